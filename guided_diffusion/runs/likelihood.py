"""Likelihoods of images: the variational bound in bits per dimension, in chunks as a sampling run.

Image i is that of number i in its data, and its noise depends on (seed, i) and the step alone. The chunks stay in the
folder, so that a larger number of images goes on from them:

    OUT/likelihoods/000123.npz  a chunk: total_bpd, prior_bpd (n,), and each term by step, (n, T)
    OUT/bpd.npz                 total_bpd, prior_bpd (N,), labels (N,) where the network has classes
    OUT/vb_terms.npz, mse_terms.npz, xstart_mse_terms.npz    arr_0 (T,): the mean of each term, from step T - 1 down to
                                0, as the official code writes them
    OUT/terms.csv               the same by step, with intervals
    OUT/run.json                configuration, result and times, written last
"""

from __future__ import annotations

import itertools
import json
import logging
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from .. import checkpoint, dist_util
from ..build import DiffusionOptions, ModelOptions, build_diffusion, build_model
from ..classes import CLASS_RULES, stored_names
from ..digests import data_digest
from ..errors import NonFiniteError, UserError
from ..fetch import public_values, sha256_of, without_secrets
from ..files import check_folder, write_csv, write_json
from ..guidance import Networks
from ..image_datasets import TrainingImages, open_images
from ..jobs import job
from ..late import Tensor, torch
from ..npz import write_batch
from ..options import batch_option, option, seed_option
from ..process import DiffusionProcess
from ..rng import image_noise
from . import shards
from .chunk_files import REMEDY, ChunkFiles
from .chunks import Indices
from .folders import default_folder
from .options import MOST_IMAGES, CheckpointOptions
from .record import MODEL_FLAG, READ_ERRORS, made_by
from .work import make_chunks
from .workers import WorkQueue

TERMS = ("vb", "mse", "xstart_mse")
NORMAL_95 = 1.959963984540054           # standard errors on each side of a mean that hold 95 %
IRRELEVANT = ("out", "overwrite", "log_every", "model", "num_samples")

_log = logging.getLogger(__name__)


class Estimate(NamedTuple):
    """A mean over images, and the ends of its 95 % interval; of one image there is none, the ends are NaN."""

    mean: float
    low: float
    high: float

    def known(self) -> dict[str, float]:
        """Those of the three that there are, by name."""
        return {name: value for name, value in self._asdict().items() if not np.isnan(value)}


def estimate(total: float, squares: float, count: int) -> Estimate:
    """The mean of `count` values and its normal interval, from their sum and the sum of their squares."""
    mean = total / count
    if count < 2:
        return Estimate(mean, np.nan, np.nan)
    error = NORMAL_95 * (max(0.0, squares - total * mean) / (count - 1) / count) ** 0.5
    return Estimate(mean, mean - error, mean + error)


@dataclass(frozen=True)
class LikelihoodOptions(CheckpointOptions):
    """The likelihoods."""

    data_dir: str = option("", "folder of images or IDX files, or an .npz file of images; fashion-mnist: where Debian "
                           "installs it")
    split: str = option("train", "of IDX files: train or test", choices=("train", "test"))
    classes: str = option("", "how the classes of an image folder are told: prefix (of the file name, before the first "
                          "_) or folders (below --data_dir); unset: prefix, and folders where prefixes tell none apart",
                          choices=CLASS_RULES)
    num_samples: int = option(1000, "number of images, the first ones in the order of their names; all where there are "
                              "fewer", minimum=1, maximum=MOST_IMAGES)
    batch_size: int = batch_option(1, "images at a time on each rank, and in a chunk")
    clip_denoised: bool = option(True, "clip the predicted image to [-1, 1] at each step")
    seed: int = seed_option("seed of the noise")
    out: str = option("", "folder for the results and the record; unset: likelihoods/NAME-FINGERPRINT, named by the "
                      "model and by what the results depend on")
    overwrite: bool = option(False, "begin anew, and replace what is in that folder")
    log_every: int = option(0, "a plain line of progress every so many images, in place of the bar; 0: the bar",
                            minimum=0)


@dataclass(frozen=True)
class LikelihoodChunks(ChunkFiles):
    """The finished chunks of a run."""

    FOLDER: ClassVar = "likelihoods"
    CONTENT: ClassVar = "likelihoods"

    def identify(self, configuration: Mapping[str, Any], sha256: Mapping[str, str]) -> dict[str, Any]:
        """All options that a likelihood depends on, and digests of the network's file and of the images."""
        return {**{name: value for name, value in configuration.items() if name not in IRRELEVANT},
                "model_path": sha256["model"], "data_dir": sha256["data"]}

    def is_whole(self, arrays: Mapping[str, np.ndarray], count: int) -> bool:
        """Whether these arrays are those of a chunk of `count` images."""
        terms = [arrays[name] for name in TERMS]
        return (arrays["total_bpd"].shape == arrays["prior_bpd"].shape == (count,)
                and all(array.ndim == 2 and array.shape == (count, terms[0].shape[1]) for array in terms))

    @property
    def record(self) -> Path:
        """The file that says of the finished run what its likelihoods depend on, and their mean."""
        return self.out / "run.json"

    def made_ready(self, overwrite: bool) -> Indices:
        """As `ChunkFiles.made_ready`; raises UserError also where the folder holds samples or another record."""
        samples = self.out / shards.Shards.FOLDER
        if overwrite:
            self.record.unlink(missing_ok=True)
            shutil.rmtree(samples, ignore_errors=True)
        elif (samples / "run.json").exists():
            raise UserError(f"--out {self.out}: holds samples, finished or not; {REMEDY}")
        elif self.record.exists() and not self._is_of_likelihoods():
            raise UserError(f"--out {self.out}: its {self.record.name} is of another kind of run, or unreadable; "
                            f"{REMEDY}")
        return super().made_ready(overwrite)

    def _is_of_likelihoods(self) -> bool:
        try:
            return "bits_per_dimension" in json.loads(self.record.read_text())
        except READ_ERRORS:
            return False


@dataclass(frozen=True)
class LikelihoodMeter:
    """What measures images.

    network: called with (x, t), and y where it has classes. seed: of the noise. size: images of an evaluation.
    """

    network: Callable[..., Tensor]
    process: DiffusionProcess
    seed: int = 0
    size: int = 1
    clip_denoised: bool = True

    def terms(self, image_ids: Sequence[int], images: Tensor, cond: Mapping[str, Tensor],
              on_step: Callable[[], object] = lambda: None) -> dict[str, np.ndarray]:
        """All terms of the bound, as `DiffusionProcess.calc_bpd_loop` gives them, in float32.

        images: (n, C, H, W) in [-1, 1]; n at most `size`. image_ids: their numbers. cond: {"y": (n,)} or nothing.
        Raises NonFiniteError where the network returns NaN or infinity.
        """
        # The fill repeats an image, which is dropped: not a bit depends on how many there are.
        rows = [min(i, len(image_ids) - 1) for i in range(self.size)]
        numbers, device = [image_ids[row] for row in rows], dist_util.dev()

        def noise(step: int) -> Tensor:
            return image_noise(self.seed, numbers, step, images.shape[1:], "likelihood").to(device)

        found = self.process.calc_bpd_loop(
            self.network, images[rows].to(device), self.clip_denoised,
            {name: value[rows].to(device) for name, value in cond.items()}, noise, on_step)
        finite = torch.stack([found[name].flatten(1).isfinite().all(dim=1) for name in TERMS]).all(dim=0).tolist()
        if bad := [str(number) for number, good in zip(image_ids, finite, strict=False) if not good]:
            raise NonFiniteError("the network returned NaN or infinity for image "
                                 f"{', '.join(list(dict.fromkeys(bad))[:8])}")
        return {name: value[:len(image_ids)].cpu().numpy() for name, value in found.items()}


@dataclass(frozen=True)
class LikelihoodRun:
    """All options of a run. `run()` measures what is missing, and returns the mean in words on rank 0.

    given: the names of those that the user gave, as far as the run has anything to say of them.
    """

    options: LikelihoodOptions
    model: ModelOptions
    diffusion: DiffusionOptions
    given: Collection[str] = ()

    @property
    def out(self) -> Path:
        """The output folder; see `default_folder` where none is given."""
        if self.options.out:
            return Path(self.options.out)
        values = {name: value for name, value in self._values().items() if name not in IRRELEVANT}
        return default_folder("likelihoods", self.options, values)

    def run(self) -> str:
        """Measures what is missing, on all ranks; "" on ranks but the first.

        Raises UserError for options, images and files that cannot work, before the first image is measured.
        """
        began = time.time()
        dist_util.connect()
        with ExitStack() as stack:
            with dist_util.together():
                self.options.check_given()
                if not self.options.out and dist_util.is_main():
                    _log.info("--out is not given: the results go to %s", self.out)
                images = self._images()
                check_folder("--out", self.out)
                if dist_util.is_main():
                    stack.enter_context(shards.locked(self.out))
                    images.check_first(self.options.num_samples)
                    self._say_fewer(images.count)
            weights = {MODEL_FLAG: self.options.model_path}
            with dist_util.together():
                before = checkpoint.stamps(weights)
                meter = self._meter()
            queue = WorkQueue()
            with dist_util.together():
                sha256 = self._sha256() if dist_util.is_main() else {}
                checkpoint.check_unchanged(weights, before)         # else the digest is that of other weights
                if dist_util.is_main():
                    queue.put("sha256", sha256)
                    chunks = self._chunks(images, queue.get("sha256"))
                    queue.put("todo", chunks.made_ready(self.options.overwrite).spans)
            chunks = self._chunks(images, queue.get("sha256"))
            todo = Indices.of(queue.get("todo"))
            with job("likelihood", self.out, resumes=True), queue:
                self._work(meter, images, chunks, todo, queue)
                return self._finish(chunks, images, began) if dist_util.is_main() else ""

    def _say_fewer(self, count: int) -> None:
        """Logs that there are fewer images than were asked for; the default is no such question."""
        wanted = self.options.num_samples
        if "num_samples" in self.given and count < wanted:
            _log.info("--num_samples %d: %s holds %d image%s, all are measured", wanted,
                      without_secrets(self.options.data_dir), count, "s" * (count > 1))

    def _images(self) -> TrainingImages:
        if not self.options.data_dir:
            raise UserError("--data_dir: is missing, name a folder of images or IDX files, an .npz file, or "
                            "fashion-mnist")
        known = stored_names(checkpoint.locate(self.options.model_path)) if self.model.class_cond else None
        frame = self.model.in_channels, self.model.image_size, self.model.image_size
        images = open_images(self.options.data_dir, frame, split=self.options.split, class_cond=self.model.class_cond,
                             classes=self.options.classes, known=known, skip_damaged=None)
        images.check_classes(self.model.num_classes, trained=True)
        return images

    def _meter(self) -> LikelihoodMeter:
        """The network with its weights, and its process."""
        process = build_diffusion(self.diffusion)
        with torch.device("meta"):
            network = build_model(self.model)
        Networks(network, dist_util.dev()).load(network, self.options.model_path, asdict(self.model)
                                                | asdict(self.diffusion), self.options.checkpoint_entry)
        return LikelihoodMeter(network, process, self.options.seed, self.options.batch_size,
                               self.options.clip_denoised)

    def _sha256(self) -> dict[str, str]:
        return {"model": sha256_of(checkpoint.locate(self.options.model_path)),
                "data": data_digest(self.options.data_dir)}

    def _chunks(self, images: TrainingImages, sha256: Mapping[str, str]) -> LikelihoodChunks:
        values = {**self._values(), "num_samples": min(self.options.num_samples, images.count)}
        return LikelihoodChunks(self.out, values, sha256)

    def _values(self) -> dict[str, Any]:
        """All options by flag name, without secrets."""
        return public_values({**asdict(self.diffusion), **asdict(self.model), **asdict(self.options)})

    def _work(self, meter: LikelihoodMeter, images: TrainingImages, chunks: LikelihoodChunks, todo: Indices,
              queue: WorkQueue) -> None:
        def make(image_ids: Sequence[int], on_step: Callable[[float], None]) -> dict[str, np.ndarray]:
            done, steps = itertools.count(1), meter.process.num_timesteps
            return meter.terms(image_ids, *images.at(image_ids), on_step=lambda: on_step(next(done) / steps))

        make_chunks(make, chunks, todo, queue, self.options.log_every, "measuring")

    def _finish(self, chunks: LikelihoodChunks, images: TrainingImages, began: float) -> str:
        """Writes the results of all chunks, the record last; returns the mean in words."""
        bpd: dict[str, list[np.ndarray]] = {"total_bpd": [], "prior_bpd": []}
        sums: dict[str, Any] = {f"{name}_{kind}": 0.0 for name in TERMS for kind in ("sum", "squares")}
        for index in range(len(chunks.chunks)):
            arrays = chunks.read(index)
            for name, parts in bpd.items():
                parts.append(arrays[name])
            for name in TERMS:
                values = arrays[name].astype(np.float64)
                sums[f"{name}_sum"] += values.sum(axis=0)
                sums[f"{name}_squares"] += (values**2).sum(axis=0)
        whole = {name: np.concatenate(parts) for name, parts in bpd.items()}
        labels = {} if images.labels is None else {"labels": images.labels[:chunks.num_samples]}
        chunks.record.unlink(missing_ok=True)
        write_batch(self.out / "bpd.npz", {**whole, **labels})
        for name in TERMS:
            write_batch(self.out / f"{name}_terms.npz", {"arr_0": sums[f"{name}_sum"] / chunks.num_samples})
        write_csv(self.out / "terms.csv", self._rows(sums, chunks.num_samples))
        found = {name: mean_of(values) for name, values in whole.items()}
        write_json(chunks.record, {
            "configuration": chunks.configuration, "fingerprint": chunks.fingerprint, "sha256": chunks.sha256,
            "bits_per_dimension": {name: value.known() for name, value in found.items()},
            **made_by(), "timing": {"seconds": time.time() - began}}, sync=True)
        total = found["total_bpd"]
        interval = "" if chunks.num_samples < 2 else f", 95 % interval {total.low:.4f} to {total.high:.4f}"
        return f"{total.mean:.4f} bits per dimension ({chunks.num_samples} images{interval})"

    def _rows(self, sums: Mapping[str, np.ndarray], count: int) -> list[dict[str, Any]]:
        """Of each step, from the last to the first, the terms with their intervals."""
        process, rows = build_diffusion(self.diffusion), []
        for column, step in enumerate(reversed(range(process.num_timesteps))):
            row: dict[str, Any] = {"step": step, "network_step": int(process.timestep_map[step])}
            for name in TERMS:
                value = estimate(float(sums[f"{name}_sum"][column]), float(sums[f"{name}_squares"][column]), count)
                row |= {name: value.mean, f"{name}_low": value.low, f"{name}_high": value.high}
            rows.append(row)
        return rows


def mean_of(values: np.ndarray) -> Estimate:
    """The mean of values (N,), and its 95 % interval."""
    values = values.astype(np.float64)
    return estimate(float(values.sum()), float((values**2).sum()), len(values))
