"""torch, which is loaded where something of it is first used: `--help` and a mistyped option need none of it.

Loading torch takes seconds. A file that a command imports before it has read its options takes these names from here,
in place of `import torch`. Such a file does not touch them while it is imported, but in functions and in annotations;
and what extends `nn.Module` stands in a file of its own, which is imported in functions.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

__all__ = ["F", "Tensor", "dist", "nn", "no_grad", "torch"]

P = ParamSpec("P")
R = TypeVar("R")


class Late:
    """Stands for a module, or for a class in one, and has its attributes; the first that is asked for loads it.

    module: its dotted name. name: of the class, "" for the module itself.
    """

    def __init__(self, module: str, name: str = "") -> None:
        self._module, self._name = module, name

    @functools.cached_property
    def _loaded(self) -> Any:
        module = importlib.import_module(self._module)
        return getattr(module, self._name) if self._name else module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loaded, name)

    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(instance, self._loaded)

    def __or__(self, other: object) -> Any:
        return Any                          # in a name for a type, like `Tensor | None`

    __ror__ = __or__

    def __repr__(self) -> str:
        return ".".join(filter(None, [self._module, self._name]))


if TYPE_CHECKING:
    import torch
    import torch.distributed as dist
    from torch import Tensor, nn
    from torch.nn import functional as F
else:
    torch = Late("torch")
    dist = Late("torch.distributed")
    nn = Late("torch.nn")
    F = Late("torch.nn.functional")
    Tensor = Late("torch", "Tensor")


def no_grad(function: Callable[P, R]) -> Callable[P, R]:
    """`torch.no_grad()` as a decorator, also of generators: the function keeps no graph for gradients."""
    @functools.cache
    def decorated() -> Callable[P, R]:
        return torch.no_grad()(function)

    @functools.wraps(function)
    def without(*args: P.args, **kwargs: P.kwargs) -> R:
        return decorated()(*args, **kwargs)
    return without
