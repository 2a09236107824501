"""The golden cases: outputs of the official code.

The repository holds one of each kind in tests/golden. Where the full set lies beside the checkout (../shared/golden),
the tests run on that one. `GOLDEN_CASES=DIR` names another folder.
"""

import importlib.util
import json
import os
from pathlib import Path

BUNDLED = Path(__file__).parents[1] / "golden"
FULL = Path(__file__).parents[3] / "shared" / "golden"
GOLDEN = Path(os.environ.get("GOLDEN_CASES") or (FULL if FULL.is_dir() else BUNDLED)).resolve()


def cases(pattern):
    """Paths of the golden files of that pattern, like unet_*.npz."""
    return sorted(GOLDEN.glob(pattern))


def released_checkpoints():
    """Of each released checkpoint: its kind, all its flags, its parameters, and the names and shapes of its weights."""
    guided = json.loads((GOLDEN / "checkpoints.json").read_text())
    improved = json.loads((GOLDEN / "checkpoints_improved.json").read_text())
    return guided | {name: {**entry, "flags": entry["all_flags"]} for name, entry in improved.items()}


def _load_fill():
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
