"""Training of depth predictors on the features of a frozen diffusion network (Kim et al., 2212.08861).

All branches are trained together by L1 on noised versions of the labelled images, at steps t uniform over the network's
chain. Training step s is a function of (seed, s) and of the weights before it. While a training goes on, all that a
restart needs lies beside its output, in NAME.state.safetensors; the same command goes on from it and ends with the same
weights, and the state is removed at the end. What was trained until an error or a signal is saved first. Its log lies
beside it, too, in the folder NAME_log.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import checkpoint, dist_util
from ..build import DiffusionOptions, ModelOptions, build_diffusion, build_model
from ..classes import ClassNames, stored_names
from ..errors import NonFiniteError, UserError
from ..fetch import sha256_of
from ..files import check_folder, check_space, check_writable, only_job, reason
from ..fp16_util import MixedPrecisionTrainer
from ..gaussian_diffusion import GaussianDiffusion
from ..jobs import job, mark_finished, state_file
from ..late import Tensor, no_grad, torch
from ..log_sinks import check_sinks
from ..logger import MetricLogger, Totals, open_log, totals_as_tensors, totals_of_tensors
from ..options import Options, batch_option, entry_option, option, seed_option
from ..presets import find_preset
from ..progress import progress_bar
from ..rng import seeded_torch, stream_generator
from ..training.loss_curve import draw_loss_curve
from ..training.options import DescentOptions
from .features import decoder_features, feature_channels, parse_blocks
from .pairs import SCENES, Pairs, checked_depth_range, class_names_of, read_pairs

if TYPE_CHECKING:
    from ..unet import UNetModel
    from .predictor import DepthPredictors

_log = logging.getLogger(__name__)

STATE_KIND = "depth_training"
EVALUATED_AT_ONCE = 32          # images
STATISTICS = 256                # noised images whose features tell their mean and variance
# Options that what is learnt depends on, beside the branches, the data and the network.
RECIPE = ("steps", "batch_size", "lr", "draws", "seed")
LATER = {"checkpoint_entry": "", "grad_clip": 0.0}      # those that older files say nothing of, where these are meant


@dataclass(frozen=True)
class PredictorOptions(Options):
    """Options that say what predictors are trained on, and how."""

    model: str = option("", "a diffusion model by name: a bundled one, or the flags of a released checkpoint")
    model_path: str = option("", "checkpoint of the diffusion network, .pt or .safetensors")
    checkpoint_entry: str = entry_option()
    data: str = option("", "labelled images: an .npz file (arr_0, depth), a folder with images/ and depth/, or scenes")
    depth_range: str = option("", "depths that become -1 and 1: image (each map's own), or NEAR,FAR in the units of "
                              "the files; unset: image, and of scenes the range of all of them")
    num_labels: int = option(100, "labelled images: the first ones of --data", minimum=1)
    strong_blocks: str = option("2,4,5,6,7", "decoder blocks that the strong branch reads")
    weak_blocks: str = option("6", "decoder blocks that the weak branch reads")
    steps: int = option(1500, "steps of the training", minimum=1)
    batch_size: int = batch_option(16, "noised images per step")
    lr: float = option(2e-3, "learning rate of AdamW, decays linearly to 0", above=0)
    draws: int = option(32, "noised versions of each labelled image; 0: new ones in every step", minimum=0)
    seed: int = seed_option("seed of the weights, the batches and the noise")
    cache_gb: float = option(2.0, "memory for features in GB: they are computed once if all fit, else in each step",
                             minimum=0)
    save_interval: int = option(500, "steps between two saves; a kill loses at most these", minimum=1)
    log_interval: int = option(50, "steps between two losses shown", minimum=1)

    def branches(self, model: UNetModel) -> dict[str, tuple[str, ...]]:
        """The decoder blocks that the strong and the weak branch read; UserError where the network lacks one."""
        return {name: parse_blocks(text, model, f"{name}_blocks")
                for name, text in (("strong", self.strong_blocks), ("weak", self.weak_blocks))}


@dataclass(frozen=True)
class DepthTrainOptions(PredictorOptions, DescentOptions):
    """Options of a training of predictors, and the file to write them to."""

    out: str = option("predictors.safetensors", "file for the predictors; the log lies beside it, in the folder "
                      "NAME_log")


@dataclass(frozen=True)
class Network:
    """A frozen diffusion network whose features predictors read."""

    model: UNetModel
    diffusion: GaussianDiffusion          # the whole chain
    sha256: str                           # of the checkpoint, hexadecimal
    facts: dict[str, Any]                 # options by flag name


def load_network(options: PredictorOptions, model_options: ModelOptions, diffusion_options: DiffusionOptions,
                 ) -> Network:
    """The network that the options name; raises UserError where there is none or the options don't fit it."""
    if not options.model_path:
        url = find_preset(options.model).url if options.model else None
        hint = f" (`python scripts/fetch_models.py {options.model}` fetches it from {url})" if url else ""
        raise UserError(f"--model_path is not given: name a checkpoint, or a bundled model with --model{hint}")
    diffusion_options = replace(diffusion_options, timestep_respacing="")
    facts = asdict(model_options) | asdict(diffusion_options)
    with torch.device("meta"):
        model = build_model(model_options)
    diffusion = build_diffusion(diffusion_options)
    weights = {"model_path": options.model_path}
    before = checkpoint.stamps(weights)
    checkpoint.load_into(model, options.model_path, facts, options.checkpoint_entry)
    checkpoint.ready(model, dist_util.dev())
    sha256 = sha256_of(checkpoint.locate(options.model_path))
    checkpoint.check_unchanged(weights, before)
    return Network(model, diffusion, sha256, facts)


def read_labelled(options: PredictorOptions, network: Network, data: str, count: int, flag: str,
                  seed: int = 0) -> Pairs:
    """The first `count` pairs of `data` as the network takes them; raises UserError as `read_pairs`."""
    model = network.model
    names = None
    if model.num_classes is not None and data != SCENES:
        names = known_classes(options.model_path, data, model.num_classes)
    pairs = read_pairs(data, size=model.image_size, depth_range=options.depth_range, count=count, flag=flag,
                       channels=model.in_channels, class_cond=model.num_classes is not None, seed=seed,
                       class_names=names)
    if pairs.labels is not None and model.num_classes is not None:
        least, greatest = int(pairs.labels.min()), int(pairs.labels.max())
        if not 0 <= least <= greatest < model.num_classes:
            raise UserError(f"{data}: has classes from {least} to {greatest}, the network knows 0 to "
                            f"{model.num_classes - 1}")
    return pairs


def known_classes(model_path: str, data: str, num_classes: int) -> ClassNames | None:
    """The classes that a network was trained on, None where the file does not state them.

    Raises UserError where it does not and the classes of `data` have names, but are not as many: no one knows which
    numbers the network calls them by.
    """
    names = stored_names(model_path)
    found = class_names_of(data) if names is None else None
    if found is not None and len(found) != num_classes:
        raise UserError(f"{data}: has {found}, and {model_path} has {num_classes} classes without their names; give an "
                        ".npz file whose arr_1 holds their numbers")
    return names


class NoisedFeatures:
    """Feature maps of images at numbered noised versions of them.

    Draw k of image i is a step, uniform over the chain, and noise: both functions of (seed, i, k).
    """

    def __init__(self, network: Network, pairs: Pairs, blocks: Sequence[str], seed: int) -> None:
        self.network, self.pairs, self.blocks, self.seed = network, pairs, tuple(blocks), seed
        self._kept: dict[str, Tensor] = {}          # block -> (images * draws, h, w, C) float16
        self._draws = 0

    def __call__(self, images: np.ndarray, draws: np.ndarray) -> tuple[dict[str, Tensor], Tensor]:
        """Maps (N, C, h, w) float32 by block, and t (N,) as networks see it, of N images and draws by their indices."""
        t, noise = self._noise(images, draws)
        if not self._kept:
            return features_at(self.network, self.pairs, self.blocks, images, t, noise)
        index = torch.from_numpy(images * self._draws + draws)
        maps = {name: kept[index].to(dist_util.dev()).float().movedim(3, 1) for name, kept in self._kept.items()}
        return maps, self.network.diffusion.model_timesteps(t.to(dist_util.dev()))

    def keep(self, draws: int, gigabytes: float) -> str:
        """Computes the features of that many draws of every image, if they fit; says what was done."""
        if not draws:
            return "features are computed in each step, as every step has new noise"
        count = len(self.pairs.images) * draws
        maps, _ = self(np.zeros(1, np.int64), np.zeros(1, np.int64))
        needed = count * sum(x.numel() for x in maps.values()) * 2 / 1e9
        if needed > gigabytes:
            return (f"features of {count} noised images are computed in each step, as they take {needed:.2f} GB and "
                    f"--cache_gb is {gigabytes:g}")
        kept = {name: torch.empty((count, *x.shape[2:], x.shape[1]), dtype=torch.float16) for name, x in maps.items()}
        with progress_bar(count, "features", "image") as progress:
            for start in range(0, count, EVALUATED_AT_ONCE):
                rows = np.arange(start, min(start + EVALUATED_AT_ONCE, count))
                maps, _ = self(*np.divmod(rows, draws))
                maps = {name: x.half() for name, x in maps.items()}
                if name := first_not_finite(maps):
                    raise UserError(f"--cache_gb {gigabytes:g}: must be 0, as features of block {name!r} are too large "
                                    "for the half precision in which they are kept")
                for name, x in maps.items():
                    kept[name][start:start + len(rows)] = x.movedim(1, 3)
                progress.update(len(rows))
        self._kept, self._draws = kept, draws
        return f"features of {count} noised images are kept in {needed:.2f} GB"

    def _noise(self, images: np.ndarray, draws: np.ndarray) -> tuple[Tensor, Tensor]:
        """Indices into the chain (N,), and noise like the images; no noise where the features are kept."""
        generators = [stream_generator("depth noise", self.seed, image, draw)
                      for image, draw in zip(images, draws, strict=True)]
        t = torch.tensor([int(generator.integers(self.network.diffusion.num_timesteps)) for generator in generators])
        shape = (0,) if self._kept else self.pairs.images.shape[1:]
        return t, torch.from_numpy(np.stack([generator.standard_normal(shape, np.float32) for generator in generators]))


def first_not_finite(maps: Mapping[str, Tensor]) -> str:
    """The first block whose map holds NaN or infinity, "" where none does; the device is waited for once."""
    finite = torch.stack([x.isfinite().all() for x in maps.values()]).tolist()
    return next((name for name, good in zip(maps, finite, strict=True) if not good), "")


@no_grad
def features_at(network: Network, pairs: Pairs, blocks: Sequence[str], images: np.ndarray, t: Tensor, noise: Tensor,
                ) -> tuple[dict[str, Tensor], Tensor]:
    """Maps (N, C, h, w) float32 by block of images by their indices, noised to t (N,); and t as networks see it.

    Raises NonFiniteError where the network gives NaN or infinity.
    """
    device, diffusion = dist_util.dev(), network.diffusion
    t = t.to(device)
    x_t = diffusion.q_sample(pairs.images[images].to(device), t, noise.to(device))
    y = None if pairs.labels is None else pairs.labels[images].to(device)
    seen = diffusion.model_timesteps(t)
    maps = decoder_features(network.model, blocks, x_t, seen, y, graph=False)
    if name := first_not_finite(maps):
        raise NonFiniteError(f"the network returned NaN or infinity in block {name!r}")
    return {name: x.float() for name, x in maps.items()}, seen


class PredictorTraining:
    """Trains branches, name -> blocks, on pairs; `run()` gives the predictors, which are then in the file `out`.

    descent: the largest norm of a step's gradient, and the sinks of the log; where it is given, there is a log, in the
    folder NAME_log beside the file.

    Raises UserError where `out` or the state beside it is of another training, before anything is computed.
    """

    def __init__(self, branches: Mapping[str, Sequence[str]], network: Network, pairs: Pairs, depth_range: str,
                 options: PredictorOptions, out: str | Path, descent: DescentOptions | None = None) -> None:
        from .predictor import DepthPredictors

        self.network, self.pairs, self.options, self.out = network, pairs, options, Path(out)
        self.grad_clip = descent.grad_clip if descent else 0.0
        self.state = self.out.with_name(f"{self.out.stem}.state.safetensors")
        self.descent, self.log = descent, log_folder(self.out)
        channels = {name: feature_channels(network.model, blocks) for name, blocks in branches.items()}
        self.config = {
            "branches": {name: list(blocks) for name, blocks in branches.items()}, "depth_range": depth_range,
            **{name: value for name, value in asdict(options).items() if name in RECIPE},
            **({"checkpoint_entry": options.checkpoint_entry} if options.checkpoint_entry else {}),
            **({"grad_clip": self.grad_clip} if self.grad_clip else {}),
            "num_labels": len(pairs.images), "data_sha256": digest(pairs), "network_sha256": network.sha256,
            **network.facts}
        self._check_out()
        with seeded_torch("depth weights", options.seed):
            self.predictors = DepthPredictors(channels, network.model.image_size, depth_range, network.sha256)
        self.predictors.to(dist_util.dev())
        self.optimizer = torch.optim.AdamW(self.predictors.parameters(), lr=options.lr)
        self.precision = MixedPrecisionTrainer(self.predictors)
        self.features = NoisedFeatures(network, pairs, self.predictors.blocks, options.seed)
        self.step = 0
        self._saved = 0                         # the step of the state, or of the start
        self._between_steps = True              # whether weights and moments belong to the same step, and are finite
        self._unwritten: Totals = {}            # what the log had not written at this step

    def run(self) -> DepthPredictors:
        """Trains to the last step, unless that was done before; UserError where another job does so."""
        lock = self.out.with_name(f".{self.out.name}.lock")
        finished = self.out.exists()
        if not finished or any(left.exists() for left in (lock, self.state, state_file(self.out))):
            with only_job(self.out, lock):
                if not finished:
                    with job("training", self.out, resumes=True):
                        return self._train()
                self.state.unlink(missing_ok=True)          # a kill came at the end of the training
                mark_finished(self.out)
        from .predictor import load_predictors

        _log.info("%s is finished: there is nothing to do", self.out)
        return load_predictors(self.out, dist_util.dev())

    def _train(self) -> DepthPredictors:
        from .predictor import save_predictors

        resumed = self._load()
        self._check_space()
        logger = self._logger()
        try:
            _log.info("%s", self.features.keep(self.options.draws, self.options.cache_gb))
            if not resumed:
                self._standardise()
            self._descend(logger)
            save_predictors(self.out, self.predictors, {"training": json.dumps(self.config)})
        except BaseException:
            self._rescue()
            raise
        finally:
            logger.close()
        self.state.unlink(missing_ok=True)
        checkpoint.ready(self.predictors, dist_util.dev())
        return self.predictors

    def _logger(self) -> MetricLogger:
        if self.descent is None:
            return MetricLogger(None)
        folder = check_folder("--out", self.log)
        logger = open_log(folder, self.step - self._row_due, self.descent.log, self.config, self.descent.log_online)
        logger.take(self._unwritten)
        return logger

    def _descend(self, logger: MetricLogger) -> None:
        """All steps that are left, and what is saved and logged on the way."""
        options = self.options
        row = self.step, time.monotonic()
        with progress_bar(options.steps, "training", "step", self.step) as progress:
            if self._row_due:                   # which a start was ended before
                row = self._write_row(logger, *row)
            while self.step < options.steps:
                losses = self.run_step(logger)
                progress.update()
                if self._is_shown:
                    shown = ", ".join(f"{name} {loss:.4f}" for name, loss in list(losses.items())[:2])
                    progress.note(f"L1: {shown}")
                    row = self._write_row(logger, *row)
                if self.step % options.save_interval == 0 and self.step < options.steps:
                    self._save()
                    self._draw()
        self._draw()

    def _draw(self) -> None:
        if self.descent is not None:
            draw_loss_curve(self.log / "progress.csv", self.log / "loss.png")

    @property
    def _is_shown(self) -> bool:
        return self.step % self.options.log_interval == 0 or self.step == self.options.steps

    @property
    def _row_due(self) -> bool:
        """Whether the log is to have a row at this step, which it has not."""
        return bool(self._unwritten) and self._is_shown

    def _write_row(self, logger: MetricLogger, since: int, began: float) -> tuple[int, float]:
        """Writes a row of the log, whose speed is that of the steps since the last one; returns this step and now."""
        now, images = time.monotonic(), (self.step - since) * self.options.batch_size
        logger.write(self.step, samples=self.step * self.options.batch_size,
                     **({"images_per_second": images / (now - began)} if images else {}))
        self._unwritten = logger.unwritten
        return self.step, now

    def run_step(self, logger: MetricLogger) -> dict[str, float]:
        """One update of the weights; the L1 loss of each branch before it."""
        options, count = self.options, len(self.pairs.images)
        rng = stream_generator("depth batch", options.seed, self.step)
        images = rng.integers(count, size=options.batch_size)
        draws = (rng.integers(options.draws, size=options.batch_size) if options.draws
                 else self.step * options.batch_size + np.arange(options.batch_size))
        depth = self.pairs.depth[images].to(dist_util.dev())
        losses = {name: (predicted - depth).abs().mean()
                  for name, predicted in self.predictors(*self.features(images, draws)).items()}
        sum(losses.values()).backward()
        rate = options.lr * (1 - self.step / options.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self._between_steps = False
        norm = self.precision.step(self.optimizer, self.grad_clip)
        values = {name: loss.item() for name, loss in losses.items()}
        if not all(map(math.isfinite, [norm, *values.values()])):
            raise UserError(f"--lr {options.lr:g}: the loss is not finite at step {self.step}, give a smaller one and "
                            "another --out")
        for name, value in {"lr": rate, "loss": sum(values.values()),
                            **{f"loss_{branch}": value for branch, value in values.items()}}.items():
            logger.add(name, value)
        logger.add_gradient(norm, self.grad_clip)
        self._unwritten = logger.unwritten
        self.step += 1
        self._between_steps = True
        return values

    def _standardise(self) -> None:
        count, draws = len(self.pairs.images), self.options.draws
        chosen = np.arange(min(STATISTICS, count * draws) if draws else STATISTICS)
        parts = [self.features(part % count, part // count)[0]
                 for part in np.split(chosen, range(EVALUATED_AT_ONCE, len(chosen), EVALUATED_AT_ONCE))]
        self.predictors.standardise({name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    # Files

    def _check_out(self) -> None:
        from .predictor import KIND

        if self.out.suffix != ".safetensors":
            raise UserError(f"--out {self.out}: the name must end in .safetensors")
        if not self.out.exists():
            check_writable("--out", self.out, parents=True)
        for path, kind in ((self.out, KIND), (self.state, STATE_KIND)):
            if path.exists():
                self._check_same(path, kind)

    def _check_space(self) -> None:
        """Raises UserError where the disk cannot hold the state twice, as it lies there while it is replaced."""
        weights = sum(param.numel() * param.element_size() for param in self.predictors.parameters())
        there = self.state.stat().st_size if self.state.exists() else 0
        check_space(self.out.parent, 6 * weights - there, f"--out {self.out}: cannot hold what a save writes",
                    "for weights and moments, twice while they are replaced")

    def _check_same(self, path: Path, kind: str) -> None:
        """Raises UserError where a file is not of this training, or of another kind, as a converted state is."""
        try:
            metadata = checkpoint.read_metadata(path)
            if metadata["kind"] != kind:
                raise ValueError(metadata["kind"])
            before = {**LATER, **json.loads(metadata["training"])}
        except (UserError, KeyError, TypeError, ValueError, RecursionError):
            raise UserError(f"--out {self.out}: {path} is something else, name another --out") from None
        for name, value in {**LATER, **self.config}.items():
            if before.get(name) != value:
                raise UserError(f"--out {self.out}: is of a training with {name} {before.get(name)}, not {value}; give "
                                "the same or another --out")

    def _rescue(self) -> None:
        """Saves what was trained before an error or a signal."""
        if not self._between_steps or self.step == self._saved or self.out.exists():
            return
        try:
            self._save()
            _log.info("what was trained until step %d is saved in %s", self.step, self.state)
        except Exception as fault:                              # of the two errors, the first one matters
            _log.warning("what was trained after step %d cannot be saved (%s)", self._saved, reason(fault))

    def _save(self) -> None:
        tensors = {f"predictors/{name}": value for name, value in self.predictors.state_dict().items()}
        for name, parameter in self.predictors.named_parameters():
            tensors |= {f"{key}/{name}": value for key, value in self.optimizer.state[parameter].items()}
        tensors |= {f"log/{name}": total for name, total in totals_as_tensors(self._unwritten).items()}
        checkpoint.save_state(self.state, tensors, {
            "kind": STATE_KIND, "training": json.dumps(self.config), "step": str(self.step)})
        self._saved = self.step

    def _load(self) -> bool:
        """Whether there was a state to go on from."""
        if not self.state.exists():
            return False
        tensors = checkpoint.load_state_dict(self.state, dist_util.dev())
        groups: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            group, _, rest = name.partition("/")
            groups.setdefault(group, {})[rest] = tensor
        try:
            self.predictors.load_state_dict(groups.pop("predictors"))
            for name, parameter in self.predictors.named_parameters():
                moments = {key: groups[key][name] for key in ("exp_avg", "exp_avg_sq", "step")}
                self.optimizer.state[parameter] = {**moments, "step": moments["step"].cpu()}
            self.step = self._saved = int(checkpoint.read_metadata(self.state)["step"])
            self._unwritten = totals_of_tensors(groups.get("log", {}))
        except (KeyError, ValueError, RuntimeError):
            raise UserError(f"{self.state}: is damaged; delete it to begin anew") from None
        _log.info("going on from step %d, saved in %s", self.step, self.state)
        return True


def train_predictors(options: DepthTrainOptions, model_options: ModelOptions, diffusion_options: DiffusionOptions,
                     ) -> DepthPredictors:
    """Trains a strong and a weak branch and writes their file; raises UserError where there are several ranks."""
    dist_util.one_process()
    check_sinks(options.log)
    network = load_network(options, model_options, diffusion_options)
    branches = options.branches(network.model)
    pairs = read_labelled(options, network, options.data, options.num_labels, "num_labels")
    depth_range = checked_depth_range(options.data, options.depth_range)
    return PredictorTraining(branches, network, pairs, depth_range, options, options.out, options).run()


def log_folder(out: Path) -> Path:
    """Where the log of a training lies that writes the file `out`: progress.csv, loss.png, and those of --log."""
    return out.with_name(f"{out.stem}_log")


def digest(pairs: Pairs) -> str:
    """SHA-256 of what the pairs hold."""
    result = hashlib.sha256()
    for tensor in pairs:
        if tensor is not None:
            result.update(np.ascontiguousarray(tensor.numpy()).data)
    return result.hexdigest()
