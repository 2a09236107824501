"""The files that a row of a table needs: which are missing, what brings them, and where depth maps are looked for."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from guided_diffusion.checkpoint import on_disk
from guided_diffusion.presets import find_preset, released_names
from guided_diffusion.runs.record import MODEL_FLAG
from guided_diffusion.runs.sample import SamplingRun

from ..extractors import find_extractor
from ..extractors.inception_graph import FILE_NAME, is_here
from ..extractors.own import NoSuchNetwork
from ..references import find_reference, reference_names
from .tables import DFID, Row


@dataclass(frozen=True)
class MissingFile:
    """A file that a row needs and has not, and what brings it. blocks: it is needed before the first image."""

    file: str
    remedy: str
    blocks: bool = True

    def __str__(self) -> str:
        return f"{self.file}: {self.remedy}"


def missing_files(row: Row, references: str | Path, inception: str = "") -> list[MissingFile]:
    """Returns the files that the row needs and has not.

    references: folder of reference batches; inception: as `--inception`.
    """
    return [*_missing_checkpoints(row.run), *_missing_reference(row, references), *_missing_network(row),
            *_missing_inception(row, inception), *_missing_depth(row, references)]


def depth_reference(row: Row, references: str | Path) -> Path:
    """Returns the file of depth maps of real images that a row's dFID compares with."""
    return Path(references) / f"{Path(row.run.sample.model_path).stem}_depth.npz"


def depth_maps(row: Row) -> Path:
    """Returns the file of depth maps of a row's samples."""
    return row.run.out / "depth.npz"


def needs_depth_maps(row: Row) -> bool:
    """Whether the user has to estimate depth for a row's dFID, as its extractor does not compute it."""
    return DFID in row.published and DFID not in row.evaluation.words


def _missing_checkpoints(run: SamplingRun) -> Iterator[MissingFile]:
    for flag, path in run.checkpoints().items():
        if not path or ("://" not in path and not Path(on_disk(path)).is_file()):
            yield MissingFile(path or f"--{flag}", _remedy(run, flag, Path(path).stem))
    for method in run.active:
        for path in method.beside().values():
            if not Path(path).is_file():
                yield MissingFile(path, "says how images become the input of the network beside it, write it "
                                  "(docs/clean_classifiers.md)")


def _remedy(run: SamplingRun, flag: str, stem: str) -> str:
    """Returns what brings the checkpoint of a flag."""
    name = run.sample.model if flag == MODEL_FLAG and run.sample.model in released_names() else stem
    if name in released_names():
        return f"python scripts/fetch_models.py {find_preset(name).name}"
    made = next((method.remedies[flag] for method in run.active if flag in method.remedies), None)
    return made or "no such checkpoint was released: train one, or name yours in the row's file"


def _missing_reference(row: Row, references: str | Path) -> Iterator[MissingFile]:
    word = row.evaluation.reference
    if word and find_reference(word, references) is None:
        known = Path(word).stem in reference_names()
        yield MissingFile(str(Path(references) / word),
                          f"python scripts/fetch_references.py {Path(word).stem} --out {shlex.quote(str(references))}"
                          if known else "name the folder that holds it with --references")


def _missing_network(row: Row) -> Iterator[MissingFile]:
    try:
        find_extractor(row.evaluation.backend)
    except NoSuchNetwork as error:
        yield MissingFile(row.evaluation.backend, error.remedy)


def _missing_inception(row: Row, inception: str) -> Iterator[MissingFile]:
    needed, network = row.evaluation.reference or needs_depth_maps(row), row.evaluation.kind
    if needed and network and network.is_inception and not is_here(inception or None):
        yield MissingFile(inception or FILE_NAME, "downloaded when the table is begun, or name it with --inception",
                          blocks=bool(inception))


def _missing_depth(row: Row, references: str | Path) -> Iterator[MissingFile]:
    if not needs_depth_maps(row):
        return
    for file, what in ((depth_reference(row, references), "of real images"), (depth_maps(row), "of the samples")):
        if not file.is_file():
            yield MissingFile(str(file), f"depth {what}, which a network of your choice estimates "
                              "(scripts/depth_fid.py)", blocks=False)
