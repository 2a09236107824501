"""Write a checkpoint in half precision: half the size, the same names, and what its metadata say. Networks load either.

Example:
    python scripts/halve_checkpoint.py runs/scenes32/ema_0.999.safetensors \\
        --out guided_diffusion/models/scenes32.safetensors
"""

import argparse

from guided_diffusion.checkpoint import load_state_dict, read_metadata, save_state
from guided_diffusion.cli import run_script


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="checkpoint to read, .pt or .safetensors")
    parser.add_argument("--out", required=True, metavar="FILE", help="file to write, .safetensors or .pt")
    arguments = parser.parse_args()
    weights = load_state_dict(arguments.checkpoint)
    halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    save_state(arguments.out, halves, read_metadata(arguments.checkpoint))
    print(f"checkpoint: {arguments.out}")


if __name__ == "__main__":
    run_script(main)
