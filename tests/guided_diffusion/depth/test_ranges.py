"""Depths on the scale of the files and from -1 to 1."""

import numpy as np
import pytest
import torch

from guided_diffusion.depth.ranges import from_unit_range, parse_depth_range, to_fraction, to_unit_range
from guided_diffusion.errors import UserError


def test_near_and_far_become_the_ends_and_come_back():
    depth = np.array([0.5, 2.0, 4.0, 6.0, 7.0], np.float32)
    assert to_fraction(depth, 2, 6).tolist() == [0, 0, 0.5, 1, 1]
    unit = to_unit_range(depth, 2, 6)
    assert unit.dtype == np.float32 and unit.tolist() == [-1, -1, 0, 1, 1]
    assert from_unit_range(unit, 2, 6).tolist() == [2, 2, 4, 6, 6]
    assert from_unit_range(torch.tensor([-2.0, 0.0]), 2, 6).tolist() == [0, 4]


def test_words_of_a_depth_range():
    assert parse_depth_range("image") is None and parse_depth_range("1,9.5") == (1, 9.5)
    for text in ("", "9,1", "1,1", "1", "1,2,3", "nan,2", "near,far", "1,inf"):
        with pytest.raises(UserError, match=r"--depth_range .*NEAR,FAR"):
            parse_depth_range(text)
