"""Clean-classifier guidance by networks that were not trained here: TorchScript files and functions."""

import json
import re
import sys

import pytest
import torch
from commands import call, flags, samples_in
from networks import TINY, with_random_weights
from torch import nn
from torch.nn import functional as F

from guided_diffusion.checkpoint import save_state
from guided_diffusion.errors import UserError
from guided_diffusion.fetch import sha256_of
from guided_diffusion.guidance import CleanClassifierOptions, Networks, StepContext
from guided_diffusion.guidance.foreign_classifier import _say_relus
from guided_diffusion.process import Denoiser, Prediction
from guided_diffusion.script_util import create_gaussian_diffusion, create_model

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")        # old, and what people have

SETTINGS = """
input_size: [10, 12]
resize: bilinear
range: [0, 1]
mean: [0.4, 0.5, 0.6]
std: [0.2, 0.25, 0.3]
"""
CPU = torch.device("cpu")
CLOSE = 1e-5                    # of the largest gradient: some ten times what float32 differs from float64 here


class Tiny(nn.Module):
    """A classifier of colour images with a ReLU."""

    def __init__(self, channels=3, classes=2):
        super().__init__()
        self.conv, self.relu, self.head = nn.Conv2d(channels, 4, 3), nn.ReLU(inplace=True), nn.Linear(4, classes)
        with_random_weights(self, seed=3)

    def forward(self, x):
        return self.head(self.relu(self.conv(x)).mean(dim=(2, 3)))


class Other(nn.Module):
    """A network that does something else with the tiny classifier's logits."""

    def __init__(self, then, network=None):
        super().__init__()
        self.network, self.then = network or Tiny(), then

    def forward(self, x):
        return self.then(self.network(x), x)


@pytest.fixture
def exported(tmp_path):
    """Writes a network with its settings; returns its path. size: of the images that it is traced with."""
    def exported(network=None, settings=SETTINGS, name="net.pt", size=(10, 12), count=1):
        torch.jit.trace(network or Tiny().eval(), torch.rand(count, 3, *size)).save(str(tmp_path / name))
        (tmp_path / name).with_suffix(".yaml").write_text(settings)
        return str(tmp_path / name)
    return exported


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module into the current folder."""
    def module(text, name="own_classifiers"):
        monkeypatch.chdir(tmp_path)
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / f"{name}.py").write_text(text)
        return name
    yield module
    sys.modules.pop("own_classifiers", None)


@pytest.fixture
def function(module):
    """Has a function of the current folder return a network; returns its word."""
    def function(network):
        word = module("def given():\n    return network\n") + ":given"
        CleanClassifierOptions(clean_classifier_scale=1.0, clean_classifier_path=word).check_files()
        sys.modules["own_classifiers"].network = network
        return word
    return function


def networks(channels=3, **changes):
    return Networks(create_model(**{**TINY, "in_channels": channels, **changes}), CPU)


def built(path, channels=3, **options):
    """The term of a classifier, at scale 2."""
    return CleanClassifierOptions(clean_classifier_scale=2.0, clean_classifier_path=str(path), **options).build(
        networks(channels))[0]


def gradient_of(term, x0, y):
    """The gradient of a term where the predicted image is x0."""
    denoise = Denoiser(create_gaussian_diffusion(timestep_respacing="10"), None, model_kwargs={"y": y})
    t = torch.full((len(x0),), 6)
    return term.gradient(StepContext(denoise, x0, t, t), Prediction(*[x0] * len(Prediction.__dataclass_fields__)))


def by_hand(x0, y, hidden, tau_1=1.0, tau_2=0.5, network=None, prepared=True):
    """The gradient at scale 2, in float64; hidden: what takes the place of the ReLU."""
    network, x = (network or Tiny()).double(), x0.double().requires_grad_()
    seen = x
    if prepared:
        resized = F.interpolate(x, (10, 12), mode="bilinear", antialias=True)
        mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in ([0.4, 0.5, 0.6], [0.2, 0.25, 0.3]))
        seen = ((resized + 1) / 2 - mean) / std
    logits = network.head(hidden(network.conv(seen)).mean(dim=(2, 3)))
    odds = tau_1 * logits[range(len(y)), y] - torch.log(torch.exp(tau_2 * logits).sum(dim=1))
    return 2 * torch.autograd.grad(odds.sum(), x)[0].float()


@pytest.fixture
def x0():
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)


Y = torch.tensor([0, 1, 1])


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("how", ["trace", "script"])
def test_the_gradient_of_a_file_is_that_by_hand(exported, x0, how, half, tmp_path):
    path = exported()
    if how == "script":
        torch.jit.script(Tiny().eval()).save(path)
    if half:
        torch.jit.script(Tiny().half().eval()).save(path)
    expected = by_hand(x0, Y, F.relu, 3.0, 0.5, Tiny().half() if half else None)
    assert expected.abs().max() > 1e-4
    term = built(path, clean_classifier_temperature=3.0, clean_classifier_margin_temperature=0.5)
    found = [gradient_of(term, x0, Y) for _ in range(4)]            # TorchScript likes to change its mind
    torch.testing.assert_close(found[0], expected, rtol=0, atol=CLOSE * float(expected.abs().max()))
    assert all(torch.equal(found[0], other) for other in found)
    assert {weight.dtype for weight in term.classifier.parameters()} == {torch.float32}


def test_grey_samples_are_seen_as_grey_images_of_three_channels(exported, x0):
    path, grey = exported(), x0[:, :1]
    expected = by_hand(grey.expand(-1, 3, -1, -1), Y, F.relu).sum(dim=1, keepdim=True)
    found = gradient_of(built(path, channels=1), grey, Y)
    torch.testing.assert_close(found, expected, rtol=0, atol=CLOSE * float(expected.abs().max()))
    with pytest.raises(UserError, match=r"sees images of 3 channels .of 1 as grey., and the network .* makes 2"):
        built(path, channels=2)


def test_the_logits_are_the_output_that_the_settings_name(exported, x0):
    expected = gradient_of(built(exported()), x0, Y)
    several = exported(Other(lambda logits, x: (x.flatten(1), logits)).eval(),
                       SETTINGS + "outputs: {pooled: 0, logits: 1}\n", "several.ts")
    torch.testing.assert_close(gradient_of(built(several), x0, Y), expected, rtol=1e-5, atol=1e-8)
    with pytest.raises(UserError, match=r"outputs {'pooled': 0} in .*net\.yaml: must be .*, logits among them"):
        built(exported(settings=SETTINGS + "outputs: {pooled: 0}\n"))
    with pytest.raises(UserError, match=r"net\.pt: logits is the output 3, but the network has 0$"):
        built(exported(settings=SETTINGS + "outputs: {logits: 3}\n"))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_function_gives_a_module_whose_relus_are_softplus(function, x0, channels):
    x = x0[:, :channels]
    found = gradient_of(built(function(Tiny(channels)), channels), x, Y)
    expected = by_hand(x, Y, lambda hidden: F.softplus(hidden, beta=3), network=Tiny(channels), prepared=False)
    torch.testing.assert_close(found, expected, rtol=0, atol=CLOSE * float(expected.abs().max()))
    sharp = by_hand(x, Y, F.relu, network=Tiny(channels), prepared=False)
    assert (expected - sharp).abs().max() > 1e-2 * expected.abs().max()


def test_relus_of_a_file_are_said_to_stay(exported, caplog):
    caplog.set_level("INFO")
    for name, network in (("with.pt", Tiny()), ("without.pt", Tiny())):
        if name == "without.pt":
            network.relu = nn.Softplus(beta=3)
        built(exported(network.eval(), name=name))
    assert [message.split(": ")[0].split("/")[-1] for message in caplog.messages if "ReLU" in message] == ["with.pt"]


class Called(nn.Module):
    """The tiny classifier with something else in the place of its ReLU."""

    def __init__(self, hidden):
        super().__init__()
        self.network, self.hidden = Tiny(), hidden

    def forward(self, x):
        return self.network.head(self.hidden(self.network.conv(x)).mean(dim=(2, 3)))


@pytest.mark.parametrize("hidden, of_function, of_file", [
    *((relu, True, True) for relu in (F.relu, F.relu6, torch.relu, torch.Tensor.relu, lambda x: x.clone().relu_(),
                                      nn.ReLU6())),
    (nn.ReLU(), False, True),
    *((other, False, False) for other in (nn.Softplus(beta=3), nn.Hardtanh(), nn.LeakyReLU()))],
    ids=["relu", "relu6", "torch_relu", "Tensor_relu", "relu_", "ReLU6", "ReLU", "Softplus", "Hardtanh", "LeakyReLU"])
def test_all_relus_that_stay_are_said(exported, function, caplog, hidden, of_function, of_file):
    caplog.set_level("INFO")
    network = Called(hidden).eval()
    for word, stays in ((function(network), of_function), (exported(network), of_file)):
        _say_relus.cache_clear()                # a line is said once of each word
        caplog.clear()
        built(word)
        assert [message.split("; ")[0] for message in caplog.messages if "ReLU" in message] == [
            f"--clean_classifier_path {word}: has ReLUs, which stay as they are"] * stays


# Refusals


@pytest.mark.parametrize("then, sentence", [
    (lambda logits, x: logits[:, :1], "has 1 classes, and the network that is sampled 2"),
    (lambda logits, x: logits[:, 0], r"gives \(2,\) float32 for 2 images, it must give floating-point logits .N, cl"),
    (lambda logits, x: logits.argmax(dim=1, keepdim=True), r"gives \(2, 1\) int64 for 2 images"),
    (lambda logits, x: logits.detach(), "is not differentiable, no gradient of its logits reaches the image"),
    (lambda logits, x: torch.ones(len(x), 1, requires_grad=True) * torch.ones(2), "is not differentiable"),
    (lambda logits, x: logits * 0, "has a gradient of 0 everywhere"),
    (lambda logits, x: logits.round() + 0 * logits, "has a gradient of 0 everywhere"),
    (lambda logits, x: logits / 0, "gives logits or a gradient that are not finite"),
    (lambda logits, x: logits - logits.mean(dim=0), "gives an image other logits alone than beside another"),
    (lambda logits, x: logits + torch.rand_like(logits), "gives an image other logits alone .* export it after .eval"),
    (lambda logits, x: logits @ torch.ones(2, 2, dtype=torch.float64), "the network fails on an input of 2x3x10x12"),
], ids=lambda value: value[:20] if isinstance(value, str) else "")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_network_that_cannot_guide_is_a_sentence(exported, then, sentence, function):
    network = Other(then).eval()
    word = function(network)
    with pytest.raises(UserError, match=f"^--clean_classifier_path {word}: {sentence.replace('10x12', '16x16')}"):
        built(word)
    if "fails" not in sentence:
        path = exported(network, count=2)
        with pytest.raises(UserError, match=f"^--clean_classifier_path {re.escape(path)}: {sentence}"):
            built(path)


def test_files_that_cannot_be_used_are_a_sentence(exported, tmp_path, module):
    with pytest.raises(UserError, match=r"net\.pt: the network fails on an input of 2x3x2x2 .Calculated pad"):
        built(exported(settings="input_size: 2"))
    with pytest.raises(UserError, match=r"size in .*net\.yaml: no such setting"):
        built(exported(settings="size: 2"))
    path = exported()
    (tmp_path / "net.yaml").unlink()
    alone = CleanClassifierOptions(clean_classifier_scale=1.0, clean_classifier_path=path)
    for read in (alone.check_files, lambda: alone.build(networks())):
        with pytest.raises(UserError, match=r"^--clean_classifier_path .*net\.pt: needs .*net\.yaml beside it, whi"):
            read()
    torch.save(Tiny().state_dict(), path)
    (tmp_path / "net.yaml").write_text("{}")
    with pytest.raises(UserError, match=r"^--clean_classifier_path .*holds weights without a network, which are"):
        built(path)
    name = module("def three():\n    return 3\ndef broken():\n    raise OSError(7)\n"
                  "def ends():\n    raise SystemExit(3)\n")
    for word, sentence in (
            ("none.pt", "there is no such file"), ("none.onnx", "ONNX files are run without a gradient, which guidan"),
            ("https://host/net.pt", "must be a file on this machine, as its YAML file lies beside it"),
            ("no_such_module:load", "no_such_module cannot be imported"), ("sys:exit", "must be a function of a"),
            (f"{name}:absent", "own_classifiers has no function absent"), (f"{name}:broken", "the function fails"),
            (f"{name}:ends", r"the function fails .it ends the program by exit\(3\)"),
            (f"{name}:three", "returns a int, it must return a torch.nn.Module")):
        with pytest.raises(UserError, match=f"^--clean_classifier_path {word}: {sentence}"):
            built(word)


def test_a_method_that_is_off_asks_for_nothing(tmp_path):
    off = CleanClassifierOptions(clean_classifier_path=str(tmp_path / "none.onnx"))
    off.check_files()
    assert off.files() == off.beside() == {}


# On the command line


@pytest.fixture
def sample(tiny_checkpoints, tmp_path, capsys):
    """Runs image_sample; returns the exit code, and what it said."""
    def sample(path, **changes):
        code = call("image_sample", *flags({
            **TINY, "model_path": tiny_checkpoints / "model.safetensors", "timestep_respacing": 2, "num_samples": 4,
            "batch_size": 2, "clean_classifier_scale": 30, "clean_classifier_path": path, "out": tmp_path / "out",
            **changes}))
        return code, capsys.readouterr().err
    return sample


def test_a_command_samples_with_a_file_and_its_record_knows_it(exported, sample, tmp_path):
    path = exported()
    assert sample(path)[0] == 0
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["configuration"]["clean_classifier_path"] == path
    assert record["sha256"]["clean_classifier"] == sha256_of(path)
    assert record["sha256"]["clean_classifier_settings"] == sha256_of(tmp_path / "net.yaml")
    plain, guided = tmp_path / "plain", samples_in(tmp_path / "out")[0]
    assert sample(path, clean_classifier_scale=0, out=plain)[0] == 0
    assert (samples_in(plain)[0] != guided).any()
    late = tmp_path / "late"
    assert sample(path, clean_classifier_start=0, out=late)[0] == 0
    assert (samples_in(late)[0] == samples_in(plain)[0]).all()
    assert sample(path)[0] == 0                                     # the same again
    (tmp_path / "net.yaml").write_text(SETTINGS.replace("0.25", "0.5"))
    code, said = sample(path)
    assert code == 2 and "another configuration (--clean_classifier_settings differs)" in said
    network = Tiny().eval()
    network.head.bias.data += 1
    exported(network)
    code, said = sample(path)
    assert code == 2 and "another configuration" in said


def test_a_command_samples_with_a_function_and_its_record_knows_it(module, sample, tmp_path):
    text = """
import torch
def one():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 2))
two = one
"""
    name = module(text)
    assert sample(f"{name}:one")[0] == 0
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["sha256"]["clean_classifier"] == sha256_of(tmp_path / "own_classifiers.py")
    assert sample(f"{name}:one")[0] == 0
    code, said = sample(f"{name}:two")
    assert code == 2 and "--clean_classifier_path differs" in said
    module(text + "# changed\n")
    assert sample(f"{name}:one")[0] == 2


def test_a_command_refuses_before_it_samples(exported, sample, tmp_path):
    code, said = sample(exported(Tiny(classes=5).eval()))
    assert code == 2 and "net.pt: has 5 classes, and the network that is sampled 2" in said
    assert not list((tmp_path / "out").glob("*.npz"))
    assert sample(exported(), labels="cat")[1].count("as the checkpoint states no names") == 1


def test_without_classes_of_its_own_a_network_has_labels_of_as_many_as_the_classifier(exported, sample, tmp_path):
    network, plain = tmp_path / "plain.safetensors", {"class_cond": False, "num_classes": 1000}
    save_state(network, with_random_weights(create_model(**{**TINY, **plain})).state_dict())
    path = exported()
    code, said = sample(path, model_path=network, **plain)
    assert (code, said.splitlines()[-1]) == (
        2, f"error: --clean_classifier_path {path}: has 2 classes, and the images have those of --num_classes 1000: "
           "pass --num_classes 2")
    assert not list((tmp_path / "out").glob("*"))
    assert sample(path, model_path=network, **{**plain, "num_classes": 2})[0] == 0
