"""Pictures of attention: overlays on images, spectra of patches, and overlap with objects."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from guided_diffusion.files import write
from guided_diffusion.pictures import grid as image_grid
from guided_diffusion.pictures import save

from ..plots import new_figure, plain_numbers
from .measures import EVERY_STEP, AttentionRow

CELL = 96               # pixels that a small image is enlarged to, or a little less
GAP = 2                 # pixels between images
OPACITY = 0.5           # of the heat over the image
OCTAVES = 2             # attention is coloured from 2**-OCTAVES to 2**OCTAVES times the average,
PER_OCTAVE = 4          # in so many shades for each factor of 2
GREYS = 32              # under the heat: fewer shades than images have make files half as large
DARKEST = 0.35          # of them: on black, no colour could be told from another
OUTLINE = (0, 170, 60)  # in neither image nor heat
COLOURS = "RdBu_r"
DPI = 100


def overlay(x0: np.ndarray, received: np.ndarray, grid: tuple[int, int], threshold: float) -> np.ndarray:
    """Received attention in colours over grey images, with the outline of the mask: (N, h, w, 3) uint8.

    x0: (N, H, W, 3) uint8. received: (N, T) of a block of this grid (T = height * width), mean 1 over T: white is the
    average, blue less, red more. The mask is `received > threshold`. h and w are H and W as `enlarged` has them.
    """
    from matplotlib import colormaps

    images = enlarged(x0)
    size = images.shape[1:3]
    octaves = np.log2(np.maximum(received, 2.0**-OCTAVES)).clip(-OCTAVES, OCTAVES)
    octaves = np.rint(PER_OCTAVE * octaves) / PER_OCTAVE
    heat = colormaps[COLOURS](_nearest(octaves.reshape(-1, *grid), size) / (2 * OCTAVES) + 0.5)[..., :3]
    grey = np.rint(images.mean(axis=3, keepdims=True) / 255 * (GREYS - 1)) / (GREYS - 1)
    grey = DARKEST + (1 - DARKEST) * grey
    blended = (255 * ((1 - OPACITY) * grey + OPACITY * heat) + 0.5).astype(np.uint8)
    blended[outline(_nearest((received > threshold).reshape(-1, *grid), size))] = OUTLINE
    return blended


def enlarged(images: np.ndarray) -> np.ndarray:
    """Enlarges images (N, H, W, 3) of fewer than CELL pixels by the whole factor that brings them close to it."""
    factor = max(1, CELL // images.shape[1])
    return images.repeat(factor, axis=1).repeat(factor, axis=2)


def outline(mask: np.ndarray) -> np.ndarray:
    """The pixels of a mask (N, H, W) bool that have a neighbour outside it; image borders are no outline."""
    padded = np.pad(mask, ((0, 0), (1, 1), (1, 1)), mode="edge")
    within = padded[:, :-2, 1:-1] & padded[:, 2:, 1:-1] & padded[:, 1:-1, :-2] & padded[:, 1:-1, 2:]
    return mask & ~within


def _nearest(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Values (N, h, w) enlarged to (N, *size) by nearest neighbours."""
    rows, columns = (np.arange(new) * old // new for new, old in zip(size, values.shape[1:], strict=True))
    return values[:, rows][:, :, columns]


def draw_overlays(folder: Path, image_id: int, steps: Sequence[int], x0: np.ndarray,
                  received: Mapping[str, tuple[np.ndarray, tuple[int, int]]], threshold: float) -> None:
    """Draws overlay_NUMBER.png and .svg of one image: a column for each step, a row for x0 and for each block.

    x0: (steps, H, W, 3) uint8. received: by block, (steps, T) and its grid.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    rows = [enlarged(x0), *(overlay(x0, *attention, threshold) for attention in received.values())]
    canvas = image_grid(np.concatenate(rows), len(steps), GAP)
    height, width = canvas.shape[:2]
    left, top, bottom = 96, 24, 62          # pixels
    total = left + width + 10, top + height + bottom
    with new_figure(total[0] / DPI, total[1] / DPI, DPI, layout=None) as figure:
        axes = figure.add_axes([left / total[0], bottom / total[1], width / total[0], height / total[1]])
        axes.imshow(canvas, interpolation="none", aspect="auto", extent=(0, width, height, 0))
        axes.xaxis.tick_top()
        cell_height, cell_width = rows[0].shape[1] + GAP, rows[0].shape[2] + GAP
        axes.set_xticks([GAP / 2 + (i + 0.5) * cell_width for i in range(len(steps))], [f"t = {t}" for t in steps])
        names = ["predicted x0", *(f"{name}\n{shape[0]}x{shape[1]}" for name, (_, shape) in received.items())]
        axes.set_yticks([GAP / 2 + (i + 0.5) * cell_height for i in range(len(rows))], names)
        axes.tick_params(length=0, labelsize=9)
        axes.spines[:].set_visible(False)
        bar = figure.add_axes([left / total[0], 36 / total[1], width / total[0], 10 / total[1]])
        shades = colormaps[COLOURS].resampled(2 * PER_OCTAVE * OCTAVES + 1)
        colours = ScalarMappable(Normalize(-OCTAVES, OCTAVES), shades)
        ticks = range(-OCTAVES, OCTAVES + 1)
        figure.colorbar(colours, cax=bar, orientation="horizontal", ticks=list(ticks))
        bar.set_xticklabels([f"{2.0**tick:g}" for tick in ticks], fontsize=8)
        bar.set_xlabel(f"received attention / average; green outline: mask, above {threshold:g}", fontsize=8,
                       labelpad=1)
        _save(figure, folder / f"overlay_{image_id}", colours=None)


def draw_frequencies(folder: Path, rows: Sequence[AttentionRow]) -> None:
    """Draws frequency.png and .svg: spectra of masked and of all patches, and their ratio, a column for each block.

    rows: those of frequency.csv that are to be drawn.
    """
    blocks = list(dict.fromkeys(row["block"] for row in rows))
    steps = list(dict.fromkeys(row["t"] for row in rows if row["t"] != EVERY_STEP))
    with new_figure(1.8 + 3 * len(blocks), 5.6, DPI) as figure:
        panels = figure.subplots(2, len(blocks), squeeze=False, sharex=True, sharey="row")
        for block, (above, below) in zip(blocks, panels.T, strict=True):
            of_block = [row for row in rows if row["block"] == block]
            for index, t in enumerate((*steps, EVERY_STEP)):
                chosen = [row for row in of_block if row["t"] == t]
                frequency = [row["frequency"] for row in chosen]
                if t == EVERY_STEP:
                    for kind, style in (("masked", {"color": "tab:red"}), ("all", {"color": "0.4", "ls": "--"})):
                        above.plot(frequency, [row[kind] for row in chosen], marker="o", label=f"{kind} patches",
                                   **style)
                below.plot(frequency, [row["ratio"] for row in chosen], **_step_style(index, len(steps), t))
            resolution = of_block[0]["resolution"]
            pixels = round(1 / min(row["frequency"] for row in of_block if row["frequency"]))
            above.set(title=f"{block}, {resolution}x{resolution}\npatches of {pixels}x{pixels} pixels", yscale="log")
            plain_numbers(above.yaxis)
            below.axhline(1, color="0.4", lw=1, ls="--")
            below.set(xlabel="frequency, cycles / pixel")
            for axes in (above, below):
                axes.grid(alpha=0.3)
        for axes, label in zip(panels[:, 0], ("mean |FFT| of a patch", "masked / all"), strict=True):
            axes.set_ylabel(label)
        handles = [handle for axes in panels[:, 0] for handle in axes.get_legend_handles_labels()[0]]
        figure.legend(handles=handles, loc="outside right center", fontsize=8)
        _save(figure, folder / "frequency")


def draw_overlaps(folder: Path, rows: Sequence[AttentionRow]) -> None:
    """Draws semantic.png and .svg: IoU with objects over psi, of attention and random masks, a panel for each block.

    rows: those of semantic.csv.
    """
    blocks = list(dict.fromkeys(row["block"] for row in rows))
    steps = list(dict.fromkeys(row["t"] for row in rows if row["t"] != EVERY_STEP))
    lines = math.ceil(len(blocks) / 5)
    columns = math.ceil(len(blocks) / lines)
    with new_figure(1 + 2.4 * columns, 0.8 + 2.3 * lines, DPI) as figure:
        panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flat
        for axes, block in zip(panels, blocks, strict=False):
            for index, t in enumerate((*steps, EVERY_STEP)):
                chosen = [row for row in rows if row["block"] == block and row["t"] == t]
                psi, iou = ([row[name] for row in chosen] for name in ("psi", "iou"))
                axes.plot(psi, iou, **_step_style(index, len(steps), t))
                if t == EVERY_STEP:
                    random = [row["random"] for row in chosen]
                    axes.plot(psi, random, color="k", ls="--", lw=1.5, label="random masks")
                    other = [row["other"] for row in chosen]
                    axes.plot(psi, other, color="tab:red", ls=":", lw=1.5, label="with another\nimage's objects")
                    low, high = ([row["random"] + row[name] for row in chosen] for name in ("low", "high"))
                    axes.fill_between(psi, low, high, color="k", alpha=0.15, lw=0, label="95 % of the difference")
            axes.set_title(block, fontsize=10)
            axes.tick_params(labelbottom=True)
            axes.grid(alpha=0.3)
        for axes in list(figure.axes)[len(blocks):]:
            axes.set_axis_off()
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
        figure.supxlabel("threshold psi", fontsize=10)
        figure.supylabel("IoU with the objects", fontsize=10)
        _save(figure, folder / "semantic")


def _step_style(index: int, count: int, t: int | str) -> dict[str, Any]:
    """A thin line for a step, from noise (dark) to image (bright); a thick one for the mean over all."""
    from matplotlib import colormaps

    if t == EVERY_STEP:
        return {"color": "k", "lw": 2, "label": "all steps"}
    return {"color": colormaps["viridis"](index / max(1, count)), "lw": 0.9, "label": f"t = {t}"}


def _save(figure: Any, path: Path, colours: int | None = 256) -> None:
    """Writes a figure as path.png, in so many colours (None: all), and as path.svg; the same bytes each time."""
    import matplotlib

    figure.canvas.draw()
    picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3])
    picture = picture.quantize(colours, dither=Image.Dither.NONE) if colours else picture
    save(picture, path.with_name(f"{path.name}.png"))
    with matplotlib.rc_context({"svg.hashsalt": "attention", "svg.fonttype": "none"}):
        write(path.with_name(f"{path.name}.svg"),
              lambda file: figure.savefig(file, format="svg", metadata={"Date": None}))
