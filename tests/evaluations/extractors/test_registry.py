"""The list of extractors: their names, and what their records say before they are loaded."""

import numpy as np
import pytest
from synthetic_inception import write_weights

from evaluations.extractors import BACKENDS, EXTRACTORS, find_extractor
from guided_diffusion.errors import UserError


def test_every_word_of_the_option_finds_its_record():
    assert [find_extractor(word).name for word in BACKENDS] == [
        "torch", "tensorflow", "fashion_mnist", "fashion_mnist", "scenes", "photo"]
    assert find_extractor("embedded") is EXTRACTORS["fashion_mnist"]
    with pytest.raises(UserError, match=r"--backend scene: must be one of torch, .* \(did you mean scenes\?\)"):
        find_extractor("scene")


@pytest.mark.parametrize("name", [name for name, kind in EXTRACTORS.items() if not kind.plugin])
def test_records_say_how_many_numbers_an_image_has(name, tmp_path):
    kind = EXTRACTORS[name]
    if kind.is_inception:
        assert (kind.pooled, kind.spatial, kind.probabilities) == (2048, 2023, 1008)
        return
    try:
        kind.check()
    except UserError as error:
        pytest.skip(str(error))
    features = kind.load(device="cpu").features(np.zeros((2, 32, 32, 3), np.uint8))
    sizes = [values[0].size for values in features]
    assert sizes == [kind.pooled, kind.spatial, kind.probabilities]
    assert kind.feature_bytes == sum(values[0].nbytes for values in features)


def test_an_inception_of_another_size_says_so(tmp_path):
    weights = write_weights(tmp_path / "small.safetensors")
    extractor = EXTRACTORS["torch"].load(inception=str(weights), device="cpu")
    assert "these are not the numbers that others publish" in extractor.caveat
    assert EXTRACTORS["scenes"].load(device="cpu").caveat == ""


def test_a_device_that_is_not_there_is_named():
    with pytest.raises(UserError, match="--device abacus: "):
        EXTRACTORS["fashion_mnist"].load(device="abacus")
