"""The Inception of 2015 whose features FID, sFID, IS, precision and recall are defined on, in PyTorch.

Same features as TensorFlow gives from classify_image_graph_def.pb (Szegedy et al. 2015, arXiv:1512.00567, as the
guided-diffusion evaluator reads it) up to rounding, with the graph's own names for its layers.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guided_diffusion.dtypes import exact_convolutions
from guided_diffusion.errors import UserError

from ..features import FeatureExtractor, Features
from .base import chosen_device
from .inception_graph import FILE_NAME, LOGITS, load_weights, size_caveat

IMAGE_SIZE = 299            # pixels, whatever the images have
POOLED = 2048               # numbers of pool_3
SPATIAL_CHANNELS = 7        # of mixed_6/conv,
SPATIAL_SIDE = 17           # 17 x 17: 2023 numbers
CLASSES = 1008
IMAGES_AT_ONCE = 4          # on a thread of the CPU: about 120 MB in float32
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Conv(nn.Module):
    """A convolution with its batch norm folded in, and a ReLU."""

    def __init__(self, weight: Tensor, bias: Tensor, stride: int, padding: tuple[int, int]) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight, False), nn.Parameter(bias, False)
        self.stride, self.padding = stride, padding

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps (N, C, H, W) of x (N, C', H', W')."""
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding).relu_()


class AveragedConv(Conv):
    """Average pooling, 3x3 at stride 1 over the cells inside the map, before a 1x1 convolution.

    Both are linear and the averages' weights sum to 1, so that they are exchanged: fewer channels are pooled.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps (N, C, H, W) of x (N, C', H, W)."""
        x = F.conv2d(x, self.weight, self.bias)
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False).relu_()


class Join(nn.Module):
    """Several layers on the same input, their channels one after another."""

    def __init__(self, *towers: nn.Module) -> None:
        super().__init__()
        self.towers = nn.ModuleList(towers)

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps of x (N, C, H, W), joined along their channels."""
        return torch.cat([tower(x) for tower in self.towers], dim=1)


class Inception(nn.Module):
    """The network on prepared images; its widths are those of the weights.

    weights: `inception_graph.Weights.tensors`. Raises UserError where a layer is missing, has another kernel than in
    2015, or does not fit the one before.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        conv = functools.partial(_conv, weights)
        self.until_mixed_6 = nn.Sequential(
            conv("conv", 3, stride=2, same=False),
            conv("conv_1", 3, same=False),
            conv("conv_2", 3),
            nn.MaxPool2d(3, stride=2),
            conv("conv_3", 1),
            conv("conv_4", 3, same=False),
            nn.MaxPool2d(3, stride=2),
            *(_mixed_35(conv, name) for name in ("mixed", "mixed_1", "mixed_2")),
            _mixed_3(conv),
            *(_mixed_17(conv, name) for name in ("mixed_4", "mixed_5", "mixed_6")),
        )
        self.after_mixed_6 = nn.Sequential(
            _mixed_17(conv, "mixed_7"),
            _mixed_8(conv),
            _mixed_8x8(conv, "mixed_9", conv("mixed_9/tower_2/conv", 1, averaged=True)),
            _mixed_8x8(conv, "mixed_10", nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1),
                                                       conv("mixed_10/tower_2/conv", 1))),
        )
        if LOGITS not in weights:
            raise UserError(f"has not the weights of the 2015 Inception: {LOGITS} is missing")
        self.classify = nn.Parameter(weights[LOGITS], False)
        self._check_widths()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pooled features, spatial features and logits, in float32.

        images: (N, 3, 299, 299) as `resize` makes them. Returns pool_3 (N, 2048), the first channels of mixed_6/conv
        (N, 17 * 17 * 7) in the order height, width, channel, and the logits without bias (N, 1008).
        """
        x = self.until_mixed_6(images)
        # mixed_6/conv stands first in mixed_6
        spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1).float()
        pooled = self.after_mixed_6(x).mean(dim=(2, 3), dtype=torch.float32)
        return pooled, spatial, pooled @ self.classify

    def _check_widths(self) -> None:
        """Runs shapes alone through the layers."""
        try:
            with torch.device("meta"):
                meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in self.state_dict().items()}
                shapes = torch.func.functional_call(self, meta, torch.empty(1, 3, IMAGE_SIZE, IMAGE_SIZE))
        except RuntimeError as error:
            raise UserError(f"has not the weights of the 2015 Inception: {str(error).splitlines()[0]}") from None
        if shapes[1].shape[1] != SPATIAL_SIDE**2 * SPATIAL_CHANNELS:
            channels = shapes[1].shape[1] // SPATIAL_SIDE**2
            raise UserError(f"has not the weights of the 2015 Inception: mixed_6 has {channels} channels, "
                            f"at least {SPATIAL_CHANNELS} are needed")


def _conv(weights: Mapping[str, Tensor], name: str, *kernel: int, stride: int = 1, same: bool = True,
          averaged: bool = False) -> Conv:
    """The layer of that name; kernel: height and width, or one for both."""
    height, width = kernel if len(kernel) == 2 else kernel * 2
    weight, bias = weights.get(f"{name}.weight"), weights.get(f"{name}.bias")
    if weight is None or bias is None:
        raise UserError(f"has not the weights of the 2015 Inception: {name} is missing")
    if weight.shape[2:] != (height, width):
        raise UserError(f"has not the weights of the 2015 Inception: {name} has a kernel of {tuple(weight.shape[2:])}, "
                        f"must be {height, width}")
    padding = (height // 2, width // 2) if same else (0, 0)
    return (AveragedConv if averaged else Conv)(weight, bias, stride, padding)


MakeConv = Callable[..., Conv]


def _mixed_35(conv: MakeConv, name: str) -> Join:
    """35 x 35: 1x1, 5x5, two 3x3, average."""
    return Join(
        conv(f"{name}/conv", 1),
        nn.Sequential(conv(f"{name}/tower/conv", 1), conv(f"{name}/tower/conv_1", 5)),
        nn.Sequential(conv(f"{name}/tower_1/conv", 1), conv(f"{name}/tower_1/conv_1", 3),
                      conv(f"{name}/tower_1/conv_2", 3)),
        conv(f"{name}/tower_2/conv", 1, averaged=True),
    )


def _mixed_3(conv: MakeConv) -> Join:
    """35 x 35 to 17 x 17."""
    return Join(
        conv("mixed_3/conv", 3, stride=2, same=False),
        nn.Sequential(conv("mixed_3/tower/conv", 1), conv("mixed_3/tower/conv_1", 3),
                      conv("mixed_3/tower/conv_2", 3, stride=2, same=False)),
        nn.MaxPool2d(3, stride=2),
    )


def _mixed_17(conv: MakeConv, name: str) -> Join:
    """17 x 17: 1x1, 7x7 as two, two 7x7 as four, average."""
    return Join(
        conv(f"{name}/conv", 1),
        nn.Sequential(conv(f"{name}/tower/conv", 1), conv(f"{name}/tower/conv_1", 1, 7),
                      conv(f"{name}/tower/conv_2", 7, 1)),
        nn.Sequential(conv(f"{name}/tower_1/conv", 1), conv(f"{name}/tower_1/conv_1", 7, 1),
                      conv(f"{name}/tower_1/conv_2", 1, 7), conv(f"{name}/tower_1/conv_3", 7, 1),
                      conv(f"{name}/tower_1/conv_4", 1, 7)),
        conv(f"{name}/tower_2/conv", 1, averaged=True),
    )


def _mixed_8(conv: MakeConv) -> Join:
    """17 x 17 to 8 x 8."""
    return Join(
        nn.Sequential(conv("mixed_8/tower/conv", 1), conv("mixed_8/tower/conv_1", 3, stride=2, same=False)),
        nn.Sequential(conv("mixed_8/tower_1/conv", 1), conv("mixed_8/tower_1/conv_1", 1, 7),
                      conv("mixed_8/tower_1/conv_2", 7, 1),
                      conv("mixed_8/tower_1/conv_3", 3, stride=2, same=False)),
        nn.MaxPool2d(3, stride=2),
    )


def _mixed_8x8(conv: MakeConv, name: str, pooled: nn.Module) -> Join:
    """8 x 8: 1x1, 3x3 as two side by side, two 3x3 with the second as two side by side, pooled."""
    return Join(
        conv(f"{name}/conv", 1),
        nn.Sequential(conv(f"{name}/tower/conv", 1), Join(conv(f"{name}/tower/mixed/conv", 1, 3),
                                                          conv(f"{name}/tower/mixed/conv_1", 3, 1))),
        nn.Sequential(conv(f"{name}/tower_1/conv", 1), conv(f"{name}/tower_1/conv_1", 3),
                      Join(conv(f"{name}/tower_1/mixed/conv", 1, 3), conv(f"{name}/tower_1/mixed/conv_1", 3, 1))),
        pooled,
    )


def resize(images: Tensor, size: int = IMAGE_SIZE) -> Tensor:
    """(N, 3, size, size), float32 in [-1, 127/128], in channels_last order, as TensorFlow 1 makes it of images.

    Bilinear, no antialiasing; pixel i of the result lies at i * (old size / size) of the image: corners are neither
    aligned nor are pixel centres. images: (N, H, W, 3), uint8.
    """
    x = images
    for dim in (2, 1):
        if x.shape[dim] != size:
            low, high, share = _sources(x.shape[dim], size, images.device)
            low, high = x.index_select(dim, low).float(), x.index_select(dim, high).float()
            x = low.lerp_(high, share if dim == 1 else share[:, 0])
    return ((x.float() - 128) / 128).permute(0, 3, 1, 2)


@functools.lru_cache(maxsize=8)
def _sources(old: int, new: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The two pixels between which each of `new` lies (new,), and the share of the second (new, 1, 1)."""
    place = torch.arange(new, dtype=torch.float32) * (torch.tensor(float(old)) / new)
    low = place.long()
    share = (place - low)[:, None, None]
    return low.to(device), (low + 1).clamp(max=old - 1).to(device), share.to(device)


class InceptionExtractor:
    """The 2015 Inception in PyTorch, as an extractor of the evaluator.

    path: the .pb, or the file that it was converted to; None takes it from the cache, where it is downloaded to.
    cache: folder; None is ~/.cache/guided-pixels. Both as in `inception_graph.load_weights`, which raises UserError.
    device: of PyTorch. dtype: "float32", or "bfloat16" for the convolutions.
    channels_last: memory order of the convolutions' inputs; it is nearly always faster.

    `name` and `fingerprint` (SHA-256 of the .pb) stand in every result. `caveat` says where the .pb has not the size of
    the official one.
    """

    name = "torch Inception 2015"

    def __init__(self, path: str | os.PathLike | None = None, cache: str | os.PathLike | None = None,
                 device: str | torch.device = "cpu", dtype: str = "float32", channels_last: bool = True) -> None:
        if dtype not in DTYPES:
            raise UserError(f"dtype {dtype}: must be one of {', '.join(DTYPES)}")
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device {device}: cannot be used ({str(error).splitlines()[0]})") from None
        weights = load_weights(path, cache)
        self.fingerprint, self.caveat = weights.sha256, size_caveat(weights.size)
        self.device, self.dtype = torch.device(device), DTYPES[dtype]
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.settings = {"backend": "torch", "dtype": dtype, "resize": f"bilinear as TensorFlow, {IMAGE_SIZE}",
                         "channels_last": channels_last}
        try:
            self.model = Inception(weights.tensors).eval()
        except UserError as error:
            raise UserError(f"{path or FILE_NAME}: {error}") from None
        for layer in self.model.modules():
            if isinstance(layer, Conv):
                layer.to(self.device, self.dtype)
                layer.weight.data = layer.weight.data.contiguous(memory_format=self.memory_format)
        self.model.to(self.device)
        # on a busy machine, threads that share each layer wait for the slowest one: each takes images of its own
        self._threads = torch.get_num_threads()
        self._workers = _workers(self._threads) if self.device.type == "cpu" and self._threads > 1 else None

    def features(self, images: np.ndarray) -> Features:
        """Features of one batch: pooled (N, 2048), spatial (N, 2023), probabilities (N, 1008).

        images: (N, H, W, 3), uint8, RGB, of any size. Raises UserError for other images, or where a feature is not
        finite.
        """
        check_images(images)
        if self.device.type == "cpu":
            each = min(IMAGES_AT_ONCE, -(-len(images) // self._threads))
            pieces = [images[first:first + each] for first in range(0, len(images), each)]
            parts = (self._workers.map if self._workers and len(pieces) > 1 else map)(self._read, pieces)
            features = Features(*map(np.concatenate, zip(*parts, strict=True)))
        else:
            features = self._read(images)
        check_finite(features)
        return features

    @torch.inference_mode()
    def _read(self, images: np.ndarray) -> Features:
        with exact_convolutions(self.device):
            prepared = resize(torch.from_numpy(np.ascontiguousarray(images)).to(self.device))
            prepared = prepared.to(self.dtype).contiguous(memory_format=self.memory_format)
            pooled, spatial, logits = self.model(prepared)
            return Features(*(x.cpu().numpy() for x in (pooled, spatial, logits.softmax(dim=1))))


def check_images(images: np.ndarray) -> None:
    """Raises UserError where images are not (N, H, W, 3), uint8, with N, H, W > 0."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or images.size == 0:
        raise UserError(f"images of shape {images.shape} and type {images.dtype}: must be (N, H, W, 3), uint8, N > 0")


def check_finite(features: Features) -> None:
    """Raises UserError, naming the first image of the batch, where a feature is NaN or infinite."""
    finite = np.all([np.isfinite(x).reshape(len(x), -1).all(axis=1) for x in features], axis=0)
    if not finite.all():
        raise UserError(f"image {finite.argmin()} of a batch of {len(finite)}: its features are not finite, "
                        "the weights are damaged")


def _workers(count: int) -> ThreadPoolExecutor:
    """Threads in which PyTorch computes on one thread each."""
    started = threading.Barrier(count)

    def start() -> None:
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(count)
    wait([pool.submit(start) for _ in range(count)])
    # it was set for these threads, and as a default for later ones: that is put back
    torch.set_num_threads(count)
    return pool


def load(*, inception: str = "", device: str = "", dtype: str = "float32") -> FeatureExtractor:
    """The Inception in the file; see `evaluations.extractors.base.Loader`."""
    return InceptionExtractor(inception or None, device=chosen_device(device), dtype=dtype)
