"""The old name of the command `scripts/depth_fid.py`."""

from guided_diffusion.cli import run_renamed

if __name__ == "__main__":
    run_renamed("python -m evaluations.depth_fid", "depth_fid")
