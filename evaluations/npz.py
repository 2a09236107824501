"""The old name of `guided_diffusion.npz`, for code that imports sample files from here."""

from guided_diffusion.npz import BatchFile, Statistics, write_batch

__all__ = ["BatchFile", "Statistics", "write_batch"]
