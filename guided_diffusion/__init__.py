"""Guidance of pixel diffusion models: ADM networks, Gaussian diffusion, SAG, classifier guidance and more."""

__version__ = "0.1.0"
