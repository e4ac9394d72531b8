"""Length and rates of training: settings, the plateau rule, and the record."""

import json
import math

import numpy as np
import pytest

from armed_pyro import Schedule
from armed_pyro.schedule import History, Plateau


@pytest.mark.parametrize(
    "setting",
    [
        {"steps": 0},
        {"steps": -1},
        {"learning_rate": 0.0},
        {"net_learning_rate": -0.1},
        {"decay": 0.0},
        {"patience": 0},
        {"clip": 0.0},
        {"batch_size": 0},
        {"window": 0},
        {"learning_rate": math.nan},
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_name(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        Schedule(**setting)


@pytest.mark.parametrize(
    ("batch_size", "n_rows", "expected"),
    [(None, 10, 10), (None, 4096, 4096), (None, 4097, 1024), (32, 100, 32), (32, 20, 20)],
)
def test_rows_a_step(batch_size, n_rows, expected):
    assert Schedule(batch_size=batch_size).batch(n_rows) == expected


@pytest.mark.parametrize(
    ("settings", "n_rows", "expected"),
    [
        ({}, 50, 100),
        ({"batch_size": 10}, 500, 100),
        ({"batch_size": 10}, 5000, 500),
        ({"window": 7}, 5000, 7),
    ],
)
def test_a_window_is_an_epoch_but_at_least_a_hundred_steps(settings, n_rows, expected):
    assert Schedule(**settings).window_steps(n_rows) == expected


def test_rates_fall_over_the_last_fifth_of_the_steps_and_stay_positive():
    rates = [Schedule(steps=100).rate(step) for step in range(100)]
    assert set(rates[:81]) == {1.0}
    assert np.all(np.diff(rates[80:]) < 0)
    assert rates[90] == pytest.approx(0.5)
    assert min(rates) >= 0.02


def window(mean, sd=0.01, n=100, seed=0):
    """Losses with exactly this mean and standard deviation."""
    noise = np.random.default_rng(seed).normal(size=n)
    return mean + sd * (noise - noise.mean()) / noise.std()


def test_a_falling_loss_goes_on_and_a_flat_one_is_cut():
    plateau = Plateau(tolerance=1e-6, patience=5)
    assert [plateau.training(window(mean)) for mean in (3.0, 2.0, 1.0)] == [False] * 3
    assert plateau.cuts == 0
    assert plateau.training(window(1.0))
    assert plateau.cuts == 1
    assert not plateau.training(window(1.0)), "after a cut there must be two windows to compare"
    assert plateau.training(window(1.0))
    assert plateau.cuts == 2


@pytest.mark.parametrize(("drop", "cut"), [(0.5, True), (3.0, False)])
def test_an_improvement_counts_beyond_its_standard_error(drop, cut):
    error = math.sqrt(2) * 0.01 / math.sqrt(100)
    plateau = Plateau(tolerance=1e-9, patience=5)
    plateau.training(window(1.0))
    assert plateau.training(window(1.0 - drop * error)) is cut


@pytest.mark.parametrize(("drop", "cut"), [(0.9e-3, True), (1.1e-3, False)])
def test_without_noise_an_improvement_counts_beyond_the_tolerance(drop, cut):
    plateau = Plateau(tolerance=1e-3, patience=5)
    plateau.training(np.full(10, 1.0))
    assert plateau.training(np.full(10, 1.0 - drop)) is cut


def test_a_rising_loss_is_a_plateau():
    plateau = Plateau(tolerance=1e-6, patience=5)
    plateau.training(window(1.0))
    assert plateau.training(window(2.0))


def test_validation_waits_for_patience_windows_since_the_best():
    plateau = Plateau(tolerance=0.0, patience=2)
    answers = [plateau.validation(value) for value in (2.0, 1.0, 1.5, 1.2, 1.1, 0.9)]
    assert answers == [
        (True, False),
        (True, False),
        (False, False),
        (False, True),
        (False, False),
        (True, False),
    ]
    assert (plateau.cuts, plateau.best) == (1, 0.9)


def test_negative_validation_losses_improve_too():
    plateau = Plateau(tolerance=0.0, patience=2)
    assert [plateau.validation(value)[0] for value in (-1.0, -2.0, -1.5)] == [True, True, False]


def test_a_validation_loss_that_is_not_a_number_is_never_the_best():
    plateau = Plateau(tolerance=0.0, patience=2)
    assert plateau.validation(math.nan) == (False, False)
    assert plateau.best == math.inf


def test_state_survives_json_and_decides_the_same():
    one = Plateau(tolerance=1e-6, patience=3)
    one.training(window(1.0))
    other = Plateau.from_json(json.loads(json.dumps(one.to_json())))
    assert other == one
    assert other.training(window(1.0))
    assert one.training(window(1.0))
    assert other == one


def test_record_and_settings_survive_json():
    history = History(loss=[0.1, 1 / 3], step=[2], adversary_accuracy=[[0.5]])
    assert History(**json.loads(json.dumps(history.to_json()))) == history
    schedule = Schedule(steps=7, window=3)
    assert Schedule(**json.loads(json.dumps(schedule.to_json()))) == schedule
