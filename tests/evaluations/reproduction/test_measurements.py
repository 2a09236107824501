"""The rows of a table are shared out among ranks: rank 0 has all numbers, however long another rank takes."""

import json

import pytest
from commands import execute

PROGRAM = """
import json, sys, time
from datetime import timedelta
from types import SimpleNamespace

import numpy as np

from evaluations.metrics import Replicates
from evaluations.reproduction.measurements import _shared_out
from guided_diffusion import dist_util
from guided_diffusion.errors import UserError

dist_util.connect()
dist_util._meeting.set_timeout(timedelta(seconds=2))        # 30 minutes elsewhere
rows = [SimpleNamespace(name=name, evaluation=SimpleNamespace(words=["fid"])) for name in ("quick", "slow")]
outcomes, updates = [], []
for fails in (False, True):
    def measure(row, images):
        if row.name == "slow":
            if fails:
                raise UserError("no number")
            time.sleep(5)
        return {"fid": Replicates(float(len(images)), np.arange(2.0))}

    sample = SimpleNamespace(first=range)
    try:
        found = _shared_out(rows, [sample, sample], {"quick": [5, 7], "slow": [9]}, lambda: updates.append(1), measure)
        outcomes.append({f"{name} {count}": [numbers["fid"].estimate, numbers["fid"].values.tolist()]
                         for (name, count), numbers in found.items()})
    except Exception as error:
        outcomes.append(f"{type(error).__name__}: {error}")
    if not fails:
        outcomes.append(len(updates))
dist_util.shutdown()
open(f"{sys.argv[1]}/{dist_util.rank()}.json", "w").write(json.dumps(outcomes))
"""


@pytest.mark.slow
def test_a_rank_waits_for_the_rows_of_another_as_long_as_it_takes(launcher, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    ended = execute(*launcher, tmp_path / "program.py", tmp_path, CUDA_VISIBLE_DEVICES="")
    assert ended.returncode == 0, ended.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == [{"quick 5": [5, [0, 1]], "quick 7": [7, [0, 1]], "slow 9": [9, [0, 1]]}, 2,
                     "PeerError: rank 1 failed"]
    assert second == [{}, 1, "UserError: no number"]
