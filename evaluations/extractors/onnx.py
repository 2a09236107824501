"""Networks in ONNX files, which onnxruntime runs."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from guided_diffusion.errors import UserError
from guided_diffusion.foreign import reading
from guided_diffusion.network_inputs import Outputs, Preparation

from ..features import FeatureExtractor
from .base import chosen_device
from .network import as_extractor

WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}

_log = logging.getLogger(__name__)


def load(path: Path, preparation: Preparation, device: str) -> FeatureExtractor:
    """Loads the network in an ONNX file. Raises UserError without onnxruntime, and where it cannot be used."""
    where, runtime = chosen_device(device), _onnxruntime(path)
    with reading(path, "cannot be read", flag="--backend"):
        content = path.read_bytes()
    with (reading(path, "is no ONNX file that can be used; its weights must stand in the file itself",
                  flag="--backend"), TemporaryDirectory() as empty):
        options = runtime.SessionOptions()
        options.log_severity_level = 4          # what is wrong becomes a sentence
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry(WEIGHTS_FOLDER, empty)     # else the SHA-256 would not be that of all weights
        session = runtime.InferenceSession(content, options, providers=_providers(runtime, path, where))
    return as_extractor(path, hashlib.sha256(content).hexdigest(), _Network(session, path), preparation, where,
                        f"onnxruntime {runtime.__version__}")


class _Network:
    """A session as a network. A file that was made for batches of one size gets batches of that size."""

    def __init__(self, session: Any, path: Path) -> None:
        entries = session.get_inputs()
        if len(entries) != 1 or entries[0].type not in TYPES or len(entries[0].shape) != 4:
            found = ", ".join(f"{entry.name} {entry.type} {entry.shape}" for entry in entries)
            raise UserError(f"--backend {path}: must have one input of images (N, 3, H, W), but has {found}")
        self._session, self._input, self._dtype = session, entries[0].name, TYPES[entries[0].type]
        self._batch = entries[0].shape[0] if isinstance(entries[0].shape[0], int) else 0
        self._names = [entry.name for entry in session.get_outputs()]

    def __call__(self, inputs: Tensor) -> Outputs:
        images = inputs.cpu().numpy().astype(self._dtype)
        parts = [self._run(images[start:start + (self._batch or len(images))])
                 for start in range(0, len(images), self._batch or len(images))]
        return {name: torch.from_numpy(np.concatenate(values)) for name, values in
                zip(self._names, zip(*parts, strict=True), strict=True)}

    def _run(self, images: np.ndarray) -> list[np.ndarray]:
        lacking = max(0, self._batch - len(images))
        padded = np.concatenate([images, images[-1:].repeat(lacking, axis=0)]) if lacking else images
        return [values[:len(images)] for values in self._session.run(self._names, {self._input: padded})]


def _providers(runtime: Any, path: Path, device: torch.device) -> list[str]:
    """Returns what onnxruntime is to compute with, and says so where that is not the device."""
    gpu = "CUDAExecutionProvider"
    if device.type == "cuda" and gpu in runtime.get_available_providers():
        return [gpu, "CPUExecutionProvider"]
    if device.type != "cpu":
        _log.warning("%s: runs on the CPU, as this onnxruntime knows no %s", path, device)
    return ["CPUExecutionProvider"]


def _onnxruntime(path: Path) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"--backend {path} needs the package onnxruntime ({error}): "
                        "pip install 'guided-pixels[onnx]'") from None
    return onnxruntime
