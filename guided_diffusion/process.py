"""The Gaussian diffusion process: q, its posterior, what a network's output says of them, losses and likelihoods.

Ho et al. (2006.11239: the process), Nichol & Dhariwal (2102.09672: learned variance), Dhariwal & Nichol (2105.05233).
Images are (N, C, H, W) in [-1, 1]; t is (N,) int64, an index into the (respaced) chain. Sampling is another room:
`steps` and `solvers` have the step bodies, `gaussian_diffusion` the methods of the old names.
"""

from __future__ import annotations

import enum
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

import numpy as np

from .errors import UserError
from .late import Tensor, nn, no_grad, torch
from .losses import discretized_gaussian_log_likelihood, mean_flat, normal_kl
from .options import shortened
from .schedules import gather

Images = dict[str, Tensor]


class ModelMeanType(enum.Enum):
    """What the network predicts; VELOCITY is sqrt(abar) eps - sqrt(1 - abar) x0 (Salimans & Ho, 2202.00512)."""

    PREVIOUS_X = enum.auto()
    START_X = enum.auto()
    EPSILON = enum.auto()
    VELOCITY = enum.auto()


class ModelVarType(enum.Enum):
    """Where the variance of x_{t-1} comes from; LEARNED_RANGE interpolates between the two fixed ones."""

    LEARNED = enum.auto()
    FIXED_SMALL = enum.auto()
    FIXED_LARGE = enum.auto()
    LEARNED_RANGE = enum.auto()


class LossType(enum.Enum):
    """Training loss; with a learned variance, MSE adds the variational bound (of the variance only)."""

    MSE = enum.auto()
    RESCALED_MSE = enum.auto()
    KL = enum.auto()
    RESCALED_KL = enum.auto()

    def is_vb(self) -> bool:
        """Whether the loss is the variational bound alone."""
        return self in (LossType.KL, LossType.RESCALED_KL)


@dataclass(frozen=True)
class Prediction:
    """One network evaluation at x_t, all (N, C, H, W).

    eps, xstart: the noise in x_t and x0, before any clipping. pred_xstart: x0, clipped where asked. mean, variance,
    log_variance: of x_{t-1} given x_t.
    """

    eps: Tensor
    xstart: Tensor
    pred_xstart: Tensor
    mean: Tensor
    variance: Tensor
    log_variance: Tensor


@dataclass(frozen=True)
class Denoiser:
    """A network bound to a process and its conditions: `denoise(x_t, t)` is a Prediction.

    denoised_fn: applied to x0 before it is clipped to [-1, 1] (where clip_denoised). model_kwargs: labels and the
    like, (N, ...) each. dynamic_threshold: a quantile in (0, 1] by which x0 is thresholded in place of clipping (see
    `dynamically_thresholded`). batch_contrasts: a guided step makes further evaluations that differ in their inputs
    alone as one batch, and those that need nothing of the step's own evaluation together with that one.
    """

    diffusion: DiffusionProcess
    model: Callable[..., Tensor]
    clip_denoised: bool = True
    denoised_fn: Callable[[Tensor], Tensor] | None = None
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    dynamic_threshold: float | None = None
    batch_contrasts: bool = False

    def __call__(self, x_t: Tensor, t: Tensor) -> Prediction:
        """One evaluation of the network at x_t (N, C, H, W), at steps t (N,)."""
        output = self.model(x_t, self.diffusion.model_timesteps(t), **self.model_kwargs)
        return self.diffusion.interpret(output, x_t, t, self.process_xstart)

    @functools.cached_property
    def label_range(self) -> tuple[int, int] | None:
        """The lowest and the highest of the labels y, of which the device is asked once; None where there are none."""
        y = self.model_kwargs.get("y")
        if not _are_numbers(y) or not y.numel():
            return None
        low, high = torch.stack(y.aminmax()).tolist()
        return low, high

    @property
    def label_count(self) -> int | None:
        """How many labels the network knows, that of no class among them; None where it does not say."""
        count: int | None = getattr(self.model, "label_count", None)
        return count

    def check_labels(self, wait: bool = True) -> None:
        """Raises UserError for labels y that a network which says how many it knows does not have.

        wait: else they are looked at as far as it shows without waiting for a device.
        """
        count, y = self.label_count, self.model_kwargs.get("y")
        if count is None or y is None:
            return
        if not _are_numbers(y) or y.ndim != 1:
            what = f"is {tuple(y.shape)} {y.dtype}" if isinstance(y, Tensor) else f"is a {type(y).__name__}"
            raise UserError(f"y: {what}, must be a tensor (N,) of whole numbers (int64), the labels of the images")
        seen = wait or y.device.type == "cpu"
        low, high = (seen and self.label_range) or (0, 0)
        if low < 0 or high >= count:
            raise UserError(f"y: has the label {low if low < 0 else high}, must be labels from 0 to {count - 1}, which "
                            "the network knows")

    def process_xstart(self, x: Tensor) -> Tensor:
        """x0 (N, C, H, W) after `denoised_fn` and clipping or thresholding, as far as they are asked for."""
        if self.denoised_fn is not None:
            x = self.denoised_fn(x)
        if self.dynamic_threshold is not None:
            return dynamically_thresholded(x, self.dynamic_threshold)
        return x.clamp(-1, 1) if self.clip_denoised else x

    def guided(self, pred: Prediction, x_t: Tensor, t: Tensor, delta: Tensor) -> Prediction:
        """`pred` with an eps that is changed by `delta` (N, C, H, W); the variance stays."""
        eps = pred.eps + delta
        if self.diffusion.model_mean_type is ModelMeanType.EPSILON:
            xstart = self.diffusion.predict_xstart_from_eps(x_t, t, eps)
        else:           # from its own x0: that of eps has the rounding of eps, up to 1 / sqrt(abar) times
            xstart = pred.xstart + self.diffusion.predict_xstart_from_eps(torch.zeros_like(delta), t, delta)
        pred_xstart = self.process_xstart(xstart)
        mean = self.diffusion.posterior_mean(pred_xstart, x_t, t)
        return replace(pred, eps=eps, xstart=xstart, pred_xstart=pred_xstart, mean=mean)


def dynamically_thresholded(x: Tensor, quantile: float, largest: float = math.inf) -> Tensor:
    """Images (N, C, H, W) whose values far out are pulled into [-1, 1] (Saharia et al., 2205.11487, section 2.3).

    Per image: with q the quantile of |x|, at least 1 and at most `largest`, x is clipped to [-q, q] and divided by q.
    """
    values = x.abs().flatten(1)
    place = quantile * (values.shape[1] - 1)
    below = int(place)
    upper = values.topk(values.shape[1] - below, dim=1).values         # the last is number `below` from the bottom
    limit = torch.lerp(upper[:, -1], upper[:, max(-2, -upper.shape[1])], place - below).clamp(1, largest)
    limit = limit.reshape(-1, 1, 1, 1)
    return torch.clamp(x, -limit, limit) / limit


def _are_numbers(y: Any) -> TypeGuard[Tensor]:
    """Whether labels are of a type that embeddings of labels take."""
    return isinstance(y, Tensor) and y.dtype in (torch.int64, torch.int32)


class DiffusionProcess:
    """The process with given betas, and the meaning of a network's output.

    betas: (T,) in (0, 1]. rescale_timesteps: the network sees t * 1000 / T. last_alphas_cumprod: abar where the chain
    ends, after its last step; 1, of an image without noise, but on the grids of `grids`. Raises UserError for other
    betas.
    """

    def __init__(self, *, betas: Sequence[float] | np.ndarray, model_mean_type: ModelMeanType,
                 model_var_type: ModelVarType, loss_type: LossType, rescale_timesteps: bool = False,
                 last_alphas_cumprod: float = 1.0) -> None:
        betas = np.array(betas, dtype=np.float64)
        if betas.ndim != 1 or not len(betas) or not ((betas > 0) & (betas <= 1)).all():
            raise UserError("betas: must be a list of numbers greater than 0 and at most 1")
        self.model_mean_type = model_mean_type
        self.model_var_type = model_var_type
        self.loss_type = loss_type
        self.rescale_timesteps = rescale_timesteps
        self.num_timesteps = len(betas)
        self.original_num_steps = len(betas)
        self.timestep_map = np.arange(len(betas))

        self.betas = betas
        alphas = 1 - betas
        self.alphas_cumprod = last_alphas_cumprod * np.cumprod(alphas)
        self.original_alphas_cumprod = self.alphas_cumprod
        self.alphas_cumprod_prev = np.append(last_alphas_cumprod, self.alphas_cumprod[:-1])
        self.alphas_cumprod_next = np.append(self.alphas_cumprod[1:], 0.0)
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1 - self.alphas_cumprod)
        self.log_one_minus_alphas_cumprod = np.log(1 - self.alphas_cumprod)
        self.sqrt_recip_alphas_cumprod = np.sqrt(1 / self.alphas_cumprod)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1 / self.alphas_cumprod - 1)

        self.posterior_variance = betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        # The variance at t = 0 is 0: its logarithm is that of the next step instead.
        first = self.posterior_variance[1] if len(betas) > 1 else betas[0]
        self.posterior_log_variance_clipped = np.log(np.append(first, self.posterior_variance[1:]))
        self.posterior_mean_coef1 = betas * np.sqrt(self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        self.posterior_mean_coef2 = (1 - self.alphas_cumprod_prev) * np.sqrt(alphas) / (1 - self.alphas_cumprod)

    # The process

    def check_steps(self, t: Tensor) -> None:
        """Raises UserError for steps that are none of the chain, as far as it shows without waiting for a device."""
        seen, count = t.device.type == "cpu", self.num_timesteps
        if t.dtype not in (torch.int64, torch.int32) or (seen and not ((t >= 0) & (t < count)).all()):
            shown = t.tolist() if seen else t.dtype
            raise UserError(f"t {shortened(shown)}: must be whole numbers from 0 to {count - 1}, the steps of the "
                            "chain")

    def model_timesteps(self, t: Tensor) -> Tensor:
        """The step that the network sees at index t of this chain: an original index, rescaled if so asked.

        (N,) int64, or float32 where it is rescaled, and on grids, whose steps are fractions.
        """
        original = torch.from_numpy(self.timestep_map).to(t.device)[t]
        if self.rescale_timesteps:
            return original.float() * (1000 / self.original_num_steps)
        return original.float() if original.is_floating_point() else original

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log-variance of q(x_t | x0) (2006.11239, eq. 4)."""
        mean = gather(self.sqrt_alphas_cumprod, t, x_start) * x_start
        variance = gather(1 - self.alphas_cumprod, t, x_start).expand_as(mean)
        return mean, variance, gather(self.log_one_minus_alphas_cumprod, t, x_start).expand_as(mean)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t from x0 and noise (2006.11239, eq. 4, reparametrised)."""
        noise = torch.randn_like(x_start) if noise is None else noise
        return (gather(self.sqrt_alphas_cumprod, t, x_start) * x_start
                + gather(self.sqrt_one_minus_alphas_cumprod, t, x_start) * noise)

    def posterior_mean(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The mean of q(x_{t-1} | x_t, x0) (2006.11239, eq. 7)."""
        return (gather(self.posterior_mean_coef1, t, x_t) * x_start
                + gather(self.posterior_mean_coef2, t, x_t) * x_t)

    def q_posterior_mean_variance(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and (clipped) log-variance of q(x_{t-1} | x_t, x0) (2006.11239, eq. 6 and 7)."""
        mean = self.posterior_mean(x_start, x_t, t)
        variance = gather(self.posterior_variance, t, x_t).expand_as(mean)
        return mean, variance, gather(self.posterior_log_variance_clipped, t, x_t).expand_as(mean)

    def predict_xstart_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x0 from the noise in x_t (2006.11239, eq. 15)."""
        return (gather(self.sqrt_recip_alphas_cumprod, t, x_t) * x_t
                - gather(self.sqrt_recipm1_alphas_cumprod, t, x_t) * eps)

    def predict_eps_from_xstart(self, x_t: Tensor, t: Tensor, pred_xstart: Tensor) -> Tensor:
        """The noise in x_t from x0: eq. 15 of 2006.11239, solved for it."""
        return ((gather(self.sqrt_recip_alphas_cumprod, t, x_t) * x_t - pred_xstart)
                / gather(self.sqrt_recipm1_alphas_cumprod, t, x_t))

    def eps_with_gradient(self, eps: Tensor, t: Tensor, gradient: Tensor) -> Tensor:
        """As a gradient changes eps: eps - sqrt(1 - abar) gradient, (N, C, H, W) each (2105.05233, algorithm 2)."""
        return eps - gather(self.sqrt_one_minus_alphas_cumprod, t, eps) * gradient

    def velocity(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """sqrt(abar) noise - sqrt(1 - abar) x0 (Salimans & Ho, 2202.00512, appendix D)."""
        return (gather(self.sqrt_alphas_cumprod, t, x_start) * noise
                - gather(self.sqrt_one_minus_alphas_cumprod, t, x_start) * x_start)

    def predict_xstart_from_velocity(self, x_t: Tensor, t: Tensor, velocity: Tensor) -> Tensor:
        """x0 from the velocity at x_t (2202.00512, appendix D)."""
        return (gather(self.sqrt_alphas_cumprod, t, x_t) * x_t
                - gather(self.sqrt_one_minus_alphas_cumprod, t, x_t) * velocity)

    def predict_eps_from_velocity(self, x_t: Tensor, t: Tensor, velocity: Tensor) -> Tensor:
        """The noise in x_t from the velocity there (2202.00512, appendix D)."""
        return (gather(self.sqrt_alphas_cumprod, t, x_t) * velocity
                + gather(self.sqrt_one_minus_alphas_cumprod, t, x_t) * x_t)

    def predict_xstart_from_xprev(self, x_t: Tensor, t: Tensor, xprev: Tensor) -> Tensor:
        """x0 whose posterior mean is xprev."""
        return (gather(1 / self.posterior_mean_coef1, t, x_t) * xprev
                - gather(self.posterior_mean_coef2 / self.posterior_mean_coef1, t, x_t) * x_t)

    # The names in the official code
    _predict_xstart_from_eps = predict_xstart_from_eps
    _predict_eps_from_xstart = predict_eps_from_xstart
    _predict_xstart_from_xprev = predict_xstart_from_xprev

    # The network's output

    def output_of(self, pred: Prediction, t: Tensor) -> Tensor:
        """What a network of this process said for a prediction at steps t: eps, x0 or the velocity, (N, C, H, W).

        For networks that predict x_{t-1} it is eps.
        """
        match self.model_mean_type:
            case ModelMeanType.START_X:
                return pred.xstart
            case ModelMeanType.VELOCITY:
                return self.velocity(pred.xstart, t, pred.eps)
            case _:
                return pred.eps

    def eps_per_output(self, t: Tensor, like: Tensor) -> Tensor | float:
        """By how much eps changes with what `output_of` gives, at the same x_t; broadcasts with `like` (N, ...)."""
        match self.model_mean_type:
            case ModelMeanType.START_X:
                return gather(-1 / self.sqrt_recipm1_alphas_cumprod, t, like)
            case ModelMeanType.VELOCITY:
                return gather(self.sqrt_alphas_cumprod, t, like)
            case _:
                return 1.0

    def eps_between(self, pred: Prediction, other: Prediction, t: Tensor) -> Tensor:
        """What the network said for one prediction minus what it said for another, as a change of eps, (N, C, H, W).

        At the same x_t this is the difference of the two eps, with the digits that an eps made of x0 has lost where
        abar is near 0.
        """
        return (self.output_of(pred, t) - self.output_of(other, t)) * self.eps_per_output(t, pred.eps)

    def interpret(self, output: Tensor, x_t: Tensor, t: Tensor,
                  process_xstart: Callable[[Tensor], Tensor] = lambda x: x) -> Prediction:
        """What a network's output at x_t says of x0, the noise and x_{t-1}.

        output: (N, C, H, W), twice the channels where the variance is learned. process_xstart: applied to x0
        (clipping). Raises UserError where the output is no tensor, or has another shape.
        """
        if not isinstance(output, Tensor):
            raise UserError(f"the network returned a {type(output).__name__}, must be a tensor (N, C, H, W)")
        learned = self.model_var_type in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)
        channels = x_t.shape[1] * (2 if learned else 1)
        if output.shape != (len(x_t), channels, *x_t.shape[2:]):
            raise UserError(f"the network returned {tuple(output.shape)} for an input of {tuple(x_t.shape)}: with "
                            f"learn_sigma {learned} it must return {channels} channels")
        values = output
        if learned:
            values, variance_values = output.chunk(2, dim=1)
            log_variance = self._learned_log_variance(variance_values, t)
            variance = log_variance.exp()
        else:
            variance, log_variance = self._fixed_variance(x_t, t)

        previous = self.model_mean_type is ModelMeanType.PREVIOUS_X
        if self.model_mean_type is ModelMeanType.EPSILON:
            eps, xstart = values, self.predict_xstart_from_eps(x_t, t, values)
        elif self.model_mean_type is ModelMeanType.VELOCITY:
            eps = self.predict_eps_from_velocity(x_t, t, values)
            xstart = self.predict_xstart_from_velocity(x_t, t, values)
        else:
            xstart = self.predict_xstart_from_xprev(x_t, t, values) if previous else values
            eps = self.predict_eps_from_xstart(x_t, t, xstart)
        pred_xstart = process_xstart(xstart)
        mean = values if previous else self.posterior_mean(pred_xstart, x_t, t)
        return Prediction(eps, xstart, pred_xstart, mean, variance, log_variance)

    def _learned_log_variance(self, values: Tensor, t: Tensor) -> Tensor:
        if self.model_var_type is ModelVarType.LEARNED:
            return values
        # 2102.09672, eq. 15
        smallest = gather(self.posterior_log_variance_clipped, t, values)
        largest = gather(np.log(self.betas), t, values)
        fraction = (values + 1) / 2
        return fraction * largest + (1 - fraction) * smallest

    def _fixed_variance(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        if self.model_var_type is ModelVarType.FIXED_LARGE:
            # At t = 0 the posterior's, since beta would give a poor decoder likelihood.
            log_variance = np.append(self.posterior_log_variance_clipped[0], np.log(self.betas[1:]))
            variance = np.exp(log_variance)
        else:
            variance, log_variance = self.posterior_variance, self.posterior_log_variance_clipped
        return gather(variance, t, x_t).expand_as(x_t), gather(log_variance, t, x_t).expand_as(x_t)

    def denoiser(self, model: Callable[..., Tensor], clip_denoised: bool = True,
                 denoised_fn: Callable[[Tensor], Tensor] | None = None, model_kwargs: Mapping[str, Any] | None = None,
                 dynamic_threshold: float | None = None) -> Denoiser:
        """`model` bound to this process and its conditions; the arguments are the fields of `Denoiser`."""
        return Denoiser(self, model, clip_denoised, denoised_fn, model_kwargs or {}, dynamic_threshold)

    def p_mean_variance(self, model: nn.Module, x: Tensor, t: Tensor, clip_denoised: bool = True,
                        denoised_fn: Callable[[Tensor], Tensor] | None = None,
                        model_kwargs: Mapping[str, Any] | None = None) -> Images:
        """{"mean", "variance", "log_variance", "pred_xstart", "xstart", "eps"} of p(x_{t-1} | x_t)."""
        return dict(vars(self.denoiser(model, clip_denoised, denoised_fn, model_kwargs)(x, t)))

    # Losses and likelihoods

    def _vb_terms_bpd(self, pred: Prediction, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """(N,) terms of the variational bound in bits per dimension (2006.11239, eq. 5): KL, at t = 0 the decoder."""
        true_mean, _, true_log_variance = self.q_posterior_mean_variance(x_start, x_t, t)
        kl = mean_flat(normal_kl(true_mean, true_log_variance, pred.mean, pred.log_variance))
        nll = -mean_flat(discretized_gaussian_log_likelihood(
            x_start, means=pred.mean, log_scales=0.5 * pred.log_variance))
        return torch.where(t == 0, nll, kl) / math.log(2)

    def training_losses(self, model: Callable[..., Tensor], x_start: Tensor, t: Tensor,
                        model_kwargs: Mapping[str, Any] | None = None, noise: Tensor | None = None) -> Images:
        """Losses of one batch, (N,) each: {"loss"}, and "mse" and "vb" where they are parts of it.

        "mse" is L_simple (2006.11239, eq. 14), "vb" a term of the bound (eq. 5); both together are L_hybrid
        (2102.09672, eq. 16) without its factor, which `LossType.RESCALED_MSE` brings in.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise)
        output = model(x_t, self.model_timesteps(t), **(model_kwargs or {}))
        if self.loss_type.is_vb():
            vb = self._vb_terms_bpd(self.interpret(output, x_t, t), x_start, x_t, t)
            return {"loss": vb * self.num_timesteps if self.loss_type is LossType.RESCALED_KL else vb}
        terms: Images = {}
        if self.model_var_type in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE):
            output, variance_values = output.chunk(2, dim=1)
            # The bound trains the variance alone: it sees the mean without its graph.
            frozen = torch.cat([output.detach(), variance_values], dim=1)
            terms["vb"] = self._vb_terms_bpd(self.interpret(frozen, x_t, t), x_start, x_t, t)
            if self.loss_type is LossType.RESCALED_MSE:
                terms["vb"] = terms["vb"] * (self.num_timesteps / 1000)
        terms["mse"] = mean_flat((self._target(x_start, x_t, t, noise) - output) ** 2)
        return {"loss": functools.reduce(torch.add, terms.values()), **terms}

    def _target(self, x_start: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the network should have predicted, (N, C, H, W)."""
        match self.model_mean_type:
            case ModelMeanType.PREVIOUS_X:
                return self.posterior_mean(x_start, x_t, t)
            case ModelMeanType.START_X:
                return x_start
            case ModelMeanType.EPSILON:
                return noise
            case ModelMeanType.VELOCITY:
                return self.velocity(x_start, t, noise)

    def _prior_bpd(self, x_start: Tensor) -> Tensor:
        """(N,) KL of q(x_T | x0) from the standard normal, in bits per dimension."""
        t = torch.full((len(x_start),), self.num_timesteps - 1, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        zero = torch.zeros((), device=x_start.device)
        return mean_flat(normal_kl(mean, log_variance, zero, zero)) / math.log(2)

    @no_grad
    def calc_bpd_loop(self, model: Callable[..., Tensor], x_start: Tensor, clip_denoised: bool = True,
                      model_kwargs: Mapping[str, Any] | None = None, noise_at: Callable[[int], Tensor] | None = None,
                      on_step: Callable[[], object] = lambda: None) -> Images:
        """The variational bound of images in bits per dimension.

        {"total_bpd", "prior_bpd"}: (N,). {"vb", "xstart_mse", "mse"}: (N, T), from step T - 1 down to 0. noise_at: the
        noise (N, C, H, W) of a step, drawn anew where None. on_step: called after each.
        """
        denoise = self.denoiser(model, clip_denoised, model_kwargs=model_kwargs)
        denoise.check_labels()
        columns: dict[str, list[Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
        for index in reversed(range(self.num_timesteps)):
            t = torch.full((len(x_start),), index, device=x_start.device)
            noise = torch.randn_like(x_start) if noise_at is None else noise_at(index)
            x_t = self.q_sample(x_start, t, noise)
            pred = denoise(x_t, t)
            columns["vb"].append(self._vb_terms_bpd(pred, x_start, x_t, t))
            columns["xstart_mse"].append(mean_flat((pred.pred_xstart - x_start) ** 2))
            eps = self.predict_eps_from_xstart(x_t, t, pred.pred_xstart)
            columns["mse"].append(mean_flat((eps - noise) ** 2))
            on_step()
        result = {name: torch.stack(values, dim=1) for name, values in columns.items()}
        prior = self._prior_bpd(x_start)
        return {"total_bpd": result["vb"].sum(dim=1) + prior, "prior_bpd": prior, **result}
