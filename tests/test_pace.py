"""Pace: as much is learnt of the hyperparameters in a window, in many small steps or few."""

import pytest

from armed_pyro.engine.schedule import CHEAP, Pace


def test_few_rows_take_more_draws_in_fewer_longer_steps():
    few, many = (Pace.of(rows, network=False) for rows in (CHEAP // 32, CHEAP // 32 + 1))
    assert few.draws > many.draws
    assert few.window < many.window
    assert few.rate == pytest.approx((few.draws / many.draws) ** 0.5), "as far as the noise allows"
    assert few.window * few.rate == pytest.approx(many.window * many.rate, rel=0.1)


def test_a_network_that_runs_once_a_draw_does_so_rarely():
    assert Pace.of(10, network=True).draws == 2
