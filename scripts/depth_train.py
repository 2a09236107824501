r"""Train the depth predictors of depth-aware guidance on a diffusion network's features.

Examples (each goes on from its last save when started again):
    python scripts/depth_train.py --model scenes32 --data scenes --out runs/scenes32_depth.safetensors
    python scripts/depth_train.py --model lsun_bedroom --model_path models/lsun_bedroom.pt --use_fp16 True \
        --data bedrooms --depth_range image --out runs/lsun_bedroom_depth.safetensors
"""

from collections.abc import Sequence
from pathlib import Path

from guided_diffusion.build import DiffusionOptions, ModelOptions
from guided_diffusion.cli import log_to_stdout, run_script, tell
from guided_diffusion.depth.train import DepthTrainOptions, log_folder, train_predictors
from guided_diffusion.runs.options import preset_values
from guided_diffusion.runs.training_effects import idle_in_predictors, parse_training


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    log_to_stdout()
    options = parse_training(argv, DepthTrainOptions, ModelOptions, DiffusionOptions, idle=idle_in_predictors,
                             description=__doc__, preset=preset_values)
    train_predictors(*options)
    curve = log_folder(Path(options[0].out)) / "loss.png"
    tell(f"predictors: {options[0].out}" + (f"\nlosses: {curve}" if curve.exists() else ""))


if __name__ == "__main__":
    run_script(main)
