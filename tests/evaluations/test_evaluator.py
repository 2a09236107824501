"""The evaluator as its users meet it: the official numbers, bundled references, what is said and what is refused."""

import json
import re
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from commands import REPOSITORY, call, execute
from golden import BUNDLED
from launchers import BIN, needs_mpi
from PIL import Image
from synthetic_inception import write_weights

from evaluations.evaluation import Evaluation
from evaluations.evaluation_plot import PlottedFile, plot_evaluation
from evaluations.extractors.fashion_mnist import FashionMnistClassifier
from evaluations.metrics import METRICS
from guided_diffusion.image_datasets import DEBIAN_FASHION_MNIST, load_arrays
from guided_diffusion.npz import BatchFile, write_batch
from guided_diffusion.pictures import MARGIN
from guided_diffusion.runs.status import status_of

needs_fashion_mnist = pytest.mark.skipif(not DEBIAN_FASHION_MNIST.is_dir(), reason="dataset-fashion-mnist is missing")
FASHION_MNIST = ("--backend", "fashion_mnist")
FIVE = ["Inception Score", "FID", "sFID", "Precision", "Recall"]


def clothes(count, seed=0):
    """(count, 32, 32, 3) of coarse random blots: something for the embedded network to tell apart."""
    random = np.random.default_rng(seed)
    coarse = random.random((count, 4, 4)).repeat(8, axis=1).repeat(8, axis=2)
    grey = (255 * np.clip(coarse + 0.1 * random.random((count, 32, 32)), 0, 1)).astype(np.uint8)
    return grey[..., None].repeat(3, axis=3)


@pytest.fixture
def save(tmp_path):
    def save(name, images=None, **arrays):
        path = tmp_path / f"{name}.npz"
        write_batch(path, arrays, None if images is None else iter([images]), np.shape(images))
        return path
    return save


@pytest.fixture
def evaluate(tmp_path, capsys):
    """Runs the evaluator; returns its results and what it printed."""
    def evaluate(*words, backend=FASHION_MNIST):
        capsys.readouterr()
        code = call("evaluations/evaluator", *words, *backend, "--json", tmp_path / "result.json")
        printed = capsys.readouterr()
        assert code == 0, printed.err
        return json.loads((tmp_path / "result.json").read_text()), printed
    return evaluate


@pytest.fixture
def refused(tmp_path, capsys):
    """Runs the evaluator, which must refuse: exit code 2, one sentence, no file. Returns the sentence."""
    def refused(*words, script="evaluations/evaluator", backend=FASHION_MNIST):
        before = sorted(tmp_path.iterdir())
        capsys.readouterr()
        code = call(script, *words, *backend)
        out, err = capsys.readouterr()
        assert (code, out) == (2, ""), err
        lines = [line for line in err.splitlines() if line and ", took " not in line]       # of progress
        assert len(lines) == 1 and lines[0].startswith("error: "), err
        assert sorted(tmp_path.iterdir()) == before
        return lines[0]
    return refused


def values(results):
    return [result["metrics"] for result in results]


# The official numbers


def test_the_official_command_end_to_end(save, evaluate, tmp_path):
    """An eighth of the network's width: the features of the whole one are compared in test_inception."""
    golden = json.loads((BUNDLED / "eval" / "e2e_w8.json").read_text())
    variables = {"np": np}
    exec(golden["recipe"], variables)
    weights = write_weights(tmp_path / "weights.safetensors", golden["weights_seed"], golden["width_div"])
    files = save("reference", variables["ref"]), save("sample", variables["sample"])
    torch_backend = ("--inception", weights, "--cache", tmp_path / "cache")
    results, printed = evaluate(*files, "--precision_recall", "official", backend=torch_backend)

    official = dict(line.split(": ") for line in golden["stdout"].splitlines())
    lines = printed.out.splitlines()[-5:]
    assert [line.split(": ")[0] for line in lines] == FIVE
    shown = {line.split(": ")[0]: float(line.split(": ")[1]) for line in lines}
    assert shown["Inception Score"] == pytest.approx(float(official["Inception Score"]), abs=5e-7)
    assert shown["FID"] == pytest.approx(float(official["FID"]), rel=1e-4)
    assert shown["sFID"] == pytest.approx(float(official["sFID"]), rel=1e-4)
    # The distances of one image in 40 lie where the last bit of half precision decides.
    assert shown["Precision"] == pytest.approx(float(official["Precision"]), abs=0.03)
    assert shown["Recall"] == pytest.approx(float(official["Recall"]), abs=0.03)
    assert results[0]["backend"]["name"] == "torch Inception 2015"
    assert results[0]["protocol"]["precision_recall"] == "official"

    exact, _ = evaluate(*files, backend=torch_backend)
    precision, recall = golden["own_f64_precision_recall"]
    assert (exact[0]["metrics"]["precision"], exact[0]["metrics"]["recall"]) == pytest.approx((precision, recall))


def test_the_state_lies_beside_the_samples_as_long_as_it_runs(save, monkeypatch):
    found = []
    reference, sample = save("reference", clothes(2)), save("sample", clothes(2))
    monkeypatch.setattr(Evaluation, "run", lambda evaluation, folder: found.append(str(status_of(sample))) or [])
    assert call("evaluations/evaluator", reference, sample, *FASHION_MNIST, "--metrics", "kid") == 0
    assert "evaluation, running" in found[0] and not list(sample.parent.glob("*status*"))


def test_identical_sets(save, evaluate):
    reference, sample = save("reference", clothes(60)), save("sample", clothes(60)[::-1])
    results, printed = evaluate(reference, sample, "--metrics", "fid,sfid,precision,recall,kid,density,coverage")
    found = results[0]["metrics"]
    assert found["fid"] == pytest.approx(0, abs=1e-6) and found["sfid"] == pytest.approx(0, abs=1e-6)
    assert found["precision"] == found["recall"] == found["coverage"] == 1
    assert found["kid"] < 0.01
    assert printed.err.count("warning") == 0
    assert [line.split(": ")[0] for line in printed.out.splitlines()[-7:]] == [
        "FID", "sFID", "Precision", "Recall", "KID", "Density", "Coverage"]


@pytest.mark.slow
@needs_fashion_mnist
def test_fid_falls_as_noise_is_removed(save, evaluate, few_neighbours):
    pixels, _ = load_arrays("fashion-mnist", "train")
    real = np.pad(pixels[:600], ((0, 0), (2, 2), (2, 2))).astype(np.float32)
    noise = np.random.default_rng(0).normal(size=real.shape)
    noisy = {level: np.clip(real + level * noise, 0, 255).astype(np.uint8) for level in (80, 30, 10, 0)}
    files = [save(f"noise{level}", grey[..., None].repeat(3, axis=3)) for level, grey in noisy.items()]
    found = values(evaluate("fmnist32", *files)[0])
    for word in ("fid", "sfid"):
        series = [numbers[word] for numbers in found]
        assert series == sorted(series, reverse=True), (word, series)
    assert found[-1]["fid"] < 0.3 < found[0]["fid"] and found[-1]["precision"] > 0.8 > found[0]["precision"]


# What a result is made of


def test_result_says_what_it_is(save, evaluate):
    reference, sample = save("reference", clothes(30)), save("sample", clothes(20, 1))
    (result,), printed = evaluate(reference, sample)
    assert result["metrics"].keys() == {"is", "fid", "sfid", "precision", "recall"}
    for side, path, count in (("reference", reference, 30), ("sample", sample, 20)):
        assert result[side]["file"] == str(path) and result[side]["images"] == count
        assert result[side]["sha256"] == BatchFile(path).sha256 and result[side]["resolution"] == "32x32"
    assert result["reference"]["statistics"] == "computed"
    assert result["backend"]["name"] == "embedded Fashion-MNIST classifier" and len(result["backend"]["sha256"]) == 64
    assert result["protocol"]["precision_recall"] == "exact"
    assert {"torch", "numpy", "scipy", "guided_diffusion"} <= result["versions"].keys()
    for words in ("embedded Fashion-MNIST classifier", "30 images", "20 images", "exact precision and recall"):
        assert words in printed.out
    assert "different numbers of images (30, 20)" in printed.err
    assert [line.split(": ")[0] for line in printed.out.splitlines()[-5:]] == FIVE
    _, printed = evaluate(reference, sample, "--metrics", "authenticity")
    assert f"copies of the images of {reference}, which must be those that the network was trained on" in printed.err
    assert "FID" not in printed.err


OF_NETWORK = ("--dtype (--backend fashion_mnist computes in one type); "
              "--inception (--backend fashion_mnist is no Inception)")


@pytest.mark.parametrize("words, note, protocol", [
    (["--metrics", "fid", "--precision_recall", "official", "--seed", 3],
     "--precision_recall (neither precision nor recall is computed); --seed (nothing is drawn)", set()),
    (["--metrics", "fid", "--precision_recall", "official", "--bootstrap", 5, "--seed", 3, "--plot", "x.png"], "",
     {"precision_recall", "neighbours", "seed"}),
    (["--metrics", "recall", "--precision_recall", "official"], "", {"precision_recall", "neighbours"}),
    (["--metrics", "is", "--dtype", "bfloat16", "--inception", "/nowhere"], OF_NETWORK, {"inception_score_split"}),
    (["--metrics", "kid", "--seed", 3], "", {"seed"})])
def test_what_has_no_effect_is_said_and_the_protocol_is_that_of_what_was_computed(
        words, note, protocol, save, evaluate, caplog, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (result,), printed = evaluate(save("reference", clothes(20)), save("sample", clothes(20, 1)), *words)
    said = [line for line in caplog.messages if line.startswith("without effect")]
    assert said == ([f"without effect: {note}"] if note else [])
    assert result["protocol"].keys() == protocol
    assert ("official precision and recall" in printed.out) == ("precision_recall" in protocol)


@pytest.mark.parametrize(("count", "rest"), [(6, 1), (5, 0), (10, 0), (3, 0), (12, 2)])
def test_a_short_last_split_of_the_inception_score_is_said(save, evaluate, monkeypatch, count, rest):
    monkeypatch.setattr("evaluations.evaluation_warnings.SPLIT_SIZE", 5)
    _, printed = evaluate(save("reference", clothes(count)), save("sample", clothes(count, 1)), "--metrics", "is")
    warning = f"Inception Score of {count} images: the last of its splits of 5 has {rest}, and counts as much as the"
    assert (warning in printed.err) is bool(rest) and ("splits" in printed.err) is bool(rest)


def test_held_out_images_are_shown_before_the_samples(save, evaluate, refused):
    reference, held_out = save("reference", clothes(40)), save("held_out", clothes(30, 1))
    sample = save("sample", clothes(30, 2))
    words = ("--metrics", "authenticity,saturation,contrast,fid_infinity", "--bootstrap", 5)
    (first, second), printed = evaluate(reference, sample, *words, "--held_out", held_out)
    assert first["held_out"] and "held_out" not in second
    ((alone,), _), ((plain,), _) = evaluate(reference, held_out, *words), evaluate(reference, sample, *words)
    assert (first["metrics"], second["metrics"]) == (alone["metrics"], plain["metrics"])
    assert first["metrics"]["saturation"] == 0 < first["metrics"]["contrast"] < 0.5
    assert printed.out.index("held out:  ") < printed.out.index("sample:    ")
    assert [line.split(": ")[0] for line in printed.out.splitlines()[-4:]] == [
        "FID at infinity", "Authenticity in %", "Saturation", "Contrast"]
    assert "FID at infinity lies beside the truth with fewer than 20 images for each feature" in printed.err
    assert "no such file" in refused(reference, sample, "--held_out", "absent.npz")
    assert "has 19 images, --metrics fid_infinity needs at least 20" in refused(
        reference, save("few", clothes(19)), "--metrics", "fid_infinity")


def test_batches_and_order_do_not_matter(save, evaluate):
    images = clothes(40, 1)
    reference = save("reference", clothes(50))
    plain, shuffled = save("plain", images), save("shuffled", images[np.random.default_rng(0).permutation(40)])
    first, second = values(evaluate(reference, plain, shuffled)[0])
    assert first == pytest.approx(second, rel=1e-5, abs=1e-6)
    assert values(evaluate(reference, plain, "--batch_size", 7)[0])[0] == pytest.approx(first, rel=1e-5, abs=1e-6)


def test_first_images_only(save, evaluate):
    reference = save("reference", clothes(30))
    all_of_it, more = save("short", clothes(20, 1)[:12]), save("long", clothes(20, 1))
    short, _ = values(evaluate(reference, all_of_it, more)[0])
    results, _ = evaluate(reference, more, "--num_images", 12)
    assert results[0]["metrics"] == pytest.approx(short, rel=1e-5, abs=1e-6)
    assert results[0]["sample"]["images"] == 12


def test_stored_statistics_are_used_as_they_are(save, evaluate, tmp_path, refused):
    sample = save("sample", clothes(20, 1))
    call("make_reference", save("source", clothes(40)), tmp_path / "made.npz", *FASHION_MNIST)
    with np.load(tmp_path / "made.npz") as made:
        arrays = dict(made)
    assert arrays["arr_0"].shape == (40, 32, 32, 3)
    assert arrays["mu"].shape == (64,) and arrays["sigma"].shape == (64, 64)
    assert arrays["mu_s"].shape == (512,) and arrays["sigma_s"].shape == (512, 512)
    computed = values(evaluate(tmp_path / "source.npz", sample)[0])[0]
    results, _ = evaluate(tmp_path / "made.npz", sample)
    assert results[0]["metrics"] == pytest.approx(computed) and results[0]["reference"]["statistics"] == "stored"

    images = arrays.pop("arr_0")
    moved = save("moved", images, **{**arrays, "mu": arrays["mu"] + 1})
    assert values(evaluate(moved, sample)[0])[0]["fid"] != pytest.approx(computed["fid"], rel=0.01)
    bare = save("bare", **arrays)
    assert values(evaluate(bare, sample, "--metrics", "fid,sFID")[0])[0]["fid"] == pytest.approx(computed["fid"])
    message = refused(bare, sample)
    assert "no images" in message and "precision, recall" in message


def test_statistics_of_the_same_network_trained_again_are_refused(save, evaluate, refused, tmp_path):
    """They are told apart by the SHA-256 of the weights; files that do not hold it, by the name of the network."""
    sample = save("sample", clothes(20, 1))
    call("make_reference", save("source", clothes(40)), tmp_path / "made.npz", *FASHION_MNIST)
    with np.load(tmp_path / "made.npz") as made:
        arrays = dict(made)
    images = arrays.pop("arr_0")
    again = save("again", images, **{**arrays, "backend_sha256": np.array("0" * 64)})
    assert "another --backend" in (message := refused(again, sample)) and "SHA-256 0000000000000000..." in message
    renamed = save("renamed", images, **{**arrays, "backend": np.array("classifier")})
    evaluate(renamed, sample)
    arrays.pop("backend_sha256")
    evaluate(save("older", images, **arrays), sample)
    assert "another --backend" in refused(save("foreign", images, **{**arrays, "backend": np.array("other")}), sample)


def test_stored_statistics_of_a_sample_file_are_not_used_where_another_network_made_them(save, evaluate, tmp_path):
    images, words = clothes(20, 1), ("--metrics", "fid,sfid")
    call("make_reference", save("source", images), tmp_path / "made.npz", *FASHION_MNIST)
    with np.load(tmp_path / "made.npz") as made:
        arrays = {name: made[name] for name in made if name not in ("arr_0", "mu_s", "sigma_s")}
    arrays["mu"] += 5
    nameless = {name: array for name, array in arrays.items() if not name.startswith("backend")}
    right, renamed, unnamed = (save(name, images, **more) for name, more in (
        ("right", arrays), ("renamed", arrays | {"backend_sha256": np.array("0" * 64)}), ("unnamed", nameless)))
    reference, plain = save("reference", clothes(20)), tmp_path / "source.npz"
    results, printed = evaluate(reference, right, renamed, unnamed, *words, "--held_out", plain)
    of_plain, of_right, *others = values(results)
    assert of_right["fid"] > of_plain["fid"] + 1000 and others == [of_plain, of_plain]
    assert [result["sample"]["statistics"] for result in results] == ["computed", "stored", "computed", "computed"]
    lines = [line for line in printed.err.splitlines() if "those of its images were computed instead" in line]
    assert len(lines) == 2 and "renamed.npz" in lines[0] and "SHA-256 0000" in lines[0]
    assert "unnamed.npz: its stored statistics are Inception's" in lines[1]


def test_stored_statistics_of_more_images_than_a_sample_file_holds_are_not_taken_for_theirs(save, evaluate, tmp_path):
    """The official reference batches are such files: fewer images, and the statistics of a larger set."""
    call("make_reference", save("source", clothes(40, 1)), tmp_path / "made.npz", *FASHION_MNIST, "--keep", "features")
    with np.load(tmp_path / "made.npz") as made:
        arrays = {name: made[name] for name in made if name != "pooled"}
    uncounted = {name: array for name, array in arrays.items() if name != "count"}
    images, words = clothes(40, 1)[:20], ("--metrics", "fid,sfid,kid", "--bootstrap", 20)
    files = [save(name, images, **more) for name, more in (("plain", {}), ("larger", arrays), ("silent", uncounted))]
    (plain, larger, silent), printed = evaluate(save("reference", clothes(40)), *files, *words)
    assert larger["metrics"] == plain["metrics"] and larger["intervals95"] == plain["intervals95"]
    assert [result["sample"]["statistics"] for result in (plain, larger, silent)] == ["computed", "computed", "stored"]
    assert silent["metrics"]["fid"] < plain["metrics"]["fid"] and silent["intervals95"].keys() == {"kid"}
    silence = "silent.npz: {}its stored statistics do not say of how many images they are"
    for line in ("larger.npz: its stored statistics are of 40 images, not of its 20; those of its images were computed "
                 "instead", silence.format("") + "; they may be of others than its 20",
                 silence.format("no 95 % interval of FID: "), silence.format("no 95 % interval of sFID: ")):
        assert printed.err.count(line) == 1, line


def test_bundled_reference(save, evaluate, tmp_path):
    results, _ = evaluate("fmnist32", save("sample", clothes(20)))
    assert results[0]["reference"]["images"] == 10000 and results[0]["reference"]["statistics"] == "stored"
    assert results[0]["metrics"]["precision"] < 0.2


@pytest.mark.slow
@needs_fashion_mnist
def test_bundled_reference_is_that_of_the_test_images(tmp_path):
    """The features of the first 1,000 are the bundled ones, and its statistics those of all the features it holds.

    Spatial features are in no file: the statistics of those 1,000 are as near to the bundled ones as chance allows.
    """
    words = ("fashion-mnist", tmp_path / "made.npz", *FASHION_MNIST, "--keep", "features", "--num_images", 1000)
    assert call("make_reference", *words) == 0
    bundled = REPOSITORY / "evaluations" / "models" / "fmnist32_reference.npz"
    with np.load(tmp_path / "made.npz") as made, np.load(bundled) as ours:
        assert made.files == ours.files
        assert [made[name].item() for name in ("backend", "backend_sha256", "count")] == [
            ours["backend"].item(), ours["backend_sha256"].item(), 1000]
        assert ours["count"].item() == len(ours["pooled"]) == 10000
        near = {"rtol": 1e-3, "atol": 1e-3}
        np.testing.assert_allclose(made["pooled"], ours["pooled"][:1000], **near)
        np.testing.assert_allclose(ours["mu"], ours["pooled"].mean(axis=0), **near)
        np.testing.assert_allclose(ours["sigma"], np.cov(ours["pooled"], rowvar=False), **near)
        standard_errors = np.sqrt(ours["sigma_s"].diagonal() / 1000)
        assert (abs(made["mu_s"] - ours["mu_s"]) <= 5 * standard_errors).all()
        off = np.linalg.norm(made["sigma_s"] - ours["sigma_s"]) / np.linalg.norm(ours["sigma_s"])
        assert off < 0.15           # 0.11: a tenth of the images


def test_intervals(save, evaluate):
    files = save("reference", clothes(40)), save("sample", clothes(30, 1))
    words = ("--metrics", "is,fid,sfid,precision,recall,kid,density,coverage", "--bootstrap", 20)
    (result,), printed = evaluate(*files, *words)
    without = {"recall", "coverage"}            # too few reference images lie near samples to say how far these move
    assert result["intervals95"].keys() == result["metrics"].keys() - without and result["bootstrap"] == 20
    for word, (low, high) in result["intervals95"].items():
        assert low <= high, word
    assert re.search(r"^FID: [\d.]+   \(95 %, of FID of 30 images: [\d.e-]+ to [\d.e-]+\)$", printed.out, re.MULTILINE)
    assert "no 95 % interval of recall: it is nearly 0 or 1, or there are too few images" in printed.err
    assert evaluate(*files, *words)[0][0]["intervals95"] == result["intervals95"]
    assert evaluate(*files, *words, "--seed", 1)[0][0]["intervals95"] != result["intervals95"]


def test_the_interval_of_mind_is_of_as_many_images_as_the_smaller_file_has(save, evaluate):
    _, printed = evaluate(save("reference", clothes(20)), save("sample", clothes(30, 1)), "--metrics", "fid,mind",
                          "--bootstrap", 2)
    assert "95 % intervals of FID are wider than they need to be" in printed.err
    assert "beside the truth" not in printed.err
    assert "(95 %, of FID of 30 images: " in printed.out and "(95 %, of MIND of 20 images: " in printed.out


def test_probability_zero_is_told(save, evaluate, monkeypatch):
    from evaluations.extractors.fashion_mnist import FashionMnistClassifier

    real = FashionMnistClassifier.features
    monkeypatch.setattr(FashionMnistClassifier, "features", lambda self, images: real(self, images)._replace(
        probabilities=np.eye(10, dtype=np.float32)[np.arange(len(images)) % 10]))
    results, printed = evaluate(save("reference", clothes(20)), save("sample", clothes(20, 1)))
    assert results[0]["metrics"]["is"] is None
    assert "Inception Score: nan" in printed.out
    assert "sample.npz: Inception Score: a class has probability 0" in printed.err


def test_an_own_metric_may_give_any_number_and_is_named_where_it_gives_none(save, evaluate, refused, monkeypatch):
    def give(value):
        monkeypatch.setitem(METRICS, "own", replace(METRICS["fid"], word="own", title="Own distance",
                                                    value=lambda comparison: value, by_network=""))

    files = save("reference", clothes(20)), save("sample", clothes(20, 1))
    give(np.float32(0.5))
    assert values(evaluate(*files, "--metrics", "fid,own", "--bootstrap", 5)[0])[0]["own"] == 0.5
    give(np.float32(np.nan))
    results, printed = evaluate(*files, "--metrics", "own")
    assert values(results) == [{"own": None}] and "sample.npz: own distance: it is not a number" in printed.err
    give(np.ones(2))
    assert "own: its value is array([1., 1.]), it must be a number" in refused(*files, "--metrics", "own")


def test_cached_features_spare_the_network(save, evaluate, tmp_path, monkeypatch):
    files = save("reference", clothes(30)), save("sample", clothes(20, 1))
    first = values(evaluate(*files, "--cache", tmp_path / "cache")[0])
    monkeypatch.setattr("evaluations.extractors.fashion_mnist.FashionMnistClassifier.features", None)
    assert values(evaluate(*files, "--cache", tmp_path / "cache")[0]) == first


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_picture(save, evaluate, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    for folder in (r"a $\frac$ b", "_b", "more/_b"):
        (tmp_path / folder).mkdir(parents=True)
    sets = {r"a $\frac$ b/sample": clothes(20, 1), "_b/s": clothes(25, 2), "more/_b/s": clothes(25, 3)}
    files = save(r"a $\frac$ b/reference", clothes(30)), *(save(name, images) for name, images in sets.items())
    picture = tmp_path / f"picture.{suffix}"
    evaluate(*files, "--plot", picture, "--bootstrap", 5)
    if suffix == "png":
        with Image.open(picture) as image:
            assert image.width > 800 and np.asarray(image).std() > 10
    else:
        for file in (r"a $\frac$ b/sample.npz", *files[2:]):
            assert picture.read_text().count(f"<!-- {file} -->") == 2          # in both legends


def test_a_file_far_away_is_within_the_histogram(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    shown = []
    monkeypatch.setattr("evaluations.evaluation_plot.save_figure",
                        lambda figure, path: shown.append(figure.axes[1].get_xlim()[1]))
    images = np.zeros((1, 8, 8, 3), np.uint8)
    file = PlottedFile("_far", 0, 0, None, np.linspace(8, 9, 5), images, images)
    plot_evaluation(tmp_path / "x.png", [file], np.linspace(0, 1, 2000), "")
    assert shown[0] > 8.5


def test_pictures_of_nearest_images_of_two_files_of_one_name(save, evaluate, tmp_path):
    reference, heights = save("reference", clothes(30)), []
    for folder in ("a/s", "b/a/s"):
        (tmp_path / folder).mkdir(parents=True)
    for files in ([save("a/s/x", clothes(20, 1))], [save("a/s/x", clothes(20, 1)), save("b/a/s/x", clothes(20, 2))]):
        evaluate(reference, *files, "--metrics", "saturation", "--nearest", tmp_path / "nearest.png")
        with Image.open(tmp_path / "nearest.png") as image:
            heights.append(image.height)
    assert heights[1] > 1.9 * heights[0]


def test_the_picture_of_nearest_images_shows_copies_first(save, evaluate, refused, tmp_path):
    reference, samples = clothes(30), clothes(20, 1)
    samples[13] = reference[7]
    files, picture = (save("reference", reference), save("sample", samples)), tmp_path / "nearest.png"
    refused(*files, "--nearest", tmp_path / "nearest.svg")
    evaluate(*files, "--metrics", "saturation", "--nearest", picture)
    with Image.open(picture) as image:
        pixels = np.asarray(image)
    step = 2 * 34 + 4 + 24 + MARGIN                 # from a block to the next: images of 32 pixels, twice as large
    blocks = [pixels[MARGIN + 24 + 4 + step * row:][:64, MARGIN + 4:][:, :64] for row in range(2)]
    assert np.array_equal(*blocks) and np.array_equal(blocks[0][::2, ::2], reference[7])


def test_memory_benchmark_says_what_it_measured(capsys):
    arguments = ("--num_images", 30, "--reference_images", 20, "--image_size", 16, "--metrics", "fid,precision")
    assert call("benchmark_memory", *arguments) == 0
    assert re.fullmatch(r"30 images of 16x16 against 20, fid,precision: \d+ s, peak \d+ MiB\n", capsys.readouterr().out)


def test_a_folder_or_an_archive_of_pictures_is_evaluated_like_a_file(save, evaluate, tmp_path):
    images = clothes(20, 1)
    files = save("reference", clothes(30)), save("sample", images)
    (tmp_path / "pictures").mkdir()
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for index, image in enumerate(images):
            path = tmp_path / "pictures" / f"{index:03}.png"
            Image.fromarray(image).save(path)
            archive.write(path, path.name)
    np.save(tmp_path / "sample.npy", images)
    pictures = tmp_path / "pictures", tmp_path / "pictures.zip", tmp_path / "sample.npy"
    results = evaluate(*files, *pictures)[0]
    assert all(one == values(results)[0] for one in values(results))
    assert [result["sample"]["resolution"] for result in results] == ["32x32"] * 4
    assert values(evaluate(tmp_path / "pictures", files[1])[0])[0]["fid"] == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
def test_statistics_made_by_the_torch_inception_are_accepted(save, evaluate, refused, tmp_path):
    """They are told apart by the weights' SHA-256, whatever the network is called."""
    weights = write_weights(tmp_path / "w.safetensors")
    torch_backend = ("--backend", "torch", "--inception", weights)
    reference, sample = tmp_path / "made.npz", save("sample", clothes(6, 1))
    assert call("make_reference", save("images", clothes(6)), reference, *torch_backend) == 0
    stored = {name: BatchFile(reference).read(name) for name in BatchFile(reference).members if name != "arr_0"}
    renamed = save("renamed", clothes(6), **stored | {"backend": np.array("Inception of another name")})
    results, _ = evaluate(renamed, sample, "--metrics", "fid", backend=torch_backend)
    assert results[0]["reference"]["statistics"] == "stored" and values(results)[0]["fid"] > 0
    other = save("other", clothes(6), **stored | {"backend_sha256": np.array("1" * 64)})
    assert "its statistics are of the network" in refused(other, sample, "--metrics", "fid", backend=torch_backend)


# Several ranks


@pytest.mark.slow
@needs_mpi
def test_ranks_find_what_one_finds(python, save, evaluate, tmp_path):
    files = save("reference", clothes(50)), save("sample", clothes(41, 1))
    alone = values(evaluate(*files, "--batch_size", 8)[0])[0]
    ended = execute(BIN / "mpiexec", "-n", 2, python, "evaluations/evaluator.py", *files, *FASHION_MNIST,
                    "--batch_size", 8, "--json", tmp_path / "shared.json")
    assert ended.returncode == 0, ended.stderr
    assert json.loads((tmp_path / "shared.json").read_text())[0]["metrics"] == pytest.approx(alone, rel=1e-6, abs=1e-9)
    assert ended.stdout.count("FID: ") == 2
    ended = execute(BIN / "mpiexec", "-n", 2, python, "evaluations/evaluator.py", files[0], "missing.npz")
    assert ended.returncode in (2, 9)           # 9: mpiexec killed the other rank before that had ended by itself
    assert ended.stderr == "error: missing.npz: there is no such file\n"


# Making references


def test_reference_of_a_folder_of_pictures(tmp_path, capsys, caplog, refused):
    caplog.set_level("INFO")
    folder = tmp_path / "pictures" / "inner"
    folder.mkdir(parents=True)
    images = clothes(6)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number}.png")
    made = tmp_path / "made.npz"
    assert call("make_reference", tmp_path / "pictures", made, *FASHION_MNIST, "--num_images", 5) == 0
    assert str(made) in capsys.readouterr().out
    file = BatchFile(made)
    np.testing.assert_array_equal(file.read("arr_0"), images[:5])
    assert file.value("backend") == "embedded Fashion-MNIST classifier" and file.value("count") == 5
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(folder / "z.png")
    assert "z.png has 50x40 pixels" in refused(tmp_path / "pictures", made, script="make_reference")
    assert call("make_reference", tmp_path / "pictures", made, *FASHION_MNIST, "--image_size", 32) == 0
    assert len(BatchFile(made)) == 7 and "enlarged" not in caplog.text
    assert call("make_reference", tmp_path / "pictures", made, "--statistics", False, "--image_size", 36) == 0
    assert f"{tmp_path / 'pictures'}: 6 image(s) are enlarged to 36 pixels (first 0.png)" in caplog.messages


def test_reference_of_images_alone_with_their_classes(tmp_path, refused):
    for number, image in enumerate(clothes(6)):
        (tmp_path / "pictures" / f"kind{number % 3}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "pictures" / f"kind{number % 3}" / f"{number}.png")
    words = tmp_path / "pictures", tmp_path / "made.npz", "--statistics", False
    assert call("make_reference", *words, "--classes", "folders", "--num_images", 5) == 0
    file = BatchFile(tmp_path / "made.npz")
    assert set(file.members) == {"arr_0", "arr_1", "class_names"}
    np.testing.assert_array_equal(file.read("arr_0"), clothes(6)[[0, 3, 1, 4, 2]])
    assert file.labels.tolist() == [0, 0, 1, 1, 2] and file.read("class_names").tolist() == ["kind0", "kind1", "kind2"]
    assert "--keep features: must be images" in refused(*words, "--keep", "features", script="make_reference")
    assert "is no folder of pictures" in refused(tmp_path / "made.npz", tmp_path / "out.npz", "--classes", "prefix",
                                                 script="make_reference")


@pytest.mark.parametrize("names", [["cat", "dog", "hen"], None])
def test_a_reference_keeps_labels_where_it_keeps_images(save, tmp_path, refused, names):
    labels = np.array([2, 0, 1, 1, 2])
    source = save("source", clothes(5), arr_1=labels, **({"class_names": np.array(names)} if names else {}))
    words = "make_reference", source, tmp_path / "made.npz", *FASHION_MNIST
    assert call(*words, "--num_images", 4) == 0
    made = BatchFile(tmp_path / "made.npz")
    assert made.labels.tolist() == [2, 0, 1, 1]
    assert (made.read("class_names").tolist() if "class_names" in made.members else None) == names
    assert call(*words, "--keep", "features") == 0
    assert not {"arr_0", "arr_1", "class_names"} & BatchFile(tmp_path / "made.npz").members.keys()
    for arrays, message in (({"arr_1": np.zeros(5)}, "wrong.npz: arr_1 is (5,) float64, must be (5,) whole numbers"),
                            ({"arr_1": labels, "class_names": np.array(["cat", "dog"])}, "arr_1 has the class 2")):
        assert message in refused(save("wrong", clothes(5), **arrays), tmp_path / "made.npz", script="make_reference")


def test_labels_of_images_that_do_not_take_part_stop_nothing(save, evaluate, refused, tmp_path):
    """As those of a file whose last images another program labelled."""
    labels = np.array([*range(10), 3, 99])
    whole, cut = save("whole", clothes(12), arr_1=labels), save("cut", clothes(12)[:10], arr_1=labels[:10])
    words = ("--metrics", "class_accuracy")
    (of_first,), _ = evaluate("fmnist32", whole, *words, "--num_images", 10)
    (of_cut,), _ = evaluate("fmnist32", cut, *words)
    assert of_first["metrics"] == of_cut["metrics"]
    assert "whole.npz: arr_1 has labels 0 to 99, must be 0 to 9" in refused("fmnist32", whole, *words)
    named = save("named", clothes(12), arr_1=labels, class_names=np.array([str(number) for number in range(10)]))
    made = "make_reference", named, tmp_path / "made.npz", "--statistics", "False", "--num_images"
    assert call(*made, 10) == 0 and call(*made, 12) == 2
    assert BatchFile(tmp_path / "made.npz").labels.tolist() == list(range(10))


def test_a_reference_of_idx_files_keeps_their_labels(tmp_path):
    for name, values in (("images-idx3", np.arange(3 * 28 * 28).reshape(3, 28, 28)), ("labels-idx1", [7, 0, 2])):
        array = np.asarray(values, np.uint8)
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
        (tmp_path / f"t10k-{name}-ubyte").write_bytes(header + array.tobytes())
    assert call("make_reference", tmp_path, tmp_path / "made.npz", "--statistics", False) == 0
    assert BatchFile(tmp_path / "made.npz").labels.tolist() == [7, 0, 2]


@pytest.mark.parametrize("words, said", [
    (["--half", True], "--half (--keep images keeps no features)"),
    (["--half", True, "--keep", "features"], ""),
    (["--statistics", False], "--backend (--statistics False needs no network)"),
    (["--dtype", "bfloat16"], "--dtype (--backend fashion_mnist computes in one type)")])
def test_options_of_a_reference_without_effect_are_said(words, said, save, caplog, tmp_path):
    assert call("make_reference", save("images", clothes(5)), tmp_path / "made.npz", *FASHION_MNIST, *words) == 0
    assert [line for line in caplog.messages if "without" in line] == ([f"without effect: {said}"] if said else [])


def test_options_of_pictures_in_a_folder_are_refused_for_others(save, tmp_path, refused):
    np.save(tmp_path / "images.npy", clothes(5))
    (tmp_path / "idx").mkdir()
    (tmp_path / "idx" / "t10k-images-idx3-ubyte").touch()
    for source in (save("images", clothes(5)), tmp_path / "images.npy", tmp_path / "idx"):
        assert refused(source, tmp_path / "made.npz", "--image_size", 8, script="make_reference").endswith(
            f"--image_size 8: must be left out, {source} is no folder of pictures")
    (tmp_path / "photos.npz" / "cat").mkdir(parents=True)
    for index, image in enumerate(clothes(3)):
        Image.fromarray(image).save(tmp_path / "photos.npz" / "cat" / f"{index}.png")
    assert call("make_reference", tmp_path / "photos.npz", tmp_path / "made.npz", "--statistics", False, "--classes",
                "folders", "--image_size", 8) == 0
    assert BatchFile(tmp_path / "made.npz").resolution == "8x8"


@pytest.mark.parametrize("suffix", ["zip", "ZIP", "npy"])
def test_reference_of_an_archive_or_an_array(save, tmp_path, suffix):
    images, source = clothes(5), tmp_path / f"images.{suffix}"
    if suffix == "npy":
        np.save(source, images)
    else:
        with zipfile.ZipFile(source, "w") as archive:
            for index, image in enumerate(images):
                Image.fromarray(image).save(tmp_path / "x.png")
                archive.write(tmp_path / "x.png", f"{index}.png")
    assert call("make_reference", source, tmp_path / "made.npz", *FASHION_MNIST) == 0
    assert call("make_reference", save("images", images), tmp_path / "expected.npz", *FASHION_MNIST) == 0
    assert (tmp_path / "made.npz").read_bytes() == (tmp_path / "expected.npz").read_bytes()


def test_images_of_a_reference_do_not_stay_in_the_cache(tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()
    for index, image in enumerate(clothes(4)):
        Image.fromarray(image).save(tmp_path / "pictures" / f"{index}.png")

    def terminated(self, images):
        assert len(list((tmp_path / "cache").glob("*/images-*"))) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr("evaluations.extractors.fashion_mnist.FashionMnistClassifier.features", terminated)
    assert call("make_reference", tmp_path / "pictures", tmp_path / "made.npz", *FASHION_MNIST,
                "--cache", tmp_path / "cache") == 130
    assert list((tmp_path / "cache").iterdir()) == []


def test_two_references_of_one_name_may_share_a_cache(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index, image in enumerate(clothes(4) if name == "a" else 255 - clothes(4)):
            Image.fromarray(image).save(tmp_path / name / f"{index}.png")

    def make(name):
        words = [tmp_path / name, tmp_path / name / "made.npz", *FASHION_MNIST, "--cache", tmp_path / "cache"]
        assert call("make_reference", *words) == 0

    def meanwhile(self, images):
        monkeypatch.setattr(FashionMnistClassifier, "features", features)
        make("b")
        return features(self, images)

    features = FashionMnistClassifier.features
    monkeypatch.setattr(FashionMnistClassifier, "features", meanwhile)
    make("a")
    with np.load(tmp_path / "a" / "made.npz") as file:
        assert (file["arr_0"] == clothes(4)).all()


@pytest.mark.parametrize("words, message", [
    ([], "0 words given"),
    (["missing.npz", "out.npz"], "missing.npz: there is no such file"),
    (["missing", "out.npz"], "missing"),
    ([str(REPOSITORY / "evaluations" / "models" / "icons32_reference.npz"), "nowhere/out.npz"],
     "nowhere/out.npz: cannot be written"),
    (["fashion-mnist", "out.npz", "--keep", "all"], "--keep all: must be one of"),
])
def test_reference_that_cannot_be_made(words, message, refused):
    assert message in refused(*words, script="make_reference")


@pytest.mark.parametrize(("factor", "fits"), [(1.0, True), (1e6, False), (1e-11, False)])
def test_features_in_half_precision_are_refused_where_they_do_not_fit(factor, fits, save, monkeypatch, capsys):
    features = FashionMnistClassifier.features
    monkeypatch.setattr(FashionMnistClassifier, "features", lambda self, images: (
        found := features(self, images))._replace(pooled=found.pooled * np.float32(factor)))
    images = save("images", clothes(10))
    words = [images, images.with_name("out.npz"), *FASHION_MNIST, "--keep", "features", "--half", True]
    assert call("make_reference", *words) == (0 if fits else 2)
    assert ("do not fit into float16; leave it out" in capsys.readouterr().err) != fits
    assert images.with_name("out.npz").exists() == fits


# What is refused


def test_files_that_are_refused(save, refused, tmp_path):
    good, text = save("good", clothes(10)), tmp_path / "text.npz"
    text.write_text("text")
    np.savez(tmp_path / "float.npz", arr_0=clothes(10) / np.float32(255))
    np.savez(tmp_path / "grey.npz", arr_0=clothes(10)[..., :1])
    np.savez(tmp_path / "pickle.npz", arr_0=np.array([None]))
    bright = save("bright", clothes(10) // 200)
    for path, words in ((tmp_path / "missing.npz", "no such file"), (text, "not an .npz"),
                        (save("empty"), "no images"), (tmp_path / "float.npz", "uint8 from 0 to 255"),
                        (tmp_path / "grey.npz", "must be (N, H, W, 3)"), (tmp_path / "pickle.npz", "pickled"),
                        (save("few", clothes(3)), "has 3 images"), (bright, "not 0 to 1"),
                        (save("large", np.zeros((10, 64, 64, 3), np.uint8) + 9), "(1, 64, 64, 3)")):
        message = refused(good, path)
        assert words in message, message
        assert str(path) in message or path.name == "large.npz"
    for path, words in ((text, "not an .npz"), (save("few", clothes(3)), "has 3 images"), (save("empty"), "no images"),
                        (save("half", clothes(10), mu=np.zeros(64)), "has no sigma"),
                        (save("foreign", clothes(10), mu=np.zeros(2048), sigma=np.eye(2048)), "Inception's"),
                        (save("other", clothes(10), backend=np.array("torch Inception 2015")), "another --backend")):
        assert words in refused(path, good)


def test_no_file_that_is_read_or_written_is_replaced(save, refused, tmp_path):
    good, other = save("good", clothes(10), arr_1=np.arange(10)), save("other", clothes(12))
    picture = tmp_path / "a.png"
    before = good.read_bytes()
    lost = "is another file of this command, which would be lost"
    for words in ((good, other, "--json", good), (good, other, "--json", other.parent / "." / other.name),
                  (good, other, "--plot", picture, "--nearest", picture),
                  (good, other, "--held_out", save("held_out", clothes(10)), "--json", tmp_path / "held_out.npz")):
        assert lost in refused(*words)
    assert lost in refused(good, good, script="make_reference")
    assert lost in refused(good, "--json", good, script="class_accuracy", backend=())
    assert good.read_bytes() == before


def stored(**arrays):
    """A reference of the network of the tests, with statistics and these arrays."""
    return {"mu": np.zeros(64), "sigma": np.eye(64), "backend": np.array("embedded Fashion-MNIST classifier")} | arrays


@pytest.mark.parametrize("arrays, message", [
    (stored(pooled=np.zeros(64, np.float32)), "pooled is (64,) float32, it must hold floating-point numbers of each"),
    (stored(pooled=np.array([["a"] * 64] * 12)), "pooled is (12, 64) <U1"),
    (stored(pooled=np.full((12, 64), np.nan, np.float16)), "pooled must be finite numbers"),
    (stored(pooled=np.zeros((1, 64), np.float32)), "pooled has 1 images, --metrics"),
    (stored(pooled=np.zeros((12, 3), np.float32)), "its pooled features have 3 numbers an image, the features of"),
    (stored(mu=np.zeros(7), sigma=np.eye(7)), "reference.npz: its pooled statistics have 7 numbers an image, the"),
    (stored(sigma=np.triu(np.ones((64, 64)))), "reference.npz: sigma1 is not a covariance"),
    (stored(backend=np.array(4)), "backend must be a single word"),
    (stored(count=np.array(-5)), "count is -5, it must be the number of images"),
    (stored(count=np.array("x")), "count must be a single whole number"),
    ({"pictures": clothes(10), "names": np.zeros(3)}, "its arrays are: pictures, names"),
])
def test_references_that_are_refused(arrays, message, save, refused):
    reference = save("reference", **arrays)
    words = ("--metrics", "fid,precision" if "pooled" in arrays or "pictures" in arrays else "fid", "--batch_size", 64)
    assert message in refused(reference, save("sample", clothes(10)), *words)


def test_files_that_do_not_fit_are_told_before_the_network_sees_more_than_their_first_images(
        save, refused, monkeypatch):
    seen, real = [], FashionMnistClassifier.features

    def features(self, images):
        seen.append(len(images))
        return real(self, images)

    monkeypatch.setattr(FashionMnistClassifier, "features", features)
    good, narrow = save("good", clothes(10)), np.zeros((12, 3), np.float32)
    statistics = stored(mu=np.zeros(7), sigma=np.eye(7))
    for reference, sample, words, message in (
            (save("rows", clothes(12), **stored(pooled=narrow)), good, ("--metrics", "is,precision"),
             "rows.npz: its pooled features have 3 numbers"),
            (save("drawn", clothes(12), **stored(pooled=narrow)), good,
             ("--metrics", "fid", "--plot", good.with_suffix(".png")),
             "drawn.npz: its pooled features have 3 numbers"),
            (save("reference", clothes(12), **statistics), good, ("--metrics", "fid,sfid"),
             "reference.npz: its pooled statistics have 7 numbers"),
            (good, save("sample", clothes(12), **statistics), ("--metrics", "fid"),
             "sample.npz: its pooled statistics have 7 numbers"),
            (good, save("large", np.zeros((10, 64, 64, 3), np.uint8) + 9), ("--metrics", "is"), "64, 64, 3")):
        seen.clear()
        assert message in refused(reference, sample, *words)
        assert set(seen) <= {1} and len(seen) <= 2


def test_what_a_picture_needs_is_told_before_the_work_and_numbers_are_written_before_it(
        save, evaluate, refused, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    good, few, bare = save("good", clothes(12)), save("few", clothes(5)), save("bare", **stored())
    picture = tmp_path / "picture.png"
    monkeypatch.setattr(FashionMnistClassifier, "features", None)
    for files, words, message in (
            ((good, few), ("--plot", picture), "few.npz: has 5 images, --plot"),
            ((good, good), ("--num_images", 5, "--plot", picture), "good.npz: has 5 images, --plot"),
            ((save("five", **stored(pooled=np.eye(5, 64))), good), ("--plot", picture), "pooled: has 5 images, --plot"),
            ((bare, good), ("--plot", picture), f"--plot {picture}: {bare} has neither images (arr_0) nor pooled"),
            ((save("other", clothes(8), **stored(pooled=np.eye(12, 64))), good), ("--nearest", picture),
             "other.npz has 8 images, and pooled features of 12")):
        message_found = refused(*files, "--metrics", "fid", *words)
        assert message in message_found, message_found
    monkeypatch.undo()
    monkeypatch.setattr("evaluations.evaluation.plot_evaluation", None)
    with pytest.raises(TypeError):
        call("evaluate", good, good, *FASHION_MNIST, "--metrics", "fid", "--plot", picture, "--json",
             tmp_path / "kept.json")
    assert json.loads((tmp_path / "kept.json").read_text())[0]["metrics"].keys() == {"fid"}


def test_a_sample_file_without_images_is_told_with_its_arrays(save, refused):
    message = refused(save("reference", clothes(10)), save("sample", x=np.zeros(2), y=np.zeros(2)))
    assert message.endswith("sample.npz: has no images, arr_0 must be (N, H, W, 3) uint8; its arrays are: x, y")


@pytest.mark.parametrize("words, message", [
    ([], "0 files given"),
    (["good.npz"], "1 files given"),
    (["fmnist", "good.npz"], "no bundled reference of that name (did you mean fmnist32?)"),
    (["good.npz", "good.npz", "--metrics", "fit"], "'fit' is none of is, fid, sfid"),
    (["good.npz", "good.npz", "--metrics", ""], "is none of"),
    (["good.npz", "good.npz", "--backend", "keras"], "--backend keras: must be one of torch, tensorflow, embedded"),
    (["good.npz", "good.npz", "--num_images", "11"], "--num_images 11: "),
    (["good.npz", "good.npz", "--batch_size", "0"], "--batch_size 0"),
    (["good.npz", "good.npz", "--bootstrap", "1"], "--bootstrap 1"),
    (["good.npz", "good.npz", "--device", "abacus"], "--device abacus"),
    (["good.npz", "good.npz", "--json", "/nowhere/x.json"], "--json /nowhere/x.json: cannot be written"),
    (["good.npz", "good.npz", "--plot", "x.gif"], "--plot x.gif: must end in .png"),
    (["good.npz", "good.npz", "--inception", "/nowhere.pb", "--backend", "torch"], "/nowhere.pb"),
    (["good.npz", "good.npz", "--precision_recall", "half"], "must be one of exact, official"),
])
def test_options_that_are_refused(words, message, save, refused):
    good = save("good", clothes(10))
    backend = () if "--backend" in words else FASHION_MNIST
    assert message in refused(*(good if word == "good.npz" else word for word in words), backend=backend)


def test_features_that_are_not_numbers_end_it(save, refused, monkeypatch):
    from evaluations.extractors.fashion_mnist import FashionMnistClassifier

    real = FashionMnistClassifier.features

    def broken(self, images):
        features = real(self, images)
        features.pooled[2:3] = np.nan
        return features

    monkeypatch.setattr(FashionMnistClassifier, "features", broken)
    files = save("reference", clothes(10)), save("sample", clothes(10))
    assert "reference.npz: the pooled features of image 2 are not finite" in refused(*files, "--batch_size", 32)
