"""Memory of this process: its peak, and the return of freed memory to the system."""

from __future__ import annotations

import ctypes
import resource
import sys


def most_held() -> int:
    """Peak memory of this process, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def release() -> None:
    """Return freed memory to the system, if the C library is glibc.

    glibc keeps freed blocks for reuse; after many arrays of up to 32 MB each, that can be hundreds
    of megabytes. This returns them within milliseconds.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
