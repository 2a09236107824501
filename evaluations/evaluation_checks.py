"""Checks of an evaluation: whether extractor and reference give what the metrics need, and fit each other."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from guided_diffusion.errors import UserError, said_otherwise
from guided_diffusion.files import check_ending, check_writable
from guided_diffusion.npz import BatchFile

from .evaluation_plot import check_plot
from .evaluator_options import EvaluatorOptions
from .extractors import EXTRACTORS, ExtractorKind
from .features import FeatureExtractor, Features
from .metrics import FromReference, Metric
from .metrics.comparison import DENSITY_K, SUFFIXES, Feature
from .metrics.frechet import check_covariance
from .metrics.inception_score import checked_probabilities
from .stored_statistics import check_extractor_of

ROWS = 4096                     # of stored features, that are looked at together


def check_options(options: EvaluatorOptions, kind: ExtractorKind, read: Iterable[str | Path] = ()) -> None:
    """Raises UserError for files that cannot be written, and for metrics that the extractor cannot give.

    read: the files that are evaluated, which no other may replace.
    """
    taken = [*read, options.held_out]
    for flag in ("json", "plot", "nearest"):
        check_writable(f"--{flag}", getattr(options, flag), read=taken)
        taken.append(getattr(options, flag))
    if options.nearest:
        check_ending("--nearest", options.nearest, ".png")
    if options.plot:
        check_plot(options.plot)
    if options.bootstrap == 1:
        raise UserError("--bootstrap 1: must be 0, or at least 2")
    check_outputs(options.wanted, kind)


def check_count(file: str, count: int, options: EvaluatorOptions) -> None:
    """Raises UserError where a file has too few images for the metrics, or fewer than --num_images asks for."""
    if options.num_images and options.num_images > count:
        raise UserError(f"--num_images {options.num_images}: {file} holds {count}")
    check_enough(file, options.num_images or count, options)


def check_enough(file: str, count: int, options: EvaluatorOptions) -> None:
    """Raises UserError where so many images of a file are too few for the metrics."""
    needed = max(metric.smallest_count for metric in options.wanted)
    if count < needed:
        raise UserError(f"{file}: has {count} images, --metrics {options.metrics} needs at least {needed}")
    check_drawn(file, count, options)


def check_drawn(file: str, count: int, options: EvaluatorOptions) -> None:
    """Raises UserError where so many images of a file are too few for the picture."""
    if options.plot and count <= DENSITY_K:
        raise UserError(f"{file}: has {count} images, --plot {options.plot} needs at least {DENSITY_K + 1}")


def check_outputs(metrics: Sequence[Metric], kind: ExtractorKind, within: str = "") -> None:
    """Raises UserError where metrics need features that the extractor does not give; within: where it was named."""
    start = f"--backend {kind.name}{within}:"
    of_depth = [metric.word for metric in metrics if metric.needs_depth]
    if of_depth and not kind.estimates_depth:
        able = ", ".join(other.name for other in EXTRACTORS.values() if other.estimates_depth)
        raise UserError(f"{start} does not estimate depth, which {', '.join(of_depth)} would need; must be one of "
                        f"{able}, or your own network with an output depth")
    lacking = {metric.word: metric.feature for metric in metrics
               if metric.needs_network and metric.feature not in kind.outputs}
    if lacking:
        raise UserError(f"{start} gives {', '.join(sorted(kind.outputs))}, but no "
                        f"{' and no '.join(dict.fromkeys(lacking.values()))}, which {', '.join(lacking)} would need: "
                        "leave them out of --metrics")


def check_first_features(found: Features, kind: ExtractorKind, options: EvaluatorOptions) -> None:
    """Raises UserError where the features of one image are none for the metrics: empty ones, or no probabilities."""
    empty = {Feature(name) for name, values in found._asdict().items() if not values.size}
    check_outputs(options.wanted, replace(kind, outputs=kind.outputs - empty))
    if any(metric.feature is Feature.PROBABILITIES for metric in options.wanted):
        logits = "; of logits give the softmax, or call the output logits in a YAML file" if kind.is_own else ""
        with said_otherwise(lambda text: f"--backend {kind.name}: {text}{logits}"):
            checked_probabilities(found.probabilities.reshape(1, -1))


def check_reference(reference: BatchFile, options: EvaluatorOptions, kind: ExtractorKind) -> None:
    """Raises UserError where a reference lacks what the metrics need, or was made by another kind of extractor."""
    lacking = [metric.word for metric in options.wanted if not is_stored(reference, metric)]
    if options.nearest and not len(reference):
        raise UserError(f"--nearest {options.nearest}: {reference.path} has no images (arr_0) to draw")
    if options.nearest and Feature.POOLED in reference.members and not lacking:
        rows = reference.header(Feature.POOLED)[0][:1]
        if rows != (len(reference),):
            raise UserError(f"--nearest {options.nearest}: {reference.path} has {len(reference)} images, and pooled "
                            f"features of {rows[0] if rows else 0}")
    if lacking and not len(reference):
        raise UserError(f"{reference.path}: has no images (arr_0), which {', '.join(lacking)} would need: leave "
                        f"them out of --metrics; its arrays are: {reference.array_names}")
    if options.plot and Feature.POOLED not in reference.members and not len(reference):
        raise UserError(f"--plot {options.plot}: {reference.path} has neither images (arr_0) nor pooled features, "
                        "which a picture needs: leave it out")
    made_by = reference.value("backend", str)
    if made_by is None and not kind.is_inception and reference.statistics():
        raise UserError(f"{reference.path}: its statistics are Inception's, not those of --backend {kind.name}")
    if made_by is not None and kind.is_inception and "Inception" not in made_by:
        raise UserError(f"{reference.path}: its statistics are of the network {made_by!r}, not of Inception: pass "
                        "another --backend")


def check_whole_reference(reference: BatchFile, options: EvaluatorOptions, kind: ExtractorKind) -> None:
    """Raises UserError as `check_reference`, for stored features that are none, and for too few images."""
    check_reference(reference, options, kind)
    check_stored_features(reference, options)
    if len(reference):
        check_enough(str(reference.path), len(reference), options)


def check_stored_features(reference: BatchFile, options: EvaluatorOptions) -> None:
    """Raises UserError where the features that a reference holds, and that the metrics read, are no features."""
    read = [metric.feature for metric in options.wanted if metric.needs is FromReference.FEATURES]
    for name in dict.fromkeys([*read, *[Feature.POOLED] * options.is_drawn]):
        if name not in reference.members:
            continue
        shape, dtype = reference.header(name)
        if dtype.kind != "f" or len(shape) != (1 if name == Feature.SHARPNESS else 2) or min(shape) < 1:
            raise UserError(f"{reference.path}: {name} is {shape} {dtype}, it must hold floating-point numbers of each "
                            "image")
        needed = max((metric.smallest_count for metric in options.wanted if metric.feature == name), default=1)
        if shape[0] < needed:
            raise UserError(f"{reference.path}: {name} has {shape[0]} images, --metrics {options.metrics} needs at "
                            f"least {needed}")
        if name == Feature.POOLED:
            check_drawn(f"{reference.path}: {name}", shape[0], options)
        if not all(np.isfinite(rows).all() for rows in reference.pieces(name, ROWS)):
            raise UserError(f"{reference.path}: {name} must be finite numbers")


def check_trained_on(reference: BatchFile, extractor: FeatureExtractor, kind: ExtractorKind, options: EvaluatorOptions,
                     ) -> None:
    """Raises UserError where an extractor is not that of a reference's statistics, or of the classifier in use."""
    check_extractor_of(reference, extractor)
    if any(metric.feature is Feature.CORRECTNESS for metric in options.wanted):
        kind.check_classifier(extractor)


def check_extractor(reference: BatchFile, extractor: FeatureExtractor, kind: ExtractorKind, options: EvaluatorOptions,
                    size: int) -> None:
    """Raises UserError where an extractor cannot compare images of `size` pixels with a reference.

    That is where it refuses such images or gives none of the features that metrics read, where what the reference
    stores was made by another one, has other widths or is no covariance, and where the classifier of class accuracy was
    trained on another one's features.
    """
    check_trained_on(reference, extractor, kind, options)
    if not options.is_drawn and not any(metric.needs_network for metric in options.wanted):
        return
    noise = np.random.default_rng(0).integers(0, 256, (1, size, size, 3), np.uint8)     # some take no constant image
    with said_otherwise(lambda text: f"--backend {kind.name}: {text}"):
        found = extractor.features(noise)
    check_first_features(found, kind, options)
    statistics = kinds_read(options)[1]
    widths = {Feature(name): values.size for name, values in found._asdict().items()}
    stored = {name: width for name, width in stored_widths(reference, options).items() if name in widths}
    check_same_widths(reference, extractor.name, widths, stored, statistics & widths.keys())
    for name in statistics:
        if (of_reference := reference.statistics(SUFFIXES[name])) is not None:
            check_covariance(of_reference.covariance, f"{reference.path}: sigma{SUFFIXES[name]}")


def kinds_read(options: EvaluatorOptions) -> tuple[set[Feature], set[Feature]]:
    """The kinds of features of the reference that are read themselves, and those of which the statistics are."""
    metrics = [metric for metric in options.wanted if metric.needs_network]
    rows = {metric.feature for metric in metrics if metric.needs is FromReference.FEATURES}
    return (rows | {Feature.POOLED} if options.is_drawn else rows,
            {metric.feature for metric in metrics if metric.needs is FromReference.STATISTICS})


def stored_widths(reference: BatchFile, options: EvaluatorOptions) -> dict[Feature, int]:
    """How many numbers of an image a reference stores, by the kinds of features that are read."""
    return {kind: reference.header(kind)[0][1] for kind in kinds_read(options)[0] if kind in reference.members}


def check_same_widths(file: BatchFile, of: str, expected: Mapping[Feature, int],
                      features: Mapping[Feature, int], statistics: Collection[Feature]) -> None:
    """Raises UserError where what metrics read of a file has other widths than the features of others.

    of: the others, in words. expected: how many numbers of an image these have, by kind. features: the same of the
    file, as stored or extracted, of the kinds that are compared. statistics: the kinds whose stored mean and covariance
    are read.
    """
    widths = [(kind, "features", width) for kind, width in features.items()]
    for kind in statistics:
        if stored := file.statistics(SUFFIXES[kind]):
            widths.append((kind, "statistics", len(stored.mean)))
    for kind, what, width in widths:
        if width != expected[kind]:
            raise UserError(f"{file.path}: its {kind} {what} have {width} numbers an image, the features of {of} "
                            f"{expected[kind]}: they are of another network")


def is_stored(reference: BatchFile, metric: Metric) -> bool:
    """Whether a reference holds what the metric needs of it, so that no feature needs to be extracted."""
    if metric.needs is FromReference.STATISTICS:
        return reference.statistics(SUFFIXES[metric.feature]) is not None
    return metric.needs is FromReference.NOTHING or metric.feature in reference.members
