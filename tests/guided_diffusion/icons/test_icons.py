"""Icons from packages in the layout of the real ones: what is taken, how it is labelled, split and written."""

import json
from dataclasses import replace
from hashlib import sha256

import numpy as np
import pytest
from crashes import content_of, restore, states_of
from PIL import Image

from guided_diffusion.errors import UserError
from guided_diffusion.icons import sets
from guided_diffusion.icons.files import SPLITS, IconOptions, split_of, write_icons
from guided_diffusion.icons.sets import drawings, read_packages

pytest.importorskip("resvg_py", reason="needs the extra data")

RED_DISC = '<circle cx="8" cy="8" r="6" fill="#f00"/>'
WIDE = {"body": '<rect width="32" height="16" fill="#00f"/>', "width": 32, "height": 16}


def package(icons, categories, aliases=None):
    return {"icons.json": {"prefix": "p", "icons": icons, "aliases": aliases or {}, "width": 16, "height": 16},
            "metadata.json": {"categories": categories}}


@pytest.fixture
def packages(monkeypatch):
    """Two styles: one with the standard's categories, one with its own, in which faces are people."""
    monkeypatch.setattr(sets, "FEWEST", 1)
    names = [f"thing-{i}" for i in range(40)]
    fine = package({"bear-face": {"body": RED_DISC}, "person": {"body": RED_DISC}, "wide": WIDE,
                    "person-dark-skin-tone": {"body": RED_DISC}, "old": {"body": RED_DISC, "hidden": True},
                    **{name: {"body": RED_DISC} for name in names}},
                   {"Animals & Nature": ["bear-face"], "People & Body": ["person"], "Objects": names,
                    "Smileys & Emotion": ["wide"]},
                   {"bear": {"parent": "bear-face"}, "mirrored": {"parent": "wide", "hFlip": True}})
    coarse = package({"bear": {"body": RED_DISC}, "bearface": {"body": RED_DISC}, "wide": WIDE},
                     {"People": ["bear", "wide"], "Nature": ["bearface"]})
    return {"fine": fine, "coarse": coarse}


def test_skin_tones_and_hidden_drawings_are_left_out(packages):
    names = {drawing.name for drawing in drawings(packages)}
    assert {"bear-face", "person", "wide"} <= names
    assert not names & {"person-dark-skin-tone", "old", "mirrored"}


def test_synonyms_and_spellings_are_one_item(packages):
    items = {(drawing.style, drawing.name): drawing.item for drawing in drawings(packages)}
    assert len({items["fine", "bear-face"], items["coarse", "bear"], items["coarse", "bearface"]}) == 1
    assert items["fine", "person"] != items["fine", "wide"]


def test_the_standards_categories_outvote_a_sets_own(packages):
    categories = {(drawing.style, drawing.name): drawing.category for drawing in drawings(packages)}
    assert categories["coarse", "bear"] == "animals" and categories["coarse", "wide"] == "smileys"


def test_a_tiny_category_of_a_style_is_among_its_symbols(packages, monkeypatch):
    monkeypatch.setattr(sets, "FEWEST", 2)
    categories = {(drawing.style, drawing.name): drawing.category for drawing in drawings(packages)}
    assert categories["fine", "person"] == "symbols" and categories["fine", "thing-1"] == "objects"


def test_splits_have_their_shares_and_depend_on_the_name_alone():
    splits = [split_of(f"item{i}") for i in range(4000)]
    for split, share in SPLITS.items():
        assert abs(splits.count(split) / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5
    assert split_of("item7") == splits[7]


@pytest.fixture
def folder(packages, monkeypatch, tmp_path):
    """The packages as files, pinned."""
    pinned = []
    for icon_set, (style, files) in zip(sets.SETS, packages.items(), strict=False):
        place = tmp_path / "packages" / icon_set.package.rpartition("/")[2]
        place.mkdir(parents=True)
        for name, content in files.items():
            (place / name).write_text(json.dumps(content))
        digest = sha256((place / "icons.json").read_bytes()).hexdigest()
        pinned.append(replace(icon_set, style=style, sha256=digest))
    monkeypatch.setattr("guided_diffusion.icons.files.read_packages", lambda path: read_packages(path, pinned))
    return tmp_path / "packages"


@pytest.mark.parametrize("kind", ["folder", "npz"])
def test_files_hold_every_drawing_once_with_its_class(folder, tmp_path, kind):
    lines = []
    out = tmp_path / "out"
    write_icons(IconOptions(packages=str(folder), image_size=16, format=kind, out=str(out)), lines.append)
    manifest = json.loads((out / "manifest.json").read_text())
    assert len(manifest["icons"]) == 46 and len(lines) == 3
    if kind == "folder":
        files = sorted(out.glob("*/*/*.png"))
        assert len(files) == 46 and {file.parent.name for file in files} == set(manifest["classes"])
        assert {file.parent.parent.name for file in files} <= set(SPLITS)
        image = np.asarray(Image.open(next(file for file in files if ".coarse.wide." in file.name)))
    else:
        with np.load(out / "train.npz") as train:
            names = list(train["class_names"])
            assert train["arr_0"].shape[1:] == (16, 16, 3) and len(train["arr_0"]) == len(train["arr_1"])
            wide = [icon for icon in manifest["icons"] if icon["split"] == "train"]
            assert [icon["class"] for icon in wide] == [names[label] for label in train["arr_1"]]
            return
    assert image.shape == (16, 16, 3)
    np.testing.assert_array_equal(image[0], 255)                # what is not square is centred, on white
    np.testing.assert_array_equal(image[8], [[0, 0, 255]] * 16)


@pytest.mark.parametrize("kind", ["folder", "npz"])
def test_what_was_killed_goes_on_to_the_same_files(folder, tmp_path, kind):
    out = tmp_path / "out"
    options = IconOptions(packages=str(folder), image_size=8, format=kind, out=str(out))
    with states_of(out) as states:
        write_icons(options, print)
    whole = content_of(out)
    some = states[1:6] + states[6:-4:len(states) // 2] + states[-4:]
    for state in some:
        restore(out, state)
        write_icons(options, print)
        assert content_of(out) == whole
    restore(out, states[-4])
    with pytest.raises(UserError, match="holds a part of icons with image_size 8, and now it is 9; name another"):
        write_icons(replace(options, image_size=9), print)


@pytest.mark.parametrize("kind", ["folder", "npz"])
def test_icons_that_are_gone_are_not_called_finished(folder, tmp_path, kind):
    out = tmp_path / "out"
    options = IconOptions(packages=str(folder), image_size=8, format=kind, out=str(out))
    write_icons(options, print)
    lines = []
    write_icons(options, lines.append)
    assert lines == [f"{out} has these icons already: there is nothing to do"]
    gone = sorted(out.rglob("test/*/*.png" if kind == "folder" else "test.npz"))[0]
    gone.unlink()
    with pytest.raises(UserError, match=rf"lacks {gone.relative_to(out)} of what its manifest\.json lists; name a new"):
        write_icons(options, print)
    (out / "sheet.png").unlink()
    with pytest.raises(UserError, match="and 1 more of what"):
        write_icons(options, print)
    (out / "manifest.json").write_text('{"image_size": 8, "label": "category-style"}')
    with pytest.raises(UserError, match=r"its manifest\.json is not one of icons"):
        write_icons(options, print)


def test_another_version_and_a_missing_package_are_refused(folder, tmp_path):
    (folder / "noto" / "icons.json").write_text("{}")
    with pytest.raises(UserError, match="SHA-256"):
        write_icons(IconOptions(packages=str(folder), out=str(tmp_path / "a")), print)
    with pytest.raises(UserError, match=r"has no noto/icons\.json"):
        write_icons(IconOptions(packages=str(tmp_path), out=str(tmp_path / "b")), print)


def test_a_folder_that_holds_something_is_refused_before_any_work(tmp_path):
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(UserError, match="is not empty"):
        write_icons(IconOptions(packages="nowhere", out=str(tmp_path)), print)
