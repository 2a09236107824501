"""Statistics that files store: by which extractor they were made, and of how many images they are."""

from __future__ import annotations

import json
from typing import Any

from guided_diffusion.errors import UserError
from guided_diffusion.npz import BatchFile
from guided_diffusion.options import cut

from .features import FeatureExtractor


def extractor_settings(extractor: FeatureExtractor) -> dict[str, Any]:
    """Returns what the features of an extractor depend on besides its weights, as JSON has it."""
    return dict(getattr(extractor, "settings", {}))


def settings_text(extractor: FeatureExtractor) -> str:
    """Returns the settings of an extractor as a reference file keeps them: without the version of what runs it."""
    return json.dumps({name: value for name, value in extractor_settings(extractor).items() if name != "runtime"},
                      sort_keys=True)


def other_extractor(file: BatchFile, extractor: FeatureExtractor) -> str:
    """Returns whose statistics a file stores, in words, where they are those of another extractor; else "".

    Extractors are told apart by the SHA-256 of their weights, and by name where the file does not hold that. A file
    that names none is not judged.
    """
    name, sha256 = file.value("backend", str), file.value("backend_sha256", str)
    if name is None:
        return ""
    if (name == extractor.name) if sha256 is None else (sha256 == extractor.fingerprint):
        settings = file.value("backend_settings", str)
        if settings in (None, settings_text(extractor)):
            return ""
        return f"of {name!r} with other settings ({cut(settings)}, not {cut(settings_text(extractor))})"
    weights = "" if sha256 is None else f" (SHA-256 {sha256[:16]}..., not {extractor.fingerprint[:16]}...)"
    return f"of the network {name!r}, not of {extractor.name!r}{weights}"


def check_extractor_of(reference: BatchFile, extractor: FeatureExtractor) -> None:
    """Raises UserError where the statistics stored in a reference are those of an `other_extractor`."""
    if whose := other_extractor(reference, extractor):
        raise UserError(f"{reference.path}: its statistics are {whose}: pass another --backend, or make it again with "
                        "scripts/make_reference.py")


def stored_count(reference: BatchFile) -> int:
    """The number of images of the statistics in a file, 0 where it does not say; UserError below 1."""
    count = reference.value("count", int)
    if count is not None and count < 1:
        raise UserError(f"{reference.path}: count is {count}, it must be the number of images")
    return count or 0
