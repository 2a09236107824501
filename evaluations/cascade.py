"""A cascade: base images, larger ones made of them, and how good those are; each part goes on where it was stopped.

    OUT/base            the run of the base images, as image_sample.py leaves it
    OUT/upsampler       that of the upsampler; OUT/upsampler2 of one that goes on from there
    OUT/features        the features of the evaluation, so that a network reads each image once
    OUT/evaluation.json the results

The runs take care of kills and restarts themselves: a run that is finished is left as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from guided_diffusion import dist_util
from guided_diffusion.classes import first_names
from guided_diffusion.errors import UserError, said_otherwise
from guided_diffusion.files import check_folder
from guided_diffusion.jobs import job
from guided_diffusion.options import Options, option, seed_option
from guided_diffusion.runs.base_images import OF_BASE, taken_labels
from guided_diffusion.runs.comparison import class_names_of
from guided_diffusion.runs.labels import Labels
from guided_diffusion.runs.options import MOST_IMAGES
from guided_diffusion.runs.sample import SamplingRun
from guided_diffusion.runs.upsample import UpsamplingRun

from .evaluation import Evaluation
from .evaluation_checks import check_count, check_extractor, check_options, check_whole_reference
from .evaluation_results import summary
from .evaluator_options import EvaluatorOptions
from .extractor_options import ExtractorOptions, load_extractor_once
from .features import FeatureExtractor, feature_folder
from .image_sets import open_images
from .references import open_reference

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CascadeOptions(Options):
    """The cascade."""

    num_samples: int = option(1000, "number of images, of every part", minimum=1, maximum=MOST_IMAGES)
    seed: int = seed_option("seed of noise and labels, of every part")
    out: str = option("cascade", "folder for the folders of the parts")
    overwrite: bool = option(False, "begin anew, and replace what is in those folders")


@dataclass(frozen=True)
class EvaluationPart:
    """The evaluation of the last images against a reference, a file or a bundled one by name."""

    reference: str
    extractor: ExtractorOptions
    options: EvaluatorOptions


@dataclass(frozen=True)
class Cascade:
    """All parts of a cascade. `run()` makes them one after the other, and returns what to tell the user on rank 0.

    base, upsamplers: what the options of the cascade say (`shared`) replaces what their own say. evaluation: None for
    none. warn: receives each warning of the evaluation, a sentence.
    """

    options: CascadeOptions
    base: SamplingRun
    upsamplers: Sequence[UpsamplingRun]
    evaluation: EvaluationPart | None = None
    warn: Callable[[str], None] = lambda text: None

    def shared(self, name: str) -> dict[str, Any]:
        """Values of a part's options that the cascade has for all; name: of its folder."""
        return {"num_samples": self.options.num_samples, "seed": self.options.seed,
                "overwrite": self.options.overwrite, "out": str(Path(self.options.out) / name)}

    def runs(self) -> Iterator[tuple[str, SamplingRun]]:
        """The runs by the names of their folders, in order, each with the images of the one before as its base."""
        before = "base"
        yield before, self.base.changed(**self.shared(before))
        for number, upsampler in enumerate(self.upsamplers, 1):
            name = "upsampler" if number == 1 else f"upsampler{number}"
            folder = str(Path(self.options.out) / before)
            yield name, upsampler.changed(**self.shared(name), base_samples=folder)
            before = name

    def check(self) -> None:
        """Raises UserError where the parts cannot work, alone or together, before the first image is sampled."""
        if not self.upsamplers:
            raise UserError("a cascade needs an upsampler: add the word upsampler and its options, like upsampler "
                            "--model runs/icons64_upsampler")
        runs: list[Any] = list(self.runs())
        for (name, run), (after, upsampler) in pairwise(runs):
            if run.model.image_size != upsampler.model.small_size:
                raise UserError(f"{after} --small_size {upsampler.model.small_size}: the images of {name} have "
                                f"{run.model.image_size} pixels")
        labels: dict[str, Labels | None] = {}
        for name, run in runs:          # so that a file that does not fit shows now, and not after the part before
            with _about(name):
                run.build()
                of_base = isinstance(run, UpsamplingRun) and run.sample.labels == OF_BASE
                labels[name] = None if of_base else run.labels()
        for (name, run), (after, upsampler) in pairwise(runs):
            if upsampler.labelled and upsampler.sample.labels == OF_BASE:
                self._check_classes(after, upsampler, name, run, labels[name])
        if self.evaluation is not None:
            self._check_evaluation(self.evaluation)
        if dist_util.is_main():
            for name, run in runs:
                with _about(name):
                    run.check_kept()

    def _check_classes(self, after: str, upsampler: UpsamplingRun, name: str, run: SamplingRun,
                       labels: Labels | None) -> None:
        """Raises UserError where the images of a part have no classes, or some that the upsampler after it has not.

        labels: of the part; None where it has none, or those of its base, which are checked with it.
        """
        if not run.labelled:
            raise UserError(f"{after} --labels base: the images of {name} have no classes; pass others, like "
                            "--labels random")
        if labels is not None:
            taken_labels(labels(range(self.options.num_samples)).numpy(), upsampler.model.num_classes,
                         class_names_of({"model_path": run.sample.model_path}),
                         first_names(upsampler.checkpoints().values()), f"{after} --labels base: {name}")

    def _check_evaluation(self, part: EvaluationPart) -> None:
        """Raises UserError where the evaluation cannot work, as far as that shows before there are images."""
        reference, options = open_reference(part.reference), part.options
        with _about("evaluation"):
            check_options(options, part.extractor.kind, [reference.path])
            check_count("the cascade", self.options.num_samples, options)
            check_whole_reference(reference, options, part.extractor.kind)
            if options.held_out:
                held_out = open_images(options.held_out)
                check_count(str(held_out.path), len(held_out), options)

    def run(self) -> str:
        """Makes what is missing, on all ranks; "" on ranks but the first."""
        dist_util.connect()
        with dist_util.together():
            self.check()
            check_folder("--out", self.options.out)
        extractor = self._extractor()
        samples: Path | None = None
        for name, run in self.runs():
            if dist_util.is_main():
                _log.info("%s: %d images of %dx%d, %s", name, self.options.num_samples, *[run.model.image_size] * 2,
                          run.title())
            with _about(name):
                samples = run.run()
        lines = [] if samples is None else [f"samples: {samples}", f"picture: {samples.parent / 'grid.png'}"]
        if self.evaluation is not None:
            lines.append(self._evaluate(self.evaluation, extractor))
        return "\n".join(lines) if dist_util.is_main() else ""

    @property
    def _last(self) -> SamplingRun:
        """The run whose images are evaluated."""
        return [run for _, run in self.runs()][-1]

    def _extractor(self) -> FeatureExtractor | None:
        """What sees the last images, on all ranks; raises UserError where it does not fit them or the reference."""
        if self.evaluation is None:
            return None
        extractor = load_extractor_once(self.evaluation.extractor)
        with dist_util.together():
            part = self.evaluation
            with _about("evaluation"):
                check_extractor(open_reference(part.reference), extractor, part.extractor.kind, part.options,
                                self._last.model.image_size)
        return extractor

    def _evaluate(self, part: EvaluationPart, extractor: FeatureExtractor | None) -> str:
        """The results in words, on all ranks."""
        out = Path(self.options.out)
        options = replace(part.options, json=part.options.json or str(out / "evaluation.json"))
        cached = replace(part.extractor, cache=part.extractor.cache or str(out / "features"))
        with dist_util.together():
            evaluation = Evaluation(part.reference, [str(self._last.samples)], cached, options, self.warn, extractor)
        with job("evaluation", options.json), feature_folder(cached.cache) as folder:
            results = evaluation.run(folder)
        return f"results: {options.json}\n{summary(results)}" if results else ""


def _about(part: str) -> AbstractContextManager[None]:
    """Begins a UserError with the part that it is about."""
    return said_otherwise(lambda text: f"{part}: {text}")
