"""Checks of misfit: each fault is found and named, and right models pass."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from armed_pyro import ClusteredData, MixedEffects, fit
from armed_pyro.checks import score_tests
from armed_pyro.checks.findings import Kind, ratio
from armed_pyro.checks.misfit_checks import misfit_checks
from armed_pyro.checks.predictive_checks import cluster_checks
from armed_pyro.checks.quantile_residuals import QuantileResiduals
from armed_pyro.checks.score_tests import Tested
from armed_pyro.models.linear import linear

MODEL_PARTS = {"warn", "fail"}


def table(clusters=25, rows=10, seed=0):
    rng = np.random.default_rng(seed)
    g = np.repeat(np.arange(clusters), rows)
    x = rng.normal(size=(clusters, rows))
    x = (x - x.mean(1, keepdims=True)).ravel()
    eta = 0.5 + 0.7 * x + 0.8 * rng.normal(size=clusters)[g]
    return rng, pd.DataFrame({"x": x, "g": g, "eta": eta})


def fitted(frame, family="gaussian", random="(1 | g)", features=("x",), clusters=("g",)):
    data = ClusteredData.from_frame(
        frame, outcome="y", clusters=list(clusters), features=list(features)
    )
    model = MixedEffects(linear(data.n_features), random, family, bayesian_head=True)
    return fit(model, data, progress=False)


def judged(result):
    posterior = result.posterior
    checks = list(misfit_checks(posterior, posterior.draws(100)))
    return {check.name: check for check in checks}


def misfits(checks):
    return {name for name, check in checks.items() if check.verdict in MODEL_PARTS}


# ---------------------------------------------------------------------------------- score tests


def normal(n=400, draws=20, seed=0):
    rng = np.random.default_rng(seed)
    # The draws of a fit share most of their noise.
    return rng, 0.95 * rng.normal(size=(n, 1)) + np.sqrt(1 - 0.95**2) * rng.normal(size=(n, draws))


@pytest.mark.slow
def test_score_tests_of_right_residuals_are_uniform():
    p = {name: [] for name in ("curve", "spread", "clusters", "lag")}
    codes = np.repeat(np.arange(40), 10)
    for seed in range(1000):
        rng, z = normal(seed=seed, draws=1)
        z /= 0.95**2 + (1 - 0.95**2)
        x = rng.normal(size=400)
        basis = score_tests.curve_basis(x)
        p["curve"].append(score_tests.curve("x", z, basis).p)
        p["spread"].append(score_tests.curve("x", score_tests.spread_scores(z), basis).p)
        p["clusters"].append(score_tests.between_clusters("x", z, x, codes).p)
        p["lag"].append(score_tests.lag_one("x", z, codes, np.arange(400.0)).p)
    for name, values in p.items():
        assert stats.kstest(values, "uniform").pvalue > 0.01, name


@pytest.mark.slow
@pytest.mark.parametrize("by_cluster", [False, True])
def test_a_spread_is_not_taken_for_slopes(by_cluster):
    codes = np.repeat(np.arange(25), 10)
    p = []
    for seed in range(1000):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=250)
        log_sd = 0.6 * rng.normal(size=25)[codes] if by_cluster else 0.8 * x
        z = rng.normal(size=(250, 1)) * np.exp(log_sd)[:, None]
        p.append(score_tests.between_clusters("x", z / np.sqrt((z**2).mean()), x, codes).p)
    # Shrunken variances of clusters allow a little more than the level. With squares, 64% of the
    # p-values of the first of these designs are below 0.001.
    assert (np.array(p) < 0.01).sum() <= 30
    assert (np.array(p) < 0.001).sum() <= 5


def test_effects_of_known_size_are_estimated():
    rng, z = normal(n=4000)
    x, codes = rng.normal(size=4000), np.repeat(np.arange(200), 20)
    basis = score_tests.curve_basis(x)
    square = (x**2 - 1) / np.sqrt(2)
    curve = score_tests.curve("x", z + 0.5 * square[:, None], basis)
    assert curve.effect == pytest.approx(0.5, abs=0.08)
    slopes = 0.4 * rng.normal(size=200)[codes] * x
    tested = score_tests.between_clusters("x", z + slopes[:, None], x, codes)
    assert tested.effect == pytest.approx(0.4, abs=0.06)
    spread = score_tests.spread_scores(z * np.exp(0.3 * x[:, None]))
    log_sd = score_tests.curve("x", spread, basis).effect / score_tests.SPREAD_PER_LOG_SD
    assert log_sd == pytest.approx(0.3, abs=0.05)
    series = z.copy()
    for i in range(1, 4000):
        series[i] = 0.5 * series[i - 1] + np.sqrt(0.75) * z[i]
    found = score_tests.lag_one("x", series, codes, np.arange(4000.0))
    assert found.effect == pytest.approx(0.5, abs=0.05)


def test_spread_scores_are_standard_normal():
    _, z = normal(n=20_000, draws=1)
    scores = score_tests.spread_scores(z / z.std())
    assert stats.kstest(scores[:, 0], "norm").pvalue > 0.01
    assert np.isfinite(score_tests.spread_scores(np.array([[0.0, 8.0, -8.0, 1e-300]]))).all()


def test_few_distinct_values_give_few_columns():
    assert score_tests.curve_basis(np.ones(50)).shape == (50, 0)
    assert score_tests.curve_basis(np.arange(50) % 2.0).shape == (50, 1)
    assert score_tests.curve_basis(np.arange(50) % 3.0).shape == (50, 2)
    basis = score_tests.curve_basis(np.linspace(1e6, 1e6 + 1, 200))
    np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-8)
    np.testing.assert_allclose(basis.sum(0), 0, atol=1e-6)


def test_removed_slopes_and_curves_leave_nothing():
    rng, z = normal()
    x, codes = rng.normal(size=400), np.repeat(np.arange(40), 10)
    left = score_tests.without_slopes(z + (rng.normal(size=40)[codes] * x)[:, None], x, codes)
    assert np.abs(np.bincount(codes, x * left[:, 0])).max() < 1e-10
    basis = np.column_stack([x, 2 * x, x**2])
    left = score_tests.without_curve(z + 3 * x[:, None], basis)
    assert np.abs(basis.T @ left).max() < 1e-9


def test_a_misfit_needs_an_effect_that_matters_and_a_small_p():
    kind = Kind("slopes", "sd", 0.2, 0.5)

    def verdict(effect, p, kind=kind):
        return kind.judge([Tested("x", effect, p)], "none", "{}", lambda test: "add it").verdict

    assert [verdict(0.1, 1e-9), verdict(0.3, 0.01), verdict(0.3, 1e-9), verdict(0.6, 1e-9)] == [
        "pass",
        "pass",
        "warn",
        "fail",
    ]
    variances = Kind("dispersion", "ratio", 1.2, 2.0, ratio)
    assert verdict(0.4, 1e-9, variances) == verdict(2.5, 1e-9, variances) == "fail"
    assert verdict(1.1, 1e-9, variances) == "pass"
    with pytest.raises(ValueError, match="not finite"):
        verdict(np.nan, 0.5)
    many = [Tested(str(k), 0.3, 5e-4) for k in range(10)]
    assert kind.judge(many, "none", "{}", lambda test: "").verdict == "pass"


# ------------------------------------------------------------------------------------ residuals


@pytest.mark.parametrize("family", ["gaussian", "poisson", "negative_binomial", "binomial"])
def test_residuals_of_right_models_are_standard_normal(family):
    rng, frame = table(seed=3)
    outcome = {
        "gaussian": lambda eta: rng.normal(eta),
        "poisson": lambda eta: rng.poisson(np.exp(eta)),
        "negative_binomial": lambda eta: rng.negative_binomial(2, 2 / (2 + np.exp(eta))),
        "binomial": lambda eta: rng.binomial(8, 1 / (1 + np.exp(-eta))),
    }
    frame["y"] = outcome[family](frame.eta.to_numpy()).astype(float)
    more = {"trials": "n"} if family == "binomial" else {}
    data = ClusteredData.from_frame(
        frame.assign(n=8), outcome="y", clusters=["g"], features=["x"], **more
    )
    model = MixedEffects(linear(1), "(1 | g)", family, bayesian_head=True)
    posterior = fit(model, data, progress=False).posterior
    residuals = QuantileResiduals.of(posterior, posterior.draws(100))
    assert residuals.z.shape == (250, 40)
    p = [stats.kstest(z, "norm").pvalue for z in residuals.z.T]
    assert np.median(p) > 0.01
    assert residuals.mean[0].slope.shape == (250,)
    np.testing.assert_array_equal(residuals.codes["g"], frame.g)
    if family != "gaussian":
        assert residuals.dispersion == pytest.approx(1, abs=0.25)
        share = (frame.y == 0).sum() / residuals.zeros.sum(0).mean()
        assert share == pytest.approx(1, abs=0.4)


def test_rows_without_weight_are_not_checked():
    rng, frame = table()
    frame["y"] = rng.normal(frame.eta)
    frame["w"] = (np.arange(250) % 5 > 0).astype(float)
    frame.loc[frame.w == 0, "y"] += 50
    data = ClusteredData.from_frame(frame, outcome="y", clusters=["g"], features=["x"], weights="w")
    model = MixedEffects(linear(1), "(1 | g)", bayesian_head=True)
    posterior = fit(model, data, progress=False).posterior
    residuals = QuantileResiduals.of(posterior, posterior.draws(50))
    assert len(residuals.index) == 200
    assert np.abs(residuals.z).max() < 6


def test_frequencies_count_as_that_many_rows():
    rng, frame = table()
    frame = frame.assign(y=rng.poisson(np.exp(frame.eta)).astype(float), w=rng.integers(0, 4, 250))

    def posterior(frame, **weights):
        data = ClusteredData.from_frame(
            frame, outcome="y", clusters=["g"], features=["x"], **weights
        )
        model = MixedEffects(linear(1), "(1 | g)", "poisson", bayesian_head=True)
        return fit(model, data, progress=False).posterior

    weighted = posterior(frame, weights="w")
    repeated = posterior(frame.loc[frame.index.repeat(frame.w)])
    left = [QuantileResiduals.of(p, p.draws(50)) for p in (weighted, repeated)]
    np.testing.assert_array_equal(left[0].index, np.repeat(np.arange(250), frame.w))
    np.testing.assert_array_equal(left[0].outcome, left[1].outcome)
    np.testing.assert_allclose(left[0].dispersion, left[1].dispersion, rtol=0.05)
    np.testing.assert_array_equal(np.diff(left[0].index[left[0].first]) > 0, True)
    clusters = [cluster_checks(p, "g", p.draws(100)) for p in (weighted, repeated)]
    for column in ("rows", "mean", "zeros"):
        np.testing.assert_allclose(clusters[0].table[column], clusters[1].table[column])
    p_values = [c.overall["mean"][0] for c in clusters]
    assert p_values[0] == pytest.approx(p_values[1], abs=0.15)


# --------------------------------------------------------------------------------------- faults


def test_a_right_model_has_no_misfit():
    rng, frame = table(seed=1)
    checks = judged(fitted(frame.assign(y=rng.normal(frame.eta))))
    assert misfits(checks) == set()
    assert {
        "non-linearity",
        "left-out slopes",
        "spread",
        "spread by cluster",
        "autocorrelation",
        "skewness",
        "tails",
        "outlying clusters",
        "outlying rows",
        "influence of clusters",
        "influence of rows",
    } <= set(checks)
    assert not any(check.advice for check in checks.values())


def test_a_left_out_slope_is_named():
    rng, frame = table()
    slopes = rng.normal(size=25)[frame.g] * frame.x
    checks = judged(fitted(frame.assign(y=rng.normal(frame.eta + slopes))))
    assert misfits(checks) == {"left-out slopes"}
    assert checks["left-out slopes"].advice == "add (0 + x | g)"
    assert 0.4 < checks["left-out slopes"].effect < 0.9
    with_slope = judged(fitted(frame.assign(y=rng.normal(frame.eta + slopes)), random="(x | g)"))
    assert misfits(with_slope) == set()
    assert "left-out slopes" not in with_slope


def test_a_left_out_square_is_named():
    rng, frame = table()
    checks = judged(fitted(frame.assign(y=rng.normal(frame.eta + 2 * frame.x**2))))
    assert misfits(checks) == {"non-linearity"}
    assert "I(x**2)" in checks["non-linearity"].advice


def test_a_spread_that_depends_on_x_is_named():
    rng, frame = table()
    y = frame.eta + np.exp(0.8 * frame.x) * rng.normal(size=250)
    checks = judged(fitted(frame.assign(y=y)))
    assert "spread" in misfits(checks)
    assert "a residual sd that depends on x" in checks["spread"].advice
    assert not misfits(checks) & {"non-linearity", "tails", "autocorrelation"}


def test_a_spread_that_differs_between_clusters_is_named():
    rng, frame = table()
    sd = np.exp(0.8 * rng.normal(size=25))[frame.g]
    checks = judged(fitted(frame.assign(y=frame.eta + sd * rng.normal(size=250))))
    assert "clusters of g" in checks["spread by cluster"].advice


def test_autocorrelation_is_found_in_the_order_of_rows_or_of_time():
    rng, frame = table()
    errors = rng.normal(size=(25, 10))
    for t in range(1, 10):
        errors[:, t] = 0.8 * errors[:, t - 1] + 0.6 * errors[:, t]
    frame = frame.assign(y=frame.eta + errors.ravel(), week=np.tile(np.arange(10.0), 25))
    checks = judged(fitted(frame))
    assert misfits(checks) == {"autocorrelation"}
    assert "AR(1)" in checks["autocorrelation"].advice
    shuffled = frame.sample(frac=1, random_state=0).reset_index(drop=True)
    assert "autocorrelation" not in misfits(judged(fitted(shuffled)))
    checks = judged(fitted(shuffled, features=("x", "week")))
    assert "week within g" in checks["autocorrelation"].reason


def test_overdispersion_and_zeros_are_told_apart():
    rng, frame = table()
    mean = np.exp(frame.eta + 1)
    overdispersed = rng.negative_binomial(2, 2 / (2 + mean)).astype(float)
    checks = judged(fitted(frame.assign(y=overdispersed), "poisson"))
    assert "negative_binomial" in checks["dispersion"].advice
    assert checks["dispersion"].effect > 1.5
    assert checks["zeros"].verdict == "pass"
    assert checks["spread"].verdict == "not checked"
    inflated = np.where(rng.random(250) < 0.35, 0, rng.poisson(mean)).astype(float)
    checks = judged(fitted(frame.assign(y=inflated), "poisson"))
    assert {"dispersion", "zeros"} <= misfits(checks)
    assert "hurdle" in checks["zeros"].advice


def test_heavy_tails_and_an_outlying_row_are_named():
    rng, frame = table(clusters=40)
    y = frame.eta + rng.standard_t(2, size=400)
    assert "family student" in judged(fitted(frame.assign(y=y)))["tails"].advice
    y = rng.normal(frame.eta)
    y[17] += 9
    checks = judged(fitted(frame.assign(y=y)))
    assert checks["outlying rows"].verdict == "warn"
    assert "17" in checks["outlying rows"].reason


def test_an_outlying_cluster_is_named():
    rng, frame = table(clusters=40)
    y = rng.normal(frame.eta) + 9 * (frame.g == 7)
    checks = judged(fitted(frame.assign(y=y)))
    assert checks["outlying clusters"].verdict in MODEL_PARTS
    assert "7 (g)" in checks["outlying clusters"].reason


def test_a_factor_of_the_data_without_random_effects_is_named():
    rng, frame = table()
    frame["h"] = rng.integers(12, size=250)
    frame["y"] = rng.normal(frame.eta + rng.normal(size=12)[frame.h])
    checks = judged(fitted(frame, clusters=("g", "h")))
    assert checks["left-out factors"].advice == "add (1 | h)"
    assert checks["left-out factors"].verdict in MODEL_PARTS


def test_an_effect_of_the_clusters_means_is_named():
    rng, frame = table(clusters=40)
    between = rng.normal(size=40)
    x = frame.x + between[frame.g]
    y = rng.normal(0.7 * frame.x - 1.5 * between[frame.g] + 0.3 * rng.normal(size=40)[frame.g])
    checks = judged(fitted(frame.assign(x=x, y=y)))
    assert checks["cluster means"].verdict in MODEL_PARTS
    assert checks["cluster means"].advice.startswith("write between(x | g) beside x")


@pytest.mark.parametrize("fault", ["slope", "square", "none"])
def test_single_trials_are_checked_by_their_scores(fault):
    rng, frame = table(clusters=60, rows=20)
    more = {"slope": 1.5 * rng.normal(size=60)[frame.g] * frame.x, "square": 1.5 * frame.x**2}
    eta = frame.eta + more.get(fault, 0)
    frame["y"] = rng.binomial(1, 1 / (1 + np.exp(-eta))).astype(float)
    checks = judged(fitted(frame, "bernoulli"))
    # A left-out slope also bends the mean of the probabilities.
    expected = {"slope": {"left-out slopes"}, "square": {"non-linearity"}, "none": set()}
    assert expected[fault] <= misfits(checks) <= expected[fault] | {"non-linearity"}
    assert fault != "none" or misfits(checks) == set()
    assert "any probability fits single trials" in checks["residuals"].reason
    assert "spread" not in checks


@pytest.mark.slow
@pytest.mark.parametrize("left_out", [False, True])
def test_classes_are_checked_by_their_scores(left_out):
    rng, frame = table(clusters=60, rows=20)
    logits = np.column_stack([0 * frame.eta, frame.eta, -frame.eta + 0.5])
    if left_out:
        logits[:, 1] += 2 * rng.normal(size=60)[frame.g] * frame.x
    frame["y"] = np.array(["a", "b", "c"])[(logits + rng.gumbel(size=(1200, 3))).argmax(1)]
    data = ClusteredData.from_frame(frame, outcome="y", clusters=["g"], features=["x"])
    model = MixedEffects(linear(1, 3), "(1 | g)", "categorical", bayesian_head=True)
    checks = judged(fit(model, data, progress=False))
    assert ("left-out slopes" in misfits(checks)) is left_out
    if left_out:
        assert "x by g (class b)" in checks["left-out slopes"].reason
        assert checks["left-out slopes"].advice.startswith("add (0 + x | g)")
    else:
        assert misfits(checks) == set()


def test_few_rows_are_not_tested():
    rng, frame = table(clusters=5, rows=3)
    checks = judged(fitted(frame.assign(y=rng.normal(frame.eta))))
    assert set(checks) == {"residuals", "misfit"}
    assert checks["misfit"].verdict == "not checked"


def test_rows_sorted_by_outcome_are_not_autocorrelated():
    rng, frame = table()
    frame["y"] = rng.normal(frame.eta)
    checks = judged(fitted(frame.sort_values(["g", "y"])))
    assert checks["autocorrelation"].verdict == "not checked"


def test_an_influential_row_is_named_with_the_shift_of_a_fit_without_it():
    rng, frame = table(clusters=8, rows=6, seed=3)
    frame = frame.assign(y=rng.normal(frame.eta))
    frame.loc[17, ["x", "y"]] = [6.0, frame.eta.mean() - 4.0]
    whole, without = fitted(frame), fitted(frame.drop(index=17))
    posterior = whole.posterior
    checks = list(misfit_checks(posterior, posterior.draws(1000)))
    (check,) = (one for one in checks if one.name == "influence of rows")
    assert check.verdict != "pass"
    assert "without row 17, a fixed effect" in check.reason
    one, other = (result.fixed_effects().set_index("term").loc["x"] for result in (whole, without))
    # Weights that move a posterior by several sds are the smoothed weights of few draws.
    assert check.effect < abs(other["mean"] - one["mean"]) / one["sd"] + 0.5
    assert check.effect > 1.5


def test_predictions_that_are_not_finite_fail():
    rng, frame = table()
    result = fitted(frame.assign(y=rng.normal(frame.eta)))
    latents = result.posterior.draws(20)
    latents["fixed_effect"] = latents["fixed_effect"] * np.nan
    with pytest.raises(ValueError, match="not finite"):
        list(misfit_checks(result.posterior, latents))
