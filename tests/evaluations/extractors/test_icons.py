"""The evaluation classifier of icons: it learns from its features, is kept in a file, and refuses other features."""

import json
import re

import numpy as np
import pytest

from evaluations import class_accuracy
from evaluations.evaluation import Evaluation, EvaluatorOptions, ExtractorOptions
from evaluations.extractors.efficientnet import POOLED
from evaluations.extractors.icons import IconsClassifier, load_layer
from evaluations.extractors.train_icons import IconsTrainingOptions, train
from evaluations.features import Features
from guided_diffusion.errors import UserError

NAMES = np.array(["animals-noto", "people-noto", "food-noto"])


class Colours:
    """Mean colours, in place of the network of photographs."""

    name, fingerprint, caveat = "colours", "0" * 64, ""

    def features(self, images):
        pooled = np.zeros((len(images), POOLED), np.float32)
        pooled[:, :3] = images.mean(axis=(1, 2)) / 255
        return Features(pooled, pooled[:, :4], pooled[:, :2])


def write_split(path, count, seed):
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    images = random.integers(0, 100, (count, 32, 32, 3), np.uint8)
    images[np.arange(count), :, :, labels] += 100               # the class is the colour
    np.savez(path, arr_0=images, arr_1=labels, class_names=NAMES)


@pytest.fixture
def trained(tmp_path):
    for seed, split in enumerate(("train", "validation", "test")):
        write_split(tmp_path / f"{split}.npz", 30, seed)
    out = tmp_path / "icons.safetensors"
    options = IconsTrainingOptions(data_dir=str(tmp_path), out=str(out), weight_decay="0.01,1")
    return train(options, "made so", Colours()), out


def test_the_classifier_learns_and_its_file_holds_it(trained, tmp_path, monkeypatch):
    layer, out = trained
    assert layer.accuracy["test"] == layer.accuracy["validation"] == 1
    classifier = IconsClassifier(load_layer(out), Colours())
    assert (list(classifier.class_names), classifier.test_accuracy) == (list(NAMES), 1.0)
    monkeypatch.setitem(class_accuracy.CLASSIFIERS, "icons", lambda: classifier)
    options = class_accuracy.ClassAccuracyOptions(classifier="icons", json=str(tmp_path / "result.json"))
    assert "100.0%" in class_accuracy.class_accuracy([str(tmp_path / "test.npz")], options)
    assert json.loads((tmp_path / "result.json").read_text())["classifier"] == "icons"


def test_what_does_not_fit_is_refused(trained, tmp_path):
    layer, out = trained
    with pytest.raises(UserError, match="trained on features of other weights"):
        IconsClassifier(layer._replace(features_sha256="1" * 64), Colours())
    icons = str(tmp_path / "test.npz")
    evaluation = Evaluation(icons, [icons], ExtractorOptions(backend="photo"),
                            EvaluatorOptions(metrics="class_accuracy"), extractor=Colours())
    with pytest.raises(UserError, match="trained on features of other weights"):
        evaluation.features(tmp_path)
    out.write_bytes(out.read_bytes()[:100])
    for path, message in ((out, "cannot be read as a classifier"), (tmp_path / "no.safetensors", "No such file")):
        with pytest.raises(UserError, match=message):
            load_layer(path)
    for given, message in (({"weight_decay": "0"}, "must be numbers above 0"), ({"out": "no/where"}, "--out no/where")):
        with pytest.raises(UserError, match=re.escape(message)):
            train(IconsTrainingOptions(data_dir=str(tmp_path), **given), "", Colours())
