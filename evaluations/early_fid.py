"""Early evaluation: FID of a few samples of a network while it is trained, against a reference batch.

The value is that of so few images, and larger than that of many: its column of the log says of how many.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from guided_diffusion import dist_util
from guided_diffusion.errors import UserError
from guided_diffusion.guidance import GuidanceOptions
from guided_diffusion.guidance.base import naming
from guided_diffusion.runs.previews import Preview, PreviewOptions, SampleGrids
from guided_diffusion.training.options import TrainOptions
from guided_diffusion.training.watch import Watched, Watcher

if TYPE_CHECKING:
    from .features import FeatureExtractor
    from .metrics.comparison import FeatureSet

_log = logging.getLogger(__name__)

METRIC = "fid"
COLUMN = re.compile(rf"{METRIC}_of_\d+_images")         # of the log
FLAG = "--eval_fid_interval"


def watchers(training: TrainOptions, options: PreviewOptions, guidance: Sequence[GuidanceOptions]) -> list[Watcher]:
    """What the options ask for, for `train_diffusion`: pictures of samples, and early evaluation.

    guidance: an instance of each class of GUIDANCE. Raises UserError where the options do not fit together, or packages
    are missing.
    """
    options.check_beside(training.log_interval)
    if options.eval_fid_interval and importlib.util.find_spec("scipy") is None:
        raise UserError(f"{FLAG} {options.eval_fid_interval}: needs scipy: pip install "
                        "'guided-pixels[eval]'")
    preview = Preview(options, guidance)
    grids: list[Watcher] = [SampleGrids(preview)] if options.grid_interval else []
    return [*grids, *([EarlyFid(preview)] if options.eval_fid_interval else [])]


@dataclass
class EarlyFid:
    """Measures FID of samples every so many steps (`guided_diffusion.training.watch.Watcher`).

    The reference must hold statistics, of the extractor that --eval_fid_backend names.
    """

    preview: Preview
    extractor: FeatureExtractor | None = None
    reference: FeatureSet | None = None
    batch_size: int = 1         # images that the extractor sees at a time

    @property
    def interval(self) -> int:
        """That of --eval_fid_interval."""
        return self.preview.options.eval_fid_interval

    @property
    def settings(self) -> Mapping[str, Any]:
        """The options of the samples, by flag."""
        return self.preview.settings

    def prepare(self, training: Watched) -> None:
        """Loads reference and extractor, which sees a sample. Raises UserError for what does not fit together."""
        # Here, as a training without evaluation needs none of their packages.
        from .evaluation_checks import check_outputs, check_reference
        from .evaluator_options import EvaluatorOptions
        from .extractor_options import ExtractorOptions, load_extractor_once
        from .metrics import METRICS, FileFeatures
        from .references import open_reference
        from .stored_statistics import check_extractor_of, stored_count

        self.preview.prepare(training)
        options = self.preview.options
        with dist_util.together():
            with naming("eval_fid_reference", options.eval_fid_reference):
                reference = open_reference(options.eval_fid_reference)
                if reference.statistics() is None:
                    raise UserError("has no statistics; scripts/make_reference.py makes a file that has")
            with naming("eval_fid_backend", options.eval_fid_backend):
                extractor_options = ExtractorOptions(backend=options.eval_fid_backend)
                check_outputs([METRICS[METRIC]], extractor_options.kind)
                check_reference(reference, EvaluatorOptions(metrics=METRIC), extractor_options.kind)
        self.extractor, self.batch_size = load_extractor_once(extractor_options), extractor_options.batch_size
        with dist_util.together(), naming("eval_fid_backend", options.eval_fid_backend):
            check_extractor_of(reference, self.extractor)
            self._pooled(np.zeros((1, *[training.model.image_size] * 2, 3), np.uint8))
        self.reference = FileFeatures(reference, len(reference) or stored_count(reference))

    def look(self, step: int) -> Mapping[str, float | Path]:
        """FID of the samples, as fid_of_N_images, which a line of the log says, too."""
        from .metrics import METRICS, Comparison
        from .metrics.comparison import Feature, FeatureSet

        options = self.preview.options
        pooled = self.preview.images(options.eval_fid_images, self._pooled)
        values: dict[str, float | Path] = {}
        with dist_util.together():
            if dist_util.is_main() and self.reference is not None:
                value = METRICS[METRIC].value(Comparison(self.reference, FeatureSet({Feature.POOLED: pooled})))
                values[f"{METRIC}_of_{len(pooled)}_images"] = value
                _log.info("step %d: FID of %d images against %s: %.4g", step, len(pooled), options.eval_fid_reference,
                          value)
        return values

    def _pooled(self, images: np.ndarray) -> np.ndarray:
        """Features (N, D) of images (N, H, W, 3)."""
        assert self.extractor is not None           # `prepare` loads it
        return np.concatenate([self.extractor.features(images[first:first + self.batch_size]).pooled
                               for first in range(0, len(images), self.batch_size)])
