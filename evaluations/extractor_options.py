"""The extractor by its options: which network sees the images, and loading it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from guided_diffusion import dist_util
from guided_diffusion.functions import code_digest, is_ours, sources_of
from guided_diffusion.options import Options, batch_option, option

from .extractors import EXTRACTORS, ExtractorKind, check_backend, find_extractor
from .features import FeatureExtractor


@dataclass(frozen=True)
class ExtractorOptions(Options):
    """The network that sees the images."""

    backend: str = option("torch", "the network: " + "; ".join(f"{kind.name}, {kind.title}"
                                                              for kind in EXTRACTORS.values()))
    inception: str = option("", "the official classify_image_graph_def.pb, or its conversion; unset: from the cache of "
                            "this library, else the one in the current folder, else downloaded")
    device: str = option("", "device of the network, like cpu or cuda:1; unset: a GPU for each rank, else the CPU")
    dtype: str = option("float32", "type in which the torch Inception computes; bfloat16 moves FID in its first "
                       "decimal and is for quick looks", choices=("float32", "bfloat16"))
    batch_size: int = batch_option(64, "images at a time on each rank")
    cache: str = option("", "folder that keeps features, so that a file is read by the network once; unset: not kept")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_backend(self.backend)

    @property
    def kind(self) -> ExtractorKind:
        """What is known of the extractor before it is loaded."""
        return find_extractor(self.backend)

    def useless(self) -> dict[str, str]:
        """The options that have no effect beside the others, and why. Raises UserError as `find_extractor`."""
        idle = {}
        if not self.kind.is_inception:
            idle["inception"] = f"--backend {self.kind.name} is no Inception"
        if not self.kind.has_dtype:
            idle["dtype"] = f"--backend {self.kind.name} computes in one type"
        return idle


def load_extractor(options: ExtractorOptions) -> FeatureExtractor:
    """Loads the extractor that `--backend` names. Raises UserError where its file or the device cannot be used.

    Of one that is not of this library its settings say the code, so that features of other code are not used.
    """
    load = options.kind.load
    extractor = load(inception=options.inception, device=options.device, dtype=options.dtype)
    made_by = [getattr(one, "__module__", "") for one in (getattr(load, "func", load), type(extractor))]
    sources = [sources_of(name) for name in made_by if not is_ours(name)]
    if sources:
        _add_code(extractor, code_digest({name: file for one in sources for name, file in one.items()}))
    return extractor


def _add_code(extractor: Any, code: str) -> None:
    try:
        if code:
            extractor.settings = {**getattr(extractor, "settings", {}), "code": code}
    except AttributeError:              # of a frozen class, or one with slots
        code = ""
    if not code:
        dist_util.say(f"the code of the extractor {extractor.name} is not recorded, as it is in no file or its "
                      "settings cannot be set: after a change of it, name another --cache, or older features are used")


def load_extractor_once(options: ExtractorOptions) -> FeatureExtractor:
    """Loads the extractor on all ranks; the first one goes ahead, so that a file is downloaded or converted once."""
    extractor: FeatureExtractor | None = None
    for turn in (dist_util.is_main(), not dist_util.is_main()):
        with dist_util.together():
            if turn:
                extractor = load_extractor(options)
    assert extractor is not None            # each rank has had its turn
    return extractor
