"""A whole sampling run: from options to a file of samples, a picture and a record.

The run is cut into chunks of `batch_size` consecutive image numbers, dealt out to the ranks in turn. Each finished
chunk is a file, so that no rank holds more than one; at the end rank 0 packs them. Image i depends on (seed, i) and
the configuration alone.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import shutil
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import __version__, checkpoint, dist_util, pictures, sampling
from .errors import UserError
from .gaussian_diffusion import Denoiser, GaussianDiffusion
from .guidance import ClassifierGuidance, Guidance
from .nn import UninitializedWeights
from .options import Options, option
from .rng import image_labels, image_noise
from .script_util import (
    ClassifierOptions,
    DiffusionOptions,
    ModelOptions,
    SagOptions,
    build_classifier,
    build_diffusion,
    build_model,
)

LABELS = ("random", "balanced")


@dataclass(frozen=True)
class SampleOptions(Options):
    """The sampling run."""

    model: str = option("", "a model by name: a shipped one (fmnist32), or the flags of a released checkpoint")
    model_path: str = option("", "checkpoint of the diffusion network, .pt or .safetensors")
    num_samples: int = option(10000, "number of images", minimum=1)
    batch_size: int = option(16, "images at a time on each rank", minimum=1)
    use_ddim: bool = option(False, "sample by DDIM instead of DDPM")
    eta: float = option(0.0, "fresh noise in DDIM: 0 none, 1 as much as DDPM", minimum=0, maximum=1)
    clip_denoised: bool = option(True, "clip the predicted image to [-1, 1] at each step")
    labels: str = option("random", "classes of conditional samples: random, or balanced (number modulo classes)",
                         choices=LABELS)
    seed: int = option(0, "seed of noise and labels; the same seed gives the same file", minimum=0)
    out: str = option("samples", "folder for the samples, the picture and the record")
    overwrite: bool = option(False, "replace the samples of another configuration in that folder")
    classifier_guidance: bool = option(False, "guide by a classifier")
    classifier_path: str = option("", "checkpoint of the noise-aware classifier; shipped models have theirs")
    classifier_scale: float = option(1.0, "scale of classifier guidance; 0: off")


@dataclass(frozen=True)
class ClassifierSampleOptions(SampleOptions):
    """The sampling run, guided by a classifier unless told otherwise."""

    classifier_guidance: bool = option(True, "guide by a classifier")


OPTION_CLASSES = (ModelOptions, DiffusionOptions, ClassifierOptions, SagOptions)


def preset_values(given: dict[str, Any]) -> dict[str, Any]:
    """Values of the options that `--model` stands for; empty without it."""
    if not given.get("model"):
        return {}
    preset = checkpoint.find_preset(given["model"])
    if preset.kind != "diffusion":
        raise UserError(f"--model {preset.name}: is a model of kind {preset.kind}, not a diffusion model")
    values = preset.options | preset.sag
    if preset.path is not None:
        values["model_path"] = str(preset.path)
    if preset.classifier:
        classifier = checkpoint.find_preset(preset.classifier)
        values |= {name: value for name, value in classifier.options.items() if name.startswith("classifier_")}
        if classifier.path is not None:
            values["classifier_path"] = str(classifier.path)
    return values


@dataclass(frozen=True)
class SamplingRun:
    """All options of a run. `run()` samples, and returns the path of the .npz on rank 0."""

    sample: SampleOptions
    model: ModelOptions
    diffusion: DiffusionOptions
    classifier: ClassifierOptions
    sag: SagOptions
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
        for options in (self.classifier, self.diffusion, self.model, self.sag, self.sample):
            values |= asdict(options)
        return {name: value for name, value in values.items() if name not in ("out", "overwrite")}

    def run(self) -> Path | None:
        dist_util.setup_dist()
        shards = self.out / "shards"
        with dist_util.together():
            self._check_out()
            network, diffusion, guidance = self._build()
        try:
            with dist_util.together():
                if dist_util.is_main():
                    shutil.rmtree(shards, ignore_errors=True)
                    shards.mkdir()
            timing = self._sample_chunks(network, diffusion, guidance, shards)
            with dist_util.together():
                path = self._finish(shards, timing) if dist_util.is_main() else None
        finally:
            if dist_util.is_main():
                shutil.rmtree(shards, ignore_errors=True)
        return path

    def _check_out(self) -> None:
        """Raises UserError where the output folder cannot be written or holds samples of another configuration."""
        record = self.out / "run.json"
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            probe = self.out / f".writable-{dist_util.rank()}"
            probe.touch()
            probe.unlink()
            before = dict(json.loads(record.read_text())["configuration"]) if record.exists() else None
        except OSError as error:
            raise UserError(f"--out {self.out}: cannot be written ({error.strerror})") from None
        except (ValueError, KeyError, TypeError):
            before = {}
        if before is None or self.sample.overwrite:
            return
        now = json.loads(json.dumps(self.configuration()))
        different = [name for name in {**now, **before} if now.get(name) != before.get(name)]
        if different:
            raise UserError(f"--out {self.out}: holds samples of another configuration (--{different[0]} differs); "
                            "name another folder, or pass --overwrite True")

    def _build(self) -> tuple[Callable[..., Tensor], GaussianDiffusion, list[Guidance]]:
        """Everything that the options describe, so that what is wrong with them shows before the large file is read."""
        if not self.sample.model_path:
            url = checkpoint.find_preset(self.sample.model).url if self.sample.model else None
            hint = f"it lies at {url}" if url else "or a shipped model with --model, like --model fmnist32"
            raise UserError(f"--model_path is not given: name a checkpoint, {hint}")
        if self.guided_by_classifier and not self.sample.classifier_path:
            raise UserError("--classifier_path is not given: classifier guidance needs a classifier")
        diffusion = build_diffusion(self.diffusion)
        with UninitializedWeights():
            model = build_model(self.model)
            classifier = build_classifier(self.classifier) if self.guided_by_classifier else None
        guidance: list[Guidance] = [self.sag.build(model)] if self.sag.guide_scale != 1 else []
        if classifier is not None:
            self._load(classifier, self.sample.classifier_path, asdict(self.classifier))
            guidance.append(ClassifierGuidance(classifier, self.sample.classifier_scale))
        self._load(model, self.sample.model_path, asdict(self.model) | asdict(self.diffusion))
        network = model if self.model.class_cond else _without_labels(model)
        return network, diffusion, guidance

    def _load(self, network: nn.Module, path: str, options: dict[str, Any]) -> None:
        checkpoint.load_into(network, path, options)
        network.to(dist_util.dev()).channels_last().eval().requires_grad_(False)

    @property
    def _chunks(self) -> list[range]:
        size, total = self.sample.batch_size, self.sample.num_samples
        return [range(first, min(first + size, total)) for first in range(0, total, size)]

    def _sample_chunks(self, network: Callable[..., Tensor], diffusion: GaussianDiffusion, guidance: list[Guidance],
                       shards: Path) -> list[dict[str, Any]]:
        """Samples this rank's chunks into files, one a round; returns the seconds that each took."""
        ranks, timing = dist_util.world_size(), []
        rounds = range(0, len(self._chunks), ranks)
        with _progress(len(rounds) * diffusion.num_timesteps) as progress:
            for first in rounds:
                index = first + dist_util.rank()
                with dist_util.together():
                    if index < len(self._chunks):
                        start, numbers = time.monotonic(), self._chunks[index]
                        labels = self._labels(numbers)
                        images = self._chunk(network, diffusion, guidance, numbers, labels, progress)
                        arrays = {"images": to_uint8(images)} | ({} if labels is None else {"labels": labels.numpy()})
                        _save_npz(shards / f"{index:06d}.npz", arrays)
                        seconds = time.monotonic() - start
                        timing.append({"first": numbers.start, "images": len(numbers), "seconds": seconds})
                done = min(self.sample.num_samples, (first + ranks) * self.sample.batch_size)
                progress.set_postfix_str(f"{done} of {self.sample.num_samples} images")
        return timing

    def _labels(self, numbers: Sequence[int]) -> Tensor | None:
        if not (self.model.class_cond or self.guided_by_classifier):
            return None
        if self.sample.labels == "balanced":
            return torch.tensor(numbers) % self.model.num_classes
        return image_labels(self.sample.seed, numbers, self.model.num_classes)

    def _chunk(self, network: Callable[..., Tensor], diffusion: GaussianDiffusion, guidance: list[Guidance],
               numbers: Sequence[int], labels: Tensor | None, progress: tqdm) -> Tensor:
        """Images (N, C, H, W) in [-1, 1], on the CPU."""
        device = dist_util.dev()
        shape = (self.model.in_channels, self.model.image_size, self.model.image_size)

        def noise(step: int) -> Tensor:
            return image_noise(self.sample.seed, numbers, step, shape).to(device)

        kwargs = {} if labels is None else {"y": labels.to(device)}
        denoise = Denoiser(diffusion, network, self.sample.clip_denoised, model_kwargs=kwargs)
        ddim = functools.partial(sampling.ddim_step, eta=self.sample.eta)
        step = ddim if self.sample.use_ddim else sampling.ddpm_step
        x_T = noise(diffusion.num_timesteps)
        chain = sampling.sample_chain(step, denoise, x_T, noise, guidance, torch.tensor(numbers))
        return sampling.last(chain, progress.update)["sample"].cpu()

    def _finish(self, shards: Path, timing: list[dict[str, Any]]) -> Path:
        """Packs the chunks, draws the picture, and writes the record last."""
        size, total = self.model.image_size, self.sample.num_samples
        record_path, path = self.out / "run.json", self.out / f"samples_{total}x{size}x{size}x3.npz"
        files = [shards / f"{index:06d}.npz" for index in range(len(self._chunks))]
        record_path.unlink(missing_ok=True)
        pack(files, path)
        pictures.save_grid(first_images(path, 64), self.out / "grid.png")
        record = {
            "configuration": self.configuration(),
            "samples": path.name,
            "sha256": {"samples": _sha256(path), "model": _sha256(self.sample.model_path),
                       **({"classifier": _sha256(self.sample.classifier_path)} if self.guided_by_classifier else {})},
            "versions": {"guided_diffusion": __version__, "torch": torch.__version__, "numpy": np.__version__,
                         "python": platform.python_version()},
            "command": sys.argv,
            "ranks": dist_util.world_size(),
            "device": str(dist_util.dev()),
            "timing": {"seconds": time.time() - self.began, "chunks_of_rank_0": timing},
        }
        temporary = self.out / "run.json.tmp"
        temporary.write_text(json.dumps(record, indent=2) + "\n")
        os.replace(temporary, record_path)
        return path


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


def pack(files: Sequence[Path], path: Path) -> None:
    """One .npz with arr_0 (images) and, where there are labels, arr_1, streamed from chunk files in their order."""
    with np.load(files[0], allow_pickle=False) as first:
        names = {"images": "arr_0", **({"labels": "arr_1"} if "labels" in first else {})}
        headers = {name: (first[name].shape[1:], first[name].dtype) for name in names}
    total = 0
    for file in files:
        with np.load(file, allow_pickle=False) as chunk:
            total += len(chunk["labels" if "labels" in names else "images"])
    temporary = path.with_name(f"{path.name}.tmp")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for name, stored in names.items():
            shape, dtype = headers[name]
            # A fixed date: the same samples are the same bytes.
            with archive.open(zipfile.ZipInfo(f"{stored}.npy"), "w", force_zip64=True) as stream:
                np.lib.format.write_array_header_1_0(
                    stream, {"descr": dtype.str, "fortran_order": False, "shape": (total, *shape)})
                for file in files:
                    with np.load(file, allow_pickle=False) as chunk:
                        stream.write(np.ascontiguousarray(chunk[name]).tobytes())
    os.replace(temporary, path)


def first_images(path: str | Path, count: int) -> np.ndarray:
    """The first images (N, H, W, 3) of a sample file, without reading the rest."""
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as stream:
        np.lib.format.read_magic(stream)
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
        count = min(count, shape[0])
        data = stream.read(count * dtype.itemsize * int(np.prod(shape[1:])))
        return np.frombuffer(data, dtype).reshape(count, *shape[1:])


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


def _progress(steps: int) -> tqdm:
    interval = 0.5 if sys.stderr.isatty() else 10
    return tqdm(total=steps, unit="step", desc="sampling", mininterval=interval, dynamic_ncols=True,
                disable=not dist_util.is_main())


def _save_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as stream:
        np.savez(stream, **arrays)
    os.replace(temporary, path)


def _sha256(path: str | Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
