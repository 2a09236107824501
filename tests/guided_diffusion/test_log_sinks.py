"""Logs beside progress.csv: what they are given, that nothing goes out unless asked, and packages that are missing."""

import importlib.util
import struct
import sys
import types

import pytest
from depth_world import train_world, write_world
from PIL import Image
from tiny_training import log_of, train, train_tiny_classifier

from guided_diffusion import log_sinks
from guided_diffusion.errors import UserError
from guided_diffusion.training.options import TrainOptions


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package, which keeps what it is told."""
    module = types.ModuleType("wandb")
    module.__spec__ = importlib.util.spec_from_loader("wandb", None)
    module.runs = []

    class Run:
        def __init__(self, **options):
            self.options, self.rows, self.finished = options, [], False
            module.runs.append(self)

        def log(self, values, step):
            self.rows.append((step, values))

        def finish(self):
            self.finished = True

    module.init, module.Settings, module.Image = Run, dict, str
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_ERROR_REPORTING", raising=False)
    return module


def test_wandb_stays_offline_and_goes_on_under_its_id(data_dir, tmp_path, wandb):
    train(data_dir, tmp_path / "run", log="wandb")
    train(data_dir, tmp_path / "run", log="wandb", log_online=True, lr_anneal_steps=4)
    first, second = wandb.runs
    assert (first.options["mode"], second.options["mode"]) == ("offline", "online")
    assert first.options["id"] == second.options["id"] and first.options["dir"] == str(tmp_path / "run")
    assert first.options["config"]["num_channels"] == 32 and first.finished and second.finished
    rows = [*first.rows, *second.rows]
    assert [step for step, _ in rows] == [1, 2, 3, 4]
    assert [values["loss"] for _, values in rows] == pytest.approx(log_of(tmp_path / "run", "loss"), rel=1e-5)


def test_predictors_of_depth_have_these_logs(tmp_path, wandb):
    write_world(tmp_path)
    train_world(tmp_path, tmp_path / "p.safetensors", log="wandb", log_interval=6)
    run, = wandb.runs
    assert run.options["dir"] == str(tmp_path / "p_log") and run.options["mode"] == "offline" and run.finished
    assert [(step, values["loss"] > 0) for step, values in run.rows] == [(6, True), (12, True)]


def test_a_server_that_refuses_is_one_sentence(data_dir, tmp_path, wandb, monkeypatch):
    def refused(**options):
        raise RuntimeError("no key\nlog in first")

    monkeypatch.setattr(wandb, "init", refused)
    with pytest.raises(UserError, match=r"^--log wandb --log_online True: cannot be opened \(no key log in first\)$"):
        train(data_dir, tmp_path / "run", log="wandb", log_online=True)
    assert not list((tmp_path / "run").glob("*.safetensors"))


def records(path):
    """The records of an event file: a length, its checksum, the bytes, their checksum."""
    content, place = path.read_bytes(), 0
    while place < len(content):
        length, = struct.unpack_from("<Q", content, place)
        yield content[place + 12:place + 12 + length]
        place += 16 + length


def test_tensorboard_holds_the_rows_of_the_log(data_dir, tmp_path):
    event_pb2 = pytest.importorskip("tensorboard.compat.proto.event_pb2", reason="needs tensorboard")
    train_tiny_classifier(data_dir, tmp_path, log="tensorboard")
    path, = (tmp_path / "tensorboard").iterdir()
    version, start, *rows = map(event_pb2.Event.FromString, records(path))
    assert version.file_version == "brain.Event:2" and start.step == 1 and [row.step for row in rows] == [1, 2, 3]
    values = [{value.tag: value.simple_value for value in row.summary.value} for row in rows]
    assert [row["loss"] for row in values] == pytest.approx(log_of(tmp_path, "loss"), rel=1e-5)
    assert [row["val_loss"] for row in values if "val_loss" in row] == pytest.approx(log_of(tmp_path, "val_loss"),
                                                                                      rel=1e-5)


def test_pictures_go_to_both(tmp_path, wandb):
    event_pb2 = pytest.importorskip("tensorboard.compat.proto.event_pb2", reason="needs tensorboard")
    path = tmp_path / "samples.png"
    Image.new("RGB", (7, 5)).save(path)
    for sink in log_sinks.open_sinks("wandb,tensorboard", tmp_path, 0, {}, False):
        sink.picture(4, "samples", path)
        sink.close()
    assert wandb.runs[0].rows == [(4, {"samples": str(path)})]
    events, = (tmp_path / "tensorboard").iterdir()
    event = event_pb2.Event.FromString(list(records(events))[-1])
    image = event.summary.value[0].image
    assert (event.step, image.width, image.height, image.encoded_image_string) == (4, 7, 5, path.read_bytes())


@pytest.mark.parametrize("word", ["tensorboard", "wandb"])
def test_a_missing_package_is_said_before_any_work(data_dir, tmp_path, monkeypatch, word):
    monkeypatch.setattr(log_sinks.importlib.util, "find_spec", lambda name: None)
    for trainer in (train, train_tiny_classifier, train_world):
        with pytest.raises(UserError, match=rf"--log {word}: needs the package {word}: pip install 'guided-pixels"):
            trainer(data_dir, tmp_path / "run", log=word)
    assert not (tmp_path / "run").exists()


def test_words_that_are_no_log():
    with pytest.raises(UserError, match=r"--log tensorbord: 'tensorbord' is none of .*did you mean tensorboard\?"):
        TrainOptions(log="tensorbord")
    with pytest.raises(UserError, match="--log_online True --log unset: only --log wandb goes online"):
        TrainOptions(log_online=True)
