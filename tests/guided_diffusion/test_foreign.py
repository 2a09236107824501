"""Files of others: whatever is wrong with one is a sentence that names it."""

import io
import json
import struct
import zipfile

import numpy as np
import pytest
from fuzzing import damaged, fuzz, survives
from hypothesis import given

from guided_diffusion.errors import PeerError, UserError
from guided_diffusion.foreign import read_json, reading
from guided_diffusion.npz import ArrayFile, BatchFile, is_whole, read_arrays, read_checked, read_npy

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), np.uint8)


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def npz(compressed, **arrays):
    stream = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(stream, **arrays)
    return stream.getvalue()


def header(text):
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + 1) + text.encode() + b"\n"


ARRAYS = {"arr_0": IMAGES, "arr_1": np.arange(5), "mu": np.zeros(3), "sigma": np.eye(3), "backend": np.array("x")}
HEADERS = {
    "token": header("{'descr': ((( "),
    "deep": header("{'descr': '|u1', 'fortran_order': False, 'shape': (" + "-" * 8000 + "1,)}"),
    "huge": header(f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({10**12}, 32, 32, 3)}}"),
    "long": header(f"{{'descr': '<i8', 'fortran_order': False, 'shape': ({10**30},)}}"),
    "negative": header("{'descr': '|u1', 'fortran_order': False, 'shape': (-4, -32, 32, 3)}"),
    "sizeless": header("{'descr': '|S0', 'fortran_order': False, 'shape': (5,)}"),
    "object": header("{'descr': '|O', 'fortran_order': False, 'shape': (5,)}"),
    "version": b"\x93NUMPY\x09\x00" + header("{}")[8:],
    "text": b"text",
    "nothing": b"",
}


def every_array(path):
    """Reads all that an .npz file has in every way in which it is read."""
    file = BatchFile(path)
    file.statistics()
    file.value("backend", str)
    if len(file):
        list(file.batches(2))
    return [file.read(name) for name in file.members]


@fuzz(200)
@given(damaged(npz(False, **ARRAYS), npz(True, **ARRAYS)))
def test_any_damage_to_an_npz_file_is_a_sentence_or_harmless(content):
    survives(every_array, content, "damaged.npz")
    survives(lambda path: read_arrays(path, ["arr_0", "arr_1"], f"--data_dir {path}: is damaged"), content, "x.npz")
    survives(lambda path: is_whole(path, IMAGES.shape), content, "x.npz")
    survives(read_checked, content, "x.npz")


@fuzz(200)
@given(damaged(npy(np.arange(40)), npy(np.asfortranarray(np.eye(5, dtype=np.float32))), npy(IMAGES),
               npy(np.zeros(3, [("a", "<i4"), ("b", "<f8", (2,))]))))
def test_any_damage_to_an_npy_file_is_a_sentence_or_harmless(content):
    survives(lambda path: np.array(read_npy(path)), content, "damaged.npy")


@fuzz(200)
@given(damaged(json.dumps({"a": [1, 2.5, {"b": None}], "c": "\u00e9\n", "samples": "x.npz"}, indent=2).encode()))
def test_any_damage_to_a_json_file_is_a_sentence_or_harmless(content):
    survives(read_json, content, "damaged.json")
    survives(lambda path: read_json(path, lambda record: record["a"][2]["b"] is None), content, "damaged.json")


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_are_none(tmp_path, name):
    (tmp_path / "x.npy").write_bytes(HEADERS[name])
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("arr_0.npy", HEADERS[name])
    with pytest.raises(UserError, match=r"^--labels .*x\.npy: is no \.npy file"):
        read_npy(tmp_path / "x.npy", flag="--labels")
    for read in (BatchFile, lambda path: ArrayFile(path).read("arr_0"), read_checked,
                 lambda path: read_arrays(path, ["arr_0"], f"--data_dir {path}: is damaged")):
        with pytest.raises(UserError, match=r"x\.npz: .*arr_0|is damaged \(arr_0"):
            read(tmp_path / "x.npz")
    assert not is_whole(tmp_path / "x.npz", IMAGES.shape)


def test_members_that_cannot_be_read_say_why(tmp_path):
    whole = npz(False, arr_0=IMAGES)
    listed = whole.rindex(b"PK\x01\x02")
    for places, value, words in (((8, listed + 10), 99, "compressed by method 99"),
                                 ((6, listed + 8), 1, "arr_0 is encrypted")):
        content = bytearray(whole)
        for place in places:
            content[place] = value
        (tmp_path / "x.npz").write_bytes(content)
        with pytest.raises(UserError, match=rf"x\.npz: .*{words}"):
            BatchFile(tmp_path / "x.npz")
    (tmp_path / "x.npz").write_bytes(npy(IMAGES))
    with pytest.raises(UserError, match=r"x\.npz: is not an \.npz file"):
        read_arrays(tmp_path / "x.npz", ["arr_0"], f"{tmp_path / 'x.npz'}: is not an .npz file")


def test_what_is_right_is_read_as_numpy_reads_it(tmp_path):
    for array in (np.asfortranarray(np.eye(5)[:3]), np.arange(4, dtype=">i2"), np.array(3.5), np.zeros((0, 4), np.int8),
                  np.array(["a", "bc"])):
        np.save(tmp_path / "x.npy", array)
        np.savez_compressed(tmp_path / "x.npz", a=array)
        for found in (read_npy(tmp_path / "x.npy"), *read_arrays(tmp_path / "x.npz", ["a"], "")):
            assert found.dtype == array.dtype
            np.testing.assert_array_equal(found, array)


def test_a_value_is_one_word_or_number(tmp_path):
    np.savez(tmp_path / "x.npz", word=np.array("x"), number=np.array(4), many=np.arange(2))
    file = ArrayFile(tmp_path / "x.npz")
    assert (file.value("word", str), file.value("number", int), file.value("other", int)) == ("x", 4, None)
    for name, kind in (("word", int), ("number", str), ("many", int)):
        with pytest.raises(UserError, match=rf"x\.npz: {name} must be a single "):
            file.value(name, kind)


def test_what_is_no_file_is_said(tmp_path):
    for path in (tmp_path, tmp_path / "missing", tmp_path / ("x" * 5000), "a\0b"):
        for read in (BatchFile, read_npy, read_json):
            with pytest.raises(UserError):
                read(path)


def test_json_of_another_kind_is_a_sentence(tmp_path):
    path = tmp_path / "x.json"
    for content in ("[1]", "{}", "[" * 10**5, "9" * 5000, "\xff", ""):
        path.write_text(content, encoding="latin-1")
        with pytest.raises(UserError, match=r"^--config .*x\.json: is no JSON file that can be used \(."):
            read_json(path, lambda record: record["a"] > 0, flag="--config")
    for content in ("[1]", "null", "1"):
        path.write_text(content)
        with pytest.raises(UserError, match="its content is of another kind"):
            read_json(path)
    path.write_text('{"a": 1}')
    assert read_json(path, lambda record: record["a"] > 0) == {"a": 1}


def test_errors_that_have_their_own_words_keep_them():
    for error in (UserError("x"), PeerError("y"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as raised, reading("file", "is damaged"):
            raise error
        assert raised.value is error
    with pytest.raises(UserError, match=r"^file: is damaged \(more \? lines\)$"), reading("file", "is damaged"):
        raise ValueError("more \x1b\n lines")
