"""Rendered rooms with exact depth: images to learn depth-aware guidance on, where nothing has to be estimated.

A room (floor, walls, ceiling) with one to four boxes, spheres, cylinders and cones, in checks, stripes or plain, under
a lamp that casts shadows, in perspective. Scene i of a seed is always the same. A ray is o + z d, with d scaled
so that z is the distance along the optical axis: the depth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ...errors import UserError
from ...rng import image_generator

KINDS = ("box", "sphere", "cylinder", "cone")
TEXTURES = ("plain", "checks", "stripes")
NEAR, FAR = 1.0, 9.0        # metres: every depth lies between them
FOV = 60.0                  # degrees, horizontal and vertical
DEPTH_RANGE = f"{NEAR:g},{FAR:g}"
MAX_OBJECTS = 4
SUPERSAMPLING = 3           # rays per pixel and axis, odd: the middle one gives depth and mask
AMBIENT = 0.4
RAYS_AT_ONCE = 2**18
_EPSILON = 1e-3             # metres from a surface within which it does not shade itself
_MAIN_OBJECT = 1

Array = np.ndarray


class Scenes(NamedTuple):
    """N rendered scenes of size S."""

    rgb: Array      # (N, S, S, 3) uint8
    depth: Array    # (N, S, S) float32, metres along the optical axis, at the middle of each pixel
    mask: Array     # (N, S, S) uint8: 0 the room, 1 the main object, 2 ... the others
    label: Array    # (N,) int64, index into KINDS of the main object


def render(seed: int, scene_ids: Sequence[int], size: int = 32) -> Scenes:
    """The scenes with these indices, anti-aliased, `size` pixels high and wide. Raises UserError for a size below 8."""
    if size < 8:
        raise UserError(f"size {size}: a scene needs at least 8 pixels")
    scene_ids = [int(scene) for scene in scene_ids]
    chunk = max(1, RAYS_AT_ONCE // (size * SUPERSAMPLING) ** 2)
    parts = [_render(seed, scene_ids[start:start + chunk], size) for start in range(0, len(scene_ids), chunk)]
    if not parts:
        raise UserError("scene_ids: no scene is asked for")
    return Scenes(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def intrinsics(size: int) -> tuple[float, float]:
    """Focal length and principal point (the same on both axes), in pixels, of an image of `size` pixels."""
    return size / 2 / np.tan(np.radians(FOV) / 2), (size - 1) / 2


class _Draws:
    """Uniform random numbers of N scenes, taken column by column: those of a scene depend on its index alone."""

    def __init__(self, seed: int, scene_ids: Sequence[int], columns: int = 128) -> None:
        self._values = np.stack([image_generator(seed, scene, stream="scene").random(columns, np.float32)
                                 for scene in scene_ids])
        self._taken = 0

    def uniform(self, low: float | Array = 0.0, high: float | Array = 1.0) -> Array:
        """(N,) between low and high."""
        self._taken += 1
        return low + (high - low) * self._values[:, self._taken - 1]

    def integers(self, count: int) -> Array:
        """(N,) from 0 to count - 1."""
        return np.minimum(self.uniform(0, count).astype(np.int64), count - 1)


@dataclass
class _Texture:
    """Two colours in a pattern of solid cells, fixed in space; each field (N, ...)."""

    kind: Array         # index into TEXTURES
    colours: Array      # (N, 2, 3), 0 to 1
    cell: Array         # metres
    phase: Array        # (N, 3), cells

    @classmethod
    def draw(cls, draws: _Draws, cell: tuple[float, float]) -> _Texture:
        kind = draws.integers(len(TEXTURES))
        first = _rgb(draws.uniform(), draws.uniform(0.1, 0.9), draws.uniform(0.5, 1))
        second = _rgb(draws.uniform(), draws.uniform(0.1, 0.9), draws.uniform(0.15, 0.8))
        phase = np.stack([draws.uniform(0.2, 0.8) for _ in range(3)], axis=1)
        return cls(kind, np.stack([first, second], axis=1), draws.uniform(*cell), phase)

    def colour(self, scene: Array, points: Array) -> Array:
        """(M, 3): the colour at points (M, 3) of scenes (M,)."""
        cells = np.floor(points / self.cell[scene, None] + self.phase[scene]).astype(np.int32)
        kind = self.kind[scene]
        odd = np.where(kind == 1, cells.sum(axis=1), np.where(kind == 2, cells[:, 0] + cells[:, 1], 0)) % 2
        return self.colours[scene, odd]


@dataclass
class _Objects:
    """One object in each of N scenes, standing on the floor; each field (N,)."""

    there: Array        # bool
    kind: Array         # index into KINDS
    x: Array
    z: Array            # of its middle, metres
    radius: Array       # half its width
    height: Array
    flat: Array         # depth of a box as a share of its width
    turn: Array         # radians about the vertical
    texture: _Texture

    def local(self, scene: Array, o: Array, d: Array) -> tuple[Array, Array]:
        """Origins and directions (M, 3) as seen by the objects of scenes (M,)."""
        shift = np.stack([self.x, np.zeros_like(self.x), self.z], axis=1)[scene]
        c, s = np.cos(self.turn)[scene], np.sin(self.turn)[scene]
        return _turned(o - shift, c, -s), _turned(d, c, -s)

    def hit(self, index: Array, o: Array, d: Array) -> tuple[Array, Array]:
        """Distances (M, R), infinite where nothing is hit, and normals (M, R, 3) of scenes `index` (M,).

        o, d: (M, R, 3).
        """
        distance = np.full(d.shape[:2], np.inf, np.float32)
        normal = np.zeros(d.shape, np.float32)
        c, s = np.cos(self.turn)[index][:, None], np.sin(self.turn)[index][:, None]
        shift = np.stack([self.x, np.zeros_like(self.x), self.z], axis=1)[index][:, None]
        for kind, shape in enumerate(_SHAPES):
            rows = np.flatnonzero(self.there[index] & (self.kind[index] == kind))
            if not len(rows):
                continue
            sizes = (self.radius[index[rows], None], self.height[index[rows], None], self.flat[index[rows], None])
            local_o, local_d = _turned(o[rows] - shift[rows], c[rows], -s[rows]), _turned(d[rows], c[rows], -s[rows])
            distance[rows], local_normal = shape(local_o, local_d, *sizes)
            normal[rows] = _turned(local_normal, c[rows], s[rows])
        return distance, normal


@dataclass
class _Rooms:
    """What N scenes consist of; fields (N,) or (N, 3)."""

    half_width: Array
    height: Array
    length: Array
    eye: Array
    forward: Array
    right: Array
    up: Array
    lamp: Array
    surfaces: tuple[_Texture, _Texture, _Texture]   # walls, floor, ceiling
    objects: list[_Objects]

    @classmethod
    def draw(cls, seed: int, scene_ids: Sequence[int]) -> _Rooms:
        draws = _Draws(seed, scene_ids)
        half_width, height, length = draws.uniform(1.9, 3), draws.uniform(2.6, 3.2), draws.uniform(4.6, 7.5)
        eye = np.stack([draws.uniform(-0.8, 0.8), draws.uniform(1.3, 2), np.zeros(len(scene_ids))], axis=1)
        yaw, pitch = np.radians(draws.uniform(-12, 12)), np.radians(draws.uniform(8, 22))
        zero = np.zeros_like(yaw)
        forward = np.stack([np.sin(yaw) * np.cos(pitch), -np.sin(pitch), np.cos(yaw) * np.cos(pitch)], axis=1)
        right = np.stack([np.cos(yaw), zero, -np.sin(yaw)], axis=1)
        lamp = np.stack([draws.uniform(-1.5, 1.5), 0.95 * height, draws.uniform(0.5, 0.6 * length)], axis=1)
        walls, floor, ceiling = (_Texture.draw(draws, cell) for cell in ((0.4, 1.2), (0.3, 0.9), (0.6, 1.2)))
        count = 1 + draws.integers(MAX_OBJECTS)
        rooms = cls(half_width, height, length, eye, forward, right, np.cross(forward, right), lamp,
                    (walls, floor, ceiling), [])
        for place in range(MAX_OBJECTS):
            rooms.objects.append(rooms._object(draws, place, count > place, yaw))
        return rooms

    def _object(self, draws: _Draws, place: int, there: Array, yaw: Array) -> _Objects:
        """The main object stands in the middle ground, those after it behind, to the left, to the right, anywhere."""
        main = place == 0
        kind = draws.integers(len(KINDS))
        radius = draws.uniform(0.35, 0.65) if main else draws.uniform(0.22, 0.5)
        height = draws.uniform(0.6, 1.5) if main else draws.uniform(0.4, 1.4)
        away = draws.uniform(2.5, 3.5) if main else draws.uniform(3.6, np.maximum(self.length - 0.6, 3.7))
        angle = yaw + np.radians([draws.uniform(-12, 12), draws.uniform(-26, -4), draws.uniform(4, 26),
                                  draws.uniform(-26, 26)][place])
        wall = self.half_width - radius
        return _Objects(
            there, kind, np.clip(self.eye[:, 0] + away * np.sin(angle), -wall, wall),
            np.minimum(away * np.cos(angle), self.length - radius), radius, height, draws.uniform(0.5, 1),
            draws.uniform(0, np.pi), _Texture.draw(draws, (0.2, 0.5)))

    def walls_hit(self, d: Array) -> tuple[Array, Array]:
        """Distances (N, R) to walls, floor and ceiling along directions d (N, R, 3) from the eye, and normals."""
        low = np.stack([-self.half_width, np.zeros_like(self.height), np.full_like(self.length, -1)], axis=1)
        high = np.stack([self.half_width, self.height, self.length], axis=1)
        bound = np.where(d > 0, high[:, None], low[:, None])
        with np.errstate(divide="ignore", invalid="ignore"):
            along = np.where(d == 0, np.inf, (bound - self.eye[:, None]) / d)
        axis = along.argmin(axis=2)
        normal = np.where(np.arange(3) == axis[:, :, None], -np.sign(d), 0)
        return along.min(axis=2), normal


def _render(seed: int, scene_ids: Sequence[int], size: int) -> tuple[Array, ...]:
    rooms = _Rooms.draw(seed, scene_ids)
    for name in ("eye", "forward", "right", "up", "lamp"):
        setattr(rooms, name, getattr(rooms, name).astype(np.float32))
    d = _directions(rooms, size * SUPERSAMPLING)
    o = np.broadcast_to(rooms.eye[:, None], d.shape)
    depth, normal = rooms.walls_hit(d)
    owner = np.zeros(depth.shape, np.uint8)
    every = np.arange(len(scene_ids))
    for index, objects in enumerate(rooms.objects, _MAIN_OBJECT):
        distance, its_normal = objects.hit(every, o, d)
        nearer = distance < depth
        depth, owner = np.where(nearer, distance, depth), np.where(nearer, np.uint8(index), owner)
        normal[nearer] = its_normal[nearer]
    points = o + depth[:, :, None] * d
    light = AMBIENT + (1 - AMBIENT) * _lit(rooms, points, normal)
    colour = _colours(rooms, points, normal, owner) * light[:, :, None]
    rgb = _pixels(colour, size).mean(axis=(2, 4))
    middle = SUPERSAMPLING // 2
    return ((rgb * 255 + 0.5).astype(np.uint8), _pixels(depth, size)[:, :, middle, :, middle].astype(np.float32),
            _pixels(owner, size)[:, :, middle, :, middle].copy(), rooms.objects[0].kind)


def _directions(rooms: _Rooms, side: int) -> Array:
    """(N, side * side, 3) float32, row by row from the top left; the part along the optical axis is 1."""
    across = np.tan(np.radians(FOV) / 2) * ((np.arange(side) + 0.5) * 2 / side - 1)
    down, along = (axis.reshape(1, -1, 1) for axis in np.meshgrid(across, across, indexing="ij"))
    return (rooms.forward[:, None] + along * rooms.right[:, None] - down * rooms.up[:, None]).astype(np.float32)


def _pixels(values: Array, size: int) -> Array:
    """(N, rays, ...) -> (N, size, rays down, size, rays across, ...)."""
    return values.reshape(len(values), size, SUPERSAMPLING, size, SUPERSAMPLING, *values.shape[2:])


def _lit(rooms: _Rooms, points: Array, normal: Array) -> Array:
    """(N, R), 0 to 1: light of the lamp on points (N, R, 3) by Lambert's law, 0 where an object is between."""
    towards = rooms.lamp[:, None] - points
    distance = np.sqrt(np.einsum("nri,nri->nr", towards, towards))
    towards /= distance[:, :, None]
    light = np.clip(np.einsum("nri,nri->nr", towards, normal), 0, 1)
    start = points + _EPSILON * normal
    every = np.arange(len(points))
    for objects in rooms.objects:
        between, _ = objects.hit(every, start, towards)
        light[between < distance] = 0
    return light


def _colours(rooms: _Rooms, points: Array, normal: Array, owner: Array) -> Array:
    """(N, R, 3) without light: textures of objects turn with them, those of the room lie in it."""
    colours = np.empty(points.shape, np.float32)
    horizontal = abs(normal[:, :, 1]) > 0.5
    below = points[:, :, 1] < rooms.height[:, None] / 2
    of_room = owner == 0
    surfaces = (of_room & ~horizontal, of_room & horizontal & below, of_room & horizontal & ~below)
    for texture, here in zip(rooms.surfaces, surfaces, strict=True):
        colours[here] = texture.colour(np.nonzero(here)[0], points[here])
    for index, objects in enumerate(rooms.objects, _MAIN_OBJECT):
        here = owner == index
        scene = np.nonzero(here)[0]
        local, _ = objects.local(scene, points[here], points[here])
        colours[here] = objects.texture.colour(scene, local)
    return colours


# Shapes in their own frame: standing on the origin, y up. Each takes origins and directions (M, R, 3) and sizes
# (M, 1): half width, height and flatness, and returns distances (M, R), infinite where missed, and normals (M, R, 3).


def _box(o: Array, d: Array, radius: Array, height: Array, flat: Array) -> tuple[Array, Array]:
    half = np.stack([radius, height / 2, radius * flat], axis=-1)
    centred = o - np.stack([np.zeros_like(height), height / 2, np.zeros_like(height)], axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        one, other = (-half - centred) / d, (half - centred) / d
    entry, leave = np.minimum(one, other), np.maximum(one, other)
    axis = entry.argmax(axis=2)
    first = entry.max(axis=2)
    normal = np.where(np.arange(3) == axis[:, :, None], -np.sign(d), 0)
    return np.where((first > 0) & (first < leave.min(axis=2)), first, np.inf), normal


def _sphere(o: Array, d: Array, radius: Array, height: Array, flat: Array) -> tuple[Array, Array]:
    centred = o - np.stack([np.zeros_like(radius), radius, np.zeros_like(radius)], axis=-1)
    first = _first_root(np.einsum("mri,mri->mr", d, d), np.einsum("mri,mri->mr", centred, d),
                        np.einsum("mri,mri->mr", centred, centred) - radius**2)
    return first, (centred + _finite(first)[:, :, None] * d) / radius[:, :, None]


def _cylinder(o: Array, d: Array, radius: Array, height: Array, flat: Array) -> tuple[Array, Array]:
    side = _first_root(d[..., 0]**2 + d[..., 2]**2, o[..., 0] * d[..., 0] + o[..., 2] * d[..., 2],
                       o[..., 0]**2 + o[..., 2]**2 - radius**2)
    y = o[..., 1] + _finite(side) * d[..., 1]
    side = np.where((y >= 0) & (y <= height), side, np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        top = (height - o[..., 1]) / d[..., 1]
    x, z = (o[..., axis] + _finite(top) * d[..., axis] for axis in (0, 2))
    top = np.where((top > 0) & (x**2 + z**2 <= radius**2), top, np.inf)
    first = np.minimum(side, top)
    point = o + _finite(first)[:, :, None] * d
    normal = np.stack([point[..., 0] / radius, np.zeros_like(first), point[..., 2] / radius], axis=-1)
    normal[top < side] = (0, 1, 0)
    return first, normal


def _cone(o: Array, d: Array, radius: Array, height: Array, flat: Array) -> tuple[Array, Array]:
    slope = radius / height
    left = height - o[..., 1]           # from the origin up to the apex
    first = _first_root(
        d[..., 0]**2 + d[..., 2]**2 - (slope * d[..., 1])**2,
        o[..., 0] * d[..., 0] + o[..., 2] * d[..., 2] + slope**2 * left * d[..., 1],
        o[..., 0]**2 + o[..., 2]**2 - (slope * left)**2,
        lambda root: _between(o[..., 1] + root * d[..., 1], height))
    point = o + _finite(first)[:, :, None] * d
    normal = np.stack([point[..., 0], slope**2 * (height - point[..., 1]), point[..., 2]], axis=-1)
    return first, normal / np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-6)


_SHAPES = (_box, _sphere, _cylinder, _cone)


def _anything(root: Array) -> Array:
    return np.ones_like(root, bool)


def _first_root(a: Array, half_b: Array, c: Array, valid: Callable[[Array], Array] = _anything) -> Array:
    """The smallest positive valid root of a x^2 + 2 half_b x + c, infinite where there is none."""
    discriminant = half_b**2 - a * c
    root = np.sqrt(np.maximum(discriminant, 0))
    with np.errstate(divide="ignore", invalid="ignore"):
        first, second = (np.where((discriminant >= 0) & (x > 0) & valid(x), x, np.inf)
                         for x in ((-half_b - root) / a, (-half_b + root) / a))
    return np.minimum(first, second)


def _between(y: Array, height: Array) -> Array:
    return (y >= 0) & (y <= height)


def _finite(distance: Array) -> Array:
    return np.where(np.isfinite(distance), distance, 0)


def _turned(v: Array, c: Array, s: Array) -> Array:
    """Vectors (..., 3) turned about the vertical by the angle of cosine c and sine s."""
    return np.stack([c * v[..., 0] + s * v[..., 2], v[..., 1], c * v[..., 2] - s * v[..., 0]], axis=-1)


def _rgb(hue: Array, saturation: Array, value: Array) -> Array:
    """(N, 3), 0 to 1, of hue, saturation and value, (N,) each, 0 to 1."""
    wheel = np.clip(abs((hue[:, None] * 6 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    return value[:, None] * (1 - saturation[:, None] * (1 - wheel))
