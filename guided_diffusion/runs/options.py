"""The options of a sampling run."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from ..build import DiffusionOptions, ModelOptions
from ..dtypes import dtype_option
from ..errors import UserError
from ..guidance import GUIDANCE
from ..options import Options, batch_option, entry_option, option, option_fields, seed_option
from ..presets import Preset, find_preset, implied_values, is_bundled
from ..sampling import SAMPLERS
from ..stated import statement_of

_log = logging.getLogger(__name__)

DEFAULT_SAMPLER = "ddpm"
MOST_IMAGES = 10**10
KINDS = {"diffusion": "a diffusion model", "upsampler": "an upsampler"}


@dataclass(frozen=True)
class CheckpointOptions(Options):
    """The checkpoint."""

    model: str = option("", "a model by name: a bundled one (fmnist32), the folder of a training, or the flags of a "
                        "released checkpoint")
    model_path: str = option("", "checkpoint of the diffusion network, .pt or .safetensors: a path, or an address "
                             "(https://, gs://, az://), which is fetched once")
    checkpoint_entry: str = entry_option()

    def check_given(self) -> None:
        """Raises UserError where no checkpoint is named, and says how to come by one."""
        if self.model_path:
            return
        hint = "name a checkpoint, or a bundled model with --model, like --model fmnist32"
        if self.model:
            preset = find_preset(self.model)
            hint = (f"--model {preset.name} has its own file, leave --model_path out" if preset.url is None else
                    f"`python scripts/fetch_models.py {preset.name}` fetches {preset.url} to models/{preset.name}.pt")
        raise UserError(f"--model_path is not given: {hint}")


@dataclass(frozen=True)
class SampleOptions(CheckpointOptions):
    """The sampling run."""

    num_samples: int = option(10000, "number of images", minimum=1, maximum=MOST_IMAGES)
    batch_size: int = batch_option(16, "images at a time on each rank, and in a chunk")
    sampler: str = option("", f"the sampler: {', '.join(SAMPLERS)}; unset: {DEFAULT_SAMPLER}", choices=SAMPLERS)
    use_ddim: bool = option(False, "another way to say --sampler ddim")
    clip_denoised: bool = option(True, "clip the predicted image to [-1, 1] at each step")
    batch_contrasts: bool = option(False, "make further evaluations of guidance that differ in their inputs alone as "
                                   "one batch, for devices that one batch does not fill", later=True)
    labels: str = option("random", "classes of conditional samples: random, balanced (number modulo classes), none "
                                   "(of a network with a null class), one class by its number or name, or a .npy "
                                   "file of one for each image")
    seed: int = seed_option("seed of noise and labels; the same seed gives the same file")
    shared_start: bool = option(False, "draw the noise that an image begins with by its number alone, so that runs of "
                                "different numbers of steps begin alike; False: by the number of steps too",
                                later=True)
    out: str = option("", "folder for the samples, the picture and the record; unset: samples/NAME-FINGERPRINT, named "
                      "by the model and by what the images depend on")
    overwrite: bool = option(False, "begin anew, and replace what is in that folder")
    keep_shards: bool = option(False, "keep the files of the chunks beside the file of samples")
    log_every: int = option(0, "a plain line of progress every so many images, in place of the bar; 0: the bar",
                            minimum=0)
    dtype: str = dtype_option()
    compile: bool = option(False, "compile the network with torch.compile: for GPUs and long runs, as it takes minutes "
                           "before the first step", later=True)
    auto_batch: bool = option(False, "out of memory: evaluate fewer images at a time, in chunks as large as before")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_ddim and self.sampler not in ("", "ddim"):
            raise UserError(f"--use_ddim True --sampler {self.sampler}: one of them is enough, they differ")

    @property
    def sampler_name(self) -> str:
        """The name in SAMPLERS of the sampler that is used."""
        return _sampler_name(self.sampler, self.use_ddim)


def _sampler_name(sampler: str, use_ddim: bool) -> str:
    return sampler or ("ddim" if use_ddim else DEFAULT_SAMPLER)


def option_classes() -> tuple[type[Options], ...]:
    """The options of a run beside its own: network, process, samplers and guidance methods, as `--help` shows them."""
    return (ModelOptions, DiffusionOptions, *SAMPLERS.values(), *GUIDANCE)


def preset_values(given: dict[str, Any], kind: str = "diffusion") -> dict[str, Any]:
    """Values of the options that `--model` stands for, and those that the checkpoints state of themselves.

    given: what the user gave, by flag name. kind: of the model, "diffusion" or "upsampler". Raises UserError where that
    contradicts what a checkpoint states, and for options of another sampler that refuses them there.
    """
    values: dict[str, Any] = {}
    if given.get("model"):
        preset = find_preset(given["model"])
        if preset.kind != kind:
            raise UserError(f"--model {preset.name}: is a model of kind {preset.kind}, not {KINDS[kind]}")
        values |= preset.options
        for method in GUIDANCE:
            values |= method.preset_values(preset)
        if preset.path is not None:
            values["model_path"] = str(preset.path)
        if not preset.known and not given.get("model_path"):
            _say_files(preset, {**values, **given})
    else:
        values |= implied_values("model_path", given, kind)
    known = {**values, **given}
    _check_sampler(_sampler_name(known.get("sampler", ""), known.get("use_ddim", False)), given)
    return values | _stated_values(known, given, kind)


def preset_sampling(given: dict[str, Any]) -> dict[str, Any]:
    """The flags of the sampler that suits `--model`, and says so; none where a sampler or a respacing is given.

    given: what the user gave, by flag name. What is given of these flags goes before. It is for commands alone: tables
    and benches say how they sample.
    """
    if not given.get("model") or any(given.get(name) for name in ("sampler", "use_ddim", "timestep_respacing")):
        return {}
    values = find_preset(given["model"]).sampling
    if values:
        flags = " ".join(f"--{name} {given.get(name, value)}" for name, value in values.items())
        _log.info("--model %s: samples with %s, to save time (--sampler ddpm: the full chain)", given["model"], flags)
    return values


def command_values(given: dict[str, Any], kind: str = "diffusion") -> dict[str, Any]:
    """What `preset_sampling` and `preset_values` give, for commands; says which defaults guidance methods take."""
    sampling = preset_sampling(given)
    values = sampling | preset_values(sampling | given, kind)
    for line in filter(None, (method.assumed({**values, **given}) for method in GUIDANCE)):
        _log.info(line)
    return values


def _check_sampler(name: str, given: dict[str, Any]) -> None:
    """Raises UserError where options that were given belong to other samplers, which refuse them."""
    own = {field.name for field in option_fields(SAMPLERS[name])}
    for flag, value in given.items():
        others = [other for other, kind in SAMPLERS.items() if kind.refused_elsewhere
                  if flag in {field.name for field in option_fields(kind)}]
        if others and flag not in own and value is not None:
            raise UserError(f"--{flag} {value}: is an option of --sampler {' and '.join(others)}, and the sampler is "
                            f"{name}")


def _say_files(preset: Preset, values: dict[str, Any]) -> None:
    """Logs which files of the folder of a training were taken, and which were not as several would do."""
    others = [f"{path} as --{flag}" for flag, path in values.items() if flag.endswith("_path") and flag != "model_path"]
    _log.info("--model %s: takes %s", preset.name, ", and ".join([values["model_path"], *others]))
    if preset.open_choice:
        _log.info("--model %s: %s", preset.name, preset.open_choice)


def _stated_values(values: dict[str, Any], given: dict[str, Any], kind: str) -> dict[str, Any]:
    """What the checkpoints among the values state of themselves; UserError where the flags given contradict it."""
    stated: dict[str, Any] = {}
    model = statement_of(values.get("model_path", ""), kind)
    if model is not None:
        model.check(given)
        if not is_bundled(model.path):
            model.say(given)
        stated |= model.facts
    for method in GUIDANCE:
        stated |= method.stated_values({**values, **stated, **given}, given)
    return stated
