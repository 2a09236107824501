"""Classifiers of clean images that were not trained here: TorchScript files, and modules that a function returns."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..checkpoint import ready
from ..errors import UserError
from ..foreign import reading
from ..functions import find_function, is_function
from ..launchers import is_main
from ..network_inputs import Preparation, chosen_output, read_preparation, settings_beside
from ..steadiness import PROBES, check_steady, noise_images
from ..torchscript import load_torchscript

if TYPE_CHECKING:
    from .base import Networks

OUTPUT = "logits"               # of those that a YAML file may name

_log = logging.getLogger(__name__)


class ForeignClassifier(nn.Module):
    """A network as a classifier of clean images, in float32, frozen, on a device.

    network: gives logits of its input, alone or among other outputs. preparation: how images become its input, and
    which output is the logits; None: they are given as they are, and it gives the logits alone. where: how sentences
    about it begin.
    """

    def __init__(self, network: nn.Module, preparation: Preparation | None, where: str, device: torch.device) -> None:
        super().__init__()
        self.network, self.preparation, self.where, self.device = network, preparation, where, device
        ready(self.float(), device)
        self.output = 0 if preparation is None else dict(preparation.outputs)[OUTPUT]

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """Logits (N, classes) of images (N, C, H, W) in [-1, 1], differentiable; t is what classifiers of noise take.

        Raises UserError where there is no such output.
        """
        # TorchScript would compile itself at its second call, and an image would depend on how many were made before.
        with torch.jit.optimized_execution(False):
            found = self.network(self.inputs(x))
        return chosen_output(found, self.output, f"{self.where}: {OUTPUT}")

    def inputs(self, x: Tensor) -> Tensor:
        """What the network is given of images, float32."""
        return (x if self.preparation is None else self.preparation.inputs_of_samples(x)).float()


def load_classifier(path: str, flag: str, device: torch.device) -> ForeignClassifier:
    """The classifier in a TorchScript file, or that of a MODULE:FUNCTION.

    flag: the option that named it, with its dashes. Raises UserError where it cannot be loaded.
    """
    where = f"{flag} {path}"
    if is_function(path):
        function, _ = find_function(path, flag)
        with reading(path, "the function fails", flag=flag), torch.device(device):
            network = function()
        if not isinstance(network, nn.Module):
            raise UserError(f"{where}: returns a {type(network).__name__}, it must return a torch.nn.Module")
        return ForeignClassifier(network, None, where, device)
    preparation = read_preparation(settings_beside(Path(path), flag), OUTPUT, flag)
    script = load_torchscript(Path(path), device, flag)
    with reading(path, "is no TorchScript file that can be used", flag=flag):
        if _has_relus(script):
            _say_relus(where, "export it with")
    return ForeignClassifier(script, preparation, where, device)


def _has_relus(script: torch.jit.ScriptModule) -> bool:
    """Whether a network in TorchScript has ReLUs; a ReLU6 is there under the name of what it is made of."""
    return ("aten::relu" in str(script.inlined_graph)
            or any(getattr(module, "original_name", "") == "ReLU6" for module in script.modules()))


class _Relus(TorchFunctionMode):
    """Notes whether ReLUs are called within, but those in TorchScript."""

    found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the function."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        self.found |= name in ("relu", "relu_", "relu6") or (name == "hardtanh" and kwargs.get("min_val") == 0)
        return func(*args, **kwargs)


@functools.cache
def _say_relus(where: str, remedy: str) -> None:
    """Logs, once, that a classifier is not as in the paper; remedy: the beginning of what changes that."""
    if is_main():
        _log.info("%s: has ReLUs, which stay as they are; %s nn.Softplus(beta=3) in their place, as the paper has it",
                  where, remedy)


def check_classifier(classifier: ForeignClassifier, nets: Networks) -> None:
    """Tries a classifier on images of noise, with its gradient, and logs where it calls ReLUs that are no nn.ReLU.

    Those are called as softplus around this. Raises UserError where it cannot guide.
    """
    where, channels, size = classifier.where, nets.model.image_channels, nets.model.image_size
    if classifier.preparation is not None and channels not in (1, 3):
        raise UserError(f"{where}: sees images of 3 channels (of 1 as grey), and the network that is sampled makes "
                        f"{channels}")
    x = (2 * noise_images(channels, size, size) - 1).to(classifier.device).requires_grad_()
    shape = "x".join(map(str, classifier.inputs(x).shape))
    with torch.enable_grad():
        with reading(where, f"the network fails on an input of {shape}"):
            logits = classifier(x)
        _check_logits(logits, where)
        nets.check_classes(where, logits.shape[1])
        gradient = _gradient(logits, x, where)
    if not (logits.isfinite().all() and gradient.isfinite().all()):
        raise UserError(f"{where}: gives logits or a gradient that are not finite, of images of noise")
    if not gradient.any():
        raise UserError(f"{where}: has a gradient of 0 everywhere, of images of noise; guidance needs logits that "
                        "follow the image smoothly, not classes or rounded numbers")
    with (reading(where, f"the network fails on an input of 1{shape.removeprefix(str(PROBES))}"), torch.no_grad(),
          _Relus() as relus):
        check_steady(lambda images: [classifier(images)], x, where, OUTPUT, [logits])
    if relus.found:
        _say_relus(where, "use nn.ReLU, which becomes softplus, or")


def _check_logits(logits: Tensor, where: str) -> None:
    if logits.ndim != 2 or len(logits) != PROBES or not logits.is_floating_point():
        raise UserError(f"{where}: gives {tuple(logits.shape)} {str(logits.dtype).removeprefix('torch.')} for {PROBES} "
                        "images, it must give floating-point logits (N, classes)")


def _gradient(logits: Tensor, x: Tensor, where: str) -> Tensor:
    """The gradient of the first class's log-odds, (N, C, H, W). Raises UserError where there is none."""
    found = None
    if logits.requires_grad:
        with reading(where, "its gradient fails"):
            odds = logits[:, 0] - (logits / 2).logsumexp(dim=1)
            found, = torch.autograd.grad(odds.sum(), x, allow_unused=True)
    if found is None:
        raise UserError(f"{where}: is not differentiable, no gradient of its logits reaches the image; does it detach, "
                        "or run under torch.no_grad()?")
    return found
