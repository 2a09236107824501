"""The benchmark of networks and guided steps: its rows, and the passes that it counts."""

import json
import re

import pytest
import torch
from commands import flags
from networks import TINY, TINY_CLASSIFIER, with_random_weights

from evaluations.benchmarks import speed
from evaluations.benchmarks.setting import checkpointed
from evaluations.benchmarks.speed import BenchmarkOptions, benchmark, count_passes
from guided_diffusion.build import DiffusionOptions, ModelOptions
from guided_diffusion.checkpoint import save_state
from guided_diffusion.depth.features import feature_channels
from guided_diffusion.depth.predictor import DepthPredictors, save_predictors
from guided_diffusion.errors import UserError
from guided_diffusion.guidance import GUIDANCE
from guided_diffusion.options import parse_options
from guided_diffusion.script_util import create_model

OPTIONS = {**TINY, **TINY_CLASSIFIER, "model": "", "batch_size": 2, "rounds": 1, "sel_attn_depth": 0}
PRIOR = {"image_size": 8, "in_channels": 1, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1",
         "attention_resolutions": "", "class_cond": False, "learn_sigma": True, "diffusion_steps": 100}


def table(**options):
    """Cells of each row by its name."""
    chosen, model, diffusion, *methods = parse_options(flags({**OPTIONS, **options}), BenchmarkOptions, ModelOptions,
                                                       DiffusionOptions, *GUIDANCE)
    lines = benchmark(chosen, model, diffusion, methods).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows[1:]}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Options that name depth predictors of the network of TINY, and a depth prior."""
    folder = tmp_path_factory.mktemp("depth")
    model = create_model(**TINY)
    save_predictors(folder / "predictors.safetensors", DepthPredictors(
        {"strong": feature_channels(model, ["output.0", "output.1", "output.2"]),
         "weak": feature_channels(model, ["output.1"])}, 16, "image", "0" * 64))
    network = {name: value for name, value in PRIOR.items() if name != "diffusion_steps"}
    save_state(folder / "prior.safetensors", create_model(**network).state_dict(), {"config": json.dumps(PRIOR)})
    return {"depth_predictor": folder / "predictors.safetensors", "depth_prior": folder / "prior.safetensors"}


def test_the_network_is_an_entry_of_its_file(tmp_path):
    state = create_model(**TINY).state_dict()
    torch.save({"model": state, "ema": state}, tmp_path / "both.pt")
    with pytest.raises(UserError, match=r"--checkpoint_entry emma: .*both\.pt has model, ema"):
        table(model_path=tmp_path / "both.pt", checkpoint_entry="emma")


def test_rows_without_depth():
    rows = table()
    expected = {"network evaluation": "1 + 0", "unguided step": "1 + 0", "plain evaluation": "1 + 0",
                "SAG step": "2 + 0", "CG step": "1 + 0", "SAG + CG step": "2 + 0"}
    assert {name: rows[name][3] for name in expected} == expected and "PAG step" in rows
    assert all(re.fullmatch(r"[\d.]+", cell) for row in rows.values() for cell in row[:3])


def test_a_method_that_remembers_is_timed():
    assert table(apg=True, apg_momentum=-0.5)["APG step"][3] == "1 + 0"


def test_rows_of_depth_guidance_with_their_memory_and_passes(files, monkeypatch):
    rows = table(**files)
    names = [f"{name} step{end}" for name in ("DCG", "DPG", "DCG + DPG") for end in ("", ", checkpointed")]
    assert [rows[name][3] for name in names] == ["1 + 1"] * 6
    memory = {name: float(row[1]) for name, row in rows.items()}
    for name in ("DCG", "DPG", "DCG + DPG"):
        assert memory["unguided step"] < memory[f"{name} step, checkpointed"] < memory[f"{name} step"]
    monkeypatch.setattr(speed, "measure_calls", lambda functions, *_: dict.fromkeys(
        functions, speed.CallCost([1.0], 0.0, 1, 0)))
    assert [name for name in table(depth_predictor=files["depth_predictor"]) if name in names] == names[:2]


def test_files_that_do_not_fit_are_refused(files):
    with pytest.raises(UserError, match="--depth_predictor is not given"):
        table(depth_prior=files["depth_prior"])
    with pytest.raises(UserError, match="depth predictors"):
        table(**files, image_size=32, attention_resolutions="16", classifier_attention_resolutions="16")


def test_passes_are_counted_and_checkpoints_left_as_they_were():
    model = with_random_weights(create_model(**TINY)).requires_grad_(False)
    x, t, y = torch.randn(1, 1, 16, 16), torch.tensor([5]), torch.tensor([0])

    def twice_and_back():
        with torch.enable_grad():
            leaf = x.clone().requires_grad_()
            loss = model(leaf, t, y).sum()
            for _ in range(3):
                torch.autograd.grad(loss, leaf, retain_graph=True)
        model(x, t, y)

    seen = []

    def look():
        seen.append({module.use_checkpoint for module in model.modules() if hasattr(module, "use_checkpoint")})
        twice_and_back()

    assert count_passes(twice_and_back, [model]) == (2, 3)
    assert count_passes(checkpointed(model, look, True), [model]) == (2, 3)
    look()
    assert seen == [{True}, {False}]
    assert not model._forward_pre_hooks
