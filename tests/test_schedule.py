"""Length and rates of training: settings, the plateau rule, and the record."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
from rich.progress import Progress, TimeRemainingColumn

from armed_pyro import Schedule
from armed_pyro.engine.schedule import WANDERING, History, Plateau, split_r_hat
from armed_pyro.inference import train


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
        {"particles": 0},
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


@pytest.mark.parametrize(("settings", "expected"), [({}, 25), ({"window": 7}, 7)])
def test_once_settled_a_window_is_as_long_however_many_rows(settings, expected):
    for n_rows in (50, 500_000):
        assert Schedule(**settings).window_steps(n_rows, 25) == expected


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


def test_a_guide_that_moves_is_given_time_and_one_that_only_wanders_is_not():
    plateau = Plateau(tolerance=1e-6, patience=5)
    assert not any(plateau.training(window(1.0), moving=True) for _ in range(WANDERING))
    better = [plateau.training(window(0.9 - 0.1 * k), moving=True) for k in range(3)]
    wandering = [plateau.training(window(0.9), moving=True) for _ in range(WANDERING + 1)]
    assert not any(better + wandering[:-1]), "each new best starts the count again"
    assert wandering[-1]
    assert plateau.cuts == 1


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


# ------------------------------------------------------------------------------------ split_r_hat


def test_iterates_at_rest_have_an_r_hat_of_one():
    r_hat, drift = split_r_hat(np.tile([0.3, -2.0], (40, 1)))
    assert (r_hat, drift) == (1.0, 0.0)


def test_r_hat_and_drift_are_those_of_the_component_that_moves_most():
    """R-hat of draws around the iterates, whose sd is 1: sqrt(1 + B / W)."""
    noise = np.random.default_rng(0).normal(0, 0.1, (100, 3))
    iterates = noise + np.where(np.arange(100) < 50, -1, 1)[:, None] * [0.1, 0.5, 0.2]
    r_hat, drift = split_r_hat(iterates)
    first, second = iterates[:50, 1], iterates[50:, 1]
    assert drift == pytest.approx(second.mean() - first.mean())
    within = 1 + (first.var(ddof=1) + second.var(ddof=1)) / 2
    assert r_hat == pytest.approx(math.sqrt(1 + drift**2 / 2 / within))
    assert drift == pytest.approx(1.0, abs=0.1)


def test_r_hat_of_a_steady_walk_grows_with_its_speed():
    found = [split_r_hat(np.linspace(0, way, 50)[:, None])[0] for way in (0.1, 1.0, 10.0)]
    assert found == sorted(found)
    assert found[0] < 1.01 < 1.1 < found[2]


def test_an_odd_last_iterate_is_left_out():
    even = np.random.default_rng(0).normal(size=(20, 2))
    assert split_r_hat(even) == split_r_hat(np.concatenate([even, [[99.0, 99.0]]]))


def test_too_few_iterates_tell_nothing():
    for n in (1, 2, 3):
        assert np.isnan(split_r_hat(np.zeros((n, 2)))).all()
    assert split_r_hat(np.zeros((4, 2))) == (1.0, 0.0)


def test_no_iterates_of_nothing_are_at_rest():
    assert split_r_hat(np.zeros((50, 0))) == (1.0, 0.0)


def test_state_survives_json_and_decides_the_same():
    one = Plateau(tolerance=1e-6, patience=3)
    one.training(window(1.0))
    other = Plateau(**json.loads(json.dumps(asdict(one))))
    assert other == one
    assert other.training(window(1.0))
    assert one.training(window(1.0))
    assert other == one


def test_record_and_settings_survive_json():
    history = History(loss=[0.1, 1 / 3], step=[2], adversary_accuracy=[[0.5]])
    assert (history.settled, history.particles) == (None, 1)
    assert History(**json.loads(json.dumps(history.to_json()))) == history
    history = History(settled=100, particles=16, r_hat=[1.25], drift=[1 / 3])
    assert History(**json.loads(json.dumps(history.to_json()))) == history
    schedule = Schedule(steps=7, window=3, particles=5)
    assert Schedule(**json.loads(json.dumps(schedule.to_json()))) == schedule


@pytest.mark.parametrize(("stages", "shown"), [(0, True), (3, False)])
def test_a_time_left_is_shown_only_if_the_number_of_steps_is_fixed(monkeypatch, stages, shown):
    columns = []

    def progress(*given, **options):
        columns.extend(given)
        return Progress(*given, **options)

    monkeypatch.setattr(train, "Progress", progress)
    with train._training_bar(Schedule(stages=stages), show=False) as report:
        report(10, "loss 1.0 [red] :school:")
    assert any(isinstance(column, TimeRemainingColumn) for column in columns) is shown
