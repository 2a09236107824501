"""The benchmark of the evaluator: its table and its other ways."""

import re
import time

import numpy as np
import pytest
from commands import call

from evaluations.benchmarks import evaluator as benchmark
from evaluations.metrics import precision_recall


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_quick_run_prints_a_table_of_ratios(capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "QUICK", benchmark.Sizes(64, 200, 500, 2))
    assert call("benchmark_evaluator", "--quick", "--repeats", 1) == 0
    printed = capsys.readouterr().out
    header, rule, *rows = (cells(line) for line in printed.splitlines() if line.startswith("|"))
    assert len(header) == len(rule) == 7 and header[2] == "Times as fast"
    assert [row[0].split(",")[0] for row in rows if "TensorFlow" not in row[1]] == [
        "Fréchet distance", "Precision and recall", "Covariance"]
    for row in rows:
        assert len(row) == 7
        ratio, here, there = map(float, row[2:5])
        assert ratio == pytest.approx(there / here, rel=0.1, abs=0.06)
    assert ("TensorFlow" in rows[1][1]) != (benchmark.NO_TENSORFLOW in printed)


def test_costs_are_those_of_the_work(monkeypatch):
    kept, clock = [], [0.0]

    def wait(*seconds):
        """Work that takes so long, by a clock of its own, the first time, the second time, and so on."""
        left = list(seconds)
        return lambda: clock.__setitem__(0, clock[0] + left.pop(0))

    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock[0])
    cost = benchmark.measure_work(lambda: (kept.append(np.ones(20_000_000)), time.sleep(0.1), wait(0.25)()))
    assert cost.seconds == 0.25
    assert np.isnan(cost.megabytes) or 120 < cost.megabytes < 400
    slow, = benchmark.compare("waiting", wait(0.75, 0.5), {"longer": wait(2, 3)}, repeats=2)
    assert (slow.what, slow.other_way, slow.ratio) == ("waiting", "longer", 4)
    assert re.fullmatch(r"\| waiting \| longer \|( [\d.nan]+ \|){5}", benchmark.row(slow))


def test_the_other_way_gives_the_same_numbers():
    rng = np.random.default_rng(0)
    reference, sample = rng.standard_normal((2, 500, 20), dtype=np.float32)
    assert benchmark.whole_precision_recall(reference, sample, benchmark.numpy_distances) == precision_recall(
        reference, sample)


def test_arguments(capsys):
    assert call("benchmark_evaluator", "--repeats", 0) == 2
    assert "--repeats 0: must be at least 1" in capsys.readouterr().err
