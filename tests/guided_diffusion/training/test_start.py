"""What a training starts from: an official run that goes on, or weights of which those that fit are loaded."""

import re
import shutil

import numpy as np
import pytest
import torch
from commands import call
from PIL import Image
from tiny_training import largest_difference, log_of, train, train_tiny_classifier, weights

from guided_diffusion import checkpoint
from guided_diffusion.classes import names_of_run, stored_names
from guided_diffusion.errors import UserError
from guided_diffusion.training.start import MOMENTS, official_step

# The order of the parameters in the official code, where the label embedding comes before the input blocks.
PARTS = ("time_embed", "label_emb", "input_blocks", "middle_block", "out")


@pytest.fixture(scope="module")
def own(data_dir, tmp_path_factory):
    """An own training of three steps."""
    return train(data_dir, tmp_path_factory.mktemp("own"), ema_rate="0.9")


def official_files(own, folder, flat):
    """The files of an official run at step 3 whose weights and moments are those of an own one.

    flat: in float16 AdamW had few tensors: two, of all parameters with at most one dimension and of all others, or
    "whole", one of all parameters, as in improved-diffusion.
    """
    folder.mkdir()
    state = checkpoint.load_state_dict(own / "state.safetensors")
    model = {name.removeprefix("model/"): value for name, value in state.items() if name.startswith("model/")}
    model = dict(sorted(model.items(), key=lambda item: next(
        place for place, part in enumerate(PARTS) if item[0].startswith(part))))
    moments = {key: [state[f"optimizer/{key}/{name}"] for name in model] for key in MOMENTS}
    if flat:
        small = [value.ndim <= 1 for value in model.values()]
        groups = [[i for i, one in enumerate(small) if one == kind] for kind in (True, False)]
        groups, shapes = ([[*range(len(small))]], [[-1]]) if flat == "whole" else (groups, [[-1], [1, -1]])
        moments = {key: [torch.cat([values[i].flatten() for i in group]).reshape(shape)
                         for group, shape in zip(groups, shapes, strict=True)]
                   for key, values in moments.items()}
    entries = [{"step": 3, **dict(zip(MOMENTS, values, strict=True))} for values in zip(*moments.values(), strict=True)]
    group = {"lr": 1e-3, "weight_decay": 0.0, "betas": (0.9, 0.999), "eps": 1e-8, "params": list(range(len(entries)))}
    torch.save(model, folder / "model000003.pt")
    torch.save({name: torch.full_like(value, 0.25) for name, value in model.items()}, folder / "ema_0.9_000003.pt")
    torch.save({"state": dict(enumerate(entries)), "param_groups": [group]}, folder / "opt000003.pt")
    return folder / "model000003.pt"


@pytest.mark.parametrize("flat", [False, True, "whole"])
def test_an_official_run_goes_on_where_it_was(data_dir, own, tmp_path, caplog, flat):
    caplog.set_level("INFO")
    path = official_files(own, tmp_path / "official", flat)
    train(data_dir, tmp_path / "out", lr_anneal_steps=6, ema_rate="0.9", save_interval=1, resume_checkpoint=path)
    assert "goes on from step 3 of an official run, with ema_0.9_000003.pt, opt000003.pt" in caplog.text
    assert "missing" not in caplog.text and "counts" not in caplog.text
    assert log_of(tmp_path / "out", "step") == [4, 5, 6]
    assert log_of(tmp_path / "out", "lr") == pytest.approx([1e-3 * (1 - step / 6) for step in (3, 4, 5)], rel=1e-5)
    assert weights(tmp_path / "out", "state")["optimizer/step/out.2.bias"] == 6


def test_it_goes_on_with_fewer_classes_than_its_network_has(data_dir, tmp_path, caplog):
    """As class-conditional official networks, which have 1,000 whatever the images are."""
    caplog.set_level("INFO")
    network, named = {"num_classes": 5, "ema_rate": "0.9"}, tmp_path / "images"
    numbered = train(data_dir, tmp_path / "own", **network)
    path = tmp_path / "model000003.pt"
    torch.save(weights(numbered), path)
    named.mkdir()
    for number in range(4):
        Image.new("L", (8, 8), 60 * number).save(named / f"{'cat' if number < 2 else 'dog'}_{number}.png")
    said = "has 2 classes, and the network knows 5: they are taken for its first ones"
    out = tmp_path / "out"
    for steps in (4, 5):                                        # the second time the folder alone tells the network
        caplog.clear()
        start = {"resume_checkpoint": str(path)} if steps == 4 else {}
        train(named, out, lr_anneal_steps=steps, **network, **start)
        assert said in caplog.text
        assert names_of_run(out) is None                        # as they would name two of the five
    assert log_of(out, "step") == [4, 5] and weights(out)["label_emb.weight"].shape[0] == 5
    moved = (weights(out)["label_emb.weight"] - weights(numbered)["label_emb.weight"]).abs().amax(dim=1)
    assert moved[:2].min() > 0 and moved[2:].max() == 0
    with pytest.raises(UserError, match=r"--num_classes 5: .* pass --num_classes 2"):
        train(named, tmp_path / "anew", **network)
    with pytest.raises(UserError, match=r"--num_classes 7: .* pass --num_classes 2"):
        train(named, tmp_path / "other", **{**network, "num_classes": 7}, resume_checkpoint=str(path))

    classifier = {"num_classes": 5, "val_data_dir": ""}
    trained = train_tiny_classifier(data_dir, tmp_path / "classifier", **classifier)
    torch.save(weights(trained), tmp_path / "classifier" / "model000003.pt")
    train_tiny_classifier(named, tmp_path / "further", **classifier, iterations=4, batch_size=4,
                          resume_checkpoint=str(tmp_path / "classifier" / "model000003.pt"))
    assert caplog.text.count(said) == 2


def test_it_goes_on_as_the_run_itself(data_dir, own, tmp_path):
    same = shutil.copytree(own, tmp_path / "same")
    train(data_dir, same, lr_anneal_steps=6, ema_rate="0.9")
    for flat in (False, True, "whole"):
        path = official_files(own, tmp_path / f"official{flat}", flat)
        out = train(data_dir, tmp_path / f"out{flat}", lr_anneal_steps=6, ema_rate="0.9", resume_checkpoint=path)
        assert largest_difference(weights(same), weights(out)) == 0


def test_its_average_has_no_warm_up(data_dir, own, tmp_path):
    path = official_files(own, tmp_path / "official", flat=False)
    out, values = tmp_path / "out", {"ema_rate": "0.9", "save_interval": 1, "resume_checkpoint": path}
    train(data_dir, out, lr_anneal_steps=4, **values)
    first = weights(out)
    expected = {name: 0.9 * torch.full_like(value, 0.25) + 0.1 * value for name, value in first.items()}
    assert largest_difference(expected, weights(out, "ema_0.9")) < 1e-6
    train(data_dir, out, lr_anneal_steps=5, **values)            # nor after a restart
    expected = {name: 0.9 * expected[name] + 0.1 * value for name, value in weights(out).items()}
    assert largest_difference(expected, weights(out, "ema_0.9")) < 1e-6


def test_what_is_missing_beside_it_is_said(data_dir, own, tmp_path, caplog):
    caplog.set_level("INFO")
    path = official_files(own, tmp_path / "official", flat=False)
    path.with_name("opt000003.pt").unlink()
    train(data_dir, tmp_path / "out", lr_anneal_steps=4, ema_rate="0.9,0.5", resume_checkpoint=path)
    assert "with ema_0.9_000003.pt; ema_0.5_000003.pt is missing, so that this average starts from the weights; " \
           "opt000003.pt is missing, so that AdamW starts anew" in caplog.text
    assert weights(tmp_path / "out", "state")["optimizer/step/out.2.bias"] == 1


def test_what_adamw_had_otherwise_is_said(data_dir, own, tmp_path, caplog):
    caplog.set_level("INFO")
    path = official_files(own, tmp_path / "official", flat=False)
    train(data_dir, tmp_path / "out", lr_anneal_steps=4, ema_rate="0.9", weight_decay=0.1, resume_checkpoint=path)
    assert "has weight_decay 0, but --weight_decay 0.1 counts" in caplog.text and "has lr" not in caplog.text


def test_an_official_classifier_goes_on(data_dir, tmp_path, caplog):
    caplog.set_level("INFO")
    given = train_tiny_classifier(data_dir, tmp_path / "given")
    torch.save(weights(given), tmp_path / "model000003.pt")
    train_tiny_classifier(data_dir, tmp_path / "out", iterations=4, resume_checkpoint=tmp_path / "model000003.pt")
    assert log_of(tmp_path / "out", "step") == [4] and "opt000003.pt is missing" in caplog.text
    with pytest.raises(UserError, match=r"is at step 3 already, and --iterations is 2; give more$"):
        train_tiny_classifier(data_dir, tmp_path / "no", iterations=2, resume_checkpoint=tmp_path / "model000003.pt")


@pytest.mark.parametrize("content, message", [
    ({"weight": torch.zeros(2)}, "is not the state of AdamW"),
    ([1, 2], "is not the state of AdamW"),
    ({"state": {0: {"step": 1, "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}}, "param_groups": [{}]},
     "is the state of AdamW of another network"),
    ({"state": {0: {"step": "one", "exp_avg": 3}}, "param_groups": [{}]}, "is not the state of AdamW"),
])
def test_an_optimiser_that_is_something_else(data_dir, own, tmp_path, content, message):
    path = official_files(own, tmp_path / "official", flat=False)
    torch.save(content, path.with_name("opt000003.pt"))
    with pytest.raises(UserError, match=f"^--resume_checkpoint {path}: .*opt000003.pt: {message}"):
        train(data_dir, tmp_path / "out", lr_anneal_steps=4, ema_rate="0.9", resume_checkpoint=path)


def test_an_official_run_that_is_past_the_end(data_dir, own, tmp_path):
    path = official_files(own, tmp_path / "official", flat=False)
    with pytest.raises(UserError, match=r"--resume_checkpoint .*: is at step 3 already, and --lr_anneal_steps is "
                                        "3; give more$"):
        train(data_dir, tmp_path / "out", ema_rate="0.9", resume_checkpoint=path)
    train(data_dir, tmp_path / "out", ema_rate="0.9", resume_checkpoint=path, lr_anneal_steps=4)


@pytest.mark.parametrize("path, step", [
    ("model010000.pt", 10000), ("logs/model1000000.pt", 1000000), ("gs://bucket/model000000.pt", 0),
    ("https://example.org/model010000.pt?token=1", 10000), ("mymodel010000.pt", None), ("model.safetensors", None),
    ("ema_0.9999_010000.pt", None), ("model5.pt", None)])
def test_the_step_in_an_official_name(path, step):
    assert official_step(path) == step


def test_weights_of_any_other_name_start_at_step_0(data_dir, own, tmp_path, caplog):
    caplog.set_level("INFO")
    train(data_dir, tmp_path / "out", lr_anneal_steps=1, resume_checkpoint=own / "model.safetensors")
    assert "only the weights are used, training starts at step 0" in caplog.text
    assert log_of(tmp_path / "out", "step") == [1]


@pytest.mark.parametrize("changes, anew", [
    ({"num_classes": 3}, ["label_emb.weight (3x128, 2x128 in the file)"]),
    ({"in_channels": 3}, ["input_blocks.0.0.weight (32x3x3x3, 32x1x3x3 in the file)",
                          "out.2.weight (6x32x3x3, 2x32x3x3 in the file)", "out.2.bias (6, 2 in the file)"]),
    ({"learn_sigma": False}, ["out.2.weight (1x32x3x3, 2x32x3x3 in the file)", "out.2.bias (1, 2 in the file)"]),
    ({}, []),
])
def test_weights_that_fit_are_loaded_and_others_start_anew(data_dir, own, tmp_path, caplog, changes, anew):
    caplog.set_level("INFO")
    train(data_dir, tmp_path / "out", lr=1e-12, lr_anneal_steps=1, init_from=own / "model.safetensors", **changes)
    line, = (line for line in caplog.messages if line.startswith("--init_from"))
    assert line.endswith(f"; these start anew: {', '.join(anew)}" if anew else "training starts at step 0")
    given, now = weights(own), weights(tmp_path / "out")
    fitting = [name for name in now if name in given and now[name].shape == given[name].shape]
    assert largest_difference({name: now[name] for name in fitting}, {name: given[name] for name in fitting}) < 1e-9
    assert len(fitting) + len(anew) == len(now)
    assert largest_difference(now, weights(tmp_path / "out", "ema_0.9")) < 1e-9        # averages start from them


def test_classes_that_are_called_otherwise_are_said(data_dir, own, tmp_path, caplog):
    caplog.set_level("INFO")
    arrays = {"arr_0": np.full((4, 8, 8, 3), 9, np.uint8), "arr_1": np.arange(4) % 2}
    np.savez(tmp_path / "ants.npz", **arrays, class_names=np.array(["ant", "bee"]))
    np.savez(tmp_path / "cows.npz", **arrays, class_names=np.array(["bee", "cow"]))
    start = train(tmp_path / "ants.npz", tmp_path / "ants", in_channels=3, lr_anneal_steps=1) / "model.safetensors"
    train(tmp_path / "ants.npz", tmp_path / "same", in_channels=3, lr_anneal_steps=1, init_from=start)
    assert "was trained on" not in caplog.text
    train(tmp_path / "cows.npz", tmp_path / "cows", in_channels=3, lr_anneal_steps=1, init_from=start)
    assert f"--init_from {start}: was trained on 2 classes: 0 ant, 1 bee; here the numbers mean other" in caplog.text


@pytest.fixture(scope="module")
def two_sets(tmp_path_factory):
    """The same images twice: with the names of their classes, and with numbers only."""
    folder = tmp_path_factory.mktemp("sets")
    arrays = {"arr_0": np.full((4, 8, 8, 3), 9, np.uint8), "arr_1": np.arange(4) % 2}
    np.savez(folder / "numbers.npz", **arrays)
    np.savez(folder / "named.npz", **arrays, class_names=np.array(["ant", "bee"]))
    return {name: folder / f"{name}.npz" for name in ("named", "numbers")}


TRAINERS = [(train, {"lr_anneal_steps": 1}, {"lr_anneal_steps": 2}),
            (train_tiny_classifier, {"iterations": 1, "val_data_dir": ""}, {"iterations": 2, "val_data_dir": ""})]


@pytest.mark.parametrize(("trainer", "steps", "_"), TRAINERS)
@pytest.mark.parametrize(("option", "said", "kept"), [
    ("init_from", "was trained on 2 classes: 0 ant, 1 bee; here the classes have numbers only, which may mean others, "
                  "so that the new weights state no names", None),
    ("resume_checkpoint", "was trained on 2 classes: 0 ant, 1 bee; the classes of {numbers} have numbers only, which "
                          "are taken for these", ("ant", "bee")),
])
def test_numbers_after_weights_with_names_are_said(two_sets, tmp_path, caplog, trainer, steps, _, option, said, kept):
    caplog.set_level("INFO")
    start = trainer(two_sets["named"], tmp_path / "named", in_channels=3, **steps) / "model.safetensors"
    out = trainer(two_sets["numbers"], tmp_path / "out", in_channels=3, **steps, **{option: start})
    assert caplog.messages.count(f"--{option} {start}: {said.format(**two_sets)}") == 1
    for names in (stored_names(out / "model.safetensors"), names_of_run(out)):
        assert (None if names is None else names.names) == kept


@pytest.mark.parametrize("option", ["init_from", "resume_checkpoint"])
def test_names_after_weights_with_numbers_are_said(two_sets, tmp_path, caplog, option):
    caplog.set_level("INFO")
    start = train(two_sets["numbers"], tmp_path / "numbers", in_channels=3, lr_anneal_steps=1) / "model.safetensors"
    train(two_sets["numbers"], tmp_path / "same", in_channels=3, lr_anneal_steps=1, **{option: start})
    assert "was trained on" not in caplog.text
    out = train(two_sets["named"], tmp_path / "out", in_channels=3, lr_anneal_steps=1, **{option: start})
    assert (f"--{option} {start}: was trained on 2 classes without names; their numbers are taken for 2 classes: "
            "0 ant, 1 bee") in caplog.messages
    assert names_of_run(out).names == ("ant", "bee")


@pytest.mark.parametrize(("trainer", "steps", "more"), TRAINERS)
@pytest.mark.parametrize(("first", "then", "said"), [
    ("named", "numbers", "have numbers only, and those of the run in .* have names, so .* give data whose classes have "
                         "names, or"),
    ("numbers", "named", "have names, and those of the run in .* have numbers only, so .* give data whose classes have "
                         "numbers only, or"),
])
def test_names_and_numbers_do_not_follow_each_other_in_a_run(two_sets, tmp_path, trainer, steps, more, first, then,
                                                             said):
    out = trainer(two_sets[first], tmp_path / "run", in_channels=3, **steps)
    before = (out / "config.json").read_bytes()
    with pytest.raises(UserError, match=f"^--data_dir {two_sets[then]}: its classes {said} another --out$"):
        trainer(two_sets[then], out, in_channels=3, **more, change="data_dir")
    assert (out / "config.json").read_bytes() == before
    trainer(two_sets[first], out, in_channels=3, **more)


def test_a_run_keeps_the_names_that_its_numbers_were_taken_for(two_sets, tmp_path):
    start = train(two_sets["named"], tmp_path / "named", in_channels=3, lr_anneal_steps=1) / "model.safetensors"
    for steps in (1, 2):
        out = train(two_sets["numbers"], tmp_path / "out", in_channels=3, lr_anneal_steps=steps,
                    resume_checkpoint=start)
    assert len(log_of(out, "loss")) == 2 and stored_names(out / "model.safetensors").names == ("ant", "bee")


def test_an_entry_of_the_file_is_chosen(data_dir, own, tmp_path, caplog):
    caplog.set_level("INFO")
    torch.save({"model": weights(own), "ema": weights(own, "ema_0.9")}, tmp_path / "x.pt")
    values = {"lr_anneal_steps": 1, "init_from": tmp_path / "x.pt", "lr": 1e-12}
    out = train(data_dir, tmp_path / "out", **values, checkpoint_entry="model")
    assert "its entry model is taken of model, ema" in caplog.text
    assert largest_difference(weights(out), weights(own)) < 1e-9
    train(data_dir, out, lr_anneal_steps=1, lr=1e-12)            # and counts no more
    assert "there is nothing to do" in caplog.text


def test_classes_come_and_go(data_dir, own, tmp_path, caplog):
    caplog.set_level("INFO")
    plain = train(data_dir, tmp_path / "plain", lr_anneal_steps=1, class_cond=False,
                  init_from=own / "model.safetensors")
    assert "not used: label_emb.weight" in caplog.text
    train(data_dir, tmp_path / "named", lr_anneal_steps=1, init_from=plain / "model.safetensors")
    assert "label_emb.weight (2x128, not in the file)" in caplog.text


def test_four_channels_from_weights_of_one_and_samples_of_four(data_dir, own, tmp_path, capsys):
    """RGB and a fourth channel, as depth, from an .npz file; samples of four channels go on and are no pictures."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 4), np.uint8)
    np.savez(tmp_path / "rgbd.npz", pixels, np.arange(8) % 2)
    out = train(tmp_path / "rgbd.npz", tmp_path / "out", in_channels=4, lr_anneal_steps=1,
                init_from=own / "model.safetensors")
    for count in (2, 3):
        assert call("image_sample", "--model", out, "--timestep_respacing", 2, "--batch_size", 1, "--num_samples",
                    count, "--out", tmp_path / "samples") == 0
    with np.load(tmp_path / "samples" / "samples_3x8x8x4.npz") as file:
        assert file["arr_0"].shape == (3, 8, 8, 4) and file["arr_1"].shape == (3,)
    capsys.readouterr()
    assert call("compare", tmp_path / "samples", "--out", tmp_path / "comparison.png") == 2
    assert "images must be (N, H, W, 3), RGB" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"arr_0 is \(8, 8, 8, 4\) uint8, must be \(N, 8, 8, 5\) uint8"):
        train(tmp_path / "rgbd.npz", tmp_path / "other", in_channels=5)


def test_another_number_of_classes_is_no_run_that_goes_on(data_dir, own, tmp_path):
    with pytest.raises(UserError, match=r"label_emb.weight first\); --init_from takes the others$"):
        train(data_dir, tmp_path / "out", num_classes=3, resume_checkpoint=own / "model.safetensors")


@pytest.mark.parametrize("flag", ["init_from", "resume_checkpoint"])
@pytest.mark.parametrize("name, message", [
    ("nowhere.pt", "there is no such file"), ("other.safetensors", "does not fit the network, "),
    ("state.safetensors", "is the state of a training; name ema_0.9.safetensors or"), ("", "is a folder"),
    ("config.json", "is no checkpoint")])
def test_errors_name_the_flag(data_dir, own, tmp_path, flag, name, message):
    path = own / name
    if name.startswith("other"):
        path = train(data_dir, tmp_path / "wide", num_channels=64, lr_anneal_steps=1) / "model.safetensors"
    with pytest.raises(UserError, match=f"^--{flag} {re.escape(str(path))}: {message}") as error:
        train(data_dir, tmp_path / "out", **{flag: path})
    assert "\n" not in str(error.value)


def test_only_one_start(data_dir, tmp_path):
    with pytest.raises(UserError, match=r"--init_from a.pt: cannot be given with --resume_checkpoint"):
        train(data_dir, tmp_path, init_from="a.pt", resume_checkpoint="b.pt")


def test_a_start_counts_no_more_once_there_is_a_state(data_dir, own, tmp_path, caplog):
    given = tmp_path / "given.safetensors"
    given.write_bytes((own / "model.safetensors").read_bytes())
    train(data_dir, tmp_path / "out", init_from=given)
    given.unlink()
    train(data_dir, tmp_path / "out", init_from=given, lr_anneal_steps=4)
    caplog.set_level("INFO")
    train(data_dir, tmp_path / "out", lr_anneal_steps=5)
    assert "--init_from ''" in caplog.text and "it counts at the start only" in caplog.text
