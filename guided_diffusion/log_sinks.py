"""Where a training's log goes beside progress.csv: TensorBoard's files, and Weights & Biases.

Both write into the folder of the run. Nothing leaves the machine unless `--log_online True` asks for it.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from .errors import UserError
from .files import reason, write_text
from .options import comma_separated, nearest

PROJECT = "guided-pixels"       # of Weights & Biases


class Sink(Protocol):
    """A log beside progress.csv."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the values of a row."""

    def picture(self, step: int, name: str, path: Path) -> None:
        """Shows a PNG file, whose row follows or does not."""

    def close(self) -> None:
        """Ends the log."""


class TensorBoardSink:
    """An event file in the folder `tensorboard` of a run, without TensorFlow, which takes seconds to load.

    Another start writes another file; what others hold after the step that it goes on from is hidden.
    """

    package = "tensorboard"

    def __init__(self, out: Path, resume_step: int, config: Mapping[str, Any], online: bool) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        path = out / "tensorboard" / f"events.out.tfevents.{time.time_ns()}"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = RecordWriter(path.open("xb"))
        self._add(file_version="brain.Event:2")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(step=resume_step + 1, session_log=start)

    def _add(self, **fields: Any) -> None:
        self._file.write(self._event(wall_time=time.time(), **fields).SerializeToString())

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes a scalar for each value."""
        scalars = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(step=step, summary=self._summary(value=scalars))
        self._file.flush()

    def picture(self, step: int, name: str, path: Path) -> None:
        """Writes the picture into the event file."""
        with Image.open(path) as picture:
            width, height = picture.size
        image = self._summary.Image(width=width, height=height, colorspace=3, encoded_image_string=path.read_bytes())
        self._add(step=step, summary=self._summary(value=[self._summary.Value(tag=name, image=image)]))
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


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

        self._image = wandb.Image
        self._run = wandb.init(
            project=PROJECT, dir=str(out), id=_run_id(out / "wandb" / "id.txt"), name=out.name, resume="allow",
            mode="online" if online else "offline", config=dict(config),
            settings=wandb.Settings(console="off", disable_git=True, save_code=False, silent=True))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the values of a step."""
        self._run.log(dict(values), step=step)

    def picture(self, step: int, name: str, path: Path) -> None:
        """Copies the picture into the folder of the run."""
        self._run.log({name: self._image(str(path))}, step=step)

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
            raise UserError(f"--log {text}: needs the package {SINKS[word].package}: pip install "
                            "'guided-pixels[log]'")


def open_sinks(text: str, out: Path, resume_step: int, config: Mapping[str, Any], online: bool) -> list[Sink]:
    """The sinks of `--log`, for a run in the folder `out` that begins or goes on after a step.

    Raises UserError where one cannot be opened: the folder is not writable, or no one is logged in at a server.
    """
    sinks: list[Sink] = []
    for word in parse_sinks(text):
        try:
            sinks.append(SINKS[word](out, resume_step, config, online))
        except Exception as error:          # each package has errors of its own
            raise UserError(f"--log {word}{' --log_online True' if online else ''}: cannot be opened "
                            f"({reason(error)})") from None
    return sinks


def _run_id(path: Path) -> str:
    """The id of the run, drawn when it begins."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, secrets.token_hex(8))
    return path.read_text(encoding="utf-8").strip()
