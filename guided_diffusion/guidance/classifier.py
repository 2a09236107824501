"""Classifier guidance (Dhariwal & Nichol, 2105.05233, algorithms 1 and 2).

    g = scale * grad_x log p(y | x_t)

Needs: a classifier of noisy images, labels y. Cost: one forward and backward pass of the classifier, no evaluation of
the diffusion network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Unpack

from ..build import ClassifierOptions, build_classifier
from ..late import Tensor, nn, torch
from ..options import option
from ..presets import Preset, find_preset, is_bundled
from ..process import Prediction
from ..stated import statement_of
from ..terms import GradientGuidance, Guidance, Passes, SigmaRange, StepContext
from .base import GuidanceOptions, Networks, each, sigma_max_option, sigma_min_option, start_option
from .classifier_free import check_logits, labels_of

if TYPE_CHECKING:
    from ..unet import EncoderUNetModel


class ClassifierGuidance(GradientGuidance):
    """Guidance by the gradient of a classifier's log-probability of the label.

    classifier: (x_t, original step) -> logits (N, classes). scale and the others: see `Guidance`.
    """

    passes = Passes(others={"classifier": 1})

    def __init__(self, classifier: nn.Module, scale: float, start: int | None = None, stop: int | None = None,
                 **sigma: Unpack[SigmaRange]) -> None:
        super().__init__(scale, start, stop, **sigma)
        self.classifier = classifier

    def gradient(self, ctx: StepContext, pred: Prediction) -> Tensor:
        """The gradient `scale * grad_x log p(y | x_t)`, (N, C, H, W).

        Raises UserError without labels, and for those that the classifier has not.
        """
        y = labels_of(ctx, "classifier guidance")
        with torch.enable_grad():
            x = ctx.x_t.detach().requires_grad_()
            logits = self.classifier(x, ctx.model_t)
            check_logits(ctx, logits, "classifier guidance")
            log_probabilities = logits.log_softmax(dim=-1)
            chosen = log_probabilities.gather(1, y[:, None]).sum()
            return self.scale * torch.autograd.grad(chosen, x)[0]


@dataclass(frozen=True)
class ClassifierGuidanceOptions(ClassifierOptions, GuidanceOptions):
    """Classifier guidance, and the noise-aware classifier."""

    short = "CG"
    switched_on: ClassVar = {"classifier_guidance": True}
    search: ClassVar = each("classifier_scale", 0.5, 1.0, 2.0, 4.0, classifier_guidance=True)
    search_scale = ("classifier_scale", 0.0)
    kind = GradientGuidance
    needs_labels = True
    sigma_flags = "classifier"

    classifier_guidance: bool = option(False, "guide by a classifier")
    classifier_path: str = option("", "checkpoint of the noise-aware classifier; bundled models have theirs")
    classifier_scale: float = option(1.0, "scale of classifier guidance; 0: off")
    classifier_start: int | None = start_option(later=True)
    classifier_sigma_min: float | None = sigma_min_option()
    classifier_sigma_max: float | None = sigma_max_option()

    @property
    def active(self) -> bool:
        """Whether it is switched on, with a scale that is not 0."""
        return self.classifier_guidance and self.classifier_scale != 0

    def headline(self) -> str:
        """Like "CG scale 0.5"."""
        return f"CG scale {self.classifier_scale:g}"

    def files(self) -> dict[str, str]:
        """The classifier."""
        return {"classifier_path": self.classifier_path} if self.active else {}

    def need(self, flag: str) -> str:
        """Why the classifier is needed."""
        return "classifier guidance needs a classifier"

    def networks(self) -> dict[str, Callable[[], nn.Module]]:
        """The classifier."""
        return {"classifier": lambda: build_classifier(self)}

    def load_classifier(self, nets: Networks) -> EncoderUNetModel | None:
        """The classifier in its file, or one of random weights where `nets` allows it; None where there is neither."""
        if not (self.classifier_path or nets.random_weights):
            return None
        with torch.device("cpu" if nets.random_weights else "meta"):
            classifier = build_classifier(self)
        return nets.load(classifier, self.classifier_path, asdict(self))

    def build(self, nets: Networks) -> list[Guidance]:
        """The one term, with its classifier loaded."""
        classifier = self.load_classifier(nets)
        if classifier is None:
            return []
        return [ClassifierGuidance(classifier, self.classifier_scale, **self.window)]

    def schedule(self) -> list[tuple[Guidance, Passes]]:
        """An evaluation and a gradient of the classifier at every step of the window."""
        return [(Guidance(self.classifier_scale if self.active else 0.0, **self.window), ClassifierGuidance.passes)]

    @classmethod
    def preset_values(cls, preset: Preset) -> dict[str, Any]:
        """The flags and the file of the classifier that guides the model."""
        if not preset.classifier:
            return {}
        classifier = find_preset(preset.classifier)
        shared = () if preset.options.get("class_cond") else ("num_classes",)
        values = {name: value for name, value in classifier.options.items()
                  if name.startswith("classifier_") or name in shared}
        return values if classifier.path is None else {**values, "classifier_path": str(classifier.path)}

    @classmethod
    def stated_values(cls, values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """What the classifier's file states, and the classes of a network that has none."""
        classifier = statement_of(values.get("classifier_path", ""), "classifier")
        if classifier is None:
            return {}
        named = bool(given.get("classifier_path"))
        classifier.check(given if named else {flag: value for flag, value in given.items() if "classifier_" in flag})
        if named or given.get("classifier_guidance"):
            classifier.check_beside(values)
        if named and not is_bundled(classifier.path):
            classifier.say(given)
        shared = () if values.get("class_cond") else ("num_classes",)
        return {name: value for name, value in classifier.facts.items()
                if name.startswith("classifier_") or name in shared}
