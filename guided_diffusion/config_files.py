"""YAML files of options: YAML 1.1 as PyYAML reads it, without what surprises people, and safe from any content."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from .errors import UserError

LARGEST_FILE = 1_000_000        # bytes
LARGEST_CONTENT = 100_000       # values, those that an alias stands for counted each time

_INT, _FLOAT, _TIME, _BOOL = (f"tag:yaml.org,2002:{name}" for name in ("int", "float", "timestamp", "bool"))


class _Whole(int):
    """A whole number whose text is as it was written, like 010: an option of text takes that."""

    written: str

    def __str__(self) -> str:
        return self.written


class _Real(float):
    """A number whose text is as it was written, like 1.10."""

    written: str

    def __str__(self) -> str:
        return self.written


def _as_written(number: float, text: str) -> float:
    if str(number) == text:
        return number
    kept = _Whole(number) if isinstance(number, int) else _Real(number)
    kept.written = text
    return kept


class _Loader(yaml.SafeLoader):
    """Scalars are those of the core schema of YAML 1.2: 010 is 10, 0o10 is 8, and 1:10 is text, as dates and `no` are.

    A number that is taken as text, such as a folder's name, is as it is written: 010, 1.10.
    A key that stands twice in a mapping is an error, and so is content that aliases make huge or endless.
    """

    def get_single_node(self) -> yaml.Node | None:
        """The one document; raises YAMLError where it is too large with all that its aliases stand for."""
        node = super().get_single_node()
        if node is not None and _count(node, {}) > LARGEST_CONTENT:
            raise yaml.YAMLError(f"holds more than {LARGEST_CONTENT:,} values")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping; raises YAMLError where a key stands twice."""
        written = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in written:
                    raise yaml.YAMLError(f"{key.value[:100]} is given twice, again in line {key.start_mark.line + 1}")
                written.add((key.tag, key.value))
        return super().construct_mapping(node, deep)

    def construct_whole_number(self, node: yaml.ScalarNode) -> float:
        """A whole number of the core schema."""
        text = str(self.construct_scalar(node))
        try:
            return _as_written(int(text, {"0o": 8, "0x": 16}.get(text[:2], 10)), text)
        except ValueError:
            raise yaml.YAMLError(f"{text[:20]}... has too many digits") from None

    def construct_number(self, node: yaml.ScalarNode) -> float:
        """A number that need not be whole."""
        return _as_written(float(self.construct_yaml_float(node)), str(self.construct_scalar(node)))


def _count(node: yaml.Node, known: dict[int, float]) -> float:
    """The values in a node, endless where it holds itself."""
    if id(node) not in known:
        known[id(node)] = float("inf")
        children = ([child for pair in node.value for child in pair] if isinstance(node, yaml.MappingNode) else
                    node.value if isinstance(node, yaml.SequenceNode) else [])
        known[id(node)] = 1 + sum(_count(child, known) for child in children)
    return known[id(node)]


def _resolve_as_core_schema() -> None:
    """Takes PyYAML's rules for numbers, dates and yes or no from the loader, and adds those of the core schema."""
    _Loader.yaml_implicit_resolvers = {
        first: [(tag, rule) for tag, rule in rules if tag not in (_INT, _FLOAT, _TIME, _BOOL)]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()}
    digits = list("-+0123456789")
    _Loader.add_implicit_resolver(_INT, re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), digits)
    _Loader.add_implicit_resolver(
        _FLOAT, re.compile(r"(?:[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
                           r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"), [*digits, "."])
    _Loader.add_implicit_resolver(_BOOL, re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
    _Loader.add_constructor(_INT, _Loader.construct_whole_number)
    _Loader.add_constructor(_FLOAT, _Loader.construct_number)


_resolve_as_core_schema()


def read_mapping(path: str | Path, within: str = "", flag: str = "--config") -> dict[str, Any]:
    """The mapping in a YAML file; raises UserError where it cannot be read, or holds something else.

    within: what follows the reason where the file cannot be read. flag: the option that named the file.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(LARGEST_FILE + 1)
        if len(text) > LARGEST_FILE:
            raise UserError(f"{flag} {path}: is larger than {LARGEST_FILE:,} bytes, too large for options")
        content = yaml.load(text.decode(), _Loader)
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be read ({error.strerror}){within}") from None
    except RecursionError:
        raise UserError(f"{flag} {path}: is nested too deeply") from None
    except UserError:
        raise
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError) as error:
        said = " ".join(str(error).split()).replace(' in "<unicode string>",', " at")
        raise UserError(f"{flag} {path}: is not YAML ({said[:500]})") from None
    if not isinstance(content, dict):
        raise UserError(f"{flag} {path}: must hold option names and values, one a line")
    return content
