"""The old name of the command `scripts/train_scenes.py`."""

from guided_diffusion.cli import run_renamed

if __name__ == "__main__":
    run_renamed("python -m evaluations.train_scenes_judge", "train_scenes")
