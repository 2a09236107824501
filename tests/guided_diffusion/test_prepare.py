"""Image data of one size: the official crops, every kind of source, classes, and going on after a stop."""

import io
import json
import tarfile
import zipfile

import numpy as np
import pytest
from commands import call
from PIL import Image

from guided_diffusion import prepare
from guided_diffusion.files import only_job
from guided_diffusion.image_datasets import open_images
from guided_diffusion.prepare import cropped


def picture(seed, width=23, height=17):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def png(seed):
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


FILES = {"cat/a.png": png(0), "cat/b.png": png(1), "dog/c.png": png(2)}


def tar_of(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def data(tmp_path):
    """The same three pictures as a folder, and in archives; nested.tar holds a .tar for each class, like ImageNet."""
    for name, content in FILES.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for name, content in {**FILES, "__MACOSX/._a.png": b"x", "readme.txt": b"x"}.items():
            archive.writestr(name, content)
    (tmp_path / "data.tar").write_bytes(tar_of(FILES))
    (tmp_path / "nested.tar").write_bytes(tar_of({
        "cat.tar": tar_of({"a.png": png(0), "b.png": png(1)}), "dog.tar": tar_of({"c.png": png(2)})}))
    return tmp_path


@pytest.mark.parametrize("source", ["folder", "data.zip", "data.tar", "nested.tar"])
def test_every_source_gives_the_same_images_and_classes(source, data, capsys):
    out = data / "out.npz"
    assert call("prepare_images", data / source, "--labels", "folders", "--image_size", 8, "--out", out) == 0
    said = capsys.readouterr().out
    assert "3 images of 8x8 in 2 classes" in said
    assert ("left out: 1 file(s) that are no pictures (readme.txt), 1 hidden or system file(s) (._a.png)" in said) \
        == (source == "data.zip")
    with np.load(out) as file:
        assert file["arr_1"].tolist() == [0, 0, 1] and file["class_names"].tolist() == ["cat", "dog"]
        for i in range(3):
            assert (file["arr_0"][i] == np.asarray(cropped(picture(i), 8, "adm"))).all()
    images = open_images(out, (3, 8, 8), class_cond=True)
    assert images.class_names.names == ("cat", "dog")
    manifest = json.loads(out.with_suffix(".json").read_text())
    assert [row["source"] for row in manifest["images"]] == list(FILES)


def test_an_archive_within_a_folder_of_any_name_is_a_class(tmp_path):
    (tmp_path / "all.tar").write_bytes(tar_of({f"all.tar.d/{name}": tar_of({"a.png": png(0)})
                                               for name in ("cat.tgz", "dog.TAR", "emu.v1.tar", "fox.tar.gz")}))
    assert call("prepare_images", tmp_path / "all.tar", "--labels", "folders", "--image_size", 8, "--out",
                tmp_path / "out") == 0
    assert {path.parent.name for path in (tmp_path / "out").rglob("*.png")} == {"cat", "dog", "emu.v1", "fox"}


def test_backslashes_in_a_zip_file_part_folders(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("cat\\", "cat\\a.png", "dog\\b.png", "..\\c.png", "emu/d\\e.png"):
            archive.writestr(name, png(0) if name.endswith("png") else b"")
    assert call("prepare_images", tmp_path / "a.zip", "--labels", "folders", "--image_size", 8, "--out",
                tmp_path / "out") == 0
    assert "left out: 1 hidden or system file(s) (c.png)" in capsys.readouterr().out
    assert {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.png")} == {
        "cat/a.png", "dog/b.png", "emu/d\\e.png"}


def test_links_in_an_archive_are_counted(tmp_path, capsys):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in (("a.png", tarfile.REGTYPE), ("b.png", tarfile.LNKTYPE), ("c.png", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.png"
            info.size = len(png(0)) if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(png(0)))
    assert call("prepare_images", tmp_path / "a.tar", "--image_size", 8, "--out", tmp_path / "out.npz") == 0
    assert "left out: 2 link(s) or devices (first b.png)" in capsys.readouterr().out


@pytest.mark.parametrize("source", ["folder", "data.tar"])
def test_pictures_that_are_enlarged_are_said(source, data, capsys):
    small = min(picture(0).size)
    for size, said in ((small + 1, f"{data / source}: 3 image(s) are enlarged to {small + 1} pixels (first a.png)\n"),
                       (small, ""), (small - 1, "")):
        assert call("prepare_images", data / source, "--image_size", size, "--out", data / f"{size}.npz") == 0
        found = capsys.readouterr().out
        assert said in found and ("enlarged" in found) == bool(said)


def test_an_image_folder_is_what_trainings_read_and_goes_on(data, capsys):
    line = [data / "folder", "--labels", "folders", "--image_size", 8, "--out", data / "out"]
    assert call("prepare_images", *line) == 0
    images = open_images(data / "out", (3, 8, 8), class_cond=True)
    assert images.labels.tolist() == [0, 0, 1]
    kept = data / "out" / "cat" / "a.png"
    before = kept.stat().st_mtime_ns
    (data / "out" / "dog" / "c.png").unlink()
    assert call("prepare_images", *line) == 0
    assert kept.stat().st_mtime_ns == before and (data / "out" / "dog" / "c.png").exists()
    line[line.index(8)] = 9
    assert call("prepare_images", *line) == 2
    assert "holds images with image_size 8, and now it is 9" in capsys.readouterr().err
    assert call("prepare_images", *line[:-1], data) == 2
    assert "holds other files" in capsys.readouterr().err
    assert call("prepare_images", *line[:-1], data / "folder" / "out") == 2
    assert "so that its images would be among those that are prepared" in capsys.readouterr().err


def content_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def stopped(data):
    """A command that ended at a damaged picture, and what it writes without a stop; the picture is whole again."""
    line = [data / "folder", "--labels", "folders", "--name", "x", "--image_size", 8, "--out"]
    assert call("prepare_images", *line, data / "whole") == 0
    (data / "folder" / "dog" / "c.png").write_bytes(b"damaged")
    assert call("prepare_images", *line, data / "out") == 2
    (data / "folder" / "dog" / "c.png").write_bytes(png(2))
    assert {"cat/x_0000000.png", "cat/x_0000001.png"} == {name for name in content_of(data / "out") if "png" in name}
    return [*line, data / "out"], content_of(data / "whole")


def test_what_was_stopped_ends_with_the_bytes_of_what_was_not(stopped, data):
    line, whole = stopped
    kept = data / "out" / "cat" / "x_0000001.png"
    before = kept.stat().st_mtime_ns
    record = data / "out" / prepare.RECORD
    record.write_text(record.read_text() + '{"file": "dog/x_00')           # as a kill may leave the last line
    (data / "out" / "dog").mkdir(exist_ok=True)
    (data / "out" / "dog" / ".x_0000002.png.0.tmp").write_bytes(b"x")        # and the image that it was writing
    assert call("prepare_images", *line) == 0
    assert kept.stat().st_mtime_ns == before and content_of(data / "out") == whole


def test_images_of_earlier_versions_without_a_record_are_kept(stopped, data):
    line, whole = stopped
    (data / "out" / prepare.RECORD).unlink()
    assert call("prepare_images", *line) == 0
    assert content_of(data / "out") == whole


@pytest.mark.parametrize("recorded", [False, True])
def test_images_whose_pixels_changed_under_the_same_name_are_refused(recorded, stopped, data, capsys):
    line, _ = stopped
    if not recorded:
        (data / "out" / prepare.RECORD).unlink()
    (data / "folder" / "cat" / "b.png").write_bytes(png(3))
    before = content_of(data / "out")
    assert call("prepare_images", *line) == 2
    assert "holds cat/x_0000001.png with other pixels than cat/b.png gives now" in capsys.readouterr().err
    assert content_of(data / "out") == before


def test_two_commands_in_one_folder_are_refused(data, capsys):
    (data / "out").mkdir()
    with only_job(data / "out"):
        assert call("prepare_images", data / "folder", "--image_size", 8, "--out", data / "out") == 2
        assert "another job is working there (process" in capsys.readouterr().err
    assert not content_of(data / "out")


@pytest.mark.parametrize("ended", [False, True])
def test_images_of_data_that_has_changed_are_refused(ended, stopped, data, capsys):
    line, whole = stopped
    if ended:
        assert call("prepare_images", *line) == 0
    before = content_of(data / "out")
    (data / "folder" / "cat" / "a2.png").write_bytes(png(3))
    assert call("prepare_images", *line) == 2
    assert "holds cat/x_0000001.png made of cat/b.png, and now it would be made of cat/a2.png; the data has changed" \
        in capsys.readouterr().err
    (data / "folder" / "cat" / "a2.png").unlink()
    assert call("prepare_images", *line, "--num_images", 1) == 2
    assert f"holds {2 + ended - 1} image(s) that are not among the 1 of now, the first is cat/x_0000001.png" \
        in capsys.readouterr().err
    assert content_of(data / "out") == before
    assert call("prepare_images", *line) == 0 and content_of(data / "out") == whole


@pytest.mark.parametrize("content", ['{"images": []}', '{"settings": 3}', "[1]", "no JSON", ""])
def test_a_file_in_the_place_of_the_manifest_is_not_replaced(content, data, capsys):
    line = [data / "folder", "--image_size", 8, "--out", data / "val.npz"]
    (data / "val.json").write_text(content)
    assert call("prepare_images", *line) == 2
    assert f"the manifest beside it would replace {data / 'val.json'}" in capsys.readouterr().err
    assert (data / "val.json").read_text() == content and not (data / "val.npz").exists()
    (data / "val.json").unlink()
    assert call("prepare_images", *line) == 0 and call("prepare_images", *line) == 0


def test_images_that_are_one_file_to_the_file_system_are_refused(data, capsys):
    (data / "folder" / "dog" / "b.png").write_bytes(png(3))
    line = [data / "folder", "--labels", "folders", "--image_size", 8, "--out", data / "out"]
    assert call("prepare_images", *line, "--num_images", 1) == 0
    (data / "out" / "dog").symlink_to("cat")            # as Cat and cat are one where case is not told apart
    assert call("prepare_images", *line) == 2
    assert "dog/b.png would be dog/b.png, which is there since now" in capsys.readouterr().err


@pytest.mark.parametrize(("source", "ahead"), [("clash", True), ("clash.zip", True), ("clash.tar", False)])
def test_two_images_that_would_be_one_file_are_refused_before_the_work(source, ahead, tmp_path, capsys):
    files = {"a/1.jpg": png(0), "a/2.png": png(1), "b/1.png": png(2)}
    for name, content in files.items():
        (tmp_path / "clash" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "clash" / name).write_bytes(content)
    with zipfile.ZipFile(tmp_path / "clash.zip", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    (tmp_path / "clash.tar").write_bytes(tar_of(files))
    line = [tmp_path / source, "--image_size", 8, "--out", tmp_path / "out"]
    assert call("prepare_images", *line) == 2
    assert "error: b/1.png: another image, a/1.jpg, is 1.png already; pass --name, which numbers them" \
        + ("\n" if ahead else ", and another --out\n") in capsys.readouterr().err
    assert len([*(tmp_path / "out").glob("*.png")]) == (0 if ahead else 2)
    assert call("prepare_images", *line, "--name", "q") == (0 if ahead else 2)      # what was advised
    assert ahead or "holds images with name unset, and now it is q; name another folder" in capsys.readouterr().err
    more = ["--out", tmp_path / "first", "--num_images", 2]                         # among which no two are one
    assert call("prepare_images", *line, *more) == 0
    (tmp_path / "labels.txt").write_text("1,x\n1,x\n2,y\n")
    assert call("prepare_images", *line, "--out", tmp_path / "x", "--labels_file", tmp_path / "labels.txt") == 2
    assert "error: b/1.png: another image, a/1.jpg, is x/1.png already" in capsys.readouterr().err


def test_an_image_that_is_left_out_takes_no_name(tmp_path):
    for name, content in {"a/1.jpg": b"damaged", "b/1.png": png(0)}.items():
        (tmp_path / "data" / name).parent.mkdir(parents=True)
        (tmp_path / "data" / name).write_bytes(content)
    assert call("prepare_images", tmp_path / "data", "--image_size", 8, "--skip_damaged", True, "--out",
                tmp_path / "out") == 0


def test_another_spelling_of_a_source_is_the_same_one(data, monkeypatch, capsys):
    monkeypatch.chdir(data)
    for source, code in (("folder/", 0), ("folder", 0), ("./folder", 0), ("data.zip", 2)):
        assert call("prepare_images", source, "--image_size", 8, "--out", "out") == code
    assert "holds images with source ./folder, and now it is data.zip" in capsys.readouterr().err


def test_the_crops_are_those_of_the_official_code():
    image = picture(5, 41, 30)
    assert cropped(image, 10, "adm").size == cropped(image, 10, "box").size == (10, 10)
    halved = image.resize((20, 15), Image.Resampling.BOX)                   # center_crop_arr
    whole = np.asarray(halved.resize((round(20 * 10 / 15), 10), Image.Resampling.BICUBIC))
    assert (np.asarray(cropped(image, 10, "adm")) == whole[:, (13 - 10) // 2:][:, :10]).all()
    whole = np.asarray(image.resize((round(41 * 10 / 30), 10), Image.Resampling.BOX))       # lsun_bedroom.py
    assert (np.asarray(cropped(image, 10, "box")) == whole[:, (14 - 10) // 2:][:, :10]).all()


@pytest.mark.parametrize("lines", ["ImageId,PredictionString\nb,n2 1 2 3 4\na,n10 5 6 7 8\nc,n2\n", "n10\nn2\nn2\n"])
def test_classes_of_a_validation_set_stand_in_a_file(lines, data, capsys):
    (data / "labels.txt").write_text(lines, encoding="utf-8-sig")         # as a spreadsheet of Windows writes it
    (data / "flat.tar").write_bytes(tar_of({"a.png": png(0), "b.png": png(1), "c.png": png(2)}))
    line = ["--labels_file", data / "labels.txt", "--image_size", 8, "--out", data / "out.npz"]
    assert call("prepare_images", data / "flat.tar", *line) == 0
    with np.load(data / "out.npz") as file:
        assert file["class_names"].tolist() == ["n2", "n10"] and file["arr_1"].tolist() == [1, 0, 0]
    (data / "flat.tar").write_bytes(tar_of({f"{i}.png": png(i) for i in range(4)}))
    assert call("prepare_images", data / "flat.tar", *line) == 2
    assert "labels.txt: has " in capsys.readouterr().err


def test_the_order_of_classes_without_names_is_said_where_there_are_two(data, capsys):
    (data / "labels.txt").write_text("x\ny\nz\n")
    for names, said in ((["1.png", "2.png", "10.png"], "where 10.png comes before 2.png"),
                        (["1.png", "2.png", "3.png"], "")):
        folder = data / f"of_{names[-1]}"
        folder.mkdir()
        for i, name in enumerate(names):
            (folder / name).write_bytes(png(i))
        assert call("prepare_images", folder, "--labels_file", data / "labels.txt", "--image_size", 8, "--out",
                    data / "out.npz") == 0
        out = capsys.readouterr().out
        assert said in out and ("in the order of their names as text" in out) == bool(said)


def test_classes_in_a_file_may_have_blanks_in_their_names(data):
    (data / "labels.txt").write_text('folder/a.png,polar bear\n"b.png","polar fox"\nc.png,polar bear\n')
    assert call("prepare_images", data / "folder", "--labels_file", data / "labels.txt", "--image_size", 8, "--out",
                data / "out.NPZ") == 0
    with np.load(data / "out.NPZ") as file:
        assert file["class_names"].tolist() == ["polar bear", "polar fox"] and file["arr_1"].tolist() == [0, 1, 0]


def test_a_folder_of_other_classes_is_refused(data, capsys):
    line = [data / "folder", "--labels_file", data / "labels.txt", "--image_size", 8, "--out", data / "out"]
    for labels, code in (("a,x\nb,x\nc,y\n", 0), ("a,x\nb,x\nc,y\n", 0), ("a,x\nb,y\nc,y\n", 2)):
        (data / "labels.txt").write_text(labels)
        assert call("prepare_images", *line) == code
    assert "holds images with labels_sha256 " in capsys.readouterr().err


@pytest.mark.parametrize(("lines", "said"), [
    ("cat/a.png,cat\ndog/a.png,dog\n", "says that a is of the class cat, and also of dog"),
    ("cat\ndog\ndog\n", "has classes in the order of the images' names, and b.png comes after c.png")])
def test_classes_that_could_be_of_other_images_are_refused(lines, said, data, capsys):
    (data / "labels.txt").write_text(lines)
    (data / "mixed.tar").write_bytes(tar_of({name: png(0) for name in ("a.png", "c.png", "b.png")}))
    line = [data / "mixed.tar", "--labels_file", data / "labels.txt", "--image_size", 8, "--out", data / "out.npz"]
    assert call("prepare_images", *line) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("source", ["a folder", "a.tar"])
@pytest.mark.parametrize(("lines", "more", "classes"), [
    ("ABCD", [], None), ("AC", [], None), ("ACD", [], [0, 1, 2]),
    ("ACD", ["--num_images", 2], [0, 1]), ("AC", ["--num_images", 2], None), ("ABCD", ["--num_images", 2], None)])
def test_classes_without_names_are_never_shifted_by_what_is_left_out(lines, more, classes, source, tmp_path, capsys):
    files = {"a.png": png(0), "b.svg": b"<svg/>", "c.png": png(2), "d.png": png(3)}
    (tmp_path / "a folder").mkdir()
    for name, content in files.items():
        (tmp_path / "a folder" / name).write_bytes(content)
    (tmp_path / "a.tar").write_bytes(tar_of(files))
    (tmp_path / "labels.txt").write_text("\n".join(lines))
    line = [tmp_path / source, "--labels_file", tmp_path / "labels.txt", "--image_size", 8, "--out", tmp_path / "out"]
    assert call("prepare_images", *line, *more) == (2 if classes is None else 0)
    written = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.png"))
    if classes is None:
        assert (f"has {len(lines)} classes without names, and {tmp_path / source} has 3 images, and beside them "
                "1 file(s) that are no pictures (b.svg); give a line for each image, or lines NAME,CLASS") \
            in capsys.readouterr().err
        assert not written
    else:
        assert written == ["A/a.png", "C/c.png", "D/d.png"][:len(classes)]


def test_classes_without_names_may_be_those_of_the_first_images_and_pass_over_damaged_ones(tmp_path):
    (tmp_path / "labels.txt").write_text("A\nB\nC\n")
    (tmp_path / "a.tar").write_bytes(tar_of({f"{i}.png": b"damaged" if i == 1 else png(i) for i in range(5)}))
    assert call("prepare_images", tmp_path / "a.tar", "--labels_file", tmp_path / "labels.txt", "--num_images", 3,
                "--skip_damaged", True, "--image_size", 8, "--out", tmp_path / "out") == 0
    assert {path.parent.name + path.stem for path in (tmp_path / "out").rglob("*.png")} == {"A0", "C2"}


@pytest.mark.parametrize(("lines", "code"), [("cat/a.png,pet\n", 2), ("cat/a.png,pet\ndog/a.png,pet\n", 0)])
def test_a_line_gives_its_class_to_one_image_alone(lines, code, tmp_path, capsys):
    (tmp_path / "labels.txt").write_text(lines)
    (tmp_path / "a.tar").write_bytes(tar_of({"cat/a.png": png(0), "dog/a.png": png(1)}))
    assert call("prepare_images", tmp_path / "a.tar", "--labels_file", tmp_path / "labels.txt", "--image_size", 8,
                "--out", tmp_path / "out.npz") == code
    assert ("has fewer lines for a than there are images called so, and dog/a.png may be of another class"
            in capsys.readouterr().err) == (code == 2)


def test_what_is_damaged_or_far_too_large_in_an_archive_may_be_left_out(data, capsys, monkeypatch):
    monkeypatch.setattr(prepare, "MAX_PACKED", 10**4)
    with zipfile.ZipFile(data / "odd.zip", "w") as archive:
        for name, content in {"a.png": png(0), "b.png": bytes(10**4 + 1), "c.png": b"damaged" + png(1)}.items():
            archive.writestr(name, content)
    content = bytearray((data / "odd.zip").read_bytes())
    content[content.index(b"damaged")] ^= 1          # so that its checksum is another one
    (data / "odd.zip").write_bytes(content)
    line = [data / "odd.zip", "--image_size", 8, "--out", data / "out.npz"]
    assert call("prepare_images", *line) == 2
    assert "odd.zip/b.png: unpacks to 10001 bytes, more than 10000" in capsys.readouterr().err
    assert call("prepare_images", *line, "--skip_damaged", True) == 0
    assert "left out 2 damaged image(s)" in capsys.readouterr().out


@pytest.mark.parametrize("cut", ["a broken header", "after an image", "within a header"])
def test_an_archive_that_is_not_whole_is_no_smaller_one(cut, data, capsys):
    content = bytearray((data / "data.tar").read_bytes())
    second = content.index(b"cat/b.png")
    if cut == "a broken header":
        content[second] ^= 1
    else:
        del content[second + 100 * (cut == "within a header"):]
    (data / "data.tar").write_bytes(content)
    assert call("prepare_images", data / "data.tar", "--image_size", 8, "--skip_damaged", True, "--out",
                data / "out.npz") == 2
    assert "data.tar: is no .tar file, or is damaged (" in capsys.readouterr().err
    assert not (data / "out.npz").exists()


def test_a_class_without_a_name_is_refused(data, capsys):
    (data / "folder" / "cat" / "_x.png").write_bytes(png(0))
    assert call("prepare_images", data / "folder" / "cat", "--labels", "prefix", "--image_size", 8, "--out",
                data / "out.npz") == 2
    assert "_x.png: has nothing before a _ in its name" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../x", ".x"])
def test_a_name_that_leads_elsewhere_or_hides_is_refused(name, data, capsys):
    assert call("prepare_images", data / "folder", "--name", name, "--image_size", 8, "--out", data / "a" / "out") == 2
    assert f"--name {name}: must be the beginning of a file's name" in capsys.readouterr().err
    assert not (data / "a").exists()


def test_what_cannot_be_read_is_one_sentence(data, capsys):
    (data / "folder" / "cat" / "b.png").write_bytes(FILES["cat/b.png"][:60])
    (data / "broken.tar").write_bytes(b"x" * 600)
    (data / "empty").mkdir()
    for source, words in (("folder", "b.png: cannot be read as an image"), ("none", "no such folder or file"),
                          ("broken.tar", "is no .tar file"), ("empty", "holds no pictures")):
        assert call("prepare_images", data / source, "--image_size", 8, "--out", data / "out.npz") == 2
        assert words in capsys.readouterr().err
        assert not (data / "out.npz").exists()
    (data / "text.txt").write_text("no picture")
    for source in (data / "none", data / "empty", data / "text.txt", ""):       # which leave nothing
        assert call("prepare_images", source, "--image_size", 8, "--out", data / "out") == 2
        assert not (data / "out").exists()
    assert "'': must name what is to be prepared" in capsys.readouterr().err
    line = [data / "folder", "--image_size", 8, "--skip_damaged", True, "--name", "x", "--out", data / "out"]
    assert call("prepare_images", *line) == 0
    assert "left out 1 damaged image(s)" in capsys.readouterr().out
    assert {path.name for path in (data / "out").iterdir()} == {"x_0000000.png", "x_0000001.png", "manifest.json"}


def test_an_lsun_database_becomes_a_folder_as_by_the_official_command(tmp_path):
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(tmp_path / "lmdb"), map_size=2**20) as database, database.begin(write=True) as view:
        for i in range(3):
            buffer = io.BytesIO()
            picture(i).save(buffer, "WEBP", lossless=True)
            view.put(f"{9 - i:040d}".encode(), buffer.getvalue())
    line = [tmp_path / "lmdb", tmp_path / "out", "--image-size", 8, "--prefix", "bedroom"]
    assert call("lsun_bedroom", *line) == 0
    for i in range(3):                                  # in the order of the keys
        with Image.open(tmp_path / "out" / f"bedroom_{i:07d}.png") as image:
            assert (np.asarray(image) == np.asarray(cropped(picture(2 - i), 8, "box"))).all()
