"""Training the evaluation classifier of icons: multinomial regression on the features of photographs.

The validation split chooses the strength of weight decay. The test split serves only to measure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from guided_diffusion.errors import UserError
from guided_diffusion.files import check_writable
from guided_diffusion.late import nn, torch
from guided_diffusion.options import Options, option

from ..features import FeatureExtractor, extract, feature_folder
from ..image_sets import open_images
from .base import bundled_file

if TYPE_CHECKING:
    from .icons import Layer

SPLITS = ("train", "validation", "test")
STEPS = 60              # of L-BFGS


@dataclasses.dataclass(frozen=True)
class IconsTrainingOptions(Options):
    """How the classifier is trained."""

    data_dir: str = option("data/icons32", "folder with train.npz, validation.npz and test.npz of "
                           "`scripts/icons_render.py --format npz`")
    out: str = option(str(bundled_file("icons")), "file for the weights")
    weight_decay: str = option("0.01,0.03,0.1,0.3,1", "strengths of weight decay, comma-separated, among which the "
                               "validation split chooses")
    cache: str = option("", "folder that keeps features; unset: not kept")


class Split(NamedTuple):
    """Features (N, D) float32 and labels (N,) int64 of a split."""

    features: np.ndarray
    labels: np.ndarray


def train(options: IconsTrainingOptions, command: str, extractor: FeatureExtractor) -> Layer:
    """Trains the classifier on `extractor`'s features, writes it, and returns it.

    command: the command line, which the file names. Raises UserError for data or a file that cannot be used.
    """
    from .icons import save_layer

    check_writable("--out", options.out)
    strengths = _strengths(options.weight_decay)
    files = {split: open_images(Path(options.data_dir) / f"{split}.npz") for split in SPLITS}
    if missing := [str(file.path) for file in files.values() if not {"arr_1", "class_names"} <= set(file.members)]:
        raise UserError(f"--data_dir {options.data_dir}: {missing[0]} has no classes (arr_1 and class_names)")
    names = [str(name) for name in files["train"].read("class_names")]
    with feature_folder(options.cache) as folder:
        splits = {split: Split(np.array(extract(file, extractor, folder, 64).pooled), file.read("arr_1"))
                  for split, file in files.items()}
    layer = fit(splits, names, extractor.fingerprint, strengths)
    save_layer(layer, options.out, {"command": command, "torch": torch.__version__,
                                    "data": f"icons, {len(splits['train'].labels)} training images"})
    return layer


def _strengths(text: str) -> list[float]:
    """The numbers above 0 of a comma-separated list; UserError where it is none."""
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < value < float("inf") for value in found):
        raise UserError(f"--weight_decay {text}: must be numbers above 0, comma-separated")
    return found


def fit(splits: Mapping[str, Split], class_names: list[str], features_sha256: str, strengths: list[float]) -> Layer:
    """The layer of that strength which names most of the validation split rightly; of equals the strongest.

    Features are brought to mean 0 and standard deviation 1 of the training split; the layer holds both.
    """
    from .icons import Layer

    mean, deviation = splits["train"].features.mean(axis=0), splits["train"].features.std(axis=0) + 1e-6
    inputs = torch.from_numpy((splits["train"].features - mean) / deviation)

    def of(strength: float) -> Layer:
        weight, bias = regression(inputs, torch.from_numpy(splits["train"].labels), len(class_names), strength)
        weight = weight / deviation[:, None]
        bias = bias - mean @ weight
        accuracy = {name: float(((split.features @ weight + bias).argmax(axis=1) == split.labels).mean())
                    for name, split in splits.items()}
        return Layer(weight, bias, class_names, {**accuracy, "weight_decay": strength}, features_sha256)

    # Of equals `max` takes the first.
    return max(map(of, sorted(strengths, reverse=True)), key=lambda layer: layer.accuracy["validation"])


def regression(inputs: torch.Tensor, labels: torch.Tensor, classes: int, weight_decay: float,
               ) -> tuple[np.ndarray, np.ndarray]:
    """Weight (D, C) and bias (C,) of the least cross entropy plus weight_decay / 2 times the squared weights.

    inputs: (N, D); labels: (N,) int64.
    """
    weight = torch.zeros(inputs.shape[1], classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(inputs @ weight + bias, labels) + weight_decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach().numpy(), bias.detach().numpy()
