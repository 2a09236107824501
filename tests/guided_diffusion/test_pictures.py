"""Pictures of samples."""

import re

import numpy as np
import pytest
from PIL import Image

from guided_diffusion.errors import UserError
from guided_diffusion.pictures import CAPTION, MARGIN, grid, save_comparison, save_grid


@pytest.fixture
def images():
    """Five images (5, 4, 6, 3), each of one colour."""
    colours = np.array([[200, 0, 0], [0, 200, 0], [0, 0, 200], [90, 90, 90], [7, 8, 9]], np.uint8)
    return np.tile(colours[:, None, None], (1, 4, 6, 1))


def test_grid_places_images_row_by_row_on_white(images):
    canvas = grid(images, columns=3, gap=2)
    assert canvas.shape == (2 * (4 + 2) + 2, 3 * (6 + 2) + 2, 3) and canvas.dtype == np.uint8
    for i, image in enumerate(images):
        top, left = 2 + (i // 3) * 6, 2 + (i % 3) * 8
        assert (canvas[top:top + 4, left:left + 6] == image).all()
    covered = len(images) * 4 * 6
    assert (canvas == 255).all(axis=-1).sum() == canvas.shape[0] * canvas.shape[1] - covered


def test_saved_grid_is_square_enlarged_and_exact(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)
    save_grid(images, tmp_path / "new" / "grid.png")
    with Image.open(tmp_path / "new" / "grid.png") as picture:
        pixels = np.asarray(picture)
    assert pixels.shape == (4 * (3 * 18 + 2), 4 * (3 * 18 + 2), 3)
    assert (pixels[::4, ::4] == grid(images, columns=3)).all()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["grid.png"]


def test_large_images_keep_their_size_and_one_image_is_a_grid(tmp_path):
    save_grid(np.zeros((1, 128, 128, 3), np.uint8), tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (132, 132)


def test_comparison_has_a_titled_block_for_each_setting(tmp_path):
    colours = np.array([[200, 0, 0], [0, 200, 0], [0, 0, 200]], np.uint8)
    rows = {f"setting {i}": np.tile(colour, (20, 32, 32, 1)) for i, colour in enumerate(colours)}
    save_comparison(rows, tmp_path / "comparison.png", columns=10)
    with Image.open(tmp_path / "comparison.png") as picture:
        pixels = np.asarray(picture)
    tops = []
    for colour in colours:
        rows, columns = np.nonzero((pixels == colour).all(axis=-1))
        tops.append(rows.min())
        assert np.ptp(columns) + 1 == 2 * (10 * 34 - 2)               # ten images side by side, each enlarged twice
        assert len(rows) == 20 * 64 * 64
    assert tops == sorted(tops)
    assert (pixels[:tops[0]] < 128).any()                         # a title stands above
    assert pixels[-1].min() == 255


def captioned(tmp_path, captions, zoom=None, title="title"):
    """The pixels below the images of a comparison, for each of its captions."""
    save_comparison({title: np.zeros((len(captions), 32, 32, 3), np.uint8)}, tmp_path / "x.png", len(captions), zoom,
                    captions)
    factor = zoom or 2
    with Image.open(tmp_path / "x.png") as picture:
        pixels = np.asarray(picture)
    bottom = MARGIN + 24 + 36 * factor
    return [pixels[bottom - factor:bottom + CAPTION, MARGIN + factor * (34 * place + 1):][:, :32 * factor]
            for place in range(len(captions))]


def test_a_caption_that_is_cut_has_a_mark_and_a_zoom(tmp_path, caplog):
    name = "0: smileys-twemoji"
    long, *marked = captioned(tmp_path, [name, *(f"{name[:count]}…" for count in range(11))])
    assert any(np.array_equal(long, other) for other in marked)
    zoom = int(re.search(r"x\.png: .* cut where they end in …; --zoom (\d+) shows", caplog.text)[1])
    for factor in (zoom - 1, zoom):
        caplog.clear()
        captioned(tmp_path, [name], factor)
        assert ("cut" in caplog.text) == (factor < zoom)


def test_letters_that_the_font_lacks_are_told(tmp_path, caplog):
    captioned(tmp_path, ["dogs…", "a_b-(c)"])
    assert not caplog.text
    captioned(tmp_path, ["собаки"], zoom=9, title="犬")
    assert "x.png: boxes stand for letters that the font of pictures lacks: " + " ".join("犬собаки") in caplog.text


def test_picture_that_cannot_be_written(images, tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "grid.png", "/proc/nowhere/grid.png"):
        with pytest.raises(UserError, match=r"grid.png: cannot be written"):
            save_grid(images, path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        save_grid(images, tmp_path / "folder")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder"}
