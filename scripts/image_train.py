"""Train a diffusion model on images.

Example (goes on from its last save when started again):
    python scripts/image_train.py --data_dir fashion-mnist --image_size 32 --in_channels 1 --num_channels 32 \
        --batch_size 64 --lr_anneal_steps 10000 --out runs/fmnist
"""

import logging
import sys

from guided_diffusion.options import parse_options
from guided_diffusion.script_util import DiffusionOptions, ModelOptions, run_script
from guided_diffusion.train_util import TrainOptions, train_diffusion


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    train_diffusion(*parse_options(None, ModelOptions, DiffusionOptions, TrainOptions, description=__doc__))


if __name__ == "__main__":
    run_script(main)
