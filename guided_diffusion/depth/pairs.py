"""Pairs of an image and its depth map, from files or rendered, as a network of a given size sees them.

`data` is one of
    an .npz file        arr_0 (N, H, W, 3) uint8, depth (N, H, W) or (N, H, W, 1), whole numbers or floats; for networks
                        with classes arr_1 (N,), whole numbers, and class_names where these have names. As
                        scripts/scenes_render.py writes it.
    a folder            images/NAME.png, .jpg or another picture (`image_files`), and depth/NAME.npy (H, W) or 8- or
                        16-bit grey NAME.png; NAME may have folders in it. Classes are told as `classes` says; their
                        numbers are those that the network was trained with, where its checkpoint states names.
    the word "scenes"   rendered scenes (depth.scenes).
Images of another size are resized and cut as `image_datasets` does it without random crops. Depth maps go the same
way, except that the last step is bilinear, since bicubic resizing overshoots at edges.

A depth range says what becomes -1 and 1: "image" each map's own least and greatest depth, or "NEAR,FAR" two depths in
the units of the files, beyond which is clamped; how much of a data set was, is said in a line. NaN is refused. 0 means
in most files that nothing was measured, and is a depth in others: whole numbers of 0 are refused where NEAR is above 0;
else a line says how many there are, and that they are taken as depth.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from ..classes import ClassNames
from ..dist_util import say
from ..errors import UserError
from ..image_datasets import crop_square, named_labels, resize_smaller_side, say_left_out
from ..image_files import IMAGE_SUFFIXES, find_pictures, image_extent, read_depth_image, read_image
from ..late import Tensor, torch
from ..npz import check_brightest, check_brightness, read_arrays, read_npy
from ..pixels import from_uint8, to_rounded_uint8
from .ranges import OWN_RANGE, parse_depth_range, to_unit_range
from .scenes import DEPTH_RANGE, render
from .scenes.files import MOST_SCENES, render_scenes

SCENES = "scenes"
FEW_SCENES = 300          # more of them are rendered on all cores
DEPTH_SUFFIXES = frozenset((".npy", ".png"))
SHARED_AT_MOST = 0.01     # of the images to measure on

_log = logging.getLogger(__name__)


class Pairs(NamedTuple):
    """N pairs: images (N, C, S, S) and depth (N, 1, S, S), float32 in [-1, 1], labels (N,) int64 or None."""

    images: Tensor
    depth: Tensor
    labels: Tensor | None


class DepthMaps(Protocol):
    """Where depth maps come from; each is read when it is asked for."""

    def depth(self, index: int) -> np.ndarray:
        """One depth map (H, W), whole numbers or floats in the units of the files."""

    def name(self, index: int) -> str:
        """What messages call the depth map."""


class Source(DepthMaps, Protocol):
    """Where pairs come from; each is read when it is asked for."""

    def __len__(self) -> int: ...

    def image(self, index: int, channels: int) -> Image.Image:
        """One image, RGB (3 channels) or grey (1)."""

    def labels(self, known: ClassNames | None) -> np.ndarray | None:
        """The classes (N,) of all images, None where there are none.

        known: the names and numbers that the network was trained with; None: as the images themselves tell.
        """


def read_pairs(data: str, *, size: int, depth_range: str = "", count: int | None = None, flag: str = "num_labels",
               channels: int = 3, class_cond: bool = False, seed: int = 0,
               class_names: ClassNames | None = None) -> Pairs:
    """The first `count` pairs of `data` (None: all), at `size` pixels.

    flag: the option that `count` is, for messages. channels: 3, or 1 for grey images. class_cond: with labels. seed:
    of the scenes. class_names: of the network, where they are known.

    Raises UserError, before anything is computed, for whatever is wrong with them.
    """
    if channels not in (1, 3):
        raise UserError(f"{data}: its images are RGB or grey, and the network has {channels} image channels")
    limits = parse_depth_range(checked_depth_range(data, depth_range))
    source = open_pairs(data, size=size, count=count, flag=flag, seed=seed)
    labels = source.labels(class_names) if class_cond else None
    if class_cond and labels is None:
        raise UserError(f"{data}: has no labels, which the class-conditional network needs: arr_1, one for each image")
    indices = range(len(source) if count is None else count)
    maps = DepthReader(size, limits)
    depth = np.stack([maps.read(source, index) for index in indices])[:, None]
    maps.report(data)
    images = np.stack([read_pixels(source, index, size, channels) for index in indices])
    check_brightest(data, f"first {len(images)}", int(to_rounded_uint8(images.max())))
    return Pairs(torch.from_numpy(images), torch.from_numpy(depth),
                 None if labels is None else torch.from_numpy(labels[:len(indices)].astype(np.int64)))


def check_apart(learnt: Pairs, held: Pairs, what: str) -> None:
    """Raises UserError, beginning with `what`, where images to measure on are among those that are learnt from.

    A few, which large sets may share, are warned of.
    """
    known = {_digest(image) for image in learnt.images}
    shared = [number for number, image in enumerate(held.images) if _digest(image) in known]
    if not shared:
        return
    words = (f"{what}: {len(shared)} of its {len(held.images)} images, the first is number {shared[0]}, are also "
             "learnt from")
    if len(shared) > SHARED_AT_MOST * len(held.images):
        raise UserError(f"{words}, and so they test nothing; name other data")
    _log.warning("%s", words)


def _digest(image: Tensor) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(image.numpy()).data).digest()


def class_names_of(data: str) -> ClassNames | None:
    """The classes of a folder of pairs; None for other data, whose classes have numbers only."""
    folder = Path(data) / "images"
    return ClassNames.from_images(folder, find_pictures(folder).files) if folder.is_dir() else None


def open_pairs(data: str, *, size: int, count: int | None, flag: str, seed: int = 0) -> Source:
    """The pairs that `data` names, at least `count` of them; raises UserError as `read_pairs`."""
    if data == SCENES:
        if count is None:
            raise UserError(f"--{flag}: is not given, and there is no end of scenes")
        if count > MOST_SCENES:
            raise UserError(f"--{flag} {count}: must be at most {MOST_SCENES} with scenes, which are all in memory")
        scenes = (render if count <= FEW_SCENES else render_scenes)(seed, range(count), size)
        return _Arrays(data, scenes.rgb, scenes.depth, scenes.label)
    if not data:
        raise UserError("--data is not given: name an .npz file or a folder of images and depth maps, or scenes")
    path = Path(data)
    if not path.exists():
        raise UserError(f"{data}: there is no such file or folder of images and depth maps")
    source = _Folder(path) if path.is_dir() else _read_npz(path)
    if not len(source):
        raise UserError(f"{data}: holds no pair of an image and a depth map")
    if count is not None and count > len(source):
        raise UserError(f"--{flag} {count}: must be at most {len(source)}, the number of pairs in {data}")
    return source


# Depth


def checked_depth_range(data: str, text: str) -> str:
    """The depth range of `data` where `--depth_range` is `text`, "" if unset; raises UserError for what it can't be."""
    if data == SCENES:
        if text not in ("", DEPTH_RANGE):
            raise UserError(f"--depth_range {text}: is always {DEPTH_RANGE} for scenes")
        return DEPTH_RANGE
    parse_depth_range(text or OWN_RANGE)
    return text or OWN_RANGE


class DepthReader:
    """Reads depth maps as (size, size) float32 in [-1, 1], and counts what `report` says of them.

    limits: what becomes -1 and 1; None: the extremes of each map, beyond which nothing is. grey: the maps are images of
    depth, in which 0 is black and nothing else. What is counted are the pixels of the files in the square that is used.
    """

    def __init__(self, size: int, limits: tuple[float, float] | None, *, grey: bool = False) -> None:
        self.size, self.limits, self.grey = size, limits, grey
        self._pixels = self._beyond = self._zeros = self._maps = self._maps_with_zeros = self._enlarged = 0

    def read(self, source: DepthMaps, index: int) -> np.ndarray:
        """One depth map; raises UserError where it is not finite, is constant, has holes or is beyond the limits."""
        values, name = source.depth(index), source.name(index)
        depth = values.astype(np.float32)
        if not np.isfinite(depth).all():
            raise UserError(f"{name}: has {(~np.isfinite(depth)).sum()} pixels without a finite depth (NaN or "
                            "infinite)")
        if depth.min() == depth.max():
            raise UserError(f"{name}: is constant, every pixel has depth {depth.flat[0]:g}")
        whole = Image.fromarray(depth)
        used = np.asarray(crop_square(whole, min(whole.size)))
        self._enlarged += len(used) < self.size
        self._count_zeros(used, name, values.dtype.kind in "iu")
        picture = resize_smaller_side(whole, self.size, Image.Resampling.BILINEAR)
        resized = np.asarray(crop_square(picture, self.size))
        if resized.min() == resized.max():
            raise UserError(f"{name}: is constant in the part of the image that is used")
        near, far = self.limits or (float(resized.min()), float(resized.max()))
        unit = to_unit_range(resized, near, far)
        if unit.min() == unit.max():
            raise UserError(f"{name}: lies outside --depth_range {near:g},{far:g}, its depths are {used.min():g} to "
                            f"{used.max():g}")
        self._pixels += used.size
        self._beyond += int(((used < near) | (used > far)).sum()) if self.limits else 0
        return unit.astype(np.float32)

    def _count_zeros(self, depth: np.ndarray, name: str, whole_numbers: bool) -> None:
        """Counts pixels of 0, and raises UserError where they are no depths; beside negative depths 0 is one."""
        self._maps += 1
        zeros = 0 if self.grey or depth.min() < 0 else int((depth == 0).sum())
        if not zeros:
            return
        if whole_numbers and self.limits and self.limits[0] > 0:
            near, far = self.limits
            raise UserError(f"{name}: has {zeros} pixels of depth 0, below --depth_range {near:g},{far:g}; in files of "
                            "whole numbers 0 says that nothing was measured: fill them, or give NEAR as 0 where it is "
                            "a depth")
        self._zeros += zeros
        self._maps_with_zeros += 1

    def report(self, data: object) -> None:
        """Says how much of the maps of `data` was enlarged and clamped so far, and how much is 0, where any is."""
        if self._enlarged:
            say(f"{data}: {self._enlarged} of {self._maps} depth maps are enlarged to {self.size} pixels")
        if self._beyond and self.limits:
            near, far = self.limits
            say(f"{data}: {self._share(self._beyond)} of the pixels of its depth maps were beyond --depth_range "
                f"{near:g},{far:g} and clamped")
        if self._zeros:
            say(f"{data}: {self._share(self._zeros)} of the pixels of its depth maps, in {self._maps_with_zeros} of "
                f"{self._maps}, are 0, which is taken as a depth; where it means that nothing was measured, fill them "
                "first")

    def _share(self, count: int) -> str:
        return f"{100 * count / self._pixels:.2g} %"


def read_pixels(source: Source, index: int, size: int, channels: int) -> np.ndarray:
    """One image, (channels, size, size) float32 in [-1, 1]."""
    image = crop_square(resize_smaller_side(source.image(index, channels), size), size)
    pixels = np.asarray(image).reshape(size, size, channels)
    return from_uint8(pixels.transpose(2, 0, 1))


# Sources


class _Arrays:
    """Pairs in memory: images (N, H, W, 3) uint8, depth (N, H, W), labels (N,) or None."""

    def __init__(self, data: str, images: np.ndarray, depth: np.ndarray, labels: np.ndarray | None) -> None:
        self._data, self._images, self._depth, self._labels = data, images, depth, labels

    def __len__(self) -> int:
        return len(self._images)

    def image(self, index: int, channels: int) -> Image.Image:
        image = Image.fromarray(self._images[index])
        return image if channels == 3 else image.convert("L")

    def depth(self, index: int) -> np.ndarray:
        return self._depth[index]

    def name(self, index: int) -> str:
        return f"{self._data}: depth map {index}"

    def labels(self, known: ClassNames | None) -> np.ndarray | None:
        return self._labels


def _read_npz(path: Path) -> _Arrays:
    images, depth, labels = read_arrays(path, ["arr_0", "depth", "arr_1"],
                                        f"{path}: is no .npz file of images and depth maps, or is damaged")
    if images is None or images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape[1:]:
        raise UserError(f"{path}: arr_0 {_shown(images)}, must be images (N, H, W, 3) uint8")
    if len(images):
        check_brightness(str(path), images)
    if depth is not None and depth.ndim == 4 and depth.shape[3] == 1:
        depth = depth[..., 0]
    if depth is None or depth.dtype.kind not in "fiu" or depth.ndim != 3:
        raise UserError(f"{path}: depth {_shown(depth)}, must be depth maps (N, H, W) of numbers")
    if depth.shape != images.shape[:3]:
        raise UserError(f"{path}: depth {_shown(depth)}, must be {images.shape[:3]}, as there are {len(images)} images "
                        f"of {images.shape[1]}x{images.shape[2]} pixels")
    if labels is not None and (labels.shape != (len(images),) or labels.dtype.kind not in "iu"):
        raise UserError(f"{path}: arr_1 {_shown(labels)}, must be a class (a whole number) for each image")
    return _NpzArrays(str(path), images, depth, labels)


class _NpzArrays(_Arrays):
    """Those of an .npz file, whose classes may have names."""

    def labels(self, known: ClassNames | None) -> np.ndarray | None:
        return self._labels if self._labels is None else named_labels(self._data, self._labels, known, self._data)[0]


def _shown(array: np.ndarray | None) -> str:
    return "is missing" if array is None else f"is {array.shape} {array.dtype}"


class _Folder:
    """Pairs in the folders images/ and depth/, in the order of their names."""

    def __init__(self, path: Path) -> None:
        images, depth = _by_name(path / "images", IMAGE_SUFFIXES), _by_name(path / "depth", DEPTH_SUFFIXES)
        for name in sorted(images.keys() ^ depth.keys()):
            there, missing = (images[name], "depth") if name in images else (depth[name], "images")
            raise UserError(f"{there}: has no counterpart {path / missing / name}")
        self._root = path / "images"
        self._images = [images[name] for name in sorted(images)]
        self._depth = [depth[name] for name in sorted(images)]

    def __len__(self) -> int:
        return len(self._images)

    def image(self, index: int, channels: int) -> Image.Image:
        return read_image(self._images[index], channels)

    def depth(self, index: int) -> np.ndarray:
        path = self._depth[index]
        depth = _read_npy(path) if path.suffix.lower() == ".npy" else read_depth_image(path)
        width, height = image_extent(self._images[index])
        if depth.shape != (height, width):
            raise UserError(f"{path}: is {depth.shape[0]}x{depth.shape[1]}, must be {height}x{width}, as its image")
        return depth

    def name(self, index: int) -> str:
        return str(self._depth[index])

    def labels(self, known: ClassNames | None) -> np.ndarray:
        return (known or ClassNames.from_images(self._root, self._images)).numbers(self._root, self._images)


def _by_name(folder: Path, suffixes: frozenset[str]) -> dict[str, Path]:
    """The pictures below a folder by their places in it, without their suffixes; says what else lies there."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; pairs lie in images/ and depth/, under the same names")
    pictures = find_pictures(folder, suffixes)
    say_left_out(pictures, folder)
    found: dict[str, Path] = {}
    for path in pictures.files:
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in found:
            raise UserError(f"{path}: has the same name as {found[name].name}, one of them must go")
        found[name] = path
    return found


def _read_npy(path: Path) -> np.ndarray:
    depth = read_npy(path, "is no .npy file of numbers, or is damaged")
    if depth.ndim != 2 or depth.dtype.kind not in "fiu":
        raise UserError(f"{path}: {_shown(depth)}, must be a depth map (H, W) of numbers")
    return depth
