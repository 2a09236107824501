"""Typed options: frozen dataclasses that are filled from a YAML file and the command line.

An options class states each field once, with its default, help and range; the command line, the YAML keys, the
help text and the checks all come from there. Values take precedence in this order: command line, `--config` file,
named preset, default of the command, default of the class.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import logging
import math
import os
import re
import reprlib
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from .errors import UserError
from .places import find_configuration

LARGEST_BATCH = 10**6
MOST = 10**10                       # of whatever is counted, where an option states no other limit
LONGEST_NUMBER = 18                 # digits of a number in a list; Python reads no number of thousands of digits
MAX_SEED = 2**64 - 1                # the largest seed whose random numbers are no other seed's
WATCHED = "watched"                 # of a training's config.json: options that do not change the training
EVALUATION_SECTION = "evaluation"   # of a configuration: how its images are evaluated, which only tables read

EXPECTED: Mapping[type, str] = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}

_log = logging.getLogger(__name__)

Preset = Callable[[dict[str, Any]], dict[str, Any]]     # from what the user gave to values that a name stands for


def option(default: Any, help: str, *, choices: Collection[Any] | None = None, minimum: float | None = None,
           above: float | None = None, maximum: float | None = None, later: bool = False,
           old_names: Sequence[str] = (), infinity: float | None = None) -> Any:
    """A dataclass field with help text and the values it allows (`minimum` and `maximum` inclusive).

    choices: what is allowed beside the default; one that grows, such as that of samplers, counts as it is then.
    later: the option came after the first records of runs: at its default it is no part of what a run is.
    old_names: what it was called before, which command lines and configurations may go on saying. infinity: the number
    that is meant where inf is given; None: inf is refused.
    """
    limits = {"choices": choices, "minimum": minimum, "above": above, "maximum": maximum, "infinity": infinity}
    return dataclasses.field(default=default, metadata={"help": help, "later": later, "old_names": old_names, **limits})


def entry_option() -> Any:
    """The option that chooses one of several networks in the file --model_path, "" by default."""
    return option("", "entry of --model_path, of a file that wraps several, like ema or model; unset: the moving "
                  "average, if it has one", later=True)


def seed_option(help: str, default: int = 0) -> Any:
    """A dataclass field of a seed, from 0 to `MAX_SEED`: random numbers differ between any two of these."""
    return option(default, help, minimum=0, maximum=MAX_SEED)


def batch_option(default: Any, help: str, minimum: int = 1) -> Any:
    """A dataclass field of a number of images at a time."""
    return option(default, help, minimum=minimum, maximum=LARGEST_BATCH)


def switch(help: str) -> Any:
    """A dataclass field that is False unless `--name` is given, which takes no value: the next word is another one."""
    return dataclasses.field(default=False, metadata={"help": help, "switch": True})


def required(help: str) -> Any:
    """A dataclass field of text that the command line or the `--config` file must give."""
    return dataclasses.field(default="", metadata={"help": f"{help}; must be given", "required": True})


@dataclasses.dataclass(frozen=True)
class Options:
    """Base of all options classes: checks every field against its type and range when it is made."""

    def __post_init__(self) -> None:
        for field in option_fields(type(self)):
            object.__setattr__(self, field.name, checked(field, getattr(self, field.name)))

    @classmethod
    def check_class(cls, beside: Sequence[type]) -> None:
        """Raises UserError where the class is not whole, or does not go with others; beside: all of a command."""
        if "__dataclass_fields__" not in vars(cls):
            raise UserError(f"{cls.__name__}: its options are not seen, write @dataclass(frozen=True) above the class")


def check_stated(cls: type, base: type, *names: str) -> None:
    """Raises UserError where a class is without attributes or methods that those below `base` must state."""
    if lacking := [name for name in names if getattr(cls, name, None) is getattr(base, name, None)]:
        raise UserError(f"{cls.__name__}: states no {' and no '.join(lacking)}, which a class below {base.__name__} "
                        "must have")


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
        """What the option means, and its default."""
        return f"{self.metadata.get('help', '')} (default: {'unset' if self.default in (None, '') else self.default})"


def option_fields(cls: type) -> tuple[OptionField, ...]:
    """The options of a class, in the order in which it states them.

    Raises UserError for a field that is of another type than those of options, or has no default.
    """
    return _read_fields(cls)


@functools.cache
def _read_fields(cls: Any) -> tuple[OptionField, ...]:
    """What `option_fields` returns; reading the types takes long. Any: mypy holds frozen dataclasses for no keys."""
    hints = typing.get_type_hints(cls)
    result = []
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)] if union else [hint]
        if len(kinds) != 1 or kinds[0] not in EXPECTED:
            shown = hint.__name__ if isinstance(hint, type) else hint
            raise UserError(f"{cls.__name__}.{field.name}: an option of the type {shown}, must be bool, int, float or "
                            "str, or one of them | None; a list is comma-separated text")
        if field.default is dataclasses.MISSING:
            raise UserError(f"{cls.__name__}.{field.name}: an option without a default, must be option(default, help)")
        result.append(OptionField(field.name, kinds[0], union, field.default, field.metadata))
    return tuple(result)


def checked(field: OptionField, value: Any) -> Any:
    """`value`, converted to the field's type; raises UserError naming the option where it is not allowed."""
    if field.optional and (value is None or value in ("", "None", "none")):
        return None
    value = _converted(field, value)
    limits = field.metadata
    shown = f"--{field.name} {value if not isinstance(value, str) else cut(value)}"
    if limits.get("choices") is not None and value != field.default and value not in limits["choices"]:
        raise UserError(f"{shown}: must be one of {', '.join(map(str, limits['choices']))}")
    if limits.get("minimum") is not None and value < limits["minimum"]:
        raise UserError(f"{shown}: must be at least {limits['minimum']}")
    if limits.get("above") is not None and value <= limits["above"]:
        raise UserError(f"{shown}: must be greater than {limits['above']}")
    most = MOST if field.type is int and limits.get("maximum") is None else limits.get("maximum")
    if most is not None and value > most:
        raise UserError(f"{shown}: must be at most {most}")
    return value


def comma_separated(text: str) -> list[str]:
    """The words between the commas, without empty ones."""
    return [word.strip() for word in text.split(",") if word.strip()]


def whole_number(text: str) -> int | None:
    """The number from 0 up that some digits say; None for anything else, and for more than LONGEST_NUMBER digits."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= LONGEST_NUMBER else None


def image_numbers(text: str, most: int) -> list[int]:
    """The different numbers, rising, that an option --images names, like 0:8 (0 to 7) or 3,5,12.

    Raises UserError for anything but one to `most` numbers from 0 to below MOST.
    """
    refusal = UserError(f"--images {cut(text)}: must be a range of numbers from 0 to {MOST - 1}, like 0:8, or a "
                        f"list of them, like 3,5,12, of at most {most}")
    numbers: set[int] = set()
    for part in comma_separated(text):
        first, colon, last = part.partition(":")
        start = whole_number(first)
        end = whole_number(last) if colon else start
        if start is None or end is None:
            raise refusal
        span = range(start, end if colon else end + 1)
        if not 0 < len(span) <= most or span[-1] >= MOST:
            raise refusal
        numbers |= set(span)
    if not 0 < len(numbers) <= most:
        raise refusal
    return sorted(numbers)


_TRUE, _FALSE = {"true", "t", "yes", "y", "on", "1"}, {"false", "f", "no", "n", "off", "0"}


def parse_bool(text: Any) -> bool:
    """True or False from the spellings people use; raises ValueError for any other."""
    word = str(text).lower()
    if word in _TRUE | _FALSE:
        return word in _TRUE
    raise ValueError(f"{text!r} is neither True nor False")


def _converted(field: OptionField, value: Any) -> Any:
    refusal = UserError(f"--{field.name} {shortened(value)}: must be {EXPECTED[field.type]}")
    try:
        if field.type is bool:
            return parse_bool(value)
        if field.type is str:
            if isinstance(value, bool) or not isinstance(value, (str, int, float, os.PathLike)):
                raise refusal           # such as `out: true` of a YAML file, which may be no name of a folder
            return _checked_text(field, str(value))
        if isinstance(value, bool):
            raise refusal
        number = field.type(value)
        if number == math.inf and field.metadata.get("infinity") is not None:
            return field.metadata["infinity"]
        if not math.isfinite(number) or (isinstance(value, float) and number != value):
            raise refusal
    except UserError:
        raise
    except (TypeError, ValueError, OverflowError):
        raise refusal from None
    return number


def _checked_text(field: OptionField, text: str) -> str:
    """The text, where the operating system could take it for the name of a file; "~/" is what it is to a shell."""
    try:
        if b"\0" not in os.fsencode(text):
            return os.path.expanduser(text) if text.startswith("~/") else text
    except UnicodeEncodeError:
        pass
    raise UserError(f"--{field.name} {shortened(text)}: must be text without NUL and without half characters")


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = 500


def shortened(value: object) -> str:
    """`repr(value)`, with an ellipsis in place of what is too long or too deep for a message."""
    try:
        return _REPR.repr(value)
    except ValueError:          # a number of too many digits for Python to write
        return "a number of thousands of digits"


def cut(text: str) -> str:
    """`text`, with an ellipsis in place of what is too long for a message."""
    return text if len(text) <= 200 else f"{text[:100]}...{text[-50:]}"


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean X?)`, or the empty string where nothing is near."""
    found = difflib.get_close_matches(name[:100], list(known), n=1, cutoff=0.5)
    return f" (did you mean {found[0]}?)" if found else ""


def check_numbers(values: Mapping[str, Any], what: str, where: str) -> None:
    """Raises UserError for a value of a file that is no finite number; what, where: around its name, in words."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f"{what} {name}: {value} {where}: must be a number")


def read_yaml(path: str | Path, chain: Sequence[Path] = (), flag: str = "--config") -> dict[str, Any]:
    """The mapping in a YAML file. `include` names a file, relative to this one, whose values it starts from.

    The section EVALUATION_SECTION of a file changes that of an included one key by key; every other value replaces it.
    chain: the files that include this one. flag: the option that named the first of them. Raises UserError where a file
    is missing, holds something else, or includes itself.
    """
    from .config_files import read_mapping  # here, as help and command lines need no YAML

    path = Path(path)
    content = read_mapping(path, f" (included by {chain[-1]})" if chain else "", flag)
    if not isinstance(content.get(EVALUATION_SECTION, {}), dict):
        raise UserError(f"{EVALUATION_SECTION} in {path}: must hold names and values")
    if "include" not in content:
        return content
    included = content.pop("include")
    if not isinstance(included, str):
        raise UserError(f"include in {path}: must be the name of one file")
    chain = (*chain, path)
    try:
        circle = (path.parent / included).resolve() in {file.resolve() for file in chain}
    except (OSError, ValueError, RuntimeError):
        raise UserError(f"include {shortened(included)} in {path}: is no name of a file") from None
    if circle:
        raise UserError(f"include {included} in {path}: goes round in a circle")
    values = read_yaml(path.parent / included, chain, flag)
    section = {**values.get(EVALUATION_SECTION, {}), **content.get(EVALUATION_SECTION, {})}
    return {**values, **content, **({EVALUATION_SECTION: section} if section else {})}


@dataclasses.dataclass(frozen=True)
class Words:
    """What a command takes without an option's name, such as files.

    name: as the help calls them, like FILE. needed: whether there must be at least one.
    """

    name: str
    help: str
    needed: bool = False


class OptionParser(argparse.ArgumentParser):
    """The command line of every command: `--config FILE`, the options of options classes, and words where declared.

    A name that several classes have is one option for all of them, which they must state alike. What is wrong on the
    command line raises UserError, and for an unknown option it names the nearest one. defaults: those of the command,
    in place of the classes' own. program: what the usage line calls the command; None: the name of the file that runs.
    """

    def __init__(self, *classes: type, description: str = "", words: Words | None = None,
                 defaults: Mapping[str, Any] | None = None, program: str | None = None) -> None:
        super().__init__(program, description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
        self.classes, self.words, self.defaults = classes, words, dict(defaults or {})
        self.fields = _fields_by_name(classes)
        self.given: list[str] = []              # the options that the user gave, once they are read
        self.add_argument("--config", metavar="FILE", help="YAML file whose keys are the options below: a path, or the "
                                                          "name of one that comes with this library")
        declared: set[str] = set()
        for cls in classes:
            group = self.add_argument_group((cls.__doc__ or cls.__name__).splitlines()[0].rstrip("."))
            for field in option_fields(cls):
                if field.name not in declared:
                    self._declare(group.add_argument, field)
            declared |= {field.name for field in option_fields(cls)}
        if words is not None:
            self.add_argument("words", nargs="*", metavar=words.name, help=words.help.replace("%", "%%"))

    def _declare(self, add: Callable[..., object], field: OptionField) -> None:
        field = dataclasses.replace(field, default=self.defaults.get(field.name, field.default))
        kind: dict[str, Any] = {"metavar": field.type.__name__.upper()}
        if field.metadata.get("switch"):
            kind = {"action": "store_true"}
        elif field.type is bool:
            kind |= {"nargs": "?", "const": "True"}
        add(f"--{field.name}", default=argparse.SUPPRESS, help=field.help.replace("%", "%%"), **kind)
        for old in field.metadata.get("old_names", ()):
            add(f"--{old}", dest=field.name, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **kind)

    def error(self, message: str) -> NoReturn:
        """Raises UserError, where argparse would end the process."""
        raise UserError(re.sub(r"^argument (--\w+): expected one argument$", r"\1: a value is missing", message))

    def _read_configuration(self, path: Path, flags: Mapping[str, Any]) -> dict[str, Any]:
        """The values in a configuration, or in the config.json of a training, as this command knows them."""
        old = {name: field.name for field in self.fields.values() for name in field.metadata.get("old_names", ())}
        written = read_yaml(path)
        for name in written:
            if name in old and old[name] in written:
                raise UserError(f"{name} in {path}: is the former name of {old[name]}, which is given too, give one")
        values = {old.get(name, name): value for name, value in written.items()}
        model, training = values.get("model"), values.get("training")
        if not (isinstance(model, dict) and isinstance(training, dict)):
            return values
        if "data_dir" in self.fields:
            return {**training, **model, **values.get(WATCHED, {})}
        return self._read_training(path, model, training, flags)

    def _read_training(self, path: Path, model: dict[str, Any], training: dict[str, Any],
                       flags: Mapping[str, Any]) -> dict[str, Any]:
        """What a command that does not train takes from a training: its network and, unless flags name any, weights."""
        known = {name: value for name, value in model.items() if name != "num_classes" or model.get("class_cond")}
        weights = {} if {"model", "model_path"} & flags.keys() else {"model": str(path.parent)}
        taken = {name: value for name, value in {**known, **weights}.items() if name in self.fields}
        left_out = [name for name in (*training, *model) if name not in taken]
        _log.info("--config %s: is of a training, whose options %s are left out", path, ", ".join(left_out))
        return taken

    def read(self, argv: Sequence[str] | None, preset: Preset | None = None) -> tuple[list[str], list[Any]]:
        """The words, and one instance of each options class, from `argv` and the `--config` file it may name.

        argv: None for the arguments of this process. preset: receives what the user gave, and returns values that go
        before the defaults. Raises UserError for an unknown name, a value that is not allowed, and what is missing.
        """
        known, unknown = self.parse_known_intermixed_args(argv)
        if unknown:
            name = unknown[0].split("=")[0]
            fault = "no such option" if name.startswith("-") else "stands where an option is expected"
            raise UserError(f"{cut(name)}: {fault}{nearest(name, [f'--{n}' for n in self.fields])}")
        flags = vars(known)
        config, words = flags.pop("config"), flags.pop("words", [])
        if config == "":
            raise UserError("--config: is empty, name a file or leave it out")
        given = {**(self._read_configuration(find_configuration(config), flags) if config else {}), **flags}
        given.pop(EVALUATION_SECTION, None)
        self.given = list(given)
        parsed = fill(given, self.classes, preset, source=str(config), defaults=self.defaults)
        missing = [self.words.name] if self.words and self.words.needed and not words else []
        missing += [f"--{name}" for name, field in self.fields.items() if field.metadata.get("required")
                    and not any(getattr(one, name, None) for one in parsed)]
        if missing:
            raise UserError(f"the following arguments are required: {', '.join(missing)}")
        return words, parsed


def parse_options(argv: Sequence[str] | None, *classes: type, description: str = "",
                  preset: Preset | None = None, defaults: Mapping[str, Any] | None = None) -> list[Any]:
    """One instance of each options class from a command line that has no words; see `OptionParser` and its `read`."""
    return options_parser(argv, *classes, description=description, defaults=defaults).read(argv, preset)[1]


def options_parser(argv: Sequence[str] | None, *classes: type, description: str = "", words: Words | None = None,
                   defaults: Mapping[str, Any] | None = None) -> OptionParser:
    """The parser of a command line; argv: what it is to read, see `OptionParser`."""
    return OptionParser(*classes, description=description, words=words, defaults=defaults, program=_program(argv))


def parse_words(argv: Sequence[str] | None, words: Words, *classes: type,
                description: str = "") -> tuple[list[str], list[Any]]:
    """The words of a command line, and one instance of each options class; see `OptionParser` and its `read`."""
    return options_parser(argv, *classes, description=description, words=words).read(argv)


def _program(argv: Sequence[str] | None) -> str:
    """How the command was called: the file that runs, and what stands between it and the command's own arguments."""
    called, arguments = sys.argv, sys.argv[1:] if argv is None else list(argv)
    before = len(called) - len(arguments)
    own = before >= 1 and called[before:] == arguments
    return " ".join([Path(called[0]).name, *(called[1:before] if own else [])])


def _fields_by_name(classes: Sequence[type]) -> dict[str, OptionField]:
    """The options of all classes. Raises UserError where two mean different ones by a name, see also `check_class`."""
    found: dict[str, tuple[OptionField, type]] = {}
    for cls in classes:
        if issubclass(cls, Options):
            cls.check_class(classes)
        for field in option_fields(cls):
            known, owner = found.setdefault(field.name, (field, cls))
            if known != field:
                raise UserError(f"--{field.name}: {owner.__name__} and {cls.__name__} state two different options of "
                                "that name; rename the one of the class that was added")
    return {name: field for name, (field, _) in found.items()}


def fill(given: dict[str, Any], classes: Sequence[type], preset: Preset | None, source: str,
         defaults: Mapping[str, Any] | None = None) -> list[Any]:
    """One instance of each options class from values by name; `preset` and `defaults` as in `OptionParser`.

    Raises UserError for a name that none of the classes has, and for a value that is not allowed; source: the file
    that the message names.
    """
    fields = _fields_by_name(classes)
    for name in given:
        if name not in fields:
            raise UserError(f"{cut(str(name))} in {source}: no such option{nearest(str(name), fields)}")
    given = {name: checked(fields[name], value) for name, value in given.items()}
    values = {**(defaults or {}), **(preset(given) if preset else {}), **given}
    return [cls(**{f.name: values[f.name] for f in option_fields(cls) if f.name in values}) for cls in classes]


def options_from(flags: Mapping[str, Any], *classes: type) -> list[Any]:
    """An instance of each options class from flags; raises UserError for a flag that none of them has."""
    names = _fields_by_name(classes)
    for name in flags:
        if name not in names:
            raise UserError(f"{name}: no such flag{nearest(name, names)}")
    return [cls(**{f.name: flags[f.name] for f in option_fields(cls) if f.name in flags}) for cls in classes]
