"""Images of a run by their places in it: batches of one size, and smaller ones where memory ends."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .. import dist_util, sampling
from ..errors import UserError
from ..execution import check_memory, is_out_of_memory
from ..late import Tensor, torch
from ..pixels import to_uint8
from ..process import Denoiser, DiffusionProcess
from ..rng import image_noise
from ..sampling import SamplerOptions
from ..terms import Guidance
from .options import SampleOptions

if TYPE_CHECKING:
    from ..unet import UNetModel

SMALLER = "pass --auto_batch True, which keeps finished chunks, or a smaller --batch_size"      # where memory ends


class BuiltRun(NamedTuple):
    """What a run samples with.

    model: the network; network: the same, called with labels also where it has none. diffusion: the process whose steps
    the sampler walks through.
    """

    model: UNetModel
    network: Callable[..., Tensor]
    diffusion: DiffusionProcess
    guidance: list[Guidance]


class ImageSampler:
    """What makes the images of a run.

    All chunks are evaluated at one batch size, filled up where they are smaller, so that not a bit of an image depends
    on how many there are.

    low_res: where the network upsamples, the images that it upsamples, (N, C, h, w) in [-1, 1] by their numbers. stage:
    how often these were upsampled before.
    """

    def __init__(self, options: SampleOptions, sampler: SamplerOptions, built: BuiltRun,
                 low_res: Callable[[Sequence[int]], Tensor] | None = None, stage: int = 0) -> None:
        self.options = options
        self.sampler = sampler
        self.model, self.network, self.diffusion, self.guidance = built
        self.low_res, self.stage = low_res, stage
        self.size = options.batch_size
        self._check_memory()

    def _check_memory(self) -> None:
        """Raises UserError where not even the noise of a batch and one map of its features fit into memory."""
        each = 4 * self.model.in_channels + self.model.dtype.itemsize * self.model.model_channels
        if not self.options.auto_batch:
            check_memory(f"--batch_size {self.size}", self.size * self.model.image_size**2 * each, dist_util.dev())

    def images(self, image_ids: Sequence[int], labels: np.ndarray | None, on_step: Callable[[float], None],
               ) -> np.ndarray:
        """Images (n, H, W, 3) uint8. on_step is called after each step with the part that is done.

        Raises UserError where memory ends and --auto_batch does not help.
        """
        while True:
            try:
                return self._images(image_ids, labels, on_step)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            self._shrink()          # out here, as the exception holds the tensors of the failed step

    def _shrink(self) -> None:
        if not self.options.auto_batch or self.size == 1:
            tried = f" (in evaluations of {self.size})" if self.size < self.options.batch_size else ""
            raise UserError(f"--batch_size {self.options.batch_size}{tried}: {dist_util.dev()} is out of memory; "
                            f"{SMALLER}")
        self.size = (self.size + 1) // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _images(self, image_ids: Sequence[int], labels: np.ndarray | None, on_step: Callable[[float], None],
                ) -> np.ndarray:
        images, size = [], self.size
        starts = range(0, len(image_ids), size)
        steps = len(starts) * self.diffusion.num_timesteps
        done = itertools.count(1)
        for start in starts:
            # The fill repeats an image, which is dropped.
            index = [min(i, len(image_ids) - 1) for i in range(start, start + size)]
            chosen = None if labels is None else torch.from_numpy(labels[index])
            piece = self._piece([image_ids[i] for i in index], chosen, lambda: on_step(next(done) / steps))
            images.append(to_uint8(piece[:len(image_ids) - start]))
        return np.concatenate(images)

    def _piece(self, image_ids: Sequence[int], labels: Tensor | None, on_step: Callable[[], None]) -> Tensor:
        """Images (N, C, H, W) in [-1, 1], on the CPU."""
        return sampling.last(self.chain(image_ids, labels), on_step)["sample"].cpu()

    def noise(self, image_ids: Sequence[int], step: int) -> Tensor:
        """The noise (N, C, H, W) of these images at a step; that of `num_timesteps` is what they begin with."""
        shape = (self.model.image_channels, self.model.image_size, self.model.image_size)
        stream, start = ("noise", "start") if self.low_res is None else ("upsampling", "upsampling start")
        if step == self.diffusion.num_timesteps and self.options.shared_start:
            step, stream = 0, start
        return image_noise(self.options.seed, image_ids, step, shape, stream, self.stage).to(dist_util.dev())

    def denoiser(self, image_ids: Sequence[int], labels: Tensor | None = None) -> Denoiser:
        """The network as samplers call it on these images; labels: (N,) int64."""
        kwargs = {} if labels is None else {"y": labels.to(dist_util.dev())}
        if self.low_res is not None:
            kwargs["low_res"] = self.low_res(image_ids).to(dist_util.dev())
        denoise = self.diffusion.denoiser(self.network, self.options.clip_denoised, model_kwargs=kwargs,
                                          dynamic_threshold=self.sampler.threshold_quantile)
        return replace(denoise, batch_contrasts=self.options.batch_contrasts)

    def chain(self, image_ids: Sequence[int], labels: Tensor | None = None) -> Iterator[dict[str, Tensor]]:
        """The steps of these images, as `sampling.sample_chain` gives them; labels: (N,) int64."""
        return sampling.sample_chain(
            self.sampler.step(), self.denoiser(image_ids, labels), self.noise(image_ids, self.diffusion.num_timesteps),
            lambda step: self.noise(image_ids, step), self.guidance, torch.tensor(image_ids))
