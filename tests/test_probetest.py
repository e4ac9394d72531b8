"""The probe test: p-values known by counting, error rates under the null, and real fits."""

import numpy as np
import pytest
import xarray as xr
from scipy import stats

from armed_pyro import MixedEffects, Schedule, fit, probe_test
from armed_pyro.data.simulate import spirals
from armed_pyro.explain.attribution import Attribution
from armed_pyro.models.linear import linear

TRUE, PROBES = ["x1", "x2"], ["p1", "p2"]


def fits(x1, x2, p1, p2, n=6, noise=0.05, seed=0):
    rng = np.random.default_rng(seed)
    levels = np.array([x1, x2, p1, p2]) * rng.lognormal(0, noise, (n, 4))
    return [dict(zip([*TRUE, *PROBES], one, strict=True)) for one in levels]


def one_model(found):
    (row,) = found.table.to_dict("records")
    return row


def test_p_values_are_those_of_counting():
    """If all n fits agree, one sign pattern of 2^n is as extreme."""
    row = one_model(probe_test({"m": fits(2, 3, 1, 0.5)}, true=TRUE, probes=PROBES))
    assert row["true_first"] == 1
    assert row["p_true_first"] == pytest.approx(1 / 64)
    assert row["p_probe_first"] == 1
    assert row["verdict"] == "true features first"
    assert np.exp(row["margin"]) == pytest.approx(2, rel=0.1)


def test_one_probe_above_one_true_feature_is_enough():
    found = probe_test({"m": fits(5, 1, 2, 0.1, n=9)}, true=TRUE, probes=PROBES)
    row = one_model(found)
    assert row["true_first"] == 0
    assert row["p_probe_first"] == pytest.approx(4 / 2**9)
    assert row["p_true_first"] == pytest.approx(1)
    assert row["verdict"] == "a probe first"
    pairs = found.pairs.set_index(["true", "probe"])
    assert pairs.loc[("x2", "p1"), "above"] == 0
    assert (pairs["above"].drop(("x2", "p1")) == 1).all()


def test_every_pair_must_be_in_order_for_true_features_first():
    """The largest p-value over pairs decides: one tied pair leaves it open."""
    row = one_model(probe_test({"m": fits(5, 1, 1, 0.1, n=20)}, true=TRUE, probes=PROBES))
    assert row["verdict"] == "undecided"
    assert row["p_true_first"] > 0.05


def test_error_rates_under_the_null():
    """No importance differs: each wrong verdict has at most its level, to within 3 errors."""
    rng, n = np.random.default_rng(1), 120
    verdicts = []
    for _ in range(n):
        levels = rng.lognormal(0, 1, (10, 4))
        importances = {"m": [dict(zip([*TRUE, *PROBES], one, strict=True)) for one in levels]}
        verdicts.append(one_model(probe_test(importances, true=TRUE, probes=PROBES))["verdict"])
    most = 0.05 + 3 * np.sqrt(0.05 * 0.95 / n)
    assert verdicts.count("a probe first") / n < most
    assert verdicts.count("true features first") / n < most
    one = [
        one_model(
            probe_test(
                {"m": [{"x": a, "p": b} for a, b in rng.lognormal(0, 1, (12, 2))]},
                true=["x"],
                probes=["p"],
            )
        )["p_true_first"]
        for _ in range(n)
    ]
    # With one pair the p-value is that of the signed-rank test, uniform on its grid.
    assert stats.kstest(one, "uniform").statistic < 1.63 / np.sqrt(n) + 0.03


def test_models_are_compared_fit_by_fit():
    """The fits' own sizes vary far more than the models differ."""
    rng = np.random.default_rng(2)
    sizes = rng.lognormal(0, 3, 10)
    models = {
        name: [{"x": s * shift * rng.lognormal(0, 0.05), "p": s} for s in sizes]
        for name, shift in {"base": 1.0, "other": 1.5, "same": 1.0}.items()
    }
    found = probe_test(models, true=["x"], probes=["p"]).table.set_index("model")
    assert np.isnan(found.loc["base", "p_difference"])
    assert found.loc["other", "p_difference"] == pytest.approx(2 / 2**10)
    assert found.loc["same", "p_difference"] > 0.05
    swapped = probe_test(models, true=["x"], probes=["p"], reference="other").table
    assert np.isnan(swapped.set_index("model").loc["other", "p_difference"])


def test_unused_features_come_last_and_ties_count_for_nothing():
    zeros = [{"x": 1.0, "p": 0.0}] * 5
    assert one_model(probe_test({"m": zeros}, true=["x"], probes=["p"]))["p_true_first"] == 1 / 32
    ties = [{"x": 0.0, "p": 0.0}] * 5
    row = one_model(probe_test({"m": ties}, true=["x"], probes=["p"]))
    assert (row["p_true_first"], row["p_probe_first"], row["margin"]) == (1, 1, 0)


def test_columns_of_the_predictor_are_summed():
    values = xr.DataArray(
        [[1.0, 2.0], [4.0, 0.5]],
        {"feature": ["x", "p"], "column": ["b", "c"]},
        ["feature", "column"],
    )
    posterior = xr.Dataset({"importance": values}, {"scale": ("feature", [1.0, 1.0])})
    found = Attribution("gradient", posterior, values.expand_dims("row"))
    pairs = probe_test({"m": [found] * 3}, true=["x"], probes=["p"]).pairs
    assert pairs["log_ratio"].iloc[0] == pytest.approx(np.log(3 / 4.5))


def test_fits_that_only_a_probe_helps_rank_it_first():
    """A linear network cannot use a spiral, but a probe tells the cluster's class ratio."""
    data, _ = spirals(8, 60, ratio_sd=0.3, probes=1, seed=3)
    found = []
    for train, _ in data.folds(3, seed=0):
        model = MixedEffects(linear(3), "(1 | site)", "bernoulli")
        alone = MixedEffects(linear(3), (), "bernoulli")
        schedule = Schedule(steps=60, stages=0, net_learning_rate=0.05)
        settings = {"schedule": schedule, "refine": False, "progress": False}
        found.append([fit(m, train, **settings).attribution() for m in (alone, model)])
    models = dict(zip(["alone", "random"], zip(*found, strict=True), strict=True))
    table = probe_test(models, true=["x1", "x2"], probes=["probe1"]).table.set_index("model")
    assert table.loc["alone", "true_first"] == 0
    assert table.loc["alone", "p_true_first"] > 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"true": []}, "at least one feature"),
        ({"true": ["p1"]}, "none in common"),
        ({"true": ["x9"]}, "feature"),
        ({"reference": "q"}, "model"),
        ({"level": 0}, "between 0 and 1"),
        ({"importances": {}}, "at least one model"),
        ({"importances": {"m": fits(1, 1, 1, 1, n=1)}}, "at least 2"),
        ({"importances": {"m": fits(1, 1, 1, 1), "n": fits(1, 1, 1, 1, n=5)}}, "same fits"),
        ({"importances": {"m": fits(-1, 1, 1, 1)}}, "at least 0"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    given = {"importances": {"m": fits(1, 1, 1, 1)}, "true": TRUE, "probes": PROBES} | arguments
    with pytest.raises(ValueError, match=message):
        probe_test(given.pop("importances"), **given)
