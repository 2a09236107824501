"""Training the classifier of Fashion-MNIST that measures: on the 60,000 training images.

The test images serve only to measure: the weights of the last epoch are kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from guided_diffusion.files import check_ending, check_writable
from guided_diffusion.image_datasets import load_arrays, load_data, pad_to_frame
from guided_diffusion.late import Tensor, nn, torch
from guided_diffusion.options import Options, batch_option, option, seed_option

from .base import IMAGE_SIZE, bundled_file
from .training import EpochTraining, learning_rate_factor

if TYPE_CHECKING:
    from .fashion_mnist import FashionMnistClassifier


@dataclasses.dataclass(frozen=True)
class FashionMnistTrainingOptions(Options):
    """How the classifier is trained."""

    data_dir: str = option("fashion-mnist", "folder with the IDX files, or fashion-mnist: where Debian installs them")
    out: str = option(str(bundled_file("fashion_mnist")), "file for the weights; the log goes beside it, ending in "
                      ".log")
    epochs: int = option(14, "passes over the training images", minimum=1)
    batch_size: int = batch_option(128, "images per step", minimum=2)
    lr: float = option(0.1, "learning rate at its peak, after the first epoch; it falls to 0 as a cosine", above=0)
    weight_decay: float = option(5e-4, "weight decay of SGD", minimum=0)
    max_shift: int = option(2, "largest random shift of an image, in pixels, along each axis", minimum=0, maximum=2)
    seed: int = seed_option("seed of initial weights, order and augmentation")


def train(options: FashionMnistTrainingOptions, command: str) -> FashionMnistClassifier:
    """Trains the classifier, writes weights and log, and returns it as it is in the file, in evaluation mode.

    command: the command line, which log and weights name. Raises UserError for data or a folder that cannot be used.
    """
    from .bundled import channels_last
    from .fashion_mnist import FashionMnistClassifier, save_fashion_mnist

    out = Path(options.out)
    check_ending("--out", out, ".safetensors")
    check_writable("--out", out)
    test_images, test_labels = load_arrays(options.data_dir, "test")
    test = pad_to_frame(test_images, (1, IMAGE_SIZE, IMAGE_SIZE)), torch.from_numpy(test_labels)
    num_images = len(load_arrays(options.data_dir, "train")[0])
    batches = load_data(data_dir=options.data_dir, batch_size=options.batch_size, image_size=IMAGE_SIZE,
                        class_cond=True, in_channels=1, seed=options.seed, rank=0, world_size=1)
    torch.manual_seed(options.seed)
    shifts = torch.Generator().manual_seed(options.seed)
    model = channels_last(FashionMnistClassifier())
    optimizer = torch.optim.SGD(model.parameters(), options.lr, momentum=0.9, nesterov=True,
                                weight_decay=options.weight_decay)
    steps = max(1, num_images // options.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, warm_up=steps, total=steps * options.epochs))

    def losses() -> Iterator[Tensor]:
        for _ in range(steps):
            images, labels = next(batches)
            logits = model(shift(images, options.max_shift, shifts))
            yield nn.functional.cross_entropy(logits, labels["y"])

    def measure() -> str:
        model.test_accuracy = classification_accuracy(model, *test)
        return f"test accuracy {model.test_accuracy:.4f}"

    EpochTraining(model, optimizer, schedule, options.epochs, steps, losses, measure).run(
        out.with_suffix(".log"),
        f"# {command}\n# torch {torch.__version__}, {num_images} training and {len(test[1])} test images\n")
    save_fashion_mnist(model, out, {"command": command, "torch": torch.__version__,
                                    "data": f"Fashion-MNIST, {num_images} training images"})
    return model


def shift(images: Tensor, largest: int, generator: torch.Generator) -> Tensor:
    """Moves each image (N, C, H, W) by up to `largest` pixels along each axis; what leaves at one edge re-enters."""
    size = images.shape[-1]
    moves = torch.randint(-largest, largest + 1, (len(images), 2), generator=generator)
    rows, columns = ((torch.arange(size) + moves[:, axis, None]) % size for axis in (0, 1))     # (N, size) each
    image = torch.arange(len(images))[:, None, None]
    return images.movedim(1, 3)[image, rows[:, :, None], columns[:, None, :]].movedim(3, 1)


def classification_accuracy(model: FashionMnistClassifier, images: Tensor, labels: Tensor) -> float:
    """Share of images (N, 1, 32, 32) in [-1, 1] that are classified as labelled; leaves evaluation mode on."""
    return float((model.eval().predict(images) == labels.numpy()).mean())
