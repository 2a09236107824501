"""Independent condition guidance (Sadat et al., 2407.02687, section 3).

    delta = s (eps(x_t, y) - eps(x_t, y_random))

y_random: a label drawn uniformly from all classes, anew at each step and independent of the image, which stands for no
label: classifier-free guidance of a conditional network that was not trained for it.
Needs: a network with labels. Cost: one more network evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Unpack

from ..errors import UserError
from ..late import torch
from ..options import option
from ..process import Denoiser
from ..rng import image_generator
from ..terms import ContrastGuidance, Guidance, Inputs, SigmaRange, StepContext
from .base import Networks, ScaledOptions, each, sigma_max_option, sigma_min_option, start_option
from .classifier_free import labels_of


class IndependentConditionGuidance(ContrastGuidance):
    """Guidance away from what the network predicts for a class drawn at random.

    scale: s, 0 is off. num_classes: labels are drawn from 0 to num_classes - 1. seed: the label of an image at a step
    depends on seed, image and step alone. The others: see `Guidance`.
    """

    def __init__(self, scale: float, num_classes: int, seed: int = 0, start: int | None = None,
                 stop: int | None = None, **sigma: Unpack[SigmaRange]) -> None:
        super().__init__(scale, start, stop, **sigma)
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
            raise UserError(f"num_classes {num_classes!r}: must be a number of classes, at least 1")
        self.num_classes = num_classes
        self.seed = seed

    def check_network(self, denoise: Denoiser) -> None:
        """Raises UserError for a network that does not know so many labels."""
        count = denoise.label_count
        if count is not None and self.num_classes > count:
            raise UserError(f"num_classes {self.num_classes}: must be at most {count}, as many labels as the network "
                            "knows")

    def beforehand(self, ctx: StepContext) -> Inputs:
        """The same image with a random label. Raises UserError for a network without labels."""
        y = labels_of(ctx, "independent condition guidance")
        drawn = [int(image_generator(self.seed, image_id, step, "independent label").integers(self.num_classes))
                 for image_id, step in zip(ctx.image_ids.tolist(), ctx.t.tolist(), strict=True)]
        return Inputs(ctx.x_t, ctx.t, {"y": torch.tensor(drawn).to(y)})


@dataclass(frozen=True)
class IcgOptions(ScaledOptions):
    """Independent condition guidance."""

    short = "ICG"
    term = IndependentConditionGuidance
    switched_on: ClassVar = {"icg_scale": 1.0}
    search: ClassVar = each("icg_scale", 0.25, 0.5, 1.0, 2.0)
    sigma_flags = "icg"
    needs_labels = True
    can_batch = True
    beside_the_step = True
    for_pipelines = True

    icg_scale: float = option(0.0, "scale s of independent condition guidance; 0: off")
    icg_start: int | None = start_option()
    icg_sigma_min: float | None = sigma_min_option()
    icg_sigma_max: float | None = sigma_max_option()

    def build(self, nets: Networks) -> list[Guidance]:
        """The one term. Raises UserError for a network without labels."""
        if nets.model.num_classes is None:
            raise UserError(f"--icg_scale {self.icg_scale:g}: needs a network with labels")
        return [IndependentConditionGuidance(self.icg_scale, nets.model.num_classes, nets.seed, **self.window)]
