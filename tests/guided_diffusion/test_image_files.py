"""Pictures in files: which are found below a folder, and that they are read as a viewer shows them."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from fuzzing import damaged, fuzz, survives
from hypothesis import given
from PIL import Image

from guided_diffusion import image_files
from guided_diffusion.errors import UserError
from guided_diffusion.image_files import (
    count_decoded,
    damaged_pictures,
    find_pictures,
    image_extent,
    read_depth_image,
    read_image,
)

UP = np.zeros((8, 12, 3), np.uint8)           # as a viewer shows it: red above, blue in the lower left
UP[:4, :, 0], UP[4:, :6, 2] = 255, 255
STORED = {1: UP, 2: UP[:, ::-1], 3: UP[::-1, ::-1], 4: UP[::-1], 5: UP.swapaxes(0, 1), 6: np.rot90(UP),
          7: UP[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(UP, -1)}


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(pixels)).save(path, **options)
    return path


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def test_litter_is_left_out_and_counted(tmp_path):
    for name in ("b.png", "a/c.JPG", "a/d.jfif", "e.webp", "f.bmp", "g.tif", "h.gif"):
        path = tmp_path / name
        save(path, UP, format={".jfif": "JPEG"}.get(path.suffix))
    for name in ("._b.png", ".hidden/x.png", "Thumbs.db", "__MACOSX/y.png", "notes.txt", "a/labels.csv"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "itself.png").symlink_to("itself.png")
    (tmp_path / "folder.png").mkdir()
    found = find_pictures(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in found.files] == [
        "a/c.JPG", "a/d.jfif", "b.png", "e.webp", "f.bmp", "g.tif", "h.gif"]
    assert str(found) == ("2 broken link(s) or devices (first gone.png), 2 file(s) that are no pictures (first "
                          "labels.csv), 4 hidden or system file(s) (first ._b.png)")


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path):
    save(tmp_path / "elsewhere" / "x.png", UP)
    save(tmp_path / "data" / "dogs" / "y.png", UP)
    (tmp_path / "data" / "cats").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "tabbies").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data")
    found = find_pictures(tmp_path / "data")
    assert [path.relative_to(tmp_path / "data").as_posix() for path in found.files] == [
        "cats/x.png", "dogs/y.png", "tabbies/x.png"]
    assert str(found) == "2 link(s) that lead back (first back)"


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(tmp_path, orientation, suffix):
    path = save(tmp_path / f"x.{suffix}", STORED[orientation], exif=exif(orientation),
                **({"lossless": True} if suffix == "webp" else {}))
    np.testing.assert_array_equal(np.asarray(read_image(path, 3)), UP)
    assert image_extent(path) == (12, 8)


def test_orientation_of_depth_and_of_damaged_exif(tmp_path):
    grey = UP[..., 0].astype(np.uint16) * 200
    path = save(tmp_path / "d.png", np.rot90(grey), exif=exif(6))
    np.testing.assert_array_equal(read_depth_image(path), grey)
    path = save(tmp_path / "e.png", UP, exif=b"Exif\0\0MM\0*nonsense")
    np.testing.assert_array_equal(np.asarray(read_image(path, 3)), UP)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bits_become_eight(tmp_path, suffix):
    path = save(tmp_path / f"x.{suffix}", np.array([[0, 128, 257, 32768], [65535, 65407, 65406, 1]], np.uint16))
    expected = [[0, 0, 1, 128], [255, 255, 254, 0]]
    assert np.asarray(read_image(path, 1)).tolist() == expected
    assert np.asarray(read_image(path, 3))[..., 2].tolist() == expected


def test_transparency_is_white(tmp_path):
    pixels = np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [0, 0, 0, 51]]], np.uint8)
    expected = [[[200, 0, 0], [255, 255, 255], [204, 204, 204]]]
    assert np.asarray(read_image(save(tmp_path / "a.png", pixels), 3)).tolist() == expected
    palette = Image.fromarray(np.array([[0, 1, 1]], np.uint8), "P")
    palette.putpalette([9, 9, 9, 200, 0, 0])
    palette.save(tmp_path / "p.png", transparency=0)
    assert np.asarray(read_image(tmp_path / "p.png", 3)).tolist() == [[[255] * 3, [200, 0, 0], [200, 0, 0]]]
    for name, dtype, white in (("l.png", np.uint8, 7), ("i.png", np.uint16, 700)):
        save(tmp_path / name, np.array([[0, white]], dtype), transparency=white)
        assert np.asarray(read_image(tmp_path / name, 1)).tolist() == [[0, 255]]


@pytest.mark.parametrize(("bits", "kind", "row", "key", "expected"), [
    (4, 0, bytes([0x5A]), struct.pack(">H", 5), [[255] * 3, [170] * 3]),
    (4, 0, bytes([0x5A]), struct.pack(">H", 10), [[85] * 3, [255] * 3]),
    (2, 0, bytes([0b01100000]), struct.pack(">H", 1), [[255] * 3, [170] * 3]),
    (16, 2, struct.pack(">6H", 0x1234, 0x5678, 0x9ABC, 0x1234, 0x5678, 0), struct.pack(">3H", 0x1234, 0x5678, 0x9ABC),
     [[255] * 3, [0x12, 0x56, 0]])])
def test_transparent_colours_of_few_or_many_bits_are_white(tmp_path, bits, kind, row, key, expected):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    (tmp_path / "x.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, bits, kind, 0, 0, 0)) + chunk(b"tRNS", key)
        + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b""))
    assert np.asarray(read_image(tmp_path / "x.png", 3)).tolist() == [expected]


def test_an_animation_is_its_first_picture(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "x.gif", 3).getpixel((0, 0)) == (255, 0, 0)


def encoded(pixels, format, **options):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format, **options)
    return stream.getvalue()


def tiff(bits, photometric=1, kind=1):
    """A grey TIFF of 16x16 pixels that are all 0; kind: 1 without a sign, 2 with."""
    tags = {256: 16, 257: 16, 258: bits, 259: 1, 262: photometric, 273: 0, 277: 1, 278: 16, 279: 32 * bits, 339: kind}
    tags[273] = 14 + 12 * len(tags)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4 + 32 * bits)


def test_a_grey_tiff_of_eight_bits_may_have_white_as_zero(tmp_path):
    (tmp_path / "x.tif").write_bytes(tiff(8, photometric=0))
    assert np.asarray(read_image(tmp_path / "x.tif", 1)).min() == 255
    (tmp_path / "x.tif").write_bytes(tiff(16))
    assert read_depth_image(tmp_path / "x.tif").max() == 0
    (tmp_path / "x.tif").write_bytes(tiff(16, photometric=0))
    with pytest.raises(UserError, match="level 0 is white"):
        read_depth_image(tmp_path / "x.tif")


@pytest.mark.parametrize(("content", "message"), [
    (b"", "none of the formats PNG, "), (b"no picture", "none of the formats PNG, "),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "none of the formats PNG, "),
    (encoded(UP, "PNG")[:60], ""), (encoded(np.zeros((64, 64, 3), np.uint8), "JPEG")[:300], "[Tt]runcated"),
    (encoded(np.zeros((150_000, 1), np.uint8), "PNG"), "1x150000 pixels, one side may be 100 times the other"),
    (encoded(np.zeros((9, 9), np.float32), "TIFF"), "floating-point"),
    (encoded(np.full((9, 9), 70000, np.int32), "TIFF"), "levels have 32 bits, save it with 8 or 16"),
    (tiff(12), "levels have 12 bits"), (tiff(32), "levels have 32 bits"), (tiff(8, kind=2), "levels have a sign"),
    (tiff(16, photometric=0), "level 0 is white, save it with black as 0"),
])
def test_files_that_are_refused(tmp_path, content, message):
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.png: cannot be read as an image \(.*" + message) as caught:
        read_image(path, 3)
    assert damaged_pictures([path], 1).keys() == {0}, "a training would only notice when its turn comes"
    if message == "floating-point":
        assert damaged_pictures([path], 0) == {0: str(caught.value)}, "the header tells"


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    with pytest.raises(UserError, match="decompression bomb"):
        read_image(save(tmp_path / "x.png", UP), 3)


def test_damage_is_found_in_headers_and_at_the_start_in_whole_files(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    files = [save(tmp_path / f"{i}.jpg", rng.integers(0, 256, (64, 64, 3), np.uint8)) for i in range(5)]
    files[1].write_bytes(b"nothing")
    files[3].write_bytes(files[3].read_bytes()[:1500])
    assert count_decoded(files) == 5
    assert list(damaged_pictures(files, 5)) == [1, 3] and list(damaged_pictures(files, 2)) == [1]
    monkeypatch.setattr(image_files, "DECODED_AT_START", os.path.getsize(files[0]) + 10)
    assert count_decoded(files) == 2
    monkeypatch.setattr(image_files, "AT_ONCE", 2)
    assert list(damaged_pictures(files, 5)) == [1, 3]


# Pillow warns of what the reader then refuses or does without.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

NOISE = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
WHOLE = [encoded(NOISE, format) for format in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA")]
WHOLE += [encoded(NOISE[..., 0].astype(np.uint16), "PNG"), encoded(NOISE, "JPEG", exif=exif(6)),
          encoded(NOISE[..., 0], "PNG", transparency=3)]


@fuzz(200)
@given(damaged(*WHOLE))
def test_damaged_pictures_are_read_or_refused(content):
    survives(lambda path: (read_image(path, 3), image_extent(path)), content, "x.png", memory=2**30)
