r"""Sample images with classifier guidance, and self-attention guidance where --guide_scale is not 1.

Examples:
    python scripts/classifier_sample.py --config configs/fmnist32_sag_cg.yaml --num_samples 64 --out samples/sag_cg
    mpiexec -n 8 python scripts/classifier_sample.py --model 128x128_diffusion \
        --model_path models/128x128_diffusion.pt --classifier_path models/128x128_classifier.pt \
        --classifier_scale 0.5 --guide_scale 1.1 --sel_attn_block output --sel_attn_depth 8 --blur_sigma 3 \
        --timestep_respacing 250 --num_samples 50000 --use_fp16 True
"""

from collections.abc import Sequence

from guided_diffusion.cli import run_script
from guided_diffusion.guidance import ClassifierGuidanceOptions
from guided_diffusion.runs.command import sample_command


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    sample_command(argv, __doc__, on=ClassifierGuidanceOptions)


if __name__ == "__main__":
    run_script(main)
