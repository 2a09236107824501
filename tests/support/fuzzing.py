"""Fuzzing readers of files: a good file is damaged in every way, and its reader must return or raise a UserError.

    @fuzz(200)
    @given(damaged(GOOD_FILE))
    def test_damaged_files(content):
        survives(read_my_format, content, "x.idx")

The same examples are drawn in every run, on every machine. `survives` also holds the reader to an amount of memory.
"""

import contextlib
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from guided_diffusion.errors import UserError

MEMORY = 2**26          # bytes that a reader may take for a damaged file of a few kilobytes
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**40, 2**63 - 1, 2**63,
           2**64 - 1)
WORDS = (b"", b"\0", b"(" * 2000, b"[" * 20000, b"{" * 500, b"-" * 8000, b"9" * 5000, b"\xff\xfe", b"../" * 5, b"NaN",
         b"1e999", b"True", b"None", b"'", b'"', b",", b"\n", "\u202e\U0001f40d".encode())


def fuzz(examples: int) -> settings:
    """The settings of a fuzz test: so many examples, the same in every run, none kept, no clock."""
    return settings(max_examples=examples, derandomize=True, deadline=None, database=None,
                    phases=(Phase.explicit, Phase.generate),
                    suppress_health_check=list(HealthCheck))


@st.composite
def damaged(draw: st.DrawFn, *whole: bytes, words: tuple[bytes, ...] = WORDS) -> bytes:
    """One of these files with one to four faults: bits, bytes and numbers changed, parts cut, moved, or inserted."""
    content = bytearray(draw(st.sampled_from(whole)))
    for _ in range(draw(st.integers(1, 4))):
        _damage(draw, content, words)
    return bytes(content)


def _damage(draw: st.DrawFn, content: bytearray, words: tuple[bytes, ...]) -> None:
    place = draw(st.integers(0, len(content)))
    fault = draw(st.sampled_from(("bit", "number", "word", "cut", "end", "copy", "noise")))
    if fault == "bit" and place < len(content):
        content[place] ^= 1 << draw(st.integers(0, 7))
    elif fault == "number":
        size = draw(st.sampled_from((1, 2, 4, 8)))
        number = draw(st.sampled_from(NUMBERS)) % 256**size
        content[place:place + size] = number.to_bytes(size, draw(st.sampled_from(("little", "big"))))
    elif fault == "word":
        content[place:place + draw(st.integers(0, 8))] = draw(st.sampled_from(words))
    elif fault == "cut":
        del content[place:place + draw(st.integers(1, 40))]
    elif fault == "end":
        del content[place:]
    elif fault == "copy":
        other = draw(st.integers(0, len(content)))
        content[place:place] = content[other:other + draw(st.integers(1, 60))]
    elif fault == "noise":
        content[place:place + 16] = draw(st.binary(min_size=1, max_size=16))


def survives(read: Callable[[Path], Any], content: bytes, name: str, memory: int = MEMORY) -> None:
    """Lets `read` read a file of this content and name: it must return, or raise a UserError that names the file.

    The sentence must stand on one line, and no more than `memory` bytes may be taken.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        tracemalloc.start()
        try:
            with contextlib.suppress(Refused):
                _read(read, path)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < memory, f"{peak} bytes of memory"


class Refused(Exception):
    """The reader has refused the file as it should."""


def _read(read: Callable[[Path], Any], path: Path) -> None:
    try:
        read(path)
    except UserError as error:
        message = str(error)
        assert path.name in message, f"the file is not named: {message}"
        assert len(message.splitlines()) == 1 and len(message) < 1000, f"no sentence: {message}"
        raise Refused from error
