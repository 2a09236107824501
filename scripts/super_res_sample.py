r"""Upsample images with an upsampling diffusion model: image i of the base file gives image i.

Examples:
    python scripts/super_res_sample.py --model runs/icons64_upsampler --base_samples samples/icons32 \
        --timestep_respacing 50 --out samples/icons64
    mpiexec -n 8 python scripts/super_res_sample.py --model 64_256_upsampler --model_path models/64_256_upsampler.pt \
        --base_samples samples/imagenet64/samples_10000x64x64x3.npz --timestep_respacing 250 --use_fp16 True
"""

from collections.abc import Sequence

from guided_diffusion.cli import run_script
from guided_diffusion.runs.command import sample_command
from guided_diffusion.runs.upsample import UpsamplingRun


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    sample_command(argv, __doc__, kind=UpsamplingRun)


if __name__ == "__main__":
    run_script(main)
