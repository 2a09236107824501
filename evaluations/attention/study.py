"""What self-attention attends to while a network denoises: the analysis of SAG (arXiv 2210.00939, section 3).

A token is masked where the attention that it receives is above the threshold psi. This attention is averaged over the
heads, and its mean over the tokens is 1.

    frequency   Images are sampled, and x0 as predicted at some steps is cut into the patches of a block's tokens. The
                mean magnitude of the 2-D Fourier transform of masked patches is compared with that of all patches.
    semantics   Real images with object masks are noised to some steps. The intersection over union (IoU) of mask and
                objects is compared with that of random masks with as many tokens, over psi, and with the IoU of the
                mask and the objects of the image before, which tells how much is a matter of place alone.

Steps t are indices into the (respaced) chain. The output folder holds overlay_NUMBER.png for the chosen images,
frequency.csv and .png, semantic.csv and .png, each figure as .svg too, and summary.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from guided_diffusion import dist_util
from guided_diffusion.build import DiffusionOptions, ModelOptions
from guided_diffusion.capture import HEADS, Received, capture_attention, find_blocks
from guided_diffusion.classes import first_names
from guided_diffusion.depth.scenes import render
from guided_diffusion.dtypes import dtype_option
from guided_diffusion.errors import UserError
from guided_diffusion.files import stamp, write_csv, write_text
from guided_diffusion.guidance import GUIDANCE, GuidanceOptions
from guided_diffusion.guidance.base import naming
from guided_diffusion.image_datasets import named_labels
from guided_diffusion.jobs import job, job_folder
from guided_diffusion.late import Tensor, no_grad, torch
from guided_diffusion.npz import check_brightness, read_arrays
from guided_diffusion.options import MOST, Options, batch_option, comma_separated, entry_option, option, seed_option
from guided_diffusion.pictures import grid as image_grid
from guided_diffusion.pixels import from_uint8, to_uint8
from guided_diffusion.process import Denoiser
from guided_diffusion.progress import progress_bar
from guided_diffusion.runs.options import SampleOptions
from guided_diffusion.runs.sample import SamplingRun
from guided_diffusion.runs.sampler import ImageSampler
from guided_diffusion.sampling import SAMPLERS

from ..metrics.bootstrap import MOST_RESAMPLINGS
from ..plots import require_matplotlib
from .measures import (
    EVERY_STEP,
    HIGH,
    AttentionRow,
    Observation,
    PatchStatistics,
    Ratio,
    overlap_rows,
    overlaps,
)
from .pictures import draw_frequencies, draw_overlaps, draw_overlays, enlarged, overlay

SCENES = "scenes"
BUNDLED_SCENES = "scenes32"     # the bundled model whose real images are rendered, with their masks
FILES = re.compile(r"overlay_\d+\.(png|svg)|(frequency|semantic)\.(png|svg|csv)|summary\.md")        # of a study
NUM_STEPS, MOST_IMAGES = 6, 10**5          # all numbers of the images are in memory


@dataclass(frozen=True)
class AttentionOptions(Options):
    """The study of attention."""

    model: str = option("", "a model by name: a bundled one (scenes32), or the flags of a released checkpoint")
    model_path: str = option("", "checkpoint of the diffusion network, .pt or .safetensors")
    checkpoint_entry: str = entry_option()
    images: str = option("0,1,2,3", "numbers of the sampled images that are drawn, comma-separated")
    steps: str = option("", f"respaced steps to look at, like 24,12,0; unset: {NUM_STEPS}, evenly spaced")
    blocks: str = option("", "attention blocks to look at, like middle,output.2; unset: all")
    num_images: int = option(200, "images that the numbers are of: sampled ones, and real ones with objects", minimum=2,
                             maximum=MOST_IMAGES)
    batch_size: int = batch_option(16, "images at a time")
    labels: str = option("random", "classes of conditional samples: random, balanced (number modulo classes), one "
                                   "class, or a .npy file of one for each image")
    seed: int = seed_option("seed of noise and labels")
    use_ddim: bool = option(False, "sample by DDIM instead of DDPM")
    dtype: str = dtype_option()
    threshold: float = option(1.0, "psi of overlays and frequencies: a token is masked if it receives more than this, "
                              "where 1 is average", minimum=0)
    thresholds: str = option("0.5,0.75,1,1.25,1.5,1.75,2", "values of psi to compare masks with objects at")
    attention_heads: str = option("exact", "exact, or official: split heads as the official SAG code does",
                                  choices=HEADS)
    objects: str = option("", f"real images with objects: an .npz (arr_0 images, mask: not 0 on objects, arr_1 labels "
                          f"if there are), or {SCENES}, rendered ones; unset: {SCENES} for --model {BUNDLED_SCENES}, "
                          "for others none")
    object_seed: int = seed_option(f"seed of the {SCENES}; the bundled model was trained on those of 0", default=1)
    object_steps: str = option("", "respaced steps that real images are noised to; unset: those of --steps")
    bootstrap: int = option(1000, "resamplings for 95 % intervals", minimum=2, maximum=MOST_RESAMPLINGS)
    out: str = option("runs/attention", "folder for figures, tables and summary")

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.image_ids, self.psis        # which raise for what is not allowed

    @property
    def image_ids(self) -> list[int]:
        """The images that are drawn."""
        return _parsed_list("images", self.images, int, "image numbers from 0 up, like 0,1,2", lambda n: 0 <= n < MOST)

    @property
    def psis(self) -> list[float]:
        """Rising thresholds, --threshold among them."""
        psis = _parsed_list("thresholds", self.thresholds, float, "numbers from 0 up, like 0.5,1,2",
                            lambda psi: psi >= 0 and math.isfinite(psi))
        return sorted({*psis, self.threshold})

    def chosen_steps(self, flag: str, num_timesteps: int) -> list[int]:
        """The steps of an option of this class, from noise to image."""
        text = getattr(self, flag)
        if not text:
            return evenly_spaced(num_timesteps)
        steps = _parsed_list(flag, text, int, f"steps from 0 to {num_timesteps - 1} of this chain, comma-separated",
                             lambda t: 0 <= t < num_timesteps)
        return sorted(steps, reverse=True)

    def run(self, model: ModelOptions, diffusion: DiffusionOptions) -> SamplingRun:
        """The unguided sampling run that is observed."""
        sample = SampleOptions(
            model=self.model, model_path=self.model_path, checkpoint_entry=self.checkpoint_entry,
            num_samples=max(self.num_images, max(self.image_ids) + 1), batch_size=self.batch_size,
            labels=self.labels, seed=self.seed, use_ddim=self.use_ddim, dtype=self.dtype, out=self.out)
        return SamplingRun.of([sample, model, diffusion, *(kind() for kind in (*SAMPLERS.values(), *GUIDANCE))])


def _parsed_list(flag: str, text: str, kind: type, expected: str, allowed: Callable[[Any], bool]) -> list[Any]:
    """The different values of a comma-separated list; raises UserError where one is not allowed, or there is none."""
    try:
        values = list(dict.fromkeys(kind(part) for part in text.split(",")))
    except ValueError:
        values = []
    if not values or not all(map(allowed, values)):
        raise UserError(f"--{flag} {text}: must be {expected}")
    return values


def evenly_spaced(num_timesteps: int, count: int = NUM_STEPS) -> list[int]:
    """At most `count` steps from the first, the noisiest, to 0."""
    return list(dict.fromkeys(np.linspace(num_timesteps - 1, 0, count).round().astype(int).tolist()))


def study_attention(options: AttentionOptions, model: ModelOptions, diffusion: DiffusionOptions) -> str:
    """Runs the whole study and returns its summary.

    Raises UserError for whatever is wrong with the options, before the first image is sampled.
    """
    return AttentionStudy(options, options.run(model, diffusion).decided()).run()


# What a network attends to


class ObservedNetwork:
    """The network of a sampling run, with which one observes what its attention blocks receive.

    heads: as in `capture_attention`.
    """

    def __init__(self, run: SamplingRun, heads: str) -> None:
        if run.model.in_channels not in (1, 3):
            raise UserError(f"{run.title()}: the network has {run.model.in_channels} channels, and pictures are drawn "
                            "of 1 or 3")
        self.run, self.heads = run, heads
        built = run.build()
        self.model, self.diffusion, self.guidance = built.model, built.diffusion, built.guidance
        self.sampler = ImageSampler(run.sample, run.sampler, built)
        self.labels = run.labels()

    @no_grad
    def observe(self, denoise: Denoiser, x_t: Tensor, t: int, blocks: Sequence[str]) -> Observation:
        """Evaluates the network once, at x_t (N, C, H, W) of step t, and observes these blocks."""
        with capture_attention(self.model, blocks, heads=self.heads) as captured:
            x0 = denoise(x_t, torch.full((len(x_t),), t, device=x_t.device)).pred_xstart
        received = {name: Received(one.received.cpu(), one.grid) for name, one in captured.items()}
        return Observation(t, x0.cpu(), received)

    def observe_chain(self, image_ids: Sequence[int], steps: Sequence[int], blocks: Sequence[str],
                      ) -> Iterator[Observation]:
        """Observes the chosen steps of the chain of these images, from noise to image.

        Each is evaluated once more than the chain does it, as guidance evaluates the network on degraded images too,
        and attention that nobody reads need not be captured.
        """
        labels = None if self.labels is None else self.labels(image_ids)
        denoise = self.sampler.denoiser(image_ids, labels)
        x_t = self.sampler.noise(image_ids, self.diffusion.num_timesteps)
        chain = self.sampler.chain(image_ids, labels)
        for t in reversed(range(min(steps), self.diffusion.num_timesteps)):
            if t in steps:
                yield self.observe(denoise, x_t, t, blocks)
            x_t = next(chain)["sample"]


def attention_method(run: SamplingRun) -> GuidanceOptions | None:
    """The first guidance method of a run that is on and reads the attention of a block."""
    return next((method for method in run.active if method.attention_block), None)


def overlay_strip(run: SamplingRun, image_ids: Sequence[int], steps: int = NUM_STEPS) -> np.ndarray:
    """Draws a row for each image, from noise to image: x0, then the attention on it. Returns (h, w, 3) uint8.

    The attention is that of the block that the run's `attention_method` reads, with its mask. steps: how many. Raises
    UserError where no method of the run reads attention, or there is no such block.
    """
    method = attention_method(run)
    if method is None or method.attention_block is None:
        raise UserError(f"{run.title()}: no guidance method of this run reads the attention of a block")
    network = ObservedNetwork(run.changed(batch_size=len(image_ids)), method.heads or "exact")
    block = method.attention_block
    chosen = evenly_spaced(network.diffusion.num_timesteps, steps)
    pairs: list[np.ndarray] = []
    for observation in network.observe_chain(image_ids, chosen, [block]):
        x0, (received, grid) = to_uint8(observation.x0), observation.arrays(block)
        pairs += [enlarged(x0), overlay(x0, received, grid, method.attention_threshold)]
    return image_grid(np.stack(pairs, axis=1).reshape(-1, *pairs[0].shape[1:]), len(pairs))


# Objects


class ObjectImages(NamedTuple):
    """Real images with masks of their objects."""

    images: np.ndarray                  # (N, H, W, 3) uint8
    mask: np.ndarray                    # (N, H, W) bool, True on objects
    labels: np.ndarray | None           # (N,) int64
    source: str                         # where they are from, for messages


def read_objects(options: AttentionOptions, model: ModelOptions) -> ObjectImages | None:
    """Reads the first --num_images of --objects; None where there are none.

    Raises UserError for a file that does not fit the options or the model.
    """
    source = options.objects or (SCENES if options.model == BUNDLED_SCENES else "")
    if not source:
        return None
    count, size = options.num_images, model.image_size
    if source == SCENES:
        scenes = render(options.object_seed, range(count), size)
        return ObjectImages(scenes.rgb, scenes.mask > 0, None, f"{SCENES} of seed {options.object_seed}")
    flag = f"--objects {source}"
    images, mask, labels = read_arrays(source, ("arr_0", "mask", "arr_1"), f"{flag}: cannot be read")
    images, mask = _checked_images(flag, images, mask, size)
    if count > len(images):
        raise UserError(f"--num_images {count}: {source} holds {len(images)} images")
    if model.class_cond and labels is not None:
        _check_labels(flag, labels, len(images), model.num_classes)
        known = first_names([options.model_path])
        labels = named_labels(source, labels.astype(np.int64), known, flag)[0][:count]
    else:
        labels = None
    return ObjectImages(images[:count], mask[:count] != 0, labels, Path(source).name)


def _checked_images(flag: str, images: np.ndarray | None, mask: np.ndarray | None, size: int,
                    ) -> tuple[np.ndarray, np.ndarray]:
    """Images and masks as they are; raises UserError where one is missing or cannot be used."""
    if images is None or mask is None:
        raise UserError(f"{flag}: has no {'arr_0 (images)' if images is None else 'mask (objects)'}")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise UserError(f"{flag}: arr_0 is {images.shape} {images.dtype}, must be (N, H, W, 3) uint8")
    if images.shape[1:3] != (size, size):
        raise UserError(f"{flag}: holds images of {images.shape[1]}x{images.shape[2]}, those of the model are "
                        f"{size}x{size}")
    check_brightness(flag, images)
    if mask.shape != images.shape[:3] or mask.dtype.kind not in "biu":
        raise UserError(f"{flag}: mask is {mask.shape} {mask.dtype}, must be {images.shape[:3]} whole numbers")
    if not mask.any():
        raise UserError(f"{flag}: mask is 0 everywhere, so that no image has an object")
    return images, mask


def _check_labels(flag: str, labels: np.ndarray, count: int, num_classes: int) -> None:
    """Raises UserError where labels are not `count` classes."""
    if (labels.shape != (count,) or labels.dtype.kind not in "iu" or labels.min() < 0
            or labels.max() >= num_classes):
        raise UserError(f"{flag}: arr_1 must be {count} classes from 0 to {num_classes - 1}")


# The study


class DrawnImage(NamedTuple):
    """What is drawn of a sampled image."""

    x0: np.ndarray                                                  # (steps, H, W, 3) uint8
    received: dict[str, tuple[np.ndarray, tuple[int, int]]]         # by block, (steps, T) and its grid


class AttentionStudy:
    """The whole study of a run, into the folder --out. Raises UserError as it is made, for whatever is wrong."""

    def __init__(self, options: AttentionOptions, run: SamplingRun) -> None:
        require_matplotlib("the figures need")
        self.options, self.out = options, job_folder("attention study", options.out)
        self.objects = read_objects(options, run.model)
        self.network = ObservedNetwork(run, options.attention_heads)
        length = self.network.diffusion.num_timesteps
        self.steps = options.chosen_steps("steps", length)
        self.object_steps = options.chosen_steps("object_steps", length) if options.object_steps else self.steps
        names = comma_separated(options.blocks)
        blocks = self.network.model.attention_blocks
        with naming("blocks", options.blocks):
            self.blocks = list(find_blocks(blocks, names or blocks, "attention block"))

    def run(self) -> str:
        """Writes all files and returns the summary.

        Those of an earlier study in the folder stay until all is measured, and then go.
        """
        with job("attention study", self.out):
            return self._run()

    def _run(self) -> str:
        patches, drawn = self._sample()
        overlap = [] if self.objects is None else self._compare_with_objects(self.objects)
        text = self._summary(patches, overlap)
        earlier = {path: stamp(path) for path in self.out.iterdir() if FILES.fullmatch(path.name)}
        self._write(patches.rows(), overlap, drawn)
        write_text(self.out / "summary.md", text)
        for path, before in earlier.items():        # of another study, which had other images, or objects
            if stamp(path) == before:
                path.unlink(missing_ok=True)
        return text

    def _write(self, frequencies: Sequence[AttentionRow], overlap: Sequence[AttentionRow],
               drawn: dict[int, DrawnImage]) -> None:
        """Writes the tables and the figures."""
        for image_id, image in drawn.items():
            draw_overlays(self.out, image_id, self.steps, *image, self.options.threshold)
        if frequencies:
            write_csv(self.out / "frequency.csv", frequencies)
            last = {row["resolution"]: row["block"] for row in frequencies}
            draw_frequencies(self.out, [row for row in frequencies if row["block"] in last.values()])
        if overlap:
            write_csv(self.out / "semantic.csv", overlap)
            draw_overlaps(self.out, overlap)

    def _sample(self) -> tuple[PatchStatistics, dict[int, DrawnImage]]:
        """Samples; returns the sums over the first --num_images, and what is drawn of the chosen images, by number."""
        options = self.options
        patches = PatchStatistics(options.threshold)
        drawn: dict[int, DrawnImage] = {}
        image_ids = sorted({*range(options.num_images), *options.image_ids})
        with progress_bar(len(image_ids) * len(self.steps), "sampled images", "image") as progress:
            for piece in _pieces(image_ids, options.batch_size):
                chosen: dict[int, list[Observation]] = {one: [] for one in piece if one in options.image_ids}
                counted = sum(image_id < options.num_images for image_id in piece)
                for observation in self.network.observe_chain(piece, self.steps, self.blocks):
                    if counted:
                        patches.add(observation.select(slice(counted)))
                    for image_id, of_image in chosen.items():
                        index = piece.index(image_id)
                        of_image.append(observation.select(slice(index, index + 1)))
                    progress.update(len(piece))
                drawn |= {image_id: self._drawn(of_image) for image_id, of_image in chosen.items()}
        return patches, drawn

    def _drawn(self, observations: Sequence[Observation]) -> DrawnImage:
        received = {block: (np.concatenate([one.received[block].received.numpy() for one in observations]),
                            observations[0].received[block].grid) for block in self.blocks}
        return DrawnImage(to_uint8(torch.cat([one.x0 for one in observations])), received)

    def _compare_with_objects(self, objects: ObjectImages) -> list[AttentionRow]:
        """Compares masks with objects; returns the rows of semantic.csv."""
        others = np.roll(objects.mask, 1, axis=0)
        scores: dict[tuple[str, int], list[np.ndarray]] = {}
        count = len(objects.images)
        with progress_bar(count * len(self.object_steps), "real images", "image") as progress:
            for piece in _pieces(range(count), self.options.batch_size):
                for observation in self._observe_real(objects, piece):
                    for block in self.blocks:
                        scores.setdefault((block, observation.t), []).append(overlaps(
                            observation.received[block], torch.from_numpy(objects.mask[piece]),
                            torch.from_numpy(others[piece]), self.options.psis, piece, observation.t))
                    progress.update(len(piece))
        joined = {key: np.concatenate(parts) for key, parts in scores.items()}
        return overlap_rows({(block, t): joined[block, t] for block in self.blocks for t in self.object_steps},
                            self.options.psis, self.options.bootstrap)

    def _observe_real(self, objects: ObjectImages, piece: list[int]) -> Iterator[Observation]:
        """Observes some of the real images, noised to each of --object_steps."""
        x0 = from_uint8(torch.from_numpy(objects.images[piece]).permute(0, 3, 1, 2))
        x0 = x0.mean(dim=1, keepdim=True) if self.network.run.model.in_channels == 1 else x0
        labels = None if objects.labels is None else torch.from_numpy(objects.labels[piece])
        if labels is None and self.network.labels is not None:
            labels = self.network.labels(piece)
        denoise = self.network.sampler.denoiser(piece, labels)
        for t in self.object_steps:
            steps = torch.full((len(piece),), t, device=dist_util.dev())
            x_t = self.network.diffusion.q_sample(x0.to(steps.device), steps, self.network.sampler.noise(piece, t))
            yield self.network.observe(denoise, x_t, t, self.blocks)

    def _summary(self, patches: PatchStatistics, overlap: Sequence[AttentionRow]) -> str:
        options = self.options
        ratios = {block: patches.high_ratio(block, options.bootstrap) for block in self.blocks}
        at_psi = {row["block"]: row for row in overlap if row["t"] == EVERY_STEP and row["psi"] == options.threshold}
        lines = ["| block | grid | tokens masked | IoU with objects | of random masks | difference | with objects of "
                 f"another image | above {HIGH:g} cycles / pixel, masked / all |", "|---|---|---|---|---|---|---|---|"]
        for block, (height, width) in patches.grids.items():
            ratio = ratios[block]
            cells = [block, f"{height}x{width}", f"{100 * patches.share(block):.0f} %",
                     *_overlap_cells(at_psi.get(block)),
                     "-" if math.isnan(ratio.value) else f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"]
            lines.append(f"| {' | '.join(cells)} |")
        model = options.model or Path(options.model_path).name
        return "\n".join([
            f"{model}, seed {options.seed}: {options.num_images} images sampled by "
            f"{self.network.run.sampler.title} in {self.network.diffusion.num_timesteps} steps, seen at t = "
            f"{_listed(self.steps)}. A token is masked where it receives more than {options.threshold:g} times the "
            "average attention. In brackets 95 % intervals.", "", *lines, "",
            *_frequency_verdict(ratios), *self._object_verdict(at_psi), ""])

    def _object_verdict(self, at_psi: dict[str, AttentionRow]) -> list[str]:
        if self.objects is None:
            return ["Semantic analysis: skipped, as --objects names no images with object masks."]
        best = max(at_psi.values(), key=lambda row: row["difference"])
        better, worse = (sum(sign * row[bound] > 0 for row in at_psi.values())
                         for sign, bound in ((1, "low"), (-1, "high")))
        unknown = self.objects.labels is None and self.network.labels is not None
        return [f"Masks pick objects better than random ones in {better} of {len(at_psi)} blocks, worse in {worse}; "
                f"best: {best['block']} ({best['difference']:+.3f}). On {len(self.objects.images)} images of "
                f"{self.objects.source}, noised to t = {_listed(self.object_steps)}."
                + f" Their classes are not known (arr_1): the network was told those of --labels {self.options.labels}."
                * unknown]


def _overlap_cells(row: AttentionRow | None) -> list[str]:
    """The cells of the summary that compare masks with objects; None: there are no objects."""
    if row is None:
        return ["-"] * 4
    return [f"{row['iou']:.3f}", f"{row['random']:.3f}",
            f"{row['difference']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})", f"{row['other']:.3f}"]


def _frequency_verdict(ratios: dict[str, Ratio]) -> list[str]:
    known = [ratio for ratio in ratios.values() if not math.isnan(ratio.value)]
    missing = [block for block, ratio in ratios.items() if math.isnan(ratio.value)]
    lines = [f"Masked patches hold more of the high frequencies than all patches in {sum(r.low > 1 for r in known)} of "
             f"{len(known)} blocks, less in {sum(r.high < 1 for r in known)}."] if known else []
    if missing:
        lines.append(f"No spectrum: {', '.join(missing)} (patches of one pixel, or none masked).")
    return lines


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps))


def _pieces(image_ids: Sequence[int], size: int) -> list[list[int]]:
    return [list(image_ids[start:start + size]) for start in range(0, len(image_ids), size)]
