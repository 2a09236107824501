"""Every code block of the README and the documentation: run where it can run here, else its options are read.

So are the examples in the help of the commands.
"""

import ast
import glob
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from code_blocks import DOCUMENTS, Block, blocks_in, commands_in, in_language
from commands import REPOSITORY, call, finish

from evaluations.reproduction import tables
from guided_diffusion import execution
from guided_diffusion.build import ClassifierOptions, ModelOptions, UpsamplerOptions, build_classifier, build_model
from guided_diffusion.options import OptionParser

BLOCKS = [block for path in DOCUMENTS for block in blocks_in(path)]
PYTHON = {path.name: blocks for path in DOCUMENTS if (blocks := in_language(path, "python"))}
SHELL = {path.name: blocks for path in DOCUMENTS if (blocks := in_language(path, "sh"))}

# Smaller than in the documents, so that all of them together take less than a minute: what is given to a command in
# place of its own values, or beside them.
SAMPLING = {"num_samples": 6, "batch_size": 6, "timestep_respacing": 2}
SMALLER = {
    "image_sample": SAMPLING,
    "classifier_sample": SAMPLING,
    "dag_sample": SAMPLING,
    "image_nll": SAMPLING,
    "evaluate": {"num_images": 6, "bootstrap": 2},
    "attention": {"num_images": 4, "timestep_respacing": 2, "bootstrap": 10, "blocks": "middle,output.2"},
    "benchmark": {"rounds": 1, "batch_size": 1},
    "depth_train": {"steps": 2, "num_labels": 4, "draws": 2},
    "bench": {"methods": "SAG,CG"},
    "reproduce": {"num_samples": 4, "evaluation_seconds": 0.05},
    "explore": {"images": "0:2", "timestep_respacing": 2},
    "probe": {"num_images": 2, "batch_size": 2, "levels": 1},
}
ACTIVATION = ". .venv/bin/activate\n"


def smaller(script, arguments):
    """The arguments of a command with the smaller values in SMALLER."""
    arguments, values = list(arguments), dict(SMALLER.get(script, {}))
    if "--sampling_steps" in arguments:         # of a solver's own grid, as many as the highest order needs
        values["sampling_steps"] = values.pop("timestep_respacing", 2) + 1
    for name, value in values.items():
        if f"--{name}" in arguments:
            arguments[arguments.index(f"--{name}") + 1] = str(value)
        else:
            arguments += [f"--{name}", str(value)]
    return arguments


def file_names(words):
    """The words as a shell gives them to a command: patterns of existing files become those files."""
    return [name for word in words for name in (sorted(glob.glob(word)) or [word])]


def with_new_count(words):
    """The words with the smaller number of images in the names of sample files."""
    return [re.sub(r"samples_\d+x", f"samples_{SAMPLING['num_samples']}x", word) for word in words]


def script_of(words):
    return words[0].removeprefix("scripts/").removesuffix(".py")


def test_no_block_is_of_a_kind_that_nothing_checks():
    assert {block.language for block in BLOCKS} <= {"python", "sh", "yaml", "text"}
    unfenced = re.compile(r"^    (?:.*\bpython |mpiexec |torchrun )", re.MULTILINE)
    assert [path.name for path in DOCUMENTS if unfenced.search(re.sub(r"^```.*?^```$", "", path.read_text(),
                                                                      flags=re.MULTILINE | re.DOTALL))] == []


def test_most_blocks_are_known_and_those_that_cannot_run_say_why():
    assert sum(not block.why for blocks in SHELL.values() for block in blocks) >= 10
    assert sum(not block.why for blocks in PYTHON.values() for block in blocks) >= 8
    assert all(len(block.why.split()) >= 2 for block in BLOCKS if block.why)


@pytest.mark.slow
@pytest.mark.parametrize("document", PYTHON)
def test_python_blocks_run(document, python, tmp_path):
    """All blocks of a document run in one process, as one who reads it from the top would type them."""
    for block in PYTHON[document]:
        compile(block.text, str(block), "exec")
    program = "\n".join(block.text for block in PYTHON[document] if not block.why)
    program = re.sub(r'(timestep_respacing"?[=:] ?)"\d+"', rf'\1"{SAMPLING["timestep_respacing"]}"', program)
    program = re.sub(r"\bsteps=\d+", "steps=3", program)
    done = finish([python, "-c", program], cwd=tmp_path, env={
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)})
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("document", [name for name, blocks in SHELL.items() if any(not block.why for block in blocks)])
def test_shell_blocks_run(document, tmp_path, monkeypatch, few_neighbours):
    """All blocks of a document run one after the other, in a folder with nothing but the configurations."""
    shutil.copytree(REPOSITORY / "configs", tmp_path / "configs")
    write_configurations(document, tmp_path)
    monkeypatch.setattr(tables, "CONFIGS", tmp_path / "configs")
    monkeypatch.setattr(execution, "SECONDS", 0.05)         # of timing for --dtype auto
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    for block in SHELL[document]:
        for words in commands_in(block) if not block.why and block.text != ACTIVATION else ():
            arguments = file_names(with_new_count(smaller(script_of(words), words[1:])))
            assert call(script_of(words), *arguments) == 0, f"{block}: {words[0]} {arguments}"


def write_configurations(document, folder):
    """The YAML blocks of a document, each in the file that its first line names."""
    for block in BLOCKS:
        if block.language == "yaml" and Path(block.document).name == document:
            path = folder / block.text.splitlines()[0].removeprefix("# ")
            path.parent.mkdir(parents=True)
            path.write_text(block.text)


class Read(Exception):
    """The options of a command were read: it does not run."""


@pytest.mark.parametrize("block", [block for blocks in SHELL.values() for block in blocks if block.why], ids=str)
def test_options_of_blocks_that_cannot_run_are_those_of_the_commands(block, monkeypatch):
    real = OptionParser.read

    def read(*arguments, **named):
        real(*arguments, **named)
        raise Read

    monkeypatch.setattr(OptionParser, "read", read)
    monkeypatch.chdir(REPOSITORY)
    for words in commands_in(block):
        with pytest.raises(Read):
            call(script_of(words), *words[1:])


def examples_in(path):
    """The indented lines of a command's docstring below `Example:` or `Examples:`, as a block that cannot run here."""
    _, _, text = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\nExample")
    lines = [line[4:] for line in text.splitlines() if line.startswith("    ")]
    return Block(f"scripts/{path.name}", 1, "sh", "\n".join(lines), "an example of help")


EXAMPLES = [block for path in sorted((REPOSITORY / "scripts").glob("[a-z]*.py")) if (block := examples_in(path)).text]


@pytest.mark.parametrize("block", EXAMPLES, ids=lambda block: Path(block.document).stem)
def test_examples_of_help_name_options_and_networks_that_there_are(block, monkeypatch, capsys):
    real, given = OptionParser.read, []

    def read(*arguments, **named):
        given[:] = real(*arguments, **named)[1]
        raise Read

    monkeypatch.setattr(OptionParser, "read", read)
    monkeypatch.chdir(REPOSITORY)
    for words in commands_in(block):
        try:
            call(*(words[1:] if words[0] == "guided-pixels" else [script_of(words), *words[1:]]))
        except Read:
            with torch.device("meta"):
                for options in given:
                    if isinstance(options, ModelOptions | UpsamplerOptions):
                        build_model(options)
                    elif type(options) is ClassifierOptions:         # and no guidance by one
                        build_classifier(options)
        else:       # the model of a line before it, or of another command
            assert capsys.readouterr().err.endswith(": there is no such folder or file\n")


def test_most_commands_have_an_example():
    assert len(EXAMPLES) > 40
