"""Warnings of an evaluation: what readers of its numbers must know of the files, a sentence each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .class_accuracy import read_labels_by_name
from .evaluation_checks import is_stored
from .evaluator_options import EvaluatorOptions
from .extractors import ExtractorKind
from .metrics import METRICS, FileFeatures, FromReference, Metric
from .metrics.comparison import Feature
from .metrics.registry import SPLIT_SIZE
from .stored_statistics import stored_count

NARROW = 4                      # samples for each feature, below which intervals of Frechet distances are too wide


def evaluation_warnings(reference: FileFeatures, samples: Sequence[FileFeatures], options: EvaluatorOptions,
                        kind: ExtractorKind) -> Iterator[str]:
    """Yields the warnings of an evaluation whose features are known. Raises UserError as `read_labels_by_name`."""
    yield from _of_statistics(samples, options)
    yield from _of_labels(samples, options, kind)
    yield from _of_few_samples(samples, options, kind)
    yield from _of_training(reference, options)
    yield from _of_counts(reference, samples, options, kind)
    yield from _of_splits(samples, options, kind)
    yield from _of_sizes((reference, *samples))


def _of_statistics(samples: Sequence[FileFeatures], options: EvaluatorOptions) -> Iterator[str]:
    """Where statistics that a sample file stores are not used, or do not say of how many images they are."""
    read = {metric.feature for metric in options.wanted if metric.needs is FromReference.STATISTICS}
    for sample in (sample for sample in samples if sample.is_whole):
        for whose in dict.fromkeys(words for kind, words in sample.foreign.items() if kind in read):
            yield f"{sample.file.path}: its stored statistics are {whose}; those of its images were computed instead"
        for why in dict.fromkeys(filter(None, map(sample.unresampled, sorted(read)))):
            yield f"{sample.file.path}: {why}; they may be of others than its {sample.count}"


def _of_labels(samples: Sequence[FileFeatures], options: EvaluatorOptions, kind: ExtractorKind) -> Iterator[str]:
    """Where labels are probably not those of the classes that the network tells apart."""
    if not kind.classes_of or all(metric.feature is not Feature.CORRECTNESS for metric in options.wanted):
        return
    names = kind.class_names()
    for sample in samples:
        greatest = int(read_labels_by_name(sample.file, names, sample.count).max())
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


def _of_counts(reference: FileFeatures, samples: Sequence[FileFeatures], options: EvaluatorOptions,
               kind: ExtractorKind) -> Iterator[str]:
    """Where numbers of images differ; the first metric that falls with them stands for all that depend on them."""
    counts = [sample.count for sample in samples]
    behind = {metric.word: _images_behind(reference, metric) for metric in options.wanted}
    metrics = [metric for metric in options.wanted if len({behind[metric.word] or counts[0], *counts}) > 1]
    if metrics:
        counts = [*filter(None, (behind[metric.word] for metric in metrics)), *counts]
        first = next((metric for metric in metrics if metric.falls_with_count), metrics[0]).by(kind.network).label
        yield (f"different numbers of images ({_listed(counts)}), on which {first} "
               f"{'and others depend' if len(metrics) > 1 else 'depends'}")


def _images_behind(reference: FileFeatures, metric: Metric) -> int:
    """Returns of how many images of the reference a metric is, 0 for none and where the reference does not say."""
    if metric.needs is FromReference.NOTHING:
        return 0
    stored = metric.needs is FromReference.STATISTICS and is_stored(reference.file, metric)
    return stored_count(reference.file) if stored else reference.count


def _of_splits(samples: Sequence[FileFeatures], options: EvaluatorOptions, kind: ExtractorKind) -> Iterator[str]:
    """Where the Inception Score is a mean of splits of which the last one is short."""
    metric = METRICS["is"]
    for count in dict.fromkeys(sample.count for sample in samples if metric in options.wanted):
        if count > SPLIT_SIZE and (rest := count % SPLIT_SIZE):
            yield (f"{metric.by(kind.network).label} of {count} images: the last of its splits of {SPLIT_SIZE} has "
                   f"{rest}, and counts as much as the others, as in the official code")


def _of_sizes(files: Sequence[FileFeatures]) -> Iterator[str]:
    """Where images differ in size."""
    sizes = [features.file.resolution for features in files if len(features.file)]
    if len(set(sizes)) > 1:
        yield f"images of different sizes ({_listed(sizes)}), which the network resizes to its own"


def _listed(values: Sequence[Any]) -> str:
    """Lists different values in their order."""
    return ", ".join(map(str, dict.fromkeys(values)))
