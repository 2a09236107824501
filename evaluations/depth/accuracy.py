"""How well depth can be read from a network's features, by block, by step and by number of labels (arXiv 2212.08861).

It is measured on held-out pairs, at steps spread evenly over the chain; each image is noised anew at each step:
    l1          mean |d - d*| of depths in [-1, 1]
    abs_rel     mean |d - d*| / d*, in the units of --depth_range NEAR,FAR; none where each map has its own range, or
                NEAR is not above 0
    delta       share of pixels with max(d / d*, d* / d) < 1.25, likewise
l1_error is the standard error of l1 over the held-out images. The branch "mean depth" is the mean of the labelled maps,
which tells what is known without an image.

The output folder holds labels_N.safetensors (the predictors that N labels give; a run that was stopped goes on from
them), blocks.csv, timesteps.csv, labels.csv, accuracy.png and .svg, verdict.txt, and config.json.
"""

from __future__ import annotations

import csv
import json
import logging
import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from guided_diffusion import dist_util
from guided_diffusion.build import DiffusionOptions, ModelOptions
from guided_diffusion.depth.features import decoder_blocks
from guided_diffusion.depth.pairs import SCENES, Pairs, check_apart, checked_depth_range
from guided_diffusion.depth.ranges import has_ratios, parse_depth_range
from guided_diffusion.depth.scenes import DEPTH_RANGE
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
from guided_diffusion.files import reason, write_csv, write_json, write_text
from guided_diffusion.jobs import job, job_folder
from guided_diffusion.late import no_grad, torch
from guided_diffusion.options import option
from guided_diffusion.progress import progress_bar
from guided_diffusion.rng import stream_generator

from ..depth_errors import depth_errors
from ..plots import require_matplotlib
from .accuracy_report import MEAN_DEPTH, AccuracyRow, accuracy_verdict, draw_accuracy

if TYPE_CHECKING:
    from guided_diffusion.depth.predictor import DepthPredictors

_log = logging.getLogger(__name__)

HELD_OUT_SEED = 1          # of scenes; the labelled ones are of seed 0
METRICS = ("l1", "l1_error", "abs_rel", "delta")


@dataclass(frozen=True)
class DepthAccuracyOptions(PredictorOptions):
    """The study: what predictors are trained on, and how, and what they are measured on."""

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
    """Runs the whole study and returns the verdict.

    Raises UserError for whatever is wrong with the options, and where there are several ranks, before anything is
    trained.
    """
    dist_util.one_process()
    require_matplotlib("the figure needs")
    held_out = options.held_out or (SCENES if options.data == SCENES else "")
    if not held_out:
        raise UserError("--held_out is not given: name pairs that are not in --data")
    # What is measured on has the range of what is learnt on, also where only one of the two is scenes.
    options = replace(options, depth_range=checked_depth_range(options.data, options.depth_range))
    if options.data and held_out == SCENES and options.depth_range != DEPTH_RANGE:
        raise UserError(f"--held_out {SCENES}: their depth has --depth_range {DEPTH_RANGE}, and --data {options.data} "
                        f"is read with {options.depth_range}; give --depth_range {DEPTH_RANGE} where its depth is in "
                        "metres as well, or other pairs to measure on")
    network = load_network(options, model_options, diffusion_options)
    if not has_ratios(parse_depth_range(options.depth_range)):
        dist_util.say(f"--depth_range {options.depth_range}: abs_rel and delta are not measured, which need NEAR,FAR, "
                      "both above 0")
    if options.num_timesteps > network.diffusion.num_timesteps:
        raise UserError(f"--num_timesteps {options.num_timesteps}: must be at most {network.diffusion.num_timesteps}, "
                        "the length of the chain")
    labelled = read_labelled(options, network, options.data, max(options.counts), "label_counts")
    held = read_labelled(options, network, held_out, options.num_held_out, "num_held_out", seed=HELD_OUT_SEED)
    check_apart(labelled, held, f"--held_out {held_out}")
    return AccuracyStudy(network, labelled, held, options).run()


class AccuracyStudy:
    """Trains on the first pairs of `labelled`, as many as each of --label_counts says, and measures on `held`.

    Raises UserError as it is made, where the output folder holds another study or a block does not exist.
    """

    def __init__(self, network: Network, labelled: Pairs, held: Pairs, options: DepthAccuracyOptions) -> None:
        self.network, self.held, self.options = network, held, options
        self.depth_range = options.depth_range
        self.blocks = decoder_blocks(network.model)
        self.guiding = options.branches(network.model)
        self.out = job_folder("depth accuracy", options.out)
        self._check_config()
        self.labels = {count: _first_pairs(labelled, count) for count in options.counts}
        self.trainings = {count: self._training(count) for count in options.counts}

    def run(self) -> str:
        """Writes all files and returns the verdict."""
        with job("depth accuracy", self.out, resumes=True):
            return self._run()

    def _run(self) -> str:
        tables = [self._read_table(name) for name in ("blocks", "timesteps", "labels")]
        if not all(tables):
            predictors = {}
            for count in self.options.counts:
                _log.info("%d labels, %d noised versions of each", count, self.options.draws_of(count))
                predictors[count] = self.trainings.pop(count).run()          # whose features can then be forgotten
            tables = self._tables(self._errors(predictors))
        else:
            _log.info("the tables in %s are finished", self.out)
        blocks, timesteps, labels = tables
        draw_accuracy(self.out, blocks, timesteps, labels)
        text = accuracy_verdict(blocks, labels, self.options.num_labels)
        write_text(self.out / "verdict.txt", text)
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

    @no_grad
    def _errors(self, predictors: dict[int, DepthPredictors]) -> dict[tuple[int, str], np.ndarray]:
        """The errors l1, abs_rel and delta by number of labels and branch, (steps, images, 3)."""
        blocks = list(dict.fromkeys(name for p in predictors.values() for name in p.blocks))
        count, limits = len(self.held.images), parse_depth_range(self.depth_range)
        errors: dict[tuple[int, str], list[np.ndarray]] = {}
        with progress_bar(count * len(self.steps), "measuring", "image") as progress:
            for step, t in enumerate(self.steps):
                for start in range(0, count, EVALUATED_AT_ONCE):
                    images = np.arange(start, min(start + EVALUATED_AT_ONCE, count))
                    noise = np.stack([self._noise(int(image), step) for image in images])
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

    def _noise(self, image: int, step: int) -> np.ndarray:
        """The noise (C, H, W) of a held-out image at one of `steps`, by its place."""
        generator = stream_generator("held-out noise", self.options.seed, image, step)
        return generator.standard_normal(self.held.images.shape[1:], np.float32)

    def _tables(self, errors: dict[tuple[int, str], np.ndarray]) -> list[list[AccuracyRow]]:
        """Writes the tables blocks, timesteps and labels as CSV, and returns them."""
        count = self.options.num_labels
        named = {**{block: errors[count, _key(block)] for block in self.blocks},
                 **{name: errors[count, name] for name in (*self.guiding, MEAN_DEPTH)}}
        tables = {
            "blocks": [{"branch": name, **_summary(values)} for name, values in named.items()],
            "timesteps": [{"t": t, "branch": name, **_summary(values[step:step + 1])}
                          for step, t in enumerate(self.steps) for name, values in named.items()],
            "labels": [{"labels": labels, "branch": name, **_summary(values)}
                       for (labels, name), values in errors.items() if name in (*self.guiding, MEAN_DEPTH)]}
        for name, rows in tables.items():
            write_csv(self.out / f"{name}.csv", rows)
        return [self._read_table(name) for name in tables]          # as a later run would see them

    # Files

    def _read_table(self, name: str) -> list[AccuracyRow]:
        """The rows of a finished table; an empty list where it is not there."""
        path = self.out / f"{name}.csv"
        if not path.exists():
            return []
        with path.open(newline="") as file:
            return [{key: value if key == "branch" else int(value) if key in ("t", "labels") else
                     float(value) if value else math.nan for key, value in row.items()} for row in csv.DictReader(file)]

    def _check_config(self) -> None:
        """Raises UserError where the folder is of another study; else it is begun."""
        kept = {"save_interval", "log_interval", "cache_gb", "out", "model", "model_path"}
        kept |= set() if self.options.checkpoint_entry else {"checkpoint_entry"}        # older studies know none
        config = {**{name: value for name, value in asdict(self.options).items() if name not in kept},
                  "network_sha256": self.network.sha256, "held_out_sha256": digest(self.held)}
        path = self.out / "config.json"
        try:
            before = json.loads(path.read_text()) if path.exists() else config
            changed = [name for name, value in config.items() if before.get(name) != value]
        except OSError as error:
            raise UserError(f"--out {self.out}: its config.json cannot be read ({reason(error)})") from None
        except (ValueError, AttributeError, RecursionError):
            raise UserError(f"--out {self.out}: its config.json is not one of an accuracy study, name another "
                            "folder") from None
        if changed:
            name = changed[0]
            raise UserError(f"--out {self.out}: holds a study with {name} {before.get(name)}, not {config[name]}; give "
                            "the same or another --out")
        write_json(path, config)


def _first_pairs(pairs: Pairs, count: int) -> Pairs:
    labels = None if pairs.labels is None else pairs.labels[:count]
    return Pairs(pairs.images[:count], pairs.depth[:count], labels)


def _summary(values: np.ndarray) -> AccuracyRow:
    """The means of errors (steps, images, 3), by the names in METRICS."""
    images = values.mean(axis=0)
    l1, abs_rel, delta = images.mean(axis=0)
    return dict(zip(METRICS, (l1, images[:, 0].std(ddof=1) / len(images) ** 0.5, abs_rel, delta), strict=True))


def _key(block: str) -> str:
    """A block's name as that of a branch, which can hold no dot."""
    return block.replace(".", "_")
