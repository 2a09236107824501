"""Paths as links where the terminal can follow them, and pages and pictures in the browser."""

from __future__ import annotations

import os
import re
import socket
import sys
import webbrowser
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TextIO
from urllib.parse import quote

PAGES, PICTURES = (".html", ".htm"), (".png", ".svg", ".webp", ".jpg")

# "label: path", or "label: path (note)".
_LINE = re.compile(r"([A-Za-z][\w -]*: +)(\S.*?)((?: \([^()]*\))?)", re.ASCII)
# Environment variables of terminals that know links, and the values of TERM and TERM_PROGRAM of others.
_KNOWN = ("WT_SESSION", "KONSOLE_VERSION", "KITTY_WINDOW_ID", "DOMTERM", "ALACRITTY_WINDOW_ID")
_TERMS = ("xterm-kitty", "xterm-ghostty", "alacritty", "foot", "wezterm", "contour")
_PROGRAMS = ("iTerm.app", "WezTerm", "vscode", "ghostty", "Hyper", "Tabby", "rio")
_VTE = 5000                     # the first version of VTE (GNOME Terminal and others) with links


def takes_links(stream: TextIO, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a stream is a terminal that shows links, as far as its environment tells.

    FORCE_HYPERLINK, as other programs read it, overrules what is found; 0 is no.
    """
    if (forced := environment.get("FORCE_HYPERLINK")) is not None:
        return forced != "0"
    if not stream.isatty() or environment.get("TERM") == "dumb":
        return False
    version = environment.get("VTE_VERSION", "")
    return (any(name in environment for name in _KNOWN) or environment.get("TERM_PROGRAM") in _PROGRAMS
            or environment.get("TERM", "").startswith(_TERMS) or (version.isdecimal() and int(version) >= _VTE))


def link(path: Path, text: str) -> str:
    """The text as a link to a file (OSC 8); the host is named, as the terminal may be on another."""
    address = f"file://{socket.gethostname()}{quote(bytes(path.absolute()))}"
    return f"\033]8;;{address}\033\\{text}\033]8;;\033\\"


def linked(text: str) -> str:
    """The text with a link wherever a line says `label: path`, or `label: path (note)`, and the path exists."""
    return "\n".join(f"{label}{link(Path(path), path)}{note}" if path else line for line, label, path, note in
                     _parts(text))


def paths_in(text: str) -> list[Path]:
    """The files and folders that `linked` makes links to."""
    return [Path(path) for _, _, path, _ in _parts(text) if path]


def _parts(text: str) -> Iterator[tuple[str, str, str, str]]:
    """Of each line: itself, its label, its path ("" where there is none that exists) and its note."""
    for line in text.split("\n"):
        found = _LINE.fullmatch(line)
        label, path, note = found.groups() if found else ("", "", "")
        yield line, label, path if path and os.path.lexists(path) else "", note


def worth_showing(paths: list[Path]) -> Path | None:
    """The first page among some files, else the first picture; None where there is neither."""
    return next((path for endings in (PAGES, PICTURES) for path in paths if path.suffix.lower() in endings), None)


def open_in_browser(path: Path, environment: Mapping[str, str] = os.environ) -> str:
    """Opens a page or picture in the browser; returns a sentence where there is none, else ""."""
    screen = any(environment.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"))
    if sys.platform.startswith("linux") and not screen:     # else a browser of text would take over the terminal
        return f"--open: there is no screen here to show {path} on"
    try:
        shown = webbrowser.open(path.absolute().as_uri())
    except webbrowser.Error:
        shown = False
    return "" if shown else f"--open: there is no browser here to show {path} in"
