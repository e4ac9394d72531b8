"""Reading ahead: order, errors, how far ahead, and that no thread is left."""

import threading
import time

import pytest
import torch

from armed_pyro.rows.read_ahead import Foreseen, ahead


def reading_threads():
    return [one for one in threading.enumerate() if one.name.startswith(("Thread-", "ahead"))]


def test_items_come_in_order_and_are_made_ahead_of_their_use_but_not_too_far():
    made = []

    def items():
        for item in range(10):
            made.append(item)
            yield item

    found = []
    for item in ahead(items(), depth=2):
        found.append(item)
        if item == 3:
            deadline = time.monotonic() + 5
            while len(made) < 7 and time.monotonic() < deadline:
                time.sleep(0.01)
            # Two wait, and a third is held by the thread.
            assert made == list(range(7))
    assert found == list(range(10))


def test_an_error_comes_where_its_item_would():
    def items():
        yield 1
        raise ValueError("broken")

    seen = ahead(items())
    assert next(seen) == 1
    with pytest.raises(ValueError, match="broken"):
        next(seen)


def test_a_loop_that_ends_early_ends_the_thread():
    before = threading.active_count()
    for item in ahead(iter(range(10**9))):
        if item == 2:
            break
    del item
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_what_is_foreseen_is_read_once_and_a_wrong_guess_does_no_harm():
    asked = []

    def read(index):
        asked.append(index.tolist())
        return index * 10

    source = Foreseen(read)
    one, two, three = (torch.tensor([k]) for k in (1, 2, 3))
    assert source(one, two).tolist() == [10]
    assert source(two, three).tolist() == [20]
    deadline = time.monotonic() + 5
    while len(asked) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert source(one).tolist() == [10]
    assert asked == [[1], [2], [3], [1]]
