"""A model as a folder of its own, in the layout of model hubs, which `--model FOLDER` reads.

    FOLDER/model.safetensors        the weights, whose metadata state the flags
    FOLDER/classifier.safetensors   those of the classifier that guides the model, where there is one
    FOLDER/config.json              kind, flags, and flags of guidance that suit the model
    FOLDER/README.md                the model card, kept by the next export where it was edited

The weights state all that the network needs; the other files are for readers, and for guidance. The layout "diffusers"
is that of a pipeline of diffusers in place of it, see `unet2d.files`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import checkpoint
from .build import DiffusionOptions
from .checkpoint import read_metadata
from .entries import check_weights
from .errors import UserError
from .facts import check_options
from .fetch import sha256_of, without_secrets
from .files import write_json, write_text
from .foreign import read_text, reading
from .jobs import job_folder
from .late import Tensor
from .model_folders import CONFIG, GUIDANCE_KEY, is_own
from .options import Options, entry_option, option, required
from .presets import MODELS, Preset, find_preset
from .stated import NETWORKS, statement_of
from .unet2d.files import PIPELINE_FILES, WEIGHTS, write_pipeline

_log = logging.getLogger(__name__)

COMMANDS = {"diffusion": "image_sample", "upsampler": "super_res_sample"}
CARD = """---
license: {tag}
library_name: {library}
tags: [{tags}]
pipeline_tag: {task}
---

# {name}

{begin} network of {parameters:,} parameters, for images of {size} pixels. {images}

{usage}

- licence: {licence}
- source: {source}
- SHA-256 of `{weights}`: {sha256}
{classifier}
## Flags

The metadata of `{weights}` state them, so that no command of guided_diffusion needs them.

{flags}

## Limits

{limits}
{attribution}"""
GUIDED = """- `{weights}`: a classifier of {classes} classes, by which `scripts/classifier_sample.py` guides
- SHA-256 of `{weights}`: {sha256}
"""
ATTRIBUTION = """
## Sources of the training images

```text
{text}```
"""
UNKNOWN = "Nothing is known here of how good its images are beyond what its source says."
ALWAYS = "A network repeats what its training images show, with their errors and omissions."
COMMAND = """```sh
python scripts/{command}.py --model {folder}{more}
```"""
PIPELINE = """```python
from diffusers import DDPMPipeline

images = DDPMPipeline.from_pretrained({folder!r})(batch_size=4).images
```"""
NETWORK = """```python
import torch
from diffusers import UNet2DModel

network = UNet2DModel.from_pretrained({folder!r}, subfolder="unet")
prediction = network(torch.randn(1, {channels}, {size}, {size}), 500, class_labels=torch.tensor([0])).sample
```"""
SIGNED = "\n<!-- SHA-256 of the lines above, as they were written: "
README = "README.md"
OWN_WEIGHTS, OWN_CLASSIFIER = "model.safetensors", "classifier.safetensors"
OWN_FILES = (CONFIG, OWN_WEIGHTS, OWN_CLASSIFIER)


@dataclass(frozen=True)
class ExportOptions(Options):
    """The model to export."""

    model: str = required("a model by name: a bundled one, the folder of a training, or a released checkpoint")
    model_path: str = option("", "file of a released checkpoint: a path, or an address")
    classifier_path: str = option("", "file of the classifier that guides the model; unset: that of a bundled model, "
                                  "or of a training, in its folder or in one beside it named like it, as "
                                  "RUN_classifier; of a released checkpoint none is exported")
    checkpoint_entry: str = entry_option()
    layout: str = option("hub", "hub: as --model FOLDER reads it; diffusers: a DDPMPipeline of diffusers with a "
                         "UNet2DModel", choices=("hub", "diffusers"), later=True)
    out: str = required("folder to write")
    licence: str = option("", "licence of a model of your own, as the card names it; unset: the card says that none "
                          "is stated")


@dataclass(frozen=True)
class Source:
    """A network to export: its kind, all its flags, its weights by name, and what its file states beside."""

    kind: str
    options: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    metadata: Mapping[str, str]

    @classmethod
    def read(cls, preset: Preset, path: str, entry: str = "") -> Source:
        """Raises UserError where the file cannot be read, or is no network of the preset's flags."""
        defaults = asdict(NETWORKS[preset.kind]()) | asdict(DiffusionOptions())
        weights = checkpoint.load_state_dict(path, entry=entry)
        check_weights(weights, path)
        stated = read_metadata(checkpoint.locate(path))
        with reading(path, "states no options of a network"):
            options = defaults | (json.loads(stated["config"]) if "config" in stated else preset.options)
        check_options({name: tuple(value.shape) for name, value in weights.items()}, options, path)
        return cls(preset.kind, options, weights, {**stated, "config": json.dumps(options)})

    def write(self, path: Path) -> None:
        """Writes the weights, which state the flags."""
        checkpoint.save_state(path, self.weights, self.metadata)


def export_model(options: ExportOptions) -> Path:
    """Writes the folder of a model; returns it. Raises UserError for a model or file that cannot be exported."""
    preset = find_preset(options.model)
    if preset.kind not in COMMANDS:
        raise UserError(f"--model {preset.name}: is a classifier, which is exported with the model that it guides")
    path = str(preset.path or options.model_path)
    if not path:
        raise UserError(f"--model_path is not given: name the file of {preset.name}, which "
                        f"`python scripts/fetch_models.py {preset.name}` fetches")
    if preset.path and options.model_path:
        raise UserError(f"--model_path {without_secrets(options.model_path)}: {preset.name} has its file already, "
                        "leave it out")
    source, found = Source.read(preset, path, options.checkpoint_entry), _classifier(preset, options)
    classifier = Source.read(*found) if found else None
    out = job_folder("export", options.out)
    if (out / CONFIG).exists() and not _is_export(out / CONFIG):
        raise UserError(f"--out {out}: is the folder of a training, name another")
    layered = options.layout == "diffusers"
    _check_left_over(out, layered, classifier is not None)
    _check_replaced(out, layered)
    if layered:
        return _export_pipeline(preset, source, options, out, classifier is not None)
    guidance = {flag: value for flag, value in preset.guidance.items() if not Path(str(value)).is_absolute()}
    write_json(out / CONFIG, {"library_name": "guided_diffusion", "kind": source.kind, "model": dict(source.options),
                              GUIDANCE_KEY: guidance})          # first: by it the next export knows this one
    source.write(out / OWN_WEIGHTS)
    if found and classifier:
        classifier.write(out / OWN_CLASSIFIER)
        _log.info("%s: is exported with the classifier %s", preset.name, without_secrets(found[1]))
    left = [f"--{flag}" for flag in preset.guidance if flag not in guidance]
    if left:
        _log.info("%s: its files of %s are not exported", preset.name, " and ".join(left))
    _write_card(out, _card(preset, source, options, classifier))
    return out


def _export_pipeline(preset: Preset, source: Source, options: ExportOptions, out: Path, guided: bool) -> Path:
    """Writes the model as diffusers lays pipelines out. Raises UserError for what diffusers has no like of."""
    what = f"--model {preset.name} --layout diffusers"
    if source.kind != "diffusion":
        raise UserError(f"{what}: is an upsampler, and pipelines of UNet2DModel see no low-resolution image")
    try:
        write_pipeline(out, source.weights, source.options, source.metadata)
    except UserError as error:
        raise UserError(f"{what}: {error}") from None
    if source.options["class_cond"]:
        _log.info("%s: the network takes classes, and DDPMPipeline gives none; UNet2DModel takes class_labels",
                  preset.name)
    if guided:
        _log.info("%s: its classifier is not exported, as diffusers has none", preset.name)
    _write_card(out, _card(preset, source, options))
    return out


def _check_left_over(out: Path, layered: bool, classifier: bool) -> None:
    """Raises UserError where a folder holds what readers would take for a part of the model, and is of another one."""
    written = PIPELINE_FILES if layered else OWN_FILES if classifier else OWN_FILES[:2]
    found = [name for name in (*OWN_FILES, *PIPELINE_FILES) if name not in written and (out / name).exists()]
    if found:
        raise UserError(f"--out {out}: holds {', '.join(found)} of another export, which this one does not write and "
                        "which would stand beside its model; remove that, or name another folder")


def _check_replaced(out: Path, layered: bool) -> None:
    """Raises UserError where a folder without an export holds files of the names that one has."""
    weights = out / "unet" / WEIGHTS
    exported = (weights.exists() and "config" in read_metadata(weights)) if layered else (out / CONFIG).exists()
    found = [name for name in (*(PIPELINE_FILES if layered else OWN_FILES), README) if (out / name).exists()]
    if found and not exported:
        raise UserError(f"--out {out}: holds {', '.join(found)}, which no export made and this one would replace; name "
                        "another folder")


def _write_card(out: Path, text: str) -> None:
    """Writes the model card, which ends in the checksum of its text, by which one that was edited is known and kept."""
    path = out / README
    if path.exists():
        before = read_text(path)
        if before != _signed(before.rpartition(SIGNED)[0]):
            _log.warning("%s: is kept, as it is not as an export writes it, and may describe what was here before; "
                         "remove it to have a new one", path)
            return
    write_text(path, _signed(text))


def _signed(text: str) -> str:
    return f"{text}{SIGNED}{hashlib.sha256(text.encode(errors='backslashreplace')).hexdigest()} -->\n"


def _is_export(config: Path) -> bool:
    try:
        return json.loads(config.read_text(encoding="utf-8")).get("library_name") == "guided_diffusion"
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def _classifier(preset: Preset, options: ExportOptions) -> tuple[Preset, str] | None:
    """The classifier that goes with the model, and its file: the one that was given, or else the model's own.

    One beside a training that is not named like it may be of other images: it is left out, which is said.
    """
    given = options.classifier_path
    if given and preset.path:
        return _stated_classifier(preset, given), given
    if preset.classifier is None:
        if given:
            raise UserError(f"--classifier_path {without_secrets(given)}: no classifier is known for {preset.name}")
        if preset.open_choice:
            _log.info("%s: %s", preset.name, preset.open_choice)
        return None
    found = find_preset(preset.classifier)
    if found.path and not preset.known and preset.path and not is_own(found.path, preset.path.parent):
        _log.info("%s: the classifier %s may be of other images, as it is not named like the model, and is not "
                  "exported; --classifier_path names one", preset.name, found.path)
        return None
    path = str(found.path or given)
    return (found, path) if path else None


def _stated_classifier(preset: Preset, path: str) -> Preset:
    """The classifier in a file. Raises UserError where it states none, or one of other images than the model's."""
    read_metadata(path)                     # says why a file cannot be read
    stated = statement_of(path, "classifier")
    if stated is None:
        raise UserError(f"--classifier_path {without_secrets(path)}: states no options of a classifier, as the files "
                        "of scripts/classifier_train.py do")
    stated.check_beside(preset.options)
    return Preset(path, stated.kind, stated.facts, {}, None, None)


def _bundled(preset: Preset) -> str:
    page = preset.about.get("page")
    return "bundled with this project" + (f"; {page} there says how it was trained and measured" if page else "")


def _card(preset: Preset, source: Source, options: ExportOptions, classifier: Source | None = None) -> str:
    own = preset.path is not None and preset.known
    licence = preset.licence or options.licence or "none is stated"
    sources = preset.about.get("attribution")
    sizes = source.options
    size = f"{sizes['small_size']} to {sizes['large_size']}" if source.kind == "upsampler" else sizes["image_size"]
    folder, layered = _name(options.out), options.layout == "diffusers"
    weights = f"unet/{WEIGHTS}" if layered else OWN_WEIGHTS
    return CARD.format(
        tag="mit" if licence.startswith("MIT") else "other", tags=", ".join(dict.fromkeys(("diffusion", source.kind))),
        begin="An upsampler" if source.kind == "upsampler" else f"A {source.kind}", name=_name(preset.name),
        task="image-to-image" if source.kind == "upsampler" else "unconditional-image-generation",
        parameters=sum(value.numel() for value in source.weights.values()), size=size,
        images=f"It was trained on {preset.data}." if preset.data else "Its training images are not stated.",
        library="diffusers" if layered else "guided_diffusion", usage=_usage(source, folder, layered), licence=licence,
        source=preset.url or (_bundled(preset) if own else "a training with this project"),
        weights=weights, sha256=sha256_of(Path(options.out) / weights),
        classifier="" if classifier is None else GUIDED.format(
            weights=OWN_CLASSIFIER, classes=classifier.options["num_classes"],
            sha256=sha256_of(Path(options.out) / OWN_CLASSIFIER)),
        limits=f"{preset.about.get('limits', UNKNOWN)} {ALWAYS}",
        attribution=ATTRIBUTION.format(text=(MODELS / sources).read_text(encoding="utf-8")) if sources else "",
        flags="\n".join(f"- `--{name} {value}`" for name, value in source.options.items() if value != ""))


def _name(folder: str) -> str:
    return Path(os.path.abspath(folder)).name           # "." has one as well


def _usage(source: Source, folder: str, layered: bool) -> str:
    """How the folder is used, as the card shows it."""
    if layered:
        return (NETWORK if source.options["class_cond"] else PIPELINE).format(
            folder=folder, channels=source.options["in_channels"], size=source.options["image_size"])
    return COMMAND.format(command=COMMANDS[source.kind], folder=shlex.quote(folder),
                          more=" --base_samples SAMPLES.npz" if source.kind == "upsampler" else "")
