"""Rooms of Freedoom with the depth of every pixel, rendered by the engine ViZDoom: pairs for depth predictors.

A view is taken at a thing of a map (an item, a lamp, a tree) or a step beside it, in a random direction. Views of a
wall alone, and of much sky, are left out. Frames are the middle squares of 320x240 pixels, 73.7 degrees wide,
gamma-corrected, since the rooms are dark.

The engine's depth buffer has 8 bits and is linear in the distance along the optical axis: measured on the walls of a
map (162 views, whose distance follows from the map), it is 7.143 map units a step and 8.9 at 0, with a standard
deviation of 2.3 units; floors lie within two steps of that. Walls end at 127, and the sky has 127, so beyond it all is
as far. A map unit is 1/32 m here, at which the player is 1.75 m tall.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..errors import UserError
from ..fetch import sha256_of
from ..files import check_folder, write_json
from ..image_datasets import crop_square, resize_smaller_side
from ..npz import write_batch
from ..options import Options, comma_separated, nearest, option, seed_option
from ..pictures import grid, save
from ..progress import progress_bar
from .ranges import to_fraction

WADS = {"freedoom1": [f"E{episode}M{level}" for episode in range(1, 5) for level in range(1, 10)],
        "freedoom2": [f"MAP{level:02d}" for level in range(1, 33)]}
MAPS = {name: wad for wad, names in WADS.items() for name in names}
TEST_EVERY = 5                          # of MAPS, in their order, each so many-th is of the test
UNITS_PER_STEP, UNITS_AT_0, FARTHEST, UNITS_PER_METRE = 7.143, 8.9, 127, 32
NEAR, FAR = UNITS_AT_0 / UNITS_PER_METRE, (UNITS_AT_0 + FARTHEST * UNITS_PER_STEP) / UNITS_PER_METRE
ASIDE, SETTLE = 48, 12                  # map units beside a thing; tics in which the player comes to rest
MOST_SKY, MOST_NEAR, NEAREST = 0.25, 0.25, 5       # shares of pixels: at FARTHEST, and below NEAREST
LEAST_SPREAD = 4                        # steps of the buffer between the tenth and the ninetieth of 100 pixels
ATTEMPTS = 40                           # views that are tried for each that is kept
LICENCES = {
    "engine": "ViZDoom: MIT; it contains ZDoom, whose parts have licences of their own (https://zdoom.org/wiki/license)",
    "content": "Freedoom, contributors to the Freedoom project: BSD-3-Clause (https://freedoom.github.io)"}


@dataclass(frozen=True)
class DoomOptions(Options):
    """Options that say which views to render, and where to."""

    num_train: int = option(4000, "views of the maps to train on", minimum=1)
    num_test: int = option(1000, "views of the maps to test on", minimum=1)
    maps: str = option("", "maps, like E1M1,MAP01, comma-separated; unset: all 68, of which each fifth is of the test")
    image_size: int = option(32, "height and width in pixels", minimum=8, maximum=240)
    gamma: float = option(1.8, "brightness x of a frame, from 0 to 1, becomes x^(1 / gamma)", above=0)
    seed: int = seed_option("seed of the views; the first views of a map are the same for any number of them")
    out: str = option("data/doom32", "folder for train.npz and test.npz (arr_0, depth in metres), sheet.png and "
                      "manifest.json")


class View(NamedTuple):
    """A view: frame (240, 320, 3) uint8, its depth buffer (240, 320) uint8, and from where it was taken."""

    frame: np.ndarray
    buffer: np.ndarray
    pose: Mapping[str, Any]


def split_of(name: str) -> str:
    """Whether a map is of the training or of the test; it depends on its name alone."""
    return "test" if list(MAPS).index(name) % TEST_EVERY == TEST_EVERY - 1 else "train"


def metres(buffer: np.ndarray) -> np.ndarray:
    """Depth in metres, float32, of a depth buffer (uint8)."""
    units = np.minimum(buffer, FARTHEST).astype(np.float32) * UNITS_PER_STEP + UNITS_AT_0
    return units / np.float32(UNITS_PER_METRE)


def is_room(buffer: np.ndarray) -> bool:
    """Whether a view shows a room, by its depth buffer: not much sky, little that is very near, and no wall alone."""
    low, high = np.percentile(buffer, [10, 90])
    return bool((buffer >= FARTHEST).mean() <= MOST_SKY and (buffer < NEAREST).mean() <= MOST_NEAR
                and high - low >= LEAST_SPREAD)


def brightened(frame: np.ndarray, gamma: float) -> np.ndarray:
    """A frame (uint8) whose brightness x, from 0 to 1, has become x^(1 / gamma)."""
    return np.rint(255 * (np.arange(256) / 255) ** (1 / gamma)).astype(np.uint8)[frame]


def as_pair(view: View, size: int, gamma: float) -> tuple[np.ndarray, np.ndarray]:
    """The image (size, size, 3) uint8 and depth (size, size) float32 in metres of a view's middle square."""
    image = resize_smaller_side(Image.fromarray(brightened(view.frame, gamma)), size)
    depth = resize_smaller_side(Image.fromarray(metres(view.buffer)), size, Image.Resampling.BILINEAR)
    return np.asarray(crop_square(image, size)), np.asarray(crop_square(depth, size))


def render_doom(options: DoomOptions) -> dict[str, int]:
    """Writes all files; returns the number of views of each split, 0 where no map is of it.

    Raises UserError where the engine is missing, a map is unknown, or shows too few rooms, and where nothing can be
    written.
    """
    names = comma_separated(options.maps) or list(MAPS)
    for name in names:
        if name not in MAPS:
            raise UserError(f"--maps {options.maps}: there is no map {name!r}{nearest(name, MAPS)}, they are E1M1 to "
                            "E4M9 and MAP01 to MAP32")
    engine = _engine()
    out = check_folder("--out", options.out)
    counts = {"train": options.num_train, "test": options.num_test}
    splits = {split: [name for name in names if split_of(name) == split] for split in counts}
    poses: dict[str, list[Mapping[str, Any]]] = {}
    rows: list[np.ndarray] = []
    with progress_bar(sum(counts[split] for split in counts if splits[split]), "rendering", "view") as progress:
        for split, count in counts.items():
            if splits[split]:
                images, depth, poses[split] = _rendered(engine, splits[split], count, options, progress.update)
                write_batch(out / f"{split}.npz", {"arr_0": images, "depth": depth})
                near = (255 * (1 - to_fraction(depth[:16], NEAR, FAR))).astype(np.uint8)
                rows += [grid(images[:16], 16), grid(near[..., None].repeat(3, axis=3), 16)]
    save(Image.fromarray(np.concatenate(rows)), out / "sheet.png")
    folder = Path(engine.__file__).parent
    write_json(out / "manifest.json", {
        "settings": asdict(options), "licences": LICENCES, "engine": f"ViZDoom {engine.__version__}",
        "content": {f"{wad}.wad": sha256_of(folder / f"{wad}.wad") for wad in WADS},
        "depth": {"unit": "m", "near": NEAR, "far": FAR}, "views": poses})
    return {split: len(poses.get(split, ())) for split in counts}


def _rendered(engine: Any, names: Sequence[str], count: int, options: DoomOptions, tick: Any,
              ) -> tuple[np.ndarray, np.ndarray, list[Mapping[str, Any]]]:
    """Images, depth and poses of `count` views: the first of each map, then the second of each, and so on."""
    images = np.empty((count, options.image_size, options.image_size, 3), np.uint8)
    depth = np.empty(images.shape[:3], np.float32)
    poses: list[Mapping[str, Any]] = [{}] * count
    for index, name in enumerate(names):
        places = range(index, count, len(names))
        with game(engine, name, options.seed) as running:
            for place, view in zip(places, views(engine, running, name, len(places), options.seed), strict=True):
                images[place], depth[place] = as_pair(view, options.image_size, options.gamma)
                poses[place] = view.pose
                tick()
    return images, depth, poses


# The engine


def _engine() -> Any:
    try:
        import vizdoom
    except ImportError:
        raise UserError("the engine ViZDoom, which brings the maps of Freedoom, is not installed: pip install "
                        "'guided-pixels[doom]'") from None
    return vizdoom


@contextmanager
def game(engine: Any, name: str, seed: int) -> Iterator[Any]:
    """A map of the engine, ready for views, without monsters, weapon and texts."""
    running = engine.DoomGame()
    with tempfile.TemporaryDirectory() as folder:
        running.set_doom_config_path(str(Path(folder) / "vizdoom.ini"))
        running.set_doom_game_path(str(Path(engine.__file__).parent / f"{MAPS[name]}.wad"))
        running.set_doom_map(name)
        running.set_screen_resolution(engine.ScreenResolution.RES_320X240)
        running.set_screen_format(engine.ScreenFormat.RGB24)
        running.set_depth_buffer_enabled(True)
        running.set_objects_info_enabled(True)
        running.set_window_visible(False)
        running.set_sound_enabled(False)
        for part in ("hud", "crosshair", "weapon", "decals", "particles", "screen_flashes", "messages", "corpses"):
            getattr(running, f"set_render_{part}")(False)
        for variable in ("POSITION_X", "POSITION_Y", "POSITION_Z", "ANGLE"):
            running.add_available_game_variable(getattr(engine.GameVariable, variable))
        running.add_available_button(engine.Button.TURN_LEFT_RIGHT_DELTA)
        running.add_game_args("-nomonsters +sv_cheats 1 +con_midtime 0 +cl_showsecretmessage 0 +show_messages 0")
        running.set_episode_timeout(0)
        running.set_seed(seed % 2**32)
        running.init()
        try:
            yield running
        finally:
            running.close()
            with suppress(OSError):                 # gone, or in use by another rendering in the same folder
                Path("_vizdoom").rmdir()            # which the engine makes, and leaves empty


def views(engine: Any, running: Any, name: str, count: int, seed: int) -> Iterator[View]:
    """The first `count` views of a map that show rooms; raises UserError where too few do."""
    rng = np.random.default_rng([seed, list(MAPS).index(name)])
    running.send_game_command("god")
    things = [(thing.position_x, thing.position_y) for thing in running.get_state().objects
              if thing.name != "DoomPlayer"]
    found = 0
    for _ in range(ATTEMPTS * count):
        if found == count:
            return
        view = _view(running, things[rng.integers(len(things))], *rng.uniform(0, 1, 3)) if things else None
        if view is not None and is_room(view.buffer):
            found += 1
            yield View(view.frame, view.buffer, {"map": name, **view.pose})
    if found < count:
        raise UserError(f"{name}: shows only {found} rooms in {ATTEMPTS * count} views; ask for fewer, or leave it "
                        "out of --maps")


def _view(running: Any, thing: tuple[float, float], away: float, around: float, turn: float) -> View | None:
    """The view beside a thing; None where the player cannot stand there. away, around, turn: from 0 to 1."""
    angle, distance = 2 * math.pi * around, ASIDE * away
    x, y = thing[0] + distance * math.cos(angle), thing[1] + distance * math.sin(angle)
    running.send_game_command(f"warp {x:.0f} {y:.0f}")
    running.make_action([360 * turn - 180], 1)
    running.make_action([0], SETTLE)
    if running.is_episode_finished():
        running.new_episode()
        running.send_game_command("god")
        return None
    state = running.get_state()
    at_x, at_y, at_z, facing = state.game_variables
    if at_z < -30000 or max(abs(at_x - x), abs(at_y - y)) > ASIDE:
        return None
    return View(state.screen_buffer, state.depth_buffer, {
        "x": round(at_x, 1), "y": round(at_y, 1), "z": round(at_z, 1), "angle": round(facing, 1)})
