"""Settings of the process of one command, which its work runs in from start to end."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from armed_pyro._memory import keep_freed

__all__ = ["loading"]


@contextmanager
def loading() -> Iterator[None]:
    """Import packages without collecting garbage; freed memory is reused from then on.

    Imports make millions of objects that live as long as the process. Looking through them for
    garbage took 0.4 of 2.6 CPU s; afterwards the collector leaves them out.
    """
    keep_freed()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
