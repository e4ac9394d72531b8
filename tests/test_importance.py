"""Importance weights: each cluster's likelihood against closed forms and quadrature."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from torch import nn
from torch.distributions import MultivariateNormal

from armed_pyro import ClusteredData, Known, MixedEffects, Priors, Slopes, StructuredGuide
from armed_pyro.guides.crossed import CrossedGuide, choose_guide
from armed_pyro.guides.noise import Noise, NoiseMessenger, gaussian_noise, no_noise, proposal_noise
from armed_pyro.inference.nested_weights import weigh
from armed_pyro.inference.psis import FEWEST, pareto_smooth

K = 6
SIZES = [1, 2, 3, 9, 15, 30]
N = sum(SIZES)
KNOWN = Priors(sd=Known(0.9), residual_sd=Known(1.3))
CROSSED = ["(1 | batch)", "(1 + x0 || site)"]
pytestmark = pytest.mark.filterwarnings("ignore:there are fewer rows")


@pytest.fixture(autouse=True)
def quiet():
    """As while fitting: plates over clusters are used with many draws."""
    with pyro.validation_enabled(False):
        yield


def make_data(family="gaussian", **roles):
    rng = np.random.default_rng(0)
    site = rng.permutation(np.repeat(np.arange(K), SIZES))
    x = rng.normal(3, 2, (N, 2))
    eta = 0.5 * x[:, 0] + rng.normal(size=K)[site]
    outcomes = {
        "gaussian": 4 + 3 * (eta + rng.normal(size=N)),
        "bernoulli": (rng.random(N) < 1 / (1 + np.exp(1.5 - eta))).astype(float),
        "poisson": rng.poisson(np.exp(eta / 2)).astype(float),
    }
    labels = {"site": site, "batch": rng.permutation(np.arange(N) % 3)}
    return ClusteredData.from_arrays(x, outcomes[family], labels, **roles)


def bind(random, family="gaussian", data=None, guide=StructuredGuide, head=True, **options):
    data = make_data(family) if data is None else data
    torch.manual_seed(0)
    net = options.pop("net", None) or nn.Linear(2, 1).double()
    model = MixedEffects(net, random, family, bayesian_head=head, **options).bind(data)
    source = model.encode(data)
    return model, source, guide(model, source)


def at_theta(guide, noise, seed=3):
    """The same noise, with hyperparameters that are far from the guide's centre."""
    shape = noise.values["_theta"].shape
    random = torch.Generator().manual_seed(seed)
    theta = 4 * torch.randn(shape, generator=random, dtype=torch.float64)
    return Noise({**noise.values, "_theta": theta}, noise.log_ratio)


def of_draw(latents, draw):
    """One draw's hyperparameters, without the dimensions of draws and rows."""
    return {
        name: value[draw, 0, 0] if value.dim() > 2 else value
        for name, value in latents.items()
        if not name.endswith("_effect") or name == "fixed_effect"
    }


def cluster_likelihoods(model, source, latents):
    """log p(y_k | theta) of a gaussian outcome: dense, cluster by cluster."""
    rows, spread, (factor,) = source.all(), model.data_facts().spread, model.factors
    mean = model.predictor(rows, latents).fixed[:, 0]
    Z, D, sigma = factor.design(rows.x, {}), factor.covariance(latents), latents["residual_sd"]
    values = []
    for k in range(K):
        mine = source.codes["site"] == k
        V = Z[mine] @ D @ Z[mine].T + sigma**2 * torch.eye(int(mine.sum())).double()
        values.append(MultivariateNormal(mean[mine], spread**2 * V).log_prob(rows.y[mine]))
    return torch.stack(values)


# ---------------------------------------------------------------------------- gaussian outcomes


@pytest.mark.parametrize("random", ["(1 | site)", "(1 + x0 | site)", "(1 + x0 || site)"])
@pytest.mark.parametrize("role", [None, "offset"])
def test_one_particle_gives_each_clusters_exact_likelihood_at_any_theta(random, role):
    data = make_data(**{role: np.linspace(0, 9, N)} if role else {})
    model, source, guide = bind(random, data=data)
    torch.manual_seed(1)
    noise = at_theta(guide, gaussian_noise(guide, source.all(), 4, model.reference()))
    weighted = weigh(model, guide, source.all(), noise)
    assert weighted.particles.shape == (4, 1, K)
    assert weighted.clusters().shape == (4, K)
    for draw in range(4):
        latents = of_draw(weighted.latents, draw)
        expected = cluster_likelihoods(model, source, latents)
        torch.testing.assert_close(weighted.clusters()[draw], expected, rtol=1e-8, atol=1e-8)


def test_many_particles_agree_where_one_is_exact():
    model, source, guide = bind("(1 + x0 | site)", priors=Priors(residual_sd=Known(1.3)))
    torch.manual_seed(1)
    noise = proposal_noise(guide, source.all(), 2, 8, model.reference(), stretch=False)
    weighted = weigh(model, guide, source.all(), noise)
    assert weighted.particles.shape == (2, 8, K)
    each = weighted.particles
    torch.testing.assert_close(each, each[:, :1].expand_as(each), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(weighted.clusters(), each[:, 0], rtol=1e-8, atol=1e-8)


def test_the_evidence_of_known_variances_is_exact_in_every_draw_or_on_average():
    model, source, guide = bind("(1 + x0 || site)", priors=KNOWN)
    (factor,), facts, rows = model.factors, model.data_facts(), source.all()
    phi = factor.design(rows.x, {})
    Z = torch.zeros(N, K, 2).double()
    Z[torch.arange(N), source.codes["site"]] = phi
    Z, X = Z.flatten(1), torch.cat([torch.ones(N, 1).double(), rows.x], 1)
    D = torch.block_diag(*[factor.covariance(model.known())] * K)
    V = model.known()["residual_sd"] ** 2 * torch.eye(N).double() + Z @ D @ Z.T
    y = (rows.y - facts.center[0]) / facts.spread
    marginal = V + model.priors.fixed_sd**2 * X @ X.T
    evidence = MultivariateNormal(torch.zeros(N).double(), marginal).log_prob(y)
    evidence = evidence - N * math.log(facts.spread)
    precision = torch.eye(3) / model.priors.fixed_sd**2 + X.T @ torch.linalg.solve(V, X)
    covariance = torch.linalg.inv(precision)
    mean = covariance @ X.T @ torch.linalg.solve(V, y)
    guide.hyperparameters.set_normal(mean, torch.linalg.cholesky(covariance))
    torch.manual_seed(0)
    with torch.no_grad():
        noise = gaussian_noise(guide, rows, 5, model.reference())
        exact = weigh(model, guide, rows, noise).total()
        torch.testing.assert_close(exact, evidence.expand(5), rtol=1e-8, atol=1e-8)
        # From a proposal, and by a guide that is off: p(y) = E[exp(total)].
        wide = 1.3 * torch.linalg.cholesky(covariance)
        guide.hyperparameters.set_normal(mean + 0.3 * covariance.diagonal().sqrt(), wide)
        noise = proposal_noise(guide, rows, 20_000, 2, model.reference())
        ratio = (weigh(model, guide, rows, noise).total() - evidence).exp()
    assert abs(ratio.mean() - 1) < 4.5 * ratio.std() / math.sqrt(len(ratio))
    assert ratio.std() < 2


# --------------------------------------------------------------------------- bernoulli outcomes


def quadrature(model, source, latents, nodes=120):
    """log p(y_k | theta) by Gauss-Hermite quadrature over one or two random effects."""
    rows, (factor,) = source.all(), model.factors
    x, w = (torch.tensor(one) for one in np.polynomial.hermite.hermgauss(nodes))
    grid = torch.cartesian_prod(*[x] * len(factor.terms)).reshape(-1, len(factor.terms))
    log_w = torch.cartesian_prod(*[w] * len(factor.terms)).reshape(grid.shape).log().sum(-1)
    effects = math.sqrt(2) * grid @ torch.linalg.cholesky(factor.covariance(latents)).T
    fixed = model.predictor(rows, latents).fixed
    eta = fixed + (effects @ factor.design(rows.x, {}).T).T
    log_prob = -torch.nn.functional.softplus(torch.where(rows.y[:, None] > 0, -eta, eta))
    by_cluster = torch.zeros(K, len(grid)).double().index_add_(0, source.codes["site"], log_prob)
    constant = 0.5 * len(factor.terms) * math.log(math.pi)
    return torch.logsumexp(by_cluster + log_w, 1) - constant


@pytest.mark.parametrize("random", ["(1 | site)", "(1 + x0 | site)"])
def test_particles_agree_with_quadrature(random):
    model, source, guide = bind(random, "bernoulli")
    rows = source.all()
    torch.manual_seed(0)
    with torch.no_grad():
        guide.hyperparameters.anchor[: len(model.factors[0].terms)] = math.log(1.5)
        for _ in range(5):
            guide.refresh(model, source)
        noise = proposal_noise(guide, rows, 5, 64, model.reference(), heavy=False)
        weighted = weigh(model, guide, rows, noise)
        one = gaussian_noise(guide, rows, 5000, model.reference())
        one.values["_theta"][:] = noise.values["_theta"][:1]
        single = weigh(model, guide, rows, one).clusters()
    for draw in range(5):
        expected = quadrature(model, source, of_draw(weighted.latents, draw))
        torch.testing.assert_close(weighted.clusters()[draw], expected, rtol=0, atol=4e-3)
    # One particle is a lower bound, and noticeably so.
    gap = (quadrature(model, source, of_draw(weighted.latents, 0)) - single).sum(1)
    assert gap.mean() > 3 * gap.std() / math.sqrt(5000)


def test_a_few_particles_are_unbiased_for_the_likelihood_itself():
    """E[p^(y_k | theta)] = p(y_k | theta), at a fixed theta."""
    model, source, guide = bind("(1 | site)", "bernoulli")
    rows, n = source.all(), 4000
    torch.manual_seed(0)
    noise = proposal_noise(guide, rows, n, 2, model.reference())
    noise.values["_theta"][:] = noise.values["_theta"][:1]
    with torch.no_grad():
        weighted = weigh(model, guide, rows, noise)
        expected = quadrature(model, source, of_draw(weighted.latents, 0))
    ratio = (weighted.clusters() - expected).exp()
    assert ((ratio.mean(0) - 1).abs() < 4.5 * ratio.std(0) / math.sqrt(n)).all()
    assert (ratio.std(0) > 1e-3).all()


# ----------------------------------------------------------------------- random effects held


@pytest.mark.parametrize("sparse", [0, 10**9], ids=["pairs", "products"])
@pytest.mark.parametrize("random", ["(1 | site)", "(1 + x0 | site)", CROSSED])
def test_where_the_conditional_is_exact_they_may_be_held(random, sparse, monkeypatch):
    """log p(y | theta), its gradient and curvature are the same wherever the effects are."""
    monkeypatch.setattr("armed_pyro.guides.cross_products.SPARSE", sparse)
    kind = CrossedGuide if random is CROSSED else StructuredGuide
    model, source, guide = bind(random, guide=kind)
    guide.settle()
    guide.refresh(model, source)
    assert guide.exact(model)
    rows, size = source.all(), guide.hyperparameters.size
    drawn = at_theta(guide, gaussian_noise(guide, rows, 1, model.reference()))

    def derivatives(noise):
        theta = drawn.values["_theta"].clone().requires_grad_(True)
        given = replace(noise, values={**noise.values, "_theta": theta})
        weighted = weigh(model, guide, rows, given)
        total = (weighted.total() - weighted.hyper).sum()
        (slope,) = torch.autograd.grad(total, theta, create_graph=True)
        curves = [
            torch.autograd.grad(one, theta, retain_graph=True)[0].flatten()
            for one in slope.flatten()
        ]
        return total, slope, torch.stack(curves)

    expected = derivatives(drawn)
    assert (expected[1].abs() > 1e-3).any()
    assert expected[2].shape == (size, size)
    for noise in (replace(drawn, held=True), no_noise(guide, rows, model.reference())):
        assert noise.held
        for one, other in zip(derivatives(noise), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


# ---------------------------------------------------------------------------------- mini-batches


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("random", ["(1 + x0 | site)", CROSSED], ids=["nested", "crossed"])
def test_totals_of_whole_clusters_average_to_that_of_all_rows(random, size):
    kind = CrossedGuide if random is CROSSED else StructuredGuide
    model, source, guide = bind(random, guide=kind)
    torch.manual_seed(0)
    noise = gaussian_noise(guide, source.all(), 3, model.reference())

    def total(rows):
        chosen = rows.memberships["site"].index
        effects = noise.values["site_effect"][..., chosen, :]
        given = Noise({**noise.values, "site_effect": effects}, {})
        return weigh(model, guide, rows, given).total()

    with torch.no_grad():
        full = total(source.all())
        parts = torch.stack(
            [
                total(source.whole_clusters("site", torch.tensor(chosen)))
                for chosen in itertools.combinations(range(K), size)
            ]
        )
    torch.testing.assert_close(parts.mean(0), full, rtol=1e-8, atol=1e-8)
    assert (parts.std(0) > 1).all()


def test_gradients_of_whole_clusters_average_to_that_of_all_rows():
    model, source, guide = bind("(1 + x0 | site)", "bernoulli")
    guide.settle()
    torch.manual_seed(0)
    noise = proposal_noise(guide, source.all(), 2, 8, model.reference(), heavy=False)
    parameters = list(guide.hyperparameters.parameters())

    def gradient(rows):
        chosen = rows.memberships["site"].index
        values = {**noise.values, "site_effect": noise.values["site_effect"][..., chosen, :]}
        given = Noise(values, {"site_effect": noise.log_ratio["site_effect"][..., chosen]})
        total = weigh(model, guide, rows, given).total().mean()
        return torch.cat([one.flatten() for one in torch.autograd.grad(total, parameters)])

    parts = torch.stack(
        [
            gradient(source.whole_clusters("site", torch.tensor(chosen)))
            for chosen in itertools.combinations(range(K), 2)
        ]
    )
    full = gradient(source.all())
    torch.testing.assert_close(parts.mean(0), full, rtol=1e-7, atol=1e-8)
    assert parts.std(0).max() > 0.1
    assert full.abs().max() > 0.1


# ----------------------------------------------------------------------- against the program's own


PROGRAMS = {
    "none": ((), "gaussian", {}),
    "intercept": ("(1 | site)", "poisson", {}),
    "two-factors": (["(1 | batch)", "(1 + x0 | site)"], "bernoulli", {}),
    "crossed": (CROSSED, "gaussian", {"guide": CrossedGuide}),
    "known": ("(1 + x0 || site)", "gaussian", {"priors": KNOWN, "head": False}),
    "wide": (
        Slopes("site", on="1"),
        "gaussian",
        {"net": nn.Sequential(nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 1)).double()},
    ),
}


@pytest.mark.parametrize("batch", ["all", "rows", "whole"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_with_one_particle_the_total_is_the_programs_density_over_the_guides(name, batch):
    random, family, options = PROGRAMS[name]
    data = make_data(family, weights=np.arange(N) % 4 / 2)
    model, source, guide = bind(random, family, data, **options)
    rows = source.all()
    if batch == "rows":
        dense = N if guide.every_cluster() else 0
        rows = source.batch(torch.arange(5, 60, 3), dense_up_to=dense)
    elif batch == "whole" and guide.nested() is not None:
        rows = source.whole_clusters("site", torch.tensor([1, 4]))
    noise = gaussian_noise(guide, rows, 1, model.reference())
    shapes = guide.noise_shapes(rows)
    single = {site: one.reshape(shapes[site]) for site, one in noise.values.items()}
    with torch.no_grad():
        weighted = weigh(model, guide, rows, noise)
        with NoiseMessenger(single):
            given = poutine.trace(guide).get_trace(rows)
        trace = poutine.trace(poutine.replay(model, trace=given)).get_trace(rows)
        expected = trace.log_prob_sum() - given.log_prob_sum()
    if batch == "whole" and name == "crossed":
        # This guide leaves weights of clusters to the sum.
        site, weight = given.nodes["site_effect"], rows.memberships["site"].weight
        expected = expected - ((weight - 1) * site["fn"].log_prob(site["value"])).sum()
    torch.testing.assert_close(weighted.total()[0], torch.as_tensor(expected))
    if "_theta" in given.nodes:
        log_q = given.nodes["_theta"]["fn"].log_prob(given.nodes["_theta"]["value"])
        torch.testing.assert_close(weighted.hyper[0], -log_q)
    else:
        assert weighted.hyper[0] == 0


@pytest.mark.parametrize("kind", [StructuredGuide, CrossedGuide])
def test_the_latents_are_as_documented(kind):
    model, source, guide = bind(CROSSED, guide=kind)
    noise = proposal_noise(guide, source.all(), 5, 8, model.reference())
    weighted = weigh(model, guide, source.all(), noise)
    shapes = {name: tuple(one.shape) for name, one in weighted.latents.items()}
    assert shapes == {
        "residual_sd": (5, 1, 1),
        "fixed_effect": (5, 1, 1, 3),
        "batch_sd": (5, 1, 1, 1),
        "batch_effect": (5, 1, 3, 1),
        "site_sd": (5, 1, 1, 2),
        "site_effect": (5, 8, K, 2),
    }
    assert weighted.particles.shape == (5, 8, K)
    assert weighted.outer.shape == weighted.hyper.shape == weighted.total().shape == (5,)


@pytest.mark.parametrize("random", ["(1 + x0 | site)", CROSSED, ()], ids=["one", "crossed", "none"])
def test_rows_of_weight_zero_do_not_count(random):
    """Even where their outcome is beyond any likelihood."""
    weights = (np.arange(N) % 3 > 0).astype(float)
    data = make_data(weights=weights)
    model, source, guide = bind(random, data=data, guide=choose_guide)
    rows = source.all()
    noise = gaussian_noise(guide, rows, 3, model.reference())
    with torch.no_grad():
        weighted = weigh(model, guide, rows, noise)
        kept = source.batch(torch.tensor(weights > 0).nonzero()[:, 0], dense_up_to=N)
        # The same rows without the others; N / n times their likelihood, which is undone.
        object.__setattr__(kept, "scale", 1.0)
        other = weigh(model, guide, kept, noise)
        torch.testing.assert_close(weighted.total(), other.total())
        torch.testing.assert_close(weighted.clusters(), other.clusters())
        rows.y[weights == 0] = math.inf
        torch.testing.assert_close(weigh(model, guide, rows, noise).total(), weighted.total())


def test_a_program_without_latent_sites_weighs_its_likelihood():
    model, source, guide = bind((), "poisson", head=False)
    noise = gaussian_noise(guide, source.all(), 4, model.reference())
    assert not noise.values
    weighted = weigh(model, guide, source.all(), noise)
    expected = model.log_likelihood(source.all(), {}).sum()
    torch.testing.assert_close(weighted.total(), expected.reshape(1))
    assert weighted.clusters().shape == (1, 0)


def test_what_the_network_made_of_the_rows_gives_the_same_weights():
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    model, source, guide = bind(["(1 | site)", Slopes("site", on="1")], "poisson", net=net)
    torch.manual_seed(0)
    noise = proposal_noise(guide, source.all(), 2, 4, model.reference())
    one = weigh(model, guide, source.all(), noise).total()
    other = weigh(model, guide, model.compute(source).all(), noise).total()
    torch.testing.assert_close(one, other)


# ------------------------------------------------------------------------------- smoothing


def test_too_few_draws_for_a_tail_are_normalised_and_never_trusted():
    log_ratios = np.random.default_rng(0).normal(size=(3, FEWEST - 1))
    weights, k_hat = pareto_smooth(log_ratios)
    np.testing.assert_allclose(np.exp(weights).sum(1), 1.0)
    np.testing.assert_allclose(weights - weights[:, :1], log_ratios - log_ratios[:, :1])
    assert (k_hat == np.inf).all()
    enough = np.random.default_rng(0).normal(size=(3, FEWEST))
    assert np.isfinite(pareto_smooth(enough)[1]).all()
