"""Evaluations: sample files against one reference, by an extractor and the metrics that are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from guided_diffusion import dist_util
from guided_diffusion.errors import UserError, said_otherwise
from guided_diffusion.files import write_json
from guided_diffusion.jobs import job
from guided_diffusion.npz import BatchFile
from guided_diffusion.progress import Progress, progress_bar

from .class_accuracy import read_labels_by_name
from .evaluation_checks import (
    check_count,
    check_first_features,
    check_options,
    check_same_widths,
    check_trained_on,
    check_whole_reference,
    is_stored,
    kinds_read,
    stored_widths,
)
from .evaluation_plot import plot_evaluation, plotted_file, shown_names
from .evaluation_results import described_extractor, protocol, versions
from .evaluation_warnings import evaluation_warnings
from .evaluator_options import EvaluatorOptions
from .extractor_options import ExtractorOptions, load_extractor_once
from .extractors.depth import DepthExtractor, depth_extractor
from .features import FeatureExtractor, Features, extract, first_features
from .image_sets import open_images
from .metrics import Comparison, FileFeatures, Interval, Metric
from .metrics.comparison import SUFFIXES, Feature
from .nearest import draw_nearest
from .references import open_reference
from .stored_statistics import other_extractor, stored_count

__all__ = ["Evaluation", "EvaluatorOptions", "ExtractorOptions", "evaluation_job"]


def evaluation_job(json: str, sample: Path) -> AbstractContextManager[None]:
    """The job of an evaluation: its state lies beside the file of its results, or else of the samples that it reads."""
    return job("evaluation", json or sample, reads=not json)


class Evaluation:
    """Sample files against one reference.

    extractor: used in place of the one that `extractor_options` name. warn: receives each warning, a sentence. Raises
    UserError for files and options that cannot work, before the network is loaded.
    """

    def __init__(self, reference: str, samples: Sequence[str], extractor_options: ExtractorOptions,
                 options: EvaluatorOptions, warn: Callable[[str], None] = lambda text: None,
                 extractor: FeatureExtractor | None = None) -> None:
        self.options, self.extractor_options = options, extractor_options
        self.reference = open_reference(reference)
        given = [options.held_out] if options.held_out else []
        self.samples = [open_images(path) for path in (*given, *samples)] if samples else []
        self.warn = warn
        self._given = extractor
        check_options(options, extractor_options.kind, [file.path for file in (self.reference, *self.samples)])
        self._check_samples()
        check_whole_reference(self.reference, options, extractor_options.kind)

    def _check_samples(self) -> None:
        if not self.samples:
            raise UserError("no sample file is given: name the reference and one or more sample files")
        for file in self.samples:
            if not len(file):
                raise UserError(file.without_images)
            check_count(str(file.path), len(file), self.options)
            if any(metric.feature is Feature.CORRECTNESS for metric in self.options.wanted):
                read_labels_by_name(file, self.extractor_options.kind.class_names(), self._count(file))

    def _count(self, file: BatchFile) -> int:
        return self.options.num_images or len(file)

    @cached_property
    def extractor(self) -> FeatureExtractor:
        """The extractor. It is loaded when it is first needed, which must be on all ranks together."""
        return self._given or load_extractor_once(self.extractor_options)

    @cached_property
    def depth(self) -> DepthExtractor | None:
        """What extracts the features of depth maps, None where no metric needs them."""
        needed = any(metric.needs_depth for metric in self.options.wanted)
        return depth_extractor(self.extractor) if needed else None

    def features(self, folder: Path) -> tuple[FileFeatures, list[FileFeatures]]:
        """Extracts what the metrics need of the reference and of each sample file; called on all ranks.

        folder: keeps the features. Raises UserError where the reference's statistics are those of another extractor,
        and where the classifier of class accuracy was trained on another one's features.
        """
        extractor = self.extractor
        with dist_util.together():
            check_trained_on(self.reference, extractor, self.extractor_options.kind, self.options)
            if self.depth:
                self.depth.is_stored(self.reference)
                for file in self.samples:
                    self.depth.check(file, self._count(file))
            if dist_util.is_main():
                self._check_widths(folder)
        wanted, drawn = self.options.wanted, self.options.is_drawn
        samples = []
        with progress_bar(1 + len(self.samples), "features", "file") as progress:
            reference = self._extract(self.reference, len(self.reference), folder, self._lacking,
                                      drawn and Feature.POOLED not in self.reference.members)
            progress.update()
            for file in self.samples:
                with dist_util.together():
                    foreign = self._foreign(file)
                samples.append(self._extract(file, self._count(file), folder, wanted, drawn, foreign))
                progress.update()
        return reference, samples

    @property
    def _lacking(self) -> list[Metric]:
        """The metrics for which features of the reference are extracted."""
        return [metric for metric in self.options.wanted if not is_stored(self.reference, metric)]

    def _check_widths(self, folder: Path) -> None:
        """Raises UserError where features that files store or give cannot be compared, by the first image of each."""
        drawn = {Feature.POOLED} if self.options.is_drawn else set()
        seen = list(self.samples) if drawn or any(metric.needs_network for metric in self.options.wanted) else []
        if drawn - self.reference.members.keys() or any(metric.needs_network for metric in self._lacking):
            seen.append(self.reference)
        given = {file: self._given_widths(file, folder) for file in seen}
        rows, statistics = kinds_read(self.options)
        for file in (*self.samples, self.reference) if given else ():
            widths = given.get(file) or stored_widths(file, self.options)
            stored = statistics - self._foreign(file).keys() if self._count(file) >= len(file) else set()
            check_same_widths(file, str(self.samples[0].path), given[self.samples[0]],
                              {kind: width for kind, width in widths.items() if kind in rows | statistics},
                              statistics if file is self.reference else stored)

    def _given_widths(self, file: BatchFile, folder: Path) -> dict[Feature, int]:
        """Returns how many numbers of an image the extractor gives, by kind.

        Raises UserError where it refuses the image, or gives none of the features of a sample that metrics read.
        """
        count = len(file) if file is self.reference else self._count(file)
        first = first_features(file, self.extractor, folder, count)
        if file in self.samples:
            with said_otherwise(lambda text: f"{file.path}: {text}"):
                check_first_features(first, self.extractor_options.kind, self.options)
        return {Feature(kind): values.shape[1] for kind, values in first._asdict().items()}

    def _foreign(self, file: BatchFile) -> dict[Feature, str]:
        """Returns whose statistics a sample file stores, or of how many images, by their kind, where it is of others.

        That is where another network made them, or of a larger set, as those of the official reference batches are.
        """
        kinds = [kind for kind, suffix in SUFFIXES.items() if file.statistics(suffix)]
        if not kinds:
            return {}
        whose = other_extractor(file, self.extractor)
        if file.value("backend", str) is None and not self.extractor_options.kind.is_inception:
            whose = f"Inception's, not those of {self.extractor.name!r}"        # as those of files that name no network
        count = stored_count(file) or len(file)
        others = f"of {count} images, not of its {len(file)}" if count != len(file) else ""
        depth = self.depth.other_networks(file) if self.depth else ""
        found = {kind: (depth if kind is Feature.DEPTH else whose) or others for kind in kinds}
        return {kind: words for kind, words in found.items() if words}

    def _extract(self, file: BatchFile, count: int, folder: Path, metrics: Sequence[Metric], plotted: bool,
                 foreign: Mapping[Feature, str] | None = None) -> FileFeatures:
        """Extracts the features that `metrics` read, and those of a picture, of the first `count` images.

        foreign: see `FileFeatures`.
        """
        features: dict[str, np.ndarray] = {}
        if plotted or any(metric.needs_network for metric in metrics):
            found = extract(file, self.extractor, folder, self.extractor_options.batch_size, count)
            features |= found._asdict()
            if any(metric.feature is Feature.CORRECTNESS for metric in metrics):
                features[Feature.CORRECTNESS] = self._correctness(found, file)
        if any(metric.needs_depth for metric in metrics):
            with dist_util.together():
                if self.depth and dist_util.is_main():      # only the first rank computes metrics
                    depth = self.depth.features(file, count)
                    features |= {Feature.DEPTH: depth.depth, Feature.SHARPNESS: depth.sharpness}
        return FileFeatures(file, count or stored_count(file), features, foreign)

    def _correctness(self, features: Features, file: BatchFile) -> np.ndarray:
        """Returns for each image 1.0 where its class is named as its label says, else 0.0."""
        kind = self.extractor_options.kind
        named = kind.classify(features)
        with dist_util.together():
            labels = read_labels_by_name(file, kind.class_names(), len(named))
        return (named == labels).astype(np.float64)

    def run(self, folder: Path) -> list[dict[str, Any]]:
        """Returns the results, one for each sample file, after that of `--held_out`; none on ranks but the first.

        It writes the files of `--json`, `--plot` and `--nearest`. folder: keeps the features.
        """
        reference, samples = self.features(folder)
        results = []
        with dist_util.together():
            if dist_util.is_main():
                self._warn(reference, samples)
                comparisons = [Comparison(reference, sample, self.options.settings) for sample in samples]
                with progress_bar(len(samples) * len(self.options.wanted), "measuring", "metric") as progress:
                    results = [self._result(reference, sample, comparison, progress)
                               for sample, comparison in zip(samples, comparisons, strict=True)]
                if self.options.held_out:
                    results[0]["held_out"] = True
                if self.options.json:           # before the pictures, so that none that fails loses the numbers
                    write_json(self.options.json, results)
                if self.options.plot:
                    title = f"{self.extractor.name}, reference {self.reference.path.name}"
                    files = list(map(plotted_file, shown_names(samples), samples, comparisons, results))
                    plot_evaluation(self.options.plot, files, comparisons[0].neighbourhoods.reference_distance, title)
                if self.options.nearest:
                    draw_nearest(self.options.nearest, reference, samples)
        return results

    def _warn(self, reference: FileFeatures, samples: Sequence[FileFeatures]) -> None:
        if self.extractor.caveat:
            self.warn(self.extractor.caveat)
        for text in evaluation_warnings(reference, samples, self.options, self.extractor_options.kind):
            self.warn(text)

    def _result(self, reference: FileFeatures, sample: FileFeatures, comparison: Comparison, progress: Progress,
                ) -> dict[str, Any]:
        values: dict[str, float | None] = {}
        intervals: dict[str, Interval] = {}
        kind = self.extractor_options.kind
        for metric in self.options.wanted:
            named = metric.by(kind.network)
            with _about(reference.file, sample.file):
                value = metric.measured(comparison)
            values[metric.word] = value
            if np.isnan(value):
                self.warn(f"{sample.file.path}: {named.label}: {metric.if_nan}")
                values[metric.word] = None          # JSON has no NaN
            if self.options.bootstrap:
                with _about(reference.file, sample.file):
                    number = metric.replicates(comparison, self.options.bootstrap)
                bounds = metric.bounds(number)
                if bounds is None:
                    self.warn(f"{sample.file.path}: no 95 % interval of {named.label}: "
                              f"{named.no_interval(number)}")
                else:
                    intervals[metric.word] = bounds
            progress.update()
        return {
            "reference": reference.description(),
            "sample": sample.description(),
            "metrics": values,
            **({"intervals95": intervals, "bootstrap": self.options.bootstrap} if intervals else {}),
            "backend": described_extractor(self.extractor, self.extractor_options),
            **({"depth": self.depth.description()} if self.depth else {}),
            "protocol": protocol(self.options),
            "versions": versions(),
        }


@contextmanager
def _about(reference: BatchFile, sample: BatchFile) -> Iterator[None]:
    """Adds to a UserError of a metric, which knows numbers alone, the files that they are of."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{sample.path} against {reference.path}: {error}") from None
