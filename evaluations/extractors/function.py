"""Extractors that a function of the user's own makes: `--backend MODULE:FUNCTION`."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from guided_diffusion.errors import UserError
from guided_diffusion.fetch import sha256_of
from guided_diffusion.foreign import reading
from guided_diffusion.functions import find_function

from ..features import FeatureExtractor, Features
from ..metrics.comparison import Feature
from .base import IMAGE_SIZE, ExtractorKind
from .depth import DepthEstimator

SHA256 = re.compile(r"[0-9a-f]{64}")
PARTS = tuple(map(Feature, Features._fields))


class OwnExtractor:
    """What a function of the user's returned, with features that it may leave out, and the code in its settings."""

    def __init__(self, word: str, made: FeatureExtractor, code: str) -> None:
        self.word, self._made = word, made
        self.name, self.fingerprint, self.caveat = made.name, made.fingerprint, getattr(made, "caveat", "")
        self.settings = {"function": word, "code": code, **dict(getattr(made, "settings", {}))}

    def features(self, images: np.ndarray) -> Features:
        """Returns the features of images (N, H, W, 3) uint8; an array alone is the pooled ones.

        Raises UserError where they are not features of so many images.
        """
        return self._checked(self._made.features(images), images)

    def _checked(self, found: Features | np.ndarray, images: np.ndarray) -> Features:
        given = (found,) if isinstance(found, np.ndarray) else tuple(found)
        none = np.empty((len(images), 0), np.float32)
        parts = [none if part is None else np.asarray(part) for part in (*given, None, None)[:len(PARTS)]]
        if any(part.ndim < 2 or len(part) != len(images) or part.dtype.kind != "f" for part in parts):
            shapes = ", ".join(f"{part.shape} {part.dtype}" for part in parts)
            raise UserError(f"--backend {self.word}: gives {shapes} for {len(images)} images, it must give floating-"
                            "point arrays (N, D)")
        return Features(*(part.astype(np.float32, copy=False) for part in parts))


class OwnDepthExtractor(OwnExtractor):
    """The same of an extractor that also estimates depth, of images of any size."""

    any_size = True

    def __init__(self, word: str, made: DepthEstimator, code: str) -> None:
        super().__init__(word, made, code)
        self._estimator, self.accuracy = made, dict(getattr(made, "accuracy", {}))

    def features_and_depth(self, images: np.ndarray) -> tuple[Features, np.ndarray]:
        """Returns the features, and depth maps (N, 32, 32) from -1 (near) to 1 (far).

        Raises UserError where they are not maps of so many images.
        """
        features, depth = self._estimator.features_and_depth(images)
        if np.shape(depth) != (len(images), IMAGE_SIZE, IMAGE_SIZE) or not np.all(np.abs(depth) <= 1):
            raise UserError(f"--backend {self.word}: gives depth {np.shape(depth)} for {len(images)} images, it must "
                            f"be (N, {IMAGE_SIZE}, {IMAGE_SIZE}) from -1 (near) to 1 (far)")
        return self._checked(features, images), np.asarray(depth, np.float32)


def function_record(word: str) -> ExtractorKind:
    """Returns what is known of the extractor before it is made; UserError where the function is not there."""
    function, file = find_function(word, "--backend")
    code = sha256_of(file) if file else ""
    outputs = getattr(function, "outputs", PARTS)
    unknown = [one for one in outputs if one not in (*PARTS, Feature.DEPTH)]
    if unknown or Feature.POOLED not in outputs:
        raise UserError(f"--backend {word}: outputs of the function are {', '.join(map(str, outputs)) or 'none'}, they "
                        f"must be pooled and what else there is of {', '.join(PARTS)}, depth")
    with_depth = Feature.DEPTH in outputs
    return ExtractorKind(word, "an extractor of yours", partial(_load, word, function, code, with_depth), 0, 0, 0,
                         outputs=frozenset(map(Feature, outputs)), estimates_depth=with_depth, is_own=True)


def _load(word: str, function: Callable[..., FeatureExtractor], code: str, with_depth: bool, *,
          inception: str = "", device: str = "", dtype: str = "float32") -> FeatureExtractor:
    with reading(word, "the function fails", flag="--backend"):
        made: Any = function(device=device)
    needed = ("name", "fingerprint", "features", *(["features_and_depth"] if with_depth else []))
    lacking = [name for name in needed if not hasattr(made, name)]
    if lacking or not callable(made.features):
        raise UserError(f"--backend {word}: returns no extractor, it has no {', '.join(lacking) or 'features()'}")
    if not SHA256.fullmatch(str(made.fingerprint)):
        raise UserError(f"--backend {word}: fingerprint is {str(made.fingerprint)[:80]!r}, it must be the SHA-256 of "
                        "the weights, 64 hexadecimal digits")
    return (OwnDepthExtractor if with_depth else OwnExtractor)(word, made, code)
