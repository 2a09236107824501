r"""Train an upsampling diffusion model on large images, which it sees in small beside the noise.

Examples (each goes on from its last save when started again):
    python scripts/super_res_train.py --config configs/icons64_upsampler_train.yaml
    mpiexec -n 8 python scripts/super_res_train.py --data_dir photos --large_size 256 --small_size 64 \
        --learn_sigma True --num_channels 192 --batch_size 32 --lr_anneal_steps 100000 --out runs/photos_upsampler
"""

from collections.abc import Sequence
from functools import partial

from evaluations.early_fid import watchers
from guided_diffusion.build import DiffusionOptions, UpsamplerOptions
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
        argv, UpsamplerOptions, DiffusionOptions, TrainOptions, PreviewOptions, *GUIDANCE, idle=idle_in_diffusion,
        description=__doc__, preset=with_logdir(partial(preview_values, kind="upsampler")))
    train_diffusion(model, diffusion, options, watchers(options, previews, guidance))


if __name__ == "__main__":
    run_script(main)
