"""What `pip install .` leaves: in an empty environment, without the checkout in sight, all is there and works."""

import os
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
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", elsewhere,
        source, cwd=elsewhere)
    wheel, = elsewhere.glob("*.whl")
    venv.create(environment)
    programs = environment / "bin"
    run(sys.executable, "-m", "pip", "--python", programs / "python", "install", "--quiet", "--no-deps", "--no-index",
        wheel, cwd=elsewhere)
    shutil.rmtree(source)
    packages, = environment.glob("lib/python*/site-packages")
    # A path alone: what the .pth files there name, such as the checkout, is not found.
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return programs


def test_the_wheel_samples_evaluates_and_plans_a_table(installed, tmp_path):
    where = run(installed / "python", "-c", "import guided_diffusion as a, evaluations as b, guided_pixels as c; "
                "print(a.__file__, b.__file__, c.__file__, sep='\\n')", cwd=tmp_path).splitlines()
    assert len(where) == 3 and all(path.startswith(str(installed.parent)) for path in where)

    command = installed / "guided-pixels"
    said = run(command, "sample", "--config", "fmnist32_sag_cg.yaml", "--num_samples", 2, "--batch_size", 2,
               "--timestep_respacing", 2, "--out", "out", cwd=tmp_path)
    assert said.splitlines()[0] == "samples: out/samples_2x32x32x3.npz"
    said = run(command, "evaluate", "fmnist32", "out/samples_2x32x32x3.npz", "--backend", "fashion_mnist",
               "--metrics", "fid", cwd=tmp_path)
    assert float(said.splitlines()[-1].removeprefix("FID: ")) > 0
    plan = run(command, "reproduce", "fmnist32", "--plan", "True", "--evaluation_seconds", 0.01, cwd=tmp_path)
    assert "sag_cg" in plan and "hours" in plan
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
