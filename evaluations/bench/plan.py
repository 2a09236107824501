"""The plan of a bench, before it is begun: its pieces of work in their order, and what fits into the hours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from guided_diffusion.errors import UserError

from ..reproduction.missing import missing_files
from .candidates import FURTHER, Candidate
from .hours import Hours
from .settings import Bench
from .units import all_units


def plan(bench: Bench, found: Sequence[Candidate], why: Mapping[str, str], references: str, seconds: float,
         hours: float | None) -> str:
    """Returns the plan as Markdown.

    found, why: the methods that the model supports, and the reasons against the others. references: folder of
    reference batches. seconds: of one evaluation of an image, on all ranks together, where the bench has not measured
    them. hours: how many there are, with those that were used; None for any.
    """
    known = Hours(bench.folder, hours, seconds)
    there = known.left                  # planning itself takes none of it
    lines = [f"{bench.title}: at most {bench.spec.evaluations} evaluations of an image, all networks counted", "",
             "| piece | settings tried | evaluations of an image | images | hours | together |",
             "|---|---|---|---|---|---|"]
    total, beyond, left_out = 0.0, [], dict(why)
    gone = set[str]()                   # what is not searched: the bench goes no further with it
    done = set(known.done)
    for unit in all_units(bench, found):
        if gone & set(unit.title.split(" + ")) or (unit.steps_of and gone >= set(unit.steps_of)):
            if unit.searched:
                gone.add(unit.title)
            continue
        reason, one, key = "", 0.0, ""
        try:
            key, cost = unit.key(bench), unit.cost(bench)
            one = 0.0 if key in done else known.expected(cost) / 3600
        except UserError as error:
            reason = str(error)
        if not reason and (not one or 3600 * (total + one) <= there):
            total += one
            done.add(key)               # a row may be one of fewer steps and one of other evaluations, too
            lines.append(f"| {unit.title} | {len(unit.settings) if unit.searched else '-'} | {unit.evaluations} | "
                         f"{unit.images(bench):,} | {one:.3g} | {total:.3g} |")
            continue
        if reason:
            left_out[unit.what] = reason
        else:
            beyond.append(unit.what)
        if unit.searched:
            gone.add(unit.title)
    lines += ["", f"{known.rate:.4g} s for an evaluation of one image, on all ranks together. Hours are those of "
              f"sampling; the evaluation of the images comes on top, and so do up to {FURTHER} further settings of a "
              "method that is best at the end of its own. Pairs come last, and those whose methods do best alone come "
              "first: the search decides their order."]
    if known.seconds:
        lines += ["", f"{known.seconds / 3600:.3g} hours were used by earlier starts; what these finished takes none."]
    if beyond:
        lines += ["", f"{len(beyond)} pieces do not fit into {hours:g} hours: {', '.join(beyond)}"]
    lines += ["", *(f"left out: {what}: {reason}" for what, reason in left_out.items())]
    return "\n".join([*lines, *_missing_lines(bench, found, references)])


def _missing_lines(bench: Bench, found: Sequence[Candidate], references: str) -> list[str]:
    """Returns a line for each file that has to be brought."""
    shared = [(file, "all rows") for file in missing_files(bench.base, references)]
    return [f"missing: {file}   (for {what})" for file, what in
            [*shared, *((file, one.short) for one in found for file in one.missing)]]
