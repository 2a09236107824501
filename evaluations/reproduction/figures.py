"""How a report looks: its style sheet, figures as inline SVG with letters of 12 px on a phone too, and pictures."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 340, 270            # px, and units of the drawing
LETTER = 7.2                        # width of a digit at 12 px, rounded up
TOP, RIGHT, BOTTOM = 30, 14, 44     # margins around the plotted area; the left one fits the labels

SHOWN = 64                          # px of an image in a grid, at least
LARGEST = 128                       # and at most: larger ones are reduced

# Okabe and Ito's colours, darkened where they would be faint on white; every one goes with a shape.
COLOURS = ("#0072b2", "#c44e00", "#007a5a", "#a8447f", "#6b5900", "#2b8cbe", "#444444", "#b0202a")
SHAPES = ("M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0z", "M-4.5,-4.5h9v9h-9z", "M0,-5.5L5.5,4.5h-11z", "M0,-6L6,0L0,6L-6,0z",
          "M0,5.5L5.5,-4.5h-11z", "M-5,-1.7h3.3v-3.3h3.4v3.3h3.3v3.4h-3.3v3.3h-3.4v-3.3h-3.3z",
          "M-5.5,0L-2.7,-5h5.4L5.5,0L2.7,5h-5.4z")


@dataclass(frozen=True)
class Point:
    """A number against another one, with their intervals; hollow: published rather than measured.

    style: picks colour and shape.
    """

    x: float
    y: float
    style: int = 0
    x_interval: Sequence[float] | None = None
    y_interval: Sequence[float] | None = None
    hollow: bool = False


@dataclass(frozen=True)
class Axis:
    """Where numbers lie: from `low` to `high` on `start` to `end`, in units of the drawing."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> str:
        return f"{self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start):.1f}"


def chart(points: Sequence[Point], x_label: str, y_label: str, description: str, joined: bool = False) -> str:
    """The points on axes that just hold them; joined: the measured ones by a line, from left to right."""
    x_low, x_high = _range([(point.x, point.x_interval) for point in points])
    y_low, y_high = _range([(point.y, point.y_interval) for point in points])
    x_ticks, y_ticks = ticks(x_low, x_high, 5), ticks(y_low, y_high, 6)
    left = 14 + LETTER * max(map(len, y_ticks.values()))
    across = Axis(x_low, x_high, left, WIDTH - RIGHT)
    up = Axis(y_low, y_high, HEIGHT - BOTTOM, TOP)
    parts = [f'<text x="4" y="16" class="axis">{escape(y_label)}</text>',
             f'<text x="{(left + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 6}" class="axis" text-anchor="middle">'
             f'{escape(x_label)}</text>']
    for value, text in x_ticks.items():
        parts.append(f'<path class="lines" d="M{across(value)},{TOP}V{HEIGHT - BOTTOM}"/>'
                     f'<text x="{across(value)}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{text}</text>')
    for value, text in y_ticks.items():
        parts.append(f'<path class="lines" d="M{left:.1f},{up(value)}H{WIDTH - RIGHT}"/>'
                     f'<text x="{left - 6:.1f}" y="{up(value)}" dy="4" text-anchor="end">{text}</text>')
    if joined:
        measured = sorted((point.x, point.y) for point in points if not point.hollow)
        line = " ".join(f"{across(x)},{up(y)}" for x, y in measured)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{COLOURS[0]}" stroke-opacity="0.5"/>')
    parts += [_bars(point, across, up) for point in points]
    parts += [f'<g transform="translate({across(point.x)},{up(point.y)})">{_marker(point.style, point.hollow)}</g>'
              for point in points]
    return (f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(description)}">'
            f'{"".join(parts)}</svg>')


def key(style: int, hollow: bool = False) -> str:
    """The mark of a style, as it stands in a legend."""
    return f'<svg class="key" viewBox="-8 -8 16 16" aria-hidden="true">{_marker(style, hollow)}</svg>'


def ticks(low: float, high: float, most: int) -> dict[float, str]:
    """Round numbers from `low` to `high`, at most `most` of them, and how they are written."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    places = max(0, -math.floor(math.log10(step) + 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return {number * step: f"{number * step:.{places}f}" for number in range(first, last + 1)}


def _range(values: Sequence[tuple[float, Sequence[float] | None]]) -> tuple[float, float]:
    """What holds all values and their intervals, and a little more."""
    numbers = [number for value, interval in values for number in (value, *(interval or ()))]
    low, high = min(numbers), max(numbers)
    margin = 0.07 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _bars(point: Point, across: Axis, up: Axis) -> str:
    path = ""
    if point.x_interval:
        low, high = map(across, point.x_interval)
        path += f"M{low},{up(point.y)}H{high}"
    if point.y_interval:
        low, high = map(up, point.y_interval)
        path += f"M{across(point.x)},{low}V{high}"
    return f'<path d="{path}" stroke="{_colour(point.style)}" stroke-width="1.5" fill="none"/>' if path else ""


def _marker(style: int, hollow: bool) -> str:
    fill = "#fff" if hollow else _colour(style)
    return f'<path d="{SHAPES[style % len(SHAPES)]}" fill="{fill}" stroke="{_colour(style)}" stroke-width="1.5"/>'


def _colour(style: int) -> str:
    return COLOURS[style % len(COLOURS)]


# Pictures


def grid(title: str, rows: Mapping[str, np.ndarray]) -> str:
    """Strips of the same images under each other, each with the title of its row."""
    rows = {name: _reduced(images) for name, images in rows.items() if len(images)}
    if not rows:
        return ""
    count, cell = max(map(len, rows.values())), max(_cell(images) for images in rows.values())
    numbers = "".join(f'<span style="width:{cell}px">{number}</span>' for number in range(count))
    strips = "".join(
        f'<div class="strip"><div class="label">{escape(name)}</div><img src="{data_uri(_strip(images))}" '
        f'style="width:{len(images) * _cell(images)}px" alt="{escape(name)}: images 0 to {len(images) - 1}"></div>\n'
        for name, images in rows.items())
    return ("<figure><figcaption>The same image numbers under each setting, in the same column.</figcaption>"
            f'<div class="scroll white" tabindex="0" role="region" aria-label="Images: {escape(title)}">'
            f'<div class="strip"><div class="label">image number</div><div class="numbers">{numbers}</div></div>\n'
            f"{strips}</div></figure>")


def _reduced(images: np.ndarray) -> np.ndarray:
    """(n, H, W, 3), no side of an image longer than LARGEST."""
    height, width = images.shape[1:3]
    factor = LARGEST / max(height, width)
    if factor >= 1:
        return images
    size = max(1, round(width * factor)), max(1, round(height * factor))
    return np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX)) for image in images])


def _cell(images: np.ndarray) -> int:
    """Width of a column in CSS pixels: a whole number for each pixel of an image and of the gap to the next."""
    width = images.shape[2]
    return (width + 1) * max(1, SHOWN // width)


def _strip(images: np.ndarray) -> np.ndarray:
    """(n, H, W, 3) side by side, with a pixel of white to the right of each and below: (H + 1, n (W + 1), 3)."""
    return np.concatenate(list(np.pad(images, ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=255)), axis=1)


def overlay(caption: str, picture: np.ndarray) -> str:
    width = picture.shape[1] * max(1, 720 // picture.shape[1])
    return (f'<figure class="overlay"><figcaption>{escape(caption)}</figcaption><div class="scroll white" tabindex="0" '
            f'role="region" aria-label="{escape(caption)}"><img src="{data_uri(picture)}" style="width:{width}px" '
            f'alt="{escape(caption)}"></div></figure>\n')


def data_uri(picture: np.ndarray) -> str:
    """(H, W, 3) uint8 as PNG in a data URI."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


# Style

STYLE = """
:root { color-scheme: light dark; --text: #1c2127; --soft: #56606b; --paper: #fff; --line: #d9dee3; --shade: #0002;
  --head: #f4f6f8; --link: #0b57b0; --bar: #4a8fd0;
  --good: #0a6239; --good-paper: #dcf3e6; --bad: #99230f; --bad-paper: #fde5df;
  --doubt: #6e4a00; --doubt-paper: #fbeecb; --none: #4c5661; --none-paper: #e9edf0; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e8ec; --soft: #a0abb6; --paper: #15191d; --line: #353d45;
  --shade: #fff3; --head: #1f252b; --link: #7fb6f5; --bar: #3f7db8;
  --good: #8fe0b4; --good-paper: #143a28; --bad: #ffb3a3; --bad-paper: #4a1d15;
  --doubt: #f3d58a; --doubt-paper: #41330d; --none: #c0c9d1; --none-paper: #2c343b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--text); -webkit-text-size-adjust: 100%;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .5rem; text-wrap: balance; }
h2 { font-size: 1.3rem; line-height: 1.25; margin: 3rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--line); }
.reading { font-size: 1rem; margin: 1.5rem 0 0; padding: 0; border: 0; }
.reading + dl { margin-top: .5rem; }
p, li, dd { overflow-wrap: anywhere; }
p { max-width: 46rem; margin: .5rem 0; }
a { color: var(--link); text-underline-offset: .15em; }
code { font: .8125rem/1.45 ui-monospace, "SF Mono", Consolas, "Liberation Mono", monospace; }
.soft, caption, figcaption { color: var(--soft); font-size: .875rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .35rem 1.25rem; margin: 1.25rem 0;
  font-size: .875rem; }
dt { color: var(--soft); }
dd { margin: 0; }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: 1rem 0 0; padding: 0; list-style: none; }
nav a { display: inline-block; padding: .25rem 0; font-size: .9375rem; }
.count { display: flex; flex-wrap: wrap; gap: .5rem; margin: 1.25rem 0; padding: 0; list-style: none; }
.scroll { position: relative; overflow-x: auto; border: 1px solid var(--line); border-radius: 8px;
  background: linear-gradient(to left, var(--paper) 30%, transparent) right / 40px 100% no-repeat local,
    linear-gradient(to left, var(--shade), transparent) right / 12px 100% no-repeat scroll; }
.scroll:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: .9375rem; line-height: 1.35; }
caption { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
th, td { padding: .5rem .75rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line); }
tbody:last-child tr:last-child > * { border-bottom: 0; }
td { white-space: nowrap; font-variant-numeric: tabular-nums; }
th { font-weight: 600; }
thead th { background: var(--head); font-size: .8125rem; vertical-align: bottom; }
thead small { display: block; font-weight: 400; font-size: .75rem; color: var(--soft); white-space: nowrap; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); z-index: 1; min-width: 8rem; }
thead th:first-child { background: var(--head); }
.published th:first-child { min-width: 0; }
.published tbody th { font-weight: 400; padding-left: 1.5rem; }
.published .group th { font-weight: 600; padding-left: .75rem; background: var(--head); }
.group span { position: sticky; left: .75rem; display: inline-flex; flex-wrap: wrap; align-items: baseline;
  gap: .25rem .75rem; max-width: min(100%, calc(100vw - 4rem)); }
td.words, th.words { text-align: left; }
td.path { white-space: normal; overflow-wrap: anywhere; min-width: 9rem; }
td b { display: block; font-weight: 600; }
td small { display: block; font-size: .75rem; color: var(--soft); }
.mark { display: inline-block; padding: 0 .45rem; border-radius: 4px; font-size: .75rem; line-height: 1.6;
  font-weight: 600; font-style: normal; white-space: nowrap; }
.better, .reproduced { color: var(--good); background: var(--good-paper); }
.worse, .differs { color: var(--bad); background: var(--bad-paper); }
.not-comparable { color: var(--doubt); background: var(--doubt-paper); }
.not-run-here, .no-difference { color: var(--none); background: var(--none-paper); }
.no-difference { background: none; padding: 0; font-weight: 400; }
.count .mark { font-size: .875rem; padding: .15rem .6rem; }
.notes { margin: .75rem 0; padding-left: 1.1rem; font-size: .875rem; }
.bar { display: block; height: 6px; margin-top: .3rem; border-radius: 3px; background: var(--bar); margin-right: auto; }
.timing td, .timing th { min-width: 7rem; text-align: left; }
figure { margin: 1.25rem 0 0; }
figcaption { margin-bottom: .4rem; max-width: 46rem; }
.white { background-color: #fff; color: #1c2127; padding: .5rem; --paper: #fff; --shade: #0003; }
.strip { display: grid; grid-template-columns: 12rem max-content; align-items: center; width: max-content; }
.label { position: sticky; left: 0; align-self: stretch; display: flex; align-items: center; background: #fff;
  z-index: 1; padding: .25rem .75rem .25rem .25rem; font-size: .875rem; line-height: 1.25; }
.numbers { display: flex; font-size: .75rem; color: #56606b; }
.numbers span { flex: none; text-align: center; }
.strip img, .overlay img { display: block; image-rendering: pixelated; height: auto; max-width: none; }
.figures { display: flex; flex-wrap: wrap; gap: 0 1.25rem; }
.figures figure { width: 350px; max-width: 100%; }
.plot { background: #fff; color: #1c2127; border: 1px solid var(--line); border-radius: 8px; padding: 4px; }
.chart { display: block; width: 100%; height: auto; font: 12px system-ui, "Segoe UI", Roboto, "Liberation Sans", Arial,
  sans-serif; fill: #3a434c; }
.chart .axis { font-weight: 600; fill: #1c2127; }
.chart .lines { stroke: #e3e7ea; }
.key { width: 16px; height: 16px; flex: none; }
.legend { margin: .25rem .5rem .5rem; padding: 0; list-style: none; font-size: .8125rem; line-height: 1.35; }
.legend li { display: flex; gap: .4rem; align-items: center; padding: .1rem 0; }
details { margin-top: 3rem; }
summary { cursor: pointer; padding: .5rem 0; font-weight: 600; }
@media (max-width: 40rem) {
  main { padding: 1rem .75rem 3rem; }
  h1 { font-size: 1.45rem; }
  h2 { font-size: 1.2rem; margin-top: 2.25rem; }
  dl { grid-template-columns: minmax(4.5rem, max-content) 1fr; gap: .35rem .75rem; }
  nav ul { display: block; }
  th, td { padding: .45rem .5rem; }
  thead th { font-size: .75rem; }
  thead small { white-space: normal; }
  .published th, .published td { padding: .45rem .3rem; }
  .published th:first-child, .published .group th { padding-left: .6rem; }
  .published td:last-child, .published th:last-child { padding-right: .6rem; }
  table { font-size: .875rem; }
  th:first-child { min-width: 6.5rem; max-width: 9rem; }
  .group th { max-width: none; }
  .timing td, .timing th:not(:first-child) { min-width: 0; }
  .timing .mark { white-space: normal; }
  .strip { grid-template-columns: max-content; }
  .label { justify-self: start; padding-top: .5rem; max-width: calc(100vw - 3rem); }
  .figures figure { width: 100%; max-width: 400px; }
}
"""
