"""The networks that see images for the metrics, in the order in which help shows them, and how ours were trained.

Everything else loops over `EXTRACTORS` or asks a record for its properties; nothing tells extractors apart by name.
"""

from collections.abc import Callable

from guided_diffusion.errors import UserError
from guided_diffusion.options import cut, nearest

from ..metrics.comparison import Feature
from . import own
from .base import PARTS, ExtractorKind, found_in, load_from

CLASSIFYING = PARTS | {Feature.CORRECTNESS}

EXTRACTORS: dict[str, ExtractorKind] = {kind.name: kind for kind in (
    ExtractorKind("torch", "the 2015 Inception in PyTorch", load_from("inception"),
                  pooled=2048, spatial=17 * 17 * 7, probabilities=1008, is_inception=True, has_dtype=True),
    ExtractorKind("tensorflow", "the 2015 Inception in TensorFlow", load_from("tensorflow"),
                  pooled=2048, spatial=17 * 17 * 7, probabilities=1008, is_inception=True),
    ExtractorKind("fashion_mnist", "a small classifier of Fashion-MNIST", load_from("fashion_mnist"),
                  pooled=64, spatial=8 * 8 * 8, probabilities=10, old_names=("embedded",), outputs=CLASSIFYING,
                  class_names=found_in("fashion_mnist", "class_names"), classify=found_in("fashion_mnist", "classify")),
    ExtractorKind("scenes", "a network that estimates the depth of rendered rooms", load_from("scenes"),
                  pooled=64, spatial=4 * 8 * 8, probabilities=4, estimates_depth=True),
    ExtractorKind("photo", "EfficientNet-Lite0, trained on the photographs of ImageNet", load_from("photo"),
                  pooled=1280, spatial=14 * 14 * 7, probabilities=1000, network="EfficientNet-Lite0",
                  check=found_in("photo", "check"), outputs=CLASSIFYING, classes_of="icons",
                  class_names=found_in("icons", "class_names"), classify=found_in("icons", "classify"),
                  check_classifier=found_in("icons", "check_classifier")),
    *own.KINDS)}
# Every word that --backend takes but for those that name a network of the user's: the names, each after its old ones.
BACKENDS: tuple[str, ...] = tuple(word for kind in EXTRACTORS.values() if not kind.plugin
                                  for word in (*kind.old_names, kind.name))


def check_backend(word: str) -> str:
    """Returns a word that --backend takes; raises UserError for another one. No file is looked at."""
    _finder(word)
    return word


def find_extractor(word: str) -> ExtractorKind:
    """The record of an extractor by its name, an old name, or the word that names a network of the user's.

    Raises UserError for any other word, and where that network's file or function cannot be used.
    """
    return _finder(word)()


def _finder(word: str) -> Callable[[], ExtractorKind]:
    for kind in EXTRACTORS.values():
        if not kind.plugin and word in (kind.name, *kind.old_names):
            return lambda: kind
    for kind in EXTRACTORS.values():
        finder = kind.plugin(word) if kind.plugin else None
        if finder:
            return finder
    known = [*BACKENDS, *(kind.name for kind in EXTRACTORS.values() if kind.plugin)]
    raise UserError(f"--backend {cut(word)}: must be one of {', '.join(known)}{nearest(word, BACKENDS)}")
