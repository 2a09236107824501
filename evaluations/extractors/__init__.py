"""The networks that see images for the metrics, in the order in which help shows them, and how ours were trained.

Everything else loops over `EXTRACTORS` or asks a record for its properties; nothing tells extractors apart by name.
"""

from guided_diffusion.errors import UserError
from guided_diffusion.options import nearest

from .base import ExtractorKind, load_from

EXTRACTORS: dict[str, ExtractorKind] = {kind.name: kind for kind in (
    ExtractorKind("torch", "the 2015 Inception in PyTorch", load_from("inception"),
                  pooled=2048, spatial=17 * 17 * 7, probabilities=1008, is_inception=True, has_dtype=True),
    ExtractorKind("tensorflow", "the 2015 Inception in TensorFlow", load_from("tensorflow"),
                  pooled=2048, spatial=17 * 17 * 7, probabilities=1008, is_inception=True),
    ExtractorKind("fashion_mnist", "a small classifier of Fashion-MNIST", load_from("fashion_mnist"),
                  pooled=64, spatial=8 * 8 * 8, probabilities=10, old_names=("embedded",)),
    ExtractorKind("scenes", "a network that estimates the depth of rendered rooms", load_from("scenes"),
                  pooled=64, spatial=4 * 8 * 8, probabilities=4, estimates_depth=True))}
# Every word that --backend takes: the names, and the old ones before the name that took their place.
BACKENDS: tuple[str, ...] = tuple(word for kind in EXTRACTORS.values() for word in (*kind.old_names, kind.name))


def find_extractor(word: str) -> ExtractorKind:
    """The record of an extractor by its name or an old name; raises UserError for a word that is neither."""
    for kind in EXTRACTORS.values():
        if word in (kind.name, *kind.old_names):
            return kind
    raise UserError(f"--backend {word}: must be one of {', '.join(BACKENDS)}{nearest(word, BACKENDS)}")
