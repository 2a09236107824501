"""Networks on the device "meta", whose weights come from a file: they have no room for initial values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_FILLS = {nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.normal_, Tensor.fill_, Tensor.zero_, Tensor.div_}


class Unfilled(TorchFunctionMode):
    """A context in which tensors keep what they hold where initial values would be put into them.

    On "meta" these values are none, yet each takes its way through much of PyTorch: a third of the time in which a
    network is built.
    """

    def __torch_function__(self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        """What `func` returns, or the tensor that it would fill."""
        kwargs = kwargs or {}
        if func in _FILLS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
