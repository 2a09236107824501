"""A function that is called in a process of its own, which no setting of this process reaches."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from guided_diffusion.errors import UserError

from ..memory import peak_memory

START = "spawn"                 # how the other process begins: as a new interpreter


class Elsewhere:
    """A function in a process of its own, which ends with the `with` block.

    make: a function of a module, which is called there with the arguments, and returns the function that is meant.
    Results are copied through a pipe. Raises UserError where `make` or the function does, and where the process ends.

    Example: `with Elsewhere(make, path) as there: there.call()`.
    """

    def __init__(self, make: Callable[..., Callable[..., Any]], *arguments: Any) -> None:
        self._make, self._arguments = make, arguments

    def __enter__(self) -> Elsewhere:
        context: Any = multiprocessing.get_context(START)
        self._pipe, end = context.Pipe()
        self._process = context.Process(target=_serve, args=(end, self._make, self._arguments), daemon=True)
        self._process.start()
        end.close()
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        self._process.join()

    def call(self) -> None:
        """Calls the function, and waits until it has returned."""
        self._ask("call", ())

    def result(self, *arguments: Any) -> Any:
        """What the function returns for these arguments."""
        return self._ask("result", arguments)

    def peak_memory(self) -> float:
        """The most memory in MiB that PyTorch holds during a call there, as `evaluations.memory` counts it."""
        return float(self._ask("memory", ()))

    def _ask(self, what: str, arguments: tuple[Any, ...]) -> Any:
        try:
            self._pipe.send((what, arguments))
            answer = self._pipe.recv()
        except (EOFError, OSError):
            raise UserError("the process of the other network has ended (too little memory?)") from None
        if isinstance(answer, UserError):
            raise answer
        return answer


def _serve(pipe: Connection, make: Callable[..., Callable[..., Any]], arguments: tuple[Any, ...]) -> None:
    """Answers what is asked, until it is told to end."""
    try:
        function = make(*arguments)
        while asked := pipe.recv():
            what, given = asked
            if what == "memory":
                pipe.send(peak_memory(function, warm=True))
            else:
                result = function(*given)
                pipe.send(result if what == "result" else None)
    except EOFError:
        return
    except UserError as error:
        pipe.send(error)
