"""What the simulations of intervals share."""

import functools
import importlib

import numpy as np
import pytest


@pytest.fixture
def drawn_once(monkeypatch):
    """Resamplings, which are the same for all files of equally many images, are drawn once for all of them."""
    module = importlib.import_module("evaluations.metrics.bootstrap")       # whose name is also that of a function
    drawn = functools.cache(module.resamplings)

    def resamplings(sizes, replicates, seed=0):
        return drawn(tuple(np.atleast_1d(sizes).tolist()), replicates, seed)

    monkeypatch.setattr(module, "resamplings", resamplings)
