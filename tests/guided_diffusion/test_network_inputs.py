"""What a YAML file says of a network's input: samples become it as by hand, and gradients come back."""

import numpy as np
import pytest
import torch

from guided_diffusion.network_inputs import RESIZES, Preparation, chosen_output

LINEAR = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.25, 2.0)}


def weights(kind, size, new):
    """How much each of `size` pixels counts in each of `new` ones, (new, size)."""
    scale, ends = size / new, np.arange(new + 1)[:, None] * size / new
    if kind == "nearest":
        return np.eye(size)[(np.arange(new) * scale).astype(int)]
    if kind == "area":          # the mean over all pixels that the new one touches
        touched = (np.arange(size) < np.ceil(ends[1:])) & (np.arange(size) >= np.floor(ends[:-1]))
        return touched / touched.sum(axis=1, keepdims=True)
    away = np.abs((np.arange(new)[:, None] + 0.5) * scale - (np.arange(size) + 0.5)) / max(scale, 1)
    if kind == "bilinear":
        found = np.maximum(0, 1 - away)
    else:                       # Keys' cubic with a = -1/2
        found = np.where(away < 1, 1.5 * away**3 - 2.5 * away**2 + 1,
                         np.where(away < 2, -0.5 * away**3 + 2.5 * away**2 - 4 * away + 2, 0))
    return found / found.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("size", [(5, 7), (12, 9), (16, 16)], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", RESIZES)
def test_samples_and_their_gradients_are_those_of_a_computation_by_hand(kind, channels, size):
    prepare = Preparation(size, kind, -2.0, 3.0, **LINEAR)
    generator = np.random.default_rng(0)
    x, away = generator.uniform(-1.2, 1.2, (2, channels, 8, 8)), generator.normal(size=(2, 3, *size))
    rows, columns = weights(kind, 8, size[0]), weights(kind, 8, size[1])
    mean, std = (np.array(LINEAR[name])[:, None, None] for name in ("mean", "std"))
    expected = ((rows @ x @ columns.T + 1) / 2 * 5 - 2 - mean) / std
    gradient = rows.T @ (away * 2.5 / std) @ columns
    given = torch.tensor(x, requires_grad=True)
    found = prepare.inputs_of_samples(given)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=0, atol=1e-12)
    found.backward(torch.tensor(away))
    np.testing.assert_allclose(given.grad.numpy(), gradient if channels == 3 else gradient.sum(axis=1, keepdims=True),
                               rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", RESIZES)
def test_samples_and_images_of_8_bits_become_the_same_input(kind):
    images = np.random.default_rng(0).integers(100, 150, (2, 8, 8, 3), np.uint8)
    prepare = Preparation((5, 11), kind, **LINEAR)
    samples = torch.from_numpy(images).movedim(3, 1).float() / 127.5 - 1
    torch.testing.assert_close(prepare.inputs_of_samples(samples), prepare.inputs(images, torch.device("cpu")),
                               rtol=0, atol=1e-5)


def test_white_has_a_gradient():
    """Rounding lifts it above 1 here and there."""
    white = torch.ones(1, 3, 8, 8, requires_grad=True)
    Preparation((11, 11), "bicubic").inputs_of_samples(white).sum().backward()
    assert (white.grad > 0.5).all()


def test_an_output_is_chosen_by_number_or_name():
    one, other = torch.zeros(1), torch.ones(1)
    assert chosen_output(one, 0, "x") is one
    assert chosen_output((one, other), 1, "x") is other
    assert chosen_output({"a": one, "b": other}, "b", "x") is chosen_output({"a": one, "b": other}, 1, "x") is other
