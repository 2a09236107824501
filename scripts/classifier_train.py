"""Train a classifier of noised images, for classifier guidance.

Example (goes on from its last save when started again):
    python scripts/classifier_train.py --data_dir fashion-mnist --val_data_dir fashion-mnist --image_size 32 \
        --in_channels 1 --num_classes 10 --batch_size 64 --iterations 10000 --out runs/classifier
"""

import logging
import sys

from guided_diffusion.options import parse_options
from guided_diffusion.script_util import ClassifierOptions, DiffusionOptions, run_script
from guided_diffusion.train_util import ClassifierTrainOptions, train_classifier


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    options = parse_options(None, ClassifierOptions, DiffusionOptions, ClassifierTrainOptions, description=__doc__)
    train_classifier(*options)


if __name__ == "__main__":
    run_script(main)
