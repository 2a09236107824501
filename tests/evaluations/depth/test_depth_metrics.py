"""Depth metrics: dFID, edge sharpness, their intervals and differences, and dFID of files of depth maps."""

import json

import numpy as np
import pytest
from commands import call

from evaluations.depth import fid
from evaluations.depth.fid import DepthFidOptions
from evaluations.depth.metrics import DepthReference, compare, markdown, read_reference
from evaluations.evaluation import ExtractorOptions
from evaluations.extractors.depth import DepthExtractor, DepthFeatures, edge_sharpness, metres
from evaluations.metrics import METRICS, FeatureSet, frechet_distance
from evaluations.references import open_reference
from guided_diffusion.depth.images import depth_images
from guided_diffusion.depth.scenes import FAR, NEAR, render
from guided_diffusion.errors import UserError
from guided_diffusion.npz import BatchFile, write_batch

FASHION_MNIST = ("--backend", "fashion_mnist")


@pytest.fixture(scope="module")
def scenes():
    return render(1, range(30000, 30160))


@pytest.fixture(scope="module")
def extractor():
    return DepthExtractor()


@pytest.fixture
def save(tmp_path):
    def save(name, images):
        path = tmp_path / f"{name}.npz"
        write_batch(path, {}, iter([images]), images.shape)
        return path
    return save


@pytest.fixture
def command(tmp_path, capsys):
    """Runs a command, which must succeed; its results and what it printed."""
    def command(name, *words):
        code = call(name, *words, "--json", tmp_path / "result.json")
        printed = capsys.readouterr()
        assert code == 0, printed.err
        return json.loads((tmp_path / "result.json").read_text()), printed.out
    return command


@pytest.fixture
def refused(capsys):
    def refused(name, *words):
        assert call(name, *words) == 2
        out, err = capsys.readouterr()
        assert out == ""
        return next(line for line in err.splitlines() if line.startswith("error: "))
    return refused


def blurred(images):
    """Averages of 5 x 5 pixels: edges in depth go with those in colour."""
    padded = np.pad(images.astype(float), ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
    parts = [padded[:, i:i + 32, j:j + 32] for i in range(5) for j in range(5)]
    return np.mean(parts, axis=0).astype(np.uint8)


# Depth maps


def test_depth_as_image():
    depth = np.array([[[-1, 1], [0, 0.5]]], np.float32)
    images = depth_images(depth)
    assert images.shape == (1, 2, 2, 3) and images.dtype == np.uint8
    assert images[0, :, :, 0].tolist() == [[0, 255], [128, 191]]
    assert (images[..., 0] == images[..., 2]).all()
    assert metres(np.array([-1, 0, 1])).tolist() == [NEAR, (NEAR + FAR) / 2, FAR]


def test_sharpness_of_ramp_and_step():
    ramp = np.tile(np.arange(32) * 0.25, (1, 32, 1))
    assert edge_sharpness(ramp) == pytest.approx([0.25])
    slanted = ramp + ramp.transpose(0, 2, 1)
    assert edge_sharpness(slanted) == pytest.approx([0.25 * 2**0.5])
    step = np.zeros((2, 32, 32))
    step[0, :, 16:], step[1, :, 10:13] = 3, 3
    # A tenth of 31 x 31 pixels are 96: 31 of them on each edge, the others are flat.
    assert edge_sharpness(step) == pytest.approx([3 * 31 / 96, 3 * 62 / 96])
    assert edge_sharpness(np.ones((1, 32, 32))) == 0


def test_blurring_depth_makes_it_softer(scenes):
    soft = (scenes.depth[:, :-1] + scenes.depth[:, 1:]) / 2
    assert edge_sharpness(soft).mean() < 0.95 * edge_sharpness(scenes.depth).mean()


# Comparison


def normal(shift, count=400, seed=0):
    """Features and sharpness around `shift`; the same seed has the same noise."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(count, 3)) + shift
    return DepthFeatures(features, features + 1, rng.normal(1 + shift, 0.1, count))


def compared(real, rows, replicates):
    """What `compare` says of rows of features beside those of a reference."""
    reference = DepthReference("real.npz", FeatureSet(real._asdict()))
    return compare(reference, {name: FeatureSet(row._asdict()) for name, row in rows.items()}, replicates)


def test_numbers_against_direct_formulas():
    real, row = normal(0, seed=5), normal(0.3)
    found = compared(real, {"row": row}, replicates=50)["row"]
    assert list(found) == ["dfid", "fid", "sharpness", "gap"]
    for word, ours, theirs in (("fid", row.pooled, real.pooled), ("dfid", row.depth, real.depth)):
        direct = frechet_distance(ours.mean(0), np.cov(ours.T), theirs.mean(0), np.cov(theirs.T))
        assert found[word]["value"] == pytest.approx(direct, rel=1e-4)
        assert found[word]["interval95"][0] < direct < found[word]["interval95"][1]
    assert found["sharpness"]["value"] == pytest.approx(row.sharpness.mean())
    assert found["gap"]["value"] == pytest.approx(abs(row.sharpness.mean() - real.sharpness.mean()))
    assert compared(real, {"row": real}, replicates=5)["row"]["dfid"]["value"] < 1e-6


def test_differences_hold_the_truth_and_say_what_they_mean():
    real = normal(0, seed=5)
    rows = {"unguided": normal(0.4), "worse": normal(0.7), "better": normal(0.1), "same": normal(0.4, seed=9)}
    found = compared(real, rows, replicates=300)
    assert "verdict" not in found["unguided"]["fid"]
    truth = {name: 3 * (shift**2 - 0.4**2) for name, shift in (("worse", 0.7), ("better", 0.1), ("same", 0.4))}
    for name, difference in truth.items():
        low, high = found[name]["fid"]["difference95"]
        assert low < difference + 0.2 and high > difference - 0.2
        assert low <= found[name]["fid"]["difference"] <= high
        assert found[name]["fid"]["difference"] == pytest.approx(
            found[name]["fid"]["value"] - found["unguided"]["fid"]["value"])
    verdicts = {name: {word: numbers["verdict"] for word, numbers in found[name].items()} for name in truth}
    assert verdicts == {
        "worse": {"dfid": "worse", "fid": "worse", "sharpness": "sharper", "gap": "worse"},
        "better": {"dfid": "better", "fid": "better", "sharpness": "softer", "gap": "better"},
        "same": dict.fromkeys(found["same"], "no difference")}


def test_differences_are_paired():
    """Where a row is the first one but for a constant, the difference hardly moves, unlike the numbers themselves."""
    base = normal(0.4)
    shifted = base._replace(sharpness=base.sharpness + 0.02)
    found = compared(normal(0, seed=5), {"first": base, "shifted": shifted}, replicates=100)["shifted"]
    assert found["sharpness"]["difference95"] == pytest.approx([0.02, 0.02])
    assert found["fid"]["difference95"] == [0, 0] and found["fid"]["verdict"] == "no difference"
    low, high = found["sharpness"]["interval95"]
    assert high - low > 0.01


def test_images_that_are_all_alike_have_no_intervals_and_are_no_word():
    rows = {"first": normal(0.4), "alike": DepthFeatures(*(value[:1].repeat(400, axis=0) for value in normal(0.7)))}
    real = normal(0, seed=5)
    found = compared(real, rows, replicates=20)
    for number in found["alike"].values():
        assert number["interval95"] is number["difference95"] is None and number["verdict"] == "no word"
    described = markdown(found, found["first"]["sharpness"])
    assert "nan" not in described and described.count(": no word |") == 4
    assert "no 95 % interval of dFID of alike: all its resamplings give the same number" in described
    assert "of first:" not in described and json.loads(json.dumps(found, allow_nan=False)) == found


def test_rate_at_which_intervals_hold_a_known_mean():
    """Of the difference of two means, whose truth is known: about 95 of 100 intervals hold it."""
    rng, held, trials = np.random.default_rng(0), 0, 100
    for _ in range(trials):
        common = rng.normal(size=60)
        rows = {name: DepthFeatures(*[np.zeros((60, 2))] * 2, common + rng.normal(shift, 0.5, 60))
                for name, shift in (("first", 1.0), ("second", 1.3))}
        real = DepthFeatures(*[np.zeros((2, 2))] * 2, np.array([5.0, 5.0]))
        low, high = compared(real, rows, replicates=100)["second"]["sharpness"]["difference95"]
        held += low < 0.3 < high
    assert 85 <= held <= 100


def test_verdict():
    for word, low, high, expected in (("fid", 0.1, 2, "worse"), ("fid", -2, -0.1, "better"),
                                      ("precision", 0.1, 2, "better"), ("recall", -2, -0.1, "worse"),
                                      ("sharpness", 0.1, 2, "sharper"), ("gap", -1, 0, "no difference")):
        assert METRICS[word].direction.verdict(low, high) == expected


def test_different_numbers_of_images():
    with pytest.raises(UserError, match="b has 5 images and a has 6"):
        compared(normal(0), {"a": normal(0, 6), "b": normal(0, 5)}, replicates=5)


# On images


def test_scenes_against_themselves_and_changed(extractor, scenes, save):
    real = BatchFile(save("real", scenes.rgb))
    rows = {name: FeatureSet(extractor.features(BatchFile(save(name, images)))._asdict()) for name, images in (
        ("same", scenes.rgb), ("blurred", blurred(scenes.rgb)), ("dark", scenes.rgb // 4))}
    found = compare(read_reference(str(real.path), extractor), rows, replicates=50)
    assert found["same"]["dfid"]["value"] < 1e-3 and found["same"]["fid"]["value"] < 1e-3
    assert found["same"]["gap"]["value"] == pytest.approx(0, abs=1e-6)
    for name in ("blurred", "dark"):
        assert found[name]["dfid"]["verdict"] == found[name]["fid"]["verdict"] == "worse"
    assert found["blurred"]["sharpness"]["verdict"] == "softer"


def test_features_are_what_the_networks_say(extractor, scenes, save):
    found = extractor.features(BatchFile(save("some", scenes.rgb[:20])), 12)
    pooled, depth = extractor.scenes.features(scenes.rgb[:12]).pooled, extractor.scenes.depth(scenes.rgb[:12])
    np.testing.assert_allclose(found.pooled, pooled, rtol=1e-4, atol=1e-5)
    expected = extractor.classifier.features(depth_images(depth)).pooled
    np.testing.assert_allclose(found.depth, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.sharpness, edge_sharpness(metres(depth)), rtol=1e-5)


def test_the_evaluator_has_the_same_numbers(save, scenes, command):
    """The metrics of depth are metrics of the evaluator as well, where its network estimates depth."""
    sample = save("unguided", scenes.rgb[:60])
    (by_evaluator,), printed = command("evaluate", "scenes32", sample, "--backend", "scenes",
                                       "--metrics", "dfid,fid,sharpness,gap", "--bootstrap", 20)
    by_command, _ = command("depth_metrics", "scenes32", sample, "--bootstrap", 20)
    for word, number in by_command["rows"][str(sample)]["metrics"].items():
        assert by_evaluator["metrics"][word] == pytest.approx(number["value"], rel=1e-4)
        low, high = number["interval95"]
        bounds = [pytest.approx(low, rel=1e-3, abs=1e-3), pytest.approx(high, rel=1e-3)]
        assert by_evaluator["intervals95"][word] == bounds
    assert [line.split(": ")[0] for line in printed.splitlines()[-4:]] == [
        "FID", "dFID", "Edge sharpness", "Sharpness gap"]
    assert by_evaluator["depth"]["extractor"]["sha256"] == by_command["extractor"]["sha256"]


def test_the_evaluator_needs_a_network_that_estimates_depth(save, scenes, refused):
    sample = save("unguided", scenes.rgb[:10])
    message = refused("evaluate", sample, sample, "--metrics", "fid,dfid", *FASHION_MNIST)
    assert message == ("error: --backend fashion_mnist: does not estimate depth, which dfid would need; must be one "
                       "of scenes, or your own network with an output depth")


def test_command(save, scenes, command):
    files = save("unguided", scenes.rgb), save("upside_down", scenes.rgb[:, ::-1])
    result, printed = command("depth_metrics", "scenes32", *files, "--bootstrap", 50, "--num_images", 150)
    assert result["reference"]["images"] == 10000 and result["bootstrap"] == 50
    assert [row["images"] for row in result["rows"].values()] == [150, 150]
    first, other = (row["metrics"] for row in result["rows"].values())
    assert other["dfid"]["verdict"] == "worse" and other["sharpness"]["verdict"] == "softer"
    assert first["dfid"]["value"] < other["dfid"]["value"]
    low, high = first["sharpness"]["interval95"]
    assert low < first["sharpness"]["value"] < high
    assert result["estimator"]["accuracy"] and "| dFID | FID | edge sharpness | sharpness gap |" in printed
    assert f"{other['dfid']['value']:.4g} (" in printed and ": softer |" in printed


def test_what_the_command_refuses(save, scenes, refused, tmp_path):
    good = save("good", scenes.rgb[:4])
    large = save("large", np.zeros((4, 64, 64, 3), np.uint8) + 9)
    single = save("single", scenes.rgb[:1])
    np.savez(tmp_path / "labels.npz", arr_1=np.zeros(4, int))
    for words, message in (
            (("scenes32",), "1 files given"), (("scenes32", large), "its images are 64x64"),
            (("scenes32", tmp_path / "labels.npz"), "has no images"), (("scenes32", single), "has 1 images"),
            ((large, good), "its images are 64x64"), (("scenes31", good), "scenes31: there is no such file"),
            (("scenes32", good, "--num_images", 9), "has 4 images, 9 are needed"),
            (("scenes32", good, large, good), f"{good}: is named more than once"),
            (("scenes32", good, save("five", scenes.rgb[:5])), "has 5 images"),
            (("fmnist32", good), "has no images"), (("scenes32", good, "--bootstrap", 1), "--bootstrap 1"),
            (("scenes32", good, "--json", "/nowhere/x.json"), "--json /nowhere/x.json: cannot be written")):
        assert message in refused("depth_metrics", *words), words


def test_a_reference_of_another_network_is_refused(extractor, tmp_path):
    bundled = open_reference("scenes32")
    arrays = {name: bundled.read(name) for name in bundled.members}
    for changed, said in (({"judge": np.array("0" * 64)}, "SHA-256 0000"),
                          ({"sharpness": None, "judge": None}, "none is named")):
        kept = {name: array for name, array in (arrays | changed).items() if array is not None}
        np.savez(tmp_path / "other.npz", **kept)
        with pytest.raises(UserError, match=rf"other.npz: .* are those of another depth estimator \({said}"):
            read_reference(str(tmp_path / "other.npz"), extractor)


# Files of depth maps


@pytest.fixture
def save_depth(tmp_path):
    def save(name, depth):
        np.savez(tmp_path / f"{name}.npz", depth=depth)
        return tmp_path / f"{name}.npz"
    return save


def test_dfid_of_depth_files_is_that_of_their_images(scenes, save_depth, save, command):
    real, other = scenes.depth[:80], scenes.depth[80:]
    files, limits = (save_depth("real", real), save_depth("other", other)), f"{NEAR},{FAR}"
    (result,), printed = command("depth_fid", *files, "--depth_range", limits, "--bootstrap", 20, *FASHION_MNIST)
    value = result["metrics"]["dfid"]
    assert result["sample"]["file"] == str(files[1]) and result["reference"]["images"] == 80
    low, high = result["intervals95"]["dfid"]
    assert low < value < high and f"dFID: {value}" in printed
    as_images = [save(f"{path.stem}_images", depth_images((depth - NEAR) / (FAR - NEAR) * 2 - 1))
                 for path, depth in zip(files, (real, other), strict=True)]
    (by_hand,), _ = command("evaluate", *as_images, "--metrics", "fid", *FASHION_MNIST)
    assert value == pytest.approx(by_hand["metrics"]["fid"], rel=1e-3)


def test_grey_images_of_depth_count_as_depth_maps_and_may_be_resized(scenes, save_depth, save, command):
    """Maps of 16x16, as a prior samples them, are compared at the 32x32 that the classifier of Fashion-MNIST reads."""
    grey = depth_images(((scenes.depth - NEAR) / (FAR - NEAR) * 2 - 1).reshape(-1, 16, 2, 16, 2).mean(axis=(2, 4)))
    size, grey_range = ("--map_size", 32), ("--depth_range", "0,255")
    images = save("real", grey[:80]), save("other", grey[80:])
    maps = save_depth("maps", grey[:80, :, :, 0]), save_depth("other_maps", grey[80:, :, :, :1])
    (of_images,), _ = command("depth_fid", *images, *size, *grey_range, *FASHION_MNIST)
    (of_maps,), _ = command("depth_fid", *maps, *size, *grey_range, *FASHION_MNIST)
    assert of_images["metrics"]["dfid"] == of_maps["metrics"]["dfid"] > 0
    assert of_images["protocol"]["map_size"] == 32


def test_maps_with_pixels_of_0_are_said_and_black_images_are_none(scenes, save_depth, save, command, caplog):
    caplog.set_level("INFO")
    holed = scenes.depth[:80].copy()
    holed[:8, :4, :4] = 0
    grey = depth_images((holed - NEAR) / (FAR - NEAR) * 2 - 1)
    for sample, said in ((save_depth("holed", holed), True), (save("grey", grey), False)):
        caplog.clear()
        command("depth_fid", save_depth("real", scenes.depth[80:]), sample, *FASHION_MNIST)
        line = f"{sample}: 0.16 % of the pixels of its depth maps, in 8 of 80, are 0, which is taken as a depth"
        assert any(message.startswith(line) for message in caplog.messages) is said
        assert said or "are 0" not in caplog.text


def test_range_of_each_map_makes_dfid_blind_to_scale(scenes, save_depth, command):
    scaled = scenes.depth * np.linspace(0.5, 0.9, len(scenes.depth))[:, None, None]
    files = save_depth("real", scenes.depth), save_depth("scaled", scaled), save_depth("shuffled", scenes.depth[::-1])
    of_each = [result["metrics"]["dfid"] for result in command("depth_fid", *files, *FASHION_MNIST)[0]]
    assert of_each == pytest.approx([0, 0], abs=1e-2)
    fixed = command("depth_fid", *files, "--depth_range", "0.5,9", *FASHION_MNIST)[0]
    assert fixed[0]["metrics"]["dfid"] > 0.2 and fixed[1]["metrics"]["dfid"] == pytest.approx(0, abs=1e-3)


def test_options_of_dfid_without_effect_are_said(scenes, save_depth, command, caplog):
    files = save_depth("real", scenes.depth[:80]), save_depth("other", scenes.depth[80:])
    for words, said in (([], "; --seed (nothing is drawn)"), (["--bootstrap", 20], "")):
        caplog.clear()
        command("depth_fid", *files, *FASHION_MNIST, "--dtype", "bfloat16", "--seed", 3, *words)
        assert f"without effect: --dtype (--backend fashion_mnist computes in one type){said}" in caplog.messages


def test_what_is_said_of_dfid_names_the_files_of_the_user(scenes, save_depth, refused, capsys, tmp_path):
    """Not the images that were made of them, which are gone by then."""
    real, alike = save_depth("FID", scenes.depth[:80]), save_depth("alike", scenes.depth[80:81].repeat(30, axis=0))
    cache = tmp_path / "depth FID"
    capsys.readouterr()
    assert call("depth_fid", real, alike, "--bootstrap", 10, *FASHION_MNIST, "--cache", cache) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 3 and not [line for line in warnings if str(cache) in line or " FID" in line]
    assert f"warning: {alike}: no 95 % interval of dFID: all its resamplings give the same number" in warnings[-1]
    small = save_depth("FID", scenes.depth[:80, ::2, ::2])
    message = refused("depth_fid", small, small, *FASHION_MNIST, "--cache", cache)
    assert message.startswith(f"error: {small}: ") and str(cache) not in message


def test_two_commands_in_one_cache_do_not_read_each_others_maps(scenes, save_depth, tmp_path, monkeypatch):
    files = [str(save_depth("real", scenes.depth[:80])), str(save_depth("other", scenes.depth[80:]))]
    extractor = ExtractorOptions(backend="fashion_mnist", cache=str(tmp_path / "cache"))
    own, fixed = DepthFidOptions(), DepthFidOptions(depth_range="0.5,9")
    alone = [fid.depth_fid(files[0], files[1:], extractor, options)[0]["metrics"] for options in (own, fixed)]
    evaluation, between = fid.Evaluation, []

    def interrupted(*words, **options):
        if not between:
            between.append(None)
            between[0] = fid.depth_fid(files[0], files[1:], extractor, fixed)[0]["metrics"]
        return evaluation(*words, **options)

    monkeypatch.setattr(fid, "Evaluation", interrupted)
    assert fid.depth_fid(files[0], files[1:], extractor, own)[0]["metrics"] == alone[0] != alone[1] == between[0]
    assert not list((tmp_path / "cache").glob(".*"))


def test_depth_files_that_are_refused(scenes, save_depth, refused, tmp_path):
    good, holed, flat = scenes.depth[:70].copy(), scenes.depth[:70].copy(), scenes.depth[:70].copy()
    holed[66, 3, 4], flat[2] = np.nan, 3
    good, large = save_depth("good", good), save_depth("large", scenes.depth[:4].repeat(2, 1).repeat(2, 2))
    np.savez(tmp_path / "images.npz", arr_0=scenes.rgb[:4])
    for words, message in (
            ((good, save_depth("holed", holed)), "holed.npz: depth map 66: has 1 pixels without a finite depth"),
            ((save_depth("flat", flat), good), "flat.npz: depth map 2: is constant"),
            ((good, tmp_path / "images.npz"), "images.npz: has no depth"),
            ((good, save_depth("maps", scenes.depth[:4, None])), "maps.npz: depth is (4, 1, 32, 32) float32"),
            ((good, save_depth("one", scenes.depth[:1])), "has 1 depth map"),
            ((good, good, "--depth_range", "5,2"), "--depth_range 5,2"),
            ((good, good, "--depth_range", "20,30"), "lies outside --depth_range"),
            ((good, good, large), f"--map_size is not given, and the maps of {large} would be images of 64x64 pixels, "
                                  f"those of {good} of 32x32: give a size for both"),
            ((large, large), f"{large}: images of shape (1, 64, 64, 3): uint8 images must be (N, 32, 32, 3 or 1); "
                             "--map_size sets the size of the maps"),
            ((good, good, "--num_images", 71), "--num_images 71"), ((good,), "1 files given"),
            ((good, good, "--json", "/nowhere/x.json"), "cannot be written")):
        assert message in refused("depth_fid", *words, *FASHION_MNIST), words
