r"""Render rooms of Freedoom with their depth, to train depth predictors on, by the engine ViZDoom (extra `doom`).

Examples:
    python scripts/doom_render.py --out data/doom32
    python scripts/doom_render.py --maps MAP01,MAP04 --num_train 100 --num_test 100 --image_size 64 --out data/doom64
    python scripts/depth_train.py --model scenes32 --data data/doom32/train.npz --depth_range 0.28,28.6 \
        --out doom.safetensors
"""

from collections.abc import Sequence

from guided_diffusion import dist_util
from guided_diffusion.cli import ShowOptions, log_to_stderr, run_script, tell
from guided_diffusion.depth.doom import DoomOptions, render_doom
from guided_diffusion.options import parse_options


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    log_to_stderr()
    options, show = parse_options(argv, DoomOptions, ShowOptions, description=__doc__)
    dist_util.one_process()
    counts = render_doom(options)
    parts = ", ".join(f"{count or 'no map'} to {split}" for split, count in counts.items())
    tell(f"rooms: {options.out} ({parts})\nsheet: {options.out}/sheet.png", show)


if __name__ == "__main__":
    run_script(main)
