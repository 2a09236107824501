"""The official reference batches, from a server on this machine, and finding a reference by its word."""

import functools
import hashlib
import io
import os

import numpy as np
import pytest
from commands import call
from local_server import serving

from evaluations import references
from evaluations.references import MODELS, fetch_reference, find_reference, reference_names, reference_url
from guided_diffusion import fetch
from guided_diffusion.errors import UserError

CAT = "VIRTUAL_lsun_cat256"
OFFICIAL = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/"


def batch(**changes):
    """The bytes of a small reference batch; an array that is None is left out."""
    arrays = {"arr_0": np.full((4, 8, 8, 3), 200, np.uint8), "mu": np.zeros(3), "sigma": np.eye(3), **changes}
    file = io.BytesIO()
    np.savez(file, **{name: array for name, array in arrays.items() if array is not None})
    return file.getvalue()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Stands for the official one."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(fetch, "PAUSE", 0.001)
    monkeypatch.chdir(tmp_path)
    with serving() as server:
        monkeypatch.setattr(references, "URL", f"{server.url}/")
        yield server


@pytest.fixture
def run():
    """Runs the command in this process and returns its exit code."""
    return functools.partial(call, "fetch_references")


def test_each_name_has_its_official_address():
    assert [reference_url(name).removeprefix(OFFICIAL) for name in reference_names()] == [
        "imagenet/64/VIRTUAL_imagenet64_labeled.npz", "imagenet/128/VIRTUAL_imagenet128_labeled.npz",
        "imagenet/256/VIRTUAL_imagenet256_labeled.npz", "imagenet/512/VIRTUAL_imagenet512.npz",
        "lsun/bedroom/VIRTUAL_lsun_bedroom256.npz", "lsun/cat/VIRTUAL_lsun_cat256.npz",
        "lsun/horse/VIRTUAL_lsun_horse256.npz"]
    with pytest.raises(UserError, match=r"VIRTUAL_lsun_cats256: is no reference batch \(did you mean VIRTUAL_lsun_cat"):
        reference_url("VIRTUAL_lsun_cats256")


def test_fetched_once_after_saying_from_where(server, run, tmp_path, capsys):
    content = batch()
    url = server.add(f"/lsun/cat/{CAT}.npz", content)
    assert run(CAT, CAT) == 0
    assert capsys.readouterr().out.splitlines() == [
        CAT, f"    address: {url}", f"    size:    {len(content):,} bytes",
        f"references/{CAT}.npz: fetched, {len(content):,} bytes, SHA-256 {hashlib.sha256(content).hexdigest()}"]
    assert [method for method, *_ in server.requests] == ["HEAD", "GET"]
    assert os.listdir(tmp_path / "references") == [f"{CAT}.npz"]

    server.files.clear()
    assert run(CAT) == 0
    assert f"references/{CAT}.npz: is there already" in capsys.readouterr().out


def test_list_asks_no_server(server, run, tmp_path, capsys):
    assert run("--list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[::2] == reference_names() and all(server.url in line for line in lines[1::2])
    assert server.requests == [] and os.listdir(tmp_path) == []


def test_several_into_another_folder_after_a_break(server, run, tmp_path):
    content = batch()
    server.add(f"/lsun/cat/{CAT}.npz", content, cuts=[len(content) // 3])
    server.add("/imagenet/512/VIRTUAL_imagenet512.npz", content)
    assert run(CAT, "VIRTUAL_imagenet512", "--out", tmp_path / "a" / "b") == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "a" / "b").iterdir()} == {
        f"{CAT}.npz": content, "VIRTUAL_imagenet512.npz": content}
    assert server.ranges[1] == f"bytes={len(content) // 3}-"


@pytest.mark.parametrize(("how", "said"), [
    ({"content": batch(mu=None, sigma=None)}, "is no reference batch, it has no mu and sigma"),
    ({"content": batch(sigma=None)}, "has no sigma"), ({"content": batch(mu=np.zeros(2))}, "must be (D,) and (D, D)"),
    ({"content": batch(arr_0=np.zeros((4, 8, 8, 3)))}, "images must be uint8"),
    ({"content": batch()[:-40]}, "is not an .npz file"), ({"content": b"PK and something else"}, "is not an .npz file"),
    ({"content": b"<html>Sign in"}, "is a web page"), ({"statuses": [404]}, "HTTP 404 Not Found")])
def test_garbage_is_refused_and_not_kept(server, run, tmp_path, capsys, how, said):
    url = server.add(f"/lsun/cat/{CAT}.npz", **how)
    assert run(CAT) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in message and url in message and f"put it at references/{CAT}.npz" in message
    assert ".part" not in message and os.listdir(tmp_path / "references") == []


def test_a_file_that_is_no_reference_is_left_alone(server, tmp_path):
    (tmp_path / f"{CAT}.npz").write_bytes(b"mine")
    with pytest.raises(UserError, match=f"{CAT}.npz: is not an .npz file.*delete it"):
        fetch_reference(CAT, tmp_path)
    assert (tmp_path / f"{CAT}.npz").read_bytes() == b"mine" and server.requests == []


def test_unknown_names_are_refused_before_anything_is_fetched(server, run, capsys):
    server.add(f"/lsun/cat/{CAT}.npz", batch())
    for arguments in ([CAT, "VIRTUAL_lsun_hors256"], ["--list", "VIRTUAL_lsun_hors256"]):
        assert run(*arguments) == 2
        assert "(did you mean VIRTUAL_lsun_horse256?), there are VIRTUAL" in capsys.readouterr().err
    assert run() == 2 and "no NAME is given" in capsys.readouterr().err
    assert server.requests == []


def test_a_folder_that_cannot_be_written_is_refused_before_a_server_is_asked(server, run, tmp_path, capsys):
    server.add(f"/lsun/cat/{CAT}.npz", batch())
    (tmp_path / "file").touch()
    assert run(CAT, "--out", tmp_path / "file") == 2
    assert f"--out {tmp_path / 'file'}: cannot be written" in capsys.readouterr().err and server.requests == []


def test_the_command_runs_as_a_module_does(capsys):
    assert call("fetch_references", "--list", CAT) == 0
    assert capsys.readouterr().out == f"{CAT}\n    address: {OFFICIAL}lsun/cat/{CAT}.npz\n"


def test_a_word_is_a_path_then_a_file_of_the_folder_then_a_bundled_reference(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bundled = MODELS / "fmnist32_reference.npz"
    assert find_reference("fmnist32", "references") == bundled
    assert find_reference("mine.npz", "references") is None and find_reference("", tmp_path) is None
    (tmp_path / "references" / "fmnist32").mkdir(parents=True)
    assert find_reference("fmnist32", "references") == bundled          # a folder is none
    (tmp_path / "references" / "mine.npz").touch()
    assert str(find_reference("mine.npz", "references")) == "references/mine.npz"
    (tmp_path / "mine.npz").touch()
    assert str(find_reference("mine.npz", tmp_path / "references")) == "mine.npz"
    assert find_reference(str(bundled), "references") == bundled
