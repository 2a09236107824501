"""Training data: which images come in which batch, what their pixels are, and what bad data says."""

import dataclasses
import gzip
import itertools
import struct
import tracemalloc
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from fuzzing import damaged, fuzz, survives
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from guided_diffusion import image_datasets, image_files
from guided_diffusion.classes import ClassNames
from guided_diffusion.errors import UserError
from guided_diffusion.image_datasets import load_arrays, load_data, open_images

HAS_FASHION_MNIST = image_datasets.DEBIAN_FASHION_MNIST.is_dir()


def idx_bytes(array):
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}i", *array.shape) + array.tobytes()


@pytest.fixture
def idx_folder(tmp_path):
    """50 training images whose pixels are all their number, class number % 10; 7 test images, gzipped."""
    def images(count):
        return np.repeat(np.arange(count, dtype=np.uint8), 28 * 28).reshape(count, 28, 28)

    def labels(count):
        return (np.arange(count) % 10).astype(np.uint8)

    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx_bytes(images(50)))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(labels(50)))
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images(7))))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(labels(7))))
    return tmp_path


@pytest.fixture
def image_folder(tmp_path):
    """Twelve 24 x 20 images of 2 classes in 2 folders; image i has red 20 * i, and its left half has green 255."""
    (tmp_path / "deeper").mkdir()
    for i in range(12):
        pixels = np.zeros((20, 24, 3), np.uint8)
        pixels[:, :, 0] = 20 * i
        pixels[:, :12, 1] = 255
        folder = tmp_path / "deeper" if i % 3 == 0 else tmp_path
        Image.fromarray(pixels).save(folder / f"{('dog', 'cat')[i % 2]}_{i:02d}.png")
    return tmp_path


def numbers(images):
    """The numbers of IDX test images, read off their central pixel."""
    return ((images[:, 0, 16, 16] + 1) * 127.5).round().int().tolist()


def take(count, **options):
    options = {"batch_size": 8, "image_size": 32, **options}
    return list(itertools.islice(load_data(**options), count))


def test_idx_batches_are_padded_with_black_and_labelled(idx_folder):
    for channels in (1, 3):
        images, conditions = take(1, data_dir=idx_folder, class_cond=True, deterministic=True, in_channels=channels)[0]
        assert images.shape == (8, channels, 32, 32) and images.dtype == torch.float32
        assert numbers(images) == list(range(8))
        assert conditions["y"].tolist() == list(range(8)) and conditions["y"].dtype == torch.int64
        inside = images[7, :, 2:30, 2:30]
        assert torch.all(inside == torch.tensor(7 / 127.5 - 1))
        assert images[7].sum() == pytest.approx(float(inside.sum()) - channels * (32 * 32 - 28 * 28), rel=1e-5)
    assert take(1, data_dir=idx_folder)[0][1] == {}


def test_pictures_beside_idx_files_are_said(idx_folder, caplog):
    caplog.set_level("INFO")
    take(1, data_dir=idx_folder)
    assert "beside" not in caplog.text
    Image.new("L", (28, 28), 9).save(idx_folder / "x.png")
    take(1, data_dir=idx_folder)
    assert f"{idx_folder}: its IDX files are read, and 1 picture(s) beside them are not" in caplog.text


def test_test_split_and_gzip(idx_folder):
    images, labels = load_arrays(idx_folder, "test")
    assert images.shape == (7, 28, 28) and images.dtype == np.uint8 and images[6, 5, 5] == 6
    assert labels.tolist() == list(range(7)) and labels.dtype == np.int64
    assert numbers(take(1, data_dir=idx_folder, split="test", deterministic=True)[0][0]) == [0, 1, 2, 3, 4, 5, 6, 0]


def test_every_epoch_is_another_permutation_of_all_images(idx_folder):
    seen, other_seed = (numbers(torch.cat([images for images, _ in take(25, data_dir=idx_folder, seed=seed)]))
                        for seed in (0, 1))
    epochs = [seen[start:start + 50] for start in range(0, 200, 50)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert seen != other_seed


@pytest.mark.parametrize("source", ["idx_folder", "image_folder"])
def test_resumed_run_sees_the_same_batches(source, request):
    options = {"data_dir": request.getfixturevalue(source), "class_cond": True, "random_crop": True, "image_size": 28}
    whole, resumed = take(9, **options), take(4, start_batch=5, **options)
    for (images, conditions), (again, again_conditions) in zip(whole[5:], resumed, strict=True):
        assert torch.equal(images, again) and torch.equal(conditions["y"], again_conditions["y"])
    assert not torch.equal(whole[0][0], resumed[0][0])


def test_a_rank_of_a_job_sees_its_share(idx_folder, monkeypatch):
    """Official scripts name neither rank nor number of ranks."""
    options = {"data_dir": idx_folder, "image_size": 32, "in_channels": 1, "batch_size": 3}
    monkeypatch.setenv("PMI_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("PMI_RANK", str(rank))
        own, given = take(3, **options), take(3, **options, rank=rank, world_size=2)
        assert all(torch.equal(a[0], b[0]) for a, b in zip(own, given, strict=True))
        other = take(3, **options, rank=1 - rank, world_size=2)
        assert not any(torch.equal(a[0], b[0]) for a, b in zip(own, other, strict=True))


@pytest.mark.parametrize("source", ["idx_folder", "image_folder"])
def test_two_ranks_see_what_one_rank_with_twice_the_batch_sees(source, request):
    options = {"data_dir": request.getfixturevalue(source), "class_cond": True, "random_crop": True, "image_size": 28}
    one = take(7, batch_size=6, **options)
    two = [take(7, batch_size=3, rank=rank, world_size=2, **options) for rank in (0, 1)]
    for step, (images, conditions) in enumerate(one):
        assert torch.equal(images, torch.cat([two[0][step][0], two[1][step][0]]))
        assert torch.equal(conditions["y"], torch.cat([two[0][step][1]["y"], two[1][step][1]["y"]]))


def test_half_of_the_images_are_mirrored(image_folder):
    def left_is_green(batches):
        return torch.cat([images[:, 1, 10, 2] > 0 for images, _ in batches])

    options = {"data_dir": image_folder, "image_size": 20, "batch_size": 40}
    assert left_is_green(take(3, random_flip=False, **options)).all()
    assert 0.3 < left_is_green(take(3, **options)).float().mean() < 0.7


def test_idx_images_are_mirrored_left_to_right(idx_folder):
    pixels = np.zeros((50, 28, 28), np.uint8)
    pixels[:, :, :14] = 255
    (idx_folder / "train-images-idx3-ubyte").write_bytes(idx_bytes(pixels))
    left = torch.cat([images[:, 0, 4, 4] > 0 for images, _ in take(20, data_dir=idx_folder)])
    right = torch.cat([images[:, 0, 4, 27] > 0 for images, _ in take(20, data_dir=idx_folder)])
    assert torch.equal(left, ~right) and 0.3 < left.float().mean() < 0.7


def test_folder_classes_order_and_pixels(image_folder):
    (images, conditions), (more, _) = take(2, data_dir=image_folder, image_size=20, class_cond=True,
                                           deterministic=True, random_flip=False)
    # cat_01 05 07 11, then cat_03 09, dog_00 06 in the folder `deeper`, then the other dogs
    assert conditions["y"].tolist() == [0, 0, 0, 0, 0, 0, 1, 1]
    assert ((images[:, 0, 0, 0] + 1) * 127.5 / 20).round().int().tolist() == [1, 5, 7, 11, 3, 9, 0, 6]
    assert images.shape == (8, 3, 20, 20) and images.dtype == torch.float32
    assert images.min() == -1 and images.max() == 1
    assert torch.all(images[:, 1, :, :10] == 1) and torch.all(images[:, 1, :, 10:] == -1)    # the centre was cut out
    assert ((more[:, 0, 0, 0] + 1) * 127.5 / 20).round().int().tolist() == [2, 4, 8, 10, 1, 5, 7, 11]


def test_folder_images_in_grey_and_in_every_format(tmp_path):
    for suffix in ("jpg", "JPEG", "png", "gif"):
        Image.fromarray(np.full((40, 50, 3), 255, np.uint8)).save(tmp_path / f"image.{suffix}")
    images, conditions = take(1, data_dir=tmp_path, in_channels=1, batch_size=4)[0]
    assert images.shape == (4, 1, 32, 32) and torch.all(images > 0.99) and conditions == {}


def test_large_images_are_averaged_before_they_are_resized(tmp_path):
    rows, columns = np.indices((96, 128))
    checks = np.where((rows + columns) % 2, 255, 0).astype(np.uint8)
    Image.fromarray(checks).save(tmp_path / "checks.png")
    images, _ = take(1, data_dir=tmp_path, batch_size=1)[0]
    assert images.shape == (1, 3, 32, 32) and images.abs().max() < 0.02


def test_random_crops_vary_in_place_and_size(tmp_path):
    ramp = np.broadcast_to(np.arange(100, dtype=np.uint8) * 2, (100, 100))
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    images, _ = take(1, data_dir=tmp_path, batch_size=64, random_crop=True, random_flip=False)[0]
    left, right = images[:, 0, 0, 0], images[:, 0, 0, -1]
    assert left.std() > 0.02 and right.std() > 0.02
    widths = (right - left) * 127.5 / 2
    assert widths.min() > 70 and widths.max() < 100 and widths.std() > 2


def break_file(folder, name, change):
    (folder / name).write_bytes(change((folder / name).read_bytes()))


@pytest.mark.parametrize("name, change, message", [
    ("train-images-idx3-ubyte", lambda content: content[:-5], "train-images-idx3-ubyte: is truncated"),
    ("train-images-idx3-ubyte", lambda content: content + b"x", "is damaged"),
    ("train-images-idx3-ubyte", lambda content: b"", "is not an IDX file"),
    ("train-images-idx3-ubyte", lambda content: b"text" + content, "is not an IDX file"),
    ("train-labels-idx1-ubyte", lambda content: idx_bytes(np.zeros(49, np.uint8)), "50 train images but 49 labels"),
    ("t10k-images-idx3-ubyte.gz", lambda content: content[:-20], "damaged or truncated"),
    ("t10k-images-idx3-ubyte.gz", lambda content: b"not gzip", "damaged or truncated"),
])
def test_damaged_idx_files(idx_folder, name, change, message):
    break_file(idx_folder, name, change)
    with pytest.raises(UserError, match=message):
        load_arrays(idx_folder, "train" if name.startswith("train") else "test")


@pytest.mark.parametrize(("shape", "message"), [
    ((-1, 28, 28), "its header says -1 x 28 x 28"), ((5, -28, -28), "says 5 x -28 x -28"),
    ((5, 0, 28), "says 5 x 0 x 28"), ((2**31 - 1, 28, 28), "which .* bytes do not hold"),
    ((2**31 - 1, 2**31 - 1, 2**31 - 1), "which .* bytes do not hold"),
])
@pytest.mark.parametrize("zipped", [False, True])
def test_idx_headers_that_no_images_have(tmp_path, shape, message, zipped):
    content = bytes((0, 0, 8, 3)) + struct.pack(">3i", *shape) + bytes(28 * 28)
    path = tmp_path / f"train-images-idx3-ubyte{'.gz' if zipped else ''}"
    path.write_bytes(gzip.compress(content) if zipped else content)
    with pytest.raises(UserError, match=f"is damaged, its header .*{message}|{message}"):
        image_datasets.read_idx(path, 3)


def test_idx_files_are_not_unpacked_further_than_their_header_says(tmp_path):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(idx_bytes(np.zeros((1, 8, 8), np.uint8)) + bytes(2**25)))
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="more bytes than the 80 that its header says"):
            image_datasets.read_idx(path, 3)
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()


WHOLE_IDX = idx_bytes(np.random.default_rng(0).integers(0, 256, (3, 5, 4), np.uint8))


@fuzz(150)
@given(damaged(WHOLE_IDX, gzip.compress(WHOLE_IDX, mtime=0)), st.sampled_from(["x-ubyte", "x-ubyte.gz"]))
def test_damaged_idx_files_are_read_or_refused(content, name):
    survives(lambda path: image_datasets.read_idx(path, 3), content, name)


@pytest.mark.parametrize("prefix", ["train", "t10k"])
def test_idx_images_of_zeros_and_ones_are_refused(idx_folder, prefix):
    split = {"train": "train", "t10k": "test"}[prefix]
    ones = (np.arange(7 * 28 * 28) % 2).astype(np.uint8).reshape(7, 28, 28)
    for path in idx_folder.iterdir():
        path.unlink()
    (idx_folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx_bytes(ones))
    (idx_folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(7, np.uint8)))
    with pytest.raises(UserError, match=f"--data_dir {idx_folder}: its 7 images hold nothing above 1: pixels must be"):
        load_data(data_dir=idx_folder, batch_size=1, image_size=28, split=split)
    (idx_folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx_bytes(ones * 255))
    load_data(data_dir=idx_folder, batch_size=1, image_size=28, split=split)


def test_missing_idx_file(idx_folder):
    (idx_folder / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match=r"has neither train-labels-idx1-ubyte nor train-labels-idx1-ubyte\.gz"):
        load_data(data_dir=idx_folder, batch_size=4, image_size=32)


@pytest.mark.parametrize("options, message", [
    ({"image_size": 16}, "--image_size 16: must be at least 28"),
    ({"batch_size": 0}, "--batch_size 0"),
    ({"in_channels": 4}, r"--in_channels 4: pictures have 1 channel .* an .npz file whose arr_0 is \(N, H, W, 4\)"),
    ({"split": "validation"}, "validation: must be one of train, test"),
])
def test_wrong_options_are_refused_before_the_first_batch(idx_folder, options, message):
    with pytest.raises(UserError, match=message):
        load_data(**{"data_dir": idx_folder, "batch_size": 4, "image_size": 32, **options})


def test_wrong_folders_are_refused_before_the_first_batch(tmp_path, image_folder, monkeypatch):
    def load(data_dir, **options):
        load_data(data_dir=data_dir, batch_size=4, image_size=32, **options)

    with pytest.raises(UserError, match="no such folder"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds neither image files"):
        load(tmp_path / "empty")
    for name in ("run.json", "samples_2x8x8x3.npz"):
        (tmp_path / "empty" / name).write_bytes(b"")
    with pytest.raises(UserError, match=r"is the folder of a sampling run; name its file of samples, .*2x8x8x3\.npz"):
        load(tmp_path / "empty")
    with pytest.raises(UserError, match=r"is neither a folder nor an \.npz file"):
        load(tmp_path / "empty" / "run.json")
    with pytest.raises(UserError, match="an image folder has no test split"):
        load(image_folder, split="test")
    Image.new("RGB", (32, 32)).save(image_folder / "nameless.png")
    load(image_folder)
    with pytest.raises(UserError, match=r"nameless\.png: has no class"):
        load(image_folder, class_cond=True)
    monkeypatch.setattr(image_datasets, "DEBIAN_FASHION_MNIST", tmp_path / "not-installed")
    with pytest.raises(UserError, match="apt-get install dataset-fashion-mnist"):
        load("fashion-mnist")


@pytest.mark.parametrize("change", [lambda content: b"no image", lambda content: content[:60], lambda content: b""])
def test_file_that_is_no_image(image_folder, change):
    break_file(image_folder, "dog_04.png", change)
    with pytest.raises(UserError, match=r"dog_04\.png: cannot be read as an image"):
        take(3, data_dir=image_folder)


def profile(red=b"rXYZ"):
    """A colour profile: sRGB, or one whose red is that of `red` in sRGB, and the other way round."""
    content = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    table = content[:256].replace(b"rXYZ", b"----").replace(red, b"rXYZ").replace(b"----", red)
    return table + content[256:]


@pytest.mark.parametrize(("mode", "embedded", "counted"), [
    ("RGB", "swapped", True), ("RGBA", "swapped", True), ("P", "swapped", True), ("RGB", "sRGB", False),
    ("L", "sRGB", False), ("RGB", None, False), ("RGB", "damaged", False), ("CMYK", "damaged", True),
    ("CMYK", None, False)])
def test_colours_are_those_of_the_file_and_other_profiles_are_said(tmp_path, caplog, mode, embedded, counted):
    caplog.set_level("INFO")
    content = {"swapped": profile(b"gXYZ"), "sRGB": profile(), "damaged": b"no profile", None: None}[embedded]
    picture = Image.new("RGB", (8, 8), (255, 0, 0)).convert(mode)
    for name in ("b", "a"):
        picture.save(tmp_path / f"{name}.tif", **({"icc_profile": content} if content else {}))
    images = open_images(tmp_path, (3, 8, 8))
    assert images.damaged() == {}
    line = f"{tmp_path}: 2 image(s) have a colour profile other than sRGB, which is not applied (first a.tif)"
    assert caplog.messages == ([line] if counted else [])
    plain = np.asarray(Image.new("RGB", (8, 8), (255, 0, 0)).convert(mode).convert("RGB"))[0, 0]
    assert np.allclose(images.at([0])[0][0, :, 0, 0], plain / 127.5 - 1)


def test_pictures_that_are_enlarged_are_said_and_where_they_are_measured_reduced_ones(tmp_path, caplog):
    caplog.set_level("INFO")
    for name, size in {"d": (8, 30), "c": (9, 20), "b": (30, 7), "a": (8, 8), "e": (1, 1)}.items():
        Image.new("RGB", size, (255, 0, 0)).save(tmp_path / f"{name}.png")
    images = open_images(tmp_path, (3, 8, 8))
    assert images.damaged() == {}
    images.check_first(4)
    assert caplog.messages == [
        f"{tmp_path}: 2 image(s) are enlarged to 8 pixels (first b.png)",
        f"{tmp_path}: 1 image(s) are enlarged to 8 pixels (first b.png), 1 image(s) are reduced to 8 pixels "
        "(first c.png)"]


CHESS = np.indices((8, 8)).sum(0) % 2           # zeros and ones


@pytest.mark.parametrize(("pictures", "good"), [
    ([CHESS.astype(np.uint8)], False),
    ([0 * CHESS.astype(np.uint8), CHESS.astype(np.uint8)], False),
    ([(255 * CHESS).astype(np.uint16)], False),                     # of 16 bits, where 65535 is white
    ([0 * CHESS.astype(np.uint8)], True),
    ([CHESS.astype(np.uint8), 2 * CHESS.astype(np.uint8)], True),
    ([CHESS.astype(bool)], True),                                   # of one bit, where 1 is white
    (["palette"], True),                                            # of two colours, numbered 0 and 1
])
def test_pictures_of_zeros_and_ones_are_refused_and_black_ones_are_not(tmp_path, pictures, good):
    for number, pixels in enumerate(pictures):
        if isinstance(pixels, str):
            picture = Image.fromarray(CHESS.astype(np.uint8)).convert("P")
            picture.putpalette([0, 0, 0, 255, 255, 255])
        else:
            picture = Image.fromarray(pixels)
        picture.save(tmp_path / f"{number}.png")
    images = open_images(tmp_path, (3, 8, 8))
    for look in (images.damaged, lambda: images.check_first(len(pictures))):
        with nullcontext() if good else pytest.raises(UserError, match=(
                f"^--data_dir {tmp_path}: its {len(pictures)} images hold nothing above 1: pixels must be 0 to 255")):
            look()


def test_only_pictures_up_to_a_bright_one_are_decoded_for_their_brightness(image_folder, monkeypatch):
    seen = []
    monkeypatch.setattr(image_datasets, "read_image", lambda path, channels: seen.append(path)
                        or image_files.read_image(path, channels))
    open_images(image_folder, (3, 8, 8)).damaged()
    assert len(seen) == 1


def test_what_is_left_out_is_said(image_folder, caplog):
    (image_folder / "._dog_04.png").write_bytes(b"Mac OS X")
    with caplog.at_level("INFO"):
        take(1, data_dir=image_folder)
    assert caplog.messages[:1] == [f"{image_folder}: 12 images; left out: 1 hidden or system file(s) (._dog_04.png)"]


def opened(folder, **options):
    images = image_datasets.open_images(folder, (3, 20, 20), **options)
    return images.without(images.damaged())


def plan(count, **changes):
    return image_datasets.BatchPlan(**{
        "num_images": count, "batch_size": 12, "seed": 0, "shuffle": False, "flip": False, "crop": False, "rank": 0,
        "world_size": 1, **changes})


def red(images):
    return ((images[:, 0, 0, 0] + 1) * 127.5 / 20).round().int().tolist()


def test_damaged_images_are_left_out_and_counted(image_folder, caplog):
    break_file(image_folder, "dog_04.png", lambda content: content[:60])
    break_file(image_folder, "cat_07.png", lambda content: b"")
    with pytest.raises(UserError, match=r"cat_07\.png: .*, and 1 more are damaged; .* --skip_damaged True"):
        opened(image_folder)
    with caplog.at_level("INFO"):
        images = opened(image_folder, class_cond=True, skip_damaged=True)
    assert images.count == 10 and images.labels.tolist() == [0] * 5 + [1] * 5
    assert "left out 2 damaged image(s), the first is" in caplog.text and "cat_07.png" in caplog.text
    for path in image_folder.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"all 12 images are damaged, the first is .*\.png: cannot be read"):
        opened(image_folder, skip_damaged=True)


def test_damage_that_shows_in_training(image_folder, monkeypatch, caplog):
    monkeypatch.setattr(image_files, "DECODED_AT_START", 0)         # as if the images were many
    files = image_datasets.list_images(image_folder)
    break_file(image_folder, files[1].name, lambda content: content[:-30])
    with pytest.raises(UserError, match=rf"{files[1].name}: .* --skip_damaged True"):
        next(opened(image_folder).batches(plan(12), 0))
    said = f"left out a damaged image: {files[1]}: "
    batches = opened(image_folder, class_cond=True, skip_damaged=True).batches(plan(12), 0)
    (images, conditions), (again, _) = next(batches), next(batches)
    assert red(images) == [1, 7, 7, 11, 3, 9, 0, 6, 2, 4, 8, 10] == red(again)          # 7 in place of 5
    assert conditions["y"].tolist() == [0] * 6 + [1] * 6
    assert caplog.text.count(said) == 1
    for rank in range(2):                       # each comes upon it in its third batch at the latest, and says the same
        caplog.clear()
        batches = opened(image_folder, skip_damaged=True).batches(plan(12, batch_size=5, rank=rank, world_size=2), 0)
        for _ in range(3):
            next(batches)
        line, = [line for line in caplog.messages if "left out a damaged image" in line]
        assert line.startswith(said)


def test_a_picture_in_place_of_a_damaged_one_has_its_own_label(image_folder):
    images = opened(image_folder, class_cond=True, skip_damaged=True)
    last = max(np.flatnonzero(images.labels == 0))                      # of the cats, before the dogs
    images.files[last].write_bytes(b"")
    pixels, conditions = images.at([last - 1, last, last + 1])
    assert conditions["y"].tolist() == [0, 1, 1] and red(pixels[1:2]) == red(pixels[2:])


def test_a_whole_picture_among_a_million_takes_the_memory_of_one(image_folder):
    images = opened(image_folder, skip_damaged=True)
    images = dataclasses.replace(images, files=images.files * 100_000)
    images.at([0])                              # what Pillow keeps
    tracemalloc.start()
    try:
        assert red(images.at([600_001])[0]) == red(images.at([1])[0])
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_damage_is_found_before_its_turn(image_folder, monkeypatch):
    class Done(image_files.BackgroundCheck):
        def __enter__(self):
            check = super().__enter__()
            self.thread.join()
            return check

    monkeypatch.setattr(image_files, "DECODED_AT_START", 0)
    monkeypatch.setattr(image_datasets, "BackgroundCheck", Done)
    last = image_datasets.list_images(image_folder)[-1]
    break_file(image_folder, last.name, lambda content: content[:-30])
    with pytest.raises(UserError, match=rf"{last.name}: .* --skip_damaged True"):
        next(opened(image_folder).batches(plan(12, batch_size=1), 0))


def test_a_network_must_have_the_classes_of_the_images(image_folder, caplog):
    with pytest.raises(UserError, match=r"--num_classes 1000: .* has 2 classes: 0 cat, 1 dog; pass --num_classes 2"):
        opened(image_folder, class_cond=True).check_classes(1000)
    with pytest.raises(UserError, match=r"--data_dir .*: has 2 classes: 0 cat, 1 dog, and the network knows 1"):
        opened(image_folder, class_cond=True).check_classes(1, trained=True)
    with pytest.raises(UserError, match=r"the network knows 3; an \.npz file whose labels, arr_1, are its numbers"):
        opened(image_folder, class_cond=True).check_classes(3, trained=True)
    with caplog.at_level("INFO"):
        opened(image_folder, class_cond=True).check_classes(3, trained=True, resumed=True)
    assert f"{image_folder}: has 2 classes, and the network knows 3: they are taken for its first ones, as if it was " \
           "trained on them; it never sees the others and should not be asked for them" in caplog.messages
    with caplog.at_level("INFO"):
        ClassNames(("kind2", "kind10")).check(1000, "images", trained=True, resumed=True)
    assert caplog.messages[-1].endswith("digits in them count as numbers, and the official code sorts them as text")
    with caplog.at_level("INFO"):
        opened(image_folder, class_cond=True).check_classes(2)
    assert "2 classes: 0 cat, 1 dog (--classes prefix)" in caplog.messages
    images = opened(image_folder, class_cond=True, known=ClassNames(("bat", "cat", "dog")))
    assert images.labels.tolist() == [1] * 6 + [2] * 6
    assert images.without_images().endswith("has no image of 1 of its classes: 0 bat")
    assert opened(image_folder, class_cond=True).without_images() == opened(image_folder).without_images() == ""
    opened(image_folder).check_classes(7)                           # without classes, their number says nothing


def test_known_classes_are_told_by_the_rule_that_is_given(tmp_path, caplog):
    for name in ("cat/cat_0", "cat/dog_1", "dog/cat_2", "dog/dog_3"):           # both rules fit, with other labels
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 20)).save(tmp_path / f"{name}.png")
    stored = ClassNames(("cat", "dog"), source="config.json")
    by_rule = {"folders": [0, 0, 1, 1], "prefix": [0, 1, 0, 1], "": [0, 1, 0, 1]}
    for rule, labels in by_rule.items():
        first = opened(tmp_path, class_cond=True, classes=rule)
        again = opened(tmp_path, class_cond=True, classes=rule, known=stored)
        assert first.labels.tolist() == again.labels.tolist() == labels
        assert first.class_names.rule == again.class_names.rule
        for names in (first.class_names, again.class_names):                    # validation after either start
            assert opened(tmp_path, class_cond=True, known=names).labels.tolist() == labels
    flat = tmp_path / "flat"
    flat.mkdir()
    (tmp_path / "cat/cat_0.png").rename(flat / "cat_0.png")
    caplog.set_level("INFO")
    assert opened(flat, class_cond=True, classes="folders", known=stored).labels.tolist() == [0]
    assert f"--classes folders: does not tell the 2 classes: 0 cat, 1 dog in {flat}; there it is prefix" in caplog.text


def test_numbers_of_classes_may_be_fewer_than_those_of_the_network(idx_folder, caplog):
    images = image_datasets.open_images(idx_folder, (1, 28, 28), class_cond=True)
    images.check_classes(10)
    assert not caplog.messages
    with caplog.at_level("INFO"):
        images.check_classes(1000)
    assert "has classes from 0 to 9, --num_classes is 1000" in caplog.text
    with pytest.raises(UserError, match=r"--num_classes 9: .* has more classes, the greatest is 9; pass --num_classes"):
        images.check_classes(9)


@pytest.mark.skipif(not HAS_FASHION_MNIST, reason="dataset-fashion-mnist is not installed")
def test_fashion_mnist_of_debian():
    images, labels = load_arrays("fashion-mnist", "test")
    assert images.shape == (10000, 28, 28)
    assert np.bincount(labels).tolist() == [1000] * 10
    batches = load_data(data_dir="fashion-mnist", batch_size=64, image_size=32, split="test", in_channels=1)
    batch, _ = next(batches)
    assert batch.shape == (64, 1, 32, 32) and -1 <= batch.min() < 0 < batch.max() <= 1


# Files of samples


@pytest.fixture
def npz_file(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "samples.npz"
    np.savez(path, arr_0=rng.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8), arr_1=np.array([3, 1, 0, 1, 2]))
    return path


def test_npz_images_fill_the_frame_and_are_labelled(npz_file):
    (images, cond), = take(1, data_dir=npz_file, batch_size=5, image_size=8, class_cond=True, deterministic=True,
                           random_flip=False)
    with np.load(npz_file) as file:
        np.testing.assert_allclose(images.permute(0, 2, 3, 1), file["arr_0"] / 127.5 - 1, atol=1e-6)
        np.testing.assert_array_equal(cond["y"], file["arr_1"])


def test_npz_images_are_mirrored_and_resumed(npz_file):
    options = {"data_dir": npz_file, "batch_size": 4, "image_size": 8}
    whole, later = take(3, **options), take(1, **options, start_batch=2)
    torch.testing.assert_close(whole[2][0], later[0][0], rtol=0, atol=0)
    with np.load(npz_file) as file:
        straight = {image.tobytes() for image in file["arr_0"]}
    seen = [np.rint((image.permute(1, 2, 0).numpy() + 1) * 127.5).astype(np.uint8) for image in whole[0][0]]
    assert all(image.tobytes() in straight or image[:, ::-1].tobytes() in straight for image in seen)
    assert not all(image.tobytes() in straight for image in seen)


def test_npz_images_in_grey(npz_file, tmp_path):
    (images, _), = take(1, data_dir=npz_file, batch_size=5, image_size=8, in_channels=1, deterministic=True,
                        random_flip=False)
    with np.load(npz_file) as file:
        expected = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in file["arr_0"]])
    assert images.shape == (5, 1, 8, 8)
    assert (np.rint((images[:, 0].numpy() + 1) * 127.5) == expected).all()


def test_colours_become_the_grey_that_they_are_in_files():
    colours = np.random.default_rng(0).integers(0, 256, (4, 500, 500, 3), dtype=np.uint8)
    expected = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in colours])
    assert (image_datasets.grey(colours)[..., 0] == expected).all()
    levels = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(1, 1, 256, 3)
    assert (image_datasets.grey(levels) == levels[..., :1]).all()


@pytest.mark.parametrize(("arrays", "options", "message"), [
    ({"arr_0": np.zeros((2, 8, 9, 3), np.uint8)}, {}, r"arr_0 is \(2, 8, 9, 3\) uint8, must be \(N, 8, 8, 3\) uint8"),
    ({"arr_0": np.zeros((2, 8, 8, 3), np.float32)}, {}, "must be .* uint8"),
    ({"arr_0": np.zeros((0, 8, 8, 3), np.uint8)}, {}, "must be .* uint8"),
    ({"images": np.zeros((2, 8, 8, 3), np.uint8)}, {}, "arr_0 is missing"),
    ({"arr_0": np.zeros((2, 8, 8, 3), np.uint8)}, {"class_cond": True}, "arr_1 must be the classes of the 2 images"),
    ({"arr_0": np.zeros((2, 8, 8, 3), np.uint8), "arr_1": np.zeros(3, int)}, {"class_cond": True}, "classes of the 2"),
    ({"arr_0": np.zeros((2, 8, 8, 3), np.uint8), "arr_1": np.array([1, -1])}, {"class_cond": True}, "the class -1"),
    ({"arr_0": np.zeros((2, 8, 8, 3), np.uint8)}, {"split": "test"}, "an .npz file has no test split"),
])
def test_wrong_npz_files_are_refused_before_the_first_batch(tmp_path, arrays, options, message):
    path = tmp_path / "wrong.npz"
    np.savez(path, **arrays)
    with pytest.raises(UserError, match=message):
        load_data(data_dir=path, batch_size=1, image_size=8, **options)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut"])
def test_damaged_npz_files(tmp_path, content):
    path = tmp_path / "damaged.npz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"damaged.npz: is not an .npz file of images, or is damaged"):
        load_data(data_dir=path, batch_size=1, image_size=8)


def test_missing_npz_file(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_data(data_dir=tmp_path / "none.npz", batch_size=1, image_size=8)


def test_an_npz_file_tells_the_names_of_its_classes(tmp_path):
    arrays = {"arr_0": np.full((3, 4, 4, 3), 9, np.uint8), "arr_1": np.array([0, 1, 1])}
    np.savez(tmp_path / "named.npz", **arrays, class_names=np.array(["ant", "bee"]))
    (tmp_path / "named.NPZ").write_bytes((tmp_path / "named.npz").read_bytes())
    images = open_images(tmp_path / "named.NPZ", (3, 4, 4), class_cond=True)
    assert images.class_names.to_json() == ["ant", "bee"]
    images.check_classes(2)
    with pytest.raises(UserError, match="--num_classes 5"):
        images.check_classes(5)
    assert open_images(tmp_path / "named.npz", (3, 4, 4)).class_names is None
    known = ClassNames(("bee", "cow", "ant"))
    images = open_images(tmp_path / "named.npz", (3, 4, 4), class_cond=True, known=known)
    assert images.labels.tolist() == [2, 0, 0] and images.class_names == known
    with pytest.raises(UserError, match=r"class ant, which is none of the 2 classes: 0 bee, 1 cow \(of a run\)"):
        open_images(tmp_path / "named.npz", (3, 4, 4), class_cond=True, known=ClassNames(("bee", "cow"), "", "a run"))
    np.savez(tmp_path / "wraps.npz", arr_0=arrays["arr_0"], arr_1=np.array([0, 1, 2**63 + 1], np.uint64))
    with pytest.raises(UserError, match="arr_1 has the class 9223372036854775809, classes are from 0 up"):
        open_images(tmp_path / "wraps.npz", (3, 4, 4), class_cond=True)
    np.savez(tmp_path / "few.npz", **arrays, class_names=np.array(["ant"]))
    with pytest.raises(UserError, match="arr_1 has the class 1, and its class_names are 1 class: 0 ant"):
        open_images(tmp_path / "few.npz", (3, 4, 4), class_cond=True)
    np.savez(tmp_path / "odd.npz", **arrays, class_names=np.array([1, 2]))
    with pytest.raises(UserError, match="class_names must be a list of different names"):
        open_images(tmp_path / "odd.npz", (3, 4, 4), class_cond=True)


def test_images_must_fit_a_network_that_is_trained(idx_folder, caplog):
    images = image_datasets.open_images(idx_folder, (1, 28, 28), class_cond=True)
    with caplog.at_level("INFO"):
        images.check_classes(1000, trained=True)
    assert not caplog.messages
    with pytest.raises(UserError, match=rf"--data_dir {idx_folder}: has more classes than the network, which knows 9"):
        images.check_classes(9, trained=True)
