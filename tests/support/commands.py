"""Running the scripts as a user does, in this process or in others."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

REPOSITORY = Path(__file__).parents[2]
PATIENCE = 600           # seconds: what is right is right on a slow or busy machine, too; this ends what hangs


def flags(options):
    """The command line of a dict of options: --name value ..."""
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def call(script, *arguments):
    """Runs scripts/`script`.py, or a `script` in another/folder, in this process, and returns its exit code."""
    path = str(REPOSITORY / f"{script if '/' in script else f'scripts/{script}'}.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [path, *map(str, arguments)])
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as end:
            return end.code or 0
    return 0


def execute(*command, **environment):
    """Runs a command on one thread for each process, and returns how it ended with stdout and stderr."""
    return finish(command, cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


def finish(command, **how):
    """Runs a command as `subprocess.run` does with its output as text; fails, with what it said, where it hangs."""
    try:
        return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=PATIENCE, **how)
    except subprocess.TimeoutExpired as hung:
        said = b"".join(part[-2000:] for part in (hung.stdout, hung.stderr) if part).decode(errors="replace")
        pytest.fail(f"{' '.join(map(str, command))}: did not end within {PATIENCE} s; it said: {said or 'nothing'}")


def samples_in(out):
    """The images and the labels (None where there are none) of the one sample file in a folder."""
    path, = Path(out).glob("samples_*.npz")
    with np.load(path, allow_pickle=False) as file:
        return file["arr_0"], file.get("arr_1")
