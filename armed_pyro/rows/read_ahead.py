"""Reading ahead: a thread fetches what comes next while the present is worked on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import torch
from torch import Tensor

__all__ = ["Foreseen", "ahead"]


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
    made: queue.Queue[tuple[str, T | BaseException | None]] = queue.Queue(depth)
    over = threading.Event()

    def put(kind: str, value: T | BaseException | None) -> bool:
        while not over.is_set():
            try:
                made.put((kind, value), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put("item", item):
                    return
        except BaseException as error:
            put("error", error)
        put("end", None)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            kind, value = made.get()
            if kind == "end":
                return
            if isinstance(value, BaseException):
                raise value
            yield value  # type: ignore[misc]
    finally:
        over.set()
        thread.join()


class Foreseen(Generic[T]):
    """Reads what an index asks for, and begins with the next index at once.

    Parameters
    ----------
    read : callable
        Gives what an index asks for; runs in a thread where the index was foreseen.
    """

    def __init__(self, read: Callable[[Tensor], T]) -> None:
        self._read = read
        self._pool = ThreadPoolExecutor(1, "read-ahead")
        self._pending: tuple[Tensor, Future[T]] | None = None

    def __call__(self, index: Tensor, following: Tensor | None = None) -> T:
        """What `index` asks for; `following` is what will be asked for next."""
        pending, self._pending = self._pending, None
        if pending is not None and torch.equal(pending[0], index):
            found = pending[1].result()
        else:
            found = self._read(index)
        if following is not None and len(following):
            self._pending = (following, self._pool.submit(self._read, following))
        return found
