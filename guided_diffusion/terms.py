"""What a sampler asks of guidance: a list of terms, each a function of one network evaluation.

A *contrast* evaluates the network again on something degraded and returns a change of eps. A *gradient* returns a
gradient at x_t; the sampler decides how it enters (`mean += variance * g` in DDPM, `eps -= sqrt(1 - abar) * g` in
DDIM). A *loss* is differentiated to x_t through the step's own evaluation, the losses of all terms at once; any sampler
takes that gradient from x_{t-1} (`mean -= g`). A *transform* changes the sum of all contrasts. Terms know neither each
other nor the sampler. A term whose scale is 0, or whose window does not hold the step, is not evaluated, and observes
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, ClassVar, TypedDict, TypeVar

import numpy as np

from .errors import UserError, said_otherwise
from .late import Tensor, torch
from .process import Denoiser, DiffusionProcess, Prediction

Value = TypeVar("Value")


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a further evaluation of the network is given.

    x: (N, C, H, W). t: (N,) int64, respaced. changes: conditions that differ from those of the step, such as another
    label under "y", (N, ...) each.
    """

    x: Tensor
    t: Tensor
    changes: Mapping[str, Any] = field(default_factory=dict)

    def same(self, other: Inputs) -> bool:
        """Whether an evaluation of the other inputs gives the same."""
        return (_same(self.x, other.x) and _same(self.t, other.t) and self.changes.keys() == other.changes.keys()
                and all(_same(value, other.changes[name]) for name, value in self.changes.items()))


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    tensors = isinstance(one, Tensor) and isinstance(other, Tensor)
    return tensors and one.dtype == other.dtype and torch.equal(one, other)


Lent = Sequence[tuple[str, Tensor, int]]            # tensors that terms see, with their names and versions


@dataclass
class Shared:
    """What the terms of one step share: values by key, and evaluations by their inputs.

    lent: the tensors of these. asked: the methods of terms that are at work, the innermost last.
    """

    values: dict[Hashable, Any] = field(default_factory=dict)
    evaluations: list[tuple[Inputs, Prediction]] = field(default_factory=list)
    lent: list[tuple[str, Tensor, int]] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def add(self, inputs: Inputs, pred: Prediction) -> None:
        """Takes an evaluation in."""
        self.evaluations.append((inputs, pred))
        self.lent += _lent({f"the {name} of an evaluation": value for name, value in vars(pred).items()})


@dataclass(frozen=True)
class StepContext:
    """One step of a batch: what every guidance term may see.

    denoise: (x, t) -> Prediction, the network with its labels, respaced. x_t: (N, C, H, W). t: (N,) int64, index
    into the respaced chain. image_ids: (N,) int64, the images' places in the run. observed: what each term's
    `observe` gave around the evaluation that `pred` came from. shared: see `once` and `evaluate`. memory: what terms
    keep from step to step of a chain, (N, ...) each.
    """

    denoise: Denoiser
    x_t: Tensor
    t: Tensor
    image_ids: Tensor
    observed: dict[Guidance, Any] = field(default_factory=dict)
    shared: Shared = field(default_factory=Shared)
    memory: dict[Guidance, Tensor] = field(default_factory=dict)

    @property
    def fraction(self) -> Tensor:
        """The step as a fraction of the original chain, (N,) float from 0 to 1."""
        diffusion = self.denoise.diffusion
        return torch.from_numpy(diffusion.timestep_map).to(self.t.device)[self.t].float() / diffusion.original_num_steps

    @property
    def model_t(self) -> Tensor:
        """The original step index, as networks see it."""
        return self.denoise.diffusion.model_timesteps(self.t)

    @property
    def model_kwargs(self) -> Mapping[str, Any]:
        """The network's conditions, such as labels under "y"."""
        return self.denoise.model_kwargs

    def once(self, key: Hashable, compute: Callable[[], Value]) -> Value:
        """The value of `compute()`, which is called for the first term of the step that asks for this key."""
        if key not in self.shared.values:
            self.shared.values[key] = compute()
        return self.shared.values[key]

    def evaluate(self, x: Tensor, t: Tensor, **changes: Any) -> Prediction:
        """A further evaluation of the network at x (N, C, H, W), at steps t (N,), with some conditions changed.

        Terms that ask for the same evaluation share one. It must be that of the network as it is: a term that overrides
        anything inside it calls `denoise` itself. Raises UserError for inputs that are not of the step's images.
        """
        inputs = Inputs(x, t, changes)
        for known, pred in self.shared.evaluations:
            if inputs.same(known):
                return pred
        self.check(inputs)
        pred = self._bound(changes)(x, t)
        self.shared.add(inputs, pred)
        return pred

    def evaluate_together(self, wanted: Sequence[Inputs]) -> list[int]:
        """Makes several evaluations as one batch, from which `evaluate` then takes them: the same to rounding.

        Those that the step has made already are left out, and a single one is left to `evaluate`. Returns the place of
        each in the batch. Raises UserError as `evaluate`.
        """
        different: list[Inputs] = []
        places = []
        for inputs in wanted:
            self.check(inputs)
            if any(inputs.same(known) for known, _ in self.shared.evaluations):
                continue
            place = next((i for i, other in enumerate(different) if inputs.same(other)), len(different))
            different += [inputs] if place == len(different) else []
            places.append(place)
        if len(different) < 2:
            return places
        x, t = (torch.cat(parts) for parts in zip(*[(inputs.x, inputs.t) for inputs in different], strict=True))
        conditions = [{**self.model_kwargs, **inputs.changes} for inputs in different]
        if any(one.keys() != conditions[0].keys() for one in conditions):
            raise UserError("evaluations in one batch must have the same conditions, such as y")
        batch = {name: _stacked([one[name] for one in conditions]) for name in conditions[0]}
        pred = replace(self.denoise, model_kwargs=batch)(x, t)
        parts = [dict(zip(vars(pred), values, strict=True))
                 for values in zip(*[value.chunk(len(different)) for value in vars(pred).values()], strict=True)]
        for inputs, part in zip(different, parts, strict=True):
            self.shared.add(inputs, Prediction(**part))
        return places

    def check(self, inputs: Inputs) -> None:
        """Raises UserError where an evaluation is not one of the step's images, (N, ...) each, at steps of the chain.

        Steps and labels are looked at as far as it shows without waiting for a device.
        """
        who = self.shared.asked[-1] if self.shared.asked else "evaluate"
        count = len(self.x_t)
        if not isinstance(inputs.x, Tensor) or inputs.x.shape != self.x_t.shape:
            raise UserError(f"{who}: asks for x {_in_words(inputs.x)}, must be {tuple(self.x_t.shape)} as x_t")
        if not isinstance(inputs.t, Tensor) or inputs.t.shape != (count,):
            raise UserError(f"{who}: asks for t {_in_words(inputs.t)}, must be ({count},), a step for each image")
        for name, value in inputs.changes.items():
            if isinstance(value, Tensor) and value.shape[:1] != (count,):
                raise UserError(f"{who}: asks for {name} {_in_words(value)}, must have {count} rows, one an image")
        with said_otherwise(lambda text: f"{who}: asks for {text}"):
            if inputs.t is not self.t:
                self.denoise.diffusion.check_steps(inputs.t)
            if "y" in inputs.changes:
                self._bound(inputs.changes).check_labels(wait=False)

    def _bound(self, changes: Mapping[str, Any]) -> Denoiser:
        """The network with changed conditions."""
        return replace(self.denoise, model_kwargs={**self.model_kwargs, **changes}) if changes else self.denoise


@contextmanager
def left_alone(who: str, ctx: StepContext, pred: Prediction | None = None, **given: Tensor | None) -> Iterator[None]:
    """Raises UserError, beginning with `who`, where the block writes in place what it was given for a step.

    That is what the sampler and other terms go on with: x_t, t, image_ids, the conditions, `pred`, further evaluations,
    and `given`, by name. Tensors that were made in inference mode do not tell.
    """
    conditions = dict(ctx.model_kwargs)
    lent = _lent({"x_t": ctx.x_t, "t": ctx.t, "image_ids": ctx.image_ids, **conditions,
                  **({} if pred is None else {f"pred.{name}": value for name, value in vars(pred).items()}), **given})
    ctx.shared.asked.append(who)
    try:
        yield
    finally:
        ctx.shared.asked.pop()
    changed = [name for name, value, version in [*lent, *ctx.shared.lent] if value._version != version]
    now = ctx.model_kwargs
    changed += [name for name in {**conditions, **now} if now.get(name) is not conditions.get(name)]
    if changed:
        raise UserError(f"{who}: changed {changed[0]} in place, must work on a copy (like x.clone())")


def _lent(values: Mapping[str, Any]) -> Lent:
    return [(name, value, value._version) for name, value in values.items()
            if isinstance(value, Tensor) and not value.is_inference()]


def _in_words(value: object) -> str:
    return f"of {tuple(value.shape)}" if isinstance(value, Tensor) else f"that is a {type(value).__name__}"


def _stacked(values: Sequence[Any]) -> Any:
    """The conditions of several evaluations as one batch; what is no tensor is the same for all."""
    return torch.cat(list(values)) if isinstance(values[0], Tensor) else values[0]


@dataclass(frozen=True)
class Passes:
    """Passes through networks that a term adds to one guided step of one image.

    forward: further evaluations of the diffusion network. begins_at: attention blocks, at the first of which these
    begin, as they share what lies before it with the step's own; each is then a part of an evaluation, in proportion to
    the operations. Without any, they begin at the beginning. backward: 1 where the step's own evaluation is
    differentiated, which all such terms do at once. readers: by name, networks that read feature maps of that
    evaluation, and whether the loss is differentiated through them: the gradient then begins at the last block that
    such a one reads, and else at the end of the evaluation. others: by name, evaluations of other networks, each with
    its gradient. plain: by name, evaluations of other networks without one.
    """

    forward: int = 0
    backward: int = 0
    others: Mapping[str, int] = field(default_factory=dict)
    begins_at: Sequence[str] = ()
    plain: Mapping[str, int] = field(default_factory=dict)
    readers: Mapping[str, bool] = field(default_factory=dict)


class SigmaRange(TypedDict, total=False):
    """The noise levels at which a term guides, as keyword arguments: see `Window`."""

    sigma_min: float | None
    sigma_max: float | None


class WindowArguments(SigmaRange, total=False):
    """The same with the respaced steps between which a term guides, see `Window`."""

    start: int | None
    stop: int | None


@dataclass(frozen=True)
class Window:
    """The steps at which a term guides; None leaves a side open.

    start, stop: stop <= t < start, t the respaced step index that counts down to 0. sigma_min, sigma_max: the noise
    level sigma = sqrt((1 - abar) / abar) of the step, sigma_min < sigma <= sigma_max (Kynkaanniemi et al., 2404.07724,
    equation 5), which means the same for any number of steps. `what` names the owner in the UserError that is raised
    for anything but numbers, for a negative level, and for a range that is empty.
    """

    start: float | None = None
    stop: float | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    what: str = "window"

    def __post_init__(self) -> None:
        for name in ("start", "stop", "sigma_min", "sigma_max"):
            value = getattr(self, name)
            if value is not None:
                check_number(f"{self.what} {name}", value)
                if name == "sigma_min" and value < 0:
                    raise UserError(f"{self.what} {name} {value!r}: must be at least 0")
                if name == "sigma_max" and value <= 0:
                    raise UserError(f"{self.what} {name} {value!r}: must be greater than 0")
        if self.sigma_min is not None and self.sigma_max is not None and self.sigma_min >= self.sigma_max:
            raise UserError(f"{self.what} sigma_min {self.sigma_min!r}, sigma_max {self.sigma_max!r}: the first must "
                            "be smaller than the second")
        if self.start is not None and self.stop is not None and self.start <= self.stop:
            raise UserError(f"{self.what} start {self.start!r}, stop {self.stop!r}: the first must be greater than the "
                            "second, as steps count down")

    def holds(self, t: Tensor, process: DiffusionProcess | None) -> Tensor:
        """(N,) bool: whether the steps t (N,) of a process lie in the window.

        Raises UserError where the window is one of noise levels and no process is given.
        """
        inside = torch.ones_like(t, dtype=torch.bool)
        if self.start is not None:
            inside &= t < self.start
        if self.stop is not None:
            inside &= t >= self.stop
        if self.sigma_min is not None or self.sigma_max is not None:
            if process is None:
                raise UserError(f"{self.what}: a window of noise levels needs the process whose steps are asked for")
            inside &= torch.from_numpy(self._sigma_holds(process)).to(t.device)[t]
        return inside

    def _sigma_holds(self, process: DiffusionProcess) -> np.ndarray:
        """(T,) bool: whether each step of the process has a noise level in the window."""
        with np.errstate(divide="ignore"):
            sigma = np.sqrt((1 - process.alphas_cumprod) / process.alphas_cumprod)
        inside = np.ones(len(sigma), dtype=bool)
        if self.sigma_min is not None:
            inside &= sigma > self.sigma_min
        if self.sigma_max is not None:
            inside &= sigma <= self.sigma_max
        return inside


def check_number(what: str, value: object) -> None:
    """Raises UserError, beginning with `what`, unless the value is a finite number."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise UserError(f"{what} {value!r}: must be a finite number")


class Guidance:
    """A term with a scale and a window of steps; terms of a method extend one of the four kinds below.

    scale: finite; 0 is off. start, stop, sigma_min, sigma_max: guided only where stop <= t < start and sigma_min <
    sigma <= sigma_max, see `Window`; None leaves that side open. `start` is `--guide_start`. passes: what a guided step
    costs beside the evaluation that every step makes. remembers: whether it goes on from what it left in the context's
    memory at the step before: single steps without a memory are then refused at once. Raises UserError for anything
    else.
    """

    passes: Passes = Passes()
    remembers: bool = False

    def __init__(self, scale: float, start: int | None = None, stop: int | None = None, *,
                 sigma_min: float | None = None, sigma_max: float | None = None) -> None:
        check_number(f"{type(self).__name__} scale", scale)
        self.scale = scale
        self.steps = Window(start, stop, sigma_min, sigma_max, what=type(self).__name__)

    @property
    def start(self) -> float | None:
        """The respaced step below which it guides; None: no bound."""
        return self.steps.start

    @property
    def stop(self) -> float | None:
        """The respaced step from which up it guides; None: no bound."""
        return self.steps.stop

    def window(self, t: Tensor, process: DiffusionProcess | None = None) -> Tensor:
        """(N,) bool: the images of the batch that this term guides at steps t (N,) of a process.

        The process is needed where the window is one of noise levels.
        """
        return self.steps.holds(t, process) if self.scale else torch.zeros_like(t, dtype=torch.bool)

    def check_network(self, denoise: Denoiser) -> None:
        """Raises UserError, before a chain begins, for a network that the term cannot guide; by default for none."""

    def observe(self) -> AbstractContextManager[Any]:
        """Entered around the step's own network evaluation; what it gives is `ctx.observed[self]`."""
        return nullcontext()

    def seen(self, observed: Any, rows: slice) -> Any:
        """What `observe` gave, of the images in some rows of the batch alone; by default all of it.

        The step's own evaluation may be a part of a larger batch, see `ContrastGuidance.beforehand`.
        """
        return observed


class ContrastGuidance(Guidance):
    """A term that changes eps by comparing with another evaluation.

    To write one, give it `weaker`, the inputs of that evaluation, where it differs in nothing else:

        class HalfNoise(ContrastGuidance):
            passes = Passes(forward=1)

            def weaker(self, ctx, pred):
                return Inputs(ctx.x_t / 2, ctx.t)

    Such terms share an evaluation that several of them need, and `--batch_contrasts` evaluates them together. Any other
    term gives `delta` itself, as perturbed-attention guidance does. unconditional: with classifier-free guidance of
    prompts it acts on the evaluation without a prompt, as the SAG paper does (2210.00939, eq. 25).
    """

    passes = Passes(forward=1)
    unconditional: ClassVar[bool] = False

    def beforehand(self, ctx: StepContext) -> Inputs | None:
        """What `weaker` gives, of a term that needs no prediction for it; None for all others.

        With `--batch_contrasts` such an evaluation is a part of the batch that the step's own is in.
        """
        return None

    def weaker(self, ctx: StepContext, pred: Prediction) -> Inputs | None:
        """The inputs of the evaluation to compare with; None where that differs in more than its inputs."""
        return self.beforehand(ctx)

    def delta(self, ctx: StepContext, pred: Prediction) -> Tensor:
        """The change of eps, (N, C, H, W): by default `scale (eps - eps of the weaker evaluation)`."""
        inputs = self.inputs(ctx, pred)
        if inputs is None:
            raise UserError(f"{type(self).__name__}.weaker: gave None, and the term has no delta of its own")
        weaker = ctx.evaluate(inputs.x, inputs.t, **inputs.changes)
        same = inputs.x is ctx.x_t and inputs.t is ctx.t
        return self.scale * (ctx.denoise.diffusion.eps_between(pred, weaker, ctx.t) if same else pred.eps - weaker.eps)

    def inputs(self, ctx: StepContext, pred: Prediction) -> Inputs | None:
        """What `weaker` gives at this step, where it is asked once."""
        def weaker() -> Inputs | None:
            who = f"{type(self).__name__}.weaker"
            with left_alone(who, ctx, pred):
                found = self.weaker(ctx, pred)
                if not isinstance(found, Inputs | None):
                    raise UserError(f"{who}: gave a {type(found).__name__}, must be Inputs, what the network is given "
                                    "(or None, where delta is the term's own)")
                if found is not None:
                    ctx.check(found)
                return found

        return ctx.once((self, "weaker"), weaker)


class TransformGuidance(Guidance):
    """A term that changes the sum of all contrasts; several are applied in the order of the list.

    To write one, give it `transform`:

        class Halved(TransformGuidance):
            def transform(self, ctx, pred, delta):
                return delta / 2
    """

    def transform(self, ctx: StepContext, pred: Prediction, delta: Tensor) -> Tensor:
        """The new change of eps, (N, C, H, W), in place of `delta`."""
        raise NotImplementedError


class GradientGuidance(Guidance):
    """A term that gives the gradient of a log-probability at x_t.

    To write one, give it `gradient`:

        class TowardsGrey(GradientGuidance):
            def gradient(self, ctx, pred):
                return -self.scale * ctx.x_t
    """

    def gradient(self, ctx: StepContext, pred: Prediction) -> Tensor:
        """The gradient at x_t, (N, C, H, W), scale included."""
        raise NotImplementedError


class LossGuidance(Guidance):
    """A term that lowers a loss of the step's own evaluation.

    To write one, give it `loss`:

        class Darker(LossGuidance):
            def loss(self, ctx, pred):
                return self.scale * pred.pred_xstart.mean(dim=(1, 2, 3))
    """

    passes = Passes(backward=1)

    def loss(self, ctx: StepContext, pred: Prediction) -> Tensor:
        """The loss of each image, (N,), scale included: a function of ctx.x_t through the evaluation that gave `pred`.

        What `observe` gave, and `pred`, carry that evaluation's graph here, and nowhere else.
        """
        raise NotImplementedError

    def end_graph(self) -> AbstractContextManager[Any] | None:
        """Entered around the step's own evaluation, to keep no graph above what the loss reads.

        None, as by default, says that the loss may read `pred`: then the whole evaluation keeps its graph, for all.
        """
        return None


class FunctionGuidance(GradientGuidance):
    """The older interface: cond_fn(x_t, original step, **model_kwargs) -> gradient, (N, C, H, W)."""

    def __init__(self, cond_fn: Callable[..., Tensor]) -> None:
        super().__init__(1.0)
        self.cond_fn = cond_fn

    def gradient(self, ctx: StepContext, pred: Prediction) -> Tensor:
        """What the function gives at x_t; as in the official code it may be one number for each image, (N, 1, 1, 1)."""
        found = self.cond_fn(ctx.x_t, ctx.model_t, **ctx.model_kwargs)
        every_image = isinstance(found, Tensor) and found.ndim == 4 and len(found) == len(ctx.x_t)
        fits = every_image and all(one in (1, other) for one, other in zip(found.shape, ctx.x_t.shape, strict=True))
        return found.expand_as(ctx.x_t) if fits else found
