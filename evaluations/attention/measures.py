"""Measures of the study of attention: spectra of patches, and the overlap of masks with objects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from guided_diffusion.capture import Received
from guided_diffusion.guidance.degrade import random_mask
from guided_diffusion.late import F, Tensor, torch

from ..metrics import bootstrap_interval, resampled_mean, resamplings

EVERY_STEP = "all"      # in place of a step: all of them together
HIGH = 0.25             # cycles / pixel: half of the band

AttentionRow = dict[str, Any]       # a row of a CSV file, by its columns


class Observation(NamedTuple):
    """What one evaluation of the network at step t shows, on the CPU."""

    t: int
    x0: Tensor                          # (N, C, H, W) in [-1, 1], as predicted
    received: dict[str, Received]       # by block

    def arrays(self, block: str) -> tuple[np.ndarray, tuple[int, int]]:
        """The received attention (N, T) of a block, and its grid."""
        return self.received[block].received.numpy(), self.received[block].grid

    def select(self, images: slice) -> Observation:
        """The observation of some of the images alone."""
        received = {block: Received(one.received[images], one.grid) for block, one in self.received.items()}
        return Observation(self.t, self.x0[images], received)


class Ratio(NamedTuple):
    """A ratio with its 95 % interval."""

    value: float
    low: float
    high: float


# Frequencies


def patch_spectra(x0: Tensor, grid: tuple[int, int]) -> Tensor:
    """Magnitudes of the 2-D Fourier transform of each token's patch of grey images, (N, T, h, w) float64.

    x0: (N, C, H, W), of which grey is the mean over C; h = H / grid[0], w = W / grid[1].
    """
    n, _, height, width = x0.shape
    rows, columns = grid
    patches = x0.double().mean(dim=1).reshape(n, rows, height // rows, columns, width // columns).transpose(2, 3)
    return torch.fft.fft2(patches.flatten(1, 2)).abs()


def radial_profile(spectrum: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies in cycles / pixel, and the mean of a spectrum (s, s) over the ring around each.

    Both are (s // 2 + 1,). The corners of the spectrum, beyond 0.5, belong to the last ring.
    """
    size = len(spectrum)
    frequency = np.fft.fftfreq(size)
    ring = np.rint(np.hypot(frequency[:, None], frequency[None]) * size).astype(int).clip(max=size // 2)
    return np.arange(size // 2 + 1) / size, np.bincount(ring.ravel(), spectrum.ravel()) / np.bincount(ring.ravel())


class PatchStatistics:
    """Sums of the spectra of masked patches and of all patches, by block and step.

    threshold: psi; a token is masked where it receives more attention. spectra: (2, s, s), summed over patches and
    images. images: (N, 2, 2) in pieces; for each image the sum over its patches of their mean magnitude above HIGH on
    either axis, and the number of these patches.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.spectra: dict[tuple[str, int], np.ndarray] = {}
        self.images: dict[tuple[str, int], list[np.ndarray]] = {}
        self.grids: dict[str, tuple[int, int]] = {}

    def add(self, observation: Observation) -> None:
        """Adds the patches of some images at one step."""
        grids = {one.grid for one in observation.received.values()}
        by_grid = {grid: patch_spectra(observation.x0, grid).numpy() for grid in grids}
        for block in observation.received:
            received, grid = observation.arrays(block)
            spectra, key = by_grid[grid], (block, observation.t)
            masks = np.stack([received > self.threshold, np.ones_like(received, bool)]).astype(float)    # (2, N, T)
            frequency = abs(np.fft.fftfreq(spectra.shape[-1]))
            high = spectra[..., np.maximum(frequency[:, None], frequency) > HIGH]
            high = high.sum(axis=2) / max(1, high.shape[2])
            self.grids[block] = grid
            self.spectra[key] = self.spectra.get(key, 0) + np.einsum("mnt,ntyx->myx", masks, spectra)
            self.images.setdefault(key, []).append(
                np.stack([(masks * high).sum(axis=2), masks.sum(axis=2)], axis=2).swapaxes(0, 1))

    def of_images(self, block: str, t: int | str = EVERY_STEP) -> np.ndarray:
        """The sums (N, 2, 2) of the attribute `images` for a block, at one step or over all steps."""
        return np.sum([np.concatenate(parts) for (name, step), parts in self.images.items()
                       if name == block and t in (step, EVERY_STEP)], axis=0)

    def share(self, block: str) -> float:
        """The share of the block's tokens that are masked, over all steps."""
        masked, every = self.of_images(block)[:, :, 1].sum(axis=0)
        return float(masked / every)

    def high_ratio(self, block: str, bootstrap: int) -> Ratio:
        """The mean magnitude above HIGH of masked patches, divided by that of all patches, over all steps.

        bootstrap: how many times images are resampled for the interval. All is NaN where patches have no spectrum, or
        none is masked.
        """
        images = self.of_images(block)

        def ratio(counts: np.ndarray) -> np.ndarray:
            sums = np.einsum("bn,nms->bms", counts.astype(float), images)
            with np.errstate(invalid="ignore", divide="ignore"):
                means = sums[..., 0] / sums[..., 1]
                return means[:, 0] / means[:, 1]

        value = float(ratio(np.ones((1, len(images))))[0])
        return Ratio(value, *bootstrap_interval(ratio(resamplings(len(images), bootstrap)), value))

    def rows(self) -> list[AttentionRow]:
        """The rows of frequency.csv, by block, step and frequency.

        Blocks whose patches are single pixels have no spectrum, and no row.
        """
        rows: list[AttentionRow] = []
        for block in self.grids:
            by_step: dict[int | str, np.ndarray] = {
                t: spectra for (name, t), spectra in self.spectra.items() if name == block}
            total = np.sum(list(by_step.values()), axis=0)
            if total.shape[-1] > 1:
                for t, spectra in {**by_step, EVERY_STEP: total}.items():
                    rows += self._step_rows(block, t, spectra)
        return rows

    def _step_rows(self, block: str, t: int | str, spectra: np.ndarray) -> list[AttentionRow]:
        """A row for each frequency; spectra: (2, s, s) of masked patches and of all."""
        patches = self.of_images(block, t)[:, :, 1].sum(axis=0)
        with np.errstate(invalid="ignore"):         # no patch is masked: NaN
            (frequencies, masked), (_, every) = map(radial_profile, spectra / patches[:, None, None])
            ratio = masked / every
        return [{"block": block, "resolution": self.grids[block][0], "t": t, "frequency": float(f), "masked": float(m),
                 "all": float(e), "ratio": float(r), "masked_patches": int(patches[0]), "patches": int(patches[1])}
                for f, m, e, r in zip(frequencies, masked, every, ratio, strict=True)]


# Objects


def iou(masks: Tensor, objects: Tensor) -> Tensor:
    """Intersection over union (...) of masks and objects (..., H, W) bool; 0 where both are empty."""
    both, either = (masks & objects).sum(dim=(-2, -1)), (masks | objects).sum(dim=(-2, -1))
    return both / either.clamp(min=1)


def overlaps(received: Received, objects: Tensor, others: Tensor, psis: Sequence[float], image_ids: Sequence[int],
             t: int) -> np.ndarray:
    """IoU of masks with objects, (N, psis, 3), for each image and threshold.

    The three are masks by attention with the image's own objects, random masks of as many tokens with the same objects,
    and masks by attention with the objects of another image. objects, others: (N, H, W) bool. image_ids and t seed the
    random masks.
    """
    attended = torch.stack([received.received > psi for psi in psis], dim=1)             # (N, psis, T)
    n, count, _ = attended.shape
    repeated_ids = torch.tensor(image_ids).repeat_interleave(count)
    random = random_mask(attended.sum(dim=2).flatten(), received.grid, repeated_ids, torch.full_like(repeated_ids, t))
    tokens = torch.stack([attended, random.unflatten(0, (n, count))], dim=2).unflatten(3, received.grid)
    masks = F.interpolate(tokens.flatten(1, 2).float(), objects.shape[1:], mode="nearest") > 0.5
    own = iou(masks, objects[:, None]).unflatten(1, (count, 2))
    other = iou(masks, others[:, None]).unflatten(1, (count, 2))[:, :, :1]
    return torch.cat([own, other], dim=2).double().numpy()


def overlap_rows(scores: dict[tuple[str, int], np.ndarray], psis: Sequence[float], bootstrap: int,
                 ) -> list[AttentionRow]:
    """The rows of semantic.csv, by block, step and threshold; low and high bound 95 % of the difference.

    scores: the `overlaps` of all images, by block and step. bootstrap: how many times images are resampled.
    """
    counts = resamplings(len(next(iter(scores.values()))), bootstrap)
    rows: list[AttentionRow] = []
    for block in dict.fromkeys(block for block, _ in scores):
        by_step: dict[int | str, np.ndarray] = {t: values for (name, t), values in scores.items() if name == block}
        for t, values in {**by_step, EVERY_STEP: np.mean(list(by_step.values()), axis=0)}.items():
            for index, psi in enumerate(psis):
                attended, random, other = values[:, index].T
                difference = attended - random
                low, high = bootstrap_interval(resampled_mean(difference)(counts), difference.mean())
                rows.append({"block": block, "t": t, "psi": psi, "iou": attended.mean(), "random": random.mean(),
                             "difference": difference.mean(), "low": low, "high": high, "other": other.mean(),
                             "images": len(values)})
    return rows
