"""Reading ahead: a thread makes the next items while the current item is in use."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

__all__ = ["ahead"]


T = TypeVar("T")


def ahead(items: Iterable[T], depth: int = 2) -> Iterator[T]:
    """Yield the items, which a thread makes up to `depth` items ahead.

    An error in the thread is raised in place of its item. The thread ends when the loop over the
    items ends, also by an error.

    Examples
    --------
    >>> list(ahead(range(4)))
    [0, 1, 2, 3]
    """
    iterator, end = iter(items), object()
    pool = ThreadPoolExecutor(1, "read-ahead")
    try:
        pending = deque(pool.submit(next, iterator, end) for _ in range(depth))
        while (item := pending.popleft().result()) is not end:
            pending.append(pool.submit(next, iterator, end))
            yield item  # type: ignore[misc]
    finally:
        pool.shutdown(cancel_futures=True)
