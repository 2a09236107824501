"""The file of samples: written as a stream, checked, read in parts."""

import numpy as np
import pytest

from guided_diffusion.errors import UserError
from guided_diffusion.packing import first_images, is_whole, pack, read_labels, unpack

SHAPE = (7, 4, 5, 3)


@pytest.fixture
def chunks():
    """Chunks of 3, 3 and 1 images with labels, and the arrays they are together."""
    images, labels = np.random.default_rng(0).integers(0, 256, SHAPE, dtype=np.uint8), np.arange(7)
    return [(images[i:i + 3], labels[i:i + 3]) for i in range(0, 7, 3)], images, labels


@pytest.fixture
def packed(chunks, tmp_path):
    return pack(chunks[0], SHAPE, tmp_path / "packed.npz")


def test_pack_joins_chunks_in_order(chunks, packed, tmp_path):
    parts, images, labels = chunks
    with np.load(packed, allow_pickle=False) as file:
        assert file.files == ["arr_0", "arr_1"]
        assert file["arr_0"].dtype == np.uint8 and (file["arr_0"] == images).all()
        assert file["arr_1"].dtype == np.int64 and (file["arr_1"] == labels).all()
    again = pack(iter(parts), SHAPE, tmp_path / "again.npz")
    assert again.read_bytes() == packed.read_bytes()


def test_pack_without_labels(tmp_path):
    packed = pack([(np.ones((2, 4, 4, 3), np.uint8), None)], (2, 4, 4, 3), tmp_path / "packed.npz")
    with np.load(packed, allow_pickle=False) as file:
        assert file.files == ["arr_0"]
    assert read_labels(packed) is None


def test_pack_that_fails_leaves_nothing(chunks, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="cannot be written"):
        pack(chunks[0], SHAPE, tmp_path / "nowhere" / "packed.npz")
    with pytest.raises(UserError, match="reads back"):
        pack(chunks[0][:2], SHAPE, tmp_path / "packed.npz")             # one image is missing
    assert not list(tmp_path.iterdir())


def test_every_flipped_byte_of_an_image_shows(packed):
    assert is_whole(packed, SHAPE) and not is_whole(packed, (6, *SHAPE[1:]))
    content = packed.read_bytes()
    start = content.index(b"NUMPY")
    for at in range(start, start + 500, 7):
        packed.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1:])
        assert not is_whole(packed, SHAPE), at
    packed.write_bytes(content[:-30])
    assert not is_whole(packed, SHAPE)


@pytest.mark.parametrize("count", [1, 4, 7, 100])
def test_first_images(count, chunks, packed):
    assert (first_images(packed, count) == chunks[1][:count]).all()
    assert len(first_images(packed, count)) == min(count, 7)


def test_unpack_reads_the_chunks_asked_for(chunks, packed):
    _, images, labels = chunks
    wanted = [range(0, 2), range(3, 4), range(4, 7)]
    for numbers, (some, some_labels) in zip(wanted, unpack(packed, wanted), strict=True):
        assert (some == images[numbers.start:numbers.stop]).all()
        assert (some_labels == labels[numbers.start:numbers.stop]).all()
