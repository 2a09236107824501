"""Every option of every method acts: each changes the image where it should, and nothing while the method is off."""

import json
import math
import re
import shutil
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from networks import TINY, TINY_CLASSIFIER, with_random_weights

from guided_diffusion import sampling
from guided_diffusion.build import ClassifierOptions
from guided_diffusion.checkpoint import save_state
from guided_diffusion.depth.predictor import DepthPredictors, save_predictors
from guided_diffusion.errors import UserError
from guided_diffusion.guidance import (
    GUIDANCE,
    ApgOptions,
    AutoguidanceOptions,
    CfgOptions,
    ClassifierGuidanceOptions,
    CleanClassifierOptions,
    DagOptions,
    FunctionGuidance,
    GradientGuidance,
    IcgOptions,
    Networks,
    PagOptions,
    ProjectedGuidance,
    Rescale,
    RescaleOptions,
    SagOptions,
    ScaledOptions,
    SegOptions,
    TsgOptions,
)
from guided_diffusion.guidance.base import start_option
from guided_diffusion.options import option, option_fields, options_from, parse_options
from guided_diffusion.process import Denoiser
from guided_diffusion.runs.effects import without_effect
from guided_diffusion.runs.options import SampleOptions, option_classes
from guided_diffusion.runs.sample import SamplingRun
from guided_diffusion.script_util import create_classifier, create_gaussian_diffusion, create_model

WITH_NULL = {**TINY, "null_class": True}
PRIOR = {**TINY, "class_cond": False, "image_size": 8}
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
    ClassifierGuidanceOptions: (
        {"classifier_guidance": True, "classifier_scale": 100.0, "classifier_path": "noisy", **TINY_CLASSIFIER},
        {"classifier_scale": 200.0, "classifier_path": "clean", "classifier_start": 1, "classifier_sigma_min": 10.0,
         "classifier_sigma_max": 1.0}),
    DagOptions: (
        {"dcg_scale": 40.0, "dpg_scale": 40.0, "depth_predictor": "depth", "depth_prior": "prior"},
        {"dcg_scale": 80.0, "dpg_scale": 80.0, "depth_predictor": "other_depth", "depth_prior": "other_prior",
         "dag_reduction": "sum", "depth_tau": 0.5, "dpg_gradient": "score", "dag_start": 1, "dag_stop": 1,
         "dag_sigma_min": 10.0, "dag_sigma_max": 1.0}),
    ApgOptions: ({"apg": True}, {"apg_eta": 0.5, "apg_norm_threshold": 0.5, "apg_momentum": -0.5, "apg_start": 1,
                                 "apg_sigma_min": 1.0, "apg_sigma_max": 1.0}),
    RescaleOptions: ({"rescale_phi": 1.0}, {"rescale_phi": 0.3, "rescale_start": 1, "rescale_sigma_min": 1.0,
                                            "rescale_sigma_max": 1.0}),
}
TRANSFORMS = (ApgOptions, RescaleOptions)
# The first is the same where both ways to split agree, the others say how a classifier is built.
OTHER = {"attention_heads", *(field.name for field in option_fields(ClassifierOptions))}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model with a null class, weaker ones, classifiers, depth predictors and priors, which state their options."""
    folder = tmp_path_factory.mktemp("networks")
    states = {"model": (WITH_NULL, 1), "weak": (WITH_NULL, 2), "weaker": ({**WITH_NULL, "num_res_blocks": 2}, 3),
              "other": ({**TINY, "num_classes": 5}, 4), "no_null": (TINY, 5),
              "prior": (PRIOR, 6), "other_prior": (PRIOR, 7)}
    for name, (flags, seed) in states.items():
        save_state(folder / f"{name}.safetensors", with_random_weights(create_model(**flags), seed).state_dict(),
                   {"config": json.dumps(flags)})
    for name, flags, seed in (("clean", TINY_CLASSIFIER, 5), ("noisy", TINY_CLASSIFIER, 8),
                              ("small", {**TINY_CLASSIFIER, "image_size": 8}, 9)):
        save_state(folder / f"{name}.safetensors", with_random_weights(create_classifier(**flags), seed).state_dict(),
                   {"config": json.dumps(flags)})
    for name, seed in (("depth", 10), ("other_depth", 11)):
        predictors = DepthPredictors({"strong": {"output.0": 32, "output.2": 32}, "weak": {"output.0": 32}}, 16, "", "")
        save_predictors(folder / f"{name}.safetensors", with_random_weights(predictors, seed))
    return folder


@pytest.fixture(scope="module")
def model():
    return with_random_weights(create_model(**WITH_NULL), seed=1).requires_grad_(False)


def names_file(flag):
    """Whether a flag names a file."""
    return flag.endswith("_path") or flag in ("depth_predictor", "depth_prior")


def placed(files, flags):
    """The flags with the paths of the files that they name."""
    return {name: str(files / f"{value}.safetensors") if names_file(name) else value for name, value in flags.items()}


def image(model, *methods):
    """What three steps make of noise under some methods."""
    nets = Networks(model, torch.device("cpu"), seed=3)
    return image_of(model, [term for method in methods for term in method.build(nets)])


def run_of(files, **flags):
    """A sampling run of the model."""
    flags = placed(files, {**WITH_NULL, "model_path": "model", **flags})
    return SamplingRun.of(options_from(flags, SampleOptions, *option_classes()))


def image_of(model, guidance):
    """What three steps make of noise, always the same, under some terms."""
    generator = torch.Generator().manual_seed(0)
    x, *noise = torch.randn(4, 1, 1, 16, 16, generator=generator)
    diffusion = create_gaussian_diffusion(learn_sigma=True, timestep_respacing="3")
    denoise = Denoiser(diffusion, model, model_kwargs={"y": torch.tensor([1])})
    return sampling.last(sampling.sample_chain(sampling.ddpm_step, denoise, x, lambda t: noise[t], guidance))["sample"]


def test_every_method_and_every_option_has_a_case():
    assert set(GUIDANCE) == set(CASES)
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
        assert other.title() != method.title() or windows[0] != windows[1] or names_file(name), name


def test_a_title_names_nothing_of_the_attention_where_none_is_read():
    method = SagOptions(guide_scale=1.5, sel_attn_block="middle", threshold=0.5, attention_heads="official")
    assert method.title() == "SAG s = 0.5, block middle, psi = 0.5, official heads"
    assert replace(method, mask="global", blur_sigma=2.0).title() == "SAG s = 0.5, mask global, sigma = 2"


@pytest.mark.parametrize("kind, flag", [(kind, flag) for kind in GUIDANCE for flag in kind.symbols])
def test_titles_call_an_option_as_charts_do(kind, flag):
    symbol, zero = kind.symbols[flag]
    method = kind(**{**kind.switched_on, flag: zero + 0.25})
    assert f"{symbol} = 0.25" in re.split(" (?=s = )|, | (?=phi|eta)", method.title({}))


def test_the_symbol_of_a_method_with_one_scale_is_that_of_its_title():
    assert PagOptions.symbols == {"pag_scale": ("s", 0.0)} and SagOptions.symbols["guide_scale"] == ("s", 1.0)


@pytest.mark.parametrize("kind", CASES, ids=lambda kind: kind.short)
def test_windows_of_the_plan_are_those_of_the_terms(kind, files, model):
    on, process, t = placed(files, CASES[kind][0]), create_gaussian_diffusion(timestep_respacing="10"), torch.arange(10)
    assert {f"{kind.sigma_flags}_sigma_min", f"{kind.sigma_flags}_sigma_max"} < set(kind.bounds())
    for flag in [None, *kind.bounds()]:
        method = kind(**on, **({} if flag is None else {flag: 1.0 if "_sigma_" in flag else 5}))
        terms = method.build(Networks(model, torch.device("cpu")))
        for term, (planned, passes) in zip(terms, method.schedule(), strict=True):
            assert torch.equal(term.window(t, process), planned.window(t, process)) and passes == term.passes
            assert 0 < int(term.window(t, process).sum()) < 10 or flag is None
            assert flag is not None or term.window(t, process).all()


def test_a_method_of_one_scale_may_stop():
    """By a flag NAME_stop; a method without one gives its terms no stop, which not all of them take."""
    @dataclass(frozen=True)
    class GreyOptions(ScaledOptions):
        short, sigma_flags, term = "grey", "grey", GradientGuidance
        switched_on: ClassVar = {"grey_scale": 1.0}
        grey_scale: float = option(0.0, "scale; 0: off")
        grey_start: int | None = start_option()
        grey_stop: int | None = option(None, "guided only at respaced steps from this one up; unset: to the last")

    options = GreyOptions(grey_scale=1.0, grey_start=5, grey_stop=2)
    (term, _), = options.schedule()
    assert term.window(torch.arange(10)).nonzero().flatten().tolist() == [2, 3, 4]
    assert "stop" not in PagOptions().window
    run = SamplingRun.of(options_from({"timestep_respacing": "10"}, SampleOptions, *option_classes()))
    flags = {"grey_scale", "grey_start", "grey_stop"}
    assert without_effect(replace(run, guidance=(options,)), flags) == ""
    assert without_effect(replace(run, guidance=(replace(options, grey_stop=0),)), flags) == (
        "without effect: --grey_stop (every step of the window of grey is within)")


def test_classifier_guidance_without_a_window_is_that_of_the_official_code(files, model):
    on = placed(files, CASES[ClassifierGuidanceOptions][0])
    classifier = with_random_weights(create_classifier(**TINY_CLASSIFIER), seed=8)

    def cond_fn(x, t, y):
        with torch.enable_grad():
            x_in = x.detach().requires_grad_(True)
            log_probs = torch.log_softmax(classifier(x_in, t), dim=-1)
            return torch.autograd.grad(log_probs[range(len(y)), y.view(-1)].sum(), x_in)[0] * 100.0

    official = image_of(model, [FunctionGuidance(cond_fn)])
    assert (official - image(model)).abs().max() > 1e-3
    torch.testing.assert_close(image(model, ClassifierGuidanceOptions(**on)), official, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [IcgOptions, TsgOptions, DagOptions], ids=lambda kind: kind.short)
def test_what_a_method_draws_follows_the_seed_of_the_run(kind, files):
    """The noise of the sampler is the same in all of these."""
    def drawn(seed):
        built = run_of(files, **CASES[kind][0], seed=seed).build()
        return image_of(built.model, built.guidance)

    images = [drawn(seed) for seed in range(4)]
    assert not all(torch.equal(images[0], other) for other in images[1:])
    assert torch.equal(drawn(3), images[3])


def test_a_run_projects_before_it_rescales(files):
    """Then the guided prediction has the deviation of the unguided one."""
    flags = {"pag_scale": 20.0, "pag_blocks": "output.0", "apg": True, "rescale_phi": 1.0}
    model, _, diffusion, guidance = run_of(files, **flags, timestep_respacing="3").build()
    x, t = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([1])

    def deviation(terms):
        denoise = Denoiser(diffusion, model, model_kwargs={"y": torch.tensor([1])})
        with torch.no_grad():
            out = sampling.sample_step(sampling.ddim_step, denoise, x, t, lambda: None, terms)
        return float(out["eps"].std())

    plain = deviation([])
    assert deviation(guidance) == pytest.approx(plain, rel=1e-4)
    swapped = [guidance[0], Rescale(1.0), ProjectedGuidance()]
    assert deviation(swapped) != pytest.approx(plain, rel=1e-3)


def test_a_clean_classifier_sees_images_of_the_size_that_it_states(files, model):
    method = CleanClassifierOptions(**placed(files, {"clean_classifier_scale": 30.0, "clean_classifier_path": "small"}))
    term, = method.build(Networks(model, torch.device("cpu")))
    assert term.as_trained(torch.zeros(2, 1, 16, 16)).shape == (2, 1, 8, 8)
    assert not torch.equal(image(model, method), image(model))


def test_the_blur_of_smoothed_energy_guidance_may_be_infinite():
    for given in ("inf", "Infinity", math.inf):
        options, = (parse_options(["--seg_blur_sigma", given], SegOptions) if isinstance(given, str)
                    else [SegOptions(seg_blur_sigma=given)])
        assert options == SegOptions()
    for given in ("-inf", "nan"):
        with pytest.raises(UserError, match=f"--seg_blur_sigma '{given}': must be a number"):
            parse_options([f"--seg_blur_sigma={given}"], SegOptions)
    with pytest.raises(UserError, match="--seg_scale 'inf': must be a number"):
        parse_options(["--seg_scale", "inf"], SegOptions)


@pytest.mark.parametrize(("method", "message"), [
    (CfgOptions(cfg_scale=1.0), "--cfg_scale 1: needs a network with labels and a null class, as --label_dropout "
     "trains it$"),
    (PagOptions(pag_scale=1.0, pag_blocks=""), "--pag_blocks '': must name blocks of the network, comma-separated, "
     "like middle$"),
    (SegOptions(seg_scale=1.0, seg_blocks=","), "--seg_blocks ,: must name blocks"),
    (TsgOptions(tsg_scale=1.0, tsg_blocks=","), "--tsg_blocks ,: must name blocks"),
    (TsgOptions(tsg_scale=1.0, tsg_blocks="input.0"), r"--tsg_blocks input\.0: the embedding of the step does not "
     r"reach input\.0; it reaches: input\.1, "),
    (IcgOptions(icg_scale=2.0), "--icg_scale 2: needs a network with labels"),
    (SegOptions(seg_scale=1.0, seg_blocks="input.0"), "--seg_blocks input.0: 'input.0' is no attention block"),
    (PagOptions(pag_scale=1.0, pag_blocks="input.0"), "--pag_blocks input.0: 'input.0' is no attention block"),
    (TsgOptions(tsg_scale=1.0, tsg_blocks="output.9"), "--tsg_blocks output.9: 'output.9' is no block"),
    (CleanClassifierOptions(clean_classifier_scale=1.0, clean_classifier_path="none"), "none: there is no such file")],
                         ids=lambda value: str(value)[:12])
def test_wrong_use_is_a_sentence_before_any_work(method, message):
    unconditional = create_model(**{**TINY, "class_cond": False})
    with pytest.raises(UserError, match=f"^{message}" if message.startswith("--") else message):
        method.build(Networks(unconditional, torch.device("cpu")))


def test_independent_conditions_are_advised_where_the_network_has_labels():
    with pytest.raises(UserError, match=r"trains it; without one there is --icg_scale$"):
        CfgOptions(cfg_scale=1.0).build(Networks(create_model(**TINY), torch.device("cpu")))


def test_a_weak_network_that_is_the_sampled_one_is_refused(files, tmp_path):
    shutil.copy(files / "model.safetensors", tmp_path / "copy.safetensors")
    both = {"model": create_model(**WITH_NULL).state_dict(), "ema": create_model(**WITH_NULL).state_dict()}
    torch.save(both, tmp_path / "both.pt")
    flags = {**WITH_NULL, "autoguidance_scale": 1.0, "timestep_respacing": "2", "num_samples": 1, "batch_size": 1}

    def sample(out, **changes):
        options = options_from({**flags, **changes, "out": tmp_path / out}, SampleOptions, *option_classes())
        return SamplingRun.of(options).run()

    with pytest.raises(UserError, match=re.escape(f"--weak_model_path {tmp_path / 'copy.safetensors'}: is the network "
                                                  "that is sampled, which gives no contrast; name an earlier snapsh")):
        sample("same", model_path=files / "model.safetensors", weak_model_path=tmp_path / "copy.safetensors")
    wrapped = {"model_path": tmp_path / "both.pt", "weak_model_path": tmp_path / "both.pt"}
    with pytest.raises(UserError, match="is the network that is sampled"):
        sample("entry", **wrapped, checkpoint_entry="ema")
    assert sample("other", **wrapped, checkpoint_entry="model").exists()


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
    plain = create_model(**{**TINY, "class_cond": False})
    with pytest.raises(UserError, match=r"clean\.safetensors: has 2 classes, and the images have those of --num_classes"
                                        " 5: pass --num_classes 2"):
        fitting.build(Networks(plain, torch.device("cpu"), num_classes=5))
    fitting.build(Networks(plain, torch.device("cpu"), num_classes=2))
    with pytest.raises(UserError, match=f"sees images of {TINY['in_channels']} channels, and the network .* makes 3"):
        fitting.build(Networks(create_model(**{**TINY, "in_channels": 3}), torch.device("cpu")))
