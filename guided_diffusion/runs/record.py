"""What run.json says of a run: its configuration, what its images depend on, how they were made; written and read."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import dist_util
from ..build import DiffusionOptions, ModelOptions
from ..dtypes import dtype_name
from ..errors import UserError
from ..fetch import without_secrets
from ..files import reason
from ..functions import function_sources, is_function, is_ours, sources_of
from ..guidance import GUIDANCE, GuidanceOptions
from ..late import torch
from ..npz import BatchFile
from ..options import Options, option_fields, options_from, shortened
from ..places import command_file
from ..respace import space_timesteps
from ..sampling import SAMPLERS, SamplerOptions
from ..version import __version__
from .labels import is_file
from .options import DEFAULT_SAMPLER, MOST_IMAGES, SampleOptions, option_classes

# Options that no image depends on. Paths of checkpoints and labels give way to what the files hold.
IRRELEVANT = ("out", "overwrite", "keep_shards", "log_every", "auto_batch", "model", "num_samples", "use_ddim",
              "dtype",                # which is recorded as what it means: use_fp16 and use_bf16
              "base_samples")         # whose images are compared one by one
MODEL_FLAG = "model_path"
SOURCE = "source of "           # begins the names of files of code
LONGEST_NAME = 255
SIZES = ("num_samples", "batch_size", "image_size")         # what the chunks of a run follow from
READ_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError)


def name_of(flag: str) -> str:
    """The name that run.json has for the checkpoint of a flag: "model" for --model_path."""
    return flag.removesuffix("_path")


def identity(configuration: Mapping[str, Any], sha256: Mapping[str, str]) -> dict[str, Any]:
    """What the images of a run depend on, by flag name: its options and the SHA-256 of its checkpoints.

    Options of a guidance method that is off, files that one does not read, and options of a sampler that is not used,
    are no part of it. Raises UserError for a configuration that is none.
    """
    values = {name: value for name, value in configuration.items() if name not in IRRELEVANT}
    sample, = _read(configuration, SampleOptions)
    sampler, = _read(configuration, SAMPLERS[sample.sampler_name])
    files, beside = [MODEL_FLAG], list[str](own_sources(sampler))
    used = _flags(SampleOptions, ModelOptions, DiffusionOptions, type(sampler))
    for guidance in GUIDANCE:
        method, = _read(configuration, guidance)
        files += (read := method.files())
        beside += [*method.beside(), *(own_sources(method) if method.active else ())]
        used |= _flags(guidance) - (guidance.remedies.keys() - read.keys()) if method.active else set()
    unused = _flags(*SAMPLERS.values(), *GUIDANCE) - used
    values = {name: value for name, value in values.items() if name not in unused}
    later = _later_defaults()
    values = {name: value for name, value in values.items() if name not in later or value != later[name]}
    values |= sampler.settled(values.get("timestep_respacing") or "")
    values |= {"sampler": sample.sampler_name, **{name: sha256.get(name, sha256.get(_older(name))) for name in beside},
               **{flag: _content(sha256.get(name_of(flag)), configuration.get(flag)) for flag in files}}
    if is_file(str(values.get("labels"))):
        values["labels"] = ".npy"               # the labels are compared image by image
    return json.loads(json.dumps(values))


def own_sources(*options: Options) -> dict[str, str]:
    """The files of methods and samplers that are not of this library, by the names that run.json has for them.

    Images depend on their code, "source of MODULE:CLASS", and on that of the modules written with them and with a
    MODULE:FUNCTION, "source of MODULE". Without a file, as in a notebook, there is none: see `say_unrecorded`.
    """
    by_kind = {f"{kind.__module__}:{kind.__name__}": (kind, sources_of(kind.__module__)) for kind in _outside(options)}
    words = [path for one in options if isinstance(one, GuidanceOptions) for path in one.files().values()
             if is_function(path)]
    groups = [files for _, files in by_kind.values()]
    found = {f"{SOURCE}{next(iter(files))}:{kind.__name__}": str(next(iter(files.values())))
             for kind, files in by_kind.values() if files}
    groups += [dict(list(function_sources(word).items())[1:]) for word in words]        # its own is the option's file
    return {SOURCE + name: str(file) for files in groups for name, file in files.items()
            if str(file) not in found.values()} | found


def say_unrecorded(*options: Options) -> None:
    """Says, on the first rank, which methods and samplers have no file, so that a change of their code goes unseen."""
    names = [kind.__name__ for kind in _outside(options) if not sources_of(kind.__module__)]
    if names:
        dist_util.say(f"the code of {', '.join(names)} is in no file, so it is not recorded: after a change of it, "
                      "pass --overwrite True, or samples made before it are kept")


def _outside(options: Iterable[Options]) -> list[type]:
    """The classes of options that are not of this library, and those of their terms."""
    kinds = dict.fromkeys(kind for one in options for kind in (type(one), getattr(one, "term", type(one))))
    return [kind for kind in kinds if not is_ours(kind.__module__)]


def _older(name: str) -> str:
    """The name that older records have for a file: without the module of a class."""
    return SOURCE + name.removeprefix(SOURCE).rpartition(":")[2] if name.startswith(SOURCE) else name


def _content(sha256: str | None, path: Any) -> str | None:
    """What the file of an option holds, and which function of it is used where the option names one."""
    return f"{sha256}:{path.partition(':')[2]}" if isinstance(path, str) and is_function(path) else sha256


def _later_defaults() -> dict[str, Any]:
    """The defaults of options that older runs do not know."""
    classes: list[type[Options]] = [SampleOptions, *option_classes()]
    return {field.name: field.default for cls in classes for field in option_fields(cls) if field.metadata.get("later")}


def _flags(*classes: type[Options]) -> set[str]:
    return {field.name for cls in classes for field in option_fields(cls)}


def _read(configuration: Mapping[str, Any], kind: type[Options]) -> list[Any]:
    names = _flags(kind)
    return options_from({name: value for name, value in configuration.items() if name in names}, kind)


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """The first flag in which two identities differ, as "--seed", or whose code does.

    Code that the record of one does not know of, as older ones do not, is taken to be the same.
    """
    for name in {**one, **other}:
        of_code = name.startswith(SOURCE)
        if one.get(name) != other.get(name) and not (of_code and None in (one.get(name), other.get(name))):
            return f"the code of {name.removeprefix(SOURCE)}" if of_code else f"--{name}"
    return None


def made_by() -> dict[str, Any]:
    """Versions, command, ranks and device of this process."""
    return {
        "versions": {"guided_diffusion": __version__, "torch": torch.__version__, "numpy": np.__version__,
                     "python": platform.python_version()},
        "command": [without_secrets(word) for word in sys.argv],
        "ranks": dist_util.world_size(),
        "device": dist_util.device_name(),
    }


def recorded_command(record: Mapping[str, Any]) -> list[str]:
    """The words of the command line in a run.json, as it is called in a checkout; none where it holds none.

    A file that is no command of this library, as one of the user's own, stays where it lay.
    """
    words = record.get("command")
    if not isinstance(words, list) or not words:
        return []
    script, *arguments = [without_secrets(str(word)) for word in words]
    path = Path(script)
    if path.suffix != ".py":
        return [path.name, *arguments]
    return ["python", f"scripts/{path.name}" if os.path.isfile(command_file(path.stem)) else script, *arguments]


def read_record(path: Path) -> dict[str, Any]:
    """The content of a run.json; raises one of READ_ERRORS where it is none."""
    return checked_record(json.loads(path.read_text()))


def checked_record(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a run.json, whose chunks can be told; raises one of READ_ERRORS where it is none."""
    configuration = dict(content["configuration"])
    for name in SIZES:
        value = configuration[name]
        if type(value) is not int or not 1 <= value <= MOST_IMAGES:
            raise ValueError(f"its {name} is {shortened(value)}")
    return {**content, "configuration": configuration, "sha256": dict(content["sha256"])}


def recorded_dtype(folder: Path) -> str | None:
    """The type in which the network of the run in a folder computes, begun or finished; None where there is none."""
    for path in (folder / "shards" / "run.json", folder / "run.json"):
        try:
            return dtype_name(read_record(path)["configuration"])
        except READ_ERRORS:
            continue
    return None


def first_images(path: Path, count: int) -> np.ndarray:
    """The first images (N, H, W, 3) of a file, as many as --num_images says; a line says so where there are fewer."""
    file = BatchFile(path)
    if len(file) < count:
        dist_util.say(f"{path}: has {len(file)} images, and all are shown, as --num_images is {count}")
    return file.first(count)


def run_samples(folder: Path, count: int) -> tuple[np.ndarray, dict[str, Any]]:
    """`first_images` of a finished run, and its configuration; UserError where there is none."""
    try:
        file, configuration = _finished(folder)
        return first_images(file, count), configuration
    except READ_ERRORS as error:
        raise _unfinished(folder, error) from None


def samples_of(folder: Path) -> Path:
    """The file of samples of a finished run; UserError where there is none."""
    try:
        return _finished(folder)[0]
    except READ_ERRORS as error:
        raise _unfinished(folder, error) from None


class FinishedRun(NamedTuple):
    """A finished run. samples: its file of samples. title: its guidance and sampler in words, see `title`."""

    samples: Path
    configuration: dict[str, Any]
    title: str


def finished_run(folder: Path) -> FinishedRun:
    """The finished run in a folder, called as its record says. UserError where there is none."""
    try:
        return _finished_run(folder)
    except READ_ERRORS as error:
        raise _unfinished(folder, error) from None


def _finished_run(folder: Path) -> FinishedRun:
    """The same; raises one of READ_ERRORS where there is none."""
    path, configuration = _finished(folder)
    record = json.loads((folder / "run.json").read_text())
    words = record.get("title") or title(configuration, record.get("sha256") or ())
    return FinishedRun(path, configuration, str(words))


def _finished(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The file of samples and the configuration in a run.json; raises one of READ_ERRORS where it is none."""
    record = json.loads((folder / "run.json").read_text())
    name = record["samples"]
    if Path(name).name != name or len(name) > LONGEST_NAME:
        raise ValueError(f"its samples are in {shortened(name)}, which is no file of the folder")
    return folder / name, dict(record["configuration"])


def _unfinished(folder: Path, error: Exception) -> UserError:
    return UserError(f"{folder}: holds no finished sampling run ({reason(error)})")


def title(configuration: Mapping[str, Any], files: Iterable[str] = ()) -> str:
    """The guidance of a recorded run in words, and its sampler if that is not DDPM.

    Like "SAG s = 0.1 + CG scale 0.5", or "no guidance, DPM-Solver++(2M), 20 steps, time-uniform". A run that upsampled
    the images of another, which is still there, says that one's first: "SAG s = 0.1, upsampled by UniPC-2, 15 steps".
    files: what run.json has digests of, by its names; code among them that this process does not know is named.
    """
    methods = [method.title() for method in active_guidance(configuration)]
    if unknown := _unknown_code(files):
        methods.append(f"code unknown here ({', '.join(unknown)})")
    guidance = " + ".join(methods)
    sampler = "" if _sampler_name(configuration) == DEFAULT_SAMPLER else sampler_title(configuration)
    try:
        base = f"{_finished_run(Path(configuration['base_samples'])).title}, upsampled"
    except READ_ERRORS:                 # no such run
        return ", ".join(filter(None, (guidance or "no guidance", sampler)))
    own = ", ".join(filter(None, (guidance, sampler)))
    return f"{base} by {own}" if own else base


def _unknown_code(files: Iterable[str]) -> list[str]:
    """The names of methods, samplers and their terms from outside that this process has not registered."""
    kinds: list[type[Options]] = [*GUIDANCE, *SAMPLERS.values()]
    known = own_sources(*(kind() for kind in kinds if not is_ours(kind.__module__)))
    code = [name for name in files if name.startswith(SOURCE)]
    classes = [name for name in code if ":" in name] or [name for name in code if "." not in name]
    unknown = set(classes) - known.keys() - {_older(name) for name in known}
    return sorted({_older(name).removeprefix(SOURCE) for name in unknown})


def active_guidance(configuration: Mapping[str, Any]) -> list[GuidanceOptions]:
    """The options of the guidance methods that were on in a recorded run."""
    methods: Sequence[Any] = [_read(configuration, kind)[0] for kind in GUIDANCE]
    return [method for method in methods if method.active]


def sampler_title(configuration: Mapping[str, Any]) -> str:
    """The sampler of a recorded run in words, with its steps, like "DDPM, 250 steps"."""
    name = _sampler_name(configuration)
    if name not in SAMPLERS:
        return f"{name} (unknown here)"
    sampler, = _read(configuration, SAMPLERS[name])
    return str(sampler.headline(_num_steps(configuration, sampler)))


def num_steps(configuration: Mapping[str, Any]) -> int | None:
    """The steps of a recorded run; None where its sampler is not known here, or its record does not say."""
    if "diffusion_steps" not in configuration:
        steps = configuration.get("steps")              # of a pipeline
        return steps if isinstance(steps, int) else None
    name = _sampler_name(configuration)
    return _num_steps(configuration, _read(configuration, SAMPLERS[name])[0]) if name in SAMPLERS else None


def _num_steps(configuration: Mapping[str, Any], sampler: SamplerOptions) -> int:
    diffusion, = _read(configuration, DiffusionOptions)
    chain = space_timesteps(diffusion.diffusion_steps, sampler.respacing(diffusion.timestep_respacing)
                            or [diffusion.diffusion_steps])
    return int(sampler.num_steps(len(chain)))


def _sampler_name(configuration: Mapping[str, Any]) -> str:
    """The name of the sampler of a recorded run, which may be none of SAMPLERS."""
    name = configuration.get("sampler")
    if isinstance(name, str) and name and name not in SAMPLERS:
        return name
    sample, = _read(configuration, SampleOptions)
    return str(sample.sampler_name)
