"""Fixtures that several tests of commands share."""

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def photos(tmp_path):
    """A folder with a picture of a dog and one of a cat, as their names say, of 32x32 random pixels."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{'cat' if i else 'dog'}_{i}.png")
    return folder
