"""What starts several ranks."""

import importlib.util
import signal
import sys
from pathlib import Path

import pytest


def usual_signals():
    """Handles signals as a program in a terminal does, also where whoever runs the tests ignores them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


BIN = Path(sys.executable).parent
needs_mpi = pytest.mark.skipif(not ((BIN / "mpiexec").exists() and importlib.util.find_spec("mpi4py")),
                               reason="mpiexec or mpi4py is not installed: the extra `mpi`")
