"""The pieces of work of a bench, in the order in which hours are given to them, and what each costs.

First no guidance, then each method alone, then those methods at the further numbers of evaluations, then the pairs:
those whose methods did best alone come first. Methods alone, and pairs, are followed by no guidance with their numbers
of steps. A piece is a search and the row that is reported of it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from guided_diffusion.errors import UserError
from guided_diffusion.files import json_digest
from guided_diffusion.runs.record import identity
from guided_diffusion.runs.sample import SamplingRun
from guided_diffusion.runs.status import run_status

from ..reproduction.costs import equivalent_evaluations
from ..reproduction.tables import Row
from .candidates import Candidate, Flags, pair_settings, pairs
from .settings import Bench

NO_GUIDANCE = "no guidance"


@dataclass(frozen=True)
class Unit:
    """A piece of work.

    title: the methods in it. settings: flags that are tried, or the one that is reported. evaluations: of an image.
    searched: whether the best of the settings is looked for. pair: whether it is one of two methods. steps_of: titles
    of the pieces whose number of steps it has, of no guidance with fewer steps. scale: see `Candidate`, of a search
    that goes on beyond its settings.
    """

    title: str
    settings: Sequence[Flags]
    evaluations: int
    searched: bool = True
    pair: bool = False
    steps_of: tuple[str, ...] = ()
    scale: tuple[str, float] | None = None

    def rows(self, bench: Bench) -> list[Row]:
        """Returns the rows of its search."""
        return [bench.searched(flags) for flags in self.settings] if self.searched else []

    @property
    def what(self) -> str:
        """Like "SAG at 20 evaluations"."""
        return f"{self.title} at {self.evaluations} evaluations"

    def key(self, bench: Bench) -> str:
        """Returns what tells it from all other pieces, also from the same one with other numbers of images or options.

        The settings that are tried are no part of it, as those of a pair follow from other searches, and a search may
        go on beyond them. A search by another metric than the default one is another piece, as it may choose another
        setting. Raises UserError where it cannot be had at so many evaluations.
        """
        flags = self.settings[-1]
        rows = [bench.reported(flags, self.evaluations), *self.rows(bench)[-1:]]
        searched = f"{bench.spec.search_images} in the search, " * self.searched
        if flags:
            searched += f"chosen by {bench.spec.metric}, "
        options = [{name: value for name, value in identity(row.run.configuration(), {}).items() if name not in flags}
                   for row in rows]
        return (f"{self.title}, {self.evaluations} evaluations, {searched}{bench.spec.images} images, "
                f"options {json_digest(options)[:16]}")

    def images(self, bench: Bench) -> int:
        """Returns the number of images that it samples."""
        return self.searched * len(self.settings) * bench.spec.search_images + bench.spec.images

    def cost(self, bench: Bench) -> float:
        """Returns the network evaluations of its images, but of those that are there (see `images_there`).

        Before the search it is not known which of its settings is reported: the one that has most images.
        Raises UserError where it cannot be had at so many evaluations.
        """
        reported = [bench.reported(flags, self.evaluations).run for flags in self.settings]
        missing = bench.spec.images - max(map(images_there, reported))
        return missing * equivalent_evaluations(reported[-1]) + sum(
            missing_cost(row) for row in self.rows(bench))


def unguided(bench: Bench, evaluations: int) -> Unit:
    """Returns the piece that all others are compared with at so many evaluations."""
    return Unit(NO_GUIDANCE, [{}], evaluations, searched=False)


def alone(bench: Bench, found: Iterable[Candidate]) -> list[Unit]:
    """Returns the pieces of the methods alone, without those that do nothing alone."""
    return [Unit(one.short, one.settings, bench.spec.evaluations, scale=one.scale)
            for one in found if not one.transforms]


def fewer_steps(bench: Bench, rows: Iterable[tuple[str, Row]]) -> list[Unit]:
    """Returns no guidance with the numbers of steps of these rows, the most first, where it has more by itself.

    rows: with the titles of their pieces.
    """
    spec = bench.spec
    if not spec.same_steps:
        return []
    whole = bench.reported({}, spec.evaluations).run.num_steps
    titles: dict[int, list[str]] = {}
    for title, row in rows:
        titles.setdefault(row.run.num_steps, []).append(title)
    return [replace(unguided(bench, math.ceil(spec.evaluations * steps / whole)), steps_of=tuple(titles[steps]))
            for steps in sorted(titles, reverse=True) if steps < whole]


def elsewhere(bench: Bench, best: Mapping[str, Flags]) -> Iterator[Unit]:
    """Yields the pieces at the further numbers of evaluations. best: by method, what was best alone."""
    for evaluations in bench.spec.others:
        yield unguided(bench, evaluations)
        for short, flags in best.items():
            yield Unit(short, [flags], evaluations, searched=False)


def in_pairs(bench: Bench, found: Sequence[Candidate], best: Mapping[str, Flags], order: Sequence[str]) -> list[Unit]:
    """Returns the pieces of the pairs, those of the first methods in `order` first.

    best: by method, what was best alone, of transforms any; pairs of other methods are left out. A transform stands
    in the middle of the order.
    """
    place = {short: float(number) for number, short in enumerate(order)}
    chosen = [(one, other) for one, other in pairs(found) if one.short in best and other.short in best]
    chosen.sort(key=lambda pair: sum(place.get(one.short, len(order) / 2) for one in pair))
    return [Unit(f"{one.short} + {other.short}", pair_settings(one, other, best), bench.spec.evaluations, pair=True)
            for one, other in chosen] if bench.spec.pairs else []


def all_units(bench: Bench, found: Sequence[Candidate]) -> list[Unit]:
    """Returns all pieces as far as they can be known before the search, which decides the order of the pairs.

    Every method stands with a setting that has a weaker and a stronger one, where there are as many.
    """
    best = {one.short: one.settings[len(one.settings) // 2] for one in found}
    guiding = {one.short: best[one.short] for one in found if not one.transforms}
    single = alone(bench, found)
    both = in_pairs(bench, found, best, [one.short for one in found])
    return [unguided(bench, bench.spec.evaluations), *single, *fewer_steps(bench, _reportable(bench, single)),
            *elsewhere(bench, guiding), *both, *fewer_steps(bench, _reportable(bench, both))]


def _reportable(bench: Bench, units: Iterable[Unit]) -> Iterator[tuple[str, Row]]:
    """Yields the title and a row of each piece that can be had at its evaluations."""
    for unit in units:
        with contextlib.suppress(UserError):            # the piece says itself why it cannot
            yield unit.title, bench.reported(unit.settings[-1], unit.evaluations)


def missing_cost(row: Row) -> float:
    """Returns the network evaluations of the images of a row but of those that are there (see `images_there`)."""
    return (row.images - images_there(row.run)) * equivalent_evaluations(row.run)


def images_there(run: SamplingRun) -> int:
    """Returns how many images of a run are there, of one that was stopped, too."""
    total = run.sample.num_samples
    if (run.out / "run.json").is_file() and run.samples.is_file():
        return total
    try:
        return min(total, run_status(run.out).done)
    except UserError:                   # where nothing has begun; what is wrong there is said when it is sampled
        return 0
