"""Classes by name: how they are found, in which order they are numbered, and what a number is refused for."""

import json
from pathlib import Path

import pytest
import torch

from guided_diffusion import checkpoint
from guided_diffusion.classes import (
    ClassNames,
    check_same_names,
    label_number,
    names_of_run,
    natural_order,
    stored_names,
)
from guided_diffusion.errors import UserError

ROOT = Path("data")


def files(*names):
    return [ROOT / name for name in names]


@pytest.mark.parametrize("names", [
    ["kind0", "kind2", "kind10", "kind100"], ["a", "a1", "a01b", "a1b", "a2", "b"], ["2", "10", "x"],
    ["n01440764", "n01443537", "n02110341", "n15075141"], ["10a2", "10a10", "10b"]])
def test_digits_in_names_are_numbers(names):
    assert sorted(reversed(names), key=natural_order) == names


def test_names_of_equally_many_digits_are_numbered_as_in_the_official_code():
    names = [f"n{number:08d}" for number in (15075141, 1440764, 2110341, 1443537)]
    found = ClassNames.from_images(ROOT, files(*(f"{name}_{i}.JPEG" for i, name in enumerate(names))))
    assert list(found.names) == sorted(names) and found.rule == "prefix"


@pytest.mark.parametrize(("given", "names", "rule"), [
    (["b_1.png", "a_1.png"], ("a", "b"), "prefix"),
    (["x/cat_1.png", "y/dog_1.png", "y/cat_2.png"], ("cat", "dog"), "prefix"),
    (["cat/img_0.png", "dog/img_0.png"], ("cat", "dog"), "folders"),
    (["cat/0.png", "dog/img_0.png"], ("cat", "dog"), "folders"),
    (["train/kind10/0.png", "train/kind2/deeper/0.png"], ("kind2", "kind10"), "folders"),
    (["cat/img_0.png", "cat/img_1.png"], ("img",), "prefix"),
])
def test_the_rule_that_fits(given, names, rule):
    found = ClassNames.from_images(ROOT, files(*given))
    assert (found.names, found.rule) == (names, rule)


@pytest.mark.parametrize(("given", "said"), [
    (["cat/1_a.png", "cat/2_a.png", "dog/3_a.png"], "its file names tell 3 classes, and its 2 folders others"),
    (["x/cat_1.png", "y/dog_1.png", "y/cat_2.png"], "its file names tell 2 classes, and its 2 folders others"),
    (["n01/n01_1.JPEG", "n02/n02_1.JPEG"], ""),
    (["train/n01/n01_1.JPEG", "val/n02/n02_1.JPEG", "val/n01/n01_2.png"], ""),
    (["cat_1.png", "x/dog_1.png"], ""), (["x/cat_1.png", "x/dog_1.png"], ""), (["cat/a_1.png", "dog/a_2.png"], "")])
def test_folders_that_tell_other_classes_than_names_are_said(caplog, given, said):
    caplog.set_level("INFO")
    ClassNames.from_images(ROOT, files(*given))
    assert said in caplog.text and bool(said) == bool(caplog.text)
    caplog.clear()
    ClassNames.from_images(ROOT, files(*given), "prefix")
    assert not caplog.text


def test_folders_of_prepared_images_are_classes(tmp_path, caplog):
    given = [tmp_path / name for name in ("cat/1_a.png", "cat/2_a.png", "dog/3_a.png")]
    manifest = tmp_path / "manifest.json"
    for settings, names in (({"labels": "folders", "labels_file": ""}, ("cat", "dog")),
                            ({"labels": "none", "labels_file": "x.txt"}, ("cat", "dog")),
                            ({"labels": "none", "labels_file": ""}, ("1", "2", "3")), ([], ("1", "2", "3"))):
        manifest.write_text(json.dumps({"settings": settings}))
        assert ClassNames.from_images(tmp_path, given).names == names
        assert ClassNames.from_images(tmp_path, given, "prefix").names == ("1", "2", "3")


def test_a_rule_that_is_given_counts():
    given = files("cat/img_0.png", "dog/pic_0.png")
    assert ClassNames.from_images(ROOT, given).names == ("img", "pic")
    assert ClassNames.from_images(ROOT, given, "folders").names == ("cat", "dog")
    with pytest.raises(UserError, match=r"plain\.png: has no class, .* name must be CLASS_anything\.png"):
        ClassNames.from_images(ROOT, files("a_1.png", "plain.png"))
    with pytest.raises(UserError, match=r"_b\.png: has no class"):
        ClassNames.from_images(ROOT, files("a_1.png", "__b.png"))
    with pytest.raises(UserError, match=r"a_1\.png: has no class, with --classes folders"):
        ClassNames.from_images(ROOT, files("a_1.png", "cat/b_1.png"), "folders")


def test_other_images_get_the_same_numbers():
    names = ClassNames(("ant", "bee", "cow"), "prefix")
    assert names.numbers(ROOT, files("bee_0.png", "cow_1.png", "x/ant_2.png")).tolist() == [1, 2, 0]
    assert names.numbers(ROOT, files("bee/val_0.png", "cow/val_1.png")).tolist() == [1, 2]      # by folders, here
    assert names.numbers(ROOT, files("val/bee/0.png")).tolist() == [1]
    assert ClassNames(("ant", "bee"), "folders").numbers(ROOT, files("bee_0.png")).tolist() == [1]
    with pytest.raises(UserError, match=r"bat_1\.png: is of the class bat, which is none of the 3 classes: 0 ant, 1 b"):
        names.numbers(ROOT, files("ant_0.png", "bat_1.png"))
    with pytest.raises(UserError, match="has no class"):
        names.numbers(ROOT, files("plain.png"))


def test_words():
    assert str(ClassNames(("ant",))) == "1 class: 0 ant"
    assert str(ClassNames(("ant", "bee"))) == "2 classes: 0 ant, 1 bee"
    many = str(ClassNames(tuple(f"k{i}" for i in range(1000))))
    assert many.startswith("1000 classes: 0 k0, 1 k1, ") and many.endswith(", ..., 999 k999") and len(many) < 100
    names = ClassNames(("ant", "bee"))
    names.check(2, "data")
    for count in (1, 3, 1000):
        with pytest.raises(UserError, match=rf"--num_classes {count}: data has 2 classes: .*; pass --num_classes 2"):
            names.check(count, "data")


def test_names_that_are_stored(tmp_path):
    names = ClassNames(("ant", "bee"))
    (tmp_path / "config.json").write_text(json.dumps({"class_names": names.to_json()}))
    assert names_of_run(tmp_path) == names and names_of_run(tmp_path / "none") is None
    path, other = tmp_path / "model.safetensors", tmp_path / "other.pt"
    checkpoint.save_state(path, {"x": torch.zeros(1)}, {"class_names": json.dumps(names.to_json())})
    checkpoint.save_state(other, {"x": torch.zeros(1)})
    assert stored_names(path) == names and stored_names(other) is None
    assert label_number("bee", ["", str(other), str(path)], ["random"]) == "1"
    (tmp_path / "gone").mkdir()
    checkpoint.save_state(tmp_path / "gone" / "state.safetensors", {"x": torch.zeros(1)},
                          {"class_names": json.dumps(names.to_json())})
    assert names_of_run(tmp_path / "gone") == names
    (tmp_path / "gone" / "config.json").write_text("{}")
    assert names_of_run(tmp_path / "gone") == names
    (tmp_path / "gone" / "config.json").write_text('{"class_names": ["bee", "ant"]}')
    with pytest.raises(UserError, match=r"config.json: has 2 classes: 0 bee, .* was trained on 2 classes: 0 ant"):
        names_of_run(tmp_path / "gone")
    for word, meant in (("bea", "bee"), ("bse", "base")):
        with pytest.raises(UserError, match=rf"--labels {word}: must be base, random, a .npy file, or one of the 2 "
                                            rf"classes: 0 ant, 1 bee \(did you mean {meant}\?\)"):
            label_number(word, [str(path)], ["base", "random"])
    with pytest.raises(UserError, match=r"--labels bee: must be random, a .npy file, .* checkpoint states no names"):
        label_number("bee", [str(other)], ["random"])


@pytest.mark.parametrize(("word", "number", "said"), [
    ("7", "2", ""), ("0", "0", ""), ("2", "2", "is the number of the class 7; the class called 2 has the number 1"),
    ("9", "9", "")])
def test_a_number_that_is_a_name_is_said(tmp_path, caplog, word, number, said):
    caplog.set_level("INFO")
    path = str(tmp_path / "x.safetensors")
    checkpoint.save_state(path, {"x": torch.zeros(1)}, {"class_names": '["1", "2", "7"]'})
    assert label_number(word, [path], []) == number and said in caplog.text and bool(said) == bool(caplog.text)


def test_a_classifier_of_other_classes_is_refused(tmp_path):
    paths = {}
    for name, value in (("a", '["ant", "bee"]'), ("b", '["bee", "ant"]'), ("silent", None)):
        paths[name] = str(tmp_path / f"{name}.safetensors")
        checkpoint.save_state(paths[name], {"x": torch.zeros(1)}, {"class_names": value} if value else {})
    check_same_names({"model_path": paths["a"], "depth_predictor": paths["silent"], "classifier_path": paths["a"]})
    with pytest.raises(UserError, match=r"--classifier_path .*b\.safetensors: has 2 classes: 0 bee, 1 ant, and "
                                        r"--model_path .*a\.safetensors has 2 classes: 0 ant, 1 bee"):
        check_same_names({"model_path": paths["a"], "classifier_path": paths["b"]})
    images = ClassNames(("bee", "ant"))
    check_same_names({"depth_predictor": paths["silent"], "classifier_path": paths["b"]}, images)
    with pytest.raises(UserError, match=r"--classifier_path .*a\.safetensors: has 2 classes: 0 ant, 1 bee, and the "
                                        "training images have 2 classes: 0 bee, 1 ant; they must be trained on the"):
        check_same_names({"classifier_path": paths["a"]}, images)


@pytest.mark.parametrize("value", ['[]', '["a", "a"]', '"ab"', '[1]', '{', '[""]', "[" * 100000])
def test_stored_names_that_are_wrong(tmp_path, value):
    path = tmp_path / "model.safetensors"
    checkpoint.save_state(path, {"x": torch.zeros(1)}, {"class_names": value})
    with pytest.raises(UserError, match=r"model\.safetensors: its class_names must be a list of different names"):
        stored_names(path)
