"""Guidance is a list everywhere: a method that is added in one place is found wherever methods are."""

import ast
import dataclasses
import json
import math
import re
from dataclasses import dataclass, make_dataclass, replace
from typing import ClassVar

import pytest
import torch
from commands import REPOSITORY, call, flags, samples_in
from networks import TINY

from guided_diffusion.errors import UserError
from guided_diffusion.guidance import (
    GUIDANCE,
    GradientGuidance,
    Guidance,
    GuidanceOptions,
    Networks,
    Passes,
    ScaledOptions,
)
from guided_diffusion.options import option, options_from
from guided_diffusion.runs.options import SampleOptions, option_classes
from guided_diffusion.runs.record import identity
from guided_diffusion.runs.sample import SamplingRun, built_terms
from guided_diffusion.sampling import SAMPLERS, SamplerOptions
from guided_diffusion.script_util import create_gaussian_diffusion

SHORT = {**TINY, "timestep_respacing": "3", "num_samples": 4, "batch_size": 2, "labels": "balanced"}


class TowardsGrey(GradientGuidance):
    passes = Passes(others={"painter": 1})

    def gradient(self, ctx, pred):
        return -self.scale * ctx.x_t


@dataclass(frozen=True)
class GreyOptions(GuidanceOptions):
    """Guidance towards grey."""

    short = "grey"
    kind = GradientGuidance
    switched_on: ClassVar = {"grey_scale": 3.0}
    for_pipelines = True

    grey_scale: float = option(0.0, "scale of guidance towards grey; 0: off")
    grey_start: int | None = option(None, "guided only at respaced steps below this one; unset: at all", minimum=0)
    grey_model: str = option("", "a file that it needs")

    @property
    def active(self):
        return self.grey_scale != 0

    def headline(self):
        return f"grey {self.grey_scale:g}"

    def details(self):
        return {"start": f"from step {self.grey_start}"}

    def files(self):
        return {"grey_model": self.grey_model} if self.active else {}

    def build(self, nets: Networks):
        return [TowardsGrey(self.grey_scale, self.grey_start)]

    def schedule(self):
        return [(Guidance(self.grey_scale, self.grey_start), TowardsGrey.passes)]


@pytest.fixture
def grey():
    """The method, in the one list there is."""
    GUIDANCE.append(GreyOptions)
    yield GreyOptions
    GUIDANCE.remove(GreyOptions)


def run(out, tiny_checkpoints, **changes):
    options = {**SHORT, "model_path": tiny_checkpoints / "model.safetensors", "out": out, **changes}
    return call("image_sample", *flags(options))


def record(out):
    return json.loads((out / "run.json").read_text())


@pytest.mark.parametrize("command", ["image_sample", "latent_sample"])
def test_a_new_method_is_in_the_help(command, grey, capsys):
    assert call(command, "--help") == 0
    text = capsys.readouterr().out
    assert "Guidance towards grey:" in text and "--grey_scale" in text and "--grey_start" in text


def test_a_new_method_guides_is_recorded_and_has_a_title(grey, tmp_path, tiny_checkpoints, monkeypatch):
    (tmp_path / "file").write_text("weights")
    assert run(tmp_path / "plain", tiny_checkpoints) == 0
    assert run(tmp_path / "grey", tiny_checkpoints, grey_scale=3, grey_start=2, grey_model=tmp_path / "file") == 0
    plain, guided = (samples_in(tmp_path / name)[0].astype(int) for name in ("plain", "grey"))
    assert (plain != guided).any()

    written = record(tmp_path / "grey")
    assert written["configuration"]["grey_scale"] == 3 and written["configuration"]["grey_start"] == 2
    assert len(written["sha256"]["grey_model"]) == 64
    assert written["fingerprint"] != record(tmp_path / "plain")["fingerprint"]
    known = identity(written["configuration"], written["sha256"])
    assert known["grey_scale"] == 3 and known["grey_model"] == written["sha256"]["grey_model"]
    unguided = record(tmp_path / "plain")
    assert not [name for name in identity(unguided["configuration"], unguided["sha256"]) if name.startswith("grey")]

    rows = {}
    monkeypatch.setattr("guided_diffusion.runs.comparison.save_comparison",
                        lambda images, path, **how: rows.update(images))
    assert call("compare", tmp_path / "plain", tmp_path / "grey", "--out", tmp_path / "comparison.png") == 0
    assert list(rows) == ["plain: no guidance", "grey: grey 3, from step 2"]


def test_a_file_that_a_new_method_needs_is_asked_for(grey, tmp_path, tiny_checkpoints, capsys):
    assert run(tmp_path / "out", tiny_checkpoints, grey_scale=3) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: --grey_model is not given: grey needs it"


# Classes that are not whole


def scaled(**changes):
    """The options of a method towards grey, with other attributes; None leaves one out."""
    stated = {"short": "grey", "sigma_flags": "grey", "term": TowardsGrey, "switched_on": {"grey_scale": 0.1},
              "build": lambda self, nets: [TowardsGrey(self.grey_scale)], **changes}
    return make_dataclass("Grey", [("grey_scale", float, option(0.0, "scale; 0: off"))], bases=(ScaledOptions,),
                          frozen=True, namespace={name: value for name, value in stated.items() if value is not None})


@dataclass(frozen=True)
class Undecided(GuidanceOptions):
    """Without anything that every method says."""

    short = "undecided"


class Undecorated(scaled()):
    """Whose option nobody sees."""

    grey_start: int | None = option(None, "start")


@pytest.mark.parametrize(("method", "said"), [
    (scaled(short=None), "Grey: states no short, which a class below GuidanceOptions must have"),
    (scaled(switched_on=None, build=None), "Grey: states no switched_on and no build, which a class below "
     "GuidanceOptions must have"),
    (scaled(term=None), "Grey: states no term, which a class below ScaledOptions must have"),
    (scaled(sigma_flags=None), "Grey: states no sigma_flags, which a class below ScaledOptions must have"),
    (scaled(sigma_flags="gray"), 'Grey: has no option gray_scale, as sigma_flags = "gray" says'),
    (scaled(term=TowardsGrey(1.0)), "Grey.term: is <"), (scaled(search=({"gray_scale": 1.0},)),
     "Grey.search: gray_scale is none of its options (did you mean grey_scale?)"),
    (scaled(symbols={"gray_scale": ("s", 0.0)}), "Grey.symbols: gray_scale is none of its options"),
    (scaled(search={"grey_scale": 1.0}), "Grey.search: has 'grey_scale' where flags by value are expected"),
    (scaled(switched_on={"grey_scal": 1.0}),
     "Grey.switched_on: grey_scal is none of its options (did you mean grey_scale?)"),
    (Undecided, "Undecided: states no switched_on and no active and no headline and no build and no schedule, which a "
     "class below GuidanceOptions must have"),
    (Undecorated, "Undecorated: its options are not seen, write @dataclass(frozen=True) above the class"),
    (scaled(short="PAG"), 'short "PAG": is that of two methods, guided_diffusion.guidance.perturbed_attention.'
     "PagOptions and ")])
@pytest.mark.parametrize("command", ["image_sample", "probe", "image_train"])
def test_a_method_that_is_not_whole_is_named_by_runs_without_it(command, method, said, capsys):
    GUIDANCE.append(method)
    try:
        assert call(command, "--help") == 2
    finally:
        GUIDANCE.remove(method)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"error: {said}")


def test_a_sampler_that_is_not_whole_is_named_by_runs_without_it(monkeypatch, capsys):
    @dataclass(frozen=True)
    class Still(SamplerOptions):
        """A sampler."""

    monkeypatch.setitem(SAMPLERS, "still", Still)
    assert call("image_sample", "--help") == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: Still: states no title and no step, which a class below SamplerOptions must have")


# Windows in noise level


METHODS = {kind: replace(kind(), **kind.switched_on) for kind in GUIDANCE}


@pytest.mark.parametrize("kind", METHODS, ids=lambda kind: kind.__name__)
def test_every_method_has_a_window_of_noise_levels(kind):
    process, on, flag = create_gaussian_diffusion(timestep_respacing="10"), METHODS[kind], f"{kind.sigma_flags}_sigma"
    cases = [({}, "", range(10)), ({"min": 2.0}, ", noise levels above 2", range(4, 10)),
             ({"max": 2.5}, ", noise levels up to 2.5", range(4)),
             ({"min": 0.5, "max": 2.5}, ", noise levels 0.5 to 2.5", range(2, 4))]
    for levels, words, held in cases:
        options = replace(on, **{f"{flag}_{name}": value for name, value in levels.items()})
        assert options.title() == on.title() + words
        for term, _ in options.schedule():
            assert term.window(torch.arange(10), process).nonzero().flatten().tolist() == list(held)


@pytest.mark.parametrize("kind", METHODS, ids=lambda kind: kind.__name__)
def test_titles_say_windows_of_steps(kind):
    on, flags = METHODS[kind], {flag.rpartition("_")[2]: flag for flag in kind.bounds() if "_sigma_" not in flag}
    cases = [({"start": 20}, ", steps below 20"), ({"stop": 5}, ", steps from 5 up"),
             ({"start": 20, "stop": 5}, ", steps 5 to 19")]
    assert "start" in flags
    for bounds, words in cases:
        if bounds.keys() <= flags.keys():
            options = replace(on, **{flags[name]: value for name, value in bounds.items()})
            assert options.title() == on.title() + words
            level = {f"{kind.sigma_flags}_sigma_max": 3.0}
            assert replace(options, **level).title() == f"{options.title()}, noise levels up to 3"


@pytest.mark.parametrize("kind", METHODS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(("levels", "said"), [
    ({"min": -1}, "_min -1.0: must be at least 0"), ({"max": 0}, "_max 0.0: must be greater than 0"),
    ({"min": math.nan}, "_min nan: must be a number"), ({"max": "wide"}, "_max 'wide': must be a number"),
    ({"min": 3, "max": 3}, "_max 3: the first must be smaller than the second")])
def test_bad_noise_levels_are_sentences(kind, levels, said):
    flag = f"--{kind.sigma_flags}_sigma"
    with pytest.raises(UserError) as refused:
        replace(METHODS[kind], **{f"{flag[2:]}_{name}": value for name, value in levels.items()})
    assert str(refused.value).startswith(f"{flag}_") and said in str(refused.value)


def test_options_that_came_later_are_no_part_of_a_run_that_does_not_use_them():
    run = SamplingRun.of(options_from({"guide_scale": 1.1, "pag_scale": 1.0}, SampleOptions, *option_classes()))
    plain = identity(run.configuration(), {})
    assert not [name for name in plain if "sigma_m" in name or "batch_contrasts" in name]
    older = {name: value for name, value in run.configuration().items() if name in plain}
    assert identity(older, {}) == plain
    for changes in ({"sag_sigma_min": 0.5}, {"pag_sigma_max": 3.0}, {"batch_contrasts": True}):
        assert identity(run.changed(**changes).configuration(), {}) == {**plain, **changes}
    for changes in ({"classifier_sigma_min": 0.5}, {"classifier_start": 5}):
        assert identity(run.changed(**changes).configuration(), {}) == plain            # CG is off
    run = run.changed(classifier_guidance=True)
    plain = identity(run.configuration(), {})
    assert "classifier_scale" in plain and "classifier_start" not in plain
    assert identity(run.changed(classifier_start=5).configuration(), {}) == {**plain, "classifier_start": 5}


# What a run's identity is


@pytest.mark.parametrize("changes", [
    {"dag_start": 5}, {"sel_attn_depth": 0, "blur_sigma": 1}, {"pag_blocks": "output.0"}, {"eta": 0.5},
    {"classifier_scale": 4, "classifier_path": "elsewhere.pt"}])
def test_options_of_what_is_off_are_no_part_of_a_run(changes, tmp_path, tiny_checkpoints, capsys):
    assert run(tmp_path, tiny_checkpoints) == 0
    before = (tmp_path / "run.json").read_bytes()
    assert run(tmp_path, tiny_checkpoints, **changes) == 0, capsys.readouterr().err
    assert (tmp_path / "run.json").read_bytes() == before          # finished, and known as such


@pytest.mark.parametrize(("options", "changes", "flag"), [
    ({"guide_scale": 1.2, "sel_attn_depth": 1}, {"blur_sigma": 1}, "blur_sigma"),
    ({"use_ddim": True, "eta": 0.0}, {"eta": 0.5}, "eta"),
    ({}, {"sampler": "ddim"}, "sampler"),
    ({}, {"seed": 1}, "seed")])
def test_options_of_what_is_on_are_a_part_of_it(options, changes, flag, tmp_path, tiny_checkpoints, capsys):
    assert run(tmp_path, tiny_checkpoints, **options) == 0
    assert run(tmp_path, tiny_checkpoints, **{**options, **changes}) == 2
    assert f"--{flag} differs" in capsys.readouterr().err


def test_both_ways_to_ask_for_ddim_are_one_run(tmp_path, tiny_checkpoints, capsys):
    assert run(tmp_path, tiny_checkpoints, use_ddim=True) == 0
    before = (tmp_path / "run.json").read_bytes()
    assert run(tmp_path, tiny_checkpoints, sampler="ddim") == 0
    assert (tmp_path / "run.json").read_bytes() == before
    assert run(tmp_path, tiny_checkpoints, sampler="ddpm", use_ddim=True) == 2
    assert "--use_ddim True --sampler ddpm" in capsys.readouterr().err


# No other code knows a method


def own_flags():
    """The flags that methods define themselves, by name."""
    return {name for method in GUIDANCE for name in method.__annotations__ if not name.startswith("_")
            and name in {field.name for field in dataclasses.fields(method)}}


def names_in(tree):
    """Attributes, keywords, words and strings of a program, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr, node.lineno
        elif isinstance(node, ast.keyword) and node.arg:
            yield node.arg, node.value.lineno
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"\w+", node.value):
            yield node.value, node.lineno


def test_no_code_outside_guidance_names_a_flag_of_a_method():
    flags_of_methods = own_flags()
    assert {"guide_scale", "pag_scale", "classifier_scale", "dcg_scale"} <= flags_of_methods
    found = []
    for package in ("guided_diffusion", "evaluations", "scripts"):
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            if "guidance" in path.parts:
                continue
            tree = ast.parse(path.read_text())
            # A program may have options or variables of its own by such a name, like the threshold of a study.
            own = {node.target.id for node in ast.walk(tree)
                   if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}
            found += [f"{path.relative_to(REPOSITORY)}:{line}: {name}" for name, line in names_in(tree)
                      if name in flags_of_methods - own - {"mask", "threshold"}]
    assert not found


def test_a_method_that_builds_no_term_of_the_kind_that_it_states_is_said(caplog):
    @dataclass(frozen=True)
    class Grey(GuidanceOptions):
        def build(self, nets):
            return [TowardsGrey(0.1)]

        def schedule(self):
            return [(Guidance(0.1), TowardsGrey.passes)]

    caplog.set_level("INFO")
    assert [type(term) for term in built_terms(Grey(), None)] == [TowardsGrey]
    assert caplog.messages == ["Grey: states the kind ContrastGuidance, and builds none of it but TowardsGrey; kind = "
                               "GradientGuidance would be right"]
    Grey.kind = GradientGuidance
    built_terms(Grey(), None)
    assert len(caplog.messages) == 1
