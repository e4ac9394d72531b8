"""Verdicts: healthy fits pass, fits that cannot be trusted do not, and say why."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from armed_pyro import ClusteredData, Fit, MixedEffects, Schedule, fit
from armed_pyro.checks.check import Check, checked, severity
from armed_pyro.checks.design_checks import dependencies, separating
from armed_pyro.checks.inference_checks import inference_checks
from armed_pyro.checks.misfit_checks import misfit_checks
from armed_pyro.checks.pivotal_checks import normality_checks
from armed_pyro.checks.predictive_checks import cluster_checks, predictive_checks
from armed_pyro.checks.verdict import Diagnostics
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
    result, found = diagnosed(simulate(outcome, clusters=30, seed=1), family)
    assert (found.computation.word, found.model.word) == ("pass", "pass"), found
    assert found.reasons == ()
    names = {check.name.partition(" ")[0] for check in found.checks}
    assert {
        "training",
        "accuracy",
        "clusters",
        "prior",
        "predictive",
        "normality",
    } <= names
    # A gaussian guide that is good at the mode takes no steps.
    assert ("iterates" in names) == (len(result.history.loss) > 1) == (family != "gaussian")
    assert not any(check.advice for check in found.checks)


def test_two_clusters_fail():
    _, found = diagnosed(simulate(gaussian, clusters=2, rows=30), "gaussian")
    assert found.model.word == "fail"
    assert found.computation.word == "pass"
    (check,) = named(found, "clusters of site")
    assert check.verdict == "fail"
    assert "a guess from its prior" in check.reason


def test_far_too_few_steps_are_said():
    result, found = diagnosed(simulate(gaussian), "gaussian", schedule=Schedule(steps=5))
    assert result.stopped == "steps"
    assert found.computation.word in ("warn", "fail")
    assert any("ran out" in reason for reason in found.reasons)


def test_a_network_stopped_in_training_fails():
    model = MixedEffects(dense(1, hidden=(8,)), "(1 | site)")
    few = {"schedule": Schedule(steps=20), "progress": False}
    result = fit(model, simulate(gaussian), **few)
    (check,) = named(result.diagnostics(), "training")
    assert check.verdict == "fail"
    assert "5 of 5 networks were still improving when their 20 steps ran out" in check.reason
    result = fit(model, simulate(gaussian), validation=None, **few)
    (check,) = named(result.diagnostics(), "training")
    assert check.verdict == "fail"
    assert "before the guide was settled" in check.reason


def test_separation_leaves_the_coefficient_to_its_prior():
    _, found = diagnosed(simulate(lambda rng, eta, x: (x[:, 0] > 0).astype(float)), "bernoulli")
    (check,) = named(found, "prior sensitivity")
    assert check.verdict == "warn"
    assert "fixed_effect[x0]" in check.reason
    (check,) = named(found, "separation")
    assert check.verdict == "warn"
    assert check.reason.startswith("x0 separates the outcomes")
    assert found.computation.word == "pass"


def test_a_wrong_family_fails():
    def overdispersed(rng, eta, x):
        return rng.poisson(np.exp(eta + rng.normal(size=len(eta)))).astype(float)

    _, found = diagnosed(simulate(overdispersed, clusters=40), "poisson")
    assert found.model.word == "fail"
    assert named(found, "predictive sd")[0].verdict == "fail"
    assert "negative_binomial" in named(found, "predictive sd")[0].advice
    assert named(found, "residuals")[0].verdict == "fail"
    _, found = diagnosed(simulate(poisson, clusters=40), "gaussian")
    assert found.model.word == "fail"
    assert "overdispersion" not in str(found)


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
    assert check.verdict == "note"
    assert found.model.word == "pass"
    assert "cannot be told from zero" in found.model.sentence
    assert "leave" not in check.advice


def test_nuts_draws_are_judged_by_their_chains():
    result, _ = diagnosed(simulate(gaussian, clusters=8, rows=5), "gaussian")
    found = result.refine("nuts", draws=16, chains=2, warmup=6, progress=False).diagnostics()
    (check,) = named(found, "NUTS")
    assert check.verdict != "pass"
    assert "R-hat" in check.reason
    assert not named(found, "accuracy")


def test_a_guide_that_is_off_is_said_where_it_is_not_corrected():
    raw, _ = diagnosed(simulate(gaussian), "gaussian", refine=False)
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
    assert {"part", "name", "verdict", "reason", "effect", "threshold", "p"} < set(table.columns)
    assert len(table) == len(found.checks)
    clusters = found.clusters
    assert clusters["cluster"].tolist() == list(range(10))
    assert clusters["rows"].tolist() == [5] * 10
    means = data.outcome.numpy().reshape(10, 5).mean(1)
    np.testing.assert_allclose(clusters["mean"], means)
    assert clusters["mean_p"].between(0, 1).all()
    assert np.isfinite(clusters["elpd"]).all()
    loaded = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert loaded["computation"]["verdict"] == found.computation.word
    assert loaded["model"]["sentence"] == found.model.sentence
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


def test_the_verdicts_are_the_worst_of_their_checks():
    checks = [
        Check("computation", "a", "pass", "it is fine"),
        Check("computation", "b", "warn", "the steps ran out", advice="allow more"),
        Check("model", "c", "warn", "a curve is missing", 0.4, "size", 0.2, 1e-4),
        Check("model", "d", "fail", "columns are collinear", is_misfit=False),
        Check("model", "e", "not checked", "there are too many rows"),
    ]
    found = Diagnostics(tuple(checks))
    assert (found.computation.word, found.model.word) == ("warn", "fail")
    assert str(found).splitlines() == [
        "Computation: to be taken with care: the steps ran out.",
        "  -> allow more",
        "Model: misfit found: a curve is missing; the data say little: columns are collinear "
        "(not checked: e).",
    ]
    assert found.failed
    assert not Diagnostics(tuple(checks[:3])).failed
    assert Diagnostics(()).computation.word == "not checked"
    assert [check.name for check in found.model.unchecked] == ["e"]


def test_a_check_that_cannot_be_computed_fails():
    for number in (np.nan, np.inf):
        with pytest.raises(ValueError, match="not finite"):
            Check("model", "a", "pass", "it is fine", effect=number)
        with pytest.raises(ValueError, match="not finite"):
            Check("model", "a", "warn", "hm", p=number)
    assert severity(np.nan, 1.0) == severity(np.nan, 1.0, noise=True) == "fail"
    assert severity(np.inf, 1.0, noise=True) == "fail"

    def broken():
        yield Check("model", "a", "pass", "it is fine")
        raise ValueError("invalid Poisson rate")

    first, second = checked("model", "b", broken)
    assert (first.name, second.name) == ("a", "b")
    assert second.verdict == "fail"
    assert second.reason == "could not be computed: invalid Poisson rate"


def counted():
    data = simulate(poisson, clusters=12, rows=7)
    model = MixedEffects(linear(1), "(1 | site)", "poisson", bayesian_head=True)
    return fit(model, data, schedule=Schedule(steps=30), progress=False, refine=False)


@pytest.mark.parametrize("value", [np.nan, 60.0, 1000.0])
def test_predictions_that_are_not_finite_fail_and_lose_nothing(value, tmp_path):
    result = counted()
    posterior = result.posterior
    latents = dict(posterior.draws(50))
    latents["fixed_effect"] = latents["fixed_effect"] + value
    _, checks = predictive_checks(posterior, latents, None)
    assert [check.verdict for check in checks] == ["fail"]
    assert "could not be computed" in checks[0].reason
    if not value < 1000:
        (check,) = checked("model", "residuals", lambda: misfit_checks(posterior, latents))
        assert check.verdict == "fail"
    with torch.no_grad():
        result.guide.hyperparameters.shift.add_(1000)
    diverged = Fit(replace(posterior, stopped="diverged", importance=None))
    found = diverged.diagnostics()
    assert found.computation.word == "fail"
    assert found.model.word == "fail"
    json.dumps(found.to_json(), allow_nan=False)
    diverged.save(tmp_path / "run")
    assert Fit.load(tmp_path / "run").stopped == "diverged"


def test_k_hat_warns_where_means_and_sds_may_be_wrong():
    result, _ = diagnosed(simulate(gaussian), "gaussian")
    weighted = result.importance

    def accuracy(**changes):
        posterior = replace(result.posterior, importance=replace(weighted, **changes))
        checks = list(inference_checks(posterior))
        (check,) = [check for check in checks if check.name.startswith("accuracy")]
        return check

    right = accuracy(k_hat=0.73)
    assert right.verdict == "pass"
    assert "k-hat 0.73" in right.reason
    few = np.log(np.where(np.arange(len(weighted.weights)) < 30, 1.0, 1e-9))
    few -= np.logaddexp.reduce(few)
    wrong = accuracy(k_hat=0.3, log_weights=few)
    assert wrong.verdict == "warn"
    assert wrong.effect > wrong.threshold
    assert "refine nuts" in wrong.advice
    posterior = replace(result.posterior, importance=replace(weighted, log_weights=few))
    lines = str(Fit(posterior).diagnostics()).splitlines()
    assert lines[1].endswith("--refine nuts")
    assert re.search(r"exact draws will take about \d+ (second|minute)s on this machine", lines[2])
    assert accuracy(k_hat=1.2).verdict == "fail"
    assert accuracy(k_hat=np.inf).verdict == "fail"


def test_small_departures_of_many_clusters_from_normal_pass():
    """A threshold on the effect, not on p: the same departure in more clusters is no worse."""
    result, _ = diagnosed(simulate(gaussian, clusters=12, rows=4), "gaussian")
    rng, latents = np.random.default_rng(0), dict(result.draws(40))
    sd = result.model.factors[0].sd(latents)

    def normality(z):
        effects = torch.as_tensor(z).to(sd)[None, :, None] * sd
        (check,) = normality_checks(result.posterior, latents | {"site_effect": effects})
        return check

    small = rng.gamma(25, size=500)  # skewness 0.4
    check = normality((small - small.mean()) / small.std())
    assert check.verdict == "pass"
    assert check.p < 1e-3
    low, high = check.interval
    assert low < check.effect < high
    large = rng.gamma(1, size=500)
    assert normality(large - 1).verdict == "fail"
    groups = normality(rng.choice([-1.0, 1.0], 500) + 0.3 * rng.normal(size=500))
    assert groups.verdict == "fail"
    assert "in groups" in groups.reason


def test_a_small_distance_of_residuals_passes_in_any_number_of_rows():
    def nearly(rng, eta, x):
        return eta + (rng.gamma(20, size=len(eta)) - 20) / 20**0.5  # skewness 0.45

    _, found = diagnosed(simulate(nearly, clusters=200, rows=40), "gaussian")
    (check,) = named(found, "residuals")
    assert check.p < 1e-3
    assert 0.02 < check.effect < 0.05
    assert check.verdict == "pass"


def test_one_dominant_site_passes_and_is_right():
    rng = np.random.default_rng(3)
    site = np.repeat(np.arange(12), [1000, *[10] * 11])
    x = rng.normal(size=(len(site), 1))
    y = rng.normal(size=12)[site] + x[:, 0] + rng.normal(size=len(site))
    _, found = diagnosed(ClusteredData.from_arrays(x, y, {"site": site}), "gaussian")
    assert found.figures["effective_clusters[site]"] < 3
    assert named(found, "clusters of site")[0].verdict == "pass"


def test_the_boundary_is_tested_where_the_table_shows_the_sd():
    """Slopes vary, intercepts at the mean of x do not; at x = 0 intercepts vary, too."""
    rng = np.random.default_rng(0)
    site = np.repeat(np.arange(30), 10)
    x = 10 + np.tile(np.linspace(-1, 1, 10), 30)
    y = (1 + rng.normal(size=30))[site] * (x - 10) + 0.5 * rng.normal(size=300)
    data = ClusteredData.from_arrays(x[:, None], y, {"site": site})
    model = MixedEffects(linear(1), "(1 + x0 | site)", bayesian_head=True)
    result = fit(model, data, progress=False)
    found = result.diagnostics()
    (check,) = named(found, "boundary of site[Intercept]")
    table = result.variance_components().query("statistic == 'sd' and term == 'Intercept'")
    assert table["lower"].item() > 5
    assert check.interval == pytest.approx((table["lower"].item(), table["upper"].item()), rel=0.1)
    assert check.verdict == "pass"


def test_collinear_columns_are_named():
    rng = np.random.default_rng(0)
    site = np.repeat(np.arange(20), 10)
    a = rng.normal(size=200)
    y = a + rng.normal(size=20)[site] + rng.normal(size=200)
    # The fit drops exact copies. It keeps b, whose noise is just above rounding errors.
    frame = pd.DataFrame({"y": y, "a": a, "b": 2 * a + 3 + 4e-6 * rng.normal(size=200)})
    frame["site"] = site
    data = ClusteredData.from_frame(frame, outcome="y", clusters=["site"])
    result = fit(MixedEffects(linear(2), "(1 | site)", bayesian_head=True), data, progress=False)
    found = result.diagnostics()
    assert found.computation.word == "pass"
    assert found.model.word == "fail"
    (check,) = named(found, "collinear")
    assert "b = 2 a + 3" in check.reason
    (check,) = named(found, "coefficients")
    assert check.verdict == "warn"
    assert "a, b" in check.reason


def test_columns_that_were_dropped_are_named():
    rng = np.random.default_rng(0)
    site, a = np.repeat(np.arange(20), 10), rng.normal(size=200)
    y = a + rng.normal(size=20)[site] + rng.normal(size=200)
    frame = pd.DataFrame({"y": y, "a": a, "b": 2 * a + 3, "site": site})
    data = ClusteredData.from_frame(frame, outcome="y", clusters=["site"])
    with pytest.warns(UserWarning, match=r"dropped 'b' \('b' is a copy of 'a'\)"):
        result = fit(
            MixedEffects(linear(2), "(1 | site)", bayesian_head=True), data, progress=False
        )
    (check,) = named(result.diagnostics(), "collinear")
    assert check.verdict == "pass"
    assert "have been dropped: b" in check.reason


def test_dependencies_of_columns():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 50))
    columns = np.column_stack([a, b, a - b, np.ones(50), a + 1e-3 * b])
    found = dependencies(columns, ("a", "b", "c", "d", "e"))
    assert list(found) == ["c = a - b", "d is constant", "e = a + 0.001 b"]
    nearly = np.column_stack([a, a + 1e-3 * b])
    ((text, left),) = dependencies(nearly, ("a", "e")).items()
    assert text.startswith("e = ")
    assert 1e-7 < left < 1e-5
    assert dependencies(np.column_stack([a, a + 0.1 * b]), ("a", "e")) == {}
    # Without an intercept, a constant is a column like others.
    assert dependencies(np.column_stack([np.ones(50), a]), ("one", "a"), intercept=False) == {}


def test_separating_columns():
    rng = np.random.default_rng(0)
    group, noise = np.arange(60) % 3, rng.normal(size=60)
    dummies = np.column_stack([group == 1, group == 2, noise]).astype(float)
    sides = rng.choice([-1.0, 1.0], 60)
    assert separating(dummies, sides) == []
    assert separating(dummies, np.where(group == 2, 1.0, sides)) == [1]
    # The reference level, which has no column, is told by all columns of its factor.
    assert separating(dummies, np.where(group == 0, -1.0, sides)) == [0, 1]
    # Outcomes between the extremes have two sides.
    assert separating(dummies, np.where(group == 2, 0.0, sides)) == []
    # Neither column separates by itself.
    x = rng.normal(size=(60, 2))
    assert separating(x, np.sign(x[:, 0] + x[:, 1])) == [0, 1]


@pytest.mark.skipif("ARMED_PYRO_REFERENCE_DATA" not in os.environ, reason="no reference data")
@pytest.mark.parametrize("name", ["sleepstudy", "cbpp"])
def test_reference_fits_pass_both_verdicts(name):
    frame = pd.read_csv(Path(os.environ["ARMED_PYRO_REFERENCE_DATA"]) / f"{name}.csv")
    if name == "sleepstudy":
        data = ClusteredData.from_frame(frame, outcome="Reaction", clusters=["Subject"])
        model = MixedEffects(linear(1), "(1 + Days | Subject)", bayesian_head=True)
    else:
        frame["period"] = frame["period"].astype(str)
        data = ClusteredData.from_frame(
            frame, outcome="incidence", clusters=["herd"], trials="size", features=["period"]
        )
        model = MixedEffects(linear(3), "(1 | herd)", "binomial", bayesian_head=True)
    found = fit(model, data, progress=False).diagnostics()
    assert str(found).splitlines()[0] == "Computation: trustworthy."
    assert found.model.word == "pass"


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
