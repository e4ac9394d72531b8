"""Variance components, ICC, R2 and fixed effects, against arithmetic on the draws by hand."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from armed_pyro import ClusteredData, Fit, Known, MixedEffects, Priors, Schedule, fit
from armed_pyro.program.units import original_covariance

SHORT = Schedule(steps=4, window=2, stages=0)
COLUMNS = ["factor", "term", "statistic", "mean", "median", "sd", "lower", "upper"]
DRAWS = 200


def make_frame(n=60, seed=0):
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "x": rng.normal(4.0, 2.0, n),
            "z": rng.normal(-1.0, 0.5, n),
            "site": np.arange(n) % 6,
            "batch": np.arange(n) % 5,
        }
    )
    frame["y"] = 20 + 3 * frame["x"] + rng.normal(0, 4, 6)[frame["site"]] + rng.normal(0, 2, n)
    frame["won"] = (rng.random(n) < 0.4).astype(int)
    frame["trials"], frame["hits"] = 10, rng.binomial(10, 0.3, n)
    frame["count"] = rng.poisson(3, n)
    frame["grade"] = rng.permutation(["low", "mid", "top"] * (n // 3))
    return frame


FRAME = make_frame()
OUTCOMES = {
    "gaussian": "y",
    "bernoulli": "won",
    "binomial": "hits",
    "poisson": "count",
    "negative_binomial": "count",
    "categorical": "grade",
}


def run(random="(1 + x | site)", family="gaussian", *, frame=FRAME, bias=True, **options):
    data = ClusteredData.from_frame(
        frame,
        outcome=OUTCOMES[family],
        clusters=["site", "batch"],
        features=["x", "z"],
        trials="trials" if family == "binomial" else None,
    )
    torch.manual_seed(0)
    net = nn.Linear(2, 3 if family == "categorical" else 1, bias=bias)
    settings = {"bayesian_head": True} | options
    model = MixedEffects(net, random, family, **settings)
    return fit(model, data, schedule=SHORT, progress=False)


@pytest.fixture(scope="module")
def slope_fit():
    return run()


def pick(table, statistic, factor=None, term=None):
    chosen = table[table["statistic"] == statistic]
    chosen = chosen if factor is None else chosen[chosen["factor"] == factor]
    return chosen if term is None else chosen[chosen["term"] == term]


def by_hand(result, draws=DRAWS):
    """D on the original scale, variance of the fixed effects, residual variance, by draw."""
    facts, latents = result.model.facts, result.draws(draws)
    names = ("site_sd", "site_cor_cholesky", "fixed_effect", "residual_sd")
    latents = {name: latents[name].double().numpy()[:, 0] for name in names}
    mean, scale = np.array(facts.feature_mean), np.array(facts.feature_scale)
    spread = facts.spread
    covariances, fixed = [], []
    for draw in range(draws):
        tril = latents["site_cor_cholesky"][draw]
        sd = latents["site_sd"][draw]
        inner = np.diag(sd) @ tril @ tril.T @ np.diag(sd)
        # u0 + u1 (x - mean) / scale, in units of the outcome
        back = spread * np.array([[1.0, -mean[0] / scale[0]], [0.0, 1 / scale[0]]])
        covariances.append(back @ inner @ back.T)
        weights = latents["fixed_effect"][draw][1:] / scale * spread
        fixed.append(np.var(FRAME[["x", "z"]].to_numpy() @ weights, ddof=1))
    residual = (latents["residual_sd"].ravel() * spread) ** 2
    return np.array(covariances), np.array(fixed), residual


def summarised(values, prob=0.9):
    tail = (1 - prob) / 2
    quantiles = np.quantile(values, [0.5, tail, 1 - tail])
    return [np.mean(values), quantiles[0], np.std(values, ddof=1), quantiles[1], quantiles[2]]


def assert_row(row, values, prob=0.9):
    assert len(row) == 1
    np.testing.assert_allclose(row[COLUMNS[3:]].to_numpy()[0], summarised(values, prob), rtol=1e-4)


# ------------------------------------------------------------------------------ the table's form


def test_the_table_has_exactly_these_columns_and_rows(slope_fit):
    table = slope_fit.variance_components(draws=DRAWS)
    assert list(table.columns) == COLUMNS
    assert [tuple(row) for row in table[COLUMNS[:3]].to_numpy()] == [
        ("site", "Intercept", "sd"),
        ("site", "x", "sd"),
        ("site", "Intercept", "variance"),
        ("site", "x", "variance"),
        ("site", "Intercept,x", "cor"),
        ("Residual", "", "sd"),
        ("Residual", "", "variance"),
        ("site", "", "icc"),
        ("Fixed", "", "share"),
        ("site", "", "share"),
        ("Residual", "", "share"),
        ("", "", "r2_marginal"),
        ("", "", "r2_conditional"),
    ]
    assert not table.isna().any().any()
    assert (table["lower"] <= table["median"]).all()
    assert (table["median"] <= table["upper"]).all()


def test_seed_draws_and_prob_are_honoured(slope_fit):
    one, again = (slope_fit.variance_components(draws=DRAWS, seed=3) for _ in range(2))
    pd.testing.assert_frame_equal(one, again)
    other = slope_fit.variance_components(draws=DRAWS, seed=4)
    assert (one["mean"] != other["mean"]).all()
    wide = slope_fit.variance_components(draws=DRAWS, seed=3, prob=0.99)
    assert (wide["upper"] > one["upper"]).all()
    assert wide.attrs["prob"] == 0.99


# ----------------------------------------------------------------------------- numbers, by hand


def test_sds_variances_and_correlations_are_the_draws_on_the_original_scale(slope_fit):
    table = slope_fit.variance_components(draws=DRAWS)
    covariance, _, residual = by_hand(slope_fit)
    for place, term in enumerate(["Intercept", "x"]):
        variance = covariance[:, place, place]
        assert_row(pick(table, "sd", "site", term), np.sqrt(variance))
        assert_row(pick(table, "variance", "site", term), variance)
    sds = np.sqrt(covariance[:, 0, 0] * covariance[:, 1, 1])
    assert_row(pick(table, "cor"), covariance[:, 0, 1] / sds)
    assert_row(pick(table, "sd", "Residual"), np.sqrt(residual))


def test_icc_shares_and_r2_are_those_of_the_rows(slope_fit):
    table = slope_fit.variance_components(draws=DRAWS)
    covariance, fixed, residual = by_hand(slope_fit)
    phi = np.column_stack([np.ones(len(FRAME)), FRAME["x"]])
    random = np.array([np.mean([row @ one @ row for row in phi]) for one in covariance])
    total = fixed + random + residual
    assert_row(pick(table, "icc", "site"), random / (random + residual))
    assert_row(pick(table, "share", "Fixed"), fixed / total)
    assert_row(pick(table, "share", "site"), random / total)
    assert_row(pick(table, "r2_marginal"), fixed / total)
    assert_row(pick(table, "r2_conditional"), (fixed + random) / total)


def test_r2_is_the_share_of_variance_in_simulated_outcomes(slope_fit):
    """Outcomes of many new clusters, simulated from one draw, have these shares of variance."""
    covariance, fixed, residual = (one[0] for one in by_hand(slope_fit, draws=2))
    rng = np.random.default_rng(0)
    effects = rng.multivariate_normal([0, 0], covariance, size=4000)
    phi = np.column_stack([np.ones(len(FRAME)), FRAME["x"]])
    random = effects @ phi.T
    # Variance over clusters at each row, averaged over rows.
    variance = (random**2).mean()
    expected = (fixed + variance) / (fixed + variance + residual)
    one = slope_fit.variance_components(draws=2)
    ends = pick(one, "r2_conditional")[["lower", "upper"]].to_numpy()[0]
    # With two draws, the interval's ends are 5% and 95% of the way between them.
    first, second = (ends[0] * 0.95 - ends[1] * 0.05) / 0.9, (ends[1] * 0.95 - ends[0] * 0.05) / 0.9
    # The sd of a variance of 4000 clusters is about 2 to 3%, of the share a third of that.
    assert min(abs(first - expected), abs(second - expected)) < 0.03


@pytest.mark.parametrize("family", OUTCOMES)
@pytest.mark.parametrize("random", ["(1 | site)", "(1 + x || site) + (1 | batch)", ()])
def test_shares_sum_to_one_for_every_family(family, random):
    table = run(random, family).variance_components(draws=50)
    for _, rows in table.groupby("term"):
        share = pick(rows, "share")
        if len(share):
            assert share["mean"].sum() == pytest.approx(1)
            marginal, conditional = pick(rows, "r2_marginal"), pick(rows, "r2_conditional")
            fixed, residual = pick(share, "share", "Fixed"), pick(share, "share", "Residual")
            assert marginal["mean"].item() == pytest.approx(fixed["mean"].item())
            assert conditional["mean"].item() == pytest.approx(1 - residual["mean"].item())
            assert ((share[["mean", "lower", "upper"]] >= 0).all()).all()
    assert pick(table, "cor").empty, "none of these terms is correlated"
    has_residual = not pick(table, "sd", "Residual").empty
    assert has_residual == (family == "gaussian")
    labels = ["mid", "top"] if family == "categorical" else [""]
    assert list(pick(table, "r2_marginal")["term"]) == labels


@pytest.mark.parametrize("family", ["bernoulli", "binomial", "poisson", "negative_binomial"])
def test_icc_is_on_the_latent_scale(family):
    result = run("(1 | site)", family)
    table = result.variance_components(draws=DRAWS)
    latents, facts = result.draws(DRAWS), result.model.facts
    variance = latents["site_sd"].double().numpy()[:, 0, 0] ** 2
    weights = latents["fixed_effect"].double().numpy()[:, 0]
    x = (FRAME[["x", "z"]].to_numpy() - facts.feature_mean) / np.array(facts.feature_scale)
    eta = facts.center[0] + weights[:, :1] + weights[:, 1:] @ x.T
    mean = np.exp(eta + variance[:, None] / 2).mean(1)
    # Nakagawa, Johnson, Schielzeth (2017), table 1
    residual = {
        "bernoulli": np.pi**2 / 3,
        "binomial": np.pi**2 / 3,
        "poisson": np.log(1 + 1 / mean),
    }
    if family == "negative_binomial":
        residual[family] = np.log(1 + 1 / mean + 1 / latents["shape"].double().numpy().ravel())
    assert_row(pick(table, "icc"), variance / (variance + residual[family]))


def test_classes_have_components_of_their_own():
    table = run("(1 + x | site)", "categorical").variance_components(draws=20)
    terms = ["Intercept[mid]", "Intercept[top]", "x[mid]", "x[top]"]
    assert list(pick(table, "sd")["term"]) == terms
    assert list(pick(table, "cor")["term"]) == ["Intercept[mid],x[mid]", "Intercept[top],x[top]"]


def test_known_sds_are_reported_as_given():
    priors = Priors(sd=Known({"Intercept": 3.0, "x": 0.5}), residual_sd=Known(2.0))
    table = run("(1 + x || site)", priors=priors).variance_components(draws=20)
    for factor, term, value in [
        ("site", "Intercept", 3.0),
        ("site", "x", 0.5),
        ("Residual", "", 2.0),
    ]:
        row = pick(table, "sd", factor, term)
        np.testing.assert_allclose(row[["mean", "lower", "upper"]].to_numpy(), value, rtol=1e-5)
        assert row["sd"].item() == pytest.approx(0, abs=1e-5)
    moment = 9.0 + 0.25 * (FRAME["x"] ** 2).mean()
    assert pick(table, "icc")["mean"].item() == pytest.approx(moment / (moment + 4), rel=1e-4)


def test_a_network_without_latent_sites_has_shares():
    table = run((), "bernoulli", bayesian_head=False).variance_components(draws=20)
    assert set(table["statistic"]) == {"share", "r2_marginal", "r2_conditional"}
    assert (table["sd"].abs() < 1e-9).all()


def test_many_rows_are_thinned(slope_fit, monkeypatch):
    monkeypatch.setattr("armed_pyro.summaries.variance.MOST_ROWS", 20)
    table = slope_fit.variance_components(draws=DRAWS)
    covariance, _, residual = by_hand(slope_fit)
    # Drawn at random: every k-th row of a periodic table would not be like the others.
    chosen = np.random.default_rng(0).permutation(len(FRAME))[:20]
    phi = np.column_stack([np.ones(20), FRAME["x"].to_numpy()[chosen]])
    random = np.einsum("ri,dij,rj->d", phi, covariance, phi) / 20
    assert_row(pick(table, "icc", "site"), random / (random + residual))


# ------------------------------------------------------------------------------------ invariance


def moved(result, **changes):
    """The same posterior in internal units, of data in other units."""
    other = run(frame=FRAME.assign(**changes))
    other.guide.load_state_dict(result.guide.state_dict())
    return Fit(replace(other.posterior, refined=result.refined))


def test_other_units_are_the_same_problem_inside(slope_fit):
    other = run(frame=FRAME.assign(x=1000 * FRAME["x"] + 50, y=10 * FRAME["y"] - 7))
    rows, its = slope_fit.model.encode(slope_fit.data), other.model.encode(other.data)
    torch.testing.assert_close(rows.x, its.x, rtol=1e-5, atol=1e-5)
    one, another = slope_fit.model.factors[0], other.model.factors[0]
    torch.testing.assert_close(one.prior_scale, another.prior_scale)
    # The density is that of y in its own units: log 10 less a row.
    gap = slope_fit.history.elbo[0] - other.history.elbo[0]
    assert gap == pytest.approx(np.log(10), abs=1e-3)


def test_components_follow_the_units_of_a_feature(slope_fit):
    other = moved(slope_fit, x=1000 * FRAME["x"] + 50)
    draws = slope_fit.draws(50)
    one = original_covariance(slope_fit.model.factors[0], draws)
    its = original_covariance(other.model.factors[0], draws)
    # slope' = slope / 1000, intercept' = intercept - 50 slope / 1000
    change = torch.tensor([[1.0, -0.05], [0.0, 0.001]], dtype=torch.float64)
    torch.testing.assert_close(its, change @ one @ change.T, rtol=1e-5, atol=1e-9)
    assert (its[:, 0, 0] / one[:, 0, 0] - 1).abs().max() > 0.001, "the intercept must have moved"
    before, after = slope_fit.variance_components(draws=50), other.variance_components(draws=50)
    ratio = (
        pick(before, "sd", "site", "x")["mean"].item()
        / pick(after, "sd", "site", "x")["mean"].item()
    )
    assert ratio == pytest.approx(1000, rel=1e-5)
    for statistic in ("icc", "share", "r2_marginal", "r2_conditional"):
        np.testing.assert_allclose(
            pick(after, statistic)["mean"], pick(before, statistic)["mean"], rtol=1e-4
        )


def test_components_follow_the_units_of_the_outcome(slope_fit):
    other = moved(slope_fit, y=10 * FRAME["y"] - 7)
    before, after = slope_fit.variance_components(draws=50), other.variance_components(draws=50)
    factor = before["statistic"].map({"sd": 10.0, "variance": 100.0}).fillna(1.0)
    for column in COLUMNS[3:]:
        np.testing.assert_allclose(after[column], factor * before[column], rtol=1e-4)


# --------------------------------------------------------------------------------- fixed effects


@pytest.mark.parametrize("family", ["gaussian", "bernoulli", "poisson"])
def test_fixed_effects_are_the_coefficients_of_the_predictor(family):
    """x'b in the units of the data is the prediction for a cluster without random effects."""
    result = run("(1 | site)", family)
    table = result.fixed_effects(draws=DRAWS).set_index("term")
    assert list(table.columns) == COLUMNS[3:]
    assert list(table.index) == ["Intercept", "x", "z"]
    prediction = result.predict(FRAME.assign(site=99), unseen="population", draws=DRAWS)
    link = {"gaussian": lambda p: p, "bernoulli": lambda p: np.log(p / (1 - p)), "poisson": np.log}
    eta = link[family](prediction.expected.astype(float))
    x = np.column_stack([np.ones(len(FRAME)), FRAME["x"], FRAME["z"]])
    draws = np.linalg.lstsq(x, eta.T, rcond=None)[0]
    np.testing.assert_allclose(table["mean"], draws.mean(1), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(table["sd"], draws.std(1, ddof=1), rtol=1e-3)
    np.testing.assert_allclose(table["upper"], np.quantile(draws, 0.95, axis=1), rtol=1e-3)


def test_fixed_effects_of_classes_are_named_and_on_the_original_scale():
    result = run("(1 | site)", "categorical")
    table = result.fixed_effects(draws=DRAWS).set_index("term")["mean"]
    assert list(table.index) == [
        f"{t}[{c}]" for t in ("Intercept", "x", "z") for c in ("mid", "top")
    ]
    prediction = result.predict(FRAME.assign(site=99), unseen="population", draws=DRAWS)
    p = prediction.expected.astype(float)
    x = np.column_stack([np.ones(len(FRAME)), FRAME["x"], FRAME["z"]])
    for code, name in enumerate(["mid", "top"], start=1):
        eta = np.log(p[..., code] / p[..., 0]).mean(0)
        coefficients = np.linalg.lstsq(x, eta, rcond=None)[0]
        own = [table[f"{term}[{name}]"] for term in ("Intercept", "x", "z")]
        np.testing.assert_allclose(own, coefficients, rtol=1e-3, atol=1e-4)


def test_fixed_effects_follow_the_units(slope_fit):
    other = moved(slope_fit, x=1000 * FRAME["x"] + 50, y=10 * FRAME["y"] - 7)
    one = slope_fit.fixed_effects(draws=50).set_index("term")["mean"]
    its = other.fixed_effects(draws=50).set_index("term")["mean"]
    assert its["x"] == pytest.approx(10 * one["x"] / 1000, rel=1e-4)
    assert its["z"] == pytest.approx(10 * one["z"], rel=1e-4)
    assert its["Intercept"] == pytest.approx(
        10 * (one["Intercept"] - 0.05 * one["x"]) - 7, rel=1e-4
    )


def test_without_a_bias_there_is_no_intercept():
    assert list(run(bias=False).fixed_effects(draws=5)["term"]) == ["x", "z"]


def test_a_plain_network_has_no_fixed_effects_to_report():
    table = run(bayesian_head=False).fixed_effects(draws=5)
    assert table.empty
    assert list(table.columns) == ["term", *COLUMNS[3:]]
