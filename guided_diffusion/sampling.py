"""The one step body of all samplers, and the loop over it. Knows no file, no rank and no network class.

    pred      = denoise(x_t, t)
    loss_grad = gradient at x_t of the sum of the losses, through that evaluation
    eps       = pred.eps + sum of the contrasts
    grad      = sum of the gradients
    x_{t-1}   = the sampler's step (pred guided by eps, grad, noise) - loss_grad

A sampler is a step and its options (`steps`, `solvers`); SAMPLERS lists them by the names that `--sampler` takes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import MappingProxyType

from .errors import NonFiniteError, UserError
from .late import Tensor, no_grad, torch
from .options import shortened
from .process import Denoiser, Prediction
from .solvers import SOLVERS
from .steps import DdimOptions, DdpmOptions, Noise, SamplerOptions, Step, ddim_step, ddpm_step
from .terms import (
    ContrastGuidance,
    FunctionGuidance,
    GradientGuidance,
    Guidance,
    Inputs,
    LossGuidance,
    Shared,
    StepContext,
    TransformGuidance,
    left_alone,
)

__all__ = ["SAMPLERS", "DdimOptions", "DdpmOptions", "Noise", "SamplerOptions", "Step", "ddim_step", "ddpm_step",
           "last", "sample_chain", "sample_step", "scaled_gradient"]

# A loss is multiplied by the first of these that gives a finite gradient, and the gradient divided: in float16 small
# gradients would be 0, and large ones infinite. In float32 the factor changes no bit.
LOSS_SCALES = tuple(2.0**exponent for exponent in (16, 12, 8, 4, 0, -4, -8))

FARTHEST = 1000.0               # an absolute value that no x_t comes near by itself

# The kinds of terms, and the methods one of which a term must give.
KINDS: dict[type[Guidance], Sequence[str]] = {
    ContrastGuidance: ("weaker", "beforehand", "delta"), GradientGuidance: ("gradient",), LossGuidance: ("loss",),
    TransformGuidance: ("transform",)}

Active = Sequence[tuple[Guidance, Tensor]]         # terms with the images (N,) that they guide at this step

SAMPLERS: dict[str, type[SamplerOptions]] = {"ddpm": DdpmOptions, "ddim": DdimOptions, **SOLVERS}


def sample_step(step: Step, denoise: Denoiser, x_t: Tensor, t: Tensor, noise: Noise,
                guidance: Sequence[Guidance] = (), image_ids: Tensor | None = None,
                memory: dict[Guidance, Tensor] | None = None) -> dict[str, Tensor]:
    """One guided step: {"sample", "pred_xstart", "pred_xstart_unguided", "eps"}, (N, C, H, W) each.

    t: (N,) int64, respaced. image_ids: the images' places in the run, 0 to N - 1 by default. memory: what terms keep
    from step to step, empty at the first one; all steps of a chain are given the same. eps is that of the guided
    prediction. Where a loss guides, "loss_gradient" is what was taken from the sample, (N, C, H, W). Raises UserError
    where a term remembers, or has used it, and there is no memory, for what is no term, and for a term or a step that
    returns no tensor on the device of x_t, another shape, or a wider type of numbers than x_t or the network's output
    has.
    """
    guidance = listed_terms(guidance)
    x_t = x_t.to(torch.promote_types(x_t.dtype, torch.float32))         # the tables of the process are float32
    if memory is None:
        _check_forgets([term for term in guidance if term.remembers])
    ctx = StepContext(denoise, x_t, t, torch.arange(len(x_t)) if image_ids is None else image_ids,
                      memory={} if memory is None else memory)
    active = [(term, window) for term in guidance if (window := term.window(t, denoise.diffusion)).any()]
    loss_gradient = None
    if any(isinstance(term, LossGuidance) for term, _ in active):
        ctx, pred, loss_gradient = _evaluated_with_losses(ctx, active)
    else:
        pred = _evaluated(ctx, active, _beforehand(ctx, active))
    unguided = pred
    contrasts = [(term, window) for term, window in active if isinstance(term, ContrastGuidance)]
    if denoise.batch_contrasts:
        ctx.evaluate_together([inputs for g, _ in contrasts if (inputs := g.inputs(ctx, unguided)) is not None])
    like = x_t.to(torch.promote_types(x_t.dtype, unguided.eps.dtype))
    deltas = [_within(window, _asked(g, "delta", like, ctx, unguided)) for g, window in contrasts]
    if deltas:
        delta = _transformed(ctx, unguided, _sum(deltas), active, like)
        pred = denoise.guided(unguided, x_t, t, delta)
    gradients = [_within(window, _asked(g, "gradient", like, ctx, unguided))
                 for g, window in active if isinstance(g, GradientGuidance)]
    if memory is None:
        _check_forgets(ctx.memory)
    sample, pred_xstart = _stepped(step, ctx, pred, _sum(gradients) if gradients else None, noise, like)
    out = {"pred_xstart": pred_xstart, "pred_xstart_unguided": unguided.pred_xstart, "eps": pred.eps}
    if loss_gradient is None:
        return {"sample": sample, **out}
    return {"sample": sample - loss_gradient, **out, "loss_gradient": loss_gradient}


def _check_forgets(keepers: Iterable[Hashable]) -> None:
    """Raises UserError for the first of what keeps something from step to step, where there is no memory."""
    for keeper in keepers:
        who = type(keeper).__name__ if isinstance(keeper, Guidance) else f"memory of {shortened(keeper)}"
        raise UserError(f"{who}: goes on from what it left at the step before: give all steps of a chain the same dict "
                        "as memory")


def listed_terms(guidance: Iterable[Guidance]) -> list[Guidance]:
    """Terms as a list, also of what can be walked through once.

    Raises UserError for anything else, and for terms that are not whole.
    """
    if isinstance(guidance, Guidance):
        raise UserError(f"guidance: must be a list of terms, and {type(guidance).__name__} is one of them: [term]")
    if not isinstance(guidance, Iterable):
        raise UserError(f"guidance {shortened(guidance)}: must be a list of terms; leave it out for none")
    terms = list(guidance)
    for term in terms:
        if not isinstance(term, tuple(KINDS)):
            raise UserError(f"guidance: {shortened(term)} is no term, which is an object of a class below "
                            f"{', '.join(kind.__name__ for kind in KINDS)}")
        _check_whole(term)
    return terms


def _check_whole(term: Guidance) -> None:
    """Raises UserError for a term that lacks what its kind asks of it, or what all terms have."""
    who = type(term).__name__
    for kind, methods in KINDS.items():
        if isinstance(term, kind) and not any(
                name in vars(term) or getattr(type(term), name) is not getattr(kind, name) for name in methods):
            raise UserError(f"{who}: has no method {' or '.join(methods)}, which a {kind.__name__} must give")
    if not (hasattr(term, "scale") and hasattr(term, "steps")):
        raise UserError(f"{who}: has no scale or no window of steps; its __init__ must call super().__init__(scale, "
                        "...)")
    try:
        hash(term)
    except TypeError:
        raise UserError(f"{who}: has no hash, by which terms are told apart; a dataclass needs @dataclass(eq=False)",
                        ) from None


def _transformed(ctx: StepContext, pred: Prediction, delta: Tensor, active: Active, like: Tensor) -> Tensor:
    """The sum of the contrasts after all transforms, in the order of the list."""
    for term, window in active:
        if isinstance(term, TransformGuidance):
            changed = _asked(term, "transform", like, ctx, pred, delta=delta)
            delta = torch.where(window.reshape(-1, 1, 1, 1), changed, delta)
    return delta


def _asked(term: Guidance, method: str, like: Tensor, ctx: StepContext, pred: Prediction, **further: Tensor) -> Tensor:
    """What a method of a term returns.

    Raises UserError where that has not a value of its own for each image, see `_check_like`, or the term has written in
    place what it was given.
    """
    who = "cond_fn" if isinstance(term, FunctionGuidance) else f"{type(term).__name__}.{method}"
    with left_alone(who, ctx, pred, **further):
        value: Tensor = getattr(term, method)(ctx, pred, *further.values())
    _check_like(who, value, like)
    return value


def _stepped(step: Step, ctx: StepContext, pred: Prediction, grad: Tensor | None, noise: Noise, like: Tensor,
             ) -> tuple[Tensor, Tensor]:
    """x_{t-1} and x0, from a sampler's step; raises UserError where they are not that, or x_t was written in place."""
    function = getattr(step, "func", step)                          # of functools.partial
    who = f"the sampler's step {getattr(function, '__name__', type(function).__name__)}"
    with left_alone(who, ctx, pred):
        returned = step(ctx, pred, grad, noise)
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise UserError(f"{who}: gave a {type(returned).__name__}, must give a pair of tensors, x_(t-1) and x0")
    for name, value in zip(("x_(t-1)", "x0"), returned, strict=True):
        _check_like(f"{who}, {name}", value, like)
    if returned[0].dtype != like.dtype:
        raise UserError(f"{who}, x_(t-1): {_misfit(returned[0].dtype, like.dtype)}")
    return returned


def _check_like(who: str, value: object, like: Tensor) -> None:
    """Raises UserError unless a value is a dense tensor with the shape and the device of `like`, in no wider a type.

    Where `like` is (N,) bool, of losses, any floating-point type will do: their gradient has that of x_t.
    """
    fault = ""
    if not isinstance(value, Tensor):
        fault = f"gave a {type(value).__name__}, must be a tensor of {tuple(like.shape)}"
    elif value.shape != like.shape:
        fault = f"gave a tensor of {tuple(value.shape)}, must be one of {tuple(like.shape)}"
    elif value.layout is not torch.strided:
        fault = _misfit(value.layout, like.layout)
    elif value.device != like.device:
        fault = _misfit(value.device, like.device)
    elif not value.is_floating_point():
        fault = _misfit(value.dtype, "floating-point numbers" if like.dtype is torch.bool else like.dtype)
    elif like.dtype is not torch.bool and torch.promote_types(value.dtype, like.dtype) != like.dtype:
        fault = _misfit(value.dtype, like.dtype)
    if fault:
        raise UserError(f"{who}: {fault}")


def _misfit(found: object, expected: object) -> str:
    """The layout, the device or the type of numbers of a tensor beside that of x_t, in words."""
    return f"gave a tensor of {found}, must be one of {expected}".replace("torch.", "")


def _sum(values: Sequence[Tensor]) -> Tensor:
    return functools.reduce(torch.add, values)


def _evaluated(ctx: StepContext, active: Active, others: Mapping[Guidance, Inputs] = MappingProxyType({}),
               ) -> Prediction:
    """The step's own network evaluation, observed by the active terms.

    others: evaluations that are made with it as one batch, by the terms that will ask for them. Such a term sees its
    own one, all other terms that of the step.
    """
    with ExitStack() as stack:
        for term, _ in active:
            ctx.observed[term] = stack.enter_context(term.observe())
        if not others:
            return ctx.denoise(ctx.x_t, ctx.t)
        own, *places = ctx.evaluate_together([Inputs(ctx.x_t, ctx.t), *others.values()])
        pred = ctx.evaluate(ctx.x_t, ctx.t)
    place_of, count = dict(zip(others, places, strict=True)), len(ctx.x_t)
    for term, _ in active:
        first = count * place_of.get(term, own)
        ctx.observed[term] = term.seen(ctx.observed[term], slice(first, first + count))
    return pred


def _beforehand(ctx: StepContext, active: Active) -> dict[Guidance, Inputs]:
    """The evaluations that can be made together with the step's own, by their terms; none unless that is asked for."""
    if not ctx.denoise.batch_contrasts:
        return {}
    found: dict[Guidance, Inputs] = {}
    for term, _ in active:
        if isinstance(term, ContrastGuidance):
            with left_alone(f"{type(term).__name__}.beforehand", ctx):
                inputs = term.beforehand(ctx)
                if inputs is not None:
                    ctx.check(inputs)
                    found[term] = inputs
    return found


def _evaluated_with_losses(ctx: StepContext, active: Active) -> tuple[StepContext, Prediction, Tensor]:
    """`_evaluated`, and the gradient at x_t of all losses, (N, C, H, W).

    Context and prediction come back detached: the graph, which is most of a network's memory, ends here, before any
    contrast evaluates the network again.
    """
    losses = [(term, window) for term, window in active if isinstance(term, LossGuidance)]
    ends = [end for term, _ in losses if (end := term.end_graph()) is not None]
    with torch.enable_grad():
        with_graph = replace(ctx, x_t=ctx.x_t.detach().requires_grad_(), observed={}, shared=Shared())
        with ExitStack() as stack:
            for end in ends if len(ends) == len(losses) else []:
                stack.enter_context(end)
            pred = _evaluated(with_graph, active)
        loss = _sum([_within(window, _asked(term, "loss", window, with_graph, pred)).sum()
                     for term, window in losses])
    if not loss.requires_grad:
        raise UserError(f"{', '.join(type(term).__name__ for term, _ in losses)}: the loss does not depend on x_t "
                        "through the network, so that it has no gradient")
    # Before the backward pass, which then needs no memory for what only the prediction depends on.
    pred = replace(pred, **{name: value.detach() for name, value in vars(pred).items()})
    guided = torch.stack([window for _, window in losses]).any(dim=0)
    observed = {term: value for term, value in with_graph.observed.items() if not isinstance(term, LossGuidance)}
    ctx = replace(ctx, x_t=ctx.x_t.detach(), observed=observed)
    return ctx, pred, scaled_gradient(loss, with_graph.x_t, guided)


def scaled_gradient(loss: Tensor, x_t: Tensor, guided: Tensor) -> Tensor:
    """The gradient d loss / d x_t where guided (N,), 0 elsewhere.

    Each image's is by the first of LOSS_SCALES that makes it finite; NaN or infinity is left where none does.
    """
    gradient, missing = torch.zeros_like(x_t), guided
    for scale in LOSS_SCALES:
        scaled, = torch.autograd.grad(loss, x_t, torch.full_like(loss, scale), retain_graph=scale != LOSS_SCALES[-1])
        gradient = torch.where(missing.reshape(-1, 1, 1, 1), scaled / scale, gradient)
        missing = guided & ~gradient.isfinite().flatten(1).all(dim=1)
        if not missing.any():
            break
    return gradient


def _within(window: Tensor, value: Tensor) -> Tensor:
    """`value` (N, ...) where the window (N,) holds the image, 0 elsewhere."""
    return torch.where(window.reshape(-1, *[1] * (value.ndim - 1)), value, 0)


@no_grad
def sample_chain(step: Step, denoise: Denoiser, x_T: Tensor, noise_at: Callable[[int], Tensor],
                 guidance: Sequence[Guidance] = (), image_ids: Tensor | None = None) -> Iterator[dict[str, Tensor]]:
    """All steps from x_T (N, C, H, W) to the image, each as `sample_step` gives it.

    noise_at: respaced step index -> (N, C, H, W); called at most once a step, by samplers that draw noise there. Raises
    NonFiniteError where the network or a term returns NaN or infinity, and UserError for labels that the network does
    not know, before the first step.
    """
    guidance = listed_terms(guidance)
    denoise.check_labels()
    for term in guidance:
        if term.scale:
            term.check_network(denoise)
    image_ids = torch.arange(len(x_T)) if image_ids is None else image_ids
    memory: dict[Guidance, Tensor] = {}
    x_t = x_T
    for index in reversed(range(denoise.diffusion.num_timesteps)):
        t = torch.full((len(x_t),), index, device=x_t.device)
        out = sample_step(step, denoise, x_t, t, functools.partial(noise_at, index), guidance, image_ids, memory)
        # Clipping hides an infinite eps from the sample.
        if bad := not_finite(image_ids, out["sample"], out["eps"]):
            raise NonFiniteError(f"step {index}: {_who(denoise, x_t, t, guidance)} returned NaN or infinity for image "
                                 f"{bad}")
        x_t = out["sample"]
        yield out


def _who(denoise: Denoiser, x_t: Tensor, t: Tensor, guidance: Sequence[Guidance]) -> str:
    """What returned NaN or infinity: the network at an x_t that it can know, or else guidance."""
    if not guidance:
        return "the network"
    if (largest := x_t.abs().max()) > FARTHEST:
        return f"the network, at images that guidance has made as large as {largest:.2g},"
    return "guidance" if denoise(x_t, t).eps.isfinite().all() else "the network"


def not_finite(image_ids: Tensor, *values: Tensor) -> str:
    """The images (N,) of which a value (N, ...) is NaN or infinity, like "3, 7": eight at most, and "" for none."""
    finite = torch.stack([value.isfinite().flatten(1).all(dim=1) for value in values]).all(dim=0).cpu()
    return ", ".join(str(number) for number in list(dict.fromkeys(image_ids.cpu()[~finite].tolist()))[:8])


def last(chain: Iterator[dict[str, Tensor]], on_step: Callable[[], object] = lambda: None) -> dict[str, Tensor]:
    """The last step of a chain; on_step is called after each."""
    out: dict[str, Tensor] = {}
    for step in chain:
        out = step
        on_step()
    return out
