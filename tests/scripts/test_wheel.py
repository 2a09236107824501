"""What `pip install .` leaves: in an empty environment, without the checkout in sight, all is there and works."""

import json
import os
import re
import shutil
import sys
import sysconfig
import venv

import pytest
from commands import REPOSITORY, finish

pytestmark = pytest.mark.slow
SOURCES = ("guided_diffusion", "evaluations", "scripts", "configs", "setup.py", "pyproject.toml", "README.md",
           "LICENSE")


def run(*command, cwd):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = finish(command, cwd=cwd, env={**environment, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what a wheel is built from: a build leaves files beside it."""
    folder = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (REPOSITORY / name).is_dir():
            shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(REPOSITORY / name, folder)
    return folder


@pytest.fixture(scope="module")
def installed(source, tmp_path_factory):
    """The folder of the programs of an environment with the wheel. All that it needs comes from this environment."""
    elsewhere, environment = tmp_path_factory.mktemp("elsewhere"), tmp_path_factory.mktemp("environment")
    # What pip asks for a wheel; pip itself would load all that builds it three times.
    run(sys.executable, "-c", BUILD, elsewhere, cwd=source)
    wheel, = elsewhere.glob("*.whl")
    venv.create(environment)
    programs = environment / "bin"
    run(sys.executable, "-m", "pip", "--python", programs / "python", "install", "--quiet", "--no-deps", "--no-index",
        "--no-compile", wheel, cwd=elsewhere)
    shutil.rmtree(source)
    packages, = environment.glob("lib/python*/site-packages")
    # A path alone: what the .pth files there name, such as the checkout, is not found.
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return programs


# Not compressed: nothing here depends on it, and weights take long and hardly shrink.
BUILD = """
import sys
from setuptools.build_meta import build_wheel
build_wheel(sys.argv[1], {"--build-option": ["--compression=stored"]})
"""
COMMANDS = """
import json, sys
import evaluations, guided_diffusion, guided_pixels
from guided_pixels.__main__ import main
print(*(module.__file__ for module in (evaluations, guided_diffusion, guided_pixels)), sep="\\n")
for words in json.loads(sys.argv[1]):
    sys.argv[1:] = words
    main()
    if words[0] == "sample":
        assert "torch._dynamo" not in sys.modules, "a compiler was loaded, which takes a second"
"""


def test_the_wheel_samples_evaluates_and_plans_a_table(installed, tmp_path):
    """In one process, as each would load PyTorch anew."""
    words = [["sample", "--config", "fmnist32_sag_cg.yaml", "--num_samples", "2", "--batch_size", "2",
              "--timestep_respacing", "2", "--out", "out"],
             ["evaluate", "fmnist32", "out/samples_2x32x32x3.npz", "--backend", "fashion_mnist", "--metrics", "fid"],
             ["reproduce", "fmnist32", "--plan", "True", "--rows", "sag_cg", "--evaluation_seconds", "0.01"]]
    *where, samples, said = run(installed / "python", "-c", COMMANDS, json.dumps(words), cwd=tmp_path).split("\n", 4)
    assert all(path.startswith(str(installed.parent)) for path in where)
    assert samples == "samples: out/samples_2x32x32x3.npz"
    assert float(re.search(r"^FID: (.+)$", said, re.MULTILINE)[1]) > 0
    assert "sag_cg" in said and "hours" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_the_wheel_has_a_command(installed, tmp_path):
    assert "classifier-sample" in run(installed / "guided-pixels", "--help", cwd=tmp_path)


def test_the_wheel_has_the_licences_of_the_icons_and_their_models_are_small(installed):
    packages, = installed.parent.glob("lib/python*/site-packages")
    for name in ("guided_diffusion/models/icons_attribution.txt", "evaluations/models/icons32_reference.txt"):
        said = (packages / name).read_text()
        assert "Copyright (c) Microsoft Corporation" in said and "Permission is hereby granted" in said
        assert "Copyright 2013 Google" in said and "Mozilla Foundation" in said
        assert "END OF TERMS AND CONDITIONS" in said
    weights = list((packages / "guided_diffusion" / "models").glob("icons*.safetensors"))
    assert len(weights) >= 5 and sum(path.stat().st_size for path in weights) <= 32_000_000
