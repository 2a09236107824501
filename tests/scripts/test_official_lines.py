"""Command lines of the official codes as they stand there: under `mpiexec`, and the PAG code's by a table of flags."""

import re

import pytest
import torch
from commands import REPOSITORY, call, execute, flags, samples_in
from launchers import BIN, needs_mpi
from networks import with_random_weights

from guided_diffusion.build import build_classifier, build_model
from guided_diffusion.checkpoint import save_state
from guided_diffusion.guidance import ClassifierGuidanceOptions, PagOptions
from guided_diffusion.runs.command import read_run
from guided_diffusion.runs.sample import SamplingRun


def words_of(line):
    """The flags of a line by name; of one that stands twice, the last value counts."""
    words = line.split()
    return {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=True)}


def method_of(run, kind):
    return next(method for method in run.guidance if isinstance(method, kind))


def save_networks(given):
    """Random weights in the files that the flags name."""
    run, _ = read_run(flags(given), SamplingRun)
    save_state(given["model_path"], with_random_weights(build_model(run.model)).float().state_dict())
    if "classifier_path" in given:
        classifier = build_classifier(method_of(run, ClassifierGuidanceOptions))
        save_state(given["classifier_path"], with_random_weights(classifier, 1).float().state_dict())


# Under mpiexec: the READMEs' lines, with smaller networks and few steps


@pytest.fixture
def job(python):
    """Runs a script as two ranks under mpiexec; fails where it does."""
    def run(script, given):
        ended = execute(BIN / "mpiexec", "-n", 2, python, f"scripts/{script}.py", *flags(given))
        assert ended.returncode == 0, ended.stderr
    return run


@needs_mpi
def test_improved_diffusion_trains_and_samples_on_two_ranks(photos, job, tmp_path):
    network = words_of("--image_size 32 --num_channels 128 --num_res_blocks 3 --learn_sigma True --dropout 0.3 "
                       "--diffusion_steps 4000 --noise_schedule cosine --use_kl True")
    network |= {"num_channels": 32, "num_res_blocks": 1, "image_size": 16, "channel_mult": "1,1",
                "attention_resolutions": 8}
    training = words_of("--lr 1e-4 --batch_size 128 --schedule_sampler loss-second-moment")
    out = tmp_path / "out"
    job("image_train", {"data_dir": photos, **network, **training, "batch_size": 1, "lr_anneal_steps": 1, "out": out})
    job("image_sample", {"model_path": out / "ema_0.9999.safetensors", **network, "timestep_respacing": 2,
                         "num_samples": 3, "batch_size": 1, "out": tmp_path / "samples"})
    assert samples_in(tmp_path / "samples")[0].shape == (3, 16, 16, 3)


@needs_mpi
def test_guided_diffusion_trains_a_classifier_and_both_codes_sample_by_it_on_two_ranks(photos, job, tmp_path):
    smaller = {"image_size": 16, "classifier_width": 32, "classifier_depth": 1, "classifier_channel_mult": "1,1",
               "classifier_attention_resolutions": 8, "classifier_num_head_channels": 32}
    classifier = words_of("--image_size 128 --classifier_attention_resolutions 32,16,8 --classifier_depth 2 "
                          "--classifier_width 128 --classifier_pool attention --classifier_resblock_updown True "
                          "--classifier_use_scale_shift_norm True") | smaller
    training = words_of("--iterations 300000 --anneal_lr True --batch_size 256 --lr 3e-4 --save_interval 10000 "
                        "--weight_decay 0.05") | {"iterations": 1, "batch_size": 1}
    job("classifier_train", {"data_dir": photos, **training, **classifier, "num_classes": 2, "out": tmp_path / "train"})

    network = words_of(
        "--attention_resolutions 32,16,8 --class_cond True --image_size 128 --learn_sigma True --num_channels 256 "
        "--num_heads 4 --num_res_blocks 2 --resblock_updown True --use_fp16 True --use_scale_shift_norm True")
    network |= {"attention_resolutions": 8, "num_channels": 32, "channel_mult": "1,1", "num_res_blocks": 1}
    sampling = words_of("--batch_size 4 --num_samples 50000 --timestep_respacing ddim25 --use_ddim True "
                        "--classifier_scale 1.0 --classifier_use_fp16 True")
    given = {"model_path": tmp_path / "model.pt", **network, **classifier, "num_classes": 2, **sampling,
             "timestep_respacing": "ddim2", "num_samples": 3, "batch_size": 2, "out": tmp_path / "samples"}
    save_networks(given)
    given["classifier_path"] = tmp_path / "train" / "model.safetensors"
    job("classifier_sample", given)
    images, labels = samples_in(tmp_path / "samples")
    assert images.shape == (3, 16, 16, 3) and set(labels) <= {0, 1}

    # The SAG code's line for the same networks, whose images are those of one process.
    sag = words_of("--guide_scale 1.1 --guide_start 250 --sel_attn_block output --sel_attn_depth 8 --blur_sigma 3 "
                   "--classifier_guidance True") | {"sel_attn_depth": 1}
    given |= {**sag, "classifier_scale": 0.5, "timestep_respacing": 2, "use_ddim": False}
    job("classifier_sample", {**given, "out": tmp_path / "two"})
    assert call("classifier_sample", *flags({**given, "out": tmp_path / "one"})) == 0
    (two, _), (one, _) = samples_in(tmp_path / "two"), samples_in(tmp_path / "one")
    assert (one == two).all() and (one != images).any()


# SAG, whose code has other defaults


@pytest.mark.parametrize(("line", "said"), [
    ("--guide_scale 1.5", "--guide_scale 1.5: takes --sel_attn_depth 8 --blur_sigma 3, the block output.8, as nothing "
     "says otherwise; the defaults of the SAG code are --sel_attn_depth 2 --blur_sigma 9"),
    ("--guide_scale 1.5 --sel_attn_block input", "takes --sel_attn_depth 8 --blur_sigma 3, the block input.8, as"),
    ("--guide_scale 1.5 --sel_attn_depth 2", "--guide_scale 1.5: takes --blur_sigma 3, as nothing"),
    ("--guide_scale 1.5 --sel_attn_block middle", "--guide_scale 1.5: takes --blur_sigma 3, as nothing"),
    ("--guide_scale 1.5 --mask global", "--guide_scale 1.5: takes --blur_sigma 3, as nothing"),
    ("--guide_scale 1.5 --blur_sigma 9", "takes --sel_attn_depth 8, the block output.8, as nothing"),
    ("--guide_scale 1.5 --blur_sigma 9 --sel_attn_depth 8", ""),
    ("--guide_scale 1.5 --blur_sigma 9 --sel_attn_block middle", ""),
    ("--guide_scale 1 --guide_start 250", ""),
    ("--guide_scale 1.5 --model icons32", ""), ("--guide_scale 1.5 --model fmnist32", ""),
    ("--guide_scale 1.5 --model 256x256_diffusion_uncond", "")])
def test_a_line_that_leaves_defaults_to_the_sag_code_is_told_which_are_taken(line, said, caplog):
    caplog.set_level("INFO")
    read_run(flags(words_of(line)), SamplingRun)
    told = [message for message in caplog.messages if "takes --" in message]
    assert said in told[0] if said else told == []


# The variable by which official scripts are told where they write

OFFICIAL = ("image_sample", "classifier_sample", "super_res_sample", "image_nll", "image_train", "classifier_train",
            "super_res_train")


@pytest.mark.parametrize("command", OFFICIAL)
def test_openai_logdir_is_the_folder_where_none_is_given(command, tmp_path, monkeypatch, caplog):
    """As is said where the options are read: here nothing else is given, so that the command ends after that."""
    caplog.set_level("INFO")
    monkeypatch.chdir(tmp_path)
    line = f"--out is not given: the folder is {tmp_path / 'logs'}, as OPENAI_LOGDIR says"
    for folder, words, said in ((tmp_path / "logs", [], True), (tmp_path / "logs", ["--out", "own"], False),
                                ("", [], False)):
        monkeypatch.setenv("OPENAI_LOGDIR", str(folder))
        caplog.clear()
        assert call(command, *words) == 2
        assert (line in caplog.messages) is said and ("OPENAI_LOGDIR" in caplog.text) is said


def test_what_is_trained_sampled_and_measured_lies_in_openai_logdir(tmp_path, photos, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    network = {"image_size": 16, "num_channels": 32, "channel_mult": "1,1", "num_res_blocks": 1,
               "attention_resolutions": 8, "num_heads": 1}
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "logs"))
    assert call("image_train", *flags({**network, "data_dir": photos, "batch_size": 1, "lr_anneal_steps": 1})) == 0
    assert (tmp_path / "logs" / "model.safetensors").exists() and not (tmp_path / "train").exists()
    line = ["--model", tmp_path / "logs", *flags({"timestep_respacing": 2, "num_samples": 1, "batch_size": 1})]
    assert call("image_sample", *line) == 0                      # beside the training, as there
    assert samples_in(tmp_path / "logs")[0].shape == (1, 16, 16, 3)
    assert call("image_sample", *line, "--seed", 1) == 2
    assert f"error: --out {tmp_path / 'logs'}: holds" in capsys.readouterr().err
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "likelihood"))
    assert call("image_nll", *line, "--data_dir", photos) == 0
    assert (tmp_path / "likelihood" / "bpd.npz").exists()


# The scripts of perturbed-attention guidance, run/NAME.sh: what differs between them, and what is the same in all

PAG_BLOCKS = "input_blocks.14.1 input_blocks.16.1 input_blocks.17.1 middle_block.1"
PAG_SAMPLING = "--classifier_guidance False --classifier_scale 0.0 --batch_size 5 --save_png True"
PAG_NETWORK = (
    "--attention_resolutions 32,16,8 --diffusion_steps 1000 --image_size 256 --learn_sigma True "
    "--noise_schedule linear --num_channels 256 --num_head_channels 64 --num_res_blocks 2 --resblock_updown True "
    "--use_fp16 True --use_scale_shift_norm True")
PAG_UNCOND = "--class_cond False --model_path models/256x256_diffusion_uncond.pt"
PAG_COND = ("--class_cond True --model_path models/256x256_diffusion.pt "
            "--classifier_path models/256x256_classifier.pt")
DDIM, DDPM = "--timestep_respacing ddim25 --use_ddim True", "--timestep_respacing 250 --use_ddim False"
PAG = {
    "sample_cond_ddim25": f"{PAG_COND} {DDIM} --guide_scale 4.0 --num_samples 5000 --gpu 0",
    "sample_cond_ddim25@multigpu": f"{PAG_COND} {DDIM} --guide_scale 4.0 --num_samples 5000 --gpu_offset 0",
    "sample_cond_ddim25_baseline": f"{PAG_COND} {DDIM} --guide_scale 1.0 --num_samples 5000 --gpu 0",
    "sample_cond_ddim25_baseline@multigpu":
        f"{PAG_COND} {DDIM} --guide_scale 1.0 --num_samples 5000 --gpu_offset 0",
    "sample_cond_ddpm250": f"{PAG_COND} {DDPM} --guide_scale 4.0 --num_samples 5000 --gpu 0",
    "sample_uncond_ddim25": f"{PAG_UNCOND} {DDIM} --guide_scale 4.0 --num_samples 5000 --gpu 0 --seed 0",
    "sample_uncond_ddim25@multigpu":
        f"{PAG_UNCOND} {DDIM} --guide_scale 4.0 --num_samples 5000 --gpu_offset 0 --seed 0",
    "sample_uncond_ddim25_baseline": f"{PAG_UNCOND} {DDIM} --guide_scale 1.0 --num_samples 10 --gpu 0",
    "sample_uncond_ddim25_baseline@multigpu": f"{PAG_UNCOND} {DDIM} --guide_scale 1.0 --num_samples 10 --gpu_offset 0",
    "sample_uncond_ddpm250": f"{PAG_UNCOND} {DDPM} --guide_scale 4.0 --num_samples 5000 --gpu 0",
}


def called_here():
    """What docs/official.md says that flags of the PAG code are called here; "" where nothing is."""
    page = (REPOSITORY / "docs" / "official.md").read_text().partition("## The scripts of perturbed-attention")[2]
    rows = re.findall(r"^\| (`--.*?) \| (.*?) \|$", page, re.MULTILINE)
    return {flag: "".join(re.findall(r"--(\w+)", here)[:1]) for there, here in rows
            for flag in re.findall(r"--(\w+)", there)}


def translated(name):
    """The flags of a script of the PAG code as they are called here."""
    given = words_of(f"{PAG[name]} {PAG_SAMPLING} {PAG_NETWORK}") | {
        "drop_layers": PAG_BLOCKS, "results_root_dir": "RESULTS", "results_dir": name.partition("@")[0],
        "guidance_strategies": {"attention_mask_identity": [25 if "ddim25" in name else 250, 0]}}
    names = called_here()
    here = {names.get(flag, flag): value for flag, value in given.items()}
    here.pop("")
    here["pag_scale"] = float(here["pag_scale"]) - 1
    here["pag_start"] = here["pag_start"]["attention_mask_identity"][0] + 1
    here["pag_blocks"] = re.sub(r"_blocks?|\.1\b", "", here["pag_blocks"]).replace(" ", ",")
    here["out"] = f"{given['results_root_dir']}/{given['results_dir']}"
    return here


@pytest.mark.parametrize("kind", ["uncond", "cond"])
def test_scripts_of_the_pag_code_mean_what_they_mean_there(kind):
    networks = set()
    for name in (name for name in PAG if name.startswith(f"sample_{kind}_")):
        run, _ = read_run(flags(translated(name)), SamplingRun)
        method, steps = method_of(run, PagOptions), 250 if "ddpm250" in name else 25
        assert method.pag_scale == (0 if "baseline" in name else 3) and method.pag_start > steps
        assert run.diffusion.timestep_respacing == (f"ddim{steps}" if "ddim" in name else f"{steps}")
        assert run.active == ([method] if method.pag_scale else []) and str(run.out) == f"RESULTS/{name.split('@')[0]}"
        networks.add(run.model)
    model, = networks
    with torch.device("meta"):
        blocks = build_model(model).attention_blocks
    assert [blocks[name].grid for name in method.blocks] == [(16, 16), (8, 8), (8, 8), (8, 8)]


@pytest.mark.parametrize("name", ["sample_cond_ddim25", "sample_uncond_ddpm250"])
def test_scripts_of_the_pag_code_run(name, tmp_path):
    """With blocks of the same names in a network that is narrower, of smaller images."""
    given = translated(name)
    given |= {"image_size": 64, "num_channels": 32, "num_head_channels": 32, "channel_mult": "1,1,1,1,1,1",
              "attention_resolutions": "8,4,2", "num_classes": 3, "num_samples": 2, "batch_size": 2,
              "timestep_respacing": "ddim2" if "ddim25" in name else "2",
              "out": tmp_path / "out", "model_path": tmp_path / "model.pt"}
    if "classifier_path" in given:
        given |= {"classifier_path": tmp_path / "classifier.pt", "classifier_width": 32, "classifier_depth": 1,
                  "classifier_num_head_channels": 32}
    save_networks(given)
    assert call("classifier_sample", *flags(given)) == 0
    guided, labels = samples_in(tmp_path / "out")
    assert guided.shape == (2, 64, 64, 3) and (labels is None) == ("uncond" in name)
    if name == "sample_cond_ddim25":
        assert call("classifier_sample", *flags({**given, "pag_scale": 0, "out": tmp_path / "plain"})) == 0
        assert (samples_in(tmp_path / "plain")[0] != guided).any()
