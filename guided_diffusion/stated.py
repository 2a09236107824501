"""What a checkpoint states of itself in its metadata: the options that it was trained with, and those given with it.

Training stores its options as JSON under "config". They are the defaults wherever the file is used, and a flag that
says something else is refused: such a network would give images, and they would be wrong. A file of `torch.save`
states nothing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .build import (
    ClassifierOptions,
    DiffusionOptions,
    ModelOptions,
    UpsamplerOptions,
    kind_of,
    map_sizes,
    parse_channel_mult,
    parse_resolutions,
)
from .checkpoint import locate, read_metadata
from .errors import UserError
from .fetch import is_address, without_secrets
from .launchers import is_main
from .options import Options, checked, option_fields, options_from
from .shapes import CHANNEL_MULT, UPSAMPLER_CHANNEL_MULT

# How a network is run, trained or sampled: options that are no facts about weights.
FREE = ("use_fp16", "use_bf16", "use_checkpoint", "classifier_use_fp16", "dropout", "timestep_respacing", "use_kl",
        "rescale_learned_sigmas")
CHOICES = ("sigma_small",)          # stated ones are defaults, others do no harm
# The noise that a network knows images to have.
PROCESS = ("diffusion_steps", "noise_schedule", "rescale_timesteps")
PREDICTIONS = ("predict_xstart", "predict_v")
# How weights are read; their shapes do not show it.
UNSEEN = ("num_heads", "num_head_channels", "num_heads_upsample", "use_new_attention_order",
          "classifier_num_head_channels")
NOISED = "noised"                   # in the metadata of a classifier, beside its options, as it is none of the network
NETWORKS: dict[str, type[Options]] = {"diffusion": ModelOptions, "upsampler": UpsamplerOptions,
                                      "classifier": ClassifierOptions}

AnyOptions = TypeVar("AnyOptions", bound=Options)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Statement:
    """What the file `path` states. facts: the options by flag name, without those that may differ.

    noised: whether a classifier was trained on noised images; None where that is not stated, as in older files.
    """

    path: str
    kind: str
    facts: dict[str, Any]
    noised: bool | None = None

    def options(self, kind: type[AnyOptions]) -> AnyOptions:
        """The options of a class as the file states them, and defaults for the others."""
        names = {field.name for field in option_fields(kind)}
        options, = options_from({name: value for name, value in self.facts.items() if name in names}, kind)
        return options

    def check(self, given: Mapping[str, Any]) -> None:
        """Raises UserError where flags that were given contradict it: one sentence with both values of each."""
        before, after = _comparable(self.facts), _comparable({**self.facts, **given})
        wrong = [name for name in self.facts
                 if name in given and name not in CHOICES and before.get(name) != after.get(name)
                 and given[name] != self.facts[name]]
        if not wrong:
            return
        flags = " ".join(f"--{name} {_shown(given[name])}" for name in wrong)
        stated = ", ".join(f"{name} {_shown(self.facts[name])}" for name in wrong)
        right = " ".join(f"--{name} {_shown(self.facts[name])}" for name in wrong)
        raise UserError(f"{flags}: {self.path} states {stated} of itself, pass {right} or leave "
                        f"{'it' if len(wrong) == 1 else 'them'} out")

    def say(self, given: Mapping[str, Any]) -> None:
        """Logs what is taken from the file, in one line: facts that no flag gave and that are no defaults."""
        defaults = {field.name: field.default for cls in (NETWORKS[self.kind], DiffusionOptions)
                    for field in option_fields(cls)}
        taken = [f"{name} {_shown(value)}" for name, value in self.facts.items()
                 if name not in given and value != defaults[name]]
        if taken:
            _log.info("%s: trained with %s", self.path, ", ".join(taken))

    def check_beside(self, values: Mapping[str, Any]) -> None:
        """Raises UserError where a classifier was trained for other images or noise than the network that it guides.

        One of clean images guides by another option, which the error names.
        values: the options of that network and its process by flag name; defaults may be missing.
        """
        if self.noised is False:
            raise UserError(f"--classifier_path {self.path}: must be a classifier of noised images, and states that it "
                            "was trained on clean ones (noised False); --clean_classifier_path takes it")
        defaults = {field.name: field.default for cls in (ModelOptions, DiffusionOptions)
                    for field in option_fields(cls)}
        for name in ("image_size", "in_channels", *PROCESS, *(["num_classes"] if values.get("class_cond") else [])):
            other = values.get(name, defaults[name])
            if self.facts.get(name, other) != other:
                raise UserError(f"--classifier_path {self.path}: states {name} {self.facts[name]} of itself, and the "
                                f"diffusion network that it is to guide has {name} {other}")


def statement_of(path: str | Path, kind: str) -> Statement | None:
    """What a file states, if it states a network of that kind ("diffusion", "upsampler" or "classifier") at all.

    None where there is no such file, or none that can be read: whoever loads it says so. A file at an address is
    fetched if its name ends in .safetensors. Raises UserError for values that are not allowed.
    """
    if not path or (is_address(path) and not str(path).partition("#")[0].partition("?")[0].endswith(".safetensors")):
        return None
    try:
        metadata = read_metadata(locate(path))
        config = json.loads(metadata["config"])
    except (UserError, KeyError, ValueError, RecursionError):
        return None
    if not isinstance(config, dict) or kind_of(config) != kind:
        return None
    shown = without_secrets(str(path))
    fields = {field.name: field for cls in (NETWORKS[kind], DiffusionOptions) for field in option_fields(cls)}
    if kind == "classifier":
        fields = {name: field for name, field in fields.items() if field.name in _classifier_facts()}
    try:
        facts = {name: checked(field, config[name]) for name, field in fields.items()
                 if name in config and name not in FREE}
    except UserError as error:
        raise UserError(f"{shown}: states options that are not allowed ({error})") from None
    noised = {"true": True, "false": False}.get(metadata.get(NOISED, ""))
    return Statement(shown, kind, _effective(facts), noised) if facts else None


def network_statement(path: str | Path) -> Statement | None:
    """What the file of a diffusion network or an upsampler states, of whichever kind it is; see `statement_of`."""
    return next((stated for kind in ("diffusion", "upsampler") if (stated := statement_of(path, kind)) is not None),
                None)


def starting_flag(given: Mapping[str, Any]) -> str:
    """The option that names the file a training starts from, of those that the user gave, by flag name."""
    return "init_from" if given.get("init_from") else "resume_checkpoint"


def starting_values(given: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """What the file that a training starts from states of itself, as defaults of the training's options.

    given: what the user gave, by flag name. kind: of the network, a key of NETWORKS. Other values may be given, as
    training makes another network of these weights; another process is said. Raises UserError for those in which the
    weights would be read otherwise than they were trained.
    """
    flag = starting_flag(given)
    stated = statement_of(given.get(flag, ""), kind)
    if stated is None:
        return {}
    stated.check({name: value for name, value in given.items() if name in UNSEEN})
    if not is_main():
        return stated.facts
    stated.say(given)
    new = [name for name in (*PROCESS, *PREDICTIONS) if name in given and given[name] != stated.facts.get(name)]
    if new:
        _log.info("--%s %s: was trained with %s; this training has %s", flag, stated.path,
                  ", ".join(f"{name} {stated.facts.get(name)}" for name in new),
                  ", ".join(f"{name} {given[name]}" for name in new))
    return stated.facts


def _classifier_facts() -> set[str]:
    return {field.name for field in option_fields(ClassifierOptions)} | set(PROCESS)


def _effective(facts: dict[str, Any]) -> dict[str, Any]:
    """Without classes that the network does not have, and attention at sizes that none of its feature maps has."""
    facts = dict(facts)
    if facts.get("class_cond") is False:
        facts.pop("num_classes", None)
    for name in ("attention_resolutions", "classifier_attention_resolutions"):
        resolutions, there = parse_resolutions(facts.get(name, "")), _maps(facts)
        if there and not set(resolutions) <= set(there):
            facts[name] = ",".join(str(size) for size in resolutions if size in there)
    return facts


def _maps(facts: Mapping[str, Any]) -> list[int]:
    """The sizes of the feature maps; none where that is not known."""
    size = facts.get("large_size", facts.get("image_size", 0))
    text = facts.get("channel_mult") or facts.get("classifier_channel_mult") or _usual_channel_mult(facts)
    return map_sizes(size, len(parse_channel_mult(text)) if text else 0)


def _usual_channel_mult(facts: Mapping[str, Any]) -> str:
    """The multiples of the base channels where none are given; "" where there is no usual choice."""
    if "large_size" in facts:
        return UPSAMPLER_CHANNEL_MULT.get(facts["large_size"], "")
    return CHANNEL_MULT.get(facts.get("image_size", 0), "")


def _comparable(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Values that are equal where the network is: defaults by image size written out, and no heads that do nothing."""
    result = dict(facts)
    default = _usual_channel_mult(facts)
    for prefix in ("", "classifier_"):
        name = f"{prefix}channel_mult"
        if name in facts:
            result[name] = parse_channel_mult(facts[name] or default) if facts[name] or default else ()
        name = f"{prefix}attention_resolutions"
        if name in facts:
            result[name] = set(parse_resolutions(facts[name])) & {0, *_maps(facts)}
    if facts.get("num_head_channels", -1) != -1:
        result |= {"num_heads": None, "num_heads_upsample": None}
    elif facts.get("num_heads_upsample") == -1:
        result["num_heads_upsample"] = facts.get("num_heads")
    return result


def _shown(value: Any) -> str:
    return repr(value) if value == "" else str(value)
