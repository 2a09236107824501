"""Processes from the schedulers of diffusers."""

import numpy as np
import pytest
import torch
from golden import noise
from tiny_diffusers import diffusers, scheduler

from guided_diffusion.adapters.diffusers import process_of
from guided_diffusion.errors import UserError
from guided_diffusion.sampling import ddim_step, last, sample_chain


@pytest.mark.parametrize("kind", ["DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"])
def test_the_whole_process_is_that_of_the_scheduler(kind):
    process = process_of(scheduler(kind, **({"set_alpha_to_one": True} if kind == "DDIMScheduler" else {})))
    expected = torch.cumprod(1 - scheduler(kind).betas.double(), 0).numpy()
    np.testing.assert_allclose(process.alphas_cumprod, expected[-process.num_timesteps:], rtol=1e-12)


@pytest.mark.parametrize("kind", ["DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_steps_are_those_of_the_scheduler(kind, spacing):
    own = scheduler(kind, timestep_spacing=spacing)
    before = own.timesteps.clone()
    process = process_of(own, 7)
    assert torch.equal(own.timesteps, before)
    own.set_timesteps(7)
    kept = [t for t in own.timesteps.tolist()[::-1] if t or kind != "DDIMScheduler"]
    assert process.timestep_map.tolist() == kept


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_runge_kutta_steps_become_those_of_ddim(spacing):
    """A step of them takes four evaluations, at steps between, and fewer than four are not to be had."""
    own = diffusers.DDIMScheduler(timestep_spacing=spacing, set_alpha_to_one=False)
    for steps in (2, 3, 5):
        used = process_of(diffusers.PNDMScheduler(timestep_spacing=spacing), steps).timestep_map
        assert used.tolist() == process_of(own, steps).timestep_map.tolist()


def test_fractions_of_steps_become_those_of_ddim():
    process = process_of(scheduler("EulerDiscreteScheduler", timestep_spacing="linspace"), 7)
    assert process.timestep_map.tolist() == [0, 166, 333, 500, 666, 832, 999]


@pytest.mark.parametrize("kind", ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler",
                                  "LMSDiscreteScheduler", "KDPM2DiscreteScheduler", "PNDMScheduler"])
def test_a_scheduler_that_was_saved_takes_the_same_steps(kind, tmp_path):
    """What was left at its default is no default of another class."""
    own = getattr(diffusers, kind)(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    own.save_pretrained(tmp_path)
    saved = type(own).from_pretrained(tmp_path)
    used = process_of(own, 7).timestep_map.tolist()
    assert process_of(saved, 7).timestep_map.tolist() == used
    if kind != "PNDMScheduler":
        assert own.config.timestep_spacing == "linspace" and used == [0, 166, 333, 500, 666, 832, 999]


def test_the_three_predictions_of_one_function_give_the_same_images():
    start, x0 = noise((2, 4, 8, 8), 0), noise((2, 4, 8, 8), 1)
    results = []
    for prediction in ("epsilon", "v_prediction", "sample"):
        process = process_of(scheduler(prediction_type=prediction), 6)

        def network(x, t, prediction=prediction, process=process):
            # An eps of x and t alone, said in three ways.
            index = torch.from_numpy(np.searchsorted(process.timestep_map, t.numpy()))
            eps = torch.tanh(x) + 0.1 * x0
            if prediction == "epsilon":
                return eps
            xstart = process.predict_xstart_from_eps(x, index, eps)
            return xstart if prediction == "sample" else process.velocity(xstart, index, eps)

        denoise = process.denoiser(network, clip_denoised=False)
        results.append(last(sample_chain(ddim_step, denoise, start, lambda index: start))["sample"])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(results[2], results[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large", "learned_range"])
def test_a_step_is_that_of_the_scheduler_with_each_variance(variance, monkeypatch):
    own = scheduler("DDPMScheduler", steps_offset=0, variance_type=variance, clip_sample=False)
    own.set_timesteps(5)
    process, index = process_of(own, 5), 2
    x, drawn, output = noise((2, 4, 8, 8), 0), noise((2, 4, 8, 8), 1), noise((2, 8, 8, 8), 2)
    output = output if variance == "learned_range" else output[:, :4]
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *args, **options: drawn)
    expected = own.step(output, int(process.timestep_map[index]), x).prev_sample
    found = process.interpret(output, x, torch.tensor([index, index]))
    torch.testing.assert_close(found.mean + (0.5 * found.log_variance).exp() * drawn, expected, rtol=1e-4, atol=1e-5)


def test_cosine_schedules_are_taken_and_only_those_without_any_signal_refused():
    cosine = scheduler(beta_schedule="squaredcos_cap_v2")
    assert 0 < process_of(cosine).alphas_cumprod[-1] < 1e-8
    betas = [*scheduler().betas[:-1].tolist(), 1.0]
    with pytest.raises(UserError, match="zero terminal"):
        process_of(scheduler("DPMSolverMultistepScheduler", trained_betas=betas))


def test_a_number_of_steps_that_the_scheduler_refuses_is_a_sentence():
    with pytest.raises(UserError, match="steps 1: UnCLIPScheduler cannot take so many"):
        process_of(diffusers.UnCLIPScheduler(), 1)


@pytest.mark.parametrize("kind", ["LCMScheduler", "TCDScheduler"])
def test_schedulers_of_consistency_models_are_refused_and_what_is_made_of_them_taken(kind):
    own = getattr(diffusers, kind)()
    with pytest.raises(UserError, match=f"^{kind}: jumps .* by a consistency function, .* take for example a DDIM"):
        process_of(own, 4)
    assert process_of(diffusers.DDIMScheduler.from_config(own.config), 4).num_timesteps == 4


@pytest.mark.parametrize("kind", ["DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler"])
def test_schedulers_that_invert_images_are_refused(kind):
    with pytest.raises(UserError, match=f"^{kind}: goes from images to noise, which no sampler here does"):
        process_of(getattr(diffusers, kind)(), 4)


def test_a_scheduler_that_does_not_fit_is_a_sentence():
    with pytest.raises(UserError, match="has no betas"):
        process_of(diffusers.FlowMatchEulerDiscreteScheduler())
    with pytest.raises(UserError, match="zero terminal"):
        process_of(scheduler(rescale_betas_zero_snr=True))
    with pytest.raises(UserError, match="prediction_type 'flow'"):
        process_of(scheduler(prediction_type="flow"))
    with pytest.raises(UserError, match=r"^DDPMScheduler variance_type 'learned': must be learned_range"):
        process_of(scheduler("DDPMScheduler", variance_type="learned"))
    with pytest.raises(UserError, match="from 1 to 1000"):
        process_of(scheduler(), 0)
    with pytest.raises(UserError, match="take more"):
        process_of(scheduler(steps_offset=0), 1)
