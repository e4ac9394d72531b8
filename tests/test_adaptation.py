"""Adaptation to labelled rows of new clusters: closed forms, quadrature, refits, and errors."""

import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import nn

from armed_pyro import ClusteredData, MixedEffects, Schedule, Slopes, fit
from armed_pyro.families.simulate import mixed_model
from armed_pyro.prediction.adapt import joined
from armed_pyro.prediction.new_clusters import condition

SHORT = Schedule(steps=60, window=20, stages=0)


def trained(family, sd=(1.0, 0.5), seed=0, held=5, rows=12, clusters=25):
    data, _ = mixed_model(family, clusters, rows, sd=sd, coefficients=[0.2, 0.5], seed=seed)
    seen, unseen = data.hold_out_clusters("site", labels=list(range(clusters - held, clusters)))
    torch.manual_seed(0)
    net = nn.Linear(1, 2 if family == "categorical" else 1).double()
    random = "(1 + x0 | site)" if len(sd) == 2 else "(1 | site)"
    model = MixedEffects(net, random, family, bayesian_head=True)
    quiet = {"schedule": SHORT, "refine": False, "progress": False}
    return fit(model, seen, **quiet), unseen


@pytest.fixture(scope="module")
def gaussian():
    return trained("gaussian")


def weights_of(result, support, draws, seed=0, update=False):
    """Draws, log-weights and effects before resampling."""
    latents = dict(result.draws(draws, seed=seed))
    made = condition(result.posterior, support, latents, seed, update_seen=update)
    quality = {"efficiency": made.efficiency}
    return made.latents, made.log_weights, made.effects, quality


def of_cluster(data, cluster, n=None):
    inside = np.flatnonzero(data.grouping("site").labels() == cluster)
    return data.take(inside[:n])


def by_hand(result, rows, latents, draw):
    """Mean and covariance of u, and log p(y), of one cluster of a gaussian program."""
    model, facts = result.model, result.model.data_facts()
    x = facts.scaling.standardise(rows.features).numpy()
    z = np.column_stack([np.ones(len(x)), x])
    y = (rows.outcome.numpy() - facts.center[0]) / facts.spread
    residual = y - z @ latents["fixed_effect"][draw, 0].numpy()
    sigma2 = float(latents["residual_sd"][draw]) ** 2
    cov = model.factors[0].covariance(latents)[draw, 0].numpy()
    v = z @ cov @ z.T + sigma2 * np.eye(len(y))
    gain = cov @ z.T @ np.linalg.inv(v)
    evidence = stats.multivariate_normal(np.zeros(len(y)), v).logpdf(residual)
    return gain @ residual, cov - gain @ z @ cov, evidence - len(y) * np.log(facts.spread)


def test_gaussian_conditionals_are_exact_in_every_draw(gaussian):
    result, unseen = gaussian
    one = of_cluster(unseen, 21)
    # The same draw of the hyperparameters many times: its conditional can be seen.
    latents, total, effects, quality = weights_of(result, unseen, 6)
    sums = [
        sum(by_hand(result, of_cluster(unseen, k), latents, s)[2] for k in range(20, 25))
        for s in range(6)
    ]
    np.testing.assert_allclose(total.numpy(), sums, rtol=1e-8)
    assert quality["efficiency"] == 1.0
    draws = 3000
    latents, _, effects, _ = weights_of(result, one, draws)
    white = []
    for s in range(draws):
        mean, cov, _ = by_hand(result, one, latents, s)
        white.append(np.linalg.solve(np.linalg.cholesky(cov), effects["site"][s, 0].numpy() - mean))
    white = np.array(white)
    assert np.abs(white.mean(0)).max() < 4 / np.sqrt(draws)
    np.testing.assert_allclose(np.cov(white.T), np.eye(2), atol=5 * np.sqrt(2 / draws))


@pytest.mark.parametrize("family", ["bernoulli", "poisson", "negative_binomial", "binomial"])
def test_evidence_and_moments_agree_with_quadrature(family):
    """Of one effect a cluster, in every draw, by a fine grid."""
    result, unseen = trained(family, sd=(1.0,))
    one = of_cluster(unseen, 22, 4)
    draws = 2000
    latents, total, effects, quality = weights_of(result, one, draws)
    model = result.model
    levels = model.data_facts().levels_with(one)
    source = model.encode(one, levels)
    rows, k = source.all(), len(model.data_facts().levels["site"])
    z = torch.linspace(-8, 8, 801, dtype=torch.float64)
    some = {name: v[:50] if v.dim() > 1 else v for name, v in latents.items()}
    logs = []
    for value in z:
        u = value * some["site_sd"].reshape(-1, 1, 1)
        both = torch.cat([some["site_effect"], u], 1)
        assert both.shape[1] == k + 1
        logs.append(model.log_likelihood(rows, {**some, "site_effect": both}).sum(-1))
    logs = torch.stack(logs) - 0.5 * z[:, None] ** 2 - 0.5 * np.log(2 * np.pi)
    step = float(z[1] - z[0])
    evidence = torch.logsumexp(logs, 0) + np.log(step)
    # Particles on a lattice: nearly as good as the grid.
    np.testing.assert_allclose(total[:50].numpy(), evidence, atol=0.02)
    assert quality["efficiency"] > 0.4
    density = torch.softmax(logs, 0)
    mean, square = (density * z[:, None]).sum(0), (density * z[:, None] ** 2).sum(0)
    sd = (square - mean**2).sqrt()
    drawn = (effects["site"][:50, 0, 0] / some["site_sd"].reshape(-1) - mean) / sd
    assert abs(float(drawn.mean())) < 4 / np.sqrt(50)
    assert 0.6 < float(drawn.std()) < 1.4


def test_no_rows_are_the_marginal_mode_draw_by_draw(gaussian):
    result, unseen = gaussian
    marginal = result.predict(unseen, unseen="marginal", draws=50)
    for support in (unseen.take([]), pd.DataFrame()):
        made = result.adapt(support, draws=50).predict(unseen)
        np.testing.assert_array_equal(made.expected, marginal.expected)
        np.testing.assert_array_equal(made.outcome, marginal.outcome)
        assert set(made.unseen) == {"marginal"}


@pytest.mark.parametrize("family", ["gaussian", "bernoulli", "categorical"])
def test_more_rows_update(family):
    result, unseen = trained(family)
    half = np.arange(unseen.n_rows) % 2 == 0
    at_once = result.adapt(unseen, draws=200)
    first = result.adapt(unseen.take(half), draws=200)
    updated = first.adapt(unseen.take(~half))
    assert updated.support.n_rows == unseen.n_rows
    names = ["factor", "cluster", "rows", "term"]
    pd.testing.assert_frame_equal(at_once.table()[names], updated.table()[names])
    gap = np.abs(at_once.table()["mean"] - updated.table()["mean"]) / at_once.table()["sd"]
    assert gap.max() < 5 * np.sqrt(2 / 50)
    if family == "gaussian":  # elsewhere the new rows may say that clusters differ more
        assert (updated.table()["sd"] < first.table()["sd"]).mean() > 0.8


def test_a_refit_with_the_rows_agrees(gaussian):
    result, unseen = gaussian
    few = np.flatnonzero(np.arange(unseen.n_rows) % 12 < 6)
    support, rest = unseen.take(few), unseen.take(np.setdiff1d(np.arange(unseen.n_rows), few))
    both = joined(result.posterior, result.data, support)
    settings = {"schedule": Schedule(steps=400), "refine": False, "progress": False}
    again, converged = (fit(_plan(), data, **settings) for data in (both, result.data))
    adapted = converged.adapt(support, draws=1000)
    assert adapted.quality["reweighted"] == 1.0
    one, other = adapted.predict(rest), again.predict(rest, draws=1000)
    error = one.sd / np.sqrt(min(adapted.quality["ess"], 1000))
    assert np.abs((one.mean - other.mean) / error).max() < 6
    np.testing.assert_allclose(one.sd, other.sd, rtol=0.2)


def _plan():
    torch.manual_seed(0)
    return MixedEffects(nn.Linear(1, 1).double(), "(1 + x0 | site)", bayesian_head=True)


def test_seen_clusters_are_updated_by_their_old_and_new_rows():
    """Half of a seen cluster's rows, then the other half: the same as all at once, in each draw."""
    result, _ = trained("gaussian")
    more, _ = mixed_model("gaussian", 25, 12, sd=(1.0, 0.5), coefficients=[0.2, 0.5], seed=0)
    extra = of_cluster(more, 3)
    adapted = result.adapt(extra, draws=400, update_seen=True)
    assert adapted.quality["reweighted"] == 1.0
    both = joined(result.posterior, of_cluster(result.data, 3), extra)
    place = result.model.facts.levels["site"].get_loc(3)
    drawn = adapted.latents["site_effect"][:, place].numpy()
    white = []
    for s in range(400):
        mean, cov, _ = by_hand(result, both, adapted.latents, s)
        white.append(np.linalg.solve(np.linalg.cholesky(cov), drawn[s] - mean))
    white, ess = np.array(white), 0.5 * adapted.quality["ess"]
    assert np.abs(white.mean(0)).max() < 4 / np.sqrt(ess)
    assert np.abs(white.std(0) - 1).max() < 4 / np.sqrt(ess)
    made = adapted.predict(extra)
    assert set(made.unseen) == {""}
    assert made.sd.mean() < result.predict(extra, draws=400).sd.mean()


def crossed(seed=0):
    rng = np.random.default_rng(seed)
    school = np.repeat(np.arange(24), 8)
    district = school % 6
    x = rng.normal(size=(len(school), 1))
    eta = x[:, 0] + rng.normal(size=24)[school] + rng.normal(size=6)[district]
    y = eta + 0.5 * rng.normal(size=len(school))
    groups = {"school": school, "district": district}
    return ClusteredData.from_arrays(x, y, groups, outcome_name="y")


def test_new_clusters_of_two_factors_are_known_jointly():
    """A new district of four new schools, and new schools in districts that are known."""
    data = crossed()
    school, district = (data.grouping(name).labels() for name in ("school", "district"))
    held = (district == 5) | (school == 0)
    seen, unseen = data.take(~held), data.take(held)
    torch.manual_seed(0)
    model = MixedEffects(nn.Linear(1, 1).double(), ["(1 | school)", "(1 | district)"],
                         bayesian_head=True)  # fmt: skip
    result = fit(model, seen, schedule=SHORT, refine=False, progress=False)
    draws = 5
    latents, total, effects, _ = weights_of(result, unseen, draws)
    facts = result.model.data_facts()
    school, district = (unseen.grouping(name).labels() for name in ("school", "district"))
    x = facts.scaling.standardise(unseen.features).numpy()[:, 0]
    y = (unseen.outcome.numpy() - facts.center[0]) / facts.spread
    for s in range(draws):
        beta = latents["fixed_effect"][s, 0].numpy()
        base = beta[0] + beta[1] * x
        known = latents["district_effect"][s, 0, 0].numpy()
        base = base + np.where(district == 0, known, 0.0)
        a, b = (float(latents[f"{name}_sd"][s].reshape(())) for name in ("school", "district"))
        v = a**2 * (school[:, None] == school) + float(latents["residual_sd"][s]) ** 2 * np.eye(
            len(y)
        )
        v = v + b**2 * ((district[:, None] == district) & (district == 5))
        log_p = stats.multivariate_normal(base, v).logpdf(y) - len(y) * np.log(facts.spread)
        assert float(total[s]) == pytest.approx(log_p, rel=1e-6)
    assert effects["district"].shape == (draws, 1, 1)
    assert effects["school"].shape == (draws, 5, 1)
    adapted = result.adapt(unseen, draws=300)
    made = adapted.predict(unseen)
    assert set(made.unseen) == {"adapt"}
    residual = unseen.outcome.numpy() - made.mean
    assert residual.std() < 0.6


def test_slopes_on_hidden_layers_adapt():
    rng = np.random.default_rng(0)
    site = np.repeat(np.arange(20), 30)
    x = rng.normal(size=(600, 2))
    slope = rng.normal(size=(20, 2))
    y = (x * slope[site]).sum(1) + rng.normal(size=20)[site] + 0.3 * rng.normal(size=600)
    data = ClusteredData.from_arrays(x, y, {"site": site})
    seen, unseen = data.hold_out_clusters("site", labels=[17, 18, 19])
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 20), nn.ELU(), nn.Linear(20, 1))
    model = MixedEffects(net, ["(1 | site)", Slopes("site", on="1")])
    schedule = Schedule(steps=400, stages=0)
    result = fit(model, seen, schedule=schedule, refine=False, progress=False)
    support = unseen.take(np.arange(90) % 30 < 20)
    rest = unseen.take(np.arange(90) % 30 >= 20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the weights cannot be relied upon
        made = result.predict(rest, unseen="adapt", support=support, draws=100)
    before = result.predict(rest, unseen="marginal", draws=100)
    truth = rest.outcome.numpy()
    assert np.mean((made.mean - truth) ** 2) < 0.5 * np.mean((before.mean - truth) ** 2)
    assert (made.sd < before.sd).all()


def test_weights_and_offsets_of_the_support_count():
    data, _ = mixed_model("poisson", 12, 10, sd=(0.7,), seed=1)
    data = replace(data, offset=torch.full((120,), 0.3).double(), weights=torch.ones(120).double())
    seen, unseen = data.hold_out_clusters("site", labels=[10, 11])
    model = MixedEffects(nn.Linear(1, 1).double(), "(1 | site)", "poisson", bayesian_head=True)
    result = fit(model, seen, schedule=SHORT, refine=False, progress=False)
    twice = joined(result.posterior, unseen, unseen)
    heavy = replace(unseen, weights=2 * unseen.weights)
    none = replace(twice, weights=torch.cat([unseen.weights, 0 * unseen.weights]))
    tables = [result.adapt(one, draws=500).table() for one in (twice, heavy, unseen, none)]
    for one, other in (tables[:2], tables[2:]):
        gap = (one["mean"] - other["mean"]).abs() / one["sd"]
        assert gap.max() < 5 * np.sqrt(2 / 300)
    assert (tables[0]["sd"] < tables[2]["sd"]).all()


def test_weights_that_cannot_be_relied_upon_are_said_and_not_used():
    result, _ = trained("gaussian", sd=(1.0,), clusters=8, held=2)
    other, _ = mixed_model("gaussian", 300, 10, sd=(1.0,), coefficients=[0.2, 0.5], seed=9)
    codes = other.grouping("site").codes.numpy()
    many = ClusteredData.from_arrays(
        other.features, other.outcome, {"site": 1000 + codes}, outcome_name="y"
    )
    with pytest.warns(UserWarning, match="more of the hyperparameters"):
        adapted = result.adapt(many, draws=300)
    assert adapted.quality["reweighted"] == 0.0
    assert torch.equal(adapted.latents["site_sd"], result.draws(300)["site_sd"])
    made = adapted.predict(many)
    residual = many.outcome.numpy() - made.mean
    assert residual.std() < 1.15


# ---------------------------------------------------------------------------------------- errors


def test_support_errors(gaussian):
    result, unseen = gaussian
    blind = replace(unseen, outcome=None)
    with pytest.raises(ValueError, match="support rows have no outcome 'y'"):
        result.adapt(blind)
    with pytest.raises(ValueError, match="support rows have no outcome 'y'"):
        result.predict(unseen, unseen="adapt", support=blind)
    with pytest.raises(ValueError, match=r"clusters that training saw: 3 of 'site'.*update_seen"):
        result.adapt(of_cluster(result.data, 3))
    keep = unseen.grouping("site").labels() != 24
    with pytest.raises(ValueError, match=r"1 cluster\(s\) of 'site' that are not in the data.*24"):
        result.predict(unseen.take(keep), unseen="adapt", support=unseen)
    with pytest.raises(ValueError, match="used by the mode 'adapt' only"):
        result.predict(unseen, unseen="membership", support=unseen)


def test_outcomes_outside_the_familys_range_are_refused():
    result, unseen = trained("poisson", sd=(0.5,))
    with pytest.raises(ValueError, match="whole numbers"):
        result.adapt(replace(unseen, outcome=unseen.outcome - 0.5))
