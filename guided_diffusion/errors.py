"""The one exception for what a user typed or supplied."""


class UserError(ValueError):
    """A mistake in an option, a file or an argument.

    The message is one sentence that names the option, the value and what is allowed. Scripts print it and
    exit with code 2; library users may catch it as a ValueError.
    """
