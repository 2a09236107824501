"""A guidance method from outside the library, which only those know that have registered it."""

from dataclasses import dataclass
from typing import ClassVar

from guided_diffusion.guidance import GradientGuidance, ScaledOptions
from guided_diffusion.options import option


class TowardsGrey(GradientGuidance):
    def gradient(self, ctx, pred):
        return -self.scale * ctx.x_t


@dataclass(frozen=True)
class GreyOptions(ScaledOptions):
    short, sigma_flags, term = "grey", "grey", TowardsGrey
    switched_on: ClassVar = {"grey_scale": 0.1}
    grey_scale: float = option(0.0, "scale")

    def build(self, nets):
        return [TowardsGrey(self.grey_scale)]
