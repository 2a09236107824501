"""From sampled rows to numbers: every sample file is seen once, and all numbers of all sections are computed.

The ranks extract the features of each file together, and then share the rows out among them.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from guided_diffusion import dist_util
from guided_diffusion.errors import UserError
from guided_diffusion.progress import progress_bar

from ..depth.fid import DepthFidOptions, DepthFile, depth_fid
from ..evaluation import Evaluation
from ..evaluation_warnings import evaluation_warnings
from ..evaluator_options import EvaluatorOptions
from ..extractor_options import ExtractorOptions, load_extractor_once
from ..features import FeatureExtractor
from ..metrics import METRICS, Comparison, ComparisonSettings, FileFeatures, Replicates
from ..references import find_reference
from ..stored_statistics import extractor_settings, stored_count
from .missing import depth_maps, depth_reference, needs_depth_maps
from .tables import DFID, EvaluationSpec, Row, Section, Table, smallest

_calls = itertools.count()


@dataclass(frozen=True)
class EvaluationSettings:
    """How the rows are evaluated.

    references: folder of reference batches. extractor: without its backend, which the rows name. bootstrap: number of
    resamplings. changed: by row, what of its evaluation is not as the row's file has it, in words.
    """

    references: Path
    extractor: ExtractorOptions
    bootstrap: int
    changed: Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Measurements:
    """The numbers of the rows that were sampled.

    replicates: by row and number of images, then by the words of the metrics. depth: by row, dFID of depth maps that
    the user has estimated, as value and interval95, or why there is none. by_row: of each row that has a reference, the
    "network", and of the "reference" its file, images, sha256, of how many images its stored statistics are, None where
    it does not say, and, for the metrics that have any, its own values. warnings: what readers of the numbers must
    know, each once.
    """

    replicates: Mapping[tuple[str, int], Mapping[str, Replicates]]
    depth: Mapping[str, Mapping[str, Any]]
    by_row: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    warnings: Sequence[str] = ()


@dataclass(frozen=True)
class _Group:
    """Rows that are evaluated together: against one reference, by one extractor, with the same metrics."""

    reference: str
    backend: str
    metrics: str


def measure_rows(table: Table, sampled: Sequence[str], settings: EvaluationSettings, folder: Path,
                 extractors: dict[str, FeatureExtractor]) -> Measurements | None:
    """Evaluates all sample files, on all ranks; None on ranks other than the first.

    sampled: names of the rows that there are samples of. folder: keeps the features. extractors: by backend, those that
    are loaded, to which this adds its own.
    """
    counts = _counts(table, sampled)
    replicates: dict[tuple[str, int], dict[str, Replicates]] = {}
    by_row: dict[str, dict[str, Any]] = {}
    warnings: dict[str, None] = {}
    evaluated = 0
    for group, rows in _groups(table, sampled).items():
        options = replace(settings.extractor, backend=group.backend)
        extractor = loaded(group.backend, settings, extractors)
        chosen = EvaluatorOptions(metrics=group.metrics, bootstrap=settings.bootstrap,
                                  precision_recall=table.precision_recall)
        with dist_util.together():
            evaluation = Evaluation(str(find_reference(group.reference, settings.references)),
                                    [str(row.run.samples) for row in rows], options, chosen, extractor=extractor)
        reference, samples = evaluation.features(folder)
        measure = functools.partial(_row_replicates, reference, chosen.settings, settings.bootstrap)
        with progress_bar(len(counts), "evaluating", "row", evaluated) as progress:
            replicates |= _shared_out(rows, samples, counts, progress.update, measure)
        evaluated += len(rows)
        with dist_util.together():
            if dist_util.is_main():
                network = {"name": extractor.name, "sha256": extractor.fingerprint,
                           **({"settings": extractor_settings(extractor)} if options.kind.is_own else {}),
                           **({"caveat": extractor.caveat} if extractor.caveat else {})}
                described = _described(reference, rows[0].evaluation, settings.bootstrap)
                by_row |= {row.name: {"reference": described, "network": network} for row in rows}
                seen = {row.name: sample for row, sample in zip(rows, samples, strict=True)}
                for images in _as_in_sections(table, sampled, seen):
                    warnings |= dict.fromkeys(evaluation_warnings(reference, images, chosen, options.kind))
                warnings |= dict.fromkeys([extractor.caveat] * bool(extractor.caveat))
                warnings |= dict.fromkeys(_of_numbers(rows, replicates, options.kind.network))
    depth = {name: _depth_fid(table.rows[name], settings, lambda text: warnings.update({text: None}))
             for name in sampled if needs_depth_maps(table.rows[name])}
    return Measurements(replicates, depth, by_row, list(warnings)) if dist_util.is_main() else None


def loaded(backend: str, settings: EvaluationSettings, extractors: dict[str, FeatureExtractor]) -> FeatureExtractor:
    """Returns the extractor of a backend, on all ranks together; extractors: those that there are, which it joins."""
    if backend not in extractors:
        extractors[backend] = load_extractor_once(replace(settings.extractor, backend=backend))
    return extractors[backend]


def _shared_out(rows: Sequence[Row], samples: Sequence[FileFeatures], counts: Mapping[str, Sequence[int]],
                update: Callable[[], object], measure: Callable[[Row, FileFeatures], dict[str, Replicates]],
                ) -> dict[tuple[str, int], dict[str, Replicates]]:
    """Measures each row with each number of its images on one of the ranks; returns all on rank 0, else nothing.

    All ranks call it together. Rows whose features only rank 0 has, as those of depth, are its own. update: called for
    each row that this rank is done with, and for those of others when all are.
    """
    answers = dist_util.store(f"measured rows {next(_calls)}")
    found: dict[tuple[str, int], dict[str, Replicates]] = {}
    owners = [0 if any(METRICS[word].needs_depth for word in row.evaluation.words) else number % dist_util.world_size()
              for number, row in enumerate(rows)]
    with dist_util.together():
        for owner, row, sample in zip(owners, rows, samples, strict=True):
            if dist_util.rank() == owner:
                for count in counts[row.name]:
                    numbers = measure(row, sample.first(count))
                    answers.set(f"{row.name} {count}", json.dumps(
                        {word: (number.estimate, number.values.tolist(), number.unknown)
                         for word, number in numbers.items()}))
                update()
    # Only now, as the store has less patience for a slow rank than `together`, and does not know of one that failed.
    with dist_util.together():
        if not dist_util.is_main():
            return {}
        for owner, row in zip(owners, rows, strict=True):
            for count in counts[row.name]:
                told = json.loads(answers.get(f"{row.name} {count}"))
                found[row.name, count] = {word: Replicates(estimate, np.array(values), unknown)
                                          for word, (estimate, values, unknown) in told.items()}
            if owner:
                update()
        return found


def section_images(table: Table, section: Section, sampled: Sequence[str]) -> int:
    """Returns the number of images that a section is evaluated with: as many as its smallest row has."""
    rows = [table.rows[name] for name in dict.fromkeys((*section.rows, section.base))]
    return smallest([row for row in rows if row.name in sampled] or rows)


def _groups(table: Table, sampled: Sequence[str]) -> dict[_Group, list[Row]]:
    """Returns the rows that are evaluated together."""
    groups: dict[_Group, list[Row]] = {}
    for name in sampled:
        row = table.rows[name]
        spec = row.evaluation
        if spec.reference:
            groups.setdefault(_Group(spec.reference, spec.backend, spec.metrics), []).append(row)
    return groups


def _counts(table: Table, sampled: Sequence[str]) -> dict[str, list[int]]:
    """Returns the numbers of images that each row is evaluated with, one for each of its sections."""
    counts: dict[str, list[int]] = {name: [] for name in sampled}
    for section in table.sections:
        count = section_images(table, section, sampled)
        for name in (*section.rows, section.base):
            if name in counts and count not in counts[name]:
                counts[name].append(count)
    return counts


def _as_in_sections(table: Table, sampled: Sequence[str], samples: Mapping[str, FileFeatures],
                    ) -> Iterator[list[FileFeatures]]:
    """Yields the images of rows that are evaluated together in each section. samples: of the rows that have any."""
    for section in table.sections:
        count = section_images(table, section, sampled)
        rows = dict.fromkeys((*section.rows, section.base))
        if images := [samples[name].first(count) for name in rows if name in samples]:
            yield images


def _of_numbers(rows: Sequence[Row], replicates: Mapping[tuple[str, int], Mapping[str, Replicates]], network: str,
                ) -> Iterator[str]:
    """Yields of which rows metrics are no number, or have no interval, a sentence for each metric."""
    for word in rows[0].evaluation.words:
        metric = METRICS[word].by(network)
        found = {row.name: [numbers.get(word) for (name, _), numbers in replicates.items() if name == row.name]
                 for row in rows}
        nan = [name for name, numbers in found.items() if None in numbers]
        wide: dict[str, dict[str, None]] = {}
        for name, numbers in found.items():
            for number in numbers:
                if number is not None and number.interval is None:
                    wide.setdefault(metric.no_interval(number), {})[name] = None
        if nan:
            yield f"{metric.label} of {', '.join(nan)}: {metric.if_nan}"
        for why, names in wide.items():
            yield f"no 95 % interval of {metric.label} of {', '.join(names)}: {why}"


def _described(reference: FileFeatures, spec: EvaluationSpec, bootstrap: int) -> dict[str, Any]:
    """Returns what the results say of the reference, with its own values of metrics where neither way is better."""
    described = reference.description()
    own = {}
    for metric in (METRICS[word] for word in spec.words):
        if not metric.direction.reading and reference.knows(metric.feature):
            number = metric.replicates(Comparison(reference, reference), bootstrap)
            bounds = metric.bounds(number)
            own[metric.word] = {"value": number.estimate, "interval95": bounds and list(bounds)}
    stored = {"statistics_images": stored_count(reference.file) or None} if described["statistics"] == "stored" else {}
    return {"file": Path(described["file"]).name, "images": described["images"], "sha256": described["sha256"],
            **stored, **({"metrics": own} if own else {})}


def _row_replicates(reference: FileFeatures, settings: ComparisonSettings, bootstrap: int, row: Row,
                    sample: FileFeatures) -> dict[str, Replicates]:
    """Returns the numbers of a row by the words of its metrics, without those that are not a number."""
    comparison, spec = Comparison(reference, sample, settings), row.evaluation
    found = {word: METRICS[word].replicates(comparison, bootstrap) for word in spec.words}
    return {word: number for word, number in found.items() if math.isfinite(number.estimate)}


def _depth_fid(row: Row, settings: EvaluationSettings, warn: Callable[[str], None]) -> dict[str, Any]:
    """Returns dFID of the depth maps that the user has estimated of a row's samples, or why there is none.

    warn: receives each warning, a sentence, which begins with the name of the row.
    """
    samples, reference = depth_maps(row), depth_reference(row, settings.references)
    absent = [str(path) for path in (reference, samples) if not path.is_file()]
    if absent:
        return {"why": f"estimate depth with one network for the reference and the samples, into {' and '.join(absent)}"
                       " (scripts/depth_fid.py says how such a file looks)"}
    with dist_util.together():
        if (count := DepthFile(str(samples)).shape[0]) != row.images:
            raise UserError(f"{samples}: holds {count} depth maps, the row has {row.images} images")
    found = depth_fid(str(reference), [str(samples)], replace(settings.extractor, backend=row.evaluation.backend),
                      DepthFidOptions(bootstrap=settings.bootstrap), lambda text: warn(f"dFID of {row.name}: {text}"))
    if not found:
        return {}
    bounds = found[0].get("intervals95", {}).get(DFID)
    return {"value": found[0]["metrics"][DFID], "interval95": bounds and list(bounds)}
