"""Classes by name, from a folder of images to samples: every command has the numbers of the training."""

import csv
import json

import numpy as np
import pytest
from commands import call
from PIL import Image

from guided_diffusion.checkpoint import read_metadata

NETWORK = ("--image_size", 8, "--num_channels", 32, "--channel_mult", 1, "--num_res_blocks", 1,
           "--attention_resolutions", 8, "--num_heads", 1, "--diffusion_steps", 50, "--class_cond", True)
CLASSIFIER = ("--image_size", 8, "--classifier_width", 32, "--classifier_depth", 1, "--classifier_channel_mult", 1,
              "--classifier_attention_resolutions", 8, "--classifier_num_head_channels", 32, "--noised", False,
              "--batch_size", 6, "--lr", 0.003, "--random_crop", False)


def folder(path, *names):
    path.mkdir(exist_ok=True)
    for name in names:
        for i in range(2):
            Image.new("RGB", (8, 8), (90 * int(name[4:]) % 256, 250 - 20 * int(name[4:]), 0)).save(
                path / f"{name}_{i}.png")
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of one step on the classes kind0, kind2 and kind10, and its images."""
    path = tmp_path_factory.mktemp("named")
    data = folder(path / "data", "kind10", "kind0", "kind2")
    assert train(data, path / "run") == 0
    return data, path / "run"


def train(data, out, *flags, num_classes=3):
    return call("image_train", *NETWORK, "--num_classes", num_classes, "--data_dir", data, "--batch_size", 2,
                "--lr_anneal_steps", 1, "--out", out, *flags)


def test_a_run_among_its_images_is_refused(trained, capsys):
    data, _ = trained
    assert train(data, data / "run") == 2
    assert "so that its pictures would be among the images when the training goes on" in capsys.readouterr().err


def test_names_stand_in_the_record_and_the_weights(trained):
    _, run = trained
    names = ["kind0", "kind2", "kind10"]
    assert json.loads((run / "config.json").read_text())["class_names"] == names
    for name in ("model", "ema_0.9999"):
        assert json.loads(read_metadata(run / f"{name}.safetensors")["class_names"]) == names


def test_samples_of_a_class_by_its_name(trained, tmp_path, capsys):
    _, run = trained
    flags = (*NETWORK, "--num_classes", 3, "--model_path", run / "model.safetensors", "--num_samples", 2,
             "--timestep_respacing", 2, "--batch_size", 2, "--out", tmp_path / "s")
    assert call("image_sample", *flags, "--labels", "kind10") == 0
    with np.load(tmp_path / "s" / "samples_2x8x8x3.npz") as file:
        assert file["arr_1"].tolist() == [2, 2]
    assert call("image_sample", *flags, "--labels", "kind1") == 2
    assert "3 classes: 0 kind0, 1 kind2, 2 kind10 (did you mean kind1" in capsys.readouterr().err


def test_a_number_of_classes_that_does_not_fit(trained, tmp_path, capsys):
    data, _ = trained
    for count in (1000, 2):
        assert train(data, tmp_path / "other", num_classes=count) == 2
        assert "has 3 classes: 0 kind0, 1 kind2, 2 kind10; pass --num_classes 3" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_run_does_not_go_on_with_another_class(trained, tmp_path, capsys):
    data = folder(tmp_path / "data", "kind0", "kind2", "kind10")
    assert train(data, tmp_path / "run") == 0
    folder(data, "kind1")
    assert train(data, tmp_path / "run", "--change", "data_dir", "--lr_anneal_steps", 2, num_classes=4) == 2
    assert "kind1_0.png: is of the class kind1, which is none of the 3 classes" in capsys.readouterr().err


def test_a_start_that_saved_nothing_decides_no_classes(tmp_path, capsys):
    data, out = folder(tmp_path / "data", "kind0", "kind2"), tmp_path / "run"
    assert train(data, out, "--lr", 1e30, "--lr_anneal_steps", 9, num_classes=2) == 2
    assert (out / "config.json").exists() and not (out / "state.safetensors").exists()
    folder(data, "kind1")
    assert train(data, out) == 0, capsys.readouterr().err
    assert json.loads((out / "config.json").read_text())["class_names"] == ["kind0", "kind1", "kind2"]


def test_validation_has_the_numbers_of_the_training(trained, tmp_path, capsys):
    data, _ = trained
    held_out = folder(tmp_path / "val", "kind10", "kind2")
    flags = (*CLASSIFIER, "--num_classes", 3, "--data_dir", data, "--iterations", 40, "--eval_interval", 39,
             "--log_interval", 40)
    assert call("classifier_train", *flags, "--val_data_dir", held_out, "--out", tmp_path / "run") == 0
    with open(tmp_path / "run" / "progress.csv") as file:
        row = list(csv.DictReader(file))[-1]
    assert float(row["val_loss"]) < 2 * float(row["loss"]) + 0.1
    folder(held_out, "kind7")
    assert call("classifier_train", *flags, "--val_data_dir", held_out, "--out", tmp_path / "other") == 2
    assert "is of the class kind7, which is none of the 3 classes" in capsys.readouterr().err
    assert call("classifier_train", *flags, "--val_data_dir", tmp_path / "none", "--out", tmp_path / "other") == 2
    assert f"error: --val_data_dir {tmp_path / 'none'}: no such folder" in capsys.readouterr().err


def test_validation_by_images_that_are_trained_on_is_said(tmp_path, caplog):
    """A folder is searched at any depth, so that --data_dir imagenet trains on imagenet/val, too."""
    data = folder(tmp_path / "data", "kind0", "kind1")
    inner = folder(data / "val", "kind0")
    flags = (*CLASSIFIER, "--num_classes", 2, "--data_dir", data, "--iterations", 1, "--eval_interval", 1)
    count = len(list(inner.iterdir()))
    for place, said in ((inner, f"{count} of its {count} images lie in --data_dir {data} as well"),
                        (folder(tmp_path / "apart", "kind0"), "")):
        caplog.clear()
        with caplog.at_level("INFO"):
            out = tmp_path / f"{place.name}_run"
            assert call("classifier_train", *flags, "--val_data_dir", place, "--out", out) == 0
        assert ("as well, so that they are trained on" in caplog.text) == bool(said) and said in caplog.text


def test_a_probe_asks_for_the_classes_of_the_network(trained, tmp_path, capsys):
    _, run = trained
    flags = ("probe", "--model", run, "--num_images", 2, "--levels", 1, "--methods", "PAG", "--out", tmp_path / "out")
    assert call(*flags, "--data_dir", folder(tmp_path / "some", "kind10", "kind2")) == 0
    assert call(*flags, "--data_dir", folder(tmp_path / "other", "kind7", "kind2")) == 2
    assert "is of the class kind7, which is none of the 3 classes" in capsys.readouterr().err
