"""Warnings of an evaluation: what readers of its numbers must know of the files, a sentence each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .class_accuracy import read_labels_by_name
from .evaluator_options import EvaluatorOptions
from .extractors import ExtractorKind
from .metrics import METRICS, FileFeatures, FromReference, Metric
from .metrics.comparison import Feature

NARROW = 4                      # samples for each feature, below which intervals of Frechet distances are too wide


def evaluation_warnings(reference: FileFeatures, samples: Sequence[FileFeatures], options: EvaluatorOptions,
                        kind: ExtractorKind) -> Iterator[str]:
    """Yields the warnings of an evaluation whose features are known. Raises UserError as `read_labels_by_name`."""
    yield from _of_statistics(samples, options)
    yield from _of_labels(samples, options, kind)
    yield from _of_few_samples(samples, options, kind)
    yield from _of_training(reference, options)
    yield from _of_counts((reference, *samples), options, kind)
    yield from _of_sizes((reference, *samples))


def _of_statistics(samples: Sequence[FileFeatures], options: EvaluatorOptions) -> Iterator[str]:
    """Where statistics that a sample file stores are not used, since another network made them."""
    read = {metric.feature for metric in options.wanted if metric.needs is FromReference.STATISTICS}
    for sample in (sample for sample in samples if sample.is_whole):
        for whose in dict.fromkeys(words for kind, words in sample.foreign.items() if kind in read):
            yield f"{sample.file.path}: its stored statistics are {whose}; those of its images were computed instead"


def _of_labels(samples: Sequence[FileFeatures], options: EvaluatorOptions, kind: ExtractorKind) -> Iterator[str]:
    """Where labels are probably not those of the classes that the network tells apart."""
    if not kind.classes_of or all(metric.feature is not Feature.CORRECTNESS for metric in options.wanted):
        return
    names = kind.class_names()
    for sample in samples:
        greatest = int(read_labels_by_name(sample.file, names).max())
        if 2 * (greatest + 1) <= len(names):
            yield (f"{sample.file.path}: its labels go up to {greatest}, class_accuracy reads them as those of the "
                   f"{len(names)} classes of {kind.classes_of}")


def _of_few_samples(samples: Sequence[FileFeatures], options: EvaluatorOptions, kind: ExtractorKind) -> Iterator[str]:
    """Where there are few samples beside their features: of numbers that are wrong, and of wide intervals."""
    def few(metric: Metric, per_feature: int) -> bool:
        return any(per_feature * sample[metric.feature][0].size > sample.count for sample in samples)

    wanted = [metric.by(kind.network) for metric in options.wanted]
    for metric in wanted:
        if metric.per_feature and few(metric, metric.per_feature):
            yield (f"{metric.label} lies beside the truth with fewer than {metric.per_feature} images for each "
                   "feature")
    wide = [metric.label for metric in wanted if metric.needs is FromReference.STATISTICS and few(metric, NARROW)]
    if wide and options.bootstrap:
        yield (f"95 % intervals of {' and '.join(wide)} are wider than they need to be, with fewer than {NARROW} "
               "images for each feature")


def _of_training(reference: FileFeatures, options: EvaluatorOptions) -> Iterator[str]:
    """Where copies of training images are looked for, which only a reference of these can tell."""
    metric = METRICS["authenticity"]
    if metric in options.wanted:
        yield (f"{metric.label} tells copies of the images of {reference.file.path}, which must be those that the "
               "network was trained on")


def _of_counts(files: Sequence[FileFeatures], options: EvaluatorOptions, kind: ExtractorKind) -> Iterator[str]:
    """Where numbers of images differ; the first metric that falls with them stands for all that depend on them."""
    counts = [features.count for features in files if features.count]
    if len(set(counts)) > 1:
        falling = [metric.by(kind.network).label for metric in options.wanted if metric.falls_with_count]
        yield (f"different numbers of images ({_listed(counts)}), on which "
               f"{f'{falling[0]} and others depend' if falling else 'such numbers depend'}")


def _of_sizes(files: Sequence[FileFeatures]) -> Iterator[str]:
    """Where images differ in size."""
    sizes = [features.file.resolution for features in files if len(features.file)]
    if len(set(sizes)) > 1:
        yield f"images of different sizes ({_listed(sizes)}), which the network resizes to its own"


def _listed(values: Sequence[Any]) -> str:
    """Lists different values in their order."""
    return ", ".join(map(str, dict.fromkeys(values)))
