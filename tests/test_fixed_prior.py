"""The prior of latent fixed effects is that of the function, whatever the coding of its columns."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from armed_pyro import ClusteredData, MixedEffects, Priors
from armed_pyro.report.text import priors

ROWS = 300


def frame(first_a="p", first_b="u", origin=0.0, flip=False):
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {
            "a": rng.choice(list("pqr"), ROWS, p=[0.5, 0.3, 0.2]),
            "b": rng.choice(list("uv"), ROWS),
            "x": rng.normal(3, 2, ROWS) + origin,
            "z": rng.normal(0, 2, ROWS),
            "i": rng.choice([0, 1], ROWS, p=[0.8, 0.2]),
            "g": rng.integers(0, 10, ROWS),
            "y": rng.normal(size=ROWS),
        }
    )
    table["i"] = 1 - table["i"] if flip else table["i"]
    for name, first in (("a", first_a), ("b", first_b)):
        levels = [first, *(level for level in sorted(set(table[name])) if level != first)]
        table[name] = pd.Categorical(table[name], categories=levels)
    return table


def bind(table, features, **settings):
    data = ClusteredData.from_frame(table, outcome="y", clusters=["g"], features=features)
    net = nn.Linear(data.n_features, 1).double()
    model = MixedEffects(net, "(1 | g)", bayesian_head=True, **settings).bind(data)
    rows = model.encode(data).x
    return model, torch.cat([torch.ones(ROWS, int(model.has_intercept)).double(), rows], 1)


HIERARCHICAL = ["a", "a + x", "a * b", "a * x", "a * b * x", "a*x + z*x + i", "i * x", "x * z"]


@pytest.mark.parametrize("features", [*HIERARCHICAL, "x + a:x", "a:b"])
def test_the_prior_of_the_function_does_not_depend_on_the_coding(features):
    """Same function, same log density; an origin of x matters only if it is part of the formula."""
    origins = (0.0, 2000.0) if features in HIERARCHICAL else (0.0,)
    expected = None
    for first_a, first_b, origin, flip in itertools.product("pq", "uv", origins, (False, True)):
        model, columns = bind(frame(first_a, first_b, origin, flip), features)
        if expected is None:
            torch.manual_seed(0)
            f = columns @ model.fixed_prior().sample()
        beta, *_ = torch.linalg.lstsq(columns, f[:, None], driver="gelsd")
        torch.testing.assert_close(columns @ beta[:, 0], f, atol=1e-6, rtol=0)
        # The density of f is that of its coefficients, by the volume of the columns.
        volume = torch.linalg.slogdet(columns.T @ columns)[1] / 2
        density = model.fixed_prior().log_prob(beta[:, 0]) - volume
        expected = density if expected is None else expected
        torch.testing.assert_close(density, expected, atol=1e-4, rtol=0)


def test_the_prior_of_cell_means_is_that_of_contrasts():
    densities = []
    for features in ("a + b + x", "0 + a + b + x"):
        model, columns = bind(frame(), features)
        f = columns @ torch.linspace(-1, 1, columns.shape[1]).double() if not densities else f
        beta, *_ = torch.linalg.lstsq(columns, f[:, None], driver="gelsd")
        volume = torch.linalg.slogdet(columns.T @ columns)[1] / 2
        densities.append(model.fixed_prior().log_prob(beta[:, 0]) - volume)
    torch.testing.assert_close(densities[0], densities[1])


def test_any_two_levels_differ_by_fixed_sd():
    model, columns = bind(frame(), "a + x", priors=Priors(fixed_sd=1.5))
    covariance = model.fixed_prior().covariance_matrix
    names = model.fixed_terms()
    q, r, x = (names.index(name) for name in ("a[T.q]", "a[T.r]", "x"))
    contrasts = torch.zeros(3, len(names)).double()
    contrasts[0, q], contrasts[1, r], contrasts[2, [q, r]] = 1, 1, torch.tensor([1.0, -1]).double()
    variances = (contrasts @ covariance @ contrasts.T).diagonal()
    torch.testing.assert_close(variances, torch.full((3,), 1.5**2).double())
    torch.testing.assert_close(covariance[x, x], torch.tensor(1.5**2).double())
    mean = columns.mean(0)
    torch.testing.assert_close(mean @ covariance @ mean, torch.tensor(1.5**2).double())
    assert "between levels; Intercept at the features' means" in priors(model)["fixed_effect"]


@pytest.mark.parametrize("features", [["x", "z"], "x:a"])
def test_effects_are_independent_without_factors_or_a_known_map(features):
    model, _ = bind(frame(), features)
    assert model.fixed_root is None
    assert model.fixed_prior().log_prob(torch.zeros(len(model.fixed_terms()))).isfinite()


def test_arrays_have_an_intercept_at_the_means():
    x = np.column_stack([frame()["x"], frame()["i"]])
    data = ClusteredData.from_arrays(x, frame()["y"], {"g": frame()["g"]})
    net = nn.Linear(2, 1).double()
    model = MixedEffects(net, "(1 | g)", bayesian_head=True).bind(data)
    covariance = model.fixed_prior().covariance_matrix / 2.5**2
    share = float(x[:, 1].mean())
    expected = torch.tensor([[1 + share**2, 0, -share], [0, 1, 0], [-share, 0, 1]])
    torch.testing.assert_close(covariance, expected.double())
