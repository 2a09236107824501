"""Depth-aware guidance (Kim et al., 2212.08861): depth consistency (DCG) and depth prior guidance (DPG).

    DCG: L_dc = || stopgrad(d_S) - d_W ||^2
    DPG: L_dp = || eta - eps_phi(d_tau, tau) ||^2,    d_tau = sqrt(abar_tau) d_S + sqrt(1 - abar_tau) eta
    mean -= scale * grad L

The gradient of L_dp contains the Jacobian of eps_phi. Score distillation (Poole et al., 2209.14988, equation 3) drops
it: (eps_phi - eta) grad d_S takes the place of grad L_dp.

d_S, d_W: the depth that the strong and the weak predictor read from the network's own feature maps at x_t. phi: a
diffusion model of depth maps. Where the paper leaves it open: the square is averaged over pixels, tau is uniform over
the middle of phi's chain, all steps are guided.
Needs: capture of the predictors' feature blocks with their graph; DPG a depth prior. Cost: a backward pass through the
network evaluation that the step makes anyway, up to the blocks read (one for both terms together), and no further
evaluation; DPG also a forward and a backward pass of phi, of which score distillation needs the first alone. The graph
of one evaluation is held in memory up to the last block through which a loss is differentiated, unless the network was
built with use_checkpoint. The strong predictor runs once for both terms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Unpack

import numpy as np

from ..build import build_model
from ..capture import capture_features, end_graph, find_blocks
from ..checkpoint import locate, read_metadata
from ..depth.prior import DepthPrior, as_prior_sees, load_prior, prior_options
from ..depth.ranges import parse_depth_range
from ..dist_util import say
from ..errors import UserError
from ..late import Tensor, nn, torch
from ..losses import mean_flat
from ..npz import RANGE_KEY
from ..options import option
from ..process import Prediction
from ..rng import image_generator
from ..terms import Guidance, LossGuidance, Passes, SigmaRange, StepContext
from .base import GuidanceOptions, Networks, Reader, each, sigma_max_option, sigma_min_option

if TYPE_CHECKING:
    from ..depth.predictor import DepthPredictors
    from ..unet import Encoder

REDUCTIONS = ("mean", "sum")
TAU_RANGE = (0.02, 0.98)        # of the prior's chain, where tau is drawn
FULL, SCORE = "full", "score"
# What a step costs by each gradient of depth prior guidance.
GRADIENTS = {FULL: Passes(backward=1, others={"prior": 1}, readers={"strong": True}),
             SCORE: Passes(backward=1, plain={"prior": 1}, readers={"strong": True})}


class _DepthGuidance(LossGuidance):
    """What both terms share: the depth that predictors read from the network's features.

    branches: the predictors that a term reads. differentiated: those through which its loss has a gradient.
    """

    branches: Sequence[str] = ()
    differentiated: Sequence[str] = ()

    def __init__(self, model: Encoder, predictors: DepthPredictors, scale: float, reduction: str = "mean",
                 start: int | None = None, stop: int | None = None, **sigma: Unpack[SigmaRange]) -> None:
        super().__init__(scale, start, stop, **sigma)
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

    def observe(self) -> AbstractContextManager[Any]:
        """Captures the blocks that the predictors read, with their graph."""
        return capture_features(self.model, self.predictors.blocks, graph=True)

    def end_graph(self) -> AbstractContextManager[Any]:
        """Keeps the graph up to the last block that a differentiated predictor reads."""
        branches = [self.predictors.branches[name] for name in self.differentiated]
        return end_graph(self.model, {block for branch in branches for block in branch.blocks})

    def depth(self, ctx: StepContext, branch: str) -> Tensor:
        """The depth at x_t by one branch, (N, 1, h, w) in [-1, 1], computed once for all terms of the step.

        It carries a graph if a term of the step is differentiated through that branch.
        """
        maps = ctx.observed.get(self)
        if not maps:
            raise UserError(f"depth guidance saw no evaluation of {', '.join(self.predictors.blocks)}: it must be "
                            "given the network that is sampled")
        graph = any(isinstance(term, _DepthGuidance) and branch in term.differentiated and self._reads_as(term)
                    for term in ctx.observed)

        def read() -> Tensor:
            with torch.set_grad_enabled(graph):
                return self.predictors.branches[branch](maps, ctx.model_t)

        return ctx.once((self.predictors, self.model, branch), read)

    def _reads_as(self, other: _DepthGuidance) -> bool:
        """Whether another term has the same predictors of the same network."""
        return other.predictors is self.predictors and other.model is self.model

    def reduced(self, squares: Tensor) -> Tensor:
        """(N, 1, h, w) -> (N,), scale included."""
        return self.scale * (mean_flat(squares) if self.reduction == "mean" else squares.flatten(1).sum(dim=1))


class DepthConsistencyGuidance(_DepthGuidance):
    """Guidance to images whose depth the weak predictor reads as the strong one does.

    model: the network that is sampled. predictors: read its feature blocks (`model.feature_blocks`), with branches
    "strong" and "weak". scale: 0 is off, the paper's best is 40. reduction: of the squares over the pixels, "mean" or
    "sum". start, stop and the noise levels: see `Guidance`.
    """

    branches = ("strong", "weak")
    differentiated = ("weak",)
    passes = Passes(backward=1, readers={"strong": False, "weak": True})

    def loss(self, ctx: StepContext, pred: Prediction) -> Tensor:
        """The loss `scale * L_dc` of each image, (N,)."""
        strong = self.depth(ctx, "strong").detach()
        return self.reduced((strong - self.depth(ctx, "weak")) ** 2)


class DepthPriorGuidance(_DepthGuidance):
    """Guidance to images whose depth a diffusion model of depth maps finds likely.

    model, predictors, scale, reduction: as in `DepthConsistencyGuidance`, without the weak branch. prior: its
    `image_size` may differ from the depth's: the depth is then resized by bilinear interpolation, antialiased where it
    shrinks. tau: the prior's step, as a fraction of its chain from 0 (no noise) to 1; None draws it from the middle,
    0.02 to 0.98. tau and eta depend on seed, image and step alone. start, stop and the noise levels: see `Guidance`.

    gradient: "full" is that of L_dp, through the prior, as the paper writes it. "score" is score distillation: each
    pixel of the depth that the prior sees is pushed by eps_phi - eta, times the scale and, where the reduction is the
    mean, over the number of these pixels. That has neither the factor 2 of the square nor the sqrt(abar_tau) of d_tau,
    so the same scale is not the same strength. The prior then records no graph and is not differentiated.
    """

    branches = ("strong",)
    differentiated = ("strong",)
    passes = GRADIENTS[FULL]

    def __init__(self, model: Encoder, predictors: DepthPredictors, prior: DepthPrior, scale: float,
                 reduction: str = "mean", tau: float | None = None, seed: int = 0, start: int | None = None,
                 stop: int | None = None, *, gradient: str = FULL, **sigma: Unpack[SigmaRange]) -> None:
        super().__init__(model, predictors, scale, reduction, start, stop, **sigma)
        if gradient not in GRADIENTS:
            raise UserError(f"gradient {gradient!r}: must be one of {', '.join(GRADIENTS)}")
        if tau is not None and (isinstance(tau, bool) or not isinstance(tau, Real) or not 0 <= tau <= 1):
            raise UserError(f"tau {tau!r}: must be a fraction of the prior's chain from 0 to 1, or None")
        self.prior = prior
        self.tau = tau
        self.seed = seed
        self.gradient = gradient
        self.passes = GRADIENTS[gradient]

    def loss(self, ctx: StepContext, pred: Prediction) -> Tensor:
        """What each image is moved down, (N,): `scale * L_dp`, or what has the gradient of score distillation."""
        depth = as_prior_sees(self.depth(ctx, "strong"), self.prior.image_size)
        tau, eta = self.draw(ctx.image_ids, ctx.t)
        tau, eta = tau.to(depth.device), eta.to(depth)
        if self.gradient == FULL:
            return self.reduced(self._error(depth, tau, eta) ** 2)
        with torch.no_grad():
            error = self._error(depth, tau, eta)
        return self.reduced(error * depth)

    def _error(self, depth: Tensor, tau: Tensor, eta: Tensor) -> Tensor:
        """eps_phi(d_tau, tau) - eta, (N, 1, h, w)."""
        return self.prior.eps(self.prior.diffusion.q_sample(depth, tau, noise=eta), tau) - eta

    def draw(self, image_ids: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Draws tau (N,) int64 and eta (N, 1, size, size) float32 of images (N,) at steps t (N,), on the CPU."""
        last, size = self.prior.diffusion.num_timesteps - 1, self.prior.image_size
        low, high = (round(fraction * last) for fraction in (TAU_RANGE if self.tau is None else (self.tau, self.tau)))
        taus, etas = [], []
        for image_id, step in zip(image_ids.tolist(), t.tolist(), strict=True):
            generator = image_generator(self.seed, image_id, step, "depth")
            # By a single uniform number, so that eta is the same whatever tau is.
            taus.append(low + int(generator.random() * (high - low + 1)))
            etas.append(generator.standard_normal((1, size, size), dtype=np.float32))
        return torch.tensor(taus), torch.from_numpy(np.stack(etas))


def _found(path: str) -> Path | None:
    """Where a file is on this machine; None where there is none, which whoever loads it says."""
    try:
        found = Path(locate(path))
    except UserError:
        return None
    return found if found.is_file() else None


@dataclass(frozen=True)
class DagOptions(GuidanceOptions):
    """Depth-aware guidance."""

    short = "DAG"
    sigma_flags = "dag"
    switched_on: ClassVar = {"dcg_scale": 40.0, "dpg_scale": 40.0}
    search: ClassVar = each("dcg_scale", 3.0, 10.0, 40.0)
    search_scale = ("dcg_scale", 0.0)
    symbols: ClassVar = {"depth_tau": ("tau", 0.0)}
    kind = LossGuidance
    remedies: ClassVar = {"depth_predictor": "scripts/depth_train.py trains one (docs/dag.md)",
                          "depth_prior": "scripts/image_train.py trains one on depth images (docs/dag.md)"}

    dcg_scale: float = option(0.0, "scale of depth consistency guidance; 0: off")
    dpg_scale: float = option(0.0, "scale of depth prior guidance; 0: off")
    depth_predictor: str = option("", "depth predictors of the network, as scripts/depth_train.py writes them; bundled "
                                  "models have theirs")
    depth_prior: str = option("", "diffusion model of depth images, as scripts/image_train.py writes it; bundled "
                              "models have theirs")
    dag_reduction: str = option("mean", f"squares over the pixels: {' or '.join(REDUCTIONS)}", choices=REDUCTIONS)
    depth_tau: float | None = option(None, "step of the depth prior as a part of its chain; unset: drawn from 0.02 to "
                                     "0.98", minimum=0, maximum=1)
    dpg_gradient: str = option(FULL, "gradient of depth prior guidance: full, through the prior, or score, without the "
                               "prior's Jacobian (score distillation)", choices=tuple(GRADIENTS), later=True)
    dag_start: int | None = option(None, "guided only at respaced steps below this one; unset: from the first",
                                   minimum=0)
    dag_stop: int | None = option(None, "guided only at respaced steps from this one up; unset: to the last", minimum=0)
    dag_sigma_min: float | None = sigma_min_option()
    dag_sigma_max: float | None = sigma_max_option()

    @property
    def active(self) -> bool:
        """Whether one of the two scales is not 0."""
        return bool(self.dcg_scale or self.dpg_scale)

    def headline(self) -> str:
        """Like "DCG 40 + DPG 40"."""
        return " + ".join(f"{name} {scale:g}" for name, scale in (("DCG", self.dcg_scale), ("DPG", self.dpg_scale))
                          if scale)

    def details(self) -> dict[str, str]:
        """Reduction, tau, and the gradient of depth prior guidance."""
        score = self.dpg_scale and self.dpg_gradient == SCORE
        return {"reduction": f"{self.dag_reduction} over pixels",
                "tau": "tau drawn" if self.depth_tau is None else f"tau = {self.depth_tau:g}",
                "gradient": "score distillation" if score else "full gradient"}

    def files(self) -> dict[str, str]:
        """The predictors, and the prior where it is used."""
        return {**({"depth_predictor": self.depth_predictor} if self.active else {}),
                **({"depth_prior": self.depth_prior} if self.dpg_scale else {})}

    def useless(self) -> dict[str, str]:
        """What is about depth prior guidance, where that is off."""
        of_prior = ("depth_prior", "depth_tau", "dpg_gradient")
        return {} if self.dpg_scale else dict.fromkeys(of_prior, "--dpg_scale is 0")

    def need(self, flag: str) -> str:
        """Why a file is needed, and what makes it."""
        return f"depth-aware guidance needs it, {self.remedies[flag].removesuffix(' (docs/dag.md)')}"

    def build(self, nets: Networks) -> list[Guidance]:
        """Both terms, or the one that is on."""
        from ..depth.predictor import check_entry, check_fits, load_predictors

        predictors = load_predictors(locate(self.depth_predictor), nets.device)
        check_fits(predictors, nets.model, None)
        if nets.model_path:
            check_entry(self.depth_predictor, nets.model_path, nets.entry,
                        f"--depth_predictor {self.depth_predictor}: was")
        common: dict[str, Any] = {"reduction": self.dag_reduction, "start": self.dag_start, "stop": self.dag_stop,
                                  **self.sigma_range}
        terms: list[Guidance] = []
        if self.dcg_scale:
            terms.append(DepthConsistencyGuidance(nets.model, predictors, self.dcg_scale, **common))
        if self.dpg_scale:
            prior = load_prior(locate(self.depth_prior), nets.device)
            self._check_range(predictors.depth_range)
            terms.append(DepthPriorGuidance(nets.model, predictors, prior, self.dpg_scale, tau=self.depth_tau,
                                            seed=nets.seed, gradient=self.dpg_gradient, **common))
        return terms

    def _check_range(self, of_predictors: str) -> None:
        """Raises UserError where the prior learnt depth of another range; says where that is not known."""
        of_prior = read_metadata(self.depth_prior).get(RANGE_KEY)
        if of_prior is None:
            say(f"--depth_prior {self.depth_prior}: does not say of which --depth_range its depth images were; it "
                f"must be {of_predictors}, that of --depth_predictor")
        elif parse_depth_range(of_prior) != parse_depth_range(of_predictors):
            raise UserError(f"--depth_prior {self.depth_prior}: was trained on depth images of --depth_range "
                            f"{of_prior}, and the predictors of --depth_predictor on {of_predictors}; the two must be "
                            "the same")

    def networks(self) -> dict[str, Callable[[], nn.Module]]:
        """The prior, where it is used and its file is there."""
        path = _found(self.depth_prior) if self.dpg_scale else None
        return {"prior": lambda: build_model(prior_options(path)[0])} if path else {}

    def readers(self) -> dict[str, Callable[[], Reader]]:
        """The branches of the predictors, where their file is there."""
        from ..depth.predictor import build_predictors

        path = _found(self.depth_predictor)
        return {"strong": lambda: build_predictors(path).branches["strong"],
                "weak": lambda: build_predictors(path).branches["weak"]} if path else {}

    def schedule(self) -> list[tuple[Guidance, Passes]]:
        """One backward pass for both terms together, and the prior's evaluations."""
        return [(Guidance(scale, self.dag_start, self.dag_stop, **self.sigma_range), passes)
                for scale, passes in ((self.dcg_scale, DepthConsistencyGuidance.passes),
                                      (self.dpg_scale, GRADIENTS[self.dpg_gradient]))]

    def check(self, sha256: Mapping[str, str], entry: str = "") -> None:
        """Raises UserError where the predictors, which `build` has read, were trained on another checkpoint."""
        if self.active:
            from ..depth.predictor import check_network

            check_network(read_metadata(self.depth_predictor)["network_sha256"], sha256["model_path"],
                          f"--depth_predictor {self.depth_predictor}: was")

    def variants(self) -> dict[str, DagOptions]:
        """DCG, DPG and both, at every step, as far as there are files."""
        always = replace(self, dag_start=None, dag_stop=None, dag_sigma_min=None, dag_sigma_max=None)
        scales = {"DCG": (1.0, 0.0), "DPG": (0.0, 1.0), "DCG + DPG": (1.0, 1.0)}
        chosen = {name: replace(always, dcg_scale=dcg, dpg_scale=dpg) for name, (dcg, dpg) in scales.items()}
        return {name: options for name, options in chosen.items() if all(options.files().values())}
