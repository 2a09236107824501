"""The bar: on rank 0 alone."""

import pytest

from guided_diffusion.progress import progress_bar


@pytest.mark.parametrize(("rank", "enabled", "shown"), [(0, True, True), (1, True, False), (0, False, False)])
def test_only_the_first_rank_shows_a_bar(rank, enabled, shown, monkeypatch, capsys):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with progress_bar(4, "painting", "fence", initial=1, enabled=enabled) as bar:
        bar.update(3)
    assert ("painting" in capsys.readouterr().err) == shown


def test_a_bar_to_loop_over():
    assert list(progress_bar(3, "painting", "fence", iterable="abc")) == ["a", "b", "c"]
