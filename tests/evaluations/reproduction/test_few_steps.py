"""The tables of few-step sampling: their published numbers, their base lines, and what their rows cost."""

from functools import cache

import pytest
import yaml

from evaluations.reproduction import tables
from evaluations.reproduction.costs import passes
from evaluations.reproduction.tables import CONFIGS
from evaluations.reproduction.verdicts import not_comparable
from guided_diffusion.options import fill
from guided_diffusion.runs.options import SampleOptions, option_classes, preset_values
from guided_diffusion.runs.record import identity, name_of
from guided_diffusion.runs.sample import SamplingRun

SMALL = {"few_steps_scenes32": 9.0, "few_steps_fmnist32": 1.0, "few_steps_icons32": 3.0}       # and the blur of SAG
FEW = 40                    # evaluations of an image
SOLVERS = {"dpm2": ("dpm-solver++", 2, 0), "dpm3": ("dpm-solver++", 3, 0), "sde2": ("dpm-solver++", 2, 1),
           "unipc2": ("unipc", 2, None), "unipc3": ("unipc", 3, None)}
GUIDANCE = {"sag": ("guide_scale", 1.25), "cg": ("classifier_scale", 2.0), "pag": ("pag_scale", 1.0)}


load_table = cache(tables.load_table)


# The published ones

def test_adm_with_25_steps_of_ddim():
    rows = load_table("adm_g_25steps").rows
    assert {name: dict(row.published) for name, row in rows.items()} == {
        "imagenet128": {"fid": 5.98, "sfid": 7.04, "precision": 0.78, "recall": 0.51},
        "imagenet256": {"fid": 5.44, "sfid": 5.32, "precision": 0.81, "recall": 0.49}}
    for name, row in rows.items():
        assert row.run.sampler.title == "DDIM" and row.run.num_steps == 25 and row.images == 50_000
        assert [method.short for method in row.run.active] == ["CG"]
        assert row.evaluation.reference == f"VIRTUAL_{name}_labeled.npz"
        assert not_comparable(row, 50_000, []) == []        # the official evaluator


def test_solvers_with_classifier_guidance():
    rows = load_table("guided_few_steps_imagenet256").rows
    numbers = {"dpm2": [16.87, 13.09, 9.95, 8.72, 8.13, 7.73, 7.48],
               "unipc2": [15.62, 11.91, 9.29, 8.35, 7.95, 7.64, 7.44]}
    assert {name: dict(row.published) for name, row in rows.items()} == {
        f"{solver}_{steps}": {"fid": fid} for solver, fids in numbers.items()
        for steps, fid in zip((5, 6, 8, 10, 12, 15, 20), fids, strict=True)}
    for name, row in rows.items():
        solver, steps = name.split("_")
        assert_solver(row.run, solver, int(steps), "time-uniform")
        assert row.run.configuration()["classifier_scale"] == 2 and not row.run.sample.clip_denoised
        assert row.images == 10_000 and row.evaluation.reference == "VIRTUAL_imagenet256_labeled.npz"
        reason, = not_comparable(row, 10_000, [])
        assert "a PyTorch FID: not comparable with the official evaluator to the last digit" in reason


def assert_solver(run, solver, steps, grid):
    flags, (sampler, order, eta) = run.configuration(), SOLVERS[solver]
    assert (run.sample.sampler_name, flags["solver_order"], flags["solver_grid"]) == (sampler, order, grid)
    assert run.num_steps == steps
    assert eta is None or flags["solver_eta"] == eta
    assert sampler != "unipc" or flags["solver_variant"] == "bh2"


# The small ones

@pytest.mark.parametrize("table", SMALL)
def test_names_of_rows_say_what_they_are(table):
    for name, row in load_table(table).rows.items():
        solver, *words = name.split("_")
        grid = words.pop(0) if words[0] in ("chain", "logsnr") else "time-uniform"
        steps = int(words.pop(0))
        if solver in SOLVERS:
            assert_solver(row.run, solver, steps, grid)
        else:
            assert (row.run.sample.sampler_name, row.run.num_steps) == (solver, steps)
        guidance = [word for word in words if word in GUIDANCE]
        assert [method.short.lower() for method in row.run.active] == sorted(
            guidance, key=["sag", "pag", "cg"].index)
        assert all(row.run.configuration()[flag] == value for flag, value in map(GUIDANCE.get, guidance))


@pytest.mark.parametrize("table", SMALL)
def test_rows_are_alike_but_for_sampler_and_guidance(table):
    rows = load_table(table).rows.values()
    assert {row.images for row in rows} == {2000}
    assert {(row.run.sample.seed, row.run.sample.labels, row.run.sample.batch_size) for row in rows} == {
        (1, "balanced", 25)}
    assert not any(row.run.model.use_bf16 or row.run.model.use_fp16 for row in rows)
    assert {row.run.configuration()["blur_sigma"] for row in rows} == {SMALL[table]}


@pytest.mark.parametrize("table", SMALL)
def test_few_steps_are_compared_with_250_steps_of_the_same_guidance(table):
    table = load_table(table)
    for section in table.sections:
        base = table.rows[section.base].run
        assert base.sampler.title == "DDPM" and base.num_steps == 250
        for name in section.rows:
            run = table.rows[name].run
            assert [method.short for method in run.active] == [method.short for method in base.active]
            assert name == section.base or passes(run).forward <= FEW
    assert (table.chart.x, table.chart.y) == ("evaluations", "fid")


@pytest.mark.parametrize("row, flags", [("ddpm_250", {}), ("ddpm_250_sag", {"guide_scale": 1.25, "blur_sigma": 9})])
def test_base_lines_are_runs_of_the_plain_command(row, flags):
    """A folder that image_sample.py has filled can be put in the place of a row's."""
    flags = {"model": "scenes32", "timestep_respacing": "250", "labels": "balanced", "seed": 1, "num_samples": 2000,
             "batch_size": 25, **flags}
    plain = SamplingRun.of(fill(flags, [SampleOptions, *option_classes()], preset_values, source="here"))
    assert identified(plain) == identified(load_table("few_steps_scenes32").rows[row].run)


def identified(run):
    return identity(run.configuration(), {name_of(flag): path for flag, path in run.checkpoints().items()})


def test_windows_change_what_a_row_costs():
    table = load_table("few_steps_scenes32")
    section = next(one for one in table.sections if "window" in one.title)
    whole, *others = [passes(table.rows[name].run) for name in section.rows]
    assert whole.forward == FEW and all(one.steps < one.forward < 2 * one.steps for one in others)


def test_what_is_common_stands_once():
    """The small tables hold all rows of few_steps.yaml."""
    common = yaml.safe_load((CONFIGS / "few_steps.yaml").read_text())["rows"].keys()
    assert all(load_table(name).rows.keys() == common for name in SMALL)
    assert len({load_table(name).chart for name in SMALL}) == 1
