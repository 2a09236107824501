"""Pixels of files and of networks."""

import numpy as np
import torch

from guided_diffusion.pixels import from_uint8, to_rounded_uint8, to_uint8, unit_to_uint8

EVERY = np.arange(256, dtype=np.uint8)


def test_rounding_undoes_what_reading_does():
    unit = from_uint8(EVERY)
    assert unit.dtype == np.float32 and unit[0] == -1 and unit[-1] == 1
    assert (to_rounded_uint8(unit) == EVERY).all()
    assert torch.equal(from_uint8(torch.from_numpy(EVERY)), torch.from_numpy(unit))


def test_samples_are_truncated_and_depth_is_rounded():
    between = from_uint8(EVERY[:-1]) + np.float32(0.6 / 127.5)
    assert (to_uint8(torch.from_numpy(between)[None, None, None])[0, 0, :, 0] == EVERY[:-1]).all()
    assert (to_rounded_uint8(between) == EVERY[1:]).all()


def test_samples_are_clamped_and_grey_fills_three_channels():
    pixels = to_uint8(torch.tensor([-3.0, 0.0, 1.0, 1.5]).reshape(1, 1, 2, 2))
    assert pixels.shape == (1, 2, 2, 3)
    assert pixels[..., 0].flatten().tolist() == [0, 127, 255, 255] and (pixels == pixels[..., :1]).all()


def test_unit_values_become_the_nearest():
    unit = EVERY.astype(np.float32) / 255
    assert (unit_to_uint8(unit) == EVERY).all() and (unit_to_uint8(unit[1:] - np.float32(0.4 / 255)) == EVERY[1:]).all()
