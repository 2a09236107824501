"""The golden cases: outputs of the official code, kept in a folder beside the repository (../shared/golden)."""

import importlib.util
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"

needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"the golden cases are not at {GOLDEN}")


def cases(pattern):
    """Paths of the golden files of that pattern, like unet_*.npz; none where the folder is absent."""
    return sorted(GOLDEN.glob(pattern))


def _load_fill():
    if not GOLDEN.is_dir():
        return None
    spec = importlib.util.spec_from_file_location("golden_fill", GOLDEN / "fill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_fill = _load_fill()


def fill(module, salt=""):
    """`module` with the weights of the golden cases, in eval mode."""
    return _fill.fill(module, salt)


def noise(shape, seed):
    """The standard normal input of a golden case."""
    return _fill.noise(shape, seed)


def relative_error(actual, expected):
    """Largest difference of two arrays or of two tensors, as a share of the largest expected value."""
    return float(abs(actual - expected).max() / abs(expected).max())
