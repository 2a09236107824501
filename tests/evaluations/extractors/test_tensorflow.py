import importlib.util
import sys

import numpy as np
import pytest
from golden import GOLDEN, relative_error
from synthetic_inception import make_synthetic_graph

from evaluations.extractors.inception import InceptionExtractor
from evaluations.extractors.tensorflow import TensorflowExtractor
from guided_diffusion.errors import UserError

needs_tensorflow = pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None,
                                      reason="tensorflow is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def graph_file(tmp_path_factory):
    """The graph of public_graph_w8."""
    path = tmp_path_factory.mktemp("graph") / "w8.pb"
    path.write_bytes(make_synthetic_graph().build_graph_def(12, 8).SerializeToString())
    return path


@needs_tensorflow
@pytest.mark.slow
def test_tensorflow_and_torch_agree(graph_file, tmp_path):
    pytest.importorskip("tensorboard")
    ours, theirs = InceptionExtractor(graph_file, cache=tmp_path), TensorflowExtractor(graph_file)
    assert ours.fingerprint == theirs.fingerprint
    assert ours.name != theirs.name
    random = np.random.default_rng(0)
    for shape in ((3, 32, 32), (1, 50, 75), (2, 299, 299), (2, 420, 333)):
        images = random.integers(0, 256, (*shape, 3), np.uint8)
        for actual, expected in zip(ours.features(images), theirs.features(images), strict=True):
            assert actual.shape == expected.shape
            assert actual.dtype == expected.dtype == np.float32
            assert relative_error(actual, expected) < 1e-4


@needs_tensorflow
@pytest.mark.slow
def test_golden_graph(graph_file):
    network = TensorflowExtractor(graph_file)
    with np.load(GOLDEN / "eval" / "public_graph_w8.npz") as golden:
        for size in ("s32", "s128"):
            features = network.features(golden[f"{size}_images"])
            assert relative_error(features.pooled, golden[f"{size}_pool"]) < 1e-5
            assert relative_error(features.spatial, golden[f"{size}_spatial"]) < 1e-5
    with pytest.raises(UserError, match=r"must be \(N, H, W, 3\), uint8"):
        network.features(np.zeros((2, 8, 8), np.uint8))


@needs_tensorflow
@pytest.mark.slow
def test_wrong_files(graph_file, tmp_path):
    content = graph_file.read_bytes()
    for wrong in (b"", b"no graph at all" * 100, content[:100_000], content.replace(b"mixed_6/conv", b"mixed_6/othe")):
        (tmp_path / "wrong.pb").write_bytes(wrong)
        with pytest.raises(UserError, match=r"wrong\.pb: is not the 2015 Inception, or is truncated") as error:
            TensorflowExtractor(tmp_path / "wrong.pb")
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"--inception .*none.pb: no such file"):
        TensorflowExtractor(tmp_path / "none.pb")
    (tmp_path / "converted.safetensors").touch()
    with pytest.raises(UserError, match="TensorFlow needs the graph itself"):
        TensorflowExtractor(tmp_path / "converted.safetensors")


@needs_tensorflow
@pytest.mark.slow
def test_damaged_weights_are_noticed(tmp_path):
    module = make_synthetic_graph()
    values = module.synthetic_weights(12, 8)
    values["conv/batchnorm/beta"][0] = np.nan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "synthetic_weights", lambda *_: values)
        (tmp_path / "nan.pb").write_bytes(module.build_graph_def(12, 8).SerializeToString())
    with pytest.raises(UserError, match="not finite"):
        TensorflowExtractor(tmp_path / "nan.pb").features(np.zeros((1, 8, 8, 3), np.uint8))


def test_missing_tensorflow_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow.compat.v1", None)
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(UserError, match=r"--backend tensorflow needs the package tensorflow .*pip install"):
        TensorflowExtractor()
