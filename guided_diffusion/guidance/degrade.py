"""How guidance degrades an image: Gaussian blur, and masks over the tokens of an attention block. Pure functions."""

from __future__ import annotations

from ..late import F, Tensor, torch
from ..rng import image_generator

MASKS = ("self-attention", "global", "high-frequency", "random", "square")
BLUR_TAPS = 31
NARROWEST = 1e-3                # of the blur, in pixels: the middle has all the weight from there on, in float32


def gaussian_blur(x: Tensor, sigma: float, taps: int = BLUR_TAPS) -> Tensor:
    """Blur of (N, C, H, W): `taps` (odd) normalised weights per axis, sigma in pixels, reflected at the borders.

    An image smaller than the kernel's reach is reflected as often as needed.
    """
    offsets = torch.arange(taps, dtype=torch.float32, device=x.device) - (taps - 1) / 2
    weights = torch.exp(-0.5 * (offsets / max(sigma, NARROWEST)) ** 2)
    weights = (weights / weights.sum()).to(x.dtype)
    height, width = (_blur_matrix(size, weights) for size in x.shape[2:])
    return height @ x @ width.T


def _blur_matrix(size: int, weights: Tensor) -> Tensor:
    """The blur along an axis as a (size, size) matrix, which is faster than a convolution by a few channels.

    Beyond the border lies the mirror image, edge not repeated.
    """
    reach, period = len(weights) // 2, max(2 * (size - 1), 1)
    offsets = torch.arange(-reach, reach + 1, device=weights.device)
    index = (torch.arange(size, device=weights.device)[:, None] + offsets) % period
    index = torch.where(index < size, index, period - index)
    return weights.new_zeros(size, size).scatter_add_(1, index, weights.expand(size, -1))


def square_mask(count: Tensor, grid: tuple[int, int]) -> Tensor:
    """(N, T) bool: a centred square (cut at the border) of about `count` (N,) tokens of a grid (height, width)."""
    height, width = grid
    rows = (torch.arange(height, device=count.device) - (height - 1) / 2).abs()
    columns = (torch.arange(width, device=count.device) - (width - 1) / 2).abs()
    distance = torch.maximum(rows[:, None], columns[None, :]).flatten()
    return _first(distance.expand(len(count), -1), count)


def random_mask(count: Tensor, grid: tuple[int, int], numbers: Tensor, steps: Tensor) -> Tensor:
    """(N, T) bool: `count` (N,) tokens at random, a function of the image's number (N,) and its step (N,) alone."""
    order = torch.stack([
        torch.from_numpy(image_generator(0, number, step, "mask").random(grid[0] * grid[1]))
        for number, step in zip(numbers.tolist(), steps.tolist(), strict=True)])
    return _first(order.to(count.device), count)


def high_frequency_mask(count: Tensor, grid: tuple[int, int], x: Tensor) -> Tensor:
    """(N, T) bool: the `count` (N,) tokens of x (N, C, H, W) with the most energy above a quarter of the band."""
    spectrum = torch.fft.fft2(x.float())
    rows = torch.fft.fftfreq(x.shape[2], device=x.device).abs()
    columns = torch.fft.fftfreq(x.shape[3], device=x.device).abs()
    high = torch.maximum(rows[:, None], columns[None, :]) > 0.25
    energy = torch.fft.ifft2(spectrum * high).real.square().sum(dim=1, keepdim=True)
    return _first(-F.adaptive_avg_pool2d(energy, grid).flatten(1), count)


def _first(order: Tensor, count: Tensor) -> Tensor:
    """(N, T) bool: the `count` (N,) positions with the smallest `order` (N, T); ties go to the first."""
    ranks = order.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    return ranks < count[:, None]
