r"""Write a checkpoint in another precision: the same names, and what its metadata say. Networks load any of them.

A folder of diffusers with a UNet2DModel, alone or in a pipeline, becomes a checkpoint of this project that states its
options. scripts/export_model.py --layout diffusers goes the other way. A released checkpoint whose name stands for its
flags states them from then on, as the new file has another name.

Examples, of which the first makes a file half as large:
    python scripts/convert_checkpoint.py runs/scenes32/ema_0.999.safetensors --dtype float16 \
        --out guided_diffusion/models/scenes32.safetensors
    python scripts/convert_checkpoint.py exports/pipeline --dtype float32 --out models/converted.safetensors
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guided_diffusion.cli import log_to_stderr, run_script, tell
from guided_diffusion.errors import UserError
from guided_diffusion.files import check_writable
from guided_diffusion.options import Options, Words, option, parse_words, required

if TYPE_CHECKING:
    from torch import Tensor

_log = logging.getLogger(__name__)

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
    files, (options,) = parse_words(argv, Words("CHECKPOINT", "checkpoint to read, .pt or .safetensors, or a folder of "
                                                "diffusers", needed=True),
                                    ConvertOptions, description=__doc__)
    if len(files) > 1:
        raise UserError(f"{len(files)} checkpoints given: name one")
    import torch  # here, as help needs none of it

    from guided_diffusion import dist_util
    from guided_diffusion.checkpoint import load_state_dict, read_metadata, save_state
    from guided_diffusion.entries import check_no_state
    from guided_diffusion.unet2d.files import read_network

    dist_util.one_process()
    path, dtype = files[0], getattr(torch, options.dtype)
    check_writable("--out", options.out, read=[path])
    if not Path(path).is_dir():
        weights, metadata = load_state_dict(path, entry=options.checkpoint_entry), read_metadata(path)
        check_no_state(weights, path)
        if "config" not in metadata and (flags := _implied_flags(path, options.out, weights)):
            metadata = {**metadata, "config": json.dumps(flags)}
    elif options.checkpoint_entry:
        raise UserError(f"--checkpoint_entry {options.checkpoint_entry}: is of checkpoints, and {path} is a folder")
    else:
        weights, flags = read_network(Path(path))
        metadata = {"config": json.dumps(flags)}
    converted = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    for name, tensor in converted.items():
        if tensor.is_floating_point() and not tensor.isfinite().all() and weights[name].isfinite().all():
            raise UserError(f"--dtype {options.dtype}: has no numbers as large as some of {name}, up to "
                            f"{weights[name].abs().max():.3g}; take another type")
    save_state(options.out, converted, metadata)
    tell(f"checkpoint: {options.out}")


def _implied_flags(path: str, out: str, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """All flags of the released checkpoint that the name of the file stands for, to be stated in `out`; says so.

    weights: what the file holds. No flags where the name stands for none or is that of `out` too; nor where the
    weights are others or `out` can state nothing, and then a line says so.
    """
    from guided_diffusion.build import DiffusionOptions
    from guided_diffusion.facts import check_options
    from guided_diffusion.fetch import without_secrets
    from guided_diffusion.presets import implied_preset
    from guided_diffusion.stated import NETWORKS

    preset = next(filter(None, (implied_preset(path, kind) for kind in NETWORKS)), None)
    if preset is None or Path(out).stem == preset.name:
        return {}
    shown = f"{without_secrets(path)}: its name stands for the flags of the released {preset.name}"
    flags = {**asdict(NETWORKS[preset.kind]()), **asdict(DiffusionOptions()), **preset.options}
    try:
        check_options({name: tuple(value.shape) for name, value in weights.items()}, flags, path)
    except UserError:
        _log.warning("%s, whose weights it does not hold; %s states none of them, pass them as flags", shown, out)
        return {}
    if Path(out).suffix != ".safetensors":
        _log.warning("%s; %s can state none of them, use it with --model %s", shown, out, preset.name)
        return {}
    _log.info("%s, which %s states", shown, out)
    return flags


if __name__ == "__main__":
    run_script(main)
