"""What all commands share: the one entry point, old names, configurations by name, and words beside the options."""

import functools
import runpy
import sys
from dataclasses import dataclass

import pytest
import yaml
from commands import REPOSITORY, call, finish, flags, samples_in

from evaluations.reproduction.missing import missing_files
from evaluations.reproduction.tables import load_table
from guided_diffusion.errors import UserError
from guided_diffusion.options import Options, Words, option, parse_words, required, switch
from guided_diffusion.places import configurations, find_configuration
from guided_diffusion.version import __version__

OLD_NAMES = {
    "evaluations.recognised": "class_accuracy", "evaluations.depth_metrics": "depth_metrics",
    "evaluations.depth_fid": "depth_fid", "evaluations.depth_pictures": "depth_pictures",
    "evaluations.train_embedded": "train_fashion_mnist", "evaluations.train_scenes_judge": "train_scenes",
    "evaluations.benchmark": "benchmark_evaluator", "evaluations.memory_benchmark": "benchmark_memory",
    "evaluations.make_reference": "make_reference", "evaluations.references": "fetch_references"}

OLD_FILES = {"dag_table", "halve_checkpoint", "train_icons_judge"}


# The one entry point


@pytest.fixture
def guided_pixels(monkeypatch):
    """The command `guided-pixels`; its commands lie beside it, as where `python scripts` runs it."""
    monkeypatch.syspath_prepend(REPOSITORY / "scripts")
    return functools.partial(call, "__main__")


def files():
    return {path.stem for path in (REPOSITORY / "scripts").glob("[a-z]*.py")}


def test_the_overview_names_every_command_with_what_it_does(guided_pixels, capsys):
    for words in ([], ["--help"]):
        assert guided_pixels(*words) == 0
        lines = capsys.readouterr().out.splitlines()
        shown = dict(line.split(maxsplit=1) for line in lines if line.startswith("  "))
        short = {"sample": "image_sample", "train": "image_train", "fetch": "fetch_models", "status": "run_status",
                 "convert": "convert_checkpoint"}
        assert {short.get(name, name.replace("-", "_")) for name in shown} == files() - OLD_FILES
        assert shown["compare"] == "Draw the same images under several settings, one block below the other."
        assert all(text.endswith(".") for text in shown.values())


def test_the_version(guided_pixels, capsys):
    assert guided_pixels("--version") == 0
    assert capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize("name", ["run_status", "run-status", "status"])
def test_a_command_by_each_of_its_names(guided_pixels, name, tmp_path, capsys):
    assert guided_pixels(name, tmp_path) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: holds no sampling run, and no state of another job\n"
    assert guided_pixels(name, "--help") == 0
    assert f"usage: __main__.py {name} " in capsys.readouterr().out


def test_every_command_is_reached(guided_pixels, capsys):
    for name in files() - OLD_FILES:
        assert guided_pixels(name, "--help") == 0, name
        assert f"usage: __main__.py {name} " in capsys.readouterr().out


LIGHT = """
import contextlib, io, runpy, sys
for words in (["__main__"], ["__main__", "smaple"], ["run_status", "--help"], ["fetch_models", "--help"],
              ["convert_checkpoint", "--help"], ["run_status", "x", "--jsno"]):
    sys.argv = [f"scripts/{words[0]}.py", *words[1:]]
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        runpy.run_path(sys.argv[0], run_name="__main__")
print(sorted({"torch", "numpy", "yaml"} & set(sys.modules)))
"""


def test_help_and_mistakes_of_light_commands_load_no_torch():
    ended = finish([sys.executable, "-c", LIGHT], cwd=REPOSITORY)
    assert ended.stdout == "[]\n"
    assert [line.split(":")[1] for line in ended.stderr.splitlines()] == [" smaple", " --jsno"]


LATE = """
import contextlib, io, runpy, sys
from pathlib import Path
mistakes = {"image_sample": ["--num_samples", "-1"], "evaluate": ["a", "b", "--backend", "x"],
            "image_train": ["--lr", "x"], "dag_sample": ["--model", "x"], "reproduce": ["x", "--ranks", "y"],
            "depth_train": ["--config", "x.yaml"]}
old = {"dag_table", "halve_checkpoint", "train_icons_judge"}
for path in sorted(Path("scripts").glob("[a-z]*.py")):
    lines = [["--help"], ["--no_such_option"], *([mistakes[path.stem]] if path.stem in mistakes else [])]
    for words in lines[:1] if path.stem in old else lines:
        sys.argv = [str(path), *words]
        said = io.StringIO()
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            runpy.run_path(sys.argv[0], run_name="__main__")
        if "torch" in sys.modules or not said.getvalue().startswith(("usage:", "error: ", "scripts/")):
            sys.exit(f"{path} {words}: torch is loaded, or this is no answer: {said.getvalue()[:200]}")
"""


def test_no_command_loads_torch_before_its_options_are_read():
    ended = finish([sys.executable, "-c", LATE], cwd=REPOSITORY)
    assert (ended.returncode, ended.stderr) == (0, "")


# Commands whose work ranks share, and the one that asks from anywhere how a job is. Every other command is one process.
SHARED = {"bench", "cascade", "classifier_sample", "classifier_train", "dag_sample", "depth_fid", "evaluate",
          "image_nll", "image_sample", "image_train", "latent_sample", "make_reference", "reproduce",
          "super_res_sample", "super_res_train"}
ASKS = {"run_status"}
WORDS = {"class_accuracy": "a.npz", "compare": "a --out a.png", "depth_metrics": "a b", "gallery": "a --out b",
         "convert_checkpoint": "a.pt --dtype float16 --out b.safetensors", "dag_depth_training": "scenes32",
         "ema_reconstruct": "a --sigma_rel 0.1", "export_model": "--model fmnist32 --out a",
         "depth_pictures": "a --out a.png", "fetch_models": "128x128_diffusion", "lsun_bedroom": "a b", "report": "a",
         "prepare_images": "a --out b", "probe": "--data_dir a", "training_chart": "a.csv --out a.png"}


@pytest.mark.parametrize("name", sorted(files() - OLD_FILES - SHARED - ASKS))
def test_a_command_that_no_rank_shares_is_refused_under_a_launcher(name, tmp_path, monkeypatch):
    """Else each rank does and writes all of it, and they meet in one folder."""
    main = runpy.run_path(str(REPOSITORY / "scripts" / f"{name}.py"))["main"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 ranks were started, and this is the work of one process"):
        main(WORDS.get(name, "").split())
    assert not list(tmp_path.iterdir())


def test_an_unknown_command_is_told_the_nearest_one(guided_pixels, capsys):
    assert guided_pixels("smaple") == 2
    assert capsys.readouterr().err.startswith("error: smaple: no such command (did you mean sample?), there are ")


@pytest.mark.filterwarnings("ignore:.*found in sys.modules.*:RuntimeWarning")
@pytest.mark.parametrize("module", OLD_NAMES)
def test_an_old_name_says_the_new_one_and_does_the_same(module, monkeypatch, capsys):
    new = OLD_NAMES[module]
    monkeypatch.setattr(sys, "argv", [module, "--no_such_option"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__")
    assert ended.value.code == 2
    said, error = capsys.readouterr().err.splitlines()
    assert said == (f"python -m {module} is now `python scripts/{new}.py`, or `guided-pixels {new.replace('_', '-')}`")
    assert error.startswith("error: --no_such_option: no such option")


def test_the_old_file_of_a_command_says_the_new_one_and_does_the_same(capsys):
    assert call("train_icons_judge", "--no_such_option") == 2
    said, error = capsys.readouterr().err.splitlines()
    assert said == "scripts/train_icons_judge.py is now `python scripts/train_icons.py`, or `guided-pixels train-icons`"
    assert error.startswith("error: --no_such_option: no such option")


def test_evaluate_is_the_evaluator(capsys):
    for name in ("evaluate", "evaluations/evaluator"):
        assert call(name, "fmnist32") == 2
        assert capsys.readouterr().err == (
            "error: 1 files given: the reference batch and one or more sample files are needed\n")


# Words and options


@dataclass(frozen=True)
class Drawing(Options):
    """A drawing."""

    out: str = required("file to write")
    size: int = option(3, "pixels", minimum=1)
    quiet: bool = switch("says nothing")


FILES = Words("FILE", "100 % of the files", needed=True)


def test_words_and_options_in_any_order():
    for line in ("a b --out x --quiet c", "--quiet a --out x b c", "--out x --quiet a b c"):
        assert parse_words(line.split(), FILES, Drawing) == (["a", "b", "c"], [Drawing("x", 3, True)])
    assert parse_words([], Words("FILE", "files")) == ([], [])


@pytest.mark.parametrize(("line", "message"), [
    ("a", "the following arguments are required: --out"), ("--out x", "the following arguments are required: FILE"),
    ("a --out x --siez 4", r"--siez: no such option \(did you mean --size\?\)"),
    ("a --out x --size 0", "--size 0: must be at least 1"), ("a --out", "--out: a value is missing")])
def test_a_wrong_line_is_refused(line, message):
    with pytest.raises(UserError, match=message):
        parse_words(line.split(), FILES, Drawing)


def test_help_shows_words_switches_and_what_must_be_given(capsys):
    with pytest.raises(SystemExit):
        parse_words(["--help"], FILES, Drawing, description="Draws.")
    text = " ".join(capsys.readouterr().out.split())
    for shown in ("FILE 100 % of the files", "--quiet says nothing (default: False)",
                  "--out STR file to write; must be given"):
        assert shown in text


def test_a_configuration_can_give_what_must_be_given(tmp_path):
    (tmp_path / "run.yaml").write_text("out: x\nquiet: true\n")
    assert parse_words(["a", "--config", str(tmp_path / "run.yaml")], FILES, Drawing)[1] == [Drawing("x", 3, True)]


# Configurations by name


def test_a_configuration_is_found_by_its_path_then_among_those_of_the_library(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bundled = configurations() / "fmnist32_sag.yaml"
    assert bundled.is_file()
    for name in ("fmnist32_sag.yaml", "configs/fmnist32_sag.yaml"):
        assert find_configuration(name) == bundled
    (tmp_path / "fmnist32_sag.yaml").touch()
    assert str(find_configuration("fmnist32_sag.yaml")) == "fmnist32_sag.yaml"
    for name in ("none.yaml", "configs/none.yaml", "/configs/fmnist32_sag.yaml", "configs"):
        assert str(find_configuration(name)) == name


def test_a_command_takes_a_configuration_of_the_library_anywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    short = flags({"timestep_respacing": 1, "num_samples": 2, "batch_size": 2, "labels": "balanced"})
    for number, name in enumerate(("fmnist32_unguided.yaml", "configs/fmnist32_unguided.yaml")):
        assert call("image_sample", "--config", name, *short, "--out", f"out{number}") == 0
    assert (samples_in("out0")[0] == samples_in("out1")[0]).all()
    capsys.readouterr()
    assert call("image_sample", "--config", "fmnist32_sgg.yaml") == 2
    assert capsys.readouterr().err == "error: --config fmnist32_sgg.yaml: cannot be read (No such file or directory)\n"


def test_bundled_files_that_a_configuration_names_are_found_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = flags({"timestep_respacing": 1, "num_samples": 1, "batch_size": 1})
    assert call("dag_sample", "--config", "scenes32_dag_paper_blocks.yaml", *short, "--out", "out") == 0
    assert not missing_files(load_table("scenes32_dag").rows["dcg_paper_blocks"], "references")


@pytest.mark.parametrize("path", sorted(configurations().glob("**/*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_is_a_mapping(path):
    assert isinstance(yaml.safe_load(path.read_text()), dict)


# Each file of a command stands alone


@pytest.mark.slow
def test_a_script_runs_from_another_folder(tmp_path):
    ended = finish([sys.executable, REPOSITORY / "scripts" / "run_status.py", tmp_path], cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (
        2, f"error: {tmp_path}: holds no sampling run, and no state of another job\n")
