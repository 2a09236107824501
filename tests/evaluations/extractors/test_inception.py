import gzip
import hashlib
import json
import os
import re
import socket
import sys

import numpy as np
import pytest
import torch
from commands import REPOSITORY, finish
from golden import GOLDEN, relative_error
from local_server import serving
from synthetic_inception import constants, graph, write_weights

from evaluations.extractors import inception_graph
from evaluations.extractors.inception import InceptionExtractor, check_finite, resize
from evaluations.extractors.inception_graph import FILE_NAME, find_graph, fold, is_here, load_weights, parse_graph
from evaluations.features import Features
from guided_diffusion.errors import UserError

OUTPUTS = ("pool", "spatial", "softmax")


def golden_images(count, size, seed):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Converted weights of the golden graphs: a function of their seed and width."""
    folder, made = tmp_path_factory.mktemp("inception"), {}

    def file(seed, width_div):
        if (seed, width_div) not in made:
            made[seed, width_div] = write_weights(folder / f"{seed}-{width_div}.safetensors", seed, width_div)
        return made[seed, width_div]

    return file


@pytest.fixture(scope="module")
def small(files):
    """The network of public_graph_w8, an eighth as wide."""
    return InceptionExtractor(files(12, 8))


# --- what the network says

@pytest.mark.parametrize("file, seed, width_div", [
    ("public_graph_w8", 12, 8), pytest.param("public_graph", 11, 1, marks=pytest.mark.slow)])
def test_golden_graphs(files, file, seed, width_div):
    network = InceptionExtractor(files(seed, width_div))
    with np.load(GOLDEN / "eval" / f"{file}.npz") as golden:
        sizes = [size for size in ("s32", "s128") if f"{size}_images" in golden]
        assert sizes
        for size in sizes:
            features = dict(zip(OUTPUTS, network.features(golden[f"{size}_images"]), strict=True))
            for output in OUTPUTS:
                if f"{size}_{output}" in golden:
                    assert features[output].dtype == np.float32
                    assert features[output].shape == golden[f"{size}_{output}"].shape
                    assert relative_error(features[output], golden[f"{size}_{output}"]) < 1e-4
            assert features["softmax"].shape == (4, 1008)
            assert np.allclose(features["softmax"].sum(axis=1), 1, atol=1e-5)


@pytest.mark.slow
def test_golden_end_to_end(files):
    case = json.loads((GOLDEN / "eval" / "public_e2e.json").read_text())
    images = {"np": np}
    exec(case["recipe"], images)
    network = InceptionExtractor(files(case["weights_seed"], 1))
    with np.load(GOLDEN / "eval" / "public_e2e.npz") as golden:
        for side in ("ref", "sample"):
            features = network.features(images[side][:8])          # of the others, the evaluator's test sees the FID
            kept = len(golden[f"{side}_pool"][:8])
            assert relative_error(features.pooled[:kept], golden[f"{side}_pool"][:8]) < 1e-4
            assert relative_error(features.spatial[:kept, ::17], golden[f"{side}_spatial"][:8]) < 1e-4
        assert relative_error(features.probabilities[:4], golden["sample_softmax"]) < 1e-4


def test_spatial_features_have_the_order_height_width_channel(small):
    with np.load(GOLDEN / "eval" / "public_graph_w8.npz") as golden:
        spatial, expected = small.features(golden["s128_images"]).spatial, golden["s128_spatial"]
    channels_first = spatial.reshape(-1, 17, 17, 7).transpose(0, 3, 1, 2).reshape(len(spatial), -1)
    assert relative_error(spatial, expected) < 1e-4
    assert relative_error(channels_first, expected) > 0.1


def test_features_of_an_image_are_its_own(small):
    images = golden_images(11, 40, seed=0)
    together, order = small.features(images), np.random.default_rng(1).permutation(11)
    for other in ([small.features(image[None]) for image in images[order]], [small.features(images[order])]):
        for all_at_once, parts in zip(together, zip(*other, strict=True), strict=True):
            assert relative_error(np.concatenate(parts), all_at_once[order]) < 1e-5


def test_several_threads_say_the_same(files, small):
    images, before = golden_images(7, 33, seed=2), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        network = InceptionExtractor(files(12, 8))
        features = network.features(images)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    for actual, expected in zip(features, small.features(images), strict=True):
        assert relative_error(actual, expected) < 1e-5


def test_other_formats(files, small):
    images = golden_images(2, 64, seed=3)
    expected = small.features(images)
    for options, tolerance in (({"channels_last": False}, 1e-5), ({"dtype": "bfloat16"}, 0.05)):
        for actual, wanted in zip(InceptionExtractor(files(12, 8), **options).features(images), expected, strict=True):
            assert actual.dtype == np.float32
            assert relative_error(actual, wanted) < tolerance
    with pytest.raises(UserError, match="dtype float16: must be one of float32, bfloat16"):
        InceptionExtractor(files(12, 8), dtype="float16")


@pytest.mark.parametrize("device", ["gpu", "meta:x", "cuda:99"])
def test_wrong_device(device):
    with pytest.raises(UserError, match=f"device {device}: cannot be used"):
        InceptionExtractor(device=device)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"--inception .*none.pb: no such file"):
        InceptionExtractor(tmp_path / "none.pb")


@pytest.mark.parametrize("images", [
    np.zeros((2, 8, 8, 3), np.float32), np.zeros((2, 8, 8, 4), np.uint8), np.zeros((2, 8, 8), np.uint8),
    np.zeros((0, 8, 8, 3), np.uint8), np.zeros((2, 3, 8, 8), np.uint8)])
def test_wrong_images(small, images):
    with pytest.raises(UserError, match=r"must be \(N, H, W, 3\), uint8"):
        small.features(images)


def test_features_that_are_not_finite_name_the_image():
    features = Features(np.ones((5, 2), np.float32), np.ones((5, 3, 2), np.float32), np.ones((5, 4), np.float32))
    check_finite(features)
    for bad in (np.nan, np.inf):
        features.spatial[3, 1, 0] = bad
        with pytest.raises(UserError, match="image 3 of a batch of 5: its features are not finite"):
            check_finite(features)


def test_damaged_weights_are_noticed(tmp_path):
    values = constants()
    values["mixed_10/conv/batchnorm/beta"][0] = np.nan
    weights = inception_graph.Weights(fold(values), "0" * 64, 1)
    inception_graph.write_converted(weights, tmp_path / "nan.safetensors")
    with pytest.raises(UserError, match=r"image 0 .* not finite"):
        InceptionExtractor(tmp_path / "nan.safetensors").features(np.zeros((1, 8, 8, 3), np.uint8))


# --- the resize

@pytest.mark.parametrize("height, width", [(1, 1), (32, 32), (20, 31), (299, 299), (400, 299), (613, 1024)])
def test_resize_is_tensorflows(height, width):
    images = np.random.default_rng(height).integers(0, 256, (2, height, width, 3), np.uint8)
    resized = resize(torch.from_numpy(images)).permute(0, 2, 3, 1).numpy()
    assert resized.shape == (2, 299, 299, 3)
    for row, column in ((0, 0), (1, 2), (150, 77), (298, 298), (297, 0)):
        y, x = row * height / 299, column * width / 299
        top, left = int(y + 1e-6), int(x + 1e-6)
        bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
        upper, lower = ((1 - (x - left)) * images[:, at, left] + (x - left) * images[:, at, right]
                        for at in (top, bottom))
        expected = ((1 - (y - top)) * upper + (y - top) * lower - 128) / 128
        assert np.abs(resized[:, row, column] - expected).max() < 2e-4


# --- the weights in the graph

@pytest.fixture
def values():
    return constants()


def tensorboard():
    return pytest.importorskip("tensorboard.compat.proto.graph_pb2", reason="tensorboard is not installed")


def test_graph_gives_the_weights(values):
    tensorboard()
    read = parse_graph(graph(values).SerializeToString(), "graph.pb")
    expected = fold(values)
    assert read.keys() == expected.keys()
    assert len(expected) == 2 * 94 + 1
    assert all(torch.allclose(read[name], expected[name], rtol=1e-6) for name in expected)


def test_batch_norm_is_folded(values):
    folded, name = fold(values), "mixed_9/tower/mixed/conv"
    x = torch.randn(2, values[f"{name}/conv2d_params"].shape[2], 5, 6)
    weight = torch.from_numpy(values[f"{name}/conv2d_params"]).permute(3, 2, 0, 1)
    mean, variance, gamma, beta = (torch.from_numpy(values[f"{name}/batchnorm/{part}"]) for part in
                                   ("moving_mean", "moving_variance", "gamma", "beta"))
    expected = torch.nn.functional.batch_norm(torch.nn.functional.conv2d(x, weight), mean, variance, gamma, beta,
                                              eps=0.001)
    actual = torch.nn.functional.conv2d(x, folded[f"{name}.weight"], folded[f"{name}.bias"])
    assert torch.allclose(actual, expected, atol=1e-5)


def test_what_the_graph_says_of_its_norms_counts(values):
    tensorboard()
    ungained = {name: np.ones_like(value) if name.endswith("gamma") else value for name, value in values.items()}
    read = parse_graph(graph(values, scale_after_normalization=False).SerializeToString(), "graph.pb")
    assert torch.allclose(read["conv.weight"], fold(ungained)["conv.weight"])
    read = parse_graph(graph(values, epsilon=0.5).SerializeToString(), "graph.pb")
    shifted = {name: value + np.float32(0.499) if name.endswith("variance") else value
               for name, value in values.items()}
    assert torch.allclose(read["conv.weight"], fold(shifted)["conv.weight"], rtol=1e-5)


def test_constants_as_lists_of_numbers(values):
    tensorboard()
    values["conv/batchnorm/beta"][:] = [1, 2, *[3] * (len(values["conv/batchnorm/beta"]) - 2)]
    written = graph(values)
    for node in written.node:
        if node.name == "conv/batchnorm/beta":
            node.attr["value"].tensor.tensor_content = b""
            node.attr["value"].tensor.float_val.extend([1, 2, 3])
    assert torch.equal(parse_graph(written.SerializeToString(), "graph.pb")["conv.bias"], fold(values)["conv.bias"])


@pytest.mark.parametrize("content, message", [
    (b"", "is not the 2015 Inception, it has no node softmax/weights"),
    (b"no graph at all" * 100, "is not a TensorFlow graph, or is truncated"),
    (gzip.compress(b"a graph", mtime=0), "compressed with gzip"),
])
def test_files_that_are_no_graphs(tmp_path, content, message):
    tensorboard()
    path = tmp_path / "graph.pb"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_weights(path, tmp_path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("share", [0.3, 0.999])
def test_truncated_graph(values, share):
    tensorboard()
    content = graph(values).SerializeToString()
    with pytest.raises(UserError, match=r"or is truncated|is not the 2015 Inception"):
        parse_graph(content[:int(share * len(content))], "graph.pb")


def without(values, name):
    return {key: value for key, value in values.items() if name not in key}


@pytest.mark.parametrize("change, message", [
    (lambda v: {f"InceptionV3/{name}": value for name, value in v.items()}, "no node softmax/weights"),
    (lambda v: {"softmax/weights": v["softmax/weights"]}, "no node conv/conv2d_params"),
    (lambda v: without(v, "mixed_4/conv/batchnorm/beta"), "no node mixed_4/conv/batchnorm/beta"),
    (lambda v: without(v, "mixed_10/tower/conv/"), "mixed_10/tower/conv is missing"),
    (lambda v: {**v, "mixed_6/tower/conv_1/conv2d_params": v["mixed_6/tower/conv_2/conv2d_params"]},
     "do not fit together"),
    (lambda v: {**v, "conv/conv2d_params": v["conv/conv2d_params"][:2]}, r"conv has a kernel of \(2, 3\)"),
    (lambda v: {**v, "conv_1/conv2d_params": v["conv_1/conv2d_params"][:, :, :-1]}, "2015 Inception"),
    (lambda v: {**v, "softmax/weights": v["softmax/weights"][1:]}, "2015 Inception"),
    (lambda v: {**v, "conv/batchnorm/beta": np.int32(v["conv/batchnorm/beta"])}, "not a float32 constant"),
    (lambda v: {**v, "Sub/y": np.float32(127.5)}, "its node Sub/y is not 128"),
])
def test_other_networks(tmp_path, values, change, message):
    tensorboard()
    (tmp_path / "other.pb").write_bytes(graph(change(values)).SerializeToString())
    with pytest.raises(UserError, match=message) as error:
        InceptionExtractor(tmp_path / "other.pb", cache=tmp_path)
    assert str(error.value).startswith(str(tmp_path / "other.pb"))
    assert "\n" not in str(error.value)


def test_reading_needs_tensorboard_and_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.graph_pb2", None)
    with pytest.raises(UserError, match=r"graph\.pb needs the package tensorboard .*pip install"):
        parse_graph(b"", "graph.pb")


def test_reading_does_not_bring_tensorflow(python):
    tensorboard()
    code = ("import sys\nfrom evaluations.extractors import inception\n"
            "assert 'tensorboard' not in sys.modules\n"
            "try: inception.load_weights.__globals__['parse_graph'](b'', 'graph')\n"
            "except ValueError: pass\n"
            "assert 'tensorboard' in sys.modules and 'tensorflow' not in sys.modules")
    ended = finish([python, "-c", code], cwd=REPOSITORY)
    assert ended.returncode == 0, ended.stderr


# --- the cache

@pytest.fixture
def graph_file(tmp_path, values):
    tensorboard()
    path = tmp_path / "given" / "graph.pb"
    path.parent.mkdir()
    path.write_bytes(graph(values).SerializeToString())
    return path


def test_converted_once(tmp_path, graph_file, monkeypatch):
    first = load_weights(graph_file, tmp_path / "cache")
    assert first.sha256 == hashlib.sha256(graph_file.read_bytes()).hexdigest()
    assert first.size == graph_file.stat().st_size
    monkeypatch.setattr(inception_graph, "parse_graph", lambda *_: pytest.fail("converted again"))
    converted, = (tmp_path / "cache").iterdir()
    for path in (graph_file, converted):
        again = load_weights(path, tmp_path / "cache")
        assert (again.sha256, again.size) == (first.sha256, first.size)
        assert all(torch.equal(again.tensors[name], first.tensors[name]) for name in first.tensors)
    assert InceptionExtractor(converted).fingerprint == first.sha256


def test_another_graph_is_converted_anew(tmp_path, graph_file):
    first = load_weights(graph_file, tmp_path / "cache")
    graph_file.write_bytes(graph(constants(seed=5)).SerializeToString())
    second = load_weights(graph_file, tmp_path / "cache")
    assert first.sha256 != second.sha256
    assert not torch.equal(first.tensors["conv.bias"], second.tensors["conv.bias"])


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip, lambda path: path.write_bytes(b""),
                                    lambda path: path.write_bytes(b"something else" * 100)])
def test_damaged_conversion(tmp_path, graph_file, damage):
    first = load_weights(graph_file, tmp_path / "cache")
    converted, = (tmp_path / "cache").iterdir()
    damage(converted)
    with pytest.raises(UserError, match=f"{converted}: is damaged, or not a converted"):
        load_weights(converted)
    again = load_weights(graph_file, tmp_path / "cache")
    assert all(torch.equal(again.tensors[name], first.tensors[name]) for name in first.tensors)
    assert load_weights(converted).sha256 == first.sha256
    assert list((tmp_path / "cache").iterdir()) == [converted]


def test_cache_that_cannot_be_written(tmp_path, graph_file):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="cannot be written .*, the graph will be converted again"):
        weights = load_weights(graph_file, tmp_path / "file" / "cache")
    assert len(weights.tensors) == 2 * 94 + 1


def test_default_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert inception_graph.default_cache() == tmp_path / "guided-pixels"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert inception_graph.default_cache() == tmp_path / "home" / ".cache" / "guided-pixels"


# --- the download

CONTENT = bytes(range(256)) * 4000


@pytest.fixture(scope="module")
def server():
    with serving() as server:
        server.add("/whole", CONTENT)
        yield server.url


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


def test_downloaded_once(server, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inception_graph, "URL", f"{server}/whole")
    monkeypatch.setattr(inception_graph, "SIZE", len(CONTENT))
    path = find_graph(cache=tmp_path / "new" / "cache")
    assert path == tmp_path / "new" / "cache" / FILE_NAME
    assert path.read_bytes() == CONTENT
    progress = capsys.readouterr().err
    assert f"downloading {FILE_NAME}" in progress
    assert "B/s" in progress
    monkeypatch.setattr(inception_graph, "URL", f"{server}/none")
    assert find_graph(cache=tmp_path / "new" / "cache") == path
    assert os.listdir(path.parent) == [FILE_NAME]


def test_no_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        free = listening.getsockname()[1]
    monkeypatch.setattr(inception_graph, "URL", f"http://127.0.0.1:{free}/{FILE_NAME}")
    with pytest.raises(UserError, match=r"cannot be reached \(Connection refused\)") as error:
        InceptionExtractor(cache=tmp_path)
    assert f"put it at {tmp_path / FILE_NAME}, or name it with --inception PATH" in str(error.value)
    assert os.listdir(tmp_path) == []


def test_the_file_that_the_official_evaluator_left_in_the_current_folder(server, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    cache, here = tmp_path / "cache", tmp_path / "here" / FILE_NAME
    monkeypatch.setattr(inception_graph, "URL", f"{server}/none")
    monkeypatch.setattr(inception_graph, "SIZE", len(CONTENT))
    monkeypatch.setattr(inception_graph, "default_cache", lambda: cache)
    here.parent.mkdir()
    monkeypatch.chdir(here.parent)
    assert not is_here()
    here.write_bytes(CONTENT)
    assert is_here() and not is_here("elsewhere.pb")
    assert find_graph().read_bytes() == CONTENT
    assert caplog.messages == [f"--inception is not given: {here} is read"] and not cache.exists()
    caplog.clear()
    here.write_bytes(CONTENT[:-1])                      # of another network, or part of it
    assert not is_here()
    skipped = f"{here} has {len(CONTENT) - 1:,} bytes instead of {len(CONTENT):,} and is not read"
    with pytest.raises(UserError, match=f"or name it with --inception PATH; {re.escape(skipped)}$"):
        find_graph()
    assert caplog.messages == [skipped]
    (cache / FILE_NAME).write_bytes(CONTENT)
    caplog.clear()
    assert find_graph() == cache / FILE_NAME and not caplog.messages


def test_incomplete_file_in_the_cache(tmp_path):
    (tmp_path / FILE_NAME).write_bytes(b"part of it")
    with pytest.raises(UserError, match="has 10 bytes instead of 95,673,916, delete it"):
        find_graph(cache=tmp_path)
