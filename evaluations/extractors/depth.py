"""Features of the depth of images: those of estimated depth maps, and how sharp the edges in these are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from guided_diffusion.depth.images import depth_images
from guided_diffusion.depth.ranges import from_unit_range
from guided_diffusion.depth.scenes import FAR, NEAR
from guided_diffusion.errors import UserError
from guided_diffusion.npz import BatchFile
from guided_diffusion.progress import progress_bar

from ..features import FeatureExtractor, Features
from ..metrics import feature_statistics
from .base import IMAGE_SIZE

if TYPE_CHECKING:
    from .fashion_mnist import FashionMnistClassifier

EDGE_SHARE = 0.1
BATCH = 250
DEPTH_ARRAYS = ("mu_depth", "sigma_depth", "sharpness")     # in reference files, beside the SHA-256 of both networks
ESTIMATOR = "judge"         # the array in them that has the SHA-256 of the depth estimator


class DepthFeatures(NamedTuple):
    """Features of N images and of their estimated depth maps, by the names of `metrics.Feature`."""

    pooled: np.ndarray              # (N, 64), of the images, by the extractor of scenes
    depth: np.ndarray               # (N, 64), of the depth maps, by the classifier of Fashion-MNIST
    sharpness: np.ndarray           # (N,), metres per pixel


@runtime_checkable
class DepthEstimator(FeatureExtractor, Protocol):
    """An extractor that also estimates depth. accuracy: on held-out images, by name.

    It sees images of 32x32, unless an attribute `any_size` is True. NEAR and FAR are those of scenes, unless an
    attribute `limits` has them.
    """

    accuracy: Mapping[str, float]

    def features_and_depth(self, images: np.ndarray) -> tuple[Features, np.ndarray]:
        """Returns features of images (N, H, W, 3), uint8, and depth maps (N, 32, 32), from -1 (NEAR) to 1 (FAR)."""


class DepthExtractor:
    """Two networks: the extractor of scenes estimates depth maps, the classifier of Fashion-MNIST reads them as images.

    They are the bundled ones unless others are given.
    """

    def __init__(self, scenes: DepthEstimator | None = None, classifier: FashionMnistClassifier | None = None) -> None:
        from .fashion_mnist import load_fashion_mnist
        from .scenes import load_scenes

        self.scenes, self.classifier = scenes or load_scenes(), classifier or load_fashion_mnist()

    def description(self) -> dict[str, Any]:
        """Returns what results say of the two networks."""
        return {"estimator": {"name": self.scenes.name, "sha256": self.scenes.fingerprint,
                              "accuracy": self.scenes.accuracy},
                "extractor": {"name": self.classifier.name, "sha256": self.classifier.fingerprint}}

    def check(self, file: BatchFile, count: int | None = None) -> None:
        """Raises UserError where a file has fewer than `count` images (None: two), or of a size that is not read."""
        check_scenes(file, count, any_size=getattr(self.scenes, "any_size", False))

    def features(self, file: BatchFile, count: int | None = None) -> DepthFeatures:
        """Returns the features of the first `count` images of a file (None: of all).

        Raises UserError where the file has fewer images, or images of another size.
        """
        self.check(file, count)
        count, parts = count or len(file), []
        limits = getattr(self.scenes, "limits", (NEAR, FAR))
        with progress_bar(count, file.path.name, "image") as progress:
            for _, images in file.batches(BATCH, num_images=count):
                features, depth = self.scenes.features_and_depth(images)
                parts.append(DepthFeatures(features.pooled, self.classifier.features(depth_images(depth)).pooled,
                                           edge_sharpness(from_unit_range(depth, *limits))))
                progress.update(len(images))
        return DepthFeatures(*(np.concatenate(values) for values in zip(*parts, strict=True)))

    def reference_arrays(self, images: BatchFile, count: int) -> dict[str, np.ndarray]:
        """Returns what a reference file holds of the depth of its first `count` images, by name."""
        features = self.features(images, count)
        depth = feature_statistics(features.depth)
        return {"mu_depth": depth.mean, "sigma_depth": depth.covariance, "sharpness": features.sharpness,
                ESTIMATOR: np.array(self.scenes.fingerprint), "extractor": np.array(self.classifier.fingerprint)}

    def is_stored(self, reference: BatchFile) -> bool:
        """Whether a reference file holds what `reference_arrays` returns.

        Raises UserError where it was made by other networks.
        """
        if whose := self.other_networks(reference):
            raise UserError(f"{reference.path}: its statistics are {whose}: make it again with "
                            "scripts/make_reference.py")
        return all(name in reference.members for name in DEPTH_ARRAYS)

    def other_networks(self, file: BatchFile) -> str:
        """Returns whose `reference_arrays` a file stores, in words, where they are those of other networks; else ""."""
        made_by = {ESTIMATOR: ("depth estimator", self.scenes.fingerprint),
                   "extractor": ("extractor", self.classifier.fingerprint)}
        if any(name in file.members for name in DEPTH_ARRAYS):
            for name, (words, fingerprint) in made_by.items():
                if (stated := file.value(name, str)) != fingerprint:
                    given = "none is named" if stated is None else f"SHA-256 {stated[:16]}..."
                    return f"those of another {words} ({given}, not {fingerprint[:16]}...)"
        return ""


def depth_extractor(extractor: FeatureExtractor) -> DepthExtractor:
    """Returns the depth extractor of an evaluation network; raises UserError where that does not estimate depth."""
    if not isinstance(extractor, DepthEstimator):
        raise UserError(f"{extractor.name}: does not estimate depth")
    return DepthExtractor(extractor)


def check_scenes(file: BatchFile, count: int | None = None, any_size: bool = False) -> None:
    """Raises UserError where a file has not `count` images (None: two), or, unless any size does, not 32x32 ones."""
    if not len(file):
        raise UserError(f"{file.path}: has no images, arr_0 must be (N, {IMAGE_SIZE}, {IMAGE_SIZE}, 3) uint8")
    if not any_size and file.shape[1:3] != (IMAGE_SIZE, IMAGE_SIZE):
        raise UserError(f"{file.path}: its images are {file.resolution}, the extractor of scenes reads {IMAGE_SIZE}x"
                        f"{IMAGE_SIZE}; for others scripts/depth_fid.py compares depth maps that you estimated")
    if len(file) < (count or 2):
        raise UserError(f"{file.path}: has {len(file)} images, {count or 2} are needed")


def metres(depth: np.ndarray) -> np.ndarray:
    """Turns depth from -1 (NEAR) to 1 (FAR) into metres."""
    return from_unit_range(depth, NEAR, FAR)


def edge_sharpness(depth: np.ndarray) -> np.ndarray:
    """Returns (N,): mean magnitude of the gradient of depth (N, H, W) over the tenth of the pixels where it is largest.

    It is in the unit of depth per pixel. The gradient is that of forward differences to the right and down, so at
    (H - 1)(W - 1) pixels: a step between two pixels counts with its whole height, a ramp with its slope.
    """
    across, down = depth[:, :-1, 1:] - depth[:, :-1, :-1], depth[:, 1:, :-1] - depth[:, :-1, :-1]
    magnitude = np.hypot(across, down).reshape(len(depth), -1)
    count = max(1, round(EDGE_SHARE * magnitude.shape[1]))
    return np.partition(magnitude, -count, axis=1)[:, -count:].mean(axis=1)
