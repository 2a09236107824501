"""The tables that can be reproduced: their files hold the published numbers, and fit the released checkpoints."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from commands import REPOSITORY
from golden import BUNDLED, GOLDEN

from evaluations.references import reference_names
from evaluations.reproduction import tables
from evaluations.reproduction.tables import load_table, table_names
from guided_diffusion.build import build_diffusion, build_model
from guided_diffusion.errors import UserError
from guided_diffusion.options import option_fields, read_yaml
from guided_diffusion.presets import find_preset
from guided_diffusion.runs.options import SampleOptions, option_classes

PUBLISHED = BUNDLED / "published.yaml"
TABLES = {name: load_table(name) for name in ("sag_cg_imagenet128", "sag_pretrained_256", "dag_dfid")}
ROWS = [(name, row) for name, table in TABLES.items() for row in table.rows.values()]
NUMBERS = ("fid", "sfid", "is", "precision", "recall", "dfid")

FEW_STEPS = [(name, row) for name in ("adm_g_25steps", "guided_few_steps_imagenet256")
             for row in list(load_table(name).rows.values())[-2:]]

every_row = pytest.mark.parametrize(("table", "row"), ROWS, ids=lambda value: getattr(value, "name", value))


# The published ones

def setting(table, row):
    """What sets a row of published.yaml apart, as `published_setting` names it."""
    run, flags = row.run, row.run.configuration()
    model = run.sample.model or Path(run.sample.model_path).stem
    scale = round(flags["guide_scale"] - 1, 6)
    if table == "sag_cg_imagenet128":
        return scale == 0.1, flags["classifier_guidance"]
    if table == "sag_pretrained_256":
        return model, scale
    return model, flags["dcg_scale"] == 40, flags["dpg_scale"] == 40, run.sample.use_ddim


def published_setting(table, row):
    if table == "sag_cg_imagenet128":
        return row["sag"], row["cg"]
    if table == "sag_pretrained_256":
        return row["model"], row["s"]
    return row["model"], row["dcg"], row["dpg"], row.get("sampler") == "ddim"


@pytest.mark.parametrize("name", TABLES)
def test_each_published_row_has_one_file_with_its_numbers(name):
    published, table = yaml.safe_load(PUBLISHED.read_text())[name], TABLES[name]
    ours = [(setting(name, row), dict(row.published)) for row in table.rows.values()]
    assert ours == [(published_setting(name, row), {word: row[word] for word in NUMBERS if word in row})
                    for row in published["rows"]]
    assert len({one for one, _ in ours}) == len(ours)
    if "reference" in published:
        assert {row.evaluation.reference for row in table.rows.values()} == {published["reference"]}


@pytest.mark.parametrize("name", TABLES)
def test_every_file_of_the_folder_is_a_row(name):
    table = TABLES[name]
    files = {path.stem for path in (tables.CONFIGS / name).glob("*.yaml")} - {"table"}
    assert files == set(table.rows) and table.source and table.note
    assert all(row.file == tables.CONFIGS / name / f"{row.name}.yaml" for row in table.rows.values())
    for section in table.sections:
        assert table.rows[section.rows[0]].run.active == []


@every_row
def test_the_header_holds_the_command(table, row):
    header = [line for line in row.file.read_text().splitlines() if line.startswith("#")]
    assert f"#   mpiexec -n 8 python scripts/reproduce.py {table} --rows {row.name}" in header
    for line in header:
        for word in line.split():
            assert not word.startswith(("scripts/", "configs/")) or (REPOSITORY / word).is_file()
    assert row.evaluation.source and list(TABLES[table].chosen(row.name).rows) == [row.name]


# The networks

@pytest.fixture(scope="module")
def released():
    path = GOLDEN / "checkpoints.json"
    return {name: {weight: tuple(shape) for weight, shape in entry["state"].items()}
            for name, entry in json.loads(path.read_text()).items()}


@pytest.fixture(scope="module")
def shapes():
    """The names and shapes of a network's weights, each distinct one built once."""
    known = {}

    def shapes(build, options):
        if options not in known:
            with torch.device("meta"):
                network = build(options)
            known[options] = {name: tuple(value.shape) for name, value in network.state_dict().items()}
        return known[options]
    return shapes


@pytest.mark.parametrize(("table", "row"), ROWS + FEW_STEPS, ids=lambda value: getattr(value, "name", value))
def test_networks_are_those_of_the_released_checkpoints(table, row, released, shapes):
    run = row.run
    name = Path(run.sample.model_path).stem
    assert run.sample.model_path == f"models/{name}.pt" and run.model.use_fp16
    if name == "lsun_church":                    # which was not released
        assert not run.sample.model
        name = "lsun_bedroom"
    else:
        assert run.sample.model == name
    assert shapes(build_model, run.model) == released[name]
    for method in run.active:
        if "classifier_path" in method.files():
            classifier = f"{run.model.image_size}x{run.model.image_size}_classifier"
            assert method.files() == {"classifier_path": f"models/{classifier}.pt"}
            assert shapes(lambda method: method.networks()["classifier"](), method) == released[classifier]


# Sampling and evaluation

@every_row
def test_steps(table, row):
    run = row.run
    church = row.name.startswith("church")
    assert run.sample.use_ddim == church and run.diffusion.noise_schedule == "linear"
    assert run.diffusion.timestep_respacing == ("ddim50" if church else "250")
    diffusion = build_diffusion(run.diffusion)
    assert (diffusion.num_timesteps, run.diffusion.learn_sigma) == (50 if church else 250, True)
    assert run.sample.num_samples == (5000 if table == "dag_dfid" else 50_000)


def test_guidance_of_imagenet_128():
    for name, row in TABLES["sag_cg_imagenet128"].rows.items():
        assert sag_settings(row) == (1.1 if "sag" in name else 1.0, "output", 8, 3.0, "exact", "self-attention", 1.0)
        assert [method.short for method in row.run.active] == [word.upper() for word in ("sag", "cg") if word in name]
        assert row.run.configuration()["classifier_scale"] == 0.5 and row.run.configuration()["guide_start"] is None


def test_guidance_at_256_pixels():
    for name, row in TABLES["sag_pretrained_256"].rows.items():
        scale = float(name.partition("_sag_")[2] or 0)
        assert sag_settings(row) == (1 + scale, "output", 2, 9.0, "official", "self-attention", 1.0)
        assert [method.short for method in row.run.active] == ["SAG"] * ("sag" in name)
        assert row.run.configuration()["guide_start"] is None


def sag_settings(row):
    flags = row.run.configuration()
    return tuple(flags[name] for name in ("guide_scale", "sel_attn_block", "sel_attn_depth", "blur_sigma",
                                          "attention_heads", "mask", "threshold"))


def test_guidance_by_depth():
    for name, row in TABLES["dag_dfid"].rows.items():
        flags = row.run.configuration()
        assert (flags["dcg_scale"], flags["dpg_scale"]) == (40 * ("_dcg" in name), 40 * ("_dpg" in name))
        assert flags["depth_predictor"].endswith("_depth.safetensors")
        assert flags["depth_prior"].endswith("prior.safetensors")
        assert flags["dag_reduction"] == "mean"
        assert [flags[name] for name in ("depth_tau", "dag_start", "dag_stop")] == [None] * 3
        assert [method.short for method in row.run.active] == ["DAG"] * ("_d" in name)


def test_block_and_blur_are_stated_once_with_the_name_of_the_model():
    """Files of configs/models/ leave them to the name of the model, and its rows get them from there."""
    for file in (tables.CONFIGS / "models").glob("*.yaml"):
        assert not {"sel_attn_block", "sel_attn_depth", "blur_sigma"} & yaml.safe_load(file.read_text()).keys()
    for _, row in ROWS:
        if row.run.sample.model:
            flags = row.run.configuration()
            preset = find_preset(row.run.sample.model).guidance
            assert {"sel_attn_depth", "blur_sigma"} <= preset.keys()
            assert preset == {name: flags[name] for name in preset}


@every_row
def test_how_the_numbers_were_made(table, row):
    spec = row.evaluation
    assert spec.backend == "torch"
    assert spec.images == (None if table == "dag_dfid" else 50_000)
    assert spec.heads == ("official" if table == "sag_pretrained_256" else "")
    places = {"imagenet256": "VIRTUAL_imagenet256_labeled", "lsun_cat": "VIRTUAL_lsun_cat256", "church": None,
              "lsun_horse": "VIRTUAL_lsun_horse256", "bedroom": "VIRTUAL_lsun_bedroom256"}
    place = next((name for start, name in places.items() if row.name.startswith(start)), "VIRTUAL_imagenet128_labeled")
    assert spec.reference == (f"{place}.npz" if place else "")
    assert place is None or place in reference_names()
    assert "not known" in spec.note.lower() or table == "sag_pretrained_256"


@every_row
def test_rows_turn_off_what_scripts_have_on(table, row):
    """A row is the same by every script: those of classifier and depth-aware guidance guide unless told otherwise."""
    written = yaml.safe_load(row.file.read_text())
    needed = {"sag_cg_imagenet128": {"guide_scale", "classifier_guidance"}, "sag_pretrained_256": {"guide_scale"},
              "dag_dfid": {"dcg_scale", "dpg_scale"}}[table]
    assert written.keys() == {"include", "evaluation", *needed} and written["evaluation"].keys() == {"published"}


def test_all_tables_load():
    assert set(TABLES) | {"fmnist32", "scenes32"} <= set(table_names())
    for name in table_names():
        table = TABLES.get(name) or load_table(name)
        assert table.title and set(table.rows) == {row for section in table.sections for row in section.rows}
        for section in table.sections:
            numeric = [field.name for cls in (SampleOptions, *option_classes()) for field in option_fields(cls)
                       if field.type in (int, float)]
            assert not section.against or section.against in numeric
            run = [table.rows[row].run.configuration() for row in section.rows]
            assert max(Counter(json.dumps(one) for one in run).values()) == 1


# What a table may be made of

@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a file of a table: by default the table `mini`, of one row."""
    monkeypatch.setattr(tables, "CONFIGS", tmp_path)

    def write(content, name="mini/table.yaml"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        return path
    return write


def mini(rows="a: {}", sections="[{title: All, rows: [a]}]", shared="{model: fmnist32}", more=""):
    return f"title: Mini\nshared: {shared}\nrows: {{{rows}}}\nsections: {sections}\n{more}\n"


def refusal(name="mini"):
    with pytest.raises(UserError) as caught:
        load_table(name)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_values_of_a_row_go_before_those_of_its_table_and_of_what_it_includes(write):
    write(mini(rows="b: {seed: 3}", sections="[{title: All, rows: [a, b], against: seed}]",
               shared="{seed: 1, num_samples: 9, evaluation: {heads: official, images: 7}}"))
    write("include: ../model.yaml\nnum_samples: 8\nevaluation: {published: {fid: 2}, images: 6}", "mini/a.yaml")
    write("include: common.yaml\nmodel: fmnist32\nseed: 2\nevaluation: {reference: r}", "model.yaml")
    write("seed: 5\nbatch_size: 4\nevaluation: {reference: q, note: n}", "common.yaml")
    table = load_table("mini")
    a, b = table.rows["a"], table.rows["b"]
    assert (a.run.sample.seed, a.images, a.run.sample.batch_size, a.published) == (2, 8, 4, {"fid": 2})
    spec = a.evaluation
    assert (spec.reference, spec.note, spec.images, spec.heads) == ("r", "n", 6, "official")
    assert (b.run.sample.seed, b.images, b.evaluation.images, b.published) == (3, 9, 7, {})
    assert table.sections[0].rows == ("a", "b") and table.sections[0].against == "seed"
    assert [row.file.name for row in (a, b)] == ["a.yaml", "table.yaml"]


def test_a_table_extends_another_file_row_by_row_and_section_by_title(write):
    write("shared: {model: fmnist32, seed: 1, evaluation: {reference: r}}\nrows: {a: {seed: 2}, b: {seed: 3}, c: {}}\n"
          "sections: [{title: X, rows: [a, b]}, {title: Y, rows: [a]}]", "base.yaml")
    write("extends: ../base.yaml\ntitle: Mini\nshared: {batch_size: 4}\nrows: {b: {seed: 9}}\n"
          "sections: [{title: Y, rows: [c, a]}, {title: Z, rows: [b]}]")
    table = load_table("mini")
    assert {name: row.run.sample.seed for name, row in table.rows.items()} == {"a": 2, "b": 9, "c": 1}
    assert {(row.run.sample.batch_size, row.evaluation.reference) for row in table.rows.values()} == {(4, "r")}
    assert [(section.title, section.rows) for section in table.sections] == [
        ("X", ("a", "b")), ("Y", ("c", "a")), ("Z", ("b",))]
    write("extends: mini/table.yaml\nsections: []", "base.yaml")
    assert "extends mini/table.yaml in " in refusal() and "goes round in a circle" in refusal()
    write("extends: 3\nsections: []")
    assert "must be the name of one file" in refusal()


def test_what_is_chosen_of_a_table(write):
    write(mini(rows="a: {}, b: {seed: 2}, c: {seed: 3}",
               sections="[{title: X, rows: [a, b]}, {title: Y, rows: [c]}, {title: Z, rows: [c, a]}]"))
    table = load_table("mini")
    assert table.chosen("") == table and list(table.rows) == ["a", "b", "c"]
    some = table.chosen("c, a")
    assert list(some.rows) == ["a", "c"]
    assert [(section.title, section.rows) for section in some.sections] == [("X", ("a",)), ("Y", ("c",)),
                                                                           ("Z", ("c", "a"))]
    assert [section.title for section in table.chosen("b").sections] == ["X"]
    write(mini(rows="a: {}, b: {seed: 2}, c: {seed: 3}", more="chart: {x: evaluations, y: fid}",
               sections="[{title: X, rows: [a, b]}, {title: Y, rows: [b, c], against_row: a}]"))
    compared = load_table("mini")
    assert [section.base for section in compared.sections] == ["a", "a"]
    assert [section.base for section in compared.chosen("b,c").sections] == ["b", "b"]      # and their sentence says it
    assert compared.chosen("b").chart == tables.ChartSpec("evaluations", "fid") and table.chart is None
    write(mini(rows="a: {}, b: {seed: 2}, c: {seed: 3}",
               sections="[{title: X, rows: [a, b, c]}, {title: Y, rows: [b, c]}, {title: Z, rows: [a, b]}]"))
    assert [section.title for section in load_table("mini").chosen("a,b,c").sections] == ["X", "Y"]     # own base
    write(mini(sections="[{title: X, rows: [a], images_seen: 500}]", more="chart: {x: images_seen, y: 'fid, is'}"))
    seen = load_table("mini")
    assert seen.chart == tables.ChartSpec("images_seen", "fid,is")
    assert [section.images_seen for section in seen.sections] == [500]
    placed = tables.in_folder(table, "runs", 5)
    assert placed.rows["b"].run.sample.out == "runs/b" and tables.smallest(list(placed.rows.values())) == 5


def test_unknown_tables_and_rows_are_refused_with_the_nearest_name(write):
    write(mini(rows="sag_cg: {}", sections="[{title: All, rows: [sag_cg]}]"))
    assert refusal("minni") == "TABLE minni: there is no such table (did you mean mini?), there are mini"
    assert refusal("configs/mini.yaml").startswith("TABLE configs/mini.yaml: is no name of a table; a table is a")
    with pytest.raises(UserError, match=r"--rows sag_gc: mini has no row 'sag_gc' \(did you mean sag_cg\?\), there"):
        load_table("mini").chosen("sag_gc")


@pytest.mark.parametrize(("content", "said"), [
    (mini(rows="a: {}, b: {}"), "row b of "), (mini(rows="a: {}, b: {}"), "stands in no section"),
    (mini(sections="[{title: All, rows: [a, b]}]"), "neither among its rows nor a file b.yaml beside it"),
    (mini(sections="[{title: All}]"), "must be a list of different names of rows"),
    (mini(sections="[{title: All, rows: a}]"), "must be a list of different names of rows"),
    (mini(sections="[{title: All, rows: [a, a]}]"), "must be a list of different names of rows"),
    (mini(sections="[{title: All, rows: [1, a]}]"), "must be a list of different names of rows"),
    (mini(sections="[{title: All, rows: [a], agianst: seed}]"), "(did you mean against?)"),
    (mini(sections="[{title: All, rows: [a], against: sed}]"), "(did you mean seed?)"),
    (mini(sections="[{title: All, rows: [a], against: {seed: 1}}]"), "must be an option that is a number"),
    (mini(sections="[{title: All, rows: [a], against: mask}]"), "must be an option that is a number"),
    (mini(sections="[{title: All, rows: [a], against_row: b}]"), "against_row b in "),
    (mini(sections="[{title: All, rows: [a], images_seen: 0.5}]"), "images_seen 0.5 in "),
    *((mini(rows=f"'{row}': {{}}", sections=f"[{{title: All, rows: ['{row}']}}]"),
       f"row {row or repr(row)} of {{path}}: must be the name of a folder, without / and not beginning with a dot")
      for row in ("../../evil", "/tmp/evil", "a/b", ".", "..", ".a", "")),
    *((mini(rows=f"{row}: {{}}", sections=f"[{{title: All, rows: [{row}]}}]"),
       f"row {row} of {{path}}: must be another name, as the table has a file {row.lower()} of its own")
      for row in ("table.json", "table.md", "report.html", "chart.png", "status.json", "Features")),
    (mini(rows="", sections="[]"), "sections in {path}: must have a row"),
    (mini(sections="[{title: All, rows: [a]}, {title: All, rows: [a]}]"),
     "sections in {path}: two have the title All, they must differ"),
    (mini(sections="[{title: [All], rows: [a]}]"), "title ['All'] in a section of {path}: must be text"),
    (mini(sections="[{title: All, rows: [a], against_row: {a: 1}}]"), "must be text"),
    (mini(more="source: [a]"), "source ['a'] in {path}: must be text"),
    (mini(more="note: true"), "note True in {path}: must be text"),
    (mini(more="chart: {x: evaluatoins, y: fid}"), "(did you mean evaluations?)"),
    (mini(more="chart: {x: sections, y: 'fid,presicion'}"), "(did you mean precision?)"),
    (mini(more="chart: {x: evaluations, y: fdi}"), "(did you mean fid?)"),
    (mini(more="chart: {x: evaluations}"), "y None of chart in "),
    (mini(more="chart: {x: evaluations, y: fid, z: is}"), "z in chart in "), (mini(more="chart: fid"), "chart in "),
    (mini(sections="{title: All}"), "must be a list of sections"),
    (mini(rows="a: 3"), "row a in "), (mini(shared="[1]"), "shared in "),
    (mini(rows="a: {evaluation: 3}"), "evaluation"),
    (mini(rows="a: {evaluation: {published: 3.1}}"), "published in "),
    (mini(more="sektion: 3"), "sektion in "), (mini(more="titel: x"), "(did you mean title?)"),
    (mini(rows="a: {guide_skale: 2}"), "(did you mean guide_scale?)"),
    (mini(rows="a: {guide_scale: big}"), "--guide_scale 'big': must be a number"),
    (mini(rows="a: {evaluation: {refrence: r}}"), "(did you mean reference?)"),
    (mini(rows="a: {evaluation: {heads: both}}"), "--heads both: must be one of"),
    (mini(rows="a: {evaluation: {images: 1}}"), "--images 1: must be at least 2"),
    (mini(rows="a: {evaluation: {published: {fid: about 3}}}"), "published fid: about 3 of row a in "),
    (mini(rows="a: {evaluation: {published: {fid: .nan}}}"), "must be a number"),
    (mini(rows="a: {evaluation: {published: {fid: true}}}"), "must be a number"),
    (mini(rows="a: {evaluation: {published: {fdi: 3.0}}}"), "(did you mean fid?)"),
    (mini(shared="{model: fmnist23}"), "(did you mean fmnist32?)"), ("- a list", "must hold option names"),
    ("a: [", "TABLE ")])
def test_what_is_no_table_is_refused(write, content, said):
    path = write(content)
    message = refusal()
    assert said.replace("{path}", str(path)) in message
    assert str(path) in message or message.startswith(("--", "evaluation: "))


def test_a_title_that_is_left_empty_is_none(write):
    content = mini(sections="[{title: , rows: [a]}, {title: 2024, rows: [a]}]", more="note:")
    write(content.replace("title: Mini", "title:"))
    table = load_table("mini")
    assert (table.title, table.note, [section.title for section in table.sections]) == ("mini", "", ["", "2024"])


def test_a_row_stands_in_one_place(write):
    write(mini())
    write("seed: 2", "mini/a.yaml")
    assert "must stand in one of them" in refusal()
    write(mini(rows=""))
    assert load_table("mini").rows["a"].run.sample.seed == 2
    write("seed: 3", "mini/spare.yaml")
    assert "row spare of" in refusal()


def test_includes_that_go_round_or_are_missing_are_refused(tmp_path, write):
    write("include: mini/b.yaml", "a.yaml")
    write("include: ../a.yaml", "mini/b.yaml")
    assert f"include ../a.yaml in {tmp_path}/mini/b.yaml: goes round in a circle" in reading(tmp_path / "a.yaml")
    write("include: a.yaml", "a.yaml")
    assert f"include a.yaml in {tmp_path}/a.yaml: goes round in a circle" in reading(tmp_path / "a.yaml")
    write("include: none.yaml", "a.yaml")
    assert reading(tmp_path / "a.yaml") == (f"--config {tmp_path}/none.yaml: cannot be read (No such file or "
                                           f"directory) (included by {tmp_path}/a.yaml)")
    write("include: [b.yaml]", "a.yaml")
    assert "must be the name of one file" in reading(tmp_path / "a.yaml")
    write("evaluation: 3", "a.yaml")
    assert "evaluation in" in reading(tmp_path / "a.yaml")


def reading(path):
    with pytest.raises(UserError) as caught:
        read_yaml(path)
    return str(caught.value)


def test_the_section_of_an_included_file_is_changed_key_by_key(write):
    path = write("include: b.yaml\nseed: 3\nevaluation: {published: {fid: 1}}", "a.yaml")
    write("seed: 1\nbatch_size: 2\nevaluation: {published: {fid: 9, is: 3}, note: n}", "b.yaml")
    assert read_yaml(path) == {"seed": 3, "batch_size": 2, "evaluation": {"published": {"fid": 1}, "note": "n"}}
