"""A sampling run of a pipeline of diffusers, in chunks as other sampling runs.

Image i depends on (seed, i), its prompt and the options alone. The chunks stay in the folder, so that a run that was
stopped, or has more images, goes on from them:

    OUT/latent/000123.npz       a chunk: images (n, H, W, 3) uint8
    OUT/samples_NxHxWx3.npz     all images, arr_0
    OUT/grid.png                the first ones
    OUT/run.json                configuration, what the images depend on, and times, written last
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from .. import dist_util, pictures
from ..errors import UserError, said_otherwise
from ..fetch import sha256_of
from ..files import check_folder, reason, write_json
from ..guidance import GUIDANCE, CfgOptions, GuidanceOptions, IcgOptions, Networks, SagOptions
from ..guidance.base import naming
from ..jobs import job
from ..late import torch
from ..npz import BatchFile, prepare_samples
from ..options import Options, batch_option, option, option_fields, seed_option
from ..pixels import unit_to_uint8
from ..runs import shards
from ..runs.chunk_files import ChunkFiles
from ..runs.chunks import Indices
from ..runs.command import say_note
from ..runs.effects import idle_batches, idle_methods, in_words, methods_off
from ..runs.options import MOST_IMAGES
from ..runs.record import made_by, own_sources, say_unrecorded
from ..runs.sample import begins_late, built_terms
from ..runs.work import make_chunks
from ..runs.workers import WorkQueue
from ..sampling import SAMPLERS
from ..terms import Guidance
from ..unet2d.files import read_index

if TYPE_CHECKING:
    from ..process import DiffusionProcess
    from .latent import LatentDiffusion

IRRELEVANT = ("out", "overwrite", "log_every", "num_samples", "pipeline", "prompts", "icg_prompts")
MOST_DRAWN = 64                 # prompts of the run itself among which independent condition guidance draws


@dataclass(frozen=True)
class LatentOptions(Options):
    """The pipeline and its images."""

    pipeline: str = option("", "folder of a pipeline that diffusers saved, or its name on the hub")
    prompt: str = option("", "what the images show")
    prompts: str = option("", "in place of --prompt, a text file of prompts, a line each: that of image i is in line "
                          "i; they begin again after the last")
    negative_prompt: str = option("", "what stands for no prompt in classifier-free guidance")
    sampler: str = option("ddim", f"the sampler: {', '.join(SAMPLERS)}", choices=SAMPLERS)
    steps: int = option(50, "steps, at the places of the pipeline's own scheduler", minimum=1)
    prompt_scale: float = option(7.5, "classifier-free guidance as diffusers counts it, at least 1; 1: off", minimum=1)
    sag_scale: float = option(0.0, "scale s of self-attention guidance; 0: off")
    sag_block: str = option("middle", "its attention block, like middle or up.1.0")
    icg_prompts: str = option("", "text file of prompts, a line each, among which --icg_scale draws; unset: the first "
                              f"{MOST_DRAWN} different ones of --prompts", later=True)
    height: int = option(0, "of the images, in pixels; 0: that of the pipeline", minimum=0)
    width: int = option(0, "of the images, in pixels; 0: that of the pipeline", minimum=0)
    num_samples: int = option(1, "number of images", minimum=1, maximum=MOST_IMAGES)
    batch_size: int = batch_option(1, "images at a time on each rank, and in a chunk")
    seed: int = seed_option("seed of the noise")
    batch_contrasts: bool = option(False, "make evaluations that do not need each other as one batch, as those with "
                                   "and without the prompt", later=True)
    out: str = option("latent", "folder for the images and the record")
    overwrite: bool = option(False, "begin anew, and replace what is in that folder")
    log_every: int = option(0, "a plain line of progress every so many images, in place of the bar; 0: the bar",
                            minimum=0)


@dataclass(frozen=True)
class LatentChunks(ChunkFiles):
    """The finished chunks of a run."""

    FOLDER: ClassVar = "latent"
    CONTENT: ClassVar = "samples"

    def identify(self, configuration: Mapping[str, Any], sha256: Mapping[str, str]) -> dict[str, Any]:
        """All options that an image depends on, and digests of the pipeline, of the prompts and of methods' code."""
        later = {field.name: field.default for field in option_fields(LatentOptions) if field.metadata.get("later")}
        return {**{name: value for name, value in configuration.items()
                   if name not in IRRELEVANT and (name not in later or value != later[name])}, **sha256}

    def is_whole(self, arrays: Mapping[str, np.ndarray], count: int) -> bool:
        """Whether these arrays are those of a chunk of `count` images."""
        images = arrays["images"]
        return images.dtype == np.uint8 and images.ndim == 4 and images.shape[::3] == (count, 3)


class Prepared(NamedTuple):
    """What makes the images: the pipeline, its guidance, and the prompts, in turn; none where it takes none.

    process: that of the steps which the scheduler makes of those that were asked for.
    """

    latent: LatentDiffusion
    guidance: list[Guidance]
    prompts: list[str]
    process: DiffusionProcess

    @property
    def steps(self) -> int:
        """How many are made."""
        return self.process.num_timesteps


@dataclass(frozen=True)
class LatentRun:
    """All options of a run: those of the pipeline, and of methods for it. `run()` makes what is missing."""

    options: LatentOptions
    methods: tuple[GuidanceOptions, ...]

    @classmethod
    def classes(cls) -> tuple[type[Options], ...]:
        """The classes of the options, those of the pipeline first."""
        return (LatentOptions, *(method for method in GUIDANCE if method.for_pipelines))

    @property
    def out(self) -> Path:
        """The output folder."""
        return Path(self.options.out)

    @property
    def active(self) -> list[GuidanceOptions]:
        """The guidance methods that are on."""
        return [method for method in self.methods if method.active]

    def title(self, steps: int | None = None) -> str:
        """The guidance and the sampler in words, like "SAG s = 0.75 + prompt scale 7.5, ddim, 50 steps".

        steps: how many are made; None: those that were asked for.
        """
        options = self.options
        words = [method.title() for method in self.active]
        words += [f"SAG s = {options.sag_scale:g}"] if options.sag_scale else []
        words += [f"prompt scale {options.prompt_scale:g}"] if self._prompts and options.prompt_scale != 1 else []
        return f"{' + '.join(words) or 'no guidance'}, {options.sampler}, {steps or options.steps} steps"

    @cached_property
    def _prompts(self) -> list[str]:
        """Raises UserError for a file that cannot be read, or is empty, and for two ways to say a prompt."""
        if not self.options.prompts:
            return [self.options.prompt] if self.options.prompt else []
        if self.options.prompt:
            raise UserError("--prompts and --prompt: give one of the two")
        return _lines("prompts", self.options.prompts)

    @cached_property
    def _drawn(self) -> list[str]:
        """The prompts among which independent condition guidance draws; none where that is off.

        Raises UserError for a file that cannot be read, or has no effect, and for fewer than two prompts.
        """
        icg, = (method for method in self.methods if isinstance(method, IcgOptions))
        if self.options.icg_prompts:
            if not icg.active:
                raise UserError(f"--icg_prompts {self.options.icg_prompts}: acts with --icg_scale only, give both or "
                                "none")
            return list(dict.fromkeys(_lines("icg_prompts", self.options.icg_prompts)))
        if not icg.active or not self._prompts:
            return []
        drawn = list(dict.fromkeys(self._prompts))[:MOST_DRAWN]
        if len(drawn) < 2:
            raise UserError(f"--icg_scale {icg.scale:g}: needs other prompts to draw from, name a file of them "
                            "with --icg_prompts")
        return drawn

    def without_effect(self, given: Collection[str], process: DiffusionProcess) -> str:
        """One line on the flags among `given` that no image depends on; "" where there is none.

        process: whose steps are made (`LatentDiffusion.process`).
        """
        guiding = self._guiding
        idle = methods_off(self.methods) | idle_methods(guiding, process)
        if not self.options.sag_scale:
            idle["sag_block"] = "--sag_scale is 0"
        if not self._prompts:
            idle |= dict.fromkeys(("prompt_scale", "negative_prompt"), "there is no prompt")
        elif self.options.prompt_scale == 1:
            idle["negative_prompt"] = "--prompt_scale is 1"
        if self.options.batch_contrasts:
            idle |= idle_batches(guiding)
        return in_words(idle, given)

    @property
    def _guiding(self) -> list[GuidanceOptions]:
        """The methods that are on; SAG and classifier-free guidance, whose options are others here, at any scale."""
        kinds: list[type[GuidanceOptions]] = [SagOptions] if self.options.sag_scale else []
        kinds += [CfgOptions] if self._prompts and self.options.prompt_scale != 1 else []
        return [*(kind(**kind.switched_on) for kind in kinds), *self.active]

    def run(self, given: Collection[str] = ()) -> Path | None:
        """Samples what is missing; the same on all ranks. Returns the file of samples on rank 0, else None.

        given: the flags that a user gave; those without effect are said in one line. Raises UserError for options and
        pipelines that cannot work, before the first image is sampled.
        """
        began = time.time()
        dist_util.connect()
        say_unrecorded(*self.active)
        with ExitStack() as stack:
            with dist_util.together():
                prompts, drawn = self._prompts, self._drawn
                check_folder("--out", self.out)
                if dist_util.is_main():
                    stack.enter_context(shards.locked(self.out))
            with dist_util.together():
                prepared = self._prepared(prompts)
                say_note(self.without_effect(given, prepared.process))
            queue = WorkQueue()
            with dist_util.together():
                if dist_util.is_main():
                    queue.put("sha256", self._sha256(prepared.latent.pipe, prompts, drawn))
                    queue.put("todo", self._chunks(queue.get("sha256")).made_ready(self.options.overwrite).spans)
            chunks = self._chunks(queue.get("sha256"))
            spans = queue.get("todo")
            say_note(begins_late(prepared.process) if spans else "")
            todo = Indices.of(spans)
            with job("sampling by diffusers", self.out, resumes=True), queue:
                self._work(prepared, chunks, todo, queue)
                return self._finish(chunks, began, prepared.steps) if dist_util.is_main() else None

    def _prepared(self, prompts: list[str]) -> Prepared:
        from .latent import LatentDiffusion

        pipe = load_pipeline(self.options.pipeline).to(dist_util.dev())
        with self._as_typed():
            latent = LatentDiffusion.from_pipeline(pipe)
        if latent.unet.takes_prompts != bool(prompts):
            raise UserError("--prompt: " + ("is missing, the pipeline takes one" if latent.unet.takes_prompts
                                            else "the pipeline takes none"))
        if prompts and getattr(pipe, "text_encoder", None) is None:
            raise UserError(f"--pipeline {self.options.pipeline}: has no text_encoder, which --prompt needs; "
                            "LatentDiffusion.sample takes prompt_embeds")
        if latent.unet.has_labels:
            raise UserError(f"--pipeline {self.options.pipeline}: its network takes classes, which this command does "
                            "not give; LatentDiffusion.sample takes labels, and scripts/convert_checkpoint.py makes a "
                            "checkpoint of a UNet2DModel for scripts/image_sample.py")
        with self._as_typed():
            latent.check(self.options.sampler, self.options.steps, self.options.height or None,
                         self.options.width or None)
        nets = Networks(latent.unet, dist_util.dev(), self.options.seed)    # type: ignore[arg-type]  # has its blocks
        guidance = [term for method in self.active for term in self._terms(method, latent, nets)]
        if self.options.sag_scale:
            with naming("sag_block", self.options.sag_block):
                guidance.append(latent.self_attention_guidance(self.options.sag_scale, self.options.sag_block))
        return Prepared(latent, guidance, prompts, latent.process(self.options.sampler, self.options.steps))

    def _as_typed(self) -> AbstractContextManager[None]:
        """Lets what is said of an argument of `LatentDiffusion` name the option, and all else the pipeline."""
        return said_otherwise(lambda text: f"--{text}" if text.startswith(("steps", "height", "width"))
                              else f"--pipeline {self.options.pipeline}: {text}")

    def _terms(self, method: GuidanceOptions, latent: LatentDiffusion, nets: Networks) -> list[Guidance]:
        """The terms of a method; independent conditions are prompts where the network takes them, else labels."""
        if isinstance(method, IcgOptions) and self._drawn:
            return [latent.independent_prompt_guidance(method.scale, self._drawn, seed=self.options.seed,
                                                       **method.window)]
        return built_terms(method, nets)

    def _sha256(self, pipe: Any, prompts: list[str], drawn: list[str]) -> dict[str, str]:
        """Digests of the pipeline, of the prompts, and of the code of methods that are not of this library."""
        texts = {"prompts": prompts, **({"icg_prompts": drawn} if drawn else {})}
        return {"pipeline": _digest(pipe),
                **{name: hashlib.sha256(json.dumps(lines).encode()).hexdigest() for name, lines in texts.items()},
                **{name: sha256_of(path) for name, path in own_sources(*self.active).items()}}

    def _chunks(self, sha256: Mapping[str, str]) -> LatentChunks:
        values = asdict(self.options)
        for method in self.active:
            values |= asdict(method)
        return LatentChunks(self.out, values, sha256)

    def _work(self, prepared: Prepared, chunks: LatentChunks, todo: Indices, queue: WorkQueue) -> None:
        def make(image_ids: Sequence[int], on_step: Callable[[float], None]) -> dict[str, np.ndarray]:
            return {"images": self._images(prepared, image_ids, on_step)}

        make_chunks(make, chunks, todo, queue, self.options.log_every)

    def _images(self, prepared: Prepared, image_ids: Sequence[int], on_step: Callable[[float], None]) -> np.ndarray:
        """Images (n, H, W, 3) uint8."""
        # The fill repeats an image, which is dropped: not a bit depends on how many there are.
        numbers = [image_ids[min(i, len(image_ids) - 1)] for i in range(self.options.batch_size)]
        prompts = prepared.prompts
        given: dict[str, Any] = {} if not prompts else {
            "prompt": [prompts[number % len(prompts)] for number in numbers]}
        done, options = itertools.count(1), self.options
        if prompts and options.negative_prompt and options.prompt_scale != 1:
            given["negative_prompt"] = options.negative_prompt
        cfg_scale: float = options.prompt_scale
        images = prepared.latent.sample(
            **given, steps=options.steps, sampler=options.sampler, cfg_scale=cfg_scale,
            guidance=prepared.guidance, seed=options.seed, numbers=numbers, height=options.height or None,
            width=options.width or None, output_type="np", batch_contrasts=options.batch_contrasts,
            on_step=lambda: on_step(min(1.0, next(done) / prepared.steps)))
        pixels = unit_to_uint8(images[:len(image_ids)])
        return np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels

    def _finish(self, chunks: LatentChunks, began: float, steps: int) -> Path:
        """Packs the chunks, draws the picture, and writes the record last."""
        shape = (chunks.num_samples, *chunks.read(0)["images"].shape[1:])
        height, width = shape[1:3]
        samples = self.out / f"samples_{chunks.num_samples}x{height}x{width}x3.npz"

        def packed() -> Iterator[tuple[np.ndarray, None]]:
            for index in range(len(chunks.chunks)):
                yield chunks.read(index)["images"], None

        whole = prepare_samples(packed(), (shape[0], height, width, 3), samples, {})
        (self.out / "run.json").unlink(missing_ok=True)
        os.replace(whole, samples)
        pictures.save_grid(BatchFile(samples).first(64), self.out / "grid.png")
        write_json(self.out / "run.json", {
            "configuration": chunks.configuration, "title": self.title(steps), "fingerprint": chunks.fingerprint,
            "samples": samples.name,
            "sha256": {"samples": sha256_of(samples), **chunks.sha256}, **made_by(),
            "timing": {"seconds": time.time() - began}}, sync=True, ending="the samples are kept")
        return samples


def _lines(flag: str, path: str) -> list[str]:
    """The lines of a text file, as editors count them. Raises UserError where it cannot be read, or is empty."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")          # Windows begins a file with a mark
    except (OSError, ValueError) as error:
        raise UserError(f"--{flag} {path}: cannot be read ({reason(error)})") from None
    if not lines[-1]:                               # after the last line
        lines.pop()
    if not lines:
        raise UserError(f"--{flag} {path}: holds no line")
    return lines


def load_pipeline(name: str) -> Any:
    """A pipeline of diffusers from a folder or by its name on the hub; only weights in safetensors are read.

    Raises UserError where it cannot be loaded, and where diffusers is not installed.
    """
    if not name:
        raise UserError("--pipeline: is missing, name a folder of a pipeline that diffusers saved, or one on the hub")
    try:
        from diffusers import DiffusionPipeline
    except ImportError:
        raise UserError("--pipeline: needs diffusers: pip install 'guided-pixels[diffusers]'") from None
    try:
        missing = _missing(Path(name))
        pipe: Any = None if missing else DiffusionPipeline.from_pretrained(name, use_safetensors=True)
    except Exception as error:          # of any kind: the loaders of diffusers and transformers raise what they come by
        raise UserError(f"--pipeline {name}: diffusers cannot load it ({reason(error)})") from None
    if missing:
        raise UserError(f"--pipeline {name}: its model_index.json names {', '.join(missing)}, of which there is no "
                        "folder")
    for part, words in pipe.components.items():
        if hasattr(words, "get_vocab") and len(words.get_vocab()) <= len(words.all_special_tokens):
            raise UserError(f"--pipeline {name}: its {part} knows no words, its files are missing or damaged")
    return pipe


def _missing(folder: Path) -> list[str]:
    """Components that the index of a pipeline's folder names and that have no folder; none for names on the hub.

    Diffusers looks for some of them in the folder of the pipeline then, and takes a tokenizer without words.
    """
    return [name for name, kind in read_index(folder).items()
            if isinstance(kind, list) and len(kind) == 2 and all(isinstance(part, str) for part in kind)
            and not (folder / name).is_dir()]


def _digest(pipe: Any) -> str:
    """SHA-256 of what computes in a pipeline: its classes, configurations, weights and tokenizers; hexadecimal."""
    digest = hashlib.sha256()
    for name, part in [("", pipe), *sorted(pipe.components.items())]:
        digest.update(json.dumps([name, type(part).__name__, _configuration(part)], sort_keys=True,
                                 default=str).encode())
        for key, value in sorted(part.state_dict().items()) if hasattr(part, "state_dict") else ():
            digest.update(f"{name}.{key} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        if getattr(part, "name_or_path", "") and hasattr(part, "vocab_files_names"):       # a tokenizer, and its folder
            for path in sorted(path for path in Path(part.name_or_path).glob("*") if path.is_file()):
                digest.update(f"{name}/{path.name} {sha256_of(path)}".encode())
    return digest.hexdigest()


def _configuration(part: Any) -> Any:
    """The configuration of a pipeline or of its component, without notes on where and with what it was saved."""
    config = getattr(part, "config", None) or {}

    def cleaned(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {str(key): cleaned(inner) for key, inner in value.items()
                if not str(key).startswith("_") and key != "transformers_version"}

    return cleaned(config.to_dict() if hasattr(config, "to_dict") else dict(config))
