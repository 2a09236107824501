"""The classifier of Fashion-MNIST: its accuracy, its inputs, its training command, and class accuracy."""

import itertools
import re
import struct

import numpy as np
import pytest
import torch
from commands import call
from safetensors import safe_open

from evaluations.extractors.fashion_mnist import (
    SPATIAL_SHAPE,
    WEIGHTS,
    FashionMnistClassifier,
    load_fashion_mnist,
    save_fashion_mnist,
    to_grey,
)
from evaluations.extractors.train_fashion_mnist import shift
from evaluations.extractors.training import learning_rate_factor
from evaluations.references import MODELS
from guided_diffusion.image_datasets import DEBIAN_FASHION_MNIST, load_arrays

needs_fashion_mnist = pytest.mark.skipif(not DEBIAN_FASHION_MNIST.is_dir(), reason="Fashion-MNIST is not installed")


@pytest.fixture(scope="module")
def classifier():
    return load_fashion_mnist()


def framed_test_images(count):
    images, labels = load_arrays("fashion-mnist", "test")
    images = np.pad(images[:count], ((0, 0), (2, 2), (2, 2)))
    return np.repeat(images[..., None], 3, axis=3), labels[:count]


@pytest.fixture
def noise():
    return np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)


@needs_fashion_mnist
def test_bundled_classifier_is_right_on_real_test_images(classifier):
    images, labels = framed_test_images(1000)
    predicted = classifier.predict(images)
    assert predicted.shape == (1000,) and predicted.dtype == np.int64
    assert (predicted == labels).mean() > 0.9
    assert classifier.test_accuracy >= 0.91


@needs_fashion_mnist
def test_accuracy_in_the_file_is_the_measured_one(classifier):
    """By the features in the bundled reference, which are those of all test images, as another test says."""
    _, labels = framed_test_images(10000)
    with np.load(MODELS / "fmnist32_reference.npz") as file, torch.no_grad():
        predicted = classifier.classify(torch.from_numpy(file["pooled"])).argmax(dim=1).numpy()
    assert (predicted == labels).mean() == pytest.approx(classifier.test_accuracy, abs=3e-4)
    assert (predicted[:500] == classifier.predict(framed_test_images(500)[0])).mean() > 0.995


def test_bundled_file_is_small_and_describes_itself():
    assert WEIGHTS.stat().st_size <= 400_000
    with safe_open(WEIGHTS, "pt") as file:
        metadata = file.metadata()
    assert {"widths", "test_accuracy", "command", "data"} <= set(metadata)


def test_features(classifier, noise):
    pooled, spatial, probabilities = classifier.features(noise)
    assert pooled.shape == (5, 64) and spatial.shape == (5, *SPATIAL_SHAPE) and probabilities.shape == (5, 10)
    assert {pooled.dtype, spatial.dtype, probabilities.dtype} == {np.dtype(np.float32)}
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    logits = classifier(to_grey(noise)).softmax(dim=1)
    np.testing.assert_allclose(probabilities, logits.detach().numpy(), rtol=1e-4, atol=1e-6)


@needs_fashion_mnist
def test_no_channel_of_the_spatial_features_is_dead(classifier):
    assert (classifier.features(framed_test_images(50)[0]).spatial.std(axis=(0, 2, 3)) > 1e-3).all()


def test_result_does_not_depend_on_batch_or_form_of_the_images(classifier, noise):
    pooled = classifier.features(noise).pooled
    as_floats = torch.from_numpy(noise).permute(0, 3, 1, 2) / 127.5 - 1
    grey = as_floats.mean(dim=1, keepdim=True)
    for images in (torch.from_numpy(noise), as_floats, as_floats.double(), grey, grey.numpy()):
        np.testing.assert_allclose(classifier.features(images, batch_size=2).pooled, pooled, rtol=1e-3, atol=1e-4)


def test_grey_levels():
    images = np.zeros((1, 32, 32, 3), np.uint8)
    images[0, 0, 0], images[0, 1, 1] = 255, (255, 0, 0)
    grey = to_grey(images)
    assert grey.shape == (1, 1, 32, 32) and grey.dtype == torch.float32
    assert grey[0, 0, 0, 0] == 1 and grey[0, 0, 5, 5] == -1
    assert float(grey[0, 0, 1, 1]) == pytest.approx(-1 / 3)
    assert torch.equal(to_grey(images[..., :1]), to_grey(np.repeat(images[..., :1], 3, axis=3)))


@pytest.mark.parametrize("images, message", [
    (np.zeros((2, 28, 28, 3), np.uint8), r"\(2, 28, 28, 3\): uint8 images must be"),
    (np.zeros((2, 3, 32, 32), np.uint8), r"\(2, 3, 32, 32\): uint8 images must be"),
    (np.zeros((2, 32, 32), np.uint8), r"shape \(2, 32, 32\)"),
    (np.zeros((2, 32, 32, 3), np.float32), r"\(2, 32, 32, 3\): floating-point images must be"),
    (torch.zeros(2, 2, 32, 32), "floating-point images must be"),
    (np.zeros((2, 32, 32, 3), np.int64), "must be uint8 or floating point"),
    (np.zeros((0, 32, 32, 3), np.uint8), "at least one"),
])
def test_wrong_images(classifier, images, message):
    with pytest.raises(ValueError, match=message):
        classifier.predict(images)


def test_saved_classifier_is_the_same_up_to_rounding(tmp_path, noise):
    torch.manual_seed(0)
    model = FashionMnistClassifier((4, 6, 8, 8, 64), test_accuracy=0.25).eval()
    save_fashion_mnist(model, tmp_path / "small.safetensors", {"command": "none"})
    loaded = load_fashion_mnist(tmp_path / "small.safetensors")
    assert loaded.test_accuracy == 0.25 and not loaded.training
    np.testing.assert_allclose(loaded.features(noise).pooled, model.features(noise).pooled, rtol=0.02, atol=1e-3)
    assert [path.name for path in tmp_path.iterdir()] == ["small.safetensors"]


def test_wrong_weight_files(tmp_path):
    with pytest.raises(ValueError, match="No such file"):
        load_fashion_mnist(tmp_path / "missing.safetensors")
    for content in (b"", b"something else", WEIGHTS.read_bytes()[:-1000]):
        (tmp_path / "wrong.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read as a Fashion-MNIST classifier"):
            load_fashion_mnist(tmp_path / "wrong.safetensors")


# Training


def write_idx(path, array):
    path.write_bytes(bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}i", *array.shape) + array.tobytes())


def test_training_command_learns_and_describes_what_it_made(tmp_path, capsys):
    for prefix, count in (("train", 80), ("t10k", 20)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = np.zeros((count, 28, 28), np.uint8)
        images[:, :14] = (labels * 28)[:, None, None]      # the class is the brightness of the upper half
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte", images)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte", labels)
    out, precious = tmp_path / "classifier.safetensors", tmp_path / "precious"
    precious.write_text("precious")
    (tmp_path / "classifier.log").symlink_to(precious)
    assert call("train_fashion_mnist", "--data_dir", tmp_path, "--out", out, "--epochs", 4, "--batch_size", 8,
                "--lr", 0.02) == 0
    classifier = load_fashion_mnist(out)
    assert classifier.test_accuracy > 0.5
    assert f"test accuracy {classifier.test_accuracy:.2%}" in capsys.readouterr().out
    lines = (tmp_path / "classifier.log").read_text().splitlines()
    assert precious.read_text() == "precious"           # links are not followed
    assert len(lines) == 6 and "--epochs 4" in lines[0] and f"test accuracy {classifier.test_accuracy:.4f}" in lines[-1]
    with safe_open(out, "pt") as file:
        assert "--epochs 4" in file.metadata()["command"]


def test_training_command_refuses_what_cannot_work(tmp_path, capsys):
    for arguments, message in ((["--epochs", "0"], "--epochs 0"), (["--data_dir", tmp_path], "has neither"),
                               (["--out", tmp_path / "no" / "x.safetensors"], "--out .*: cannot be written")):
        assert call("train_fashion_mnist", *arguments) == 2
        assert re.search(message, capsys.readouterr().err)


def test_shift_moves_whole_images():
    images = torch.zeros(200, 1, 32, 32)
    images[:, :, 10, 20] = 1
    moved = shift(images, 2, torch.Generator().manual_seed(0))
    _, _, rows, columns = moved.nonzero().T
    assert len(rows) == 200
    places = set(zip(rows.tolist(), columns.tolist(), strict=True))
    assert places == set(itertools.product(range(8, 13), range(18, 23)))
    assert torch.equal(shift(images, 0, torch.Generator()), images)


def test_learning_rate_rises_then_falls_to_zero():
    factors = [learning_rate_factor(step, warm_up=10, total=50) for step in range(51)]
    assert factors[0] == pytest.approx(0.1) and max(factors) == factors[10] == 1
    assert all(a > b for a, b in itertools.pairwise(factors[10:]))
    assert factors[30] == pytest.approx(0.5) and factors[50] == pytest.approx(0)
