"""Accuracy against closed forms, classical estimates and known truths.

The tests marked slow take minutes; ARMED_PYRO_REFERENCE_DATA names a folder with lme4's
sleepstudy.csv (columns Reaction, Days, Subject) for the comparison with lme4.
"""

import os
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from armed_pyro import ClusteredData, Known, MixedEffects, Priors, Schedule, fit


def linear(n_features):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Initializing zero-element")
        return nn.Linear(n_features, 1, dtype=torch.float64)


def encode(frame, features, outcome="y"):
    return ClusteredData.from_frame(frame, outcome=outcome, clusters=["site"], features=features)


def sd_row(result, term, factor="site"):
    table = result.variance_components(draws=4000)
    chosen = table[(table.statistic == "sd") & (table.factor == factor) & (table.term == term)]
    return chosen.iloc[0]


# ----------------------------------------------------------------------------- the closed form


def unbalanced(seed=0):
    """Clusters of 2 to 12 rows."""
    rng = np.random.default_rng(seed)
    site = np.repeat(np.arange(8), rng.integers(2, 13, 8))
    y = 5 + 2.0 * rng.normal(size=8)[site] + 1.5 * rng.normal(size=len(site))
    return pd.DataFrame({"y": y, "site": site})


def exact_posterior(frame, sd, residual_sd, fixed_sd):
    """Mean and covariance of (beta, u) given y: beta ~ N(mean(y), fixed_sd^2), u_k ~ N(0, sd^2)."""
    y, clusters = frame["y"].to_numpy(), frame["site"].nunique()
    design = np.column_stack([np.ones(len(y)), np.eye(clusters)[frame["site"]]])
    prior = np.diag([fixed_sd**-2] + [sd**-2] * clusters)
    covariance = np.linalg.inv(prior + design.T @ design / residual_sd**2)
    start = np.array([y.mean()] + [0.0] * clusters)
    return covariance @ (prior @ start + design.T @ y / residual_sd**2), covariance


@pytest.mark.parametrize("batch_size", [None, 20], ids=["full", "batches"])
def test_random_intercepts_have_their_exact_posterior(batch_size, monkeypatch):
    if batch_size is not None:
        # As a network is trained: a linear program is settled, and takes all rows.
        monkeypatch.setattr("armed_pyro.inference.training_run.trains_network", lambda model: True)
    frame, sd, residual_sd, n = unbalanced(), 2.0, 1.5, 8000
    priors = Priors(sd=Known(sd), residual_sd=Known(residual_sd))
    model = MixedEffects(linear(0), "(1 | site)", priors=priors, bayesian_head=True)
    schedule = Schedule(steps=400, window=100, stages=0, batch_size=batch_size)
    result = fit(model, encode(frame, []), schedule=schedule, progress=False)
    assert result.history.settled == (0 if batch_size is None else None)
    spread = frame["y"].std()
    draws = result.draws(n, seed=1)
    beta = draws["fixed_effect"][:, 0, :].numpy() * spread + frame["y"].mean()
    joint = np.concatenate([beta, draws["site_effect"][..., 0].numpy() * spread], 1)
    mean, covariance = exact_posterior(frame, sd, residual_sd, 2.5 * spread)
    exact_sd = np.sqrt(np.diag(covariance))
    # Monte Carlo error, and a slack for what the last steps leave: less where nothing is noisy.
    slack = 0.05 if batch_size is None else 0.15
    z = (joint.mean(0) - mean) / exact_sd
    assert np.abs(z).max() < 4 / np.sqrt(n) + slack, z
    ratio = joint.std(0) / exact_sd
    assert np.abs(np.log(ratio)).max() < 4 / np.sqrt(2 * n) + slack, ratio
    # beta and u trade off against each other: a guide without that coupling is too narrow.
    exact = covariance[0, 1:] / exact_sd[0] / exact_sd[1:]
    found = np.corrcoef(joint.T)[0, 1:]
    assert np.abs(found - exact).max() < 4 / np.sqrt(n) + 2 * slack


# ------------------------------------------------------------------- linear, against REML and ML


def slopes(n_sites=40, per_site=10, seed=2):
    """y = 1 + 2 x + u0 + u1 x + e with sds 1.0, 0.6 and 0.8, correlation 0.3."""
    rng = np.random.default_rng(seed)
    site = np.repeat(np.arange(n_sites), per_site)
    x = rng.normal(2.0, 1.5, len(site))
    cov = 0.3 * 1.0 * 0.6
    u = rng.multivariate_normal([0, 0], [[1.0, cov], [cov, 0.36]], n_sites)
    y = 1 + 2 * x + u[site, 0] + u[site, 1] * x + 0.8 * rng.normal(size=len(site))
    return pd.DataFrame({"y": y, "x": x, "site": site})


def classical(frame, features, slope=None, reml=True):
    """statsmodels' sds of random intercept, slope and residual."""
    smf = pytest.importorskip("statsmodels.formula.api")
    formula = "y ~ " + (" + ".join(features) or "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = smf.mixedlm(formula, frame, groups="site", re_formula=f"~{slope}" if slope else "1")
        result = model.fit(reml=reml)
    return np.sqrt([*np.diag(result.cov_re), result.scale])


@pytest.fixture(scope="module")
def slope_fit():
    frame = slopes()
    model = MixedEffects(linear(1), "(1 + x | site)", bayesian_head=True)
    schedule = Schedule(steps=700, window=100, stages=0)
    return frame, fit(model, encode(frame, ["x"]), schedule=schedule, progress=False)


@pytest.mark.parametrize(
    ("factor", "term", "truth"),
    [("site", "Intercept", 1.0), ("site", "x", 0.6), ("Residual", "", 0.8)],
)
def test_sds_are_recovered(slope_fit, factor, term, truth):
    row = sd_row(slope_fit[1], term, factor)
    assert abs(row["mean"] - truth) < 2 * row["sd"]
    assert row["sd"] < 0.4 * truth, "the data say more than this"


def test_sds_agree_with_reml(slope_fit):
    frame, result = slope_fit
    medians = [sd_row(result, t, f)["median"] for f, t in [("site", "Intercept"), ("site", "x")]]
    medians.append(sd_row(result, "", "Residual")["median"])
    np.testing.assert_allclose(medians, classical(frame, ["x"], "x"), rtol=0.1)


def test_fixed_effects_agree_with_generalised_least_squares(slope_fit):
    frame, result = slope_fit
    smf = pytest.importorskip("statsmodels.formula.api")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        classic = smf.mixedlm("y ~ x", frame, groups="site", re_formula="~x").fit(reml=True)
    table = result.fixed_effects().set_index("term")
    errors = classic.bse_fe.to_numpy()
    assert (np.abs(table["mean"] - classic.fe_params.to_numpy()) < 0.3 * errors).all()
    np.testing.assert_allclose(table["sd"], errors, rtol=0.2)


@pytest.mark.slow
def test_few_clusters_and_many_fixed_effects_correspond_to_reml():
    """ML takes the fixed effects as known, and so finds too small an sd between clusters."""
    rng = np.random.default_rng(3)
    n_sites, per_site = 8, 6
    site = np.repeat(np.arange(n_sites), per_site)
    frame = pd.DataFrame({"site": site})
    features = ["a", "b", "c"]
    for name in features:
        frame[name] = rng.normal(size=n_sites)[site]
    u = rng.normal(size=n_sites)
    frame["y"] = frame["a"] + 1.5 * u[site] + 0.5 * rng.normal(size=len(site))
    reml, ml = (classical(frame, features, reml=kind)[0] for kind in (True, False))
    assert ml < 0.85 * reml
    # Little prior information: what is left is the likelihood of REML or ML.
    model = MixedEffects(linear(3), "(1 | site)", bayesian_head=True, priors=Priors(fixed_sd=10.0))
    data = encode(frame, features)
    result = fit(model, data, schedule=Schedule(steps=3000, stages=0), progress=False)
    row = sd_row(result, "Intercept")
    assert abs(row["median"] - reml) < abs(row["median"] - ml)
    assert row["median"] > reml * 0.9


# -------------------------------------------------------------------------------------- bernoulli


def test_a_logistic_model_recovers_sd_and_signs():
    rng = np.random.default_rng(5)
    n_sites, truth = 50, 1.2
    site = np.repeat(np.arange(n_sites), 12)
    x = rng.normal(size=(len(site), 2))
    eta = -0.5 + x @ [1.5, -1.0] + truth * rng.normal(size=n_sites)[site]
    frame = pd.DataFrame({"a": x[:, 0], "b": x[:, 1], "site": site})
    frame["y"] = (rng.random(len(site)) < 1 / (1 + np.exp(-eta))).astype(int)
    model = MixedEffects(linear(2), "(1 | site)", "bernoulli", bayesian_head=True)
    schedule = Schedule(steps=500, window=100, stages=0)
    result = fit(model, encode(frame, ["a", "b"]), schedule=schedule, progress=False)
    row = sd_row(result, "Intercept")
    assert abs(row["mean"] - truth) < 3 * row["sd"]
    assert row["sd"] < 0.5
    table = result.fixed_effects().set_index("term")
    assert table.loc["a", "lower"] > 0 > table.loc["b", "upper"]
    assert (np.abs(table["mean"] - [-0.5, 1.5, -1.0]) < 3 * table["sd"]).all()


# ------------------------------------------------------------------------------------------ NUTS


@pytest.mark.slow
def test_the_guide_agrees_with_nuts():
    import pyro
    from pyro.infer import MCMC, NUTS

    frame = slopes(n_sites=12, per_site=6)
    model = MixedEffects(linear(1), "(1 + x | site)", bayesian_head=True)
    schedule = Schedule(steps=2500, stages=0)
    result = fit(model, encode(frame, ["x"]), schedule=schedule, progress=False)
    rows = result.model.encode(result.data).all()
    # 72 rows tell u well enough to sample it directly.
    with torch.random.fork_rng():
        pyro.set_rng_seed(0)
        kernel = NUTS(result.model, target_accept_prob=0.9, max_tree_depth=6)
        mcmc = MCMC(kernel, 500, 300, disable_progbar=True)
        mcmc.run(rows)
    exact, found = mcmc.get_samples(), result.draws(4000)
    effective = {name: one["n_eff"] for name, one in mcmc.diagnostics().items() if "n_eff" in one}
    for name in ("site_sd", "fixed_effect", "residual_sd", "site_effect"):
        one = exact[name].flatten(1) if exact[name].dim() > 1 else exact[name][:, None]
        other = found[name].flatten(1)
        # Fixed and random intercepts mix slowly; what NUTS leaves open is in the error below.
        assert effective[name].min() > 25, name
        error = 4 / effective[name].flatten().clamp(max=500).sqrt()
        z = (other.mean(0) - one.mean(0)) / one.std(0)
        assert (z.abs() < 0.15 + error).all(), (name, z)
        ratio = (other.std(0) / one.std(0)).log()
        assert (ratio.abs() < 0.15 + error).all(), (name, ratio.exp())


# ------------------------------------------------------------------------------------------ lme4


@pytest.mark.slow
@pytest.mark.skipif("ARMED_PYRO_REFERENCE_DATA" not in os.environ, reason="no reference data")
def test_sleepstudy_agrees_with_lme4():
    frame = pd.read_csv(Path(os.environ["ARMED_PYRO_REFERENCE_DATA"]) / "sleepstudy.csv")
    data = ClusteredData.from_frame(
        frame, outcome="Reaction", clusters=["Subject"], features=["Days"]
    )
    model = MixedEffects(linear(1), "(1 + Days | Subject)", bayesian_head=True)
    result = fit(model, data, schedule=Schedule(steps=4000), seed=1, progress=False)
    table = result.variance_components().set_index(["factor", "term", "statistic"])
    for key, value in {
        ("Subject", "Intercept", "sd"): 24.741,
        ("Subject", "Days", "sd"): 5.922,
        ("Subject", "Intercept,Days", "cor"): 0.066,
        ("Residual", "", "sd"): 25.592,
    }.items():
        row = table.loc[key]
        # 18 subjects: the posterior of an sd is skewed, its median above REML's mode.
        assert abs(row["median"] - value) < 0.75 * row["sd"], (key, row["median"])
    fixed = result.fixed_effects().set_index("term")
    for term, value, error in [("Intercept", 251.405, 6.825), ("Days", 10.467, 1.546)]:
        assert abs(fixed.loc[term, "mean"] - value) < 0.3 * fixed.loc[term, "sd"]
        # The posterior allows for the variances being unknown, lme4's standard error does not.
        assert error * 0.95 < fixed.loc[term, "sd"] < error * 1.35
