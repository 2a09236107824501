"""Training logs: the mean of each named value since the last line, as a log line and as a row of progress.csv.

The same row goes to further sinks, where there are any (`log_sinks`).
"""

from __future__ import annotations

import csv
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import check_folder, open_own, reason, write_csv
from .late import Tensor, torch
from .launchers import is_main
from .log_sinks import Sink, open_sinks
from .places import LOGDIR

_log = logging.getLogger(__name__)

_folder: list[Path] = []        # of `log`, one at most

Totals = dict[str, tuple[Tensor | float, int]]

IN_THE_WAY = "; move it away, or name another --out"       # of a training that would write there


def totals_as_tensors(totals: Totals) -> dict[str, Tensor]:
    """What `MetricLogger.unwritten` gives, as the state of a training keeps it: (2,) float64 each."""
    return {name: torch.tensor([float(total), count], dtype=torch.float64) for name, (total, count) in totals.items()}


def totals_of_tensors(tensors: Mapping[str, Tensor]) -> Totals:
    """The other way; raises ValueError and the like for tensors of something else."""
    return {name: (float(total), int(count)) for name, (total, count) in tensors.items()}


def configure(dir: str | Path | None = None) -> None:
    """What official scripts call first: `log` writes from then on, also into log.txt in the folder `dir`.

    dir: None for the one that the variable OPENAI_LOGDIR names, else a new one in the folder of temporary files, which
    a line says; there, as in the official code, each rank has its own. Raises UserError where none can be written.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    dir = dir or os.environ.get(LOGDIR)
    _folder[:] = [check_folder("dir", dir or _temporary())]
    if not dir:
        log(f"{LOGDIR} is not set: the folder is {_folder[0]}")


def _temporary() -> str:
    try:
        return tempfile.mkdtemp(prefix="openai-")
    except OSError as error:
        raise UserError(f"{LOGDIR}: is not set, and no folder for temporary files can be written ({reason(error)}): "
                        "name a folder with it") from None


def get_dir() -> str:
    """The folder of `configure`, which is called with its defaults where it was not yet."""
    if not _folder:
        configure()
    return str(_folder[0])


def log(*words: object) -> None:
    """Writes a line, on the first rank alone."""
    line = " ".join(map(str, words))
    if not is_main():
        return
    _log.info(line)
    for folder in _folder:
        with os.fdopen(open_own(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), "a") as file:
            file.write(f"{line}\n")


info = warn = error = log           # the official names, which write the line alone, too


class MetricLogger:
    """Collects values and writes their means, one row per call of `write`.

    folder: where progress.csv is kept, or None to keep no log (every rank but the first).
    resume_step: rows after this step are dropped from an existing progress.csv: the run repeats them.

    Each row also goes to the attribute `sinks`, of which there are none at first.

    Raises UserError where progress.csv is there and is no such log, or cannot be written.
    """

    def __init__(self, folder: str | os.PathLike | None, resume_step: int = 0) -> None:
        self._path = Path(folder) / "progress.csv" if folder is not None else None
        self._totals: Totals = {}
        self._columns: list[str] = []
        self.sinks: Sequence[Sink] = ()
        if self._path and self._path.exists():
            self._columns, rows = _read(self._path)
            write_csv(self._path, [row for row in rows if _step(self._path, row) <= resume_step], self._columns)

    def add(self, name: str, values: Tensor | float) -> None:
        """Adds one value, or each element of a tensor, to the mean of `name`."""
        if self._path:
            total, count = self._totals.get(name, (0.0, 0))
            values = torch.as_tensor(values).detach().double()
            self._totals[name] = total + values.sum(), count + values.numel()      # waits for no device

    @property
    def unwritten(self) -> Totals:
        """The sum and the number of the values since the last row, by name."""
        return dict(self._totals)

    def take(self, unwritten: Totals) -> None:
        """Goes on from what was `unwritten` in an earlier log of the same training."""
        if self._path:
            self._totals = dict(unwritten)

    def write(self, step: int, **exact: float) -> None:
        """Writes a row: `step`, the `exact` values and the means of what was added since the last one."""
        if not self._path:
            return
        means = {name: float(total) / count for name, (total, count) in sorted(self._totals.items())}
        self._totals.clear()
        row = {name: _short(value) for name, value in {"step": step, **exact, **means}.items()}
        _log.info(" | ".join(f"{name} {value}" for name, value in row.items()))
        new_columns = [name for name in row if name not in self._columns]
        if new_columns:
            rows = _read(self._path)[1] if self._path.exists() else []
            self._columns += new_columns
            write_csv(self._path, rows, self._columns)
        try:
            with os.fdopen(open_own(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "a", newline="") as file:
                csv.DictWriter(file, self._columns, lineterminator="\n").writerow(row)
        except OSError as error:
            raise UserError(f"{self._path}: cannot be written ({reason(error)})") from None
        for sink in self.sinks:
            sink.write(step, {**exact, **means})

    def add_gradient(self, norm: float, max_norm: float) -> None:
        """Adds the norm of a step's gradient, and whether it was shortened to `max_norm`; 0: none is."""
        self.add("grad_norm", norm)
        if max_norm:
            self.add("clipped", float(norm > max_norm))

    def picture(self, step: int, name: str, path: Path) -> None:
        """Shows a PNG file in the sinks."""
        for sink in self.sinks:
            sink.picture(step, name, path)

    def close(self) -> None:
        """Ends the sinks."""
        for sink in self.sinks:
            sink.close()


def open_log(folder: Path, resume_step: int, sinks: str, config: Mapping[str, Any], online: bool) -> MetricLogger:
    """The log of a training in a folder, with the sinks of `--log`; arguments and errors are those of `open_sinks`."""
    logger = MetricLogger(folder, resume_step)      # so that a log that is none is found before sinks are opened
    logger.sinks = open_sinks(sinks, folder, resume_step, config, online)
    return logger


def read_log(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The columns and whole rows of a progress.csv; a last line that a kill cut short is left out.

    Raises UserError where it is no such log, or cannot be read.
    """
    columns, rows = _read(path, "")
    for row in rows:
        _step(path, row, "")
    return columns, rows


def _short(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6g}"


def _step(path: Path, row: dict[str, str], remedy: str = IN_THE_WAY) -> int:
    """The step of a row; raises UserError, which ends in the remedy, where it is not one of a training's log."""
    try:
        if None in row or None in row.values():         # more or fewer values than columns
            raise ValueError
        return int(row["step"])
    except (KeyError, ValueError):
        raise _foreign(path, remedy) from None


def _foreign(path: Path, remedy: str) -> UserError:
    return UserError(f"{path}: is not the log of a training, or is damaged{remedy}")


def _read(path: Path, remedy: str = IN_THE_WAY) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and whole rows of a CSV file; a last line that a kill cut short is left out."""
    try:
        text = path.read_text(encoding="utf-8")
        reader = csv.DictReader(text[:text.rfind("\n") + 1].splitlines())
        return list(reader.fieldnames or []), list(reader)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)})") from None
    except (ValueError, csv.Error):
        raise _foreign(path, remedy) from None
