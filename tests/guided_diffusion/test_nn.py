"""Layer helpers: step embedding, norms in float32, checkpointing."""

import math

import pytest
import torch
from torch import nn

from guided_diffusion.nn import SiLU, checkpoint, mean_flat, normalization, rows_of, timestep_embedding, zero_module

HALVES = (torch.float16, torch.bfloat16)


def test_the_step_embedding_is_cosines_then_sines_of_falling_frequency():
    steps = torch.tensor([0, 7, 999])
    embedding = timestep_embedding(steps, 8)
    for row, step in zip(embedding.tolist(), steps.tolist(), strict=True):
        angles = [step * 10000 ** (-i / 4) for i in range(4)]
        assert row == pytest.approx([math.cos(a) for a in angles] + [math.sin(a) for a in angles], abs=1e-4)


def test_the_step_embedding_takes_fractions_and_pads_odd_widths():
    assert timestep_embedding(torch.tensor([2.5]), 2).tolist()[0] == pytest.approx([math.cos(2.5), math.sin(2.5)])
    odd = timestep_embedding(torch.tensor([3]), 5)
    assert odd.shape == (1, 5) and odd[0, -1] == 0
    torch.testing.assert_close(odd[:, :-1], timestep_embedding(torch.tensor([3]), 4))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("recorded", [True, False])
def test_norms_compute_in_float32(dtype, memory_format, recorded):
    """The squares of these values overflow a float16 sum, and a bfloat16 sum of them stalls."""
    x = (30 + 3 * torch.randn(2, 64, 16, 16, generator=torch.Generator().manual_seed(0))).to(dtype)
    norm = normalization(64)
    with torch.set_grad_enabled(recorded):
        got = norm(x.to(memory_format=memory_format))
    expected = nn.functional.group_norm(x.double(), 32, eps=norm.eps)
    assert got.dtype == dtype and norm.weight.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-3)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_norms_of_large_maps_are_to_the_bit_those_of_float32_rounded(dtype):
    x = (30 + 3 * torch.randn(2, 64, 32, 32, generator=torch.Generator().manual_seed(0))).to(dtype)
    x, norm = x.to(memory_format=torch.channels_last), normalization(64)
    with torch.no_grad():
        assert torch.equal(norm(x), nn.functional.group_norm(x.float(), 32, eps=norm.eps).to(dtype))


def test_zero_module_and_mean_flat():
    assert all(not parameter.any() for parameter in zero_module(nn.Conv2d(2, 3, 3)).parameters())
    x = torch.arange(12.0).view(2, 3, 2, 1)
    assert mean_flat(x).tolist() == [2.5, 8.5]


def counting(layer):
    calls = []

    def function(x):
        calls.append(torch.is_grad_enabled())
        return layer(x).sin()
    return function, calls


def test_checkpointing_computes_again_in_the_backward_pass_and_only_there():
    function, calls = counting(nn.Linear(3, 3))
    x = torch.randn(2, 3, requires_grad=True)
    checkpoint(function, x, enabled=True).sum().backward()
    assert len(calls) == 2
    with torch.no_grad():
        checkpoint(function, x, enabled=True)
    checkpoint(function, x, enabled=False).sum().backward()
    assert len(calls) == 4


def test_checkpointing_lets_the_gradient_through_frozen_weights():
    function, _ = counting(nn.Linear(3, 3).requires_grad_(False))
    x = torch.randn(2, 3, requires_grad=True)
    (expected,) = torch.autograd.grad(function(x).sum(), x)
    (got,) = torch.autograd.grad(checkpoint(function, x, enabled=True).sum(), x)
    assert torch.equal(got, expected)


def test_checkpointing_repeats_random_numbers():
    x = torch.randn(100, requires_grad=True)
    out = checkpoint(nn.functional.dropout, x, enabled=True)
    out.sum().backward()
    assert torch.equal(x.grad != 0, out != 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [8, 32])
def test_group_norm_of_channels_last_maps_stays_channels_last(size, dtype):
    norm = normalization(64)
    torch.nn.init.normal_(norm.weight)
    x = (torch.randn(2, 64, size, size) + 3).to(dtype)
    normed = norm(x.contiguous(memory_format=torch.channels_last))
    assert normed.is_contiguous(memory_format=torch.channels_last) and normed.dtype == dtype
    torch.testing.assert_close(normed, norm(x), rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-4)


def test_silu_keeps_its_input_where_a_gradient_is_recorded():
    x = torch.randn(5, requires_grad=True)
    before, activation = x.detach().clone(), SiLU()
    activation(x).sum().backward()
    assert x.equal(before) and x.grad.allclose(before.sigmoid() * (1 + before * (1 - before.sigmoid())))
    with torch.no_grad():
        assert activation(x).allclose(before.sigmoid() * before)


def test_rows_of_a_part_are_found_from_multiples_of_its_length():
    x, t, y = torch.arange(24.0).reshape(6, 4), torch.arange(6), torch.arange(6) % 2
    assert rows_of((x, t, y), (x[2:4], t[2:4], y[2:4])) == slice(2, 4)
    assert rows_of((x, t, None), (x.clone(), t.clone(), None)) == slice(0, 6)
    assert rows_of((x, t, y), (x[1:3], t[1:3], y[1:3])) is None
    assert rows_of((x, t, y), (x[2:4], t[2:4], None)) is None
    assert rows_of((x, t, y), (x[2:4], t[2:4].float(), y[2:4])) is None
    assert rows_of((x[:2], t[:2], y[:2]), (x, t, y)) is None
