"""Reading ahead: order, errors, how far ahead, and that no thread is left."""

import threading
import time

import pytest

from armed_pyro.rows.passes import ahead


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
            while len(made) < 6 and time.monotonic() < deadline:
                time.sleep(0.01)
            # Two wait.
            time.sleep(0.05)
            assert made == list(range(6))
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
