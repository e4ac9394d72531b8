"""Memory of this process: its peak, and giving back what was freed."""

from __future__ import annotations

import ctypes
import resource
import sys

__all__ = ["most_held", "release"]


def most_held() -> int:
    """Bytes of memory that this process has held at its peak."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def release() -> None:
    """Give freed memory back to the system, where the C library is glibc.

    glibc keeps freed blocks for reuse; after work on many arrays of up to 32 MB each that can be
    hundreds of megabytes, beside what the next step needs. This returns them in milliseconds.

    Examples
    --------
    >>> release()
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
