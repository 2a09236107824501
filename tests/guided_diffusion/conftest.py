"""Fixtures of sampling and of trainings, shared by their tests."""

import struct

import numpy as np
import pytest
from networks import with_random_weights

from guided_diffusion.script_util import create_model_and_diffusion


@pytest.fixture
def network(tiny_flags):
    """The tiny network, which also predicts variances, and its process of ten steps."""
    model, diffusion = create_model_and_diffusion(**tiny_flags, timestep_respacing="10")
    return with_random_weights(model).requires_grad_(False), diffusion


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """IDX files of 32 images, 8x8: class 0 has rows, class 1 columns of light."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    labels = np.arange(32, dtype=np.uint8) % 2
    images = rng.integers(0, 60, (32, 8, 8), dtype=np.uint8)
    images[labels == 0, ::2] += 190
    images[labels == 1, :, ::2] += 190
    for prefix in ("train", "t10k"):
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">4B3I", 0, 0, 8, 3, *images.shape)
                                                             + images.tobytes())
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">4BI", 0, 0, 8, 1, 32) + labels.tobytes())
    return folder
