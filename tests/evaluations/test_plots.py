"""Figures of matplotlib as files."""

import pytest

from evaluations.plots import SUFFIXES, new_figure, save_figure


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".SVG"])
def test_the_same_figure_gives_the_same_bytes_on_any_day(suffix, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    files = [tmp_path / f"{day}{suffix}" for day in (1, 2)]
    for day, file in enumerate(files, 1):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", str(86400 * day))
        figure = new_figure(3, 2)
        axes = figure.add_subplot()
        axes.plot([1, 2], [3, 1], label="a line")
        axes.legend()
        save_figure(figure, file)
    assert files[0].read_bytes() == files[1].read_bytes()
