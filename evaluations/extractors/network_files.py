"""Networks that users have in a file: TorchScript, or ONNX, with a YAML file beside it that `preparation` explains.

Neither is ever unpickled. A TorchScript file holds code, which runs when it is used: as with every program, use files
whose makers you trust.
"""

from __future__ import annotations

import hashlib
import logging
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from guided_diffusion.errors import UserError
from guided_diffusion.fetch import sha256_of
from guided_diffusion.foreign import reading

from ..features import FeatureExtractor, Features
from ..metrics.comparison import Feature
from .base import ExtractorKind, chosen_device
from .bundled import IMAGE_SIZE
from .preparation import Preparation, read_preparation

TORCHSCRIPT, ONNX = (".pt", ".ts", ".pth", ".torchscript"), (".onnx",)
ONNX_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}

Outputs = Mapping[str, Tensor] | Sequence[Tensor]
Network = Callable[[Tensor], Outputs]       # images as it reads them to outputs by name or number

_log = logging.getLogger(__name__)


class NetworkExtractor:
    """A network of a user's file as an extractor.

    path: the file. fingerprint: its SHA-256. network: runs it on images (N, 3, height, width) float32. runtime: what
    runs it, with its version. Raises UserError where one grey image shows that it cannot be used.
    """

    caveat = ""

    def __init__(self, path: Path, fingerprint: str, network: Network, preparation: Preparation,
                 device: torch.device, runtime: str) -> None:
        self.name, self.file, self.fingerprint = path.name, str(path), fingerprint
        self.preparation = preparation
        self.settings = {"runtime": runtime, **self.preparation.described()}
        self._network, self._device = network, device
        if preparation.size is not None:
            self.outputs(np.full((1, *preparation.size, 3), 128, np.uint8))

    def outputs(self, images: np.ndarray) -> dict[str, Tensor]:
        """Returns the outputs that the YAML file names, each (N, ...) float32 on the CPU, by what they are.

        images: (N, H, W, 3) uint8. Raises UserError where the network fails, or lacks one of them.
        """
        inputs = self.preparation.inputs(images, self._device)
        shape = "x".join(map(str, inputs.shape))
        with reading(self.file, f"the network fails on an input of {shape}", flag="--backend"), torch.no_grad():
            found = self._network(inputs)
        chosen = {name: _chosen(found, place, f"--backend {self.file}: {name}")
                  for name, place in self.preparation.outputs}
        for name, values in chosen.items():
            if values.ndim < (3 if name == "depth" else 2) or len(values) != len(images) or not values[0].numel():
                raise UserError(f"--backend {self.file}: {name} is {tuple(values.shape)} for {len(images)} images, it "
                                f"must be {'(N, H, W)' if name == 'depth' else '(N, ...)'}")
        return {name: values.detach().float().cpu() for name, values in chosen.items()}

    def features(self, images: np.ndarray) -> Features:
        """Returns features of images (N, H, W, 3) uint8, those that the network does not give of width 0."""
        return _as_features(self.outputs(images))


class DepthNetworkExtractor(NetworkExtractor):
    """A network that also estimates depth; nothing is known of its accuracy, and it reads images of any size."""

    accuracy: Mapping[str, float] = {}

    def features_and_depth(self, images: np.ndarray) -> tuple[Features, np.ndarray]:
        """Returns the features, and depth maps (N, 32, 32) from -1 (near) to 1 (far), averaged over squares."""
        outputs = self.outputs(images)
        return _as_features(outputs), self.preparation.depth(outputs["depth"], IMAGE_SIZE)


def _as_features(outputs: Mapping[str, Tensor]) -> Features:
    pooled = outputs["pooled"]
    if pooled.ndim == 4:                    # a map: the mean over its places
        pooled = pooled.mean(dim=(2, 3))
    none = pooled.new_empty(len(pooled), 0)
    probabilities = outputs["logits"].softmax(dim=1) if "logits" in outputs else outputs.get("probabilities", none)
    parts = (pooled, outputs.get("spatial", none), probabilities)
    return Features(*(part.flatten(1).contiguous().numpy() for part in parts))


def _chosen(outputs: Outputs, place: int | str, where: str) -> Tensor:
    """Returns an output by its number or name; UserError where there is none."""
    known = list(outputs) if isinstance(outputs, Mapping) else list(range(len(outputs)))
    if isinstance(outputs, Mapping) and type(place) is int:
        place = known[place] if place < len(known) else place
    if place not in known:
        raise UserError(f"{where} is the output {place}, but the network has {', '.join(map(str, known))}")
    found = outputs[place]                  # type: ignore[index]
    if not isinstance(found, Tensor):
        raise UserError(f"{where} is the output {place}, which is no tensor")
    return found


def settings_of(word: str) -> Path:
    """Returns the YAML file of a network's file."""
    return Path(word).with_suffix(".yaml")


def _record(word: str, load: Callable[..., tuple[str, Network, str]], title: str) -> ExtractorKind:
    """Returns what is known of a file before it is loaded; UserError where it or its YAML file cannot be used."""
    path, settings = Path(word), settings_of(word)
    with reading(path, "cannot be read", flag="--backend"):
        if not path.is_file():
            raise UserError(f"--backend {word}: no such file")
        if not settings.is_file():
            raise UserError(f"--backend {word}: needs {settings} beside it, which says how images become its input: "
                            "input_size, resize, range, mean, std and outputs")
    preparation = read_preparation(settings)
    return ExtractorKind(word, title, partial(_load, path, preparation, load), 0, 0, 0, outputs=preparation.kinds,
                         estimates_depth=Feature.DEPTH in preparation.kinds, is_own=True)


def _load(path: Path, preparation: Preparation, load: Callable[..., tuple[str, Network, str]], *,
          inception: str = "", device: str = "", dtype: str = "float32") -> FeatureExtractor:
    where = chosen_device(device)
    fingerprint, network, runtime = load(path, where)
    kind = DepthNetworkExtractor if Feature.DEPTH in preparation.kinds else NetworkExtractor
    return kind(path, fingerprint, network, preparation, where, runtime)


# TorchScript


def _load_torchscript(path: Path, device: torch.device) -> tuple[str, Network, str]:
    """Loads a TorchScript file: its SHA-256, the network, and what runs it."""
    with reading(path, "is no TorchScript file", flag="--backend"), zipfile.ZipFile(path) as archive:
        if not any("/code/" in name for name in archive.namelist()):
            raise UserError(f"--backend {path}: holds weights without a network, which are not unpickled: save the "
                            "network itself with torch.jit.script or torch.jit.trace")
    _log.info("%s: a TorchScript file, whose code is run", path)
    with reading(path, "is no TorchScript file that can be used", flag="--backend"):
        module = torch.jit.load(str(path), map_location=device).eval()

    def network(inputs: Tensor) -> Outputs:
        found = module(inputs)
        return (found,) if isinstance(found, Tensor) else found

    return sha256_of(path), network, f"TorchScript of torch {torch.__version__}"


# ONNX


def _load_onnx(path: Path, device: torch.device) -> tuple[str, Network, str]:
    """Loads an ONNX file: its SHA-256, the network, and what runs it."""
    runtime = _onnxruntime(path)
    with reading(path, "cannot be read", flag="--backend"):
        content = path.read_bytes()
    with reading(path, "is no ONNX file that can be used; its weights must stand in the file itself",
                 flag="--backend"):
        options = runtime.SessionOptions()
        options.log_severity_level = 4          # what is wrong becomes a sentence
        options.intra_op_num_threads = torch.get_num_threads()
        session = runtime.InferenceSession(content, options, providers=_providers(runtime, path, device))
    return hashlib.sha256(content).hexdigest(), _OnnxNetwork(session, path), f"onnxruntime {runtime.__version__}"


class _OnnxNetwork:
    """A session as a network. A file that was made for batches of one size gets batches of that size."""

    def __init__(self, session: Any, path: Path) -> None:
        entries = session.get_inputs()
        if len(entries) != 1 or entries[0].type not in ONNX_TYPES or len(entries[0].shape) != 4:
            found = ", ".join(f"{entry.name} {entry.type} {entry.shape}" for entry in entries)
            raise UserError(f"--backend {path}: must have one input of images (N, 3, H, W), but has {found}")
        self._session, self._input, self._dtype = session, entries[0].name, ONNX_TYPES[entries[0].type]
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


def _plugin(suffixes: tuple[str, ...], load: Callable[..., tuple[str, Network, str]],
            title: str) -> Callable[[str], Callable[[], ExtractorKind] | None]:
    """Returns a function that makes the records of files with these suffixes."""
    def plugin(word: str) -> Callable[[], ExtractorKind] | None:
        return partial(_record, word, load, title) if Path(word).suffix.lower() in suffixes else None
    return plugin


def _not_named(**_: str) -> FeatureExtractor:
    raise UserError("--backend: must name the file")


TORCHSCRIPT_KIND = ExtractorKind("FILE.pt", "a TorchScript network of yours, with FILE.yaml beside it", _not_named,
                                 0, 0, 0, plugin=_plugin(TORCHSCRIPT, _load_torchscript, "a TorchScript network"))
ONNX_KIND = ExtractorKind("FILE.onnx", "an ONNX network of yours, with FILE.yaml beside it", _not_named,
                          0, 0, 0, plugin=_plugin(ONNX, _load_onnx, "an ONNX network"))
