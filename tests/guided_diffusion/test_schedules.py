import math

import numpy as np
import pytest
import torch

from guided_diffusion.errors import UserError
from guided_diffusion.schedules import betas_for_alpha_bar, gather, get_named_beta_schedule


@pytest.mark.parametrize("steps", [50, 1000, 4000])
def test_linear_schedule_runs_from_1e_4_to_2e_2_scaled_to_the_number_of_steps(steps):
    betas = get_named_beta_schedule("linear", steps)
    scale = 1000 / steps
    expected = [scale * (1e-4 + (2e-2 - 1e-4) * i / (steps - 1)) for i in range(steps)]
    np.testing.assert_allclose(betas, expected, rtol=1e-12)
    assert betas.dtype == np.float64 and betas.shape == (steps,)


@pytest.mark.parametrize("steps", [10, 1000])
def test_cosine_schedule_has_the_closed_form_as_its_cumulative_product(steps):
    betas = get_named_beta_schedule("cosine", steps)
    ends = np.arange(1, steps) / steps             # the last step is capped
    expected = np.cos((ends + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    np.testing.assert_allclose(np.cumprod(1 - betas)[:-1], expected, rtol=1e-9)
    assert betas[-1] == 0.999


def test_betas_are_capped_where_asked():
    betas = betas_for_alpha_bar(4, lambda u: 1 - u, max_beta=0.4)
    np.testing.assert_allclose(betas, [1 / 4, 1 / 3, 0.4, 0.4])


@pytest.mark.parametrize(("name", "steps", "said"), [
    ("sigmoid", 1000, "--noise_schedule sigmoid: must be one of linear, cosine"),
    ("linear", 0, "--diffusion_steps 0"),
    ("cosine", -3, "--diffusion_steps -3"),
    ("linear", 20, "--diffusion_steps 20: must be more than 20 with --noise_schedule linear"),
])
def test_bad_schedules_are_named(name, steps, said):
    with pytest.raises(UserError, match=said):
        get_named_beta_schedule(name, steps)


@pytest.mark.parametrize("shape", [(3, 1), (3, 2, 4, 4)])
def test_gather_reads_the_table_for_each_image(shape):
    table = np.array([0.1, 0.2, 0.7])
    values = gather(table, torch.tensor([2, 0, 2]), torch.zeros(shape))
    assert values.dtype == torch.float32 and values.shape == (3, *[1] * (len(shape) - 1))
    np.testing.assert_array_equal(values.flatten().numpy(), np.float32([0.7, 0.1, 0.7]))
