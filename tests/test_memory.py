"""The process's peak, and memory given back that the C library would keep."""

import ctypes
import os
from pathlib import Path

import numpy as np
import pytest

from armed_pyro._memory import most_held, release
from armed_pyro.cli.fit import byte_size

STATM = Path("/proc/self/statm")
SIZE, COUNT = 100_000, 600  # each too small for pages of its own


def held():
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_the_peak_is_below_all_memory():
    assert 0 < most_held() < 2 * byte_size(None)


@pytest.mark.skipif(
    not (STATM.exists() and hasattr(ctypes.CDLL(None), "malloc_trim")), reason="glibc's"
)
def test_what_lies_between_things_in_use_is_given_back():
    arrays = [np.ones(SIZE, np.uint8) for _ in range(COUNT)]
    kept = arrays[::2]
    del arrays
    before = held()
    release()
    assert before - held() > 0.8 * SIZE * COUNT / 2
    assert all(one.all() for one in kept)
