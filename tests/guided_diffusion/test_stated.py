"""What checkpoints state of themselves: defaults, contradictions, and the folder of a training as a model."""

import json
import logging

import pytest
import torch
from networks import TINY, TINY_CLASSIFIER

from guided_diffusion import load
from guided_diffusion.build import DiffusionOptions, ModelOptions
from guided_diffusion.checkpoint import save_state
from guided_diffusion.errors import UserError
from guided_diffusion.options import parse_options
from guided_diffusion.runs.options import SampleOptions, option_classes, preset_values
from guided_diffusion.script_util import create_classifier, create_model
from guided_diffusion.stated import starting_values, statement_of
from guided_diffusion.train_util import TrainOptions

PROCESS = {"diffusion_steps": 100, "noise_schedule": "cosine", "predict_v": True, "rescale_timesteps": False}
RUN = {"use_fp16": False, "dropout": 0.1, "timestep_respacing": "7", "use_kl": True, "sigma_small": True}
CONFIG = {**TINY, "num_heads_upsample": -1, "num_head_channels": -1, **PROCESS, **RUN}
CLASSIFIER = {**TINY_CLASSIFIER, **PROCESS, "predict_v": False}


@pytest.fixture
def save(tmp_path):
    """Writes a checkpoint below tmp_path that states a configuration; of what it holds nothing is read here."""
    weights = create_model(**TINY).state_dict()

    def write(name, config=CONFIG, weights=weights):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save_state(path, weights, None if config is None else {"config": json.dumps(config)})
        return str(path)
    return write


@pytest.fixture
def save_classifier(tmp_path, save):
    """Writes the file of a classifier that states whether it was trained on noised images."""
    def write(name, noised):
        path = save(name)
        save_state(path, {"x": torch.zeros(1)}, {"config": json.dumps(CLASSIFIER), "noised": json.dumps(noised)})
        return path
    return write


def refusal(**given):
    with pytest.raises(UserError) as caught:
        preset_values(given)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_a_file_states_is_the_default(save):
    values = preset_values({"model_path": save("x.safetensors")})
    assert values == {name: value for name, value in CONFIG.items() if name not in RUN} | {"sigma_small": True}


def test_a_file_of_pickled_weights_or_without_options_states_nothing(save, tmp_path):
    for path in (save("x.safetensors", None), save("y.pt", None), save("z.safetensors", {"large_size": 64}),
                 str(tmp_path / "none.safetensors"), "https://example.invalid/model.pt"):
        assert preset_values({"model_path": path}) == {}


@pytest.mark.parametrize(("flag", "value", "stated"), [
    ("image_size", 32, "16"), ("noise_schedule", "linear", "cosine"), ("diffusion_steps", 1000, "100"),
    ("predict_v", False, "True"), ("num_heads", 4, "2"), ("num_heads_upsample", 1, "-1"), ("num_channels", 64, "32"),
    ("learn_sigma", False, "True"), ("num_classes", 3, "2"), ("class_cond", False, "True"),
    ("channel_mult", "1,2", "1,1"), ("attention_resolutions", "16", "8"), ("rescale_timesteps", True, "False"),
    ("num_head_channels", 16, "-1")])
def test_a_flag_that_contradicts_the_file_is_refused(save, flag, value, stated):
    path = save("x.safetensors")
    assert refusal(model_path=path, **{flag: value}) == (
        f"--{flag} {value}: {path} states {flag} {stated} of itself, pass --{flag} {stated} or leave it out")


def test_several_contradictions_are_one_sentence(save):
    message = refusal(model_path=save("x.safetensors"), noise_schedule="linear", diffusion_steps=1000)
    assert message.startswith("--diffusion_steps 1000 --noise_schedule linear: ") and "leave them out" in message


@pytest.mark.parametrize("given", [
    {"use_fp16": True}, {"use_bf16": True}, {"dropout": 0.5}, {"timestep_respacing": "5"}, {"use_kl": False},
    {"use_checkpoint": True}, {"rescale_learned_sigmas": True}, {"sigma_small": False}, {"num_heads": 2},
    {"channel_mult": "1,1.0"}, {"attention_resolutions": "8,32"}, {"num_heads_upsample": 2}])
def test_how_a_network_is_run_may_differ_and_what_means_the_same_is_the_same(save, given):
    preset_values({"model_path": save("x.safetensors"), **given})


def test_heads_that_have_no_effect_are_not_compared(save):
    preset_values({"model_path": save("x.safetensors", {**CONFIG, "num_head_channels": 32}), "num_heads": 7})


def test_attention_at_sizes_that_are_none_is_left_out_of_what_is_stated(save):
    stated = statement_of(save("x.safetensors", {**CONFIG, "attention_resolutions": "8,4"}), "diffusion")
    assert stated.facts["attention_resolutions"] == "8"


def test_options_that_are_not_allowed_name_the_file(save):
    path = save("x.safetensors", {**CONFIG, "num_channels": "many"})
    assert refusal(model_path=path).startswith(f"{path}: states options that are not allowed (--num_channels 'many'")


def test_bundled_models_state_their_options():
    message = refusal(model="fmnist32", noise_schedule="linear")
    assert message.startswith("--noise_schedule linear: ") and "states noise_schedule cosine of itself" in message


def test_what_is_taken_from_a_file_is_said_in_one_line(save, caplog):
    with caplog.at_level(logging.INFO, "guided_diffusion"):
        preset_values({"model_path": save("x.safetensors"), "noise_schedule": "cosine"})
    message, = caplog.messages
    assert "trained with" in message and "diffusion_steps 100" in message and "noise_schedule" not in message


# Where a training starts


def test_a_training_starts_with_what_its_file_states(save, tmp_path, caplog):
    path = save("x.safetensors")
    assert starting_values({"init_from": path}, "diffusion") == preset_values({"model_path": path})
    assert starting_values({"init_from": path}, "classifier") == starting_values({}, "diffusion") == {}
    assert starting_values({"resume_checkpoint": str(tmp_path / "model000001.pt")}, "diffusion") == {}
    caplog.set_level("INFO")
    starting_values({"init_from": path, "num_classes": 7, "noise_schedule": "linear"}, "diffusion")
    assert caplog.messages[-1] == (f"--init_from {path}: was trained with noise_schedule cosine; this training has "
                                   "noise_schedule linear")
    for flag in ("init_from", "resume_checkpoint"):
        with pytest.raises(UserError, match=r"^--num_heads 4: .* states num_heads 2 of itself"):
            starting_values({flag: path, "num_heads": 4}, "diffusion")


# Classifiers


def test_a_classifier_states_its_options(save):
    path = save("c.safetensors", CLASSIFIER)
    values = preset_values({"model_path": save("x.safetensors"), "classifier_path": path})
    assert values["classifier_width"] == 32 and values["predict_v"] is True
    assert refusal(classifier_path=path, classifier_width=64).startswith(
        f"--classifier_width 64: {path} states classifier_width 32 of itself")


@pytest.mark.parametrize("change", [{"noise_schedule": "linear"}, {"diffusion_steps": 50}, {"image_size": 32},
                                    {"num_classes": 3}])
def test_a_classifier_of_other_noise_images_or_classes_than_the_network_is_refused(save, change):
    (name, value), = change.items()
    path = save("c.safetensors", {**CLASSIFIER, **change})
    assert refusal(model_path=save("x.safetensors"), classifier_path=path) == (
        f"--classifier_path {path}: states {name} {value} of itself, and the diffusion network that it is to guide has "
        f"{name} {CONFIG[name]}")


def test_a_classifier_of_clean_images_is_refused_as_a_noise_aware_one(save, save_classifier):
    model, clean = save("x.safetensors"), save_classifier("clean.safetensors", False)
    assert refusal(model_path=model, classifier_path=clean) == (
        f"--classifier_path {clean}: must be a classifier of noised images, and states that it was trained on clean "
        "ones (noised False); --clean_classifier_path takes it")
    preset_values({"model_path": model, "classifier_path": save_classifier("noised.safetensors", True)})
    for name, noised in (("clean", False), ("noised", True)):
        path = save_classifier(f"{name}.safetensors", noised)
        preset_values({"model_path": model, "clean_classifier_path": path, "clean_classifier_scale": 1.0})


def test_a_network_without_classes_takes_those_of_its_classifier(save):
    values = preset_values({"model_path": save("x.safetensors", {**CONFIG, "class_cond": False, "num_classes": 1000}),
                            "classifier_path": save("c.safetensors", CLASSIFIER)})
    assert values["num_classes"] == 2


def test_a_network_without_classes_takes_those_of_a_clean_classifier_that_guides_it(save):
    plain = save("x.safetensors", {**CONFIG, "class_cond": False, "num_classes": 1000})
    clean = {"model_path": plain, "clean_classifier_path": save("c.safetensors", CLASSIFIER)}
    assert "num_classes" not in preset_values(clean)                        # it is off
    guided = {**clean, "clean_classifier_scale": 1.0}
    assert preset_values(guided)["num_classes"] == 2
    assert refusal(**guided, num_classes=3) == (
        f"--num_classes 3: {clean['clean_classifier_path']} states num_classes 2 of itself, pass --num_classes 2 or "
        "leave it out")
    assert preset_values({**guided, "model_path": save("y.safetensors")})["num_classes"] == CONFIG["num_classes"]


# The folder of a training


def test_the_folder_of_a_training_is_a_model(save, tmp_path, caplog):
    for name in ("model", "ema_0.99", "ema_0.999", "ema_0.9"):
        save(f"x/{name}.safetensors")
    save("x_classifier/model.safetensors", CLASSIFIER)
    save("another/model.safetensors", CLASSIFIER)
    with caplog.at_level(logging.INFO, "guided_diffusion"):
        values = preset_values({"model": str(tmp_path / "x")})
    assert values["model_path"] == str(tmp_path / "x" / "ema_0.999.safetensors")
    assert values["classifier_path"] == str(tmp_path / "x_classifier" / "model.safetensors")
    assert values["classifier_width"] == 32 and values["noise_schedule"] == "cosine"
    assert values["model_path"] in caplog.messages[0] and values["classifier_path"] in caplog.messages[0]


@pytest.mark.parametrize(("classifiers", "expected"), [
    ({}, None), ({"one": {}}, "one"), ({"one": {}, "two": {}}, None), ({"one": {}, "two": {"image_size": 32}}, "one"),
    ({"one": {}, "x/classifier": {}}, "x/classifier"), ({"x_classifier": {"noise_schedule": "linear"}}, None)])
def test_the_classifier_beside_it_is_the_one_that_fits(save, tmp_path, classifiers, expected):
    save("x/model.safetensors")
    for name, change in classifiers.items():
        save(f"{name}/model.safetensors", {**CLASSIFIER, **change})
    found = preset_values({"model": str(tmp_path / "x")}).get("classifier_path")
    assert found == (None if expected is None else str(tmp_path / expected / "model.safetensors"))


def test_several_classifiers_that_fit_are_named(save, tmp_path, caplog):
    save("x/model.safetensors")
    both = [save(f"{name}/model.safetensors", CLASSIFIER) for name in ("one", "two")]
    caplog.set_level("INFO")
    line = (f"--model {tmp_path / 'x'}: several classifiers fit, {', '.join(both)}; none is taken unless "
            "--classifier_path names it")
    preset_values({"model": str(tmp_path / "x")})
    assert line in caplog.messages


def test_the_classifier_of_other_classes_does_not_fit(save, tmp_path):
    for name, config, classes in (("x", CONFIG, ["ant", "bee"]), ("one", CLASSIFIER, ["bee", "ant"]),
                                  ("two", CLASSIFIER, ["ant", "bee"])):
        save_state(save(f"{name}/model.safetensors"), {"x": torch.zeros(1)},
                   {"config": json.dumps(config), "class_names": json.dumps(classes)})
    found = preset_values({"model": str(tmp_path / "x")})["classifier_path"]
    assert found == str(tmp_path / "two" / "model.safetensors")


def test_a_classifier_of_clean_images_does_not_fit(save_classifier, save, tmp_path):
    save("x/model.safetensors")
    save_classifier("x_clean/model.safetensors", False)
    assert "classifier_path" not in preset_values({"model": str(tmp_path / "x")})
    noised = save_classifier("noised/model.safetensors", True)
    assert preset_values({"model": str(tmp_path / "x")})["classifier_path"] == noised


def test_folders_that_are_no_training_are_refused(save, tmp_path):
    assert "holds no weights of a training" in refusal(model=str(tmp_path))
    save("c/model.safetensors", CLASSIFIER)
    assert "is a model of kind classifier" in refusal(model=str(tmp_path / "c"))
    save("bare/model.safetensors", None)
    assert refusal(model=str(tmp_path / "bare")).endswith("pass the file as --model_path, and its options as flags")


def test_a_training_loads_in_python(save, tmp_path):
    save("x/model.safetensors")
    save("x/classifier/model.safetensors", CLASSIFIER, create_classifier(**TINY_CLASSIFIER).state_dict())
    model, diffusion, classifier = load(str(tmp_path / "x"), device="cpu", timestep_respacing="5")
    assert model.num_heads == 2 and diffusion.original_num_steps == 100 and diffusion.num_timesteps == 5
    assert classifier is not None
    alone = load(model_path=tmp_path / "x" / "model.safetensors", device="cpu")
    assert alone.classifier is None and alone.diffusion.original_num_steps == 100
    with pytest.raises(UserError, match="states noise_schedule cosine"):
        load(str(tmp_path / "x"), noise_schedule="linear")
    with pytest.raises(UserError, match="name a model"):
        load()


# Its config.json


def parsed(*words, classes=None):
    options = parse_options([str(word) for word in words], *(classes or (SampleOptions, *option_classes())),
                            preset=None if classes else preset_values)
    return {type(one): one for one in options}


def test_the_config_of_a_training_gives_its_network_and_leaves_out_its_training(save, tmp_path, caplog):
    weights = save("x/ema_0.9.safetensors")
    record = {"model": CONFIG, "training": {"data_dir": "photos", "out": "runs/x", "seed": 7, "lr": 0.1}}
    (tmp_path / "x" / "config.json").write_text(json.dumps(record))
    with caplog.at_level(logging.INFO, "guided_diffusion"):
        options = parsed("--config", tmp_path / "x" / "config.json", "--num_samples", 3)
    assert options[SampleOptions].model_path == weights and options[DiffusionOptions].predict_v
    assert (options[SampleOptions].out, options[SampleOptions].seed) == ("", 0)
    assert "data_dir, out, seed, lr are left out" in caplog.messages[0]
    options = parsed("--config", tmp_path / "x" / "config.json", classes=(ModelOptions, DiffusionOptions, TrainOptions))
    assert options[TrainOptions].data_dir == "photos" and options[TrainOptions].seed == 7


def test_other_configurations_with_unknown_options_are_refused_still(tmp_path):
    (tmp_path / "run.yaml").write_text("training: 3\nlr: 0.1\n")
    with pytest.raises(UserError, match=r"training in .*: no such option"):
        parsed("--config", tmp_path / "run.yaml")
