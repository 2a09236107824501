"""The old name of the command `scripts/train_fashion_mnist.py`."""

from guided_diffusion.cli import run_renamed

if __name__ == "__main__":
    run_renamed("python -m evaluations.train_embedded", "train_fashion_mnist")
