"""The gallery of finished runs."""

from commands import call, flags
from PIL import Image


def test_a_page_shows_the_images_of_runs_and_their_commands(tmp_path, capsys):
    short = flags({"model": "fmnist32", "sampler": "unipc", "sampling_steps": 2, "num_samples": 2, "batch_size": 2})
    for name, more in (("plain", []), ("guided", flags({"pag_scale": 0.5}))):
        assert call("image_sample", *short, *more, "--out", tmp_path / "runs" / name) == 0
    runs, out = [str(tmp_path / "runs" / name) for name in ("plain", "guided")], str(tmp_path / "gallery")
    assert call("gallery", *runs, "--out", out, "--columns", 2) == 0
    text = (tmp_path / "gallery" / "index.md").read_text()
    assert text.startswith("# Gallery\n") and text.count("## fmnist32: ") == 2
    assert "![2 images: PAG s = 0.5" in text and "](guided.png)" in text
    assert "python scripts/gallery.py" in text and all(run in text for run in runs)
    with Image.open(tmp_path / "gallery" / "guided.png") as picture:
        assert picture.size == (2 * (2 * 34 + 2), 2 * (34 + 2))
    capsys.readouterr()
    assert call("gallery", runs[0], runs[0], "--out", out) == 2
    assert "plain: is the name of several folders" in capsys.readouterr().err
    assert call("gallery", tmp_path, "--out", out) == 2
    assert "holds no finished sampling run" in capsys.readouterr().err
