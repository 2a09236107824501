"""Extractors that users bring, by the words of --backend: a network's file, or a function.

Neither a file nor a module is looked at before its record is asked for, and no network is loaded before it is used.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

from guided_diffusion.errors import UserError
from guided_diffusion.foreign import reading
from guided_diffusion.functions import is_function
from guided_diffusion.network_inputs import read_preparation, settings_beside
from guided_diffusion.torchscript import SUFFIXES as TORCHSCRIPT

from ..features import FeatureExtractor
from ..metrics.comparison import Feature
from .base import ExtractorKind

SUFFIXES = {"torchscript": TORCHSCRIPT, "onnx": (".onnx",)}      # by the file that loads
DEPTH_NETWORK = ".safetensors"


class NoSuchNetwork(UserError):
    """The file that --backend names is not there. remedy: what brings it."""

    def __init__(self, word: str, remedy: str) -> None:
        super().__init__(f"--backend {word}: no such file")
        self.remedy = remedy


def _file_record(word: str, loader: str) -> ExtractorKind:
    """Returns what is known of a network's file; UserError where it or its YAML file cannot be used."""
    path = Path(word)
    with reading(path, "cannot be read", flag="--backend"):
        if not path.is_file():
            raise NoSuchNetwork(word, f"export one ({loader}), or name yours as backend in the row's file")
        settings = settings_beside(path, "--backend")
    preparation = read_preparation(settings)
    outputs = frozenset(Feature("probabilities" if name == "logits" else name) for name, _ in preparation.outputs)

    def load(*, inception: str = "", device: str = "", dtype: str = "float32") -> FeatureExtractor:
        extractor: FeatureExtractor = importlib.import_module(f"{__package__}.{loader}").load(path, preparation, device)
        return extractor

    return ExtractorKind(word, f"a network of yours ({loader})", load, 0, 0, 0, outputs=outputs,
                         estimates_depth=Feature.DEPTH in outputs, is_own=True)


def _depth_record(word: str) -> ExtractorKind:
    """Returns what is known of a depth network that scripts/train_scenes.py wrote; UserError where there is none."""
    path = Path(word)
    if not path.is_file():
        raise NoSuchNetwork(word, "scripts/train_scenes.py trains one (docs/dag.md)")

    def load(*, inception: str = "", device: str = "", dtype: str = "float32") -> FeatureExtractor:
        extractor: FeatureExtractor = importlib.import_module(f"{__package__}.scenes").load_own(path, device)
        return extractor

    return ExtractorKind(word, "a depth network of yours", load, 0, 0, 0, estimates_depth=True, is_own=True,
                         outputs=frozenset({Feature.POOLED, Feature.SPATIAL, Feature.DEPTH}))


def _finder_of_depth_networks(word: str) -> Callable[[], ExtractorKind] | None:
    return partial(_depth_record, word) if Path(word).suffix.lower() == DEPTH_NETWORK else None


def _function_record(word: str) -> ExtractorKind:
    """Returns what is known of a function; UserError where it is not there."""
    from .function import function_record

    return function_record(word)


def _finder_of_files(loader: str, word: str) -> Callable[[], ExtractorKind] | None:
    return partial(_file_record, word, loader) if Path(word).suffix.lower() in SUFFIXES[loader] else None


def _finder_of_functions(word: str) -> Callable[[], ExtractorKind] | None:
    return partial(_function_record, word) if is_function(word) else None


def _not_named(*, inception: str = "", device: str = "", dtype: str = "float32") -> FeatureExtractor:
    raise UserError("--backend: must name your file or function itself")


KINDS = (
    ExtractorKind("FILE.pt", "your own network in TorchScript, with FILE.yaml beside it", _not_named, 0, 0, 0,
                  plugin=partial(_finder_of_files, "torchscript")),
    ExtractorKind("FILE.onnx", "your own network in ONNX, with FILE.yaml beside it", _not_named, 0, 0, 0,
                  plugin=partial(_finder_of_files, "onnx")),
    ExtractorKind("FILE.safetensors", "your own depth network, as scripts/train_scenes.py writes it", _not_named,
                  0, 0, 0, plugin=_finder_of_depth_networks),
    ExtractorKind("MODULE:FUNCTION", "what your own function returns", _not_named, 0, 0, 0,
                  plugin=_finder_of_functions),
)
