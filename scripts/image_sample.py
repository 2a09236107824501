r"""Sample images from a diffusion model, with self-attention guidance where --guide_scale is not 1.

Examples:
    python scripts/image_sample.py --model fmnist32 --timestep_respacing 50 --num_samples 64 --out samples/plain
    python scripts/image_sample.py --config configs/fmnist32_sag.yaml --num_samples 64 --out samples/sag
    mpiexec -n 8 python scripts/image_sample.py --model 256x256_diffusion_uncond \
        --model_path models/256x256_diffusion_uncond.pt --timestep_respacing 250 --num_samples 50000 \
        --guide_scale 1.5 --sel_attn_block output --sel_attn_depth 2 --blur_sigma 9 --use_fp16 True
"""

from collections.abc import Sequence

from guided_diffusion.cli import run_script
from guided_diffusion.runs.command import sample_command


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    sample_command(argv, __doc__)


if __name__ == "__main__":
    run_script(main)
