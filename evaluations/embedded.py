"""The embedded judge: a small convolutional classifier of clean Fashion-MNIST images, shipped with its weights.

It says which share of samples is recognised as the class asked for, and its features serve FID, sFID and the
Inception Score where Inception would be out of place. It never guides sampling. Trained by
`python -m evaluations.train_embedded`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from guided_diffusion.errors import UserError

from .features import Features

IMAGE_SIZE = 32
SPATIAL_SHAPE = (8, 8, 8)
CLASS_NAMES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
WEIGHTS = Path(__file__).parent / "models" / "fmnist_embedded.safetensors"

Images = np.ndarray | Tensor


class EmbeddedClassifier(nn.Module):
    """Five 3x3 convolutions with batch norm and ReLU (32 -> 16 -> 8 pixels), global average pooling, one linear layer.

    widths: output channels of the five convolutions; the second and the fourth halve the resolution.
    test_accuracy: share of the 10,000 test images classified rightly (NaN before training).

    Its features (`evaluations.features.Features`): pooled (N, 64), the averages over the last map; spatial
    (N, 8, 8, 8), the first 8 channels of the last map at 16 x 16, averaged over squares of 2 x 2; probabilities
    (N, 10).
    """

    name = "embedded Fashion-MNIST classifier"

    def __init__(self, widths: Sequence[int] = (24, 48, 48, 96, 64), test_accuracy: float = float("nan")) -> None:
        super().__init__()
        first, second, third, fourth, last = self.widths = tuple(widths)
        self.test_accuracy = test_accuracy
        self.at_16 = nn.Sequential(_block(1, first), _block(first, second, stride=2), _block(second, third))
        self.at_8 = nn.Sequential(_block(third, fourth, stride=2), _block(fourth, last))
        self.classify = nn.Linear(last, len(CLASS_NAMES))

    def forward(self, grey: Tensor) -> Tensor:
        """Logits (N, 10) of images (N, 1, 32, 32) in [-1, 1]."""
        return self._read(grey)[2]

    def _read(self, grey: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        at_16 = self.at_16(grey.contiguous(memory_format=torch.channels_last))
        pooled = self.at_8(at_16).mean(dim=(2, 3))
        spatial = nn.functional.avg_pool2d(at_16[:, :SPATIAL_SHAPE[0]], 2)
        return pooled, spatial, self.classify(pooled)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the weights."""
        digest = hashlib.sha256()
        for name, tensor in self.state_dict().items():
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def features(self, images: Images, batch_size: int = 250) -> Features:
        """Features and class probabilities of images; `images` as in `to_grey`, which raises the UserErrors."""
        grey, device = to_grey(images), self.classify.weight.device
        parts = [self._read(piece.to(device)) for piece in grey.split(batch_size)]
        pooled, spatial, logits = (torch.cat(column).float().cpu() for column in zip(*parts, strict=True))
        return Features(pooled.numpy(), spatial.contiguous().numpy(), logits.softmax(dim=1).numpy())

    def predict(self, images: Images, batch_size: int = 250) -> np.ndarray:
        """The most probable class of each image: (N,), int64; `images` as in `to_grey`."""
        return self.features(images, batch_size).probabilities.argmax(axis=1)


def _block(channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=False),
                         nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


def to_grey(images: Images) -> Tensor:
    """(N, 1, 32, 32), float32 in [-1, 1]; grey is the mean over the channels.

    images: uint8 (N, 32, 32, 3 or 1), or floating point (N, 3 or 1, 32, 32) in [-1, 1]: a 28 x 28 picture in the
    middle of a black frame. Raises UserError for any other shape or type, or for no image at all.
    """
    images = torch.as_tensor(images)
    if images.dtype == torch.uint8:
        expected, channel_dim = "uint8 images must be (N, 32, 32, 3 or 1)", 3
    elif images.is_floating_point():
        expected, channel_dim = "floating-point images must be (N, 3 or 1, 32, 32)", 1
    else:
        raise UserError(f"images of type {images.dtype}: must be uint8 or floating point")
    shapes = {(channels, IMAGE_SIZE, IMAGE_SIZE) for channels in (1, 3)}
    if images.ndim != 4 or tuple(images.movedim(channel_dim, 1).shape[1:]) not in shapes:
        raise UserError(f"images of shape {tuple(images.shape)}: {expected}")
    if len(images) == 0:
        raise UserError("no images: at least one is needed")
    grey = images.movedim(channel_dim, 1).float().mean(dim=1, keepdim=True)
    return grey / 127.5 - 1 if images.dtype == torch.uint8 else grey


def load_embedded(path: str | os.PathLike | None = None) -> EmbeddedClassifier:
    """The shipped judge, or the one in a file that `save_embedded` wrote; in evaluation mode, float32.

    Raises UserError where the file is missing, damaged, or of another kind.
    """
    path = Path(path or WEIGHTS)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        model = EmbeddedClassifier(json.loads(metadata["widths"]), float(metadata["test_accuracy"]))
        model.load_state_dict(weights)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError):
        raise UserError(f"{path}: does not hold an embedded classifier, or is damaged") from None
    return model.eval().to(memory_format=torch.channels_last)


def save_embedded(model: EmbeddedClassifier, path: str | os.PathLike, notes: dict[str, str]) -> None:
    """Writes the model with its architecture and test accuracy; convolutions in float16, the rest in float32.

    notes: further metadata, such as the training command.
    """
    weights = {name: (tensor.half() if tensor.ndim == 4 else tensor).contiguous()
               for name, tensor in model.state_dict().items()}
    metadata = {**notes, "widths": json.dumps(model.widths), "test_accuracy": f"{model.test_accuracy:.4f}"}
    temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}")
    try:
        temporary.write_bytes(save(weights, metadata))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
