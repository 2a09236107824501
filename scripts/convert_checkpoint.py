r"""Write a checkpoint in another precision: the same names, and what its metadata say. Networks load any of them.

Example, which makes a file half as large:
    python scripts/convert_checkpoint.py runs/scenes32/ema_0.999.safetensors --dtype float16 \
        --out guided_diffusion/models/scenes32.safetensors
"""

from collections.abc import Sequence
from dataclasses import dataclass

from guided_diffusion.cli import log_to_stderr, run_script, tell
from guided_diffusion.errors import UserError
from guided_diffusion.options import Options, Words, option, parse_words, required

DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class ConvertOptions(Options):
    """The checkpoint to write."""

    out: str = required("file to write, .safetensors or .pt")
    checkpoint_entry: str = option("", "entry of a file that wraps several, like ema or model; unset: the moving "
                                   "average, if it has one")
    dtype: str = option("float16", "type of its numbers, where they are no whole numbers", choices=DTYPES)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    log_to_stderr()
    files, (options,) = parse_words(argv, Words("CHECKPOINT", "checkpoint to read, .pt or .safetensors", needed=True),
                                    ConvertOptions, description=__doc__)
    if len(files) > 1:
        raise UserError(f"{len(files)} checkpoints given: name one")
    import torch  # here, as help needs none of it

    from guided_diffusion.checkpoint import load_state_dict, read_metadata, save_state

    dtype, weights = getattr(torch, options.dtype), load_state_dict(files[0], entry=options.checkpoint_entry)
    converted = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    save_state(options.out, converted, read_metadata(files[0]))
    tell(f"checkpoint: {options.out}")


if __name__ == "__main__":
    run_script(main)
