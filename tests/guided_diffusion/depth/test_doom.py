"""Rooms of Freedoom: depth in metres, the split by maps, and the files, with and without the engine."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from commands import call

from guided_diffusion.depth import doom
from guided_diffusion.depth.doom import FAR, MAPS, NEAR, DoomOptions, View, render_doom, split_of
from guided_diffusion.depth.pairs import read_pairs


def test_depth_is_linear_in_the_buffer_up_to_the_sky():
    depth = doom.metres(np.array([0, 1, 2, 126, 127, 194], np.uint8))
    assert depth.dtype == np.float32 and depth[0] == pytest.approx(NEAR) and depth[-1] == depth[-2]
    assert depth[-1] == pytest.approx(FAR)
    assert np.diff(depth[:3]) == pytest.approx(7.143 / 32, rel=1e-4)


def test_maps_are_split_by_their_names():
    test = [name for name in MAPS if split_of(name) == "test"]
    assert len(MAPS) == 68 and test[:2] == ["E1M5", "E2M1"] and len(test) == 13
    assert {name[:1] for name in test} == {"E", "M"}


def test_rooms_are_told_from_skies_and_from_walls_before_the_nose():
    room = np.tile(np.arange(30, 38, dtype=np.uint8), (8, 1))
    assert doom.is_room(room) and not doom.is_room(np.full((8, 8), 30, np.uint8))
    for value in (127, 2):
        other = room.copy()
        other[:3] = value
        assert not doom.is_room(other)


def test_gamma_brightens_and_keeps_the_ends():
    frame = np.array([[[0, 64, 255]]], np.uint8)
    assert doom.brightened(frame, 1.0).tolist() == frame.tolist()
    assert doom.brightened(frame, 1.8).tolist() == [[[0, round(255 * (64 / 255) ** (1 / 1.8)), 255]]]


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """In place of the engine: views of one wall each, whose distance is drawn from the seed and the map."""
    (tmp_path / "engine").mkdir()
    for wad in doom.WADS:
        (tmp_path / "engine" / f"{wad}.wad").write_bytes(b"IWAD")

    def views(engine, running, name, count, seed):
        rng = np.random.default_rng([seed, list(MAPS).index(name)])
        for _ in range(count):
            buffer = np.broadcast_to(np.linspace(10, rng.integers(60, 120), 320).astype(np.uint8), (240, 320))
            yield View(np.repeat(buffer[..., None], 3, axis=2), buffer, {"map": name, "x": 0.0})

    class Game:
        def __getattr__(self, name):
            return lambda *words: None

    anything = SimpleNamespace(RES_320X240=0, RGB24=0, TURN_LEFT_RIGHT_DELTA=0, POSITION_X=0, POSITION_Y=0,
                               POSITION_Z=0, ANGLE=0)
    fake = SimpleNamespace(__file__=str(tmp_path / "engine" / "__init__.py"), __version__="0", DoomGame=Game,
                           ScreenResolution=anything, ScreenFormat=anything, Button=anything, GameVariable=anything)
    monkeypatch.setattr(doom, "_engine", lambda: fake)
    monkeypatch.setattr(doom, "views", views)


def test_files_are_pairs_and_the_manifest_names_sources(engine, tmp_path):
    out = tmp_path / "rooms"
    options = DoomOptions(maps="MAP01,E1M1,E1M5", num_train=5, num_test=2, image_size=16, out=str(out))
    assert render_doom(options) == {"train": 5, "test": 2}
    manifest = json.loads((out / "manifest.json").read_text())
    assert [view["map"] for view in manifest["views"]["train"]] == ["MAP01", "E1M1", "MAP01", "E1M1", "MAP01"]
    assert [view["map"] for view in manifest["views"]["test"]] == ["E1M5"] * 2
    assert "BSD-3-Clause" in manifest["licences"]["content"] and len(manifest["content"]["freedoom2.wad"]) == 64
    pairs = read_pairs(str(out / "train.npz"), size=16, depth_range="0.28,28.6")
    assert pairs.images.shape == (5, 3, 16, 16) and pairs.depth.shape == (5, 1, 16, 16)
    assert (pairs.depth.diff(dim=3) >= 0).all()
    before = (out / "train.npz").read_bytes()
    render_doom(options)
    assert (out / "train.npz").read_bytes() == before


def test_the_folder_that_a_killed_engine_left_empty_goes_and_no_other(engine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    litter, options = tmp_path / "_vizdoom", DoomOptions(maps="MAP01", num_train=1, image_size=16, out="rooms")
    litter.mkdir()
    render_doom(options)
    assert not litter.exists()
    litter.mkdir()
    (litter / "mine").touch()
    render_doom(options)
    assert (litter / "mine").exists()


def test_what_is_refused(tmp_path, capsys, monkeypatch):
    assert call("doom_render", "--maps", "MAP33", "--out", tmp_path / "out") == 2
    assert "there is no map 'MAP33' (did you mean MAP3" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "vizdoom", None)
    assert call("doom_render", "--out", tmp_path / "out") == 2
    assert "pip install 'guided-pixels[doom]'" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_engine_shows_the_same_rooms_again(tmp_path, monkeypatch):
    pytest.importorskip("vizdoom", reason="vizdoom is not installed: the extra `doom`")
    depth = []
    monkeypatch.chdir(tmp_path)
    for out in (tmp_path / "one", tmp_path / "two"):
        render_doom(DoomOptions(maps="MAP01", num_train=3, image_size=16, out=str(out)))
        with np.load(out / "train.npz") as file:
            depth.append(file["depth"])
            assert file["arr_0"].std() > 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    assert (depth[0] == depth[1]).all() and NEAR <= depth[0].min() < depth[0].max() <= FAR + 1e-3
