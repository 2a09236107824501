"""Autoguidance (Karras et al., 2406.02507, eq. 3).

    delta = s (eps(x_t) - eps_weak(x_t))

eps_weak: another, weaker network at the same image, step and label: fewer parameters, or an earlier snapshot, trained
on the same data. The paper's w is 1 + s.
Needs: that network. Cost: one evaluation of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Unpack

from ..build import DiffusionOptions, ModelOptions, UpsamplerOptions, build_model
from ..checkpoint import taken_entry
from ..errors import UserError
from ..late import Tensor, torch
from ..options import option, option_fields
from ..process import Prediction
from ..stated import CHOICES, network_statement
from ..terms import ContrastGuidance, Guidance, Passes, SigmaRange, StepContext
from .base import Networks, ScaledOptions, each, sigma_max_option, sigma_min_option, start_option, without_labels

if TYPE_CHECKING:
    from torch import nn


class AutoGuidance(ContrastGuidance):
    """Guidance away from what a weaker network predicts.

    weak: (x_t, original step, **conditions) -> output, as the network that is sampled. scale: s, 0 is off. The others:
    see `Guidance`.
    """

    passes = Passes(plain={"weak network": 1})

    def __init__(self, weak: Callable[..., Tensor], scale: float, start: int | None = None, stop: int | None = None,
                 **sigma: Unpack[SigmaRange]) -> None:
        super().__init__(scale, start, stop, **sigma)
        self.weak = weak

    def delta(self, ctx: StepContext, pred: Prediction) -> Tensor:
        """The contrast, (N, C, H, W)."""
        weaker = replace(ctx.denoise, model=self.weak)(ctx.x_t, ctx.t)
        return self.scale * ctx.denoise.diffusion.eps_between(pred, weaker, ctx.t)


KINDS: dict[str, type[ModelOptions] | type[UpsamplerOptions]] = {"diffusion": ModelOptions,
                                                                 "upsampler": UpsamplerOptions}


@dataclass(frozen=True)
class AutoguidanceOptions(ScaledOptions):
    """Autoguidance."""

    short = "autoguidance"
    term = AutoGuidance
    switched_on: ClassVar = {"autoguidance_scale": 1.0}
    search: ClassVar = each("autoguidance_scale", 0.25, 0.5, 1.0, 2.0)
    remedies: ClassVar = {"weak_model_path": "an earlier snapshot of the model, or a smaller one that was trained on "
                          "the same images"}
    sigma_flags = "autoguidance"

    autoguidance_scale: float = option(0.0, "scale s of autoguidance; 0: off")
    weak_model_path: str = option("", "checkpoint of the weaker network of autoguidance; unless it states its options, "
                                  "it is built as the model is")
    autoguidance_start: int | None = start_option()
    autoguidance_sigma_min: float | None = sigma_min_option()
    autoguidance_sigma_max: float | None = sigma_max_option()

    def files(self) -> dict[str, str]:
        """The weaker network."""
        return {"weak_model_path": self.weak_model_path} if self.active else {}

    def _stated(self) -> ModelOptions | UpsamplerOptions | None:
        """The options that the file of the weaker network states; None where it states none."""
        stated = network_statement(self.weak_model_path)
        return None if stated is None else stated.options(KINDS[stated.kind])

    def networks(self) -> dict[str, Callable[[], nn.Module]]:
        """The weaker network, where its file states how it is built."""
        options = self._stated()
        return {} if options is None else {"weak network": lambda: build_model(options)}

    def build(self, nets: Networks) -> list[Guidance]:
        """The one term, with its network loaded. Raises UserError for a network of other images or labels."""
        options = self._stated()
        if options is None:
            weak = copy.deepcopy(nets.model)
        else:
            with torch.device("cpu" if nets.random_weights and not self.weak_model_path else "meta"):
                weak = build_model(options)
        compared = {name: (getattr(weak, name), getattr(nets.model, name))
                    for name in ("image_size", "in_channels", "out_channels", "num_classes")}
        if options is not None and nets.flags:
            compared["small_size"] = getattr(options, "small_size", None), nets.flags.get("small_size")
        for name, (one, other) in compared.items():
            if one != other:
                raise UserError(f"--weak_model_path {self.weak_model_path}: has {name} {one}, and the network that is "
                                f"sampled {other}; both must see the same images and labels")
        if weak.null_label is None and nets.model.null_label is not None:
            raise UserError(f"--weak_model_path {self.weak_model_path}: has no null class (--label_dropout), and the "
                            "network that is sampled has one; both must know the same labels")
        nets.load(weak, self.weak_model_path, nets.flags if options is None else asdict(options))
        network = weak if weak.num_classes is not None else without_labels(weak)
        return [AutoGuidance(network, self.autoguidance_scale, **self.window)]

    def check(self, sha256: Mapping[str, str], entry: str = "") -> None:
        """Raises UserError where the weaker network is the one that is sampled."""
        path = self.weak_model_path
        same_file = self.active and sha256["weak_model_path"] == sha256.get("model_path")
        if same_file and taken_entry(path) == taken_entry(path, entry):
            raise UserError(f"--weak_model_path {path}: is the network that is sampled, which gives no contrast; "
                            f"name {self.remedies['weak_model_path']}")

    @classmethod
    def stated_values(cls, values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """Nothing; raises UserError where the weaker network was trained on another process than the model."""
        weak = network_statement(values.get("weak_model_path", ""))
        if weak is not None and values.get("autoguidance_scale"):
            defaults = {field.name: field.default for field in option_fields(DiffusionOptions)}
            for name in sorted((weak.facts.keys() & defaults.keys()).difference(CHOICES)):
                other = values.get(name, defaults[name])
                if weak.facts[name] != other:
                    raise UserError(f"--weak_model_path {weak.path}: states {name} {weak.facts[name]} of itself, and "
                                    f"the network that is sampled has {name} {other}")
        return {}
