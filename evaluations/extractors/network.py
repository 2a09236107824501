"""A network of the user's as an extractor: what `preparation` says goes in, and what it says comes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from guided_diffusion.errors import UserError
from guided_diffusion.foreign import reading
from guided_diffusion.network_inputs import Outputs, Preparation, chosen_output

from ..features import Features
from ..metrics.comparison import Feature
from .base import IMAGE_SIZE, averaged
from .tried import TriedExtractor

Network = Callable[[Tensor], Outputs]       # images as it reads them to outputs by name or number


class NetworkExtractor(TriedExtractor):
    """A network of a user's file as an extractor.

    path: the file. fingerprint: its SHA-256. network: runs it on images (N, 3, height, width) float32. runtime: what
    runs it, with its version. Raises UserError where one grey image, or noise, shows that it cannot be used.
    """

    caveat = ""

    def __init__(self, path: Path, fingerprint: str, network: Network, preparation: Preparation,
                 device: torch.device, runtime: str) -> None:
        self.name, self.file, self.fingerprint = path.name, str(path), fingerprint
        self.preparation = preparation
        self.settings = {"runtime": runtime, **self.preparation.described()}
        self._network, self._device = network, device
        super().__init__()
        if preparation.size is not None:
            self.outputs(np.full((1, *preparation.size, 3), 128, np.uint8))

    def outputs(self, images: np.ndarray) -> dict[str, Tensor]:
        """Returns the outputs that the YAML file names, each (N, ...) float32 on the CPU, by what they are.

        images: (N, H, W, 3) uint8. Raises UserError where the network fails, or lacks one of them, and at the first
        images where it is unsteady.
        """
        found = self._outputs(images)
        self.try_once(lambda noise: list(self._outputs(noise).values()), images, f"--backend {self.file}")
        return found

    def _outputs(self, images: np.ndarray) -> dict[str, Tensor]:
        inputs = self.preparation.inputs(images, self._device)
        shape = "x".join(map(str, inputs.shape))
        with reading(self.file, f"the network fails on an input of {shape}", flag="--backend"), torch.no_grad():
            found = self._network(inputs)
        chosen = {name: chosen_output(found, place, f"--backend {self.file}: {name}")
                  for name, place in self.preparation.outputs}
        for name, values in chosen.items():
            if values.ndim < (3 if name == "depth" else 2) or len(values) != len(images) or not values[0].numel():
                raise UserError(f"--backend {self.file}: {name} is {tuple(values.shape)} for {len(images)} images, it "
                                f"must be {'(N, H, W)' if name == 'depth' else '(N, ...)'}")
        return {name: values.detach().float().cpu() for name, values in chosen.items()}

    def features(self, images: np.ndarray) -> Features:
        """Returns features of images (N, H, W, 3) uint8, those that the network does not give of width 0."""
        return _as_features(self.outputs(images))


class DepthNetworkExtractor(NetworkExtractor):
    """A network that also estimates depth; nothing is known of its accuracy, and it reads images of any size."""

    accuracy: Mapping[str, float] = {}
    any_size = True

    def features_and_depth(self, images: np.ndarray) -> tuple[Features, np.ndarray]:
        """Returns the features, and depth maps (N, 32, 32) from -1 (near) to 1 (far), averaged over squares."""
        outputs = self.outputs(images)
        return _as_features(outputs), self.preparation.depth(outputs["depth"], IMAGE_SIZE)


def _as_features(outputs: Mapping[str, Tensor]) -> Features:
    pooled = averaged(outputs["pooled"])
    none = pooled.new_empty(len(pooled), 0)
    probabilities = outputs["logits"].softmax(dim=1) if "logits" in outputs else outputs.get("probabilities", none)
    parts = (pooled, outputs.get("spatial", none), probabilities)
    return Features(*(part.flatten(1).contiguous().numpy() for part in parts))


def as_extractor(path: Path, fingerprint: str, network: Network, preparation: Preparation, device: torch.device,
                 runtime: str) -> NetworkExtractor:
    """Returns the extractor of a network, one that estimates depth where an output is depth."""
    kind = DepthNetworkExtractor if Feature.DEPTH in dict(preparation.outputs) else NetworkExtractor
    return kind(path, fingerprint, network, preparation, device, runtime)
