"""Folders as diffusers lays them out: a `UNet2DModel`, or a `DDPMPipeline` around one.

    FOLDER/model_index.json                                 the classes of the pipeline
    FOLDER/unet/config.json                                 the network's configuration, see `configurations`
    FOLDER/unet/diffusion_pytorch_model.safetensors         its weights, see `weights`
    FOLDER/scheduler/scheduler_config.json                  the process

Without a pipeline FOLDER is that of the network itself.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .. import checkpoint
from ..build import DiffusionOptions, ModelOptions, build_model
from ..errors import UserError
from ..files import check_folder, write_json
from ..foreign import read_json
from ..late import Tensor, torch
from ..options import option_fields, options_from
from .configurations import DEFAULTS, config_of, flags_of
from .weights import from_unet2d, to_unet2d

_log = logging.getLogger(__name__)

CONFIG, WEIGHTS, SCHEDULER = "config.json", "diffusion_pytorch_model.safetensors", "scheduler_config.json"
INDEX = "model_index.json"
DECODERS = ("vae", "vqvae", "movq")
PIPELINE_FILES = (INDEX, f"unet/{CONFIG}", f"unet/{WEIGHTS}", f"scheduler/{SCHEDULER}")     # of `write_pipeline`
SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
PREDICTIONS = {"predict_xstart": "sample", "predict_v": "v_prediction"}
EMBEDDED_STEPS = 1000           # to which rescale_timesteps scales any chain
LINEAR = 0.1, 20.0              # the first and the last of the linear betas, times the number of steps
LINEAR_BY_DEFAULT = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler")     # whose file may leave the betas out
VARIANCES = (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")


def write_pipeline(out: Path, weights: Mapping[str, Tensor], flags: Mapping[str, Any], metadata: Mapping[str, str],
                   ) -> None:
    """Writes the folder of a `DDPMPipeline`, whose network gives what ours gives.

    flags: all options of network and process. metadata: of our own file, which are kept in that of the weights. Raises
    UserError that says what diffusers has no like of, before anything is written.
    """
    scheduler, options = scheduler_of(flags), _model_options(flags)
    with torch.device("meta"):
        model = build_model(options)
    config = config_of(model, options.image_size, options.dropout)
    for part in ("unet", "scheduler"):
        check_folder("--out", out / part)
    checkpoint.save_state(out / "unet" / WEIGHTS, to_unet2d(model, weights), {**metadata, "format": "pt"})
    write_json(out / "unet" / CONFIG, config)
    write_json(out / "scheduler" / SCHEDULER, scheduler)
    write_json(out / INDEX, {"_class_name": "DDPMPipeline", "scheduler": ["diffusers", "DDPMScheduler"],
                             "unet": ["diffusers", "UNet2DModel"]})


def read_network(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights of a `UNet2DModel` in a folder, or in that of a pipeline, by our names, and the options they state.

    Without a scheduler beside the network nothing is known of its process: its options are left out, which is said in
    one line. Raises UserError for a folder without such a network, for a pipeline that decodes what its network makes,
    and one that says all that ADM networks, or our processes, have no like of.
    """
    _check_pixels(folder)
    place = folder / "unet" if (folder / "unet" / CONFIG).exists() else folder
    path = place / CONFIG
    config = read_json(path) if path.is_file() else {}
    kind = config.get("_class_name")
    if not kind:
        raise UserError(f"{place}: is no network of diffusers{checkpoint.checkpoints_in(place)}")
    if kind != "UNet2DModel":
        raise UserError(f"{place}: is {kind} of diffusers, and ADM networks are like its UNet2DModel only")
    try:
        flags = flags_of(config)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    except (KeyError, TypeError, ValueError, ZeroDivisionError, IndexError):
        raise UserError(f"{place / CONFIG}: describes no UNet2DModel") from None
    if not (place / WEIGHTS).exists():
        raise UserError(f"{place}: holds no {WEIGHTS}, and weights in other files are not read")
    flags |= _process(folder, flags)
    with torch.device("meta"):
        model = build_model(_model_options(flags))
    sines_first = not (DEFAULTS | config)["flip_sin_to_cos"]
    return from_unet2d(model, checkpoint.load_state_dict(place / WEIGHTS), str(place), sines_first), flags


def read_index(folder: Path) -> dict[str, Any]:
    """What the index of a pipeline's folder says of its parts; {} for a folder, or a name, without one."""
    path = folder / INDEX
    return read_json(path) if path.is_file() else {}


def _check_pixels(folder: Path) -> None:
    """Raises UserError for a pipeline with a decoder, whose network makes latents."""
    parts = read_index(folder)
    if found := [name for name in DECODERS if parts.get(name) not in (None, [None, None])]:
        raise UserError(f"{folder}: its network makes latents, which its {found[0]} decodes; must be a pipeline whose "
                        "network makes images, as the samplers of checkpoints do not decode")


def _model_options(flags: Mapping[str, Any]) -> ModelOptions:
    names = {field.name for field in option_fields(ModelOptions)}
    options, = options_from({name: value for name, value in flags.items() if name in names}, ModelOptions)
    return options


def _process(folder: Path, flags: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the process of a pipeline; none where there is no scheduler."""
    path = folder / "scheduler" / SCHEDULER
    if not path.exists():
        _log.info("%s: has no scheduler, so that the options of the process are not stated; the defaults are linear "
                  "betas of 1000 steps and a network that predicts the noise", folder)
        return {}
    scheduler = read_json(path)
    try:
        found = process_flags_of(scheduler, flags["learn_sigma"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (TypeError, ValueError, ZeroDivisionError):
        raise UserError(f"{path}: describes no scheduler") from None
    if scheduler.get("thresholding"):
        _log.warning("%s: its thresholding is no part of the conversion; sampling clips predictions to [-1, 1]", path)
    elif scheduler.get("clip_sample") is False:
        _log.warning("%s: does not clip predictions; sampling does, unless --clip_denoised False is given", path)
    elif scheduler.get("clip_sample_range", 1) != 1:
        _log.warning("%s: clips predictions at %s; sampling clips them at 1", path, scheduler["clip_sample_range"])
    return found


def scheduler_of(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The scheduler_config.json of a `DDPMScheduler` with the process of these options, which may be left out.

    Raises UserError for steps that the network sees as fractions.
    """
    defaults = {field.name: field.default for field in option_fields(DiffusionOptions)}
    values, steps = defaults | dict(flags), flags.get("diffusion_steps", defaults["diffusion_steps"])
    if values["rescale_timesteps"] and steps != EMBEDDED_STEPS:
        raise UserError(f"diffusers has no like of this process: rescale_timesteps with diffusion_steps {steps} (the "
                        f"network sees steps of {EMBEDDED_STEPS}, and schedulers of diffusers give those of the chain)")
    fixed = "fixed_small" if values["sigma_small"] else "fixed_large"
    return {
        "_class_name": "DDPMScheduler", "num_train_timesteps": steps,
        "beta_start": LINEAR[0] / steps, "beta_end": LINEAR[1] / steps,
        "beta_schedule": SCHEDULES[values["noise_schedule"]],
        "prediction_type": next((word for flag, word in PREDICTIONS.items() if values[flag]), "epsilon"),
        "variance_type": "learned_range" if values["learn_sigma"] else fixed, "clip_sample": True,
        "clip_sample_range": 1.0, "thresholding": False, "timestep_spacing": "leading", "steps_offset": 0,
        "trained_betas": None}


def process_flags_of(scheduler: Mapping[str, Any], learn_sigma: bool) -> dict[str, Any]:
    """The options of the process of a scheduler with this scheduler_config.json.

    learn_sigma: whether the network gives twice the channels. Raises UserError that says all that differs.
    """
    steps = scheduler.get("num_train_timesteps", EMBEDDED_STEPS)
    prediction, variance = scheduler.get("prediction_type", "epsilon"), scheduler.get("variance_type")
    found = list(_beta_differences(scheduler, steps))
    if prediction not in (*PREDICTIONS.values(), "epsilon"):
        found.append(f"prediction_type {prediction} (there are epsilon, sample and v_prediction)")
    if variance not in VARIANCES:
        found.append(f"variance_type {variance} (there are {', '.join(filter(None, VARIANCES))})")
    elif variance == "learned" or (variance is not None and learn_sigma != (variance == "learned_range")):
        found.append(f"variance_type {variance} (a network with twice the images' channels has learned_range)")
    if found:
        raise UserError("our processes have no like of it: " + "; ".join(found))
    schedule = {word: name for name, word in SCHEDULES.items()}[scheduler.get("beta_schedule", "linear")]
    return {"learn_sigma": learn_sigma, "sigma_small": variance in (None, "fixed_small", "fixed_small_log"),
            "diffusion_steps": steps, "noise_schedule": schedule,
            **{flag: word == prediction for flag, word in PREDICTIONS.items()}}


def _beta_differences(scheduler: Mapping[str, Any], steps: int) -> Iterator[str]:
    """What a scheduler's noise levels differ in from those of our processes."""
    name, schedule = scheduler.get("_class_name"), scheduler.get("beta_schedule", "linear")
    betas = [scheduler.get(name, usual / EMBEDDED_STEPS)
             for name, usual in zip(("beta_start", "beta_end"), LINEAR, strict=True)]
    if scheduler.get("trained_betas") is not None:
        yield "trained_betas (betas follow a noise_schedule)"
    elif "beta_schedule" not in scheduler and name not in (None, *LINEAR_BY_DEFAULT):
        yield f"{name} without a beta_schedule (there are processes of discrete steps with betas)"
    elif schedule not in SCHEDULES.values() or (schedule == "linear" and not all(
            math.isclose(beta * steps, usual, rel_tol=1e-6) for beta, usual in zip(betas, LINEAR, strict=True))):
        yield (f"betas {schedule} from {betas[0]:g} to {betas[1]:g} (there are the linear ones, "
               f"{LINEAR[0] / steps:g} to {LINEAR[1] / steps:g} for {steps} steps, and squaredcos_cap_v2)")
    if scheduler.get("rescale_betas_zero_snr"):
        yield "rescale_betas_zero_snr (the last step must keep some signal)"
    for option, off in (("timestep_type", "discrete"), ("use_flow_sigmas", False)):
        if scheduler.get(option, off) != off:
            yield f"{option} {scheduler[option]} (the network must see discrete steps of a chain with betas)"
