"""The picture of a training: its losses over the steps, as progress.csv has them, drawn without further packages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..logger import read_log
from ..pictures import save

SIZE = (800, 420)
LEFT, TOP, RIGHT, BOTTOM = 76, 34, 16, 40          # margins of the axes
CURVES = {"loss": "#1f77b4", "val_loss": "#ff7f0e"}           # columns of progress.csv, and their colours
TICKS = 5
SMALLEST = 1e-12            # on an axis of logarithms

Points = Sequence[tuple[float, float]]


def draw_loss_curve(log: Path, picture: Path) -> None:
    """Draws the losses in a progress.csv as a PNG file, where there is one with two rows at least.

    The axis of the losses is logarithmic. Raises UserError where the log cannot be read, or the picture not be written.
    """
    _, rows = read_log(log) if log.exists() else ([], [])
    found = {name: curve(rows, name) for name in CURVES}
    curves = {name: points for name, points in found.items() if len(points) > 1}
    if curves:
        save(_drawn(curves), picture)


def curve(rows: Sequence[Mapping[str, str]], name: str) -> Points:
    """(step, value) of the rows that have the value, as finite numbers above 0."""
    points = []
    for row in rows:
        try:
            value = float(row.get(name) or "nan")
        except ValueError:
            continue
        if math.isfinite(value) and value > 0:
            points.append((float(row["step"]), max(value, SMALLEST)))
    return points


def _drawn(curves: Mapping[str, Points]) -> Image.Image:
    image = Image.new("RGB", SIZE, "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=13)
    every = [point for points in curves.values() for point in points]
    low, high = _widened(min(math.log10(y) for _, y in every), max(math.log10(y) for _, y in every))
    first, last = min(x for x, _ in every), max(x for x, _ in every)
    width, height = SIZE[0] - LEFT - RIGHT, SIZE[1] - TOP - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return (LEFT + width * (x - first) / ((last - first) or 1),
                TOP + height * (high - math.log10(y)) / (high - low))

    for i in range(TICKS):
        part = i / (TICKS - 1)
        y, x = 10 ** (low + part * (high - low)), first + part * (last - first)
        draw.line([place(first, y), place(last, y)], fill="#dddddd")
        draw.text((LEFT - 6, place(first, y)[1]), f"{y:.3g}", fill="black", font=font, anchor="rm")
        draw.text((place(x, y)[0], SIZE[1] - BOTTOM + 6), f"{x:,.0f}", fill="black", font=font, anchor="ma")
    draw.text((LEFT + width / 2, SIZE[1] - 4), "step", fill="black", font=font, anchor="md")
    for i, (name, points) in enumerate(curves.items()):
        draw.line([place(*point) for point in points], fill=CURVES[name], width=2)
        draw.text((LEFT + 110 * i, 10), f"{name} {points[-1][1]:.3g}", fill=CURVES[name], font=font)
    draw.rectangle([LEFT, TOP, LEFT + width, TOP + height], outline="black")
    return image


def _widened(low: float, high: float) -> tuple[float, float]:
    """An interval with some room at its ends."""
    room = max(0.05 * (high - low), 0.01)
    return low - room, high + room
