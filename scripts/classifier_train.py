r"""Train a classifier of noised images, for classifier guidance.

Examples (each goes on from its last save when started again):
    python scripts/classifier_train.py --config configs/fmnist32_classifier_train.yaml
    python scripts/classifier_train.py --data_dir photos --num_classes 100 --image_size 64 --classifier_width 64 \
        --batch_size 32 --iterations 50000 --anneal_lr True --out runs/photos_classifier
"""

from collections.abc import Sequence
from functools import partial

from guided_diffusion.build import ClassifierOptions, DiffusionOptions
from guided_diffusion.cli import log_to_stdout, run_script, with_logdir
from guided_diffusion.runs.training_effects import idle_in_classifier, parse_training
from guided_diffusion.stated import starting_values
from guided_diffusion.train_util import train_classifier
from guided_diffusion.training.options import ClassifierTrainOptions


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    log_to_stdout()
    train_classifier(*parse_training(
        argv, ClassifierOptions, DiffusionOptions, ClassifierTrainOptions, idle=idle_in_classifier, description=__doc__,
        preset=with_logdir(partial(starting_values, kind="classifier"))))


if __name__ == "__main__":
    run_script(main)
