"""The networks that see images for the metrics, in the order in which help shows them, and how ours were trained.

Everything else loops over `EXTRACTORS` or asks a record for its properties; nothing tells extractors apart by name.
"""

from guided_diffusion.errors import UserError
from guided_diffusion.options import nearest

from . import fashion_mnist, inception, scenes, tensorflow
from .base import ExtractorKind

EXTRACTORS: dict[str, ExtractorKind] = {kind.name: kind for kind in (
    inception.KIND, tensorflow.KIND, fashion_mnist.KIND, scenes.KIND)}
# Every word that --backend takes: the names, and the old ones before the name that took their place.
BACKENDS: tuple[str, ...] = tuple(word for kind in EXTRACTORS.values() for word in (*kind.old_names, kind.name))


def find_extractor(word: str) -> ExtractorKind:
    """The record of an extractor by its name or an old name; raises UserError for a word that is neither."""
    for kind in EXTRACTORS.values():
        if word in (kind.name, *kind.old_names):
            return kind
    raise UserError(f"--backend {word}: must be one of {', '.join(BACKENDS)}{nearest(word, BACKENDS)}")
