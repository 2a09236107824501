"""What metrics are computed from: the features of two files, and what several metrics share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

import numpy as np

from guided_diffusion.npz import BatchFile, Statistics

from .authenticity import authentic_samples
from .frechet import RunningStatistics
from .neighbours import Neighbourhoods, manifold_membership, neighbourhoods
from .pixels import pixel_measure

MANIFOLD_K, DENSITY_K = 3, 5        # nearest neighbours of precision and recall, and of density and coverage


class Feature(StrEnum):
    """The kinds of features, each by its name in extractors' results and in reference batches."""

    POOLED = "pooled"                   # (N, D), averages over the last feature map
    SPATIAL = "spatial"                 # (N, ...), some channels of an earlier map, with their places
    PROBABILITIES = "probabilities"     # (N, classes), sum 1
    CORRECTNESS = "correctness"         # (N,), 1 where a classifier names the class that was asked for, else 0
    DEPTH = "depth"                     # (N, D), features of depth maps
    SHARPNESS = "sharpness"             # (N,), edge sharpness of depth maps, metres per pixel
    SATURATION = "saturation"           # (N,), of the pixels, in [0, 1]
    CONTRAST = "contrast"               # (N,), of the pixels, in [0, 0.5]


OF_DEPTH = frozenset({Feature.DEPTH, Feature.SHARPNESS})
OF_PIXELS = frozenset({Feature.SATURATION, Feature.CONTRAST})      # which no network sees
# What the names of the statistics of each kind end in, in reference batches.
SUFFIXES = {Feature.POOLED: "", Feature.SPATIAL: "_s", Feature.DEPTH: "_depth"}
OF_NETWORK = frozenset({Feature.POOLED, Feature.SPATIAL})          # of them, those of the network that sees the images


def feature_statistics(features: np.ndarray, rows: int = 4096) -> Statistics:
    """Computes mean and covariance of (N, D) features, of which `rows` are in memory at a time.

    The features may be mapped from a file. It is read then, since mapped pages would stay in memory.
    """
    running = RunningStatistics()
    for start in range(0, len(features), rows):
        piece = features[start:start + rows]
        if isinstance(features, np.memmap):
            place = features.offset + start * piece[0].nbytes
            piece = np.fromfile(str(features.filename), features.dtype, piece.size, offset=place).reshape(piece.shape)
        running.update(piece)
    return Statistics(running.mean, running.covariance)


class FeatureSet:
    """The features of images, by kind, with their statistics."""

    def __init__(self, features: Mapping[str, np.ndarray], count: int | None = None) -> None:
        """Takes (N, ...) features by kind; count: N, None where it is that of the features."""
        self.features = dict(features)
        self.count = len(next(iter(self.features.values()))) if count is None else count
        self._statistics: dict[Feature, Statistics] = {}

    def __getitem__(self, kind: Feature) -> np.ndarray:
        """Returns the features of that kind, (N, ...)."""
        return self.features[kind]

    def statistics(self, kind: Feature) -> Statistics:
        """Returns mean and covariance of the features of that kind."""
        if kind not in self._statistics:
            self._statistics[kind] = feature_statistics(self[kind])
        return self._statistics[kind]

    def unresampled(self, kind: Feature) -> str:
        """Why resampled features do not say how far the statistics of that kind move, in words; "" where they do."""
        return ""


class FileFeatures(FeatureSet):
    """The features of the first `count` images of a file, with what the file stores of them.

    features: those that were extracted, by kind. Where a kind was not, the file must hold it. foreign: by kind, whose
    the stored statistics are, in words, where another network made them, or of how many other images: those are not
    used. Others are used where all images take part.
    """

    def __init__(self, file: BatchFile, count: int, features: Mapping[str, np.ndarray] | None = None,
                 foreign: Mapping[Feature, str] | None = None) -> None:
        super().__init__(features or {}, count)
        self.file, self.foreign = file, dict(foreign or {})

    def first(self, count: int) -> FileFeatures:
        """Returns the features of the first `count` images alone."""
        if count == self.count:
            return self
        return FileFeatures(self.file, count, {kind: values[:count] for kind, values in self.features.items()},
                            self.foreign)

    def __getitem__(self, kind: Feature) -> np.ndarray:
        """Returns the features of that kind, (N, ...): extracted, stored, or measured on the pixels."""
        if kind not in self.features:
            of_pixels = kind in OF_PIXELS
            self.features[kind] = pixel_measure(kind, self.file, self.count) if of_pixels else self.file.read(kind)
        return self.features[kind]

    def knows(self, kind: Feature) -> bool:
        """Whether there are features of that kind."""
        return kind in self.features or bool(len(self.file) if kind in OF_PIXELS else kind in self.file.members)

    def statistics(self, kind: Feature) -> Statistics:
        """Returns mean and covariance of the features of that kind, stored or computed."""
        return self._stored(kind) or super().statistics(kind)

    def _stored(self, kind: Feature) -> Statistics | None:
        return self.file.statistics(SUFFIXES[kind]) if self.is_whole and kind not in self.foreign else None

    def unresampled(self, kind: Feature) -> str:
        """Why resampled features do not say how far the statistics of that kind move, in words; "" where they do."""
        known = self._stored(kind) is None or self.file.value("count", int) is not None
        return "" if known else "its stored statistics do not say of how many images they are"

    @property
    def is_whole(self) -> bool:
        """Whether all images of the file take part."""
        return self.count >= len(self.file)

    def description(self) -> dict[str, Any]:
        """Returns what results say of the file; raises UserError where it has changed since it was opened."""
        self.file.check_unchanged()
        stored = any(self._stored(kind) for kind in OF_NETWORK)
        return {"file": str(self.file.path), "sha256": self.file.sha256, "images": self.count,
                "statistics": "stored" if stored else "computed",
                **({"resolution": self.file.resolution} if len(self.file) else {})}


@dataclass(frozen=True)
class ComparisonSettings:
    """What the values of metrics depend on besides the features.

    precision_recall: "exact" or "official", as in `precision_recall`. seed: of the resamplings and of the images that
    KID draws. full_neighbourhoods: whether the densities of the same neighbourhoods will be asked for too, so that
    computing all in one go is faster; it changes no number.
    """

    precision_recall: str = "exact"
    seed: int = 0
    full_neighbourhoods: bool = False


class Comparison:
    """A sample file beside the reference. What several metrics share is computed once, when it is first needed."""

    def __init__(self, reference: FeatureSet, sample: FeatureSet,
                 settings: ComparisonSettings | None = None) -> None:
        self.reference, self.sample = reference, sample
        self.settings = settings or ComparisonSettings()

    @cached_property
    def neighbourhoods(self) -> Neighbourhoods:
        """How the pooled features of reference and sample lie to each other."""
        return neighbourhoods(self.reference[Feature.POOLED], self.sample[Feature.POOLED], MANIFOLD_K, DENSITY_K)

    @cached_property
    def membership(self) -> tuple[np.ndarray, np.ndarray]:
        """For each sample image and each reference image, whether it is inside the other manifold: (M,), (N,) bool."""
        if self.settings.full_neighbourhoods and self.settings.precision_recall == "exact":
            return self.neighbourhoods.sample_inside, self.neighbourhoods.reference_inside
        return manifold_membership(self.reference[Feature.POOLED], self.sample[Feature.POOLED], MANIFOLD_K,
                                   self.settings.precision_recall)

    @cached_property
    def authentic(self) -> np.ndarray:
        """For each sample image, whether it is no copy of an image of the reference: (M,) bool."""
        return authentic_samples(self.reference[Feature.POOLED], self.sample[Feature.POOLED])
