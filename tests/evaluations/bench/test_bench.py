"""A bench as users run it: from its plan to its two tables, and on again."""

import json
import time

import pytest
import yaml
from commands import call
from PIL import Image

from evaluations import evaluation
from evaluations.bench.bench import BenchRun
from evaluations.bench.hours import Hours
from evaluations.bench.units import Unit
from evaluations.reproduction import measurements
from guided_diffusion.errors import UserError
from guided_diffusion.guidance import GUIDANCE, SagOptions
from guided_diffusion.runs.chunk_files import ChunkFiles

SHARED = {"model": "fmnist32", "sampler": "ddim", "batch_size": 4, "labels": "balanced",
          "evaluation": {"reference": "fmnist32", "backend": "fashion_mnist", "metrics": "fid"}}


@pytest.fixture(autouse=True)
def few_settings(monkeypatch):
    """Of each method the first two settings."""
    for kind in GUIDANCE:
        monkeypatch.setattr(kind, "search", kind.search[:2])
    monkeypatch.setattr("evaluations.bench.bench.FURTHER", 0)


@pytest.fixture
def line(tmp_path):
    """The command line of bench.py; `shared` is changed in the configuration, and `changes` are flags."""
    def words(shared=None, **changes):
        content = {"title": "A small bench", "shared": {**SHARED, **(shared or {})}, "bench": {
            "evaluations": 4, "other_evaluations": "2", "search_images": 4, "images": 6}}
        (tmp_path / "mini.yaml").write_text(yaml.safe_dump(content))
        options = {"out": tmp_path / "out", "bootstrap": 10, "evaluation_seconds": 0.01, "same_steps": False, **changes}
        return [str(tmp_path / "mini.yaml"), *(str(word) for name, value in options.items()
                                               for word in (f"--{name}", value))]
    return words


def test_the_plan_says_what_fits_and_what_does_not(line, capsys):
    assert call("bench", *line(plan=True, hours=0.0005)) == 0
    text = capsys.readouterr().out
    assert "A small bench: at most 4 evaluations of an image" in text
    assert "| no guidance | - | 4 | 6 | 6.67e-05 | 6.67e-05 |" in text       # 6 images, 4 evaluations, 0.01 s
    assert "| SAG | 2 | 4 | 14 | 0.000156 | 0.000222 |" in text
    assert "pieces do not fit into 0.0005 hours: " in text and "SAG + PAG" in text
    assert "left out: CFG: --cfg_scale" in text


def test_the_plan_goes_no_further_with_a_method_that_does_not_fit_and_knows_what_is_used(line, tmp_path, capsys):
    few = {"methods": "SAG,CG,rescale", "plan": True, "same_steps": True}
    assert call("bench", *line(**few, hours=0.0003)) == 0
    text = capsys.readouterr().out
    left_out = "CG at 4 evaluations, SAG + rescale at 4 evaluations\n"
    assert f"2 pieces do not fit into 0.0003 hours: {left_out}" in text and "| SAG | - | 2 | 6 |" in text
    assert "| no guidance | - | 2 | 6 | 3.33e-05 |" in text and "| no guidance | - | 2 | 6 | 0 |" in text   # one row
    assert "SAG + CG" not in text and "| CG |" not in text

    assert call("bench", *line(methods="SAG", other_evaluations="", pairs=False)) == 0
    path = tmp_path / "out" / "mini" / "hours.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "seconds": 7200, "sampling": 100, "evaluations": 1000}))
    capsys.readouterr()
    assert call("bench", *line(**few, hours=2.001)) == 0
    text = capsys.readouterr().out
    assert "2 hours were used by earlier starts" in text and "0.1 s for an evaluation of one image" in text
    assert "| SAG | 2 | 4 | 14 | 0 | 0 |" in text and "do not fit into 2.001 hours: CG at 4" in text


def test_a_changed_configuration_takes_its_hours_anew(line, tmp_path, capsys):
    """The images of the same piece with other settings are not there."""
    few = {"methods": "SAG", "other_evaluations": "", "pairs": False}
    assert call("bench", *line(**few)) == 0
    used = json.loads((tmp_path / "out" / "mini" / "hours.json").read_text())
    changed = {**few, "shared": {"blur_sigma": 3.0}, "hours": used["seconds"] / 3600 + 1e-9}
    capsys.readouterr()
    assert call("bench", *line(**changed, plan=True)) == 0
    assert "1 pieces do not fit into" in capsys.readouterr().out
    assert call("bench", *line(**changed)) == 0
    said = json.loads((tmp_path / "out" / "mini" / "report" / "table.json").read_text())
    assert "Left out for lack of time: SAG at 4 evaluations" in said["note"]
    assert json.loads((tmp_path / "out" / "mini" / "hours.json").read_text())["evaluations"] == used["evaluations"]


def test_another_metric_that_chooses_another_setting_needs_its_time(line, tmp_path, monkeypatch):
    few = {"methods": "SAG", "other_evaluations": "", "pairs": False}
    assert call("bench", *line(**few)) == 0
    searched = BenchRun._searched
    monkeypatch.setattr(BenchRun, "_searched", lambda self, *given: -searched(self, *given))
    used = json.loads((tmp_path / "out" / "mini" / "hours.json").read_text())
    for more, rows in ((1e-9, ["no guidance"]), (1.0, ["no guidance", "SAG"])):
        assert call("bench", *line(**few, hours=used["seconds"] / 3600 + more)) == 0
        said = json.loads((tmp_path / "out" / "mini" / "report" / "table.json").read_text())
        assert [row["guidance"] for row in said["rows"].values()] == rows


def test_from_nothing_to_both_tables_and_once_more(line, tmp_path, capsys, caplog):
    assert call("bench", *line(methods="SAG,CG", same_steps=True)) == 0
    folder = tmp_path / "out" / "mini"
    text = capsys.readouterr().out
    assert (folder / "report" / "table.md").read_text().strip() in text
    said = json.loads((folder / "report" / "table.json").read_text())
    titles = [section["title"] for section in said["sections"]]
    assert titles == ["Methods alone, 4 evaluations", "No guidance, fewer steps", "Methods alone, 2 evaluations",
                      "Pairs, 4 evaluations", "As many steps: 2", "As many steps: 1"]
    alone, plain, fewer, paired, *by_steps = said["sections"]
    assert [len(section["rows"]) for section in said["sections"]] == [3, 2, 3, 1, 3, 2]
    assert [row["row"] for row in plain["rows"]] == [f"no_guidance_{steps}" for steps in (2, 1)]
    assert plain["against_row"] == "no_guidance_4" and all(row["metrics"]["fid"]["versus"] for row in plain["rows"])
    for section, steps in zip(by_steps, (2, 1), strict=True):
        assert section["against_row"] == section["rows"][0]["row"] == f"no_guidance_{steps}"
        assert section["rows"][1]["metrics"]["fid"]["versus"], "a method beside no guidance with as many steps"
        assert said["rows"][section["against_row"]]["work"] == steps
    assert alone["rows"][0]["row"] == alone["against_row"] == "no_guidance_4"
    assert all(row["metrics"]["fid"]["versus"] for row in alone["rows"][1:])       # paired with no guidance
    assert paired["against_row"] in [row["row"] for row in alone["rows"][1:]]
    for section, evaluations in ((alone, 4), (fewer, 2), (paired, 4)):
        assert all(0 < said["rows"][row["row"]]["work"] <= evaluations for row in section["rows"])
        assert all(said["rows"][row["row"]]["images"] == 6 for row in section["rows"])
    assert "SAG + CG" in {row["guidance"] for row in said["rows"].values()}

    assert said["note"] == (
        "Every row has at most the evaluations that its section names, all networks counted by their operations, so "
        "that methods that cost more have fewer steps; what these do by themselves is shown by rows without guidance "
        "that have as many, for those at 4 evaluations alone. Each has the setting that had the best FID of 4 images "
        "of seed 2 at 4 evaluations; pairs are compared with the method that was best alone there. At 2 evaluations "
        "nothing was searched: another setting may be the best one there.")
    search = json.loads((folder / "search" / "table.json").read_text())
    few = "different numbers of images (10000, 6), on which FID depends"
    assert few in said["warnings"] and few.replace("6", "4") in search["warnings"] and f"- warning: {few}" in text
    for warning in {*search["warnings"], *said["warnings"]}:
        assert [record.getMessage() for record in caplog.records].count(f"warning: {warning}") == 1
    tried = {section["title"]: len(section["rows"]) for section in search["sections"]}
    assert tried == {"SAG": 2, "CG": 2, "SAG + CG": tried["SAG + CG"]}       # fewer, where the weakest was best
    for section, method in zip(search["sections"], ("SAG", "CG"), strict=False):
        best = min(section["rows"], key=lambda row: row["metrics"]["fid"]["value"])["row"]
        assert f"{best}" in said["rows"], f"the best {method} is reported"
    seeds = {part: {json.loads(path.read_text())["configuration"]["seed"]
                    for path in (folder / part).glob("*/run.json")} for part in ("search", "report")}
    assert seeds == {"search": {2}, "report": {1}}
    assert (folder / "report" / "chart.png").is_file() and (folder / "report" / "report.html").is_file()
    with Image.open(folder / "report" / "strip.png") as strip:
        assert strip.height > 3 * 64
    drawn = {path.parent.name: json.loads(path.read_text())["configuration"]
             for path in (folder / "strip").glob("*/run.json")}
    assert drawn.keys() == {row["row"] for row in alone["rows"]}
    assert all(flags["shared_start"] for flags in drawn.values())       # from one noise, whatever the steps

    files = {path: path.stat().st_mtime_ns for path in folder.rglob("samples_*.npz")}
    used = json.loads((folder / "hours.json").read_text())
    assert call("bench", *line(methods="SAG,CG", same_steps=True, hours=used["seconds"] / 3600 + 1)) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("samples_*.npz")} == files
    again = json.loads((folder / "report" / "table.json").read_text())
    assert again["sections"] == said["sections"]
    assert json.loads((folder / "hours.json").read_text())["evaluations"] == used["evaluations"]


def test_a_picture_that_fails_loses_no_numbers(line, tmp_path, monkeypatch):
    def pictures(*arguments):
        raise UserError("no picture today")

    monkeypatch.setattr("evaluations.bench.bench.pictures", pictures)
    assert call("bench", *line(methods="SAG", other_evaluations="", pairs=False)) == 2
    report = tmp_path / "out" / "mini" / "report"
    assert len(json.loads((report / "table.json").read_text())["rows"]) == 2 and (report / "table.md").is_file()


def test_what_does_not_fit_into_the_hours_is_left_out_and_said(line, tmp_path, monkeypatch):
    expected = Hours.expected
    made = 6 * 4 + 2 * 4 * 4 + 6 * 4                # of no guidance, and of the search and the row of SAG
    monkeypatch.setattr(Hours, "expected", lambda self, evaluations: 1e9 if self.evaluations >= made else expected(
        self, evaluations))
    assert call("bench", *line(methods="SAG,CG", hours=9)) == 0
    said = json.loads((tmp_path / "out" / "mini" / "report" / "table.json").read_text())
    assert [row["guidance"] for row in said["rows"].values()] == ["no guidance", "SAG"]
    assert "Left out for lack of time: CG at 4 evaluations (would take 2.8e+05 h of the" in said["note"]
    assert "no guidance at 2 evaluations" in said["note"]


def test_what_cannot_be_had_is_left_out_and_the_others_go_on(line, tmp_path, capsys):
    few = {"methods": "SAG,CG", "evaluations": 2, "other_evaluations": 1}
    assert call("bench", *line(**few, plan=True)) == 0
    planned = capsys.readouterr().out
    assert call("bench", *line(**few)) == 0
    said = json.loads((tmp_path / "out" / "mini" / "report" / "table.json").read_text())
    assert [row["guidance"] for row in said["rows"].values()] == ["no guidance", "SAG", "CG", "no guidance"]
    assert "Left out, as they cannot be had: " in said["note"]
    for what in ("SAG at 1 evaluations", "CG at 1 evaluations", "SAG + CG at 2 evaluations"):
        reason = f"{what.split()[-2]} evaluations: are too few for a step of {what.split()[0]}"
        assert f"left out: {what}: {reason}" in planned and f"{what} ({reason}" in said["note"]


def test_time_for_the_evaluation_of_the_search_is_kept_back(line, tmp_path, monkeypatch):
    monkeypatch.setattr(BenchRun, "_time_evaluation", lambda self: setattr(self, "_search_seconds", 6000.0))
    assert call("bench", *line(methods="SAG,PAG,CG", other_evaluations="", pairs=False, hours=8)) == 0
    said = json.loads((tmp_path / "out" / "mini" / "report" / "table.json").read_text())
    assert [row["guidance"] for row in said["rows"].values()] == ["no guidance", "SAG", "PAG"]     # two settings each
    assert "Left out for lack of time: CG at 4 evaluations" in said["note"]


def test_a_later_start_keeps_back_as_much_for_the_evaluation_as_the_first(line, tmp_path, monkeypatch):
    """To extract features of a file takes 6000 s, and there is time for half of one."""
    extract, clock, passed = evaluation.extract, time.monotonic, []

    def slow(file, extractor, folder, *given):
        before = set(folder.iterdir())
        found = extract(file, extractor, folder, *given)
        passed.extend([6000] * (set(folder.iterdir()) != before))
        return found

    monkeypatch.setattr(evaluation, "extract", slow)
    monkeypatch.setattr(time, "monotonic", lambda: clock() + sum(passed))
    few = {"other_evaluations": "", "pairs": False}
    assert call("bench", *line(**few, methods="SAG", hours=99)) == 0
    path = tmp_path / "out" / "mini" / "hours.json"
    used = json.loads(path.read_text())["seconds"]
    assert used > 4 * 6000              # no guidance, SAG, and both of its settings
    assert call("bench", *line(**few, methods="SAG,CG", hours=(used + 2.5 * 6000) / 3600)) == 0
    said = json.loads((path.parent / "report" / "table.json").read_text())
    assert [row["guidance"] for row in said["rows"].values()] == ["no guidance", "SAG"]
    assert "Left out for lack of time: CG at 4 evaluations" in said["note"]


@pytest.mark.parametrize(("best", "tried"), [
    (0.03, [0.025, 0.05, 0.1, 0.25]), (0.04, [0.025, 0.05, 0.1, 0.25]), (0.12, [0.05, 0.1, 0.25]),
    (0.24, [0.1, 0.25, 0.5]), (9, [0.1, 0.25, 0.5, 1.0])])
def test_a_search_goes_on_where_its_end_is_best(best, tried, line, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("evaluations.bench.bench.FURTHER", 2)
    monkeypatch.setattr(BenchRun, "_searched", lambda self, _, row: abs(row.run.guidance[0].guide_scale - 1 - best))
    assert call("bench", *line(methods="SAG", other_evaluations="")) == 0
    folder = tmp_path / "out" / "mini"
    search, report = (json.loads((folder / part / "table.json").read_text())["rows"] for part in ("search", "report"))
    assert [row["title"].split(",")[0] for row in search.values()] == [f"SAG s = {s:g}" for s in tried]
    assert [row["title"].split(",")[0] for row in report.values()] == [
        "no guidance", f"SAG s = {min(tried, key=lambda s: abs(s - best)):g}"]
    capsys.readouterr()
    assert call("bench", *line(methods="SAG", other_evaluations="", plan=True)) == 0
    assert "| SAG | 2 | 4 | 14 | 0 | 0 |" in capsys.readouterr().out        # also of what lies beyond the settings


def test_what_was_stopped_is_counted_once_and_what_cannot_be_compared_is_said(line, tmp_path, monkeypatch, caplog):
    """FID of the first setting is no number, the last batch of a row is stopped, and a base has no time."""
    of_row, write, cost, batches = measurements._row_replicates, ChunkFiles.write, Unit.cost, []

    def without_first(reference, chosen, bootstrap, row, sample):
        found = of_row(reference, chosen, bootstrap, row, sample)
        return {} if row.run.out.parent.name == "search" and row.run.guidance[0].guide_scale == first else found

    def stopped(self, index, *given, **named):
        batches.append(index)
        if len(batches) == 6:           # two of no guidance, one of each setting of SAG, two of the better one
            raise UserError("stopped here")
        return write(self, index, *given, **named)

    first = SagOptions.search[0]["guide_scale"]
    monkeypatch.setattr(measurements, "_row_replicates", without_first)
    monkeypatch.setattr(ChunkFiles, "write", stopped)
    monkeypatch.setattr(Unit, "cost", lambda self, *given: 1e15 if (self.title, self.evaluations) == (
        "no guidance", 2) else cost(self, *given))
    folder = tmp_path / "out" / "mini"
    seconds = []
    for code, evaluations in ((2, 6 * 4 + 2 * 4 * 4), (0, 6 * 4 + 2 * 4 * 4 + 2 * 4 + 6 * 2)):
        assert call("bench", *line(methods="SAG", hours=9)) == code
        hours = json.loads((folder / "hours.json").read_text())
        assert hours["evaluations"] == evaluations and hours["seconds"] > hours["sampling"] > 0
        seconds.append(hours["seconds"])
    assert seconds[0] < seconds[1]
    assert "its FID is not a number; it counts as the worst" in caplog.text
    said = json.loads((folder / "report" / "table.json").read_text())
    second = f"SAG s = {SagOptions.search[1]['guide_scale'] - 1:g}"
    assert [row["title"].split(",")[0] for row in said["rows"].values()] == ["no guidance", second, second]
    assert "Methods alone, 2 evaluations: no guidance was left out; nothing is compared." in said["note"]


def test_a_piece_that_was_stopped_needs_time_for_what_is_missing_alone(line, tmp_path, monkeypatch):
    """An evaluation takes 100 s, and 1 h is left: enough for the last 2 images of 6, not for the whole search."""
    write, batches = ChunkFiles.write, []

    def stopped(self, index, *given, **named):
        batches.append(index)
        if len(batches) == 6:           # two of no guidance, one of each setting of SAG, two of the better one
            raise UserError("stopped here")
        return write(self, index, *given, **named)

    monkeypatch.setattr(ChunkFiles, "write", stopped)
    given = {"methods": "SAG,CG", "other_evaluations": "", "hours": 1}
    assert call("bench", *line(**given)) == 2
    path = tmp_path / "out" / "mini" / "hours.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "seconds": 0, "sampling": 1e10, "evaluations": 1e8}))
    assert call("bench", *line(**given)) == 0
    said = json.loads((path.parent / "report" / "table.json").read_text())
    assert [row["guidance"] for row in said["rows"].values()] == ["no guidance", "SAG"]
    assert "Left out for lack of time: CG at 4 evaluations (would take" in said["note"]


def test_the_network_of_the_evaluation_is_loaded_once(line, monkeypatch):
    load, loaded = measurements.load_extractor_once, []
    monkeypatch.setattr(measurements, "load_extractor_once", lambda options: loaded.append(options) or load(options))
    assert call("bench", *line(methods="SAG,CG", other_evaluations="", pairs=False)) == 0
    assert len(loaded) == 1


@pytest.mark.parametrize(("changes", "message"), [
    ({"hours": 1e-9}, "--hours 1e-09: are too few for the row without guidance"),
    ({"methods": "SAGG"}, "--methods SAGG: there is no 'sagg', there are SAG, PAG"),
    ({"methods": "CFG"}, "--methods CFG: CFG cannot be compared: --cfg_scale"),
])
def test_what_is_wrong_is_a_sentence(line, capsys, changes, message):
    assert call("bench", *line(**changes)) == 2
    assert message in capsys.readouterr().err


def test_the_table_is_shown_where_only_the_command_line_makes_the_file_a_bench(line, tmp_path, capsys):
    words = line(methods="SAG", other_evaluations="", pairs=False, search_seed=3)
    path = tmp_path / "mini.yaml"
    content = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**content, "bench": {**content["bench"], "seed": 2}}))
    assert call("bench", *words) == 0
    page = tmp_path / "out" / "mini" / "report" / "report.html"
    assert f"page: {page}" in capsys.readouterr().out and page.is_file()


@pytest.mark.parametrize("flag", ["images", "search_images"])
def test_too_few_images_are_named_by_their_option(flag, tmp_path, capsys):
    assert call("bench", "fmnist32", f"--{flag}", 2, "--metric", "density", "--out", tmp_path) == 2
    assert f"--{flag} 2: row no_guidance_" in capsys.readouterr().err and not list(tmp_path.iterdir())
