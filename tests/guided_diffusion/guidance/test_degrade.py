import numpy as np
import pytest
import torch
from scipy import ndimage

from guided_diffusion.guidance.degrade import gaussian_blur, high_frequency_mask, random_mask, square_mask


def image(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [(40, 40), (32, 48), (16, 16), (9, 20), (3, 5), (1, 4), (1, 1)])
@pytest.mark.parametrize("sigma", [0.5, 3.0, 9.0])
def test_blur_is_31_normalised_taps_with_reflected_borders(size, sigma):
    """Also where the image is smaller than the kernel's reach of 15 pixels."""
    x = image(2, 3, *size)
    weights = np.exp(-np.arange(-15, 16) ** 2 / (2 * sigma**2))
    weights /= weights.sum()
    expected = x.double().numpy()
    for axis in (2, 3):
        expected = ndimage.correlate1d(expected, weights, axis=axis, mode="mirror")
    np.testing.assert_allclose(gaussian_blur(x, sigma), expected, atol=2e-6)


def test_a_blur_of_no_width_is_none():
    torch.testing.assert_close(gaussian_blur(image(1, 1, 8, 8), 1e-300), image(1, 1, 8, 8))


def test_blur_keeps_a_flat_image_and_the_type():
    x = torch.full((1, 1, 8, 8), 0.75, dtype=torch.float64)
    blurred = gaussian_blur(x, 3.0)
    assert blurred.dtype == torch.float64
    np.testing.assert_allclose(blurred, x, atol=1e-6)


COUNTS = torch.tensor([0, 1, 7, 16, 23, 24])


def masks_of(count, grid):
    n = len(count)
    return {
        "square": square_mask(count, grid),
        "random": random_mask(count, grid, torch.arange(n), torch.full((n,), 3)),
        "high-frequency": high_frequency_mask(count, grid, image(n, 3, 4 * grid[0], 4 * grid[1])),
    }


@pytest.mark.parametrize("grid", [(4, 6), (5, 5), (24, 1)])
def test_masks_have_as_many_tokens_as_asked_for(grid):
    for name, mask in masks_of(COUNTS, grid).items():
        assert mask.dtype == torch.bool and mask.shape == (6, grid[0] * grid[1])
        assert mask.sum(dim=1).tolist() == COUNTS.tolist(), name


def test_square_mask_is_a_centred_square():
    mask = square_mask(torch.tensor([4, 16]), (6, 8)).reshape(2, 6, 8)
    for half, got in ((1, mask[0]), (2, mask[1])):
        expected = torch.zeros(6, 8, dtype=torch.bool)
        expected[3 - half:3 + half, 4 - half:4 + half] = True
        assert torch.equal(got, expected)


def test_random_mask_is_a_function_of_image_number_and_step_alone():
    count, grid = torch.tensor([10, 10, 10]), (6, 6)
    together = random_mask(count, grid, torch.tensor([4, 5, 6]), torch.tensor([9, 9, 8]))
    for i, (number, step) in enumerate([(4, 9), (5, 9), (6, 8)]):
        assert torch.equal(random_mask(count[:1], grid, torch.tensor([number]), torch.tensor([step]))[0], together[i])
    others = random_mask(count, grid, torch.tensor([4, 7, 4]), torch.tensor([8, 9, 10]))
    for other in (*others, together[1]):
        assert not torch.equal(other, together[0])


def test_random_mask_chooses_every_token_alike():
    mask = random_mask(torch.full((600,), 4), (4, 4), torch.arange(600), torch.zeros(600, dtype=torch.int64))
    assert (mask.float().mean(dim=0) - 0.25).abs().max() < 0.08                 # 4.5 standard deviations


def test_high_frequency_mask_finds_the_fine_pattern():
    x = torch.zeros(1, 1, 32, 32)
    x += torch.linspace(-1, 1, 32)                                          # a slow ramp
    checks = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1
    x[0, 0, 8:16, 16:24] += 2 * checks
    mask = high_frequency_mask(torch.tensor([4]), (8, 8), x).reshape(8, 8)
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[2:4, 4:6] = True
    assert torch.equal(mask, expected)
