"""What the small extractors that are bundled with their weights have in common: images, layers, features, files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from guided_diffusion.errors import UserError
from guided_diffusion.foreign import reading
from guided_diffusion.tensor_files import save_tensors

from ..features import Features
from .base import IMAGE_SIZE

Images = np.ndarray | Tensor


class BundledExtractor(nn.Module):
    """The base of extractors of 32x32 images: a subclass defines `name`, `inputs` and `forward_features`.

    For example, an extractor that reads RGB images and has a convolution, a pooling and a linear layer defines

        name = "small classifier"

        def inputs(self, images):
            return rgb_inputs(images)

        def forward_features(self, inputs):
            feature_map = self.conv(inputs)                                  # (N, 64, 8, 8)
            pooled = feature_map.mean(dim=(2, 3))
            return pooled, feature_map[:, :4], self.classify(pooled)
    """

    name: str
    caveat = ""

    def inputs(self, images: Images) -> Tensor:
        """Images as the network reads them: (N, C, 32, 32) float32 in [-1, 1]. Raises UserError for other images."""
        raise NotImplementedError

    def forward_features(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Pooled features, spatial features and logits, then whatever else the network computes; each (N, ...)."""
        raise NotImplementedError

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the weights."""
        digest = hashlib.sha256()
        for name, tensor in self.state_dict().items():
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def outputs(self, images: Images, batch_size: int = 250) -> list[Tensor]:
        """The results of `forward_features` for all images, float32, on the CPU; `images` as in `inputs`."""
        device = next(self.parameters()).device
        parts = [self.forward_features(piece.to(device)) for piece in self.inputs(images).split(batch_size)]
        return [torch.cat(column).float().cpu() for column in zip(*parts, strict=True)]

    def features(self, images: Images, batch_size: int = 250) -> Features:
        """Features and class probabilities of images; `images` as in `inputs`."""
        pooled, spatial, logits = self.outputs(images, batch_size)[:3]
        return as_features(pooled, spatial, logits)

    def predict(self, images: Images, batch_size: int = 250) -> np.ndarray:
        """The most probable class of each image: (N,), int64; `images` as in `inputs`."""
        return self.features(images, batch_size).probabilities.argmax(axis=1)


Bundled = TypeVar("Bundled", bound=BundledExtractor)
Network = TypeVar("Network", bound=nn.Module)


def as_features(pooled: Tensor, spatial: Tensor, logits: Tensor) -> Features:
    """The features as arrays, with probabilities in place of logits (N, classes)."""
    return Features(pooled.numpy(), spatial.contiguous().numpy(), logits.softmax(dim=1).numpy())


def conv_block(channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    """A 3x3 convolution with batch norm and ReLU."""
    return nn.Sequential(nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=False),
                         nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


def channels_first(images: Images, channels: Sequence[int]) -> Tensor:
    """Moves the channels of images to the front, (N, C, 32, 32), and leaves their type as it is.

    images: uint8 (N, 32, 32, C), or floating point (N, C, 32, 32) in [-1, 1]. channels: the values that C may have.
    Raises UserError for any other shape or type, or for no image at all.
    """
    read_only = isinstance(images, np.ndarray) and not images.flags.writeable
    images = torch.as_tensor(np.array(images) if read_only else images)          # torch warns of what it may not write
    allowed = " or ".join(map(str, channels))
    if images.dtype == torch.uint8:
        expected, channel_dim = f"uint8 images must be (N, 32, 32, {allowed})", 3
    elif images.is_floating_point():
        expected, channel_dim = f"floating-point images must be (N, {allowed}, 32, 32)", 1
    else:
        raise UserError(f"images of type {images.dtype}: must be uint8 or floating point")
    shapes = {(count, IMAGE_SIZE, IMAGE_SIZE) for count in channels}
    if images.ndim != 4 or tuple(images.movedim(channel_dim, 1).shape[1:]) not in shapes:
        raise UserError(f"images of shape {tuple(images.shape)}: {expected}")
    if len(images) == 0:
        raise UserError("no images: at least one is needed")
    return images.movedim(channel_dim, 1)


def load_bundled(path: str | Path, kind: str, build: Callable[[Mapping[str, str]], Bundled]) -> Bundled:
    """Loads the network in a file that `save_bundled` wrote, in evaluation mode and float32.

    kind: its name in messages. build: makes, from the metadata, a network with weights of the same shapes. Raises
    UserError where the file is missing, damaged, or of another kind.
    """
    with reading(path, f"cannot be read as {kind}"), safe_open(path, framework="pt") as file:
        model = build(file.metadata() or {})
        model.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})  # noqa: SIM118
    return channels_last(model.eval())


def save_bundled(model: nn.Module, path: str | Path, metadata: Mapping[str, str]) -> None:
    """Writes weights and metadata to a file: convolutions in float16, the rest in float32."""
    weights = {name: (tensor.half() if tensor.ndim == 4 else tensor).cpu().contiguous()
               for name, tensor in model.state_dict().items()}
    save_tensors(path, weights, metadata)


def channels_last(model: Network) -> Network:
    """Puts the weights in the memory order that is faster for convolutions on most devices; returns the network."""
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return model


@torch.no_grad()
def round_convolutions(model: nn.Module) -> None:
    """Rounds convolution weights to float16, as the file holds them, so that the file's network is measured."""
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.copy_(parameter.half())
