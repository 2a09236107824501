"""Ranks that share work: indices, failures and lost ranks seen by all, whoever is slow."""

import json
import os
import signal
import socket
import subprocess

import pytest
from commands import PATIENCE, REPOSITORY

from guided_diffusion.runs.workers import End, EndKind, WorkQueue

PROGRAM = """
import json, os, signal, sys, time
from guided_diffusion import dist_util
from guided_diffusion.runs import workers
case, out, rank = sys.argv[1], sys.argv[2], dist_util.rank()
# a busy machine may keep a living rank silent for seconds
workers.BEAT, workers.SILENCE, workers.LAST_WORDS = 0.1, 50 if "killed" in case else 6000, 0.2
dist_util.connect()
result = {"indices": [], "outcome": "fine"}
queue = workers.WorkQueue()
with dist_util.together():
    if rank == 0:
        queue.put("what", [1, "two"])
try:
    result["value"] = queue.get("what")
    with queue:
        while (index := queue.next_index()) < 12:
            result["indices"].append(index)
            if rank == 1:
                if case == "fails":
                    raise ValueError("of 1")
                if case == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
            if rank == 0 and case == "main killed":
                os.kill(os.getpid(), signal.SIGKILL)
            while case == "slow" and rank == 1 and queue.finished() < 11:
                queue.check()
                time.sleep(0.05)
            for _ in range(1 if case == "slow" else 20):
                time.sleep(0.1)
                queue.check()
            queue.report(len(result["indices"]))
            queue.finish_index()
        while rank == 0 and queue.finished() < 12:
            queue.check()
            time.sleep(0.05)
        if rank == 0:
            time.sleep(0.3)
            result["work"], result["alive"] = queue.work(), queue.alive()
except Exception as error:
    result["outcome"] = f"{type(error).__name__} {error}"
open(f"{out}/{rank}.json", "w").write(json.dumps(result))
os._exit(0)
"""


def ranks_of(python, case, size, tmp_path):
    """Runs PROGRAM on ranks that no launcher watches; returns what each of them wrote, None where it was killed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [subprocess.Popen([python, "-c", PROGRAM, case, tmp_path], cwd=REPOSITORY, env={
        **os.environ, "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}) for rank in range(size)]
    try:
        codes = [rank.wait(PATIENCE) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(code in (0, -signal.SIGKILL) for code in codes)
    files = [tmp_path / f"{rank}.json" for rank in range(size)]
    return [json.loads(file.read_text()) if file.exists() else None for file in files]


def test_one_process_has_every_index():
    with WorkQueue() as queue:
        queue.put("what", {"a": 1})
        assert queue.get("what") == {"a": 1}
        assert [queue.next_index() for _ in range(3)] == [0, 1, 2]
        queue.finish_index()
        queue.report(2.5)
        assert (queue.finished(), queue.work(), queue.alive()) == (1, 2.5, 1)
    with WorkQueue() as another:
        assert another.next_index() == 0
    with pytest.raises(ValueError, match="mine"), WorkQueue():
        raise ValueError("mine")


@pytest.mark.parametrize("end, text", [
    (End(EndKind.DONE, 0), "done 0"), (End(EndKind.FAILED, 3), "failed 3"), (End(EndKind.LOST, 12), "lost 12")])
def test_end_is_what_its_text_says(end, text):
    assert end.encode() == text and End.decode(text) == end


@pytest.mark.slow
def test_slow_rank_stalls_no_other(python, tmp_path):
    results = ranks_of(python, "slow", 3, tmp_path)
    assert sorted(index for result in results for index in result["indices"]) == list(range(12))
    assert all(result["outcome"] == "fine" and result["value"] == [1, "two"] for result in results)
    assert len(results[1]["indices"]) <= 1
    assert results[0]["work"] == 12 and results[0]["alive"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("case, words", [
    ("fails", ["PeerError rank 1 failed", "ValueError of 1", "PeerError rank 1 failed"]),
    ("killed", ["LostRankError rank 1 is gone", None, "PeerError rank 1 is gone"]),
    ("main killed", [None, "LostRankError rank 0 is gone", "LostRankError rank 0 is gone"]),
])
def test_rank_that_ends_ends_all(case, words, python, tmp_path):
    results = ranks_of(python, case, 3, tmp_path)
    for result, word in zip(results, words, strict=True):
        assert (result is None) == (word is None)
        assert result is None or result["outcome"].startswith(word)
