"""Pictures of geometry: samples with the depth that is estimated of them, surface normals, and point clouds.

Each folder holds a finished run of 32x32 images. Column i of every block is image number i, so that runs with the same
seed show what guidance changes. Normals and point clouds need the camera, which is known of rendered rooms alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from guided_diffusion.depth.ranges import from_unit_range, to_unit_range
from guided_diffusion.depth.scenes import FAR, NEAR, intrinsics
from guided_diffusion.errors import UserError
from guided_diffusion.files import check_ending, check_writable
from guided_diffusion.npz import BatchFile
from guided_diffusion.options import Options, comma_separated, option, required
from guided_diffusion.pictures import save_comparison
from guided_diffusion.runs.record import first_images, run_samples

from ..extractors import find_extractor
from ..extractors.depth import DepthEstimator, check_scenes, metres

ROOMS = "scenes"                # the depth network of rendered rooms
TURN, TILT = 25.0, 20.0         # degrees by which a point cloud is turned to the side and tilted down
CLOUD_SIZE = 128                # pixels
DENSITY = 6                     # points per pixel and axis


def depth_colours(depth: np.ndarray) -> np.ndarray:
    """Depth (N, H, W) in [-1, 1] in colours, (N, H, W, 3) uint8; near is bright."""
    from matplotlib import colormaps

    return colormaps["magma"]((1 - depth) / 2, bytes=True)[..., :3]


def points(depth: np.ndarray) -> np.ndarray:
    """The point that each pixel sees, (..., H, W, 3) in metres: to the right, down, and along the optical axis.

    depth: (..., H, W), metres, of square scenes.
    """
    focal, middle = intrinsics(depth.shape[-1])
    down, across = np.mgrid[:depth.shape[-2], :depth.shape[-1]]
    return np.stack([(across - middle) / focal * depth, (down - middle) / focal * depth, depth], axis=-1)


def normals(depth: np.ndarray) -> np.ndarray:
    """Unit normals (..., H, W, 3), towards the camera, of the surface with this depth (..., H, W) in metres."""
    surface = points(depth)
    across, down = np.gradient(surface, axis=-2), np.gradient(surface, axis=-3)
    normal = np.cross(down, across)
    return normal / np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-9)


def normal_colours(depth: np.ndarray) -> np.ndarray:
    """The normals of depth (N, H, W) in [-1, 1] in their usual colours, (N, H, W, 3) uint8.

    Right is red, up is green, towards the camera is blue.
    """
    towards = normals(metres(depth)) * np.array([1, -1, -1])
    return ((towards + 1) / 2 * 255 + 0.5).astype(np.uint8)


def point_cloud(image: np.ndarray, depth: np.ndarray, turn: float = TURN, tilt: float = TILT) -> np.ndarray:
    """The pixels as points in space, seen from the side and from above: (CLOUD_SIZE, CLOUD_SIZE, 3) uint8.

    image: (H, W, 3) uint8. depth: (H, W), metres. turn, tilt: degrees about the middle of the scene.
    """
    fine = np.repeat(np.repeat(image, DENSITY, axis=0), DENSITY, axis=1).reshape(-1, 3)
    cloud = points(_enlarged(depth, DENSITY)).reshape(-1, 3)
    middle = np.array([0, 0, np.median(cloud[:, 2])])
    (c, s), (up, back) = ((np.cos(a), np.sin(a)) for a in np.radians([turn, tilt]))
    about_vertical = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
    about_horizontal = np.array([[1, 0, 0], [0, up, -back], [0, back, up]])
    cloud = (cloud - middle) @ (about_horizontal @ about_vertical).T + middle * np.array([1, 1, 1.25])
    order = np.argsort(-cloud[:, 2])
    cloud, fine = cloud[order], fine[order]
    focal, centre = intrinsics(CLOUD_SIZE)
    x, y = (np.rint(focal * cloud[:, axis] / cloud[:, 2] + centre).astype(int) for axis in (0, 1))
    canvas = np.full((CLOUD_SIZE, CLOUD_SIZE, 3), 255, np.uint8)
    for colour, column, row in zip(fine, x, y, strict=True):           # far points first, near ones over them
        if 0 <= row < CLOUD_SIZE and 0 <= column < CLOUD_SIZE:
            canvas[row, column] = colour
    return canvas


def _enlarged(depth: np.ndarray, factor: int) -> np.ndarray:
    """Depth (H, W) at `factor` times the size, linear between the middles of pixels, but not across edges in depth."""
    size = len(depth)
    place = (np.arange(size * factor) + 0.5) / factor - 0.5
    low = np.clip(np.floor(place).astype(int), 0, size - 1)
    high, part = np.clip(low + 1, 0, size - 1), np.clip(place - low, 0, 1)
    rows = _between(depth[low], depth[high], part[:, None])
    return _between(rows[:, low], rows[:, high], part[None])


def _between(one: np.ndarray, other: np.ndarray, part: np.ndarray) -> np.ndarray:
    """Interpolates, but takes the nearer of the two values where they are apart by more than 15 %."""
    edge = abs(one - other) > 0.15 * np.minimum(one, other)
    return np.where(edge, np.where(part < 0.5, one, other), (1 - part) * one + part * other)


@dataclass(frozen=True)
class DepthPicturesOptions(Options):
    """The pictures."""

    out: str = required("PNG file: images, depth maps and normals")
    cloud: str = option("", "PNG file: point clouds; unset: none")
    num_images: int = option(12, "images of each run", minimum=1)
    backend: str = option(ROOMS, "the network that estimates depth, as --backend of the evaluator; with one of yours, "
                          "whose camera is not known, normals are left out")
    frames: str = option("", "file of images, .npz, whose first ones are shown above those of the runs")
    far: float | None = option(None, "metres from which on depth is drawn black, 0 is bright; unset: the range of the "
                               "network", above=0)
    titles: str = option("", "titles of the blocks, separated by commas; unset: the names of file and folders")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cloud and self.backend != ROOMS:
            raise UserError(f"--cloud {self.cloud}: needs the camera of {ROOMS}, which --backend {self.backend} is not")


def draw_geometry(folders: Sequence[str], options: DepthPicturesOptions) -> str:
    """Draws the runs in these folders; returns which files there are.

    Raises UserError where there is no run, for a file of frames without images, where not every block has a title of
    its own, and for images of another size than the network's depth maps.
    """
    for flag, path in (("--out", options.out), *([("--cloud", options.cloud)] if options.cloud else [])):
        check_ending(flag, path, ".png")
        check_writable(flag, path, parents=True, read=[options.out] if flag == "--cloud" else [])
    rows: dict[str, np.ndarray] = {}
    clouds: dict[str, np.ndarray] = {}
    columns, estimator = min(12, options.num_images), _estimator(options.backend)
    for name, images in _blocks(folders, options).items():
        depth = estimator.features_and_depth(images)[1]
        if depth.shape != images.shape[:3]:
            raise UserError(f"{name}: its images are {images.shape[1]}x{images.shape[2]}, the depth maps of --backend "
                            f"{options.backend} {depth.shape[1]}x{depth.shape[2]}")
        colours = depth_colours(_drawn_to(options.far, depth, estimator))
        if options.backend != ROOMS:
            filling = np.full((-len(images) % columns, *images.shape[1:]), 255, np.uint8)
            rows[name] = np.concatenate([images, filling, colours])
            continue
        rows |= {name: images, f"{name}: depth": colours, f"{name}: normals": normal_colours(depth)}
        clouds[name] = np.stack([point_cloud(image, one) for image, one in zip(images, metres(depth), strict=True)])
    save_comparison(rows, Path(options.out), columns)
    drawn = f"geometry: {options.out}"
    if not options.cloud:
        return drawn
    save_comparison({name: cloud[:columns // 2] for name, cloud in clouds.items()}, Path(options.cloud), columns // 2)
    return f"{drawn}\npoint clouds: {options.cloud}"


def _estimator(backend: str) -> DepthEstimator:
    extractor = find_extractor(backend).load()
    if not isinstance(extractor, DepthEstimator):
        raise UserError(f"--backend {backend}: does not estimate depth")
    return extractor


def _blocks(folders: Sequence[str], options: DepthPicturesOptions) -> dict[str, np.ndarray]:
    """The images to draw, (N, H, W, 3) uint8 each, by title."""
    blocks: list[tuple[str, np.ndarray]] = []
    if options.frames:
        file = BatchFile(options.frames)
        check_scenes(file, 1, any_size=True)
        blocks.append((file.path.stem, first_images(file.path, options.num_images)))
    blocks += [(Path(folder).resolve().name, run_samples(Path(folder), options.num_images)[0]) for folder in folders]
    titles = comma_separated(options.titles) or [name for name, _ in blocks]
    if len(titles) != len(blocks):
        raise UserError(f"--titles {options.titles}: {len(titles)} for {len(blocks)} blocks of images")
    if len(set(titles)) < len(titles):
        raise UserError(f"two of the blocks of images are called the same ({', '.join(titles)}): name them by --titles")
    return dict(zip(titles, (images for _, images in blocks), strict=True))


def _drawn_to(far: float | None, depth: np.ndarray, estimator: DepthEstimator) -> np.ndarray:
    """Depth in [-1, 1], from NEAR to FAR of the network, as it is drawn: as it is, or from 0 to `far` metres."""
    if far is None:
        return depth
    metric = from_unit_range(depth, *getattr(estimator, "limits", (NEAR, FAR)))
    return to_unit_range(metric, 0, far)
