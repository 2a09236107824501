"""Depth networks trained on generated images, and tested on real ones (Kim et al., 2212.08861).

Images are sampled under each setting of a study. The strong predictor of depth-aware guidance labels them with depth, a
small depth network learns from them, and is tested on real images whose depth is known. Real images serve as the row
"real", labelled like the generated ones, and as the row "exact", with their own depth. All rows have as many images.

A study is a file `configs/dag_depth_training/NAME.yaml`, or any other:

    title, source, note       what it shows, and where it was published
    study: {option: value}    options of the command, which the command line overrules
    shared: {option: value}   options of all sampling runs
    rows: {NAME: {option: value}}       those of each; the others are compared with the first
    published: {NAME: {delta: percent, abs_rel: number}}

The output folder holds ROW (a sampling run), labels/ROW.npz, errors/ROW_SEED.npz, study.json, table.md and
results.json. A study that was stopped goes on with what is not there yet.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from guided_diffusion import dist_util
from guided_diffusion.depth.pairs import SCENES, Pairs, check_apart, read_pairs
from guided_diffusion.depth.ranges import has_ratios, parse_depth_range
from guided_diffusion.depth.reading import DepthReadingOptions, reading_networks
from guided_diffusion.depth.scenes import DEPTH_RANGE
from guided_diffusion.depth.train import digest, features_at
from guided_diffusion.errors import UserError, resumable
from guided_diffusion.fetch import sha256_of
from guided_diffusion.files import check_folder, write_json, write_text
from guided_diffusion.foreign import read_json
from guided_diffusion.late import Tensor, no_grad, torch
from guided_diffusion.npz import BatchFile, read_arrays, write_batch
from guided_diffusion.options import Options, batch_option, check_numbers, fill, option, read_yaml
from guided_diffusion.pixels import from_uint8
from guided_diffusion.places import configurations
from guided_diffusion.progress import progress_bar
from guided_diffusion.rng import seeded_torch, stream_generator
from guided_diffusion.runs.sample import SamplingRun

from ..depth_errors import depth_errors
from ..extractors.train_scenes import ScenesTrainingOptions, scenes_loss
from ..extractors.training import learning_rate_factor
from ..metrics.bootstrap import MOST_RESAMPLINGS
from .generated_report import results_of, table_of

if TYPE_CHECKING:
    from ..extractors.scenes import ScenesExtractor

LOG = logging.getLogger(__name__)

FOLDER = "dag_depth_training"           # of the studies, in configs
PARTS = ("title", "source", "note", "study", "shared", "rows", "published")
EXACT, REAL = "exact", "real"           # rows of real images: with their own depth, and labelled like the others
REAL_SEED, TEST_SEED = 3, 1             # of scenes: no bundled network was trained on either
AT_ONCE = 50                            # images that are labelled or tested together
KEPT = ("out", "bootstrap", "num_seeds")    # options that change no finished part


@dataclass(frozen=True)
class GeneratedOptions(Options):
    """How depth networks are trained on the images of a study, and tested."""

    depth_predictor: str = option("", "depth predictors, whose strong branch labels the images; unset: those of the "
                                  "model")
    label_step: int = option(50, "step of the whole chain at which the predictor reads", minimum=0)
    label_draws: int = option(4, "noised versions of an image whose depth is averaged", minimum=1)
    real: str = option("scenes", "real images to train on with their depth: an .npz file (arr_0, depth), a folder with "
                       "images/ and depth/, or scenes")
    test: str = option("scenes", "real images to test on, as --real")
    num_samples: int = option(500, "images of each row", minimum=2)
    num_test: int = option(1000, "images to test on", minimum=2)
    num_seeds: int = option(3, "trainings of each row, from seeds 0, 1, ...", minimum=2)
    steps: int = option(600, "steps of each training", minimum=1)
    batch_size: int = batch_option(32, "images per step", minimum=2)
    lr: float = option(3e-3, "learning rate of AdamW at its peak; it falls to 0 as a cosine", above=0)
    bootstrap: int = option(1000, "resamplings of seeds and test images for the intervals", minimum=2,
                           maximum=MOST_RESAMPLINGS)
    out: str = option("runs/dag_depth_training", "folder for images, labels, errors and table")


class Study(NamedTuple):
    """A study as its file says it. rows: flags of the sampling runs. published: by row and metric."""

    words: Mapping[str, str]
    options: dict[str, Any]
    rows: Mapping[str, dict[str, Any]]
    published: Mapping[str, Mapping[str, float]]
    file: Path


def study_names() -> list[str]:
    """The names of the studies that come with this library."""
    return sorted(path.stem for path in (configurations() / FOLDER).glob("*.yaml"))


def read_study(name: str) -> Study:
    """The study of that name, or in that file; raises UserError where there is none, or where it is none."""
    path = Path(name) if name.endswith(".yaml") else configurations() / FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"STUDY {name}: there is no such study, there are {', '.join(study_names())}")
    content = read_yaml(path, flag="STUDY")
    parts = {part: content.get(part) or {} for part in ("study", "shared", "rows", "published")}
    unknown = [part for part in content if part not in PARTS]
    if unknown:
        raise UserError(f"{unknown[0]} in {path}: is none of {', '.join(PARTS)}")
    wrong = [name for name, part in parts.items() if not isinstance(part, dict)]
    wrong += [f"{row} of {name}" for name in ("rows", "published") if not wrong for row, values in parts[name].items()
              if not isinstance(values, dict)]
    if wrong or not parts["rows"] or {EXACT, REAL} & parts["rows"].keys():
        raise UserError(f"{wrong[0] if wrong else 'rows'} in {path}: must be names and values, and no row may be "
                        f"called {EXACT} or {REAL}")
    for row, numbers in parts["published"].items():
        check_numbers(numbers, "published", f"of row {row} in {path}")
    options, = fill(parts["study"], [GeneratedOptions], None, f"study of {path}")
    rows = {name: {**parts["shared"], **values} for name, values in parts["rows"].items()}
    words = {part: str(content.get(part, "")) for part in ("title", "source", "note")}
    return Study(words, {name: getattr(options, name) for name in parts["study"]}, rows, parts["published"], path)


def measure_generated(study: Study, given: GeneratedOptions) -> str:
    """Samples, labels, trains and tests what is not done yet; returns the table in Markdown.

    Raises UserError, before anything is sampled, for whatever is wrong with study, options and files, and where there
    are several ranks.
    """
    dist_util.one_process("; several can sample its rows first, by image_sample.py")
    return GeneratedTraining(study, given).run()


class GeneratedTraining:
    """All parts of a study in the folder --out. Raises UserError as `measure_generated`."""

    def __init__(self, study: Study, options: GeneratedOptions) -> None:
        self.study, self.options, self.out = study, options, check_folder("--out", options.out)
        self.runs = {name: self._run_of(name, values) for name, values in study.rows.items()}
        first = next(iter(self.runs.values()))
        if first.model.in_channels != 3:
            raise UserError(f"{study.file}: its network has {first.model.in_channels} image channels, must have 3")
        path = options.depth_predictor or str(SamplingRun.preset_values({"model": first.sample.model}).get(
            "depth_predictor", ""))
        self.network, self.predictor = reading_networks(DepthReadingOptions(
            model=first.sample.model, model_path=first.sample.model_path,
            checkpoint_entry=first.sample.checkpoint_entry, depth_predictor=path), first.model, first.diffusion)
        if options.label_step >= self.network.diffusion.num_timesteps:
            raise UserError(f"--label_step {options.label_step}: must be below {self.network.diffusion.num_timesteps}, "
                            "the length of the chain")
        self.depth_range = _range_of(path)
        for flag, data in (("test", options.test), ("real", options.real)):
            if data == SCENES and self.depth_range != DEPTH_RANGE:
                raise UserError(f"--{flag} {SCENES}: their depth has --depth_range {DEPTH_RANGE}, and that of the "
                                f"predictors in {path} is {self.depth_range}; name other pairs")
        self.size = self.network.model.image_size
        self.test = self._pairs(options.test, options.num_test, "num_test", TEST_SEED)
        self._check_study(sha256_of(path))

    def _run_of(self, name: str, values: dict[str, Any]) -> SamplingRun:
        source = f"row {name} of {self.study.file}"
        run = SamplingRun.of(fill(values, SamplingRun.classes(), SamplingRun.preset_values, source))
        run = run.changed(out=str(self.out / name), num_samples=self.options.num_samples)
        for method in run.active:
            method.check_files()
        return run

    @cached_property
    def real(self) -> Pairs:
        """The real images that stand beside the generated ones."""
        return self._pairs(self.options.real, self.options.num_samples, "num_samples", REAL_SEED)

    def _pairs(self, data: str, count: int, flag: str, seed: int) -> Pairs:
        return read_pairs(data, size=self.size, depth_range=self.depth_range, count=count, flag=flag, seed=seed)

    def _check_study(self, predictor: str) -> None:
        """Raises UserError where the folder is of another study; else it is begun."""
        config = {**{name: value for name, value in asdict(self.options).items() if name not in KEPT},
                  "rows": {name: dict(values) for name, values in self.study.rows.items()},
                  "network_sha256": self.network.sha256, "predictor_sha256": predictor, **self._digests()}
        path = self.out / "study.json"
        before = read_json(path, lambda content: isinstance(content["rows"], dict)) if path.exists() else config
        for name, value in json.loads(json.dumps(config)).items():
            if before.get(name) != value:
                raise UserError(f"--out {self.out}: holds a study with {name} {before.get(name)}, not {value}; name "
                                "another folder")
        write_json(path, config)

    def _digests(self) -> dict[str, str]:
        """What tells real images from others of the same name; nothing for scenes, which are always the same."""
        options, found = self.options, {}
        if options.test != SCENES:
            found["test_sha256"] = digest(self.test)
        if options.real != SCENES:
            found["real_sha256"] = digest(self.real)
        if found:               # scenes alone are of other seeds
            check_apart(self.real, self.test, f"--test {options.test}")
        return found

    @resumable()
    def run(self) -> str:
        """Writes what is missing, and returns the table."""
        errors: dict[str, list[np.ndarray]] = {}
        for row in (EXACT, REAL, *self.runs):
            for seed in range(self.options.num_seeds):
                LOG.info("%s, training %d of %d", row, seed + 1, self.options.num_seeds)
                errors.setdefault(row, []).append(self._errors(row, seed))
        results = results_of({row: np.stack(parts) for row, parts in errors.items()}, next(iter(self.runs)),
                             self.options.bootstrap)
        text = table_of(results, self.study.words, self.study.published, self.options.num_samples,
                        self.options.num_test, self.options.num_seeds)
        write_json(self.out / "results.json", {"study": self.study.file.name, "options": asdict(self.options),
                                               "rows": results})
        write_text(self.out / "table.md", text)
        return text

    def _errors(self, row: str, seed: int) -> np.ndarray:
        """The errors of a training on the test images, (N, 3), as `depth_errors`; from their file where it is there."""
        path = self.out / "errors" / f"{row}_{seed}.npz"
        if not path.exists():
            network = train_depth_network(*self._labelled(row), self.options, seed)
            limits = parse_depth_range(self.depth_range)
            predicted = _estimated(network, self.test.images)
            path.parent.mkdir(exist_ok=True)
            write_batch(path, {"errors": depth_errors(predicted, self.test.depth, limits)})
        return _read(path, "errors", (len(self.test.images), 3))

    # Images and their depth

    def _labelled(self, row: str) -> tuple[Tensor, Tensor]:
        """The images (N, 3, S, S) of a row and their depth (N, 1, S, S) to learn, in [-1, 1]."""
        path = self.out / "labels" / f"{row}.npz"
        if row in (EXACT, REAL):
            images = self.real.images
            if row == EXACT:
                return images, self.real.depth
        else:
            images = torch.from_numpy(from_uint8(self._samples(self.runs[row])).transpose(0, 3, 1, 2))
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            write_batch(path, {"depth": self._read_depth(images)})
        return images, torch.from_numpy(_read(path, "depth", (len(images), 1, self.size, self.size)))

    def _samples(self, run: SamplingRun) -> np.ndarray:
        run.run()
        return next(BatchFile(run.samples).images([range(self.options.num_samples)]))

    @no_grad
    def _read_depth(self, images: Tensor) -> np.ndarray:
        """What the strong predictor reads of images (N, 3, S, S), the mean over noises: (N, 1, S, S) float32."""
        pairs, parts, draws = Pairs(images, torch.empty(0), None), [], self.options.label_draws
        with progress_bar(len(images), "labels", "image") as progress:
            for start in range(0, len(images), AT_ONCE):
                chosen = np.arange(start, min(start + AT_ONCE, len(images)))
                depth = [self.predictor(*features_at(
                    self.network, pairs, self.predictor.blocks, chosen,
                    torch.full((len(chosen),), self.options.label_step), self._noise(chosen, draw, images.shape[1:])))
                    for draw in range(draws)]
                parts.append(torch.stack(depth).mean(dim=0).clamp(-1, 1).cpu().numpy())
                progress.update(len(chosen))
        return np.concatenate(parts)

    @staticmethod
    def _noise(images: np.ndarray, draw: int, shape: tuple[int, ...]) -> Tensor:
        return torch.from_numpy(np.stack([stream_generator("depth label noise", 0, int(image), draw).standard_normal(
            shape, np.float32) for image in images]))


def _range_of(path: str) -> str:
    """The depth range that the predictors in a file learnt; raises UserError where it has no units."""
    from guided_diffusion.depth.predictor import load_predictors

    depth_range = load_predictors(path).depth_range
    if not has_ratios(parse_depth_range(depth_range)):
        raise UserError(f"{path}: its predictors learnt depth with --depth_range {depth_range}; delta and AbsRel need "
                        "NEAR,FAR, both above 0")
    return depth_range


def _read(path: Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
    array, = read_arrays(path, [name], f"{path}: is damaged, remove it")
    if array is None or array.shape != shape:
        raise UserError(f"{path}: has no {name} of {shape}, remove it")
    return array


# The depth network


def train_depth_network(images: Tensor, depth: Tensor, options: GeneratedOptions, seed: int) -> ScenesExtractor:
    """A depth network, of the architecture of the extractor of scenes, trained by L1 of depth and of its differences.

    images: (N, 3, S, S), depth: (N, 1, S, S), both in [-1, 1]; half of them are mirrored. The weights are a function of
    these, of the options and of the seed.
    """
    from ..extractors.bundled import channels_last
    from ..extractors.scenes import ScenesExtractor

    with seeded_torch("depth network weights", seed):
        network = channels_last(ScenesExtractor()).to(dist_util.dev())
    optimizer = torch.optim.AdamW(network.parameters(), options.lr, weight_decay=ScenesTrainingOptions.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(
        learning_rate_factor, warm_up=max(1, options.steps // 10), total=options.steps))
    recipe = replace(ScenesTrainingOptions(), class_weight=0.0)         # of kinds nothing is known
    with progress_bar(options.steps, "training", "step") as progress:
        for step in range(options.steps):
            rng = stream_generator("depth network batch", seed, step)
            chosen, mirrored = rng.integers(len(images), size=options.batch_size), rng.random(options.batch_size) < 0.5
            pair = torch.cat([images[chosen], depth[chosen]], dim=1)
            pair[mirrored] = pair[mirrored].flip(3)
            pair = pair.to(dist_util.dev())
            kinds = torch.zeros(len(pair), dtype=torch.int64, device=pair.device)
            loss = scenes_loss(network, pair[:, :3], pair[:, 3:], kinds, recipe)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.update()
    return network.eval()


@no_grad
def _estimated(network: ScenesExtractor, images: Tensor) -> Tensor:
    return torch.cat([network(part.to(dist_util.dev()))[0].cpu() for part in images.split(AT_ONCE)])
