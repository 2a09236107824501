"""Clean-classifier guidance (Ma et al., 2310.11311: EluCD).

    g = scale * grad_{x0} log( exp(tau_1 f_y(x0)) / sum_k exp(tau_2 f_k(x0)) ) at the predicted x0

f: logits of a classifier of clean images. The predicted image is detached: no backward pass goes through the diffusion
network. tau_2 is half of tau_1 by default, ReLUs of the classifier are replaced by softplus (beta 3), and the gradient
enters as one at x_t does. `gamma` multiplies it by 1 + gamma sin(pi t), t the step as a fraction of the chain, as the
reference code does with 0.3.
The classifier may be one of this project, or any network in a TorchScript file or of a function.
Needs: a classifier of clean images, labels y. Cost: one forward and backward pass of the classifier.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Unpack

from ..build import ClassifierOptions, build_classifier
from ..checkpoint import check_there, on_disk, read_metadata
from ..errors import UserError
from ..fetch import is_address
from ..functions import find_function, is_function
from ..late import F, Tensor, nn, torch
from ..network_inputs import settings_beside
from ..options import option
from ..process import Prediction
from ..stated import statement_of
from ..terms import GradientGuidance, Guidance, Passes, SigmaRange, StepContext, check_number
from ..torchscript import SUFFIXES as TORCHSCRIPT
from .base import Networks, ScaledOptions, each, sigma_max_option, sigma_min_option, start_option
from .classifier_free import check_logits, labels_of

if TYPE_CHECKING:
    from ..unet import EncoderUNetModel
    from .foreign_classifier import ForeignClassifier

SOFTPLUS_BETA = 3.0
FLAG = "--clean_classifier_path"
ONNX = ".onnx"


class CleanClassifierGuidance(GradientGuidance):
    """Guidance by the gradient of a clean classifier's log-odds of the label, at the predicted x0.

    classifier: images (N, C, H, W) -> logits (N, classes). scale: 0 is off. temperature, margin_temperature: tau_1 and
    tau_2, None for half of tau_1. softplus_beta: of the softplus in place of ReLUs that are nn.ReLU; None keeps them.
    gamma: of the weight 1 + gamma sin(pi t). image_size, mean, std: the images as the classifier was trained on them,
    resized (bilinear, antialiased; None: as they are), then (x - mean) / std of images in [0, 1] by channel; without
    mean and std it sees [-1, 1]. The others: see `Guidance`.
    """

    passes = Passes(others={"clean classifier": 1})

    def __init__(self, classifier: Callable[..., Tensor], scale: float, temperature: float = 1.0,
                 margin_temperature: float | None = None, *, softplus_beta: float | None = SOFTPLUS_BETA,
                 gamma: float = 0.0, image_size: int | None = None, mean: Sequence[float] | None = None,
                 std: Sequence[float] | None = None, start: int | None = None, stop: int | None = None,
                 **sigma: Unpack[SigmaRange]) -> None:
        super().__init__(scale, start, stop, **sigma)
        margin_temperature = temperature / 2 if margin_temperature is None else margin_temperature
        for name, value in (("temperature", temperature), ("margin_temperature", margin_temperature),
                            ("gamma", gamma)):
            check_number(f"CleanClassifierGuidance {name}", value)
        if softplus_beta is not None and not softplus_beta > 0:
            raise UserError(f"CleanClassifierGuidance softplus_beta {softplus_beta!r}: must be greater than 0, or None")
        if (mean is None) != (std is None):
            raise UserError("CleanClassifierGuidance mean, std: both are needed, or none")
        self.classifier = classifier
        self.temperature = temperature
        self.margin_temperature = margin_temperature
        self.softplus_beta = softplus_beta
        self.gamma = gamma
        self.image_size = image_size
        self.mean, self.std = mean, std

    def gradient(self, ctx: StepContext, pred: Prediction) -> Tensor:
        """The gradient, scale and weight included, (N, C, H, W).

        Raises UserError without labels, and for those that the classifier has not.
        """
        y = labels_of(ctx, "clean-classifier guidance")
        with torch.enable_grad(), _smooth(self.classifier, self.softplus_beta):
            x0 = pred.pred_xstart.detach().requires_grad_()
            logits = self.classifier(self.as_trained(x0)).float()
            check_logits(ctx, logits, "clean-classifier guidance")
            chosen = self.temperature * logits.gather(1, y[:, None]).squeeze(1)
            odds = chosen - (self.margin_temperature * logits).logsumexp(dim=1)
            gradient, = torch.autograd.grad(odds.sum(), x0)
        weight = 1 + self.gamma * torch.sin(math.pi * ctx.fraction).to(gradient)
        return self.scale * weight.reshape(-1, 1, 1, 1) * gradient

    def as_trained(self, x: Tensor) -> Tensor:
        """Images in [-1, 1] as the classifier was trained on them; differentiable."""
        if self.image_size is not None and x.shape[2:] != (self.image_size, self.image_size):
            x = F.interpolate(x, (self.image_size, self.image_size), mode="bilinear", antialias=True)
        if self.mean is None or self.std is None:
            return x
        mean, std = (x.new_tensor(values).reshape(1, -1, 1, 1) for values in (self.mean, self.std))
        return ((x + 1) / 2 - mean) / std


@contextmanager
def _smooth(classifier: object, beta: float | None) -> Iterator[None]:
    """Lets the classifier's ReLUs be softplus, for the length of the block."""
    if beta is None or not isinstance(classifier, nn.Module):
        yield
        return
    relus = [module for module in classifier.modules() if isinstance(module, nn.ReLU)]
    try:
        for relu in relus:          # a hook behind it would come too late, where it overwrites its input
            relu.forward = partial(F.softplus, beta=beta)       # type: ignore[method-assign]
        yield
    finally:
        for relu in relus:
            vars(relu).pop("forward", None)


@dataclass(frozen=True)
class CleanClassifierOptions(ScaledOptions):
    """Clean-classifier guidance."""

    short = "clean CG"
    symbols: ClassVar = {"clean_classifier_temperature": ("tau_1", 0.0),
                         "clean_classifier_margin_temperature": ("tau_2", 0.0),
                         "clean_classifier_gamma": ("gamma", 0.0)}
    term = CleanClassifierGuidance
    switched_on: ClassVar = {"clean_classifier_scale": 1.0}
    search: ClassVar = each("clean_classifier_scale", 0.5, 1.0, 2.0, 4.0)
    remedies: ClassVar = {"clean_classifier_path": "scripts/classifier_train.py --noised False trains one"}
    needs_labels = True
    sigma_flags = "clean_classifier"

    clean_classifier_scale: float = option(0.0, "scale of guidance by a classifier of clean images; 0: off")
    clean_classifier_path: str = option("", "that classifier: a checkpoint that states its options, as "
                                        "scripts/classifier_train.py writes it; a TorchScript file (.pt) with "
                                        "FILE.yaml beside it, as --backend of the evaluator takes it; or "
                                        "MODULE:FUNCTION, which returns a module")
    clean_classifier_temperature: float = option(1.0, "tau_1, factor of the label's logit")
    clean_classifier_margin_temperature: float | None = option(None, "tau_2, factor of all logits; unset: half of "
                                                               "tau_1", later=True)
    clean_classifier_gamma: float = option(0.0, "the gradient is multiplied by 1 + gamma sin(pi t); the reference "
                                           "code has 0.3")
    clean_classifier_start: int | None = start_option()
    clean_classifier_sigma_min: float | None = sigma_min_option()
    clean_classifier_sigma_max: float | None = sigma_max_option()

    def headline(self) -> str:
        """Like "clean CG scale 2"."""
        return f"clean CG scale {self.clean_classifier_scale:g}"

    def details(self) -> dict[str, str]:
        """Temperatures and gamma."""
        margin = self.clean_classifier_margin_temperature
        return {"temperature": f"tau_1 = {self.clean_classifier_temperature:g}",
                "margin": "tau_2 = tau_1 / 2" if margin is None else f"tau_2 = {margin:g}",
                "gamma": f"gamma = {self.clean_classifier_gamma:g}"}

    def files(self) -> dict[str, str]:
        """The classifier."""
        return {"clean_classifier_path": self.clean_classifier_path} if self.active else {}

    def beside(self) -> dict[str, str]:
        """The YAML file of a classifier in TorchScript."""
        path = Path(self.clean_classifier_path)
        return {"clean_classifier_settings": str(path.with_suffix(".yaml"))} if self.active and _is_script(path) else {}

    def check_files(self) -> None:
        """Raises UserError also for a classifier of another kind that cannot be one, or lacks its YAML file."""
        super().check_files()
        if self.active and self._is_foreign:
            self._check_foreign()

    @property
    def _is_foreign(self) -> bool:
        """Whether the classifier is none of this project's."""
        path = self.clean_classifier_path
        return is_function(path) or _is_script(Path(path)) or Path(path).suffix.lower() == ONNX

    def _check_foreign(self) -> None:
        path = self.clean_classifier_path
        if Path(path).suffix.lower() == ONNX:
            raise UserError(f"{FLAG} {path}: ONNX files are run without a gradient, which guidance needs; export the "
                            "network with torch.jit.trace, as a TorchScript file (.pt)")
        if is_address(path):
            raise UserError(f"{FLAG} {path}: must be a file on this machine, as its YAML file lies beside it")
        if is_function(path):
            _, file = find_function(path, FLAG)
            if file is None:
                raise UserError(f"{FLAG} {path}: must be a function of a module with a file, by which a run knows it")
        elif Path(path).is_file():          # else whoever reads it says so
            settings_beside(Path(path), FLAG)

    def useless(self) -> dict[str, str]:
        """Everything, where no logit counts."""
        if self.clean_classifier_temperature or self.clean_classifier_margin_temperature:
            return {}
        return self.all_useless("with both temperatures 0 there is no gradient")

    def _classifier_options(self) -> ClassifierOptions:
        """What the classifier's file states. Raises UserError where it states nothing."""
        stated = statement_of(self.clean_classifier_path, "classifier")
        if stated is None:
            read_metadata(self.clean_classifier_path)           # which says it where there is no such file
            raise UserError(f"{FLAG} {self.clean_classifier_path}: must be a classifier that states its options, as "
                            "scripts/classifier_train.py --noised False writes it, a TorchScript file "
                            f"({', '.join(TORCHSCRIPT)}) or MODULE:FUNCTION")
        return stated.options(ClassifierOptions)

    @classmethod
    def stated_values(cls, values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """The classes of a network that has none: those of a classifier that states them."""
        if values.get("class_cond") or not values.get("clean_classifier_scale"):
            return {}
        stated = statement_of(values.get("clean_classifier_path", ""), "classifier")
        if stated is None:
            return {}
        stated.check({name: value for name, value in given.items() if name == "num_classes"})
        return {name: value for name, value in stated.facts.items() if name == "num_classes"}

    def networks(self) -> dict[str, Callable[[], nn.Module]]:
        """The classifier, where there is a file."""
        if not self.clean_classifier_path:
            return {}
        if self._is_foreign:
            needed = [on_disk(self.clean_classifier_path), *self.beside().values()]
            there = all(Path(path).is_file() for path in needed)
            return {"clean classifier": lambda: self._foreign(torch.device("cpu"))} if there else {}
        return {"clean classifier": lambda: build_classifier(self._classifier_options())}

    def build(self, nets: Networks) -> list[Guidance]:
        """The one term, with its classifier. Raises UserError where that has other classes or channels."""
        if nets.random_weights and not self.clean_classifier_path:
            return []
        classifier, image_size = self._foreign_that_fits(nets) if self._is_foreign else self._own(nets)
        return [CleanClassifierGuidance(
            classifier, self.clean_classifier_scale, self.clean_classifier_temperature,
            self.clean_classifier_margin_temperature, gamma=self.clean_classifier_gamma, image_size=image_size,
            **self.window)]

    def _foreign(self, device: torch.device) -> ForeignClassifier:
        from .foreign_classifier import load_classifier

        self._check_foreign()
        check_there("clean_classifier_path", self.clean_classifier_path)
        return load_classifier(self.clean_classifier_path, FLAG, device)

    def _foreign_that_fits(self, nets: Networks) -> tuple[nn.Module, None]:
        """A classifier of another kind, which sees images of the size that is sampled."""
        from .foreign_classifier import check_classifier

        classifier = self._foreign(nets.device)
        with _smooth(classifier, SOFTPLUS_BETA):            # as it guides
            check_classifier(classifier, nets)
        return classifier, None

    def _own(self, nets: Networks) -> tuple[nn.Module, int]:
        """A classifier of this project, and the size of images that it sees."""
        options = self._classifier_options()
        channels = nets.model.image_channels
        if channels != options.in_channels:
            raise UserError(f"{FLAG} {self.clean_classifier_path}: sees images of "
                            f"{options.in_channels} channels, and the network that is sampled makes {channels}")
        nets.check_classes(f"{FLAG} {self.clean_classifier_path}", options.num_classes)
        with torch.device("meta"):
            classifier = build_classifier(options)
        nets.load(classifier, self.clean_classifier_path, asdict(options))
        return at_step_0(classifier), options.image_size


def _is_script(path: Path) -> bool:
    return path.suffix.lower() in TORCHSCRIPT


def at_step_0(classifier: EncoderUNetModel) -> EncoderUNetModel:
    """A classifier of noisy images that is told, from now on, that those it is given have no noise; the same object."""
    classifier.register_forward_pre_hook(
        lambda module, inputs: (*inputs, torch.zeros(len(inputs[0]), dtype=torch.long, device=inputs[0].device)))
    return classifier
