"""Labels by image number."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from guided_diffusion.checkpoint import save_state
from guided_diffusion.errors import UserError
from guided_diffusion.options import fill
from guided_diffusion.rng import image_labels
from guided_diffusion.runs.labels import make_labels
from guided_diffusion.runs.options import SampleOptions, option_classes, preset_values
from guided_diffusion.runs.sample import SamplingRun
from guided_diffusion.runs.upsample import UpsamplingRun


def labels(text, numbers, seed=3, num_classes=10, num_samples=100):
    return make_labels(str(text), seed=seed, num_classes=num_classes, num_samples=num_samples)(numbers).tolist()


def test_random_labels_are_those_of_the_seed():
    assert labels("random", range(5, 9)) == image_labels(3, range(5, 9), 10).tolist()


@pytest.mark.parametrize("count", [1, 10, 37])
def test_balanced_counts_differ_by_one_at_most(count):
    counts = np.bincount(labels("balanced", range(count)), minlength=10)
    assert counts.max() - counts.min() <= 1
    assert labels("balanced", [13, 4]) == [3, 4]


def test_one_class():
    assert labels("7", [0, 50, 99]) == [7, 7, 7]
    assert labels("0", [1]) == [0]


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.int16])
def test_file_of_labels(dtype, tmp_path):
    np.save(tmp_path / "labels.npy", np.arange(120, dtype=dtype) % 10)
    (tmp_path / "labels.npy").rename(tmp_path / "labels.NPY")
    assert labels(tmp_path / "labels.NPY", [0, 99, 42]) == [0, 9, 2]


@pytest.mark.parametrize("text", ["10", "-1", "1.5", "even", "", "Balanced", "²", "labels.npz"])
def test_other_words_are_refused(text):
    with pytest.raises(UserError, match=f"--labels {text}: must be"):
        labels(text, [0])


@pytest.mark.parametrize("array, words", [
    (np.zeros(99, int), "holds 99 labels, and image 99 needs one"),
    (np.full(100, 10), "label 10 of image 0 .* from 0 to 9"),
    (np.r_[np.zeros(98, int), -1, 3], "label -1 of image 98"),
    (np.zeros((100, 1), int), "must hold whole numbers"),
    (np.zeros(100), "must hold whole numbers"),
    (np.array([{}] * 100, object), "not a .npy file of whole numbers"),
])
def test_file_that_does_not_fit_is_refused(array, words, tmp_path):
    np.save(tmp_path / "labels.npy", array, allow_pickle=True)
    with pytest.raises(UserError, match=words):
        labels(tmp_path / "labels.npy", [0])


def test_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        labels(tmp_path / "missing.npy", [0])
    for content in (b"", b"\x93NUMPY", b"<html>"):
        (tmp_path / "broken.npy").write_bytes(content)
        with pytest.raises(UserError, match=r"broken.npy"):
            labels(tmp_path / "broken.npy", [0])


@pytest.mark.parametrize("method", ["cfg", "icg"])
def test_guidance_by_classes_needs_some(method):
    given = {"class_cond": True, "null_class": True, f"{method}_scale": 1.0, "labels": "none"}
    with pytest.raises(UserError, match=f"--labels none: {method.upper()} guides by classes"):
        SamplingRun.of(fill(given, [SampleOptions, *option_classes()], preset_values, "here")).labels()


@pytest.mark.parametrize(("run", "given", "words"), [
    (SamplingRun, {}, "random, balanced"), (SamplingRun, {"null_class": True}, "random, balanced, none"),
    (SamplingRun, {"null_class": True, "cfg_scale": 1.0}, "random, balanced"),
    (UpsamplingRun, {"null_class": True}, "base, random, balanced, none")])
def test_the_words_that_a_network_takes_are_named(run, given, words):
    with pytest.raises(UserError, match=f"--labels bird: must be {words}, a .npy file, or a class by its number, as"):
        run.of(fill({"class_cond": True, "labels": "bird", **given}, run.classes(), run.preset_values, "here")).labels()


@pytest.mark.parametrize("word, number, said", [
    ("random", 3, "is taken as a word, not as a name; "), ("base", 0, "is taken as a word, not as a name; "),
    ("there.npy", 4, "is taken as a file, not as a name; "),
    ("cat.npy", 1, "cannot be read (No such file or directory); "),
    ("none", 2, "the network was not trained to do without a label (--label_dropout); "),
    ("balanced", None, ""), ("0", None, ""), ("cat", None, "")])
def test_a_word_that_is_also_the_name_of_a_class_is_said(word, number, said, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")
    np.save("there.npy", np.zeros(4, int))
    save_state("x.safetensors", {"x": torch.zeros(1)}, {
        "class_names": json.dumps(["base", "cat.npy", "none", "random", "there.npy", "cat"])})
    given = {"class_cond": True, "num_classes": 6, "num_samples": 4, "model_path": "x.safetensors", "labels": word}
    run = SamplingRun.of(fill(given, [SampleOptions, *option_classes()], preset_values, "here"))
    refusal = []
    try:
        run.labels(SimpleNamespace(labels=lambda *_: None) if word == "base" else None)
    except UserError as error:
        refusal = [str(error)]
    expected = f"--labels {word}: {said}the class called {word} has the number {number}"
    assert caplog.messages + refusal == [expected] * bool(said)


@pytest.mark.parametrize("flag", ["model_path", "weak_model_path"])
def test_a_missing_file_is_named_with_its_option(flag, tmp_path):
    given = {"model": "fmnist32", "autoguidance_scale": 1.0, "weak_model_path": __file__, flag: str(tmp_path / "none")}
    with pytest.raises(UserError, match=f"^--{flag} .*none: there is no such file"):
        SamplingRun.of(fill(given, [SampleOptions, *option_classes()], preset_values, "here")).build()
