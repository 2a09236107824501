"""Checkpoints of other code: wrapped, with prefixed names, or with tensors that are no weights."""

import logging
import warnings

import numpy as np
import pytest
import torch
from commands import call
from networks import TINY, TINY_CLASSIFIER

from guided_diffusion.checkpoint import load_into, load_state_dict, save_state, taken_entry
from guided_diffusion.errors import UserError
from guided_diffusion.runs.options import SampleOptions
from guided_diffusion.runs.record import identity
from guided_diffusion.script_util import create_classifier, create_model

STATE = {"a.weight": torch.ones(2), "b.weight": torch.zeros(3)}
OTHER = {name: value + 1 for name, value in STATE.items()}


@pytest.fixture
def saved(tmp_path):
    def write(content):
        torch.save(content, tmp_path / "x.pt")
        return tmp_path / "x.pt"
    return write


def assert_same(found, expected):
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def prefixed(prefix):
    return {prefix + name: value for name, value in STATE.items()}


@pytest.mark.parametrize("content", [
    prefixed("module."), prefixed("_orig_mod."), prefixed("module._orig_mod."), prefixed("_orig_mod.module."),
    {"n_averaged": torch.tensor(3), **prefixed("module.")}, {"state_dict": prefixed("_orig_mod."), "epoch": 1},
    {"ema": STATE, "model": OTHER, "opt": {}}, {"model": OTHER, "ema": STATE, "step": 7}, {"mine": STATE, "lr": 0.1},
    {"model_state_dict": STATE, "optimizer": {"state": {}, "param_groups": []}, "extra": torch.ones(1)},
    {"ema": {"module": STATE, "decay": 0.99}, "model": OTHER}, {"state": {"model": OTHER, "ema": STATE}, "epoch": 3},
    {"checkpoint": {"state_dict": prefixed("module.")}}, {"mine": STATE, "moments": {"first": OTHER, "second": OTHER}},
    {"model": STATE, "step": np.int64(3), "loss": np.float32(0.5), "best": (np.bool_(True), np.float64(1))}])
def test_prefixed_and_wrapped_files_load(saved, content):
    assert_same(load_state_dict(saved(content)), STATE)


def test_a_prefix_that_only_some_names_have_stays(saved):
    content = {"module.a": torch.ones(1), "b": torch.ones(1)}
    assert_same(load_state_dict(saved(content)), content)


def test_the_entry_is_chosen_and_said(saved, caplog):
    path = saved({"model": OTHER, "ema": STATE})
    with caplog.at_level(logging.INFO, "guided_diffusion"):
        assert_same(load_state_dict(path, entry=""), STATE)
        assert_same(load_state_dict(path, entry="model"), OTHER)
        assert_same(load_state_dict(path), STATE)
    assert caplog.messages == [f"{path}: its entry ema is taken of model, ema (--checkpoint_entry chooses)",
                               f"{path}: its entry model is taken of model, ema (--checkpoint_entry chooses)",
                               f"{path}: its entry ema is taken of model, ema (scripts/convert_checkpoint.py "
                               "--checkpoint_entry makes a file of another)"]


def test_an_entry_of_an_entry_is_chosen(saved):
    path = saved({"state": {"model": OTHER, "ema": STATE}})
    for entry, expected in (("model", OTHER), ("ema", STATE), ("state/model", OTHER), ("state", STATE)):
        assert_same(load_state_dict(path, entry=entry), expected)


def test_any_prefix_of_a_network_is_left_out_and_said(saved, caplog):
    state = create_model(**TINY).state_dict()
    with caplog.at_level(logging.INFO, "guided_diffusion"):
        path = saved({"state_dict": {f"model.net.{name}": value for name, value in state.items()}})
        assert_same(load_state_dict(path), state)
    assert caplog.messages[-1] == f"{path}: the prefix model.net. of its names is left out"


@pytest.mark.parametrize("wrapped", [lambda names: {"state_dict": names, "epoch": 3}, lambda names: names])
def test_a_network_beside_others_is_taken_by_its_prefix(saved, caplog, wrapped):
    """As in checkpoints of Lightning, of which one holds a network, its average and the loss."""
    model = create_model(**TINY)
    state = model.state_dict()
    average = {name: value + 1 for name, value in state.items()}
    content = {f"model.{name}": value for name, value in state.items()} | {"loss.weight": torch.ones(1)}
    assert_same(load_state_dict(saved(wrapped(content))), state)
    classifier = create_classifier(**TINY_CLASSIFIER).state_dict()
    classifier = {f"classifier.{name}": value for name, value in classifier.items()}
    assert_same(load_state_dict(saved(wrapped(classifier | content))), state)
    path = saved(wrapped(content | {f"ema_model.net.{name}": value for name, value in average.items()}))
    with caplog.at_level(logging.INFO, "guided_diffusion"):
        assert_same(load_state_dict(path, entry=""), average)
    assert "ema_model.net is taken of" in caplog.text and "--checkpoint_entry chooses" in caplog.text
    assert_same(load_state_dict(path, entry="model"), state)
    load_into(model, path, TINY, "ema_model.net")
    assert_same(model.state_dict(), average)


def test_the_advice_to_choose_one_of_several_networks_works(tmp_path, capsys):
    states = {"denoiser": create_model(**TINY).state_dict(), "judge": create_classifier(**TINY_CLASSIFIER).state_dict()}
    names = {f"{network}.{name}": value for network, state in states.items() for name, value in state.items()}
    path, out = tmp_path / "last.ckpt", tmp_path / "judge.safetensors"
    torch.save({"state_dict": names, "pytorch-lightning_version": "2.5"}, path)
    assert call("convert_checkpoint", path, "--out", out, "--dtype", "float32") == 2
    assert ("holds several entries of weights, state_dict/denoiser, state_dict/judge: choose one with "
            "--checkpoint_entry") in capsys.readouterr().err
    assert call("convert_checkpoint", path, "--out", out, "--dtype", "float32", "--checkpoint_entry", "judge") == 0
    assert_same(load_state_dict(out), states["judge"])
    save_state(tmp_path / "both.safetensors", names)
    assert taken_entry(tmp_path / "both.safetensors", "judge") == "judge"


@pytest.mark.parametrize(("content", "entry", "said"), [
    ({"model": STATE, "ema": STATE}, "emma", "--checkpoint_entry emma: .* has model, ema"),
    (STATE, "ema", "--checkpoint_entry ema: .* has no entries of weights"),
    ({"one": STATE, "two": STATE}, None, "several entries of weights, one, two: choose one with scripts/convert"),
    ({"one": STATE, "two": STATE}, "", "several entries of weights, one, two: choose one with --checkpoint_entry"),
    ({"state": {0: {"exp_avg": torch.ones(1)}}, "param_groups": [{"lr": 0.1}]}, "", "is the state of an optimiser")])
def test_what_cannot_be_chosen_is_refused(saved, content, entry, said):
    with pytest.raises(UserError, match=said):
        load_state_dict(saved(content), entry=entry)


@pytest.mark.parametrize(("change", "said"), [
    (lambda v: v.to("meta"), "a meta tensor"), (lambda v: v.to_sparse(), "sparse"),
    (lambda v: v.to(torch.complex64), "complex"), (lambda v: v.to(torch.float8_e4m3fn), "8-bit floats"),
    (lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8), "quantized")])
def test_tensors_that_are_no_plain_arrays_are_refused(saved, change, said):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")          # torch calls quantized tensors deprecated
        path = saved({**STATE, "odd": change(torch.ones(2, 2))})
    with pytest.raises(UserError, match=f"x.pt: its tensor odd is .*{said}"):
        load_state_dict(path)


@pytest.mark.parametrize(("change", "said"), [
    (lambda v: v.to(torch.int32), "is of int32"), (lambda v: v > 0, "is of bool")])
def test_weights_are_floating_point_numbers(saved, change, said):
    model = create_model(**TINY)
    state = {name: change(value) for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=said):
        load_into(model, saved(state), TINY)


def test_the_state_of_a_training_is_named(tmp_path):
    model = create_model(**TINY)
    for name in ("model", "ema_0.9999"):
        save_state(tmp_path / f"{name}.safetensors", model.state_dict())
    save_state(tmp_path / "state.safetensors", {"model/a": torch.ones(1), "loop/step": torch.tensor(3)})
    with pytest.raises(UserError, match=r"is the state of a training; name ema_0.9999.safetensors or model.safetensors "
                                        r"beside it"):
        load_into(model, tmp_path / "state.safetensors", TINY)


def test_the_state_of_predictors_is_named(tmp_path):
    save_state(path := tmp_path / "room.state.safetensors", {"predictors/a": torch.ones(1)})
    with pytest.raises(UserError, match=r"a training of depth predictors; room.safetensors is written at its end"):
        load_into(create_model(**TINY), path, TINY)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_the_same_weights_and_metadata_are_the_same_bytes(tmp_path, suffix):
    metadata = {name: "é\n\"\x01" for name in "defghijk"} if suffix == "safetensors" else None
    contents = set()
    for i in range(8):
        (tmp_path / str(i)).mkdir()
        save_state(tmp_path / str(i) / f"x.{suffix}", STATE, metadata)
        contents.add((tmp_path / str(i) / f"x.{suffix}").read_bytes())
    assert len(contents) == 1
    assert_same(load_state_dict(tmp_path / "0" / f"x.{suffix}"), STATE)


def test_an_entry_that_was_chosen_is_part_of_what_images_depend_on():
    sha256 = {"model": "1" * 64}
    plain = identity({"seed": 0}, sha256)
    assert identity({"seed": 0, "checkpoint_entry": SampleOptions().checkpoint_entry}, sha256) == plain
    assert identity({"seed": 0, "checkpoint_entry": "model"}, sha256) != plain
