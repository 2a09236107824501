"""What a YAML file beside a network says: how images become its input, and what its outputs are.

    input_size: 224                         # pixels, or [height, width]; left out: images as they are
    resize: bicubic                         # or bilinear, both with antialiasing, nearest or area
    range: [0, 1]                           # what the values 0 and 255 of a channel become
    mean: [0.485, 0.456, 0.406]             # then subtracted, a number or one for each channel
    std: [0.229, 0.224, 0.225]              # then divided by
    outputs: {pooled: 0}                    # by number or name
    depth_range: [0, 80]                    # with an output depth: its values for the nearest and the farthest

What is left out is as `Preparation` has it. Evaluation reads such files (an output `pooled` must be there), and so does
guidance by a classifier (an output `logits`).
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import UserError
from .late import F, Tensor, torch
from .launchers import is_main
from .npz import MAX_SIDE
from .options import nearest, shortened

Outputs = Tensor | Mapping[str, Tensor] | Sequence[Tensor]          # what a network may give: one, or several

RESIZES = {"bicubic": True, "bilinear": True, "nearest": False, "area": False}      # whether with antialiasing
KEYS = ("input_size", "resize", "range", "mean", "std", "outputs", "depth_range")
OUTPUTS = ("pooled", "spatial", "probabilities", "logits", "depth")
OF_MAP = ("min", "max")                 # ends of a depth range that are each map's own

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preparation:
    """How images become the input of a network, and which of its outputs are what.

    size: height and width of the input, None where images stay as they are. low, high: what 0 and 255 become. outputs:
    number or name by what it is. near, far: depths of the nearest and the farthest, numbers or "min" and "max".
    """

    size: tuple[int, int] | None = None
    resize: str = "bicubic"
    low: float = 0.0
    high: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    outputs: tuple[tuple[str, int | str], ...] = (("pooled", 0),)
    near: float | str = OF_MAP[0]
    far: float | str = OF_MAP[1]

    def described(self) -> dict[str, Any]:
        """Returns all of it, as JSON has it."""
        values = asdict(self)
        if "depth" not in dict(self.outputs):
            del values["near"], values["far"]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()
                if name != "outputs"} | {"outputs": dict(self.outputs)}

    def inputs(self, images: np.ndarray, device: torch.device) -> Tensor:
        """Returns images (N, H, W, 3) uint8 as (N, 3, height, width) float32 on the device.

        Bicubic resizing is cut off at 0 and 255, as it is where pictures are resized.
        """
        x = torch.from_numpy(np.array(images)).to(device).movedim(3, 1).float()
        return self._scaled(self._resized(x).clamp(0, 255))

    def inputs_of_samples(self, x: Tensor) -> Tensor:
        """Returns samples (N, 3 or 1, H, W) in [-1, 1] as (N, 3, height, width) in their type; differentiable.

        Nothing is cut off, as no gradient would reach what is; white and black would lose theirs to rounding.
        """
        return self._scaled(self._resized((x.expand(-1, 3, -1, -1) + 1) * 127.5))

    def _resized(self, x: Tensor) -> Tensor:
        if self.size is None or tuple(x.shape[2:]) == self.size:
            return x
        smooth = {"antialias": True, "align_corners": False} if RESIZES[self.resize] else {}
        return F.interpolate(x, self.size, mode=self.resize, **smooth)

    def _scaled(self, x: Tensor) -> Tensor:
        """Values from 0 to 255 as the network reads them."""
        mean, std = (x.new_tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return ((x * ((self.high - self.low) / 255) + self.low - mean) / std).contiguous()

    def depth(self, maps: Tensor, side: int) -> np.ndarray:
        """Returns maps (N, 1, H, W) or (N, H, W) as depth (N, side, side), float32, from -1 (near) to 1 (far)."""
        maps = maps.reshape(len(maps), 1, *maps.shape[-2:]).float()
        lowest, highest = (value.view(-1, 1, 1, 1) for value in maps.flatten(1).aminmax(dim=1))
        near, far = (torch.as_tensor({"min": lowest, "max": highest}.get(str(end), end)) for end in
                     (self.near, self.far))
        span = torch.where(far == near, 1.0, far - near)        # a map of one depth is near
        unit = (2 * (maps - near) / span - 1).clamp(-1, 1)
        return F.interpolate(unit, (side, side), mode="area")[:, 0].numpy()


def settings_beside(network: Path, flag: str) -> Path:
    """Returns the YAML file beside a network. Raises UserError, naming the option (with its dashes), without one."""
    settings = network.with_suffix(".yaml")
    if not settings.is_file():
        raise UserError(f"{flag} {network}: needs {settings} beside it, which says how images become its input: "
                        f"{', '.join(KEYS[:-1])}")
    return settings


def chosen_output(outputs: Outputs, place: int | str, where: str) -> Tensor:
    """Returns an output of a network by its number or name; where: how a sentence about it begins.

    Raises UserError where there is none.
    """
    if isinstance(outputs, Tensor):
        outputs = (outputs,)
    known = list(outputs) if isinstance(outputs, Mapping) else list(range(len(outputs)))
    if isinstance(outputs, Mapping) and type(place) is int:
        place = known[place] if place < len(known) else place
    if place not in known:
        raise UserError(f"{where} is the output {place}, but the network has {', '.join(map(str, known))}")
    found = outputs[place]                  # type: ignore[index]
    if not isinstance(found, Tensor):
        raise UserError(f"{where} is the output {place}, which is no tensor")
    return found


def read_preparation(path: Path, output: str = "pooled", flag: str = "--backend") -> Preparation:
    """Reads such a file. Raises UserError where it is missing or says something that is not allowed.

    output: the one that must be there, which is the first where the file names none. flag: the option that named the
    network, with its dashes.
    """
    from .config_files import read_mapping  # here, as the library runs without YAML

    values = read_mapping(path, flag=f"{flag}, settings")
    for key in values:
        if key not in KEYS:
            raise UserError(f"{key} in {path}: no such setting{nearest(str(key), KEYS)}, there are {', '.join(KEYS)}")
    reader = _Reader(path, values)
    outputs = reader.outputs(output)
    near, far = reader.depth_range("depth" in dict(outputs))
    low, high = reader.numbers("range", (0.0, 1.0), 2)
    if not low < high:
        raise reader.refusal("range", "two numbers that rise")
    std = reader.channels("std", 1.0)
    if min(std) <= 0:
        raise reader.refusal("std", "above 0")
    return Preparation(reader.size(), reader.resize(), low, high, reader.channels("mean", 0.0), std, outputs, near, far)


class _Reader:
    """The values of a file, each checked."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self._path, self._values = path, values

    def refusal(self, key: str, expected: str) -> UserError:
        """Returns the sentence for a value that is not allowed."""
        return UserError(f"{key} {shortened(self._values[key])} in {self._path}: must be {expected}")

    def size(self) -> tuple[int, int] | None:
        """Returns the height and width of the input."""
        given = self._values.get("input_size")
        if given is None:
            return None
        sides = given if isinstance(given, list) else [given, given]
        if len(sides) != 2 or not all(type(side) is int and 1 <= side <= MAX_SIDE for side in sides):
            raise self.refusal("input_size", f"a whole number of pixels up to {MAX_SIDE}, or [height, width]")
        return sides[0], sides[1]

    def resize(self) -> str:
        """Returns the kind of resizing."""
        word = self._values.get("resize", "bicubic")
        if not isinstance(word, str) or word not in RESIZES:
            raise self.refusal("resize", f"one of {', '.join(RESIZES)}{nearest(str(word), RESIZES)}")
        return word

    def numbers(self, key: str, default: tuple[float, ...], count: int) -> tuple[float, ...]:
        """Returns a list of so many numbers."""
        return self._numbers(key, self._values.get(key, list(default)), count, f"a list of {count} numbers")

    def _numbers(self, key: str, given: object, count: int, expected: str) -> tuple[float, ...]:
        if not isinstance(given, list) or len(given) != count or not all(map(_is_number, given)):
            raise self.refusal(key, expected)
        return tuple(map(float, given))

    def channels(self, key: str, default: float) -> tuple[float, ...]:
        """Returns a number, or one for each channel."""
        given = self._values.get(key, default)
        if _is_number(given):
            return (float(given),)
        return self._numbers(key, given, 3, "a list of 3 numbers, or one number, like 0.001")

    def outputs(self, needed: str) -> tuple[tuple[str, int | str], ...]:
        """Returns which outputs are what."""
        given = self._values.get("outputs", {needed: 0})
        if not isinstance(given, dict) or needed not in given or not all(
                type(place) is str or (type(place) is int and place >= 0) for place in given.values()):
            raise self.refusal("outputs", f"numbers or names of outputs by what they are, {needed} among them")
        for name in given:
            if name not in OUTPUTS:
                raise self.refusal("outputs", f"of {', '.join(OUTPUTS)}{nearest(str(name), OUTPUTS)}")
        if {"probabilities", "logits"} <= given.keys():
            raise self.refusal("outputs", "either probabilities or logits")
        return tuple(given.items())

    def depth_range(self, needed: bool) -> tuple[float | str, float | str]:
        """Returns the depths of the nearest and the farthest."""
        given = self._values.get("depth_range")
        if given is None and needed:
            raise UserError(f"depth_range in {self._path}: must be given with an output depth: its values for the "
                            "nearest and the farthest, like [0, 80], or [max, min] of each map where near is large")
        if given is None:
            return OF_MAP
        if not needed:
            _say_no_depth(self._path)
        if not isinstance(given, list) or len(given) != 2 or given[0] == given[1] or not all(
                end in OF_MAP or _is_number(end) for end in given):
            raise self.refusal("depth_range", "two different ones of a number, min and max")
        near, far = (end if isinstance(end, str) else float(end) for end in given)
        return near, far


@functools.cache
def _say_no_depth(path: Path) -> None:
    """Logs, once, that a setting is not used."""
    if is_main():
        _log.info("depth_range in %s: without effect, as outputs name no depth", path)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
