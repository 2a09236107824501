"""EfficientNet-Lite0, a network that classifies photographs: its layers, and reading its weights.

Tan and Le 2019 (arXiv:1905.11946) without squeeze-and-excitation and with ReLU6, as TensorFlow's EfficientNet-Lite has
it. Batch norms are folded into the convolutions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guided_diffusion.errors import UserError

IMAGE_SIZE = 224            # pixels
POOLED = 1280
SPATIAL_CHANNELS = 7        # of the output of block EARLY,
SPATIAL_SIDE = 14           # 14 x 14: 1372 numbers
EARLY = 7                   # the last of the first eight of sixteen blocks, 80 channels
CLASSES = 1000              # of ImageNet-1k
EPSILON = 1e-3              # of the batch norms

STEM = 32                   # channels
STAGES = (                  # of blocks: how many, kernel, stride of the first, expansion, channels
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320))


class SameConv(nn.Conv2d):
    """A convolution with a bias, padded as TensorFlow pads: at stride 2, right and bottom get the odd row.

    At stride 2, height and width of its input must be even.
    """

    def __init__(self, channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(channels, out_channels, kernel, stride, groups=groups)
        before = (kernel - stride) // 2
        self.edges = (before, kernel - stride - before) * 2 if kernel > 1 else (0, 0, 0, 0)

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps (N, C, H / stride, W / stride) of x (N, C', H, W)."""
        return super().forward(F.pad(x, self.edges) if any(self.edges) else x)


class Block(nn.Module):
    """An inverted bottleneck: channels are widened, convolved one by one, and narrowed; x is added where it fits."""

    def __init__(self, channels: int, out_channels: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels * expansion
        self.expand = SameConv(channels, wide, 1) if expansion > 1 else None
        self.depthwise = SameConv(wide, wide, kernel, stride, groups=wide)
        self.project = SameConv(wide, out_channels, 1)
        self.adds = stride == 1 and channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps (N, C, H / stride, W / stride) of x (N, C', H, W)."""
        wide = x if self.expand is None else F.relu6(self.expand(x))
        narrow = self.project(F.relu6(self.depthwise(wide)))
        return x + narrow if self.adds else narrow


class EfficientNetLite0(nn.Module):
    """The network on prepared images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = SameConv(3, STEM, 3, stride=2)
        self.blocks = nn.ModuleList(_blocks())
        self.head = SameConv(STAGES[-1][-1], POOLED, 1)
        self.classify = nn.Linear(POOLED, CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pooled features (N, 1280), spatial features (N, 7, 14, 14) and logits (N, 1000).

        images: (N, 3, 224, 224), where the values 0 and 255 of a channel are -127 / 128 and 1. Spatial features are
        the first channels of the map after the eighth block.
        """
        x, spatial = F.relu6(self.stem(images)), images
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number == EARLY:
                spatial = x[:, :SPATIAL_CHANNELS]
        pooled = F.relu6(self.head(x)).mean(dim=(2, 3))
        return pooled, spatial, self.classify(pooled)


def _blocks() -> Iterator[Block]:
    channels = STEM
    for count, kernel, stride, expansion, out_channels in STAGES:
        for number in range(count):
            yield Block(channels, out_channels, kernel, 1 if number else stride, expansion)
            channels = out_channels


def build(tensors: Mapping[str, Tensor]) -> EfficientNetLite0:
    """Returns the network with these weights, in evaluation mode.

    tensors: as `fold` returns them. Raises UserError where one is missing or of another shape.
    """
    with torch.device("meta"):
        network = EfficientNetLite0()
    try:
        network.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        detail = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"does not hold an EfficientNet-Lite0: {detail}") from None
    return network.eval().requires_grad_(False)


def fold(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights of `EfficientNetLite0`, float32, from those of a network with batch norms.

    state: by the names of EfficientNet-Lite-PyTorch, like "_blocks.3._bn1.running_mean". Raises UserError where one is
    missing or does not fit.
    """
    try:
        tensors = {f"classify.{part}": state[f"_fc.{part}"].float().contiguous() for part in ("weight", "bias")}
        for name, conv, norm in _convolutions():
            scale, shift, mean, variance = (
                state[f"{norm}.{part}"].double() for part in ("weight", "bias", "running_mean", "running_var"))
            scale = scale / (variance + EPSILON).sqrt()
            weight = state[f"{conv}.weight"].double() * scale.view(-1, 1, 1, 1)
            tensors |= {f"{name}.weight": weight.float().contiguous(),
                        f"{name}.bias": (shift - mean * scale).float().contiguous()}
    except KeyError as error:
        raise UserError(f"does not hold an EfficientNet-Lite0: {error.args[0]} is missing") from None
    except (RuntimeError, AttributeError, TypeError) as error:
        raise UserError(f"does not hold an EfficientNet-Lite0: {str(error).splitlines()[0]}") from None
    return tensors


def _convolutions() -> Iterator[tuple[str, str, str]]:
    """Each convolution's name here, its own name there, and that of its batch norm there."""
    yield "stem", "_conv_stem", "_bn0"
    expansions = [expansion for count, _, _, expansion, _ in STAGES for _ in range(count)]
    for number, expansion in enumerate(expansions):
        here, there = f"blocks.{number}", f"_blocks.{number}"
        if expansion > 1:
            yield f"{here}.expand", f"{there}._expand_conv", f"{there}._bn0"
        yield f"{here}.depthwise", f"{there}._depthwise_conv", f"{there}._bn1"
        yield f"{here}.project", f"{there}._project_conv", f"{there}._bn2"
    yield "head", "_conv_head", "_bn1"
