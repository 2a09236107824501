"""The picture of the losses of a training."""

import numpy as np
from PIL import Image
from tiny_training import train_tiny_classifier

from guided_diffusion.training.loss_curve import CURVES, curve, draw_loss_curve

LOSS, VALIDATION = (tuple(bytes.fromhex(colour[1:])) for colour in CURVES.values())


def places(path, colour):
    """Columns and rows of the pixels of that colour below the legend."""
    with Image.open(path) as picture:
        rows, columns = np.nonzero((np.asarray(picture)[30:] == colour).all(axis=2))
    return columns, rows


def test_a_falling_loss_falls_in_the_picture(tmp_path):
    log = tmp_path / "progress.csv"
    log.write_text("step,loss,val_loss\n10,1,\n20,0.1,\n30,0.01,nan\n")
    draw_loss_curve(log, tmp_path / "loss.png")
    columns, rows = places(tmp_path / "loss.png", LOSS)
    assert np.corrcoef(columns, rows)[0, 1] > 0.999          # a straight line, as its logarithm falls evenly
    assert not len(places(tmp_path / "loss.png", VALIDATION)[0])


def test_values_that_cannot_be_drawn_are_left_out():
    rows = [{"step": "1", "loss": text} for text in ("", "inf", "-1", "x", "2")] + [{"step": "6"}]
    assert curve(rows, "loss") == [(1.0, 2.0)]


def test_a_single_row_gives_no_picture(tmp_path):
    (tmp_path / "progress.csv").write_text("step,loss\n1,2\n")
    for log in ("progress.csv", "none.csv"):
        draw_loss_curve(tmp_path / log, tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_every_training_has_it(data_dir, tmp_path):
    train_tiny_classifier(data_dir, tmp_path, iterations=3, eval_interval=1)
    assert all(len(places(tmp_path / "loss.png", colour)[0]) > 20 for colour in (LOSS, VALIDATION))
