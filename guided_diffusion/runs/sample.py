"""A whole sampling run: from options to a file of samples, a picture and a record.

The run is cut into chunks of `batch_size` consecutive image numbers, which ranks take as they become free. Each
finished chunk is a file, so that no rank holds more than one, and a run that was stopped goes on where it was; at the
end rank 0 packs them. Image i depends on (seed, i) and the configuration alone.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import platform
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .. import __version__, checkpoint, dist_util, pictures, sampling
from ..depth.options import DagOptions
from ..errors import UserError
from ..fetch import sha256_of, without_secrets
from ..gaussian_diffusion import Denoiser, GaussianDiffusion
from ..guidance import ClassifierGuidance, Guidance
from ..nn import UninitializedWeights
from ..options import Options, option
from ..packing import first_images
from ..rng import image_noise
from ..script_util import (
    ClassifierOptions,
    DiffusionOptions,
    ModelOptions,
    PagOptions,
    SagOptions,
    build_classifier,
    build_diffusion,
    build_model,
)
from ..unet import UNetModel
from . import shards
from .labels import Labels, make_labels
from .shards import Shards
from .workers import Crew


@dataclass(frozen=True)
class SampleOptions(Options):
    """The sampling run."""

    model: str = option("", "a model by name: a shipped one (fmnist32), or the flags of a released checkpoint")
    model_path: str = option("", "checkpoint of the diffusion network, .pt or .safetensors: a path, or an address "
                             "(https://, gs://, az://), which is fetched once")
    num_samples: int = option(10000, "number of images", minimum=1)
    batch_size: int = option(16, "images at a time on each rank, and in a chunk", minimum=1)
    use_ddim: bool = option(False, "sample by DDIM instead of DDPM")
    eta: float = option(0.0, "fresh noise in DDIM: 0 none, 1 as much as DDPM", minimum=0, maximum=1)
    clip_denoised: bool = option(True, "clip the predicted image to [-1, 1] at each step")
    labels: str = option("random", "classes of conditional samples: random, balanced (number modulo classes), one "
                                   "class, or a .npy file of one for each image")
    seed: int = option(0, "seed of noise and labels; the same seed gives the same file", minimum=0)
    out: str = option("samples", "folder for the samples, the picture and the record")
    overwrite: bool = option(False, "begin anew, and replace what is in that folder")
    keep_shards: bool = option(False, "keep the files of the chunks beside the file of samples")
    log_every: int = option(0, "a plain line of progress every so many images, in place of the bar; 0: the bar",
                            minimum=0)
    auto_batch: bool = option(False, "out of memory: evaluate fewer images at a time, in chunks as large as before")
    classifier_guidance: bool = option(False, "guide by a classifier")
    classifier_path: str = option("", "checkpoint of the noise-aware classifier; shipped models have theirs")
    classifier_scale: float = option(1.0, "scale of classifier guidance; 0: off")


@dataclass(frozen=True)
class ClassifierSampleOptions(SampleOptions):
    """The sampling run, guided by a classifier unless told otherwise."""

    classifier_guidance: bool = option(True, "guide by a classifier")


OPTION_CLASSES = (ModelOptions, DiffusionOptions, ClassifierOptions, SagOptions, PagOptions, DagOptions)


def preset_values(given: dict[str, Any]) -> dict[str, Any]:
    """Values of the options that `--model` stands for; empty without it."""
    if not given.get("model"):
        return {}
    preset = checkpoint.find_preset(given["model"])
    if preset.kind != "diffusion":
        raise UserError(f"--model {preset.name}: is a model of kind {preset.kind}, not a diffusion model")
    values = preset.options | preset.sag | preset.depth
    if preset.path is not None:
        values["model_path"] = str(preset.path)
    if preset.classifier:
        classifier = checkpoint.find_preset(preset.classifier)
        shared = () if preset.options.get("class_cond") else ("num_classes",)
        values |= {name: value for name, value in classifier.options.items()
                   if name.startswith("classifier_") or name in shared}
        if classifier.path is not None:
            values["classifier_path"] = str(classifier.path)
    return values


class Built(NamedTuple):
    """What a run samples with. model: the network; network: the same, called with labels also where it has none."""

    model: UNetModel
    network: Callable[..., Tensor]
    diffusion: GaussianDiffusion
    guidance: list[Guidance]


@dataclass(frozen=True)
class SamplingRun:
    """All options of a run. `run()` samples, and returns the path of the .npz on rank 0."""

    sample: SampleOptions
    model: ModelOptions
    diffusion: DiffusionOptions
    classifier: ClassifierOptions
    sag: SagOptions
    pag: PagOptions
    dag: DagOptions
    began: float = field(default_factory=time.time)

    @property
    def out(self) -> Path:
        return Path(self.sample.out)

    @property
    def guided_by_classifier(self) -> bool:
        return self.sample.classifier_guidance and self.sample.classifier_scale != 0

    def configuration(self) -> dict[str, Any]:
        """Every option that the images depend on, by flag name."""
        values: dict[str, Any] = {}
        for options in (self.classifier, self.diffusion, self.model, self.sag, self.pag, self.dag, self.sample):
            values |= asdict(options)
        values |= {flag: without_secrets(values[flag]) for flag in shards.CHECKPOINT_FLAGS}
        return {name: value for name, value in values.items() if name not in ("out", "overwrite")}

    def run(self) -> Path | None:
        dist_util.setup_dist()
        with ExitStack() as stack:
            with dist_util.together():
                labels = self.labels()
                self._check_out()
                if dist_util.is_main():
                    stack.enter_context(shards.locked(self.out))
            with dist_util.together():
                sampler = Sampler(self, self.build())
            crew = Crew()
            with dist_util.together():
                if dist_util.is_main():
                    sha256 = {name: sha256_of(checkpoint.locate(path))
                              for name, path in self.checkpoints().items()}
                    self.dag.check_network(sha256["model"])
                    crew.tell("sha256", sha256)
                    crew.tell("todo", self._chunks(sha256, labels).prepare(self.sample.overwrite))
            return self._sample(sampler, self._chunks(crew.told("sha256"), labels), crew)

    def _chunks(self, sha256: dict[str, str], labels: Labels | None) -> Shards:
        return Shards(self.out, self.configuration(), sha256,
                      lambda numbers: None if labels is None else labels(numbers).numpy())

    @property
    def samples(self) -> Path:
        """The file that the samples of the finished run are in."""
        return Shards(self.out, self.configuration(), {}).samples

    def check_folder(self, sha256: dict[str, str]) -> None:
        """Raises UserError where the output folder holds images of another run; sha256: of the `checkpoints`."""
        self._chunks(sha256, self.labels()).check()

    def checkpoints(self) -> dict[str, str]:
        """The files that the images depend on, by the names that run.json has for them."""
        return {"model": self.sample.model_path,
                **({"classifier": self.sample.classifier_path} if self.guided_by_classifier else {}),
                **self.dag.files()}

    def _check_out(self) -> None:
        """Raises UserError where the output folder cannot be written."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            probe = self.out / f".writable-{dist_util.rank()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(f"--out {self.out}: cannot be written ({error.strerror})") from None

    def labels(self) -> Labels | None:
        """The labels of the images; None where nothing asks for them."""
        if not (self.model.class_cond or self.guided_by_classifier):
            if self.sample.labels not in ("random", "balanced"):
                raise UserError(f"--labels {self.sample.labels}: the network has no classes, as --class_cond is False")
            return None
        return make_labels(self.sample.labels, seed=self.sample.seed, num_classes=self.model.num_classes,
                           num_samples=self.sample.num_samples)

    def build(self) -> Built:
        """Everything that the options describe, so that what is wrong with them shows before the large file is read."""
        if not self.sample.model_path:
            hint = "name a checkpoint, or a shipped model with --model, like --model fmnist32"
            if self.sample.model:
                preset = checkpoint.find_preset(self.sample.model)
                hint = f"`python scripts/fetch_models.py {preset.name}` fetches {preset.url} to models/{preset.name}.pt"
            raise UserError(f"--model_path is not given: {hint}")
        if self.guided_by_classifier and not self.sample.classifier_path:
            raise UserError("--classifier_path is not given: classifier guidance needs a classifier")
        diffusion = build_diffusion(self.diffusion)
        with UninitializedWeights():
            model = build_model(self.model)
            classifier = build_classifier(self.classifier) if self.guided_by_classifier else None
        guidance: list[Guidance] = [self.sag.build(model)] if self.sag.guide_scale != 1 else []
        guidance += [self.pag.build(model)] if self.pag.pag_scale else []
        guidance += self.dag.build(model, self.sample.seed)
        if classifier is not None:
            self._load(classifier, self.sample.classifier_path, asdict(self.classifier))
            guidance.append(ClassifierGuidance(classifier, self.sample.classifier_scale))
        self._load(model, self.sample.model_path, asdict(self.model) | asdict(self.diffusion))
        return Built(model, model if self.model.class_cond else _without_labels(model), diffusion, guidance)

    def _load(self, network: nn.Module, path: str, options: dict[str, Any]) -> None:
        checkpoint.load_into(network, path, options)
        network.to(dist_util.dev()).channels_last().eval().requires_grad_(False)

    def _sample(self, sampler: Sampler, chunks: Shards, crew: Crew) -> Path | None:
        """Samples what there is to do, on all ranks; returns the file of samples on rank 0."""
        todo = crew.told("todo")
        try:
            with crew:
                if todo is not None:
                    self._work(sampler, chunks, crew, todo)
                    if dist_util.is_main():
                        self._finish(chunks)
        finally:
            if dist_util.is_main():
                chunks.tidy()
        if not dist_util.is_main():
            return None
        if not self.sample.keep_shards:
            chunks.remove()
        return chunks.samples

    def _work(self, sampler: Sampler, chunks: Shards, crew: Crew, todo: list[int]) -> None:
        """Samples chunks into files as long as there are any."""
        total = sum(len(chunks.chunks[index]) for index in todo)
        with Progress(crew, self.sample.num_samples, total, self.sample.log_every) as progress:
            done = 0
            while (ticket := crew.ticket()) < len(todo):
                numbers, began = chunks.chunks[todo[ticket]], time.monotonic()

                def on_step(part: float, before: int = done, count: int = len(numbers)) -> None:
                    crew.check()
                    crew.report(before + part * count)
                    progress.show()

                labels = chunks.labels(numbers)
                images = sampler.images(numbers, labels, on_step)
                seconds = time.monotonic() - began
                chunks.save(todo[ticket], images, labels, dist_util.rank(), seconds)
                done += len(numbers)
                crew.report(done)
                crew.finish_ticket()
            while dist_util.is_main() and crew.finished_tickets() < len(todo):
                crew.check()
                progress.show()
                time.sleep(0.05)

    def _finish(self, chunks: Shards) -> None:
        """Packs the chunks, draws the picture, and writes the record last."""
        record_path = self.out / "run.json"
        packed, timing = chunks.pack()
        record_path.unlink(missing_ok=True)
        os.replace(packed, chunks.samples)
        pictures.save_grid(first_images(chunks.samples, 64), self.out / "grid.png")
        record = {
            "configuration": chunks.configuration,
            "fingerprint": chunks.fingerprint,
            "samples": chunks.samples.name,
            "sha256": {"samples": sha256_of(chunks.samples), **chunks.sha256},
            "versions": {"guided_diffusion": __version__, "torch": torch.__version__, "numpy": np.__version__,
                         "python": platform.python_version()},
            "command": [without_secrets(word) for word in sys.argv],
            "ranks": dist_util.world_size(),
            "device": str(dist_util.dev()),
            "timing": {"seconds": time.time() - self.began, "chunks": timing},
        }
        shards.write_whole(record_path, (json.dumps(record, indent=2) + "\n").encode(), "the samples are kept")


class Sampler:
    """What makes images of their numbers.

    All chunks are evaluated at one batch size, filled up where they are smaller, so that not a bit of an image depends
    on how many there are.
    """

    def __init__(self, run: SamplingRun, built: Built) -> None:
        self.run = run
        _, self.network, self.diffusion, self.guidance = built
        self.size = run.sample.batch_size

    def images(self, numbers: Sequence[int], labels: np.ndarray | None, on_step: Callable[[float], None],
               ) -> np.ndarray:
        """Images (n, H, W, 3) uint8. on_step is called after each step with the part that is done."""
        while True:
            try:
                return self._images(numbers, labels, on_step)
            except RuntimeError as error:
                if not _out_of_memory(error):
                    raise
            self._shrink()          # out here, as the exception holds the tensors of the failed step

    def _shrink(self) -> None:
        if not self.run.sample.auto_batch or self.size == 1:
            tried = f" (in evaluations of {self.size})" if self.size < self.run.sample.batch_size else ""
            raise UserError(f"--batch_size {self.run.sample.batch_size}{tried}: {dist_util.dev()} is out of memory; "
                            "pass --auto_batch True, which keeps finished chunks, or a smaller --batch_size")
        self.size = (self.size + 1) // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _images(self, numbers: Sequence[int], labels: np.ndarray | None, on_step: Callable[[float], None],
                ) -> np.ndarray:
        images, size = [], self.size
        starts = range(0, len(numbers), size)
        steps = len(starts) * self.diffusion.num_timesteps
        done = itertools.count(1)
        for start in starts:
            # The fill repeats a number, whose image is dropped.
            index = [min(i, len(numbers) - 1) for i in range(start, start + size)]
            chosen = None if labels is None else torch.from_numpy(labels[index])
            piece = self._piece([numbers[i] for i in index], chosen, lambda: on_step(next(done) / steps))
            images.append(to_uint8(piece[:len(numbers) - start]))
        return np.concatenate(images)

    def _piece(self, numbers: Sequence[int], labels: Tensor | None, on_step: Callable[[], None]) -> Tensor:
        """Images (N, C, H, W) in [-1, 1], on the CPU."""
        device, options, model = dist_util.dev(), self.run.sample, self.run.model
        shape = (model.in_channels, model.image_size, model.image_size)

        def noise(step: int) -> Tensor:
            return image_noise(options.seed, numbers, step, shape).to(device)

        kwargs = {} if labels is None else {"y": labels.to(device)}
        denoise = Denoiser(self.diffusion, self.network, options.clip_denoised, model_kwargs=kwargs)
        step = functools.partial(sampling.ddim_step, eta=options.eta) if options.use_ddim else sampling.ddpm_step
        x_T = noise(self.diffusion.num_timesteps)
        chain = sampling.sample_chain(step, denoise, x_T, noise, self.guidance, torch.tensor(numbers))
        return sampling.last(chain, on_step)["sample"].cpu()


def _out_of_memory(error: RuntimeError) -> bool:
    signs = ("out of memory", "DefaultCPUAllocator", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in signs)


class Progress:
    """Where the whole job stands, on rank 0: a bar, or plain lines every `log_every` images."""

    def __init__(self, crew: Crew, num_samples: int, todo: int, log_every: int) -> None:
        self.crew, self.num_samples, self.before, self.log_every = crew, num_samples, num_samples - todo, log_every
        self.began, self.logged = time.monotonic(), num_samples - todo
        self.bar = tqdm(total=num_samples, initial=self.before, unit="image", desc="sampling", dynamic_ncols=True,
                        mininterval=0.5 if sys.stderr.isatty() else 10,
                        disable=bool(log_every) or not dist_util.is_main())

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        self.show(finished=kind is None)
        self.bar.close()

    def show(self, finished: bool = False) -> None:
        if not dist_util.is_main():
            return
        todo = self.num_samples - self.before
        made = todo if finished else min(self.crew.work(), todo)
        done = self.before + int(made)
        ranks = f"{self.crew.alive()} of {self.crew.size} ranks"
        if not self.log_every:
            self.bar.set_postfix_str(ranks, refresh=False)
            self.bar.update(done - self.bar.n)
        elif done >= self.logged + self.log_every or (done == self.num_samples > self.logged):
            self.logged = done
            rate = made / max(1e-9, time.monotonic() - self.began)
            left = timedelta(seconds=round((self.num_samples - done) / rate)) if rate else "unknown"
            print(f"{done} of {self.num_samples} images, {rate:.3g} images/s, {left} left, {ranks}", flush=True)


def sample_from(options: Sequence[Options]) -> None:
    """The run of `[SampleOptions, *OPTION_CLASSES]` instances; says where its files are."""
    path = SamplingRun(*options).run()
    if path is not None:
        print(f"samples: {path}\npicture: {path.parent / 'grid.png'}\nrecord:  {path.parent / 'run.json'}")
    dist_util.shutdown()


def to_uint8(images: Tensor) -> np.ndarray:
    """Images (N, C, H, W) in [-1, 1], C 1 or 3, as (N, H, W, 3) uint8: truncated, as the official samples are."""
    pixels = ((images.float() + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return pixels.expand(*pixels.shape[:3], 3).contiguous().numpy()


def run_samples(folder: Path, count: int) -> tuple[np.ndarray, dict[str, Any]]:
    """The first images (N, H, W, 3) of a finished run and its configuration; UserError where there is none."""
    try:
        record = json.loads((folder / "run.json").read_text())
        return first_images(folder / record["samples"], count), record["configuration"]
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{folder}: holds no finished sampling run ({error})") from None


def _without_labels(model: nn.Module) -> Callable[..., Tensor]:
    """An unconditional network among terms that have labels."""
    return lambda x, t, y=None: model(x, t)
