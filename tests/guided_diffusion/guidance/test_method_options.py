"""Every option of every method acts: each changes the image where it should, and nothing while the method is off."""

import json
from dataclasses import replace

import pytest
import torch
from networks import TINY, TINY_CLASSIFIER, with_random_weights

from guided_diffusion import sampling
from guided_diffusion.checkpoint import save_state
from guided_diffusion.errors import UserError
from guided_diffusion.guidance import (
    GUIDANCE,
    ApgOptions,
    AutoguidanceOptions,
    CfgOptions,
    ClassifierGuidanceOptions,
    CleanClassifierOptions,
    DagOptions,
    IcgOptions,
    Networks,
    PagOptions,
    RescaleOptions,
    SagOptions,
    SegOptions,
    TsgOptions,
)
from guided_diffusion.options import option_fields
from guided_diffusion.process import Denoiser
from guided_diffusion.script_util import create_classifier, create_gaussian_diffusion, create_model

WITH_NULL = {**TINY, "null_class": True}
SCALED = ("scale", "gamma", "eta", "phi")
# By method: the flags that switch it on here, and for each of its other flags a value that must change the image.
CASES = {
    SagOptions: ({"guide_scale": 2.0, "sel_attn_depth": 0}, {
        "guide_scale": 3.0, "guide_start": 1, "sel_attn_block": "middle", "sel_attn_depth": 1, "blur_sigma": 1.0,
        "mask": "square", "threshold": 0.8, "sag_sigma_min": 1.0, "sag_sigma_max": 1.0}),
    PagOptions: ({"pag_scale": 2.0}, {"pag_scale": 3.0, "pag_blocks": "output.0", "pag_start": 1, "pag_sigma_min": 1.0,
                                      "pag_sigma_max": 1.0}),
    SegOptions: ({"seg_scale": 20.0}, {"seg_scale": 40.0, "seg_blocks": "output.0", "seg_blur_sigma": 0.5,
                                       "seg_start": 1, "seg_sigma_min": 1.0, "seg_sigma_max": 1.0}),
    TsgOptions: ({"tsg_scale": 1.0}, {"tsg_scale": 2.0, "tsg_noise_scale": 0.5, "tsg_power": 3.0,
                                      "tsg_blocks": "middle", "tsg_start": 1, "tsg_sigma_min": 10.0,
                                      "tsg_sigma_max": 1.0}),
    CfgOptions: ({"cfg_scale": 1.0}, {"cfg_scale": 2.0, "cfg_start": 1, "cfg_sigma_min": 1.0, "cfg_sigma_max": 1.0}),
    IcgOptions: ({"icg_scale": 1.0}, {"icg_scale": 2.0, "icg_start": 1, "icg_sigma_min": 10.0, "icg_sigma_max": 1.0}),
    AutoguidanceOptions: ({"autoguidance_scale": 1.0, "weak_model_path": "weak"}, {
        "autoguidance_scale": 2.0, "weak_model_path": "weaker", "autoguidance_start": 1,
        "autoguidance_sigma_min": 1.0, "autoguidance_sigma_max": 1.0}),
    CleanClassifierOptions: ({"clean_classifier_scale": 30.0, "clean_classifier_path": "clean"}, {
        "clean_classifier_scale": 60.0, "clean_classifier_temperature": 2.0, "clean_classifier_margin_temperature": 3.0,
        "clean_classifier_gamma": 2.0, "clean_classifier_start": 1, "clean_classifier_sigma_min": 1.0,
        "clean_classifier_sigma_max": 1.0}),
    ApgOptions: ({"apg": True}, {"apg_eta": 0.5, "apg_norm_threshold": 0.5, "apg_momentum": -0.5, "apg_start": 1,
                                 "apg_sigma_min": 1.0, "apg_sigma_max": 1.0}),
    RescaleOptions: ({"rescale_phi": 1.0}, {"rescale_phi": 0.3, "rescale_start": 1, "rescale_sigma_min": 1.0,
                                            "rescale_sigma_max": 1.0}),
}
ELSEWHERE = (ClassifierGuidanceOptions, DagOptions)             # whose options have tests of their own
TRANSFORMS = (ApgOptions, RescaleOptions)
OTHER = {"attention_heads"}                                     # the same where both ways to split agree


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model with a null class, two weaker ones, and a classifier, which state their options."""
    folder = tmp_path_factory.mktemp("networks")
    states = {"model": (WITH_NULL, 1), "weak": (WITH_NULL, 2), "weaker": ({**WITH_NULL, "num_res_blocks": 2}, 3),
              "other": ({**TINY, "num_classes": 5}, 4), "no_null": (TINY, 5)}
    for name, (flags, seed) in states.items():
        save_state(folder / f"{name}.safetensors", with_random_weights(create_model(**flags), seed).state_dict(),
                   {"config": json.dumps(flags)})
    classifier = with_random_weights(create_classifier(**TINY_CLASSIFIER), seed=5)
    save_state(folder / "clean.safetensors", classifier.state_dict(), {"config": json.dumps(TINY_CLASSIFIER)})
    return folder


@pytest.fixture(scope="module")
def model():
    return with_random_weights(create_model(**WITH_NULL), seed=1).requires_grad_(False)


def placed(files, flags):
    """The flags with the paths of the files that they name."""
    return {name: str(files / f"{value}.safetensors") if name.endswith("_path") else value
            for name, value in flags.items()}


def image(model, *methods):
    """What three steps make of noise under some methods."""
    generator = torch.Generator().manual_seed(0)
    x, *noise = torch.randn(4, 1, 1, 16, 16, generator=generator)
    nets = Networks(model, torch.device("cpu"), seed=3)
    guidance = [term for method in methods for term in method.build(nets)]
    diffusion = create_gaussian_diffusion(learn_sigma=True, timestep_respacing="3")
    denoise = Denoiser(diffusion, model, model_kwargs={"y": torch.tensor([1])})
    return sampling.last(sampling.sample_chain(sampling.ddpm_step, denoise, x, lambda t: noise[t], guidance))["sample"]


def test_every_method_and_every_option_has_a_case():
    assert set(GUIDANCE) == {*CASES, *ELSEWHERE}
    for kind, (on, changes) in CASES.items():
        known = {field.name for field in option_fields(kind)}
        assert known - OTHER <= {*on, *changes}, kind


@pytest.mark.parametrize("kind", CASES, ids=lambda kind: kind.short)
def test_every_option_changes_the_image_and_the_title_or_the_window(kind, files, model):
    on, changes = CASES[kind]
    beside = [PagOptions(pag_scale=5.0, pag_blocks="output.0")] if kind in TRANSFORMS else []
    method = kind(**placed(files, on))
    assert method.active and not kind().active and method.headline() in method.title()
    assert kind.switched_on.keys() <= {field.name for field in option_fields(kind)}
    plain, guided = image(model, *beside), image(model, *beside, method)
    assert not torch.equal(plain, guided)
    for name, value in changes.items():
        other = replace(method, **placed(files, {name: value}))
        assert not torch.equal(image(model, *beside, other), guided), name
        windows = [[term.window(torch.arange(3), create_gaussian_diffusion(timestep_respacing="3")).tolist()
                    for term, _ in one.schedule()] for one in (method, other)]
        assert other.title() != method.title() or windows[0] != windows[1] or name.endswith("_path"), name


def test_a_title_names_nothing_of_the_attention_where_none_is_read():
    method = SagOptions(guide_scale=1.5, sel_attn_block="middle", threshold=0.5, attention_heads="official")
    assert method.title() == "SAG s = 0.5, block middle, psi = 0.5, official heads"
    assert replace(method, mask="global", blur_sigma=2.0).title() == "SAG s = 0.5, mask global, sigma = 2"


@pytest.mark.parametrize("kind", CASES, ids=lambda kind: kind.short)
def test_windows_of_the_plan_are_those_of_the_terms(kind, files, model):
    method = kind(**placed(files, {**CASES[kind][0], f"{kind.sigma_flags}_sigma_max": 1.0}))
    process, t = create_gaussian_diffusion(timestep_respacing="10"), torch.arange(10)
    terms = method.build(Networks(model, torch.device("cpu")))
    for term, (planned, passes) in zip(terms, method.schedule(), strict=True):
        assert torch.equal(term.window(t, process), planned.window(t, process)) and passes == term.passes
        assert 0 < int(term.window(t, process).sum()) < 10


@pytest.mark.parametrize(("method", "message"), [
    (CfgOptions(cfg_scale=1.0), "--cfg_scale 1: needs a network with labels and a null class"),
    (IcgOptions(icg_scale=2.0), "--icg_scale 2: needs a network with labels"),
    (SegOptions(seg_scale=1.0, seg_blocks="input.0"), "--seg_blocks input.0: 'input.0' is no attention block"),
    (PagOptions(pag_scale=1.0, pag_blocks="input.0"), "--pag_blocks input.0: 'input.0' is no attention block"),
    (TsgOptions(tsg_scale=1.0, tsg_blocks="output.9"), "--tsg_blocks output.9: 'output.9' is no block"),
    (CleanClassifierOptions(clean_classifier_scale=1.0, clean_classifier_path="none"), "none: there is no such file")],
                         ids=lambda value: str(value)[:12])
def test_wrong_use_is_a_sentence_before_any_work(method, message):
    unconditional = create_model(**{**TINY, "class_cond": False})
    with pytest.raises(UserError, match=message):
        method.build(Networks(unconditional, torch.device("cpu")))


def test_a_weak_network_of_other_labels_or_another_process_is_refused(files, model):
    method = AutoguidanceOptions(**placed(files, {"autoguidance_scale": 1.0, "weak_model_path": "other"}))
    with pytest.raises(UserError, match="has num_classes 5, and the network that is sampled 2"):
        method.build(Networks(model, torch.device("cpu")))
    without = AutoguidanceOptions(**placed(files, {"autoguidance_scale": 1.0, "weak_model_path": "no_null"}))
    with pytest.raises(UserError, match="has no null class"):
        without.build(Networks(model, torch.device("cpu")))
    larger = create_model(**{**TINY, "num_classes": 5, "image_size": 32, "attention_resolutions": "16"})
    with pytest.raises(UserError, match="has image_size 16, and the network that is sampled 32"):
        method.build(Networks(larger, torch.device("cpu")))
    values = {"autoguidance_scale": 1.0, "weak_model_path": method.weak_model_path, "learn_sigma": False}
    with pytest.raises(UserError, match="states learn_sigma True of itself"):
        AutoguidanceOptions.stated_values(values, {})


def test_a_clean_classifier_must_state_its_options_and_fit(files, model):
    unstated = CleanClassifierOptions(**placed(files, {"clean_classifier_scale": 1.0, "clean_classifier_path": "weak"}))
    with pytest.raises(UserError, match="must be a classifier that states its options"):
        unstated.build(Networks(model, torch.device("cpu")))
    fitting = replace(unstated, clean_classifier_path=str(files / "clean.safetensors"))
    five = create_model(**{**TINY, "num_classes": 5})
    with pytest.raises(UserError, match="has 2 classes, and the network that is sampled 5"):
        fitting.build(Networks(five, torch.device("cpu")))
    with pytest.raises(UserError, match=f"sees images of {TINY['in_channels']} channels, and the network .* makes 3"):
        fitting.build(Networks(create_model(**{**TINY, "in_channels": 3}), torch.device("cpu")))
