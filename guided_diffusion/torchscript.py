"""Networks in TorchScript files. They are not unpickled, but their code runs: use files whose makers you trust."""

from __future__ import annotations

import functools
import logging
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError
from .foreign import reading
from .late import torch
from .launchers import is_main

if TYPE_CHECKING:
    from torch.jit import ScriptModule

SUFFIXES = (".pt", ".ts", ".pth", ".torchscript")

_log = logging.getLogger(__name__)


def load_torchscript(path: Path, device: torch.device, flag: str) -> ScriptModule:
    """The network in a file, for evaluation. flag: the option that named it, with its dashes.

    Raises UserError where the file is none of TorchScript, or cannot be used.
    """
    with reading(path, "is no TorchScript file", flag=flag), zipfile.ZipFile(path) as archive:
        if not any("/code/" in name for name in archive.namelist()):
            raise UserError(f"{flag} {path}: holds weights without a network, which are not unpickled: save the "
                            "network itself with torch.jit.script or torch.jit.trace")
    _say(path)
    with reading(path, "is no TorchScript file that can be used", flag=flag):
        module: Any = torch.jit.load(str(path), map_location=device)
        return module.eval()


@functools.cache
def _say(path: Path) -> None:
    """Logs, once, that the code of a file is run."""
    if is_main():
        _log.info("%s: a TorchScript file, whose code is run", path)
