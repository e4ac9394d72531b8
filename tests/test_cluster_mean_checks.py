"""The check "cluster means": both slopes, and the error of predictions of new clusters."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from armed_pyro import ClusteredData, Fit, MixedEffects, Schedule, fit
from armed_pyro.checks.check import Check
from armed_pyro.data.simulate import wages


def checked(result: Fit) -> Check:
    (check,) = [c for c in result.diagnostics().checks if c.name == "cluster means"]
    return check


def linear(data: ClusteredData, **options: object) -> Fit:
    net = nn.Linear(data.n_features, 1)
    return fit(MixedEffects(net, "(1 | id)", bayesian_head=True, **options), data, progress=False)


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+\.\d+", text)]


@pytest.fixture(scope="module")
def halves() -> tuple[ClusteredData, ClusteredData]:
    return wages(200, seed=1)[0].hold_out_clusters("id", fraction=0.25, seed=0)


@pytest.fixture(scope="module")
def conflict(halves) -> Fit:
    return linear(halves[0])


@pytest.fixture(scope="module")
def with_means(halves) -> Fit:
    return linear(halves[0], between=True)


def test_both_slopes_and_the_errors_of_new_clusters_are_named(conflict, with_means, halves):
    check = checked(conflict)
    assert check.verdict == "fail"
    assert "clusters' means of exper (in id)" in check.reason
    slopes = re.search(
        r"the slope of exper is (.*) within clusters of id and (.*) between", check.reason
    )
    within, between = map(numbers, slopes.groups())
    assert within[1] <= 0.10 <= within[2]
    assert within[2] - within[1] < 0.02
    # 99.9% of estimates are within twice a 90% interval of the truth.
    middle, half = between[0], between[2] - between[0]
    assert abs(middle - 0.01) < 2 * half
    errors = numbers(check.reason.partition("an RMSE of about")[2])
    held_out = halves[1]
    actual = []
    for result in (conflict, with_means):
        made = result.predict(held_out, unseen="marginal").expected.mean(0)
        actual.append(float(np.sqrt(np.mean((made - held_out.outcome.numpy()) ** 2))))
    # 50 new people: the standard error of an RMSE is about a tenth of it.
    assert np.allclose(errors, actual, rtol=0.3)
    assert errors[0] > 2 * errors[1]
    assert "write between(exper | id) beside exper, or take between=True" in check.advice


def test_constant_features_are_not_blamed_for_the_conflict(conflict):
    # ed is correlated with experience, and its coefficient is wrong without between(exper | id).
    reason = checked(conflict).reason.partition(": ")[0]
    assert "ed (in id)" not in reason
    assert "I(" not in checked(conflict).advice


def test_means_in_the_program_pass_the_check(with_means):
    assert checked(with_means).verdict == "pass"
    table = wages(200, seed=1)[1].table
    data = ClusteredData.from_frame(
        table[table.id > 50],
        outcome="lwage",
        clusters=["id"],
        features="within(exper | id) + between(exper | id) + ed + fem + union + weeks",
    )
    assert checked(linear(data)).verdict == "pass"


def test_equal_slopes_pass():
    check = checked(linear(wages(100, within=0.05, between=0.05, seed=2)[0]))
    assert check.verdict == "pass"
    assert "RMSE" not in check.reason


def network(data: ClusteredData, **options: object) -> Fit:
    """A network that follows the slopes within clusters, as no held-out clusters stop it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(data.n_features, 5), nn.ReLU(), nn.Linear(5, 1))
    model = MixedEffects(net, "(1 | id)", **options)
    few = Schedule(steps=800)
    return fit(model, data, validation=None, schedule=few, progress=False)


@pytest.mark.slow
def test_networks_are_tested_by_features_and_output(halves):
    check = checked(network(halves[0], between=False))
    assert check.verdict in ("warn", "fail")
    assert "exper (in id)" in check.reason
    assert "RMSE" in check.reason
    assert checked(network(halves[0])).verdict == "pass"


@pytest.mark.slow
def test_the_output_of_a_network_without_feature_names():
    """Images: one pixel's mean is worth 1 within and -1 between clusters."""
    rng = np.random.default_rng(0)
    g = np.repeat(np.arange(60), 8)
    mean, deviation = rng.normal(size=60)[g], rng.normal(size=len(g))
    x = torch.zeros(len(g), 1, 2, 2)
    x[:, 0, 0, 0] = torch.from_numpy(mean + deviation).float()
    y = deviation - mean + 0.3 * rng.normal(size=len(g))
    data = ClusteredData.from_arrays(x, y, {"g": g})
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 1))
    result = fit(MixedEffects(net, "(1 | g)"), data, schedule=Schedule(steps=300), progress=False)
    check = checked(result)
    assert "the network's output (in g)" in check.reason
    assert check.advice.startswith("take fixed_weight=1")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bernoulli", "poisson"])
def test_other_families_on_the_link_scale(family):
    rng = np.random.default_rng(0)
    g = np.repeat(np.arange(150), 8)
    mean, deviation = rng.normal(size=150)[g], rng.normal(size=len(g))
    eta = 0.8 * deviation - 0.8 * mean + 0.3 * rng.normal(size=150)[g]
    y = rng.random(len(g)) < 1 / (1 + np.exp(-eta)) if family == "bernoulli" else None
    y = rng.poisson(np.exp(eta)) if y is None else y.astype(int)
    table = pd.DataFrame({"y": y, "x": mean + deviation, "id": g})
    data = ClusteredData.from_frame(table, outcome="y", clusters=["id"])
    model = MixedEffects(nn.Linear(1, 1), "(1 | id)", family, bayesian_head=True)
    check = checked(fit(model, data, progress=False))
    assert check.verdict in ("warn", "fail")
    slopes = re.search(r"the slope of x is (.*) within .* and (.*) between", check.reason)
    within, between = (numbers(text)[0] for text in slopes.groups())
    assert abs(within - 0.8) < 0.25
    assert abs(between + 0.8) < 0.35
