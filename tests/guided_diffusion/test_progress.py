"""The progress of work: plain lines where there is no terminal, bars where there is one, on rank 0 alone."""

import io
import logging
import re

import pytest

from guided_diffusion import progress
from guided_diffusion.cli import _AsideHandler
from guided_diffusion.progress import BYTES, Step, progress_bar, watched


@pytest.mark.parametrize(("rank", "enabled", "shown"), [(0, True, True), (1, True, False), (0, False, False)])
def test_only_the_first_rank_shows_progress(rank, enabled, shown, monkeypatch, capsys):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    told = []
    with watched(told.append), progress_bar(4, "painting", "fence", initial=1, enabled=enabled) as bar:
        bar.update(3)
    err = capsys.readouterr().err
    assert bool(re.fullmatch(r"painting: 4 of 4 fences, [\d.e+]+ fences/s, took 0:00:0\d\n", err)) == shown
    assert bool(err) == bool(told) == shown


@pytest.mark.parametrize(("step", "words"), [
    (Step("sampling", "image", 400, 1000, 12.34, "2 of 2 ranks"),
     "sampling: 400 of 1000 images, 12.3 images/s, 0:00:49 left, 2 of 2 ranks"),
    (Step("rows", "row", 1, 3, 0.01), "rows: 1 of 3 rows, 100 s/row, 0:03:20 left"),
    (Step("epoch", "batch", 0, 9), "epoch: 0 of 9 batches"),
    (Step("preparing", "image", 7, None, 3.0), "preparing: 7 images, 3 images/s"),
    (Step("fetching", BYTES, 1_500_000, 3_000_000, 1e6), "fetching: 1.5 MB of 3 MB, 1 MB/s, 0:00:02 left"),
])
def test_a_line_says_how_far_how_fast_and_how_long(step, words):
    assert str(step) == words


def test_lines_come_now_and_then_and_name_what_they_are_a_part_of(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress_bar(2, "rows", "row") as rows:
        for name in ("plain", "sag"):
            rows.note(name)
            with progress_bar(60, "sampling", "image") as images:
                for _ in range(60):
                    now[0] += 0.5 if name == "sag" else 0.01
                    images.update()
            rows.update()
    assert capsys.readouterr().err.splitlines() == [        # nothing of the part that took less than a second
        "row 2 of 2 (sag), sampling: 20 of 60 images, 2 images/s, 0:00:20 left",
        "row 2 of 2 (sag), sampling: 60 of 60 images, 2 images/s, took 0:00:30",
        "rows: 2 of 2 rows, 15.3 s/row, took 0:00:31, sag"]


def test_bars_on_a_terminal_stand_below_one_another_and_lines_above_them(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "30")
    handler = _AsideHandler(terminal)
    with progress_bar(1, "rows", "row") as rows, progress_bar(2, "sampling", "image") as images:
        images.update()
        handler.emit(logging.makeLogRecord({"msg": "a line"}))
        images.update()
        rows.update()
    text = terminal.getvalue()
    assert re.search(r"\r +\r(\x1b\[A)?a line\n\r  0 % ", text)         # where a bar was wiped
    assert "rows: 0 of 1 rows" in text and "\n\r" in text       # the second bar one line further down
    assert not any(len(piece) > 100 for piece in re.split(r"[\r\n]", text))
    assert text.count("100 % |") >= 2
