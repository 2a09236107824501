"""Guidance of pixel diffusion models: ADM networks, Gaussian diffusion, SAG, classifier guidance and more.

`load` gives a model by its name. It is imported when it is first used, so that this package itself costs nothing.
"""

from typing import Any

from .version import __version__

__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .loading import load

    return load
