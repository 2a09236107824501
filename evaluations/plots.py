"""Figures of matplotlib: the check that it is installed, and an empty figure."""

from __future__ import annotations

import importlib
from typing import Any, Literal

from guided_diffusion.errors import UserError

SUFFIXES = (".png", ".svg", ".pdf")


def require_matplotlib(what: str) -> None:
    """Checks that matplotlib is installed.

    what: the beginning of the sentence with its verb, such as "--plot needs" or "the figures need". Raises UserError
    "WHAT matplotlib: pip install 'guided-pixels[eval]'" where it is not.
    """
    try:
        importlib.import_module("matplotlib")
    except ImportError:
        raise UserError(f"{what} matplotlib: pip install 'guided-pixels[eval]'") from None


def new_figure(width: float, height: float, dpi: float | None = None,
               layout: Literal["constrained"] | None = "constrained") -> Any:
    """Returns an empty matplotlib Figure of `width` x `height` inches that needs no display.

    dpi: dots per inch, None for the default of matplotlib. layout: "constrained" keeps axes and labels apart, None
    leaves them where they are put.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout=layout)
    FigureCanvasAgg(figure)
    return figure
