"""Schedule samplers: their probabilities, weights and state."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from guided_diffusion.errors import UserError
from guided_diffusion.resample import LossSecondMomentResampler, UniformSampler, create_named_schedule_sampler


def warmed_up() -> LossSecondMomentResampler:
    """Four timesteps, two losses each, whose second moments are 25, 100, 0 and 25."""
    sampler = LossSecondMomentResampler(4, history_per_term=2, uniform_prob=0.1)
    for losses in ([9.0, 9.0, 9.0, 9.0], [7.0, 10.0, 0.0, 5.0], [1.0, 10.0, 0.0, -5.0]):
        sampler.update_with_losses(torch.arange(4), torch.tensor(losses))
    return sampler


def test_names():
    diffusion = SimpleNamespace(num_timesteps=7)
    assert type(create_named_schedule_sampler("uniform", diffusion)) is UniformSampler
    assert type(create_named_schedule_sampler("loss-second-moment", diffusion)) is LossSecondMomentResampler
    with pytest.raises(UserError, match="--schedule_sampler loss: must be one of uniform, loss-second-moment"):
        create_named_schedule_sampler("loss", diffusion)


def test_uniform_covers_all_timesteps_alike():
    t, weights = UniformSampler(5).sample(20000, np.random.default_rng(0))
    assert t.dtype == torch.int64 and weights.dtype == torch.float32
    assert weights.eq(1).all()
    assert torch.bincount(t, minlength=5).float() / 20000 == pytest.approx(np.full(5, 0.2), abs=0.015)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), "meta"])
def test_a_device_is_taken_as_the_official_code_has_it(device):
    sampler = warmed_up()
    np.random.seed(3)
    t, weights = sampler.sample(6, device)
    assert t.device == weights.device == torch.device(device)
    assert (t.dtype, weights.dtype, t.shape, weights.shape) == (torch.int64, torch.float32, (6,), (6,))
    if torch.device(device).type == "cpu":
        p = sampler.probabilities()
        np.random.seed(3)
        expected = np.random.choice(4, size=(6,), p=p)
        assert t.tolist() == expected.tolist()
        assert weights.numpy() == pytest.approx(1 / (4 * p[expected]))


def test_loss_second_moment_probabilities():
    roots = np.array([5.0, 10.0, 0.0, 5.0])     # sqrt of the mean square of the last two losses
    assert warmed_up().probabilities() == pytest.approx(0.9 * roots / 20 + 0.1 / 4)


def test_loss_second_moment_is_uniform_until_all_terms_have_their_history():
    sampler = LossSecondMomentResampler(3, history_per_term=2)
    sampler.update_with_losses(torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([9.0, 9.0, 9.0, 1.0, 1.0, 1.0]))
    assert sampler.probabilities() == pytest.approx(np.full(3, 1 / 3))
    sampler.update_with_losses(torch.tensor([2]), torch.tensor([1.0]))
    assert sampler.probabilities()[0] > 0.8


def test_weights_keep_the_expectation_uniform():
    losses = torch.tensor([5.0, 10.0, 3.0, 5.0])
    t, weights = warmed_up().sample(40000, np.random.default_rng(0))
    assert (losses[t] * weights).mean().item() == pytest.approx(losses.mean().item(), rel=0.02)
    assert weights.mean().item() == pytest.approx(1, rel=0.02)


def test_same_numbers_same_sample():
    first, second = (warmed_up().sample(16, np.random.default_rng(3)) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_state_is_taken_over():
    fresh = LossSecondMomentResampler(4, history_per_term=2, uniform_prob=0.1)
    sampler = warmed_up()
    state = sampler.state_dict()
    sampler.update_with_losses(torch.arange(4), torch.full((4,), 50.0))
    fresh.load_state_dict(state)
    assert np.array_equal(fresh.probabilities(), warmed_up().probabilities())


def test_losses_that_are_not_finite_say_nothing():
    sampler = warmed_up()
    sampler.update_with_losses(torch.arange(4), torch.tensor([np.inf, -np.inf, np.nan, np.nan]))
    assert np.array_equal(sampler.probabilities(), warmed_up().probabilities())


def test_losses_of_zero_do_not_divide_by_zero():
    sampler = LossSecondMomentResampler(2, history_per_term=1)
    sampler.update_with_losses(torch.arange(2), torch.zeros(2))
    assert sampler.probabilities() == pytest.approx([0.5, 0.5])
