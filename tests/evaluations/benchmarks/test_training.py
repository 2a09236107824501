"""Steps of training beside those of a clone, on a stand-in for it."""

import pytest
from commands import call

from evaluations.benchmarks import against
from evaluations.benchmarks.against import AgainstOptions, Shape
from evaluations.benchmarks.speed import CallCost
from evaluations.benchmarks.training import TrainingCosts, training_table
from guided_diffusion.errors import UserError

TINY = {"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1", "attention_resolutions": "8",
        "num_head_channels": 32, "learn_sigma": True, "resblock_updown": True}
CLONE = {
    "__init__": "", "dist_util": "",
    "unet": "from guided_diffusion.unet import UNetModel",
    "logger": "def configure(dir, format_strs): pass",
    "resample": "class UniformSampler:\n    def __init__(self, diffusion): pass",
    "script_util": """
from guided_diffusion.build import DiffusionOptions, build_diffusion
from .bias import BIAS

def create_gaussian_diffusion(steps, **options):
    diffusion = build_diffusion(DiffusionOptions(diffusion_steps=steps, **options))
    losses = diffusion.training_losses
    diffusion.training_losses = lambda model, x, t, noise: {"loss": BIAS * losses(model, x, t, noise=noise)["loss"]}
    return diffusion
""",
    "train_util": """
import blobfile
import torch

class TrainLoop:
    def __init__(self, model, diffusion, data, batch_size, **options):
        self.model, self.diffusion, self.data = model, diffusion, data
        assert dist.get_world_size() == 1

    def run_step(self, images, cond):
        t = torch.zeros(len(images), dtype=torch.int64)
        self.diffusion.training_losses(self.model, images, t, noise=images)["loss"].mean().backward()
"""}


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A function that makes a clone whose losses are a multiple of the right ones."""
    monkeypatch.setattr(against, "SHAPES", {"tiny": Shape(TINY, 2)})

    def make(bias):
        (tmp_path / "guided_diffusion").mkdir()
        for name, text in {**CLONE, "bias": f"BIAS = {bias}"}.items():
            (tmp_path / "guided_diffusion" / f"{name}.py").write_text(text)
        return tmp_path
    return make


def test_both_loops_are_timed_in_one_table(clone, capsys):
    assert call("benchmark", "--against", clone(1.0), "--training", "True", "--rounds", 1) == 0
    row, = (line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| tiny"))
    assert len(row) == 5 and float(row[-1].removesuffix(" |")) < 1e-5


def test_another_loss_is_refused(clone, capsys):
    assert call("benchmark", "--against", clone(1.01), "--training", "True", "--rounds", 1) == 2
    assert "--against: the clone's loss differs by 9.9e-03 of the largest" in capsys.readouterr().err


def test_the_table_has_medians_of_ratios():
    one = TrainingCosts(4, CallCost([10.0, 20.0, 10.0], 5.0, 0, 0), CallCost([15.0, 24.0, 30.0], 9.0, 0, 0), 3e-7)
    assert "| shape | 1.50 | 167 / 400 | 9 / 5 | 3e-07 |" in training_table({"shape": one}, "cpu")


def test_there_must_be_a_clone():
    with pytest.raises(UserError, match="--training True: needs --against"):
        AgainstOptions(training=True)
