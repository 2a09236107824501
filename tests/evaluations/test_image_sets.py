"""What can be evaluated: every form gives the same images, as a stream, and what is none is a sentence."""

import io
import json
import logging
import os
import tracemalloc
import zipfile

import numpy as np
import pytest
from finished import write_run
from fuzzing import damaged, fuzz, survives
from hypothesis import given
from PIL import Image

from evaluations.attention.study import AttentionOptions, read_objects
from evaluations.class_accuracy import read_labelled_samples
from evaluations.extractors.fashion_mnist import CLASS_NAMES
from evaluations.image_sets import open_images
from guided_diffusion.build import ModelOptions
from guided_diffusion.depth.pairs import read_pairs
from guided_diffusion.errors import UserError
from guided_diffusion.image_datasets import load_npz
from guided_diffusion.npz import BatchFile, write_batch

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 6, 5, 3), np.uint8)


def encoded(image, kind="PNG"):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind, lossless=True)
    return stream.getvalue()


def as_npz(folder):
    write_batch(folder / "a.npz", {}, iter([IMAGES]), IMAGES.shape)
    return folder / "a.npz"


def as_npy(folder):
    np.save(folder / "a.npy", IMAGES)
    return folder / "a.npy"


def as_fortran_npy(folder):
    np.save(folder / "a.npy", np.asfortranarray(IMAGES))
    return folder / "a.npy"


def as_folder(folder):
    """Pictures of several formats and depths, with what systems leave between them."""
    (folder / "pictures" / "b").mkdir(parents=True)
    for index, image in enumerate(IMAGES):
        kind = ("PNG", "WEBP", "BMP", "TIFF")[index % 4]
        path = folder / "pictures" / ("b" if index > 3 else ".") / f"{index}.{kind.lower()}"
        path.write_bytes(encoded(image, kind))
    (folder / "pictures" / "._0.png").write_bytes(b"litter")
    (folder / "pictures" / "notes.txt").write_text("notes")
    return folder / "pictures"


def as_zip(folder):
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        for index in reversed(range(len(IMAGES))):
            archive.writestr(f"some/{index}.png", encoded(IMAGES[index]))
        archive.writestr("__MACOSX/some/._0.png", b"litter")
        archive.writestr("some/notes.txt", b"notes")
        archive.writestr("some/folder.png/", b"")
    return folder / "a.zip"


def as_run(folder):
    (folder / "run").mkdir()
    as_npz(folder).rename(folder / "run" / "samples_7x6x5x3.npz")
    (folder / "run" / "grid.png").write_bytes(encoded(IMAGES[0]))
    return folder / "run"


def as_renamed_npz(folder):
    return as_npz(folder).rename(folder / "a.zip")


FORMS = (as_npz, as_npy, as_fortran_npy, as_folder, as_zip, as_run, as_renamed_npz)


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_give_the_same_images(tmp_path, form):
    file = open_images(form(tmp_path))
    assert (len(file), file.resolution) == (7, "5x6")
    batches = list(file.batches(3, slice(None), 7))
    assert [start for start, _ in batches] == [0, 3, 6]
    np.testing.assert_array_equal(np.concatenate([images for _, images in batches]), IMAGES)
    np.testing.assert_array_equal(np.concatenate([images for _, images in file.batches(2, slice(1, None, 2))]),
                                  IMAGES[[2, 3, 6]])
    np.testing.assert_array_equal(file.pick([6, 0, 3]), IMAGES[[6, 0, 3]])
    np.testing.assert_array_equal(file.first(2), IMAGES[:2])
    assert file.statistics() is None and file.labels is None and file.value("backend", str) is None


@pytest.mark.parametrize("separator", ["/", "\\"])
def test_an_archive_is_read_like_the_folder_that_was_packed(tmp_path, caplog, separator):
    """Also where text is in another order than folders, and where a program of Windows packed it."""
    caplog.set_level(logging.INFO)
    places = ["a-1/0.png", "a/1.png", "b.png", "a/._1.png", ".hidden/2.png", "__MACOSX/a/3.png", "a/notes.txt"]
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for number, place in enumerate(places):
            (tmp_path / "all" / place).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "all" / place).write_bytes(encoded(IMAGES[number]))
            archive.writestr(place.replace("/", separator), encoded(IMAGES[number]))
    folder, archive = (open_images(tmp_path / name) for name in ("all", "all.zip"))
    np.testing.assert_array_equal(folder.first(3), IMAGES[[1, 0, 2]])
    np.testing.assert_array_equal(archive.first(3), folder.first(3))
    assert len(archive) == len(folder) == 3
    for name, line in zip(("all", "all.zip"), caplog.messages, strict=True):
        assert line.startswith(f"{tmp_path / name}: 3 images; left out: 1 file(s) that are no pictures (notes.txt), 3 ")


@pytest.mark.parametrize("form", FORMS)
def test_what_is_evaluated_has_a_checksum_of_its_content(tmp_path, form):
    path = form(tmp_path)
    before = open_images(path).sha256
    assert len(before) == 64 and open_images(path).sha256 == before
    file = path if path.is_file() else sorted(path.rglob("*.[pn]*"))[0 if form is as_run else -1]
    if form is as_run:
        file = path / "samples_7x6x5x3.npz"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    if form is as_folder or form in (as_npy, as_fortran_npy):
        assert open_images(path).sha256 != before


def test_of_an_extended_run_the_images_of_its_record_are_taken(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    run = write_run(tmp_path / "run", IMAGES[:4])
    assert len(open_images(run)) == 4 and not caplog.messages
    write_run(run, IMAGES)
    file = open_images(run)
    assert (file.path.name, len(file)) == ("samples_7x6x5x3.npz", 7)
    np.testing.assert_array_equal(file.first(7), IMAGES)
    line, = caplog.messages
    assert line.endswith("run: takes samples_7x6x5x3.npz, which its run.json names, and leaves samples_4x6x5x3.npz")
    write_run(run, IMAGES[:5])
    assert len(open_images(run)) == 5
    (run / "samples_5x6x5x3.npz").unlink()
    assert "name one of them: samples_4x6x5x3.npz, samples_7x6x5x3.npz" in refused(run)
    (run / "run.json").write_text("{}")
    assert "holds several files of samples, name one of them" in refused(run)


@pytest.mark.parametrize("pictures, begun, stray, said", [
    (["grid.png"], None, False, None), (["grid.png"], {}, False, None),
    (["grid.png", "b/1.png", "2.jpg"], None, True, " and leaves 2 pictures"),
    (["2.png"], None, False, " and leaves 1 picture"),
    ([], {"num_samples": 40}, True, "; a run of 40 images there is not finished"),
    ([], {"seed": 1}, False, "; a run of 7 images there is not finished"),         # which overwrites that one
    (["2.png"], {"num_samples": 40}, False, " and leaves 1 picture; a run of 40 images there is not finished"),
])
def test_what_lies_beside_the_samples_of_a_run_is_said(pictures, begun, stray, said, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    run = write_run(tmp_path / "run", IMAGES[:, :5])
    record = json.loads((run / "run.json").read_text())
    for path in (run / name for name in pictures):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    if stray:
        (run / "run.json").unlink()                 # the file is taken, whoever has made it
    if begun is not None:
        (run / "shards").mkdir()
        (run / "shards" / "run.json").write_text(json.dumps(
            {**record, "configuration": {**record["configuration"], **begun}}))
    assert len(open_images(run)) == 7
    assert caplog.messages == ([f"{run}: takes samples_7x5x5x3.npz{said}"] if said else [])


def test_pictures_are_never_all_in_memory(tmp_path):
    image = encoded(np.full((64, 64, 3), 9, np.uint8))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for index in range(1000):                                       # 12 MB of pixels
            archive.writestr(f"{index}.png", image)
    file = open_images(tmp_path / "a.zip")
    tracemalloc.start()
    for _ in file.batches(10):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6


def refused(path):
    with pytest.raises(UserError) as raised:
        for _ in open_images(path).batches(4):
            pass
    return str(raised.value)


def test_what_is_no_set_of_images_is_a_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "empty: the folder holds neither pictures (" in refused(tmp_path / "empty")
    assert refused(tmp_path / "missing").endswith("missing: there is no such file")
    run = as_run(tmp_path)
    as_npz(tmp_path).rename(run / "samples_9x6x5x3.npz")
    assert "holds several files of samples, name one of them: samples_7x6x5x3.npz, samples_9x" in refused(run)
    with zipfile.ZipFile(tmp_path / "text.zip", "w") as archive:
        archive.writestr("notes.txt", b"notes")
    assert "text.zip: holds no pictures (" in refused(tmp_path / "text.zip")
    assert refused(tmp_path / "text.zip").endswith("but notes.txt")
    np.save(tmp_path / "float.npy", IMAGES / 255)
    assert "float.npy: the array is (7, 6, 5, 3) float64: images must be uint8 from 0 to 255" in \
        refused(tmp_path / "float.npy")
    (tmp_path / "empty.npy").touch()
    assert "empty.npy: is no .npy file that can be used" in refused(tmp_path / "empty.npy")
    os.mkfifo(tmp_path / "pipe.npz")
    assert refused(tmp_path / "pipe.npz").endswith("pipe.npz: is neither a file nor a folder")
    assert refused("") == "the name of a file or folder of images is empty"
    assert "is an address; fetch the file first" in refused("https://host/samples.npz")
    np.savez(tmp_path / "other.npz", features=np.zeros(3), labels=np.zeros(3))
    assert BatchFile(tmp_path / "other.npz").without_images.endswith("its arrays are: features, labels")


def test_pictures_of_several_sizes_and_damaged_ones_are_named(tmp_path):
    folder = as_folder(tmp_path)
    (folder / "b" / "z.png").write_bytes(encoded(IMAGES[0, :4]))
    assert "pictures: b/z.png is 5x4, the first picture 5x6: they must have one size" in refused(folder)
    (folder / "b" / "z.png").write_bytes(b"text")
    assert "z.png: cannot be read as an image" in refused(folder)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("0.png", encoded(IMAGES[0]))
        archive.writestr("1.png", b"text")
    assert "a.zip: 1.png: cannot be read as an image" in refused(tmp_path / "a.zip")


def test_values_are_0_to_1_only_where_the_whole_file_has_no_others(tmp_path):
    images = np.zeros((9, 4, 4, 3), np.uint8)
    images[8, 3, 3, 2] = 2
    np.save(tmp_path / "dark.npy", images)
    assert len(list(open_images(tmp_path / "dark.npy").batches(1))) == 9
    np.save(tmp_path / "dark.npy", images // 2)
    assert "its 9 images hold nothing above 1" in refused(tmp_path / "dark.npy")


def test_values_of_0_to_1_are_refused_by_all_who_read_a_file(tmp_path):
    path, size = str(tmp_path / "dark.npz"), 32
    images = np.random.default_rng(0).integers(0, 2, (4, size, size, 3), np.uint8)
    np.savez(path, arr_0=images, arr_1=np.arange(4), mask=images[..., 0], depth=images[..., 0])
    for read in (lambda: list(open_images(path).batches(3)), lambda: load_npz(path, (3, size, size), labelled=True),
                 lambda: read_labelled_samples(path, CLASS_NAMES), lambda: read_pairs(path, size=size),
                 lambda: read_objects(AttentionOptions(objects=path, num_images=4), ModelOptions(image_size=size))):
        with pytest.raises(UserError, match=r"dark.npz: its 4 images hold nothing above 1"):
            read()


def packed(**pictures):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in pictures.items():
            archive.writestr(f"{name}.png", content)
    return stream.getvalue()


@fuzz(100)
@given(damaged(packed(a=encoded(IMAGES[0]), b=encoded(IMAGES[1]))))
def test_any_damage_to_an_archive_of_pictures_is_a_sentence_or_harmless(content):
    survives(lambda path: list(open_images(path).batches(2)), content, "damaged.zip")
