"""Samples of a network while it is trained: a picture of the same few images every so many steps.

Image i is made of the noise of (seed, i) and the label i modulo the classes, by a solver of few steps, with the
guidance that the command was given; so the pictures of a training differ by its weights alone. The weights are the
averages that `--model FOLDER` samples with. An upsampler is given the i-th image of the training data in small.

The training is as it would be without: nothing is drawn from its random numbers, and its weights are put back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import dist_util, pictures
from ..build import DiffusionOptions, ModelOptions
from ..classes import check_same_names
from ..errors import UserError
from ..guidance import GUIDANCE, GuidanceOptions, Networks
from ..guidance.base import naming, without_labels
from ..late import Tensor, no_grad, torch
from ..options import Options, batch_option, option, option_fields
from ..presets import implied_values
from ..sampling import SAMPLERS
from ..stated import starting_flag, starting_values
from ..training.watch import Watched
from .options import SampleOptions
from .sample import SamplingRun
from .sampler import BuiltRun, ImageSampler

_log = logging.getLogger(__name__)

MOST_EVALUATED = 10**6      # images, whose numbers are in memory
GRIDS = "grids"             # folder of the pictures, in that of the training
# Options of guidance that are those of the trained network, too, and are recorded there.
_SHARED = {field.name for field in (*option_fields(ModelOptions), *option_fields(DiffusionOptions))}


@dataclass(frozen=True)
class PreviewOptions(Options):
    """Samples while training."""

    grid_interval: int = option(0, "steps between two pictures of samples, grids/STEP.png; 0: none", minimum=0)
    grid_images: int = option(16, "images of such a picture", minimum=1, maximum=1024)
    preview_sampler: str = option("dpm-solver++", "sampler of images while training", choices=SAMPLERS)
    preview_steps: int = option(10, "steps of that sampler", minimum=1)
    preview_batch_size: int = batch_option(16, "images at a time on each rank, while training")
    eval_fid_interval: int = option(0, "steps between two evaluations of samples by FID, a column of the log; a "
                                    "multiple of --log_interval; 0: none", minimum=0)
    eval_fid_reference: str = option("", "reference batch of that evaluation: a file with statistics, or a bundled one "
                                     "by name, like fmnist32 with --eval_fid_backend fashion_mnist")
    eval_fid_backend: str = option("torch", "network of that evaluation, as --backend of the evaluator")
    eval_fid_images: int = option(500, "samples of that evaluation; FID of few images is larger than that of many",
                                  minimum=2, maximum=MOST_EVALUATED)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_fid_interval and not self.eval_fid_reference:
            raise UserError(f"--eval_fid_interval {self.eval_fid_interval}: needs --eval_fid_reference, like "
                            "fmnist32 with --eval_fid_backend fashion_mnist")

    def check_beside(self, log_interval: int) -> None:
        """Raises UserError where values of the log would fall between its rows."""
        if self.eval_fid_interval % log_interval:
            raise UserError(f"--eval_fid_interval {self.eval_fid_interval}: must be a multiple of --log_interval, "
                            f"{log_interval}")


def preview_values(given: dict[str, Any], kind: str = "diffusion") -> dict[str, Any]:
    """What files state of themselves, as defaults of a training command's options.

    These are the weights that it starts from, and those of guidance. Of a released checkpoint that states nothing, the
    name stands for its flags, as in sampling. given: by the user. kind: of the network, "diffusion" or "upsampler".
    Raises UserError where the options given contradict a file (see `starting_values`), and for an `--image_size` that
    is not an upsampler's.
    """
    stated = starting_values(given, kind) or implied_values(starting_flag(given), given, kind)
    if "large_size" in stated:
        given = {"large_size": stated["large_size"], **given}
    if "large_size" in given:
        if given.get("image_size", given["large_size"]) != given["large_size"]:
            raise UserError(f"--image_size {given['image_size']}: an upsampler makes images of --large_size, which is "
                            f"{given['large_size']}; leave it out")
        given = {**given, "image_size": given["large_size"]}
    for method in GUIDANCE:
        stated |= method.stated_values({**stated, **given}, given)
    return stated


class Preview:
    """Makes images of a network while it is trained; the same object serves several watchers.

    guidance: an instance of each class of GUIDANCE.
    """

    def __init__(self, options: PreviewOptions, guidance: Sequence[GuidanceOptions]) -> None:
        self.options, self.guidance = options, guidance
        self._watched: Watched | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The options by flag that differ from their defaults."""
        return {name: value for one in (self.options, *self.guidance) for name, value in asdict(one).items()
                if value != getattr(type(one)(), name) and name not in _SHARED}

    def prepare(self, training: Watched) -> None:
        """Builds the guidance. Raises UserError for what does not fit the network, or files that are missing."""
        if self._watched is training:
            return
        with dist_util.together():
            run = self._run(training)
            for method in run.active:
                method.check_files()
            model = training.model
            nets = Networks(model, dist_util.dev(), training.seed, num_classes=training.model_options.num_classes)
            terms = [term for method in run.active for term in method.build(nets)]
            check_same_names({flag: path for method in run.active for flag, path in method.files().items()},
                             training.class_names)
            self._labelled, self._classes = run.labelled, training.model_options.num_classes
            network = model if training.model_options.class_cond else without_labels(model)
            with naming("preview_steps", str(self.options.preview_steps)):
                built = BuiltRun(model, network, run.process(), terms)
            self._sampler = ImageSampler(run.sample, run.sampler, built, self._low_res(training))
            self._watched = training
        if dist_util.is_main():
            steps = run.sampler.headline(built.diffusion.num_timesteps)
            _log.info("samples while training: %s, %s, weights: %s", run.title(), steps, training.weights)

    def _run(self, training: Watched) -> SamplingRun:
        """The run that would sample the network once it is trained."""
        options, name = self.options, self.options.preview_sampler
        sample = SampleOptions(batch_size=options.preview_batch_size, seed=training.seed, sampler=name,
                               auto_batch=True)
        model: Any = training.model_options         # of an upsampler, what is read has the same names
        run = SamplingRun(sample, model, training.diffusion_options, tuple(kind() for kind in SAMPLERS.values()),
                          tuple(self.guidance))
        fewest = run.sampler.fewest_steps
        if options.preview_steps < fewest:
            raise UserError(f"--preview_steps {options.preview_steps}: must be at least {fewest} with "
                            f"--preview_sampler {name}")
        return run.changed(**run.sampler.in_steps(options.preview_steps), image_size=model.image_size)

    def _low_res(self, training: Watched) -> Callable[[Sequence[int]], Tensor] | None:
        small = training.low_res
        return None if small is None else lambda ids: small(training.examples([i % training.count for i in ids])[0])

    def _labels(self, ids: Sequence[int]) -> np.ndarray | None:
        """The labels of images: those of the training images that an upsampler is given, else in turn."""
        if not self._labelled:
            return None
        training = self._watched
        if training is not None and training.low_res is not None:
            examples = training.examples([i % training.count for i in ids])[1]
            if "y" in examples:
                return examples["y"].numpy()
        return np.asarray(ids) % self._classes

    @no_grad
    def images(self, count: int, of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """What `of` makes of the first `count` images (N, H, W, 3) uint8, a row each, on all ranks; each makes a share.

        Raises UserError where a sample is not finite.
        """
        ranks = dist_util.world_size()
        own = list(range(dist_util.rank(), count, ranks)) or [0]
        with dist_util.together():
            rows = of(self._sampler.images(own, self._labels(own), lambda part: None))
        fill = np.minimum(np.arange(-(-count // ranks)), len(rows) - 1)
        parts = dist_util.gathered(torch.from_numpy(np.ascontiguousarray(rows[fill])))
        result = np.empty((count, *rows.shape[1:]), rows.dtype)
        for rank, part in enumerate(parts):
            result[rank::ranks] = part.numpy()[:len(range(rank, count, ranks))]
        return result


@dataclass
class SampleGrids:
    """Draws the pictures of samples (`training.watch.Watcher`). folder: for them, which `prepare` sets."""

    preview: Preview
    folder: Path = Path(GRIDS)

    @property
    def interval(self) -> int:
        """That of --grid_interval."""
        return self.preview.options.grid_interval

    @property
    def settings(self) -> Mapping[str, Any]:
        """The options of the samples, by flag."""
        return self.preview.settings

    def prepare(self, training: Watched) -> None:
        """See `Preview.prepare`."""
        self.preview.prepare(training)
        self.folder = training.out / GRIDS

    def look(self, step: int) -> Mapping[str, float | Path]:
        """Writes the picture."""
        images = self.preview.images(self.preview.options.grid_images, lambda images: images)
        path = self.folder / f"{step:07d}.png"
        with dist_util.together():
            if dist_util.is_main():
                pictures.save_grid(images, path)
        return {"samples": path}
