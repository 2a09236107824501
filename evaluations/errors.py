"""The error for what a user can put right."""


class UserError(ValueError):
    """A mistake in what the user gave; the message is one sentence that says how to put it right."""
