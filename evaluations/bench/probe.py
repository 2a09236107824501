"""How far each contrast of guidance points at the truth, on images that the network has not seen.

Guidance moves the prediction F of the clean image x0 to F + s (F - W), W the weaker prediction. On images whose x0 is
known, the scale that brings it closest to x0 on average at a noise level is

    R(t) = E <x0 - F, F - W> / E |F - W|^2,

and 1 - (E <x0 - F, F - W>)^2 / (E |F - W|^2 E |x0 - F|^2) is the part of the squared error that is then left. One scale
for all levels follows from the same sums over levels, each weighted by abar / (1 - abar): that makes them errors of the
noise, which the network was trained on. Nothing is sampled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from guided_diffusion import checkpoint, dist_util
from guided_diffusion.build import DiffusionOptions, ModelOptions
from guided_diffusion.classes import stored_names
from guided_diffusion.errors import UserError
from guided_diffusion.guidance import ContrastGuidance, GuidanceOptions, Networks, StepContext
from guided_diffusion.image_datasets import BatchPlan, TrainingImages, find_data, holds_idx, open_images
from guided_diffusion.jobs import job, job_folder
from guided_diffusion.late import Tensor, no_grad, torch
from guided_diffusion.options import (
    Options,
    batch_option,
    comma_separated,
    entry_option,
    option,
    option_fields,
    required,
    seed_option,
)
from guided_diffusion.process import Denoiser
from guided_diffusion.progress import progress_bar
from guided_diffusion.rng import image_noise
from guided_diffusion.runs.command import say_note
from guided_diffusion.runs.effects import in_words
from guided_diffusion.runs.options import SampleOptions
from guided_diffusion.runs.sample import SamplingRun
from guided_diffusion.sampling import SAMPLERS

from ..metrics import METRICS
from ..reproduction.tables import EvaluationSpec, Row
from .candidates import candidates

if TYPE_CHECKING:
    from guided_diffusion.unet import UNetModel

RESAMPLINGS = 2000


@dataclass(frozen=True)
class ProbeOptions(Options):
    """The probe."""

    model: str = option("", "a model by name: a bundled one (scenes32), or the flags of a released checkpoint")
    model_path: str = option("", "checkpoint of the diffusion network, .pt or .safetensors")
    checkpoint_entry: str = entry_option()
    data_dir: str = required("images that the network has not seen: a folder, an .npz file, or fashion-mnist, of which "
                             "the test images are taken")
    methods: str = option("", "which methods, comma-separated, by their short names, like SAG,PAG; unset: all that "
                          "contrast two predictions and that the model supports")
    labels: str = option("given", "classes of the images: given, those of --data_dir; none, of a network with a null "
                         "class", choices=("given", "none"))
    levels: int = option(8, "noise levels, evenly spaced over the steps", minimum=1)
    num_images: int = option(32, "images, drawn at random from all", minimum=2)
    batch_size: int = batch_option(16, "images at a time")
    seed: int = seed_option("seed of the noise, and of which images are drawn")
    table: str = option("", "table.json of a table or bench of this model: how well what the probe says of its rows "
                        "agrees with what was measured")
    metric: str = option("fid", "which metric of that table", choices=tuple(METRICS))
    out: str = option("runs/probe", "folder for the table, the chart and the numbers")


@dataclass(frozen=True)
class Moments:
    """Inner products of each image at each level, (N, L) float64, in x0 and summed over its pixels.

    error: |x0 - F|^2. toward: <x0 - F, F - W>. change: |F - W|^2. weights: (L,), of levels where they are taken
    together.
    """

    error: np.ndarray
    toward: np.ndarray
    change: np.ndarray
    weights: np.ndarray

    @property
    def ratios(self) -> list[float | None]:
        """R(t) of each level; None where the contrast changes nothing."""
        toward, change = self.toward.mean(axis=0), self.change.mean(axis=0)
        return [float(one / other) if other else None for one, other in zip(toward, change, strict=True)]

    @property
    def scale(self) -> float:
        """The best scale for all levels; 0 where the contrast changes nothing."""
        change = float(self._together(self.change).sum())
        return float(self._together(self.toward).sum()) / change if change else 0.0

    def left(self, scale: float) -> float:
        """The part of the squared error of all levels that is left at a scale, like 0.98; above 1 it grows."""
        error, toward, change = (float(self._together(part).sum()) for part in (self.error, self.toward, self.change))
        return 1 - (2 * scale * toward - scale**2 * change) / error

    def scale_interval(self, chosen_of: int = 1) -> tuple[float, float]:
        """The 95 % interval of the best scale, over resamplings of the images.

        chosen_of: contrasts of which this one is the best; the interval then holds for whichever is chosen
        (Bonferroni).
        """
        toward, change = (self._together(part).sum(axis=1) for part in (self.toward, self.change))
        count = len(toward)
        drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), RESAMPLINGS)
        below = drawn @ change
        scales = np.divide(drawn @ toward, below, out=np.zeros(RESAMPLINGS), where=below != 0)
        tail = 0.025 / chosen_of
        low, high = np.quantile(scales, (tail, 1 - tail))
        return float(low), float(high)

    def _together(self, part: np.ndarray) -> np.ndarray:
        return part * self.weights


@dataclass(frozen=True)
class Probed:
    """A method at a block, "" where it knows none. options: the method there, switched on."""

    options: GuidanceOptions
    block: str
    moments: Moments

    @property
    def title(self) -> str:
        """Like "PAG, middle"."""
        return ", ".join(filter(None, (self.options.short, self.block)))


@dataclass(frozen=True)
class ProbeResult:
    """What a probe found. steps: of the chain, with the noise levels sigma. why: by method, why it is not there."""

    options: ProbeOptions
    steps: Sequence[int]
    sigmas: Sequence[float]
    probed: Sequence[Probed]
    why: dict[str, str]

    @property
    def best(self) -> list[Probed]:
        """For each method the block that leaves the smallest error at its best scale."""
        best: dict[str, Probed] = {}
        for one in self.probed:
            known = best.get(one.options.short)
            if known is None or one.moments.left(one.moments.scale) < known.moments.left(known.moments.scale):
                best[one.options.short] = one
        return list(best.values())

    @property
    def proposed(self) -> list[Probed]:
        """Of the best, those whose scale is above 0 beyond chance, with the choice among blocks taken into account."""
        blocks = Counter(one.options.short for one in self.probed)
        return [one for one in self.best if one.moments.scale_interval(blocks[one.options.short])[0] > 0]


def run_probe(options: ProbeOptions, model: ModelOptions, diffusion: DiffusionOptions,
              methods: Sequence[GuidanceOptions], write: Callable[[ProbeResult], str],
              given: Collection[str] = ()) -> str:
    """Probes all methods at all blocks; returns what `write` does, which writes the files and ends the job.

    given: flags that the user gave; those without effect are said. Raises UserError for what is wrong with the options,
    before any evaluation.
    """
    _check_windows(methods)
    sample = SampleOptions(model=options.model, model_path=options.model_path, batch_size=options.batch_size,
                           seed=options.seed, checkpoint_entry=options.checkpoint_entry)
    off = [type(method)(**_files_of(method)) for method in methods]
    run = SamplingRun.of([sample, model, diffusion, *(kind() for kind in SAMPLERS.values()), *off])
    if options.labels == "none" and not model.null_class:
        raise UserError("--labels none: the network has no null class, as training with --label_dropout makes it")
    label = model.num_classes if options.labels == "none" else None
    images = _held_out(options, run.sample.model_path, model)
    chosen, why = _methods(options, replace(run, guidance=tuple(methods)))
    built = run.build()
    nets = run.networks(built.model)
    found: list[tuple[GuidanceOptions, str, ContrastGuidance]] = []
    for method in chosen:
        there = _contrasts(method, built.model, nets)
        if isinstance(there, str):
            why[method.short] = there
            _check_named(options, method.short, why)
        else:
            found += there
    if not found:
        raise UserError(f"no method can be probed: {'; '.join(f'{short}: {text}' for short, text in why.items())}")
    say_note(in_words(_idle(methods, [method for method, _, _ in found]), given))
    process = built.diffusion
    steps = levels(process.num_timesteps, options.levels)
    with job("probe", job_folder("probe", options.out)):
        moments = probe_terms(process.denoiser(built.network), [term for _, _, term in found],
                              _batches(images, options, label), steps, options.seed)
        sigmas = [float(np.sqrt(1 / process.alphas_cumprod[t] - 1)) for t in steps]
        return write(ProbeResult(options, steps, sigmas, [
            Probed(method, block, one) for (method, block, _), one in zip(found, moments, strict=True)], why))


def _check_windows(methods: Sequence[GuidanceOptions]) -> None:
    """Raises UserError for a window of steps or noise levels: a contrast is probed at all of them."""
    for method in methods:
        for flag in method.bounds():
            if (value := getattr(method, flag)) is not None:
                raise UserError(f"--{flag} {value:g}: the probe has no windows, leave it out; its table and its chart "
                                "show each noise level by itself")


def _idle(methods: Sequence[GuidanceOptions], probed: Sequence[GuidanceOptions]) -> dict[str, str]:
    """Returns the flags of guidance that nothing here depends on, and why; probed: the methods at each block."""
    of_probed = {field.name for one in probed for field in option_fields(type(one))}
    idle: dict[str, str] = {}
    for method in methods:
        flags = {field.name for field in option_fields(type(method))}
        if tried := [one for one in probed if one.short == method.short]:
            idle |= {flag: "each block is probed" for flag in flags
                     if any(getattr(one, flag) != getattr(method, flag) for one in tried)}
            idle |= dict.fromkeys(method.switched_on, "the probe proposes scales")
        else:
            idle |= dict.fromkeys(flags - of_probed, f"{method.short} is not probed")
    return idle


def _contrasts(method: GuidanceOptions, model: UNetModel, nets: Networks,
               ) -> list[tuple[GuidanceOptions, str, ContrastGuidance]] | str:
    """Returns the method at each block, the block and its one contrast there, or why it has none such, in words."""
    found = []
    for block, there in method.at_blocks(model).items():
        terms = [term for term in there.build(nets) if isinstance(term, ContrastGuidance)]
        if len(terms) != 1:
            return f"it builds {f'{len(terms)} contrasts' if terms else 'no contrast'}"
        found.append((there, block, terms[0]))
    return found or "it knows no block of this network"


def _files_of(method: GuidanceOptions) -> dict[str, Any]:
    """Returns the names of files among a method's options, which stay as they are."""
    return {flag: getattr(method, flag) for flag in {**method.files(), **method.remedies}}


def levels(num_timesteps: int, count: int) -> list[int]:
    """Returns the steps in the middles of so many equal parts of a chain, from the noisiest."""
    count = min(count, num_timesteps)
    return [int((part + 0.5) / count * num_timesteps) for part in reversed(range(count))]


def _methods(options: ProbeOptions, run: SamplingRun) -> tuple[list[GuidanceOptions], dict[str, str]]:
    """Returns the methods that contrast two predictions, switched on, and why others are not there."""
    row = Row("probe", run, EvaluationSpec(), {}, Path(""))
    off = row.changed(**{flag: field for method in run.guidance for flag, field in _switched_off(method).items()})
    found, why = candidates(off, "")
    known = {one.short: one for one in found if one.makes_contrasts}
    remembering = {method.short for method in run.guidance if method.kind.remembers}
    for one in found:
        if one.missing:
            why[one.short] = "; ".join(map(str, one.missing))
            known.pop(one.short, None)
        elif not one.makes_contrasts:
            why[one.short] = "it does not contrast two predictions"
        elif one.short in remembering:
            why[one.short] = "it goes on from what it left at the step before, and the probe's levels have none"
            known.pop(one.short)
    named = {method.short.lower(): method.short for method in run.guidance}
    words = [word.lower() for word in comma_separated(options.methods)]
    for word in words:
        if word not in named:
            raise UserError(f"--methods {options.methods}: there is no {word!r}, there are {', '.join(named.values())}")
        _check_named(options, named[word], why)
    chosen = [replace(method, **method.switched_on) for method in off.run.guidance
              if method.short in known and (not words or method.short.lower() in words)]
    return chosen, {} if words else why


def _check_named(options: ProbeOptions, short: str, why: Mapping[str, str]) -> None:
    """Raises UserError where --methods names methods, this one among them, and there is a reason against it."""
    if options.methods and short in why:
        raise UserError(f"--methods {options.methods}: {short} cannot be probed: {why[short]}")


def _switched_off(method: GuidanceOptions) -> dict[str, Any]:
    """Returns the flags that switch a method off, at their defaults."""
    default = type(method)()
    return {flag: getattr(default, flag) for flag in method.switched_on}


def _held_out(options: ProbeOptions, model_path: str, model: ModelOptions) -> TrainingImages:
    """Returns the images in the classes of the network; raises UserError for too few, and such as do not fit."""
    split = "test" if holds_idx(find_data(options.data_dir)) else "train"
    frame = (model.in_channels, model.image_size, model.image_size)
    known = stored_names(checkpoint.locate(model_path)) if model.class_cond and model_path else None
    images = open_images(options.data_dir, frame, split=split, class_cond=model.class_cond, known=known,
                         skip_damaged=None)
    if images.count < options.num_images:
        raise UserError(f"--num_images {options.num_images}: {options.data_dir} has {images.count}")
    if model.class_cond:
        images.check_classes(model.num_classes, trained=True)
    return images


def _batches(images: TrainingImages, options: ProbeOptions, label: int | None,
             ) -> Iterator[tuple[list[int], Tensor, dict[str, Tensor]]]:
    """Yields images drawn at random, each once, with numbers of their own and conditions, without augmentation.

    label: in place of the label of each image.
    """
    plan = BatchPlan(images.count, options.batch_size, options.seed, shuffle=True, flip=False, crop=False, rank=0,
                     world_size=1)
    batches = images.batches(plan, 0)
    with progress_bar(options.num_images, "probing", "image") as progress:
        for start in range(0, options.num_images, options.batch_size):
            count = min(options.batch_size, options.num_images - start)
            x0, conditions = next(batches)
            if label is not None:
                conditions["y"] = torch.full_like(conditions["y"], label)
            yield (list(range(start, start + count)), x0[:count],
                   {name: value[:count] for name, value in conditions.items()})
            progress.update(count)


@no_grad
def probe_terms(denoise: Denoiser, terms: Sequence[ContrastGuidance],
                batches: Iterator[tuple[list[int], Tensor, dict[str, Tensor]]], steps: Sequence[int], seed: int,
                ) -> list[Moments]:
    """Returns the moments of each term.

    denoise: without conditions. batches: places of images, x0 (N, C, H, W) in [-1, 1], and their conditions. steps: of
    the chain. seed: of the noise, which depends on the image and the step alone.
    """
    process, device = denoise.diffusion, dist_util.dev()
    parts: list[np.ndarray] = []                    # of each batch (terms, 3, N, L)
    for image_ids, x0, conditions in batches:
        bound = replace(denoise, model_kwargs={name: value.to(device) for name, value in conditions.items()})
        x0 = x0.to(device)
        found = [_moments_at(bound, terms, x0, image_ids, step, seed) for step in steps]
        parts.append(np.stack(found, axis=-1))
    abar = process.alphas_cumprod[list(steps)]
    together = np.concatenate(parts, axis=2)
    return [Moments(error, toward, change, abar / (1 - abar)) for error, toward, change in together]


def _moments_at(denoise: Denoiser, terms: Sequence[ContrastGuidance], x0: Tensor, image_ids: Sequence[int], step: int,
                seed: int) -> np.ndarray:
    """Returns (terms, 3, N): error, toward and change of the images at a step."""
    process = denoise.diffusion
    t = torch.full((len(x0),), step, device=x0.device)
    x_t = process.q_sample(x0, t, image_noise(seed, image_ids, step, x0.shape[1:]).to(x0))
    ctx = StepContext(denoise, x_t, t, torch.tensor(image_ids))
    with ExitStack() as stack:
        for term in terms:
            ctx.observed[term] = stack.enter_context(term.observe())
        pred = denoise(x_t, t)
    missing = x0 - process.predict_xstart_from_eps(x_t, t, pred.eps)
    found = []
    for term in terms:
        delta = term.delta(ctx, pred) / term.scale
        change = process.predict_xstart_from_eps(torch.zeros_like(delta), t, delta)
        found.append([_inner(missing, missing), _inner(missing, change), _inner(change, change)])
    return np.array(found)


def _inner(one: Tensor, other: Tensor) -> np.ndarray:
    """Returns the inner product of each image, (N,) float64."""
    values: np.ndarray = (one.double() * other.double()).flatten(1).sum(dim=1).cpu().numpy()
    return values


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Returns Spearman's correlation of two lists, ties with their mean rank; None where one of them is constant."""
    ranks = [_ranks(np.asarray(values, dtype=float)) for values in (one, other)]
    if any(len(set(values.tolist())) < 2 for values in ranks):
        return None
    return float(np.corrcoef(np.stack(ranks))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    below = (values[:, None] > values).sum(axis=1)
    return below + ((values[:, None] == values).sum(axis=1) - 1) / 2


