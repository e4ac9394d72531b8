"""Refined draws: importance weights that correct a wrong guide, and NUTS in its coordinates."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from armed_pyro import ClusteredData, Fit, HalfNormal, Known, MixedEffects, Priors, Schedule, fit
from armed_pyro.families.simulate import mixed_model
from armed_pyro.inference.importance_sampling import importance_draws
from armed_pyro.inference.posterior import RefinedDraws
from armed_pyro.inference.psis import pareto_smooth
from armed_pyro.models.linear import linear


def make(family="gaussian", clusters=12, rows=6, seed=2, random="(1 | site)", **settings):
    data, _ = mixed_model(family, clusters, rows, sd=(0.8,), seed=seed)
    model = MixedEffects(linear(1), random, family, bayesian_head=True, **settings)
    return model, data


@pytest.fixture(scope="module")
def gaussian():
    model, data = make()
    return fit(model, data, progress=False)


@pytest.fixture(scope="module")
def bernoulli():
    model, data = make("bernoulli", 15, 8)
    return fit(model, data, progress=False)


def moments(draws):
    return {
        name: (value.double().mean(0).flatten(), value.double().std(0).flatten())
        for name, value in draws.items()
    }


def test_a_fit_is_refined_where_its_guide_is_good(gaussian, bernoulli):
    for result in (gaussian, bernoulli):
        assert result.refined.method == "psis"
        assert result.refined.quality["k_hat"] < 1
        assert result.refined.quality["ess"] > 1000
        assert len(result.refined) == 4000


def test_refining_can_be_left_out():
    model, data = make()
    result = fit(model, data, schedule=Schedule(steps=20), refine=False, progress=False)
    assert result.refined is None
    assert result.posterior.importance is None


def test_weights_correct_a_guide_that_is_wrong(gaussian):
    """Shifted by half a posterior sd and a quarter too narrow, its weighted draws are the same."""
    wrong = Fit(replace(gaussian.posterior, refined=None, importance=None))
    hyper = wrong.guide.hyperparameters
    before = {name: one.clone() for name, one in hyper.state_dict().items()}
    with torch.no_grad():
        hyper.shift.add_(0.5)
        hyper.log_scale.add_(math.log(0.75))
    try:
        own = moments(wrong.draws(4000))
        weighted = importance_draws(wrong.posterior)
        with wrong.model.seeded(0):
            corrected = moments(
                RefinedDraws("psis", weighted.latents, {}, weighted.resample(4000)).latents
            )
    finally:
        hyper.load_state_dict(before)
    right = moments(gaussian.draws(4000))
    error = 4.5 * math.sqrt(1 / weighted.effective + 1 / gaussian.refined.quality["ess"])
    for name in ("site_sd", "fixed_effect", "residual_sd"):
        mean, sd = right[name]
        assert (((own[name][0] - mean) / sd).abs() > 0.2).any(), "the guide was made wrong"
        assert (((corrected[name][0] - mean) / sd).abs() < error).all(), name
        assert ((corrected[name][1] / sd).log().abs() < error).all(), name


@pytest.mark.slow
def test_nuts_agrees_with_the_weighted_draws(bernoulli):
    exact = bernoulli.refine("nuts", draws=600, chains=2, warmup=150, progress=False)
    quality = exact.refined.quality
    assert quality["r_hat"] < 1.05
    assert quality["divergences"] < 30
    right, found = moments(exact.draws(600)), moments(bernoulli.draws(4000))
    for name in ("site_sd", "fixed_effect", "site_effect"):
        mean, sd = right[name]
        assert (((found[name][0] - mean) / sd).abs() < 4.5 / math.sqrt(150)).all(), name


def test_nuts_draws_are_shaped_as_a_guides(bernoulli):
    found = bernoulli.refine("nuts", draws=12, chains=2, warmup=4, progress=False)
    shapes = {name: one.shape for name, one in bernoulli.draws(12).items()}
    assert {name: one.shape for name, one in found.draws(12).items()} == shapes
    assert set(found.refined.quality) == {"r_hat", "ess", "divergences"}
    again = bernoulli.refine("nuts", draws=12, chains=2, warmup=4, progress=False)
    assert torch.equal(again.refined.latents["site_sd"], found.refined.latents["site_sd"])


def test_crossed_programs_are_refined_with_all_their_sites():
    rng = np.random.default_rng(0)
    a, b = np.repeat(np.arange(6), 8), np.tile(np.arange(8), 6)
    y = rng.normal(size=6)[a] + rng.normal(size=8)[b] + 0.5 * rng.normal(size=48)
    data = ClusteredData.from_arrays(np.zeros((48, 0)), y, {"a": a, "b": b})
    model = MixedEffects(linear(0), "(1 | a) + (1 | b)", bayesian_head=True)
    result = fit(model, data, progress=False)
    shapes = {name: tuple(one.shape) for name, one in result.draws(7).items()}
    assert shapes == {
        "residual_sd": (7, 1),
        "fixed_effect": (7, 1, 1),
        "a_sd": (7, 1, 1),
        "b_sd": (7, 1, 1),
        "a_effect": (7, 6, 1),
        "b_effect": (7, 8, 1),
    }
    assert result.refined.quality["k_hat"] < 1


def test_draws_are_chosen_without_repeats_while_there_are_enough(gaussian):
    assert gaussian.draws(4000)["residual_sd"].unique().numel() == (
        gaussian.refined.latents["residual_sd"].unique().numel()
    )
    assert len(gaussian.draws(5000)["residual_sd"]) == 5000
    one, other = gaussian.draws(10, seed=1), gaussian.draws(10, seed=1)
    assert torch.equal(one["site_effect"], other["site_effect"])
    assert not torch.equal(one["site_effect"], gaussian.draws(10, seed=2)["site_effect"])


def test_refined_draws_are_taken_from_the_proposals_and_hold_no_copy_of_them(bernoulli):
    refined, weighted = bernoulli.refined, bernoulli.importance
    assert refined.pool is weighted.latents
    times = np.bincount(refined.index, minlength=len(weighted.weights))
    assert (np.abs(times - len(refined) * weighted.weights) < 1).all()
    for name, value in refined.latents.items():
        assert torch.equal(value, weighted.latents[name][refined.index]), name


def test_effects_are_drawn_for_the_draws_that_are_kept_as_if_for_all(gaussian, monkeypatch):
    weighted, kept = gaussian.importance, gaussian.refined.latents
    assert set(weighted.latents) == {"residual_sd", "fixed_effect", "site_sd"}
    assert len(weighted.weights) == len(kept["site_effect"]) == 4000
    assert torch.isin(kept["site_sd"], weighted.latents["site_sd"]).all()
    monkeypatch.setattr("armed_pyro.inference.importance_sampling.exact_likelihood", no_closed_form)
    rows = importance_draws(gaussian.posterior)
    assert np.corrcoef(rows.log_weights, weighted.log_weights)[0, 1] > 0.999  # the same draws
    effects = rows.latents["site_effect"][rows.resample(4000)]
    error = effects.std(0) * math.sqrt(2 / rows.effective)
    assert (((kept["site_effect"].mean(0) - effects.mean(0)) / error).abs() < 4).all()
    ratio = (kept["site_effect"].std(0) / effects.std(0)).log().abs()
    assert (ratio < 4 / math.sqrt(rows.effective)).all()


def no_closed_form(*arguments):
    return None


def test_rows_weighed_in_pieces_give_the_weights_of_all_at_once(gaussian, monkeypatch):
    monkeypatch.setattr("armed_pyro.inference.importance_sampling.exact_likelihood", no_closed_form)
    whole = importance_draws(gaussian.posterior)
    monkeypatch.setattr("armed_pyro.inference.importance_sampling.MOST_AT_ONCE", 1)
    monkeypatch.setattr("armed_pyro.inference.importance_sampling.PIECE", len(whole.weights) * 20)
    monkeypatch.setattr("armed_pyro.inference.importance_sampling.MOST_CLUSTERS", 5)
    pieces = importance_draws(gaussian.posterior)
    np.testing.assert_allclose(pieces.weights, whole.weights, rtol=1e-6)
    watched = ~np.isnan(pieces.cluster_k_hat)
    assert watched.sum() == 5
    # The conditional is exact, so that every particle tells the same of a cluster.
    np.testing.assert_allclose(pieces.clusters, whole.clusters[:, watched], atol=1e-8)
    assert torch.equal(pieces.latents["site_sd"], whole.latents["site_sd"])
    one, other = pieces.latents["site_effect"], whole.latents["site_effect"]
    assert one.shape == other.shape
    assert not torch.equal(one, other)
    error = other.std(0) * math.sqrt(2 / len(other))
    assert (((one.mean(0) - other.mean(0)) / error).abs() < 4).all()
    assert ((one.std(0) / other.std(0)).log().abs() < 4 / math.sqrt(len(other))).all()


def test_known_quantities_stay_single():
    drawn = RefinedDraws("psis", {"site_sd": torch.ones(1), "x": torch.zeros(5, 1)}).choose(3)
    assert drawn["site_sd"].shape == (1,)
    assert drawn["x"].shape == (3, 1)


def test_known_sds_are_refined():
    model, data = make(priors=Priors(sd=Known(0.8), residual_sd=HalfNormal()))
    result = fit(model, data, progress=False)
    assert result.refined is not None
    assert result.draws(5)["site_sd"].shape == (1,)


def test_where_the_weights_cannot_be_relied_upon_the_guide_is_kept(monkeypatch):
    monkeypatch.setattr(
        "armed_pyro.inference.importance_sampling.pareto_smooth",
        lambda ratios: (ratios, np.full(len(ratios), 1.1)),
    )
    model, data = make()
    result = fit(model, data, schedule=Schedule(steps=20), progress=False)
    assert result.refined is None
    assert result.importance.k_hat == 1.1


def test_refined_draws_survive_saving(gaussian, tmp_path):
    gaussian.save(tmp_path / "run")
    loaded = Fit.load(tmp_path / "run")
    assert loaded.refined.method == "psis"
    assert loaded.refined.quality == gaussian.refined.quality
    for name, value in gaussian.draws(100).items():
        assert torch.equal(loaded.draws(100)[name], value)


def test_errors(gaussian):
    with pytest.raises(ValueError, match=r"unknown method 'hmc': choose one of psis.*nuts"):
        gaussian.refine("hmc")
    with pytest.raises(ValueError, match=r"draws must be at least 2.*found 1"):
        gaussian.refine(draws=1)
    data = ClusteredData.from_arrays([[0.0], [1.0], [2.0], [3.0]], [0, 1, 1, 0], {})
    plain = fit(
        MixedEffects(nn.Linear(1, 1), family="bernoulli"),
        data,
        schedule=Schedule(steps=2),
        progress=False,
    )
    assert plain.refined is None
    with pytest.raises(ValueError, match=r"nothing to refine"):
        plain.refine()


def test_a_draw_that_outweighs_all_others_has_no_tail_but_all_the_weight():
    ratios = np.linspace(-5000, -4000, 500)
    ratios[7] = 0.0
    weights, k_hat = pareto_smooth(ratios[None])
    assert k_hat[0] > 1
    assert np.exp(weights[0]).argmax() == 7
    assert np.exp(weights[0]).sum() == pytest.approx(1)
