"""Scores of predictions for new clusters, and the comparison of modes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from armed_pyro import ClusteredData, MixedEffects, Schedule, compare_modes, fit, score_mode
from armed_pyro.families.simulate import mixed_model
from armed_pyro.prediction.scores import crps

SHORT = Schedule(steps=300, window=50)


def trained(family="gaussian", sd=(1.0,), seed=3, held=20):
    data, _ = mixed_model(family, 30 + held, 12, sd=sd, coefficients=[0.0, 0.5], seed=seed)
    seen, unseen = data.hold_out_clusters("site", labels=list(range(30, 30 + held)))
    torch.manual_seed(0)
    net = nn.Linear(1, 2 if family == "categorical" else 1).double()
    model = MixedEffects(net, "(1 | site)", family, bayesian_head=True)
    return fit(model, seen, schedule=SHORT, refine=False, progress=False), unseen


@pytest.fixture(scope="module")
def gaussian():
    return trained()


def test_crps_of_a_normal_is_its_closed_form():
    rng = np.random.default_rng(0)
    y = np.array([-1.0, 0.3, 2.0])
    found = crps(rng.normal(1.0, 2.0, (20_000, 3)), y)
    z = (y - 1.0) / 2.0
    exact = 2 * (z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - 1 / np.sqrt(np.pi))
    np.testing.assert_allclose(found, exact, atol=4 * 2 / np.sqrt(20_000))


@pytest.mark.parametrize("k", [0, 4])
def test_the_clusters_log_density_is_exact(gaussian, k):
    """Marginal, and given k labelled rows of each: normal densities, averaged over draws."""
    result, unseen = gaussian
    within = np.arange(unseen.n_rows) % 12
    support, test = unseen.take(within < k), unseen.take(within >= 6)
    mode, given = ("adapt", {"support": support}) if k else ("marginal", {})
    table = score_mode(result, test, mode, draws=200, **given).table
    latents, facts = result.draws(200), result.model.data_facts()

    def log_density(rows, s):
        x = facts.scaling.standardise(rows.features).numpy()
        beta = latents["fixed_effect"][s, 0].numpy()
        y = (rows.outcome.numpy() - facts.center[0]) / facts.spread - beta[0] - x[:, 0] * beta[1]
        tau, sigma = (float(latents[name][s].reshape(())) for name in ("site_sd", "residual_sd"))
        v = sigma**2 * np.eye(len(y)) + tau**2
        return stats.multivariate_normal(np.zeros(len(y)), v).logpdf(y) - len(y) * np.log(
            facts.spread
        )

    for cluster in (31, 47):
        own = unseen.grouping("site").labels() == cluster
        both = unseen.take(own & ((within >= 6) | (within < k)))
        logs = [log_density(both, s) for s in range(200)]
        exact = np.logaddexp.reduce(logs)
        if k:
            given = unseen.take(own & (within < k))
            exact -= np.logaddexp.reduce([log_density(given, s) for s in range(200)])
        else:
            exact -= np.log(200)
        found = table.set_index("cluster").loc[cluster, "elpd"]
        assert found == pytest.approx(exact, rel=1e-5)


def test_calibrated_predictions_have_uniform_pit_and_nominal_coverage(gaussian):
    result, unseen = gaussian
    found = score_mode(result, unseen, "marginal", draws=1000)
    assert found.summary["clusters"] == 20
    # 20 clusters: the standard error of coverage is 7 points.
    assert abs(found.summary["coverage"] - 0.9) < 0.12
    assert abs(found.summary["mean_coverage"] - 0.9) < 0.21
    assert found.pit.shape == (240,)
    assert ((found.pit > 0) & (found.pit < 1)).all()
    assert abs(found.pit.mean() - 0.5) < 4 * 0.29 / np.sqrt(20)
    table = found.table
    assert table["mean_p"].between(0, 1).all()
    assert abs(table["mean_p"].mean() - 0.5) < 4 * 0.29 / np.sqrt(20)
    assert list(table["rows"]) == [12] * 20
    assert np.isfinite(table[["rmse", "crps", "log_score", "elpd", "width"]].to_numpy()).all()


def test_scores_are_labelled(gaussian):
    result, unseen = gaussian
    dataset = score_mode(result, unseen, "population", draws=50).to_dataset()
    assert dataset["crps"].dims == ("site",)
    assert list(dataset["site"].values) == list(range(30, 50))
    assert dataset["pit"].dims == ("row",)
    assert dataset.attrs["unseen"] == "population"


def test_the_comparison_shows_that_population_undercovers(gaussian):
    result, unseen = gaussian
    within = np.arange(unseen.n_rows) % 12
    table = compare_modes(
        result, unseen.take(within >= 6), support=unseen.take(within < 6), draws=300
    ).set_index("mode")
    modes = ["population", "marginal", "membership", "membership by row", "nearest", "adapt"]
    assert list(table.index) == modes
    assert table.loc["population", "mean_coverage"] < 0.75 < table.loc["marginal", "mean_coverage"]
    assert table.loc["adapt", "rmse"] < table.loc["marginal", "rmse"]
    assert table.loc["adapt", "elpd_diff"] == 0
    assert (table.drop("adapt")["elpd_diff"] < 0).all()
    gap = table.loc["marginal", "elpd"] - table.loc["adapt", "elpd"]
    assert table.loc["marginal", "elpd_diff"] == pytest.approx(gap)
    assert table.loc["population", "elpd"] < table.loc["marginal", "elpd"]
    assert (table.drop("adapt")["elpd_diff_se"] > 0).all()


@pytest.mark.parametrize("family", ["bernoulli", "poisson", "categorical"])
def test_other_families(family):
    result, unseen = trained(family, held=6)
    table = compare_modes(result, unseen, modes=["population", "marginal"], draws=60)
    assert np.isfinite(table[["log_score", "elpd"]].to_numpy()).all()
    if family in ("bernoulli", "categorical"):
        assert table["accuracy"].between(0, 1).all()
    if family == "categorical":
        assert "crps" not in table
        assert np.isnan(score_mode(result, unseen, "marginal", draws=60).pit).all()
    else:
        assert (table["crps"] > 0).all()
        # The joint density of a cluster's rows knows that they belong together.
        assert table["elpd"][1] > table["elpd"][0]


def test_only_new_clusters_are_scored(gaussian):
    result, unseen = gaussian
    mixed = ClusteredData.from_arrays(
        torch.cat([result.data.features, unseen.features]),
        torch.cat([result.data.outcome, unseen.outcome]),
        {"site": np.r_[result.data.grouping("site").labels(), unseen.grouping("site").labels()]},
        outcome_name="y",
    )
    one, other = (score_mode(result, rows, "marginal", draws=50) for rows in (mixed, unseen))
    np.testing.assert_allclose(one.table["elpd"], other.table["elpd"])
    with pytest.raises(ValueError, match="nothing to compare"):
        score_mode(result, result.data, "marginal")


def test_scores_need_outcomes(gaussian):
    result, unseen = gaussian
    with pytest.raises(ValueError, match="rows have no 'y'"):
        compare_modes(result, replace(unseen, outcome=None))
