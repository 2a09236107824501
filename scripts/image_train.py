r"""Train a diffusion model on images.

Examples (each goes on from its last save when started again):
    mpiexec -n 2 python scripts/image_train.py --config configs/fmnist32_train.yaml
    python scripts/image_train.py --data_dir photos --image_size 64 --num_channels 64 --learn_sigma True \
        --batch_size 32 --lr_anneal_steps 100000 --out runs/photos
"""

from collections.abc import Sequence

from evaluations.early_fid import watchers
from guided_diffusion.build import DiffusionOptions, ModelOptions
from guided_diffusion.cli import log_to_stdout, run_script, with_logdir
from guided_diffusion.guidance import GUIDANCE
from guided_diffusion.runs.previews import PreviewOptions, preview_values
from guided_diffusion.runs.training_effects import idle_in_diffusion, parse_training
from guided_diffusion.train_util import train_diffusion
from guided_diffusion.training.options import TrainOptions


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    log_to_stdout()
    model, diffusion, options, previews, *guidance = parse_training(
        argv, ModelOptions, DiffusionOptions, TrainOptions, PreviewOptions, *GUIDANCE, idle=idle_in_diffusion,
        description=__doc__, preset=with_logdir(preview_values))
    train_diffusion(model, diffusion, options, watchers(options, previews, guidance))


if __name__ == "__main__":
    run_script(main)
