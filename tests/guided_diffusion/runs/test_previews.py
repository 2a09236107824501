"""Samples while training: pictures and early evaluation are what the sampling and evaluation commands would give."""

import json

import numpy as np
import pytest
from commands import call, samples_in
from PIL import Image
from tiny_training import CLASSIFIER, DIFFUSION, MODEL, TRAIN, flags, log_of, train_tiny_classifier

from evaluations.early_fid import watchers
from evaluations.extractors import EXTRACTORS
from evaluations.extractors.base import ExtractorKind
from evaluations.features import Features
from guided_diffusion import checkpoint, train_util
from guided_diffusion.errors import UserError
from guided_diffusion.fetch import sha256_of
from guided_diffusion.runs.previews import PreviewOptions
from guided_diffusion.training.options import TrainOptions

PREVIEWS = {"grid_interval": 2, "grid_images": 3, "preview_steps": 2, "preview_batch_size": 2, "pag_scale": 0.5}
FID = {"eval_fid_interval": 1, "eval_fid_images": 5, "eval_fid_backend": "brightness"}


class Brightness:
    """The brightness of the quarters of an image."""

    name, fingerprint, caveat = "brightness", "0" * 64, ""

    def features(self, images):
        grey = images.mean(axis=3, dtype=np.float32) / 255
        quarters = grey.reshape(len(grey), 2, grey.shape[1] // 2, 2, -1).mean(axis=(2, 4)).reshape(len(grey), 4)
        return Features(quarters, quarters, np.full((len(grey), 2), 0.5, np.float32))


@pytest.fixture(autouse=True, scope="module")
def brightness():
    kind = ExtractorKind("brightness", "brightness", lambda **options: Brightness(), pooled=4, spatial=4,
                         probabilities=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(EXTRACTORS, "brightness", kind)
        yield


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A reference batch of that extractor, without images."""
    features = np.random.default_rng(0).random((50, 4))
    path = tmp_path_factory.mktemp("reference") / "reference.npz"
    np.savez(path, mu=features.mean(axis=0), sigma=np.cov(features, rowvar=False), backend="brightness", count=50)
    return path


def train(data_dir, out, **changes):
    """The command, in this process; returns its exit code."""
    return call("image_train", *flags(**{**MODEL, **DIFFUSION, **TRAIN, "data_dir": data_dir, "out": out, **changes}))


def hashes(folder):
    return {path.name: sha256_of(path) for path in folder.glob("*.safetensors")}


@pytest.fixture(scope="module")
def plain(data_dir, tmp_path_factory):
    """A training that nothing looks at."""
    out = tmp_path_factory.mktemp("plain")
    assert train(data_dir, out) == 0
    return out


@pytest.fixture(scope="module")
def run(data_dir, reference, tmp_path_factory):
    """The same training with pictures and evaluation."""
    out = tmp_path_factory.mktemp("run")
    assert train(data_dir, out, **PREVIEWS, **FID, eval_fid_reference=reference) == 0
    return out


def test_watching_changes_no_weight_and_gives_what_the_commands_give(run, plain, reference, tmp_path, capsys):
    assert hashes(run) == hashes(plain)
    assert sorted(path.name for path in (run / "grids").iterdir()) == ["0000002.png", "0000003.png"]
    assert call("image_sample", "--model", run, "--num_samples", 5, "--batch_size", 2, "--labels", "balanced",
                "--sampler", "dpm-solver++", "--sampling_steps", 2, "--pag_scale", 0.5, "--out", tmp_path / "out") == 0
    images = samples_in(tmp_path / "out")[0]
    with Image.open(run / "grids" / "0000003.png") as picture:
        shown = np.asarray(picture)
    # Tiles of 8 x 8 pixels with gaps of 2, all enlarged 8 times.
    assert np.array_equal(shown[16:80:8, 16:80:8], images[0]) and np.array_equal(shown[16:80:8, 96:160:8], images[1])
    assert len(log_of(run, "fid_of_5_images")) == 3
    json_file = tmp_path / "fid.json"
    assert call("evaluate", reference, tmp_path / "out", "--backend", "brightness", "--metrics", "fid",
                "--json", json_file) == 0
    measured = json.loads(json_file.read_text())[0]["metrics"]["fid"]
    assert log_of(run, "fid_of_5_images")[-1] == pytest.approx(measured, rel=1e-5)
    assert json.loads((run / "config.json").read_text())["watched"] == {
        **PREVIEWS, **FID, "eval_fid_reference": str(reference)}


def test_a_stopped_training_goes_on_with_its_pictures(run, data_dir, reference, tmp_path, monkeypatch):
    step = train_util.TrainLoop.run_step

    def stop_at_2(loop, logger):
        if loop.step == 2:
            raise KeyboardInterrupt
        step(loop, logger)

    with monkeypatch.context() as patch:
        patch.setattr(train_util.TrainLoop, "run_step", stop_at_2)
        assert train(data_dir, tmp_path / "b", **PREVIEWS, **FID, eval_fid_reference=reference) != 0
    # The options come from config.json, those of guidance and pictures too.
    assert call("image_train", "--config", tmp_path / "b" / "config.json") == 0
    for name in ("grids/0000002.png", "grids/0000003.png", "model.safetensors"):
        assert (tmp_path / "b" / name).read_bytes() == (run / name).read_bytes()
    assert log_of(tmp_path / "b", "fid_of_5_images") == log_of(run, "fid_of_5_images")


def test_an_upsampler_is_given_small_training_images(data_dir, tmp_path):
    network = {name: MODEL[name] for name in MODEL if name != "image_size"}
    values = {**network, **DIFFUSION, **TRAIN, "large_size": 8, "small_size": 4, "data_dir": data_dir,
              "out": tmp_path / "run", "grid_interval": 3, "grid_images": 2, "preview_steps": 2, "ema_rate": ""}
    assert call("super_res_train", *flags(**values)) == 0
    assert [path.name for path in (tmp_path / "run" / "grids").iterdir()] == ["0000003.png"]


@pytest.mark.parametrize("changes, message", [
    ({"eval_fid_interval": 3}, "--eval_fid_interval 3: needs --eval_fid_reference"),
    ({**FID, "eval_fid_reference": "x", "log_interval": 2}, "--eval_fid_interval 1: must be a multiple of --log_inter"),
    ({**FID, "eval_fid_reference": "nothing.npz"}, "--eval_fid_reference nothing.npz: "),
    ({**FID, "eval_fid_reference": "fmnist32"}, "--eval_fid_backend brightness: "),
    ({"grid_interval": 1, "cfg_scale": 2.0}, "null"),
    ({"eval_fid_images": 10**10}, "--eval_fid_images 10000000000: must be at most 1000000"),
    ({"grid_interval": 1, "preview_sampler": "euler"}, "--preview_sampler euler: must be one of"),
    ({"grid_interval": 1, "clean_classifier_scale": 1.0}, "--clean_classifier_path is not given"),
    ({"grid_interval": 1, "preview_steps": 1}, "--preview_steps 1: must be at least 2 with --preview_sampler"),
])
def test_what_cannot_work_is_said_before_the_first_step(data_dir, tmp_path, capsys, changes, message):
    assert train(data_dir, tmp_path / "run", **changes) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error and not list((tmp_path / "run").glob("*.safetensors"))


def test_a_classifier_of_other_classes_is_refused(data_dir, tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for name in ("ant_0", "bee_0", "ant_1", "bee_1"):
        Image.new("L", (8, 8), 100).save(images / f"{name}.png")
    trained = train_tiny_classifier(data_dir, tmp_path / "classifier") / "model.safetensors"
    state, metadata = checkpoint.load_state_dict(trained), checkpoint.read_metadata(trained)
    options = {name: value for name, value in CLASSIFIER.items() if name not in MODEL}
    for names, code in ((["bee", "ant"], 2), (["ant", "bee"], 0)):
        path = tmp_path / f"{names[0]}.safetensors"
        checkpoint.save_state(path, state, {**metadata, "class_names": json.dumps(names)})
        assert train(images, tmp_path / "run", grid_interval=3, grid_images=2, preview_steps=2,
                     classifier_guidance=True, classifier_path=path, **options) == code
        assert ("and the training images have 2 classes: 0 ant, 1 bee" in capsys.readouterr().err) == bool(code)


def test_without_scipy(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--eval_fid_interval 10: needs scipy: pip install 'guided-pixels\[eval\]'"):
        watchers(TrainOptions(), PreviewOptions(eval_fid_interval=10, eval_fid_reference="fmnist32"), [])
