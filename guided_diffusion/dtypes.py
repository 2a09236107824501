"""The floating-point types in which the torso of a network computes, by name, and the flags that say the same."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar

from .late import torch
from .options import Options, option

DTYPES = ("float32", "float16", "bfloat16")     # from the most exact one down
AUTO = "auto"                                   # the fastest one on the device at hand


AnyOptions = TypeVar("AnyOptions", bound=Options)


def dtype_option() -> Any:
    """A dataclass field of the type in which a network computes; "" leaves it to --use_fp16 and --use_bf16."""
    return option("", "type in which the torso of the network computes, in place of --use_fp16 and --use_bf16: "
                  f"{', '.join(DTYPES)}, or {AUTO}, the fastest one here; unset: as those say",
                  choices=(AUTO, *DTYPES))


def dtype_flags(dtype: str) -> dict[str, bool]:
    """The values of --use_fp16 and --use_bf16 that say the same as the name of a type."""
    return {"use_fp16": dtype == "float16", "use_bf16": dtype == "bfloat16"}


def dtype_name(flags: Mapping[str, Any]) -> str:
    """The name of the type that --use_fp16 and --use_bf16 say."""
    return "float16" if flags.get("use_fp16") else "bfloat16" if flags.get("use_bf16") else "float32"


def with_dtype(options: AnyOptions, dtype: str) -> AnyOptions:
    """The options of a network, computing in the type of that name; as they are where the name is "" or auto."""
    return replace(options, **dtype_flags(dtype)) if dtype in DTYPES else options


def exact_convolutions(device: torch.device) -> AbstractContextManager[None]:
    """A context in which float32 convolutions on a GPU are not rounded to TF32."""
    if device.type != "cuda":
        return nullcontext()
    cudnn = torch.backends.cudnn
    return cudnn.flags(enabled=cudnn.enabled, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic,
                       allow_tf32=False)
