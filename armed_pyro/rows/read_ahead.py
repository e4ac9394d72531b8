"""Reading ahead: a thread reads the next items while the present one is worked on."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

__all__ = ["ahead"]


T = TypeVar("T")


def ahead(items: Iterable[T], depth: int = 2) -> Iterator[T]:
    """The items, made in a thread that is at most `depth` of them ahead.

    An error in the thread is raised where its item would have come; the thread ends with the
    loop that uses the items, however that ends.

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
