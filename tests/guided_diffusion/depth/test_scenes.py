"""Rendered scenes against geometry: planes, spheres and shadows are recomputed from depth maps and camera."""

import numpy as np
import pytest
from commands import call
from PIL import Image

from guided_diffusion.depth.scenes import FAR, FOV, KINDS, NEAR, render
from guided_diffusion.depth.scenes import renderer as scenes
from guided_diffusion.errors import UserError

NUMBERS = range(96)


@pytest.fixture(scope="module")
def rendered():
    return render(0, NUMBERS)


def points(depth):
    """(H, W, 3): the point that each pixel sees, in metres, camera at the origin, z along the optical axis."""
    focal, middle = scenes.intrinsics(len(depth))
    down, across = np.mgrid[:len(depth), :len(depth)]
    return np.stack([(across - middle) / focal * depth, (down - middle) / focal * depth, depth], axis=-1)


def of_kind(rendered, kind):
    """Numbers of scenes whose main object is of this kind and not too small."""
    chosen = np.flatnonzero((rendered.label == KINDS.index(kind)) & ((rendered.mask == 1).sum(axis=(1, 2)) > 40))
    assert len(chosen) >= 5
    return chosen


def test_shapes_types_and_ranges(rendered):
    assert rendered.rgb.shape == (96, 32, 32, 3) and rendered.rgb.dtype == np.uint8
    assert rendered.depth.shape == (96, 32, 32) and rendered.depth.dtype == np.float32
    assert rendered.mask.shape == (96, 32, 32) and rendered.mask.dtype == np.uint8
    assert rendered.label.shape == (96,) and rendered.label.dtype == np.int64
    assert rendered.depth.min() > NEAR and rendered.depth.max() < FAR
    assert rendered.mask.max() == scenes.MAX_OBJECTS
    assert set(rendered.label) == set(range(len(KINDS)))


def test_the_main_object_is_always_seen(rendered):
    assert ((rendered.mask == 1).sum(axis=(1, 2)) >= 8).all()


def test_a_scene_depends_on_seed_and_number_alone(rendered):
    alone = render(0, [17])
    for name, values in alone._asdict().items():
        np.testing.assert_array_equal(values[0], getattr(rendered, name)[17])
    assert (render(1, [17]).rgb != alone.rgb).any()
    assert (render(0, [18]).rgb != alone.rgb).any()


def test_depth_and_mask_are_those_of_the_middle_of_each_pixel():
    coarse, fine = render(3, range(6), 32), render(3, range(6), 96)
    np.testing.assert_allclose(coarse.depth, fine.depth[:, 1::3, 1::3], rtol=1e-5)
    np.testing.assert_array_equal(coarse.mask, fine.mask[:, 1::3, 1::3])


def test_colours_are_averages_over_the_pixel():
    coarse, fine = render(3, range(6), 32).rgb.astype(float), render(3, range(6), 96).rgb.astype(float)
    averages = fine.reshape(6, 32, 3, 32, 3, 3).mean(axis=(2, 4))
    middles = fine[:, 1::3, 1::3]
    assert abs(coarse - averages).mean() < abs(coarse - middles).mean() / 2


def test_the_field_of_view():
    focal, middle = scenes.intrinsics(64)
    assert np.degrees(2 * np.arctan((middle + 0.5) / focal)) == pytest.approx(FOV)


def test_walls_and_floor_are_planes(rendered):
    # The inverse depth of a plane is linear in the image: second differences vanish except at edges.
    inverse = 1 / rendered.depth.astype(np.float64)
    bend = abs(inverse[:, :, 2:] - 2 * inverse[:, :, 1:-1] + inverse[:, :, :-2])
    room = np.all([rendered.mask[:, :, i:30 + i] == 0 for i in range(3)], axis=0)
    assert (bend[room] < 1e-6).mean() > 0.85
    assert (bend[~room] < 1e-6).mean() < 0.6


def test_spheres_are_spheres(rendered):
    for number in of_kind(rendered, "sphere"):
        seen = points(rendered.depth[number].astype(np.float64))[rendered.mask[number] == 1]
        unknowns = np.concatenate([2 * seen, np.ones((len(seen), 1))], axis=1)
        solution, *_ = np.linalg.lstsq(unknowns, (seen**2).sum(axis=1), rcond=None)
        centre, radius = solution[:3], np.sqrt(solution[3] + solution[:3] @ solution[:3])
        assert 0.35 <= radius <= 0.65
        np.testing.assert_allclose(np.linalg.norm(seen - centre, axis=1), radius, atol=2e-4)


def test_boxes_have_plane_faces_and_cylinders_have_not(rendered):
    def flat_share(kind):
        shares = []
        for number in of_kind(rendered, kind):
            inverse, inside = 1 / rendered.depth[number].astype(np.float64), rendered.mask[number] == 1
            bend = abs(inverse[:, 2:] - 2 * inverse[:, 1:-1] + inverse[:, :-2])
            shares.append((bend[inside[:, 2:] & inside[:, 1:-1] & inside[:, :-2]] < 1e-5).mean())
        return np.mean(shares)

    assert flat_share("box") > 0.6
    assert flat_share("cylinder") < 0.4
    assert flat_share("cone") < 0.4


def test_objects_shade_what_is_behind_them():
    numbers = range(64)
    rooms = scenes._Rooms.draw(0, numbers)
    main = rooms.objects[0]
    top = np.where(main.kind == KINDS.index("sphere"), 2 * main.radius, main.height)
    inside = np.stack([main.x, 0.85 * top, main.z], axis=1)
    away = inside - rooms.lamp
    shaded = rooms.lamp + away * (rooms.lamp[:, 1] / -away[:, 1])[:, None]
    up = np.broadcast_to([0.0, 1.0, 0.0], (len(numbers), 1, 3))
    beside = np.hypot(shaded[:, 0] - main.x, shaded[:, 2] - main.z) > 1.5 * main.radius
    assert beside.sum() >= 8
    assert (scenes._lit(rooms, shaded[:, None], up)[beside] == 0).all()
    below_lamp = (rooms.lamp * [1, 0, 1])[:, None]
    assert (scenes._lit(rooms, below_lamp, up) > 0.99).sum() >= 32         # the others stand under it


@pytest.mark.parametrize(("numbers", "size", "message"), [
    ([0], 4, "size 4: a scene needs at least 8 pixels"), ([], 32, "no scene is asked for")])
def test_what_cannot_be_rendered(numbers, size, message):
    with pytest.raises(UserError, match=message):
        render(0, numbers, size)


def test_the_script_writes_the_scenes(tmp_path):
    out, sheet = tmp_path / "some.npz", tmp_path / "sheet.png"
    assert call("scenes_render", "--num_images", 20, "--start", 3, "--seed", 1, "--image_size", 16, "--out", out,
                "--sheet", sheet) == 0
    expected = render(1, range(3, 23), 16)
    with np.load(out, allow_pickle=False) as file:
        for name, values in zip(("arr_0", "depth", "mask", "arr_1"), expected, strict=True):
            np.testing.assert_array_equal(file[name], values)
    with Image.open(sheet) as picture:
        assert picture.width > 16 * 64 and picture.height > 6 * 64        # two rows of images, depths and masks
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sheet.png", "some.npz"]


@pytest.mark.parametrize(("flags", "message"), [
    (("--out", "scenes.png"), "must end in .npz"), (("--image_size", 4), "--image_size 4: must be at least 8"),
    (("--out", "/proc/none/x.npz"), "cannot be written")])
def test_bad_options_of_the_script(flags, message, capsys):
    assert call("scenes_render", "--num_images", 1, *flags) == 2
    assert message in capsys.readouterr().err
