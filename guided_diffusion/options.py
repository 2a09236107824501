"""Typed options: frozen dataclasses that are filled from a YAML file and the command line.

An options class states each field once, with its default, help and range; the command line, the YAML keys, the
help text and the checks all come from there. Values take precedence in this order: command line, `--config` file,
named preset, default.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import UserError

NOT_OPTIONS = "evaluation"      # section of a configuration that no option comes from: how its images are judged


def option(default: Any, help: str, *, choices: Sequence[Any] | None = None, minimum: float | None = None,
           above: float | None = None, maximum: float | None = None) -> Any:
    """A dataclass field with help text and the values it allows (`minimum` and `maximum` inclusive)."""
    limits = {"choices": choices, "minimum": minimum, "above": above, "maximum": maximum}
    return dataclasses.field(default=default, metadata={"help": help, **limits})


@dataclasses.dataclass(frozen=True)
class Options:
    """Base of all options classes: checks every field against its type and range when it is made."""

    def __post_init__(self) -> None:
        for field in option_fields(type(self)):
            object.__setattr__(self, field.name, checked(field, getattr(self, field.name)))


@dataclasses.dataclass(frozen=True)
class OptionField:
    """One option as the command line sees it."""

    name: str
    type: type
    optional: bool
    default: Any
    metadata: Any

    @property
    def help(self) -> str:
        return f"{self.metadata.get('help', '')} (default: {'unset' if self.default in (None, '') else self.default})"


def option_fields(cls: type) -> list[OptionField]:
    hints = typing.get_type_hints(cls)
    result = []
    for field in dataclasses.fields(cls):
        alternatives = [a for a in typing.get_args(hints[field.name]) if a is not type(None)]
        kind = alternatives[0] if alternatives else hints[field.name]
        result.append(OptionField(field.name, kind, bool(alternatives), field.default, field.metadata))
    return result


def checked(field: OptionField, value: Any) -> Any:
    """`value`, converted to the field's type; raises UserError naming the option where it is not allowed."""
    if field.optional and (value is None or value in ("", "None", "none")):
        return None
    value = _converted(field, value)
    limits = field.metadata
    shown = f"--{field.name} {value}"
    if limits.get("choices") is not None and value not in limits["choices"]:
        raise UserError(f"{shown}: must be one of {', '.join(map(str, limits['choices']))}")
    if limits.get("minimum") is not None and value < limits["minimum"]:
        raise UserError(f"{shown}: must be at least {limits['minimum']}")
    if limits.get("above") is not None and value <= limits["above"]:
        raise UserError(f"{shown}: must be greater than {limits['above']}")
    if limits.get("maximum") is not None and value > limits["maximum"]:
        raise UserError(f"{shown}: must be at most {limits['maximum']}")
    return value


_TRUE, _FALSE = {"true", "t", "yes", "y", "1"}, {"false", "f", "no", "n", "0"}


def parse_bool(text: Any) -> bool:
    """True or False from the spellings people use; raises ValueError for any other."""
    word = str(text).lower()
    if word in _TRUE | _FALSE:
        return word in _TRUE
    raise ValueError(f"{text!r} is neither True nor False")


def _converted(field: OptionField, value: Any) -> Any:
    expected = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}[field.type]
    refusal = UserError(f"--{field.name} {value!r}: must be {expected}")
    try:
        if field.type is bool:
            return parse_bool(value)
        if field.type is str:
            if value is None or isinstance(value, (dict, list)):
                raise refusal
            return str(value)
        if isinstance(value, bool):
            raise refusal
        number = field.type(value)
        if not math.isfinite(number) or (isinstance(value, float) and number != value):
            raise refusal
    except (TypeError, ValueError, OverflowError):
        raise refusal from None
    return number


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean X?)`, or the empty string where nothing is near."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {found[0]}?)" if found else ""


def read_yaml(path: str | Path, chain: Sequence[Path] = ()) -> dict[str, Any]:
    """The mapping in a YAML file. `include` names a file, relative to this one, whose values it starts from.

    The section NOT_OPTIONS of a file changes that of an included one key by key; every other value replaces it.
    chain: the files that include this one. Raises UserError where a file is missing, holds something else, or
    includes itself.
    """
    import yaml

    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        within = f" (included by {chain[-1]})" if chain else ""
        raise UserError(f"--config {path}: cannot be read ({error.strerror}){within}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: is not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: must hold option names and values, one a line")
    if not isinstance(content.get(NOT_OPTIONS, {}), dict):
        raise UserError(f"{NOT_OPTIONS} in {path}: must hold names and values")
    if "include" not in content:
        return content
    included = content.pop("include")
    if not isinstance(included, str):
        raise UserError(f"include in {path}: must be the name of one file")
    chain = (*chain, path)
    if (path.parent / included).resolve() in {file.resolve() for file in chain}:
        raise UserError(f"include {included} in {path}: goes round in a circle")
    values = read_yaml(path.parent / included, chain)
    section = {**values.get(NOT_OPTIONS, {}), **content.get(NOT_OPTIONS, {})}
    return {**values, **content, **({NOT_OPTIONS: section} if section else {})}


def parse_options(
    argv: Sequence[str] | None, *classes: type, description: str = "",
    preset: Callable[[dict[str, Any]], dict[str, Any]] | None = None, words: str = "",
    defaults: Mapping[str, Any] | None = None,
) -> list[Any]:
    """One instance of each options class from the command line and the `--config` file it may name.

    A name that several classes have is one option for all of them. `preset` receives what the user gave and
    returns values that go before the defaults. defaults: those of a command, in place of the classes' own. `words` is
    the help of what is given without a name, such as files:
    with it, the list of these words comes last. Raises UserError for an unknown name or a value not allowed.
    """
    fields = {field.name: field for cls in reversed(classes) for field in option_fields(cls)}
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE", help="YAML file whose keys are the options below")
    for cls in classes:
        group = parser.add_argument_group(cls.__doc__.splitlines()[0].rstrip("."))
        for field in option_fields(cls):
            if f"--{field.name}" in parser._option_string_actions:
                continue
            bare = {"nargs": "?", "const": "True"} if field.type is bool else {}
            group.add_argument(f"--{field.name}", metavar=field.type.__name__.upper(), default=argparse.SUPPRESS,
                               help=_with_default(field, defaults).help.replace("%", "%%"), **bare)
    parser.error = _refuse
    if words:
        parser.add_argument("words", nargs="*", metavar="FILE", help=words)
    parse = parser.parse_known_intermixed_args if words else parser.parse_known_args
    known, unknown = parse(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        raise UserError(f"{name}: no such option{nearest(name, [f'--{n}' for n in fields])}")
    flags = vars(known)
    config, files = flags.pop("config"), flags.pop("words", None)
    given = {**(read_yaml(config) if config else {}), **flags}
    given.pop(NOT_OPTIONS, None)
    parsed = fill(given, classes, preset, source=str(config), defaults=defaults)
    return [*parsed, files] if words else parsed


def _with_default(field: OptionField, defaults: Mapping[str, Any] | None) -> OptionField:
    return dataclasses.replace(field, default=(defaults or {}).get(field.name, field.default))


def fill(given: dict[str, Any], classes: Sequence[type], preset: Callable[[dict[str, Any]], dict[str, Any]] | None,
         source: str, defaults: Mapping[str, Any] | None = None) -> list[Any]:
    """One instance of each options class from values by name; `preset` and `defaults` as in `parse_options`.

    Raises UserError for a name that none of the classes has, and for a value that is not allowed; source: the file
    that the message names.
    """
    fields = {field.name: field for cls in reversed(classes) for field in option_fields(cls)}
    for name in given:
        if name not in fields:
            raise UserError(f"{name} in {source}: no such option{nearest(str(name), fields)}")
    given = {name: checked(fields[name], value) for name, value in given.items()}
    values = {**(defaults or {}), **(preset(given) if preset else {}), **given}
    return [cls(**{f.name: values[f.name] for f in option_fields(cls) if f.name in values}) for cls in classes]


def options_from(flags: Mapping[str, Any], *classes: type) -> list[Any]:
    """An instance of each options class from flags; raises UserError for a flag that none of them has."""
    names = {field.name for cls in classes for field in option_fields(cls)}
    for name in flags:
        if name not in names:
            raise UserError(f"{name}: no such flag{nearest(name, names)}")
    return [cls(**{f.name: flags[f.name] for f in option_fields(cls) if f.name in flags}) for cls in classes]


def _refuse(message: str) -> None:
    raise UserError(message)
