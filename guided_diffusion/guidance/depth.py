"""Depth-aware guidance (Kim et al., 2212.08861): depth consistency (DCG) and depth prior guidance (DPG).

    DCG: L_dc = || stopgrad(d_S) - d_W ||^2
    DPG: L_dp = || eta - eps_phi(d_tau, tau) ||^2,    d_tau = sqrt(abar_tau) d_S + sqrt(1 - abar_tau) eta
    mean -= scale * grad L

d_S, d_W: the depth that the strong and the weak predictor read from the network's own feature maps at x_t. phi: a
diffusion model of depth maps. Where the paper leaves it open: the square is averaged over pixels, tau is uniform over
the middle of phi's chain, all steps are guided.
Needs: capture of the predictors' feature blocks with their graph; DPG a depth prior. Cost: a backward pass through the
network evaluation that the step makes anyway, up to the blocks read (one for both terms together), and no further
evaluation; DPG also a forward and a backward pass of phi. The graph of one evaluation is held in memory, unless the
network was built with use_checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from numbers import Real
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..capture import capture_features, find_blocks
from ..errors import UserError
from ..nn import mean_flat
from ..rng import image_generator
from .base import Descent, StepContext

if TYPE_CHECKING:
    from ..depth.predictor import DepthPredictors
    from ..depth.prior import DepthPrior
    from ..gaussian_diffusion import Prediction

REDUCTIONS = ("mean", "sum")
TAU_RANGE = (0.02, 0.98)        # of the prior's chain, where tau is drawn


class _DepthGuidance(Descent):
    """What both terms share: the depth that predictors read from the network's features."""

    branches: Sequence[str] = ()

    def __init__(self, model: nn.Module, predictors: DepthPredictors, scale: float, reduction: str = "mean",
                 start: int | None = None, stop: int | None = None) -> None:
        super().__init__(scale, start, stop)
        if reduction not in REDUCTIONS:
            raise UserError(f"reduction {reduction!r}: must be one of {', '.join(REDUCTIONS)}")
        for branch in self.branches:
            if branch not in predictors.branches:
                raise UserError(f"the depth predictors have no branch {branch!r}; "
                                f"there are: {', '.join(predictors.branches) or 'none'}")
        find_blocks(model.feature_blocks, predictors.blocks, "block")
        self.model = model
        self.predictors = predictors
        self.reduction = reduction

    def observe(self) -> AbstractContextManager:
        return capture_features(self.model, self.predictors.blocks, graph=True)

    def depth(self, ctx: StepContext, branch: str) -> Tensor:
        """The depth at x_t by one branch, (N, 1, h, w) in [-1, 1]."""
        maps = ctx.observed.get(self)
        if not maps:
            raise UserError(f"depth guidance saw no evaluation of {', '.join(self.predictors.blocks)}: it must be "
                            "given the network that is sampled")
        return self.predictors.branches[branch](maps, ctx.model_t)

    def reduced(self, squares: Tensor) -> Tensor:
        """(N, 1, h, w) -> (N,), scale included."""
        return self.scale * (mean_flat(squares) if self.reduction == "mean" else squares.flatten(1).sum(dim=1))


class DepthConsistencyGuidance(_DepthGuidance):
    """Guidance to images whose depth the weak predictor reads as the strong one does.

    model: the network that is sampled. predictors: read its feature blocks (`model.feature_blocks`), with branches
    "strong" and "weak". scale: 0 is off, the paper's best is 40. reduction: of the squares over the pixels, "mean" or
    "sum". start, stop: see `Guidance`.
    """

    branches = ("strong", "weak")

    def loss(self, ctx: StepContext, pred: Prediction) -> Tensor:
        with torch.no_grad():
            strong = self.depth(ctx, "strong")
        return self.reduced((strong - self.depth(ctx, "weak")) ** 2)


class DepthPriorGuidance(_DepthGuidance):
    """Guidance to images whose depth a diffusion model of depth maps finds likely.

    model, predictors, scale, reduction: as in `DepthConsistencyGuidance`, without the weak branch. prior: its
    `image_size` may differ from the depth's: the depth is then resized by bilinear interpolation, antialiased where it
    shrinks. tau: the prior's step, as a fraction of its chain from 0 (no noise) to 1; None draws it from the middle,
    0.02 to 0.98. tau and eta depend on seed, image number and step alone. start, stop: see `Guidance`.
    """

    branches = ("strong",)

    def __init__(self, model: nn.Module, predictors: DepthPredictors, prior: DepthPrior, scale: float,
                 reduction: str = "mean", tau: float | None = None, seed: int = 0, start: int | None = None,
                 stop: int | None = None) -> None:
        super().__init__(model, predictors, scale, reduction, start, stop)
        if tau is not None and (isinstance(tau, bool) or not isinstance(tau, Real) or not 0 <= tau <= 1):
            raise UserError(f"tau {tau!r}: must be a fraction of the prior's chain from 0 to 1, or None")
        self.prior = prior
        self.tau = tau
        self.seed = seed

    def loss(self, ctx: StepContext, pred: Prediction) -> Tensor:
        depth = self.depth(ctx, "strong")
        size = self.prior.image_size
        if depth.shape[2:] != (size, size):
            depth = F.interpolate(depth, (size, size), mode="bilinear", antialias=size < max(depth.shape[2:]))
        tau, eta = self.draw(ctx.numbers, ctx.t)
        tau, eta = tau.to(depth.device), eta.to(depth)
        return self.reduced((eta - self.prior.eps(self.prior.diffusion.q_sample(depth, tau, noise=eta), tau)) ** 2)

    def draw(self, numbers: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """tau (N,) int64 and eta (N, 1, size, size) float32 of images `numbers` (N,) at steps t (N,), on the CPU."""
        last, size = self.prior.diffusion.num_timesteps - 1, self.prior.image_size
        low, high = (round(fraction * last) for fraction in (TAU_RANGE if self.tau is None else (self.tau, self.tau)))
        taus, etas = [], []
        for number, step in zip(numbers.tolist(), t.tolist(), strict=True):
            generator = image_generator(self.seed, number, step, "depth")
            # By a single uniform number, so that eta is the same whatever tau is.
            taus.append(low + int(generator.random() * (high - low + 1)))
            etas.append(generator.standard_normal((1, size, size), dtype=np.float32))
        return torch.tensor(taus), torch.from_numpy(np.stack(etas))
