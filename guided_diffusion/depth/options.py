"""The options of depth-aware guidance, and the terms that they describe."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .. import dist_util
from ..checkpoint import locate, read_metadata
from ..errors import UserError
from ..guidance import DepthConsistencyGuidance, DepthPriorGuidance, Guidance
from ..guidance.depth import REDUCTIONS
from ..options import Options, option
from .predictor import check_fits, check_network, load_predictors
from .prior import load_prior


@dataclass(frozen=True)
class DagOptions(Options):
    """Depth-aware guidance."""

    dcg_scale: float = option(0.0, "scale of depth consistency guidance; 0: off")
    dpg_scale: float = option(0.0, "scale of depth prior guidance; 0: off")
    depth_predictor: str = option("", "depth predictors of the network, as scripts/depth_train.py writes them; shipped "
                                  "models have theirs")
    depth_prior: str = option("", "diffusion model of depth images, as scripts/image_train.py writes it; shipped "
                              "models have theirs")
    dag_reduction: str = option("mean", f"squares over the pixels: {' or '.join(REDUCTIONS)}", choices=REDUCTIONS)
    depth_tau: float | None = option(None, "step of the depth prior as a part of its chain; unset: drawn from 0.02 to "
                                     "0.98", minimum=0, maximum=1)
    dag_start: int | None = option(None, "guided only at respaced steps below this one; unset: from the first",
                                   minimum=0)
    dag_stop: int | None = option(None, "guided only at respaced steps from this one up; unset: to the last", minimum=0)

    def files(self) -> dict[str, str]:
        """The files that the guidance needs, by the names of the options; none where it is off."""
        return {**({"depth_predictor": self.depth_predictor} if self.dcg_scale or self.dpg_scale else {}),
                **({"depth_prior": self.depth_prior} if self.dpg_scale else {})}

    def build(self, model: nn.Module, seed: int) -> list[Guidance]:
        """The guidance terms for `model`, on this rank's device. Raises UserError for files missing or for another."""
        makers = {"depth_predictor": "scripts/depth_train.py trains one",
                  "depth_prior": "scripts/image_train.py trains one on depth images"}
        for flag, path in self.files().items():
            if not path:
                raise UserError(f"--{flag} is not given: depth-aware guidance needs it, {makers[flag]}")
        if not self.files():
            return []
        predictors = load_predictors(locate(self.depth_predictor), dist_util.dev())
        check_fits(predictors, model, None)
        common = {"reduction": self.dag_reduction, "start": self.dag_start, "stop": self.dag_stop}
        terms: list[Guidance] = []
        if self.dcg_scale:
            terms.append(DepthConsistencyGuidance(model, predictors, self.dcg_scale, **common))
        if self.dpg_scale:
            prior = load_prior(locate(self.depth_prior), dist_util.dev())
            terms.append(DepthPriorGuidance(model, predictors, prior, self.dpg_scale, tau=self.depth_tau, seed=seed,
                                            **common))
        return terms

    def check_network(self, network_sha256: str) -> None:
        """Raises UserError where the predictors, which `build` has read, were trained on another checkpoint."""
        if self.files():
            check_network(read_metadata(self.depth_predictor)["network_sha256"], network_sha256,
                          f"--depth_predictor {self.depth_predictor}: was")


@dataclass(frozen=True)
class DagOnOptions(DagOptions):
    """Depth-aware guidance, on unless told otherwise: the scales are the paper's best."""

    dcg_scale: float = option(40.0, "scale of depth consistency guidance; 0: off")
    dpg_scale: float = option(40.0, "scale of depth prior guidance; 0: off")
