"""The depth metrics of sampled scenes, with their differences from the first sample file, as two tables.

They are dFID, FID, edge sharpness and its gap to that of real scenes, by the depth that the extractor of scenes
estimates: the metrics of these words in `METRICS`. Differences are of the same resampled image indices in both files:
with the same seed, image i begins in the same noise in every file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from guided_diffusion.errors import UserError
from guided_diffusion.files import check_writable, write_json
from guided_diffusion.options import Options, option, seed_option

from ..extractors.depth import DepthExtractor, check_scenes
from ..image_sets import check_named_once, open_images
from ..metrics import (
    METRICS,
    Comparison,
    FeatureSet,
    FileFeatures,
    Replicates,
    Statistic,
    resampled_mean,
    resamplings,
)
from ..metrics.bootstrap import MOST_RESAMPLINGS, known_replicates
from ..metrics.comparison import Feature
from ..references import open_reference

SHOWN = tuple(METRICS[word] for word in ("dfid", "fid", "sharpness", "gap"))


@dataclass(frozen=True)
class DepthMetricsOptions(Options):
    """The evaluation of depth."""

    num_images: int | None = option(None, "only the first so many images of each sample file; unset: all", minimum=2)
    bootstrap: int = option(1000, "resamplings for 95 % intervals", minimum=2, maximum=MOST_RESAMPLINGS)
    seed: int = seed_option("seed of the resamplings")
    json: str = option("", "also write the results to this file")


@dataclass(frozen=True)
class DepthReference:
    """What generated images are compared with. file: as it was named."""

    file: str
    features: FeatureSet


def read_reference(word: str, extractor: DepthExtractor) -> DepthReference:
    """Reads the reference in a file, or the bundled one of that name, from its statistics where it has them.

    Raises UserError where they are those of other networks, and where there are no images either.
    """
    file = open_reference(word)
    if extractor.is_stored(file):
        return DepthReference(word, FileFeatures(file, len(file.read(Feature.SHARPNESS))))
    return DepthReference(word, FeatureSet(extractor.features(file)._asdict()))


def compare(reference: DepthReference, rows: Mapping[str, FeatureSet], replicates: int, seed: int = 0,
            ) -> dict[str, dict[str, Any]]:
    """Returns, for each row and metric, value and interval95; after the first row also how it differs from that.

    rows: of the same image indices. A difference stands as difference, difference95 and verdict. Where there is no
    interval it is None, the verdict "no word", and no_interval says why. Raises UserError for rows of different numbers
    of images.
    """
    first = next(iter(rows))
    for name, row in rows.items():
        if row.count != rows[first].count:
            raise UserError(f"{name} has {row.count} images and {first} has {rows[first].count}: differences need the "
                            "same images of both")
    drawn = resamplings(rows[first].count, replicates, seed)
    results: dict[str, dict[str, Any]] = {}
    base: dict[str, Replicates] = {}
    for name, row in rows.items():
        comparison = Comparison(reference.features, row)
        found = {metric.word: _replicates(metric.resampled(comparison).statistic, drawn) for metric in SHOWN}
        base = base or found
        results[name] = {word: _described(word, number, None if name == first else number.minus(base[word]))
                         for word, number in found.items()}
    return results


def real_sharpness(reference: DepthReference, replicates: int, seed: int = 0) -> dict[str, Any]:
    """Returns value and interval95 of the edge sharpness of the reference."""
    sharpness = reference.features[Feature.SHARPNESS]
    drawn = resamplings(len(sharpness), replicates, seed)
    return _described("sharpness", _replicates(resampled_mean(sharpness), drawn), None)


def _replicates(statistic: Statistic, drawn: np.ndarray) -> Replicates:
    every = np.ones((1, drawn.shape[1]), drawn.dtype)
    return known_replicates(float(statistic(every)[0]), statistic(drawn))


def _described(word: str, number: Replicates, difference: Replicates | None) -> dict[str, Any]:
    metric = METRICS[word]
    bounds = metric.bounds(number)
    described = {"value": number.estimate, "interval95": bounds and list(bounds),
                 **({} if bounds else {"no_interval": metric.no_interval(number)})}
    if difference is None:
        return described
    bounds = difference.interval
    return {**described, "difference": difference.estimate, "difference95": bounds and list(bounds),
            "verdict": metric.direction.verdict(*bounds) if bounds else "no word"}


def markdown(results: Mapping[str, dict[str, Any]], real: dict[str, Any]) -> str:
    """Returns two tables, of the rows and of how they differ from the first one, and what has no interval."""
    first = next(iter(results))
    names = [metric.label for metric in SHOWN]
    lines = [f"| row | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    lines += [f"| {name} | {' | '.join(_with_bounds(row[metric.word], 'value', 'interval95') for metric in SHOWN)} |"
              for name, row in results.items()]
    lines.append(f"| real scenes | | | {_with_bounds(real, 'value', 'interval95')} | |")
    if len(results) > 1:
        lines += ["", f"| difference to {first} | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
        lines += [f"| {name} | {' | '.join(_difference(row[metric.word]) for metric in SHOWN)} |"
                  for name, row in results.items() if name != first]
    silent = [f"no 95 % interval of {metric.label} of {name}: {row[metric.word]['no_interval']}"
              for name, row in results.items() for metric in SHOWN if row[metric.word]["interval95"] is None]
    lines += ["", *silent] if silent else []
    return "\n".join(lines)


def _with_bounds(number: dict[str, Any], value: str, bounds: str, sign: str = "") -> str:
    if number[bounds] is None:
        return f"{number[value]:{sign}.4g}"
    low, high = number[bounds]
    return f"{number[value]:{sign}.4g} ({low:{sign}.4g} to {high:{sign}.4g})"


def _difference(number: dict[str, Any]) -> str:
    return f"{_with_bounds(number, 'difference', 'difference95', '+')}: {number['verdict']}"


def header(extractor: DepthExtractor, reference: DepthReference) -> str:
    """Returns what the numbers were made with, in lines."""
    accuracy = ", ".join(f"{name} {value:.4g}" for name, value in extractor.scenes.accuracy.items())
    return (f"reference: {reference.file}, {reference.features.count} images\n"
            f"depth:     {extractor.scenes.name}, sha256 {extractor.scenes.fingerprint[:16]}, on held-out scenes: "
            f"{accuracy}\n"
            f"features:  {extractor.classifier.name}, sha256 {extractor.classifier.fingerprint[:16]}")


def measure_depth(reference: str, samples: Sequence[str], options: DepthMetricsOptions) -> str:
    """Returns the tables of these sample files against the reference, and what they were made with.

    Raises UserError for files that do not hold scenes or are named twice, and where `--json` cannot be written.
    """
    check_named_once(samples)
    check_writable("--json", options.json, read=[reference, *samples])
    files = {name: open_images(name) for name in samples}
    for file in files.values():
        check_scenes(file, options.num_images)
    extractor = DepthExtractor()
    real = read_reference(reference, extractor)
    rows = {name: FeatureSet(extractor.features(file, options.num_images)._asdict()) for name, file in files.items()}
    results = compare(real, rows, options.bootstrap, options.seed)
    sharpness = real_sharpness(real, options.bootstrap, options.seed)
    for file in files.values():
        file.check_unchanged()
    if options.json:
        described = {name: {"sha256": file.sha256, "images": rows[name].count, "metrics": results[name]}
                     for name, file in files.items()}
        write_json(options.json, {
            "reference": {"file": real.file, "images": real.features.count, "sharpness": sharpness},
            **extractor.description(), "bootstrap": options.bootstrap, "rows": described})
    return f"{header(extractor, real)}\n\n{markdown(results, sharpness)}"
