"""Weights of rows, standard errors, effects of single rows, offsets and precision of programs."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import statsmodels.api as sm
import torch
from scipy.optimize import minimize
from scipy.special import gammaln
from torch import nn

from armed_pyro import ClusteredData, DivergenceError, Fit, MixedEffects, Schedule, fit
from armed_pyro.families.registry import family_named
from armed_pyro.program.data_spec import Facts
from armed_pyro.report.text import summarize

# Colditz et al. (1994), 13 trials of the BCG vaccine: log risk ratio, its variance, latitude.
EFFECTS = """-0.8893 -1.5854 -1.3481 -1.4416 -0.2175 -0.7861 -1.6209 0.0120 -0.4694 -1.3713 -0.3394
    0.4459 -0.0173"""
VARIANCES = """0.3256 0.1946 0.4154 0.0200 0.0512 0.0069 0.2230 0.0040 0.0564 0.0730 0.0124 0.5325
    0.0714"""
BCG = pd.DataFrame(
    {
        "effect": [float(number) for number in EFFECTS.split()],
        "variance": [float(number) for number in VARIANCES.split()],
        "latitude": [44.0, 55, 42, 52, 13, 44, 19, 13, 27, 42, 18, 33, 33],
        "trial": [f"trial {i}" for i in range(13)],
    }
).assign(se=lambda table: table.variance**0.5)


def linear(n_features, dtype=torch.float64):
    return nn.Linear(n_features, 1).to(dtype)


def weighted_rows(n=40, **roles):
    rng = np.random.default_rng(2)
    x, sd = rng.normal(size=(n, 1)), rng.uniform(0.3, 3, n)
    y = 1 + x[:, 0] + sd * rng.normal(size=n)
    data = ClusteredData.from_arrays(x, y, {"site": np.arange(n) % 4}, **roles)
    return data, x, y, sd


def fitted(data, random=(), family="gaussian", dtype=torch.float64, **options):
    model = MixedEffects(
        linear(data.n_features, dtype), random, family, bayesian_head=True, **options
    )
    return fit(model, data, progress=False)


def component(result, factor, statistic):
    table = result.variance_components()
    return table[(table.factor == factor) & (table.statistic == statistic)].iloc[0]


# ----------------------------------------------------------------------------- standard errors


def meta_regression(table, scale, fixed_sd):
    """Posterior mean and sd of tau, and means of the coefficients, by quadrature over tau."""
    x = np.column_stack(
        [np.ones(13), (table.latitude - table.latitude.mean()) / table.latitude.std()]
    )
    y, tau = table.effect.to_numpy(), np.linspace(1e-4, 4, 4000)
    log_p, means = [], []
    for value in tau:
        V = np.diag(table.variance + value**2)
        marginal = V + fixed_sd**2 * x @ x.T
        log_p.append(scipy.stats.multivariate_normal(np.full(13, y.mean()), marginal).logpdf(y))
        precision = x.T @ np.linalg.solve(V, x) + np.eye(2) / fixed_sd**2
        means.append(np.linalg.solve(precision, x.T @ np.linalg.solve(V, y - y.mean())))
    log_p = np.array(log_p) + scipy.stats.t(3, scale=scale).logpdf(tau)
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    mean = p @ tau
    slope = p @ np.array(means)[:, 1] / table.latitude.std()
    return mean, np.sqrt(p @ (tau - mean) ** 2), slope


def test_a_meta_analysis_has_known_standard_errors():
    data = ClusteredData.from_frame(
        BCG, outcome="effect", clusters=["trial"], features=["latitude"], se="se"
    )
    result = fitted(data, "(1 | trial)")
    spread = BCG.effect.std()
    mean, sd, slope = meta_regression(BCG, spread, 2.5 * spread)
    tau, coefficients = component(result, "trial", "sd"), result.fixed_effects().set_index("term")
    assert tau["mean"] == pytest.approx(mean, rel=0.05)
    assert tau["sd"] == pytest.approx(sd, rel=0.1)
    assert coefficients.loc["latitude", "mean"] == pytest.approx(slope, rel=0.03)
    assert "Residual" not in set(result.variance_components().query("statistic == 'sd'").factor)
    assert "known: the standard errors of the rows" in summarize(result.results())


def test_standard_errors_are_checked():
    roles = {"outcome": "effect", "clusters": ["trial"], "features": ["latitude"]}
    with pytest.raises(ValueError, match="standard errors must be above 0"):
        ClusteredData.from_frame(BCG.assign(se=0.0), se="se", **roles)
    with pytest.raises(ValueError, match="not both"):
        ClusteredData.from_frame(BCG, se="se", weights="variance", **roles)
    with pytest.raises(ValueError, match="weights_kind must be"):
        ClusteredData.from_frame(BCG, weights="variance", weights_kind="analytic", **roles)
    data = ClusteredData.from_frame(BCG.assign(effect=1), se="se", **roles)
    with pytest.raises(ValueError, match="'poisson' has no residual variance, which standard err"):
        Facts.of(dataclasses.replace(data, outcome=torch.arange(13.0)), family_named("poisson"), [])


def test_new_rows_need_standard_errors_with_their_outcomes():
    roles = {"outcome": "effect", "clusters": ["trial"], "features": ["latitude"]}
    data = ClusteredData.from_frame(BCG, se="se", **roles)
    model = MixedEffects(linear(1), "(1 | trial)", bayesian_head=True).bind(data)
    without = BCG.drop(columns="se")
    model.encode(ClusteredData.encode(without.drop(columns="effect"), data.schema))
    with pytest.raises(ValueError, match="not the standard errors"):
        model.encode(ClusteredData.encode(without, data.schema))


# ----------------------------------------------------------------------------- weights


def test_precisions_divide_the_residual_variance():
    data, x, y, sd = weighted_rows()
    weighted = dataclasses.replace(data, weights=torch.from_numpy(sd**-2), weights_kind="precision")
    result = fitted(weighted)
    exact = sm.WLS(y, sm.add_constant(x), sd**-2).fit()
    table = result.fixed_effects()
    np.testing.assert_allclose(table["mean"], exact.params, atol=0.1 * exact.bse.min())
    np.testing.assert_allclose(table["sd"], exact.bse, rtol=0.1)
    sigma = component(result, "Residual", "sd")
    assert sigma["mean"] == pytest.approx(np.sqrt(exact.scale), rel=0.06)
    assert "precisions; the residual variance" in summarize(result.results())


def test_the_density_of_a_row_has_its_precision():
    data, _, y, sd = weighted_rows()
    weighted = dataclasses.replace(data, weights=torch.from_numpy(sd**-2), weights_kind="precision")
    model = MixedEffects(linear(1), "(1 | site)").bind(weighted)
    rows = model.encode(weighted).all()
    latents = {
        "residual_sd": torch.tensor([0.5]).double(),
        "site_effect": torch.zeros(4, 1).double(),
    }
    found = model.log_likelihood(rows, latents).detach()
    mean = model.predictor(rows, latents).eta[:, 0].detach().numpy()
    scale = 0.5 * model.data_facts().spread * sd
    np.testing.assert_allclose(found.reshape(-1), scipy.stats.norm.logpdf(y, mean, scale))


def test_a_constant_precision_changes_nothing_but_the_unit_of_the_residual_sd():
    data, *_ = weighted_rows()
    weighted = dataclasses.replace(
        data, weights=torch.full((40,), 4.0).double(), weights_kind="precision"
    )
    plain, precise = (fitted(rows, "(1 | site)") for rows in (data, weighted))
    means = [result.fixed_effects()["mean"] for result in (plain, precise)]
    np.testing.assert_allclose(*means, atol=0.1 * plain.fixed_effects().sd.min())
    sds = [component(result, "Residual", "sd")["mean"] for result in (plain, precise)]
    assert sds[1] == pytest.approx(2 * sds[0], rel=0.05)


def test_weights_far_from_the_number_of_rows_are_said():
    data, *_ = weighted_rows(weights=np.full(40, 15.0))
    with pytest.warns(UserWarning, match="weights sum to 600 for 40 rows"):
        facts = Facts.of(data, family_named("gaussian"), ["site"])
    assert (facts.weights_kind, facts.weights_sum) == ("frequency", 600)
    with pytest.raises(ValueError, match="weights must be above 0"):
        weighted_rows(weights=np.zeros(40), weights_kind="precision")


def test_kinds_of_weights_are_saved(tmp_path):
    data, *_ = weighted_rows(weights=np.full(40, 15.0), weights_kind="precision")
    model = MixedEffects(linear(1), "(1 | site)", bayesian_head=True)
    fit(model, data, schedule=Schedule(steps=5), progress=False, refine=False).save(tmp_path)
    read = Fit.load(tmp_path, linear(1))
    facts = read.model.data_facts()
    assert (facts.weights_kind, facts.weights_sum) == ("precision", 600)
    assert read.data.weights_kind == "precision"
    # Fits that were saved before there were kinds have frequencies.
    read.model.facts = dataclasses.replace(facts, weights_kind=None)
    rows = read.model.encode(data).all()
    assert torch.equal(read.model.frequencies(rows), rows.weights)


# ----------------------------------------------------------------------------- single rows


def poisson_lognormal(n=400, sd=0.54):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(n, 1))
    y = rng.poisson(np.exp(1 + 0.5 * x[:, 0] + rng.normal(0, sd, n)))
    return ClusteredData.from_arrays(x, y, {"obs": np.arange(n)}), x, y


def test_effects_of_single_rows_are_overdispersion():
    data, x, y = poisson_lognormal()
    result = fitted(data, "(1 | obs)", "poisson")
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)

    def minus_log_likelihood(point):
        eta = (point[0] + point[1] * x[:, 0])[:, None] + np.exp(point[2]) * nodes
        density = np.exp(y[:, None] * eta - np.exp(eta) - gammaln(y + 1)[:, None])
        return -np.log(density @ weights / weights.sum()).sum()

    best = minimize(minus_log_likelihood, [1, 0.5, -0.6], method="Nelder-Mead").x
    found = component(result, "obs", "sd")
    assert abs(found["mean"] - np.exp(best[2])) < 0.3 * found["sd"]
    table = result.fixed_effects()
    assert (abs(table["mean"] - best[:2]) < 0.3 * table["sd"]).all()


@pytest.mark.parametrize(
    ("family", "y", "error"),
    [
        ("gaussian", np.arange(8.0), True),
        ("negative_binomial", np.arange(8), False),
        ("bernoulli", np.arange(8) % 2, False),
    ],
)
def test_other_variance_hides_effects_of_single_rows(family, y, error):
    x = np.random.default_rng(0).normal(size=(8, 1))
    data = ClusteredData.from_arrays(x, y, {"obs": np.arange(8)})
    model = MixedEffects(linear(1), "(1 | obs)", family)
    message = "every cluster of 'obs' has one row"
    with pytest.raises(ValueError, match=message) if error else pytest.warns(match=message):
        model.bind(data)


# ----------------------------------------------------------------------------- the rest


def test_an_exposure_that_was_not_logged_is_said():
    n = 20
    x, site = np.random.default_rng(0).normal(size=(n, 1)), np.arange(n) % 4
    table = pd.DataFrame({"y": site, "x": x[:, 0], "site": site, "days": np.linspace(1, 700, n)})
    roles = {"outcome": "y", "clusters": ["site"], "features": ["x"]}
    data = ClusteredData.from_frame(table, offset="days", **roles)
    model = MixedEffects(linear(1), "(1 | site)", "poisson", bayesian_head=True)
    with pytest.warns(UserWarning, match="offset 'days' goes up to 700 .* was not logged"):
        model.bind(data)
    with (
        pytest.warns(UserWarning, match="not logged"),
        pytest.raises(DivergenceError, match=r"offset 'days' \(up to 700"),
    ):
        fit(model, data, progress=False)


def test_the_shape_is_in_the_tables():
    x, site = np.random.default_rng(0).normal(size=(60, 1)), np.arange(60) % 6
    y = np.random.default_rng(1).negative_binomial(2, 0.3, 60)
    data = ClusteredData.from_arrays(x, y, {"site": site})
    model = MixedEffects(linear(1), "(1 | site)", "negative_binomial", bayesian_head=True)
    result = fit(model, data, schedule=Schedule(steps=30), progress=False, refine=False)
    assert component(result, "Residual", "shape")["mean"] > 0
    assert "shape" in summarize(result.results()).split("Variance components")[1]


def test_a_network_in_single_precision_keeps_the_outcome():
    """Without centring in double precision, the outcome was rounded to steps of 0.5."""
    rng = np.random.default_rng(0)
    x, site = rng.normal(size=(200, 1)), np.arange(200) % 10
    y = x[:, 0] + rng.normal(0, 0.5, 10)[site] + rng.normal(0, 0.5, 200)
    results = [
        fitted(ClusteredData.from_arrays(x, y + origin, {"site": site}), "(1 | site)", dtype=dtype)
        for origin, dtype in ((0.0, torch.float64), (6e6, torch.float32))
    ]
    sds = [[component(r, f, "sd")["mean"] for f in ("site", "Residual")] for r in results]
    np.testing.assert_allclose(sds[0], sds[1], rtol=1e-3)
    model = results[1].model
    assert model.network.weight.dtype == torch.float32
    assert model.reference().dtype == torch.float64


def test_single_precision_on_request():
    data, *_ = weighted_rows()
    model = MixedEffects(linear(1), "(1 | site)", bayesian_head=True, dtype=torch.float32).bind(
        data
    )
    assert model.encode(data).y.dtype == torch.float32
    with pytest.raises(ValueError, match="`dtype` must be"):
        MixedEffects(linear(1), dtype=torch.float16)
