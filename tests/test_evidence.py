"""The score of held-out rows, and the mean of a network's latest weights."""

import copy

import numpy as np
import pytest
import scipy
import torch
from torch import nn

from armed_pyro import ClusteredData, Known, MixedEffects, Priors
from armed_pyro.guides.crossed import choose_guide
from armed_pyro.inference.averaged_weights import LATEST, AveragedWeights
from armed_pyro.inference.evidence import Evidence

SD, RESIDUAL = 0.7, 0.4


def panel(seed=0, clusters=12, rows=5, within=0.5, between=0.5, family="gaussian"):
    """Rows whose slope within clusters may differ from that between them."""
    rng = np.random.default_rng(seed)
    g = np.repeat(np.arange(clusters), rows)
    mean, x = rng.normal(size=clusters)[g], rng.normal(size=len(g))
    eta = within * x + between * mean + SD * rng.normal(size=clusters)[g]
    y = eta + RESIDUAL * rng.normal(size=len(g))
    if family == "bernoulli":
        y = (rng.random(len(g)) < 1 / (1 + np.exp(-3 * eta))).astype(float)
    return ClusteredData.from_arrays((x + mean)[:, None], y, {"g": g})


def scored(data, slope, family="gaussian", priors=None):
    """The score of f(x) = slope x, and f in the outcome's units."""
    net = nn.Sequential(nn.Linear(1, 1), nn.Identity()).double()
    nn.init.constant_(net[0].weight, 0.0)
    nn.init.constant_(net[0].bias, 0.0)
    options = {"between": False, "linear_effects": False}
    plan = MixedEffects(net, "(1 | g)", family, priors=priors, **options)
    model = plan.bind(data)
    facts = model.data_facts()
    scale = facts.feature_scale[0] / facts.spread
    with torch.no_grad():
        model.network[0].weight.fill_(slope * scale)
    rows = model.encode(data)
    evidence = Evidence.of(model, choose_guide(model, rows), rows)
    fixed = facts.center[0] + slope * (data.features[:, 0].numpy() - facts.feature_mean[0])
    return evidence, np.asarray(fixed)


def test_the_score_is_the_joint_density_of_each_clusters_rows():
    data = panel()
    priors = Priors(sd=Known(SD), residual_sd=Known(RESIDUAL))
    evidence, fixed = scored(data, 0.5, priors=priors)
    g = np.repeat(np.arange(12), 5)
    covariance = SD**2 * (g[:, None] == g) + RESIDUAL**2 * np.eye(60)
    exact = scipy.stats.multivariate_normal(fixed, covariance).logpdf(data.outcome.numpy())
    assert evidence.loss(seed=0) == pytest.approx(-exact / 60, abs=1e-6)


def test_hyperparameters_are_those_of_the_held_out_rows():
    data = panel(clusters=60)
    evidence, fixed = scored(data, 0.5)
    evidence.loss(seed=0)
    with torch.no_grad():
        center = evidence.guide.center(evidence.model.clusters())
    spread = evidence.model.data_facts().spread
    residual = (data.outcome.numpy() - fixed).reshape(60, 5)
    within = np.sqrt(residual.var(1, ddof=1).mean())
    between = np.sqrt(residual.mean(1).var() - within**2 / 5)
    assert float(center["residual_sd"]) * spread == pytest.approx(within, rel=0.02)
    # The mode of the log sd is drawn to larger values by its Jacobian, by about 1 / (2 clusters).
    assert float(center["g_sd"].squeeze()) * spread == pytest.approx(between, rel=0.04)


@pytest.mark.parametrize("family", ["gaussian", "bernoulli"])
def test_the_score_prefers_the_slope_that_holds_within_and_between(family):
    data = panel(clusters=60, family=family)
    right = {"gaussian": 0.5, "bernoulli": 1.5}[family]
    losses = [scored(data, slope, family)[0].loss(seed=0) for slope in (0.0, right, 2 * right)]
    assert losses[1] < min(losses[0], losses[2]) - 0.02


def test_the_score_is_the_same_in_every_call_and_after_a_checkpoint():
    evidence, _ = scored(panel(family="bernoulli"), 1.0, "bernoulli")
    first, second = evidence.loss(seed=3), evidence.loss(seed=3)
    assert second == pytest.approx(first, abs=1e-3)
    other, _ = scored(panel(family="bernoulli"), 1.0, "bernoulli")
    other.restore(evidence.state())
    before = torch.get_rng_state()
    assert other.loss(seed=3) == evidence.loss(seed=3)
    assert torch.equal(before, torch.get_rng_state())


def test_effects_inside_the_network_have_no_such_score():
    data = panel()
    model = MixedEffects(nn.Sequential(nn.Linear(1, 1)).double(), "(1 | g)").bind(data)
    guide = choose_guide(model, model.encode(data))
    monster = copy.deepcopy(guide)
    monster.work = lambda: 2**60
    assert Evidence.of(model, guide, model.encode(data)) is not None
    assert Evidence.of(model, monster, model.encode(data)) is None


def test_averaged_weights_have_little_noise_and_follow():
    rng = np.random.default_rng(0)
    network, steps = nn.Linear(1, 1, bias=False).double(), 400
    ends = []
    for _ in range(40):
        nn.init.zeros_(network.weight)
        averaged = AveragedWeights(network)
        for step in range(1, steps + 1):
            nn.init.constant_(network.weight, step / steps + rng.normal())
            averaged.add()
        ends.append(averaged.tensors["weight"].item())
    # Shares grow as t^(a - 1), so their mean is about a / (a + 1) and the sum of their squares
    # a^2 / (2a - 1) / steps.
    a = LATEST
    sd = a / np.sqrt((2 * a - 1) * steps)
    assert abs(np.mean(ends) - a / (a + 1)) < 0.005 + 3 * sd / np.sqrt(40)
    assert abs(np.std(ends) / sd - 1) < 3 / np.sqrt(80)


def test_averaged_weights_are_in_the_network_only_inside_and_resume():
    network = nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2))
    averaged = AveragedWeights(network)
    for step in range(5):
        nn.init.constant_(network[0].weight, float(step))
        network(torch.randn(4, 1))
        averaged.add()
    with averaged.in_place():
        inside = copy.deepcopy(network.state_dict())
    assert network[0].weight.eq(4.0).all()
    assert torch.equal(inside["0.weight"], averaged.tensors["0.weight"])
    assert inside["1.num_batches_tracked"] == 5
    again = AveragedWeights(network)
    again.restore(averaged.state())
    for part in (averaged, again):
        nn.init.constant_(network[0].weight, 9.0)
        part.add()
    assert all(torch.equal(again.tensors[k], averaged.tensors[k]) for k in inside)
