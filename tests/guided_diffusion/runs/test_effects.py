"""Flags without effect are named, once and in one line."""

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
from commands import REPOSITORY, call, flags
from networks import TINY

from guided_diffusion.adapters.run import LatentRun
from guided_diffusion.build import DiffusionOptions, ModelOptions, build_diffusion
from guided_diffusion.guidance import GUIDANCE, ContrastGuidance, Guidance, ScaledOptions
from guided_diffusion.options import option, option_fields, options_from
from guided_diffusion.runs.effects import idle_batches, without_effect
from guided_diffusion.runs.options import SampleOptions, option_classes
from guided_diffusion.runs.previews import PreviewOptions
from guided_diffusion.runs.sample import SamplingRun
from guided_diffusion.runs.training_effects import idle_in_diffusion
from guided_diffusion.sampling import SAMPLERS
from guided_diffusion.terms import Passes
from guided_diffusion.training.options import TrainOptions


def line(**given):
    run = SamplingRun.of(options_from({"class_cond": True, **given}, SampleOptions, *option_classes()))
    return without_effect(run, given)


@pytest.mark.parametrize(("given", "said"), [
    ({}, ""), ({"num_samples": 3, "dropout": 0.1, "sampler": "ddim", "eta": 0.5}, ""),
    ({"sel_attn_depth": 99}, "--sel_attn_depth (SAG is off)"),
    ({"sel_attn_depth": 99, "guide_scale": 1.0, "blur_sigma": 3.0}, "--sel_attn_depth, --blur_sigma (SAG is off)"),
    ({"sel_attn_depth": 99, "guide_scale": 1.1}, ""), ({"eta": 0.5}, "--eta (the sampler is ddpm)"),
    ({"eta": 0.5, "use_ddim": True}, ""), ({"classifier_scale": 2.0}, "--classifier_scale (CG is off)"),
    ({"classifier_guidance": False}, ""), ({"classifier_guidance": True, "classifier_scale": 0.0}, ""),
    ({"classifier_guidance": True, "classifier_scale": 0.0, "classifier_path": "x"}, "--classifier_path (CG is off)"),
    ({"class_cond": False, "labels": "balanced"}, "--labels (nothing takes classes)"),
    ({"class_cond": False, "labels": "balanced", "classifier_guidance": True}, ""),
    ({"labels": "balanced", "num_classes": 7, "image_size": 64}, ""), ({"batch_contrasts": False}, ""),
    ({"batch_contrasts": True, "guide_scale": 1.1}, "--batch_contrasts (nothing makes two evaluations that "
     "differ in their inputs alone)"), ({"batch_contrasts": True, "icg_scale": 1.0}, ""),
    ({"pag_sigma_min": 1}, "--pag_sigma_min (PAG is off)"),
    ({"pag_scale": 1.0, "pag_sigma_min": 1e9}, "--pag_scale, --pag_sigma_min (no step lies in the window of PAG)"),
    ({"pag_scale": 1.0, "pag_start": 0, "seg_scale": 1.0}, "--pag_scale, --pag_start (no step lies in the window of "
     "PAG)"), ({"apg": True, "apg_eta": 0.5}, "--apg, --apg_eta (there is no contrast that APG could change)"),
    ({"apg": True, "rescale_phi": 0.5, "pag_scale": 1.0}, ""),
    ({"apg": True, "apg_start": 1, "icg_scale": 1.0, "icg_sigma_min": 5.0, "timestep_respacing": "4"},
     "--apg, --apg_start (no contrast acts at a step of the window of APG)"),
    ({"rescale_phi": 0.5, "rescale_sigma_max": 1.0, "pag_scale": 1.0, "pag_sigma_min": 5.0, "seg_scale": 1.0,
      "seg_sigma_min": 4.0},
     "--rescale_phi, --rescale_sigma_max (no contrast acts at a step of the window of rescale)"),
    ({"apg": True, "apg_start": 2, "icg_scale": 1.0, "icg_start": 1, "timestep_respacing": "4"},
     "--apg_start (no contrast acts at a step that it keeps from APG)"),
    ({"apg": True, "apg_start": 2, "icg_scale": 1.0, "icg_start": 1, "pag_scale": 1.0, "pag_start": 3,
      "timestep_respacing": "4"}, ""),
    ({"apg": True, "apg_eta": 1.0, "pag_scale": 1.0},
     "--apg, --apg_eta (with eta 1, any norm and no momentum the change stays as it is)"),
    ({"apg": True, "apg_eta": 1.0, "apg_momentum": 0.5, "pag_scale": 1.0}, ""),
    ({"apg": True, "apg_eta": 1.0, "apg_norm_threshold": 5.0, "pag_scale": 1.0}, ""),
    ({"guide_scale": 1.1, "guide_start": 600, "timestep_respacing": "10"},
     "--guide_start (every step of the window of SAG is within)"),
    ({"pag_scale": 1.0, "pag_start": 6, "pag_sigma_max": 1e9, "pag_sigma_min": 1e-9, "timestep_respacing": "10"},
     "--pag_sigma_max, --pag_sigma_min (every step of the window of PAG is within)"),
    ({"pag_scale": 1.0, "pag_start": 1, "pag_sigma_max": 0.5, "timestep_respacing": "6"},
     "--pag_start (every step of the window of PAG is within)"),
    ({"apg": True, "apg_start": 1, "apg_sigma_max": 0.5, "icg_scale": 1.0, "icg_start": 2,
      "timestep_respacing": "6"}, "--apg_start (every step of the window of APG is within)"),
    ({"dcg_scale": 1.0, "dag_start": 9, "dag_stop": 0, "depth_tau": 0.1, "timestep_respacing": "10"},
     "--dag_stop (every step of the window of DAG is within); --depth_tau (--dpg_scale is 0)"),
    ({"tsg_scale": 1.0, "tsg_noise_scale": 0.0}, "--tsg_scale, --tsg_noise_scale (without noise the step is not "
     "perturbed)"), ({"tsg_scale": 1.0, "tsg_noise_scale": 0.1}, ""),
    ({"clean_classifier_scale": 1.0, "clean_classifier_temperature": 0.0}, "--clean_classifier_scale, "
     "--clean_classifier_temperature (with both temperatures 0 there is no gradient)"),
    ({"clean_classifier_scale": 1.0, "clean_classifier_temperature": 0.0, "clean_classifier_margin_temperature": 0.0},
     "--clean_classifier_scale, --clean_classifier_temperature, --clean_classifier_margin_temperature (with both "
     "temperatures 0 there is no gradient)"),
    ({"clean_classifier_scale": 1.0, "clean_classifier_temperature": 0.0, "clean_classifier_margin_temperature": 1.0},
     ""), ({"classifier_guidance": True, "classifier_start": 9, "timestep_respacing": "9"},
           "--classifier_start (every step of the window of CG is within)"),
    ({"guide_scale": 1.1, "mask": "global", "sel_attn_depth": 99, "blur_sigma": 2.0},
     "--sel_attn_depth (--mask global reads no attention)"),
    ({"num_heads": 2, "num_head_channels": 32}, "--num_heads (--num_head_channels 32 counts)"),
    ({"learn_sigma": True, "sigma_small": True}, "--sigma_small (the network predicts the variance)"),
    ({"eta": 1.0, "pag_blocks": "input.8", "pag_start": 3},
     "--eta (the sampler is ddpm); --pag_blocks, --pag_start (PAG is off)")])
def test_flags_without_effect_are_named(given, said):
    assert line(**given) == (f"without effect: {said}" if said else "")


@pytest.mark.parametrize(("given", "said"), [
    ({"steps": 10, "pag_scale": 1.0, "apg": True, "batch_contrasts": True, "prompt": "a"}, ""),
    ({"tsg_scale": 1.0, "tsg_noise_scale": 0.0, "steps": 10}, "--tsg_scale, --tsg_noise_scale (without noise the step "
     "is not perturbed)"), ({"seg_blocks": "middle"}, "--seg_blocks (SEG is off)"),
    ({"pag_scale": 1.0, "pag_start": 0}, "--pag_scale, --pag_start (no step lies in the window of PAG)"),
    ({"pag_scale": 1.0, "pag_start": 10}, "--pag_start (every step of the window of PAG is within)"),
    ({"pag_scale": 1.0, "pag_start": 9}, ""),
    ({"apg": True, "prompt_scale": 7.5}, "--apg (there is no contrast that APG could change); --prompt_scale (there is "
     "no prompt)"), ({"apg": True, "prompt": "a"}, ""), ({"apg": True, "sag_scale": 0.75}, ""),
    ({"apg": True, "prompt": "a", "prompt_scale": 1.0}, "--apg (there is no contrast that APG could change)"),
    ({"rescale_phi": 0.5, "rescale_start": 5, "pag_scale": 1.0, "pag_sigma_min": 5.0},
     "--rescale_phi, --rescale_start (no contrast acts at a step of the window of rescale)"),
    ({"batch_contrasts": True, "prompt": "a", "prompt_scale": 1.0, "sag_scale": 0.75},
     "--batch_contrasts (nothing makes two evaluations that differ in their inputs alone)"),
    ({"batch_contrasts": True, "prompt": "a", "prompt_scale": 1.0, "icg_scale": 1.0}, ""),
    ({"sag_block": "middle", "prompt": "a", "prompt_scale": 1.0, "negative_prompt": "b"},
     "--sag_block (--sag_scale is 0); --negative_prompt (--prompt_scale is 1)")])
def test_flags_of_runs_of_pipelines_without_effect_are_named_too(given, said):
    options, *methods = options_from(given, *LatentRun.classes())
    process = build_diffusion(DiffusionOptions(timestep_respacing="10"))
    assert LatentRun(options, tuple(methods)).without_effect(given, process) == (
        f"without effect: {said}" if said else "")


def test_a_method_of_two_contrasts_has_something_to_batch():
    @dataclass(frozen=True)
    class Two(ScaledOptions):
        short, sigma_flags, can_batch, term = "two", "two", True, ContrastGuidance
        switched_on: ClassVar = {"two_scale": 1.0}

        two_scale: float = option(1.0, "scale of the first")
        two_second: float = option(1.0, "scale of the second")

        def schedule(self):
            return [(Guidance(self.two_scale), Passes(forward=1)), (Guidance(self.two_second), Passes(forward=1)),
                    (Guidance(1.0), Passes())]

    assert idle_batches([Two()]) == {}
    assert list(idle_batches([Two(two_second=0.0)])) == ["batch_contrasts"]
    assert idle_batches([Two(two_second=0.0), Two(two_second=0.0)]) == {}


@pytest.mark.parametrize("kind", [*GUIDANCE, *SAMPLERS.values()], ids=lambda kind: kind.__name__)
def test_each_method_and_sampler_is_watched(kind):
    run = SamplingRun.of(options_from({}, SampleOptions, *option_classes()))
    shared = {field.name for options in (run.sample, run.model, run.diffusion, run.sampler)
              for field in option_fields(type(options))}
    own = [field.name for field in option_fields(kind) if field.name not in shared]
    silent = [name for name in own if not without_effect(run, [name])]
    assert set(silent) <= set(getattr(kind, "switched_on", ())) | {"classifier_guidance"}


def test_the_command_says_it_once_on_stderr_and_not_of_presets(tmp_path, tiny_checkpoints, caplog):
    short = {**TINY, "model_path": tiny_checkpoints / "model.safetensors", "timestep_respacing": 3, "num_samples": 1,
             "batch_size": 1}
    (tmp_path / "run.yaml").write_text("eta: 0.5\n")
    assert call("image_sample", "--config", tmp_path / "run.yaml", "--blur_sigma", "4", *flags(short), "--out",
                tmp_path / "a") == 0
    assert [record.getMessage() for record in caplog.records] == [
        "without effect: --eta (the sampler is ddpm); --blur_sigma (SAG is off)"]
    caplog.clear()
    assert call("image_sample", "--model", "fmnist32", *flags({"timestep_respacing": 3, "num_samples": 1}), "--out",
                tmp_path / "b", "--batch_size", 1) == 0
    assert not caplog.records


# Trainings


@pytest.fixture
def said(monkeypatch, caplog):
    """What the commands of trainings say of flags without effect; they train nothing."""
    for place in ("train_util.train_diffusion", "train_util.train_classifier", "depth.train.train_predictors"):
        monkeypatch.setattr(f"guided_diffusion.{place}", lambda *options: None)

    def run(command, *words):
        caplog.clear()
        caplog.set_level("INFO")
        assert call(command, *words) == 0
        return [line for line in caplog.messages if line.startswith("without effect")]
    return run


NO_SAMPLES = "no samples are made while training"


@pytest.mark.parametrize(("command", "words", "line"), [
    ("image_train", {}, ""),
    ("image_train", {"checkpoint_entry": "ema"},
     "--checkpoint_entry (neither --init_from nor --resume_checkpoint is given)"),
    ("image_train", {"checkpoint_entry": "ema", "init_from": "x.pt"}, ""),
    ("super_res_train", {"checkpoint_entry": "ema", "resume_checkpoint": "x.pt"}, ""),
    ("image_train", {"fp16_scale_growth": 0.1, "use_bf16": True},
     "--fp16_scale_growth (the network does not compute in float16)"),
    ("image_train", {"fp16_scale_growth": 0.1, "use_fp16": True}, ""),
    ("super_res_train", {"num_classes": 7}, "--num_classes (--class_cond is False)"),
    ("image_train", {"num_classes": 7, "class_cond": True}, ""),
    ("image_train", {"num_classes": 7, "classifier_guidance": True, "grid_interval": 10}, ""),
    ("image_train", {"num_heads": 2, "num_heads_upsample": 2, "num_head_channels": 16, "use_kl": True},
     "--num_heads, --num_heads_upsample (--num_head_channels 16 counts)"),
    ("image_train", {"num_classes": 1000, "num_heads": 4, "num_head_channels": 16, "checkpoint_entry": ""}, ""),
    ("image_train", {"sigma_small": True, "learn_sigma": True}, "--sigma_small (the network predicts the variance)"),
    ("image_train", {"grid_images": 4, "preview_steps": 5, "pag_scale": 1.0, "eval_fid_images": 9},
     f"--grid_images (--grid_interval is 0); --preview_steps, --pag_scale ({NO_SAMPLES}); "
     "--eval_fid_images (--eval_fid_interval is 0)"),
    ("image_train", {"grid_interval": 4, "preview_steps": 5, "pag_scale": 1.0, "blur_sigma": 4.0},
     "--blur_sigma (SAG is off)"),
    ("super_res_train", {"image_size": 256, "classifier_use_fp16": True}, f"--classifier_use_fp16 ({NO_SAMPLES})"),
    ("classifier_train", {"eval_interval": 3, "fp16_scale_growth": 0.1, "predict_v": True},
     "--eval_interval (--val_data_dir is not given); --fp16_scale_growth (the network does not compute in float16); "
     "--predict_v (of diffusion models)"),
    ("classifier_train", {"eval_interval": 3, "val_data_dir": "x", "classifier_use_fp16": True,
                          "fp16_scale_growth": 0.1}, ""),
    ("classifier_train", {"noised": False, "noise_schedule": "cosine"}, ""),        # the weights state it
    ("depth_train", {"cache_gb": 1, "draws": 0, "num_heads": 2, "num_head_channels": 16, "num_classes": 7},
     "--cache_gb (--draws is 0); --num_heads (--num_head_channels 16 counts); --num_classes (--class_cond is False)"),
    ("depth_train", {"cache_gb": 1, "timestep_respacing": "10"},
     "--timestep_respacing (predictors are trained on the whole chain)"),
])
def test_flags_without_effect_on_a_training_are_named(said, tmp_path, command, words, line):
    expected = [f"without effect: {line}"] if line else []
    assert said(command, *flags(words)) == expected
    (tmp_path / "run.yaml").write_text(json.dumps(words))
    assert said(command, "--config", tmp_path / "run.yaml") == expected


@pytest.mark.parametrize(("command", "name"), [
    (command, path.name) for path in sorted((REPOSITORY / "configs").glob("*_train.yaml"))
    for command in ["classifier_train" if "classifier" in path.name else
                    "super_res_train" if "upsampler" in path.name else "image_train"]])
def test_nothing_is_said_of_the_configurations_of_this_library(said, command, name):
    assert said(command, "--config", REPOSITORY / "configs" / name) == []


def test_nothing_is_said_of_what_a_start_states(said, tmp_path, tiny_checkpoints):
    assert said("image_train", "--init_from", tiny_checkpoints / "model.safetensors") == []


@pytest.mark.parametrize("kind", GUIDANCE, ids=lambda kind: kind.__name__)
def test_each_method_is_watched_in_trainings(kind):
    network, process, *others = options_from({"class_cond": True}, ModelOptions, DiffusionOptions, TrainOptions,
                                             PreviewOptions, *GUIDANCE)
    shared = {field.name for options in (network, process) for field in option_fields(type(options))}
    idle = idle_in_diffusion(network, process, *others)
    assert {field.name for field in option_fields(kind)} - shared <= idle.keys()
