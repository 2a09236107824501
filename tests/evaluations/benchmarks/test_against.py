"""The comparison with a clone of the official code, on a stand-in for it."""

import pytest
from commands import call

from evaluations.benchmarks import against, elsewhere
from evaluations.benchmarks.against import Against, AgainstOptions, Shape, against_table
from evaluations.benchmarks.speed import CallCost
from guided_diffusion.errors import UserError

TINY = {"image_size": 16, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2", "attention_resolutions": "8",
        "num_head_channels": 32, "learn_sigma": True}
CLONE = """
from guided_diffusion import unet
from .bias import BIAS

class UNetModel(unet.UNetModel):
    def forward(self, x, timesteps, y=None):
        return super().forward(x, timesteps, y) * BIAS, "attention"
"""


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A function that makes a clone whose network multiplies what it predicts."""
    monkeypatch.setattr(against, "SHAPES", {"tiny": Shape(TINY, 2)})
    monkeypatch.setattr(against, "MATRIX", {"cpu": 64})
    monkeypatch.setattr(elsewhere, "START", "fork")         # which need not load PyTorch

    def make(bias):
        folder = tmp_path / "guided_diffusion"
        folder.mkdir(exist_ok=True)
        (folder / "__init__.py").write_text("")
        (folder / "unet.py").write_text(CLONE)
        (folder / "bias.py").write_text(f"BIAS = {bias}\n")
        return tmp_path
    return make


def test_both_networks_are_timed_in_one_table(clone, capsys):
    assert call("benchmark", "--against", clone(1.0), "--rounds", 1) == 0
    printed = capsys.readouterr().out
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith("| tiny")]
    assert [len(row) for row in rows] == [6, 6]
    assert "targets 1.5, 2, 0.7" in printed


def test_another_network_is_refused(clone, capsys):
    assert call("benchmark", "--against", clone(1.01), "--rounds", 1) == 2
    assert "--against: the clone's network differs by" in capsys.readouterr().err


def test_ratios_are_medians_over_the_rounds():
    costs = {"evaluation": CallCost([10.0, 20.0, 10.0], 5.0, 1, 0), "matrix product": CallCost([1.0], 1.0, 0, 0),
             "official evaluation": CallCost([15.0, 24.0, 30.0], 9.0, 1, 0),
             "SAG step": CallCost([20.0, 50.0, 21.0], 6.0, 2, 0)}
    one = Against(2, costs, 2e9, 4e11, 3e-6)
    assert (one.speedup, one.step, one.share) == (1.5, 2.1, 0.5)
    assert "| shape | 1.50 | 2.10 | 0.50 | 9 / 5 | 3e-06 |" in against_table({"shape": one}, "cpu")


@pytest.mark.parametrize(("options", "message"), [
    ({"shapes": "4"}, "--shapes 4: must be numbers from 1 to 3"), ({"shapes": "one"}, "--shapes one: must be")])
def test_shapes_that_there_are_not(options, message):
    with pytest.raises(UserError, match=message):
        AgainstOptions(**options)
    assert len(AgainstOptions(shapes="1,3").chosen) == 2


def test_a_folder_that_is_no_clone(tmp_path, capsys):
    assert call("benchmark", "--against", tmp_path) == 2
    assert "is no clone of the official code" in capsys.readouterr().err
