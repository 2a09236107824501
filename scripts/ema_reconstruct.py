"""Make moving averages of other widths from the snapshots of a training (EDM2's post-hoc averages).

The training must have had --ema_power and --snapshot_images.

Examples:
    python scripts/ema_reconstruct.py runs/photos --sigma_rel 0.03,0.07,0.15
    python scripts/image_sample.py --model_path runs/photos/reconstructed_0.07.safetensors --num_samples 16
"""

from collections.abc import Sequence

from guided_diffusion import dist_util
from guided_diffusion.cli import log_to_stderr, run_script
from guided_diffusion.errors import UserError
from guided_diffusion.options import Words, parse_words
from guided_diffusion.training.reconstruction import ReconstructionOptions, reconstruct


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    log_to_stderr()
    folders, (options,) = parse_words(argv, Words("FOLDER", "the folder of the training", needed=True),
                                      ReconstructionOptions, description=__doc__)
    dist_util.one_process()
    if len(folders) > 1:
        raise UserError(f"{len(folders)} folders given: name one")
    for path in reconstruct(folders[0], options):
        print(path)


if __name__ == "__main__":
    run_script(main)
