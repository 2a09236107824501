"""What the package says of each extractor, and what they have in common.

To add an extractor, write a file with a class that has `name`, `fingerprint`, `caveat` and `features` (the protocol
`evaluations.features.FeatureExtractor`, which also says when it needs `settings`) and with a function `load`

    def load(*, inception: str = "", device: str = "", dtype: str = "float32") -> FeatureExtractor:
        return Brightness()

and list its record in `EXTRACTORS`, with the name of the file, which is imported when the extractor is loaded:

    ExtractorKind("brightness", "mean brightness of each quarter", load_from("brightness"),
                  pooled=4, spatial=64, probabilities=2)
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from guided_diffusion import dist_util
from guided_diffusion.errors import UserError
from guided_diffusion.late import Tensor, torch

from ..features import FeatureExtractor, Features
from ..metrics.comparison import Feature

FLOAT32_BYTES = 4
IMAGE_SIZE = 32                 # pixels of what the bundled extractors see
Classify = Callable[[Features], np.ndarray]         # features of N images -> the class that is named of each, (N,)
PARTS = frozenset({Feature.POOLED, Feature.SPATIAL, Feature.PROBABILITIES})
Values = TypeVar("Values", np.ndarray, "Tensor")


class Loader(Protocol):
    """A function that loads an extractor."""

    def __call__(self, *, inception: str = "", device: str = "", dtype: str = "float32") -> FeatureExtractor:
        """Loads the extractor; each takes of the three options what concerns it.

        inception: the Inception's file; "" takes it from the cache. device: like "cuda:1"; "" is the rank's own.
        dtype: type of the computation. Raises UserError where a file or the device cannot be used.
        """


def found_in(file: str, function: str) -> Callable[..., Any]:
    """A function of a file of this package, by both names; the file is imported when the function is called."""
    return lambda *words, **options: getattr(importlib.import_module(f"{__package__}.{file}"), function)(
        *words, **options)


def load_from(file: str) -> Loader:
    """The function `load` of a file, as `found_in`."""
    return found_in(file, "load")


def is_its_own_classifier(extractor: FeatureExtractor) -> None:
    """Says that an extractor names classes itself, or none, so that no classifier can be of other features."""


def names_no_class(features: Features) -> np.ndarray:
    """Says that an extractor names no classes: its outputs are without `Feature.CORRECTNESS`."""
    raise UserError("this network names no classes of images")


def nothing_needed() -> None:
    """Says that an extractor needs nothing but what is always installed."""


def bundled_file(name: str) -> Path:
    """The file with the weights of a bundled extractor."""
    return Path(__file__).parents[1] / "models" / f"{name}.safetensors"


@dataclass(frozen=True)
class ExtractorKind:
    """What is known of an extractor before it is loaded.

    Widths are 0 where only loading tells them, as of networks that users bring. For those, a record in `EXTRACTORS` has
    `plugin`, which takes a word of --backend: where it is one of its own, it returns a function that makes the record
    of that very network, and which raises UserError where that cannot be used.
    """

    name: str                           # the word that --backend takes
    title: str                          # what it is, for help and messages
    load: Loader
    pooled: int                         # numbers of an image: averages over the last feature map
    spatial: int                        # numbers of an image: some channels of an earlier map, with their places
    probabilities: int                  # classes
    old_names: tuple[str, ...] = ()     # words that --backend takes as well
    is_inception: bool = False          # the 2015 Inception: its file is --inception, its references name no network
    has_dtype: bool = False             # computes in the type of --dtype
    estimates_depth: bool = False       # is an `evaluations.features.DepthExtractor`
    outputs: frozenset[Feature] = PARTS                 # the kinds of features that it gives
    network: str = ""                   # stands in the names of metrics that would say Inception's; "" leaves them
    check: Callable[[], None] = nothing_needed          # raises UserError where what `load` needs is not installed
    is_own: bool = False                # is the user's, so that results and references say its settings
    class_names: Callable[[], Sequence[str]] = tuple    # of what `classify` tells apart, in the order of the numbers
    classes_of: str = ""            # what these classes are of, where the extractor's own name does not say it
    classify: Classify = names_no_class         # names the class of images by their features, for class accuracy
    # raises UserError where `classify` reads the features of other weights
    check_classifier: Callable[[FeatureExtractor], None] = is_its_own_classifier
    plugin: Callable[[str], Callable[[], ExtractorKind] | None] | None = None

    @property
    def feature_bytes(self) -> int:
        """Bytes of the stored features of one image, as far as the widths are known."""
        return FLOAT32_BYTES * (self.pooled + self.spatial + self.probabilities)


def averaged(pooled: Values) -> Values:
    """Pooled features as they are, (N, D), or of a map (N, C, H, W) its means over the places, (N, C)."""
    return pooled.mean((2, 3)) if pooled.ndim == 4 else pooled


def chosen_device(word: str) -> torch.device:
    """The device of that word, "" for the rank's own; raises UserError for one that is not there."""
    if not word:
        return dist_util.dev()
    try:
        return torch.empty(0, device=word).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {word}: {str(error).splitlines()[0]}") from None
