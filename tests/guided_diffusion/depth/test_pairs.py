"""Pairs of images and depth maps: read, resized together, and refused where something is wrong with them."""

import sys

import numpy as np
import pytest
import torch
from commands import call, execute
from PIL import Image

from guided_diffusion.checkpoint import save_state
from guided_diffusion.classes import ClassNames
from guided_diffusion.depth.pairs import Pairs, check_apart, read_pairs
from guided_diffusion.depth.ranges import from_unit_range, parse_depth_range
from guided_diffusion.depth.scenes import DEPTH_RANGE, render
from guided_diffusion.depth.train import known_classes
from guided_diffusion.errors import UserError
from guided_diffusion.image_datasets import load_data


def arrays(count=4, height=16, width=16, seed=0):
    rng = np.random.default_rng(seed)
    return {"arr_0": rng.integers(0, 256, (count, height, width, 3), np.uint8),
            "depth": rng.uniform(1, 9, (count, height, width)).astype(np.float32),
            "arr_1": np.arange(count) % 2}


def npz(folder, **changes):
    path = folder / "pairs.npz"
    np.savez(path, **{name: value for name, value in (arrays() | changes).items() if value is not None})
    return str(path)


def folder_of(path, images, depth):
    """depth: file name -> array; images: file name -> array."""
    for name, contents in (("images", images), ("depth", depth)):
        (path / name).mkdir(parents=True)
        for file, value in contents.items():
            if file.endswith(".npy"):
                np.save(path / name / file, value)
            else:
                Image.fromarray(value).save(path / name / file)
    return str(path)


def test_pairs_of_an_npz(tmp_path):
    values = arrays()
    pairs = read_pairs(npz(tmp_path, depth=values["depth"][..., None]), size=16, depth_range="1,9", count=3,
                       class_cond=True)
    assert pairs.images.dtype == pairs.depth.dtype == torch.float32 and pairs.labels.tolist() == [0, 1, 0]
    assert np.allclose(pairs.images.numpy().transpose(0, 2, 3, 1), values["arr_0"][:3] / 127.5 - 1, atol=1e-6)
    assert np.allclose(pairs.depth[:, 0], (values["depth"][:3] - 5) / 4, atol=1e-6)
    assert torch.allclose(from_unit_range(pairs.depth, 1, 9)[:, 0], torch.from_numpy(values["depth"][:3]), atol=1e-5)
    own = read_pairs(npz(tmp_path), size=16).depth
    assert own.amin(dim=(1, 2, 3)).tolist() == [-1] * 4 and own.amax(dim=(1, 2, 3)).tolist() == [1] * 4
    clamped = read_pairs(npz(tmp_path), size=16, depth_range="2,3").depth
    assert (clamped[:, 0].numpy() == 1).sum() == (values["depth"] >= 3).sum()
    assert read_pairs(npz(tmp_path), size=16, channels=1).images.shape == (4, 1, 16, 16)


def test_pairs_of_a_folder_have_pixels_up_to_255(tmp_path):
    depth = arrays(count=1)["depth"][0]
    for name, scale in (("ones", 1), ("black", 0), ("good", 255)):
        data = folder_of(tmp_path / name, {"a.png": np.full((16, 16, 3), scale, np.uint8)}, {"a.npy": depth})
        if scale != 1:
            read_pairs(data, size=16)
            continue
        with pytest.raises(UserError, match=f"^{data}: its first 1 images hold nothing above 1: pixels must be 0 to"):
            read_pairs(data, size=16)


def test_clamped_depth_is_said_once(tmp_path, caplog):
    caplog.set_level("INFO")
    data, depth = npz(tmp_path), arrays()["depth"]
    read_pairs(data, size=16)
    read_pairs(data, size=16, depth_range="1,9")
    read_pairs("scenes", size=16, count=3)
    assert "clamped" not in caplog.text
    share = f"{100 * ((depth < 2) | (depth > 3)).mean():.2g}"
    line = f"{data}: {share} % of the pixels of its depth maps were beyond --depth_range 2,3 and clamped"
    read_pairs(data, size=16, depth_range="2,3")
    assert [record.message for record in caplog.records if "clamped" in record.message] == [line]
    ended = execute(sys.executable, "scripts/depth_images.py", "--data", data, "--depth_range", "2,3", "--image_size",
                    16, "--out", tmp_path / "grey.npz")
    assert ended.returncode == 0 and ended.stderr.splitlines().count(line) == 1


def test_maps_that_are_enlarged_are_said(tmp_path, caplog):
    caplog.set_level("INFO")
    data = npz(tmp_path, arr_0=arrays(3, 16, 24)["arr_0"], depth=arrays(3, 16, 24)["depth"], arr_1=None)
    for size, lines in ((8, []), (16, []), (20, [f"{data}: 3 of 3 depth maps are enlarged to 20 pixels"])):
        caplog.clear()
        read_pairs(data, size=size)
        assert [message for message in caplog.messages if "enlarged" in message] == lines


def test_pixels_are_counted_as_they_stand_in_the_files(tmp_path, caplog):
    """Before maps are resized, which mixes pixels with those beside them, and in the square that is used alone."""
    caplog.set_level("INFO")
    depth = np.linspace(5, 6, 2 * 16 * 24, dtype=np.float32).reshape(2, 16, 24)
    depth[0, 3, 9], depth[1, 8, 2] = 8.5, 9             # of which one is in the square
    read_pairs(npz(tmp_path, arr_0=arrays(2, 16, 24)["arr_0"], depth=depth, arr_1=None), size=4, depth_range="1,8")
    assert "pairs.npz: 0.2 % of the pixels of its depth maps were beyond --depth_range 1,8 and clamped" in caplog.text


def with_holes(dtype, scale=1000):
    depth = (arrays()["depth"] * scale).astype(dtype)
    depth[1, :4, :4] = depth[2, 5, 5] = 0
    return depth


@pytest.mark.parametrize("depth, depth_range", [
    (with_holes(np.uint16), "image"), (with_holes(np.uint16), "0,9000"), (with_holes(np.float32, 1), "image"),
    (with_holes(np.float32, 1), "1,9")])
def test_pixels_without_a_measurement_are_said_once(tmp_path, caplog, depth, depth_range):
    caplog.set_level("INFO")
    read_pairs(npz(tmp_path, depth=depth), size=8, depth_range=depth_range)
    line = (f"{tmp_path / 'pairs.npz'}: 1.7 % of the pixels of its depth maps, in 2 of 4, are 0, which is taken as a "
            "depth; where it means that nothing was measured, fill them first")
    assert [message for message in caplog.messages if "measured" in message] == [line]


def test_whole_numbers_without_a_measurement_are_refused_where_the_range_excludes_them(tmp_path):
    message = r"depth map 1: has 16 pixels of depth 0, below --depth_range 1000,9000; in files of whole numbers 0 says"
    with pytest.raises(UserError, match=message):
        read_pairs(npz(tmp_path, depth=with_holes(np.uint16)), size=8, depth_range="1000,9000")
    values = arrays(1)
    data = folder_of(tmp_path / "folder", {"a.png": values["arr_0"][0]}, {"a.png": with_holes(np.uint16)[2]})
    with pytest.raises(UserError, match=r"depth/a\.png: has 1 pixels of depth 0, below --depth_range 500,9000; in"):
        read_pairs(data, size=16, depth_range="500,9000")


def test_0_beside_negative_depths_is_a_depth(tmp_path, caplog):
    caplog.set_level("INFO")
    depth = np.tile(np.int16([-3, 0, 2, 4]), (4, 16, 4))
    read_pairs(npz(tmp_path, depth=depth), size=8)
    read_pairs("scenes", size=16, count=3)
    assert not [message for message in caplog.messages if "measured" in message]


def test_whole_numbers_as_depth(tmp_path):
    millimetres = (arrays()["depth"] * 1000).astype(np.uint16)
    pairs = read_pairs(npz(tmp_path, depth=millimetres), size=16, depth_range="1000,9000")
    assert np.allclose(pairs.depth[:, 0], millimetres / 4000 - 1.25, atol=1e-6)


def test_pairs_of_a_folder(tmp_path):
    values = arrays(3)
    depth16 = (values["depth"] * 7000).astype(np.uint16)
    data = folder_of(tmp_path / "pairs", {"b_2.png": values["arr_0"][1], "a_1.png": values["arr_0"][0],
                                          "b_3.png": values["arr_0"][2]},
                     {"a_1.npy": values["depth"][0] * 7000, "b_2.png": depth16[1], "b_3.png": (depth16[2] // 256
                                                                                             ).astype(np.uint8)})
    pairs = read_pairs(data, size=16, depth_range="0,65535", class_cond=True)
    assert pairs.labels.tolist() == [0, 1, 1]
    assert np.allclose(pairs.images.numpy().transpose(0, 2, 3, 1), values["arr_0"] / 127.5 - 1, atol=1e-6)
    assert np.allclose(pairs.depth[:2, 0], values["depth"][:2] * 7000 / 32767.5 - 1, atol=1e-4)
    assert np.allclose(pairs.depth[2, 0], (depth16[2] // 256) / 32767.5 - 1, atol=1e-4)


@pytest.mark.parametrize("height, width", [(16, 16), (40, 56), (17, 40), (70, 33)])
def test_depth_goes_the_way_of_its_image(tmp_path, height, width):
    y, x = np.mgrid[:height, :width]
    waves = 0.5 + 0.25 * np.sin(2 * np.pi * y / height) + 0.25 * np.cos(2 * np.pi * x / width)
    images = np.repeat(np.rint(waves * 255).astype(np.uint8)[None, ..., None], 3, axis=3)
    pairs = read_pairs(npz(tmp_path, arr_0=images, depth=waves[None], arr_1=None), size=16, depth_range="0,1")
    assert pairs.images.shape == (1, 3, 16, 16) and pairs.depth.shape == (1, 1, 16, 16)
    assert (pairs.images[:, :1] - pairs.depth).abs().max() < 0.05
    assert pairs.depth.std() > 0.2


def test_classes_of_a_folder_have_the_numbers_of_the_network(tmp_path):
    values = arrays(3)
    names = ("cow_1", "bee_1", "bee_2")
    data = folder_of(tmp_path / "pairs", {f"{name}.png": image for name, image in zip(names, values["arr_0"],
                                                                                      strict=True)},
                     {f"{name}.npy": depth for name, depth in zip(names, values["depth"], strict=True)})
    known = ClassNames(("ant", "bee", "cow"))
    assert read_pairs(data, size=16, class_cond=True, class_names=known).labels.tolist() == [1, 1, 2]
    assert read_pairs(data, size=16, class_cond=True).labels.tolist() == [0, 0, 1]
    with pytest.raises(UserError, match=r"bee_1\.png: is of the class bee, which is none of the 2 classes: 0 ant"):
        read_pairs(data, size=16, class_cond=True, class_names=ClassNames(("ant", "cow")))


def test_pairs_in_folders_of_their_classes(tmp_path, caplog):
    caplog.set_level("INFO")
    values = arrays(2)
    for i, name in enumerate(("bee", "cow")):
        folder_of(tmp_path / name, {"1.png": values["arr_0"][i]}, {"1.npy": values["depth"][i]})
        for kind in ("images", "depth"):
            (tmp_path / "pairs" / kind).mkdir(parents=True, exist_ok=True)
            (tmp_path / "pairs" / kind / name).symlink_to(tmp_path / name / kind)
    (tmp_path / "pairs" / "images" / "._1.png").write_bytes(b"x")
    known = ClassNames(("ant", "bee", "cow"))
    pairs = read_pairs(str(tmp_path / "pairs"), size=16, class_cond=True, class_names=known)
    assert pairs.labels.tolist() == [1, 2]
    assert "2 images; left out: 1 hidden or system file(s) (._1.png)" in caplog.text


def test_classes_of_an_npz_go_by_their_names(tmp_path):
    data = npz(tmp_path, class_names=np.array(["cow", "ant"]))
    known = ClassNames(("ant", "bee", "cow"))
    assert read_pairs(data, size=16, class_cond=True, class_names=known).labels.tolist() == [2, 0, 2, 0]


def test_classes_of_a_network_that_does_not_state_them(tmp_path):
    values = arrays(2)
    data = folder_of(tmp_path / "pairs", {"bee_1.png": values["arr_0"][0], "cow_1.png": values["arr_0"][1]},
                     {"bee_1.npy": values["depth"][0], "cow_1.npy": values["depth"][1]})
    silent, telling = str(tmp_path / "silent.safetensors"), str(tmp_path / "telling.safetensors")
    save_state(silent, {"x": torch.zeros(1)})
    save_state(telling, {"x": torch.zeros(1)}, {"class_names": '["ant", "bee", "cow"]'})
    assert known_classes(silent, data, 2) is None and known_classes(silent, npz(tmp_path), 1000) is None
    assert known_classes(telling, data, 3) == ClassNames(("ant", "bee", "cow"))
    with pytest.raises(UserError, match=r"2 classes: 0 bee, 1 cow, and .* has 1000 classes without their names"):
        known_classes(silent, data, 1000)


@pytest.mark.parametrize("orientation, stored", [(3, lambda x: x[::-1, ::-1]), (6, np.rot90)])
def test_image_and_depth_are_both_upright(tmp_path, orientation, stored):
    y, x = np.mgrid[:16, :24]
    picture = (y * 10 + x * 4).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name, depth in (("a", None), ("b", ".npy"), ("c", ".png")):
        folder = tmp_path / name
        (folder / "images").mkdir(parents=True)
        (folder / "depth").mkdir()
        Image.fromarray(np.ascontiguousarray(stored(picture))).save(folder / "images" / "x.png", exif=exif)
        if depth == ".npy":
            np.save(folder / "depth" / "x.npy", picture.astype(np.float32))
        elif depth == ".png":
            Image.fromarray(np.ascontiguousarray(stored(picture))).save(folder / "depth" / "x.png", exif=exif)
        else:
            Image.fromarray(picture).save(folder / "depth" / "x.png")
        pairs = read_pairs(str(folder), size=16, depth_range="0,255")
        assert (pairs.images[:, :1] - pairs.depth).abs().max() < 0.05


def test_scenes_as_pairs():
    pairs = read_pairs("scenes", size=16, count=3, class_cond=True, seed=1)
    scenes = render(1, range(3), 16)
    near, far = parse_depth_range(DEPTH_RANGE)
    assert np.allclose(from_unit_range(pairs.depth, near, far)[:, 0], scenes.depth, atol=1e-4)
    assert np.allclose(pairs.images.numpy().transpose(0, 2, 3, 1), scenes.rgb / 127.5 - 1, atol=1e-6)
    assert pairs.labels.tolist() == scenes.label.tolist()
    with pytest.raises(UserError, match=f"--depth_range 1,2: is always {DEPTH_RANGE} for scenes"):
        read_pairs("scenes", size=16, count=3, depth_range="1,2")
    with pytest.raises(UserError, match=f"--num_labels {10**10}: must be at most 1000000 with scenes"):
        read_pairs("scenes", size=16, count=10**10)


def changed(name, index, value):
    values = arrays()[name].astype(np.float32)
    values[index] = value
    return {name: values}


@pytest.mark.parametrize("changes, message", [
    (changed("depth", (2, 3, 4), np.nan), "depth map 2: has 1 pixels without a finite depth"),
    (changed("depth", 1, np.inf), "depth map 1: has 256 pixels without a finite depth"),
    (changed("depth", 3, 2.5), "depth map 3: is constant, every pixel has depth 2.5"),
    ({"depth": arrays(4, 8, 8)["depth"]}, r"depth is \(4, 8, 8\) float32, must be \(4, 16, 16\)"),
    ({"depth": arrays(3)["depth"]}, r"must be \(4, 16, 16\), as there are 4 images of 16x16"),
    ({"depth": None}, "depth is missing, must be depth maps"),
    ({"depth": arrays()["arr_0"]}, r"depth is \(4, 16, 16, 3\) uint8, must be depth maps"),
    ({"depth": np.zeros((4, 16, 16), bool)}, "bool, must be depth maps"),
    ({"depth": np.full((4, 16, 16), None)}, "is no .npz file of images and depth maps"),
    ({"arr_0": None}, "arr_0 is missing, must be images"),
    ({"arr_0": np.zeros((4, 16, 16, 3), np.float32)}, r"arr_0 is \(4, 16, 16, 3\) float32"),
    ({"arr_0": np.zeros((4, 0, 0, 3), np.uint8), "depth": np.zeros((4, 0, 0))}, r"arr_0 is \(4, 0, 0, 3\) uint8"),
    ({"arr_1": np.zeros(3, np.int64)}, r"arr_1 is \(3,\) int64, must be a class"),
    ({"arr_1": None}, "has no labels, which the class-conditional network needs"),
    ({"arr_0": arrays(0)["arr_0"], "depth": arrays(0)["depth"], "arr_1": None}, "holds no pair"),
])
def test_npz_files_that_are_wrong(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        read_pairs(npz(tmp_path, **changes), size=16, class_cond=True)


def test_arguments_that_are_wrong(tmp_path):
    with pytest.raises(UserError, match="--num_labels 5: must be at most 4, the number of pairs in"):
        read_pairs(npz(tmp_path), size=16, count=5)
    for text in ("1", "9,1", "1,1", "a,b", "0,inf", "1,2,3", "Image"):
        with pytest.raises(UserError, match=f"--depth_range {text}: must be image, or NEAR,FAR"):
            read_pairs(npz(tmp_path), size=16, depth_range=text)
    with pytest.raises(UserError, match="lies outside --depth_range 100,200, its depths are"):
        read_pairs(npz(tmp_path), size=16, depth_range="100,200")
    constant = np.tile(arrays()["depth"], (1, 1, 2))
    constant[2, :, 8:24] = 3
    for depth_range in ("image", "0,10"):
        with pytest.raises(UserError, match="depth map 2: is constant in the part of the image that is used"):
            read_pairs(npz(tmp_path, arr_0=arrays(width=32)["arr_0"], depth=constant), size=16, depth_range=depth_range)
    with pytest.raises(UserError, match="--data is not given"):
        read_pairs("", size=16)
    with pytest.raises(UserError, match="there is no such file or folder"):
        read_pairs(str(tmp_path / "gone"), size=16)
    (tmp_path / "text.npz").write_text("no arrays")
    with pytest.raises(UserError, match=r"text\.npz: is no .npz file"):
        read_pairs(str(tmp_path / "text.npz"), size=16)


@pytest.mark.parametrize("images, depth, message", [
    (["a.png", "b.png"], ["a.npy"], r"b\.png: has no counterpart .*depth/b"),
    (["a.png"], ["a.npy", "c.png"], r"c\.png: has no counterpart .*images/c"),
    (["a.png", "a.jpg"], ["a.npy"], r"a\.png: has the same name as a\.jpg"),
    ([], [], "holds no pair"),
])
def test_folders_that_are_wrong(tmp_path, images, depth, message):
    values = arrays(1)
    data = folder_of(tmp_path / "pairs", {name: values["arr_0"][0] for name in images},
                     {name: values["arr_0"][0, :, :, 0] for name in depth})
    with pytest.raises(UserError, match=message):
        read_pairs(data, size=16)


@pytest.mark.parametrize("name, depth, message", [
    ("a.npy", np.zeros((8, 16)), r"a\.npy: is 8x16, must be 16x16, as its image"),
    ("a.npy", np.zeros((1, 16, 16)), "must be a depth map"),
    ("a.png", np.zeros((16, 16, 3), np.uint8), "has colour mode RGB, a depth map must be grey"),
    ("a.npy", np.full((16, 16), np.nan), r"a\.npy: has 256 pixels without a finite depth"),
    ("a.png", np.full((16, 16), 7, np.uint8), r"a\.png: is constant, every pixel has depth 7"),
])
def test_depth_files_that_are_wrong(tmp_path, name, depth, message):
    data = folder_of(tmp_path / "pairs", {"a.png": arrays(1)["arr_0"][0]}, {name: depth})
    with pytest.raises(UserError, match=message):
        read_pairs(data, size=16)
    (tmp_path / "pairs" / "depth" / name).write_bytes(b"")
    with pytest.raises(UserError, match=f"{name}: "):
        read_pairs(data, size=16)
    for file in (tmp_path / "pairs" / "depth").iterdir():
        file.unlink()
    (tmp_path / "pairs" / "depth").rmdir()
    with pytest.raises(UserError, match="depth: there is no such folder"):
        read_pairs(data, size=16)


def test_depth_images_to_train_a_prior_on(tmp_path):
    out, data = tmp_path / "depth.npz", npz(tmp_path)
    assert call("depth_images", "--data", data, "--image_size", 16, "--num_images", 3, "--out", out) == 0
    with np.load(out) as file:
        images = file["arr_0"]
    depth = read_pairs(data, size=16, count=3).depth
    assert images.shape == (3, 16, 16, 3) and images.min() == 0 and images.max() == 255
    assert all(np.array_equal(images[..., channel], np.rint((depth[:, 0].numpy() + 1) * 127.5)) for channel in range(3))
    batch, _ = next(load_data(data_dir=str(out), batch_size=3, image_size=16, in_channels=1, deterministic=True,
                              random_flip=False))
    assert (batch - depth).abs().max() <= 1 / 127.5 + 1e-5


def test_depth_images_refused(tmp_path, capsys):
    out = tmp_path / "depth.npz"
    assert call("depth_images", "--data", npz(tmp_path, **changed("depth", 1, np.nan)), "--image_size", 16,
                "--out", out) == 2
    assert "depth map 1: has 256 pixels" in capsys.readouterr().err
    assert call("depth_images", "--data", "scenes", "--image_size", 16, "--out", out) == 2
    assert "--num_images: is not given" in capsys.readouterr().err
    assert call("depth_images", "--data", npz(tmp_path), "--out", tmp_path / "depth.png") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.npz"]


def test_a_few_images_that_are_also_learnt_from_are_said(caplog):
    images = torch.rand(300, 1, 2, 2)
    learnt, held = (Pairs(part, torch.empty(0), None) for part in (images[:100], images[99:]))
    check_apart(learnt, held, "--held_out x")
    assert caplog.messages == ["--held_out x: 1 of its 201 images, the first is number 0, are also learnt from"]
    with pytest.raises(UserError, match=r"3 of its 203 images, the first is number 0, .*; name other data"):
        check_apart(learnt, Pairs(images[97:], torch.empty(0), None), "--held_out x")
