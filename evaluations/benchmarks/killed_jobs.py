"""The kinds of jobs that a trial of reliability kills: sampling, training and evaluation, each with its own command."""

from __future__ import annotations

import csv
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from guided_diffusion.checkpoint import read_metadata
from guided_diffusion.npz import write_batch
from guided_diffusion.options import Options, batch_option, option
from guided_diffusion.places import PACKAGE, command_file

SIDE = 16           # pixels of the images that are trained on
TRAINING = {"image_size": SIDE, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2", "num_heads": 2,
            "attention_resolutions": "8", "dropout": 0.1, "diffusion_steps": 100,
            "schedule_sampler": "loss-second-moment", "ema_rate": "0.9,0.99", "log_interval": 1}
METRICS = "fid,sfid,is,precision,recall,kid"


@dataclass(frozen=True)
class JobOptions(Options):
    """The jobs that are killed."""

    model: str = option("fmnist32", "sampling: a bundled model")
    num_samples: int = option(96, "sampling and evaluation: number of images", minimum=1)
    batch_size: int = batch_option(4, "images in a chunk, and in a batch of each rank")
    timestep_respacing: str = option("10", "sampling: steps of each image")
    train_steps: int = option(60, "training: steps", minimum=1)
    save_interval: int = option(7, "training: steps between two saves", minimum=1)


class KilledJob(ABC):
    """A command that writes a folder, and what a killed one left there.

    options: sizes. folder: keeps what the command reads, the same for all jobs of a trial.
    """

    unit: ClassVar[str]             # of what is done, in the plural
    total: int                      # what `done` comes to; 0: it says too little to choose a moment by
    piece: int = 1                  # what one stamped file holds of it
    aside: ClassVar[str] = ""       # a folder that only restarted jobs keep

    def __init__(self, options: JobOptions, folder: Path) -> None:
        self.options, self.folder = options, folder

    @abstractmethod
    def command(self, out: Path, again: bool) -> list[str]:
        """The words of the command that works in `out`; again: after a kill."""

    @abstractmethod
    def done(self, out: Path) -> int:
        """How much of the work lies on the disk."""

    @abstractmethod
    def finished(self, out: Path) -> bool:
        """Whether the job had nothing left to do."""

    @abstractmethod
    def results(self, out: Path) -> list[Path]:
        """The files that must be the same, byte by byte, whatever was killed."""

    @abstractmethod
    def prepare(self) -> None:
        """Writes what the command reads."""

    def stamps(self, out: Path) -> Mapping[Path, int]:
        """When each file of finished work was written, in nanoseconds."""
        return {}

    def unsaved(self, out: Path) -> int:
        """How much of what is done a restart has to do again."""
        return 0


def _flags(options: Mapping[str, Any]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def _stamps(files: list[Path]) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in files}


class SamplingJob(KilledJob):
    """Images of a bundled model."""

    unit, aside = "images", "shards"

    def __init__(self, options: JobOptions, folder: Path) -> None:
        super().__init__(options, folder)
        self.total, self.piece = options.num_samples, options.batch_size

    def prepare(self) -> None:
        """Has nothing to write: the model is bundled."""

    def command(self, out: Path, again: bool) -> list[str]:
        """The words of the command; a restart keeps the chunks, so that those made twice can be counted."""
        sizes = {name: getattr(self.options, name)
                 for name in ("model", "num_samples", "batch_size", "timestep_respacing")}
        return [str(command_file("image_sample")), *_flags({**sizes, "out": out, "keep_shards": again})]

    def done(self, out: Path) -> int:
        """The images in finished chunks."""
        return min(len(self.stamps(out)) * self.piece, self.total)

    def finished(self, out: Path) -> bool:
        """Whether the chunks have been joined and removed."""
        return bool(self.results(out)) and not self.stamps(out)

    def results(self, out: Path) -> list[Path]:
        """The file of samples."""
        return list(out.glob("samples_*.npz"))

    def stamps(self, out: Path) -> Mapping[Path, int]:
        """When each chunk was written."""
        return _stamps(list((out / "shards").glob("[0-9]*.npz")))


class TrainingJob(KilledJob):
    """The training of a small network with dropout on random images."""

    unit = "steps"

    def __init__(self, options: JobOptions, folder: Path) -> None:
        super().__init__(options, folder)
        self.total = options.train_steps

    def prepare(self) -> None:
        """Writes the images."""
        images = np.random.default_rng(0).integers(0, 256, (64, SIDE, SIDE, 3), np.uint8)
        write_batch(self.folder / "images.npz", {"arr_0": images})

    def command(self, out: Path, again: bool) -> list[str]:
        """The words of the command, the same after a kill."""
        return [str(command_file("image_train")), *_flags({
            **TRAINING, "data_dir": self.folder / "images.npz", "out": out, "batch_size": self.options.batch_size,
            "lr_anneal_steps": self.total, "save_interval": self.options.save_interval})]

    def done(self, out: Path) -> int:
        """The steps in the log."""
        try:
            with (out / "progress.csv").open(newline="") as file:
                return max(int(row["step"]) for row in csv.DictReader(file))
        except (OSError, ValueError, KeyError, TypeError):         # there is none, or its last line is half written
            return self._saved(out)

    def finished(self, out: Path) -> bool:
        """Whether the last step was saved."""
        return self._saved(out) == self.total

    def results(self, out: Path) -> list[Path]:
        """The weights, their moving averages, and the state."""
        return list(out.glob("*.safetensors"))

    def unsaved(self, out: Path) -> int:
        """The steps after the last save."""
        return max(0, self.done(out) - self._saved(out))

    @staticmethod
    def _saved(out: Path) -> int:
        state = out / "state.safetensors"
        return int(read_metadata(state)["step"]) if state.exists() else 0


class EvaluationJob(KilledJob):
    """The evaluation of a file of random images against another, by the bundled classifier of Fashion-MNIST."""

    unit = "files of features"
    total = 0

    def prepare(self) -> None:
        """Writes both files of images."""
        chance = np.random.default_rng(0)
        for name in ("reference", "sample"):
            images = chance.integers(0, 256, (self.options.num_samples, 32, 32, 3), np.uint8)
            write_batch(self.folder / f"{name}.npz", {"arr_0": images})

    def command(self, out: Path, again: bool) -> list[str]:
        """The words of the command, the same after a kill."""
        return [str(PACKAGE.parent / "evaluations" / "evaluator.py"), str(self.folder / "reference.npz"),
                str(self.folder / "sample.npz"), *_flags({
                    "backend": "fashion_mnist", "metrics": METRICS, "bootstrap": 20, "cache": out / "features",
                    "batch_size": self.options.batch_size, "json": out / "results.json"})]

    def done(self, out: Path) -> int:
        """The files of features that are in use."""
        return len(self.stamps(out))

    def finished(self, out: Path) -> bool:
        """Whether the results were written."""
        return (out / "results.json").exists()

    def results(self, out: Path) -> list[Path]:
        """The results, and the features."""
        return [*out.glob("results.json"), *self.stamps(out)]

    def stamps(self, out: Path) -> Mapping[Path, int]:
        """When each file of features was written."""
        return _stamps([path for path in (out / "features").rglob("*.npy")
                        if not any(part.startswith(".") for part in path.relative_to(out).parts)])


JOBS: dict[str, type[KilledJob]] = {"sampling": SamplingJob, "training": TrainingJob, "evaluation": EvaluationJob}
