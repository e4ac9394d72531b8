"""The objective: unbiased in mini-batches, exact where the posterior is known."""

import math
from functools import partial

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from armed_pyro import (
    Adversary,
    ClusteredData,
    Known,
    MixedEffects,
    Priors,
    Slopes,
    StructuredGuide,
)
from armed_pyro.distributions.whitened import Pushforward
from armed_pyro.guides.noise import NoiseMessenger, gaussian_noise, proposal_noise
from armed_pyro.inference.objective import NestedBound, Objective

N, K, BATCH = 48, 6, 8
SIZES = {"balanced": [8] * K, "unbalanced": [33, 9, 3, 1, 1, 1]}
pytestmark = pytest.mark.filterwarnings("ignore:there are fewer rows")


def make_data(sizes="unbalanced", family="gaussian", weights=False, seed=0):
    rng = np.random.default_rng(seed)
    site, x = rng.permutation(np.repeat(np.arange(K), SIZES[sizes])), rng.normal(1, 2, (N, 2))
    signal = x[:, 0] + rng.normal(size=K)[site]
    y = rng.poisson(np.exp(signal / 4)) if family == "poisson" else signal + rng.normal(size=N)
    clusters = {"site": site, "batch": rng.permutation(np.arange(N) % 4)}
    given = rng.uniform(0.2, 3, N) if weights else None
    return ClusteredData.from_arrays(x, y, clusters, weights=given)


def deep(width=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 1)).double()


def bind(random, data=None, family="gaussian", net=None, **settings):
    torch.manual_seed(0)
    data = make_data(family=family) if data is None else data
    net = nn.Linear(2, 1).double() if net is None else net
    model = MixedEffects(net, random, family, **settings).bind(data)
    source = model.encode(data)
    # Of the shape of q(theta), too, which is trained only once the network is settled.
    return model, source, StructuredGuide(model, source).requires_grad_(True)


def disturb(guide, size=0.3, seed=1):
    """Move a guide away from the exact posterior, at which gradients vanish."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(size * torch.randn_like(parameter))


# ---------------------------------------------------------------------------- unbiased batches


class CommonNoise:
    """Every draw of theta has the same noise, and so has every draw of cluster k's effects.

    Then a mini-batch's gradient is a sum over its rows, and averages exactly.
    """

    def __init__(self, model, monkeypatch, seed=5):
        random = torch.Generator().manual_seed(seed)
        clusters = {f.name: len(one) for f in model.factors for one in [model.facts.counts[f.name]]}
        self.noise = {
            len(f.terms): torch.randn(
                clusters[f.name], len(f.terms), generator=random, dtype=torch.float64
            )
            for f in model.factors
        }
        assert len(self.noise) == len(model.factors)  # factors are told apart by their terms
        self.names = {len(f.terms): f.name for f in model.factors}
        self.theta = torch.randn(99, generator=random, dtype=torch.float64)
        self.rows = None

        def common(q, sample_shape=()):
            hyperparameters = not q.batch_shape
            return q.push(self.theta[: q.event_shape[0]] if hyperparameters else self.of(q))

        monkeypatch.setattr(Pushforward, "rsample", common)

    def of(self, q):
        terms = q.event_shape[0]
        return self.noise[terms][self.rows.memberships[self.names[terms]].index]


def gradients(model, guide, noise, rows):
    """The loss and its gradient by every parameter of guide, network and adversaries."""
    noise.rows = rows
    parameters = dict(guide.named_parameters(prefix="guide"))
    parameters |= dict(model.named_parameters(prefix="model"))
    loss = Objective(model, guide)(rows)
    found = torch.autograd.grad(loss.total, list(parameters.values()), allow_unused=True)
    zeros = map(torch.zeros_like, parameters.values())
    filled = [zero if one is None else one for one, zero in zip(found, zeros, strict=True)]
    parts = {"loss": loss.total, "elbo": loss.elbo, "fixed": loss.fixed, "game": loss.adversarial}
    return dict(zip(parameters, filled, strict=True)) | {k: v.detach() for k, v in parts.items()}


PROGRAMS = {
    "slopes": ("(1 + x0 | site)", {"bayesian_head": True}),
    "crossed": ("(1 + x0 || site) + (1 | batch)", {}),
    "counts": ("(1 | site)", {"family": "poisson"}),
    "deep": (
        ["(1 | site)", Slopes("site", on="1")],
        {"net": deep(), "bayesian_head": True, "fixed_weight": 0.7},
    ),
    "wide": (Slopes("site", on="1"), {"net": deep(20), "fixed_weight": 0.7}),
}


@pytest.mark.parametrize("dense_up_to", [1000, 0])
@pytest.mark.parametrize(("sizes", "weights"), [("balanced", False), ("unbalanced", True)])
@pytest.mark.parametrize("name", PROGRAMS)
def test_batch_gradients_average_to_the_full_one(name, sizes, dense_up_to, weights, monkeypatch):
    random, settings = PROGRAMS[name]
    data = make_data(sizes, settings.get("family"), weights)
    game = [Adversary("batch", taps=["1"], weight=2.0)] if name == "deep" else []
    model, source, guide = bind(random, data, adversary=game, **settings)
    disturb(guide)
    noise = CommonNoise(model, monkeypatch)
    full = gradients(model, guide, noise, source.all())
    order = torch.randperm(N, generator=torch.Generator().manual_seed(7))
    batches = [
        gradients(model, guide, noise, source.batch(index, dense_up_to=dense_up_to))
        for index in order.split(BATCH)
    ]
    spread = 0.0
    for key, expected in full.items():
        parts = torch.stack([one[key] for one in batches])
        torch.testing.assert_close(parts.mean(0), expected, rtol=1e-6, atol=1e-8)
        spread = max(spread, float(parts.std(0).max()))
    assert spread > 1e-3  # the batches themselves do differ
    moved = [key for key, one in full.items() if one.abs().max() > 1e-6]
    assert any(key.startswith("guide") for key in moved)
    head = name == "slopes"  # its network is the latent head alone
    assert any(key.startswith("model.net") for key in moved) is not head


def test_clusters_that_weigh_wrongly_would_be_found(monkeypatch):
    """The test above can fail: with weight 1 for every cluster in a batch, gradients are off."""
    model, source, guide = bind("(1 + x0 | site)", bayesian_head=True)
    disturb(guide)
    noise = CommonNoise(model, monkeypatch)
    full = gradients(model, guide, noise, source.all())
    total = torch.zeros_like(full["loss"])
    for index in torch.arange(N).split(BATCH):
        rows = source.batch(index, dense_up_to=0)
        object.__setattr__(rows.memberships["site"], "weight", None)
        total += gradients(model, guide, noise, rows)["loss"] / (N / BATCH)
    assert (total - full["loss"]).abs() > 1e-2


# ----------------------------------------------------------------------------- exact posteriors


def standardised(model, source):
    """Residual outcome, design of the fixed effects and of the random ones, all rows."""
    rows, facts = source.all(), model.data_facts()
    (factor,) = model.factors
    y = (rows.y - facts.center[0]) / facts.spread
    X = torch.cat([torch.ones(N, 1).double(), rows.x], 1)
    phi, code = factor.design(rows.x, {}), source.codes["site"]
    Z = torch.zeros(N, K, phi.shape[1]).double()
    Z[torch.arange(N), code] = phi
    return y, X, Z.flatten(1)


def all_known(random, **settings):
    priors = Priors(sd=Known(0.9), residual_sd=Known(1.3))
    model, source, guide = bind(random, priors=priors, **settings)
    sigma = model.known()["residual_sd"]
    y, X, Z = standardised(model, source)
    D = torch.block_diag(*[model.factors[0].covariance(model.known())] * K)
    V = sigma**2 * torch.eye(N).double() + Z @ D @ Z.T
    return model, source, guide, (y, X, V)


def elbos(model, guide, rows, n):
    with torch.no_grad():
        objective = Objective(model, guide)
        return N * torch.stack([objective(rows).elbo for _ in range(n)])


def assert_no_gradient(model, guide, rows):
    """Sticking the landing: not only on average, but in every draw."""
    loss = Objective(model, guide)(rows).total
    for one in torch.autograd.grad(loss, list(guide.parameters()), allow_unused=True):
        assert one is None or one.numel() == 0 or one.abs().max() < 1e-6


@pytest.mark.parametrize("random", ["(1 | site)", "(1 + x0 || site)"])
def test_elbo_at_the_posterior_is_the_log_marginal_likelihood(random):
    """In every draw: log p(y) = log N(y; f, s^2 (sigma^2 I + Z D Z'))."""
    model, source, guide, (y, _, V) = all_known(random)
    facts, rows = model.data_facts(), source.all()
    f = model.net(rows.x)[:, 0].detach()
    marginal = dist.MultivariateNormal(f, V).log_prob(y) - N * math.log(facts.spread)
    torch.manual_seed(0)
    got = elbos(model, guide, rows, 5)
    torch.testing.assert_close(got, marginal.expand(5), rtol=1e-7, atol=1e-7)
    assert_no_gradient(model, guide, rows)


@pytest.mark.parametrize("random", ["(1 | site)", "(1 + x0 || site)"])
def test_elbo_at_the_posterior_with_latent_fixed_effects(random):
    """Exact only because the random effects' conditional follows the draw of beta."""
    model, source, guide, (y, X, V) = all_known(random, bayesian_head=True)
    prior = 2.5**2
    precision = torch.eye(3) / prior + X.T @ torch.linalg.solve(V, X)
    covariance = torch.linalg.inv(precision)
    with torch.no_grad():
        mean = covariance @ X.T @ torch.linalg.solve(V, y)
        guide.hyperparameters.set_normal(mean, torch.linalg.cholesky(covariance))
    marginal = dist.MultivariateNormal(torch.zeros(N).double(), V + prior * X @ X.T).log_prob(y)
    marginal -= N * math.log(model.data_facts().spread)
    torch.manual_seed(0)
    got = elbos(model, guide, source.all(), 5)
    torch.testing.assert_close(got, marginal.expand(5), rtol=1e-6, atol=1e-6)
    assert_no_gradient(model, guide, source.all())


def closed_form_elbo(model, source, guide):
    """E_q log p(y | u) - KL(q(u) | p(u)) for a gaussian outcome with known sds."""
    q = poutine.trace(guide).get_trace(source.all()).nodes["site_effect"]["fn"]
    mean, half = q.mean, torch.linalg.solve_triangular(q.whitened.root, q.scale.mT, upper=False)
    S = half.mT @ half
    rows, facts, (factor,) = source.all(), model.data_facts(), model.factors
    sigma, code = model.known()["residual_sd"], source.codes["site"]
    phi = factor.design(rows.x, {})
    y = (rows.y - facts.center[0]) / facts.spread - model.net(rows.x)[:, 0]
    error = (y - (phi * mean[code]).sum(1)) ** 2
    error = error + torch.einsum("ni,nij,nj->n", phi, S[code], phi)
    likelihood = -0.5 * error / sigma**2 - sigma.log() - 0.5 * math.log(2 * math.pi)
    D = factor.covariance(model.known())
    second = S + mean[..., :, None] * mean[..., None, :]
    kl = torch.linalg.solve(D, second).diagonal(dim1=-2, dim2=-1).sum(-1) - len(D)
    kl = kl + D.logdet() - S.logdet()
    return likelihood.sum() - 0.5 * kl.sum() - N * math.log(facts.spread)


@pytest.mark.parametrize("dense_up_to", [None, 1000, 0])
def test_expected_elbo_is_the_closed_form(dense_up_to):
    """With all rows, and with random mini-batches in both modes."""
    model, source, guide, _ = all_known("(1 + x0 || site)")
    disturb(guide)
    expected = closed_form_elbo(model, source, guide).item()
    torch.manual_seed(2)
    n = 300
    rows = [
        source.all()
        if dense_up_to is None
        else source.batch(torch.randperm(N)[:BATCH], dense_up_to=dense_up_to)
        for _ in range(n)
    ]
    got = torch.cat([elbos(model, guide, one, 1) for one in rows])
    assert got.mean().item() == pytest.approx(expected, abs=4 * got.std().item() / math.sqrt(n))


def test_expected_gradient_is_that_of_the_closed_form():
    """Sticking the landing leaves the gradient unbiased."""
    model, source, guide, _ = all_known("(1 + x0 || site)")
    disturb(guide)
    parameters = [*guide.parameters(), *model.net.parameters()]
    exact = torch.autograd.grad(
        -closed_form_elbo(model, source, guide) / N, parameters, allow_unused=True
    )
    torch.manual_seed(3)
    n = 200
    draws = [
        torch.autograd.grad(
            Objective(model, guide)(source.all()).total, parameters, allow_unused=True
        )
        for _ in range(n)
    ]
    compared = 0
    for one, *many in zip(exact, *draws, strict=True):
        if one is not None:
            many = torch.stack(many)
            error = 4.5 * many.std(0) / math.sqrt(n)
            assert ((many.mean(0) - one).abs() <= error + 1e-12).all()
            compared += 1
    assert compared >= 4


# --------------------------------------------------------------------- the fixed-effects term


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("head", [False, True])
def test_fixed_effects_term_trains_the_network_only(head, weights):
    data = make_data(weights=weights)
    grads, losses = [], []
    for weight in (0.0, 2.0):
        model, source, guide = bind(
            "(1 | site)", data, net=deep(), bayesian_head=head, fixed_weight=weight
        )
        torch.manual_seed(4)
        loss = Objective(model, guide)(source.all())
        loss.total.backward()
        losses.append(loss)
        grads.append(
            [{n: p.grad for n, p in part.named_parameters()} for part in (guide, model.net)]
        )
    (guide0, net0), (guide1, net1) = grads
    for name in guide0:
        torch.testing.assert_close(guide0[name], guide1[name])
    torch.testing.assert_close(losses[0].elbo, losses[1].elbo)
    torch.testing.assert_close(losses[1].total, losses[0].total + 2 * losses[1].fixed)
    assert losses[0].fixed == 0
    assert not torch.allclose(net0["0.weight"], net1["0.weight"])


def test_fixed_effects_term_is_the_likelihood_under_them_alone():
    data = make_data(weights=True)
    priors = Priors(residual_sd=Known(1.5))
    settings = {"priors": priors, "fixed_weight": 2.0, "linear_effects": False}
    model, source, guide = bind("(1 | site)", data, net=deep(), **settings)
    loss = Objective(model, guide)(source.all())
    facts = model.data_facts()
    f = facts.center[0] + facts.spread * model.net(source.x)[:, 0]
    log_prob = dist.Normal(f, 1.5).log_prob(data.outcome) * data.weights
    torch.testing.assert_close(loss.fixed, -log_prob.mean().detach())


# ---------------------------------------------------------------------------------- edge cases


def test_parts_are_detached_and_add_up():
    games = [Adversary("site", taps=["1"]), Adversary("batch", taps=["1"])]
    model, source, guide = bind("(1 | site)", net=deep(), adversary=games, fixed_weight=0.5)
    loss = Objective(model, guide)(source.all())
    torch.testing.assert_close(loss.total, -loss.elbo + 0.5 * loss.fixed + loss.adversarial)
    assert loss.total.requires_grad
    assert not any(one.requires_grad for one in (loss.elbo, loss.fixed, loss.adversarial))
    assert loss.accuracy.shape == (2,)


def test_nothing_latent_is_maximum_likelihood():
    model, source, guide = bind((), family="poisson")
    loss = Objective(model, guide)(source.all())
    expected = model.log_likelihood(source.all(), {}).mean()
    torch.testing.assert_close(loss.total, -expected)
    assert loss.accuracy.shape == (0,)


# ------------------------------------------------------------------------------- once settled


def settled(random, family="gaussian", **options):
    model, source, guide = bind(random, make_data(family=family), family, **options)
    guide.settle()
    model.eval()
    return model, model.compute(source), guide


def shared_noise(monkeypatch, noise):
    monkeypatch.setattr(
        "armed_pyro.inference.nested_weights.gaussian_noise", lambda *arguments: noise
    )


def given(guide, values, rows):
    """The guide's draw of this noise; the program's sites have the same names."""
    with NoiseMessenger(values):
        return guide(rows)


@pytest.mark.parametrize("name", ["slopes", "crossed", "counts", "deep", "wide"])
def test_with_one_particle_the_bound_is_the_objective(name, monkeypatch):
    """The same loss, and the same gradient by what is still trained, averaged over draws."""
    random, options = PROGRAMS[name]
    options = {key: one for key, one in options.items() if key != "fixed_weight"}
    model, source, guide = settled(random, **options)
    disturb(guide)
    rows = source.all()
    shapes = guide.noise_shapes(rows)
    torch.manual_seed(0)
    noise = gaussian_noise(guide, rows, 3, model.reference())
    shared_noise(monkeypatch, noise)
    trained = [one for one in guide.parameters() if one.requires_grad]
    bound = NestedBound(model, guide, 1)(rows, 3)
    got = torch.autograd.grad(bound.total, trained)
    totals = []
    for draw in range(3):
        values = {site: one[draw].reshape(shapes[site]) for site, one in noise.values.items()}
        totals.append(Objective(model, partial(given, guide, values))(rows).total)
    torch.testing.assert_close(bound.total, torch.stack(totals).mean())
    expected = torch.autograd.grad(torch.stack(totals).mean(), trained)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
    assert max(one.abs().max() for one in got) > 1e-3


def test_more_particles_make_the_bound_tighter():
    priors = Priors(sd=Known(1.0))
    model, source, guide = settled("(1 + x0 || site)", "poisson", priors=priors)
    with torch.no_grad():
        torch.manual_seed(0)
        one, few, some, many = (
            N * float(NestedBound(model, guide, particles)(source.all(), 400).elbo)
            for particles in (1, 4, 16, 64)
        )
    assert one + 0.05 < some
    assert few < some
    assert abs(many - some) < 0.1 * (some - one)


@pytest.mark.parametrize("particles", [1, 4])
def test_at_the_posterior_the_bound_is_the_log_marginal_likelihood(particles, monkeypatch):
    """In every draw, and without a gradient. Stretched particles have weights, but no bias."""
    model, source, guide, (y, X, V) = all_known("(1 + x0 || site)", bayesian_head=True)
    guide.settle()
    prior = model.priors.fixed_sd**2
    covariance = torch.linalg.inv(torch.eye(3) / prior + X.T @ torch.linalg.solve(V, X))
    mean = covariance @ X.T @ torch.linalg.solve(V, y)
    guide.hyperparameters.set_normal(mean, torch.linalg.cholesky(covariance))
    marginal = dist.MultivariateNormal(torch.zeros(N).double(), V + prior * X @ X.T).log_prob(y)
    marginal -= N * math.log(model.data_facts().spread)
    torch.manual_seed(0)
    if particles > 1:
        plain = partial(proposal_noise, stretch=False, heavy=False)
        monkeypatch.setattr(
            "armed_pyro.inference.nested_weights.proposal_noise",
            lambda *arguments, heavy: plain(*arguments),
        )
    for _ in range(3):
        loss = NestedBound(model, guide, particles)(source.all(), 1)
        torch.testing.assert_close(N * loss.elbo, marginal, rtol=1e-7, atol=1e-7)
        trained = list(guide.hyperparameters.parameters())
        for one in torch.autograd.grad(loss.total, trained):
            assert one.abs().max() < 1e-6


def test_the_bounds_parts_are_detached_and_add_up():
    model, source, guide = settled("(1 | site)", "poisson")
    loss = NestedBound(model, guide, 4)(source.all(), 2)
    torch.testing.assert_close(loss.total, -loss.elbo)
    assert loss.total.requires_grad
    assert not loss.elbo.requires_grad
    assert loss.accuracy.shape == (0,)
    assert (loss.fixed, loss.adversarial) == (0, 0)
