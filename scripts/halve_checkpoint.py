"""The old name of `convert_checkpoint.py --dtype float16`."""

from guided_diffusion.cli import run_renamed

if __name__ == "__main__":
    run_renamed("scripts/halve_checkpoint.py", "convert_checkpoint", "--dtype", "float16")
