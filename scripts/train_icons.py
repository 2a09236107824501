"""Train the evaluation classifier of icons, a linear layer on EfficientNet-Lite0's features that names their class.

It needs the extra `photo`. Without options it makes the bundled evaluations/models/icons.safetensors from the
splits that `scripts/icons_render.py --image_size 32 --format npz --out data/icons32` writes (minutes on a CPU core).

Example:
    OMP_NUM_THREADS=1 python scripts/train_icons.py --data_dir data/icons32 --out icons.safetensors
"""

from collections.abc import Sequence

from evaluations.extractors import EXTRACTORS
from evaluations.extractors.train_icons import IconsTrainingOptions, train
from guided_diffusion import dist_util
from guided_diffusion.cli import log_to_stderr, run_script
from guided_diffusion.jobs import command_line
from guided_diffusion.options import parse_options


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    log_to_stderr()
    options, = parse_options(argv, IconsTrainingOptions, description=__doc__)
    dist_util.one_process()
    layer = train(options, command_line("scripts/train_icons.py", argv), EXTRACTORS["photo"].load(device="cpu"))
    print(f"{options.out}: " + ", ".join(f"{name} {value:.4g}" for name, value in layer.accuracy.items()))


if __name__ == "__main__":
    run_script(main)
