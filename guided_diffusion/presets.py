"""Models known by name: those that are bundled, and the released checkpoints, which are fetched."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from . import checkpoint
from .build import DiffusionOptions, kind_of
from .checkpoint import read_metadata
from .errors import UserError
from .fetch import Download, sha256_of, size_of, without_secrets
from .launchers import is_main
from .model_folders import SUFFIX, best_weights, classifiers_beside, guidance_in
from .options import nearest, option_fields
from .progress import in_bytes
from .stated import NETWORKS, statement_of

MODELS = Path(__file__).parent / "models"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preset:
    """A model known by name: one that is bundled, a released checkpoint, or the folder of a training."""

    name: str
    kind: str                       # "diffusion", "upsampler" or "classifier"
    options: dict[str, Any]         # flags that differ from the defaults
    guidance: dict[str, Any]        # flags of guidance methods that suit it, without their scales
    path: Path | None               # its file; None for a released checkpoint, which the user has to name
    classifier: str | None          # name of the classifier that guides it
    url: str | None = None          # where a released checkpoint lies
    parameters: int | None = None   # numbers in a released checkpoint
    licence: str | None = None      # of a released or bundled model, and where to read it
    data: str = ""                  # the images that a released or bundled model was trained on
    implied: bool = False           # the name of a released checkpoint's file stands for its flags
    about: dict[str, str] = field(default_factory=dict)     # of a bundled model: page, limits, attribution
    sampling: dict[str, Any] = field(default_factory=dict)      # flags of the sampler that suits it, if any
    open_choice: str = ""           # why a training's folder brings no classifier, where several fit

    @property
    def known(self) -> bool:
        """Whether the name is one of `preset_names`, and not a place of one's own."""
        return self.url is not None or self.path is None or is_bundled(self.path)


def preset_names() -> list[str]:
    """Every name that `find_preset` knows: bundled models first."""
    return bundled_names() + released_names()


def bundled_names() -> list[str]:
    """The names of the bundled models."""
    return [path.stem for path in sorted(MODELS.glob("*.safetensors"))]


def released_names() -> list[str]:
    """The names of the released checkpoints."""
    return list(_presets()["presets"])


def is_bundled(path: str | Path) -> bool:
    """Whether a file is one of the bundled models."""
    return Path(path).absolute().parent == MODELS.absolute()


def find_preset(name: str) -> Preset:
    """The model of that name, or in that folder of a training; raises UserError that lists the names there are.

    A bundled model is a file NAME.safetensors in the package folder models/, its options in the metadata as JSON
    under "config"; its classifier, where there is one, is the model NAME_classifier. presets.yaml says which flags of
    guidance suit it.
    """
    names = preset_names()
    if name not in names and os.path.exists(name):
        return _trained(Path(name))
    if name not in names and os.path.dirname(name):
        raise UserError(f"--model {name}: there is no such folder or file{nearest(name, _beside(Path(name)))}")
    if name not in names:
        raise UserError(f"--model {name}: no such model{nearest(name, names)}, there are {', '.join(names)}")
    known = _presets()
    files = {flag: str(MODELS / file) for flag, file in known.get("files", {}).get(name, {}).items()}
    guidance = {**known.get("guidance", {}).get(name, {}), **files}
    path = MODELS / f"{name}.safetensors"
    if path.is_file():
        classifier = f"{name}_classifier"
        options = _config_of(path)
        groups = known.get("bundled", {})
        about = dict(groups.get(max(filter(name.startswith, groups), key=len, default=""), {}))
        return Preset(name, kind_of(options), options, guidance, path, classifier if classifier in names else None,
                      licence=about.pop("licence", None), data=about.pop("data", ""), about=about,
                      sampling=known.get("sampling", {}).get(name, {}))
    usual = {"classifier": None, "data": known.get("data", ""), "url": known["url"], "licence": known["licence"]}
    released = {**usual, **known["presets"][name]}
    return Preset(name=name, path=None, guidance=guidance, **{**released, "url": f"{released['url']}{name}.pt"})


def implied_preset(path: str, kind: str) -> Preset | None:
    """The released checkpoint whose flags the name of a file stands for; None where it stands for none.

    That is so for checkpoints of improved-diffusion: its command lines leave out flags that have other defaults here.
    path: of the file, or its address. kind: of the network, "diffusion" or "upsampler".
    """
    stem = Path(path.partition("?")[0]).stem if path else ""
    entry = _presets()["presets"].get(stem, {})
    return find_preset(stem) if entry.get("implied") and entry["kind"] == kind else None


def implied_values(flag: str, given: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The flags that the name of the file given as --FLAG stands for, see `implied_preset`; none where that is none.

    given: by the user, by flag name. Says which of them are taken: those that no one gave, of other values than the
    defaults.
    """
    preset = implied_preset(given.get(flag, ""), kind)
    if preset is None:
        return {}
    defaults = {field.name: field.default for cls in (NETWORKS[kind], DiffusionOptions) for field in option_fields(cls)}
    taken = [f"--{name} {value}" for name, value in preset.options.items()
             if name not in given and value != defaults[name]]
    if taken and is_main():
        _log.info("--%s %s: is taken for the released %s, with %s", flag, without_secrets(given[flag]), preset.name,
                  " ".join(taken))
    return dict(preset.options)


def _config_of(path: Path) -> dict[str, Any]:
    metadata = read_metadata(path)
    try:
        return dict(json.loads(metadata["config"]))
    except (KeyError, TypeError, ValueError, RecursionError):
        raise UserError(f"{path}: its metadata has no config, the options of the network in JSON") from None


def _trained(place: Path) -> Preset:
    """The model of a training or an export: its folder, or a file of weights from it."""
    path = best_weights(place) if place.is_dir() else place
    if "config" not in read_metadata(path):
        raise UserError(f"--model {place}: {path.name} has no config in its metadata, the options of its network; pass "
                        "the file as --model_path, and its options as flags")
    kind = kind_of(_config_of(path))
    stated = statement_of(path, kind)
    beside = [str(found) for found in classifiers_beside(stated, path.parent)] if stated and kind == "diffusion" else []
    open_choice = (f"several classifiers fit, {', '.join(beside)}; none is taken unless --classifier_path names it"
                   if len(beside) > 1 else "")
    return Preset(str(place), kind, stated.facts if stated else {}, guidance_in(place) if place.is_dir() else {}, path,
                  beside[0] if len(beside) == 1 else None, open_choice=open_choice)


def _beside(place: Path) -> list[str]:
    """The folders and files of weights in the folder of a place, by paths like its own."""
    try:
        return sorted(str(path) for path in place.parent.iterdir() if path.is_dir() or path.suffix == SUFFIX)
    except OSError:
        return []


def _presets() -> dict[str, Any]:
    return _read_presets(MODELS / "presets.yaml")


@cache
def _read_presets(path: Path) -> dict[str, Any]:
    import yaml  # here, as networks and samplers run without this package

    return yaml.safe_load(path.read_text())


# Released checkpoints


def find_released(names: Sequence[str], every: bool = False) -> list[Preset]:
    """The released checkpoints of these names, or every one there is. Raises UserError for a name that is none."""
    known = released_names()
    if not (names or every):
        raise UserError(f"no NAME is given: name a checkpoint, there are {', '.join(known)}")
    for name in names:
        if name in preset_names() and name not in known:
            raise UserError(f"{name}: is bundled, there is nothing to fetch: pass --model {name}")
        if name not in known:
            raise UserError(f"{name}: is no released checkpoint{nearest(name, known)}, there are {', '.join(known)}")
    return [find_preset(name) for name in dict.fromkeys(names or known)]


def description(preset: Preset, ask: bool = True) -> str:
    """What is to know of a released checkpoint before it is fetched, in lines; `ask` the server for its size."""
    size = size_of(_url(preset)) if ask else None
    about = f"about {in_bytes(4 * (preset.parameters or 0))}"          # of float32, and next to nothing else
    guide = f", guided by {preset.classifier}" if preset.classifier else ""
    return (f"{preset.name}: {preset.kind}, {preset.parameters:,} parameters{guide}\n"
            f"    address: {preset.url}\n"
            f"    licence: {preset.licence}\n"
            f"    size:    {f'{size:,} bytes ({in_bytes(size)})' if size else about}")


def fetch_released(preset: Preset, folder: Path, sha256: str | None = None) -> str:
    """Has a released checkpoint in `folder`, as NAME.pt, and says so with its SHA-256; shows progress on stderr.

    Raises UserError where it cannot be had, or where another file has its name.
    """

    def misfit(path: Path) -> str | None:
        try:
            count = sum(value.numel() for value in checkpoint.load_state_dict(path).values())
        except UserError as error:
            return str(error).removeprefix(f"{path}: ")
        return f"holds {count:,} numbers instead of {preset.parameters:,}" if count != preset.parameters else None

    target = folder / f"{preset.name}.pt"
    done = "is there already" if target.exists() else "fetched"
    Download(_url(preset), target, sha256=sha256, check=misfit).run()
    return f"{target}: {done}, {target.stat().st_size:,} bytes, SHA-256 {sha256_of(target)}"


def _url(preset: Preset) -> str:
    if preset.url is None:
        raise UserError(f"{preset.name}: is bundled, there is nothing to fetch")
    return preset.url
