"""The chart of a metric against what an image costs: its lines, the column beside the numbers, and its files."""

import json

import numpy as np
import pytest
from PIL import Image

from evaluations.metrics import Replicates
from evaluations.reproduction.cost_chart import CostLine, CostPoint, cost_lines
from evaluations.reproduction.figures import figures
from evaluations.reproduction.markdown import markdown
from evaluations.reproduction.measurements import EvaluationSettings, Measurements, section_images
from evaluations.reproduction.panels import panels
from evaluations.reproduction.pictures import Pictures
from evaluations.reproduction.reproduce import write_all
from evaluations.reproduction.results import results
from evaluations.reproduction.sections import ShownSection
from evaluations.reproduction.table_chart import chart_drawing
from evaluations.reproduction.tables import ChartSpec, Section, Table, in_folder, read_row

SHARED = {"model": "fmnist32", "num_samples": 4, "batch_size": 4, "evaluation": {"metrics": "fid"}}
ROWS = {"base": {"timestep_respacing": "250"}, "few": {"timestep_respacing": "10"},
        "ddim": {"timestep_respacing": "ddim20", "sampler": "ddim"},
        "sag": {"timestep_respacing": "10", "guide_scale": 1.5}}
FID = {"base": 1.5, "few": 6.0, "ddim": 1.5, "sag": 3.0}


@pytest.fixture
def table(tmp_path):
    rows = {name: read_row(name, {**SHARED, **values}, tmp_path / "table.yaml") for name, values in ROWS.items()}
    sections = (Section("Long", ("base", "few")), Section("Short", ("ddim", "sag"), against_row="base"))
    return in_folder(Table("few", "Few steps", "", "", rows, sections, ChartSpec("evaluations", "fid")), tmp_path)


@pytest.fixture
def described(table):
    """The results of the table, as if it had been measured."""
    for row in table.rows.values():
        row.run.out.mkdir()
        (row.run.out / "run.json").write_text('{"timing": {"chunks": []}, "sha256": {"samples": "abc"}}')
    spread = np.linspace(-0.1, 0.1, 41)
    numbers = {(name, 4): {"fid": Replicates(fid, fid + spread)} for name, fid in FID.items()}
    return {**results(table, Measurements(numbers, {}), {}, EvaluationSettings("", None, 10, {})),
            "command": "", "version": "", "device": "", "ranks": 1}


def test_sections_compare_with_a_row_of_another_one(table, described):
    second = {row["row"]: row["metrics"]["fid"]["versus"] for row in described["sections"][1]["rows"]}
    assert {name: one["verdict"] for name, one in second.items()} == {"ddim": "no difference", "sag": "worse"}
    assert second["sag"]["difference"] == pytest.approx(FID["sag"] - FID["base"])
    first = {row["row"]: row["metrics"]["fid"]["versus"] for row in described["sections"][0]["rows"]}
    assert first["base"] is None and first["few"]["verdict"] == "worse"
    text = markdown(described)
    assert "compared with no guidance, DDPM, 250 steps." in text.split("## Short")[1]
    few = in_folder(table, "runs", 4).rows["base"].changed(num_samples=3)
    assert section_images(Table("few", "", "", "", {**table.rows, "base": few}, table.sections), table.sections[1],
                          list(table.rows)) == 3


def test_a_line_for_each_sampler_and_guidance(described):
    lines = cost_lines(described, "fid")
    assert [(line.sampler, line.guidance, [(point.x, point.y) for point in line.points]) for line in lines] == [
        ("DDPM", "no guidance", [(10, 6.0), (250, 1.5)]), ("DDIM", "no guidance", [(20, 1.5)]),
        ("DDPM", "SAG", [(20, 3.0)])]
    assert lines[0].points[0].interval == pytest.approx([5.90025, 6.09975]) and not lines[0].points[0].published
    assert chart_drawing({**described, "chart": None}) is None
    other = json.loads(json.dumps(described))
    other["sections"][1]["images"] = 3              # does not compare
    assert [line.sampler for line in cost_lines(other, "fid")] == ["DDPM"]


def test_windows_of_noise_levels_are_not_joined(described):
    rows = dict(described["rows"])
    for name, cost, flag in (("ddim", 15, "sag_sigma_max"), ("sag", 18, "sag_sigma_min"),
                             ("base", 30, "sag_sigma_min")):
        rows[name] = {**rows["sag"], "guidance": "SAG in a window", "evaluations": cost, "flags": {flag: 1.0}}
    lines = cost_lines({**described, "rows": rows}, "fid")
    assert [(line.guidance, [point.x for point in line.points]) for line in lines] == [
        ("SAG in a window", [18, 30]), ("no guidance", [10]), ("SAG in a window", [15])]


def test_lines_against_the_images_seen_in_training(described):
    chart = {"x": "images_seen", "y": "fid,is", "sections": ()}
    assert chart_drawing({**described, "chart": chart}) is None         # no section says how many
    first, second = described["sections"]
    seen = {**described, "chart": chart, "sections": [
        first, *({**second, "title": f"after {count}", "images_seen": count, "images": 3,
                  "rows": [row]} for count, row in zip((500, 2000), second["rows"], strict=True))]}
    assert [[(point.x, point.y) for point in line.points] for line in cost_lines(seen, "fid")] == [
        [(500, 1.5)], [(2000, 3.0)]]
    assert chart_drawing(seen).caption == ("FID against images seen in training, 3 images of each row; "
                                           "bars: 95 % intervals")


def test_a_panel_for_each_section(described, tmp_path):
    first, second = described["sections"]
    values = {"ddim": 1.0, "sag": None, "base": None}
    study = {**described, "chart": {"x": "sections", "y": "fid", "sections": ()}, "sections": [
        first, {**second, "against": "blur_sigma", "rows": [{**row, "against": values[row["row"]]}
                                                            for row in second["rows"]]}]}
    alone, numeric = panels(study)
    assert [(mark.label, mark.x, mark.difference) for mark in alone.marks] == [
        ("no guidance", None, pytest.approx(FID["few"] - FID["base"]))]         # not the row that it compares with
    assert [(mark.x, mark.difference) for mark in numeric.marks] == [(1.0, 0.0)]        # sag has no such value
    assert numeric.marks[0].interval == pytest.approx([0, 0]) and numeric.base == "no guidance, DDPM, 250 steps"
    assert numeric.option == "sigma"
    write_all(tmp_path, study, Pictures)
    with Image.open(tmp_path / "chart.png") as image:
        assert image.width == 1440
    assert "FID: differences from no guidance, DDPM, 250 steps" in (tmp_path / "table.md").read_text()


def test_an_axis_has_the_number_that_titles_say(described):
    """The official option of SAG's scale s is 1 + s."""
    _, second = described["sections"]
    values = {"ddim": 1.0, "sag": 1.5, "base": None}
    section = {**second, "against": "guide_scale",
               "rows": [{**row, "against": values[row["row"]]} for row in second["rows"]]}
    panel, = panels({**described, "chart": {"x": "sections", "y": "fid", "sections": ()}, "sections": [section]})
    assert panel.option == "s" and [mark.x for mark in panel.marks] == [0.0, 0.5]
    figure = figures(ShownSection(section, described))[-1]
    assert "against s" in figure.caption and "1.50 at 0, 3.00 at 0.5" in figure.svg and "guide" not in figure.svg


def test_published_numbers_stand_where_none_was_measured(described):
    number = described["sections"][1]["rows"][0]["metrics"]["fid"]
    number.update(value=None, interval95=None, published=7.25)
    assert CostLine("DDIM", "no guidance", (CostPoint(20, 7.25, None, True),)) in cost_lines(described, "fid")


def test_the_cost_stands_beside_the_numbers(described):
    text = markdown(described)
    assert "| row | network evaluations per image | FID |" in text and "![FID against network evaluations" in text
    assert "| no guidance, DDPM, 250 steps | 250 | 1.50 " in text
    assert "| SAG s = 0.5 | 20 | 3.00 " in text           # half of the rows have 10 steps of DDPM
    plain = markdown({**described, "chart": None})
    assert "| row | FID |" in plain and "![" not in plain


def test_the_chart_is_in_the_page_and_beside_it(described, tmp_path):
    write_all(tmp_path, described, Pictures)
    with Image.open(tmp_path / "chart.png") as image:
        assert image.width == 1440 and image.height > 800
    html = (tmp_path / "report.html").read_text()
    said = "FID against network evaluations per image"
    assert f'aria-label="{said}. DDPM, no guidance: 6.00 at 10, 1.50 at 250; DDIM, no guidance: 1.50 at 20' in html
    assert "4 images of each row; bars: 95 % intervals</figcaption>" in html
    assert all(f">{word}<" in html for word in ("DDPM", "DDIM", "SAG", "no guidance"))
