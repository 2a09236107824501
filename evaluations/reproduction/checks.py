"""What is checked before hours of sampling: the rows themselves, their files, and that guidance fits the networks."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from guided_diffusion import dist_util
from guided_diffusion.build import DiffusionOptions, ModelOptions, build_model
from guided_diffusion.checkpoint import load_into, locate
from guided_diffusion.classes import check_same_names
from guided_diffusion.errors import UserError, said_otherwise
from guided_diffusion.fetch import sha256_of
from guided_diffusion.late import torch
from guided_diffusion.npz import BatchFile
from guided_diffusion.runs.command import say_note
from guided_diffusion.runs.effects import in_words
from guided_diffusion.runs.labels import NONE

from ..evaluation_checks import check_extractor, check_outputs, check_reference, check_stored_features
from ..evaluator_options import EvaluatorOptions
from ..extractors import find_extractor
from ..extractors.inception_graph import find_graph
from ..features import FeatureExtractor
from ..metrics import METRICS
from ..metrics.comparison import Feature
from ..plots import require_matplotlib
from ..references import find_reference
from .measurements import EvaluationSettings, loaded
from .missing import missing_files
from .results import features_of
from .tables import Row, Table, as_of_a_table

if TYPE_CHECKING:
    from guided_diffusion.unet import UNetModel


def check_rows(table: Table, flag: str = "num_samples") -> None:
    """Raises UserError for what is wrong with the rows themselves. flag: the option that says how many images."""
    for name, row in table.rows.items():
        fewest = row.evaluation.smallest_count
        if row.images < fewest:
            needing = [METRICS[word].label for word in row.evaluation.words if METRICS[word].smallest_count == fewest]
            raise UserError(f"--{flag} {row.images}: row {name} needs at least {fewest} images, for "
                            f"{' and '.join(needing)}")
        if network := row.evaluation.kind:
            with _metrics_of(row):
                check_outputs([METRICS[word] for word in row.evaluation.words], network,
                              f" of row {name} in {row.file}")
        named = [word for word in row.evaluation.words if METRICS[word].feature is Feature.CORRECTNESS]
        if named and (not row.run.labelled or row.run.sample.labels == NONE):
            raise UserError(f"metrics {row.evaluation.metrics} of row {name} in {row.file}: the row has no labels, "
                            f"which {', '.join(named)} would need, leave that out")
    features_of(table)
    used = {name: method.heads for name, row in table.rows.items() for method in row.run.active if method.heads}
    if len(set(used.values())) > 1:
        pairs = ", ".join(f"{name} {mode}" for name, mode in used.items())
        raise UserError(f"{table.name}: mixes attention heads ({pairs}), so that its rows cannot be compared: pass "
                        "--heads exact or --heads official")
    require_matplotlib("the report needs")


def check_files(table: Table, settings: EvaluationSettings, allow_missing: bool) -> dict[str, str]:
    """Returns for each row that cannot be run the reason.

    allow_missing: whether such rows are allowed. Raises UserError where they are not, and for files that do not fit.
    """
    inception = settings.extractor.inception
    lacking = {name: [str(file) for file in missing_files(row, settings.references, inception) if file.blocks]
               for name, row in table.rows.items()}
    why = {name: "; ".join(files) for name, files in lacking.items() if files}
    if why and not allow_missing:
        files = list(dict.fromkeys(file for name in why for file in lacking[name]))
        raise UserError(f"{len(why)} of {len(table.rows)} rows cannot be run, files are missing: {'; '.join(files)} "
                        "(--plan True lists all; --allow_missing True goes on with the other rows)")
    rows = [row for name, row in table.rows.items() if name not in why]
    read = set[tuple[str, str, str]]()
    for row in rows:
        spec = row.evaluation
        find_extractor(spec.backend).check()
        stored = (spec.reference, spec.metrics, spec.backend)
        _check_reference(row, settings.references, whole=stored not in read)
        read.add(stored)
    if dist_util.is_main():
        digests = Digests()
        _check_runs(rows, digests)
        for row in rows:
            _check_folder(row, digests)
        if any(row.evaluation.reference and find_extractor(row.evaluation.backend).is_inception for row in rows):
            find_graph(inception or None)
    return why


def say_without_effect(rows: Iterable[Row], settings: EvaluationSettings) -> None:
    """Says on the first rank where no row has an Inception that would read the file of --inception."""
    kinds = [row.evaluation.kind for row in rows]
    if settings.extractor.inception and not any(kind and kind.is_inception for kind in kinds):
        say_note(in_words({"inception": "no row has a backend that is an Inception"}, ["inception"]))


def check_extractors(rows: Iterable[Row], settings: EvaluationSettings,
                     extractors: dict[str, FeatureExtractor]) -> None:
    """Raises UserError where the extractors of rows do not fit their references; all ranks call it together.

    extractors: by backend, those that are loaded; others are added.
    """
    seen = set[tuple[str, str, str, int]]()
    for row in rows:
        spec, size = row.evaluation, row.run.model.image_size
        path = find_reference(spec.reference, settings.references)
        if path is None or (spec.reference, spec.backend, spec.metrics, size) in seen:
            continue
        seen.add((spec.reference, spec.backend, spec.metrics, size))
        extractor = loaded(spec.backend, settings, extractors)
        with dist_util.together(), _metrics_of(row):
            check_extractor(BatchFile(path), extractor, find_extractor(spec.backend),
                            EvaluatorOptions(metrics=spec.metrics), size)


class Digests(dict[str, str]):
    """The SHA-256 of files by path, each computed once."""

    def __missing__(self, path: str) -> str:
        self[path] = sha256_of(locate(path))
        return self[path]

    def of(self, paths: Mapping[str, str]) -> dict[str, str]:
        """Returns the digests of paths by flag."""
        return {flag: self[path] for flag, path in paths.items()}


def _check_reference(row: Row, references: Path, whole: bool) -> None:
    """Raises UserError where the row's reference does not fit its images or its metrics.

    whole: whether the features that it holds are looked at, too, which reads them all.
    """
    spec = row.evaluation
    path = find_reference(spec.reference, references)
    if path is None:
        return
    file, size = BatchFile(path), row.run.model.image_size
    if len(file) and file.shape[1:3] != (size, size):
        raise UserError(f"{file.path}: its images are {file.resolution}, those of row {row.name} {size}x{size}")
    options = EvaluatorOptions(metrics=spec.metrics)
    with _metrics_of(row):
        check_reference(file, options, find_extractor(spec.backend))
        if whole:
            check_stored_features(file, options)
    if 0 < len(file) < spec.smallest_count:
        raise UserError(f"{file.path}: has {len(file)} images, at least {spec.smallest_count} are needed")


def _metrics_of(row: Row) -> AbstractContextManager[None]:
    """Lets a UserError of an evaluation advise what is said of the metrics in the row's file, not of --metrics."""
    return said_otherwise(lambda text: text.replace("--metrics", f"metrics of row {row.name} in {row.file}"))


def _check_folder(row: Row, digests: Digests) -> None:
    """Raises UserError where the row's folder holds the images of another configuration."""
    if (row.run.out / "run.json").exists() or (row.run.out / "shards").exists():
        with as_of_a_table():
            row.run.check_folder(digests.of(row.run.files()))


def _check_runs(rows: Sequence[Row], digests: Digests) -> None:
    """Raises UserError for what a row would only meet when it is reached.

    That is what is wrong with its labels and its steps, guidance that does not fit its network, and weights that are
    damaged or of another network.
    """
    @functools.cache
    def network(options: ModelOptions) -> UNetModel:
        with torch.device("meta"):
            return build_model(options)

    @functools.cache
    def read(model: ModelOptions, diffusion: DiffusionOptions, path: str, entry: str) -> None:
        with torch.device("meta"):
            unfilled = build_model(model)           # its weights are forgotten at once
        load_into(unfilled, path, asdict(model) | asdict(diffusion), entry)

    fitting = set()             # rows share most networks and methods
    for row in rows:
        run, files = row.run, row.run.checkpoints()
        with _naming(row):
            run.labels()
            run.process()
            for method in run.active:
                one = run.model, run.sample.model_path, run.sample.checkpoint_entry, method
                if one not in fitting:
                    method.build(run.networks(network(run.model)))
                    if method.files():
                        method.check(digests.of(files), run.sample.checkpoint_entry)
                    fitting.add(one)
            check_same_names(files)
            read(run.model, run.diffusion, run.sample.model_path, run.sample.checkpoint_entry)


def _naming(row: Row) -> AbstractContextManager[None]:
    """Begins a UserError that is raised in the block with the row that it is about."""
    return said_otherwise(lambda text: f"row {row.name} in {row.file}: {text}")
