"""The old name of the command `scripts/class_accuracy.py`."""

from guided_diffusion.cli import run_renamed

if __name__ == "__main__":
    run_renamed("python -m evaluations.recognised", "class_accuracy")
