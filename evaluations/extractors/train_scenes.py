"""Training the network that measures scenes: on rendered rooms of seed 2, which no other network sees, or on pairs.

The held-out scenes (seed 1) or pairs serve only to measure: the weights of the last epoch are kept. Of the objects in
pairs nothing is known, so that from them only depth is learnt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from guided_diffusion.depth.pairs import SCENES, DepthReader, checked_depth_range, open_pairs
from guided_diffusion.depth.ranges import from_unit_range, has_ratios, parse_depth_range, to_unit_range
from guided_diffusion.depth.scenes import FAR, NEAR, Scenes
from guided_diffusion.depth.scenes.files import MOST_SCENES, render_scenes
from guided_diffusion.errors import UserError
from guided_diffusion.files import check_ending, check_writable
from guided_diffusion.late import Tensor, nn, torch
from guided_diffusion.options import Options, batch_option, option, seed_option
from guided_diffusion.pixels import from_uint8

from ..depth_errors import depth_errors
from .base import IMAGE_SIZE, bundled_file
from .training import EpochTraining, learning_rate_factor

if TYPE_CHECKING:
    from .scenes import ScenesExtractor

SEED, HELD_OUT_SEED = 2, 1


@dataclasses.dataclass(frozen=True)
class ScenesTrainingOptions(Options):
    """How the extractor of scenes is trained."""

    out: str = option(str(bundled_file("scenes")), "file for the weights; the log goes beside it, ending in .log")
    data: str = option(SCENES, "pairs of 32x32 images and depth to train on: an .npz file (arr_0, depth), a folder "
                       "with images/ and depth/, or scenes, which are rendered")
    held_out: str = option("", "pairs to measure on, like --data; unset: scenes, where --data is that")
    depth_range: str = option("", "NEAR,FAR: depths in the units of the pairs that become -1 and 1; unset: of scenes "
                              "the range of all of them")
    num_images: int = option(20000, "images to train on, mirrored at random", minimum=2, maximum=MOST_SCENES)
    num_held_out: int = option(2000, "held-out images to measure on", minimum=1, maximum=MOST_SCENES)
    epochs: int = option(10, "passes over the scenes", minimum=1)
    batch_size: int = batch_option(64, "images per step", minimum=2)
    lr: float = option(3e-3, "learning rate of AdamW at its peak, after a tenth of the steps; it falls to 0 as a "
                       "cosine", above=0)
    weight_decay: float = option(0.02, "weight decay of AdamW", minimum=0)
    edge_weight: float = option(1.0, "weight of the L1 error of the differences between neighbouring pixels", minimum=0)
    class_weight: float = option(0.1, "weight of the cross entropy of the kinds, which only scenes have", minimum=0)
    seed: int = seed_option("seed of initial weights, order and mirroring")


def train(options: ScenesTrainingOptions, command: str) -> ScenesExtractor:
    """Trains the extractor, writes weights and log, and returns it as it is in the file, in evaluation mode.

    command: the command line, which log and weights name. Raises UserError for a file that cannot be written, and for
    pairs that cannot be used.
    """
    from .bundled import channels_last
    from .scenes import ScenesExtractor, save_scenes

    out = Path(options.out)
    check_ending("--out", out, ".safetensors")
    check_writable("--out", out)
    scenes, held_out, limits = training_scenes(options)
    if options.data != SCENES:
        options = dataclasses.replace(options, class_weight=0.0)
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    extractor = channels_last(ScenesExtractor(limits=limits))
    optimizer = torch.optim.AdamW(extractor.parameters(), options.lr, weight_decay=options.weight_decay)
    steps = max(1, options.num_images // options.batch_size)
    total = steps * options.epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, warm_up=max(1, total // 10), total=total))

    def losses() -> Iterator[Tensor]:
        order = rng.permutation(options.num_images)
        for step in range(steps):
            chosen = order[step * options.batch_size:(step + 1) * options.batch_size]
            batch = training_batch(scenes, chosen, rng.random(len(chosen)) < 0.5, limits)
            yield scenes_loss(extractor, *batch, options)

    def measure() -> str:
        extractor.accuracy = scenes_accuracy(extractor, held_out, with_kinds=options.data == SCENES)
        return accuracy_in_words(extractor.accuracy)

    EpochTraining(extractor, optimizer, schedule, options.epochs, steps, losses, measure).run(
        out.with_suffix(".log"),
        f"# {command}\n# torch {torch.__version__}, {options.num_images} {_called(options.data, SEED)}, held out "
        f"{options.num_held_out} {_called(options.held_out or options.data, HELD_OUT_SEED)}\n")
    save_scenes(extractor, out, {"command": command, "torch": torch.__version__,
                                 "data": f"{options.num_images} {_called(options.data, SEED)}"})
    return extractor


def _called(data: str, seed: int) -> str:
    return f"rendered scenes of seed {seed}" if data == SCENES else f"pairs of {Path(data).name}"


def training_scenes(options: ScenesTrainingOptions) -> tuple[Scenes, Scenes, tuple[float, float]]:
    """What to train on and what to measure on, and their NEAR and FAR.

    Raises UserError for options that do not go together, and for pairs that cannot be read or are not of 32x32 pixels.
    """
    if options.data == SCENES:
        checked_depth_range(SCENES, options.depth_range)
        if options.held_out not in ("", SCENES):
            raise UserError(f"--held_out {options.held_out}: must be left out, --data is {SCENES}")
        scenes, held_out = (render_scenes(seed, range(count), IMAGE_SIZE) for seed, count in
                            ((SEED, options.num_images), (HELD_OUT_SEED, options.num_held_out)))
        return scenes, held_out, (NEAR, FAR)
    limits = parse_depth_range(checked_depth_range(options.data, options.depth_range))
    if not has_ratios(limits):
        raise UserError(f"--depth_range {options.depth_range or 'image'}: must be NEAR,FAR, both above 0, where --data "
                        "are pairs")
    if options.held_out in ("", SCENES):
        raise UserError(f"--held_out {options.held_out or 'is not given'}: must name pairs, as --data does")
    scenes, held_out = (_as_scenes(data, count, flag, limits) for data, count, flag in (
        (options.data, options.num_images, "num_images"), (options.held_out, options.num_held_out, "num_held_out")))
    return scenes, held_out, limits


def _as_scenes(data: str, count: int, flag: str, limits: tuple[float, float]) -> Scenes:
    """The first pairs of `data`, at the size of scenes, all of kind 0 and without masks."""
    source = open_pairs(data, size=IMAGE_SIZE, count=count, flag=flag)
    images = [np.asarray(source.image(index, 3)) for index in range(count)]
    wrong = next((image.shape for image in images if image.shape[:2] != (IMAGE_SIZE, IMAGE_SIZE)), None)
    if wrong:
        raise UserError(f"{data}: has images of {wrong[1]}x{wrong[0]} pixels, must be {IMAGE_SIZE}x{IMAGE_SIZE}")
    maps = DepthReader(IMAGE_SIZE, limits)
    depth = np.stack([maps.read(source, index) for index in range(count)])
    maps.report(data)
    return Scenes(np.stack(images), from_unit_range(depth, *limits), np.zeros(depth.shape, np.uint8),
                  np.zeros(count, np.int64))


def training_batch(scenes: Scenes, chosen: np.ndarray, mirrored: np.ndarray,
                   limits: tuple[float, float] = (NEAR, FAR)) -> tuple[Tensor, Tensor, Tensor]:
    """RGB (n, 3, 32, 32) and depth (n, 1, 32, 32) in [-1, 1], and kinds (n,), of some of the scenes.

    chosen: their indices, (n,). mirrored: whether each is mirrored, (n,) bool. limits: their NEAR and FAR.
    """
    rgb, depth = scenes.rgb[chosen], scenes.depth[chosen]
    rgb[mirrored], depth[mirrored] = rgb[mirrored, :, ::-1], depth[mirrored, :, ::-1]
    rgb = from_uint8(torch.from_numpy(rgb).permute(0, 3, 1, 2))
    return rgb, depth_tensor(depth, limits), torch.from_numpy(scenes.label[chosen])


def depth_tensor(depth: np.ndarray, limits: tuple[float, float]) -> Tensor:
    """Depth (N, H, W) in metres as a tensor (N, 1, H, W) in [-1, 1]; limits: NEAR and FAR."""
    return torch.from_numpy(to_unit_range(depth, *limits))[:, None]


def scenes_loss(extractor: ScenesExtractor, rgb: Tensor, depth: Tensor, label: Tensor,
                options: ScenesTrainingOptions) -> Tensor:
    """L1 of depth and, for sharp edges, of its differences between neighbours; cross entropy of the kinds."""
    estimated, logits = extractor(rgb)
    error = estimated - depth
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return (error.abs().mean() + options.edge_weight * edges
            + options.class_weight * nn.functional.cross_entropy(logits, label))


def scenes_accuracy(extractor: ScenesExtractor, scenes: Scenes, with_kinds: bool = True) -> dict[str, float]:
    """Measures depth and, with_kinds, kinds on scenes; leaves the extractor in evaluation mode.

    l1: mean |d - d*| in [-1, 1]. abs_rel: mean |d - d*| / d*, and delta: share of pixels within a factor of 1.25, both
    in metres. class: share of main objects whose kind is right.
    """
    features, depth = extractor.eval().features_and_depth(scenes.rgb)
    limits = extractor.limits
    errors = depth_errors(torch.from_numpy(depth)[:, None], depth_tensor(scenes.depth, limits), limits).mean(axis=0)
    found = dict(zip(("l1", "abs_rel", "delta"), errors, strict=True))
    if with_kinds:
        found["class"] = (features.probabilities.argmax(axis=1) == scenes.label).mean()
    return {name: round(float(value), 4) for name, value in found.items()}


def accuracy_in_words(values: dict[str, float]) -> str:
    """What `scenes_accuracy` returns, in one line."""
    return "  ".join(f"{name} {value:.4f}" for name, value in values.items())
