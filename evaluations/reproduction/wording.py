"""How numbers are written in reports, and what reports say around their tables.

Numbers that could not be had are written `not run here`. A metric that a row does not know is left out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from ..metrics import EQUAL, METRICS, Metric
from .tables import DECIMALS
from .verdicts import DIFFERS, NO_WORD, NOT_COMPARABLE, NOT_RUN, REPRODUCED

DOES_NOT_APPLY = "-"
REFERENCE = "real images"       # the title of the reference's own values
UNKNOWN = "an unknown device"
OFFICIAL = "in the half precision of the official evaluator, as the published ones"
VERDICTS = {
    REPRODUCED: "the published number lies within the 95 % interval of the measured one, widened by the square root "
                "of two, as both are of random samples, and by half a unit of its last digit",
    DIFFERS: "it lies outside. The numbers of a row are judged together: by the correction of Holm, a row of which all "
             "numbers reproduce exactly differs in at most 5 % of all cases",
    NOT_COMPARABLE: "measured under other circumstances, which are listed below the table",
    NO_WORD: "there is no interval that holds what 95 % promises, so nothing is said of a difference",
    NOT_RUN: "there is no measured number",
}


# Numbers


def decimals(interval: Sequence[float] | None, value: float | None) -> int:
    """Returns the decimals that show two digits of the width of an interval, or four digits of a value without one."""
    width = interval[1] - interval[0] if interval else 0.0
    if width > 0:
        return min(6, max(0, 1 - math.floor(math.log10(width))))
    return min(6, max(0, 3 - math.floor(math.log10(abs(value))))) if value else 0


def written(value: float, places: int = DECIMALS, sign: str = "") -> str:
    """Returns a number with so many decimals; sign: "+" writes one before positive numbers too."""
    return f"{value:{sign}z.{places}f}"


def written_interval(bounds: Sequence[float] | None, places: int, sign: str = "") -> str:
    """Returns an interval like "0.48 to 0.67"; "" for none."""
    return " to ".join(written(bound, places, sign) for bound in bounds or ())


def written_count(value: float) -> str:
    """Returns a count or a rate, like "40", "7.36" or "12,400"."""
    return f"{value:,.0f}" if value == round(value) or value >= 100 else f"{value:.3g}"


# Around the tables


def facts(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns what the numbers of a report are numbers of, as terms and texts."""
    rows = results["rows"].values()
    run = sum(row["state"] == "measured" for row in rows)
    return [(term, text) for term, text in (
        ("source", results["source"]),
        ("note", results["note"]),
        ("rows", f"{len(rows)}, of which {run} were run here" if run < len(rows) else f"{run}, all of them run here"),
        ("settings", f"{results['settings']}, where a row says nothing else" if results["settings"] else ""),
        ("images", _images(sorted({row["images"] for row in rows}), {row.get("seed") for row in rows})),
        ("arithmetic", _types(results["rows"])),
        ("network", "; ".join(map(_network, _of_rows(results, "network"))) or NOT_RUN),
        ("precision and recall", OFFICIAL if results.get("precision_recall") == "official" else ""),
        ("reference", "; ".join(map(_reference, _of_rows(results, "reference"))) or NOT_RUN),
        ("intervals", _intervals(results)),
        ("made by", f"version {results['version']} on {machine(results)}"),
        *(("warning", text) for text in results.get("warnings", ())),
    ) if text]


def row_titles(results: Mapping[str, Any]) -> dict[str, str]:
    """Returns the titles of all rows by their names, with the name where several have the same title."""
    counts = Counter(row["title"] for row in results["rows"].values())
    return {name: row["title"] + f" ({name})" * (counts[row["title"]] > 1) for name, row in results["rows"].items()}


def machine(made: Mapping[str, Any]) -> str:
    """Returns the device and the ranks that a record or a table says it was made by, "" where it says neither."""
    ranks = made.get("ranks")
    return ", ".join(filter(None, (made.get("device"), ranks and f"{ranks} rank{'s' * (ranks != 1)}")))


def timed_where(results: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """Returns a sentence on the table of timing, and the machine of each row by its name, where rows differ in it.

    It is the machine that sampled a row, which tables of before do not say.
    """
    where = {name: machine(row) or UNKNOWN for name, row in results["rows"].items()
             if row["state"] == "measured"}
    machines, here = set(where.values()), machine(results)
    text = "What an image costs, and how many a rank made in a second"
    if machines:
        text += f" on {'the device beside it' if len(machines) > 1 else min(machines)}"
    if machines - {here}:
        text += f"; the metrics were computed on {here}"
    return f"{text}.", where if len(machines) > 1 else {}


def _images(counts: Sequence[int], seeds: Collection[int | None]) -> str:
    """Returns the numbers of images of the rows. seeds: all of theirs, None where a table of before does not say it."""
    if not counts:
        return ""
    span = " to ".join(f"{count:,}" for count in dict.fromkeys((counts[0], counts[-1])))
    one = len(seeds) == 1 and None not in seeds
    return f"{span} a row" + "; image number i of every row is drawn from the same seed" * one


def _intervals(results: Mapping[str, Any]) -> str:
    """Returns what the intervals are intervals of."""
    numbers = [(METRICS[word].by(results.get("features_of", "")), number) for section in results["sections"]
               for row in section["rows"] for word, number in row["metrics"].items()]
    text = f"95 %, of {results['bootstrap']:,} resamplings of the images"
    if halved := _labels(metric for metric, number in numbers if metric.by_halves and number["interval95"]):
        text += f" ({halved}: random halves of the samples)"
    if falling := _labels(metric for metric, _ in numbers if metric.falls_with_count):
        text += f"; of the {falling} of N images, the number that stands over each table: more images have a lower one"
    fewer = sorted({reference["images"] for section in results["sections"]
                    for reference in references(results, [row["row"] for row in section["rows"]])
                    if section["images"] > reference["images"] > 0})
    if fewer and (limited := _labels(metric for metric, _ in numbers if metric.of_fewer)):
        text += (f" ({limited}: of at most the {' or '.join(f'{count:,}' for count in fewer)} images of the "
                 "reference)")
    return text


def _labels(metrics: Iterable[Metric]) -> str:
    return " and ".join(dict.fromkeys(metric.label for metric in metrics))


def _types(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the type in which the networks of the rows computed, with their names where there are several."""
    types: dict[str, list[str]] = {}
    for name, row in rows.items():
        if row["state"] == "measured" and "dtype" in row:       # tables of before do not say it
            types.setdefault(row["dtype"], []).append(name)
    return "; ".join(word + f" ({', '.join(names)})" * (len(types) > 1) for word, names in types.items())


def references(results: Mapping[str, Any], rows: Iterable[str]) -> list[Mapping[str, Any]]:
    """Returns the references of rows, each once, with all values of its own that the rows have."""
    return _of_rows(results, "reference", rows)


def _of_rows(results: Mapping[str, Any], what: str, rows: Iterable[str] | None = None) -> list[Mapping[str, Any]]:
    """Returns the references, or the networks, of rows (None: of all), each once."""
    found: dict[str, dict[str, Any]] = {}
    for name in results["rows"] if rows is None else rows:
        # Tables of before rows had their own said that of the first one.
        if one := results["rows"][name].get(what, results[what]):
            same = found.setdefault(one["sha256"], dict(one))
            if own := {**same.get("metrics", {}), **one.get("metrics", {})}:
                same["metrics"] = own
    return list(found.values())


def _network(network: Mapping[str, Any]) -> str:
    return f"{network['name']}, sha256 {network['sha256'][:16]}"


def _reference(reference: Mapping[str, Any]) -> str:
    images = reference["images"]
    text = f"{images:,} images" if images else "an unknown number of images"
    # Tables of before statistics_images was there do not say of how many the statistics are.
    if (stored := reference.get("statistics_images", images) or 0) != images:
        text += f", statistics of {f'{stored:,}' if stored else 'a set whose size it does not say'}"
    return f"{reference['file']}, {text}, sha256 {reference['sha256'][:16]}"


def reading(published: bool, verdicts: Sequence[str]) -> list[tuple[str, str]]:
    """Returns how tables are to be read, as words and their meanings.

    published: whether there are published numbers. verdicts: those on differences from other rows.
    """
    words = [("interval", "from the lower to the upper 95 % bound, beside or below its number")]
    if published:
        words += [("difference", "measured minus published"), *VERDICTS.items()]
    else:
        words.append((NOT_RUN, VERDICTS[NOT_RUN]))
    if verdicts:
        others = sorted(set(verdicts) - {EQUAL, NO_WORD, "better", "worse"})
        words += [(", ".join(("better", "worse", *others)),
                   "than the row that the table compares with, by the paired difference on the same image numbers. "
                   f"{_by_chance(sum(word != NO_WORD for word in verdicts))}"),
                  (EQUAL, "the 95 % interval of the paired difference holds 0")]
        if NO_WORD in verdicts and not published:
            words.append((NO_WORD, VERDICTS[NO_WORD]))
    return words


def _by_chance(count: int) -> str:
    """Returns how many of so many comparisons would have a word by chance."""
    return ("Where there is no true difference, such a word stands in about 5 % of all cases. Nothing corrects it for "
            f"their number: of the {count:,} comparisons here, about {written_count(count / 20)} would have one by "
            "chance")
