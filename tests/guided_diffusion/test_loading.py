"""A model by its name: what it is made of, what can be changed, and what is refused."""

import subprocess
import sys

import pytest
import torch
from networks import TINY

import guided_diffusion
from guided_diffusion import load
from guided_diffusion.errors import UserError
from guided_diffusion.guidance import ClassifierGuidance


def test_a_bundled_model_with_its_classifier():
    model, diffusion, classifier = load("fmnist32", timestep_respacing="50", device="cpu")
    assert diffusion.num_timesteps == 50
    for network in (model, classifier):
        assert not network.training
        assert not any(p.requires_grad or p.is_meta for p in network.parameters())
    guidance = [ClassifierGuidance(classifier, scale=1.0)]
    noise, y = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 7])
    step = diffusion.p_sample(model, noise, torch.tensor([49, 49]), noise=noise, model_kwargs={"y": y},
                              guidance=guidance)
    assert step["sample"].shape == (2, 1, 32, 32) and step["sample"].isfinite().all()


def test_every_bundled_diffusion_model_loads():
    for name, classifier in (("fmnist32", True), ("scenes32", True), ("scenes32_depth", False)):
        loaded = load(name)
        assert (loaded.classifier is not None) == classifier
        assert loaded.diffusion.num_timesteps == loaded.diffusion.original_num_steps or name


def test_weights_are_the_files():
    for flags in ({"use_bf16": True}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "use_fp16": True}):
        model, _, _ = load("fmnist32", **flags)
        assert {p.dtype for p in model.parameters()} == {torch.float32, torch.bfloat16}
    for flags in ({}, {"dtype": "float32", "use_bf16": True}):          # what is slow nowhere is the default
        assert {p.dtype for p in load("fmnist32", **flags).model.parameters()} == {torch.float32}


@pytest.mark.parametrize(("name", "flags", "message"), [
    ("fmist32", {}, r"no such model \(did you mean fmnist32\?\)"),
    ("fmnist32", {"timestep_respacng": "50"}, r"no such flag \(did you mean timestep_respacing\?\)"),
    ("fmnist32", {"timestep_respacing": "2000"}, "--timestep_respacing 2000"),
    ("fmnist32", {"num_channels": 64}, "pass --num_channels"),
    ("fmnist32_classifier", {}, "is a model of kind classifier, not a diffusion model"),
    ("fmnist32", {"dtype": "half"}, "dtype 'half': must be one of auto, float32, float16, bfloat16"),
    ("lsun_cat", {}, r"lsun_cat: needs its file: `guided-pixels fetch lsun_cat` .*model_path=\"models/lsun_cat.pt\""),
    ("lsun_cat", {"model_path": "/nowhere/model.pt"}, "/nowhere/model.pt: there is no such file"),
])
def test_what_cannot_be_loaded(name, flags, message):
    with pytest.raises(UserError, match=message):
        load(name, **flags)


def test_the_name_of_a_folder_that_is_not_there(tmp_path):
    (tmp_path / "myown.npz").touch()
    for name in ("my own", "rooms"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"^--model {tmp_path}/myown: there is no such folder or file "
                                        rf"\(did you mean {tmp_path}/my own\?\)$"):
        load(f"{tmp_path}/myown")
    with pytest.raises(UserError, match=r"^--model nowhere/x: there is no such folder or file$"):
        load("nowhere/x")


def test_a_released_model_takes_its_file(tiny_checkpoints):
    loaded = load("64x64_diffusion", model_path=tiny_checkpoints / "model.safetensors", **TINY, num_head_channels=-1,
                  use_new_attention_order=False)
    assert loaded.classifier is None and loaded.model.in_channels == 1


def test_the_package_itself_is_cheap_to_import_and_has_no_other_names():
    code = "import sys, guided_diffusion; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False False\n", done.stderr
    assert guided_diffusion.__version__
    with pytest.raises(AttributeError, match="has no attribute 'laod'"):
        guided_diffusion.laod  # noqa: B018
