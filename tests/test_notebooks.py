"""The notebooks: each runs from its first cell to its last, at small sizes, and holds the outputs of its full ones."""

import json
import sys

import pytest
from commands import REPOSITORY

FOLDER = REPOSITORY / "notebooks"
SMALL = {
    "first_samples_and_guidance": {"num_images": 1, "steps": 2},
    "write_your_own_guidance": {"num_images": 4, "steps": 2, "held_out": 2, "resamplings": 2},
    "evaluate_your_own_samples": {"num_images": 20, "resamplings": 2, "steps": 3, "words": ["fid", "sfid"]},
    "latent_sag": {"steps": 2, "own_steps": 1},
}
NEEDS = {"latent_sag": "diffusers"}
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))


@pytest.fixture
def execute(monkeypatch):
    """The function of notebooks/execute.py."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delenv("PIPELINE", raising=False)
    import execute

    yield execute.execute
    sys.modules.pop("execute")


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(name, execute, few_neighbours):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    notebook, _ = execute(FOLDER / f"{name}.ipynb", SMALL[name])
    assert any(output["output_type"] != "stream" for cell in notebook["cells"] for output in cell.get("outputs", ()))


@pytest.mark.parametrize("name", sorted(SMALL.keys() - NEEDS.keys()))
def test_a_notebook_holds_its_outputs_and_pictures(name):
    cells = json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    kinds = [kind for cell in code for output in cell["outputs"] for kind in output.get("data", ())]
    assert "image/png" in kinds and (FOLDER / f"{name}.ipynb").stat().st_size < 1_000_000


def test_an_unknown_parameter_is_refused(execute, tmp_path):
    path = tmp_path / "x.ipynb"
    path.write_text(json.dumps({"cells": [
        {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": ["count = 3"]},
        {"cell_type": "code", "metadata": {}, "source": ["print(count)\n", "2"]}]}))
    notebook, names = execute(path, {"count": 1})
    assert names["count"] == 1 and [one["output_type"] for one in notebook["cells"][1]["outputs"]] == [
        "stream", "execute_result"]
    with pytest.raises(ValueError, match="sets no sizes"):
        execute(path, {"sizes": 1})
