"""The drawings of icon sets in npm packages: what each shows, in which style, in which category.

A package holds `icons.json` (names and SVG bodies) and `metadata.json` (names by category). The sets name the same
emoji differently ("alarm-clock", "alarmclock", "bear" beside "bear-face"), and only some have the categories of the
Unicode standard. So drawings are gathered into items first: an item is one emoji, in up to five styles.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..foreign import MAX_JSON, reading


@dataclass(frozen=True)
class IconSet:
    """One npm package, pinned: its version, the SHA-256 of its icons.json, its style's name, and what its licence asks.

    holder: whom the licence names.
    """

    package: str
    version: str
    sha256: str
    style: str
    licence: str
    holder: str
    source: str


SETS = (
    IconSet("@iconify-json/noto", "1.2.9", "9eac6ef4e7ec122b6f0e7ac281d61008afdbc720d0ce861e398b939daaa347c6",
            "noto", "Apache-2.0", "Google", "https://github.com/googlefonts/noto-emoji"),
    IconSet("@iconify-json/twemoji", "1.2.5", "5d5d820790565b764f2728675d487c9ee4c1fc83916d8567d5aca8ba7527c242",
            "twemoji", "CC-BY-4.0", "Twitter and other contributors", "https://github.com/jdecked/twemoji"),
    IconSet("@iconify-json/fluent-emoji-flat", "1.2.6",
            "f5f4cf457c0db2ad5a2e42e033e02e0c87d10e43d0164cfffb3bb84914970a63",
            "fluent", "MIT", "Microsoft Corporation", "https://github.com/microsoft/fluentui-emoji"),
    IconSet("@iconify-json/fxemoji", "1.2.2", "d8ef67b94a32d0abcd314d1c35db56178eaa8fa8ad71130e312f3460e307c2bf",
            "fxemoji", "Apache-2.0", "Mozilla", "https://github.com/mozilla/fxemoji"),
    IconSet("@iconify-json/emojione", "1.2.3", "e9a865faed523a7c3535b5319ae533d09fac1a62b4e96920eb178bb60e707e80",
            "emojione", "CC-BY-4.0", "Emoji One", "https://github.com/EmojiTwo/emojitwo"),
)

# The categories of the Unicode standard, and the sets' own names for them or for the nearest one.
CATEGORIES = ("activities", "animals", "flags", "food", "objects", "people", "smileys", "symbols", "travel")
_WORDS = {"activities": "activities", "animals & nature": "animals", "nature": "animals", "flags": "flags",
          "food & drink": "food", "food": "food", "objects": "objects", "modifiers": "symbols",
          "people & body": "people", "people": "people", "smileys & emotion": "smileys", "symbols": "symbols",
          "travel & places": "travel", "travel": "travel", "places": "travel"}
_COARSE = {"people", "nature", "objects", "places", "symbols", "travel", "food", "activities"}  # not the standard's

# It takes "light-bulb" and the like for a skin tone, too, which is kept, as the shipped models and reference know no
# such icons (docs/icons.md counts them).
SKIN_TONE = re.compile(r"(^|-)(light|medium|dark)(-|$)|skin-tone")
FEWEST = 20                     # drawings of a style that make a category
DEFAULT_SIDE = 16               # of icons whose file states no width or height


@dataclass(frozen=True)
class Drawing:
    """One drawing: its style, its name in its set, the SVG with its size, the emoji it shows, and the category."""

    style: str
    name: str
    svg: str
    item: str
    category: str


def fetch_packages() -> dict[str, dict[str, Any]]:
    """The files of all packages by style, from the npm client: {"noto": {"icons.json": ..., "metadata.json": ...}}.

    Raises UserError without the client, where it fails, and where a package is not the pinned one.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise UserError("--packages is not given, and there is no npm client to fetch the packages: install one, or "
                        "unpack them and pass --packages FOLDER")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for icons in SETS:
            wanted = f"{icons.package}@{icons.version}"
            done = subprocess.run([npm, "pack", wanted, "--pack-destination", folder, "--silent"],
                                  capture_output=True, text=True)
            archives = list(Path(folder).glob("*.tgz"))
            if done.returncode or len(archives) != 1:
                why = done.stderr.strip().splitlines()
                raise UserError(f"npm pack {wanted}: failed{f' ({why[-1][:150]})' if why else ''}")
            found[icons.style] = _checked(icons, wanted, _read_archive(archives[0]))
            archives[0].unlink()
    return found


def read_packages(folder: Path, sets: Sequence[IconSet] = SETS) -> dict[str, dict[str, Any]]:
    """The same of packages that lie in a folder, as PACKAGE/icons.json, with or without "@iconify-json/" before."""
    found = {}
    for icons in sets:
        places = [folder / icons.package, folder / icons.package.rpartition("/")[2]]
        place = next((place for place in places if (place / "icons.json").is_file()), None)
        if place is None:
            raise UserError(f"--packages {folder}: has no {icons.package.rpartition('/')[2]}/icons.json")
        with reading(place, "is no icon package that can be used", flag="--packages"):
            contents = {name: (place / name).read_bytes() for name in ("icons.json", "metadata.json")}
        found[icons.style] = _checked(icons, str(place), contents)
    return found


def _read_archive(path: Path) -> dict[str, bytes]:
    """The two files of a package, read in memory: nothing is unpacked."""
    contents = {}
    with reading(path.name, "is no package that can be used"), tarfile.open(path) as archive:
        for name in ("icons.json", "metadata.json"):
            member = archive.extractfile(f"package/{name}")
            contents[name] = io.BytesIO(member.read(MAX_JSON) if member else b"").getvalue()
    return contents


def _checked(icons: IconSet, where: str, contents: Mapping[str, bytes]) -> dict[str, Any]:
    digest = sha256(contents["icons.json"]).hexdigest()
    if digest != icons.sha256:
        raise UserError(f"{where}: its icons.json has the SHA-256 {digest[:16]}..., not {icons.sha256[:16]}... of "
                        f"version {icons.version}")
    with reading(where, "is no icon package that can be used"):
        return {name: json.loads(content) for name, content in contents.items()}


def drawings(packages: Mapping[str, Mapping[str, Any]]) -> list[Drawing]:
    """All drawings, in the order of item and style.

    Of skin tones only the neutral drawing is taken. packages: as `fetch_packages` gives them, by style. The category of
    an item is the one that most of its drawings have, sets with the standard's categories first; one that has fewer
    than 20 drawings in a style is merged into the symbols of that style.
    """
    items = _items(packages)
    categories = _categories(packages, items)
    found = []
    for style, files in packages.items():
        icons = files["icons.json"]
        for name in _names(icons):
            item = items[style, name]
            found.append(Drawing(style, name, _svg(icons["icons"][name], icons), item, categories[item]))
    return sorted(_without_tiny(found), key=lambda drawing: (drawing.item, drawing.style, drawing.name))


def _without_tiny(found: Sequence[Drawing]) -> list[Drawing]:
    """The drawings, of which a category that has few in a style is among the symbols of that style."""
    counts = Counter((drawing.style, drawing.category) for drawing in found)
    return [replace(drawing, category="symbols") if counts[drawing.style, drawing.category] < FEWEST else drawing
            for drawing in found]


def _names(icons: Mapping[str, Any]) -> list[str]:
    """The names of the drawings of a set that are taken."""
    return [name for name, icon in icons["icons"].items() if not icon.get("hidden") and not SKIN_TONE.search(name)]


def _svg(icon: Mapping[str, Any], icons: Mapping[str, Any]) -> str:
    left, top = icon.get("left", 0), icon.get("top", 0)
    width, height = (icon.get(side, icons.get(side, DEFAULT_SIDE)) for side in ("width", "height"))
    return (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>')


def _key(name: str) -> str:
    """A name without what the sets write differently.

    Where that makes one of two emoji, like "cat" and "cat-face", they are near relatives, which should share a split.
    """
    name = name.replace("flag-for-", "flag-").replace("digit-", "keycap-")
    return re.sub("face|sign|symbol|with|[^a-z0-9]", "", name) or name


def _items(packages: Mapping[str, Mapping[str, Any]]) -> dict[tuple[str, str], str]:
    """The item of each (style, name): drawings belong together that share a name or a synonym, in any set."""
    synonyms: dict[str, set[str]] = defaultdict(set)
    for files in packages.values():
        for alias, entry in files["icons.json"].get("aliases", {}).items():
            if not set(entry) - {"parent", "hidden"} and not SKIN_TONE.search(alias):       # no mirrored drawing
                synonyms[_key(entry["parent"])].add(_key(alias))
    root = _united(synonyms)
    return {(style, name): root.get(_key(name), _key(name))
            for style, files in packages.items() for name in _names(files["icons.json"])}


def _united(synonyms: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """By name the first name of those that are connected to it."""
    neighbours: dict[str, set[str]] = defaultdict(set)
    for name, others in synonyms.items():
        for other in others:
            neighbours[name].add(other)
            neighbours[other].add(name)
    root: dict[str, str] = {}
    for name in sorted(neighbours):
        waiting = [name] if name not in root else []
        while waiting:
            reached = waiting.pop()
            if reached not in root:
                root[reached] = name
                waiting += neighbours[reached]
    return root


def _categories(packages: Mapping[str, Mapping[str, Any]], items: Mapping[tuple[str, str], str]) -> dict[str, str]:
    """The category of each item."""
    votes: dict[str, Counter[str]] = defaultdict(Counter)
    for style, files in packages.items():
        for words, names in files["metadata.json"]["categories"].items():
            word = words.lower()
            weight = 1 if word in _COARSE and _is_coarse(files) else len(packages) + 1
            for name in names:
                if (style, name) in items and word in _WORDS:
                    votes[items[style, name]][_WORDS[word]] += weight
    return {item: max(CATEGORIES, key=lambda category: votes[item][category]) if votes[item] else "symbols"
            for item in set(items.values())}


def _is_coarse(files: Mapping[str, Any]) -> bool:
    """Whether a set has categories of its own, in which faces are people and plants nature."""
    return "Smileys & Emotion" not in files["metadata.json"]["categories"]
