"""Memory of this process: its peak, and the return of freed memory to the system."""

from __future__ import annotations

import ctypes
import resource
import sys

# Names of glibc's options in malloc.h; freed bytes at the end of the heap that are kept, and the
# largest block that is taken from the heap (glibc allows no more).
TRIM_THRESHOLD, MMAP_THRESHOLD, KEPT, LARGEST = -1, -3, 2**28, 2**25


def most_held() -> int:
    """Peak memory of this process, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def keep_freed() -> None:
    """Let this process reuse freed memory instead of returning it at once, if it runs on glibc.

    Arrays of some 100 kB to 32 MB that are made and freed again and again would otherwise be mapped
    anew each time: a fit of 1,700 clusters with slopes spent a fifth of its CPU time on that.
    `release` still returns memory.
    """
    change = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if change is not None:
        for option, size in ((TRIM_THRESHOLD, KEPT), (MMAP_THRESHOLD, LARGEST)):
            change(option, size)


def release() -> None:
    """Return freed memory to the system, if the C library is glibc.

    glibc keeps freed blocks for reuse; after many arrays of up to 32 MB each, that can be hundreds
    of megabytes. This returns them within milliseconds.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
