"""Figures of matplotlib: the check that it is installed, an empty figure, and its file."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from guided_diffusion.errors import UserError
from guided_diffusion.files import write

SUFFIXES = (".png", ".svg", ".pdf")
UNDATED = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}       # metadata by format


def require_matplotlib(what: str) -> None:
    """Checks that matplotlib is installed.

    what: the beginning of the sentence with its verb, such as "--plot needs" or "the figures need". Raises UserError
    "WHAT matplotlib: pip install 'guided-pixels[eval]'" where it is not.
    """
    try:
        importlib.import_module("matplotlib")
    except ImportError:
        raise UserError(f"{what} matplotlib: pip install 'guided-pixels[eval]'") from None


@contextmanager
def new_figure(width: float, height: float, dpi: float | None = None,
               layout: Literal["constrained"] | None = "constrained") -> Iterator[Any]:
    """Gives an empty matplotlib Figure of `width` x `height` inches that needs no display.

    It must be drawn and saved inside the context, where all texts are shown as they are: a name with a $ in it would
    else be read as a formula. Logarithmic axes need `plain_numbers` for that.

    dpi: dots per inch, None for the default of matplotlib. layout: "constrained" keeps axes and labels apart, None
    leaves them where they are put.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"text.parse_math": False}):
        figure = Figure(figsize=(width, height), dpi=dpi, layout=layout)
        FigureCanvasAgg(figure)
        yield figure


def add_legend(owner: Any, handles: Sequence[Any], names: Sequence[str], **style: Any) -> None:
    """Adds a legend to axes or a figure with all of these names.

    They are set afterwards: matplotlib leaves out those that begin with _. handles: what was drawn under each name.
    """
    legend = owner.legend(handles, ["-"] * len(handles), **style)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(name)


def plain_numbers(axis: Any) -> None:
    """Writes plain numbers beside a logarithmic axis, where matplotlib would write formulas of powers of ten."""
    from matplotlib.ticker import LogFormatter

    class PlainNumbers(LogFormatter):
        """Chooses which ticks have a number as its base does."""

        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:,.10g}" if super().__call__(x, pos) else ""

    axis.set_major_formatter(PlainNumbers())
    axis.set_minor_formatter(PlainNumbers())


def save_figure(figure: Any, path: str | Path) -> None:
    """Writes a figure in the format that its name ends in, whole or not at all; the same figure gives the same bytes.

    Raises UserError where the file cannot be written.
    """
    import matplotlib

    kind = Path(path).suffix[1:].lower() or "png"
    with matplotlib.rc_context({"svg.hashsalt": "figure"}):         # else its elements have random names
        write(path, lambda file: figure.savefig(file, dpi=120, format=kind, metadata=UNDATED.get(kind)))
