"""Damaged checkpoint files of every format: each is read, or refused in one sentence that names it."""

import io
import json

import numpy as np
import pytest
import torch
from fuzzing import WORDS, damaged, fuzz, survives
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from guided_diffusion import checkpoint
from guided_diffusion.checkpoint import load_state_dict, read_metadata
from guided_diffusion.stated import statement_of

CONFIG = {"image_size": 16, "num_channels": 32, "channel_mult": "1,2", "attention_resolutions": "8", "num_heads": 2}
TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4, dtype=torch.float16)}
SAFETENSORS = save(TENSORS, {"config": json.dumps(CONFIG), "step": "3"})
HEADER_WORDS = (*WORDS, b'"F64"', b'"F8_E4M3"', b'"C64"', b'"dtype"', b"18446744073709551615", b"-1", b"[0,0]", b"null",
                b'"__metadata__"', b"\\u0000", b"\\ud800")


def saved(content, zipped):
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


WRAPPED = {"model": TENSORS, "ema": {f"module.{name}": value for name, value in TENSORS.items()}, "step": 3}
PICKLED = [saved(content, zipped) for content in (TENSORS, WRAPPED) for zipped in (True, False)]


def read_everything(path):
    load_state_dict(path)
    read_metadata(path)


@fuzz(150)
@given(damaged(SAFETENSORS, words=HEADER_WORDS))
def test_damaged_safetensors(content):
    survives(read_everything, content, "model.safetensors")


@fuzz(150)
@given(damaged(*PICKLED))
def test_damaged_pickles(content):
    survives(read_everything, content, "model.pt")


@fuzz(80)
@given(damaged(json.dumps(CONFIG).encode(), words=WORDS))
def test_damaged_statements(config):
    content = save(TENSORS, {"config": config.decode(errors="replace")})
    survives(lambda path: statement_of(path, "diffusion"), content, "model.safetensors")


@fuzz(100)
@given(st.binary(max_size=100),
       st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x04", b"\x10" + bytes(7) + b"{"]))
def test_noise_behind_every_beginning(noise, beginning):
    survives(read_everything, beginning + noise, "model.pt")


@pytest.mark.parametrize("name", ["a\0b", "a" * 5000, "guided_diffusion/" + "a" * 5000, "guided_diffusion/a\0b"])
def test_names_that_no_file_can_have_are_refused(name):
    for read in (load_state_dict, read_metadata):
        with pytest.raises(checkpoint.UserError, match=r"is no name of a file|cannot be read"):
            read(name)


def test_numbers_of_numpy_beside_tensors_load_nothing_foreign(tmp_path):
    numbers = [np.float64(0.5), np.float32(-2), np.int64(2**40), np.bool_(True)]
    torch.save({"model": TENSORS, "numbers": numbers}, tmp_path / "model.pt")
    assert checkpoint.load_state_dict(tmp_path / "model.pt").keys() == TENSORS.keys()
    found = checkpoint.load_pickled(tmp_path / "model.pt")["numbers"]
    assert found == numbers and [type(number) for number in found] == [float, float, int, bool]
    torch.save({"model": TENSORS, "loss": np.zeros(3)}, tmp_path / "model.pt")
    with pytest.raises(checkpoint.UserError, match="only plain tensors are loaded"):
        load_state_dict(tmp_path / "model.pt")
