"""Sample files, written and read as a stream: what comes out, and what is refused."""

import io
import tracemalloc
import zipfile

import numpy as np
import pytest

from guided_diffusion.errors import UserError
from guided_diffusion.npz import BatchFile, is_whole, prepare_samples, write_batch

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (11, 6, 5, 3), np.uint8)
SHAPE = (7, 4, 5, 3)          # of samples that come in chunks


@pytest.fixture
def saved(tmp_path):
    """Writes arrays into an .npz and returns its path."""
    def save(compressed=False, **arrays):
        path = tmp_path / "batch.npz"
        (np.savez_compressed if compressed else np.savez)(path, **arrays)
        return path
    return save


def collected(file, *args, **kwargs):
    batches = list(file.batches(*args, **kwargs))
    return [start for start, _ in batches], [images for _, images in batches]


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("size", [1, 4, 11, 50])
def test_batches_give_every_image_in_order(saved, compressed, size):
    file = BatchFile(saved(compressed, arr_0=IMAGES, arr_1=np.arange(11)))
    starts, batches = collected(file, size)
    assert len(file) == 11 and file.resolution == "5x6"
    assert starts == list(range(0, 11, size))
    assert all(len(batch) <= size for batch in batches)
    np.testing.assert_array_equal(np.concatenate(batches), IMAGES)


def test_ranks_share_the_batches(saved):
    file = BatchFile(saved(arr_0=IMAGES))
    parts = [collected(file, 2, slice(rank, None, 3), 9) for rank in range(3)]
    assert [starts for starts, _ in parts] == [[0, 6], [2, 8], [4]]
    seen = {start: batch for starts, batches in parts for start, batch in zip(starts, batches, strict=True)}
    np.testing.assert_array_equal(np.concatenate([seen[start] for start in sorted(seen)]), IMAGES[:9])


def test_images_by_number(saved):
    file = BatchFile(saved(arr_0=IMAGES))
    np.testing.assert_array_equal(file.pick([7, 0, 10, 7]), IMAGES[[7, 0, 10, 7]])


def test_the_file_is_never_in_memory(saved):
    path = saved(arr_0=np.full((2000, 64, 64, 3), 9, np.uint8))         # 24 MB
    file = BatchFile(path)
    tracemalloc.start()
    for _ in file.batches(10, slice(1, None, 2)):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6e6


def test_statistics_are_those_stored(saved):
    mean, covariance = RANDOM.normal(size=4), np.cov(RANDOM.normal(size=(4, 9)))
    file = BatchFile(saved(mu_s=mean.astype(np.float32), sigma_s=covariance, count=np.array(9), backend=np.array("x")))
    assert len(file) == 0 and file.statistics() is None
    np.testing.assert_array_equal(file.statistics("_s").covariance, covariance)
    np.testing.assert_array_equal(file.statistics("_s").mean, mean.astype(np.float32).astype(np.float64))
    assert (file.value("count"), file.value("backend"), file.value("other")) == (9, "x", None)


def test_written_batch_is_an_ordinary_npz(tmp_path):
    path = tmp_path / "out.npz"
    write_batch(path, {"mu": np.arange(3.0)}, iter([IMAGES[:4], IMAGES[4:]]), IMAGES.shape)
    with np.load(path, allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], IMAGES)
        np.testing.assert_array_equal(arrays["mu"], np.arange(3.0))
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(UserError, match="cannot be written"):
        write_batch(tmp_path / "no" / "out.npz", {})


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "out.npz"
    path.write_bytes(b"old")

    def broken():
        yield IMAGES[:4]
        raise UserError("the other pieces are missing")

    with pytest.raises(UserError, match="missing"):
        write_batch(path, {}, broken(), IMAGES.shape)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("images, message", [
    (IMAGES.astype(np.float32) / 255, "float32: images must be uint8 from 0 to 255, also where they were 0 to 1"),
    (IMAGES.astype(np.int64), "int64: images must be uint8"),
    (IMAGES[..., :1], r"\(11, 6, 5, 1\) uint8: images must be \(N, H, W, 3\), RGB"),
    (np.concatenate([IMAGES, IMAGES[..., :1]], axis=3), r"\(11, 6, 5, 4\) uint8"),
    (IMAGES[..., 0], r"\(11, 6, 5\) uint8"),
    (IMAGES[:0], "at least one"),
    (IMAGES.transpose(0, 3, 1, 2), r"\(11, 3, 6, 5\) uint8"),
    (np.asfortranarray(IMAGES), "Fortran order"),
    (np.array([None, 1]), "pickled objects"),
    (np.zeros((1, 9000, 1, 3), np.uint8), "8192 pixels a side"),
])
def test_wrong_images(saved, images, message):
    with pytest.raises(UserError, match=message):
        BatchFile(saved(arr_0=images))


def test_images_from_0_to_1(saved):
    file = BatchFile(saved(arr_0=IMAGES // 200))
    with pytest.raises(UserError, match="not 0 to 1"):
        list(file.batches(4))


@pytest.mark.parametrize("arrays, message", [
    ({"mu": np.zeros(3)}, "has no sigma"),
    ({"mu": np.zeros(3), "sigma": np.zeros((3, 4))}, r"mu is \(3,\) and sigma \(3, 4\)"),
    ({"mu": np.zeros(()), "sigma": np.zeros(())}, r"they must be \(D,\) and \(D, D\)"),
    ({"mu": np.zeros(2), "sigma": np.full((2, 2), np.nan)}, "sigma must be finite"),
    ({"mu": np.zeros(2), "sigma": np.array([[None, 1], [1, 1]])}, "sigma holds pickled objects"),
    ({"mu": np.array(["a", "b"]), "sigma": np.eye(2)}, "mu must be finite floating-point"),
])
def test_wrong_statistics(saved, arrays, message):
    file = BatchFile(saved(**arrays))
    with pytest.raises(UserError, match=message):
        file.statistics()


def test_no_npz_at_all(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        BatchFile(tmp_path / "missing.npz")
    with pytest.raises(UserError, match="is a folder"):
        BatchFile(tmp_path)
    for content in (b"", b"text", IMAGES.tobytes(), b"PK\x05\x06"):
        (tmp_path / "x.npz").write_bytes(content)
        with pytest.raises(UserError, match="is not an"):
            BatchFile(tmp_path / "x.npz")


def test_truncated_files(saved, tmp_path):
    whole = saved(arr_0=IMAGES).read_bytes()
    for length in range(0, len(whole), 97):
        (tmp_path / "short.npz").write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"short\.npz"):
            list(BatchFile(tmp_path / "short.npz").batches(4))


@pytest.mark.parametrize("compressed", [False, True])
def test_damage_anywhere_is_an_error_or_harmless(saved, tmp_path, compressed):
    """A flipped byte never ends in another exception, and the checksum catches every one in the images."""
    whole = saved(compressed, arr_0=IMAGES).read_bytes()
    images_at = 0 if compressed else whole.find(IMAGES.tobytes())
    for place in range(0, len(whole), 13):
        damaged = bytearray(whole)
        damaged[place] ^= 0x5A
        (tmp_path / "damaged.npz").write_bytes(damaged)
        try:
            batches = collected(BatchFile(tmp_path / "damaged.npz"), 4)[1]
        except UserError as error:
            assert "damaged.npz" in str(error)
        else:
            assert compressed or not images_at <= place < images_at + IMAGES.size
            assert sum(map(len, batches)) in (0, 11)


def test_header_that_claims_more_than_there_is(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (10**12, 256, 256, 3)})
    with zipfile.ZipFile(tmp_path / "big.npz", "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue() + b"\0" * 100)
    with pytest.raises(UserError, match="shorter than its header says"):
        BatchFile(tmp_path / "big.npz")


def test_zip_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr("guided_diffusion.npz.SMALL", 10**6)
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", b"\0" * 2 * 10**6)
    with pytest.raises(UserError, match="which no images do"):
        BatchFile(tmp_path / "bomb.npz")


# Samples in chunks

@pytest.fixture
def chunks():
    """Chunks of 3, 3 and 1 images with labels, and the arrays they are together."""
    images, labels = np.random.default_rng(0).integers(0, 256, SHAPE, dtype=np.uint8), np.arange(7)
    return [(images[i:i + 3], labels[i:i + 3]) for i in range(0, 7, 3)], images, labels


@pytest.fixture
def prepared(chunks, tmp_path):
    return prepare_samples(chunks[0], SHAPE, tmp_path / "samples.npz")


def test_samples_joins_chunks_in_order(chunks, prepared, tmp_path):
    parts, images, labels = chunks
    with np.load(prepared, allow_pickle=False) as file:
        assert file.files == ["arr_0", "arr_1"]
        assert file["arr_0"].dtype == np.uint8 and (file["arr_0"] == images).all()
        assert file["arr_1"].dtype == np.int64 and (file["arr_1"] == labels).all()
    again = prepare_samples(iter(parts), SHAPE, tmp_path / "again.npz")
    assert again.read_bytes() == prepared.read_bytes()


def test_samples_without_labels(tmp_path):
    prepared = prepare_samples([(np.ones((2, 4, 4, 3), np.uint8), None)], (2, 4, 4, 3), tmp_path / "samples.npz")
    with np.load(prepared, allow_pickle=False) as file:
        assert file.files == ["arr_0"]
    assert BatchFile(prepared).labels is None


def test_samples_that_fails_leaves_nothing(chunks, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="cannot be written"):
        prepare_samples(chunks[0], SHAPE, tmp_path / "nowhere" / "samples.npz")
    with pytest.raises(UserError, match="reads back"):
        prepare_samples(chunks[0][:2], SHAPE, tmp_path / "samples.npz")             # one image is missing
    assert not list(tmp_path.iterdir())


def test_every_flipped_byte_of_an_image_shows(prepared):
    assert is_whole(prepared, SHAPE) and not is_whole(prepared, (6, *SHAPE[1:]))
    content = prepared.read_bytes()
    start = content.index(b"NUMPY")
    for at in range(start, start + 500, 7):
        prepared.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1:])
        assert not is_whole(prepared, SHAPE), at
    prepared.write_bytes(content[:-30])
    assert not is_whole(prepared, SHAPE)


@pytest.mark.parametrize("count", [1, 4, 7, 100])
def test_first_images(count, chunks, prepared):
    assert (BatchFile(prepared).first(count) == chunks[1][:count]).all()
    assert len(BatchFile(prepared).first(count)) == min(count, 7)


def test_images_of_the_ranges_asked_for(chunks, prepared):
    _, images, labels = chunks
    wanted, file = [range(0, 2), range(3, 4), range(4, 7)], BatchFile(prepared)
    for indices, some in zip(wanted, file.images(wanted), strict=True):
        assert (some == images[indices.start:indices.stop]).all()
    assert (file.labels == labels).all()
