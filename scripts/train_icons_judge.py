"""The old name of the command `scripts/train_icons.py`."""

from guided_diffusion.cli import run_renamed

if __name__ == "__main__":
    run_renamed("scripts/train_icons_judge.py", "train_icons")
