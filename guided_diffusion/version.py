"""The version of this library, in this one place."""

__version__ = "0.2.0"
