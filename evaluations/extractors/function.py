"""Extractors that a function of the user's own makes: `--backend MODULE:FUNCTION`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np

from guided_diffusion.errors import UserError
from guided_diffusion.foreign import reading
from guided_diffusion.functions import code_digest, find_function, function_sources
from guided_diffusion.options import shortened

from ..features import FeatureExtractor, Features
from ..metrics.comparison import Feature
from .base import IMAGE_SIZE, ExtractorKind, averaged
from .depth import DepthEstimator
from .tried import TriedExtractor

SHA256 = re.compile(r"[0-9a-f]{64}")
PARTS = tuple(map(Feature, Features._fields))


class OwnExtractor(TriedExtractor):
    """What a function of the user's returned, with features that it may leave out, and the code in its settings."""

    def __init__(self, word: str, made: FeatureExtractor, code: str) -> None:
        super().__init__()
        self.word, self._made = word, made
        self.name, self.fingerprint, self.caveat = made.name, made.fingerprint, getattr(made, "caveat", "")
        self.settings = {"function": word, "code": code, **dict(getattr(made, "settings", {}))}

    def features(self, images: np.ndarray) -> Features:
        """Returns the features of images (N, H, W, 3) uint8; an array alone is the pooled ones, or a map of them.

        Raises UserError where they are not features of so many images, and at the first images where they are unsteady.
        """
        found = self._features(images)
        self.try_once(self._features, images, f"--backend {self.word}")
        return found

    def _features(self, images: np.ndarray) -> Features:
        with self._running("features", images):
            return self._checked(self._made.features(images), images)

    def _running(self, method: str, images: np.ndarray) -> AbstractContextManager[None]:
        """Makes a sentence of whatever the extractor's method, or what it returned, raises in the block."""
        return reading(self.word, f"{method}() fails on images of {'x'.join(map(str, images.shape))}", flag="--backend")

    def _checked(self, found: Features | np.ndarray, images: np.ndarray) -> Features:
        given = (found,) if isinstance(found, np.ndarray) else found
        if not isinstance(given, (tuple, list)) or not 1 <= len(given) <= len(PARTS):
            what = f"{len(given)} parts" if isinstance(given, (tuple, list)) else f"a {type(given).__name__}"
            raise UserError(f"--backend {self.word}: gives {what}, it must give an array (N, D), or the arrays "
                            f"{', '.join(PARTS)}")
        none = np.empty((len(images), 0), np.float32)
        parts = [none if part is None else np.asarray(part) for part in (*given, None, None)[:len(PARTS)]]
        if any(part.ndim < 2 or len(part) != len(images) or part.dtype.kind != "f" for part in parts):
            shapes = ", ".join(f"{part.shape} {part.dtype}" for part in parts)
            raise UserError(f"--backend {self.word}: gives {shapes} for {len(images)} images, it must give floating-"
                            "point arrays (N, D)")
        pooled, *others = (part.astype(np.float32, copy=False) for part in parts)
        return Features(averaged(pooled), *others)


class OwnDepthExtractor(OwnExtractor):
    """The same of an extractor that also estimates depth, of images of any size."""

    any_size = True

    def __init__(self, word: str, made: DepthEstimator, code: str) -> None:
        super().__init__(word, made, code)
        self._estimator, self.accuracy = made, dict(getattr(made, "accuracy", {}))

    def features_and_depth(self, images: np.ndarray) -> tuple[Features, np.ndarray]:
        """Returns the features, and depth maps (N, 32, 32) from -1 (near) to 1 (far).

        Raises UserError where they are not maps of so many images, and at the first images where they are unsteady.
        """
        features, depth = self._features_and_depth(images)
        self.try_once(lambda noise: [*(tried := self._features_and_depth(noise))[0], tried[1]], images,
                      f"--backend {self.word}", "features and depth")
        return features, depth

    def _features_and_depth(self, images: np.ndarray) -> tuple[Features, np.ndarray]:
        with self._running("features_and_depth", images):
            features, depth = self._estimator.features_and_depth(images)
            if np.shape(depth) != (len(images), IMAGE_SIZE, IMAGE_SIZE) or not np.all(np.abs(depth) <= 1):
                raise UserError(f"--backend {self.word}: gives depth {np.shape(depth)} for {len(images)} images, it "
                                f"must be (N, {IMAGE_SIZE}, {IMAGE_SIZE}) from -1 (near) to 1 (far)")
            return self._checked(features, images), np.asarray(depth, np.float32)


def function_record(word: str) -> ExtractorKind:
    """Returns what is known of the extractor before it is made; UserError where the function is not there."""
    function, _ = find_function(word, "--backend")
    code = code_digest(function_sources(word))
    outputs = getattr(function, "outputs", PARTS)
    if not isinstance(outputs, (tuple, list, set, frozenset)) or not all(isinstance(one, str) for one in outputs):
        raise UserError(f"--backend {word}: outputs of the function are {shortened(outputs)}, they must be a list of "
                        'words, like ("pooled",)')
    unknown = [one for one in outputs if one not in (*PARTS, Feature.DEPTH)]
    if unknown or Feature.POOLED not in outputs:
        raise UserError(f"--backend {word}: outputs of the function are {', '.join(outputs) or 'none'}, they "
                        f"must be pooled and what else there is of {', '.join(PARTS)}, depth")
    with_depth = Feature.DEPTH in outputs
    return ExtractorKind(word, "an extractor of yours", partial(_load, word, function, code, with_depth), 0, 0, 0,
                         outputs=frozenset(map(Feature, outputs)), estimates_depth=with_depth, is_own=True)


def _load(word: str, function: Callable[..., FeatureExtractor], code: str, with_depth: bool, *,
          inception: str = "", device: str = "", dtype: str = "float32") -> FeatureExtractor:
    with reading(word, "the function fails", flag="--backend"):
        made: Any = function(device=device)
    with reading(word, "what the function returns cannot be used", flag="--backend"):
        methods = ("features", *(["features_and_depth"] if with_depth else []))
        lacking = [name for name in ("name", "fingerprint", *methods) if not hasattr(made, name)]
        lacking = lacking or [f"{name}()" for name in methods if not callable(getattr(made, name))]
        if lacking:
            raise UserError(f"--backend {word}: returns no extractor, it has no {', '.join(lacking)}")
        if not SHA256.fullmatch(str(made.fingerprint)):
            raise UserError(f"--backend {word}: fingerprint is {str(made.fingerprint)[:80]!r}, it must be the SHA-256 "
                            "of the weights, 64 hexadecimal digits")
        extractor = (OwnDepthExtractor if with_depth else OwnExtractor)(word, made, code)
        json.dumps([extractor.name, extractor.settings])         # as results have them
        return extractor
