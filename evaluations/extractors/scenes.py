"""The extractor of scenes: a small convolutional network for rendered rooms (`guided_diffusion.depth.scenes`).

It estimates their depth map and the kind of their main object, and its features serve FID, sFID, precision, recall and
the Inception Score of scenes. These numbers can be compared with those of no other extractor. It is trained on scenes
of a seed that no other network sees, and never guides sampling. `evaluations.extractors.train_scenes` trains it, and
others of its kind on other images with depth, which know nothing of kinds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from guided_diffusion.checkpoint import ready
from guided_diffusion.depth.ranges import parse_depth_range
from guided_diffusion.depth.scenes import DEPTH_RANGE, FAR, KINDS, NEAR
from guided_diffusion.errors import UserError
from guided_diffusion.pixels import from_uint8

from ..features import FeatureExtractor, Features
from .base import bundled_file, chosen_device
from .bundled import BundledExtractor, Images, as_features, channels_first, conv_block, load_bundled, save_bundled

SPATIAL_SHAPE = (4, 8, 8)
WEIGHTS = bundled_file("scenes")


class ScenesExtractor(BundledExtractor):
    """A U-shaped network of 3x3 convolutions with batch norm and ReLU: 32 -> 16 -> 8 -> 4 pixels and back, with skips.

    widths: channels at 32, 16, 8 and 4 pixels. accuracy: on held-out scenes, by the words of
    `evaluations.extractors.train_scenes.accuracy` (empty before training). limits: its NEAR and FAR.

    Its features (`evaluations.features.Features`): pooled (N, 64), the averages over the map at 4 x 4; spatial
    (N, 4, 8, 8), the first 4 channels of the map at 8 x 8 on the way down; probabilities (N, 4) of the kinds. Depth is
    upsampled by moving channels to pixels, which keeps edges sharp.
    """

    name = "judge of scenes"            # stands in stored statistics, in results, and in the keys of cached features

    def __init__(self, widths: Sequence[int] = (12, 32, 64, 64), accuracy: Mapping[str, float] | None = None,
                 limits: tuple[float, float] = (NEAR, FAR)) -> None:
        super().__init__()
        self.limits = limits
        self.settings: dict[str, str] = {}              # what results say of a user's network
        at_32, at_16, at_8, at_4 = self.widths = tuple(widths)
        self.accuracy = dict(accuracy or {})
        self.down_32 = conv_block(3, at_32)
        self.down_16 = nn.Sequential(conv_block(at_32, at_16, stride=2), conv_block(at_16, at_16))
        self.down_8 = nn.Sequential(conv_block(at_16, at_8, stride=2), conv_block(at_8, at_8))
        self.down_4 = nn.Sequential(conv_block(at_8, at_4, stride=2), conv_block(at_4, at_4))
        self.to_8, self.up_8 = _finer(at_4, at_8 // 2), conv_block(at_8 + at_8 // 2, at_8)
        self.to_16, self.up_16 = _finer(at_8, at_16), conv_block(at_16 + at_16, at_16)
        self.to_32, self.up_32 = _finer(at_16, at_32), conv_block(at_32 + at_32, at_32)
        self.to_depth = nn.Conv2d(at_32, 1, 3, padding=1)
        self.classify = nn.Linear(at_4, len(KINDS))

    def forward(self, rgb: Tensor) -> tuple[Tensor, Tensor]:
        """Depth (N, 1, 32, 32), about -1 (NEAR) to 1 (FAR), and logits (N, 4) of images (N, 3, 32, 32) in [-1, 1]."""
        _, _, logits, depth = self.forward_features(rgb)
        return depth, logits

    def inputs(self, images: Images) -> Tensor:
        """RGB images (N, 3, 32, 32) in [-1, 1] of uint8 (N, 32, 32, 3), or of floating point (N, 3, 32, 32)."""
        images = channels_first(images, (3,))
        return from_uint8(images) if images.dtype == torch.uint8 else images.float()

    def forward_features(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pooled features (N, 64), spatial features (N, 4, 8, 8), logits (N, 4) and depth (N, 1, 32, 32)."""
        at_32 = self.down_32(inputs.contiguous(memory_format=torch.channels_last))
        at_16 = self.down_16(at_32)
        at_8 = self.down_8(at_16)
        at_4 = self.down_4(at_8)
        pooled = at_4.mean(dim=(2, 3))
        x = self.up_8(torch.cat([self.to_8(at_4), at_8], dim=1))
        x = self.up_16(torch.cat([self.to_16(x), at_16], dim=1))
        x = self.up_32(torch.cat([self.to_32(x), at_32], dim=1))
        return pooled, at_8[:, :SPATIAL_SHAPE[0]], self.classify(pooled), self.to_depth(x)

    def depth(self, images: Images, batch_size: int = 250) -> np.ndarray:
        """Depth maps (N, 32, 32) float32, from -1 (NEAR) to 1 (FAR). Raises UserError as `inputs` does."""
        return self.features_and_depth(images, batch_size)[1]

    def features_and_depth(self, images: Images, batch_size: int = 250) -> tuple[Features, np.ndarray]:
        """Features and depth maps, as `features` and `depth` return them, from one evaluation of the network."""
        pooled, spatial, logits, depth = self.outputs(images, batch_size)
        return as_features(pooled, spatial, logits), depth[:, 0].clamp(-1, 1).contiguous().numpy()


def _finer(channels: int, out_channels: int) -> nn.Sequential:
    """Doubles the resolution: a 1x1 convolution makes four times as many channels, which become pixels."""
    return nn.Sequential(nn.Conv2d(channels, 4 * out_channels, 1, bias=False), nn.BatchNorm2d(4 * out_channels),
                         nn.ReLU(inplace=True), nn.PixelShuffle(2))


def load_scenes(path: str | Path | None = None) -> ScenesExtractor:
    """Loads the bundled extractor, or the one in a file that `save_scenes` wrote, in evaluation mode.

    Raises UserError where the file is missing, damaged, or of another kind.
    """
    def build(metadata: Mapping[str, str]) -> ScenesExtractor:
        limits = parse_depth_range(metadata.get("depth_range", DEPTH_RANGE)) or (NEAR, FAR)
        return ScenesExtractor(json.loads(metadata["widths"]), json.loads(metadata["accuracy"]), limits)

    return load_bundled(path or WEIGHTS, "an extractor of scenes", build)


def save_scenes(model: ScenesExtractor, path: str | Path, notes: dict[str, str]) -> None:
    """Writes the extractor with its architecture and accuracy: convolutions in float16, the rest in float32.

    notes: further metadata, such as the training command.
    """
    save_bundled(model, path, {**notes, "widths": json.dumps(model.widths), "accuracy": json.dumps(model.accuracy),
                               "depth_range": _range_text(model)})


def _range_text(model: ScenesExtractor) -> str:
    near, far = model.limits
    return f"{near:g},{far:g}"


def load(*, inception: str = "", device: str = "", dtype: str = "float32") -> FeatureExtractor:
    """The bundled extractor, for evaluation; see `evaluations.extractors.base.Loader`."""
    return ready(load_scenes(), chosen_device(device))


def load_own(path: Path, device: str) -> FeatureExtractor:
    """The extractor in a file that `save_scenes` wrote, as `load_scenes` and `load` have it.

    Raises UserError where the file holds anything else.
    """
    try:
        extractor = load_scenes(path)
    except UserError as error:
        raise UserError(f"--backend {path}: is no depth network that scripts/train_scenes.py wrote ({error})") from None
    extractor.name, extractor.settings = path.name, {"depth_range": _range_text(extractor)}
    return ready(extractor, chosen_device(device))
