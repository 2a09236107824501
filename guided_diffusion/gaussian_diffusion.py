"""The process with the samplers as methods: `p_sample*`, `ddim_*` and `solver_*` only bind a network and delegate.

The process itself is in `process`, the step bodies in `steps` and `solvers`, the loop in `sampling`. Images are
(N, C, H, W) in [-1, 1]; t is (N,) int64, an index into the (respaced) chain.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from . import sampling
from .errors import NonFiniteError, UserError
from .late import Tensor, nn, no_grad, torch
from .process import (
    Denoiser,
    DiffusionProcess,
    Images,
    LossType,
    ModelMeanType,
    ModelVarType,
    Prediction,
)
from .progress import progress_bar
from .rng import image_numbers
from .schedules import betas_for_alpha_bar, gather, get_named_beta_schedule
from .solvers import DEFAULT_STEPS, solver_options
from .terms import FunctionGuidance, Guidance

__all__ = ["Denoiser", "GaussianDiffusion", "LossType", "ModelMeanType", "ModelVarType", "Prediction",
           "betas_for_alpha_bar", "get_named_beta_schedule"]

CondFn = Callable[..., Tensor]
Ids = Sequence[int] | Tensor
Memory = dict[Guidance, Tensor]
DenoisedFn = Callable[[Tensor], Tensor]


class GaussianDiffusion(DiffusionProcess):
    """A process that samples.

    What all methods take: model: the network, (x, t, **model_kwargs) -> output. clip_denoised: x0 is clipped to
    [-1, 1]. denoised_fn: applied to x0 before. guidance: terms of `guided_diffusion.guidance`. cond_fn: the older way
    to give a gradient, (x, t, **model_kwargs) -> gradient at x. model_kwargs: labels and the like. noise:
    (N, C, H, W), drawn where None. device: that of the network where None. memory, of single steps: a dict, empty at
    first and the same for all steps of a chain, for terms that go on from the step before. image_ids: the numbers of
    the images, (N,), which terms that draw at random depend on; 0 to N - 1 where None, and so the same for each batch.

    Where a subclass has another `p_sample` or `ddim_sample`, the loops go step by step through that. Other methods of a
    step are not called by `p_sample` and `ddim_sample`, which raise UserError for a subclass that has others.
    """

    def p_sample(self, model: nn.Module, x: Tensor, t: Tensor, clip_denoised: bool = True,
                 denoised_fn: DenoisedFn | None = None, cond_fn: CondFn | None = None,
                 model_kwargs: Mapping[str, Any] | None = None, guidance: Sequence[Guidance] = (),
                 noise: Tensor | None = None, memory: Memory | None = None, image_ids: Ids | None = None) -> Images:
        """One DDPM step: {"sample", "pred_xstart", "pred_xstart_unguided", "eps"}, (N, C, H, W) each."""
        self._check_own()
        self.check_steps(t)
        denoise = self.denoiser(model, clip_denoised, denoised_fn, model_kwargs)
        return sampling.sample_step(sampling.ddpm_step, denoise, x, t, _drawn(noise, x), _terms(guidance, cond_fn),
                                    _numbers(image_ids, len(x)), memory)

    def ddim_sample(self, model: nn.Module, x: Tensor, t: Tensor, clip_denoised: bool = True,
                    denoised_fn: DenoisedFn | None = None, cond_fn: CondFn | None = None,
                    model_kwargs: Mapping[str, Any] | None = None, eta: float = 0.0,
                    guidance: Sequence[Guidance] = (), noise: Tensor | None = None,
                    memory: Memory | None = None, image_ids: Ids | None = None) -> Images:
        """One DDIM step, as `p_sample`; eta in [0, 1]: its share of fresh noise."""
        self._check_own()
        self.check_steps(t)
        denoise = self.denoiser(model, clip_denoised, denoised_fn, model_kwargs)
        step = sampling.DdimOptions(eta=eta).step()
        return sampling.sample_step(step, denoise, x, t, _drawn(noise, x), _terms(guidance, cond_fn),
                                    _numbers(image_ids, len(x)), memory)

    def condition_mean(self, cond_fn: CondFn, p_mean_var: Images, x: Tensor, t: Tensor,
                       model_kwargs: Mapping[str, Any] | None = None) -> Tensor:
        """The mean of p(x_{t-1} | x_t, y), as DDPM is guided (Dhariwal & Nichol, 2105.05233, algorithm 1).

        cond_fn: the gradient of log p(y | x_t), as above. p_mean_var: what `p_mean_variance` gives at x and t. Returns
        mean + variance * gradient, (N, C, H, W).
        """
        gradient = cond_fn(x, self.model_timesteps(t), **(model_kwargs or {}))
        return p_mean_var["mean"] + p_mean_var["variance"] * gradient

    def condition_score(self, cond_fn: CondFn, p_mean_var: Images, x: Tensor, t: Tensor,
                        model_kwargs: Mapping[str, Any] | None = None) -> Images:
        """`p_mean_var` conditioned as DDIM is guided (Dhariwal & Nichol, 2105.05233, algorithm 2).

        The arguments are those of `condition_mean`. eps, taken from the (clipped) x0, becomes
        eps - sqrt(1 - abar) gradient; x0, which is not clipped again, and the mean follow from it.
        """
        gradient = cond_fn(x, self.model_timesteps(t), **(model_kwargs or {}))
        eps = self.eps_with_gradient(self.predict_eps_from_xstart(x, t, p_mean_var["pred_xstart"]), t, gradient)
        pred_xstart = self.predict_xstart_from_eps(x, t, eps)
        return {**p_mean_var, "eps": eps, "xstart": pred_xstart, "pred_xstart": pred_xstart,
                "mean": self.posterior_mean(pred_xstart, x, t)}

    def p_sample_loop_progressive(
        self, model: nn.Module, shape: Sequence[int], noise: Tensor | None = None, clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None, cond_fn: CondFn | None = None,
        model_kwargs: Mapping[str, Any] | None = None, device: torch.device | str | None = None,
        progress: bool = False, guidance: Sequence[Guidance] = (), image_ids: Ids | None = None,
    ) -> Iterator[Images]:
        """The DDPM chain from noise (x_T) to images, step by step as `p_sample` gives them."""
        x_T = _first_noise(model, shape, noise, device)
        if self._is_own("p_sample"):
            step = functools.partial(self.p_sample, model, clip_denoised=clip_denoised, denoised_fn=denoised_fn,
                                     cond_fn=cond_fn, model_kwargs=model_kwargs)
            return self._own_chain(step, x_T, guidance, image_ids, progress)
        self._check_own()
        denoise = self.denoiser(model, clip_denoised, denoised_fn, model_kwargs)
        return self._chain(sampling.ddpm_step, denoise, x_T, _terms(guidance, cond_fn), progress, image_ids)

    def p_sample_loop(self, model: nn.Module, shape: Sequence[int], *arguments: Any, **options: Any) -> Tensor:
        """Images (N, C, H, W) by DDPM; the other arguments are those of `p_sample_loop_progressive`."""
        return sampling.last(self.p_sample_loop_progressive(model, shape, *arguments, **options))["sample"]

    def ddim_sample_loop_progressive(
        self, model: nn.Module, shape: Sequence[int], noise: Tensor | None = None, clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None, cond_fn: CondFn | None = None,
        model_kwargs: Mapping[str, Any] | None = None, device: torch.device | str | None = None,
        progress: bool = False, eta: float = 0.0, guidance: Sequence[Guidance] = (), image_ids: Ids | None = None,
    ) -> Iterator[Images]:
        """The DDIM chain, as `p_sample_loop_progressive`."""
        x_T = _first_noise(model, shape, noise, device)
        if self._is_own("ddim_sample"):
            step = functools.partial(self.ddim_sample, model, clip_denoised=clip_denoised, denoised_fn=denoised_fn,
                                     cond_fn=cond_fn, model_kwargs=model_kwargs, eta=eta)
            return self._own_chain(step, x_T, guidance, image_ids, progress)
        self._check_own()
        denoise = self.denoiser(model, clip_denoised, denoised_fn, model_kwargs)
        return self._chain(sampling.DdimOptions(eta=eta).step(), denoise, x_T, _terms(guidance, cond_fn), progress,
                           image_ids)

    def ddim_sample_loop(self, model: nn.Module, shape: Sequence[int], *arguments: Any, **options: Any) -> Tensor:
        """Images (N, C, H, W) by DDIM; the other arguments are those of `ddim_sample_loop_progressive`."""
        return sampling.last(self.ddim_sample_loop_progressive(model, shape, *arguments, **options))["sample"]

    def solver_sample_loop_progressive(
        self, model: nn.Module, shape: Sequence[int], solver: str = "dpm-solver++", order: int = 2,
        variant: str = "bh2", steps: int = DEFAULT_STEPS, grid: str = "time-uniform", eta: float = 0.0,
        noise: Tensor | None = None, clip_denoised: bool = True, dynamic_threshold: float | None = None,
        denoised_fn: DenoisedFn | None = None, cond_fn: CondFn | None = None,
        model_kwargs: Mapping[str, Any] | None = None, device: torch.device | str | None = None,
        progress: bool = False, guidance: Sequence[Guidance] = (), image_ids: Ids | None = None,
    ) -> Iterator[Images]:
        """The chain of a multistep solver (see `solvers`), as `p_sample_loop_progressive`.

        solver: "dpm-solver++" or "unipc". order: 1 (of "dpm-solver++": DDIM), 2 or 3. variant: of UniPC, "bh1" or
        "bh2". steps: evaluations. grid: "time-uniform", "logsnr" or "time-quadratic", which lie in the whole chain that
        the network was trained on, also where this one is respaced; or "chain", all steps of this one, however many
        (another number than the default must then be theirs). eta: 1 is the stochastic form of DPM-Solver++ (orders 1
        and 2). dynamic_threshold: a quantile, such as 0.995, see `process.dynamically_thresholded`. Raises UserError
        for what is not allowed.
        """
        self._check_own()
        options = solver_options(solver, order, variant, steps, grid, eta, dynamic_threshold)
        process = options.process(self)
        denoise = process.denoiser(model, clip_denoised, denoised_fn, model_kwargs, options.threshold_quantile)
        return self._chain(options.step(), denoise, _first_noise(model, shape, noise, device),
                           _terms(guidance, cond_fn), progress, image_ids)

    def solver_sample_loop(self, model: nn.Module, shape: Sequence[int], *arguments: Any, **options: Any) -> Tensor:
        """Images (N, C, H, W) by a multistep solver; the other arguments: see `solver_sample_loop_progressive`."""
        return sampling.last(self.solver_sample_loop_progressive(model, shape, *arguments, **options))["sample"]

    def _chain(self, step: sampling.Step, denoise: Denoiser, x_T: Tensor, guidance: Sequence[Guidance],
               progress: bool, image_ids: Ids | None) -> Iterator[Images]:
        chain = sampling.sample_chain(step, denoise, x_T, lambda index: torch.randn_like(x_T), guidance,
                                      _numbers(image_ids, len(x_T)))
        return _shown(chain, denoise.diffusion.num_timesteps) if progress else chain

    # Of subclasses

    def _is_own(self, name: str) -> bool:
        """Whether a method is another one than that of this class: of a subclass, or put in its place."""
        return name in vars(self) or getattr(type(self), name) is not METHODS[name]

    def _check_own(self) -> None:
        for name in NOT_CALLED:
            if self._is_own(name):
                raise UserError(f"{type(self).__name__}.{name}: is never called, as samplers here know terms of "
                                "guidance alone; pass such a term (guidance=), or replace p_sample or ddim_sample")

    def _own_chain(self, step: Callable[..., Images], x_T: Tensor, guidance: Sequence[Guidance],
                   image_ids: Ids | None, progress: bool) -> Iterator[Images]:
        """The chain through a step of a subclass, which need not know what the official code does not have."""
        terms = _terms(guidance, None)
        _numbers(image_ids, len(x_T))
        further: dict[str, Any] = {"guidance": terms, "memory": {}} if terms else {}
        if image_ids is not None:
            further["image_ids"] = image_ids

        def steps() -> Iterator[Images]:
            x = x_T
            for index in reversed(range(self.num_timesteps)):
                with torch.no_grad():
                    out = step(x, torch.full((len(x),), index, device=x.device), **further)
                x = out["sample"]
                if not x.isfinite().all():
                    raise NonFiniteError(f"step {index}: {type(self).__name__} returned NaN or infinity")
                yield out

        return _shown(steps(), self.num_timesteps) if progress else steps()

    def ddim_reverse_sample(self, model: nn.Module, x: Tensor, t: Tensor, clip_denoised: bool = True,
                            denoised_fn: DenoisedFn | None = None, model_kwargs: Mapping[str, Any] | None = None,
                            eta: float = 0.0) -> Images:
        """x_{t+1} from x_t along the deterministic DDIM path (2010.02502, eq. 14): {"sample", "pred_xstart"}."""
        if eta != 0:
            raise UserError(f"eta {eta}: reversed DDIM is deterministic, eta must be 0")
        self.check_steps(t)
        pred = self.denoiser(model, clip_denoised, denoised_fn, model_kwargs)(x, t)
        eps = self.predict_eps_from_xstart(x, t, pred.pred_xstart)
        abar_next = gather(self.alphas_cumprod_next, t, x)
        sample = pred.pred_xstart * torch.sqrt(abar_next) + torch.sqrt(1 - abar_next) * eps
        return {"sample": sample, "pred_xstart": pred.pred_xstart}

    @no_grad
    def ddim_reverse_sample_loop(self, model: nn.Module, x: Tensor, **options: Any) -> Tensor:
        """The noise (N, C, H, W) that DDIM with eta 0 would turn into the images x."""
        self.denoiser(model, model_kwargs=options.get("model_kwargs")).check_labels()
        for index in range(self.num_timesteps):
            t = torch.full((len(x),), index, device=x.device)
            x = self.ddim_reverse_sample(model, x, t, **options)["sample"]
        return x


NOT_CALLED = ("p_mean_variance", "q_posterior_mean_variance", "condition_mean", "condition_score",
              "_predict_xstart_from_eps", "_predict_eps_from_xstart", "_predict_xstart_from_xprev")
METHODS = {name: getattr(GaussianDiffusion, name) for name in (*NOT_CALLED, "p_sample", "ddim_sample")}


def _check_noise(noise: Tensor, shape: Sequence[int]) -> None:
    if tuple(noise.shape) != tuple(shape):
        raise UserError(f"noise: has the shape {tuple(noise.shape)}, and the images have {tuple(shape)}")


def _numbers(image_ids: Ids | None, count: int) -> Tensor | None:
    """The numbers of images, (N,); raises UserError for another number of them, and for what is none."""
    if image_ids is not None and len(image_ids) != count:
        raise UserError(f"image_ids: {len(image_ids)} numbers for {count} images")
    return None if image_ids is None else torch.tensor(image_numbers("image_ids", image_ids), dtype=torch.int64)


def _terms(guidance: Iterable[Guidance], cond_fn: CondFn | None) -> list[Guidance]:
    return [*sampling.listed_terms(guidance), *([] if cond_fn is None else [FunctionGuidance(cond_fn)])]


def _drawn(noise: Tensor | None, x: Tensor) -> sampling.Noise:
    if noise is not None:
        _check_noise(noise, x.shape)
        if noise.dtype != x.dtype:
            raise UserError(f"noise: is of {noise.dtype}, must be of {x.dtype}, as x".replace("torch.", ""))
    return lambda: torch.randn_like(x) if noise is None else noise


def _first_noise(model: nn.Module, shape: Sequence[int], noise: Tensor | None,
                 device: torch.device | str | None) -> Tensor:
    if noise is not None and shape is not None:         # official scripts may leave a shape out that noise tells
        _check_noise(noise, shape)
    if noise is not None and not noise.is_floating_point():
        raise UserError(f"noise: is of {noise.dtype}, must be of a floating type".replace("torch.", ""))
    if device is None:          # a model may be any function
        device = next((weight.device for weight in model.parameters()), None) if isinstance(model, nn.Module) else None
        device = device or (torch.device("cpu") if noise is None else noise.device)
    return torch.randn(*shape, device=device) if noise is None else noise.to(device)


def _shown(chain: Iterator[Images], steps: int) -> Iterator[Images]:
    with progress_bar(steps, "sampling", "step") as bar:
        for out in chain:
            yield out
            bar.update()
