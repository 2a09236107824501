"""Class accuracy: shares and intervals that are known, the command, and the files that it refuses."""

import hashlib
import json

import numpy as np
import pytest
import torch
from commands import call, execute

from evaluations import class_accuracy
from evaluations.extractors.fashion_mnist import CLASS_NAMES, load_fashion_mnist
from guided_diffusion.checkpoint import save_state
from guided_diffusion.errors import UserError


@pytest.fixture
def noise():
    return np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)


class AlwaysTrousers:
    class_names, test_accuracy = CLASS_NAMES, 0.1

    def predict(self, images):
        return np.ones(len(images), np.int64)


@pytest.fixture
def samples(tmp_path, noise):
    path = tmp_path / "samples.npz"
    np.savez(path, noise, np.array([1, 1, 0, 1, 0]))
    return path


def test_shares_are_counted_by_class(samples):
    read = class_accuracy.read_labelled_samples(samples, CLASS_NAMES)
    result = class_accuracy.measure_class_accuracy(AlwaysTrousers(), *read)
    assert (result["images"], result["correct"], result["share"]) == (5, 3, 0.6)
    assert {name: (c["images"], c["correct"]) for name, c in result["classes"].items()} == {
        "T-shirt": (2, 0), "trouser": (3, 3)}


def test_classes_go_by_their_names_where_the_network_has_some(samples, tmp_path, caplog):
    caplog.set_level("INFO")
    path = tmp_path / "x.safetensors"
    (tmp_path / "run.json").write_text(json.dumps({"configuration": {"model_path": str(path)}}))
    for names, expected in ((["dress", "trouser"], [1, 1, 3, 1, 3]), (["a", "b"], [1, 1, 0, 1, 0])):
        save_state(path, {"x": torch.zeros(1)}, {"class_names": json.dumps(names)})
        assert class_accuracy.read_labelled_samples(samples, CLASS_NAMES)[1].tolist() == expected
        assert ("numbers are compared" in caplog.text) == (names == ["a", "b"])
    save_state(path, {"x": torch.zeros(1)}, {"class_names": '["hat", "trouser"]'})
    with pytest.raises(UserError, match=r"samples.npz: has images of the class hat, which is none of the 10 classes"):
        class_accuracy.read_labelled_samples(samples, CLASS_NAMES)


def test_names_in_the_file_itself_come_first(tmp_path, noise):
    path = tmp_path / "named.npz"
    np.savez(path, noise, np.array([1, 1, 0, 1, 0]), class_names=np.array(["dress", "trouser"]))
    (tmp_path / "run.json").write_text('{"foo": 1}')                # of another tool
    assert class_accuracy.read_labelled_samples(path, CLASS_NAMES)[1].tolist() == [1, 1, 3, 1, 3]
    np.savez(path, noise, np.array([1, 1, 0, 2, 0]), class_names=np.array(["dress", "trouser"]))
    with pytest.raises(UserError, match=r"named.npz: arr_1 has the class 2, and its class_names are"):
        class_accuracy.read_labelled_samples(path, CLASS_NAMES)


@pytest.mark.parametrize(("changes", "expected", "said"), [
    ({}, [1, 1, 3, 1, 3], ""), ({"samples": "other.npz"}, [1, 1, 0, 1, 0], ""),
    ({"sha256": {"model": "0" * 64}}, [1, 1, 0, 1, 0], "another one by now"),
    ({"configuration": {"model_path": "gone.safetensors"}}, [1, 1, 0, 1, 0], "is not there")])
def test_the_network_beside_counts_where_it_made_the_file(changes, expected, said, samples, tmp_path, caplog):
    path = tmp_path / "x.safetensors"
    save_state(path, {"x": torch.zeros(1)}, {"class_names": json.dumps(["dress", "trouser"])})
    record = {"configuration": {"model_path": str(path)}, "samples": samples.name,
              "sha256": {"model": hashlib.sha256(path.read_bytes()).hexdigest()}}
    (tmp_path / "run.json").write_text(json.dumps({**record, **changes}))
    assert class_accuracy.read_labelled_samples(samples, CLASS_NAMES)[1].tolist() == expected
    assert said in caplog.text and bool(caplog.text) == bool(said)


def test_wilson_interval_known_values():
    assert class_accuracy.wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert class_accuracy.wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert class_accuracy.wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_command_prints_a_table_and_writes_json(samples, tmp_path, capsys):
    classifier = load_fashion_mnist()
    assert call("class_accuracy", samples, "--json", tmp_path / "result.json") == 0
    printed = capsys.readouterr().out
    assert str(samples) in printed and "T-shirt" in printed and f"{classifier.test_accuracy:.1%}" in printed
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["test_accuracy"] == classifier.test_accuracy
    assert result["files"][str(samples)]["images"] == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result.json", "samples.npz"]


def test_the_old_name_of_the_option(samples, capsys):
    words = ["class_accuracy", samples, "--judge"]
    assert (call(*words, "fashion_mnist"), call(*words, "none")) == (0, 2)
    assert capsys.readouterr().err.startswith("error: --classifier none: must be one of fashion_mnist, icons")


@pytest.mark.parametrize("arrays, message", [
    ({}, "has no images"),
    ({"arr_0": np.zeros((2, 32, 32, 3), np.uint8)}, "has no labels"),
    ({"arr_0": np.zeros((2, 64, 64, 3), np.uint8), "arr_1": np.zeros(2, int)}, r"arr_0 is \(2, 64, 64, 3\), must be"),
    ({"arr_0": np.zeros((2, 32, 32, 3), np.float32), "arr_1": np.zeros(2, int)}, "float32: images must be uint8"),
    ({"arr_0": np.zeros((0, 32, 32, 3), np.uint8), "arr_1": np.zeros(0, int)}, "at least one"),
    ({"arr_0": np.zeros((2, 32, 32, 3), np.uint8), "arr_1": np.zeros(3, int)}, r"arr_1 is \(3,\)"),
    ({"arr_0": np.zeros((2, 32, 32, 3), np.uint8), "arr_1": np.zeros(2)}, "whole numbers"),
    ({"arr_0": np.zeros((2, 32, 32, 3), np.uint8), "arr_1": np.array([0, 10])}, "labels 0 to 10"),
    ({"arr_0": np.array([None]), "arr_1": np.zeros(1, int)}, "pickled"),
])
def test_wrong_sample_arrays(tmp_path, arrays, message):
    np.savez(tmp_path / "samples.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        class_accuracy.read_labelled_samples(tmp_path / "samples.npz", CLASS_NAMES)


def test_wrong_sample_files(samples, tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        class_accuracy.read_labelled_samples(tmp_path / "missing.npz", CLASS_NAMES)
    for content in (b"", b"text", samples.read_bytes()[:-300]):
        (tmp_path / "wrong.npz").write_bytes(content)
        with pytest.raises(ValueError, match="is not an"):
            class_accuracy.read_labelled_samples(tmp_path / "wrong.npz", CLASS_NAMES)
    with pytest.raises(ValueError, match=r"--json .*: cannot be written"):
        class_accuracy.class_accuracy(
            [str(samples)], class_accuracy.ClassAccuracyOptions(json=f"{tmp_path}/nowhere/x.json"))
    with pytest.raises(ValueError, match=r"samples\.npz: is named more than once"):
        class_accuracy.class_accuracy([str(samples)] * 2, class_accuracy.ClassAccuracyOptions())


@pytest.mark.parametrize("second", [{"arr_0": np.zeros((2, 64, 64, 3), np.uint8), "arr_1": np.zeros(2, int)},
                                    {"arr_0": np.zeros((2, 32, 32, 3), np.uint8)}])
def test_no_image_is_classified_before_all_files_are_checked(samples, tmp_path, monkeypatch, capsys, second):
    class Unused(AlwaysTrousers):
        def predict(self, images):
            pytest.fail("classified")

    monkeypatch.setitem(class_accuracy.CLASSIFIERS, "fashion_mnist", Unused)
    np.savez(tmp_path / "second.npz", **second)
    assert call("class_accuracy", samples, tmp_path / "second.npz") == 2
    assert "second.npz: " in capsys.readouterr().err


def test_the_evaluator_measures_it_too(samples, tmp_path):
    images, labels = class_accuracy.read_labelled_samples(samples, CLASS_NAMES)
    labels = np.where(np.arange(5) < 3, load_fashion_mnist().predict(images), (labels + 1) % 10)
    np.savez(tmp_path / "named.npz", images, labels)
    expected = 100 * np.mean(load_fashion_mnist().predict(images) == labels)
    words = ["--backend", "fashion_mnist", "--metrics", "class_accuracy", "--json", tmp_path / "result.json"]
    assert call("evaluate", "fmnist32", tmp_path / "named.npz", *words) == 0
    assert json.loads((tmp_path / "result.json").read_text())[0]["metrics"] == {"class_accuracy": expected}
    save_state(tmp_path / "x.safetensors", {"x": torch.zeros(1)}, {"class_names": json.dumps(list(CLASS_NAMES[::-1]))})
    (tmp_path / "run.json").write_text(json.dumps({"configuration": {"model_path": str(tmp_path / "x.safetensors")}}))
    np.savez(tmp_path / "named.npz", images, 9 - labels)
    assert call("evaluate", "fmnist32", tmp_path / "named.npz", *words) == 0
    assert json.loads((tmp_path / "result.json").read_text())[0]["metrics"] == {"class_accuracy": expected}
    np.savez(tmp_path / "unlabelled.npz", images)
    assert call("evaluate", "fmnist32", tmp_path / "unlabelled.npz", *words) == 2


def test_the_command_says_that_numbers_are_compared(samples, noise, python):
    np.savez(samples, noise, np.array([1, 1, 0, 1, 0]), class_names=np.array(["cat", "dog"]))
    done = execute(python, "scripts/class_accuracy.py", samples)
    assert done.returncode == 0 and "trouser" in done.stdout
    assert f"{samples}: has 2 classes: 0 cat, 1 dog; the classifier calls none of its classes so" in done.stderr
