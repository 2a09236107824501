"""A small convolutional classifier of clean Fashion-MNIST images, bundled with its weights.

It measures class accuracy, and its features serve FID, sFID and the Inception Score where Inception would be out of
place. It never guides sampling. `evaluations.extractors.train_fashion_mnist` trains it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from guided_diffusion.checkpoint import ready
from guided_diffusion.pixels import from_uint8

from ..features import FeatureExtractor, Features
from .base import bundled_file, chosen_device
from .bundled import BundledExtractor, Images, channels_first, conv_block, load_bundled, save_bundled

SPATIAL_SHAPE = (8, 8, 8)
CLASS_NAMES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
WEIGHTS = bundled_file("fashion_mnist")


class FashionMnistClassifier(BundledExtractor):
    """Five 3x3 convolutions with batch norm and ReLU (32 -> 16 -> 8 pixels), global average pooling, one linear layer.

    widths: output channels of the five convolutions; the second and the fourth halve the resolution.
    test_accuracy: share of the 10,000 test images that it classifies correctly (NaN before training).

    Its features (`evaluations.features.Features`): pooled (N, 64), the averages over the last map; spatial
    (N, 8, 8, 8), the first 8 channels of the last map at 16 x 16, averaged over squares of 2 x 2; probabilities
    (N, 10).
    """

    name = "embedded Fashion-MNIST classifier"          # stands in stored statistics and results
    class_names = CLASS_NAMES

    def __init__(self, widths: Sequence[int] = (24, 48, 48, 96, 64), test_accuracy: float = float("nan")) -> None:
        super().__init__()
        first, second, third, fourth, last = self.widths = tuple(widths)
        self.test_accuracy = test_accuracy
        self.at_16 = nn.Sequential(conv_block(1, first), conv_block(first, second, stride=2), conv_block(second, third))
        self.at_8 = nn.Sequential(conv_block(third, fourth, stride=2), conv_block(fourth, last))
        self.classify = nn.Linear(last, len(CLASS_NAMES))

    def forward(self, grey: Tensor) -> Tensor:
        """Logits (N, 10) of images (N, 1, 32, 32) in [-1, 1]."""
        return self.forward_features(grey)[2]

    def inputs(self, images: Images) -> Tensor:
        """Grey images, as `to_grey` makes them."""
        return to_grey(images)

    def forward_features(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pooled features (N, 64), spatial features (N, 8, 8, 8) and logits (N, 10)."""
        at_16 = self.at_16(inputs.contiguous(memory_format=torch.channels_last))
        pooled = self.at_8(at_16).mean(dim=(2, 3))
        spatial = nn.functional.avg_pool2d(at_16[:, :SPATIAL_SHAPE[0]], 2)
        return pooled, spatial, self.classify(pooled)


def to_grey(images: Images) -> Tensor:
    """Grey images (N, 1, 32, 32), float32 in [-1, 1]; grey is the mean over the channels.

    images: uint8 (N, 32, 32, 3 or 1), or floating point (N, 3 or 1, 32, 32) in [-1, 1]: a 28 x 28 picture in the
    middle of a black frame. Raises UserError for any other shape or type, or for no image at all.
    """
    images = channels_first(images, (3, 1))
    grey = images.float().mean(dim=1, keepdim=True)
    return from_uint8(grey) if images.dtype == torch.uint8 else grey


def load_fashion_mnist(path: str | Path | None = None) -> FashionMnistClassifier:
    """Loads the bundled classifier, or the one in a file that `save_fashion_mnist` wrote, in evaluation mode.

    Raises UserError where the file is missing, damaged, or of another kind.
    """
    def build(metadata: Mapping[str, str]) -> FashionMnistClassifier:
        return FashionMnistClassifier(json.loads(metadata["widths"]), float(metadata["test_accuracy"]))

    return load_bundled(path or WEIGHTS, "a Fashion-MNIST classifier", build)


def save_fashion_mnist(model: FashionMnistClassifier, path: str | Path, notes: dict[str, str]) -> None:
    """Writes the classifier with its architecture and test accuracy: convolutions in float16, the rest in float32.

    notes: further metadata, such as the training command.
    """
    save_bundled(model, path, {**notes, "widths": json.dumps(model.widths),
                               "test_accuracy": f"{model.test_accuracy:.4f}"})


def load(*, inception: str = "", device: str = "", dtype: str = "float32") -> FeatureExtractor:
    """The bundled extractor, for evaluation; see `evaluations.extractors.base.Loader`."""
    return ready(load_fashion_mnist(), chosen_device(device))


def class_names() -> Sequence[str]:
    """The classes in the order of their numbers."""
    return CLASS_NAMES


def classify(features: Features) -> np.ndarray:
    """The most probable class of each image, (N,) int64."""
    named: np.ndarray = features.probabilities.argmax(axis=1)
    return named
