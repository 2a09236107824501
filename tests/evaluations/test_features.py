"""Features of files: the same for any batch and any number of ranks, computed once, never held in memory."""

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import REPOSITORY, execute
from PIL import Image
from synthetic_inception import write_weights

from evaluations.extractors.inception import InceptionExtractor
from evaluations.features import Features, extract, feature_folder
from evaluations.image_sets import open_images
from evaluations.metrics import FileFeatures
from guided_diffusion.errors import UserError
from guided_diffusion.npz import BatchFile, write_batch

IMAGES = np.random.default_rng(0).integers(0, 256, (23, 4, 4, 3), np.uint8)


class Stub:
    """A network whose features are the pixels; counts the images it sees."""

    name, fingerprint, caveat = "stub", "0" * 64, ""

    def __init__(self):
        self.seen = 0

    def features(self, images):
        self.seen += len(images)
        values = images.astype(np.float32)
        return Features(values.mean(axis=(1, 2)), values, values.reshape(len(values), -1)[:, :2] / 255)


@pytest.fixture
def file(tmp_path):
    write_batch(tmp_path / "samples.npz", {}, iter([IMAGES]), IMAGES.shape)
    return BatchFile(tmp_path / "samples.npz")


@pytest.mark.parametrize("batch_size, num_images", [(5, None), (23, None), (50, None), (4, 10), (1, 3)])
def test_features_of_the_images_asked_for(file, tmp_path, batch_size, num_images):
    network = Stub()
    features = extract(file, network, tmp_path, batch_size, num_images)
    images = IMAGES[:num_images].astype(np.float32)
    np.testing.assert_array_equal(features.pooled, images.mean(axis=(1, 2)))
    np.testing.assert_array_equal(features.spatial, images.reshape(len(images), -1))
    np.testing.assert_array_equal(features.probabilities, images.reshape(len(images), -1)[:, :2] / 255)
    assert network.seen == len(images)


def test_a_file_is_read_once_by_each_network(file, tmp_path):
    network, other = Stub(), Stub()
    other.fingerprint = "1" * 64
    with feature_folder(tmp_path / "cache") as folder:
        first = extract(file, network, folder, 5)
        again = extract(file, network, folder, 7)
        np.testing.assert_array_equal(first.pooled, again.pooled)
        assert network.seen == 23
        extract(file, other, folder, 5)
        assert other.seen == 23
        extract(file, network, folder, 5, 4)
        assert network.seen == 27


def test_no_cache_leaves_nothing(file, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    with feature_folder(None) as folder:
        extract(file, Stub(), folder, 5)
        assert folder.parent == tmp_path / "temporary"
    assert list((tmp_path / "temporary").iterdir()) == []


def test_failure_leaves_no_features(file, tmp_path):
    network = Stub()
    worst = IMAGES[:, 0, 0].sum(axis=1).argmax()
    network.features = lambda images: Features(*(
        np.where((images[:, 0, 0] == IMAGES[worst, 0, 0]).all(axis=1, keepdims=True), np.nan, 1) for _ in range(3)))
    with pytest.raises(UserError, match=rf"samples\.npz: the pooled features of image {worst} are not finite"):
        extract(file, network, tmp_path / "cache", 5)
    assert not list((tmp_path / "cache").glob("*")) and not list((tmp_path / "cache").glob(".*"))


@pytest.mark.parametrize("part", Features._fields)
def test_features_of_changing_width_are_a_sentence(file, tmp_path, part):
    """Rows of one width would be written over those of another."""
    network, plain = Stub(), Stub()

    def features(images):
        found = plain.features(images)
        return found._replace(**{part: getattr(found, part)[..., :2 if len(images) > 3 else 1]})

    network.features = features
    with pytest.raises(UserError, match=rf"samples\.npz: stub gives \d+ {part} features of image 20 and \d+ of"):
        extract(file, network, tmp_path / "cache", 5)
    assert not list((tmp_path / "cache").iterdir())
    network.features = plain.features
    assert len(extract(file, network, tmp_path / "cache", 5).pooled) == 23


def test_features_of_another_kind_are_not_taken_for_these(file, tmp_path, monkeypatch):
    """Weights alone do not say what made features: type, backend, resizing and versions take part."""
    seen = 0

    def extracted(**attributes):
        nonlocal seen
        network = Stub()
        for name, value in attributes.items():
            setattr(network, name, value)
        extract(file, network, tmp_path, 5)
        seen += network.seen
        return network.seen

    for attributes in ({}, {"settings": {"dtype": "float32"}}, {"settings": {"dtype": "bfloat16"}},
                       {"settings": {"backend": "tensorflow"}}, {"settings": {"resize": "none"}}, {"name": "other"}):
        assert (extracted(**attributes), extracted(**attributes)) == (23, 0)
    monkeypatch.setattr("evaluations.features.__version__", "99")
    assert extracted() == 23 and seen == 7 * 23


def test_what_makes_features_is_known_of_both_inceptions(tmp_path):
    weights = write_weights(tmp_path / "w.safetensors")
    settings = [InceptionExtractor(weights, dtype=dtype).settings for dtype in ("float32", "bfloat16")]
    assert [each["dtype"] for each in settings] == ["float32", "bfloat16"]
    assert {"backend", "dtype", "resize"} <= settings[0].keys()


def truncate(path):
    os.truncate(path, 200)


def blank(path):
    content = bytearray(path.read_bytes())
    content[150:200] = bytes(50)
    path.write_bytes(content)


DAMAGE = {"truncated": truncate, "blanked": blank, "missing": Path.unlink,
          "lengthened": lambda path: path.write_bytes(path.read_bytes() + b"x"),
          "a folder": lambda path: (path.unlink(), path.mkdir())}


@pytest.mark.parametrize("name", ["pooled.npy", "spatial.npy", "probabilities.npy", "features.json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_features_are_made_again(file, tmp_path, caplog, name, damage):
    first = [np.array(values) for values in extract(file, Stub(), tmp_path / "cache", 5)]
    folder, = (tmp_path / "cache").iterdir()
    DAMAGE[damage](folder / name)
    network = Stub()
    again = extract(file, network, tmp_path / "cache", 5)
    assert network.seen == 23 and list((tmp_path / "cache").iterdir()) == [folder]
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    record, = caplog.records
    assert "the features of samples.npz are damaged" in record.getMessage() and name in record.getMessage()
    assert len(record.getMessage().splitlines()) == 1
    extract(file, network, tmp_path / "cache", 5)
    assert network.seen == 23


def test_damaged_features_that_cannot_be_removed_are_not_used(file, tmp_path, monkeypatch):
    extract(file, Stub(), tmp_path / "cache", 5)
    folder, = (tmp_path / "cache").iterdir()
    blank(folder / "pooled.npy")
    monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors: None)         # as in the folder of another user
    with pytest.raises(UserError, match="cannot be written"):
        extract(file, Stub(), tmp_path / "cache", 5)


def test_a_full_disk_is_a_sentence_before_the_first_batch_is_done(file, tmp_path, monkeypatch):
    def full(descriptor, start, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(UserError, match=r"cache: the features, 1 MiB, cannot be written \(No space left on device\)"):
        extract(file, Stub(), tmp_path / "cache", 5)
    assert list((tmp_path / "cache").iterdir()) == []


def test_file_systems_that_cannot_reserve_space(file, tmp_path, monkeypatch):
    def unknown(descriptor, start, size):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr("os.posix_fallocate", unknown)
    features = extract(file, Stub(), tmp_path / "cache", 5)
    np.testing.assert_array_equal(features.pooled, IMAGES.astype(np.float32).mean(axis=(1, 2)))


@pytest.mark.parametrize("cache", [True, False])
def test_termination_leaves_no_features(file, tmp_path, monkeypatch, cache):
    """Commands raise KeyboardInterrupt where a signal ends them."""
    def terminated(images):
        if not (images == IMAGES[:5]).all():
            raise KeyboardInterrupt
        return Stub().features(images)

    network = Stub()
    network.features = terminated
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "folder"))
    with pytest.raises(KeyboardInterrupt), feature_folder(tmp_path / "folder" if cache else None) as folder:
        extract(file, network, folder, 5)
    assert list((tmp_path / "folder").iterdir()) == []


@pytest.mark.parametrize("cache", [True, False])
def test_what_a_kill_left_goes_with_the_next_run(tmp_path, monkeypatch, cache):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    left = tmp_path / (f".{'0' * 32}-{'1' * 32}-23-{'a' * 14}" if cache else f"features-{'a' * 14}")
    left.mkdir()
    (left / "pooled.npy").write_bytes(b"half")
    (left / ".owner").write_text(os.uname().nodename)
    (tmp_path / ".config").mkdir()
    with feature_folder(tmp_path if cache else None):
        assert not left.exists()
    assert list(tmp_path.iterdir()) == [tmp_path / ".config"]


def test_damaged_images_are_named(file, tmp_path):
    content = bytearray(file.path.read_bytes())
    content[content.find(IMAGES.tobytes()) + 500] ^= 1
    file.path.write_bytes(content)
    with pytest.raises(UserError, match=r"samples\.npz: arr_0 is damaged"):
        extract(BatchFile(file.path), Stub(), tmp_path / "cache", 5)


@pytest.mark.parametrize("name", ["a.npz", "a.npy", "a.zip", "a"])
def test_images_that_change_while_they_are_read_are_refused_and_leave_no_features(tmp_path, name):
    """Else the features of the new images would be kept under the digest of the old ones."""
    def save(images):
        if name == "a.npz":
            write_batch(tmp_path / name, {}, iter([images]), images.shape)
        elif name == "a.npy":
            np.save(tmp_path / name, images)
        else:
            (tmp_path / "a").mkdir(exist_ok=True)
            for index, image in enumerate(images):
                Image.fromarray(image).save(tmp_path / "a" / f"{index:02d}.png")
            if name == "a.zip":
                os.replace(shutil.make_archive(str(tmp_path / "new"), "zip", tmp_path / "a"), tmp_path / name)

    class Changing(Stub):
        def features(self, images):
            if not self.seen:
                save(255 - IMAGES)
            return super().features(images)

    save(IMAGES)
    with pytest.raises(UserError, match=rf"{name}.*: was changed while it was read; start the command again"):
        extract(open_images(tmp_path / name), Changing(), tmp_path / "cache", 5)
    assert not list((tmp_path / "cache").iterdir())
    features = extract(open_images(tmp_path / name), Stub(), tmp_path / "cache", 5)
    np.testing.assert_array_equal(features.pooled, (255 - IMAGES).mean(axis=(1, 2), dtype=np.float32))


def test_a_file_that_changed_is_not_described(file):
    described = FileFeatures(file, len(file))
    assert described.description()["images"] == 23
    write_batch(file.path, {}, iter([255 - IMAGES]), IMAGES.shape)
    with pytest.raises(UserError, match=r"samples\.npz: was changed while it was read"):
        described.description()


def test_a_rank_that_does_not_see_the_temporary_folder_says_what_to_name(monkeypatch):
    monkeypatch.setattr("evaluations.features.dist_util.is_main", lambda: False)       # the first rank is elsewhere
    with pytest.raises(UserError, match="--cache is not given: the ranks are on several machines"), feature_folder(""):
        pass


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--cache .*file: cannot be written"), feature_folder(tmp_path / "file"):
        pass


PROGRAM = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[1].split(":")
from test_features import Stub
from evaluations.extractors.inception import InceptionExtractor
from evaluations.features import extract, feature_folder
from guided_diffusion.npz import BatchFile
from guided_diffusion import dist_util
dist_util.connect()
with feature_folder(sys.argv[3]) as folder:
    network = Stub()
    extract(BatchFile(sys.argv[2]), network, folder, 4)
Path(sys.argv[3] + f"-seen-{dist_util.rank()}").write_text(str(network.seen))
with feature_folder(None) as folder:
    extract(BatchFile(sys.argv[2]), network, folder, 4)
dist_util.shutdown()
"""


@pytest.mark.slow
def test_ranks_share_the_work(launcher, file, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    here = Path(__file__).parent
    paths = (REPOSITORY, here, here.parent, here.parent / "support")
    tests, shared = ":".join(map(str, paths)), tmp_path / "shared"
    ended = execute(*launcher, tmp_path / "program.py", tests, file.path, shared)
    assert ended.returncode == 0, ended.stderr
    seen = [int(path.read_text()) for path in tmp_path.glob("shared-seen-*")]
    assert sum(seen) == 23 and min(seen) > 0
    network = Stub()
    together, alone = extract(file, network, shared, 4), extract(file, Stub(), tmp_path, 4)
    assert network.seen == 0
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_array_equal(a, b)
