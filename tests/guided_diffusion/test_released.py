"""The released checkpoints and the script that fetches them, from a server on this machine."""

import hashlib
import os

import pytest
import torch
import yaml
from commands import REPOSITORY, call
from golden import released_checkpoints
from local_server import serving
from networks import TINY

from guided_diffusion import checkpoint, fetch, presets
from guided_diffusion.presets import find_preset, released_names
from guided_diffusion.progress import in_bytes


@pytest.fixture(scope="module")
def content(tiny_checkpoints, tmp_path_factory):
    """The file of a small network, as `torch.save` writes it."""
    path = tmp_path_factory.mktemp("released") / "model.pt"
    torch.save(checkpoint.load_state_dict(tiny_checkpoints / "model.safetensors"), path)
    return path.read_bytes()


@pytest.fixture
def parameters(tiny_checkpoints):
    return sum(value.numel() for value in checkpoint.load_state_dict(tiny_checkpoints / "model.safetensors").values())


@pytest.fixture
def server(tmp_path, monkeypatch, parameters):
    """Has the checkpoints `tiny` and `other`, but no files yet."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(fetch, "PAUSE", 0.001)
    monkeypatch.setattr(presets, "MODELS", tmp_path / "known")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "known").mkdir()
    (tmp_path / "known" / "ours.safetensors").touch()
    with serving() as server:
        preset = {"kind": "diffusion", "parameters": parameters, "options": TINY}
        known = {"url": f"{server.url}/", "licence": "MIT (LICENSE)", "sag": {},
                 "presets": {"tiny": {**preset, "classifier": "other"}, "other": preset}}
        (tmp_path / "known" / "presets.yaml").write_text(yaml.safe_dump(known, sort_keys=False))
        yield server


def refused(capsys, *arguments):
    assert call("fetch_models", *arguments) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    return message


def test_the_names_are_those_of_the_released_files():
    assert set(released_names()) == {*released_checkpoints(), "lsun_horse_nodropout"}
    for name in released_names():
        preset = find_preset(name)
        when, code = ("march-2021", "improved") if preset.implied else ("jul-2021", "guided")
        assert preset.url == f"https://openaipublic.blob.core.windows.net/diffusion/{when}/{name}.pt"
        assert "MIT" in preset.licence and f"https://github.com/openai/{code}-diffusion" in preset.licence


def test_fetched_after_saying_licence_and_size(server, tmp_path, content, parameters, capsys):
    server.add("/tiny.pt", content)
    assert call("fetch_models", "tiny") == 0
    assert capsys.readouterr().out.splitlines() == [
        f"tiny: diffusion, {parameters:,} parameters, guided by other", f"    address: {server.url}/tiny.pt",
        "    licence: MIT (LICENSE)", f"    size:    {len(content):,} bytes ({in_bytes(len(content))})",
        "    runs in: image_sample, image_nll, classifier_sample",
        f"models/tiny.pt: fetched, {len(content):,} bytes, SHA-256 {hashlib.sha256(content).hexdigest()}"]
    assert [method for method, *_ in server.requests] == ["HEAD", "GET"]
    assert os.listdir(tmp_path / "models") == ["tiny.pt"]

    server.files.clear()
    assert call("fetch_models", "tiny") == 0
    assert "models/tiny.pt: is there already" in capsys.readouterr().out
    assert call("image_sample", "--model", "tiny", "--model_path", "models/tiny.pt", "--timestep_respacing", 1,
                "--num_samples", 1) == 0


def test_all_and_another_folder(server, tmp_path, content, capsys):
    for name in ("tiny", "other"):
        server.add(f"/{name}.pt", content, length=False)
    assert call("fetch_models", "--all", "--out", tmp_path / "a" / "b") == 0
    assert sorted(os.listdir(tmp_path / "a" / "b")) == ["other.pt", "tiny.pt"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines if not line.startswith(" ")] == [
        "tiny", "other", f"{tmp_path}/a/b/tiny.pt", f"{tmp_path}/a/b/other.pt"]
    assert "    size:    about " in "\n".join(lines)


def test_list_asks_no_server(server, tmp_path, capsys):
    assert call("fetch_models", "--list") == 0
    said = capsys.readouterr().out
    assert "tiny: diffusion" in said and "other: diffusion" in said and "size:    about" in said
    assert server.requests == [] and not (tmp_path / "models").exists()


def test_the_page_of_the_model_zoo_is_what_the_command_prints(capsys, tmp_path):
    assert call("fetch_models", "--table") == 0
    page = capsys.readouterr().out
    assert page == (REPOSITORY / "docs" / "model_zoo.md").read_text()
    rows = {row.split("`")[1]: row for row in page.splitlines() if row.startswith("| `")}
    assert list(rows) == released_names()
    assert "| upsampler | ImageNet | 64 to 256 | yes | 279,792,390 | 1.12 GB | `super_res_sample` |" in (
        rows["upsample_cond_500K"])
    assert "no NAME can be given with --table" in refused(capsys, "tiny", "--table")


@pytest.mark.parametrize(("arguments", "said"), [
    (["tny"], "tny: is no released checkpoint (did you mean tiny?), there are tiny, other"),
    (["tiny", "zzz"], "zzz: is no released checkpoint, there are tiny, other"),
    (["ours"], "ours: is bundled, there is nothing to fetch: pass --model ours"),
    ([], "no NAME is given: name a checkpoint, there are tiny, other"),
    (["--all", "--sha256", "0" * 64], "is that of one file"),
    (["tiny", "--sha256", "12"], "--sha256 12: must be 64 hexadecimal digits"),
    (["tiny", "--all"], "tiny: no NAME can be given with --all"),
    (["--list", "--table"], "--list: cannot be given with --table"),
    (["--all", "--table"], "--all: cannot be given with --table"),
    (["tiny", "--list", "--sha256", "0" * 64], "cannot be given with --list, which fetches nothing"),
    (["--table", "--sha256", "0" * 64], "cannot be given with --table, which fetches nothing"),
    (["tiny", "--out", "known/presets.yaml"], "--out known/presets.yaml: cannot be written")])
def test_what_cannot_be_fetched(server, tmp_path, capsys, arguments, said):
    assert said in refused(capsys, *arguments)
    assert server.requests == [] and not (tmp_path / "models").exists()


def test_a_server_that_breaks_off_and_is_slow(server, tmp_path, content):
    size = len(content)
    server.add("/tiny.pt", content, cuts=[size // 3, 0, size // 3], piece=size // 10, pause=0.01)
    assert call("fetch_models", "tiny", "--sha256", hashlib.sha256(content).hexdigest()) == 0
    assert (tmp_path / "models" / "tiny.pt").read_bytes() == content
    assert len(server.ranges) == 4 and server.ranges[-1] is not None


def test_a_server_that_breaks_off_for_good(server, tmp_path, content, capsys):
    server.add("/tiny.pt", content, cuts=[1000, *[0] * 8])
    message = refused(capsys, "tiny")
    assert "broke off after 1,000 of" in message and "put it at models/tiny.pt" in message
    server.add("/tiny.pt", content)
    assert call("fetch_models", "tiny") == 0
    assert server.ranges[-1] == "bytes=1000-"


@pytest.mark.parametrize(("how", "said"), [
    ({"content": b"no such file"}, "is no checkpoint"),
    ({"content": b"<!DOCTYPE html><html>Sign in"}, "is a web page"),
    ({"content": b"<html>Sign in", "type": "text/html"}, "gave a web page instead of a file"),
    ({"content": b"PK\x03\x04 and then something else"}, "damaged or no checkpoint"), ({"content": b""}, "is empty"),
    ({"content": b"\x80"}, "damaged or no checkpoint"), ({"statuses": [404]}, "HTTP 404 Not Found")])
def test_garbage_is_refused_and_not_kept(server, tmp_path, capsys, how, said):
    url = server.add("/tiny.pt", **how)
    message = refused(capsys, "tiny")
    assert said in message and url in message and ".part" not in message
    assert os.listdir(tmp_path / "models") == []


def test_another_checkpoint_is_refused(server, tmp_path, tiny_checkpoints, capsys, parameters):
    server.add("/tiny.pt", (tiny_checkpoints / "classifier.safetensors").read_bytes())
    assert f"numbers instead of {parameters:,}" in refused(capsys, "tiny")


def test_an_incomplete_file_is_left_alone(server, tmp_path, content, capsys):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny.pt").write_bytes(content[:-1000])
    message = refused(capsys, "tiny")
    assert "models/tiny.pt: is truncated" in message and "delete it to have it downloaded again" in message
    assert len((tmp_path / "models" / "tiny.pt").read_bytes()) == len(content) - 1000


def test_no_network(server, tmp_path, capsys):
    server.shutdown()
    server.server_close()
    assert call("fetch_models", "tiny") == 2
    said = capsys.readouterr()
    assert "size:    about" in said.out
    assert "tiny.pt cannot be reached (Connection refused)" in said.err and "put it at models/tiny.pt" in said.err
