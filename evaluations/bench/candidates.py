"""What a bench compares: the methods that a model supports, alone and in pairs, each with the settings it tries."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guided_diffusion.build import build_model
from guided_diffusion.classes import check_same_names
from guided_diffusion.errors import UserError
from guided_diffusion.guidance import ContrastGuidance, GuidanceOptions, TransformGuidance
from guided_diffusion.late import torch

from ..reproduction.checks import Digests
from ..reproduction.missing import MissingFile, missing_files
from ..reproduction.tables import Row
from .settings import row_name

if TYPE_CHECKING:
    from guided_diffusion.unet import UNetModel

FURTHER = 2             # settings that are tried at most beyond the first or last one, where that is the best

Flags = Mapping[str, Any]


@dataclass(frozen=True)
class Candidate:
    """A method that the model supports.

    short: its name. settings: what is tried, from weak to strong. transforms: it changes the sum of all contrasts, so
    that alone it does nothing. makes_contrasts: it gives such a sum. missing: files that have to be brought first.
    scale: the flag that may go beyond the settings, and its value that is off, if there is one.
    """

    short: str
    settings: Sequence[Flags]
    transforms: bool
    makes_contrasts: bool
    missing: Sequence[MissingFile] = ()
    scale: tuple[str, float] | None = None


def candidates(base: Row, references: str | Path) -> tuple[list[Candidate], dict[str, str]]:
    """Returns the methods that a row's model supports, and for each other method the reason.

    base: without guidance. references: folder of reference batches.
    """
    @functools.cache
    def network() -> UNetModel:
        with torch.device("meta"):
            return build_model(base.run.model)

    digests = Digests()
    names: dict[str, Flags] = {}
    found, why = [], {}
    for method in base.run.guidance:
        try:
            one = _candidate(base, method, references, network, digests)
            _check_names(base, one, names)
            found.append(one)
        except UserError as error:
            why[method.short] = str(error)
    return found, why


def _candidate(base: Row, method: GuidanceOptions, references: str | Path, network: Callable[[], UNetModel],
               digests: Digests) -> Candidate:
    """Returns a method as a candidate. Raises UserError where the model does not support it.

    network: gives that of the model, without weights. digests: of checkpoints.
    """
    if not method.search:
        raise UserError("it says no settings to try")
    row = base.changed(**method.search[0])
    on = replace(method, **method.search[0])
    on.check_files()
    row.run.labels()
    needed, files = set(on.files().values()), row.run.checkpoints()
    lacking = missing_files(row, references)
    missing = [file for file in lacking if file.file in needed]
    if not missing:
        on.build(base.run.networks(network()))
    if needed and all(files.values()) and not {file.file for file in lacking} & set(files.values()):
        on.check(digests.of(files), row.run.sample.checkpoint_entry)
        check_same_names(files)
    return Candidate(method.short, method.search, issubclass(method.kind, TransformGuidance),
                     issubclass(method.kind, ContrastGuidance), missing, method.search_scale)


def _check_names(base: Row, candidate: Candidate, names: dict[str, Flags]) -> None:
    """Raises UserError where the folders of two settings would have one name.

    names: settings by the names that are taken; those of the candidate are added.
    """
    for flags in candidate.settings:
        title = base.run.changed(**flags).title()
        if (other := names.setdefault(row_name(title), flags)) is not flags:
            one, two = (" ".join(f"--{flag} {value}" for flag, value in each.items()) for each in (other, flags))
            raise UserError(f"{one} and {two} are both called {title!r}, by which samples are kept; its details() must "
                            "tell them apart")


def beyond(settings: Sequence[Flags], place: int, scale: tuple[str, float] | None) -> list[Flags]:
    """Returns the settings with one more beyond the one at `place`; none where that is not the first or the last.

    The further one is half as strong as the first, or twice as strong as the last. scale: see `Candidate`; none: there
    is no further one.
    """
    flags = settings[place]
    if scale is None or scale[0] not in flags or 0 < place < len(settings) - 1:
        return []
    flag, off = scale
    factor = 2.0 if place else 0.5
    further = {**flags, flag: round(off + factor * (flags[flag] - off), 10)}
    return [*settings, further] if place else [further, *settings]


def pairs(found: Sequence[Candidate]) -> Iterator[tuple[Candidate, Candidate]]:
    """Yields the pairs that can do anything together: a transform goes with a method that makes contrasts."""
    for one, other in itertools.combinations(found, 2):
        if not (one.transforms and other.transforms) and _fits(one, other) and _fits(other, one):
            yield one, other


def _fits(one: Candidate, other: Candidate) -> bool:
    return not one.transforms or other.makes_contrasts


def pair_settings(one: Candidate, other: Candidate, best: Mapping[str, Flags]) -> list[Flags]:
    """Returns what is tried of a pair, from weak to strong. best: by method, what was best alone.

    Two methods that each guide: both at their best, and both one setting weaker, as their effects add up. A transform:
    each of its settings, with the other method at its best and one setting stronger, as transforms allow more.
    """
    if one.transforms or other.transforms:
        transform, method = (one, other) if one.transforms else (other, one)
        strengths = [_neighbour(method, best, step) for step in (0, 1)]
        return _different([{**strength, **flags} for strength in strengths for flags in transform.settings])
    return _different([{**_neighbour(one, best, step), **_neighbour(other, best, step)} for step in (-1, 0)])


def _neighbour(candidate: Candidate, best: Mapping[str, Flags], step: int) -> Flags:
    """Returns the setting so many steps from the best one, or the last in that direction."""
    settings = list(candidate.settings)
    place = settings.index(best[candidate.short]) + step
    return settings[min(max(place, 0), len(settings) - 1)]


def _different(settings: Sequence[Flags]) -> list[Flags]:
    return [flags for place, flags in enumerate(settings) if flags not in settings[:place]]
