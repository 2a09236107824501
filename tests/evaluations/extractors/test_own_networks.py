"""Networks that users bring: TorchScript and ONNX files with their YAML, functions, their features, and refusals."""

import importlib
import json
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import call
from PIL import Image
from torch import nn

from evaluations.extractor_options import ExtractorOptions, load_extractor
from evaluations.extractors import EXTRACTORS, ExtractorKind, check_backend, find_extractor
from evaluations.metrics import Feature, mind
from guided_diffusion.errors import UserError
from guided_diffusion.fetch import sha256_of
from guided_diffusion.network_inputs import read_preparation
from guided_diffusion.npz import BatchFile, write_batch
from guided_diffusion.steadiness import check_steady

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")        # old, and what people have

SETTINGS = """
input_size: [6, 8]
resize: bilinear
range: [-1, 1]
mean: [0.1, 0.2, 0.3]
std: 0.5
"""


class Tiny(nn.Module):
    """Four features, a map, logits and a depth map of an image."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        with torch.no_grad():
            self.conv.weight.copy_(torch.linspace(-1, 1, 108).sin().view(4, 3, 3, 3))
            self.conv.bias.copy_(torch.linspace(-0.1, 0.1, 4))

    def forward(self, x):
        found = self.conv(x).relu()
        return found.mean(dim=(2, 3)), found, found.amax(dim=(2, 3)), x.mean(dim=1)


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (30, 12, 12, 3), np.uint8)


@pytest.fixture
def torchscript(tmp_path):
    """Writes the tiny network with its settings; returns the word of --backend."""
    def torchscript(settings=SETTINGS, name="tiny.pt"):
        with torch.no_grad():
            torch.jit.trace(Tiny(), torch.zeros(1, 3, 6, 8)).save(str(tmp_path / name))
        (tmp_path / name).with_suffix(".yaml").write_text(settings)
        return str(tmp_path / name)
    return torchscript


def expected(images):
    """Pooled features by the settings above, one image at a time."""
    rows = []
    for image in images:
        resized = [np.asarray(Image.fromarray(image[..., c].astype(np.float32)).resize((8, 6), Image.BILINEAR))
                   for c in range(3)]
        x = np.stack(resized) / 127.5 - 1
        x = (x - np.array([0.1, 0.2, 0.3])[:, None, None]) / 0.5
        with torch.no_grad():
            rows.append(Tiny()(torch.tensor(x[None], dtype=torch.float32))[0][0].numpy())
    return np.array(rows)


def test_a_torchscript_file_sees_images_as_its_settings_say(torchscript, images):
    kind = find_extractor(torchscript())
    assert kind.outputs == {Feature.POOLED} and not kind.estimates_depth
    extractor = kind.load(device="cpu")
    assert (extractor.name, extractor.fingerprint) == ("tiny.pt", sha256_of(kind.name))
    features = extractor.features(images)
    assert features.pooled == pytest.approx(expected(images), abs=1e-5)
    assert features.spatial.shape == features.probabilities.shape == (30, 0)


def test_outputs_are_named_by_number(torchscript, images):
    word = torchscript(SETTINGS + "outputs: {pooled: 1, spatial: 1, logits: 2, depth: 3}\ndepth_range: [max, min]\n")
    kind = find_extractor(word)
    assert kind.estimates_depth and Feature.PROBABILITIES in kind.outputs
    features, depth = kind.load(device="cpu").features_and_depth(images)
    assert features.pooled == pytest.approx(expected(images), abs=1e-5)         # the mean over the map's places
    assert features.spatial.shape == (30, 4 * 4 * 6)
    assert features.probabilities.sum(axis=1) == pytest.approx(1)
    assert depth.shape == (30, 32, 32) and depth.min() >= -1 and depth.max() <= 1


def test_depth_is_read_as_the_range_says(torchscript):
    word = torchscript("outputs: {pooled: 0, depth: 3}\ndepth_range: [1, 0]\n")
    images = np.zeros((2, 32, 32, 3), np.uint8)
    images[:, :, 16:] = 255                                                     # 1: the nearest
    _, depth = find_extractor(word).load(device="cpu").features_and_depth(images)
    assert (depth[:, :, :16] == 1).all() and (depth[:, :, 16:] == -1).all()


@pytest.mark.parametrize("batch", ["N", 4], ids=["of any size", "of 4"])
def test_an_onnx_file_sees_images_as_its_settings_say(tmp_path, images, batch, monkeypatch):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    weights = [onnx.numpy_helper.from_array(value.detach().numpy(), name)
               for name, value in Tiny().conv.named_parameters()]
    nodes = [onnx.helper.make_node("Conv", ["image", "weight", "bias"], ["map"]),
             onnx.helper.make_node("Relu", ["map"], ["positive"]),
             onnx.helper.make_node("GlobalAveragePool", ["positive"], ["features"])]
    graph = onnx.helper.make_graph(
        nodes, "tiny", [onnx.helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, [batch, 3, 6, 8])],
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in ("positive", "features")],
        weights)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    path = tmp_path / "tiny.onnx"
    path.write_bytes(model.SerializeToString())
    path.with_suffix(".yaml").write_text(SETTINGS + "outputs: {pooled: features, spatial: 0}\n")
    extractor = find_extractor(str(path)).load(device="cpu")
    assert extractor.fingerprint == sha256_of(path) and "onnxruntime" in extractor.settings["runtime"]
    features = extractor.features(images)
    assert features.pooled == pytest.approx(expected(images), abs=1e-5)
    assert features.spatial.shape == (30, 4 * 4 * 6)
    path.write_bytes(model.SerializeToString()[:60])
    with pytest.raises(UserError, match=r"--backend .*tiny\.onnx: is no ONNX file that can be used"):
        find_extractor(str(path)).load(device="cpu")
    monkeypatch.chdir(tmp_path)             # weights in a second file, which the SHA-256 would not know
    onnx.save(model, str(path), save_as_external_data=True, location="weights.bin", size_threshold=0)
    with pytest.raises(UserError, match=r"tiny\.onnx: is no ONNX file that can be used; its weights must stand in the"):
        find_extractor(str(path)).load(device="cpu")


def test_without_onnxruntime_a_sentence_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "net.onnx").write_bytes(b"")
    (tmp_path / "net.yaml").write_text("{}")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"needs the package onnxruntime .*: pip install 'guided-pixels\[onnx\]'"):
        find_extractor(str(tmp_path / "net.onnx")).load(device="cpu")


# In the evaluator


@pytest.fixture
def save(tmp_path):
    def save(name, images):
        write_batch(tmp_path / name, {}, iter([images]), images.shape)
        return tmp_path / name
    return save


@pytest.fixture
def evaluate(tmp_path, capsys):
    def evaluate(*words):
        assert call("evaluations/evaluator", *words, "--json", tmp_path / "result.json") == 0, capsys.readouterr().err
        return json.loads((tmp_path / "result.json").read_text())
    return evaluate


def test_the_evaluator_measures_with_it_and_says_what_it_was(torchscript, images, save, evaluate, tmp_path):
    files, word = (save("reference.npz", images[:15]), save("sample.npz", images[15:])), torchscript()
    options = ("--backend", word, "--metrics", "fid,mind,authenticity", "--cache", tmp_path / "cache")
    (result,) = evaluate(*files, *options)
    values = expected(images)
    assert result["metrics"]["mind"] == pytest.approx(mind(values[:15], values[15:]), rel=1e-4)
    assert result["backend"]["name"] == "tiny.pt" and result["backend"]["sha256"] == sha256_of(word)
    assert result["backend"]["settings"]["size"] == [6, 8] and result["backend"]["settings"]["std"] == [0.5]
    (tmp_path / "tiny.yaml").write_text(SETTINGS.replace("0.5", "0.25"))
    (other,) = evaluate(*files, *options)           # the features that were kept are of other settings
    assert other["backend"]["sha256"] == result["backend"]["sha256"]
    assert other["metrics"]["mind"] > 1.5 * result["metrics"]["mind"]


def test_the_evaluator_measures_depth_with_it(torchscript, images, save, evaluate):
    word = torchscript("outputs: {pooled: 0, depth: 3}\ndepth_range: [min, max]\n")
    files = save("reference.npz", images[:15]), save("sample.npz", images[15:] // 2)
    (result,) = evaluate(*files, "--backend", word, "--metrics", "dfid,sharpness,mind")
    assert result["depth"]["estimator"] == {"name": "tiny.pt", "sha256": sha256_of(word), "accuracy": {}}
    assert all(value > 0 for value in result["metrics"].values())


def test_a_reference_made_with_it_remembers_its_settings(torchscript, images, save, evaluate, tmp_path, capsys):
    word, made = torchscript(), tmp_path / "made.npz"
    sample = save("sample.npz", images)
    assert call("scripts/make_reference", sample, made, "--backend", word) == 0
    assert BatchFile(made).statistics("_s") is None
    (result,) = evaluate(made, sample, "--backend", word, "--metrics", "fid")
    assert result["metrics"]["fid"] == pytest.approx(0, abs=1e-9)
    (tmp_path / "tiny.yaml").write_text(SETTINGS.replace("bilinear", "nearest"))
    capsys.readouterr()
    assert call("evaluations/evaluator", made, sample, "--backend", word, "--metrics", "fid") == 2
    assert "its statistics are of 'tiny.pt' with other settings" in capsys.readouterr().err


def test_metrics_that_its_outputs_do_not_serve_are_refused(torchscript, images, save, capsys):
    sample = save("sample.npz", images)
    assert call("evaluations/evaluator", sample, sample, "--backend", torchscript()) == 2
    said = capsys.readouterr().err
    assert "gives pooled, but no probabilities and no spatial, which is, sfid would need: leave them out" in said


def test_outputs_that_are_no_probabilities_are_told_by_the_first_image(torchscript, images, save, capsys, tmp_path):
    sample, word = save("sample.npz", images), torchscript(SETTINGS + "outputs: {pooled: 0, probabilities: 2}\n")
    assert call("evaluations/evaluator", sample, sample, "--backend", word, "--metrics", "fid,is", "--cache",
                tmp_path / "cache") == 2
    assert (f"--backend {word}: probabilities of image 0: must not be negative and must have the sum 1; of logits give "
            "the softmax, or call the output logits in a YAML file") in capsys.readouterr().err
    assert not list((tmp_path / "cache").iterdir())          # no features were made


# Functions

MODULE = """
import numpy as np

class Means:
    name, fingerprint, caveat = "means", "ab" * 32, "these are means only"

    def features(self, images):
        return images.mean(axis=(1, 2), dtype=np.float32)

def load(device=""):
    return Means()

load.outputs = ("pooled",)

class Maps(Means):
    def features(self, images):
        return np.moveaxis(images.astype(np.float16), 3, 1)

def maps(device=""):
    return Maps()

class Depths(Means):
    def features_and_depth(self, images):
        return self.features(images), images[:, ::2, ::2, 0] / 127.5 - 1

def depths(device=""):
    return Depths()

depths.outputs = ("pooled", "depth")

def broken(device=""):
    raise RuntimeError("no weights here")

def nothing(device=""):
    return object()
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_means.py").write_text(MODULE)
    monkeypatch.delitem(sys.modules, "own_means", raising=False)
    yield "own_means"
    sys.modules.pop("own_means", None)


def test_a_function_makes_an_extractor(module, images, tmp_path):
    kind = find_extractor(f"{module}:load")
    assert kind.outputs == {Feature.POOLED}
    extractor = kind.load(device="cpu")
    assert (extractor.name, extractor.caveat) == ("means", "these are means only")
    assert extractor.settings == {"function": "own_means:load", "code": sha256_of(tmp_path / "own_means.py")}
    features = extractor.features(images)
    assert features.pooled == pytest.approx(images.mean(axis=(1, 2)), rel=1e-6) and features.spatial.shape == (30, 0)


def test_a_map_of_a_function_is_averaged_over_its_places(module, images):
    features = find_extractor(f"{module}:maps").load().features(images)
    assert features.pooled.dtype == np.float32
    assert features.pooled == pytest.approx(images.mean(axis=(1, 2)), rel=1e-6)


@pytest.mark.parametrize(("word", "lacking"), [("is", "probabilities"), ("sfid", "spatial")])
def test_what_a_function_does_not_say_that_it_lacks_is_told_by_the_first_image(module, images, save, tmp_path, capsys,
                                                                              word, lacking):
    sample = save("sample.npz", images)
    assert call("evaluations/evaluator", sample, sample, "--backend", f"{module}:maps", "--metrics", f"fid,{word}",
                "--cache", tmp_path / "cache") == 2
    assert (f"--backend own_means:maps: gives pooled, but no {lacking}, which {word} would need: leave them out"
            in capsys.readouterr().err)
    assert not list((tmp_path / "cache").iterdir())


def test_a_function_may_estimate_depth(module):
    kind = find_extractor(f"{module}:depths")
    assert kind.estimates_depth
    images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
    features, depth = kind.load().features_and_depth(images)
    assert features.pooled.shape == (4, 3) and depth.shape == (4, 32, 32)
    with pytest.raises(UserError, match=r"gives depth \(4, 16, 16\) for 4 images, it must be \(N, 32, 32\)"):
        kind.load().features_and_depth(images[:, :32, :32])


@pytest.mark.parametrize("name, sentence", [
    ("absent", "own_means has no function absent"), ("broken", "the function fails .no weights here."),
    ("nothing", "returns no extractor, it has no name, fingerprint, features")])
def test_a_function_that_cannot_be_used_is_a_sentence(module, name, sentence):
    with pytest.raises(UserError, match=f"--backend own_means:{name}: {sentence}"):
        find_extractor(f"{module}:{name}").load(device="cpu")
    with pytest.raises(UserError, match="--backend no_such_module:load: no_such_module cannot be imported"):
        find_extractor("no_such_module:load")


FAULTY = """
import sys
import numpy as np

rng = np.random.default_rng(0)

class Extractor:
    name, fingerprint = "own", "ab" * 32

    def __init__(self, found=None, maps=None):
        self.found, self.maps = found, maps

    def features(self, images):
        return self.found(images.mean(axis=(1, 2), dtype=np.float32))

    def features_and_depth(self, images):
        return self.features(images), self.maps(images[:, :, :, 0] / 127.5 - 1)

def fails(means):
    raise RuntimeError("no such layer")

def as_it_is(values):
    return values

def extractor(found=as_it_is, maps=as_it_is, outputs=("pooled",), **attributes):
    def load(device=""):
        made = Extractor(found, maps)
        vars(made).update(attributes)
        return made
    load.outputs = outputs
    return load

failing = extractor(fails)
none = extractor(lambda means: None)
many = extractor(lambda means: [means] * 4)
ragged = extractor(lambda means: [[[1.0], [1.0, 2.0]]])
ending = extractor(lambda means: sys.exit(3))
beside = extractor(lambda means: means - means.mean(axis=0))
widths = extractor(lambda means: means @ means.T)
chance = extractor(lambda means: means + rng.random(means.shape, np.float32) * 99)
no_maps = extractor(maps=fails, outputs=["pooled", "depth"])
chance_maps = extractor(maps=lambda depth: rng.random(depth.shape), outputs=["pooled", "depth"])
number = extractor(outputs=5)
text = extractor(outputs="pooled")
odd = extractor(outputs=("pooled", 3))
settings = extractor(settings=7)
not_json = extractor(settings={"type": np.float32})
no_method = extractor(features=3)

def ends(device=""):
    sys.exit("no weights")
"""


@pytest.mark.parametrize("name, sentence", [
    ("failing", r"features\(\) fails on images of 4x32x32x3 \(no such layer\)"),
    ("none", r"gives a NoneType, it must give an array \(N, D\), or the arrays pooled, spatial, probabilities"),
    ("many", "gives 4 parts, it must give an array"), ("ragged", r"features\(\) fails on images of 4x32x32x3"),
    ("ending", r"features\(\) fails on images of 4x32x32x3 \(it ends the program by exit\(3\)\)"),
    *((name, "gives an image other features alone than beside another image, or at each call; export it after .eval")
      for name in ("beside", "widths", "chance")),
    ("no_maps", r"features_and_depth\(\) fails on images of 4x32x32x3 \(no such layer\)"),
    ("chance_maps", "gives an image other features and depth alone than beside another image"),
    ("number", r'outputs of the function are 5, they must be a list of words, like \("pooled",\)'),
    ("text", "outputs of the function are 'pooled', they must be a list"),
    ("odd", r"outputs of the function are \('pooled', 3\), they must be a list"),
    ("settings", "what the function returns cannot be used .*'int' object is not iterable"),
    ("not_json", "what the function returns cannot be used .*not JSON serializable"),
    ("no_method", r"returns no extractor, it has no features\(\)"),
    ("ends", r"the function fails \(it ends the program by exit\(no weights\)\)")])
def test_whatever_is_wrong_with_a_function_is_a_sentence(module, name, sentence, tmp_path):
    (tmp_path / "own_means.py").write_text(FAULTY)
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    with pytest.raises(UserError, match=f"^--backend own_means:{name}: {sentence}"):
        extractor = find_extractor(f"own_means:{name}").load(device="cpu")
        (extractor.features_and_depth if "maps" in name else extractor.features)(images)


def test_a_module_that_ends_the_program_is_a_sentence(module, tmp_path):
    (tmp_path / "own_means.py").write_text("import sys\nsys.exit()\n")
    with pytest.raises(UserError, match=r"own_means cannot be imported \(it ends the program by exit\(None\)\)"):
        find_extractor("own_means:load")


# Refusals


class Unsteady(nn.Module):
    """A convolution whose features depend on the batch, or on chance, as that of a network in training does."""

    def __init__(self, then):
        super().__init__()
        self.conv, self.then = Tiny().conv, then

    def forward(self, x):
        return self.then(self.conv(x)).mean(dim=(2, 3))


@pytest.mark.parametrize("size", ["input_size: 16", "{}"], ids=["of one size", "of any size"])
@pytest.mark.parametrize("then", [nn.BatchNorm2d(4), nn.Dropout(), nn.Identity()], ids=lambda then: type(then).__name__)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_network_that_was_exported_in_training_is_refused(tmp_path, images, then, size):
    torch.jit.trace(Unsteady(then).train(), torch.zeros(4, 3, 16, 16), check_trace=False).save(str(tmp_path / "net.pt"))
    (tmp_path / "net.yaml").write_text(size)
    kind = find_extractor(str(tmp_path / "net.pt"))
    if isinstance(then, nn.Identity):
        assert kind.load(device="cpu").features(images).pooled.shape == (30, 4)
        return
    with pytest.raises(UserError, match=r"^--backend .*net\.pt: gives an image other features alone than beside"):
        kind.load(device="cpu").features(images[:1])


@pytest.mark.filterwarnings("error")
def test_arrays_that_are_not_to_be_written_are_features_too():
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    check_steady(lambda images: [np.broadcast_to(np.float32(1), (len(images), 4))], images, "net.pt", "features")
    check_steady(lambda images: [np.empty((len(images), 0), np.float32)], images, "net.pt", "features")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_no_difference(dtype):
    def rounded(images):
        values = np.sin(np.arange(1, 65) * images.mean(axis=(1, 2, 3)).reshape(-1, 1))
        noise = np.random.default_rng(len(images)).uniform(-1, 1, values.shape)         # of other sums in other batches
        return [torch.tensor(values * (1 + noise * torch.finfo(dtype).eps)).to(dtype)]

    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    check_steady(rounded, images, "net.pt", "features")
    with pytest.raises(UserError, match=r"^net\.pt: gives an image other features"):
        check_steady(lambda images: [rounded(images)[0] * len(images)], images, "net.pt", "features")


@pytest.mark.parametrize("settings, sentence", [
    ("size: 3", r"size in .*tiny\.yaml: no such setting \(did you mean resize\?\)"),
    ("input_size: 0", r"input_size 0 in .*: must be a whole number of pixels"),
    ("input_size: [3, x]", "must be a whole number of pixels up to"),
    ("resize: cubic", r"resize 'cubic' in .*: must be one of .*did you mean bicubic"),
    ("resize: [bicubic]", r"resize \['bicubic'\] in .*: must be one of"),
    ("range: [1, 0]", r"range \[1, 0\] in .*: must be two numbers that rise"),
    ("mean: [1, 2]", r"mean \[1, 2\] in .*: must be a list of 3 numbers"),
    ("mean: .nan", r"mean nan in .*: must be a list of 3 numbers, or one number, like 0.001$"),
    ("std: 1e-3", r"std '1e-3' in .*: must be a list of 3 numbers, or one number, like 0.001$"),
    ("std: 0", "std 0 in .*: must be above 0"),
    ("outputs: {spatial: 0}", "pooled among them"),
    ("outputs: {pooled: 0, pools: 1}", "must be of pooled, spatial, probabilities, logits, depth"),
    ("outputs: {pooled: 0, depth: 1}", "depth_range in .*: must be given with an output depth"),
    ("outputs: {pooled: 0, depth: 1}\ndepth_range: [1, 1]", "two different ones of a number, min and max"),
    ("- a list", "must hold option names and values"),
    ("a: [", "is not YAML"),
])
def test_settings_that_are_wrong_are_a_sentence(tmp_path, settings, sentence):
    (tmp_path / "tiny.yaml").write_text(settings)
    with pytest.raises(UserError, match=sentence):
        read_preparation(tmp_path / "tiny.yaml")


def test_a_depth_range_without_depth_is_said_once(torchscript, caplog):
    caplog.set_level("INFO")
    for settings in (*["depth_range: [0, 80]"] * 2, "outputs: {pooled: 0, depth: 3}\ndepth_range: [0, 80]"):
        assert read_preparation(Path(torchscript(settings)).with_suffix(".yaml")).size is None
    assert [message.split(": ")[1] for message in caplog.messages] == ["without effect, as outputs name no depth"]


def test_files_that_cannot_be_used_are_a_sentence(torchscript, tmp_path):
    with pytest.raises(UserError, match=r"--backend absent\.pt: no such file"):
        find_extractor("absent.pt")
    (tmp_path / "alone.onnx").write_bytes(b"")
    with pytest.raises(UserError, match=r"needs .*alone\.yaml beside it, which says how images become its input"):
        find_extractor(str(tmp_path / "alone.onnx"))
    word = torchscript("input_size: 2")
    with pytest.raises(UserError, match=r"tiny\.pt: the network fails on an input of 1x3x2x2"):
        find_extractor(word).load(device="cpu")
    word = torchscript(SETTINGS + "outputs: {pooled: 7}")
    with pytest.raises(UserError, match=r"tiny\.pt: pooled is the output 7, but the network has 0, 1, 2, 3"):
        find_extractor(word).load(device="cpu")


class Harmful:
    """Fails the test where it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("unpickled",)


def test_pickled_weights_are_never_unpickled(tmp_path):
    (tmp_path / "weights.yaml").write_text("{}")
    torch.save({"weight": Harmful()}, tmp_path / "weights.pt")
    with pytest.raises(UserError, match="holds weights without a network, which are not unpickled"):
        find_extractor(str(tmp_path / "weights.pt")).load(device="cpu")
    with zipfile.ZipFile(tmp_path / "weights.pt", "w") as archive:      # as TorchScript has it, with foreign objects
        archive.writestr("x/code/__torch__.py", "")
        for name in ("data", "constants"):
            archive.writestr(f"x/{name}.pkl", pickle.dumps(Harmful()))
    with pytest.raises(UserError, match="is no TorchScript file that can be used"):
        find_extractor(str(tmp_path / "weights.pt")).load(device="cpu")
    (tmp_path / "weights.pt").write_bytes(b"no archive")
    with pytest.raises(UserError, match="is no TorchScript file"):
        find_extractor(str(tmp_path / "weights.pt")).load(device="cpu")


def test_words_are_told_apart_before_any_file_is_looked_at():
    for word in ("torch", "embedded", "absent.pt", "absent.onnx", "a.b:c"):
        assert check_backend(word) == word
    for word in ("FILE.png", "a:", "https://host/x", ""):
        with pytest.raises(UserError, match=r"must be one of torch, .*, FILE\.onnx, FILE\.safetensors, MODULE:FUNC"):
            check_backend(word)


OWN_EXTRACTOR = """
from my_scale import SCALE

class Means:
    name, fingerprint, caveat = "means", "0" * 64, ""

def load(*, inception="", device="", dtype="float32"):
    return Means()
"""


@pytest.mark.parametrize("word", ["registered", "my_means:load"])
def test_features_depend_on_the_files_beside_an_extractor(word, tmp_path, monkeypatch):
    """Else --cache would give features of the code before a change."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_means", raising=False)
    monkeypatch.delitem(sys.modules, "my_scale", raising=False)
    (tmp_path / "my_means.py").write_text(OWN_EXTRACTOR.replace("def load", "    def features(self, images):\n"
                                                                "        return images\n\ndef load"))
    settings = []
    for scale in (1, 2, 1):
        (tmp_path / "my_scale.py").write_text(f"SCALE = {scale}\n")
        load = importlib.import_module("my_means").load
        monkeypatch.setitem(EXTRACTORS, "registered", ExtractorKind("registered", "means", load, 1, 0, 0))
        settings.append(load_extractor(ExtractorOptions(backend=word)).settings["code"])
    assert settings[0] == settings[2] != settings[1]
