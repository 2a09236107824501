"""Features of EfficientNet-Lite0: the network beside a plain computation, its weights' file, and what results say."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from commands import call
from PIL import Image

from evaluations.extractors import EXTRACTORS, icons, photo
from evaluations.extractors.photo import PhotoExtractor, load_weights
from evaluations.references import MODELS, open_reference
from guided_diffusion.errors import UserError
from guided_diffusion.npz import write_batch

STRIDES = [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1]
CHANNELS = [32, 16, 24, 24, 40, 40, 80, 80, 80, 112, 112, 112, 192, 192, 192, 192, 320]
KERNELS = [3, 3, 3, 5, 5, 3, 3, 3, 5, 5, 5, 5, 5, 5, 5, 3]


def random_state():
    """Random weights by the names of the package's file, so that activations neither vanish nor explode."""
    generator = torch.Generator().manual_seed(0)
    state = {"_fc.weight": 0.05 * torch.randn(1000, 1280, generator=generator),
             "_fc.bias": torch.randn(1000, generator=generator)}

    def add(conv, norm, out_channels, channels, kernel):
        spread = (2 / (channels * kernel**2)) ** 0.5
        state[f"{conv}.weight"] = spread * torch.randn(out_channels, channels, kernel, kernel, generator=generator)
        state[f"{norm}.num_batches_tracked"] = torch.tensor(1)
        for part, low, high in (("weight", 0.8, 1.2), ("bias", 0, 0.4), ("running_mean", -0.2, 0.2),
                                ("running_var", 0.5, 1.5)):
            state[f"{norm}.{part}"] = low + (high - low) * torch.rand(out_channels, generator=generator)

    add("_conv_stem", "_bn0", 32, 3, 3)
    for number, kernel in enumerate(KERNELS):
        name, channels = f"_blocks.{number}", CHANNELS[number]
        wide = channels * (6 if number else 1)
        if number:
            add(f"{name}._expand_conv", f"{name}._bn0", wide, channels, 1)
        add(f"{name}._depthwise_conv", f"{name}._bn1", wide, 1, kernel)
        add(f"{name}._project_conv", f"{name}._bn2", CHANNELS[number + 1], wide, 1)
    add("_conv_head", "_bn1", 1280, 320, 1)
    return state


def plain_forward(state, x):
    """Pooled features, the map after the eighth block, and logits, with batch norms and TensorFlow's SAME padding."""
    def conv(x, name, norm, stride=1, active=True):
        weight = state[f"{name}.weight"]
        lacking = [max(0, (-(-side // stride) - 1) * stride + weight.shape[-1] - side) for side in x.shape[2:]]
        x = F.pad(x, [edge for total in reversed(lacking) for edge in (total // 2, total - total // 2)])
        groups = x.shape[1] // weight.shape[1]
        x = F.conv2d(x, weight, stride=stride, groups=groups)
        x = F.batch_norm(x, *(state[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")),
                         eps=1e-3)
        return x.clamp(0, 6) if active else x

    x = conv(x, "_conv_stem", "_bn0", 2)
    for number, stride in enumerate(STRIDES):
        name, before = f"_blocks.{number}", x
        if f"{name}._expand_conv.weight" in state:
            x = conv(x, f"{name}._expand_conv", f"{name}._bn0")
        x = conv(x, f"{name}._depthwise_conv", f"{name}._bn1", stride)
        x = conv(x, f"{name}._project_conv", f"{name}._bn2", active=False)
        if x.shape == before.shape:
            x = x + before
        if number == 7:
            early = x
    pooled = conv(x, "_conv_head", "_bn1").mean(dim=(2, 3))
    return pooled, early, F.linear(pooled, state["_fc.weight"], state["_fc.bias"])


@pytest.fixture(scope="module")
def state():
    return random_state()


@pytest.fixture(scope="module")
def file(state, tmp_path_factory):
    """A file such as the package's, with random weights."""
    path = tmp_path_factory.mktemp("package") / "random.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def extractor(file, cache):
    return PhotoExtractor(file, cache)


def pictures(count, side=32, seed=0):
    """Coloured blots, (count, side, side, 3) uint8."""
    random = np.random.default_rng(seed)
    blots = random.integers(0, 256, (count, 4, 4, 3), np.uint8)
    return blots.repeat(side // 4, axis=1).repeat(side // 4, axis=2)


def test_the_network_is_the_one_with_batch_norms(state, extractor):
    images = pictures(2, 224)
    with torch.no_grad():
        pooled, early, logits = plain_forward(state, (torch.from_numpy(images).movedim(3, 1).float() - 127) / 128)
    found = extractor.features(images)
    scale = float(early.abs().max())
    np.testing.assert_allclose(found.pooled, pooled, atol=1e-4 * float(pooled.max()))
    np.testing.assert_allclose(found.spatial, early[:, :7], atol=1e-4 * scale)
    np.testing.assert_allclose(found.probabilities, logits.softmax(dim=1), atol=1e-4)


def test_an_image_has_the_features_that_the_record_says_whatever_its_size_and_batch(extractor):
    kind, images = EXTRACTORS["photo"], pictures(photo.IMAGES_AT_ONCE + 1)
    found = extractor.features(images)
    assert [values[0].size for values in found] == [kind.pooled, kind.spatial, kind.probabilities]
    assert all(values.dtype == np.float32 for values in found)
    alone = extractor.features(images[-1:])
    np.testing.assert_allclose(alone.pooled[0], found.pooled[-1], rtol=1e-3, atol=1e-4)
    assert extractor.features(pictures(1, 64)[:, :48]).spatial.shape == (1, 7, 14, 14)
    with pytest.raises(UserError, match="must be \\(N, H, W, 3\\), uint8"):
        extractor.features(images[..., :1])


def test_weights_are_converted_once_and_again_where_the_conversion_is_damaged(file, cache, extractor, monkeypatch):
    (converted,) = cache.glob("*.safetensors")
    content = converted.read_bytes()
    converted.write_bytes(content[:-100] + bytes(100))
    made = load_weights(file, cache)
    monkeypatch.setattr(photo, "load_pickled", lambda path: pytest.fail("is converted again"))
    again = load_weights(file, cache)
    assert all(torch.equal(tensor, made.tensors[name]) for name, tensor in again.tensors.items())
    assert again.sha256 == extractor.fingerprint and "not those of version" in extractor.caveat


def changed(state, name, value):
    return {key: tensor for key, tensor in {**state, name: value}.items() if tensor is not None}


@pytest.mark.parametrize(("name", "value", "message"), [
    ("_blocks.3._bn1.running_var", None, r"random.pth: does not hold an .*: _blocks.3._bn1.running_var is missing"),
    ("_fc.bias", torch.zeros(10), "does not hold an EfficientNet-Lite0: size mismatch for classify.bias"),
    ("_bn1.bias", torch.zeros(7), "does not hold an EfficientNet-Lite0: The size of tensor"),
    ("_fc.weight", Path("x"), "holds foreign objects"),
])
def test_other_files_are_refused(state, tmp_path, name, value, message):
    torch.save(changed(state, name, value), tmp_path / "random.pth")
    with pytest.raises(UserError, match=message):
        load_weights(tmp_path / "random.pth", tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_without_the_package_a_sentence_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(photo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'guided-pixels\[photo\]'"):
        EXTRACTORS["photo"].check()
    write_batch(tmp_path / "a.npz", {}, iter([pictures(4)]), (4, 32, 32, 3))
    assert call("evaluate", tmp_path / "a.npz", tmp_path / "a.npz", "--backend", "photo", "--metrics", "mind") == 2
    assert capsys.readouterr().err.startswith("error: --backend photo needs the package efficientnet-lite0-pytorch-mod")


def test_numbers_are_named_for_the_network(file, cache, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(photo, "find_weights", lambda: file)
    monkeypatch.setattr(photo, "default_cache", lambda: cache)
    monkeypatch.setattr(icons, "check_classifier", lambda extractor: None)   # which knows the weights by their hash
    files = [tmp_path / "real.npz", tmp_path / "made.npz"]
    for seed, path in enumerate(files):
        write_batch(path, {"arr_1": np.arange(6 + seed)}, iter([pictures(6 + seed, seed=seed)]), (6 + seed, 32, 32, 3))
    assert call("evaluate", *files, "--backend", "photo", "--metrics", "is,fid,kid,precision,mind,class_accuracy",
                "--json", tmp_path / "result.json") == 0
    said = capsys.readouterr()
    names = re.findall(r"^([A-Z][^:]*): [\d.e-]+$", said.out, re.MULTILINE)
    assert names == ["Score of classes by EfficientNet-Lite0", "Frechet distance by EfficientNet-Lite0 features",
                     "Precision", "Kernel distance by EfficientNet-Lite0 features", "MIND",
                     "Class accuracy in %"]
    assert (f"{files[1]}: its labels go up to 6, class_accuracy reads them as those of the 43 classes of icons"
            in said.err)
    assert "on which Frechet distance by EfficientNet-Lite0 features and others depend" in said.err
    assert not re.search(r"\bs?FID\b|Inception", said.out + said.err)
    (result,) = json.loads((tmp_path / "result.json").read_text())
    assert result["backend"] == {"name": PhotoExtractor.name, "sha256": load_weights(file, cache).sha256,
                                 "features_of": "EfficientNet-Lite0"}


def test_a_photograph_is_classified():
    """The public-domain photograph of Grace Hopper that comes with matplotlib: ImageNet's class 652, military uniform.

    The probabilities are those of the package's own network on the same input.
    """
    matplotlib = pytest.importorskip("matplotlib")
    try:
        EXTRACTORS["photo"].check()
    except UserError as error:
        pytest.skip(str(error))
    hopper = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    extractor = EXTRACTORS["photo"].load(device="cpu")
    assert extractor.caveat == ""
    (probabilities,) = extractor.features(np.asarray(Image.open(hopper).convert("RGB"))[None]).probabilities
    best = probabilities.argsort()[:-4:-1]
    assert best.tolist() == [652, 465, 834]         # military uniform, bulletproof vest, suit
    assert probabilities[best] == pytest.approx([0.468, 0.074, 0.038], abs=0.005)     # the decoders of JPEG differ


def test_the_reference_of_the_icons_holds_images_and_labels_for_any_network():
    reference = open_reference("icons32")
    assert reference.shape == (1144, 32, 32, 3) and reference.statistics() is None
    names = reference.read("class_names").tolist()
    assert len(names) == 43 and set(reference.labels.tolist()) == set(range(43))
    assert {name.split("-")[1] for name in names} == {"emojione", "fluent", "fxemoji", "noto", "twemoji"}
    assert (MODELS / "icons32_reference.npz").stat().st_size < 8e6
    said = (MODELS / "icons32_reference.txt").read_text()
    assert all(word in said for word in ("CC BY 4.0", "Apache License 2.0", "MIT License", "Twitter", "Emoji One"))
