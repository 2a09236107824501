"""The exceptions that end a command with one sentence."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

KEPT = "what was finished is kept, and the same command goes on from there"


class UserError(ValueError):
    """A mistake in an option, a file or an argument.

    The message is one sentence that names the option, the value and what is allowed. Scripts print it and
    exit with code 2; library users may catch it as a ValueError.
    """


@contextmanager
def said_otherwise(change: Callable[[str], str]) -> Iterator[None]:
    """Lets a UserError say `change` of its sentence, where that is about options that the user has not named."""
    try:
        yield
    except UserError as error:
        raise UserError(change(str(error))) from None


@contextmanager
def resumable() -> Iterator[None]:
    """Declares that what is finished within is kept, and that the same command goes on from there.

    Where a signal ends the command within, it says so (`cli.run_script`).
    """
    try:
        yield
    except KeyboardInterrupt as error:
        if KEPT not in notes_of(error):
            error.add_note(KEPT)
        raise


def notes_of(error: BaseException) -> list[str]:
    """What was noted of an error on its way."""
    return getattr(error, "__notes__", [])


class NonFiniteError(ValueError):
    """A step gave NaN or infinity; the message names the step and the images."""


class PeerError(RuntimeError):
    """Another rank failed, and says why."""


class LostRankError(RuntimeError):
    """Another rank is gone without a word."""
