"""CrossedGuide: the joint conditional of crossed random effects against closed forms."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from armed_pyro import ClusteredData, Known, MixedEffects, Priors, Schedule, fit
from armed_pyro.guides.crossed import CrossedGuide, choose_guide
from armed_pyro.guides.noise import NoiseMessenger, gaussian_noise
from armed_pyro.guides.structured import StructuredGuide
from armed_pyro.inference.nested_weights import weigh
from armed_pyro.inference.objective import Objective

TERMS = ["(1 + x0 | item)", "(1 | person)", "(0 + x1 || school)"]


def crossed_data(outcome: str = "gaussian", n: int = 120) -> ClusteredData:
    rng = np.random.default_rng(3)
    labels = {
        "item": rng.integers(5, size=n),
        "person": rng.integers(9, size=n),
        "school": rng.integers(3, size=n),
    }
    x = rng.normal(size=(n, 2))
    eta = 0.3 + x[:, 0] + rng.normal(size=5)[labels["item"]] + rng.normal(size=9)[labels["person"]]
    y = eta + rng.normal(size=n) if outcome == "gaussian" else rng.poisson(np.exp(eta / 2))
    return ClusteredData.from_arrays(x, y, labels)


def bound(data: ClusteredData, family: str = "gaussian", **more: object) -> MixedEffects:
    net = nn.Linear(2, 1).double()
    return MixedEffects(net, TERMS, family, bayesian_head=True, **more).bind(data)


def design(model: MixedEffects, data: ClusteredData) -> tuple[torch.Tensor, ...]:
    """Dense Z over all factors' effects, X, and standardised y."""
    source = model.encode(data)
    blocks = []
    for factor in model.factors:
        phi = factor.design(source.x, {})
        k = len(model.data_facts().levels[factor.name])
        z = torch.zeros(len(source), k, phi.shape[1], dtype=phi.dtype)
        z[torch.arange(len(source)), source.codes[factor.name]] = phi
        blocks.append(z.flatten(1))
    x = torch.cat([torch.ones(len(source), 1), source.x], 1).double()
    facts = model.data_facts()
    y = (source.y - facts.center[0]) / facts.spread
    return torch.cat(blocks, 1), x, y


def closed_form(
    model: MixedEffects, data: ClusteredData, latents: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance of all effects given the hyperparameters."""
    z, x, y = design(model, data)
    levels = model.data_facts().levels
    prior = torch.block_diag(
        *[f.covariance(latents) for f in model.factors for _ in levels[f.name]]
    )
    tau = model.precision(latents)
    covariance = torch.linalg.inv(torch.linalg.inv(prior) + tau * z.T @ z)
    return covariance @ (tau * z.T @ (y - x @ latents["fixed_effect"])), covariance


def test_chosen_for_several_narrow_factors_only() -> None:
    data = crossed_data()
    assert isinstance(choose_guide(bound(data)), CrossedGuide)
    one = MixedEffects(nn.Linear(2, 1), "(1 | item)").bind(data)
    assert isinstance(choose_guide(one), StructuredGuide)


def test_conditional_is_exact_for_gaussian_outcomes_at_any_hyperparameters() -> None:
    data = crossed_data()
    model = bound(data)
    guide = CrossedGuide(model, model.encode(data))
    torch.manual_seed(1)
    with torch.no_grad():
        guide.hyperparameters.anchor.normal_(0, 0.5)
        guide.hyperparameters.log_scale.fill_(-20)
    latents = {k: v.detach() for k, v in guide.center(model.clusters()).items()}
    mean, covariance = closed_form(model, data, latents)
    effects = torch.cat([latents[f.effect_site].flatten() for f in model.factors])
    torch.testing.assert_close(effects, mean, rtol=1e-6, atol=1e-8)

    n = 20_000
    draws = guide.draws(model.clusters(), n)
    flat = torch.cat([draws[f.effect_site].flatten(1) for f in model.factors], 1)
    error = (flat.T.cov() - covariance).abs()
    scale = covariance.diagonal().sqrt()
    # The standard error of a covariance estimate is at most sqrt(2 / n) in units of the sds.
    assert (error / (scale[:, None] * scale)).max() < 5 * (2 / n) ** 0.5


def test_evidence_is_exact_when_the_hyperparameters_are_known() -> None:
    data = crossed_data()
    net = nn.Linear(2, 1).double()
    priors = Priors(sd=Known(0.8), residual_sd=Known(1.1))
    model = MixedEffects(
        net, ["(1 | item)", "(1 | person)", "(0 + x1 || school)"], priors=priors
    ).bind(data)
    source = model.encode(data)
    guide = CrossedGuide(model, source)
    objective = Objective(model, guide)
    elbos = torch.stack([objective(source.all()).elbo for _ in range(3)]) * data.n_rows

    z, _, _ = design(model, data)
    facts = model.data_facts()
    fixed = model.predictor(source.all(), {}).fixed[:, 0].detach()
    sds = torch.cat([f.prior_scale.repeat(len(facts.levels[f.name])) for f in model.factors])
    marginal = facts.spread**2 * (z * sds**2) @ z.T + 1.1**2 * torch.eye(data.n_rows).double()
    exact = torch.distributions.MultivariateNormal(fixed, marginal).log_prob(source.y)
    torch.testing.assert_close(elbos, exact.expand(3), rtol=1e-8, atol=1e-6)
    # Gradients stick the landing: there is none in any draw, not only on average.
    trained = [one for one in guide.parameters() if one.requires_grad and one.numel()]
    for one in torch.autograd.grad(objective(source.all()).total, trained):
        assert one.abs().max() < 1e-6


def test_counts_are_fitted_better_than_with_independent_factors() -> None:
    # Every item meets every person: their effects are known well, but only relative to another.
    rng = np.random.default_rng(4)
    item, person = (one.ravel() for one in np.indices((5, 8)))
    eta = 3 + rng.normal(size=5)[item] + rng.normal(size=8)[person]
    labels = {"item": item, "person": person}
    data = ClusteredData.from_arrays(np.zeros((40, 0)), rng.poisson(np.exp(eta)), labels)
    net = nn.Linear(0, 1).double()
    model = MixedEffects(net, ["(1 | item)", "(1 | person)"], "poisson", bayesian_head=True)

    def elbo(guide: type) -> float:
        schedule = Schedule(steps=250, stages=0)
        run = fit(model, data, guide=guide, schedule=schedule, progress=False)
        objective, rows = Objective(run.model, run.guide), run.model.encode(data).all()
        with torch.no_grad():
            return float(np.mean([objective(rows).elbo for _ in range(50)])) * data.n_rows

    assert elbo(CrossedGuide) > elbo(StructuredGuide) + 1


def test_some_clusters_have_the_conditionals_that_they_have_among_all() -> None:
    data = crossed_data()
    model = bound(data)
    source = model.encode(data)
    guide = CrossedGuide(model, source)
    largest = guide.nested().name
    chosen = torch.tensor([3, 0])
    few, every = source.whole_clusters(largest, chosen), source.all()
    center, whole = guide.center(few), guide.center(every)
    for factor in model.factors:
        expected = whole[factor.effect_site]
        expected = expected[chosen] if factor.name == largest else expected
        torch.testing.assert_close(center[factor.effect_site], expected)
    noise = gaussian_noise(guide, every, 4, model.reference())
    site = f"{largest}_effect"
    with NoiseMessenger(noise.values):
        all_drawn = guide(every)[site]
    with NoiseMessenger({**noise.values, site: noise.values[site][..., chosen, :]}):
        drawn = guide(few)[site]
    torch.testing.assert_close(drawn, all_drawn[..., chosen, :])


def test_where_steps_would_take_too_long_the_mode_is_kept(monkeypatch) -> None:
    rng = np.random.default_rng(5)
    a, b = np.arange(1200) % 60, rng.integers(0, 25, 1200)
    x = rng.normal(size=(1200, 1))
    y = x[:, 0] + rng.normal(0, 0.8, 60)[a] + rng.normal(0, 0.4, 25)[b] + rng.normal(size=1200)
    data = ClusteredData.from_arrays(x, y, {"a": a, "b": b})
    model = MixedEffects(nn.Linear(1, 1), "(1 | a) + (1 | b)", bayesian_head=True)
    monkeypatch.setattr("armed_pyro.inference.phases.efficient", lambda *_: False)
    trained = fit(model, data, seed=1, progress=False)
    assert trained.guide.work() == 60 * 25**2 + 25**3 // 3
    monkeypatch.setattr("armed_pyro.inference.phases.MOST_CLOSED_WORK", 0)
    kept = fit(model, data, seed=1, progress=False)
    assert kept.stopped == "converged"
    assert len(kept.history.loss) == 1 < len(trained.history.loss)
    assert kept.importance.k_hat < 0.7
    tables = [one.variance_components() for one in (kept, trained)]
    found, expected = (one[one["statistic"] == "sd"].set_index("factor") for one in tables)
    assert ((found["median"] - expected["median"]).abs() < 0.1 * expected["sd"]).all()
    assert (found["sd"] / expected["sd"] - 1).abs().max() < 0.15
    for part in ("computation", "model"):
        words = [getattr(one.diagnostics(), part).word for one in (kept, trained)]
        assert words[0] == words[1]


def test_a_sum_over_pairs_is_the_matrix_product(monkeypatch) -> None:
    """Of the same data, by either way: the joint conditional and its gradient."""
    data = crossed_data(n=40)
    model = bound(data)
    source = model.encode(data)
    found = []
    for sparse in (0, 10**9):
        monkeypatch.setattr("armed_pyro.guides.cross_products.SPARSE", sparse)
        guide = CrossedGuide(model, source)
        center = guide.center(source.all())
        total = sum((value**2).sum() for value in center.values())
        trained = [one for one in guide.parameters() if one.requires_grad]
        gradients = torch.autograd.grad(total, trained, allow_unused=True)
        found.append([*center.values(), *(one for one in gradients if one is not None)])
    assert (guide.between == 0).any()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_no_more_draws_are_weighed_at_once_than_fit_into_memory(monkeypatch) -> None:
    """Of the rows; sums of gaussian rows are not asked for."""
    for user in ("phases", "importance_sampling"):
        monkeypatch.setattr(f"armed_pyro.inference.{user}.exact_likelihood", lambda *_: None)
    data = crossed_data()
    model = MixedEffects(nn.Linear(2, 1).double(), TERMS, bayesian_head=True)
    run = fit(model, data, schedule=Schedule(steps=20), refine=False, progress=False)
    drawn = []

    def recorded(model, guide, rows, noise):
        drawn.append(len(noise.values["_theta"]))
        return weigh(model, guide, rows, noise)

    monkeypatch.setattr("armed_pyro.inference.importance_sampling.weigh", recorded)
    monkeypatch.setattr(CrossedGuide, "most_draws", lambda self: 700)
    assert len(run.importance.log_weights) == sum(drawn) == 4000
    assert max(drawn) == 700
