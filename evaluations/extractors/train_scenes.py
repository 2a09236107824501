"""Trains the judge of scenes on rendered rooms of seed 2, which no other network sees.

    OMP_NUM_THREADS=1 python -m evaluations.train_scenes_judge

makes the shipped evaluations/models/scenes_judge.safetensors (seven minutes on one CPU core, after the rendering) and,
beside it, a log with one line per epoch. The held-out scenes (seed 1) serve only to measure: the weights of the last
epoch are kept.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from guided_diffusion.cli import run_script
from guided_diffusion.depth.ranges import to_unit_range
from guided_diffusion.depth.scenes import FAR, NEAR, Scenes
from guided_diffusion.depth.scenes.files import render_scenes
from guided_diffusion.files import check_writable
from guided_diffusion.options import Options, option, parse_options
from guided_diffusion.pixels import from_uint8
from guided_diffusion.progress import progress_bar

from ..depth.accuracy import depth_errors
from .bundled import IMAGE_SIZE, round_convolutions
from .scenes import WEIGHTS, ScenesExtractor, save_scenes
from .train_fashion_mnist import learning_rate_factor

SEED, HELD_OUT_SEED = 2, 1


@dataclasses.dataclass(frozen=True)
class ScenesTrainingOptions(Options):
    """How the judge of scenes is trained."""

    out: str = option(str(WEIGHTS), "file for the weights; the log goes beside it, ending in .log")
    num_images: int = option(20000, "scenes to train on, rendered once and mirrored at random", minimum=2)
    num_held_out: int = option(2000, "held-out scenes to measure on", minimum=1)
    epochs: int = option(10, "passes over the scenes", minimum=1)
    batch_size: int = option(64, "images per step", minimum=2)
    lr: float = option(3e-3, "learning rate of AdamW at its peak, after a tenth of the steps; it falls to 0 as a "
                       "cosine", above=0)
    weight_decay: float = option(0.02, "weight decay of AdamW", minimum=0)
    edge_weight: float = option(1.0, "weight of the L1 error of the differences between neighbouring pixels", minimum=0)
    class_weight: float = option(0.1, "weight of the cross entropy of the kinds", minimum=0)
    seed: int = option(0, "seed of initial weights, order and mirroring", minimum=0)


def train(options: ScenesTrainingOptions, command: str) -> ScenesExtractor:
    """Trains, writes weights and log, and returns the judge as it is in the file, in evaluation mode."""
    out = Path(options.out)
    check_writable("--out", options.out)
    scenes, held_out = (render_scenes(seed, range(count), IMAGE_SIZE) for seed, count in
                        ((SEED, options.num_images), (HELD_OUT_SEED, options.num_held_out)))
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    judge = ScenesExtractor().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(judge.parameters(), options.lr, weight_decay=options.weight_decay)
    steps = max(1, options.num_images // options.batch_size)
    total = steps * options.epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, warm_up=max(1, total // 10), total=total))
    started = time.monotonic()
    with out.with_suffix(".log").open("w") as log:
        log.write(f"# {command}\n# torch {torch.__version__}, {options.num_images} scenes of seed {SEED}, held out "
                  f"{options.num_held_out} of seed {HELD_OUT_SEED}\n")
        for epoch in range(1, options.epochs + 1):
            judge.train()
            loss_sum = 0.0
            order = rng.permutation(options.num_images)
            for step in progress_bar(steps, f"epoch {epoch}/{options.epochs}", "batch", leave=False,
                                     iterable=range(steps)):
                chosen = order[step * options.batch_size:(step + 1) * options.batch_size]
                loss = judge_loss(judge, *batch(scenes, chosen, rng.random(len(chosen)) < 0.5), options)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                loss_sum += loss.item()
            if epoch == options.epochs:
                round_convolutions(judge)
            judge.accuracy = accuracy(judge, held_out)
            log.write(f"epoch {epoch:2d}  train loss {loss_sum / steps:.4f}  {in_words(judge.accuracy)}  "
                      f"{time.monotonic() - started:.0f} s\n")
            log.flush()
    save_scenes(judge, out, {"command": command, "torch": torch.__version__,
                            "data": f"{options.num_images} rendered scenes of seed {SEED}"})
    return judge


def batch(scenes: Scenes, chosen: np.ndarray, mirrored: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """RGB (n, 3, 32, 32) and depth (n, 1, 32, 32) in [-1, 1], kinds (n,) of scenes `chosen`, mirrored where True."""
    rgb, depth = scenes.rgb[chosen], scenes.depth[chosen]
    rgb[mirrored], depth[mirrored] = rgb[mirrored, :, ::-1], depth[mirrored, :, ::-1]
    rgb = from_uint8(torch.from_numpy(rgb).permute(0, 3, 1, 2))
    return rgb, in_unit(depth), torch.from_numpy(scenes.label[chosen])


def in_unit(depth: np.ndarray) -> Tensor:
    """(N, 1, H, W) in [-1, 1] of depth (N, H, W) in metres."""
    return torch.from_numpy(to_unit_range(depth, NEAR, FAR))[:, None]


def judge_loss(judge: ScenesExtractor, rgb: Tensor, depth: Tensor, label: Tensor, options: ScenesTrainingOptions) -> Tensor:
    """L1 of depth and, for sharp edges, of its differences between neighbours; cross entropy of the kinds."""
    estimated, logits = judge(rgb)
    error = estimated - depth
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return (error.abs().mean() + options.edge_weight * edges
            + options.class_weight * nn.functional.cross_entropy(logits, label))


def accuracy(judge: ScenesExtractor, scenes: Scenes) -> dict[str, float]:
    """l1: mean |d - d*| in [-1, 1]; abs_rel: mean |d - d*| / d*, and delta: share of pixels within a factor of 1.25, in
    metres; class: share of main objects whose kind is right. Leaves the judge in evaluation mode.
    """
    features, depth = judge.eval().features_and_depth(scenes.rgb)
    errors = depth_errors(torch.from_numpy(depth)[:, None], in_unit(scenes.depth), (NEAR, FAR)).mean(axis=0)
    right = (features.probabilities.argmax(axis=1) == scenes.label).mean()
    return {name: round(float(value), 4)
            for name, value in zip(("l1", "abs_rel", "delta", "class"), (*errors, right), strict=True)}


def in_words(values: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in values.items())


def main(argv: Sequence[str] | None = None) -> None:
    (options,) = parse_options(argv, ScenesTrainingOptions, description=__doc__)
    arguments = sys.argv[1:] if argv is None else argv
    judge = train(options, shlex.join(["python", "-m", "evaluations.train_scenes_judge", *arguments]))
    print(f"{options.out}: held out, {in_words(judge.accuracy)}")


if __name__ == "__main__":
    run_script(main)
