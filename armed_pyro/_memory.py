"""Memory of this process: its peak, giving back what is not needed, large pages."""

from __future__ import annotations

import ctypes
import resource
import sys

from torch import Tensor

__all__ = ["large_pages", "most_held", "release"]


PAGE = 2**21
# Linux's MADV_COLLAPSE, since 6.1: now, and without leave of the system's settings.
COLLAPSE = 25


def most_held() -> int:
    """Bytes of memory that this process has held at its peak."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def release() -> None:
    """Give memory that was freed back to the system, where the C library (glibc) can do so.

    It keeps what lies between things in use: hundreds of megabytes after work on many arrays of
    up to 32 MB each, which what comes next would take beside its own. Takes milliseconds.

    Examples
    --------
    >>> release()
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def large_pages(*tensors: Tensor) -> None:
    """Lay large tensors in main memory on pages of 2 MB, where the system (Linux) can do so.

    Rows read here and there are found in fewer steps: by a fifth faster of a table of 100 MB, with
    which it takes 0.1 s. Values stay as they are, and where they are.

    Examples
    --------
    >>> import torch
    >>> table = torch.zeros(1_000_000, 8)
    >>> large_pages(table)
    """
    if sys.platform != "linux":
        return
    for one in tensors:
        if not one.is_cuda:
            first, size = one.data_ptr(), one.numel() * one.element_size()
            start, stop = -(-first // PAGE) * PAGE, (first + size) // PAGE * PAGE
            if stop > start and one.is_contiguous():
                # What it cannot do, it leaves.
                ctypes.CDLL(None).madvise(
                    ctypes.c_void_p(start), ctypes.c_size_t(stop - start), COLLAPSE
                )
