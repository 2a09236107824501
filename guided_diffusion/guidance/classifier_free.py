"""Classifier-free guidance (Ho & Salimans, 2207.12598, eq. 6).

    delta = s (eps(x_t, y) - eps(x_t, null))

null: the label of no class, on which the network was trained with `--label_dropout`. The paper's w is s, the guidance
scale of Stable Diffusion and of diffusers is 1 + s.
Needs: a network with a null class. Cost: one more network evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Unpack

from ..errors import UserError
from ..late import torch
from ..options import option
from ..process import Denoiser
from ..terms import ContrastGuidance, Guidance, Inputs, SigmaRange, StepContext
from .base import Networks, ScaledOptions, each, sigma_max_option, sigma_min_option, start_option


class ClassifierFreeGuidance(ContrastGuidance):
    """Guidance away from what the network predicts without a label.

    scale: s, 0 is off. null_label: the number of the label that stands for none. The others: see `Guidance`.
    """

    def __init__(self, scale: float, null_label: int, start: int | None = None, stop: int | None = None,
                 **sigma: Unpack[SigmaRange]) -> None:
        super().__init__(scale, start, stop, **sigma)
        if isinstance(null_label, bool) or not isinstance(null_label, int) or null_label < 0:
            raise UserError(f"null_label {null_label!r}: must be the number of a label")
        self.null_label = null_label

    def check_network(self, denoise: Denoiser) -> None:
        """Raises UserError for a network that does not know the null label."""
        count = denoise.label_count
        if count is not None and self.null_label >= count:
            raise UserError(f"null_label {self.null_label}: must be a label from 0 to {count - 1}, which the network "
                            "knows")

    def beforehand(self, ctx: StepContext) -> Inputs:
        """The same image with the null label. Raises UserError for a network without labels."""
        return Inputs(ctx.x_t, ctx.t, {"y": torch.full_like(labels_of(ctx, "classifier-free guidance"),
                                                            self.null_label)})


def labels_of(ctx: StepContext, what: str) -> torch.Tensor:
    """The labels (N,) of the images of a step. Raises UserError, beginning with `what`, where there are none."""
    y = ctx.model_kwargs.get("y")
    if y is None:
        raise UserError(f"{what} needs labels: model_kwargs has no y")
    return y


def check_logits(ctx: StepContext, logits: torch.Tensor, what: str) -> None:
    """Raises UserError, beginning with `what`, for logits of a classifier that has not the labels of the images."""
    count = logits.shape[1] if logits.ndim == 2 and len(logits) == len(ctx.x_t) else 0
    low, high = ctx.denoise.label_range or (0, 0)
    if low < 0 or high >= count:
        raise UserError(f"{what}: the classifier gives logits {tuple(logits.shape)} for {len(ctx.x_t)} images with "
                        f"labels from {low} to {high}, it must give (N, classes), all labels among them")


@dataclass(frozen=True)
class CfgOptions(ScaledOptions):
    """Classifier-free guidance."""

    short = "CFG"
    term = ClassifierFreeGuidance
    switched_on: ClassVar = {"cfg_scale": 1.0}
    search: ClassVar = each("cfg_scale", 0.25, 0.5, 1.0, 2.0)
    sigma_flags = "cfg"
    needs_labels = True
    can_batch = True
    beside_the_step = True

    cfg_scale: float = option(0.0, "s of classifier-free guidance, which other programs write as 1 + s; 0: off")
    cfg_start: int | None = start_option()
    cfg_sigma_min: float | None = sigma_min_option()
    cfg_sigma_max: float | None = sigma_max_option()

    def build(self, nets: Networks) -> list[Guidance]:
        """The one term. Raises UserError for a network that was not trained for it."""
        if nets.model.null_label is None:
            advice = "" if nets.model.num_classes is None else "; without one there is --icg_scale"
            raise UserError(f"--cfg_scale {self.cfg_scale:g}: needs a network with labels and a null class, as "
                            f"--label_dropout trains it{advice}")
        return [ClassifierFreeGuidance(self.cfg_scale, nets.model.null_label, **self.window)]
