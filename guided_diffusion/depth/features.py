"""Feature maps of a diffusion network's decoder at x_t: what depth predictors read (Kim et al., 2212.08861)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..capture import capture_features, find_blocks
from ..errors import UserError
from ..late import F, Tensor, nn, torch

if TYPE_CHECKING:
    from ..unet import UNetModel


def decoder_features(model: UNetModel, blocks: Sequence[str], x_t: Tensor, t: Tensor, y: Tensor | None = None, *,
                     graph: bool = True) -> dict[str, Tensor]:
    """Outputs (N, C, h, w) of the named blocks at x_t (N, C, H, W), by one evaluation of the network.

    t: (N,) steps as the network sees them. y: (N,) labels, if it has classes. graph: keep the autograd graph to x_t.
    """
    with torch.set_grad_enabled(graph and torch.is_grad_enabled()), capture_features(
            model, blocks, graph=graph) as maps:
        model(x_t, t) if y is None else model(x_t, t, y)
    return {name: maps[name] for name in blocks}


def upsampled(x: Tensor, size: int) -> Tensor:
    """A map (N, C, h, w), bilinearly resized to (N, C, size, size)."""
    if x.shape[2:] == (size, size):
        return x
    return F.interpolate(x, (size, size), mode="bilinear", align_corners=False)


def decoder_blocks(model: UNetModel) -> tuple[str, ...]:
    """Names of all decoder blocks: `output.0` ..."""
    return tuple(f"output.{index}" for index in range(len(model.output_blocks)))


def parse_blocks(text: str, model: UNetModel, flag: str) -> tuple[str, ...]:
    """Block names from indices of decoder blocks, like "2,4,5"; raises UserError that lists those there are."""
    there_are = decoder_blocks(model)
    try:
        indices = [int(part) for part in text.split(",")]
    except ValueError:
        indices = []
    if not indices or len(set(indices)) < len(indices):
        raise UserError(f"--{flag} {text}: must be different indices of decoder blocks, with commas, like 2,4,5")
    for index in indices:
        if not 0 <= index < len(there_are):
            raise UserError(f"--{flag} {text}: the network has no decoder block {index}, it has 0 to "
                            f"{len(there_are) - 1}")
    return tuple(there_are[index] for index in indices)


def feature_channels(model: UNetModel, blocks: Sequence[str]) -> dict[str, int]:
    """Channels of the outputs of the named blocks: those of the last convolution in each."""
    convolutions = {name: [m for m in block.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d))][-1]
                    for name, block in find_blocks(model.feature_blocks, blocks, "block").items()}
    return {name: convolution.out_channels for name, convolution in convolutions.items()}
