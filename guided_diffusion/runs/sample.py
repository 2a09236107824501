"""A whole sampling run: from options to a file of samples, a picture and a record.

The run is cut into chunks of `batch_size` consecutive images, which ranks take as they become free. Each finished chunk
is a file, so that no rank holds more than one, and a run that was stopped goes on where it was; at the end rank 0 packs
them. Image i depends on (seed, i) and the configuration alone.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from .. import checkpoint, dist_util, pictures
from ..build import DiffusionOptions, ModelOptions, build_diffusion, build_model
from ..classes import ClassNames, check_same_names, class_called, first_names, label_number
from ..dtypes import AUTO, dtype_name, with_dtype
from ..errors import UserError, said_otherwise
from ..execution import choose_dtype, compile_for
from ..fetch import public_values, sha256_of, without_secrets
from ..files import check_folder, write_json
from ..functions import is_ours
from ..guidance import Guidance, GuidanceOptions, Networks
from ..guidance.base import without_labels
from ..jobs import job, mark_finished
from ..late import torch
from ..npz import BatchFile
from ..options import Options, option_fields
from ..process import DiffusionProcess
from ..respace import space_timesteps
from ..sampling import KINDS, SAMPLERS, SamplerOptions
from . import shards
from .base_images import OF_BASE, BaseImages
from .chunks import Indices
from .folders import default_folder
from .labels import ANY_LABELS, NONE, Labels, is_class, is_file, make_labels
from .options import SampleOptions, command_values, option_classes
from .record import MODEL_FLAG, identity, made_by, name_of, own_sources, recorded_dtype, say_unrecorded, title
from .sampler import BuiltRun, ImageSampler
from .shards import PICTURE, Shards
from .work import make_chunks
from .workers import WorkQueue

if TYPE_CHECKING:
    from ..unet import UNetModel

LOG = logging.getLogger(__name__)


LEAST_SIGMA = 5.0           # of the first step; the network sees more of the image in less noise


def begins_late(process: DiffusionProcess) -> str:
    """A sentence for a chain whose first step is at so little noise that the network takes pure noise for an image.

    "" where that is not so.
    """
    with np.errstate(divide="ignore"):              # abar may be 0 in pure noise
        first, last = (float(np.sqrt(1 / abar[-1] - 1))
                       for abar in (process.alphas_cumprod, process.original_alphas_cumprod))
    if first >= min(LEAST_SIGMA, last):
        return ""
    return (f"the first of {process.num_timesteps} step{'s' * (process.num_timesteps > 1)} is at the noise level "
            f"{first:.2g}, and images begin in noise as at {last:.3g}, the last step of the training: what of it is "
            "too much stays in them; more steps begin nearer to it")


def built_terms(method: GuidanceOptions, nets: Networks) -> list[Guidance]:
    """The terms of a method; says where none is of its kind.

    Raises UserError where they guide at other steps than the method says they do.
    """
    terms = method.build(nets)
    kinds = tuple(kind for kind in KINDS if issubclass(method.kind, kind))
    if terms and not any(isinstance(term, kinds) for term in terms):
        found = next((kind.__name__ for kind in KINDS if isinstance(terms[0], kind)), "that of its terms")
        dist_util.say(f"{type(method).__name__}: states the kind {method.kind.__name__}, and builds none of it but "
                      f"{', '.join(type(term).__name__ for term in terms)}; kind = {found} would be right")
    said = [replace(term.steps, what="") for term, _ in method.schedule()]
    for term in terms:
        if said and replace(term.steps, what="") not in said:
            raise UserError(f"{type(method).__name__}: builds a {type(term).__name__} that guides at other steps than "
                            "its options say; give it their window, like **self.window")
    return terms


@dataclass(frozen=True)
class SamplingRun:
    """All options of a run. `run()` samples, and returns the path of the .npz on rank 0.

    samplers: the options of every sampler, of which --sampler chooses one. guidance: those of every method, in the
    order of GUIDANCE.
    """

    LABELS: ClassVar[tuple[str, ...]] = ANY_LABELS       # words of --labels that every network takes

    sample: SampleOptions
    model: ModelOptions
    diffusion: DiffusionOptions
    samplers: tuple[SamplerOptions, ...]
    guidance: tuple[GuidanceOptions, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", with_dtype(self.model, self.sample.dtype))

    @classmethod
    def of(cls, options: Sequence[Any]) -> Self:
        """The run of SampleOptions and an instance of each of `option_classes()`, in that order."""
        sample, model, diffusion, *rest = options
        return cls(sample, model, diffusion, tuple(one for one in rest if isinstance(one, SamplerOptions)),
                   tuple(one for one in rest if isinstance(one, GuidanceOptions)))

    @classmethod
    def classes(cls) -> tuple[type[Options], ...]:
        """The classes of the options, in the order of `of`."""
        return (SampleOptions, *option_classes())

    @classmethod
    def preset_values(cls, given: dict[str, Any]) -> dict[str, Any]:
        """What `--model` and the checkpoints say of the options; given: by the user.

        See `options.command_values`.
        """
        return command_values(given)

    @property
    def options(self) -> tuple[Options, ...]:
        """All of them; of a flag that several have, the last one counts."""
        return (*self.guidance, *self.samplers, self.diffusion, self.model, self.sample)

    def changed(self, **values: Any) -> Self:
        """With other values of some flags, whichever options have them."""
        def new(options: Any) -> Any:
            names = {field.name for field in option_fields(type(options))} & values.keys()
            return replace(options, **{name: values[name] for name in names}) if names else options

        return type(self)(new(self.sample), new(self.model), new(self.diffusion), tuple(map(new, self.samplers)),
                          tuple(map(new, self.guidance)))

    @property
    def out(self) -> Path:
        """The output folder; see `default_folder` where none is given."""
        return Path(self.sample.out) if self.sample.out else self._default_folder()

    def _default_folder(self) -> Path:
        files = {name_of(flag): without_secrets(path) for flag, path in self.files().items()}
        beside = {"labels": self.sample.labels, "base_samples": getattr(self.sample, "base_samples", "")}
        return default_folder("samples", self.sample, {**identity(self.configuration(), files), **beside})

    def placed(self) -> Self:
        """The run with a folder: its own, or the one that is named after it, which rank 0 says; all ranks call it."""
        if self.sample.out:
            return self
        dist_util.connect()
        with dist_util.together():
            self.sample.check_given()
            out = self.out
        if dist_util.is_main():
            LOG.info("--out is not given: the samples go to %s", out)
        return self.changed(out=str(out))

    @property
    def sampler(self) -> SamplerOptions:
        """The options of the sampler that is used."""
        return self.samplers[list(SAMPLERS).index(self.sample.sampler_name)]

    @property
    def active(self) -> list[GuidanceOptions]:
        """The guidance methods that are on."""
        return [method for method in self.guidance if method.active]

    @property
    def labelled(self) -> bool:
        """Whether the network or a guidance method takes classes."""
        return self.model.class_cond or any(method.needs_labels for method in self.active)

    @property
    def num_steps(self) -> int:
        """Steps of the (respaced) chain, or of the sampler's own grid."""
        options = self._respaced
        chain = space_timesteps(options.diffusion_steps, options.timestep_respacing or [options.diffusion_steps])
        return self.sampler.num_steps(len(chain))

    @property
    def _respaced(self) -> DiffusionOptions:
        """The process, respaced as its options and those of the sampler say."""
        return replace(self.diffusion, timestep_respacing=self.sampler.respacing(self.diffusion.timestep_respacing))

    def process(self) -> DiffusionProcess:
        """The process whose steps the sampler walks through. Raises UserError where its options do not fit."""
        return self.sampler.process(build_diffusion(self._respaced))

    def title(self) -> str:
        """The guidance in words, like "SAG s = 0.1 + CG scale 0.5"."""
        return " + ".join(method.title() for method in self.active) or "no guidance"

    def configuration(self) -> dict[str, Any]:
        """Every option that the images may depend on, by flag name."""
        values: dict[str, Any] = {}
        for options in self.options:
            values |= asdict(options)
        values["dtype"] = values["dtype"] or dtype_name(values)
        return public_values({name: value for name, value in values.items() if name not in ("out", "overwrite")})

    def recorded(self) -> dict[str, Any]:
        """The configuration as run.json has it: without options of methods and samplers from outside that are not used.

        A process that does not know them could not tell that they are not.
        """
        unused: list[Options] = [one for one in self.guidance if not one.active and not type(one)().active]
        unused += [one for one in self.samplers if type(one) is not type(self.sampler)]
        outside = [one for one in unused if not is_ours(type(one).__module__)]
        others = {field.name for one in self.options if one not in outside for field in option_fields(type(one))}
        left_out = {field.name for one in outside for field in option_fields(type(one))} - others
        return {name: value for name, value in self.configuration().items() if name not in left_out}

    def decided(self) -> Self:
        """The run with a type of its own where --dtype is auto; all ranks call it together.

        That is the type of the images that are in the output folder already, else what rank 0 finds to be fastest.
        """
        if self.sample.dtype != AUTO:
            return self
        dist_util.connect()
        store = dist_util.store("dtype")
        with dist_util.together():
            if dist_util.is_main():
                store.set("name", self._found_dtype())
        with dist_util.together():
            return self.changed(dtype=store.get("name").decode())

    def _found_dtype(self) -> str:
        before = None if self.sample.overwrite else recorded_dtype(self.out)
        if before:
            LOG.info("--dtype auto: %s, as the images that are in %s already", before, self.out)
            return before
        choice = choose_dtype(self.model, self.sample.batch_size, dist_util.dev())
        LOG.info(choice.line())
        return choice.dtype

    def run(self) -> Path | None:
        """Samples what is missing; the same on all ranks. Returns the file of samples on rank 0, else None."""
        if not self.sample.out:
            return self.placed().run()
        if self.sample.dtype == AUTO:
            return self.decided().run()
        began = time.time()
        dist_util.connect()
        say_unrecorded(self.sampler, *self.active)
        with ExitStack() as stack:
            with dist_util.together():
                base = self.base_images()
                labels = self.labels(base)
                if base is not None:
                    base.check_all()
                self._check_out()
                if dist_util.is_main():
                    stack.enter_context(shards.locked(self.out))
            with dist_util.together():
                before = checkpoint.stamps(self.files())
                of_base = () if base is None else (base.low_res, base.stage)
                sampler = ImageSampler(self.sample, self.sampler, self.build(), *of_base)
                names = self._class_names()
            if self.sample.overwrite:
                self._compile(sampler.model)            # which may be refused, before anything is removed
            queue = WorkQueue()
            with dist_util.together():
                sha256 = self._sha256() if dist_util.is_main() else {}
                checkpoint.check_unchanged(self.files(), before)      # else the digests are of other weights
                if dist_util.is_main():
                    for method in self.active:
                        method.check(sha256, self.sample.checkpoint_entry)
                    named = {name_of(flag): value for flag, value in sha256.items()}
                    queue.put("sha256", named)
                    todo = self._chunks(named, labels, base, names).prepare(self.sample.overwrite)
                    queue.put("todo", None if todo is None else todo.spans)
            if base is not None:
                base.say_repeated(self.sample.num_samples)
            return self._sample(sampler, self._chunks(queue.get("sha256"), labels, base, names), queue, began)

    def _chunks(self, sha256: dict[str, str], labels: Labels | None, base: BaseImages | None,
                names: ClassNames | None = None) -> Shards:
        return Shards(self.out, self.recorded(), sha256,
                      lambda image_ids: None if labels is None else labels(image_ids).numpy(),
                      None if base is None else base.digests, names)

    def _class_names(self) -> ClassNames | None:
        """The names of the classes that the images are labelled with; None where they have none."""
        labelled = self.labelled and self.sample.labels != NONE
        return first_names(self.checkpoints().values()) if labelled else None

    def base_images(self) -> BaseImages | None:
        """The images that this run upsamples; None where it begins with noise alone."""
        return None

    @property
    def samples(self) -> Path:
        """The file that the samples of the finished run are in."""
        return shards.samples_file(self.out, self.sample.num_samples, self.model.image_size, self.model.in_channels)

    def check_folder(self, sha256: dict[str, str]) -> None:
        """Raises UserError where the output folder holds images of another run; sha256: of the `files`."""
        base = self.base_images()
        self._chunks({name_of(flag): value for flag, value in sha256.items()}, self.labels(base), base).check()

    def check_kept(self) -> None:
        """Raises UserError where the output folder holds images of other options or checkpoints, which the run keeps.

        The images themselves are not looked at, nor the labels: those of images to upsample may yet have to be made.
        """
        kept = not self.sample.overwrite and any((self.out / name).exists() for name in ("run.json", "shards/run.json"))
        if not kept:
            return
        if self.sample.dtype == AUTO:
            return self.changed(dtype=recorded_dtype(self.out) or "").check_kept()
        sha256 = {name_of(flag): value for flag, value in self._sha256().items()}
        Shards(self.out, self.recorded(), sha256).recorded()

    def checkpoints(self) -> dict[str, str]:
        """The files of networks that the images depend on, by flag."""
        files = {MODEL_FLAG: self.sample.model_path}
        for method in self.active:
            files |= method.files()
        return files

    def files(self) -> dict[str, str]:
        """All files that the images depend on: the checkpoints by flag, and what lies beside them by name."""
        beside = {name: path for method in self.active for name, path in method.beside().items()}
        return self.checkpoints() | beside | own_sources(self.sampler, *self.active)

    def _sha256(self) -> dict[str, str]:
        return {flag: sha256_of(checkpoint.locate(path)) for flag, path in self.files().items()}

    def _check_out(self) -> None:
        """Raises UserError where the output folder cannot be written."""
        check_folder("--out", self.out)

    def labels(self, base: BaseImages | None = None) -> Labels | None:
        """The labels of the images; None where nothing asks for them. base: the images that are upsampled.

        Says on the first rank where a word of `--labels` is the name of a class as well.
        """
        if not self.labelled:
            if self.sample.labels not in self.LABELS:
                raise UserError(f"--labels {self.sample.labels}: the network has no classes, as --class_cond is False")
            return None
        text, files = self.sample.labels, self.checkpoints().values()
        of_base = base if text == OF_BASE else None
        called = "" if is_class(text) and of_base is None else class_called(text, files)
        with said_otherwise(lambda error: f"{error}; {called}" if called else error):
            labels = (self._labels(text) if of_base is None
                      else of_base.labels(self.model.num_classes, first_names(files)))
        if called:
            dist_util.say(f"--labels {text}: is taken as {'a file' if is_file(text) else 'a word'}, not as a name; "
                          f"{called}")
        return labels

    def _labels(self, text: str) -> Labels:
        """The labels that a value of `--labels` stands for, whatever images there may be to upsample."""
        unlabelled = [method for method in self.active if method.needs_labels]
        if text == NONE and unlabelled:
            raise UserError(f"--labels {text}: {unlabelled[0].short} guides by classes; choose some, like "
                            "--labels random")
        if is_class(text):
            words = [*self.LABELS, *([NONE] if self.model.null_class and not unlabelled else [])]
            text = label_number(text, self.checkpoints().values(), words)
        return make_labels(text, seed=self.sample.seed, num_classes=self.model.num_classes,
                           num_samples=self.sample.num_samples, null_class=self.model.null_class)

    def networks(self, model: UNetModel) -> Networks:
        """What the terms of its guidance are built from; model: the network that is sampled, on any device."""
        return Networks(model, dist_util.dev(), self.sample.seed, model_path=self.sample.model_path,
                        entry=self.sample.checkpoint_entry, num_classes=self.model.num_classes,
                        flags=asdict(self.model))

    def build(self) -> BuiltRun:
        """Everything that the options describe, so that what is wrong with them shows before the large file is read."""
        self.sample.check_given()
        for method in self.active:
            method.check_files()
        for flag, path in self.checkpoints().items():
            checkpoint.check_there(flag, path)
        diffusion = self.process()
        with torch.device("meta"):
            model = build_model(self.model)
        nets = self.networks(model)
        guidance = [term for method in self.active for term in built_terms(method, nets)]
        nets.load(model, self.sample.model_path, asdict(self.model) | asdict(self.diffusion),
                  self.sample.checkpoint_entry)
        check_same_names(self.checkpoints())
        return BuiltRun(model, model if self.model.class_cond else without_labels(model), diffusion, guidance)

    def _compile(self, model: UNetModel) -> None:
        """Compiles the network where --compile asks for it; rank 0 says what that gains."""
        if self.sample.compile:
            with dist_util.together():
                line = compile_for(model, self.sample.batch_size)
            if dist_util.is_main():
                LOG.info(line)

    def _sample(self, sampler: ImageSampler, chunks: Shards, queue: WorkQueue, began: float) -> Path | None:
        """Samples what there is to do, on all ranks; returns the file of samples on rank 0."""
        spans = queue.get("todo")
        if spans is not None:
            if spans and dist_util.is_main() and (late := begins_late(sampler.diffusion)):
                LOG.warning(late)
            if not self.sample.overwrite:
                self._compile(sampler.model)
        try:
            with queue:
                if spans is not None:
                    with job("sampling", self.out, self.title(), resumes=True):
                        self._work(sampler, chunks, queue, Indices.of(spans))
                        if dist_util.is_main():
                            self._finish(chunks, began)
                            chunks.settle(self.sample.keep_shards)
                elif dist_util.is_main():
                    if not (self.out / PICTURE).exists():
                        self._draw(chunks)
                    if chunks.settle(self.sample.keep_shards):
                        with job("sampling", self.out, self.title()):
                            pass                        # the state there may be that of the longer run
                    else:
                        mark_finished(self.out)
        finally:
            if dist_util.is_main():
                chunks.tidy()
        return chunks.samples if dist_util.is_main() else None

    def _work(self, sampler: ImageSampler, chunks: Shards, queue: WorkQueue, todo: Indices) -> None:
        """Samples chunks into files as long as there are any."""
        def make(image_ids: Sequence[int], on_step: Callable[[float], None]) -> dict[str, np.ndarray]:
            labels = None if chunks.labels is None else chunks.labels(image_ids)
            images = sampler.images(image_ids, labels, on_step)
            return {"images": images, **({} if labels is None else {"labels": labels})}

        make_chunks(make, chunks, todo, queue, self.sample.log_every)

    def _draw(self, chunks: Shards) -> None:
        pictures.save_grid(BatchFile(chunks.samples, chunks.shape[3]).first(64), self.out / PICTURE)

    def _finish(self, chunks: Shards, began: float) -> None:
        """Packs the chunks, draws the picture, and writes the record last."""
        packed, timing = chunks.pack()
        chunks.set_record_aside()
        os.replace(packed, chunks.samples)
        self._draw(chunks)
        record = {
            "configuration": chunks.configuration,
            "title": title(chunks.configuration),
            "fingerprint": chunks.fingerprint,
            "samples": chunks.samples.name,
            "sha256": {"samples": sha256_of(chunks.samples), **chunks.sha256},
            **made_by(),
            "timing": {"seconds": time.time() - began, "chunks": timing},
        }
        write_json(chunks.record, record, sync=True, ending="the samples are kept")
