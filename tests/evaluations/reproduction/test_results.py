"""Verdicts: what a measured number says of a published one, and of another row."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evaluations.evaluation import ExtractorOptions
from evaluations.metrics import Replicates
from evaluations.reproduction.checks import check_rows
from evaluations.reproduction.markdown import markdown
from evaluations.reproduction.measurements import EvaluationSettings, Measurements
from evaluations.reproduction.results import features_of, results
from evaluations.reproduction.table_chart import chart_drawing
from evaluations.reproduction.tables import ChartSpec, Section, Table, in_folder, load_table, read_row
from evaluations.reproduction.titles import guidance
from evaluations.reproduction.titles import titles as titles_of
from evaluations.reproduction.verdicts import jointly, not_comparable, overall, verdict, versus
from guided_diffusion.errors import UserError


def number(value, spread=0.1, shift=0.0):
    return Replicates(value, value + shift + spread * np.linspace(-1, 1, 41))


@pytest.mark.parametrize("value, published, expected", [
    (5.91, 5.91, "reproduced"), (5.91, 6.04, "reproduced"), (5.91, 6.08, "differs"), (5.91, 5.7, "differs"),
])
def test_the_interval_decides_widened_for_the_other_sample(value, published, expected):
    assert verdict(value, [value - 0.1, value + 0.1], published, []) == expected


def test_the_last_digit_of_a_published_number_is_rounded():
    assert verdict(0.7049, [0.7045, 0.7053], 0.70, []) == "reproduced"
    assert verdict(0.7120, [0.7115, 0.7125], 0.70, []) == "differs"
    assert verdict(26.26, [26.258, 26.262], 26.2, []) == "differs"


def test_nothing_is_said_where_nothing_was_published_or_measured():
    assert verdict(1.0, [0.9, 1.1], None, []) == ""
    assert verdict(None, None, 2.0, []) == "not run here"
    assert verdict(2.0, [1.9, 2.1], 2.0, ["other images"]) == "not comparable"


def test_a_row_is_as_good_as_its_worst_number():
    assert overall(["reproduced", "differs", ""]) == "differs"
    assert overall(["reproduced", "", "reproduced"]) == "reproduced"
    assert overall(["not comparable", "differs"]) == "not comparable"
    assert overall([""]) == overall([]) == ""


def test_a_row_that_reproduces_exactly_differs_in_one_of_twenty_cases():
    random, differs, cases = np.random.default_rng(0), 0, 2000
    for _ in range(cases):
        pairs = 100 * random.standard_normal((5, 2))
        differs += overall([verdict(one, (one - 196, one + 196), other, []) for one, other in pairs]) == "differs"
    assert differs / cases == pytest.approx(0.05, abs=0.015)


def test_numbers_of_a_row_are_corrected_by_holm():
    def alone(p_value):
        deviations = {0.004: 2.878, 0.02: 2.326, 0.03: 2.170, 0.2: 1.282}
        return verdict(1000, (1000 - 196, 1000 + 196), 1000.005 + deviations[p_value] * 100 * 2**0.5, [])

    assert [alone(p_value) for p_value in (0.004, 0.02, 0.03, 0.2)] == ["differs"] * 3 + ["reproduced"]
    assert alone(0.02).p_value == pytest.approx(0.02, rel=0.01)
    assert jointly([alone(0.02), alone(0.2), "not run here"]) == ["differs", "reproduced", "not run here"]
    assert jointly([alone(0.2), alone(0.02), alone(0.03)]) == ["reproduced"] * 3
    assert jointly([alone(0.03), alone(0.004), alone(0.02)]) == ["differs"] * 3


def test_no_word_is_said_without_an_interval(table):
    assert verdict(0.7, None, 0.7, []) == "no word" and versus("recall", None, None) == "no word"
    assert overall(["no word", "reproduced"]) == "reproduced" and overall(["no word", ""]) == "no word"
    written(table)
    unknown = Replicates(0.99, np.full(41, np.nan))
    measured = {(name, 50_000): {"recall": unknown, "fid": number(5.9)} for name in table.rows}
    section, = results(table, Measurements(measured, {}), {}, how())["sections"]
    recall = section["rows"][1]["metrics"]["recall"]
    assert recall["interval95"] is None and recall["verdict"] == "no word"
    assert recall["versus"] == {"difference": 0, "interval95": None, "verdict": "no word"}


def by_photo(published, second):
    """A table of two rows, evaluated by a network that gives its metrics other names."""
    shared = {"model": "fmnist32", "evaluation": {"reference": "r", "metrics": "fid,precision", "published": published}}
    rows = {name: read_row(name, {**shared, "evaluation": {**shared["evaluation"], "backend": backend}}, Path("t.yaml"))
            for name, backend in (("a", "photo"), ("b", second))}
    return Table("mini", "Mini", "", "", rows, (Section("All", tuple(rows)),), ChartSpec("evaluations", "fid"))


def test_numbers_by_another_network_have_its_name(tmp_path):
    table = in_folder(by_photo({}, "photo"), tmp_path)
    written(table)
    measured = {(name, table.rows[name].images): {"fid": number(value), "precision": number(0.98)}
                for name, value in (("a", 3.0), ("b", 4.0))}
    said = results(table, Measurements(measured, {}), {}, how())
    first, second = said["sections"][0]["rows"]
    assert first["metrics"]["precision"]["interval95"] == pytest.approx([0.88025, 1])
    assert second["metrics"]["precision"]["versus"]["interval95"] == [0, 0]
    text = markdown({**said, "command": "", "version": "", "device": "", "ranks": 1})
    assert "| Frechet distance by EfficientNet-Lite0 features | precision |" in text
    assert "of the Frechet distance by EfficientNet-Lite0 features of N images" in text
    title = chart_drawing(said).title
    assert title.startswith("Frechet distance by EfficientNet-Lite0 features against network evaluations")
    assert "FID" not in text and features_of(by_photo({}, "photo")) == "EfficientNet-Lite0"
    assert features_of(Table("mini", "Mini", "", "", {"c": by_photo({}, "scenes").rows["b"]}, ())) == ""


@pytest.mark.parametrize(("published", "second", "message"), [
    ({"fid": 3.0}, "photo", "backend photo of row a in t.yaml: its numbers stand beside no published ones"),
    ({}, "torch", r"mini: mixes networks whose numbers have different names \(a photo, b torch\)"),
])
def test_they_stand_beside_no_others(published, second, message):
    with pytest.raises(UserError, match=message):
        check_rows(by_photo(published, second))


@pytest.mark.parametrize("word, low, high, expected", [
    ("fid", -2, -1, "better"), ("fid", 1, 2, "worse"), ("fid", -1, 1, "no difference"),
    ("precision", -2, -1, "worse"), ("is", 1, 2, "better"), ("recall", 0, 1, "no difference"),
])
def test_better_depends_on_the_number(word, low, high, expected):
    assert versus(word, low, high) == expected


def test_reasons_why_numbers_do_not_compare():
    row = load_table("sag_pretrained_256").rows["imagenet256_sag_0.2"]
    assert not_comparable(row, 50_000, []) == []
    assert "1,000 images" in not_comparable(row, 1000, [])[0]
    exact = row.changed(attention_heads="exact")
    assert "heads exact, published with official" in not_comparable(exact, 50_000, [])[0]
    assert not_comparable(row, 50_000, ["reference mine.npz"]) == ["reference mine.npz"]
    unguided = exact.changed(guide_scale=1.0)
    assert not_comparable(unguided, 50_000, []) == []
    assert "not known" in not_comparable(load_table("dag_dfid").rows["bedroom"], 5000, [])[0]


@pytest.mark.parametrize("backend", ["fashion_mnist", "scenes", "photo", "missing.pt", "evaluations.metrics:kid"])
def test_numbers_of_another_network_than_inception_do_not_compare(backend, table):
    row = table.rows["unguided"]
    reason = f"backend {backend} is not the Inception of the official evaluator"
    other = replace(row, evaluation=replace(row.evaluation, backend=backend))
    assert not_comparable(other, 50_000, []) == [reason]
    assert not_comparable(replace(other, published={"dfid": 14.0}), 50_000, []) == [reason]
    assert not_comparable(replace(other, published={"saturation": 0.3}), 50_000, []) == []      # no network sees pixels
    tensorflow = replace(row.evaluation, backend="tensorflow")
    assert not_comparable(replace(row, evaluation=tensorflow), 50_000, []) == []


@pytest.fixture
def table(tmp_path) -> Table:
    return in_folder(load_table("sag_cg_imagenet128"), tmp_path)


def how(**changes):
    return EvaluationSettings(**{"references": None, "extractor": ExtractorOptions(), "bootstrap": 10, "changed": {},
                                 **changes})


def written(table):
    """The records of all rows, as sampling leaves them."""
    for row in table.rows.values():
        row.run.out.mkdir()
        (row.run.out / "run.json").write_text('{"timing": {"chunks": [{"images": 4, "seconds": 2.0}, '
                                              '{"images": 4, "seconds": 0}]}, "sha256": {"samples": "abc"}}')


def test_published_measured_difference_and_verdict_stand_together(table):
    written(table)
    measured = {(name, 50_000): {"fid": number(5.9 - index), "precision": number(0.7, 0.001)}
                for index, name in enumerate(table.rows)}
    said = results(table, Measurements(measured, {}), {}, how())
    section, = said["sections"]
    first, second, *_ = section["rows"]
    fid = first["metrics"]["fid"]
    assert fid["published"] == 5.91 and fid["difference"] == pytest.approx(-0.01) and fid["verdict"] == "reproduced"
    assert fid["interval95"] == pytest.approx([5.80025, 5.99975]) and fid["versus"] is None
    assert second["metrics"]["fid"]["versus"] == {"difference": pytest.approx(-1), "verdict": "better",
                                                  "interval95": pytest.approx([-1, -1])}
    assert first["metrics"]["recall"]["verdict"] == "not run here"          # published, and not measured
    assert said["rows"]["unguided"]["images_per_second"] == 2.0


def test_rows_keep_the_device_that_sampled_them(table):
    """Another one may evaluate them later."""
    written(table)
    first, second = list(table.rows.values())[:2]
    record = json.loads((first.run.out / "run.json").read_text())
    (first.run.out / "run.json").write_text(json.dumps({**record, "device": "one GPU", "ranks": 2}))
    (second.run.out / "run.json").write_text(json.dumps({**record, "device": "cuda", "ranks": 1}))     # as before
    why = dict.fromkeys(list(table.rows)[3:], "not today")
    rows = results(table, Measurements({}, {}), why, how())["rows"]
    assert [(row["device"], row["ranks"]) for row in rows.values()][:4] == [("one GPU", 2), ("cuda", 1), (None, None),
                                                                          (None, None)]


def test_numbers_of_another_file_than_the_official_inception_are_not_comparable(table):
    written(table)
    measured = {(name, 50_000): {"fid": number(5.91)} for name in table.rows}
    reference = {"file": "r.npz", "images": 50_000, "sha256": "0" * 64}
    for caveat, expected in (({}, "reproduced"), ({"caveat": "another file"}, "not comparable")):
        network = {"name": "Inception", "sha256": "1" * 64, **caveat}
        by_row = {name: {"reference": reference, "network": network} for name in table.rows}
        section, = results(table, Measurements(measured, {}, by_row), {}, how())["sections"]
        first = section["rows"][0]
        assert first["metrics"]["fid"]["verdict"] == expected and first["reasons"] == list(caveat.values())


def test_rows_that_were_not_run_have_no_value(table):
    said = results(table, Measurements({}, {}), dict.fromkeys(table.rows, "no checkpoint"), how())
    assert all(row["state"] == "not run here" and row["why"] == "no checkpoint" for row in said["rows"].values())
    for row in said["sections"][0]["rows"]:
        assert row["verdict"] == "not run here"
        assert all(value["value"] is None and value["published"] is not None for value in row["metrics"].values())


def test_rows_say_in_words_what_sets_them_apart():
    said = results(load_table("fmnist32"), Measurements({}, {}), dict.fromkeys(
        load_table("fmnist32").rows, "not today"), how())
    titles = {name: row["title"] for name, row in said["rows"].items()}
    assert titles["unguided"] == "no guidance" and titles["sag_cg"] == "SAG s = 0.1 + CG scale 2"
    assert titles["threshold_1.3"] == "SAG s = 0.25, psi = 1.3" and titles["middle"] == "SAG s = 0.25, block middle"
    assert titles["pag_1"] == "PAG s = 1" and titles["pag_output_2_1"] == "PAG s = 1, block output.2"
    assert titles["ddim_25"] == "no guidance, DDIM, 25 steps"
    assert len(set(titles.values())) == len(titles)
    assert said["settings"] == ("DDPM, 20 steps; seed 1; SAG: block output.2, mask self-attention, psi = 1, sigma = 1, "
                                "exact heads; PAG: block middle")


def test_one_seed_is_said_of_all_rows_and_others_of_their_own(tmp_path):
    for seeds, titles in (((3, 3, 3), ["no guidance", "no guidance (b)", "SAG s = 0.5"]),
                          ((3, 4, 3), ["no guidance", "no guidance, seed 4", "SAG s = 0.5"])):
        rows = {name: read_row(name, {"model": "fmnist32", "seed": seed, "guide_scale": scale}, Path("t.yaml"))
                for name, seed, scale in zip("abc", seeds, (1.0, 1.0, 1.5), strict=True)}
        table = Table("mini", "Mini", "", "", rows, (Section("All", tuple(rows)),))
        said = results(table, Measurements({}, {}), dict.fromkeys(rows, "not today"), how())
        assert [row["title"] for row in said["rows"].values()] == titles
        assert [row["seed"] for row in said["rows"].values()] == list(seeds) and "seed 3" in said["settings"]
        text = markdown({**said, "command": "", "version": "", "device": "", "ranks": 1})
        assert ("image number i of every row is drawn from the same seed" in text) is (len(set(seeds)) == 1)


def test_a_row_that_a_section_compares_with_is_told_apart_from_its_own():
    rows = {name: read_row(name, {"model": "fmnist32", "guide_scale": 1.5 if name == "c" else 1.0}, Path("t.yaml"))
            for name in "abc"}
    sections = (Section("One", ("a",)), Section("Two", ("b", "c"), against_row="a"))
    assert titles_of(Table("mini", "Mini", "", "", rows, sections)) == {
        "a": "no guidance (a)", "b": "no guidance", "c": "SAG s = 0.5"}


def test_labels_are_said_where_rows_that_are_compared_differ_in_them():
    """The difference on the same image numbers is then that of other classes, too."""
    labels = {"a": "random", "b": "balanced", "c": "balanced", "d": "folder/mine.npy"}
    rows = {name: read_row(name, {"model": "icons32", "labels": words, "guide_scale": 1.5 if name == "c" else 1.0},
                           Path("t.yaml")) for name, words in labels.items()}
    rows["e"] = read_row("e", {"model": "scenes32"}, Path("t.yaml"))            # which has none

    def words(*sections):
        parts = tuple(Section("", tuple(names), against_row=base) for names, _, base in (
            section.partition("/") for section in sections))
        found = titles_of(Table("mini", "Mini", "", "", rows, parts))
        return [found[name].partition(", labels ")[2] for name in rows]

    assert words("a", "bc", "d", "e") == ["", "", "", "", ""]
    assert words("abc", "d", "e") == ["random", "balanced", "balanced", "", ""]
    assert words("a", "bc/d", "d", "e") == ["", "balanced", "balanced", "mine.npy", ""]
    assert words("ae", "bc", "d") == ["", "", "", "", ""]


def test_windows_of_any_kind_are_in_the_words_of_guidance():
    for flags, words in (({}, "SAG"), ({"guide_start": 5}, "SAG in a window"),
                         ({"sag_sigma_max": 3.0}, "SAG in a window")):
        assert guidance(read_row("a", {"model": "fmnist32", "guide_scale": 1.5, **flags}, Path("t.yaml")).run) == words


def test_what_a_method_that_is_off_would_do_sets_no_row_apart(tmp_path):
    shared = {"model": "fmnist32", "num_samples": 4, "evaluation": {"metrics": "fid"}}
    rows = {name: read_row(name, {**shared, **values}, Path("t.yaml"))
            for name, values in {"off": {"blur_sigma": 1.0}, "on": {"guide_scale": 1.5, "blur_sigma": 2.0}}.items()}
    sections = tuple(Section(option, ("off", "on"), option) for option in ("blur_sigma", "guide_scale", "seed"))
    table = in_folder(Table("mini", "Mini", "", "", rows, sections), tmp_path)
    written(table)
    said = results(table, Measurements({}, {}), {}, how())["sections"]
    assert [[row["against"] for row in section["rows"]] for section in said] == [[None, 2.0], [1.0, 1.5], [0, 0]]


def test_class_accuracy_needs_labels():
    values = {"model": "scenes32", "evaluation": {"backend": "fashion_mnist", "metrics": "class_accuracy"}}
    row = read_row("a", values, Path("t.yaml"))
    with pytest.raises(UserError, match=r"row a in t\.yaml: the row has no labels, which class_accuracy would need"):
        check_rows(Table("mini", "Mini", "", "", {"a": row}, (Section("All", ("a",)),)))
