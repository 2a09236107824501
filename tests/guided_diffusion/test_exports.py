"""A model as a folder: what is written, and that the folder is the model."""

import ast
import json
import shlex
import shutil

import numpy as np
import pytest
import torch
from commands import REPOSITORY, call, samples_in
from networks import TINY, TINY_CLASSIFIER, with_random_weights

from guided_diffusion.build import ModelOptions, build_model
from guided_diffusion.checkpoint import load_state_dict, read_metadata, save_state
from guided_diffusion.presets import MODELS, bundled_names, find_preset
from guided_diffusion.runs.command import read_run
from guided_diffusion.runs.sample import SamplingRun
from guided_diffusion.script_util import create_classifier, create_model

SHORT = ("--timestep_respacing", 1, "--num_samples", 2, "--batch_size", 2)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports") / "fmnist32"
    assert call("export_model", "--model", "fmnist32", "--out", folder) == 0
    return folder


def test_a_folder_samples_what_the_model_samples(exported, tmp_path):
    guided = ("--guide_scale", 1.2, "--classifier_scale", 2)
    for name in ("fmnist32", exported):
        out = tmp_path / f"out_{name == exported}"
        assert call("classifier_sample", "--model", name, *SHORT, *guided, "--out", out) == 0
    (one, labels), (other, same) = samples_in(tmp_path / "out_False"), samples_in(tmp_path / "out_True")
    assert np.array_equal(one, other) and np.array_equal(labels, same)


def test_the_folder_has_the_layout_of_a_hub(exported):
    assert {path.name for path in exported.iterdir()} == {
        "README.md", "config.json", "model.safetensors", "classifier.safetensors"}
    config = json.loads((exported / "config.json").read_text())
    assert (config["library_name"], config["kind"]) == ("guided_diffusion", "diffusion")
    assert config["guidance"] == find_preset("fmnist32").guidance
    assert config["model"] == json.loads(read_metadata(exported / "model.safetensors")["config"])
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n") and "--model fmnist32\n" in card and "`--image_size 32`" in card
    assert "trained on the 60,000 training images of Fashion-MNIST" in card and "docs/fmnist32.md" in card


def test_of_every_bundled_model_a_card_can_say_images_licence_page_and_limits():
    for preset in map(find_preset, bundled_names()):
        assert preset.data and preset.licence and preset.about["limits"], preset.name
        assert (REPOSITORY / preset.about["page"]).is_file()
    assert "depth maps" in find_preset("scenes32_depth").data and "rooms" in find_preset("scenes32").data


def test_the_card_of_a_model_of_icons_names_the_artists(tmp_path):
    assert call("export_model", "--model", "icons64_upsampler", "--out", tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert (MODELS / "icons_attribution.txt").read_text() in card and "An upsampler network" in card
    assert "--model out --base_samples" in card and "pipeline_tag: image-to-image" in card


def test_a_released_checkpoint_states_its_flags_once_it_is_exported(tmp_path, monkeypatch):
    preset = find_preset("cifar10_uncond_50M_500K")
    path, small = tmp_path / "released.pt", {**preset.options, "num_channels": 32}
    names = ModelOptions.__dataclass_fields__
    network = build_model(ModelOptions(**{name: value for name, value in small.items() if name in names}))
    torch.save(with_random_weights(network).state_dict(), path)
    monkeypatch.setitem(preset.options, "num_channels", 32)
    assert call("export_model", "--model", preset.name, "--model_path", path, "--out", tmp_path / "out") == 0
    run, _ = read_run(["--model", str(tmp_path / "out")], SamplingRun)
    assert run.diffusion.rescale_timesteps is True and run.model.num_channels == 32
    card = (tmp_path / "out" / "README.md").read_text()
    assert preset.url in card and preset.licence in card and "trained on CIFAR-10" in card


@pytest.mark.parametrize(("words", "said"), [
    (["--model", "fmnist32_classifier"], "is a classifier"),
    (["--model", "lsun_cat"], "--model_path is not given: name the file of lsun_cat"),
    (["--model", "fmnist32", "--model_path", "x.pt"], "has its file already")])
def test_what_cannot_be_exported(words, said, tmp_path, capsys):
    assert call("export_model", *words, "--out", tmp_path / "out") == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_what_is_not_exported_is_said(tmp_path, caplog):
    with caplog.at_level("INFO"):
        assert call("export_model", "--model", "scenes32", "--out", tmp_path / "out") == 0
    assert "scenes32: its files of --depth_predictor and --depth_prior are not exported" in caplog.messages


def test_the_folder_of_a_training_is_not_overwritten_and_other_weights_are_refused(tmp_path, capsys, tiny_checkpoints):
    for config in (json.dumps({"model": TINY, "training": {}}), "[" * 10**5):
        (tmp_path / "config.json").write_text(config)
        assert call("export_model", "--model", "fmnist32", "--out", tmp_path) == 2
        assert "is the folder of a training" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    assert call("export_model", "--model", "fmnist32", "--out", tmp_path / "run") == 2
    assert "is the folder of a run" in capsys.readouterr().err
    assert call("export_model", "--model", "lsun_cat", "--model_path", tiny_checkpoints / "model.safetensors", "--out",
                tmp_path / "out") == 2
    assert "--num_channels" in capsys.readouterr().err and not (tmp_path / "out").exists()
    save_state(tmp_path / "x.safetensors", load_state_dict(tiny_checkpoints / "model.safetensors"), {"config": "["})
    assert call("export_model", "--model", "lsun_cat", "--model_path", tmp_path / "x.safetensors", "--out",
                tmp_path / "out") == 2
    assert "x.safetensors: states no options of a network" in capsys.readouterr().err


def test_an_export_does_not_mix_with_an_earlier_one_of_other_files(exported, tmp_path, capsys):
    def export(model, out, *more):
        capsys.readouterr()
        return call("export_model", "--model", model, "--out", out, *more), capsys.readouterr().err

    def contents(folder):
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    alone = tmp_path / "alone"
    shutil.copytree(exported, alone)
    (alone / "classifier.safetensors").unlink()
    before = contents(exported)
    code, said = export(alone, exported)                                # a model without a classifier
    assert code == 2 and f"--out {exported}: holds classifier.safetensors of another export" in said
    code, said = export("icons32", exported, "--layout", "diffusers")
    assert code == 2 and "holds config.json, model.safetensors, classifier.safetensors of another" in said
    assert contents(exported) == before
    pipeline = tmp_path / "pipeline"
    for _ in range(2):                                                  # the same files are written anew
        assert export("icons32", pipeline, "--layout", "diffusers")[0] == 0
    before = contents(pipeline)
    code, said = export(alone, pipeline)
    assert code == 2 and contents(pipeline) == before
    assert ("holds model_index.json, unet/config.json, unet/diffusion_pytorch_model.safetensors, "
            "scheduler/scheduler_config.json of another") in said
    assert export("fmnist32", alone)[0] == 0 and find_preset(str(alone)).classifier


@pytest.mark.parametrize(("layout", "weights"), [
    ("hub", "model.safetensors"), ("diffusers", "unet/diffusion_pytorch_model.safetensors")])
def test_files_that_no_export_made_are_not_replaced(layout, weights, tmp_path, capsys):
    foreign = tmp_path / weights
    foreign.parent.mkdir(exist_ok=True)
    save_state(foreign, {"x": torch.zeros(1)}, {"format": "pt"})            # as other tools write it
    (tmp_path / "README.md").write_text("# Mine\n")
    words = ("export_model", "--model", "icons32", "--layout", layout, "--out", tmp_path)
    before = foreign.read_bytes()
    assert call(*words) == 2
    assert f"--out {tmp_path}: holds {weights}, README.md, which no export made" in capsys.readouterr().err
    assert foreign.read_bytes() == before
    foreign.unlink()
    assert call(*words) == 2
    assert f"--out {tmp_path}: holds README.md, which no export made" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "# Mine\n" and not foreign.exists()


@pytest.mark.parametrize("layout", ["hub", "diffusers"])
def test_a_card_that_was_edited_is_kept_and_any_other_is_written_anew(layout, tmp_path, caplog):
    out, card = tmp_path / "out", tmp_path / "out" / "README.md"
    save_state(tmp_path / "m.safetensors", create_model(**TINY).state_dict(), {"config": json.dumps(TINY)})

    def export(licence):
        caplog.clear()
        assert call("export_model", "--model", tmp_path / "m.safetensors", "--licence", licence, "--layout", layout,
                    "--out", out) == 0
        return "README.md: is kept, as it is not as an export writes it" in caplog.text

    assert not export("CC0-1.0") and "licence: CC0-1.0\n" in card.read_text()
    assert not export("of Zo\xe9 \udce9") and "licence: of Zo\xe9 \\udce9\n" in card.read_text()
    assert not export("Apache-2.0") and "licence: Apache-2.0\n" in card.read_text()
    edited = card.read_text().replace("## Limits", "It is for Tuesdays.\n\n## Limits")
    card.write_text(edited)
    assert export("CC0-1.0") and card.read_text() == edited
    card.unlink()
    assert not export("CC0-1.0") and "licence: CC0-1.0\n" in card.read_text()


@pytest.mark.parametrize(("layout", "last"), [
    ("hub", "exports.checkpoint.save_state"), ("diffusers", "unet2d.files.write_json")])
def test_an_export_that_was_interrupted_can_be_made_again(layout, last, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    words = ("export_model", "--model", "icons32", "--layout", layout, "--out", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(f"guided_diffusion.{last}", interrupted)
        assert call(*words) == 130 and len(list(tmp_path.rglob("*.*"))) == 1
    assert call(*words) == 0 and (tmp_path / "README.md").is_file()


def test_damaged_guidance_in_a_folder_is_refused(exported, tmp_path, capsys):
    (tmp_path / "model.safetensors").write_bytes((exported / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text('{"guidance": {"blur_sigma": [1]}}')
    assert call("image_sample", "--model", tmp_path, *SHORT, "--out", tmp_path / "out") == 2
    assert "its guidance must be values by the names of flags" in capsys.readouterr().err


def test_the_classifier_of_another_training_is_exported_only_when_it_is_named(tmp_path, caplog):
    def save(name, build, flags):
        path = tmp_path / name / "model.safetensors"
        path.parent.mkdir(exist_ok=True)
        save_state(path, with_random_weights(build(**flags)).state_dict(), {"config": json.dumps(flags)})
        return path

    def exported(*words):
        caplog.clear()
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        with caplog.at_level("INFO"):
            assert call("export_model", "--model", tmp_path / "rooms", "--out", out, *words) == 0
        there = (out / "classifier.safetensors").exists()
        assert there == ("classifier_sample" in (out / "README.md").read_text())
        return there, [line for line in caplog.messages if "classifier" in line]

    save("rooms", create_model, {**TINY, "class_cond": False})
    beside = str(save("animals", create_classifier, TINY_CLASSIFIER))
    there, (said,) = exported()
    assert not there and beside in said and "--classifier_path" in said
    another = save("plants", create_classifier, TINY_CLASSIFIER)
    assert exported() == (False, [f"{tmp_path / 'rooms'}: several classifiers fit, {beside}, {another}; none is taken "
                                  "unless --classifier_path names it"])
    assert exported("--classifier_path", beside) == (
        True, [f"{tmp_path / 'rooms'}: is exported with the classifier {beside}"])
    own = save("rooms_classifier", create_classifier, TINY_CLASSIFIER)
    there, (said,) = exported()
    assert there and said.endswith(str(own))


@pytest.mark.parametrize(("flags", "said"), [
    (None, "there is no such file"), ({"x": 1}, "states no options of a classifier"),
    ({**TINY_CLASSIFIER, "image_size": 8}, "states image_size 8 of itself")])
def test_a_classifier_of_other_images_is_not_exported(flags, said, tmp_path, capsys):
    path = tmp_path / "c.safetensors"
    if flags:
        save_state(path, {"x": torch.zeros(1)}, {"config": json.dumps(flags)})
    assert call("export_model", "--model", "fmnist32", "--classifier_path", path, "--out", tmp_path / "out") == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["hub", "diffusers"])
def test_the_command_of_a_card_is_one_for_a_folder_of_any_name(layout, tmp_path, monkeypatch):
    folder = tmp_path / 'my "own" model'
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert call("export_model", "--model", "icons32", "--out", ".", "--layout", layout) == 0
    block = (folder / "README.md").read_text().split("```")[1]
    if layout == "hub":
        words = shlex.split(block)
        assert words[words.index("--model") + 1] == folder.name
    else:
        assert folder.name in {node.value for node in ast.walk(ast.parse(block.removeprefix("python")))
                               if isinstance(node, ast.Constant)}
