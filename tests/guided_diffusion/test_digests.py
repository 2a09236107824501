"""What tells images from others."""

import numpy as np
import pytest
from PIL import Image

from guided_diffusion.digests import data_digest


def test_the_digest_of_images_tells_them_by_names_sizes_and_checksums(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("x.png", "y.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / "a" / name)
    first = data_digest(str(tmp_path / "a"))
    (tmp_path / "a/readme.txt").write_text("no image")
    assert data_digest(str(tmp_path / "a")) == first
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a/y.png")
    assert data_digest(str(tmp_path / "a")) != first
    digests = set()
    for value in (0, 1):
        np.savez(tmp_path / "s.npz", arr_0=np.full((2, 8, 8, 3), value, np.uint8))
        digests.add(data_digest(str(tmp_path / "s.npz")))
    assert len(digests) == 2


@pytest.mark.parametrize("name", ["x.ppm", "x.bmp", "x.TIF"])
def test_the_digest_tells_pictures_of_equal_sizes_that_are_not_packed(tmp_path, name):
    digests, sizes = set(), set()
    for colour in ("red", "blue"):
        Image.new("RGB", (8, 8), colour).save(tmp_path / name)
        digests.add(data_digest(str(tmp_path)))
        sizes.add((tmp_path / name).stat().st_size)
    assert len(digests) == 2 and len(sizes) == 1
