"""What starts several ranks."""

import importlib.util
import sys
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
needs_mpi = pytest.mark.skipif(not ((BIN / "mpiexec").exists() and importlib.util.find_spec("mpi4py")),
                               reason="mpiexec or mpi4py is not installed: the extra `mpi`")
