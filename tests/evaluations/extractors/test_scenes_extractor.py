"""The extractor of scenes: its accuracy, its inputs, its training command, and the bundled reference."""

import json
import re

import numpy as np
import pytest
import torch
from commands import call
from safetensors import safe_open

from evaluations.extractors.depth import edge_sharpness, metres
from evaluations.extractors.scenes import SPATIAL_SHAPE, WEIGHTS, ScenesExtractor, load_scenes, save_scenes
from evaluations.extractors.train_scenes import scenes_accuracy, training_batch
from guided_diffusion.depth.ranges import from_unit_range
from guided_diffusion.depth.scenes import FAR, NEAR, render
from guided_diffusion.errors import UserError
from guided_diffusion.npz import BatchFile, write_batch


@pytest.fixture(scope="module")
def extractor():
    return load_scenes()


@pytest.fixture(scope="module")
def scenes():
    """Held-out scenes that neither the extractor nor what is stored of its accuracy has seen."""
    return render(1, range(20000, 20200))


@pytest.fixture
def noise():
    return np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)


def test_accuracy_is_what_the_file_says(extractor, scenes):
    claimed, found = extractor.accuracy, scenes_accuracy(extractor, scenes)
    assert claimed.keys() == found.keys() == {"l1", "abs_rel", "delta", "class"}
    assert claimed["delta"] > 0.95 and claimed["class"] > 0.7
    # Of 200 scenes, so within some standard errors.
    assert found["l1"] == pytest.approx(claimed["l1"], rel=0.15)
    assert found["abs_rel"] == pytest.approx(claimed["abs_rel"], rel=0.2)
    assert found["delta"] == pytest.approx(claimed["delta"], abs=0.012)
    assert found["class"] == pytest.approx(claimed["class"], abs=0.1)


def test_accuracy_against_direct_formulas(scenes):
    class Guess:
        limits = NEAR, FAR

        def eval(self):
            return self

        def features_and_depth(self, images):
            kinds = np.zeros((len(images), 4))
            kinds[:, 2] = 1
            return type("Features", (), {"probabilities": kinds}), np.zeros(images.shape[:3], np.float32)

    found, middle = scenes_accuracy(Guess(), scenes), (NEAR + FAR) / 2
    assert found["l1"] == pytest.approx(abs(scenes.depth - middle).mean() * 2 / (FAR - NEAR), abs=1e-4)
    assert found["abs_rel"] == pytest.approx((abs(scenes.depth - middle) / scenes.depth).mean(), abs=1e-4)
    factor = np.maximum(scenes.depth / middle, middle / scenes.depth)
    assert found["delta"] == pytest.approx((factor < 1.25).mean(), abs=1e-4)
    assert found["class"] == pytest.approx((scenes.label == 2).mean(), abs=1e-4)


def test_depth_has_edges(extractor, scenes):
    sharpness = [edge_sharpness(depth).mean() for depth in (scenes.depth, metres(extractor.depth(scenes.rgb)))]
    assert 0.65 * sharpness[0] < sharpness[1] <= sharpness[0]


def test_bundled_file_is_small_and_describes_itself(extractor):
    assert WEIGHTS.stat().st_size < 700_000
    assert 150_000 < sum(parameter.numel() for parameter in extractor.parameters()) < 300_000
    with safe_open(WEIGHTS, "pt") as file:
        metadata = file.metadata()
        assert {file.get_tensor(name).dtype for name in file.keys() if name.endswith("0.weight")  # noqa: SIM118
                and file.get_tensor(name).ndim == 4} == {torch.float16}
    assert {"widths", "accuracy", "command", "data"} <= set(metadata)
    assert json.loads(metadata["accuracy"]) == extractor.accuracy


def test_features_and_depth(extractor, noise):
    pooled, spatial, probabilities = extractor.features(noise)
    assert pooled.shape == (5, 64) and spatial.shape == (5, *SPATIAL_SHAPE) and probabilities.shape == (5, 4)
    assert {pooled.dtype, spatial.dtype, probabilities.dtype} == {np.dtype(np.float32)}
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    depth = extractor.depth(noise)
    assert depth.shape == (5, 32, 32) and depth.dtype == np.float32 and abs(depth).max() <= 1
    estimated, logits = extractor(extractor.inputs(noise))
    np.testing.assert_allclose(depth, estimated[:, 0].detach().clamp(-1, 1), atol=1e-4)
    np.testing.assert_allclose(probabilities, logits.detach().softmax(dim=1), atol=1e-4)
    assert len(extractor.fingerprint) == 64 and extractor.fingerprint != ScenesExtractor().fingerprint


def test_no_feature_is_dead(extractor, scenes):
    features = extractor.features(scenes.rgb[:100])
    assert (features.spatial.std(axis=(0, 2, 3)) > 1e-3).all()
    assert (features.pooled.std(axis=0) > 1e-4).mean() > 0.9


def test_result_does_not_depend_on_batch_or_form_of_the_images(extractor, noise):
    depth = extractor.depth(noise)
    as_floats = torch.from_numpy(noise).permute(0, 3, 1, 2) / 127.5 - 1
    for images in (torch.from_numpy(noise), as_floats, as_floats.double().numpy()):
        np.testing.assert_allclose(extractor.depth(images, batch_size=2), depth, atol=1e-4)


@pytest.mark.parametrize("images, message", [
    (np.zeros((2, 64, 64, 3), np.uint8), r"\(2, 64, 64, 3\): uint8 images must be \(N, 32, 32, 3\)"),
    (np.zeros((2, 32, 32, 1), np.uint8), r"\(2, 32, 32, 1\): uint8 images must be"),
    (np.zeros((2, 1, 32, 32), np.float32), r"floating-point images must be \(N, 3, 32, 32\)"),
    (np.zeros((2, 32, 32, 3), np.int64), "must be uint8 or floating point"),
    (np.zeros((0, 32, 32, 3), np.uint8), "at least one"),
])
def test_wrong_images(extractor, images, message):
    with pytest.raises(UserError, match=message):
        extractor.depth(images)


def test_saved_extractor_is_the_same_up_to_rounding(tmp_path, noise):
    torch.manual_seed(0)
    model = ScenesExtractor((4, 6, 8, 10), {"l1": 0.5}).eval()
    save_scenes(model, tmp_path / "small.safetensors", {"command": "none"})
    loaded = load_scenes(tmp_path / "small.safetensors")
    assert loaded.accuracy == {"l1": 0.5} and not loaded.training
    np.testing.assert_allclose(loaded.depth(noise), model.depth(noise), rtol=0.02, atol=2e-3)
    assert [path.name for path in tmp_path.iterdir()] == ["small.safetensors"]


def test_wrong_weight_files(tmp_path):
    from evaluations.extractors.fashion_mnist import WEIGHTS as CLASSIFIER

    with pytest.raises(UserError, match="No such file"):
        load_scenes(tmp_path / "missing.safetensors")
    for content in (b"", WEIGHTS.read_bytes()[:-1000], CLASSIFIER.read_bytes()):
        (tmp_path / "wrong.safetensors").write_bytes(content)
        with pytest.raises(UserError, match="cannot be read as an extractor of scenes"):
            load_scenes(tmp_path / "wrong.safetensors")


# Training


def test_training_command_learns_and_describes_what_it_made(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("evaluations.extractors.train_scenes.render_scenes", render)
    out = tmp_path / "extractor.safetensors"
    assert call("train_scenes", "--out", out, "--num_images", 64, "--num_held_out", 32, "--epochs", 8,
                "--batch_size", 16) == 0
    extractor = load_scenes(out)
    held_out = render(1, range(32))
    guess = abs(held_out.depth - np.median(held_out.depth)).mean() * 2 / (FAR - NEAR)
    assert extractor.accuracy["l1"] < guess
    assert extractor.accuracy == scenes_accuracy(extractor, held_out)          # what is measured is the file's
    assert f"l1 {extractor.accuracy['l1']:.4f}" in capsys.readouterr().out
    lines = (tmp_path / "extractor.log").read_text().splitlines()
    assert len(lines) == 10 and "--epochs 8" in lines[0] and f"l1 {extractor.accuracy['l1']:.4f}" in lines[-1]


def test_a_network_that_learnt_from_pairs_measures_by_its_file(tmp_path, scenes, capsys):
    pairs = tmp_path / "pairs.npz"          # of other units and another range
    write_batch(pairs, {"depth": 2 * scenes.depth[:48]}, iter([scenes.rgb[:48]]), (48, 32, 32, 3))
    out, limits = tmp_path / "own.safetensors", (2.0, 25.0)
    assert call("train_scenes", "--data", pairs, "--held_out", pairs, "--depth_range", "2,25", "--num_images", 48,
                "--num_held_out", 32, "--epochs", 2, "--batch_size", 16, "--out", out) == 0
    network = load_scenes(out)
    assert network.limits == limits and network.accuracy.keys() == {"l1", "abs_rel", "delta"}
    depth = from_unit_range(network.depth(scenes.rgb[:32]), *limits)
    assert network.accuracy["abs_rel"] == pytest.approx((abs(depth / scenes.depth[:32] / 2 - 1)).mean(), rel=0.01)

    reference = tmp_path / "reference.npz"
    assert call("make_reference", pairs, reference, "--backend", out, "--keep", "features") == 0
    np.testing.assert_allclose(BatchFile(reference).read("sharpness")[:32], edge_sharpness(depth), rtol=1e-4)
    capsys.readouterr()
    assert call("evaluations/evaluator", reference, pairs, "--backend", out, "--metrics", "dfid,fid",
                "--json", tmp_path / "result.json") == 0, capsys.readouterr().err
    result, = json.loads((tmp_path / "result.json").read_text())
    assert abs(result["metrics"]["dfid"]) < 1e-3
    assert result["backend"]["settings"] == {"depth_range": "2,25"}
    assert call("evaluations/evaluator", reference, pairs, "--backend", out, "--metrics", "is") == 2
    assert "no probabilities" in capsys.readouterr().err


def test_training_command_refuses_what_cannot_work(tmp_path, capsys):
    for arguments, message in ((["--epochs", "0"], "--epochs 0"),
                               (["--data", "x.npz"], "--depth_range image: must be NEAR,FAR"),
                               (["--data", "x.npz", "--depth_range", "1,9"], "--held_out is not given"),
                               (["--held_out", "x.npz"], "--held_out x.npz: must be left out"),
                               (["--out", tmp_path / "no" / "x.safetensors"], "--out .*: cannot be written"),
                               (["--out", "x.txt"], "--out x.txt: must end in .safetensors")):
        assert call("train_scenes", *arguments) == 2
        assert re.search(message, capsys.readouterr().err)


def test_mirrored_scenes_are_mirrored_in_image_and_depth(scenes):
    chosen, mirrored = np.array([3, 7, 5]), np.array([False, True, False])
    rgb, depth, label = training_batch(scenes, chosen, mirrored)
    plain_rgb, plain_depth, plain_label = training_batch(scenes, chosen, ~np.ones(3, bool))
    assert torch.equal(rgb[1], plain_rgb[1].flip(-1)) and torch.equal(depth[1], plain_depth[1].flip(-1))
    assert torch.equal(rgb[::2], plain_rgb[::2]) and torch.equal(depth[::2], plain_depth[::2])
    assert torch.equal(label, plain_label) and label.tolist() == scenes.label[chosen].tolist()
    assert float(depth[0, 0, 4, 9]) == pytest.approx((scenes.depth[3, 4, 9] - NEAR) / (FAR - NEAR) * 2 - 1, abs=1e-6)


# The evaluator


def test_evaluator_tells_scenes_from_other_images(tmp_path, scenes, noise, capsys):
    write_batch(tmp_path / "real.npz", {}, iter([scenes.rgb]), scenes.rgb.shape)
    flat = np.repeat(noise[:, :1, :1], 32, axis=1).repeat(32, axis=2).repeat(40, axis=0)
    write_batch(tmp_path / "flat.npz", {}, iter([flat]), flat.shape)
    files = tmp_path / "real.npz", tmp_path / "flat.npz"
    code = call("evaluations/evaluator", "scenes32", *files, "--backend", "scenes",
                "--json", tmp_path / "result.json")
    assert code == 0, capsys.readouterr().err
    real, other = (result["metrics"] for result in json.loads((tmp_path / "result.json").read_text()))
    assert real["fid"] < 0.2 * other["fid"] and real["sfid"] < other["sfid"]
    assert real["precision"] > 0.7 and other["precision"] < 0.3
    assert 1 < real["is"] <= 4


def test_evaluator_refuses_what_the_extractor_cannot_read(tmp_path, scenes, capsys):
    large = np.zeros((10, 64, 64, 3), np.uint8) + 9
    write_batch(tmp_path / "large.npz", {}, iter([large]), large.shape)
    write_batch(tmp_path / "real.npz", {}, iter([scenes.rgb[:10]]), (10, 32, 32, 3))
    for words, message in ((("scenes32", tmp_path / "large.npz"), "(1, 64, 64, 3)"),
                           (("fmnist32", tmp_path / "real.npz"), "another --backend")):
        assert call("evaluations/evaluator", *words, "--backend", "scenes") == 2
        assert message in capsys.readouterr().err
    assert call("evaluations/evaluator", "scenes32", tmp_path / "real.npz", "--backend", "embedded") == 2
    assert "another --backend" in capsys.readouterr().err


def test_bundled_reference_is_that_of_held_out_scenes(extractor, tmp_path):
    from evaluations.references import open_reference

    bundled = open_reference("scenes32")
    assert bundled.path.stat().st_size < 3_000_000
    assert bundled.value("count") == 10000 and bundled.value("judge") == extractor.fingerprint
    first = render(1, range(64)).rgb
    np.testing.assert_allclose(bundled.read("pooled")[:64], extractor.features(first).pooled, rtol=2e-3, atol=2e-3)
    write_batch(tmp_path / "few.npz", {}, iter([first]), first.shape)
    made = tmp_path / "made.npz"
    assert call("make_reference", tmp_path / "few.npz", made, "--backend", "scenes", "--keep", "features",
                "--half", "True") == 0
    made = BatchFile(made)
    assert made.members.keys() == bundled.members.keys()
    assert made.read("pooled").dtype == np.float16
    np.testing.assert_allclose(made.read("sharpness"), bundled.read("sharpness")[:64], rtol=1e-3)
