r"""Look at what self-attention attends to: overlays on the predicted image, frequencies of masked patches, and objects.

Examples:
    python scripts/attention.py --model scenes32 --timestep_respacing 25 --out runs/attention/scenes32
    python scripts/attention.py --model fmnist32 --timestep_respacing 25 --labels balanced --images 0,1,2 \
        --blocks output.2,output.3 --out runs/attention/fmnist32
    python scripts/attention.py --model 256x256_diffusion_uncond --model_path models/256x256_diffusion_uncond.pt \
        --timestep_respacing 25 --num_images 64 --batch_size 4 --use_fp16 True --attention_heads official \
        --objects photographs.npz
"""

from collections.abc import Sequence

from evaluations.attention.study import AttentionOptions, study_attention
from evaluations.reports import with_page
from guided_diffusion import dist_util
from guided_diffusion.build import DiffusionOptions, ModelOptions
from guided_diffusion.cli import ShowOptions, log_to_stderr, run_script, tell
from guided_diffusion.options import parse_options
from guided_diffusion.runs.options import preset_values


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    log_to_stderr()
    show, *options = parse_options(argv, ShowOptions, AttentionOptions, ModelOptions, DiffusionOptions,
                                   description=__doc__, preset=preset_values)
    dist_util.one_process()
    text = study_attention(*options)
    tell(with_page(text, options[0].out, show), show)


if __name__ == "__main__":
    run_script(main)
