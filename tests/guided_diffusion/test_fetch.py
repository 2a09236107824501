"""Files from the network: what is fetched, resumed, refused and kept, from a server that fails in many ways."""

import hashlib
import json
import os
import re
import shutil
import socket
import sys
import time
import types
from multiprocessing import get_context
from pathlib import Path

import pytest
from commands import PATIENCE
from crashes import content_of, restore, states_of
from local_server import serving

from guided_diffusion import fetch
from guided_diffusion.errors import UserError
from guided_diffusion.fetch import Download, local, size_of

CONTENT = bytes(range(256)) * 4000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(scope="module")
def running():
    with serving() as server:
        yield server


@pytest.fixture
def server(running):
    running.files.clear()
    running.requests.clear()
    return running


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(fetch, "PAUSE", 0.001)


def download(url, folder, **known):
    return Download(url, folder / "file", **known).run()


def refusal(url, folder, **known):
    with pytest.raises(UserError) as error:
        download(url, folder, **known)
    message = str(error.value)
    assert "\n" not in message
    return message


# What is fetched

def test_paths_of_this_machine_pass_through():
    for path in ("model.pt", "./model.pt", Path("models/x.pt"), "", "httpx/model.pt", "s3://bucket/model.pt"):
        assert local(path) == path


def test_an_address_is_fetched_once(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    url = server.add("/models/x%20y.pt", CONTENT)
    path = local(url)
    assert path.read_bytes() == CONTENT
    assert path.name == "x y.pt" and path.parents[1] == tmp_path / "guided-pixels" / "checkpoints"
    progress = capsys.readouterr().err
    assert re.search(r"downloading x y\.pt: 1\.02 MB of 1\.02 MB, [\d.e+]+ .?B/s, took 0:00:0", progress)
    server.files.clear()
    assert local(url) == path
    assert len(server.requests) == 1 and capsys.readouterr().err == ""
    assert os.listdir(path.parent) == ["x y.pt"]


@pytest.mark.parametrize(("last", "name"), [
    ("a%00b.pt", "a_b.pt"), ("a%0A%1B[31m.pt", "a__[31m.pt"), ("..", "file"), ("x%2F..", "file"), ("%2E%2E", "file"),
    (".a.pt", "a.pt"), ("%F0%9F%98%80" * 100 + ".pt", 24 * "\N{GRINNING FACE}" + ".pt")])
def test_any_name_in_an_address_becomes_one_of_a_file(server, tmp_path, last, name):
    path = local(server.add(f"/{last}", CONTENT), tmp_path)
    assert path.name == name and path.parent.parent == tmp_path and path.read_bytes() == CONTENT


def test_an_address_with_bytes_that_are_no_text_is_refused(tmp_path):
    with pytest.raises(UserError, match="is no address to fetch from"):
        local("http://127.0.0.1:1/\udcff.pt", tmp_path)


def test_addresses_do_not_share_files(server, tmp_path):
    urls = [server.add("/a/model.pt", b"one"), server.add("/b/model.pt", b"two"), f"{server.url}/a/model.pt?v=2"]
    assert [local(url, tmp_path).read_bytes() for url in urls] == [b"one", b"two", b"one"]
    assert len({local(url, tmp_path) for url in urls}) == 3


@pytest.mark.parametrize("length", [True, False])
@pytest.mark.parametrize("content", [b"", b"x", CONTENT])
def test_any_size_with_or_without_its_length(server, tmp_path, content, length):
    assert download(server.add("/file", content, length=length), tmp_path).read_bytes() == content


def test_redirects_are_followed_and_keep_the_range(server, tmp_path):
    server.add("/there", CONTENT, cuts=[1000])
    url = server.add("/here", redirect="/there")
    assert download(url, tmp_path).read_bytes() == CONTENT
    assert server.requests[-1] == ("GET", "/there", "bytes=1000-")


def test_redirects_that_lead_nowhere(server, tmp_path):
    assert "HTTP 302" in refusal(server.add("/loop", redirect="/loop"), tmp_path)
    assert "HTTP 302" in refusal(server.add("/out", redirect="file:///etc/passwd"), tmp_path)


@pytest.mark.parametrize("address", ["ftp://127.0.0.1/x.pt", "FTP://127.0.0.1/x.pt", "data:,x", "gs://bucket/x.pt"])
def test_redirects_stay_on_the_web(address, server, tmp_path):
    assert "cannot be downloaded (HTTP 302 " in refusal(server.add("/elsewhere", redirect=address), tmp_path)
    assert len(server.requests) == 1


def test_redirects_do_not_leave_https():
    request = fetch.urllib.request.Request("https://host/file")
    with pytest.raises(fetch.urllib.error.HTTPError, match="redirect away from https"):
        fetch._Redirects().redirect_request(request, None, 302, "Found", {}, "http://host/file")
    assert fetch._Redirects().redirect_request(request, None, 302, "Found", {}, "https://other/file")


def test_a_slow_server_is_waited_for(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "TIMEOUT", 0.5)
    url = server.add("/slow", CONTENT[:20000], piece=1000, pause=0.04)          # longer in all than TIMEOUT
    assert download(url, tmp_path).read_bytes() == CONTENT[:20000]
    assert len(server.requests) == 1


def test_size_of(server):
    assert size_of(server.add("/file", CONTENT)) == len(CONTENT)
    assert size_of(server.add("/unknown", CONTENT, length=False)) is None
    assert size_of(f"{server.url}/none") is None and size_of("http://[") is None
    assert {method for method, *_ in server.requests} == {"HEAD"}


# Broken downloads

def test_a_broken_download_is_resumed(server, tmp_path):
    url = server.add("/file", CONTENT, cuts=[1000, 0, 50_000, 1])
    assert download(url, tmp_path, size=len(CONTENT), sha256=SHA256).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=1000-", "bytes=1000-", "bytes=51000-", "bytes=51001-"]
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("how", [
    {"ranges": False}, {"tag": ""}, {"tag": 'W/"1"'}, {"headers": {"Content-Range": "bytes 7-1023999/1024000"}},
    {"headers": {"Content-Range": "nonsense"}}, {"headers": {"Content-Range": f"bytes {5000 * '9'}-9/9"}}])
def test_where_it_cannot_be_resumed_it_starts_anew(server, tmp_path, how):
    url = server.add("/file", CONTENT, cuts=[1000, 500_000], **how)
    assert download(url, tmp_path, sha256=SHA256).read_bytes() == CONTENT
    assert os.listdir(tmp_path) == ["file"]


def test_a_date_is_enough_to_resume(server, tmp_path):
    url = server.add("/file", CONTENT, tag="", modified="Mon, 01 Jun 2026 00:00:00 GMT", cuts=[1000])
    assert download(url, tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=1000-"]


@pytest.mark.parametrize("strict", [True, False])
def test_a_file_that_changes_between_two_tries_is_not_mixed(server, tmp_path, strict):
    url = server.add("/file", b"\0" * len(CONTENT), cuts=[1000, 0, 0, 0, 0])
    assert "broke off" in refusal(url, tmp_path)
    server.add("/file", CONTENT, tag='"2"', strict=strict)
    assert download(url, tmp_path).read_bytes() == CONTENT


def test_a_change_that_the_server_hides_is_noticed_by_the_checksum(server, tmp_path):
    url = server.add("/file", b"\0" * len(CONTENT), cuts=[1000, 0, 0, 0, 0])
    refusal(url, tmp_path)
    server.add("/file", CONTENT)
    assert download(url, tmp_path, sha256=SHA256).read_bytes() == CONTENT
    assert server.ranges[-2:] == ["bytes=1000-", None]


def test_the_next_run_resumes(server, tmp_path):
    url = server.add("/file", CONTENT, cuts=[1000, 0, 0, 0, 0])
    message = refusal(url, tmp_path)
    assert "broke off after 1,000 of 1,024,000 bytes, 5 times in a row" in message
    assert "the next run goes on after 1,000 bytes" in message
    assert sorted(os.listdir(tmp_path)) == [".file.part", ".file.part.json"]
    assert download(url, tmp_path).read_bytes() == CONTENT
    assert server.ranges[-1] == "bytes=1000-"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("record", ["", "{", "[]", '{"url": "another", "version": "1"}', None])
def test_a_part_of_something_else_is_not_resumed(server, tmp_path, record):
    url = server.add("/file", CONTENT, cuts=[1000, 0, 0, 0, 0])
    refusal(url, tmp_path)
    if record is None:
        (tmp_path / ".file.part.json").unlink()
    else:
        (tmp_path / ".file.part.json").write_text(record)
    assert download(url, tmp_path).read_bytes() == CONTENT
    assert server.ranges[-1] is None


def test_a_whole_part_needs_no_request(server, tmp_path):
    url = server.add("/file", CONTENT, cuts=[1000, 0, 0, 0, 0])
    refusal(url, tmp_path)
    (tmp_path / ".file.part").write_bytes(CONTENT)
    server.requests.clear()
    assert download(url, tmp_path, sha256=SHA256).read_bytes() == CONTENT
    assert server.requests == []


def test_a_part_that_is_too_long_is_dropped(server, tmp_path):
    url = server.add("/file", CONTENT, cuts=[1000, 0, 0, 0, 0])
    refusal(url, tmp_path)
    (tmp_path / ".file.part").write_bytes(CONTENT * 2)
    assert download(url, tmp_path).read_bytes() == CONTENT


def test_nothing_is_left_of_what_cannot_be_resumed(server, tmp_path):
    refusal(server.add("/file", CONTENT, tag="", cuts=[1000] * 9), tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_server_that_is_busy_is_asked_again(server, tmp_path):
    url = server.add("/file", CONTENT, statuses=[503, 429, 500])
    assert download(url, tmp_path).read_bytes() == CONTENT
    message = refusal(server.add("/busy", CONTENT, statuses=[503] * 9), tmp_path / "other")
    assert "cannot be downloaded (HTTP 503 Service Unavailable), 5 times in a row" in message


def test_a_server_that_stops_sending(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "TIMEOUT", 0.1)
    monkeypatch.setattr(fetch, "TRIES", 2)
    url = server.add("/file", CONTENT[:100], length=200, pause=0.3)
    assert "(timed out), 2 times in a row" in refusal(url, tmp_path)


# What is refused

@pytest.mark.parametrize(("how", "known", "said"), [
    ({"content": CONTENT[:5000]}, {"size": len(CONTENT)}, "gave 5,000 bytes instead of 1,024,000"),
    ({"content": CONTENT + b"1"}, {"size": len(CONTENT)}, "gave 1,024,001 bytes instead of 1,024,000"),
    ({"content": CONTENT * 3, "length": False}, {"size": len(CONTENT)}, "gave more than 1,024,000 bytes"),
    ({"content": CONTENT}, {"sha256": "0" * 64}, f"gave a file that has the SHA-256 {SHA256} instead of 000"),
    ({"content": b"<p>Sign in", "type": "text/html; charset=utf-8"}, {}, "gave a web page instead of a file"),
    ({"content": b"\n<!DOCTYPE html><p>Sign in"}, {}, "gave a file that is a web page"),
    ({"content": b"<HTML>"}, {}, "gave a file that is a web page"),
    ({"content": b"abc"}, {"check": lambda path: f"is {path.read_text()}"}, "gave a file that is abc"),
    ({"statuses": [403]}, {}, "cannot be downloaded (HTTP 403 Forbidden)"),
])
def test_what_is_not_the_file_is_refused_and_not_kept(server, tmp_path, how, known, said):
    url = server.add("/file", **how)
    message = refusal(url, tmp_path / "new", otherwise=", or walk", **known)
    assert message.startswith(f"{url} {said}")
    assert message.endswith(f": download {url} elsewhere and put it at {tmp_path / 'new' / 'file'}, or walk")
    assert os.listdir(tmp_path / "new") == []


def test_a_file_that_is_too_short_where_the_server_says_no_length(server, tmp_path):
    url = server.add("/file", CONTENT[:9], length=False)
    assert "broke off after 9 of 10 bytes, 5 times in a row" in refusal(url, tmp_path, size=10)


def test_a_missing_file(server, tmp_path):
    assert "cannot be downloaded (HTTP 404 Not Found)" in refusal(f"{server.url}/none", tmp_path)
    assert len(server.requests) == 1


def test_no_network(tmp_path):
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/model.pt"
    with pytest.raises(UserError, match=r"cannot be reached \(Connection refused\): download http") as error:
        local(url, tmp_path)
    by_hand = Path(re.search(r"put it at (\S+), or give its path", str(error.value))[1])
    by_hand.write_bytes(CONTENT)          # its folder is there
    assert local(url, tmp_path) == by_hand


def test_a_network_that_goes_away_is_tried_again(server, tmp_path, monkeypatch):
    url, ask = server.add("/file", CONTENT, cuts=[1000]), fetch._ask
    answers = iter([ask, None, None, ask])

    def unsteady(*arguments):
        answer = next(answers)
        if answer is None:
            raise fetch._Unreachable("cannot be reached")
        return answer(*arguments)

    monkeypatch.setattr(fetch, "_ask", unsteady)
    assert download(url, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("url", ["http://", "https://[", "http://host:port/x", "http://user:secret@127.0.0.1:1/x",
                                 "http://127.0.0.1:1/x y", "http://127.0.0.1:1/x?sig=secret"])
def test_addresses_that_are_none_and_secrets_in_them(tmp_path, url):
    with pytest.raises(UserError) as error:
        local(url, tmp_path)
    assert "secret" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("fragment", "said"), [("#md5=1", "only #sha256="), ("#sha256=12", "64 hexadecimal digits")])
def test_what_may_follow_an_address(tmp_path, fragment, said):
    with pytest.raises(UserError, match=said):
        local(f"http://127.0.0.1:1/x{fragment}", tmp_path)


def test_a_checksum_in_the_address_is_compared_at_each_use(server, tmp_path):
    url = server.add("/file", CONTENT)
    path = local(f"{url}#sha256={SHA256.upper()}", tmp_path)
    assert local(url, tmp_path) == path and len(server.requests) == 1
    path.write_bytes(CONTENT[:-1] + b"\0")
    with pytest.raises(UserError, match=f"{path}: has the SHA-256 .* delete it to have it downloaded again"):
        local(f"{url}#sha256={SHA256}", tmp_path)


@pytest.mark.parametrize("known", [{"size": len(CONTENT)}, {"sha256": SHA256}, {"check": lambda path: "is damaged"}])
def test_another_file_in_its_place_is_left_alone(server, tmp_path, known):
    (tmp_path / "file").write_bytes(b"mine")
    assert refusal(f"{server.url}/file", tmp_path, **known).endswith(", delete it to have it downloaded again")
    assert (tmp_path / "file").read_bytes() == b"mine" and server.requests == []


def test_a_disk_that_is_too_small(server, tmp_path, monkeypatch):
    url = server.add("/file", CONTENT)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=1000))
    assert "(1,024,000 bytes are needed, 1,000 are free)" in refusal(url, tmp_path)
    monkeypatch.undo()


def test_a_folder_that_cannot_be_written(server, tmp_path):
    (tmp_path / "folder").touch()
    message = refusal(server.add("/file", CONTENT), tmp_path / "folder")
    assert "failed (File exists): download http" in message


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_becomes_full(server, tmp_path, monkeypatch):
    monkeypatch.setattr("guided_diffusion.fetch.open_own", lambda path, flags: os.open("/dev/full", os.O_WRONLY))
    message = refusal(server.add("/file", CONTENT), tmp_path)
    assert re.search("failed \\((No space left on device|Invalid argument)\\)", message)


# Several processes

def _local(url, cache, barrier, results):
    barrier.wait()
    results.put(str(local(url, cache)))


def test_several_processes_fetch_once(server, tmp_path):
    url = server.add("/file", CONTENT, pause=0.02)
    context = get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()
    processes = [context.Process(target=_local, args=(url, tmp_path, barrier, results)) for _ in range(4)]
    for process in processes:
        process.start()
    paths = {results.get(timeout=PATIENCE) for _ in processes}
    for process in processes:
        process.join()
    assert len(paths) == 1 and Path(paths.pop()).read_bytes() == CONTENT
    assert server.ranges == [None]


def test_a_kill_at_any_moment_leaves_what_the_next_download_ends(server, tmp_path):
    url = server.add("/file", b"x" * 1000)
    (tmp_path / "out").mkdir()
    with states_of(tmp_path / "out") as states:
        download(url, tmp_path / "out")
    whole = content_of(tmp_path / "out")
    assert list(whole) == ["file"]
    for state in states:
        restore(tmp_path / "out", state)
        download(url, tmp_path / "out")
        assert content_of(tmp_path / "out") == whole, f"otherwise after {sorted(state)}"


def test_a_process_that_is_killed_leaves_its_part_and_no_lock(server, tmp_path):
    url = server.add("/file", CONTENT, piece=100_000, pause=0.05)
    process = get_context("fork").Process(target=download, args=(url, tmp_path))
    process.start()
    deadline = time.monotonic() + PATIENCE
    while not (tmp_path / ".file.part").exists() or (tmp_path / ".file.part").stat().st_size < 200_000:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.join()
    assert not (tmp_path / "file").exists()
    assert download(url, tmp_path, sha256=SHA256).read_bytes() == CONTENT
    assert re.fullmatch(r"bytes=[2-9]00000-", server.ranges[-1])
    assert os.listdir(tmp_path) == ["file"]


# Blobs

class Blobs:
    """What is used of blobfile, with files in memory."""

    Stat = types.SimpleNamespace

    def __init__(self):
        self.content, self.version, self.cuts, self.starts, self.down = CONTENT, "1", [], [], False

    def create_context(self, retry_limit, connect_timeout, read_timeout, log_callback):
        return self

    def stat(self, url):
        if self.down:
            raise RuntimeError("failed to resolve\nthe host")
        if url != "gs://bucket/x.pt":
            raise FileNotFoundError(f"No such file: '{url}'")
        return self.Stat(size=len(self.content), version=self.version, mtime=1.0)

    def BlobFile(self, url, mode, streaming):
        assert (mode, streaming) == ("rb", True)
        return BlobStream(self)


class BlobStream:
    def __init__(self, blobs):
        self.blobs, self.at = blobs, 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def seek(self, offset):
        self.blobs.starts.append(offset)
        self.at = offset

    def read1(self, size):
        if self.blobs.cuts and self.at:
            self.blobs.cuts.pop(0)()
        piece = self.blobs.content[self.at:self.at + min(size, 100_000)]
        self.at += len(piece)
        return piece


@pytest.fixture
def blobs(monkeypatch):
    blobs = Blobs()
    monkeypatch.setitem(sys.modules, "blobfile", blobs)
    return blobs


def fail():
    raise RuntimeError("connection reset")


def test_blobs_are_fetched_once(blobs, tmp_path):
    path = local("gs://bucket/x.pt", tmp_path)
    assert path.name == "x.pt" and path.read_bytes() == CONTENT
    assert local("gs://bucket/x.pt", tmp_path) == path and blobs.starts == [0]
    assert size_of("gs://bucket/x.pt") == len(CONTENT)


def test_broken_blobs_are_resumed_unless_they_change(blobs, tmp_path):
    blobs.cuts = [fail, fail]
    assert local("gs://bucket/x.pt", tmp_path / "a").read_bytes() == CONTENT
    assert blobs.starts == [0, 100_000, 100_000]

    def change():
        blobs.content, blobs.version = CONTENT[::-1], "2"

    blobs.starts, blobs.cuts = [], [change]
    assert local("gs://bucket/x.pt", tmp_path / "b").read_bytes() == CONTENT[::-1]
    assert blobs.starts == [0, 0]


def test_blobs_that_cannot_be_had(blobs, tmp_path):
    with pytest.raises(UserError, match=r"az://store/none\.pt cannot be downloaded \(there is no such file\)"):
        local("az://store/none.pt", tmp_path)
    blobs.down = True
    with pytest.raises(UserError, match=r"cannot be reached \(failed to resolve the host\): download gs"):
        local("gs://bucket/x.pt", tmp_path)
    assert size_of("gs://bucket/x.pt") is None


def test_blobs_need_blobfile_and_say_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "blobfile", None)
    with pytest.raises(UserError, match=r"gs://bucket/x\.pt needs the package blobfile: pip install .*\[blob\]"):
        local("gs://bucket/x.pt", tmp_path)


def test_the_real_blobfile_is_used_as_it_is_meant_to_be(tmp_path):
    pytest.importorskip("blobfile")
    (tmp_path / "x").write_bytes(CONTENT)
    answer = fetch._ask_blobs(str(tmp_path / "x"), 0, "")
    assert b"".join(answer.pieces) == CONTENT
    rest = fetch._ask_blobs(str(tmp_path / "x"), 1000, answer.version)
    assert rest.start == 1000 and b"".join(rest.pieces) == CONTENT[1000:]
    assert json.dumps(answer.version) and fetch._ask_blobs(str(tmp_path / "x"), 1000, "other").start == 0
