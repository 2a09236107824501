"""Fixtures of small networks, shared by the tests."""

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")       # before NumPy is loaded, whose threads wait by computing
os.environ["HYPOTHESIS_NO_PLUGINS"] = "1"           # that of trio, which nothing here needs, would load it

import forks
import numpy as np
import pytest
from launchers import BIN, needs_mpi

# What loads PyTorch is imported in the functions: the process that only hands out the tests does without.
gc.disable()        # nothing of what is loaded and collected is ever garbage: see pytest_collection_finish


def pytest_collection_finish():
    """Keeps freed memory, and the modules and the thousands of tests out of every later collection of garbage."""
    import torch

    from guided_diffusion.allocator import keep_freed_memory

    torch.set_num_threads(1)
    keep_freed_memory()         # as every command does
    gc.freeze()
    gc.enable()
    gc.set_threshold(200_000, 20, 20)


@pytest.fixture
def tiny_flags():
    """Flags of a class-conditional UNet for 16x16 images of one channel, with attention at 8x8."""
    from networks import TINY

    return dict(TINY)


@pytest.fixture
def tiny_classifier_flags():
    """Flags of a classifier for the images of `tiny_flags`."""
    from networks import TINY_CLASSIFIER

    return dict(TINY_CLASSIFIER)


@pytest.fixture(scope="session")
def tiny_checkpoints(tmp_path_factory):
    """A folder with model.safetensors and classifier.safetensors, the networks of TINY and TINY_CLASSIFIER."""
    from networks import TINY, TINY_CLASSIFIER, with_random_weights

    from guided_diffusion.checkpoint import save_state
    from guided_diffusion.script_util import create_classifier, create_model

    folder = tmp_path_factory.mktemp("checkpoints")
    save_state(folder / "model.safetensors", with_random_weights(create_model(**TINY)).state_dict())
    classifier = with_random_weights(create_classifier(**TINY_CLASSIFIER), seed=1)
    save_state(folder / "classifier.safetensors", classifier.state_dict())
    return folder


@pytest.fixture(scope="session")
def short_references(tmp_path_factory):
    """A folder of the bundled reference batches, with the features of 500 of the 10,000 images."""
    from evaluations import references

    folder = tmp_path_factory.mktemp("references")
    for path in references.MODELS.glob("*_reference.npz"):
        with np.load(path, allow_pickle=False) as file:
            np.savez(folder / path.name, **{name: array[:500] if name == "pooled" else array
                                            for name, array in file.items()})
    return folder


@pytest.fixture
def few_neighbours(short_references, monkeypatch):
    """Takes `short_references` for the bundled ones: precision and recall search among few neighbours."""
    monkeypatch.setattr("evaluations.references.MODELS", short_references)


@pytest.fixture(scope="session")
def python(tmp_path_factory):
    """A program that does what the interpreter does, and need not load PyTorch first."""
    folder = tmp_path_factory.getbasetemp()
    # One for all workers, whose folders lie in one.
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "forks"
    folder.mkdir(exist_ok=True)
    with forks.serving(folder) as program:
        yield program


@pytest.fixture(params=["torchrun", pytest.param("mpiexec", marks=needs_mpi)])
def launcher(request, python, monkeypatch):
    """The words before the program of a job of two ranks."""
    monkeypatch.setenv("PYTHON_EXEC", str(python))              # what torchrun starts
    return {"torchrun": [python, BIN / "torchrun", "--nproc-per-node", 2],
            "mpiexec": [BIN / "mpiexec", "-n", 2, python]}[request.param]
