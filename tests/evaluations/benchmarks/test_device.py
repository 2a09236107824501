"""The check of a device: what it compares, what it finds wrong, and the report it writes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import call

from evaluations.benchmarks import device
from evaluations.benchmarks.device import Check, DeviceOptions, Parts, Report, Subject, cases, ranks_checks, relative
from evaluations.benchmarks.device_report import as_markdown

CPU = torch.device("cpu")


def test_the_report_of_small_networks(tmp_path, capsys):
    assert call("verify_device", "--small", "--ranks", 1, "--rounds", 1, "--out", tmp_path) == 0
    assert capsys.readouterr().out == f"all 9 checks hold: {tmp_path / 'report.md'}\n"
    found = json.loads((tmp_path / "report.json").read_text())
    assert [(check["what"], check["compared"]) for check in found["checks"]] == [
        (what, compared) for compared in ("float32 with the CPU", "float16 with float32", "bfloat16 with float32")
        for what in ("evaluation", "guided chain of 4 steps", "gradient of DCG")]
    assert all(0 < check["deviation"] < check["tolerance"] < 0.5 for check in found["checks"])
    names = {name.split(", ")[-1]: list(costs) for name, costs in found["costs"].items()}
    assert {"evaluation", "SAG step", "PAG step", "CG step", "DCG step", "DCG step, checkpointed"} <= {
        *names["float32"]}
    assert names["float16"] == names["bfloat16"] == ["evaluation"]
    assert [note.split(":")[0] for note in found["notes"]] == [
        "compiled networks were not checked (16x16, 32 channels)", "CFG is not timed", "ranks were not compared"]
    text = (tmp_path / "report.md").read_text()
    assert sum(found["parts"].values()) < found["seconds"] and "16x16, 32 channels, bfloat16: " in text
    assert "9 of 9 checks hold." in text and text.count("| holds |") == 9


def test_a_network_that_computes_something_else_fails():
    subject = Subject(cases(True, CPU)[0], CPU, Parts())
    expected = {"evaluation": torch.ones(4)}
    for size, holds in ((1e-6, True), (1e-3, False), (float("nan"), False)):
        check, = subject._compared("float32 with the CPU", "float32", {"evaluation": torch.ones(4) + size}, expected)
        assert check.holds is holds
    assert relative(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.2)


def test_what_fails_is_said_with_the_file_to_attach(tmp_path, monkeypatch, capsys):
    wrong = Check("net", "evaluation", "float16 with float32", 0.5, 0.01)
    report = Report({"device": "CPU"}, [wrong], {}, ["nothing was timed"], 1.0)
    monkeypatch.setattr("evaluations.benchmarks.device_report.verify", lambda options: report)
    assert call("verify_device", "--out", tmp_path) == 2
    assert f"please attach {tmp_path / 'report.md'} to an issue" in capsys.readouterr().err
    assert "| **fails** |" in as_markdown(report) and "- nothing was timed" in as_markdown(report)


def test_ranks_must_agree_to_the_bit(monkeypatch):
    commands = []

    def run(command, check, capture_output, env):
        commands.append(command)
        images = np.zeros((8, 32, 32, 3), np.uint8)
        images[0, 0, 0, 0] = "torch.distributed.run" in command
        folder = command[-1]
        Path(folder).mkdir()
        np.savez(f"{folder}/samples_8x32x32x3.npz", arr_0=images)
    monkeypatch.setattr(device.subprocess, "run", run)
    check, = ranks_checks(DeviceOptions(ranks=3), CPU, [])
    assert not check.holds and check.deviation == 1
    assert "3" in commands[1] and "torch.distributed.run" not in commands[0]


def test_the_released_networks_are_those_that_are_checked_without_small():
    names = {case.name: case.flags["image_size"] for case in cases(False, CPU)}
    assert names == {"128x128_diffusion": 128, "256x256_diffusion_uncond": 256}
