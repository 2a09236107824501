"""Memory that a process frees and keeps: what the system has to fill again, in interpreters of their own."""

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
PAGES = """
import mmap, resource, sys
import numpy as np
from guided_diffusion.allocator import give_freed_memory_back, keep_freed_memory

def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(64 * 2**20, np.uint8)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * mmap.PAGESIZE / 2**20

kept = keep_freed_memory()
pages()
again = pages()
give_freed_memory_back()
print(kept, again, pages())
"""


def kept_and_filled(**environment):
    """What was answered, and the MiB that the system filled for two later arrays of 64 MiB."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    answer, *filled = subprocess.run([sys.executable, "-c", PAGES], capture_output=True, text=True, check=True,
                                    env={**kept, "NUMPY_MADVISE_HUGEPAGE": "0", **environment}).stdout.split()
    return answer == "True", *map(float, filled)


def test_what_was_freed_is_taken_again_until_it_is_given_back():
    kept, again, anew = kept_and_filled()
    assert kept and again < 8 and anew > 32


def test_what_the_variables_of_the_c_library_say_goes_first():
    kept, again, _ = kept_and_filled(MALLOC_MMAP_THRESHOLD_="1000000")
    assert not kept and again > 32
