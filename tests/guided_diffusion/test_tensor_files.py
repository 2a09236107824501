"""Files in the safetensors format are those of its library."""

import io

import pytest
import torch
from safetensors.torch import save

from guided_diffusion.errors import UserError
from guided_diffusion.tensor_files import TYPES, write_tensors

METADATA = {"a": 'ü"\\/\x7f\u2028\x01'}         # one entry: the library writes several in any order


def written(tensors, metadata):
    stream = io.BytesIO()
    write_tensors(stream, tensors, metadata)
    return stream.getvalue()


@pytest.mark.parametrize("metadata", [METADATA, {}])
def test_the_bytes_are_those_of_the_library(metadata):
    generator = torch.Generator().manual_seed(0)
    tensors = {f"{i % 3}/{i}é": (9 * torch.rand(3, 1 + i % 4, generator=generator)).to(getattr(torch, kind))
               for i, kind in enumerate(TYPES)}
    tensors |= {"": torch.tensor(3.0), "Z\n": torch.ones(0, 2), "z": torch.arange(5)}
    assert written(tensors, metadata) == save(tensors, metadata)


def test_metadata_stand_in_the_order_of_their_names():
    assert b'{"__metadata__":{"a":"2","b":"1"},"w"' in written({"w": torch.ones(1)}, {"b": "1", "a": "2"})


def test_tensors_of_no_such_type_are_refused():
    with pytest.raises(UserError, match=r"no tensors of complex128, name a file that ends in \.pt$"):
        written({"w": torch.ones(1, dtype=torch.complex128)}, {})
