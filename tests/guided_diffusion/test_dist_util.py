"""Ranks: what launchers say of them, what they agree on, and the same samples from any number of them."""

import hashlib
import json
import os
import socket
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from commands import call, execute, flags
from launchers import BIN, needs_mpi
from networks import TINY
from safetensors.torch import load_file

from guided_diffusion import dist_util, launchers
from guided_diffusion.checkpoint import save_state
from guided_diffusion.errors import LostRankError, UserError
from guided_diffusion.runs.record import made_by

RUN = {**TINY, "timestep_respacing": "3", "num_samples": 5, "batch_size": 2, "guide_scale": 1.2, "sel_attn_depth": 1,
       "blur_sigma": 3, "labels": "balanced"}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in {name for names in launchers.LAUNCHERS for name in names} | {"SLURM_STEP_ID", launchers.STEP_TASKS}:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("environment, rank, size", [
    ({}, 0, 1),
    ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, 3, 8),
    ({"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0"}, 2, 4),
    ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, 1, 2),
    ({"SLURM_PROCID": "5", "SLURM_NTASKS": "6", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"}, 5, 6),
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "6"}, 0, 1),                 # an allocation, but no job step
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}, 0, 1),
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_ID": "4294967291"}, 0, 1),
    ({"SLURM_PROCID": "1", "SLURM_NTASKS": "8", "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "2"}, 1, 2),
    ({"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": ""}, 0, 1),
    ({"RANK": "0", "WORLD_SIZE": " "}, 0, 1),
    ({"RANK": "", "WORLD_SIZE": "2", "PMI_RANK": "1", "PMI_SIZE": "2"}, 1, 2),
    ({"RANK": "1"}, 0, 1),
    ({"RANK": "1", "WORLD_SIZE": "2", "PMI_RANK": "0", "PMI_SIZE": "1"}, 1, 2),
], ids=["plain", "torchrun", "MPICH", "Open MPI", "Slurm", "Slurm allocation", "Slurm interactive", "Slurm batch",
        "Slurm step of an allocation", "empty", "blank", "empty in MPI", "half", "torchrun in MPI"])
def test_rank_and_size_come_from_the_launcher(environment, rank, size, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (dist_util.rank(), dist_util.world_size()) == (rank, size)
    assert dist_util.is_main() == (rank == 0)


@pytest.mark.parametrize("environment, words", [
    ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK 'one': must be a whole number of at least 0"),
    ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK '-1': must be a whole number"),
    ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE '0': must be a whole number of at least 1"),
    ({"RANK": "0", "WORLD_SIZE": "9" * 5000}, "WORLD_SIZE '999"),
    ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK 2: must be less than WORLD_SIZE, which is 2"),
    ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "x"}, "LOCAL_RANK 'x': must be a whole number"),
], ids=["word", "negative", "none", "digits", "beyond", "local"])
def test_a_malformed_rank_is_refused(environment, words, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words) as refused:
        dist_util.rank()
    assert len(str(refused.value)) < 300


# Where the ranks meet


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost"])
def test_the_store_listens_on_one_address_alone(address):
    with dist_util._listener(dist_util._address_to_listen_on(address), 0) as listener:
        host, port, *_ = listener.getsockname()
        assert host in ("127.0.0.1", "::1")
        assert dist_util._listener("127.0.0.2", port).getsockname()[1] == port          # still free


def test_the_store_listens_everywhere_where_a_name_stands_for_several_addresses(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(None, None, None, None, ("127.0.1.1", 0))])
    assert dist_util._address_to_listen_on("node7") == ""
    with dist_util._listener("", 0) as listener:
        assert listener.getsockname()[0] in ("::", "0.0.0.0")


def test_ranks_meet_in_a_store_of_one_address():
    kept = dist_util._listening("127.0.0.1", 0, 2)
    other = dist_util._connected("127.0.0.1", kept.port, 2, timedelta(seconds=10))
    kept.set("name", "value")
    assert other.get("name") == b"value"


def test_a_store_that_nobody_keeps_is_a_lost_rank():
    with dist_util._listener("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(LostRankError, match=f"nobody answers at 127.0.0.1, port {port}"):
        dist_util._connected("127.0.0.1", port, 2, timedelta(0))


def test_a_rank_without_rank_0_says_whom_it_waits_for(monkeypatch, caplog):
    monkeypatch.setattr(dist_util, "REMINDER", timedelta(seconds=0.01))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(LostRankError):
        dist_util._connected("127.0.0.1", port, 2, timedelta(seconds=0.1))
    assert f"waiting for rank 0 at 127.0.0.1, port {port}" in caplog.text


@pytest.mark.parametrize("place", [
    dist_util._address_to_listen_on, lambda host: dist_util._connected(host, 1, 2, timedelta(0))], ids=["0", "1"])
def test_a_name_that_no_host_can_have_is_refused(place):
    with pytest.raises(UserError, match=r"MASTER_ADDR a\.\.b: is no address"):
        place("a..b")


@pytest.mark.parametrize("port", ["0", "70000", "-1", "x", "9" * 5000])
def test_a_malformed_port_is_refused(port, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(UserError, match=r"MASTER_PORT '.*must be a port from 1 to 65535"):
        dist_util._store_by_address(0, 2)


def test_rank_0_says_who_is_missing(monkeypatch, caplog):
    monkeypatch.setattr(dist_util, "REMINDER", timedelta(seconds=0.01))
    monkeypatch.setattr(dist_util, "ASSEMBLY", timedelta(seconds=1))
    for this, said in ((1, 0), (0, 1)):
        store = dist.HashStore()
        store.set("here 1", "")
        with pytest.raises(LostRankError, match=r"not all of the 4 ranks started .*2, 3 (is|are) missing"):
            dist_util._await_all(store, this, 4)
        lines = [record.getMessage() for record in caplog.records]
        assert bool(lines) == said
    assert lines[0].endswith("ranks 2, 3 are missing of 4")


def test_ranks_that_are_all_here_say_nothing(caplog):
    store = dist.HashStore()
    store.set("here 1", "")
    dist_util._await_all(store, 0, 2)
    assert not caplog.records


def test_one_rank_has_the_last_word(monkeypatch):
    assert dist_util.has_last_word() and dist_util.has_last_word()           # one process
    monkeypatch.setattr(dist_util, "_meeting", dist.HashStore())
    assert [dist_util.has_last_word() for _ in range(3)] == [True, False, False]


@pytest.mark.parametrize("rank, local, index", [("5", "1", 1), ("5", None, 1), ("3", "7", 3)])
def test_each_rank_of_a_node_has_a_gpu_of_its_own(rank, local, index, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "8")
    if local is not None:
        monkeypatch.setenv("LOCAL_RANK", local)
    assert dist_util.dev() == torch.device("cuda", index)


def test_records_name_the_device(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert made_by()["device"] == f"3 CPU cores, {threads} thread{'s' * (threads > 1)} a rank"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    assert made_by()["device"] == "card 0"


def test_one_process_needs_no_group():
    dist_util.connect()
    dist_util.barrier()
    tensor = torch.ones(2)
    dist_util.sync_params([tensor])
    assert not dist.is_initialized() and tensor.tolist() == [1, 1]
    with dist_util.together():
        pass
    with pytest.raises(UserError, match="mine"), dist_util.together():
        raise UserError("mine")
    dist_util.shutdown()


ALONE = """
import torch, torch.distributed as dist
from guided_diffusion import dist_util
dist_util.setup_dist()
dist_util.setup_dist()
pieces = [torch.zeros(2) for _ in range(dist.get_world_size())]
dist.all_gather(pieces, torch.ones(2))
with dist_util.together():
    dist_util.barrier()
print(dist.get_rank(), [piece.tolist() for piece in pieces], dist_util.gathered(torch.ones(1))[0].tolist(),
      dist_util.told_by_main("word"))
dist_util.shutdown()
print(dist.is_initialized())
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)       # the caller's own stays
own = dist.group.WORLD
dist_util.setup_dist()
print(dist.group.WORLD is own)
"""


def test_an_official_script_of_one_process_has_a_group(python, tmp_path):
    (tmp_path / "alone.py").write_text(ALONE)
    ended = execute(python, tmp_path / "alone.py")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == "0 [[1.0, 1.0]] [1.0] word\nFalse\nTrue\n"


PROGRAM = """
import json, os, sys, torch
from guided_diffusion import dist_util
before = dict(os.environ)
dist_util.connect()
dist_util.setup_dist()
rank, result = dist_util.rank(), {}
result["environment"] = dict(os.environ) == before
value = torch.full((3,), float(rank + 1), requires_grad=True)
dist_util.sync_params([value])
result["value"] = value.tolist()
for failing in ([], [1], [0], [0, 1]):
    try:
        with dist_util.together():
            if rank in failing:
                raise ValueError(f"of {rank}")
        outcome = "fine"
    except Exception as error:
        outcome = f"{type(error).__name__} {error}"
    result[str(failing)] = outcome
dist_util.barrier()
dist_util.shutdown()
open(f"{sys.argv[1]}/{rank}.json", "w").write(json.dumps(result))
"""


@pytest.mark.slow
def test_ranks_agree(launcher, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    ended = execute(*launcher, tmp_path / "program.py", tmp_path, CUDA_VISIBLE_DEVICES="")
    assert ended.returncode == 0, ended.stderr
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for rank, result in enumerate(results):
        assert result["environment"]                  # CUDA_VISIBLE_DEVICES among it
        assert result["value"] == [1, 1, 1]
        assert result["[]"] == "fine"
        assert result["[1]"] == ("ValueError of 1" if rank == 1 else "PeerError rank 1 failed")
        assert result["[0]"] == ("ValueError of 0" if rank == 0 else "PeerError rank 0 failed")
        assert result["[0, 1]"] == result["[0]"]


@pytest.fixture
def command(tiny_checkpoints):
    """The words after the interpreter of a short run into a folder."""
    def words(out, **changes):
        options = {**RUN, "model_path": tiny_checkpoints / "model.safetensors", "out": out, **changes}
        return ["scripts/image_sample.py", *flags(options)]
    return words


@pytest.fixture(scope="module")
def expected(tiny_checkpoints, tmp_path_factory):
    """SHA-256 of the samples of one plain process."""
    out = tmp_path_factory.mktemp("plain")
    options = {**RUN, "model_path": tiny_checkpoints / "model.safetensors", "out": out}
    assert call("image_sample", *flags(options)) == 0
    return digest(out)


def digest(out):
    return hashlib.sha256((out / "samples_5x16x16x3.npz").read_bytes()).hexdigest()


@pytest.mark.slow
@needs_mpi
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_mpiexec_gives_the_same_file(ranks, python, command, expected, tmp_path):
    words = ["-n", ranks, python, *command(tmp_path)]
    if ranks == 2:              # once as users do, on one of the ranks
        words = ["-n", 1, sys.executable, *command(tmp_path), ":", "-n", 1, python, *command(tmp_path)]
    ended = execute(BIN / "mpiexec", *words)
    assert ended.returncode == 0, ended.stderr
    assert digest(tmp_path) == expected
    assert {path.name for path in tmp_path.iterdir()} == {
        "samples_5x16x16x3.npz", "grid.png", "run.json", "status.json"}
    assert json.loads((tmp_path / "run.json").read_text())["ranks"] == ranks
    assert ended.stdout.count("samples:") == 1


@pytest.mark.slow
def test_torchrun_gives_the_same_file(python, command, expected, tmp_path):
    ended = execute(python, BIN / "torchrun", "--nproc-per-node", 2, *command(tmp_path), PYTHON_EXEC=str(python))
    assert ended.returncode == 0, ended.stderr
    assert digest(tmp_path) == expected


# The code of a rank that failed, unless mpiexec kills the other one before that has ended by itself (signal 9).
ENDED_BY_MPIEXEC = 2, 9


@pytest.mark.slow
@needs_mpi
@pytest.mark.parametrize("changes", [{"num_samples": 0}, {"model_path": "/nowhere.pt"}], ids=["option", "file"])
def test_mistake_ends_all_ranks(changes, python, command, tmp_path):
    ended = execute(BIN / "mpiexec", "-n", 2, python, *command(tmp_path / "out", **changes))
    assert ended.returncode in ENDED_BY_MPIEXEC
    assert len(set(filter(None, ended.stderr.splitlines()))) == 1         # mpiexec may add empty lines
    assert ended.stderr.startswith("error: ")
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.slow
def test_rank_that_fails_while_sampling_ends_the_job(launcher, command, tmp_path, tiny_checkpoints):
    state = load_file(tiny_checkpoints / "model.safetensors")
    state["label_emb.weight"][1] = float("nan")
    save_state(tmp_path / "nan.pt", state)
    # Balanced labels, one image at a time: every other image is of class 1.
    ended = execute(*launcher, *command(tmp_path / "out", model_path=tmp_path / "nan.pt", batch_size=1))
    assert ended.returncode in ((1,) if BIN / "torchrun" in launcher else ENDED_BY_MPIEXEC)
    assert ended.stderr.count("error: ") == 1
    assert "error: step 2: the network returned NaN or infinity for image 1\n" in ended.stderr
    # The images before are kept; torchrun may end rank 0 before it has let go of the lock.
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {"shards", ".lock", "status.json"}


@pytest.mark.slow
@needs_mpi
@pytest.mark.parametrize("failing", [0, 1])
def test_rank_that_cannot_start_ends_the_job(failing, python, command, tmp_path):
    ranks = [command(tmp_path / "out", **({"model_path": "/nowhere.pt"} if rank == failing else {})) for rank in (0, 1)]
    ended = execute(BIN / "mpiexec", "-n", 1, python, *ranks[0], ":", "-n", 1, python, *ranks[1])
    assert ended.returncode in ENDED_BY_MPIEXEC
    assert ended.stderr == "error: --model_path /nowhere.pt: there is no such file\n"
    assert list((tmp_path / "out").iterdir()) == []
