"""The version of this library, in this one place."""

__version__ = "0.1.0"
