"""Convolutions of large maps with many channels on a CPU, in fewer products (Winograd's minimal filtering)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .nn import is_channels_last_on_cpu

__all__ = ["Conv3x3", "convolve"]

PIXELS, CHANNELS = 64 * 64, 256         # of the maps from which on it is faster
STRIP = 2**21                           # numbers in the tiles of a strip, for the processor's caches


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution with a padding of 1: by `convolve` where that is faster and no gradient is recorded."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H, W)."""
        if self.bias is None or not self._is_faster(x) or _is_recorded():
            return super().forward(x)
        return convolve(x, self.weight, self.bias)

    def _is_faster(self, x: Tensor) -> bool:
        height, width = x.shape[2:]
        return (x.dtype == self.weight.dtype == torch.float32 and is_channels_last_on_cpu(x)
                and min(self.weight.shape[:2]) >= CHANNELS and height * width >= PIXELS
                and height % 2 == width % 2 == 0)


def _is_recorded() -> bool:
    """Whether operations are recorded, for a gradient or as a program, or compute in types of their own choice."""
    return (torch.is_grad_enabled() or torch.jit.is_tracing() or torch.compiler.is_compiling()
            or torch.is_autocast_enabled("cpu"))


def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F(2x2, 3x3): 16 products for 2x2 pixels and a pair of channels, where a sum over the kernel takes 36.

    Its rounding errors in float32 are smaller than those of that sum, which has 9 C terms in place of C. The map is
    walked through in strips, because its tiles are four times as large as itself. x: (N, C, H, W), H and W even.
    weight: (O, C, 3, 3). bias: (O,). Returns (N, O, H, W), channels_last. Source: Lavin and Gray, 1509.09308,
    section 4.1.
    """
    images, channels, height, width = x.shape
    outputs, across = len(weight), width // 2
    fitting = max(1, STRIP // (16 * across * max(channels, outputs)))
    rows = max(n for n in range(1, fitting + 1) if height // 2 % n == 0)            # of tiles in a strip
    kernel = _transformed_kernel(weight)
    padded = x.new_zeros(2 * rows + 2, width + 2, channels)
    columns = x.new_empty(4, rows, width + 2, channels)
    tiles = x.new_empty(4, 4, rows, across, channels)
    products = x.new_empty(4, 4, rows, across, outputs)
    sums = x.new_empty(2, 4, rows, across, outputs)
    result = x.new_empty(images, height, width, outputs)
    for image, out in zip(x.permute(0, 2, 3, 1), result, strict=True):
        for top in range(0, height, 2 * rows):
            _pad(image, top, padded[:, 1:-1])
            _transform_input(padded, columns)
            _transform_input(columns.movedim(2, 0), tiles.permute(1, 3, 0, 2, 4))
            torch.bmm(tiles.view(16, -1, channels), kernel, out=products.view(16, -1, outputs))
            products[1, 1] += bias                      # is part of each of the four pixels once, with sign +
            _transform_output(products, sums)
            strip = out[top:top + 2 * rows].view(rows, 2, across, 2, outputs)
            _transform_output(sums.transpose(0, 1), strip.permute(3, 1, 0, 2, 4))
    return result.permute(0, 3, 1, 2)


def _transformed_kernel(weight: Tensor) -> Tensor:
    """(O, C, 3, 3) -> (16, C, O)."""
    kernel = weight.permute(2, 3, 0, 1)
    for _ in range(2):
        first, middle, last = kernel
        ends = (first + last) / 2
        kernel = torch.stack([first, ends + middle / 2, ends - middle / 2, last]).transpose(0, 1)
    return kernel.flatten(0, 1).transpose(1, 2)


def _pad(image: Tensor, top: int, strip: Tensor) -> None:
    """Copies the rows from `top` - 1 on into `strip`, and zeros for those that lie outside of the image."""
    first, last = max(top - 1, 0), min(top - 1 + len(strip), len(image))
    strip[:first - top + 1].zero_()
    strip[first - top + 1:last - top + 1] = image[first:last]
    strip[last - top + 1:].zero_()


def _transform_input(pixels: Tensor, out: Tensor) -> None:
    """(2 n + 2, ...), of which tile i has the four from 2 i on -> (4, n, ...)."""
    even, odd = pixels[0::2], pixels[1::2]
    torch.sub(even[:-1], even[1:], out=out[0])
    torch.add(odd[:-1], even[1:], out=out[1])
    torch.sub(even[1:], odd[:-1], out=out[2])
    torch.sub(odd[:-1], odd[1:], out=out[3])


def _transform_output(products: Tensor, out: Tensor) -> None:
    """(4, ...) -> (2, ...): the pixels of the tiles in one direction."""
    first, second, third, fourth = products
    torch.add(second, third, out=out[0])
    torch.sub(second, third, out=out[1])
    out[0] += first
    out[1] -= fourth
