"""What benches compare: files, methods, pairs, and the steps that an equal number of evaluations leaves."""

import dataclasses
import json
import os
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import pytest
import torch
import yaml

from evaluations.bench import candidates, settings
from evaluations.bench.candidates import beyond, pair_settings, pairs
from evaluations.bench.hours import Hours, count_killed
from evaluations.bench.probe_report import Agreement
from evaluations.bench.units import all_units, in_pairs
from evaluations.metrics import BETTER, METRICS, WORSE, Direction
from evaluations.reproduction.costs import equivalent_evaluations, flops, steps_within
from evaluations.reproduction.reproduce import WorkOptions
from guided_diffusion.build import build_model
from guided_diffusion.checkpoint import load_state_dict, read_metadata, save_state
from guided_diffusion.errors import UserError
from guided_diffusion.fetch import sha256_of
from guided_diffusion.guidance import GUIDANCE, GradientGuidance, Networks, ScaledOptions
from guided_diffusion.guidance.base import each
from guided_diffusion.jobs import SILENT, STATE, JobState, State
from guided_diffusion.options import option
from guided_diffusion.presets import MODELS

OPTIONS = WorkOptions()


@cache
def bench(name, **changed):
    return settings.load_bench([name], OPTIONS, changed)


@cache
def found(name):
    return candidates.candidates(bench(name).base, "references")


@pytest.mark.parametrize("name", settings.bench_names())
def test_benches_that_come_with_the_library_are_loadable(name):
    loaded = bench(name)
    assert loaded.title and loaded.base.run.active == [] and loaded.base.evaluation.reference
    methods, why = found(name)
    assert {one.short for one in methods} | why.keys() == {method.short for method in GUIDANCE}
    assert {"SAG", "PAG", "SEG", "TSG", "APG", "rescale"} <= {one.short for one in methods}
    assert ("ICG" in why) == ("ICG" not in {one.short for one in methods}) == (loaded.base.run.model.num_classes is None
                                                                            or not loaded.base.run.model.class_cond)


@pytest.mark.parametrize(("direction", "lower"), [(Direction(WORSE, BETTER, "the smaller, the better"), True),
                                                  (Direction(BETTER, WORSE, "lower numbers are worse"), False)])
def test_which_way_a_metric_is_better_does_not_hang_on_the_words_for_it(direction, lower, monkeypatch):
    monkeypatch.setitem(METRICS, "fid", dataclasses.replace(METRICS["fid"], direction=direction))
    assert settings.BenchSpec(metric="fid").better(0, 1) is lower
    ordered = Agreement("fid", ["a", "b", "c"], predicted=[1, 2, 3], measured=[1, 2, 3])
    assert ordered.correlation == pytest.approx(1 if lower else -1)


def test_settings_switch_methods_on_from_weak_to_strong():
    for kind in GUIDANCE:
        assert kind.search and not kind().active
        methods = [kind(**flags) for flags in kind.search]
        assert all(method.active for method in methods)
        assert len({method.title() for method in methods}) == len(methods)


@pytest.mark.parametrize("name", ["scenes32", "fmnist32"])
def test_a_method_is_of_the_kind_that_its_terms_are(name):
    base = bench(name).base
    with torch.device("meta"):
        model = build_model(base.run.model)
    known = {one.short: one for one in found(name)[0]}
    for method in base.run.guidance:
        if method.short in known:
            on = base.changed(**known[method.short].settings[0]).run.active
            assert len(on) == 1
            terms = on[0].build(Networks(model, torch.device("cpu")))
            assert terms and all(isinstance(term, method.kind) for term in terms)


@pytest.mark.parametrize(("model", "short", "reason"), [
    ("scenes32", "DAG", "trained on another network"), ("icons32", "CG", "they must be trained on the same ones")])
def test_a_method_whose_files_do_not_belong_to_the_model_is_not_supported(model, short, reason, tmp_path):
    """The model has other weights than the one that its predictors read, and other classes than its classifier."""
    path = MODELS / f"{model}.safetensors"
    metadata, state = dict(read_metadata(path)), load_state_dict(path)
    state["out.2.bias"] = 1.01 * state["out.2.bias"]
    metadata["class_names"] = json.dumps(list(reversed(json.loads(metadata.get("class_names", "[]")))))
    other = tmp_path / "other.safetensors"
    save_state(other, state, {name: text for name, text in metadata.items() if text != "[]"})
    assert short in {one.short for one in found(model)[0]}
    methods, why = candidates.candidates(bench(model).base.changed(model_path=str(other)), "references")
    assert short not in {one.short for one in methods} and reason in why[short]
    assert {"SAG", "PAG"} <= {one.short for one in methods}


@pytest.mark.parametrize("entry", ["", "model"])
def test_predictors_of_another_entry_of_the_models_file_leave_a_method_out(entry, tmp_path):
    base = bench("scenes32").base
    path, read = tmp_path / "two.pt", tmp_path / "predictors.safetensors"
    state, learnt = (load_state_dict(base.run.checkpoints()["model_path"]),
                     next(method.depth_predictor for method in base.run.guidance if method.short == "DAG"))
    torch.save({"ema": state, "model": state}, path)
    metadata = {**read_metadata(learnt), "network_sha256": sha256_of(path)}
    training = json.loads(metadata["training"]) | {"checkpoint_entry": "model"}
    save_state(read, load_state_dict(learnt), {**metadata, "training": json.dumps(training)})
    methods, why = candidates.candidates(base.changed(model_path=str(path), depth_predictor=str(read),
                                                      checkpoint_entry=entry), "references")
    assert ("DAG" in {one.short for one in methods}) == (entry == "model") == ("DAG" not in why)
    assert entry or "on the entry model of" in why["DAG"]


def test_beyond_its_ends_a_search_halves_or_doubles_the_scale():
    for kind in GUIDANCE:
        last = len(kind.search) - 1
        weaker, stronger = (beyond(kind.search, place, kind.search_scale) for place in (0, last))
        if kind.search_scale is None:
            assert kind.short in ("APG", "rescale") and weaker == stronger == []
            continue
        flag, off = kind.search_scale
        assert weaker[1:] == stronger[:-1] == list(kind.search)
        assert weaker[0][flag] - off == pytest.approx((kind.search[0][flag] - off) / 2)
        assert stronger[-1][flag] - off == pytest.approx(2 * (kind.search[-1][flag] - off))
        assert kind(**weaker[0]).active and not kind(**{**weaker[0], flag: off}).active
        assert beyond(kind.search, 1, kind.search_scale) == []


@pytest.mark.parametrize(("name", "label"), [
    ("fmnist32", "FID"), ("icons32", "Frechet distance by EfficientNet-Lite0 features")])
def test_the_metric_of_the_search_is_named_by_its_features(name, label):
    assert bench(name).metric_label() == label


# Equal evaluations

def test_a_method_that_costs_two_evaluations_has_half_the_steps():
    loaded = bench("scenes32")
    assert loaded.reported({}, 40).run.num_steps == 40
    assert loaded.reported({"guide_scale": 1.25}, 40).run.num_steps == 20
    assert loaded.reported({"tsg_scale": 1.0}, 40).run.num_steps == 20
    assert loaded.reported({"tsg_scale": 1.0, "apg": True}, 40).run.num_steps == 20
    assert loaded.reported({"tsg_scale": 1.0, "guide_scale": 1.25}, 40).run.num_steps == 13
    assert 20 < loaded.reported({"pag_scale": 1.0}, 40).run.num_steps < 40


@pytest.mark.parametrize("flags", [{"pag_scale": 1.0}, {"classifier_guidance": True}, {"dcg_scale": 40.0},
                                   {"seg_scale": 1.0, "classifier_guidance": True}])
def test_as_many_steps_as_fit(flags):
    run = bench("scenes32").reported(flags, 40).run
    more = run.changed(**run.sampler.in_steps(run.num_steps + 1))
    assert equivalent_evaluations(run) <= 40 < equivalent_evaluations(more)


def test_other_networks_and_gradients_count_by_their_operations():
    run = bench("scenes32").base.run.changed(classifier_guidance=True, sampling_steps=10)
    one = flops(run)
    assert equivalent_evaluations(run) == pytest.approx(10 + 10 * one.others["classifier"] / one.forward)
    run = bench("scenes32").base.run.changed(dcg_scale=1.0, sampling_steps=10)
    assert equivalent_evaluations(run) == pytest.approx(10 * 1.54, rel=0.01)  # docs/bench_results.md: 13 steps of 20


def test_a_network_that_only_its_file_describes_counts_as_the_diffusion_network():
    run = bench("fmnist32").base.run.changed(autoguidance_scale=1.0, sampling_steps=10)
    assert equivalent_evaluations(run) == 20


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "unipc"])
def test_steps_of_every_sampler(sampler):
    run = bench("fmnist32").base.run.changed(sampler=sampler, guide_scale=1.5)
    assert steps_within(run, 12).num_steps == 6


def test_too_few_evaluations_are_a_sentence():
    run = bench("fmnist32").base.run.changed(guide_scale=1.5)
    with pytest.raises(UserError, match=r"3 evaluations: SAG s = 0\.5.* cannot have 1 steps: --sampling_steps 1: "):
        steps_within(run, 3)
    with pytest.raises(UserError, match="1 evaluations: are too few for a step of SAG"):
        steps_within(run.changed(solver_order=1), 1)


# Pairs

def test_transforms_stand_only_beside_contrasts():
    names = {(one.short, other.short) for one, other in pairs(found("scenes32")[0])}
    assert ("SAG", "PAG") in names and ("SAG", "CG") in names and ("PAG", "APG") in names
    assert ("CG", "APG") not in names and ("APG", "rescale") not in names and ("DAG", "rescale") not in names
    alone = {unit.title for unit in all_units(bench("scenes32"), found("scenes32")[0]) if not unit.pair}
    assert "APG" not in alone and "SAG" in alone


def test_pairs_are_tried_at_their_best_and_one_setting_weaker():
    methods = {one.short: one for one in found("scenes32")[0]}
    best = {"SAG": {"guide_scale": 1.1}, "PAG": {"pag_scale": 3.0}}
    assert pair_settings(methods["SAG"], methods["PAG"], best) == [
        {"guide_scale": 1.1, "pag_scale": 2.0}, {"guide_scale": 1.1, "pag_scale": 3.0}]
    best = {"PAG": {"pag_scale": 1.0}}
    assert pair_settings(methods["PAG"], methods["rescale"], best) == [
        {"pag_scale": scale, "rescale_phi": phi} for scale in (1.0, 2.0) for phi in (0.3, 0.7)]


def test_pairs_of_the_best_methods_come_first():
    methods = [one for one in found("scenes32")[0] if not one.transforms]
    best = {one.short: one.settings[0] for one in methods if one.short != "DAG"}
    titles = [unit.title for unit in in_pairs(bench("scenes32"), methods, best, ["TSG", "CG", "PAG", "SAG", "SEG"])]
    assert titles[0] == "TSG + CG" and titles[-1] == "SAG + SEG" and not any("DAG" in title for title in titles)


def test_a_search_by_another_metric_is_another_piece():
    by_fid, by_mind = bench("scenes32", other_evaluations="8"), bench("scenes32", other_evaluations="8", metric="mind")
    for unit in all_units(by_fid, found("scenes32")[0]):
        assert (unit.key(by_fid) == unit.key(by_mind)) == (unit.title == "no guidance")


def test_names_of_folders_tell_settings_apart():
    loaded = bench("scenes32", evaluations=12, other_evaluations="8")
    names = [row.name for unit in all_units(loaded, found("scenes32")[0]) for row in unit.rows(loaded)]
    assert len(set(names)) == len(names) and all(name == name.lower() and " " not in name for name in names)


@pytest.mark.parametrize(("search", "headline", "said"), [
    (each("dim_blocks", "middle", "output.2", dim_scale=1.0), None,
     "--dim_scale 1.0 --dim_blocks middle and --dim_scale 1.0 --dim_blocks output.2 are both called 'dim s = 1'"),
    (each("dim_scale", 1.0), "PAG s = 1, block output.2",
     "--pag_scale 1.0 and --dim_scale 1.0 are both called 'PAG s = 1, block output.2'"),
], ids=["of itself", "of another"])
def test_a_method_whose_settings_have_a_name_in_common_is_not_supported(search, headline, said):
    @dataclass(frozen=True)
    class DimOptions(ScaledOptions):
        """Guidance towards black."""

        short, sigma_flags, term = "dim", "dim", GradientGuidance
        switched_on: ClassVar = {"dim_scale": 1.0}

        dim_scale: float = option(0.0, "scale; 0: off")
        dim_blocks: str = option("middle", "blocks")

        def headline(self):
            return headline or super().headline()

        def build(self, nets):
            return [GradientGuidance(self.dim_scale)]

    DimOptions.search = search
    base = bench("fmnist32").base
    run = dataclasses.replace(base.run, guidance=(*base.run.guidance, DimOptions()))
    methods, why = candidates.candidates(dataclasses.replace(base, run=run), "references")
    assert "dim" not in {one.short for one in methods} and "SAG" in {one.short for one in methods}
    assert why["dim"].startswith(said) and "its details() must tell them apart" in why["dim"]


# Files and options

@pytest.fixture
def own(tmp_path):
    def write(**changes):
        content = {"shared": {"model": "fmnist32", "evaluation": {"reference": "fmnist32", "backend": "fashion_mnist"}},
                   **changes}
        (tmp_path / "own.yaml").write_text(yaml.safe_dump(content))
        return str(tmp_path / "own.yaml")
    return write


def test_a_file_of_ones_own(own):
    loaded = settings.load_bench([own(bench={"images": 77})], OPTIONS, {"evaluations": 30})
    assert (loaded.name, loaded.spec.images, loaded.spec.evaluations) == ("own", 77, 30)
    assert loaded.base.evaluation.words == settings.METRIC_WORDS.split(",")
    assert settings.load_bench([own(title=None)], OPTIONS, {}).title == "own"


@pytest.mark.parametrize(("changes", "changed", "message"), [
    ({}, {"seed": 2}, "--seed 2 --search_seed 2: must differ"),
    ({}, {"metric": "saturation"}, "--metric saturation: must be one of which a way is better"),
    ({}, {"metric": "kid"}, "--metric kid: must be one of the metrics of"),
    ({}, {"other_evaluations": "20,x"}, "--other_evaluations 20,x: 'x' is no whole number above 0"),
    ({}, {"other_evaluations": 5000 * "9"}, "999' is no whole number above 0"),
    ({}, {"other_evaluations": "40"}, "must differ from each other and from --evaluations 40"),
    ({"shared": {"model": "fmnist32", "guide_scale": 2}}, {}, "switches SAG s = 1.* on; a bench does that itself"),
    ({"shared": {"model": "fmnist32", "seed": 2}}, {}, "seed in .*: is set by the bench"),
    ({"shared": {"model": "fmnist32", "evaluation": {"published": {"fid": 3.0}}}}, {},
     "published in .*: a bench has settings and steps of its own, leave it out"),
    ({"shared": 3}, {}, "shared in .*: must be names and values"),
    ({"title": ["x"]}, {}, r"title \['x'\] in .*: must be text"), ({"source": {}}, {}, "source {} in .*: must be text"),
    ({"benhc": {}}, {}, r"benhc in .*: is none of .* \(did you mean bench\?\)"),
    ({"bench": {"imgaes": 3}}, {}, r"imgaes in .*no such option.*images"),
])
def test_what_is_wrong_with_a_file_or_an_option_is_a_sentence(own, changes, changed, message):
    with pytest.raises(UserError, match=message):
        settings.load_bench([own(**changes)], OPTIONS, changed)


@pytest.mark.parametrize(("words", "message"), [
    ([], "0 benches given: name one of"), (["scenes23"], r"BENCH scenes23: .*did you mean scenes32\?")])
def test_an_unknown_bench_is_a_sentence(words, message):
    with pytest.raises(UserError, match=message):
        settings.load_bench(words, OPTIONS, {})


# Hours

def test_hours_are_counted_over_all_starts(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    hours = Hours(tmp_path, 1.0, 0.5)
    assert hours.rate == 0.5 and hours.left == 3600
    now[0] += 600
    hours.count("first", 1000)
    assert hours.rate == 0.6 and hours.expected(100) == 60 and hours.left == 3000
    hours.reserve += 100
    now[0] += 50
    assert hours.left == 2850
    hours.count()                                   # no piece of work: no part of the rate
    again = Hours(tmp_path, 2.0, 0.5)
    assert again.done == ["first"] and again.rate == 0.6 and again.left == 7200 - 650
    assert Hours(tmp_path, None, 0.5).left == float("inf")


@pytest.mark.parametrize(("state", "added"), [(State.RUNNING, 250.0), (State.FINISHED, 0.0)])
def test_a_start_that_was_killed_is_counted_until_its_last_word(state, added, tmp_path, monkeypatch):
    hours = Hours(tmp_path, 1.0, 0.5)
    hours.count("first", 1000)
    counted = json.loads((tmp_path / "hours.json").read_text())
    told = JobState("bench", "", "", state, "elsewhere", 1, 0, 1, counted["counted"] - 900, counted["counted"] + 250)
    (tmp_path / STATE).write_text(json.dumps(told.as_dict()))
    monkeypatch.setattr("time.time", lambda: told.written + SILENT + 1)
    for _ in range(2):                              # and once only
        count_killed(tmp_path)
        again = Hours(tmp_path, 1.0, 0.5)
        assert again.seconds == pytest.approx(counted["seconds"] + added) and again.done == ["first"]


def test_hours_of_before_are_counted_from_when_their_file_was_written(tmp_path):
    path = tmp_path / "hours.json"
    path.write_text('{"seconds": 7000.0, "sampling": 0.0, "evaluations": 0.0, "done": []}')
    os.utime(path, (8000, 8000))
    told = JobState("bench", "", "", State.RUNNING, "elsewhere", 1, 0, 1, 1000.0, 8100.0)
    (tmp_path / STATE).write_text(json.dumps(told.as_dict()))
    count_killed(tmp_path)
    assert Hours(tmp_path, 1.0, 0.5).seconds == 7100


def test_a_start_that_was_killed_before_it_counted_anything(tmp_path):
    told = JobState("bench", "", "", State.RUNNING, "elsewhere", 1, 0, 1, 1000.0, 1030.0)
    (tmp_path / STATE).write_text(json.dumps(told.as_dict()))
    count_killed(tmp_path)
    assert Hours(tmp_path, 1.0, 0.5).seconds == 30
