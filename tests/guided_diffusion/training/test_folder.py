"""The folder of a training: one job, options that may change and others, states and records that are something else."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_training import log_of, train, train_tiny_classifier

from guided_diffusion import checkpoint, files, train_util
from guided_diffusion.digests import data_digest
from guided_diffusion.errors import UserError
from guided_diffusion.training.folder import Record, code_of_this_library, locked_folder


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    """The folder of a finished training of three steps."""
    return train(data_dir, tmp_path_factory.mktemp("finished"))


@pytest.fixture
def run(finished, tmp_path):
    """A copy of that folder."""
    return shutil.copytree(finished, tmp_path / "run")


def test_a_second_job_is_refused(data_dir, run, monkeypatch):
    monkeypatch.setattr(files, "PAUSE", 0)
    with locked_folder(run), pytest.raises(UserError, match=r"--out .*run: another job is working there \(process"):
        train(data_dir, run, lr_anneal_steps=4)
    train(data_dir, run, lr_anneal_steps=4)
    assert not (run / ".lock").exists()


def test_a_folder_whose_state_could_not_be_read_again_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--out .*caf.: is no name in UTF-8"), locked_folder(tmp_path / "caf\udce9"):
        pass


@pytest.mark.parametrize("changes", [
    {"num_channels": 64}, {"diffusion_steps": 20}, {"ema_rate": "0.9"}, {"use_bf16": True},
    {"schedule_sampler": "loss-second-moment"}])
def test_what_the_state_depends_on_stays(data_dir, run, changes):
    (name, value), = changes.items()
    with pytest.raises(UserError, match=f"--{name} {value}: the run in .* has .*another --out$"):
        train(data_dir, run, **{"lr_anneal_steps": 4, **changes})


@pytest.mark.parametrize("changes", [
    {"seed": 1}, {"lr": 2e-3}, {"weight_decay": 0.1}, {"lr_warmup_steps": 2}, {"random_flip": False},
    {"random_crop": True}, {"lr_anneal_steps": 2}, {"fp16_scale_growth": 0.1}, {"batch_size": 2}])
def test_what_changes_the_result_is_refused_unless_it_is_meant(data_dir, run, changes):
    (name, value), = changes.items()
    before = (run / "state.safetensors").read_bytes()
    with pytest.raises(UserError, match=f"--{name} {value}.*: the run in .* --change {name}") as error:
        train(data_dir, run, **{"lr_anneal_steps": 4, **changes})
    assert "\n" not in str(error.value) and (run / "state.safetensors").read_bytes() == before
    train(data_dir, run, **{"lr_anneal_steps": 4, **changes}, change=name)


def test_a_training_of_another_kind_of_network_is_named_first(data_dir, run):
    """Not its options one after the other, each with the advice to change it."""
    with pytest.raises(UserError, match=r"the training of a network of another kind, diffusion; name another$"):
        train_tiny_classifier(data_dir, run, lr=0.1)


@pytest.mark.parametrize("name", ["resume_checkpoint", "init_from"])
def test_another_start_is_not_promised_once_there_is_a_state(data_dir, run, name):
    with pytest.raises(UserError, match=rf"--{name} other\.pt: counts at the start only, and the run in .* began with "
                                        r"''; leave it out, or give another --out$"):
        train(data_dir, run, lr_anneal_steps=4, **{name: "other.pt"})
    train(data_dir, run, lr_anneal_steps=4)


@pytest.mark.parametrize("changes", [{"microbatch": 2}, {"compile": True}])
def test_how_a_batch_is_computed_changes_the_result_of_dropout(data_dir, tmp_path, monkeypatch, changes):
    monkeypatch.setattr(torch, "compile", lambda model: model)
    (name, value), = changes.items()
    train(data_dir, tmp_path, dropout=0.3)
    with pytest.raises(UserError, match=f"--{name} {value}: the run in .* or --change {name} to go on"):
        train(data_dir, tmp_path, dropout=0.3, lr_anneal_steps=4, **changes)
    train(data_dir, tmp_path, dropout=0.3, lr_anneal_steps=4, **changes, change=name)


@pytest.mark.parametrize("dropout", [0, 0.3])
def test_another_number_of_ranks_changes_the_result_of_dropout(tmp_path, dropout):
    one, two = (Record({"dropout": dropout}, {"batch_size": 4 // ranks}, ranks=ranks) for ranks in (1, 2))
    assert one.continues(one, tmp_path) == []
    if not dropout:
        line, = two.continues(one, tmp_path)
        assert "as many images a step as before" in line
        return
    with pytest.raises(UserError, match=r"--batch_size 2 on 2 rank\(s\): the run in .* has 4 on 1, and another number "
                                        "of ranks or images a step, with dropout, changes its result; .* --change"):
        two.continues(one, tmp_path)
    changed = Record(two.model, {**two.training, "change": "batch_size"}, ranks=2)
    line, = changed.continues(one, tmp_path)
    assert "as --change says" in line


@pytest.mark.parametrize("changes, why", [
    ({"log_interval": 2}, "the result is the same"), ({"save_interval": 1}, "the result is the same"),
    ({"microbatch": 2}, "the same up to rounding"), ({"use_checkpoint": True}, "the result is the same"),
    ({"lr_anneal_steps": 5}, "the end moves"), ({"lr_anneal_steps": 4, "skip_damaged": True}, "left out from here on")])
def test_what_does_not_matter_is_said(data_dir, run, caplog, changes, why):
    caplog.set_level("INFO")
    name, value = list(changes.items())[-1]
    train(data_dir, run, **changes)
    line, = (line for line in caplog.messages if line.startswith(f"--{name} {value}: was "))
    assert why in line


def test_the_validation_may_change(data_dir, tmp_path, caplog):
    train_tiny_classifier(data_dir, tmp_path, iterations=1)
    caplog.set_level("INFO")
    train_tiny_classifier(data_dir, tmp_path, iterations=2, eval_interval=1, val_data_dir="")
    assert len([line for line in caplog.messages if "the result is the same" in line]) == 2
    with pytest.raises(UserError, match="--noised False: the run in"):
        train_tiny_classifier(data_dir, tmp_path, iterations=2, noised=False)


def test_the_same_images_may_lie_elsewhere(data_dir, run, tmp_path, caplog):
    caplog.set_level("INFO")
    elsewhere = shutil.copytree(data_dir, tmp_path / "elsewhere")
    train(elsewhere, run, lr_anneal_steps=4)
    assert "the images are the same" in caplog.text
    path = elsewhere / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1] + b"0")         # MNIST and its like are files of the same names and sizes
    with pytest.raises(UserError, match=r"--data_dir .*elsewhere: holds other images than when the run in .* began"):
        Record({}, {"data_dir": str(elsewhere)}, data=data_digest(str(elsewhere))).continues(
            Record({}, {"data_dir": str(elsewhere)}, data=data_digest(str(data_dir))), run)


@pytest.mark.parametrize("changes", [
    {"seed": 5}, {"lr_anneal_steps": 4}, {"skip_damaged": True}, {"batch_size": 2}, {"ema_rate": "0.9"},
    {"num_channels": 64}])
def test_weights_of_another_training_are_not_mixed_with_those_of_a_new_one(data_dir, run, changes):
    (run / "state.safetensors").unlink()
    before = {path.name: path.read_bytes() for path in run.glob("*.safetensors")}
    with pytest.raises(UserError, match=r"run: has model.safetensors, ema_0.9.safetensors, ema_0.99.safetensors, which "
                                        r"are not of this training, and no state.safetensors to go on from"):
        train(data_dir, run, **changes)
    assert {path.name: path.read_bytes() for path in run.glob("*.safetensors")} == before
    for name in before:
        (run / name).unlink()
    train(data_dir, run, **changes)


@pytest.mark.parametrize("name", ["snapshot_8_ema_power_0.1", "reconstructed_0.07", "ema_0.9999", "model"])
def test_weights_of_a_training_that_is_not_known_are_not_mixed_with_those_of_a_new_one(data_dir, run, tmp_path, name):
    (tmp_path / "new").mkdir()
    shutil.copy(run / "model.safetensors", tmp_path / f"new/{name}.safetensors")
    with pytest.raises(UserError, match=rf"--out .*new: has {name}.safetensors, which are not .*; name another folder"):
        train(data_dir, tmp_path / "new")


@pytest.mark.parametrize(("unwritten", "left"), [("model.safetensors", 8), ("state.safetensors", 11)])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_same_training_makes_its_files_again(data_dir, tmp_path, monkeypatch, caplog, unwritten, left, dropout):
    def killed_save(path, tensors, metadata=None):
        if path.name == unwritten:
            raise KeyboardInterrupt
        save_state(path, tensors, metadata)

    save_state = checkpoint.save_state
    values = {"snapshot_images": 4, "lr_anneal_steps": 4, "dropout": dropout}
    whole = train(data_dir, tmp_path / "whole", **values)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "save_state", killed_save)
        train(data_dir, tmp_path / "killed", **values)
    assert len(list((tmp_path / "killed").glob("*.safetensors"))) == left
    caplog.set_level("INFO")
    train(data_dir, tmp_path / "killed", log_interval=2, **values)
    assert "snapshot_4_ema_0.9.safetensors" in caplog.text and "starts anew, and writes over them" in caplog.text
    for path in whole.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "killed" / path.name).read_bytes()


def test_images_are_counted_on_where_the_batch_changes(data_dir, run):
    values = {"snapshot_images": "14,20,36", "batch_size": 8, "change": "batch_size"}
    train(data_dir, run, lr_anneal_steps=5, **values)                   # 12 images so far, then 20 and 28
    train(data_dir, run, lr_anneal_steps=8, **{**values, "batch_size": 4})
    assert log_of(run, "samples") == [4, 8, 12, 20, 28, 32, 36, 40]
    assert sorted(path.name for path in run.glob("snapshot_*_ema_0.9.*")) == [
        "snapshot_20_ema_0.9.safetensors", "snapshot_36_ema_0.9.safetensors"]
    assert checkpoint.read_metadata(run / "snapshot_36_ema_0.9.safetensors")["step"] == "7"


@pytest.mark.parametrize("before, after", [(2, 4), (4, 2), (3, 5)])
def test_an_epoch_reads_each_image_once_where_the_batch_changes(tmp_path, monkeypatch, before, after):
    images = np.arange(32, dtype=np.uint8).reshape(32, 1, 1, 1) * 8 + np.zeros((8, 8, 3), np.uint8)
    np.savez(tmp_path / "images.npz", arr_0=images)
    read, batch = [], train_util.TrainLoop._batch

    def reading(loop, images, *others):
        read.extend(((images[:, 0, 0, 0] + 1) * 127.5 / 8).round().int().tolist())
        return batch(loop, images, *others)

    monkeypatch.setattr(train_util.TrainLoop, "_batch", reading)
    values = {"class_cond": False, "change": "batch_size"}
    steps = 4 + -(-(32 - 4 * before) // after)
    train(tmp_path / "images.npz", tmp_path / "run", lr_anneal_steps=4, batch_size=before, **values)
    for end in (6, steps):                                  # the second time, it has gone on before
        train(tmp_path / "images.npz", tmp_path / "run", lr_anneal_steps=end, batch_size=after, **values)
    assert sorted(read[:32]) == list(range(32)) and len(read) == 4 * before + (steps - 4) * after


def test_a_state_that_counts_no_images_goes_on_as_before(data_dir, run):
    tensors = checkpoint.load_state_dict(run / "state.safetensors")
    del tensors["loop/images"]
    checkpoint.save_state(run / "state.safetensors", tensors)
    train(data_dir, run, lr_anneal_steps=4, snapshot_images="16")
    assert log_of(run, "samples") == [4, 8, 12, 16] and (run / "snapshot_16_ema_0.9.safetensors").exists()


def test_records_of_older_versions_go_on(data_dir, run):
    record = json.loads((run / "config.json").read_text())
    for name in ("ranks", "data"):
        del record[name]
    del record["training"]["change"], record["training"]["init_from"]
    (run / "config.json").write_text(json.dumps(record))
    tensors = checkpoint.load_state_dict(run / "state.safetensors")
    del tensors["loop/ema_warmup"]
    checkpoint.save_state(run / "state.safetensors", tensors)
    train(data_dir, run, lr_anneal_steps=4)
    assert json.loads((run / "config.json").read_text())["ranks"] == 1


def test_a_state_knows_its_network_where_config_json_is_gone(data_dir, run):
    (run / "config.json").unlink()
    with pytest.raises(UserError, match=r"--predict_v True: the run in .* has False"):
        train(data_dir, run, lr_anneal_steps=4, predict_v=True)
    train(data_dir, run, lr_anneal_steps=4)


@pytest.mark.parametrize("changed, said", [
    ({}, []),
    ({"sha256": "0" * 64}, ["the code is another: guided_diffusion .* was changed; from here on it may"]),
    ({"torch": "1.13.1", "sha256": "0" * 64}, ["the code is another: torch was 1.13.1 so far and is .*, guided_"
                                               "diffusion .* was changed; from here on it may compute something else"]),
])
def test_code_that_is_another_is_said(tmp_path, changed, said):
    now = Record({}, {}, code=code_of_this_library())
    now.write(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    assert set(record["code"]) == {"guided_diffusion", "torch", "sha256"}
    record["code"] |= changed
    (tmp_path / "config.json").write_text(json.dumps(record))
    lines = now.continues(Record.read(tmp_path), tmp_path)
    assert len(lines) == len(said) and all(re.match(one, line) for one, line in zip(said, lines, strict=True))
    del record["code"]                                  # as an older version wrote it
    (tmp_path / "config.json").write_text(json.dumps(record))
    line, = now.continues(Record.read(tmp_path), tmp_path)
    assert "which code the training had so far is not recorded" in line


def test_other_numbers_of_classes_are_refused(tmp_path):
    now, before = (Record({}, {}, classes=names) for names in (["ant", "bee"], ["bee", "ant"]))
    with pytest.raises(UserError, match="has other classes than the run in"):
        now.continues(before, tmp_path)
    assert now.continues(now, tmp_path) == []


def test_a_record_without_names_goes_on_with_its_own_images_only(tmp_path):
    """Older versions stored no names; the same images have those that they had then."""
    before, same, others = (Record({}, {}, data=data, classes=names)
                            for data, names in [("a", None), ("a", ["ant"]), ("b", ["ant"])])
    assert same.continues(before, tmp_path) == []
    for now, then in [(others, before), (before, same), (replace(others, data=None), replace(before, data=None))]:
        with pytest.raises(UserError, match="so that it is not known which is which"):
            now.continues(then, tmp_path)


@pytest.mark.parametrize("change", ["speed", "ema_rate", "lr,", "change"])
def test_change_names_options(data_dir, run, change):
    if change == "lr,":
        train(data_dir, run, lr_anneal_steps=4, change=change, lr=2e-3)
        return
    with pytest.raises(UserError, match=f"--change {change}: must name options of the training"):
        train(data_dir, run, change=change)


def other(state, **changes):
    """A state with some tensors replaced; None: left out."""
    tensors = {name.replace("__", "/"): value for name, value in changes.items()}
    return {name: value for name, value in {**state, **tensors}.items() if value is not None}


@pytest.mark.parametrize("damage, message", [
    (lambda run, state: shutil.copy(run / "model.safetensors", run / "state.safetensors"), "is not the state of this"),
    (lambda run, state: checkpoint.save_state(run / "state.safetensors", {"a/b/c": torch.zeros(2)}), "is not the"),
    (lambda run, state: checkpoint.save_state(run / "state.safetensors", other(state, loop__step=None)), "loop/step"),
    (lambda run, state: checkpoint.save_state(run / "state.safetensors", other(state, loop__step=torch.tensor(-3))),
     "is damaged, its step is -3"),
    (lambda run, state: checkpoint.save_state(run / "state.safetensors", other(state, loop__step=torch.tensor(2.5))),
     "is damaged, its step is 2.5"),
    (lambda run, state: checkpoint.save_state(run / "state.safetensors", other(
        state, **{"optimizer__exp_avg__input_blocks.0.0.bias": torch.zeros(3)})), "another size of optimizer/exp_avg"),
    (lambda run, state: (run / "state.safetensors").write_bytes((run / "state.safetensors").read_bytes()[:-9]),
     "is truncated or damaged"),
    (lambda run, state: (run / "state.safetensors").write_bytes(b""), "is empty"),
    (lambda run, state: ((run / "state.safetensors").unlink(), (run / "state.safetensors").mkdir()), "is a folder"),
    (lambda run, state: (run / "config.json").write_text("[" * 200000), "config.json is not one of a training"),
    (lambda run, state: (run / "config.json").write_text('{"model": 3, "training": {}}'), "config.json is not one of"),
    (lambda run, state: (run / "config.json").write_text("[]"), "config.json is not one of a training"),
    (lambda run, state: (run / "config.json").write_bytes(b"\xff\xfe\0"), "config.json is not one of a training"),
    (lambda run, state: (run / "progress.csv").write_text("step,loss\nabc,1\n"), "is not the log of a training"),
])
def test_files_that_are_something_else_are_one_sentence(data_dir, run, damage, message):
    damage(run, checkpoint.load_state_dict(run / "state.safetensors"))
    with pytest.raises(UserError, match=message) as error:
        train(data_dir, run, lr_anneal_steps=4)
    assert "\n" not in str(error.value)


def test_no_secret_is_recorded(tmp_path):
    address = "https://user:hunter2@example.org/model010000.pt?token=hunter2"
    record = Record({}, {"resume_checkpoint": address, "seed": 1, "batch_size": 2}, ranks=1,
                    watched={"classifier_path": address})
    record.write(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert "hunter2" not in text and "https://example.org/model010000.pt" in text
    before = Record.read(tmp_path)
    assert record.continues(before, tmp_path) == []
    new = Record({}, {"resume_checkpoint": address.replace("model", "other"), "seed": 1, "batch_size": 2}, ranks=1)
    with pytest.raises(UserError, match=r"--resume_checkpoint https://example.org/other010000.pt: counts at") as error:
        new.continues(before, tmp_path)
    assert "hunter2" not in str(error.value)
