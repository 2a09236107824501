"""Networks of the user's in TorchScript files as extractors."""

from __future__ import annotations

from pathlib import Path

import torch

from guided_diffusion.fetch import sha256_of
from guided_diffusion.network_inputs import Preparation
from guided_diffusion.torchscript import load_torchscript

from ..features import FeatureExtractor
from .base import chosen_device
from .network import as_extractor


def load(path: Path, preparation: Preparation, device: str) -> FeatureExtractor:
    """Loads the network in a TorchScript file. Raises UserError where the file or the device cannot be used."""
    where = chosen_device(device)
    network = load_torchscript(path, where, "--backend")
    return as_extractor(path, sha256_of(path), network, preparation, where, f"TorchScript of torch {torch.__version__}")
