"""The Gaussian diffusion process: q, its posterior, what a network's output says of them, losses and likelihoods.

Ho et al. (2006.11239: the process), Nichol & Dhariwal (2102.09672: learned variance), Dhariwal & Nichol (2105.05233).
Images are (N, C, H, W) in [-1, 1]; t is (N,) int64, an index into the (respaced) chain. Sampling itself is in
`sampling`: the p_sample and ddim methods only delegate.
"""

from __future__ import annotations

import enum
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import sampling
from .errors import UserError
from .guidance.base import Guidance
from .guidance.classifier import FunctionGuidance
from .losses import discretized_gaussian_log_likelihood, normal_kl
from .nn import mean_flat
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

    @property
    def is_vb(self) -> bool:
        return self in (LossType.KL, LossType.RESCALED_KL)


@dataclass(frozen=True)
class Prediction:
    """One network evaluation at x_t, all (N, C, H, W).

    eps: the noise in x_t, before any clipping. pred_xstart: x0, clipped where asked. mean, variance, log_variance: of
    x_{t-1} given x_t.
    """

    eps: Tensor
    pred_xstart: Tensor
    mean: Tensor
    variance: Tensor
    log_variance: Tensor


@dataclass(frozen=True)
class Denoiser:
    """A network bound to a process and its conditions: `denoise(x_t, t)` is a Prediction.

    denoised_fn: applied to x0 before it is clipped to [-1, 1] (where clip_denoised). model_kwargs: labels and the
    like, (N, ...) each.
    """

    diffusion: GaussianDiffusion
    model: Callable[..., Tensor]
    clip_denoised: bool = True
    denoised_fn: Callable[[Tensor], Tensor] | None = None
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, x_t: Tensor, t: Tensor) -> Prediction:
        output = self.model(x_t, self.diffusion.model_timesteps(t), **self.model_kwargs)
        return self.diffusion.interpret(output, x_t, t, self.process_xstart)

    def process_xstart(self, x: Tensor) -> Tensor:
        if self.denoised_fn is not None:
            x = self.denoised_fn(x)
        return x.clamp(-1, 1) if self.clip_denoised else x

    def with_eps(self, pred: Prediction, x_t: Tensor, t: Tensor, eps: Tensor) -> Prediction:
        """`pred` with another eps; the variance stays."""
        pred_xstart = self.process_xstart(self.diffusion.predict_xstart_from_eps(x_t, t, eps))
        mean = self.diffusion.posterior_mean(pred_xstart, x_t, t)
        return replace(pred, eps=eps, pred_xstart=pred_xstart, mean=mean)


class GaussianDiffusion:
    """The process with given betas, and the meaning of a network's output.

    betas: (T,) in (0, 1]. rescale_timesteps: the network sees t * 1000 / T.
    """

    def __init__(self, *, betas: Sequence[float], model_mean_type: ModelMeanType, model_var_type: ModelVarType,
                 loss_type: LossType, rescale_timesteps: bool = False) -> None:
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
        self.alphas_cumprod = np.cumprod(alphas)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
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

    def model_timesteps(self, t: Tensor) -> Tensor:
        """The step that the network sees at index t of this chain: an original index, rescaled if so asked."""
        original = torch.from_numpy(self.timestep_map).to(t.device)[t]
        return original.float() * (1000 / self.original_num_steps) if self.rescale_timesteps else original

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log-variance of q(x_t | x0)."""
        mean = gather(self.sqrt_alphas_cumprod, t, x_start) * x_start
        variance = gather(1 - self.alphas_cumprod, t, x_start).expand_as(mean)
        return mean, variance, gather(self.log_one_minus_alphas_cumprod, t, x_start).expand_as(mean)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t from x0 and noise."""
        noise = torch.randn_like(x_start) if noise is None else noise
        return (gather(self.sqrt_alphas_cumprod, t, x_start) * x_start
                + gather(self.sqrt_one_minus_alphas_cumprod, t, x_start) * noise)

    def posterior_mean(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return (gather(self.posterior_mean_coef1, t, x_t) * x_start
                + gather(self.posterior_mean_coef2, t, x_t) * x_t)

    def q_posterior_mean_variance(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and (clipped) log-variance of q(x_{t-1} | x_t, x0)."""
        mean = self.posterior_mean(x_start, x_t, t)
        variance = gather(self.posterior_variance, t, x_t).expand_as(mean)
        return mean, variance, gather(self.posterior_log_variance_clipped, t, x_t).expand_as(mean)

    def predict_xstart_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        return (gather(self.sqrt_recip_alphas_cumprod, t, x_t) * x_t
                - gather(self.sqrt_recipm1_alphas_cumprod, t, x_t) * eps)

    def predict_eps_from_xstart(self, x_t: Tensor, t: Tensor, pred_xstart: Tensor) -> Tensor:
        return ((gather(self.sqrt_recip_alphas_cumprod, t, x_t) * x_t - pred_xstart)
                / gather(self.sqrt_recipm1_alphas_cumprod, t, x_t))

    def velocity(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """sqrt(abar) noise - sqrt(1 - abar) x0."""
        return (gather(self.sqrt_alphas_cumprod, t, x_start) * noise
                - gather(self.sqrt_one_minus_alphas_cumprod, t, x_start) * x_start)

    def predict_xstart_from_velocity(self, x_t: Tensor, t: Tensor, velocity: Tensor) -> Tensor:
        return (gather(self.sqrt_alphas_cumprod, t, x_t) * x_t
                - gather(self.sqrt_one_minus_alphas_cumprod, t, x_t) * velocity)

    def predict_eps_from_velocity(self, x_t: Tensor, t: Tensor, velocity: Tensor) -> Tensor:
        return (gather(self.sqrt_alphas_cumprod, t, x_t) * velocity
                + gather(self.sqrt_one_minus_alphas_cumprod, t, x_t) * x_t)

    def predict_xstart_from_xprev(self, x_t: Tensor, t: Tensor, xprev: Tensor) -> Tensor:
        """x0 whose posterior mean is xprev."""
        return (gather(1 / self.posterior_mean_coef1, t, x_t) * xprev
                - gather(self.posterior_mean_coef2 / self.posterior_mean_coef1, t, x_t) * x_t)

    # The network's output

    def interpret(self, output: Tensor, x_t: Tensor, t: Tensor,
                  process_xstart: Callable[[Tensor], Tensor] = lambda x: x) -> Prediction:
        """What a network's output at x_t says; process_xstart: applied to x0 (clipping)."""
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
        return Prediction(eps, pred_xstart, mean, variance, log_variance)

    def _learned_log_variance(self, values: Tensor, t: Tensor) -> Tensor:
        if self.model_var_type is ModelVarType.LEARNED:
            return values
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

    def p_mean_variance(self, model: nn.Module, x: Tensor, t: Tensor, clip_denoised: bool = True,
                        denoised_fn: Callable | None = None, model_kwargs: Mapping[str, Any] | None = None) -> Images:
        """{"mean", "variance", "log_variance", "pred_xstart", "eps"} of p(x_{t-1} | x_t)."""
        pred = Denoiser(self, model, clip_denoised, denoised_fn, model_kwargs or {})(x, t)
        return dict(vars(pred))

    # Sampling

    def _sample_step(self, step: sampling.Step, model: nn.Module, x: Tensor, t: Tensor, clip_denoised: bool,
                     denoised_fn: Callable | None, cond_fn: Callable | None, model_kwargs: Mapping | None,
                     guidance: Sequence[Guidance], noise: Tensor | None) -> Images:
        denoise = Denoiser(self, model, clip_denoised, denoised_fn, model_kwargs or {})
        return sampling.sample_step(step, denoise, x, t, lambda: torch.randn_like(x) if noise is None else noise,
                                    _with_function(guidance, cond_fn))

    def p_sample(self, model: nn.Module, x: Tensor, t: Tensor, clip_denoised: bool = True,
                 denoised_fn: Callable | None = None, cond_fn: Callable | None = None,
                 model_kwargs: Mapping | None = None, guidance: Sequence[Guidance] = (),
                 noise: Tensor | None = None) -> Images:
        """One DDPM step: {"sample", "pred_xstart", "pred_xstart_unguided", "eps"}.

        guidance: terms of `guided_diffusion.guidance`; cond_fn: the older way to give a gradient,
        (x, t, **model_kwargs) -> gradient at x. noise: (N, C, H, W), drawn where None.
        """
        return self._sample_step(sampling.ddpm_step, model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs,
                                 guidance, noise)

    def ddim_sample(self, model: nn.Module, x: Tensor, t: Tensor, clip_denoised: bool = True,
                    denoised_fn: Callable | None = None, cond_fn: Callable | None = None,
                    model_kwargs: Mapping | None = None, eta: float = 0.0, guidance: Sequence[Guidance] = (),
                    noise: Tensor | None = None) -> Images:
        """One DDIM step, as `p_sample`; eta in [0, 1]: its share of fresh noise."""
        step = functools.partial(sampling.ddim_step, eta=eta)
        return self._sample_step(step, model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs, guidance, noise)

    def _loop(self, step: sampling.Step, model: nn.Module, shape: Sequence[int], noise: Tensor | None,
              clip_denoised: bool, denoised_fn: Callable | None, cond_fn: Callable | None,
              model_kwargs: Mapping | None, device: torch.device | str | None, progress: bool,
              guidance: Sequence[Guidance]) -> Iterator[Images]:
        if device is None:
            device = next(model.parameters()).device
        x_T = torch.randn(*shape, device=device) if noise is None else noise.to(device)
        denoise = Denoiser(self, model, clip_denoised, denoised_fn, model_kwargs or {})
        chain = sampling.sample_chain(step, denoise, x_T, lambda index: torch.randn_like(x_T),
                                      _with_function(guidance, cond_fn))
        if not progress:
            return chain
        from tqdm.auto import tqdm

        return iter(tqdm(chain, total=self.num_timesteps, unit="step"))

    def p_sample_loop_progressive(
        self, model: nn.Module, shape: Sequence[int], noise: Tensor | None = None, clip_denoised: bool = True,
        denoised_fn: Callable | None = None, cond_fn: Callable | None = None, model_kwargs: Mapping | None = None,
        device: torch.device | str | None = None, progress: bool = False, guidance: Sequence[Guidance] = (),
    ) -> Iterator[Images]:
        """The DDPM chain from noise (x_T, drawn where None) to images, step by step as `p_sample` gives them."""
        return self._loop(sampling.ddpm_step, model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs,
                          device, progress, guidance)

    def p_sample_loop(self, model: nn.Module, shape: Sequence[int], noise: Tensor | None = None, **options) -> Tensor:
        """Images (N, C, H, W) by DDPM; options as in `p_sample_loop_progressive`."""
        return sampling.last(self.p_sample_loop_progressive(model, shape, noise, **options))["sample"]

    def ddim_sample_loop_progressive(
        self, model: nn.Module, shape: Sequence[int], noise: Tensor | None = None, clip_denoised: bool = True,
        denoised_fn: Callable | None = None, cond_fn: Callable | None = None, model_kwargs: Mapping | None = None,
        device: torch.device | str | None = None, progress: bool = False, eta: float = 0.0,
        guidance: Sequence[Guidance] = (),
    ) -> Iterator[Images]:
        """The DDIM chain, as `p_sample_loop_progressive`."""
        return self._loop(functools.partial(sampling.ddim_step, eta=eta), model, shape, noise, clip_denoised,
                          denoised_fn, cond_fn, model_kwargs, device, progress, guidance)

    def ddim_sample_loop(self, model: nn.Module, shape: Sequence[int], noise: Tensor | None = None,
                         **options) -> Tensor:
        """Images (N, C, H, W) by DDIM; options as in `ddim_sample_loop_progressive`."""
        return sampling.last(self.ddim_sample_loop_progressive(model, shape, noise, **options))["sample"]

    def ddim_reverse_sample(self, model: nn.Module, x: Tensor, t: Tensor, clip_denoised: bool = True,
                            denoised_fn: Callable | None = None, model_kwargs: Mapping | None = None,
                            eta: float = 0.0) -> Images:
        """x_{t+1} from x_t along the deterministic DDIM path: {"sample", "pred_xstart"}."""
        if eta != 0:
            raise UserError(f"eta {eta}: reversed DDIM is deterministic, eta must be 0")
        pred = Denoiser(self, model, clip_denoised, denoised_fn, model_kwargs or {})(x, t)
        eps = self.predict_eps_from_xstart(x, t, pred.pred_xstart)
        abar_next = gather(self.alphas_cumprod_next, t, x)
        sample = pred.pred_xstart * torch.sqrt(abar_next) + torch.sqrt(1 - abar_next) * eps
        return {"sample": sample, "pred_xstart": pred.pred_xstart}

    @torch.no_grad()
    def ddim_reverse_sample_loop(self, model: nn.Module, x: Tensor, **options) -> Tensor:
        """The noise (N, C, H, W) that DDIM with eta 0 would turn into the images x."""
        for index in range(self.num_timesteps):
            t = torch.full((len(x),), index, device=x.device)
            x = self.ddim_reverse_sample(model, x, t, **options)["sample"]
        return x

    # Losses and likelihoods

    def _vb_terms_bpd(self, pred: Prediction, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """(N,) terms of the variational bound in bits per dimension: KL for t > 0, decoder likelihood at t = 0."""
        true_mean, _, true_log_variance = self.q_posterior_mean_variance(x_start, x_t, t)
        kl = mean_flat(normal_kl(true_mean, true_log_variance, pred.mean, pred.log_variance))
        nll = -mean_flat(discretized_gaussian_log_likelihood(
            x_start, means=pred.mean, log_scales=0.5 * pred.log_variance))
        return torch.where(t == 0, nll, kl) / math.log(2)

    def training_losses(self, model: nn.Module, x_start: Tensor, t: Tensor, model_kwargs: Mapping | None = None,
                        noise: Tensor | None = None) -> Images:
        """Losses of one batch, (N,) each: {"loss"}, and "mse" and "vb" where they are parts of it."""
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise)
        output = model(x_t, self.model_timesteps(t), **(model_kwargs or {}))
        if self.loss_type.is_vb:
            vb = self._vb_terms_bpd(self.interpret(output, x_t, t), x_start, x_t, t)
            return {"loss": vb * self.num_timesteps if self.loss_type is LossType.RESCALED_KL else vb}
        terms = {}
        if self.model_var_type in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE):
            output, variance_values = output.chunk(2, dim=1)
            # The bound trains the variance alone: it sees the mean without its graph.
            frozen = torch.cat([output.detach(), variance_values], dim=1)
            terms["vb"] = self._vb_terms_bpd(self.interpret(frozen, x_t, t), x_start, x_t, t)
            if self.loss_type is LossType.RESCALED_MSE:
                terms["vb"] = terms["vb"] * (self.num_timesteps / 1000)
        target = {
            ModelMeanType.PREVIOUS_X: lambda: self.posterior_mean(x_start, x_t, t),
            ModelMeanType.START_X: lambda: x_start,
            ModelMeanType.EPSILON: lambda: noise,
            ModelMeanType.VELOCITY: lambda: self.velocity(x_start, t, noise),
        }[self.model_mean_type]()
        terms["mse"] = mean_flat((target - output) ** 2)
        return {"loss": sum(terms.values()), **terms}

    def _prior_bpd(self, x_start: Tensor) -> Tensor:
        """(N,) KL of q(x_T | x0) from the standard normal, in bits per dimension."""
        t = torch.full((len(x_start),), self.num_timesteps - 1, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        zero = torch.zeros((), device=x_start.device)
        return mean_flat(normal_kl(mean, log_variance, zero, zero)) / math.log(2)

    @torch.no_grad()
    def calc_bpd_loop(self, model: nn.Module, x_start: Tensor, clip_denoised: bool = True,
                      model_kwargs: Mapping | None = None) -> Images:
        """The variational bound of images in bits per dimension.

        {"total_bpd", "prior_bpd"}: (N,). {"vb", "xstart_mse", "mse"}: (N, T), from step T - 1 down to 0.
        """
        denoise = Denoiser(self, model, clip_denoised, model_kwargs=model_kwargs or {})
        columns: dict[str, list[Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
        for index in reversed(range(self.num_timesteps)):
            t = torch.full((len(x_start),), index, device=x_start.device)
            noise = torch.randn_like(x_start)
            x_t = self.q_sample(x_start, t, noise)
            pred = denoise(x_t, t)
            columns["vb"].append(self._vb_terms_bpd(pred, x_start, x_t, t))
            columns["xstart_mse"].append(mean_flat((pred.pred_xstart - x_start) ** 2))
            eps = self.predict_eps_from_xstart(x_t, t, pred.pred_xstart)
            columns["mse"].append(mean_flat((eps - noise) ** 2))
        result = {name: torch.stack(values, dim=1) for name, values in columns.items()}
        prior = self._prior_bpd(x_start)
        return {"total_bpd": result["vb"].sum(dim=1) + prior, "prior_bpd": prior, **result}


def _with_function(guidance: Sequence[Guidance], cond_fn: Callable | None) -> list[Guidance]:
    return [*guidance, *([FunctionGuidance(cond_fn)] if cond_fn is not None else [])]
