"""Convolutions in fewer products, against convolutions in float64."""

import pytest
import torch
from networks import TINY, with_random_weights
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from guided_diffusion import winograd
from guided_diffusion.script_util import create_model
from guided_diffusion.winograd import Conv3x3


def arguments(images=2, channels=8, outputs=6, height=12, width=10):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(images, channels, height, width, generator=draw).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(outputs, channels, 3, 3, generator=draw) / (9 * channels)**0.5
    return x, weight, torch.randn(outputs, generator=draw)


@pytest.mark.parametrize("strip", [1, 16 * 5 * 8 * 2, 2**21], ids=["a row of tiles", "two rows", "the whole map"])
@pytest.mark.parametrize("outputs", [6, 16])
def test_is_the_convolution_in_strips_of_any_height(strip, outputs, monkeypatch):
    monkeypatch.setattr(winograd, "STRIP", strip)
    x, weight, bias = arguments(outputs=outputs)
    out = winograd.convolve(x, weight, bias)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    torch.testing.assert_close(out.double(), expected, atol=3e-6, rtol=0)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_rounds_no_more_than_the_sum_of_all_products():
    x, weight, bias = arguments(1, 256, 16, 16, 16)
    exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    errors = [(out - exact).square().mean().sqrt() for out in
              (winograd.convolve(x, weight, bias), F.conv2d(x, weight, bias, padding=1))]
    assert errors[0] < 1.5 * errors[1]


@pytest.fixture
def no_map_is_small(monkeypatch):
    monkeypatch.setattr(winograd, "PIXELS", 1)
    monkeypatch.setattr(winograd, "CHANNELS", 1)


def counted(layer, x):
    with FlopCounterMode(display=False) as counter:
        out = layer(x)
    return out.detach(), counter.get_total_flops()


def test_a_layer_takes_it_where_no_gradient_is_recorded(no_map_is_small):
    layer, x = Conv3x3(8, 6), arguments()[0]
    recorded, plain = counted(layer, x)
    with torch.no_grad():
        out, fewer = counted(layer, x)
    assert fewer * 36 == plain * 16
    torch.testing.assert_close(out, recorded, atol=3e-6, rtol=0)


@pytest.mark.parametrize("given", [
    pytest.param(arguments()[0].contiguous(), id="another order"),
    pytest.param(arguments(height=11)[0], id="an odd height"),
    pytest.param(arguments()[0].bfloat16(), id="another type")])
def test_a_layer_takes_the_plain_one_elsewhere(given, no_map_is_small):
    layer = Conv3x3(8, 6).to(given.dtype)
    expected, plain = counted(layer, given)
    with torch.no_grad():
        out, operations = counted(layer, given)
    assert operations == plain and torch.equal(out, expected)


@torch.no_grad()
def test_a_layer_leaves_mixed_precision_alone(no_map_is_small):
    with torch.autocast("cpu", torch.bfloat16):
        assert Conv3x3(8, 6)(arguments()[0]).dtype == torch.bfloat16


@torch.no_grad()
def test_small_maps_are_convolved_as_they_were():
    layer, (x, *_) = Conv3x3(8, 6), arguments()
    assert torch.equal(layer(x), F.conv2d(x, layer.weight, layer.bias, padding=1))


def test_a_network_of_it_is_the_same_network(no_map_is_small):
    """A whole evaluation, with blocks that halve and double maps."""
    model = with_random_weights(create_model(**TINY)).eval().channels_last()
    x, t, y = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 7]), \
        torch.tensor([0, 1])
    recorded = model(x, t, y)
    with torch.no_grad():
        torch.testing.assert_close(model(x, t, y), recorded.detach(), atol=1e-5, rtol=1e-5)
