"""The trial of reliability: each kind of job is killed, started again, and compared with one that was left alone."""

import math
import sys

import pytest
from commands import call, flags

from evaluations.benchmarks.killed_jobs import JOBS
from evaluations.benchmarks.reliability import Kill, ReliabilityOptions, kills_table, reliability

SMALL = {"kills": 1, "ranks": 1, "num_samples": 24, "batch_size": 8, "timestep_respacing": "2", "train_steps": 8,
         "save_interval": 3}


@pytest.mark.slow
@pytest.mark.parametrize("what", JOBS)
def test_killed_jobs_give_the_files_of_one_that_was_left_alone(what, python, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(python))
    kill, = reliability(ReliabilityOptions(what=what, out=str(tmp_path), seed=3, **SMALL))
    assert kill.equal and kill.victim == "rank 0" and kill.redone < 24
    results = list(JOBS[what](ReliabilityOptions(**SMALL), tmp_path).results(tmp_path / what / "kill00"))
    assert len(results) == {"sampling": 1, "training": 4, "evaluation": 7}[what]


def test_table_counts_what_went_wrong():
    kills = [Kill("all", 1.25, "3 steps", 0.5, 2, 0, True), Kill("rank 1", 2, "finished", math.inf, 0, 1, False)]
    _, _, first, second, total = kills_table(kills, "training")
    assert first == "| 1 | all | 1.2 | 3 steps | 0.5 | 2 | 0 | yes |"
    assert second == "| 2 | rank 1 | 2.0 | finished | over 120 | 0 | 1 | NO |"
    assert total == "\n2 kills of training tried, 2 steps made twice, 1 files left over, 1 of 2 with equal files."


def test_earlier_trial_is_left_alone(tmp_path, capsys):
    (tmp_path / "training").mkdir()
    assert call("reliability", *flags({"what": "training", "out": tmp_path})) == 2
    assert f"--out {tmp_path}: holds training already" in capsys.readouterr().err
