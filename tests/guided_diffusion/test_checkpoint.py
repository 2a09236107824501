"""Checkpoints: what is loaded and refused, what weights show of a network, and the models known by name."""

import dataclasses
import hashlib
import json
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import released_checkpoints
from local_server import serving
from safetensors.torch import save_file
from torch import nn

from guided_diffusion import checkpoint, presets
from guided_diffusion.checkpoint import load_into, load_state_dict, read_metadata, save_state
from guided_diffusion.errors import UserError
from guided_diffusion.facts import check_options, infer_options
from guided_diffusion.guidance import Networks
from guided_diffusion.presets import find_preset, preset_names
from guided_diffusion.script_util import (
    classifier_defaults,
    create_classifier,
    create_model,
    model_and_diffusion_defaults,
    sr_create_model_and_diffusion,
    sr_model_and_diffusion_defaults,
)

FORMATS = ("safetensors", "zip", "pickle")

SMALL = {"image_size": 16, "in_channels": 1, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2",
         "attention_resolutions": "8", "class_cond": True, "num_classes": 10, "learn_sigma": True,
         "resblock_updown": True, "use_scale_shift_norm": True}
SMALL_CLASSIFIER = {"image_size": 16, "in_channels": 1, "num_classes": 10, "classifier_width": 32,
                    "classifier_depth": 1, "classifier_channel_mult": "1,2", "classifier_attention_resolutions": "8",
                    "classifier_num_head_channels": 32}


@pytest.fixture
def released():
    return released_checkpoints()


def shapes_of(create, **flags):
    """The state dict of a network, on the meta device."""
    with torch.device("meta"):
        made = create(**flags)
    return (made[0] if isinstance(made, tuple) else made).state_dict()


def tensors():
    rng = np.random.default_rng(0)
    return {"a.weight": torch.from_numpy(rng.standard_normal((3, 4), dtype=np.float32)),
            "a.half": torch.arange(5).half(), "step": torch.tensor(7)}


def write(path, format, state):
    """A file in one of the formats that are read."""
    if format == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=format == "zip")
    return path


def refusal(function, *args):
    with pytest.raises(UserError) as caught:
        function(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


def assert_same(state, expected):
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert state[name].dtype == value.dtype and torch.equal(state[name], value)


# Loading

@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("suffix", ["pt", "safetensors", "bin"])
def test_content_decides_the_format(tmp_path, format, suffix):
    assert_same(load_state_dict(write(tmp_path / f"model.{suffix}", format, tensors())), tensors())


@pytest.mark.parametrize("format", FORMATS)
def test_loaded_tensors_can_be_changed_without_changing_the_file(tmp_path, format):
    path = write(tmp_path / "model", format, tensors())
    load_state_dict(path)["a.weight"].zero_()
    assert_same(load_state_dict(path), tensors())


@pytest.mark.parametrize("format", FORMATS)
def test_a_name_that_is_no_text_is_no_damage(tmp_path, format):
    path = tmp_path / "caf\udce9"
    path.write_bytes(write(tmp_path / "model", format, tensors()).read_bytes())
    for read in (load_state_dict, read_metadata):
        assert "caf\udce9: is no name in UTF-8" in refusal(read, path)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize("format", ["safetensors", "zip"])
def test_large_files_are_mapped(tmp_path, format):
    def anonymous():
        _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
        return (resident - shared) * os.sysconf("SC_PAGE_SIZE")

    path = write(tmp_path / "model", format, {"weight": torch.ones(16 * 2**20)})
    load_state_dict(write(tmp_path / "warm", format, tensors()))
    before = anonymous()
    state = load_state_dict(path)
    assert anonymous() - before < 16 * 2**20
    assert state["weight"].sum() == 16 * 2**20


def test_parameters_come_back_as_plain_tensors(tmp_path):
    torch.save(dict(torch.nn.Linear(2, 3).named_parameters()), tmp_path / "model.pt")
    assert not any(value.requires_grad for value in load_state_dict(tmp_path / "model.pt").values())


def test_tensors_go_to_the_device(tmp_path):
    state = load_state_dict(write(tmp_path / "model", "zip", tensors()), device="meta")
    assert all(value.device.type == "meta" for value in state.values())


# From an address

@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("guided_diffusion.fetch.PAUSE", 0.001)
    with serving() as server:
        yield server


@pytest.mark.parametrize("format", FORMATS)
def test_addresses_are_fetched_once(tmp_path, server, format):
    content = write(tmp_path / "model", format, tensors()).read_bytes()
    url = server.add("/model.pt", content, cuts=[10])
    for _ in range(2):
        assert_same(load_state_dict(url), tensors())
    assert server.ranges == [None, "bytes=10-"]
    path = checkpoint.locate(f"{url}#sha256={hashlib.sha256(content).hexdigest()}")
    assert path.read_bytes() == content and read_metadata(url) == {}
    assert "instead of 000" in refusal(load_state_dict, f"{url}#sha256={'0' * 64}")


def test_an_address_goes_into_a_network(tmp_path, server):
    source, target = create_model(**SMALL), create_model(**SMALL)
    save_state(tmp_path / "model.pt", source.state_dict())
    url = server.add("/model.pt", (tmp_path / "model.pt").read_bytes())
    load_into(target, url, SMALL)
    assert_same(target.state_dict(), source.state_dict())
    message = refusal(load_into, target, url, SMALL | {"class_cond": False})
    assert message == f"{checkpoint.locate(url)} has label_emb: pass --class_cond True"


@pytest.mark.parametrize(("change", "said"), [
    (lambda content: b"not found", "is no checkpoint"), (lambda content: b"", "is empty"),
    (lambda content: content[:-100], "is truncated or damaged"),
    (lambda content: b"<!doctype html>", "is a web page")])
@pytest.mark.parametrize("format", ["safetensors", "zip"])
def test_garbage_is_not_kept(tmp_path, server, format, change, said):
    content = write(tmp_path / "model", format, tensors()).read_bytes()
    url = server.add("/model.pt", change(content), length=False)
    assert refusal(load_state_dict, url).startswith(f"{url} gave a file that {said}")
    server.add("/model.pt", content)
    assert_same(load_state_dict(url), tensors())


# What is refused

class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("save", [
    torch.save, lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    lambda state, path: path.write_bytes(pickle.dumps(state, protocol=2)),
    lambda state, path: path.write_bytes(pickle.dumps(state))], ids=["zip", "old", "pickle2", "pickle"])
def test_malicious_pickle_does_not_run(tmp_path, save):
    victim = tmp_path / "ran"
    state = {"a": torch.ones(2), "b": Malicious(victim)}
    pickle.loads(pickle.dumps(state))
    assert victim.exists()
    victim.unlink()
    save(state, tmp_path / "model.pt")
    assert "plain tensors" in refusal(load_state_dict, tmp_path / "model.pt")
    assert not victim.exists()


@pytest.mark.parametrize(("value", "named"), [
    (np.ones(3), "numpy"), (torch.nn.Linear(2, 2), "Linear"), (Malicious("/nowhere"), "system")])
def test_foreign_objects_are_named(tmp_path, value, named):
    torch.save({"a": value}, tmp_path / "model.pt")
    message = refusal(load_state_dict, tmp_path / "model.pt")
    assert str(tmp_path / "model.pt") in message and named in message and "only plain tensors are loaded" in message


@pytest.mark.parametrize(("value", "said"), [
    (torch.ones(2), "not one Tensor"), ([torch.ones(2)], "not one list"), ({}, "holds no tensors"),
    ({"model": {"a": 2.0}, "step": 3}, "'model' is a dict"), ({"lr": 0.1}, "'lr' is a float"),
    ({3: torch.ones(2)}, "entry 3")])
def test_something_else_than_tensors_by_name_is_refused(tmp_path, value, said):
    torch.save(value, tmp_path / "model.pt")
    message = refusal(load_state_dict, tmp_path / "model.pt")
    assert message.startswith(str(tmp_path / "model.pt")) and said in message


@pytest.mark.parametrize("content", [b"<html>404: not found</html>", b"{}", b"\x89PNG\r\n\x1a\n0000", b"PK\x03\x04",
                                     b"\x80", b"\x80\x05hello", bytes(100), struct.pack("<Q", 10**15) + b"{}"])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    assert refusal(load_state_dict, path).startswith(f"{path}: is ")


def test_archives_of_something_else_are_refused(tmp_path):
    np.savez(tmp_path / "samples.npz", arr_0=np.ones(3))
    assert "no checkpoint" in refusal(load_state_dict, tmp_path / "samples.npz")


def test_missing_empty_and_folder_are_refused(tmp_path):
    assert "no such file" in refusal(load_state_dict, tmp_path / "none.pt")
    assert "is a folder" in refusal(load_state_dict, tmp_path)
    (tmp_path / "empty.pt").touch()
    assert "is empty" in refusal(load_state_dict, tmp_path / "empty.pt")
    assert "cannot be read" in refusal(load_state_dict, tmp_path / "empty.pt" / "model.pt")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("share", [0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.9999])
def test_truncated_files_are_refused(tmp_path, format, share):
    state = {f"{name}.{i}": value for i in range(50) for name, value in tensors().items()}
    path = write(tmp_path / "model.pt", format, state)
    content = path.read_bytes()
    path.write_bytes(content[:max(1, int(share * len(content)))])
    assert str(path) in refusal(load_state_dict, path)
    if format == "safetensors":
        assert str(path) in refusal(read_metadata, path)


# Saving

@pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "model.pth"])
def test_round_trip(tmp_path, name):
    save_state(tmp_path / name, tensors())
    assert_same(load_state_dict(tmp_path / name), tensors())
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_shared_views_and_strided_tensors_are_saved_as_they_read(tmp_path, name):
    base = torch.arange(60000.0).reshape(2, 3, 100, 100)
    state = {"a": base, "same": base, "row": base[1, :1], "transposed": base.transpose(1, 3), "empty": base[:0],
             "channels_last": base.to(memory_format=torch.channels_last), "expanded": torch.ones(1).expand(4),
             "parameter": torch.nn.Parameter(torch.ones(2))}
    save_state(tmp_path / name, state)
    assert_same(load_state_dict(tmp_path / name), {name: value.detach() for name, value in state.items()})


def test_a_view_does_not_carry_the_tensor_that_it_views(tmp_path):
    save_state(tmp_path / "model.pt", {"a": torch.zeros(100000)[:4]})
    assert (tmp_path / "model.pt").stat().st_size < 10000


def test_metadata(tmp_path):
    save_state(tmp_path / "with.safetensors", tensors(), {"config": "{}", "step": "3"})
    save_state(tmp_path / "without.safetensors", tensors())
    save_state(tmp_path / "model.pt", tensors())
    assert read_metadata(tmp_path / "with.safetensors") == {"config": "{}", "step": "3"}
    assert read_metadata(tmp_path / "without.safetensors") == read_metadata(tmp_path / "model.pt") == {}
    assert "no such file" in refusal(read_metadata, tmp_path / "none.safetensors")
    assert ".safetensors" in refusal(save_state, tmp_path / "new.pt", tensors(), {"step": "3"})


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, name, monkeypatch):
    save_state(tmp_path / name, tensors())

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    assert "No space left" in refusal(save_state, tmp_path / name, {"b": torch.ones(1)})
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert_same(load_state_dict(tmp_path / name), tensors())


def test_where_nothing_can_be_written(tmp_path):
    assert "cannot be written" in refusal(save_state, tmp_path / "none" / "model.pt", tensors())
    save_state(tmp_path / "model.pt", tensors())
    assert "cannot be written" in refusal(save_state, tmp_path / "model.pt" / "model.safetensors", tensors())
    assert "must end in" in refusal(save_state, tmp_path / "model.ckpt", tensors())


# What weights show

def assert_shown(found, flags, size):
    """`found` is what flags say; flags of a classifier without their prefix."""
    flags = {name.removeprefix("classifier_"): value for name, value in flags.items()}
    flags |= {"num_channels": flags.get("width", flags.get("num_channels")),
              "num_res_blocks": flags.get("depth", flags.get("num_res_blocks"))}
    for name in ("num_channels", "num_res_blocks", "use_scale_shift_norm", "resblock_updown"):
        assert found[name] == flags[name], name
    for name in {"class_cond", "learn_sigma", "pool", "in_channels"} & flags.keys() & found.keys():
        assert found[name] == flags[name], name
    resolutions = [int(part) for part in flags["attention_resolutions"].split(",") if part]
    assert found["attention_factors"] == tuple(sorted(size // r for r in resolutions))


def test_weights_show_the_flags_of_every_released_checkpoint(released):
    multipliers = {512: (0.5, 1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4),
                   32: (1, 2, 2, 2)}
    for entry in released.values():
        flags, found = {"resblock_updown": False, **entry["flags"]}, infer_options(entry["state"])
        size = flags.get("large_size") or flags["image_size"]
        assert found["kind"] == entry["kind"]
        assert_shown(found, flags, size)
        assert found["channel_mult"] == multipliers[256 if entry["kind"] == "upsampler" else size]
        assert found["in_channels"] == 3
        assert found.get("num_classes", 0) == (1000 if flags.get("class_cond", True) else 0)
        assert found.get("image_size") == (size if entry["kind"] == "classifier" else None)
        check_options(entry["state"], flags, "file")


@pytest.mark.parametrize("changes", [
    {}, {"learn_sigma": False, "use_scale_shift_norm": False}, {"resblock_updown": False, "in_channels": 3},
    {"class_cond": False, "attention_resolutions": ""}, {"attention_resolutions": "16,8", "num_res_blocks": 3},
    {"channel_mult": "1,1,1", "num_res_blocks": 2, "attention_resolutions": ""},
    {"channel_mult": "2", "attention_resolutions": ""},
    {"channel_mult": "1.5,2", "num_channels": 64, "attention_resolutions": "16"}])
def test_weights_of_a_unet_show_its_flags(changes):
    flags = SMALL | changes
    state = shapes_of(create_model, **flags)
    check_options(state, flags, "file")
    found = infer_options(state)
    if flags["channel_mult"] == "2":
        assert "resblock_updown" not in found
        return
    assert_shown(found, flags, 16)
    assert found["channel_mult"] == tuple(float(part) for part in flags["channel_mult"].split(","))
    assert found.get("num_classes") == (10 if flags["class_cond"] else None)


@pytest.mark.parametrize("pool", ["adaptive", "attention", "spatial", "spatial_v2"])
@pytest.mark.parametrize("changes", [
    {}, {"classifier_resblock_updown": False, "classifier_channel_mult": "1,1,1"},
    {"classifier_use_scale_shift_norm": False, "classifier_depth": 3}, {"classifier_channel_mult": "1,1,2"}])
def test_weights_of_a_classifier_show_its_flags(pool, changes):
    flags = classifier_defaults() | SMALL_CLASSIFIER | changes | {"classifier_pool": pool}
    state = shapes_of(create_classifier, **flags)
    check_options(state, flags, "file")
    found = infer_options(state)
    assert_shown(found, flags, 16)
    assert found["num_classes"] == 10 and found.get("image_size") == (16 if pool == "attention" else None)


def test_what_weights_leave_open_has_no_entry():
    flags = SMALL_CLASSIFIER | {"classifier_channel_mult": "1,1,1", "classifier_attention_resolutions": "",
                                "classifier_pool": "adaptive"}
    state = shapes_of(create_classifier, **flags)
    found = infer_options(state)
    assert found["num_channels"] == 32 and not {"num_res_blocks", "channel_mult", "resblock_updown"} & found.keys()
    check_options(state, flags, "file")


def test_shapes_are_enough():
    state = shapes_of(create_model, **SMALL)
    assert infer_options({name: list(value.shape) for name, value in state.items()}) == infer_options(state)


@pytest.mark.parametrize("state", [
    {}, {"fc.weight": (3, 4)}, {"input_blocks.0.0.weight": (32, 3, 3, 3), "out.2.weight": (3, 32)},
    {"time_embed.0.weight": ()}])
def test_other_networks_are_refused(state):
    assert "ADM" in refusal(infer_options, state)
    message = refusal(check_options, state, SMALL, "models/x.pt")
    assert message.startswith("models/x.pt: ") and "ADM" in message


def test_incomplete_weights_are_refused():
    state = shapes_of(create_model, **SMALL)
    for part in ("time_embed", "input_blocks.1", "middle_block", "output_blocks.1", "out."):
        kept = {name: value for name, value in state.items() if not name.startswith(part)}
        assert "ADM" in refusal(infer_options, kept)


# Flags against a file

@pytest.mark.parametrize(("given", "said"), [
    ({"num_channels": 64}, "has 32 base channels: pass --num_channels 32, not 64"),
    ({"num_res_blocks": 2}, "has 1 residual blocks per level: pass --num_res_blocks 1, not 2"),
    ({"channel_mult": "1,2,2"}, "has channel multipliers 1,2: pass --channel_mult 1,2, not 1,2,2"),
    ({"channel_mult": "", "image_size": 64, "attention_resolutions": "32"},
     "has channel multipliers 1,2: pass --channel_mult 1,2"),
    ({"attention_resolutions": "16,8"}, "has attention at 8: pass --attention_resolutions 8, not 16,8"),
    ({"class_cond": False}, "has label_emb: pass --class_cond True"),
    ({"num_classes": 1000}, "has 10 classes: pass --num_classes 10, not 1000"),
    ({"learn_sigma": False}, "has learned variance: pass --learn_sigma True"),
    ({"in_channels": 3}, "has 1 image channels: pass --in_channels 1, not 3"),
    ({"resblock_updown": False}, "has residual blocks that resample: pass --resblock_updown True"),
    ({"use_scale_shift_norm": False}, "has scale-shift norms: pass --use_scale_shift_norm True"),
    ({"class_cond": False, "num_channels": 64}, "has 32 base channels: pass --num_channels 32, not 64; "
                                                "has label_emb: pass --class_cond True"),
])
def test_each_mismatch_names_the_flag_to_pass(given, said):
    state = shapes_of(create_model, **SMALL)
    assert refusal(check_options, state, SMALL | given, "models/x.pt") == f"models/x.pt {said}"


@pytest.mark.parametrize(("built", "said"), [
    ({"class_cond": False}, "has no label_emb: pass --class_cond False"),
    ({"learn_sigma": False}, "has no learned variance: pass --learn_sigma False"),
    ({"resblock_updown": False}, "has no residual blocks that resample: pass --resblock_updown False"),
    ({"use_scale_shift_norm": False}, "has no scale-shift norms: pass --use_scale_shift_norm False"),
    ({"attention_resolutions": ""}, "has no attention outside its middle block: "
                                    "pass --attention_resolutions '', not 8"),
])
def test_what_the_file_lacks(built, said):
    state = shapes_of(create_model, **SMALL | built)
    assert refusal(check_options, state, SMALL, "models/x.pt") == f"models/x.pt {said}"


@pytest.mark.parametrize(("given", "said"), [
    ({"classifier_width": 128}, "has 32 base channels: pass --classifier_width 32, not 128"),
    ({"classifier_depth": 2}, "has 1 residual blocks per level: pass --classifier_depth 1, not 2"),
    ({"classifier_pool": "spatial"}, "has attention pooling: pass --classifier_pool attention, not spatial"),
    ({"classifier_attention_resolutions": "16"},
     "has attention at 8: pass --classifier_attention_resolutions 8, not 16"),
    ({"classifier_channel_mult": "1,1"},
     "has channel multipliers 1,2: pass --classifier_channel_mult 1,2, not 1,1"),
    ({"image_size": 32}, "has a pool for images of 16 pixels: pass --image_size 16, not 32"),
    ({"num_classes": 1000}, "has 10 classes: pass --num_classes 10, not 1000"),
])
def test_each_mismatch_of_a_classifier_names_the_flag_to_pass(given, said):
    flags = classifier_defaults() | SMALL_CLASSIFIER
    state = shapes_of(create_classifier, **flags)
    assert refusal(check_options, state, flags | given, "models/c.pt") == f"models/c.pt {said}"


def test_a_wrong_image_size_is_told_by_the_default_multipliers(released):
    entry = released["256x256_diffusion"]
    assert refusal(check_options, entry["state"], entry["flags"] | {"image_size": 128}, "x.pt") == (
        "x.pt has channel multipliers 1,1,2,2,4,4: pass --image_size 256, not 128")
    entry = released["64_256_upsampler"]
    assert refusal(check_options, entry["state"], entry["flags"] | {"large_size": 64}, "x.pt") == (
        "x.pt has channel multipliers 1,1,2,2,4,4: pass --large_size 512 or 256, not 64")


def test_a_network_of_another_kind_is_named():
    states = {"diffusion": shapes_of(create_model, **SMALL),
              "classifier": shapes_of(create_classifier, **SMALL_CLASSIFIER),
              "upsampler": shapes_of(sr_create_model_and_diffusion, num_channels=32, large_size=64, small_size=16)}
    assert refusal(check_options, states["classifier"], SMALL, "c.pt") == (
        "c.pt is a classifier, not a diffusion model: pass it as --classifier_path")
    assert refusal(check_options, states["diffusion"], SMALL_CLASSIFIER, "x.pt") == (
        "x.pt is a diffusion model, not a classifier: pass it as --model_path")
    assert refusal(check_options, states["upsampler"], SMALL, "u.pt") == "u.pt is an upsampler, not a diffusion model"
    assert refusal(check_options, states["diffusion"], {"large_size": 64}, "x.pt") == (
        "x.pt is a diffusion model, not an upsampler")


# Into a network

@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_load_into_restores_the_network(tmp_path, name):
    source, target = create_model(**SMALL), create_model(**SMALL)
    for value in source.parameters():
        torch.nn.init.normal_(value, std=0.1)
    save_state(tmp_path / name, source.state_dict())
    load_into(target, tmp_path / name, SMALL)
    assert_same(target.state_dict(), source.state_dict())
    x, t, y = torch.randn(2, 1, 16, 16), torch.tensor([3, 900]), torch.tensor([0, 9])
    assert torch.equal(source(x, t, y), target(x, t, y))


@pytest.mark.parametrize("name", ["critic.safetensors", "critic.pt"])
def test_a_network_of_any_kind_is_loaded_by_its_names(tmp_path, name):
    def critic(seed, width=8):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.Conv2d(width, 1, 3))

    path, x = tmp_path / name, torch.randn(2, 1, 8, 8)
    trained = critic(0)
    trained(x)                                          # the batch norm counts it
    save_state(path, trained.state_dict())
    nets = Networks(create_model(**SMALL), torch.device("cpu"))
    loaded = nets.load(critic(1), str(path), {})
    assert torch.equal(loaded(x), trained.eval()(x)) and not any(one.requires_grad for one in loaded.parameters())
    assert loaded[1].num_batches_tracked == 1
    assert refusal(nets.load, critic(1, width=4), str(path), {}) == (
        f"{path} does not fit the network in 7 of its weights: 0.bias is 8, not 4, 0.weight is 8x1x3x3, not 4x1x3x3, "
        "1.bias is 8, not 4, ...")
    assert refusal(nets.load, critic(1).append(nn.Conv2d(1, 1, 1)), str(path), {}) == (
        f"{path} does not fit the network in 2 of its weights: 3.bias is missing, 3.weight is missing")
    assert refusal(nets.load, critic(1), str(path), SMALL).startswith(f"{path}: the weights are not those of an ADM")


def test_load_into_keeps_the_type_of_the_network(tmp_path):
    source, target = create_classifier(**SMALL_CLASSIFIER), create_classifier(**SMALL_CLASSIFIER).half()
    save_state(tmp_path / "model.safetensors", source.state_dict())
    load_into(target, tmp_path / "model.safetensors", SMALL_CLASSIFIER)
    assert_same(target.state_dict(), {name: value.half() for name, value in source.state_dict().items()})


def test_other_misfits_are_reported_shortly_and_change_nothing(tmp_path):
    model = create_model(**SMALL)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {name: value + 1 for name, value in before.items()}
    del state["middle_block.1.norm.bias"]
    save_state(tmp_path / "x.pt", state | {"extra": torch.ones(1), "out.0.bias": torch.ones(3)})
    assert refusal(load_into, model, tmp_path / "x.pt", SMALL) == (
        f"{tmp_path}/x.pt does not fit the network in 3 of its weights: extra is not in the network, "
        "middle_block.1.norm.bias is missing, out.0.bias is 3, not 32")
    assert_same(model.state_dict(), before)
    save_state(tmp_path / "x.pt", state | {f"extra.{i}": torch.ones(1) for i in range(400)})
    message = refusal(load_into, model, tmp_path / "x.pt", SMALL)
    assert "401 of its weights" in message and len(message) < 300


# Models known by name

def test_released_presets_hold_the_released_flags(released):
    defaults = {"diffusion": model_and_diffusion_defaults(), "upsampler": sr_model_and_diffusion_defaults(),
                "classifier": classifier_defaults()}
    for name, entry in released.items():
        preset = find_preset(name)
        assert preset.kind == entry["kind"] and preset.path is None and preset.parameters == entry["parameters"]
        when = "march-2021" if preset.implied else "jul-2021"
        assert preset.url == f"https://openaipublic.blob.core.windows.net/diffusion/{when}/{name}.pt"
        assert preset.options.keys() <= defaults[preset.kind].keys()
        flags = defaults[preset.kind] | preset.options
        assert {flag: flags[flag] for flag in entry["flags"]} == entry["flags"]
        check_options(entry["state"], flags, name)
        if preset.implied:          # the code that released it has other defaults, so all of its flags are stated
            assert entry["flags"].keys() <= preset.options.keys()


def test_the_horse_without_dropout_differs_in_its_dropout_alone():
    plain, without = find_preset("lsun_horse"), find_preset("lsun_horse_nodropout")
    assert plain.options == {**without.options, "dropout": 0.1} and plain.parameters == without.parameters


def test_every_class_guided_preset_has_a_classifier_of_its_size():
    for name in preset_names():
        preset = find_preset(name)
        if preset.classifier is not None:
            classifier = find_preset(preset.classifier)
            assert classifier.kind == "classifier" and classifier.options["image_size"] == preset.options["image_size"]
    assert find_preset("256x256_diffusion_uncond").classifier == "256x256_classifier"
    assert find_preset("lsun_cat").classifier is None


def test_bundled_models_are_found_by_their_file(tmp_path, monkeypatch):
    (tmp_path / "presets.yaml").write_text((presets.MODELS / "presets.yaml").read_text())
    monkeypatch.setattr(presets, "MODELS", tmp_path)
    model = create_model(**SMALL)
    save_state(tmp_path / "tiny.safetensors", model.state_dict(), {"config": json.dumps(SMALL)})
    save_state(tmp_path / "tiny_classifier.safetensors", tensors(), {"config": json.dumps(SMALL_CLASSIFIER)})
    save_state(tmp_path / "alone.safetensors", tensors(), {"config": json.dumps({"large_size": 64})})
    assert preset_names()[:3] == ["alone", "tiny", "tiny_classifier"]
    assert find_preset("alone").kind == "upsampler" and find_preset("alone").classifier is None
    assert find_preset("tiny_classifier").kind == "classifier"
    preset = find_preset("tiny")
    assert dataclasses.asdict(preset) == {
        "name": "tiny", "kind": "diffusion", "options": SMALL, "guidance": {},
        "path": tmp_path / "tiny.safetensors", "classifier": "tiny_classifier", "url": None, "parameters": None,
        "open_choice": "", "licence": None, "data": "", "implied": False, "about": {}, "sampling": {}}
    load_into(create_model(**preset.options), preset.path, preset.options)

    save_state(tmp_path / "bare.safetensors", tensors())
    assert "no config" in refusal(find_preset, "bare")
    (tmp_path / "bare.safetensors").write_bytes(b"")
    assert "is empty" in refusal(find_preset, "bare")


def test_an_unknown_name_lists_the_names_there_are():
    message = refusal(find_preset, "256x256_difusion")
    assert "--model 256x256_difusion" in message and "did you mean 256x256_diffusion?" in message
    assert all(name in message for name in preset_names())


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_saved_files_have_the_mode_of_any_new_file(tmp_path, suffix):
    (tmp_path / "other").touch()
    checkpoint.save_state(tmp_path / f"a{suffix}", {"w": torch.zeros(2)})
    assert (tmp_path / f"a{suffix}").stat().st_mode == (tmp_path / "other").stat().st_mode
