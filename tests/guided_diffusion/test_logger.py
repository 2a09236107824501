"""Training logs: means, progress.csv over a restart, silent ranks."""

import csv
import logging

import pytest
import torch

from guided_diffusion.errors import UserError
from guided_diffusion.logger import MetricLogger


def rows_of(folder):
    with (folder / "progress.csv").open() as file:
        return list(csv.DictReader(file))


def test_means_since_the_last_row(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    logger = MetricLogger(tmp_path)
    logger.add("loss", torch.tensor([1.0, 2.0]))
    logger.add("loss", 6.0)
    logger.write(10, lr=0.5)
    logger.add("loss", 8.0)
    logger.write(20, lr=0.25)
    assert [(row["step"], float(row["loss"]), float(row["lr"])) for row in rows_of(tmp_path)] == [
        ("10", 3.0, 0.5), ("20", 8.0, 0.25)]
    assert "step 10 | lr 0.5 | loss 3" in caplog.text


def test_new_names_become_columns(tmp_path):
    logger = MetricLogger(tmp_path)
    logger.add("loss", 1.0)
    logger.write(1)
    logger.add("loss_q3", 4.0)
    logger.write(2)
    assert [(row["loss"], row["loss_q3"]) for row in rows_of(tmp_path)] == [("1", ""), ("", "4")]


def test_restart_drops_rows_that_it_repeats_and_half_a_line(tmp_path):
    before = MetricLogger(tmp_path)
    for step in (10, 20, 30):
        before.add("loss", float(step))
        before.write(step)
    with (tmp_path / "progress.csv").open("a") as file:
        file.write("4")
    after = MetricLogger(tmp_path, resume_step=20)
    after.add("loss", 31.0)
    after.write(30)
    assert [(row["step"], row["loss"]) for row in rows_of(tmp_path)] == [("10", "10"), ("20", "20"), ("30", "31")]
    assert [path.name for path in tmp_path.iterdir()] == ["progress.csv"]


def test_other_ranks_write_nothing(tmp_path, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)
    logger = MetricLogger(None)
    logger.add("loss", 1.0)
    logger.write(1)
    assert not caplog.text and not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", "step,loss\n"])
def test_an_empty_log_is_begun_anew(tmp_path, content):
    (tmp_path / "progress.csv").write_text(content)
    logger = MetricLogger(tmp_path)
    logger.add("loss", 2.0)
    logger.write(5)
    assert [(row["step"], row["loss"]) for row in rows_of(tmp_path)] == [("5", "2")]


@pytest.mark.parametrize("content", [
    b"step,loss\nabc,1\n", b"loss\n1\n", b"step,loss\n1,2,3\n", b"step,loss\n1\n", b"\xff\xfe\n\xff\n"])
def test_a_file_that_is_no_log_is_one_sentence(tmp_path, content):
    path = tmp_path / "progress.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"progress.csv: is not the log of a training, or is damaged; move it away"):
        MetricLogger(tmp_path, resume_step=5)
    assert path.read_bytes() == content


def test_a_log_that_cannot_be_written_is_one_sentence(tmp_path):
    logger = MetricLogger(tmp_path)
    logger.add("loss", 1.0)
    logger.write(1)
    (tmp_path / "progress.csv").unlink()
    (tmp_path / "progress.csv").mkdir()
    logger.add("loss", 1.0)
    with pytest.raises(UserError, match=r"progress.csv: cannot be written \(Is a directory\)"):
        logger.write(2)
