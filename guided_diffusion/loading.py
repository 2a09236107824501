"""A model by its name, ready to sample: the network, its process, and the classifier that guides it."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import dist_util
from .build import DiffusionOptions, ModelOptions, build_diffusion, build_model
from .dtypes import AUTO, DTYPES, with_dtype
from .errors import UserError
from .execution import choose_dtype
from .guidance import ClassifierGuidanceOptions, Networks
from .options import option_fields, options_from
from .presets import find_preset
from .respace import SpacedDiffusion
from .runs.options import preset_values
from .unet import EncoderUNetModel, UNetModel

BATCH = 16              # images of an evaluation that "auto" times
_log = logging.getLogger(__name__)
_CLASSES = (ModelOptions, DiffusionOptions, ClassifierGuidanceOptions)


class LoadedModel(NamedTuple):
    """What `load` returns. classifier: None where there is none."""

    model: UNetModel
    diffusion: SpacedDiffusion
    classifier: EncoderUNetModel | None


def load(name: str = "", *, model_path: str | Path = "", checkpoint_entry: str = "",
         device: torch.device | str | None = None, dtype: str = "", **flags: Any) -> LoadedModel:
    """The model of that name with its weights, frozen and in evaluation mode, on its device.

        model, diffusion, classifier = load("fmnist32", timestep_respacing="50")

    name: a bundled model, the folder of a training, or a released checkpoint, whose file `model_path` then names; not
    needed where that file states its options, as those of a training do. checkpoint_entry: of a file that wraps
    several networks. device: None for the GPU of this rank, or the CPU where there is none. dtype: the type in which
    the network computes, "float32", "float16" or "bfloat16", or "auto", the fastest one here, for batches of BATCH
    images; "" leaves it to the flags use_fp16 and use_bf16, and without these it is float32. flags: options of the
    network, the process and the classifier that differ from those of the name, such as timestep_respacing, use_fp16,
    or classifier_path for a released checkpoint.
    A bundled model brings its classifier.

    Raises UserError for an unknown name, type or flag, for a flag that contradicts what a file states of itself, and
    for a file that is missing or does not fit.
    """
    if dtype not in ("", AUTO, *DTYPES):
        raise UserError(f"dtype {dtype!r}: must be one of {', '.join((AUTO, *DTYPES))}")
    typed: dict[str, Any] = {}
    for options in options_from(flags, *_CLASSES):
        typed |= {flag: value for flag, value in asdict(options).items() if flag in flags}
    named = {"model": str(name), **({"model_path": str(model_path)} if model_path else {})}
    values = preset_values({**typed, **named})
    path = model_path or values.get("model_path", "")
    if not (path or name):
        raise UserError("load: name a model, or the file of one as model_path")
    if not path:
        raise UserError(f"{name}: needs its file: `guided-pixels fetch {name}` fetches {find_preset(name).url} to "
                        f'models/{name}.pt; then pass model_path="models/{name}.pt"')
    known = {field.name for cls in _CLASSES for field in option_fields(cls)}
    given = {**{flag: value for flag, value in values.items() if flag in known}, **flags}
    model_options, diffusion_options, guidance = options_from(given, *_CLASSES)
    device = dist_util.dev() if device is None else device
    if dtype == AUTO:
        choice = choose_dtype(model_options, BATCH, torch.device(device))
        _log.info(choice.line())
        dtype = choice.dtype
    model_options = with_dtype(model_options, dtype)
    with torch.device("meta"):
        model = build_model(model_options)
    nets = Networks(model, torch.device(device))
    nets.load(model, str(path), asdict(model_options) | asdict(diffusion_options), checkpoint_entry)
    return LoadedModel(model, build_diffusion(diffusion_options), guidance.load_classifier(nets))
