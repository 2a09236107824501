"""Figures of matplotlib as files."""

import pytest

from evaluations.plots import SUFFIXES, new_figure, plain_numbers, save_figure


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".SVG"])
def test_the_same_figure_gives_the_same_bytes_on_any_day(suffix, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    files = [tmp_path / f"{day}{suffix}" for day in (1, 2)]
    for day, file in enumerate(files, 1):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", str(86400 * day))
        with new_figure(3, 2) as figure:
            axes = figure.add_subplot()
            axes.plot([1, 2], [3, 1], label="a line")
            axes.legend()
            save_figure(figure, file)
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_names_and_numbers_are_no_formulas(suffix, tmp_path):
    pytest.importorskip("matplotlib")
    with new_figure(3, 2) as figure:
        axes = figure.add_subplot()
        axes.plot([10, 100_000], [0.5, 0.9], label=r"a $\frac$ b")
        axes.set(xscale="log", yscale="log", title=r"x_1$ and $\frac")
        axes.legend()
        plain_numbers(axes.xaxis)
        plain_numbers(axes.yaxis)
        save_figure(figure, tmp_path / f"figure{suffix}")
        texts = [label.get_text() for axis in (axes.xaxis, axes.yaxis) for label in axis.get_ticklabels(which="both")]
    assert {"10", "1,000", "100,000", "0.6"} <= set(texts) and "$" not in "".join(texts)
