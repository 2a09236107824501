"""Pictures of geometry: normals and points of surfaces that are known, and the command."""

import json

import numpy as np
import pytest
import torch
from commands import call
from PIL import Image

from evaluations.depth.pictures import (
    CLOUD_SIZE,
    depth_colours,
    normal_colours,
    normals,
    point_cloud,
    points,
)
from evaluations.extractors.scenes import ScenesExtractor, save_scenes
from guided_diffusion.depth.scenes import FAR, FOV, KINDS, NEAR, render
from guided_diffusion.npz import prepare_samples


@pytest.fixture(scope="module")
def rendered():
    return render(0, range(40))


def test_points_span_the_field_of_view():
    seen = points(np.full((4, 4), 2.0))
    edge = 2 * np.tan(np.radians(FOV / 2))
    np.testing.assert_allclose(seen[0, :, 0], edge * np.array([-0.75, -0.25, 0.25, 0.75]))
    np.testing.assert_allclose(seen[:, 0, 1], edge * np.array([-0.75, -0.25, 0.25, 0.75]))
    assert (seen[..., 2] == 2).all()


def test_normals_of_a_wall_and_of_a_slope():
    np.testing.assert_allclose(normals(np.full((6, 6), 3.0)), np.broadcast_to([0, 0, -1.0], (6, 6, 3)), atol=1e-12)
    # The floor 1.5 m below the camera: y = 1.5, so that depth = 1.5 / (y / z).
    focal = 8 / np.tan(np.radians(FOV / 2))
    rows = np.arange(9, 16)
    depth = np.repeat((1.5 * focal / (rows - 7.5))[:, None], 16, axis=1)
    floor = np.full((16, 16), 9.0)
    floor[9:] = depth
    np.testing.assert_allclose(normals(floor)[11:15], np.broadcast_to([0, -1.0, 0], (4, 16, 3)), atol=0.12)


def test_normals_of_spheres_point_away_from_their_middle(rendered):
    large = (rendered.mask == 1).sum(axis=(1, 2)) > 60
    for number in np.flatnonzero((rendered.label == KINDS.index("sphere")) & large):
        depth, inside = rendered.depth[number].astype(float), rendered.mask[number] == 1
        within = inside.copy()
        for axis in (0, 1):
            within &= np.roll(inside, 1, axis) & np.roll(inside, -1, axis)
        seen = points(depth)
        unknowns = np.concatenate([2 * seen[inside], np.ones((inside.sum(), 1))], axis=1)
        centre = np.linalg.lstsq(unknowns, (seen[inside]**2).sum(axis=1), rcond=None)[0][:3]
        outwards = seen - centre
        outwards /= np.linalg.norm(outwards, axis=-1, keepdims=True)
        assert (outwards * normals(depth)).sum(axis=-1)[within].mean() > 0.97


def test_colours(rendered):
    depth = (rendered.depth - NEAR) / (FAR - NEAR) * 2 - 1
    colours = depth_colours(depth)
    assert colours.shape == (40, 32, 32, 3) and colours.dtype == np.uint8
    brightness = colours.sum(axis=3).astype(float)
    assert np.corrcoef(brightness.ravel(), rendered.depth.ravel())[0, 1] < -0.95         # near is bright
    facing = normal_colours(np.zeros((1, 8, 8)))
    assert (facing == [128, 128, 255]).all()


def test_point_clouds_show_the_colours_of_the_image(rendered):
    cloud = point_cloud(rendered.rgb[0], rendered.depth[0])
    assert cloud.shape == (CLOUD_SIZE, CLOUD_SIZE, 3)
    drawn = cloud[(cloud != 255).any(axis=2)]
    assert 0.1 * CLOUD_SIZE**2 < len(drawn) < CLOUD_SIZE**2
    assert {tuple(colour) for colour in drawn} <= {tuple(colour) for colour in rendered.rgb[0].reshape(-1, 3)}
    # Straight from the front nothing is hidden, and the image is there as it was.
    front = point_cloud(rendered.rgb[0], rendered.depth[0], turn=0, tilt=0)
    assert ((front != 255).any(axis=2)).sum() > len(drawn) * 0.5


@pytest.fixture
def folders(tmp_path, rendered):
    """Two finished runs."""
    for name, part in (("plain", slice(0, 6)), ("guided", slice(6, 12))):
        folder = tmp_path / name
        folder.mkdir()
        prepare_samples([(rendered.rgb[part], None)], (6, 32, 32, 3), folder / "samples_6x32x32x3.npz").rename(
            folder / "samples_6x32x32x3.npz")
        (folder / "run.json").write_text(json.dumps({"samples": "samples_6x32x32x3.npz", "configuration": {}}))
    return [str(tmp_path / "plain"), str(tmp_path / "guided")]


def test_the_command_draws_both_pictures(folders, tmp_path, capsys):
    assert call("depth_pictures", *folders, "--out", tmp_path / "geometry.png", "--cloud", tmp_path / "cloud.png",
                "--num_images", 4) == 0
    for name in ("geometry.png", "cloud.png"):
        assert str(tmp_path / name) in capsys.readouterr().out or name == "cloud.png"
        with Image.open(tmp_path / name) as picture:
            assert len(picture.getcolors(2**20)) > 200
    with Image.open(tmp_path / "geometry.png") as picture:
        assert picture.height > 6 * 64          # images, depth and normals of both


def test_fewer_images_than_asked_for_are_said(folders, rendered, tmp_path, caplog):
    caplog.set_level("INFO")
    frames = tmp_path / "frames.npz"
    np.savez(frames, arr_0=rendered.rgb[:7])
    for count, short in ((40, ["frames.npz: has 7", "samples_6x32x32x3.npz: has 6"]),
                         (7, ["samples_6x32x32x3.npz: has 6"]), (6, [])):
        caplog.clear()
        assert call("depth_pictures", folders[0], "--frames", frames, "--num_images", count, "--out",
                    tmp_path / "a.png") == 0
        said = [line for line in caplog.messages if "--num_images" in line]
        assert len(said) == len(short)
        assert all(f"{words} images, and all are shown, as --num_images is {count}" in line
                   for words, line in zip(short, said, strict=True))


def test_frames_and_a_depth_network_of_the_users(folders, rendered, tmp_path, capsys):
    """Each block has its images above their depth, which is black from --far on."""
    network, frames = tmp_path / "own.safetensors", tmp_path / "frames.npz"
    torch.manual_seed(0)
    save_scenes(ScenesExtractor((4, 6, 8, 10), limits=(1.0, 21.0)).eval(), network, {})
    np.savez(frames, arr_0=rendered.rgb[:8])
    words = [*folders, "--frames", frames, "--backend", network, "--far", 0.5, "--out", tmp_path / "rooms.png"]
    assert call("depth_pictures", *words, "--titles", "true,plain,guided") == 0
    with Image.open(tmp_path / "rooms.png") as picture:
        seen = np.asarray(picture)
    step, block = 2 * 34, 24 + 12 + 2 * (2 * 34 + 2)         # of a row of images, and of a block of two such rows
    assert seen.shape[0] == 12 + 3 * block
    for place, images in enumerate((rendered.rgb[:8], rendered.rgb[:6], rendered.rgb[6:12])):
        top = 12 + place * block + 24 + 4
        for column, image in enumerate(images):
            left = 12 + 4 + column * step
            assert (seen[top:top + 64:2, left:left + 64:2] == image).all()
            assert seen[top + step:top + step + 64, left:left + 64].max() <= 4         # black: all is beyond 0.5 m
    for words_, message in ((["--titles", "a,b"], "--titles a,b: 2 for 3 blocks of images"),
                            (["--cloud", tmp_path / "c.png"], "needs the camera of scenes"),
                            (["--backend", "fashion_mnist"], "does not estimate depth")):
        assert call("depth_pictures", *words, *words_) == 2
        assert message in capsys.readouterr().err


def test_what_the_command_refuses(folders, tmp_path, capsys):
    assert call("depth_pictures", *folders, "--out", tmp_path / "a.png", "--num_images", 0) == 2
    assert "--num_images 0: must be at least 1" in capsys.readouterr().err
    assert call("depth_pictures", tmp_path, "--out", tmp_path / "a.png") == 2
    assert "holds no finished sampling run" in capsys.readouterr().err
