"""Paths as links in terminals, and what --open opens."""

import io

import pytest

from guided_diffusion import cli, links
from guided_diffusion.cli import ShowOptions, tell


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("environment, expected", [
    ({}, False), ({"TERM": "xterm-256color"}, False), ({"TERM": "xterm-kitty"}, True), ({"VTE_VERSION": "7006"}, True),
    ({"VTE_VERSION": "4600"}, False), ({"TERM_PROGRAM": "vscode"}, True), ({"WT_SESSION": "1", "TERM": "dumb"}, False),
    ({"FORCE_HYPERLINK": "0", "WT_SESSION": "1"}, False)])
def test_terminals_that_know_links(environment, expected):
    assert links.takes_links(Terminal(), environment) is expected
    assert not links.takes_links(io.StringIO(), environment)
    assert links.takes_links(io.StringIO(), {**environment, "FORCE_HYPERLINK": "1"})


def test_paths_that_exist_become_links(tmp_path):
    path = tmp_path / "a page (1) ä\udce9.html"
    path.touch()
    text = f"page:   {path} (12 bytes)\nsamples: {tmp_path / 'none.npz'}\nwords without a path"
    first, *others = links.linked(text).splitlines()
    assert others == text.splitlines()[1:]
    assert first.startswith("page:   \033]8;;file://") and first.endswith(f"\033\\{path}\033]8;;\033\\ (12 bytes)")
    assert "a%20page%20%281%29%20%C3%A4%E9.html\033" in first
    assert links.paths_in(text) == [path]


@pytest.fixture
def shown(monkeypatch):
    """The addresses that the browser was asked for; there is a screen."""
    addresses = []
    monkeypatch.setattr(links.webbrowser, "open", lambda address: addresses.append(address) or True)
    monkeypatch.setattr(cli, "open_in_browser", lambda path: links.open_in_browser(path, {"DISPLAY": ":0"}))
    return addresses


def test_the_page_is_opened_before_the_picture_and_on_the_first_rank_alone(shown, tmp_path, capsys, monkeypatch):
    for name in ("x.png", "x.html", "x.npz"):
        (tmp_path / name).touch()
    text = "\n".join(f"{label}: {tmp_path / name}" for label, name in (
        ("samples", "x.npz"), ("picture", "x.png"), ("page", "x.html")))
    tell(text)
    tell("", ShowOptions(open=True))
    assert shown == [] and capsys.readouterr().out == f"{text}\n"
    tell(text, ShowOptions(open=True))
    tell(text.replace("x.html", "none.html"), ShowOptions(open=True))
    assert shown == [(tmp_path / name).as_uri() for name in ("x.html", "x.png")]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    tell(text, ShowOptions(open=True))
    assert len(shown) == 2


def test_a_sentence_where_nothing_can_be_opened(shown, tmp_path, capsys, monkeypatch):
    tell("done", ShowOptions(open=True))
    assert "no page and no picture was written" in capsys.readouterr().err
    monkeypatch.setattr(links.sys, "platform", "linux")
    assert "there is no screen here" in links.open_in_browser(tmp_path, {})
    monkeypatch.setattr(links.webbrowser, "open", lambda address: False)
    assert "there is no browser here" in links.open_in_browser(tmp_path, {"BROWSER": "none"})
