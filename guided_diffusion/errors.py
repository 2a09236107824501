"""The exceptions that end a command with one sentence."""


class UserError(ValueError):
    """A mistake in an option, a file or an argument.

    The message is one sentence that names the option, the value and what is allowed. Scripts print it and
    exit with code 2; library users may catch it as a ValueError.
    """


class NonFiniteError(ValueError):
    """A step gave NaN or infinity; the message names the step and the images."""


class PeerError(RuntimeError):
    """Another rank failed, and says why."""


class LostRankError(RuntimeError):
    """Another rank is gone without a word."""
