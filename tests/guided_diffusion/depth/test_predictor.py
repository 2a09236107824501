"""Depth predictors: what they compute, what they keep, and the files and networks that they refuse; the depth prior."""

import json

import pytest
import torch
from networks import with_random_weights
from torch.nn import functional as F

from guided_diffusion.capture import capture_features
from guided_diffusion.checkpoint import read_metadata, save_state
from guided_diffusion.depth.features import (
    decoder_blocks,
    decoder_features,
    feature_channels,
    parse_blocks,
    upsampled,
)
from guided_diffusion.depth.predictor import (
    TIME_CHANNELS,
    DepthPredictor,
    DepthPredictors,
    check_fits,
    load_predictors,
    save_predictors,
)
from guided_diffusion.depth.prior import load_prior
from guided_diffusion.errors import UserError
from guided_diffusion.nn import timestep_embedding
from guided_diffusion.presets import find_preset
from guided_diffusion.script_util import create_classifier, create_gaussian_diffusion, create_model

BLOCKS = ("output.0", "output.1", "output.3")


@pytest.fixture
def tiny_flags(tiny_flags):
    """Of a network whose blocks differ in their channels."""
    return tiny_flags | {"channel_mult": "1,2"}


@pytest.fixture
def model(tiny_flags):
    return with_random_weights(create_model(**tiny_flags | {"in_channels": 3, "class_cond": False}))


def images(count=2, size=16, seed=0):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def predictors_for(model, sha256="ab" * 32, **branches):
    branches = branches or {"strong": BLOCKS, "weak": BLOCKS[1:2]}
    channels = {name: feature_channels(model, blocks) for name, blocks in branches.items()}
    return with_random_weights(DepthPredictors(channels, model.image_size, "1,9", sha256))


# Features


def concatenated(maps, size):
    """The maps (N, C_k, h_k, w_k) at one size, stacked: (N, sum of C_k, size, size)."""
    return torch.cat([upsampled(x, size) for x in maps.values()], dim=1)


def test_features_are_the_outputs_of_the_blocks(model):
    x, t = images(), torch.tensor([3, 500])
    maps = decoder_features(model, BLOCKS, x, t)
    with capture_features(model, BLOCKS) as expected:
        model(x, t)
    assert tuple(maps) == BLOCKS and all(torch.equal(maps[name], expected[name]) for name in BLOCKS)
    assert {name: x.shape[1] for name, x in maps.items()} == feature_channels(model, BLOCKS)
    stacked = concatenated(maps, 16)
    assert stacked.shape == (2, sum(x.shape[1] for x in maps.values()), 16, 16)
    assert torch.equal(stacked[:, -32:], maps["output.3"])          # as large as the image already
    first = F.interpolate(maps["output.0"], scale_factor=2, mode="bilinear", align_corners=False)
    assert torch.allclose(stacked[:, :64], first)


@pytest.mark.parametrize("updown", [True, False])
def test_channels_of_every_block(tiny_flags, updown):
    model = create_model(**tiny_flags | {"class_cond": False, "resblock_updown": updown})
    with capture_features(model, model.feature_blocks) as maps:
        model(torch.zeros(1, 1, 16, 16), torch.tensor([1]))
    assert feature_channels(model, tuple(maps)) == {name: x.shape[1] for name, x in maps.items()}


def test_gradients_reach_the_image_and_no_weight(model):
    model.requires_grad_(False)
    x = images().requires_grad_()
    predictors = predictors_for(model).requires_grad_(False)
    predictors(decoder_features(model, predictors.blocks, x, torch.tensor([3, 500])), torch.tensor([3, 500]))[
        "strong"].sum().backward()
    assert x.grad.abs().mean() > 1e-6
    assert all(parameter.grad is None for parameter in [*model.parameters(), *predictors.parameters()])
    maps = decoder_features(model, BLOCKS, x, torch.tensor([3, 500]), graph=False)
    assert not any(value.requires_grad for value in maps.values())


def test_gradient_is_that_of_finite_differences(model):
    predictor, t = predictors_for(model).double().branches["strong"], torch.tensor([300])
    maps = {name: x.double().requires_grad_() for name, x in decoder_features(
        model, BLOCKS, images(1), t, graph=False).items()}
    depth = predictor(maps, t)
    assert depth.dtype == torch.float64
    gradients = torch.autograd.grad(depth.square().sum(), list(maps.values()))
    directions = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double() for x in maps.values()]

    def moved(length):
        return predictor({name: x + length * d for (name, x), d in zip(maps.items(), directions, strict=True)},
                         t).square().sum().item()

    slope = sum((g * d).sum().item() for g, d in zip(gradients, directions, strict=True))
    assert slope == pytest.approx((moved(1e-5) - moved(-1e-5)) / 2e-5, rel=1e-6)


def test_blocks_by_index(model):
    assert decoder_blocks(model) == ("output.0", "output.1", "output.2", "output.3")
    assert parse_blocks("2,0", model, "strong_blocks") == ("output.2", "output.0")
    with pytest.raises(UserError, match="--weak_blocks 6: the network has no decoder block 6, it has 0 to 3"):
        parse_blocks("6", model, "weak_blocks")
    for wrong in ("", "a", "1,1", "1;2"):
        with pytest.raises(UserError, match=r"--weak_blocks .* must be different indices"):
            parse_blocks(wrong, model, "weak_blocks")


# Predictors


def test_the_factored_layer_is_an_mlp_on_concatenated_features(model):
    predictor, t = predictors_for(model).branches["strong"].double(), torch.tensor([3, 500])
    maps = {name: x.double() for name, x in decoder_features(model, BLOCKS, images(), t).items()}
    predictor.standardise(maps)
    depth = predictor(maps, t)

    stacked = (concatenated(maps, 16) - predictor.mean[:, None, None]) / predictor.std[:, None, None]
    emb = predictor.time(timestep_embedding(t, TIME_CHANNELS).double())
    hidden = F.conv2d(stacked, torch.cat(list(predictor.first), dim=1)[:, :, None, None]) + emb[:, :, None, None]
    assert depth.shape == (2, 1, 16, 16)
    assert torch.allclose(depth, predictor.rest(hidden), atol=1e-10)
    assert not torch.allclose(depth, predictor(maps, t + 100), atol=1e-3)          # the step counts


def test_standardised_features_have_mean_0_and_variance_1():
    maps = {"output.0": 5 + 100 * torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
            "output.1": torch.full((4, 2, 16, 16), 7.0)}
    predictor = DepthPredictor({"output.0": 3, "output.1": 2}, 16)
    predictor.standardise(maps)
    x = (maps["output.0"] - predictor.mean[:3, None, None]) / predictor.std[:3, None, None]
    assert x.mean(dim=(0, 2, 3)).abs().max() < 1e-5 and (x.std(dim=(0, 2, 3), correction=0) - 1).abs().max() < 1e-5
    assert torch.isfinite(predictor(maps, torch.tensor([0, 1, 2, 3]))).all()          # a constant feature does no harm


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_give_float32_depth(model, dtype):
    predictors, t = predictors_for(model), torch.tensor([3, 500])
    maps = decoder_features(model, predictors.blocks, images(), t)
    exact = predictors(maps, t)["strong"]
    half = predictors({name: x.to(dtype) for name, x in maps.items()}, t)["strong"]
    assert half.dtype == torch.float32 and (half - exact).abs().max() < 0.05 * exact.std()


def test_file_of_predictors(model, tmp_path):
    path = tmp_path / "p.safetensors"
    predictors = predictors_for(model)
    predictors.branches["strong"].mean.fill_(0.5)
    save_predictors(path, predictors, {"command": "by hand"})
    loaded = load_predictors(path)
    assert loaded.blocks == predictors.blocks and loaded.branches["weak"].blocks == ("output.1",)
    assert (loaded.size, loaded.depth_range, loaded.network_sha256) == (16, "1,9", "ab" * 32)
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    maps, t = decoder_features(model, BLOCKS, images(), torch.tensor([3, 5])), torch.tensor([3, 5])
    for name, depth in predictors(maps, t).items():
        assert torch.equal(loaded(maps, t)[name], depth)
    metadata = read_metadata(path)
    assert metadata["kind"] == "depth_predictors" and metadata["command"] == "by hand"
    assert json.loads(metadata["branches"])["weak"] == {"output.1": 64}


def test_files_that_are_not_predictors(model, tiny_checkpoints, tmp_path):
    with pytest.raises(UserError, match=r"gone\.safetensors: there is no such file"):
        load_predictors(tmp_path / "gone.safetensors")
    with pytest.raises(UserError, match="is no file of depth predictors"):
        load_predictors(tiny_checkpoints / "model.safetensors")
    whole, damaged = tmp_path / "p.safetensors", tmp_path / "damaged.safetensors"
    save_predictors(whole, predictors_for(model))
    damaged.write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"damaged\.safetensors: is truncated or damaged"):
        load_predictors(damaged)
    for change in ({"branches": "{"}, {"size": "x"}, {"branches": '{"strong": {"output.0": 5}}'}, {"branches": "[1]"},
                   {"branches": '{"a.b": {"output.0": 64}}'}):
        save_state(damaged, predictors_for(model).state_dict(), read_metadata(whole) | change)
        with pytest.raises(UserError, match=r"damaged\.safetensors: is damaged"):
            load_predictors(damaged)


def test_predictors_fit_one_network_only(model, tiny_flags):
    predictors = predictors_for(model)
    check_fits(predictors, model, "ab" * 32)
    check_fits(predictors, model, None)
    with pytest.raises(UserError, match=r"another network: .* abababababababab\.\.\., not cdcdcdcdcdcdcdcd"):
        check_fits(predictors, model, "cd" * 32)
    with pytest.raises(UserError, match=r"64 channels from block 'output\.0', which has 128"):
        check_fits(predictors, create_model(**tiny_flags | {"channel_mult": "1,4"}), None)
    with pytest.raises(UserError, match="for images of 16 pixels, and the network's have 32"):
        check_fits(predictors, create_model(**tiny_flags | {"image_size": 32, "attention_resolutions": "16"}), None)
    with pytest.raises(UserError, match=r"'output.3' is no block of this network"):
        check_fits(predictors, create_model(**tiny_flags | {"channel_mult": "1", "attention_resolutions": "16"}), None)


def test_each_branch_must_fit_the_network(model):
    channels = feature_channels(model, BLOCKS)
    wrong = {"strong": {BLOCKS[0]: 7}, "weak": channels}             # of the same block
    with pytest.raises(UserError, match=rf"read 7 channels from block '{BLOCKS[0]}', which has {channels[BLOCKS[0]]}"):
        check_fits(DepthPredictors(wrong, model.image_size, "1,9", "ab" * 32), model, None)


# The prior


def write_prior(folder, flags, **metadata):
    flags = {"diffusion_steps": 50, **flags}
    model = with_random_weights(create_model(**{k: v for k, v in flags.items() if k in PRIOR}))
    path = folder / "prior.safetensors"
    save_state(path, model.state_dict(), metadata or {"config": json.dumps(flags)})
    return path, model


PRIOR = {"image_size": 16, "in_channels": 1, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2",
         "attention_resolutions": "8", "num_heads": 2, "class_cond": False, "num_classes": 2, "learn_sigma": True}


@pytest.mark.parametrize("predicted", [{}, {"predict_v": True}, {"predict_xstart": True}])
def test_noise_of_the_prior(tmp_path, predicted):
    path, model = write_prior(tmp_path, PRIOR | predicted | {"timestep_respacing": "5"})
    prior = load_prior(path)
    assert prior.image_size == 16 and prior.diffusion.num_timesteps == 50          # whole, whatever it was sampled with
    assert not any(parameter.requires_grad for parameter in prior.model.parameters())
    d, tau = images(2)[:, :1].requires_grad_(), torch.tensor([1, 40])
    eps = prior.eps(d, tau)
    diffusion = create_gaussian_diffusion(steps=50, learn_sigma=True, **predicted)
    assert torch.allclose(eps, diffusion.interpret(model(d, tau), d, tau).eps, rtol=1e-4, atol=1e-5)
    eps.sum().backward()
    assert eps.shape == d.shape and d.grad.abs().mean() > 0


def test_models_that_are_no_prior(tmp_path, tiny_classifier_flags):
    with pytest.raises(UserError, match="there is no such file"):
        load_prior(tmp_path / "gone.safetensors")
    path, _ = write_prior(tmp_path, PRIOR | {"in_channels": 3})
    with pytest.raises(UserError, match="has 3 image channels, a depth prior must be trained with --in_channels 1"):
        load_prior(path)
    path, _ = write_prior(tmp_path, PRIOR | {"class_cond": True})
    with pytest.raises(UserError, match="is class-conditional"):
        load_prior(path)
    for metadata in ({"note": "by hand"}, {"config": "[" * 10**5}):
        path, _ = write_prior(tmp_path, PRIOR, **metadata)
        for read in (load_prior, find_preset):
            with pytest.raises(UserError, match=r"no config in its metadata|its metadata has no config"):
                read(str(path))
    path, _ = write_prior(tmp_path, PRIOR, config=json.dumps(PRIOR | {"num_chanels": 32}))
    with pytest.raises(UserError, match=r"not those of a diffusion model .*num_chanels"):
        load_prior(path)
    path, _ = write_prior(tmp_path, PRIOR, config=json.dumps(PRIOR | {"channel_mult": "1,3"}))
    with pytest.raises(UserError, match="has channel multipliers 1,2"):
        load_prior(path)
    classifier = create_classifier(**tiny_classifier_flags)
    save_state(path, classifier.state_dict(), {"config": json.dumps(tiny_classifier_flags)})
    with pytest.raises(UserError, match="is not a diffusion model"):
        load_prior(path)
