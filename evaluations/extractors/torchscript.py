"""Networks in TorchScript files. They are not unpickled, but their code runs: use files whose makers you trust."""

from __future__ import annotations

import logging
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from guided_diffusion.errors import UserError
from guided_diffusion.fetch import sha256_of
from guided_diffusion.foreign import reading

from ..features import FeatureExtractor
from .base import chosen_device
from .network import Outputs, as_extractor
from .preparation import Preparation

_log = logging.getLogger(__name__)


def load(path: Path, preparation: Preparation, device: str) -> FeatureExtractor:
    """Loads the network in a TorchScript file. Raises UserError where the file or the device cannot be used."""
    where = chosen_device(device)
    with reading(path, "is no TorchScript file", flag="--backend"), zipfile.ZipFile(path) as archive:
        if not any("/code/" in name for name in archive.namelist()):
            raise UserError(f"--backend {path}: holds weights without a network, which are not unpickled: save the "
                            "network itself with torch.jit.script or torch.jit.trace")
    _log.info("%s: a TorchScript file, whose code is run", path)
    with reading(path, "is no TorchScript file that can be used", flag="--backend"):
        module = torch.jit.load(str(path), map_location=where).eval()

    def network(inputs: Tensor) -> Outputs:
        found = module(inputs)
        return (found,) if isinstance(found, Tensor) else found

    return as_extractor(path, sha256_of(path), network, preparation, where, f"TorchScript of torch {torch.__version__}")
