"""Families: densities against scipy, means, supports, centres, residual variances."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy import stats

from armed_pyro import ClusteredData
from armed_pyro.families.gaussian import Gaussian
from armed_pyro.families.registry import FAMILIES, family_named
from armed_pyro.rows.batch import Rows
from test_more_families import REFERENCES

F64 = torch.float64
TRIALS = torch.tensor([3.0, 8, 1, 20], dtype=F64)
ETA = torch.tensor([[-1.2], [0.3], [0.9], [2.1]], dtype=F64)
ETA3 = torch.tensor([[-1.2, 0.4], [0.3, 0.3], [0.9, -2.0], [2.1, 0.0]], dtype=F64)
ROWS = Rows(torch.zeros(4, 0), None, {}, trials=TRIALS)


def expit(eta):
    return 1 / (1 + np.exp(-eta))


def softmax(eta):
    odds = np.exp(np.column_stack([np.zeros(len(eta)), eta]))
    return odds / odds.sum(1, keepdims=True)


E1, E3, T = ETA[:, 0].numpy(), ETA3.numpy(), TRIALS.numpy()
SHAPE = 1.7
CASES = {
    "gaussian": (ETA, 0.8, [0.1, -2, 3, 2], lambda y: stats.norm.logpdf(y, E1, 0.8)),
    "bernoulli": (ETA, None, [1, 0, 1, 0], lambda y: stats.bernoulli.logpmf(y, expit(E1))),
    "binomial": (ETA, None, [0, 3, 1, 18], lambda y: stats.binom.logpmf(y, T, expit(E1))),
    "poisson": (ETA, None, [0, 2, 5, 9], lambda y: stats.poisson.logpmf(y, np.exp(E1))),
    "negative_binomial": (
        ETA,
        SHAPE,
        [0, 2, 5, 30],
        lambda y: stats.nbinom.logpmf(y, SHAPE, SHAPE / (SHAPE + np.exp(E1))),
    ),
    "categorical": (
        ETA3,
        None,
        [0, 2, 1, 1],
        lambda y: np.log(softmax(E3)[np.arange(4), y.astype(int)]),
    ),
}


def parameters_of(name):
    value = CASES[name][1]
    return {one.name: torch.tensor(value, dtype=F64) for one in family_named(name).parameters}


def make_data(y, n=6, **roles):
    site = np.arange(n) % 2
    return ClusteredData.from_arrays(
        np.zeros((n, 0)), y, {"site": site}, outcome_name="dose", **roles
    )


def trials_of(name):
    return {"trials": [3] * 6} if family_named(name).needs_trials else {}


def test_every_family_has_a_case():
    elsewhere = {name.partition("(")[0] for name in REFERENCES}
    elsewhere |= {"ordinal", "loglogistic", "piecewise_exponential"}  # files of their own
    assert set(CASES) | elsewhere == set(FAMILIES)


@pytest.mark.parametrize("name", CASES)
def test_log_density_is_scipys(name):
    eta, _, y, expected = CASES[name]
    density = family_named(name).distribution(eta, parameters_of(name), ROWS)
    y = torch.tensor(y, dtype=F64)
    assert density.batch_shape == (4,)
    torch.testing.assert_close(density.log_prob(y), torch.from_numpy(expected(y.numpy())))


@pytest.mark.parametrize("name", CASES)
def test_mean_is_that_of_samples(name):
    eta = CASES[name][0]
    family, parameters = family_named(name), parameters_of(name)
    torch.manual_seed(0)
    n = 20_000
    y = family.distribution(eta, parameters, ROWS).sample((n,))
    if name == "categorical":
        y = torch.nn.functional.one_hot(y.long(), 3).to(F64)
    error = y.mean(0) - family.mean(eta, ROWS)
    assert error.shape == family.mean(eta, ROWS).shape
    assert (error.abs() < 4.5 * y.std(0) / math.sqrt(n)).all()


@pytest.mark.parametrize("name", CASES)
def test_draws_come_first(name):
    """Densities and means vectorise over draws, with parameters of shape "draws 1"."""
    eta, _, y, _ = CASES[name]
    family, parameters, y = family_named(name), parameters_of(name), torch.tensor(y, dtype=F64)
    draws = torch.stack([eta, eta + 0.5])
    both = {key: torch.stack([one, 2 * one])[:, None] for key, one in parameters.items()}
    density = family.distribution(draws, both, ROWS)
    assert density.batch_shape == (2, 4)
    doubled = {key: 2 * one for key, one in parameters.items()}
    one = family.distribution(eta + 0.5, doubled, ROWS)
    torch.testing.assert_close(density.log_prob(y)[1], one.log_prob(y))
    torch.testing.assert_close(family.mean(draws, ROWS)[1], family.mean(eta + 0.5, ROWS))


@pytest.mark.parametrize(
    ("name", "y", "bad"),
    [
        ("bernoulli", [0, 1, 0, 2, 1, 0], "3"),
        ("bernoulli", [0, 1, 0.5, 1, 1, 0], "2"),
        ("binomial", [0, 1, 0, 1, 4, 0], "4"),
        ("binomial", [0, 1, 0, 1, -1, 0], "4"),
        ("binomial", [0, 1.5, 0, 1, 1, 0], "1"),
        ("poisson", [0, 1, 0, 1, 4, -2], "5"),
        ("poisson", [0, 1, 0, 1.5, 4, 2], "3"),
        ("negative_binomial", [0.1, 1, 0, 1, 4, 2], "0"),
    ],
)
def test_outcomes_outside_the_support_are_named(name, y, bad):
    data = make_data(y, **trials_of(name))
    with pytest.raises(ValueError, match=rf"{name}.*'dose'.*row\(s\) {bad} with .*correct the"):
        family_named(name).check(data)


@pytest.mark.parametrize("name", CASES)
def test_outcomes_in_the_support_pass(name):
    family_named(name).check(make_data([0, 1, 0, 1, 1, 0], **trials_of(name)))


@pytest.mark.parametrize(
    ("name", "y", "message"),
    [
        ("poisson", ["a", "b", "c"] * 2, "3 labels .*use family 'categorical'"),
        ("bernoulli", None, "'dose' is missing"),
        ("gaussian", None, "'dose' is missing"),
        ("binomial", [0, 1] * 3, "needs the number of trials of each row: name its column"),
        ("categorical", [2] * 6, "single class"),
        ("categorical", [0, 2] * 3, "the values 0.0, 2.0: store the classes as strings"),
        ("categorical", [0, 1.5] * 3, "the values 0.0, 1.5"),
    ],
)
def test_unsuitable_outcomes(name, y, message):
    with pytest.raises(ValueError, match=message):
        family_named(name).check(make_data(y))


def test_a_constant_outcome_has_no_scale():
    with pytest.raises(ValueError, match="the same in every row"):
        Gaussian().spread(make_data([2.0] * 6))


def test_labels_are_classes():
    two = make_data(["no", "yes"] * 3)
    family_named("bernoulli").check(two)
    assert family_named("bernoulli").columns(two) == ("",)
    three = make_data(["x", "y", "z"] * 2)
    assert family_named("categorical").columns(three) == ("y", "z")
    assert family_named("categorical").columns(make_data([0, 1, 2] * 2)) == ("1", "2")


@pytest.mark.parametrize(
    ("name", "y", "link"),
    [
        ("gaussian", [1.0, 2, 5, 0, 1, 3], lambda y: y.mean()),
        ("bernoulli", [1.0, 0, 1, 0, 1, 1], lambda y: np.log(y.mean() / (1 - y.mean()))),
        ("binomial", [1.0, 0, 1, 0, 2, 1], lambda y: np.log(y.sum() / (18 - y.sum()))),
        ("poisson", [1.0, 0, 1, 9, 2, 1], lambda y: np.log(y.mean())),
        ("negative_binomial", [1.0, 0, 1, 9, 2, 1], lambda y: np.log(y.mean())),
    ],
)
def test_center_is_the_link_of_the_mean(name, y, link):
    family, trials = family_named(name), [3] * 6
    center = family.center(make_data(y, trials=trials))
    assert center.item() == pytest.approx(link(np.array(y)))
    shifted = family.center(make_data(y, trials=trials, offset=[0.7] * 6))
    assert shifted.item() == pytest.approx(link(np.array(y)) - 0.7)


def test_center_of_classes_is_their_log_odds_against_the_first():
    y = [0] * 20 + [1] * 60 + [2] * 20
    center = family_named("categorical").center(make_data(y, 100))
    torch.testing.assert_close(
        center, torch.tensor([math.log(60.5 / 20.5), 0.0], dtype=center.dtype)
    )
    shifted = family_named("categorical").center(make_data(y, 100, offset=[0.5] * 100))
    torch.testing.assert_close(shifted, center - 0.5)


def test_an_offset_is_no_part_of_the_gaussian_outcomes_spread():
    y, offset = np.array([1.0, 2, 5, 0, 1, 3]), np.linspace(0, 1000, 6)
    data = make_data(y + offset, offset=offset)
    assert Gaussian().spread(data) == pytest.approx(y.std(ddof=1))
    assert Gaussian().center(data).item() == pytest.approx(y.mean())


@pytest.mark.parametrize(("name", "y"), [("bernoulli", 0), ("bernoulli", 1), ("poisson", 0)])
def test_center_is_finite_at_the_boundary(name, y):
    assert torch.isfinite(family_named(name).center(make_data([y] * 6))).all()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gaussian", 1.5**2),
        ("bernoulli", math.pi**2 / 3),
        ("binomial", math.pi**2 / 3),
        ("categorical", math.pi**2 / 3),
        # Nakagawa, Johnson and Schielzeth (2017), table 1: the log-normal approximation.
        ("poisson", math.log(1 + 1 / 4)),
        ("negative_binomial", math.log(1 + 1 / 4 + 1 / 1.5)),
    ],
)
def test_residual_variance(name, expected):
    family = family_named(name)
    parameters = {one.name: torch.tensor([1.5, 1.5]) for one in family.parameters}
    value = family.residual_variance(parameters, torch.tensor([4.0, 4.0]))
    torch.testing.assert_close(value, torch.tensor([expected, expected]))


@pytest.mark.parametrize("name", ["gaussian", "negative_binomial"])
def test_a_missing_parameter_is_an_error(name):
    with pytest.raises(ValueError, match=f"{name}.* needs its"):
        family_named(name).distribution(ETA, {}, ROWS)
    with pytest.raises(ValueError, match=f"{name}.* needs its"):
        family_named(name).residual_variance({}, torch.ones(2))


def test_missing_trials_are_an_error():
    without = dataclasses.replace(ROWS, trials=None)
    with pytest.raises(ValueError, match="needs the number of trials"):
        family_named("binomial").distribution(ETA, {}, without)


def test_precisions_are_those_of_the_residual_variance():
    half = torch.tensor(0.5)
    assert Gaussian().precision({"residual_sd": half}) == 4
    others = [family_named(name) for name in CASES if name != "gaussian"]
    assert all(one.precision({p.name: half for p in one.parameters}) is None for one in others)
    (sd,), (shape,) = Gaussian().parameters, family_named("negative_binomial").parameters
    assert sd.original(half, 3.0) == 1.5
    assert shape.original(half, 3.0) == 0.5
    assert family_named("poisson").parameters == ()


def test_family_named():
    assert family_named("gaussian") == Gaussian()
    own = Gaussian()
    assert family_named(own) is own
    with pytest.raises(ValueError, match=r"unknown family 'gausian'.*bernoulli, .*poisson"):
        family_named("gausian")
