"""Where a training's log goes beside progress.csv: TensorBoard's files, and Weights & Biases.

Both write into the folder of the run. Nothing leaves the machine unless `--log_online True` asks for it.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from .errors import UserError
from .files import write_text
from .options import comma_separated, nearest

PROJECT = "guided-pixels"       # of Weights & Biases


class Sink(Protocol):
    """A log beside progress.csv."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the values of a row."""

    def close(self) -> None:
        """Ends the log."""


class TensorBoardSink:
    """Event files in the folder `tensorboard` of a run; what follows the step that a run goes on from is hidden."""

    package = "tensorboard"

    def __init__(self, out: Path, resume_step: int, config: Mapping[str, Any], online: bool) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=resume_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes a scalar for each value."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


class WandbSink:
    """A run of Weights & Biases in the folder `wandb` of a run, which goes on under the same id.

    online: send it to the server while it goes on; else `wandb sync` can do so later. The package then does not report
    its own errors to its makers, either.
    """

    package = "wandb"

    def __init__(self, out: Path, resume_step: int, config: Mapping[str, Any], online: bool) -> None:
        if not online:
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._run = wandb.init(
            project=PROJECT, dir=str(out), id=_run_id(out / "wandb" / "id.txt"), name=out.name, resume="allow",
            mode="online" if online else "offline", config=dict(config),
            settings=wandb.Settings(console="off", disable_git=True, save_code=False, silent=True))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the values of a step."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


SINKS: dict[str, type[TensorBoardSink | WandbSink]] = {"tensorboard": TensorBoardSink, "wandb": WandbSink}


def parse_sinks(text: str) -> list[str]:
    """The words of `--log`, each once; raises UserError for one that is no sink."""
    words = list(dict.fromkeys(comma_separated(text)))
    for word in words:
        if word not in SINKS:
            raise UserError(f"--log {text}: {word!r} is none of {', '.join(SINKS)}{nearest(word, SINKS)}")
    return words


def check_sinks(text: str) -> None:
    """Raises UserError where a package that `--log` needs is not installed."""
    for word in parse_sinks(text):
        if importlib.util.find_spec(SINKS[word].package) is None:
            raise UserError(f"--log {text}: needs the package {SINKS[word].package}: install the extra `log`")


def open_sinks(text: str, out: Path, resume_step: int, config: Mapping[str, Any], online: bool) -> list[Sink]:
    """The sinks of `--log`, for a run in the folder `out` that begins or goes on after a step."""
    return [SINKS[word](out, resume_step, config, online) for word in parse_sinks(text)]


def _run_id(path: Path) -> str:
    """The id of the run, drawn when it begins."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, secrets.token_hex(8))
    return path.read_text(encoding="utf-8").strip()
