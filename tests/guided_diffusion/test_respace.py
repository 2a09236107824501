from fractions import Fraction

import numpy as np
import pytest
import torch

from guided_diffusion.errors import UserError
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, LossType, ModelMeanType, ModelVarType
from guided_diffusion.respace import SpacedDiffusion, space_timesteps
from guided_diffusion.schedules import get_named_beta_schedule

KIND = {"model_mean_type": ModelMeanType.EPSILON, "model_var_type": ModelVarType.FIXED_LARGE,
        "loss_type": LossType.MSE}


def evenly(first: int, last: int, count: int) -> list[int]:
    return [round(first + Fraction(i * (last - first), count - 1)) for i in range(count)]


@pytest.mark.parametrize(("text", "expected"), [
    ("250", evenly(0, 999, 250)),
    ("1000", list(range(1000))),
    ("10,20,30", evenly(0, 333, 10) + evenly(334, 666, 20) + evenly(667, 999, 30)),
    ("1,2", [0, 500, 999]),
    ("0,2", [500, 999]),
    ([10, 20, 30], evenly(0, 333, 10) + evenly(334, 666, 20) + evenly(667, 999, 30)),
    ("ddim25", list(range(0, 1000, 40))),
    ("ddim250", list(range(0, 1000, 4))),
    ("ddim7", list(range(0, 1000, 143))),
])
def test_steps_of_a_chain_of_1000(text, expected):
    assert sorted(space_timesteps(1000, text)) == expected


def test_each_section_of_300_steps_has_its_own_stride():
    steps = space_timesteps(300, "10,15,20")
    assert [sum(low <= s < low + 100 for s in steps) for low in (0, 100, 200)] == [10, 15, 20]
    assert {0, 99, 100, 199, 200, 299} <= steps


@pytest.mark.parametrize("text", [
    "", "0", "-3", "1001", "600,500", "a,b", "10,,20", "2.5", "ddim", "ddim0", "ddim-5", "ddim600", "ddimx", "ddim²",
    "ddim" + 5000 * "9",
    [], [0],
])
def test_what_no_chain_of_1000_can_give_is_refused(text):
    with pytest.raises(UserError, match="--timestep_respacing"):
        space_timesteps(1000, text)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_spaced_process_has_the_marginals_of_its_base(schedule):
    betas = get_named_beta_schedule(schedule, 1000)
    kept = sorted(space_timesteps(1000, "20"))
    spaced = SpacedDiffusion(kept, betas=betas, **KIND)
    abar = np.cumprod(1 - betas)
    np.testing.assert_allclose(spaced.alphas_cumprod, abar[kept], rtol=1e-9)
    for i in range(1, 20):
        np.testing.assert_allclose(1 - spaced.betas[i], np.prod(1 - betas[kept[i - 1] + 1:kept[i] + 1]), rtol=1e-9)
    assert spaced.num_timesteps == 20 and spaced.original_num_steps == 1000


def test_all_steps_kept_is_the_base_process():
    betas = get_named_beta_schedule("linear", 100)
    spaced, base = SpacedDiffusion(range(100), betas=betas, **KIND), GaussianDiffusion(betas=betas, **KIND)
    for table in ("betas", "posterior_variance", "posterior_mean_coef1", "posterior_log_variance_clipped"):
        np.testing.assert_allclose(getattr(spaced, table), getattr(base, table), rtol=1e-9)


@pytest.mark.parametrize(("rescale", "expected"), [(False, [0, 444, 3999]), (True, [0.0, 111.0, 999.75])])
def test_the_network_sees_original_steps_rescaled_where_asked(rescale, expected):
    betas = get_named_beta_schedule("linear", 4000)
    spaced = SpacedDiffusion(space_timesteps(4000, "10"), betas=betas, rescale_timesteps=rescale, **KIND)
    seen = []
    x = torch.zeros(3, 1, 2, 2)
    spaced.p_mean_variance(lambda x, t: seen.append(t) or x, x, torch.tensor([0, 1, 9]))
    assert seen[0].tolist() == expected
    assert seen[0].is_floating_point() is rescale


@pytest.mark.parametrize("variance", list(ModelVarType))
def test_a_chain_of_one_step(variance):
    spaced = SpacedDiffusion([0], betas=get_named_beta_schedule("linear", 1000), **KIND | {"model_var_type": variance})
    channels = 2 if variance in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE) else 1
    out = spaced.p_sample(lambda x, t: torch.zeros(1, channels, 2, 2), torch.full((1, 1, 2, 2), 0.5), torch.tensor([0]))
    np.testing.assert_allclose(out["sample"], 0.5 / (1 - 1e-4) ** 0.5, rtol=1e-6)      # x0, no noise
