"""How well depth can be read from a network's features: by block, by step and by number of labels (2212.08861).

Measured on held-out pairs, at steps spread evenly over the chain, each held-out image noised anew at each step:
    l1          mean |d - d*| of depths in [-1, 1]
    abs_rel     mean |d - d*| / d*, in the units of --depth_range NEAR,FAR; none where each map has its own range
    delta       share of pixels with max(d / d*, d* / d) < 1.25, likewise
l1_error is the standard error of l1 over the held-out images. The branch "mean depth" is the mean of the labelled maps:
what is known without an image.

The output folder holds labels_N.safetensors (the predictors that N labels give; a run that was stopped goes on from
them), blocks.csv, timesteps.csv, labels.csv, accuracy.png and .svg, verdict.txt, and config.json.
"""

from __future__ import annotations

import csv
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from guided_diffusion import dist_util
from guided_diffusion.build import DiffusionOptions, ModelOptions
from guided_diffusion.depth.features import decoder_blocks, parse_blocks
from guided_diffusion.depth.pairs import SCENES, Pairs, checked_depth_range
from guided_diffusion.depth.predictor import DepthPredictors
from guided_diffusion.depth.ranges import from_unit_range, parse_depth_range
from guided_diffusion.depth.train import (
    EVALUATED_AT_ONCE,
    Network,
    PredictorOptions,
    PredictorTraining,
    digest,
    features_at,
    load_network,
    read_labelled,
)
from guided_diffusion.errors import UserError
from guided_diffusion.files import write, write_csv
from guided_diffusion.options import option
from guided_diffusion.progress import progress_bar
from guided_diffusion.rng import stream_generator

_log = logging.getLogger(__name__)

HELD_OUT_SEED = 1          # of scenes; the labelled ones are of seed 0
MEAN_DEPTH = "mean depth"
THRESHOLD = 1.25
CLOSE = 1.1                # L1 with few labels against L1 with many, up to which it counts as close
METRICS = ("l1", "l1_error", "abs_rel", "delta")

Row = dict[str, Any]


@dataclass(frozen=True)
class DepthAccuracyOptions(PredictorOptions):
    """What predictors are trained on, and how, and what they are measured on."""

    steps: int = option(1000, "steps of each training", minimum=1)
    held_out: str = option("", "pairs to measure on, as --data; unset: scenes of another seed, with --data scenes")
    num_held_out: int = option(500, "number of these", minimum=2)
    num_timesteps: int = option(10, "steps of the chain at which is measured", minimum=1)
    label_counts: str = option("10,30,100,300,1000", "numbers of labels to compare; --draws is for --num_labels, and "
                               "in proportion for others, so that all see as many noised images")
    out: str = option("runs/depth_accuracy", "folder for predictors, tables, figure and verdict")

    @property
    def counts(self) -> tuple[int, ...]:
        """Rising numbers of labels, --num_labels among them."""
        try:
            counts = {int(part) for part in self.label_counts.split(",")}
        except ValueError:
            counts = {0}
        if min(counts) < 1:
            raise UserError(f"--label_counts {self.label_counts}: must be numbers of at least 1, with commas")
        return tuple(sorted(counts | {self.num_labels}))

    def draws_of(self, count: int) -> int:
        """Noised versions of each of `count` labelled images."""
        return math.ceil(self.draws * self.num_labels / count)


def measure_accuracy(options: DepthAccuracyOptions, model_options: ModelOptions, diffusion_options: DiffusionOptions,
                     ) -> str:
    """The whole study; returns the verdict."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("the figure needs matplotlib: install the extra `eval`") from None
    network = load_network(options, model_options, diffusion_options)
    held_out = options.held_out or (SCENES if options.data == SCENES else "")
    if not held_out:
        raise UserError("--held_out is not given: name pairs that are not in --data")
    # What is measured on has the range of what is learnt on, also where only one of the two is scenes.
    options = replace(options, depth_range=checked_depth_range(options.data, options.depth_range))
    labelled = read_labelled(options, network, options.data, max(options.counts), "label_counts")
    held = read_labelled(options, network, held_out, options.num_held_out, "num_held_out", seed=HELD_OUT_SEED)
    return AccuracyStudy(network, labelled, held, options).run()


class AccuracyStudy:
    """Trains on the first pairs of `labelled`, as many as each of --label_counts says, and measures on `held`.

    Raises UserError as it is made, where the output folder holds another study or a block does not exist.
    """

    def __init__(self, network: Network, labelled: Pairs, held: Pairs, options: DepthAccuracyOptions) -> None:
        self.network, self.held, self.options, self.out = network, held, options, Path(options.out)
        self.depth_range = options.depth_range
        self.blocks = decoder_blocks(network.model)
        self.guiding = {name: parse_blocks(text, network.model, f"{name}_blocks")
                        for name, text in (("strong", options.strong_blocks), ("weak", options.weak_blocks))}
        self._check_out()
        self.labels = {count: Pairs(*(x if x is None else x[:count] for x in labelled)) for count in options.counts}
        self.trainings = {count: self._training(count) for count in options.counts}

    def run(self) -> str:
        """The verdict; all files are then written."""
        tables = [self._read(name) for name in ("blocks", "timesteps", "labels")]
        if not all(tables):
            predictors = {}
            for count in self.options.counts:
                _log.info("%d labels, %d noised versions of each", count, self.options.draws_of(count))
                predictors[count] = self.trainings.pop(count).run()          # whose features can then be forgotten
            tables = self._tables(self._errors(predictors))
        else:
            _log.info("the tables in %s are finished", self.out)
        draw(self.out, *tables)
        text = verdict(*tables, self.options.num_labels)
        write(self.out / "verdict.txt", lambda path: path.write_text(text))
        return text

    def _training(self, count: int) -> PredictorTraining:
        """At --num_labels every block has a branch of its own, beside those of guidance."""
        options = replace(self.options, draws=self.options.draws_of(count))
        alone = {_key(block): (block,) for block in self.blocks} if count == options.num_labels else {}
        return PredictorTraining({**self.guiding, **alone}, self.network, self.labels[count], self.depth_range, options,
                                 self.out / f"labels_{count}.safetensors")

    # Measuring

    @property
    def steps(self) -> list[int]:
        """The indices into the chain: the middles of equal parts."""
        parts = self.options.num_timesteps
        return [int((part + 0.5) * self.network.diffusion.num_timesteps / parts) for part in range(parts)]

    @torch.no_grad()
    def _errors(self, predictors: dict[int, DepthPredictors]) -> dict[tuple[int, str], np.ndarray]:
        """By number of labels and branch: (steps, images, 3), l1, abs_rel and delta."""
        blocks = list(dict.fromkeys(name for p in predictors.values() for name in p.blocks))
        count, limits = len(self.held.images), parse_depth_range(self.depth_range)
        errors: dict[tuple[int, str], list[np.ndarray]] = {}
        with progress_bar(count * len(self.steps), "measuring", "img") as progress:
            for number, t in enumerate(self.steps):
                for start in range(0, count, EVALUATED_AT_ONCE):
                    images = np.arange(start, min(start + EVALUATED_AT_ONCE, count))
                    noise = np.stack([self._rng(image, number).standard_normal(self.held.images.shape[1:], np.float32)
                                      for image in images])
                    maps, seen = features_at(self.network, self.held, blocks, images, torch.full((len(images),), t),
                                             torch.from_numpy(noise))
                    depth = self.held.depth[images].to(dist_util.dev())
                    for labels, branches in predictors.items():
                        for name, predicted in branches(maps, seen).items():
                            errors.setdefault((labels, name), []).append(depth_errors(predicted, depth, limits))
                        mean = self.labels[labels].depth.mean(dim=0, keepdim=True).to(depth)
                        errors.setdefault((labels, MEAN_DEPTH), []).append(depth_errors(mean, depth, limits))
                    progress.update(len(images))
        return {key: np.concatenate(parts).reshape(len(self.steps), count, 3) for key, parts in errors.items()}

    def _rng(self, image: int, step: int) -> np.random.Generator:
        return stream_generator("held-out noise", self.options.seed, image, step)

    def _tables(self, errors: dict[tuple[int, str], np.ndarray]) -> list[list[Row]]:
        """blocks, timesteps and labels, also written as CSV."""
        count = self.options.num_labels
        named = {**{block: errors[count, _key(block)] for block in self.blocks},
                 **{name: errors[count, name] for name in (*self.guiding, MEAN_DEPTH)}}
        tables = {
            "blocks": [{"branch": name, **_summary(values)} for name, values in named.items()],
            "timesteps": [{"t": t, "branch": name, **_summary(values[number:number + 1])}
                          for number, t in enumerate(self.steps) for name, values in named.items()],
            "labels": [{"labels": labels, "branch": name, **_summary(values)}
                       for (labels, name), values in errors.items() if name in (*self.guiding, MEAN_DEPTH)]}
        for name, rows in tables.items():
            write_csv(self.out / f"{name}.csv", rows)
        return [self._read(name) for name in tables]          # as a later run would see them

    # Files

    def _read(self, name: str) -> list[Row]:
        """The rows of a finished table; none where it is not there."""
        path = self.out / f"{name}.csv"
        if not path.exists():
            return []
        with path.open(newline="") as file:
            return [{key: value if key == "branch" else int(value) if key in ("t", "labels") else
                     float(value) if value else math.nan for key, value in row.items()} for row in csv.DictReader(file)]

    def _check_out(self) -> None:
        """Raises UserError where the folder is of another study; else it is begun."""
        kept = ("save_interval", "log_interval", "cache_gb", "out", "model", "model_path")
        config = {**{name: value for name, value in asdict(self.options).items() if name not in kept},
                  "network_sha256": self.network.sha256, "held_out_sha256": digest(self.held)}
        path = self.out / "config.json"
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            before = json.loads(path.read_text()) if path.exists() else config
            changed = [name for name, value in config.items() if before.get(name) != value]
        except OSError as error:
            raise UserError(f"--out {self.out}: cannot be written ({error.strerror})") from None
        except (ValueError, AttributeError):
            raise UserError(f"--out {self.out}: its config.json is not one of an accuracy study, name another "
                            "folder") from None
        if changed:
            name = changed[0]
            raise UserError(f"--out {self.out}: holds a study with {name} {before.get(name)}, not {config[name]}; give "
                            "the same or another --out")
        write(path, lambda file: file.write_text(json.dumps(config, indent=2) + "\n"))


def depth_errors(predicted: Tensor, depth: Tensor, limits: tuple[float, float] | None) -> np.ndarray:
    """(N, 3): l1, abs_rel and delta of each depth map; the last two NaN without limits or where NEAR is not above 0.

    predicted, depth: (N, 1, h, w) in [-1, 1], where one map may stand for all; limits: NEAR and FAR.
    """
    predicted = predicted.clamp(-1, 1).expand_as(depth)
    l1 = (predicted - depth).abs().mean(dim=(1, 2, 3))
    if limits is None or limits[0] <= 0:
        return np.stack([l1.cpu().numpy(), *np.full((2, len(depth)), np.nan)], axis=1)
    metres, true = (from_unit_range(maps.clamp(-1, 1), *limits) for maps in (predicted, depth))
    relative = ((metres - true).abs() / true).mean(dim=(1, 2, 3))
    near = (torch.maximum(metres / true, true / metres) < THRESHOLD).float().mean(dim=(1, 2, 3))
    return torch.stack([l1, relative, near], dim=1).double().cpu().numpy()


def _summary(values: np.ndarray) -> Row:
    """The metrics of (steps, images, 3)."""
    images = values.mean(axis=0)
    l1, abs_rel, delta = images.mean(axis=0)
    return dict(zip(METRICS, (l1, images[:, 0].std(ddof=1) / len(images) ** 0.5, abs_rel, delta), strict=True))


# Words and pictures


def verdict(blocks: Sequence[Row], timesteps: Sequence[Row], labels: Sequence[Row], num_labels: int) -> str:
    """What the tables say of the paper's two findings."""
    alone = [row for row in blocks if row["branch"].startswith("output.")]
    others = {row["branch"]: row for row in blocks if row not in alone}
    place = min(range(len(alone)), key=lambda index: alone[index]["l1"])
    best, first, last = alone[place], alone[0], alone[-1]
    middle = range(len(alone) // 4, len(alone) - len(alone) // 4)
    is_middle = place in middle and all(end["l1"] - best["l1"] > 2 * math.hypot(best["l1_error"], end["l1_error"])
                                        for end in (first, last))
    lines = [
        f"Held-out L1 of depths in [-1, 1], {num_labels} labels, over all steps (standard error in brackets):",
        *(f"  {row['branch']:10} {_shown(row)}" for row in blocks),
        "",
        f"Middle blocks are best: {'confirmed' if is_middle else 'not confirmed'}.",
        f"  The best block alone is {best['branch']} of {first['branch']} to {last['branch']}. Confirmed means: it is "
        f"one of {alone[middle[0]]['branch']} to {alone[middle[-1]]['branch']}, and better than the first and the last "
        "by more than two standard errors.",
        "",
        *_label_lines(labels, num_labels),
        f"Depth that is the same for every image (the mean of the labels) has L1 {_shown(others[MEAN_DEPTH])}; the "
        f"strong branch is {_better(others['strong'], others['weak'])} than the weak one.",
        ""]
    return "\n".join(lines)


def _label_lines(labels: Sequence[Row], num_labels: int) -> list[str]:
    lines = []
    most = max(row["labels"] for row in labels)
    if most == num_labels:
        return [f"Whether {num_labels} labels are enough: not tested, as none of --label_counts is larger.", ""]
    for branch in ("strong", "weak"):
        rows = {row["labels"]: row for row in labels if row["branch"] == branch}
        ratio = rows[num_labels]["l1"] / rows[most]["l1"]
        word = "confirmed" if ratio <= CLOSE else "not confirmed"
        lines += [f"{num_labels} labels are close to {most}, {branch} branch: {word}.",
                  f"  L1 by number of labels: {', '.join(f'{n}: {_shown(row)}' for n, row in rows.items())}; "
                  f"{num_labels} against {most}: {ratio:.2f} times. Confirmed means: at most {CLOSE:g} times.", ""]
    return lines


def _better(row: Row, other: Row) -> str:
    return f"{100 * (1 - row['l1'] / other['l1']):.0f} % better"


def _shown(row: Row) -> str:
    return f"{row['l1']:.4f} ({row['l1_error']:.4f})"


def draw(folder: Path, blocks: Sequence[Row], timesteps: Sequence[Row], labels: Sequence[Row]) -> None:
    """accuracy.png and accuracy.svg: L1 by block, by step, and by number of labels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    by_block, by_step, by_count = figure.subplots(1, 3)
    alone = [row for row in blocks if row["branch"].startswith("output.")]
    by_block.bar(range(len(alone)), [row["l1"] for row in alone], yerr=[2 * row["l1_error"] for row in alone],
                 tick_label=[row["branch"].removeprefix("output.") for row in alone], color="tab:blue")
    styles = {"strong": ("tab:green", "-"), "weak": ("tab:orange", "-"), MEAN_DEPTH: ("0.5", ":")}
    for name, (colour, style) in styles.items():
        l1 = next(row["l1"] for row in blocks if row["branch"] == name)
        by_block.axhline(l1, color=colour, linestyle=style if style == ":" else "--", label=name)
        for axes, rows, key in ((by_step, timesteps, "t"), (by_count, labels, "labels")):
            chosen = [row for row in rows if row["branch"] == name]
            axes.errorbar([row[key] for row in chosen], [row["l1"] for row in chosen], color=colour, linestyle=style,
                          yerr=[2 * row["l1_error"] for row in chosen], marker="." if style == "-" else "", label=name)
    by_block.set(xlabel="decoder block alone", title="By block")
    by_step.set(xlabel="t", title="By step")
    by_count.set(xlabel="labelled images", title="By number of labels", xscale="log")
    for axes in (by_block, by_step, by_count):
        axes.set_ylabel("L1 of depth in [-1, 1], held out")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    for suffix in ("png", "svg"):
        metadata = {"Date": None} if suffix == "svg" else {}
        write(folder / f"accuracy.{suffix}",
              lambda path, suffix=suffix, metadata=metadata: figure.savefig(path, dpi=120, format=suffix,
                                                                            metadata=metadata))


def _key(block: str) -> str:
    """A block's name as that of a branch, which can hold no dot."""
    return block.replace(".", "_")
