"""Runs of the solvers: what is refused, what a run is called, and what its images depend on."""

import re

import pytest
from commands import call, flags
from networks import TINY

from evaluations.reproduction.titles import sampler
from guided_diffusion.errors import UserError
from guided_diffusion.options import fill
from guided_diffusion.runs.options import SampleOptions, option_classes, preset_values
from guided_diffusion.runs.record import identity, title
from guided_diffusion.runs.sample import SamplingRun
from guided_diffusion.runs.upsample import UpsamplingRun

SOLVER = {"sampler": "dpm-solver++"}
CHAIN = {**SOLVER, "solver_grid": "chain"}


def run_of(**given):
    given = {"model": "fmnist32", **given}
    return SamplingRun.of(fill(given, [SampleOptions, *option_classes()], preset_values, "here"))


@pytest.mark.parametrize(("given", "message"), [
    ({"solver_order": 2}, "--solver_order 2: is an option of --sampler dpm-solver++ and unipc, and the sampler is ddp"),
    ({"use_ddim": True, "sampling_steps": 20}, "--sampling_steps 20: is an option of --sampler dpm-solver++ and uni"),
    ({"sampler": "unipc", "solver_eta": 1}, "--solver_eta 1.0: is an option of --sampler dpm-solver++, and the sampl"),
    ({**SOLVER, "solver_variant": "bh1"}, "--solver_variant bh1: is an option of --sampler unipc, and the sampler is"),
    ({**SOLVER, "solver_grid": "karras"}, "--solver_grid karras: must be one of chain, time-uniform"),
    ({**SOLVER, "solver_order": 3, "sampling_steps": 2}, "--sampling_steps 2: must be at least 3, the --solver_order"),
    ({**SOLVER, "solver_order": 3, "solver_eta": 1}, "has the orders 1 and 2"),
    ({**SOLVER, "timestep_respacing": "20"}, "--timestep_respacing 20: must be unset with --solver_grid time-"),
    ({**CHAIN, "timestep_respacing": "10", "sampling_steps": 9}, "--timestep_respacing gives, 10"),
])
def test_refused_before_any_work(given, message, tmp_path):
    with pytest.raises(UserError, match=re.escape(message)):
        run_of(**given, out=str(tmp_path)).build()


@pytest.mark.parametrize(("given", "words"), [
    (SOLVER, "DPM-Solver++(2M), 20 steps, time-uniform"),
    ({**CHAIN, "solver_eta": 1, "sampling_steps": 10}, "SDE-DPM-Solver++(2M), 10 steps, chain"),
    ({"sampler": "unipc", "solver_order": 3, "dynamic_threshold": 0.995, "sampling_steps": 8},
     "UniPC-3 (bh2), 8 steps, time-uniform, dynamic threshold 0.995"),
    ({"sampler": "ddim", "timestep_respacing": "ddim25"}, "DDIM, 25 steps")])
def test_runs_are_named_with_their_sampler(given, words):
    run = run_of(**given, guide_scale=1.1)
    assert sampler(run) == words
    assert title(run.configuration()) == f"{run.title()}, {words}"


def test_the_usual_sampler_is_not_named():
    run = run_of(timestep_respacing="20")
    assert sampler(run) == "DDPM, 20 steps" and title(run.configuration()) == "no guidance"


def test_images_depend_on_the_options_of_their_solver_alone():
    def of(**given):
        return identity(run_of(**given).configuration(), {})

    own = {"solver_order", "solver_grid", "sampling_steps", "dynamic_threshold"}
    assert own | {"solver_eta"} <= of(**SOLVER).keys() and "solver_variant" not in of(**SOLVER)
    assert own | {"solver_variant"} <= of(sampler="unipc").keys() and "solver_eta" not in of(sampler="unipc")
    assert not {*own, "solver_eta", "solver_variant"} & of().keys()
    assert of(**SOLVER) == of(**SOLVER, sampling_steps=20) != of(**SOLVER, sampling_steps=19)
    assert of(**CHAIN, sampling_steps=20) == of(**CHAIN, timestep_respacing="20") != of(**CHAIN)


def test_a_longer_run_keeps_the_images_of_the_shorter(tiny_checkpoints, tmp_path):
    line = {**TINY, "model_path": tiny_checkpoints / "model.safetensors", "sampler": "unipc", "sampling_steps": 4,
            "batch_size": 2}
    for folder, counts in (("grown", (3, 5)), ("fresh", (5,))):
        for count in counts:
            assert call("image_sample", *flags({**line, "num_samples": count, "out": tmp_path / folder})) == 0
    grown, fresh = ((tmp_path / name / "samples_5x16x16x3.npz").read_bytes() for name in ("grown", "fresh"))
    assert grown == fresh


@pytest.mark.parametrize(("given", "words"), [
    ({}, "UniPC-2 (bh2), 20 steps, time-uniform"),
    ({"sampling_steps": 9}, "UniPC-2 (bh2), 9 steps, time-uniform"),
    ({"sampler": "ddpm"}, "DDPM, 1000 steps"),
    ({"use_ddim": True}, "DDIM, 1000 steps"),
    ({"timestep_respacing": "50"}, "DDPM, 50 steps")])
def test_a_bundled_model_brings_a_sampler_where_none_is_named(given, words, caplog):
    caplog.set_level("INFO")
    run = SamplingRun.of(fill({"model": "scenes32", **given}, SamplingRun.classes(), SamplingRun.preset_values, "here"))
    assert sampler(run) == words
    said = [message for message in caplog.messages if "--sampler unipc" in message]
    assert len(said) == ("UniPC" in words)
    table_row = run_of(**{"model": "scenes32"})            # rows of tables say how they are sampled
    assert sampler(table_row) == "DDPM, 1000 steps"


def test_an_upsampler_brings_its_sampler():
    run = UpsamplingRun.of(fill({"model": "icons64_upsampler"}, UpsamplingRun.classes(), UpsamplingRun.preset_values,
                                "here"))
    assert sampler(run).startswith("UniPC-2 (bh2), 20 steps")
