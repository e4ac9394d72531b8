"""The names that people try on a fit: coefficients, random effects, residuals, loo, compare."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import nn

from armed_pyro import ClusteredData, Known, MixedEffects, Priors, Schedule, compare, fit
from armed_pyro.families.simulate import mixed_model

SHORT = Schedule(steps=4, window=2, stages=0)


def run(family, *, schedule=SHORT, random="(1 + x0 | site)", seed=0, **options):
    data, truth = mixed_model(
        family, 12, 20, sd=[0.7, 0.3], coefficients=[0.3, 0.5], dispersion=0.8, seed=seed
    )
    model = MixedEffects(nn.Linear(1, 1), random, family, bayesian_head=True, **options)
    return fit(model, data, schedule=schedule, progress=False), truth


@pytest.fixture(scope="module")
def gaussian():
    return run("gaussian", schedule=Schedule(steps=150))[0]


@pytest.fixture(scope="module")
def poisson():
    return run("poisson", schedule=Schedule(steps=150))[0]


def test_coefficients_and_intervals(gaussian):
    table = gaussian.fixed_effects(draws=500).set_index("term")
    pd.testing.assert_series_equal(
        gaussian.coef(draws=500), table["mean"], check_names=False, check_exact=True
    )
    intervals = gaussian.confint(prob=0.8, draws=500)
    names = ["Intercept", "x0", "site_sd[Intercept]", "site_sd[x0]", "site_cor[Intercept,x0]"]
    assert intervals.index.tolist() == [*names, "residual_sd"]
    wanted = gaussian.fixed_effects(draws=500, prob=0.8).set_index("term")
    np.testing.assert_allclose(
        intervals.loc["x0"], wanted.loc["x0", ["lower", "upper"]].astype(float), rtol=1e-6
    )
    found = gaussian.hypothesis("x0 - 0.5 > 0", draws=500)
    assert 0 < found.probability < 1
    ratio = gaussian.hypothesis("site_sd[Intercept] / residual_sd", draws=500)
    assert ratio.draws.min() > 0
    with pytest.raises(ValueError, match=r"residual_sd"):
        gaussian.hypothesis("sigma > 1")


def test_random_effects_have_conditional_sds(gaussian):
    """With known variances and coefficients integrated out, the sd is that of the closed form."""
    data, _ = mixed_model("gaussian", 10, 8, sd=[1.0], coefficients=[0.0, 0.0], seed=1)
    priors = Priors(sd=Known(1.0), residual_sd=Known(1.0))
    model = MixedEffects(nn.Linear(1, 1), "(1 | site)", priors=priors)  # a point estimate of beta
    result = fit(model, data, schedule=SHORT, progress=False)
    table = result.random_effects(draws=4000)
    assert list(table) == ["factor", "term", "cluster", "mean", "sd", "lower", "upper"]
    exact = 1 / np.sqrt(1 + 8)
    np.testing.assert_allclose(table["sd"], exact, rtol=4 / np.sqrt(2 * 4000))


def test_fitted_values_and_residuals(gaussian):
    predicted = gaussian.predict(gaussian.data, draws=300)
    fitted = gaussian.fitted(draws=300)
    np.testing.assert_allclose(fitted, predicted.mean, rtol=1e-6)
    y = gaussian.data.outcome.numpy()
    response = gaussian.residuals(draws=300)
    np.testing.assert_allclose(response, y - fitted, rtol=1e-6, atol=1e-8)
    sd = gaussian.draws(300)["residual_sd"].numpy() * gaussian.model.facts.spread
    pearson = gaussian.residuals("pearson", draws=300)
    np.testing.assert_allclose(pearson, response / np.sqrt((sd**2).mean()), rtol=1e-5, atol=1e-7)
    expected = np.mean(
        [stats.norm.cdf(y, m, s) for m, s in zip(predicted.expected, sd[:, 0], strict=True)],
        axis=0,
    )
    drawn = gaussian.residuals("quantile", draws=300)
    assert drawn.index.equals(gaussian.data.row_labels)
    np.testing.assert_allclose(stats.norm.cdf(drawn), expected, atol=0.06)


def test_quantile_residuals_of_counts_are_normal(poisson):
    """At the true program they are nearly standard normal: fitted to 240 rows, slightly less."""
    z = poisson.residuals("quantile")
    assert stats.kstest(z, "norm").pvalue > 0.01
    assert 0.85 < z.std() < 1.1
    mean = poisson.fitted()
    pearson = poisson.residuals("pearson")
    wanted = (poisson.data.outcome.numpy() - mean) / np.sqrt(mean)
    np.testing.assert_allclose(pearson, wanted, rtol=1e-6)


def test_residuals_that_do_not_exist():
    result, _ = run("bernoulli")
    assert result.residuals("pearson").abs().max() < 20
    with pytest.raises(ValueError, match="any probability fits single trials"):
        result.residuals("quantile")
    with pytest.raises(ValueError, match="kind of residuals"):
        result.residuals("deviance")
    classes, _ = mixed_model("categorical", 6, 10, sd=[0.5], coefficients=np.zeros((2, 2)))
    model = MixedEffects(nn.Linear(1, 3), "(1 | site)", "categorical", bayesian_head=True)
    result = fit(model, classes, schedule=SHORT, progress=False)
    np.testing.assert_allclose(result.fitted(draws=20).sum(axis=1), 1, rtol=1e-6)
    with pytest.raises(ValueError, match="several classes"):
        result.residuals()


def test_predictive_intervals(gaussian):
    expected = gaussian.predict(gaussian.data, draws=500).to_frame()
    outcome = gaussian.predict(gaussian.data, draws=500, interval="outcome").to_frame()
    np.testing.assert_allclose(expected["mean"], outcome["mean"])
    assert (outcome["sd"] > expected["sd"]).all()
    y = gaussian.data.outcome.numpy()
    covered = ((outcome["lower"] < y) & (y < outcome["upper"])).mean()
    assert 0.84 < covered < 0.97  # 90% intervals, 240 rows
    with pytest.raises(ValueError, match="interval="):
        gaussian.predict(gaussian.data, interval="prediction")


def test_leave_one_out_and_comparison(gaussian):
    loo = gaussian.loo()
    assert float(loo.elpd) == pytest.approx(gaussian.diagnostics().figures["elpd_loo"], abs=0.5)
    assert loo.elpd_i.size == gaussian.data.n_rows
    smaller = fit(
        MixedEffects(nn.Linear(1, 1), "(1 | site)", bayesian_head=True),
        gaussian.data,
        schedule=Schedule(steps=150),
        progress=False,
    )
    table = compare(gaussian, smaller, names=["slopes", "intercepts"])
    assert set(table.index) == {"slopes", "intercepts"}
    assert table.loc["slopes", "rank"] == 0
    pd.testing.assert_frame_equal(table, gaussian.compare(smaller, names=["slopes", "intercepts"]))
    with pytest.raises(ValueError, match="at least two"):
        compare(gaussian)
    with pytest.raises(ValueError, match="distinct names"):
        compare(gaussian, smaller, names=["a", "a"])
    with pytest.raises(ValueError, match="different outcomes"):
        compare(gaussian, run("poisson")[0])


def test_a_program_without_latent_sites_cannot_leave_rows_out():
    data, _ = mixed_model("bernoulli", 4, 10)
    torch.manual_seed(0)
    result = fit(
        MixedEffects(nn.Linear(1, 1), (), "bernoulli"), data, schedule=SHORT, progress=False
    )
    with pytest.raises(ValueError, match="no latent site"):
        result.loo()


def test_ratios_of_coefficients():
    result, _ = run("bernoulli")
    table = result.fixed_effects(exponentiate=True, draws=400)
    log = result.fixed_effects(draws=401).set_index("term")  # odd: the median is a draw
    odd = result.fixed_effects(exponentiate=True, draws=401).set_index("term")
    np.testing.assert_allclose(odd["median"], np.exp(log["median"]), rtol=1e-6)
    assert table.attrs["quantity"] == "odds ratio"
    assert result.fixed_effects().attrs["quantity"] == "coefficient"


def test_fits_are_short_in_a_notebook(gaussian):
    text = repr(gaussian)
    assert len(text) < 300
    for part in ("y (gaussian)", "(1 + x0 | site)", "240 rows", "12 of site", "converged"):
        assert part in text
    html = gaussian._repr_html_()
    assert "Fixed effects" in html
    assert html.count("<table") == 2


def test_names_from_the_data_are_escaped_in_notebooks():
    bad = "<script>alert(1)</script>"
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({bad: rng.normal(size=40), "y": rng.normal(size=40), "g": range(40)})
    frame["g"] %= 5
    data = ClusteredData.from_frame(frame, outcome="y", clusters=["g"], features=[bad])
    model = MixedEffects(nn.Linear(1, 1), "(1 | g)", bayesian_head=True)
    result = fit(model, data, schedule=SHORT, progress=False)
    shown = result._repr_html_() + result.comparisons(bad, draws=10)._repr_html_()
    assert "<script>" not in shown
