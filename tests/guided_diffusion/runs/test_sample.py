"""A whole sampling run: numbered images whatever the batch, labels, files."""

import json
import shutil
import zipfile

import numpy as np
import pytest
import torch
from networks import TINY, TINY_CLASSIFIER, with_random_weights

from guided_diffusion import checkpoint, execution
from guided_diffusion.build import DiffusionOptions, build_diffusion
from guided_diffusion.checkpoint import load_state_dict, save_state
from guided_diffusion.errors import UserError
from guided_diffusion.options import options_from
from guided_diffusion.pixels import to_uint8
from guided_diffusion.rng import image_labels
from guided_diffusion.runs import sampler
from guided_diffusion.runs.options import SampleOptions, option_classes
from guided_diffusion.runs.record import run_samples
from guided_diffusion.runs.sample import SamplingRun, begins_late
from guided_diffusion.script_util import create_classifier, create_model

SAG = {"guide_scale": 1.2, "sel_attn_depth": 1}
SETTINGS = {
    "DDPM": {}, "DDIM": {"use_ddim": True}, "SAG": SAG, "SAG, random mask": {**SAG, "mask": "random"},
    "SAG, DDIM with noise": {**SAG, "use_ddim": True, "eta": 0.5},
    "SDE-DPM-Solver++, SAG": {**SAG, "sampler": "dpm-solver++", "solver_grid": "chain", "solver_eta": 1},
    "UniPC": {"sampler": "unipc", "solver_order": 3, "sampling_steps": 4, "timestep_respacing": "",
              "dynamic_threshold": 0.99},
    "SAG and classifier": {**SAG, **TINY_CLASSIFIER, "classifier_guidance": True, "classifier_scale": 2.0}}
# What draws numbers of its own, or remembers the steps before
DRAWN = {
    "TSG": {"tsg_scale": 1.0, "tsg_noise_scale": 0.5}, "ICG": {"icg_scale": 1.0},
    "ICG, APG with momentum": {"icg_scale": 2.0, "apg": True, "apg_momentum": -0.5},
    "TSG, APG with momentum, UniPC": {"tsg_scale": 1.0, "tsg_noise_scale": 0.5, "apg": True, "apg_momentum": -0.5,
                                      "sampler": "unipc", "sampling_steps": 3, "timestep_respacing": ""}}
SETTINGS |= DRAWN


@pytest.fixture
def sample(tiny_checkpoints, tmp_path):
    """Runs the tiny model, with changed flags, in a folder of its own; returns its images and labels."""
    count = iter(range(100))

    def run(**changes):
        flags = {**TINY, "model_path": tiny_checkpoints / "model.safetensors",
                 "classifier_path": tiny_checkpoints / "classifier.safetensors",
                 "timestep_respacing": "3", "num_samples": 5, "batch_size": 2, "out": tmp_path / f"out{next(count)}",
                 **changes}
        path = SamplingRun.of(options_from(flags, SampleOptions, *option_classes())).run()
        with np.load(path, allow_pickle=False) as file:
            return file["arr_0"], file.get("arr_1")
    return run


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_images_are_the_same_for_any_batch_size_and_count(setting, sample):
    images, labels = sample(**setting, num_samples=3)
    assert images.std() > 5

    longer, more_labels = sample(**setting, num_samples=4)
    assert (longer[:3] == images).all() and (more_labels[:3] == labels).all()
    for batch_size in (1, 3):
        other, other_labels = sample(**setting, num_samples=3, batch_size=batch_size)
        assert (other_labels == labels).all()
        assert np.abs(other.astype(int) - images).max() <= 1


@pytest.mark.parametrize("setting", DRAWN.values(), ids=DRAWN)
def test_images_are_the_same_in_a_run_that_was_extended_or_broken_off(setting, sample, tmp_path, monkeypatch):
    whole, _ = sample(**setting)
    sample(**setting, num_samples=3, out=tmp_path / "extended")
    assert (sample(**setting, out=tmp_path / "extended")[0] == whole).all()

    images, made = sampler.ImageSampler.images, []

    def broken_off(self, image_ids, *rest):
        if len(made) == 1:
            raise KeyboardInterrupt
        made.append(list(image_ids))
        return images(self, image_ids, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(sampler.ImageSampler, "images", broken_off)
        with pytest.raises(KeyboardInterrupt):
            sample(**setting, out=tmp_path / "broken")
    assert made == [[0, 1]]
    assert (sample(**setting, out=tmp_path / "broken")[0] == whole).all()


def test_labels_are_random_by_seed_or_balanced(sample):
    _, labels = sample(seed=3, num_samples=7)
    assert labels.tolist() == image_labels(3, range(7), 2).tolist()
    assert sample(labels="balanced", num_samples=5)[1].tolist() == [0, 1, 0, 1, 0]


def test_a_label_changes_its_own_image_alone(sample):
    drawn, labels = sample()
    balanced, even = sample(labels="balanced")
    differs = (drawn != balanced).any(axis=(1, 2, 3))
    assert 0 < (labels != even).sum() < 5
    assert (differs == (labels != even)).all()


def test_colour_network_without_labels(sample, tmp_path):
    flags = {**TINY, "in_channels": 3, "class_cond": False}
    save_state(tmp_path / "colour.pt", with_random_weights(create_model(**flags)).state_dict())
    images, labels = sample(**flags | {"model_path": tmp_path / "colour.pt"})
    assert images.shape == (5, 16, 16, 3) and labels is None
    assert (images[..., 0] != images[..., 1]).any()


def test_runs_of_different_steps_may_begin_with_the_same_noise(sample):
    """Without noise between them, steps then lead to much the same image, however many there are."""
    def apart(**flags):
        few, many = (sample(use_ddim=True, timestep_respacing=steps, **flags)[0].astype(float) for steps in ("5", "9"))
        return np.abs(few - many).mean()

    assert apart(shared_start=True) < 0.3 * apart()
    one, other = (sample(use_ddim=True, shared_start=True, seed=seed)[0] for seed in (0, 1))
    assert np.abs(one.astype(float) - other).mean() > 5 and np.abs(one[0].astype(float) - one[1]).mean() > 5


def test_classifier_raises_the_probability_of_its_label(sample, tmp_path):
    """By a classifier of more channels, whose random weights tell images further apart."""
    flags = {**TINY_CLASSIFIER, "classifier_channel_mult": "1,2"}
    classifier = with_random_weights(create_classifier(**flags), seed=1)
    save_state(tmp_path / "classifier.pt", classifier.state_dict())

    def log_probability(images, labels):
        x = torch.from_numpy(images[..., :1]).permute(0, 3, 1, 2) / 127.5 - 1
        with torch.no_grad():
            logits = classifier(x, torch.zeros(len(x), dtype=torch.long))
        return logits.log_softmax(dim=1)[torch.arange(len(x)), torch.from_numpy(labels)]

    guidance = {**flags, "classifier_path": tmp_path / "classifier.pt", "classifier_guidance": True,
                "labels": "balanced", "num_samples": 8}
    weak, strong = (log_probability(*sample(**guidance, classifier_scale=scale)) for scale in (0.0, 500.0))
    assert (strong - weak).min() > 0.01


def test_a_batch_that_no_memory_holds_is_refused_before_the_first_step(sample, monkeypatch):
    monkeypatch.setattr(execution, "_memory_of", lambda device: 10**6)
    with pytest.raises(UserError, match=r"--batch_size 1000: a first map of features alone takes 33,792,000 bytes"):
        sample(batch_size=1000)
    assert sample(batch_size=8)[0].shape == (5, 16, 16, 3)


def test_memory_that_python_itself_lacks_is_told_as_torch_s_is(sample, monkeypatch):
    def none_left(*_):
        raise MemoryError
    monkeypatch.setattr(sampler.ImageSampler, "_images", none_left)
    with pytest.raises(UserError, match="--batch_size 2: cpu is out of memory"):
        sample()


def test_a_number_of_images_that_no_disk_holds_is_refused_before_the_first_step(sample, tmp_path):
    for count in (10**10, 10**12):
        with pytest.raises(UserError, match=rf"--num_samples {count}: .*(No space left on device: 15,360,000,000,000 "
                                            r"bytes are needed|must be at most 10000000000)"):
            sample(num_samples=count)


@pytest.mark.parametrize("name", ["model", "classifier"])
def test_weights_that_are_replaced_while_they_are_read_are_not_recorded(name, sample, tiny_checkpoints, tmp_path,
                                                                        monkeypatch):
    path, out, load = tmp_path / f"{name}.safetensors", tmp_path / "out", checkpoint.load_into
    shutil.copy(tiny_checkpoints / path.name, path)
    flags = {**TINY_CLASSIFIER, "classifier_guidance": True, "classifier_scale": 2.0, f"{name}_path": path, "out": out}

    def training_saves_then(model, file, *rest):
        load(model, file, *rest)
        if str(file) == str(path):
            save_state(path, load_state_dict(path))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "load_into", training_saves_then)
        with pytest.raises(UserError, match=rf"^--{name}_path {path}: was replaced while it was read; start the comma"):
            sample(**flags)
    assert not any(out.rglob("*.npz")) and not any(out.rglob("run.json"))
    assert sample(**flags)[0].shape == (5, 16, 16, 3)


@pytest.mark.parametrize(("respacing", "late"), [("1", True), ("ddim1", True), ("2,0,0", True), ("ddim2", True),
                                                 ("3", False), ("ddim25", False), ("", False)])
def test_a_chain_that_does_not_begin_in_noise_is_told(respacing, late):
    said = begins_late(build_diffusion(DiffusionOptions(timestep_respacing=respacing)))
    assert bool(said) == late and (not late or "and images begin in noise as at 157" in said)


def test_to_uint8_truncates_and_clamps():
    levels = torch.tensor([-2.0, -1.0, -1 + 0.999 / 127.5, -1 + 1.001 / 127.5, 0.0, 1 - 0.001 / 127.5, 1.0, 2.0])
    pixels = to_uint8(levels.reshape(1, 1, 2, 4))
    assert pixels.shape == (1, 2, 4, 3) and pixels.dtype == np.uint8
    assert pixels[0, :, :, 0].flatten().tolist() == [0, 0, 0, 1, 127, 254, 255, 255]
    assert (pixels == pixels[..., :1]).all()


def test_to_uint8_keeps_colours_in_place():
    x = torch.linspace(-1, 1, 2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    pixels = to_uint8(x)
    assert pixels.shape == (2, 4, 5, 3)
    assert pixels[1, 2, 3].tolist() == [int((float(v) + 1) * 127.5) for v in x[1, :, 2, 3]]


def test_run_samples_reads_a_finished_run_only(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (7, 4, 5, 3), dtype=np.uint8)
    np.savez(tmp_path / "packed.npz", arr_0=images)
    record = tmp_path / "run.json"
    record.write_text(json.dumps({"samples": "packed.npz", "configuration": {"seed": 4}}))
    first, configuration = run_samples(tmp_path, 2)
    assert (first == images[:2]).all() and configuration == {"seed": 4}

    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("arr_0.npy", b"no array")
    np.savez(tmp_path / "objects.npz", arr_0=np.array([[[{}]]], object))
    for text in ("", "[]", "{}", '{"samples": "missing.npz", "configuration": {}}', '{"samples": "packed.npz"}',
                 '{"samples": 3, "configuration": {}}', '{"samples": "other.npz", "configuration": {}}',
                 '{"samples": "objects.npz", "configuration": {}}', '{"samples": "run.json", "configuration": {}}'):
        record.write_text(text)
        with pytest.raises(UserError, match="no finished sampling run"):
            run_samples(tmp_path, 2)
