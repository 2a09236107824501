"""The explorer's page: recordings as one HTML file, which holds its pictures and its script and loads nothing.

What stands in it is prepared here; how it looks and moves is in templates/.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from guided_diffusion.errors import UserError
from guided_diffusion.pixels import to_rounded_uint8, unit_to_uint8

from ..pages import page as pages
from ..pages.page import LIMIT, lossy, pages_of
from ..pages.pictures import data_uri
from .recording import Recording

STATE = "x_(t\N{NON-BREAKING HYPHEN}1)"
LETTERS = "AB"
PSI_MOST = 2.5                  # up to which a reader may move psi, in hundredths; further where a method's lies beyond

SMALLER = "record fewer images, or fewer steps with --timestep_respacing"

OF_EPS = ("contrast", "transform")          # kinds of terms whose changes of eps add up
COLOUR, SIGNED, MASK = "colour", "signed", "mask"


@dataclass(frozen=True)
class PictureKind:
    """A kind of picture that a recording has of every image and step.

    name: of its array. title: in words. drawn: COLOUR (pixels), SIGNED (around 0, blue and red) or MASK (0 to 1). term:
    the number of the term that it belongs to; None where it is of the step itself.
    """

    name: str
    title: str
    drawn: str
    term: int | None = None


def picture_kinds(recording: Recording) -> list[PictureKind]:
    """The kinds of pictures that there are, in the order in which they are shown."""
    kinds = [PictureKind("x_t", "x_t", COLOUR), PictureKind("x0_unguided", "predicted x0, unguided", COLOUR),
             PictureKind("x0", "predicted x0, guided", COLOUR),
             PictureKind("eps_change", "change of eps, all contrasts", SIGNED),
             PictureKind("state_change", f"change of {STATE}, all losses", SIGNED)]
    for number, term in enumerate(recording.terms):
        kinds += [PictureKind(f"term{number}_degraded", f"{term.title}: degraded input", COLOUR, number),
                  PictureKind(f"term{number}_mask", f"{term.title}: mask", MASK, number),
                  PictureKind(f"term{number}_change", f"{term.title}: change of eps", SIGNED, number),
                  PictureKind(f"term{number}_state_change", f"{term.title}: change of {STATE}", SIGNED, number)]
    present = [kind for kind in kinds if kind.name in recording.arrays]
    changes = [kind for kind in present if kind.term is not None and recording.terms[kind.term].kind in OF_EPS
               and kind.drawn == SIGNED]
    # One contrast alone is the sum of all.
    return [kind for kind in present if kind.name != "eps_change" or len(changes) > 1]


def write_page(path: str | Path, recordings: Sequence[Recording], title: str, command: str, limit: int = LIMIT) -> int:
    """Writes the page of one or two recordings of the same images and steps; returns its size in bytes.

    Pictures are without loss where the page stays below `limit` bytes, else as good as the limit lets them be, which is
    logged and stands in the page. Raises UserError where even that is too much, and where the file cannot be written.
    """
    lossless: dict[tuple[str, str], Any] = {}
    return pages.write_page(
        path, lambda quality: page(recordings, title, command, quality, lossless), lambda size, limit: UserError(
            f"--images: the page would take {size:,} bytes, and the limit is {limit:,}; {SMALLER}"), limit)


def check_attention(images: int, grids: Sequence[Sequence[tuple[int, int]]], steps: int, limit: int = LIMIT) -> None:
    """Raises UserError where the attention alone, which no quality makes smaller, takes more than `limit` bytes.

    grids: (h, w) of the blocks, of each setting.
    """
    tokens = [height * width for blocks in grids for height, width in blocks]
    size = sum(4 * math.ceil(images * steps * count / 3) for count in tokens)       # a byte each, in base64
    if size > limit:
        raise UserError(f"--images: the page would take {size:,} bytes for the attention of {len(tokens)} blocks "
                        f"alone, and the limit is {limit:,}; name fewer with --blocks, {SMALLER}")


def page(recordings: Sequence[Recording], title: str, command: str, quality: int | None = None,
         lossless: dict[tuple[str, str], Any] | None = None) -> str:
    """Returns the page; quality: of its pictures, see `pages.page`.

    lossless: keeps what is the same at every quality, changes and masks, from one call to the next.
    """
    kept = {} if lossless is None else lossless
    first = recordings[0]
    height, width = first.arrays["x_t"].shape[-2:]
    offered = thresholds(recordings)
    data = {
        "steps": first.steps, "sigma": first.sigma, "images": first.image_ids, "labels": first.labels,
        "width": width, "height": height, "columns": sheet_columns(len(first.steps)), "thresholds": offered,
        "settings": [_setting(letter, one, offered, quality, kept)
                     for letter, one in zip(LETTERS, recordings, strict=False)]}
    said = lossy(quality) + ("; recording.npz is not" if quality is not None else "")
    return pages_of(__package__, ("explorer.css",), ("explorer.js",)).render(
        "explorer.html.jinja", title, data=data, command=command, first=first,
        settings=list(zip(LETTERS, recordings, strict=False)),
        kinds={letter: picture_kinds(one) for letter, one in zip(LETTERS, recordings, strict=False)},
        shared=[kind for kind in picture_kinds(first)[:3]] if len(recordings) > 1 else [],
        width=width, height=height, enlarged=max(1, 256 // width), quality=said, blocks=list(first.blocks),
        thresholds=offered,
        rms_chart=any(_rms(one) for one in recordings),
        told_apart=any("state_change" in one.arrays for one in recordings))


def _setting(letter: str, recording: Recording, offered: Sequence[float], quality: int | None,
             lossless: dict[tuple[str, str], Any]) -> dict[str, Any]:
    pictures = {}
    for kind in picture_kinds(recording):
        values, key = recording.arrays[kind.name], (letter, kind.name)
        if kind.drawn == COLOUR:
            pictures[kind.name] = _picture(kind, values, quality)
        else:
            pictures[kind.name] = lossless[key] = lossless.get(key) or _picture(kind, values, None)
    return {
        "letter": letter, "title": recording.title, "block": recording.block, "psi": recording.psi,
        "terms": [{"title": term.title, "kind": term.kind, "active": term.active} for term in recording.terms],
        "pictures": pictures, "rms": list(_rms(recording)), "losses": list(_losses(recording)),
        "attention": {name: {"grid": grid, "data": _attention(recording.arrays[f"attention_{name}"], offered)}
                      for name, grid in recording.blocks.items()}}


def _picture(kind: PictureKind, values: np.ndarray, quality: int | None) -> dict[str, Any]:
    scale, levels = _levels(values, kind.drawn)
    return {"title": kind.title, "drawn": kind.drawn, "term": kind.term, "scale": scale,
            "known": (~np.isnan(values[0]).any(axis=(1, 2, 3))).tolist(),
            "sheets": [_sheet_uri(one, quality) for one in levels]}


def _rms(recording: Recording) -> list[dict[str, Any]]:
    """The lines of the chart: of each term, of all contrasts and of all losses, (N, S) numbers."""
    lines = [{"title": term.title + f", {STATE}" * (f"term{number}_state_change" in recording.arrays), "sum": False,
              "values": _rounded(recording.arrays[f"term{number}_rms"])}
             for number, term in enumerate(recording.terms) if f"term{number}_rms" in recording.arrays]
    shown = [kind.name for kind in picture_kinds(recording)]
    sums = {"eps_change": "all contrasts", "state_change": f"all losses, {STATE}"}
    return lines + [{"title": title, "sum": True, "values": _rounded(recording.arrays[f"{name}_rms"])}
                    for name, title in sums.items() if name in shown]


def _losses(recording: Recording) -> Iterator[dict[str, Any]]:
    for number, term in enumerate(recording.terms):
        if f"term{number}_loss" in recording.arrays:
            yield {"title": term.title, "values": _rounded(recording.arrays[f"term{number}_loss"])}


def _rounded(values: np.ndarray) -> list[list[float | None]]:
    """The numbers with four digits; None for NaN."""
    return [[None if math.isnan(value) else float(f"{value:.4g}") for value in row] for row in values.tolist()]


def thresholds(recordings: Sequence[Recording]) -> list[float]:
    """The values of psi that a reader may choose, rising: those of the methods, and steps from 0 up.

    There are so few that a byte says how many of them a token exceeds.
    """
    own = {1.0, *(one.psi for one in recordings)}
    most = max(PSI_MOST, *own)
    if most > PSI_MOST:
        most = max(most, *(float(one.arrays[f"attention_{name}"].max()) for one in recordings for name in one.blocks))
    step = math.ceil(most / PSI_MOST)           # hundredths
    return sorted(own.union(place / 100 for place in range(0, math.ceil(100 * most) + step, step)))


def _attention(received: np.ndarray, offered: Sequence[float]) -> str:
    """How many thresholds the received attention (N, S, h, w) exceeds, so that each splits it exactly; base64."""
    levels = np.searchsorted(offered, received.astype(np.float64), side="left").astype(np.uint8)
    return base64.b64encode(levels.tobytes()).decode()


def _levels(values: np.ndarray, drawn: str) -> tuple[float, np.ndarray]:
    """The scale and pixels (N, S, H, W) or (N, S, H, W, 3) uint8 of pictures (N, S, C, H, W).

    SIGNED: the mean v over the channels as 128 + 127 sign(v) sqrt(|v| / scale), the scale being the 0.999 quantile of
    |v|, and NaN as 0. Others: clamped to [-1, 1], or to [0, 1], scale 1.
    """
    values = np.nan_to_num(values.astype(np.float32))
    if drawn == COLOUR:
        pixels = to_rounded_uint8(values.clip(-1, 1))
        return 1.0, pixels[:, :, 0] if pixels.shape[2] == 1 else np.moveaxis(pixels, 2, -1)
    values = values.mean(axis=2)
    if drawn == MASK:
        return 1.0, unit_to_uint8(values.clip(0, 1))
    guided = np.abs(values[values != 0])
    scale = float(np.quantile(guided, 0.999)) if guided.size else 1.0
    level = np.sign(values) * np.sqrt((np.abs(values) / scale).clip(0, 1))
    return float(f"{scale:.3g}"), (128 + 127 * level).round().astype(np.uint8)


def sheet_columns(steps: int) -> int:
    """How many steps stand side by side in a sheet; more stand below, so that it is nearly square."""
    return math.ceil(math.sqrt(steps))


def _sheet_uri(levels: np.ndarray, quality: int | None) -> str:
    """All steps of an image, (S, H, W) or (S, H, W, 3) uint8, as one picture in a data URI."""
    steps, height, width = levels.shape[:3]
    columns = sheet_columns(steps)
    rows = -(-steps // columns)
    sheet = np.zeros((rows * columns, *levels.shape[1:]), np.uint8)
    sheet[:steps] = levels
    sheet = sheet.reshape(rows, columns, *levels.shape[1:]).swapaxes(1, 2)
    return data_uri(sheet.reshape(rows * height, columns * width, *levels.shape[3:]), quality)
