"""The folder of a run that is given none: named by its model and by what its results depend on."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..fetch import is_address, without_secrets
from .options import CheckpointOptions

LONGEST, DIGITS = 60, 8         # characters of the model's name and of the fingerprint


def default_folder(parent: str, checkpoint: CheckpointOptions, values: Mapping[str, Any]) -> Path:
    """The folder PARENT/NAME-FINGERPRINT of a run without --out.

    NAME is that of the model: of --model, else of the file --model_path. values: what the results depend on, by flag
    name, with the paths of files in place of their contents. So the same command finds its folder again, and another
    one does not meet it there.
    """
    text = json.dumps(values, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
    return Path(parent) / f"{_name(checkpoint)}-{digest[:DIGITS]}"


def _name(checkpoint: CheckpointOptions) -> str:
    if checkpoint.model:
        name = Path(checkpoint.model).absolute().name
    else:
        path = without_secrets(checkpoint.model_path)
        name = Path(re.split(r"[?#]", path)[0] if is_address(path) else path).stem
    return re.sub(r"[^\w.-]+", "_", name)[:LONGEST] or "model"
