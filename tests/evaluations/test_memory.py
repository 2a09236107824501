"""Measures of memory, against work that takes a known amount."""

import math
import time

import numpy as np
import torch

from evaluations.memory import MIB, ResidentMemoryPeak, peak_memory, process_peak


def test_peak_of_a_call_is_that_of_its_tensors():
    kept = torch.zeros(MIB)                          # 4 MiB that were there before
    peak = peak_memory(lambda: (kept + 1).sum() + torch.zeros(2 * MIB).sum())
    assert 8 <= peak <= 13


def test_peak_of_a_block_is_seen_after_it_is_freed():
    with ResidentMemoryPeak() as memory:
        values = np.ones(8 * MIB)                   # 64 MiB
        for _ in range(1000):                       # until the thread has looked
            if not memory.peak < 48 * MIB:
                break
            time.sleep(0.01)
        del values
    assert math.isnan(memory.peak) or 48 * MIB < memory.peak < 200 * MIB


def test_peak_of_the_process_does_not_fall():
    before = process_peak()
    assert 10 * MIB < before <= process_peak()
