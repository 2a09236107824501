"""Files of weights: the same network and notes give the same bytes, whichever command writes them."""

import numpy as np
import pytest
import torch

from evaluations.extractors.converted import write_conversion
from evaluations.extractors.fashion_mnist import FashionMnistClassifier, save_fashion_mnist
from evaluations.extractors.icons import Layer, save_layer

NOTES = {name: name for name in ["data", "command", "torch", "seed", "host"]}


def bundled(path):
    torch.manual_seed(0)
    save_fashion_mnist(FashionMnistClassifier((4, 6, 8, 8, 64)), path, NOTES)


def layer(path):
    save_layer(Layer(np.ones((3, 2)), np.zeros(2), ["a", "b"], {"test": 1.0}, "0" * 64), path, NOTES)


def conversion(path):
    write_conversion(path, "a format", {"b": torch.ones(2), "a": torch.zeros(3, 1)}, NOTES)


@pytest.mark.parametrize("write", [bundled, layer, conversion])
def test_the_same_weights_and_notes_give_the_same_bytes(write, tmp_path):
    found = set()
    for number in range(6):
        write(tmp_path / f"{number}.safetensors")
        found.add((tmp_path / f"{number}.safetensors").read_bytes())
    assert len(found) == 1
