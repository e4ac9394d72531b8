"""Verdicts: healthy fits pass, fits that cannot be trusted do not, and say why."""

import json

import numpy as np
import pandas as pd
import pytest

from armed_pyro import ClusteredData, Fit, MixedEffects, Schedule, fit
from armed_pyro.checks.diagnostics import Diagnostics
from armed_pyro.checks.inference_checks import Check, k_hat_threshold
from armed_pyro.checks.predictive_checks import cluster_checks
from armed_pyro.models.dense import dense
from armed_pyro.models.linear import linear


def simulate(outcome, clusters=20, rows=10, effects=None, seed=0, **more):
    rng = np.random.default_rng(seed)
    site = np.repeat(np.arange(clusters), rows)
    x = rng.normal(size=(len(site), 1))
    u = rng.normal(size=clusters) if effects is None else effects(rng, clusters)
    y = outcome(rng, 0.3 + 0.7 * x[:, 0] + u[site], x)
    return ClusteredData.from_arrays(x, y, {"site": site}, **more)


def gaussian(rng, eta, x):
    return eta + rng.normal(size=len(eta))


def bernoulli(rng, eta, x):
    return (rng.random(len(eta)) < 1 / (1 + np.exp(-eta))).astype(float)


def poisson(rng, eta, x):
    return rng.poisson(np.exp(eta)).astype(float)


def diagnosed(data, family, **settings):
    model = MixedEffects(linear(1), "(1 | site)", family, bayesian_head=True)
    result = fit(model, data, progress=False, **settings)
    return result, result.diagnostics()


def named(found, start):
    return [check for check in found.checks if check.name.startswith(start)]


@pytest.mark.parametrize(
    ("family", "outcome"), [("gaussian", gaussian), ("bernoulli", bernoulli), ("poisson", poisson)]
)
def test_healthy_fits_pass(family, outcome):
    _, found = diagnosed(simulate(outcome, clusters=30, seed=1), family)
    assert found.verdict == "pass", found
    assert found.reasons == ()
    names = {check.name.partition(" ")[0] for check in found.checks}
    assert {
        "training",
        "iterates",
        "k-hat",
        "clusters",
        "prior",
        "predictive",
        "normality",
    } <= names
    assert not any(check.advice for check in found.checks)


def test_two_clusters_fail():
    _, found = diagnosed(simulate(gaussian, clusters=2, rows=30), "gaussian")
    assert found.verdict == "fail"
    (check,) = named(found, "clusters of site")
    assert (check.verdict, check.value) == ("fail", 2.0)


def test_far_too_few_steps_are_said():
    result, found = diagnosed(simulate(gaussian), "gaussian", schedule=Schedule(steps=5))
    assert result.stopped == "steps"
    assert found.verdict in ("warn", "fail")
    assert any("ran out" in reason for reason in found.reasons)


def test_a_network_stopped_in_training_fails():
    model = MixedEffects(dense(1, hidden=(8,)), "(1 | site)")
    result = fit(model, simulate(gaussian), schedule=Schedule(steps=20), progress=False)
    (check,) = named(result.diagnostics(), "training")
    assert check.verdict == "fail"
    assert "before the guide was settled" in check.reason


def test_separation_leaves_the_coefficient_to_its_prior():
    _, found = diagnosed(simulate(lambda rng, eta, x: (x[:, 0] > 0).astype(float)), "bernoulli")
    (check,) = named(found, "prior sensitivity")
    assert check.verdict == "warn"
    assert "fixed_effect[x0]" in check.reason


def test_a_wrong_family_fails():
    def overdispersed(rng, eta, x):
        return rng.poisson(np.exp(eta + rng.normal(size=len(eta)))).astype(float)

    _, found = diagnosed(simulate(overdispersed, clusters=40), "poisson")
    assert found.verdict == "fail"
    assert named(found, "predictive sd")[0].verdict == "fail"
    assert named(found, "residuals")[0].verdict == "fail"
    _, found = diagnosed(simulate(poisson, clusters=40), "gaussian")
    assert found.verdict == "fail"


def test_two_groups_of_clusters_are_seen():
    def bimodal(rng, clusters):
        return rng.choice([-2.0, 2.0], clusters) + 0.3 * rng.normal(size=clusters)

    _, found = diagnosed(simulate(gaussian, clusters=40, effects=bimodal), "gaussian")
    (check,) = named(found, "normality")
    assert check.verdict in ("warn", "fail")
    assert "histogram" in check.advice


def test_an_sd_that_cannot_be_told_from_zero_is_named():
    nothing = simulate(gaussian, clusters=30, effects=lambda rng, n: np.zeros(n))
    _, found = diagnosed(nothing, "gaussian")
    (check,) = named(found, "boundary of site[Intercept]")
    assert check.verdict == "warn"


def test_nuts_draws_are_judged_by_their_chains():
    result, _ = diagnosed(simulate(gaussian, clusters=8, rows=5), "gaussian")
    found = result.refine("nuts", draws=16, chains=2, warmup=6, progress=False).diagnostics()
    (check,) = named(found, "NUTS")
    assert check.verdict != "pass"
    assert "R-hat" in check.reason
    assert not named(found, "k-hat")


def test_a_guide_that_is_off_is_said_where_it_is_not_corrected():
    from dataclasses import replace

    import torch

    result, _ = diagnosed(simulate(gaussian), "gaussian")
    raw = Fit(replace(result.posterior, refined=None, importance=None))
    (check,) = named(raw.diagnostics(), "guide")
    assert check.verdict == "pass"
    with torch.no_grad():
        raw.guide.hyperparameters.shift.add_(0.7)
    (check,) = named(Fit(raw.posterior).diagnostics(), "guide")
    assert check.verdict == "warn"
    assert "refine" in check.advice


def test_tables_and_json():
    data = simulate(gaussian, clusters=10, rows=5)
    _, found = diagnosed(data, "gaussian")
    table = found.to_frame()
    assert list(table.columns) == ["name", "verdict", "value", "threshold", "reason", "advice"]
    assert len(table) == len(found.checks)
    clusters = found.clusters
    assert clusters["cluster"].tolist() == list(range(10))
    assert clusters["rows"].tolist() == [5] * 10
    means = data.outcome.numpy().reshape(10, 5).mean(1)
    np.testing.assert_allclose(clusters["mean"], means)
    assert clusters["mean_p"].between(0, 1).all()
    assert np.isfinite(clusters["elpd"]).all()
    loaded = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert loaded["verdict"] == found.verdict
    figures = loaded["figures"]
    assert figures["elpd_loco"] == pytest.approx(clusters["elpd"].sum())
    assert figures["effective_clusters[site]"] == pytest.approx(10)
    # The rows of a left-out cluster are predicted without it: a lower density than with it.
    assert figures["elpd_loco"] < figures["elpd_loo"] + 3 * figures["elpd_loo_se"]


def test_leaving_a_cluster_out_is_what_fitting_without_it_gives():
    """elpd_loco of one cluster against the marginal density under a fit to the others."""
    data = simulate(gaussian, clusters=8, rows=5, seed=4)
    result, found = diagnosed(data, "gaussian")
    without = data.take(np.flatnonzero(data.grouping("site").codes.numpy() != 0))
    facts = result.model.data_facts()
    # Same scales and priors, so that only the data differ.
    from armed_pyro.inference.train import train

    model = MixedEffects(linear(1), "(1 | site)", "gaussian", bayesian_head=True)
    other = train(model.bind(data), without, progress=False)
    draws = other.draws(4000)
    beta = draws["fixed_effect"][:, 0]
    rows = result.model.encode(data).all()
    mine = rows.memberships["site"].position == 0
    x = np.column_stack([np.ones(5), rows.x[mine].numpy()])
    mean = facts.center[0] + facts.spread * beta.numpy() @ x.T
    sd, noise = draws["site_sd"][:, 0, 0].numpy(), draws["residual_sd"][:, 0].numpy()
    from scipy.stats import multivariate_normal

    y = rows.outcome()[mine].numpy()
    density = [
        multivariate_normal.logpdf(y, one, facts.spread**2 * (s**2 + r**2 * np.eye(5)))
        for one, s, r in zip(mean[:1000], sd[:1000], noise[:1000], strict=True)
    ]
    expected = np.logaddexp.reduce(density) - np.log(1000)
    row = found.clusters.set_index("cluster").loc[0]
    assert row["elpd"] == pytest.approx(expected, abs=0.15)


def test_the_verdict_is_the_worst_of_the_checks():
    checks = [Check(name, name, None, None, f"it is {name}") for name in ("pass", "fail", "warn")]
    found = Diagnostics(tuple(checks), None)
    assert found.verdict == "fail"
    assert found.reasons == ("it is fail", "it is warn")
    assert Diagnostics((), None).verdict == "pass"
    assert found.brief().startswith("  FAIL: 1 of 3 checks passed")
    assert "pass" not in found.brief().split("passed")[1]


def test_the_threshold_of_k_hat():
    assert k_hat_threshold(10**4) == 0.7
    assert k_hat_threshold(200) == pytest.approx(1 - 1 / np.log10(200))


@pytest.mark.parametrize(("family", "outcome"), [("gaussian", gaussian), ("poisson", poisson)])
def test_replications_made_in_blocks_are_those_of_all_draws_at_once(family, outcome, monkeypatch):
    data = simulate(outcome, clusters=12, rows=7)
    model = MixedEffects(dense(1, hidden=(3,)), "(1 | site)", family)
    result = fit(model, data, schedule=Schedule(steps=20), refine=False, progress=False)
    latents = result.draws(100)
    whole = cluster_checks(result.posterior, "site", latents)
    monkeypatch.setattr("armed_pyro.checks.predictive_checks.BLOCK", 1)
    blocks = cluster_checks(result.posterior, "site", latents)
    pd.testing.assert_frame_equal(blocks.table, whole.table)
    assert blocks.overall == whole.overall
