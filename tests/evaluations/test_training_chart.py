"""The chart of trainings: the curves of logs, and what is no log."""

import re
import shutil

import pytest
from commands import call
from PIL import Image

from evaluations.training_chart import read_curves
from guided_diffusion.errors import UserError


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "mine" / "progress.csv"
    path.parent.mkdir()
    path.write_text("step,samples,loss,val_loss\n10,100,2.5,\n20,200,1.5,3\n")
    return path


def test_a_log_is_drawn(log, tmp_path):
    assert read_curves(str(log), ["loss"], "mine") == [("mine", [100, 200], [2.5, 1.5])]
    curves = read_curves(str(log), ["val_loss", "loss", "mse"], "mine")
    assert [curve.name for curve in curves] == ["mine: val_loss", "mine: loss"]
    picture = tmp_path / "chart.png"
    assert call("training_chart", log, "--values", "loss,val_loss", "--out", picture) == 0
    with Image.open(picture) as image:
        assert image.width > 500


def test_all_curves_have_a_name(log, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("_new", "more/mine"):
        shutil.copytree(log.parent, folder)
    assert call("training_chart", *(f"{name}/progress.csv" for name in ("_new", "mine", "more/mine", "mine")),
                "--out", "chart.svg") == 0
    monkeypatch.chdir("_new")
    assert call("training_chart", "progress.csv", "--out", "../one.svg") == 0
    shown, one = (re.findall("<!-- (.*progress.csv.*|.*_new) -->", (tmp_path / name).read_text())
                  for name in ("chart.svg", "one.svg"))
    assert shown == ["_new", "mine/progress.csv", "more/mine/progress.csv", "mine/progress.csv (again 2)"]
    assert one == ["_new"]


def test_a_single_point_is_drawn(log, tmp_path):
    log.write_text("step,samples,loss\n1,100,2.5\n")
    assert call("training_chart", log, "--out", tmp_path / "chart.png") == 0
    with Image.open(tmp_path / "chart.png") as image:
        width, height = image.size
        middle = image.convert("RGB").crop((width * 2 // 5, height * 2 // 5, width * 3 // 5, height * 3 // 5))
    assert (31, 119, 180) in {colour for _, colour in middle.getcolors(10**6)}


def test_points_that_the_axes_have_no_place_for_are_told(log, tmp_path, caplog, capsys):
    log.write_text("step,samples,loss\n1,100,-2.5\n2,200,nan\n3,300,1\n")
    assert call("training_chart", log, "--log_y", True, "--out", tmp_path / "chart.png") == 0
    assert "mine: 2 of 3 points cannot be drawn" in caplog.text
    log.write_text("step,samples,loss\n1,100,-2.5\n")
    assert call("training_chart", log, "--log_y", True, "--out", tmp_path / "none.png") == 2
    assert "mine: 1 of 1 points cannot be drawn" in capsys.readouterr().err
    assert not (tmp_path / "none.png").exists()


def test_a_folder_whose_name_reads_like_a_formula(log, tmp_path):
    folder = log.parent.rename(tmp_path / r"a $\frac$ b")
    assert call("training_chart", folder / log.name, "--out", tmp_path / "chart.png") == 0
    assert (tmp_path / "chart.png").is_file()


def test_what_is_no_log_is_refused(log, tmp_path, capsys):
    other = tmp_path / "other.csv"
    for content, message in (("step,b\n1,2\n", "no value in such columns; it has step, b"),
                             ("step,samples,loss\n1,1,\n", "no value in such columns"),
                             ("loss\n1\n", r"other\.csv: is not the log of a training, or is damaged$"),
                             ("step,loss\n1,2\n", "the images seen, in a column samples"),
                             ("step,samples,loss\n1,1,x\n", "is not the log of a training")):
        other.write_text(content)
        with pytest.raises(UserError, match=message):
            read_curves(str(other), ["loss"], "other")
    for arguments, message in (([tmp_path / "no.csv", "--out", "x.png"], "cannot be read"),
                               ([log, "--out", tmp_path / "x.bmp"], "must end in .png"), ([log], "required: --out")):
        assert call("training_chart", *arguments) == 2
        assert message in capsys.readouterr().err
