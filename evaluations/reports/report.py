"""The page of a folder that a command made: written where there is none, and said where it is.

Tables, benches and explorers write their pages themselves. Those of other folders are written from what lies there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guided_diffusion.errors import UserError
from guided_diffusion.files import check_ending, check_writable, reason
from guided_diffusion.foreign import read_json
from guided_diffusion.npz import BatchFile
from guided_diffusion.options import Options, nearest, option
from guided_diffusion.runs.record import READ_ERRORS

from ..bench.bench import BenchOptions
from ..bench.settings import bench_names
from ..pages.page import write_page
from ..reproduction.pictures import Pictures
from ..reproduction.report import write_report
from ..reproduction.reproduce import PAGE, SHOWN_IMAGES, ReproduceOptions
from ..reproduction.tables import table_names
from .content import Content, content_page
from .folders import of_likelihood, of_samples, of_study, of_training

OWN_PAGES = ("explore.html",)               # that commands write, and this one does not
TABLE = "table.json"
PARTS = ("base", "upsampler*", "report", "search")      # folders in those of a cascade and of a bench


@dataclass(frozen=True)
class ReportOptions(Options):
    """The page."""

    out: str = option("", f"file to write the page to; unset: {PAGE} in the folder")


def write_pages(words: Sequence[str], options: ReportOptions) -> str:
    """Writes the pages of folders as far as they are missing or `--out` is given; returns a line of where each is.

    words: folders, or names of tables and benches whose folders are where their commands put them. The page of a run, a
    training or a study is written anew, as more may lie there now. Raises UserError for a folder that no command made.
    """
    folders = [folder for word in words for folder in _parts(_folder(word))]
    if options.out:
        if len(folders) > 1:
            raise UserError(f"--out {options.out}: is one file, and there are {len(folders)} pages to write")
        check_ending("--out", options.out, ".html", ".htm")
        check_writable("--out", options.out, parents=True)
    return "\n".join(f"page: {_page_of(folder, options)}" for folder in folders)


def _folder(word: str) -> Path:
    """The folder that a word names."""
    if Path(word).is_dir():
        return Path(word)
    for names, out in ((table_names(), ReproduceOptions().out), (bench_names(), BenchOptions().out)):
        folder = Path(out) / word
        if word in names and folder.is_dir():
            return folder
    known = [*table_names(), *bench_names()]
    raise UserError(f"{word}: is neither a folder nor a table or bench that was run here{nearest(word, known)}")


def _parts(folder: Path) -> Iterator[Path]:
    """The folder itself, or those in it where it is that of a cascade or of a bench."""
    parts = [part for pattern in PARTS for part in sorted(folder.glob(pattern)) if part.is_dir() and _is_known(part)]
    if parts and not _has_page(folder) and _kind(folder) in (None, of_study):
        yield from parts
    else:
        yield folder


def _page_of(folder: Path, options: ReportOptions) -> Path:
    """Writes the page of a folder where that is to be done; returns where it is."""
    for name in OWN_PAGES:
        if (folder / name).is_file():
            return folder / name
    path = Path(options.out) if options.out else folder / PAGE
    if (folder / TABLE).is_file():
        if options.out or not path.is_file():
            _write_table(folder, path)
        return path
    kind = _kind(folder)
    if kind is None:
        raise UserError(f"{folder}: holds no finished run, training, table or study that a page can show")
    try:
        content = kind(folder)
    except READ_ERRORS as error:
        raise UserError(f"{folder}: what lies there cannot be read ({reason(error)})") from None
    write_page(path, lambda quality: content_page(content, quality), lambda size, limit: UserError(
        f"{folder}: its page would take {size:,} bytes, and the limit is {limit:,}"))
    return path


def _write_table(folder: Path, path: Path) -> None:
    """Writes the page of a table anew, from its table.json and the samples that are still there."""
    from jinja2 import TemplateError

    results = read_json(folder / TABLE, lambda found: bool(found["rows"]) and bool(found["sections"]))
    try:
        write_report(path, results, Pictures(list(_grids(folder, results))))
    except (LookupError, TypeError, ValueError, AttributeError, TemplateError):
        raise UserError(f"{folder / TABLE}: was written by another version; the command of the table writes its page "
                        "again") from None


def _grids(folder: Path, results: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The first images of the rows whose samples are still there, by the titles of their sections."""
    for section in results["sections"]:
        found = [results["rows"][row["row"]] for row in section["rows"]]
        rows = {row["title"]: BatchFile(folder / row["samples"]).first(SHOWN_IMAGES) for row in found
                if row["samples"] and (folder / row["samples"]).is_file()}
        if rows:
            yield section["title"], rows


def _is_known(folder: Path) -> bool:
    """Whether a folder has a page, or can have one."""
    return _has_page(folder) or _kind(folder) is not None


def _has_page(folder: Path) -> bool:
    """Whether a command writes a page into this folder."""
    return any((folder / name).is_file() for name in (TABLE, *OWN_PAGES))


def _kind(folder: Path) -> Callable[[Path], Content] | None:
    """What reads a folder; None where nothing does."""
    record, config = _json(folder / "run.json"), _json(folder / "config.json")
    if "samples" in record:
        return of_samples
    if "bits_per_dimension" in record:
        return of_likelihood
    if {"model", "training"} <= config.keys():
        return of_training
    pictured = any(path.suffix in (".png", ".md", ".csv") for path in folder.iterdir() if path.is_file())
    return of_study if pictured else None


def _json(path: Path) -> Mapping[str, Any]:
    """What such a file says; nothing where there is none. Raises UserError where it is damaged."""
    found = read_json(path, lambda content: True) if path.is_file() else {}
    return found if isinstance(found, dict) else {}
