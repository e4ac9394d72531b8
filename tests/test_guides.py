"""The structured guide: its densities, and where it is the exact posterior."""

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from armed_pyro import ClusteredData, Known, MixedEffects, Priors, Slopes, StructuredGuide
from armed_pyro.distributions.observed_normal import ObservedNormal
from armed_pyro.distributions.whitened import WhitenedDiagonal, WhitenedNormal
from armed_pyro.guides.crossed import choose_guide
from armed_pyro.guides.row_sums import newton_excess
from armed_pyro.inference.objective import Objective

N, K = 60, 6
SLOPES = "(1 + x0 | site)"
pytestmark = pytest.mark.filterwarnings("ignore:there are fewer rows")


def make_data(family="gaussian", seed=0, **roles):
    rng = np.random.default_rng(seed)
    sizes = [1, 2, 3, 9, 15, 30]
    site, x = rng.permutation(np.repeat(np.arange(K), sizes)), rng.normal(3, 2, (N, 2))
    outcomes = {
        "gaussian": rng.normal(size=K)[site] + rng.normal(size=N),
        "poisson": rng.poisson(3, N),
        "negative_binomial": rng.poisson(rng.gamma(2, 2, N)),
        "bernoulli": rng.permutation(np.arange(N) % 2),
        "categorical": rng.permutation(np.arange(N) % 3).astype(str),
    }
    clusters = {"site": site, "batch": rng.permutation(np.arange(N) % 3)}
    return ClusteredData.from_arrays(x, outcomes[family], clusters, **roles)


def bind(random=SLOPES, family="gaussian", data=None, net=None, observe=True, **settings):
    data = make_data(family) if data is None else data
    torch.manual_seed(0)
    net = nn.Linear(2, 3 if family == "categorical" else 1).double() if net is None else net
    model = MixedEffects(net, random, family, **settings).bind(data)
    source = model.encode(data)
    return model, source, StructuredGuide(model, source if observe else None)


def conditional(guide, rows, theta=None, site="site_effect"):
    """q(u | theta) and the latent sites, at a given theta."""
    given = guide if theta is None else poutine.condition(guide, data={"_theta": theta})
    trace = poutine.trace(given).get_trace(rows)
    return trace.nodes[site]["fn"], trace.nodes["_RETURN"]["value"]


def moments(q):
    """Mean and covariance matrices of q(u | theta)."""
    q = q.whitened if isinstance(q, ObservedNormal) else q
    if isinstance(q, WhitenedNormal):
        root = torch.linalg.solve_triangular(q.root, q.scale.mT, upper=False)
        return q.mean, root.mT @ root
    return q.mean, torch.diag_embed((q.scale / q.root) ** 2)


def some_theta(guide, seed=3):
    loc, random = guide.hyperparameters.anchor, torch.Generator().manual_seed(seed)
    return loc + torch.randn(loc.shape, generator=random, dtype=loc.dtype)


# -------------------------------------------------------------------------------------- q(theta)


def test_density_of_the_hyperparameters():
    """log q(sd, r, beta, sigma) = log N(theta) - log |d(sd, r, sigma) / d theta|."""
    _, source, guide = bind(bayesian_head=True)
    hyper = guide.hyperparameters
    n = hyper.size
    with torch.no_grad():
        hyper.shift.add_(0.3 * torch.randn(n))
        hyper.log_scale.add_(0.3 * torch.randn(n))
        hyper.coupling.add_(0.3 * torch.randn(n, n))
    trace = poutine.trace(guide).get_trace(source.all())
    nodes = trace.nodes
    theta = nodes["_theta"]["value"]
    coupling = hyper.distribution().parameters.coupling
    L = hyper.log_scale.exp()[:, None] * (torch.eye(n) + coupling)
    expected = dist.MultivariateNormal(hyper.anchor + hyper.shift, L @ L.mT).log_prob(theta)
    sds = [nodes["residual_sd"]["value"][None], nodes["site_sd"]["value"]]
    expected -= torch.cat(sds).log().sum()
    expected -= torch.log1p(-(nodes["site_cor_cholesky"]["value"][1, 0] ** 2))
    trace.compute_log_prob()
    effects = nodes["site_effect"]["log_prob_sum"]
    torch.testing.assert_close(trace.log_prob_sum() - effects, expected, rtol=1e-5, atol=0)


def test_the_hyperparameters_become_any_normal_distribution():
    """Whatever they were before; with the program's sites in order, fixed effects last."""
    _, _, guide = bind(bayesian_head=True)
    hyper = guide.hyperparameters
    names = [site.name for site in hyper.sites]
    assert names == ["residual_sd", "site_sd", "site_cor_cholesky", "fixed_effect"]
    with torch.no_grad():
        for one in hyper.parameters():
            one.normal_()
    mean, root = some_theta(guide), torch.randn(hyper.size, hyper.size).double().tril()
    root.diagonal().abs_().add_(0.1)
    hyper.set_normal(mean, root)
    q, value = hyper.distribution(), torch.randn(9, hyper.size).double()
    dense = dist.MultivariateNormal(mean, scale_tril=root)
    torch.testing.assert_close(q.log_prob(value), dense.log_prob(value))
    center = hyper.center()
    torch.testing.assert_close(center["residual_sd"], mean[0].exp())
    torch.testing.assert_close(center["site_sd"], mean[1:3].exp())
    torch.testing.assert_close(center["fixed_effect"], mean[4:])


def test_the_guide_has_the_programs_sites():
    for random in (
        SLOPES,
        "(1 | site) + (1 + x0 || batch)",
        ["(1 | site)", "(0 + x0 + x1 | site)"],
    ):
        for family in ("gaussian", "categorical", "negative_binomial"):
            model, source, guide = bind(random, family, bayesian_head=True)
            got = poutine.trace(guide).get_trace(source.all())
            trace = poutine.trace(poutine.replay(model, trace=got)).get_trace(source)
            wanted = set(trace.stochastic_nodes) - {"site", "batch", "row"}
            assert set(got.stochastic_nodes) - {"site", "batch", "_theta"} == wanted
            assert torch.isfinite(trace.log_prob_sum())
            assert torch.isfinite(got.log_prob_sum())
            assert set(guide.center(source.all())) >= wanted


def test_draws_are_vectorised():
    model, _, guide = bind("(1 + x0 | site) + (1 | batch)", bayesian_head=True)
    draws = guide.draws(model.clusters(), 7)
    assert {name: tuple(one.shape) for name, one in draws.items()} == {
        "residual_sd": (7, 1),
        "fixed_effect": (7, 1, 3),
        "site_sd": (7, 1, 2),
        "site_cor_cholesky": (7, 1, 2, 2),
        "batch_sd": (7, 1, 1),
        "site_effect": (7, K, 2),
        "batch_effect": (7, 3, 1),
    }
    assert not any(one.requires_grad for one in draws.values())


def test_draws_come_in_as_many_pieces_as_memory_needs(monkeypatch):
    model, _, guide = bind(priors=Priors(residual_sd=Known(1.0)))
    whole = guide.draws(model.clusters(), 7)
    monkeypatch.setattr(StructuredGuide, "most_draws", lambda self: 3)
    pieces = guide.draws(model.clusters(), 7)
    assert {k: v.shape for k, v in pieces.items()} == {k: v.shape for k, v in whole.items()}
    assert len(pieces["site_effect"].unique(dim=0)) == 7
    assert pieces["residual_sd"].dim() == 0


def test_vectorised_draws_are_the_single_ones():
    """At each of n thetas, the conditional of a vectorised guide is that of a single one."""
    _, source, guide = bind(bayesian_head=True)
    thetas = torch.stack([some_theta(guide, seed) for seed in range(4)])
    with pyro.plate("draws", 4, dim=-2):
        together, _ = conditional(guide, source.all(), thetas[:, None])
    for theta, mean, cov in zip(thetas, *moments(together), strict=True):
        one, _ = conditional(guide, source.all(), theta)
        torch.testing.assert_close(mean, moments(one)[0])
        torch.testing.assert_close(cov, moments(one)[1])


# -------------------------------------------------------------------------------------- q(u|theta)


def test_intercepts_and_known_sds_start_at_the_exact_posterior():
    """u_k | y ~ N(s2 sum_i(y - f) / (s2 n_k + v), s2 v / (s2 n_k + v))."""
    s2, v = 0.8**2, 1.1**2
    priors = Priors(sd=Known(0.8), residual_sd=Known(1.1))
    model, source, guide = bind("(1 | site)", priors=priors)
    q, _ = conditional(guide, source.all())
    mean, cov = moments(q)
    rows, spread = source.all(), model.data_facts().spread
    residual = (rows.y - model.predictor(rows, {}).fixed[:, 0]).detach()
    n = source.counts["site"].double()
    total = torch.zeros(K).double().index_add_(0, source.codes["site"], residual)
    torch.testing.assert_close(mean[:, 0] * spread, s2 * total / (s2 * n + v))
    torch.testing.assert_close(cov[:, 0, 0] * spread**2, s2 * v / (s2 * n + v))


def exact_posterior(model, source, latents):
    """Of u_k given everything else, for gaussian outcomes: by the textbook, cluster by cluster."""
    rows, spread = source.all(), model.data_facts().spread
    (factor,) = model.factors
    fixed = model.predictor(rows, {"fixed_effect": latents["fixed_effect"]}).fixed[:, 0]
    residual, phi = (rows.y - fixed) / spread, factor.design(rows.x, {})
    weights = torch.ones(N).double() if rows.weights is None else rows.weights
    tau, prior = latents["residual_sd"] ** -2, torch.linalg.inv(factor.covariance(latents))
    for k in range(K):
        mine = source.codes["site"] == k
        Z, w = phi[mine], tau * weights[mine, None]
        covariance = torch.linalg.inv(prior + Z.T @ (w * Z))
        yield covariance @ Z.T @ (w[:, 0] * residual[mine]), covariance


@pytest.mark.parametrize("random", [SLOPES, "(1 + x0 || site)", "(0 + x0 + x1 | site)"])
@pytest.mark.parametrize("role", [None, "weights", "offset"])
@pytest.mark.parametrize("seed", [1, 2])
def test_gaussian_conditional_is_exact_for_every_theta(random, role, seed):
    values = {"weights": np.arange(N) % 4 / 2, "offset": np.linspace(0, 9, N)}
    data = make_data(**{role: values[role]} if role else {})
    model, source, guide = bind(random, data=data, bayesian_head=True)
    q, latents = conditional(guide, source.all(), some_theta(guide, seed))
    mean, cov = moments(q)
    for k, (expected_mean, expected_cov) in enumerate(exact_posterior(model, source, latents)):
        torch.testing.assert_close(mean[k], expected_mean, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(cov[k], expected_cov, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", ["poisson", "bernoulli"])
def test_other_conditionals_start_with_a_newton_step(family):
    """Mean (D^-1 + Z'WZ)^-1 Z'r with W and r the likelihood's curvature and slope at u = 0."""
    data = make_data(family, weights=np.arange(N) % 3 + 0.5)
    model, source, guide = bind("(1 + x0 | site)", family, data=data)
    q, latents = conditional(guide, source.all(), some_theta(guide))
    mean, cov = moments(q)
    rows, (factor,) = source.all(), model.factors
    eta = model.predictor(rows, {}).eta[:, 0].detach()
    mu = torch.exp(eta) if family == "poisson" else torch.sigmoid(eta)
    w = rows.weights * (mu if family == "poisson" else mu * (1 - mu))
    r = rows.weights * (rows.y - mu)
    Z, prior = factor.design(rows.x, {}), torch.linalg.inv(factor.covariance(latents))
    for k in range(K):
        mine = source.codes["site"] == k
        expected = torch.linalg.inv(prior + Z[mine].T @ (w[mine, None] * Z[mine]))
        torch.testing.assert_close(cov[k], expected, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(mean[k], expected @ Z[mine].T @ r[mine], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("random", ["(1 | site)", SLOPES])
def test_a_step_towards_the_mode_is_shortened_but_none_at_the_mode(random):
    model, _, guide = bind(random, "bernoulli")
    latents, (factor,) = guide.hyperparameters.center(), model.factors
    D, terms = factor.covariance(latents).detach(), len(factor.terms)
    # Rows that tell next to nothing: by the likelihood alone, every step would be a long one.
    precision = 1e-3 * (torch.eye(terms) if terms > 1 else torch.ones(1)).double()
    precision = precision.expand(K, *precision.shape)
    effects = 10 * torch.randn(K, terms).double()
    at_mode = effects @ torch.linalg.inv(D)
    gradient, excess = newton_excess(factor, latents, effects, precision, at_mode)
    assert not excess.any()
    assert gradient.abs().max() < 1e-3 * at_mode.abs().max()
    push = torch.tensor([1e4, -1e3, 1e2, 1, 0, -1]).double()[:, None].expand(K, terms)
    gradient, excess = newton_excess(factor, latents, None, precision, push)
    torch.testing.assert_close(gradient, push)
    moved = torch.linalg.inv(torch.linalg.inv(D) + 1e-3 * torch.eye(terms)) @ push[..., None]
    moved = ((1 - excess)[..., None] * moved)[..., 0].abs().amax(-1)
    torch.testing.assert_close(moved[:3], torch.full((3,), 3.0).double(), rtol=1e-3, atol=0)
    assert (excess[3:] == 0).all()
    assert (moved[3:] < 3).all()


def large_counts():
    """Up to 600, where 3 are expected at the start."""
    rng = np.random.default_rng(1)
    site, batch = np.arange(N) % K, rng.permutation(np.arange(N) % 3)
    x = rng.normal(size=(N, 2))
    y = rng.poisson(np.exp(1 + 0.3 * x[:, 0] + np.array([5, 0, 0, 1, -1, 0])[site]))
    return ClusteredData.from_arrays(x, y, {"site": site, "batch": batch})


@pytest.mark.parametrize("random", ["(1 | site)", SLOPES, "(1 | batch) + (1 + x0 | site)"])
def test_steps_towards_large_counts_are_short_but_lead_to_the_same_place(random, monkeypatch):
    data = large_counts()

    def settled():
        torch.manual_seed(0)
        net = nn.Linear(2, 1).double()
        model = MixedEffects(net, random, "poisson", bayesian_head=True).bind(data)
        source = model.encode(data)
        guide = choose_guide(model, source)
        hyper = guide.hyperparameters
        with torch.no_grad():
            hyper.log_scale.fill_(-5)
            for site in hyper.sites:
                if site.name.endswith("_sd"):  # so that effects may go beyond a single step
                    hyper.anchor[site.start : site.stop] = math.log(3.0)
        steps = [guide.center(source.all())["site_effect"]]
        for _ in range(40):
            guide.refresh(model, source)
            steps.append(guide.center(source.all())["site_effect"])
        return steps

    steps = settled()
    assert steps[0].abs().max() < 3.1
    moves = [(b - a).abs().max() for a, b in itertools.pairwise(steps)]
    assert max(moves) < 4
    assert max(moves[-10:]) < 0.5, "what 32 draws leave open"
    monkeypatch.setattr("armed_pyro.guides.row_sums.LONGEST_STEP", 1e9)
    long = settled()
    assert long[0].abs().max() > 3.5
    one, other = (torch.stack(each[-10:]).mean(0) for each in (long, steps))
    assert other.abs().max() > 3
    torch.testing.assert_close(one, other, rtol=0.02, atol=0.1)


@pytest.mark.parametrize("wide", [False, True])
def test_some_clusters_have_the_marginals_that_they_have_among_all(wide):
    net = nn.Sequential(nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 1)).double()
    random = Slopes("site", on="1") if wide else SLOPES
    _, source, guide = bind(random, net=net, bayesian_head=True)
    batch = source.batch(torch.tensor([3, 9, 40, 41]), dense_up_to=0)
    index, theta = batch.memberships["site"].index, some_theta(guide)
    assert len(index) < K
    few, _ = conditional(guide, batch, theta)
    every, _ = conditional(guide, source.all(), theta)
    for one, other in zip(moments(few), moments(every), strict=True):
        torch.testing.assert_close(one, other[index])


def test_beyond_sixteen_terms_the_precision_is_diagonal():
    net = nn.Sequential(nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 1)).double()
    random = ["(1 + x0 | site)", Slopes("site", on="1")]
    model, source, guide = bind(random, net=net, bayesian_head=True)
    q, _ = conditional(guide, source.all(), guide.hyperparameters.anchor)
    assert isinstance(q, WhitenedDiagonal)
    assert (q.batch_shape, q.event_shape) == ((K,), (22,))
    draws = guide.draws(model.clusters(), 5)
    assert draws["site_effect"].shape == (5, K, 22)
    assert all(torch.isfinite(one).all() for one in draws.values())
    # More rows, less uncertainty; never more than a priori.
    sd = guide.center(source.all())["site_sd"]
    stddev = q.scale / q.root
    assert (stddev < sd).all()
    assert stddev[5, 0] < stddev[0, 0]


def test_diagonal_conditional_is_exact_term_by_term():
    """Precision 1 / sd^2 + tau sum_i z^2 of every term alone."""
    net = nn.Sequential(nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 1)).double()
    _, source, guide = bind(Slopes("site", on="1"), net=net)
    q, latents = conditional(guide, source.all(), some_theta(guide))
    hidden = net[:2](source.x).detach()
    squares = torch.zeros(K, 20).double().index_add_(0, source.codes["site"], hidden**2)
    # Layers start with one pseudo-row each, so that silent units can wake up.
    precision = latents["site_sd"] ** -2 + latents["residual_sd"] ** -2 * (squares + 1)
    torch.testing.assert_close((q.scale / q.root) ** 2, 1 / precision)


@pytest.mark.parametrize("random", [SLOPES, "(1 + x0 || site)"])
def test_without_rows_it_starts_at_the_prior(random):
    model, source, guide = bind(random, observe=False)
    q, latents = conditional(guide, source.all(), some_theta(guide))
    mean, cov = moments(q)
    torch.testing.assert_close(mean, torch.zeros(K, 2).double())
    torch.testing.assert_close(cov, model.factors[0].covariance(latents).expand(K, 2, 2))


def test_classes():
    model, source, guide = bind("(1 + x0 | site)", "categorical", bayesian_head=True)
    draws = guide.draws(model.clusters(), 5)
    assert draws["site_effect"].shape == (5, K, 4)
    assert model.predictor(source.all(), draws).eta.shape == (5, N, 2)


def test_nothing_to_estimate_but_the_effects():
    priors = Priors(sd=Known(1.0), residual_sd=Known(1.0))
    model, source, guide = bind("(1 | site)", priors=priors)
    assert guide.hyperparameters.size == 0
    draws = guide.draws(model.clusters(), 9)
    assert draws["site_effect"].shape == (9, K, 1)
    assert model.predictor(source.all(), draws).eta.shape == (9, N, 1)


def test_no_random_effects():
    model, _, guide = bind((), bayesian_head=True)
    draws = guide.draws(model.clusters(), 3)
    assert {name: tuple(one.shape) for name, one in draws.items()} == {
        "residual_sd": (3, 1),
        "fixed_effect": (3, 1, 3),
    }


def test_the_center_is_where_the_draws_are():
    model, _, guide = bind(bayesian_head=True)
    with torch.no_grad():
        guide.hyperparameters.log_scale.sub_(3)
    center = guide.center(model.clusters())
    torch.manual_seed(0)
    draws = guide.draws(model.clusters(), 4000)
    for name in ("fixed_effect", "site_effect"):
        error = draws[name].mean(0).squeeze() - center[name].squeeze()
        assert (error.abs() < 5 * draws[name].std(0).squeeze() / math.sqrt(4000)).all()


@pytest.mark.parametrize("log_sd", [-70.0, -50.0, 50.0, 100.0])
@pytest.mark.parametrize("random", [SLOPES, "(1 | site)", Slopes("site", on="1")])
def test_draws_of_sds_beyond_all_measure_leave_gradients_finite(random, log_sd):
    """In single precision; where data say next to nothing of an sd such draws do come."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 1))
    model, source, guide = bind(random, "bernoulli", net=net)
    hyper = guide.hyperparameters
    (site,) = [one for one in hyper.sites if one.name == "site_sd"]
    with torch.no_grad():
        hyper.anchor[site.start] = log_sd
    with pyro.validation_enabled(False):
        loss = Objective(model, guide)(source.all())
    loss.total.backward()
    assert torch.isfinite(loss.total)
    for name, one in [*model.named_parameters(), *guide.named_parameters()]:
        assert one.grad is None or torch.isfinite(one.grad).all(), name
    with torch.no_grad():
        value, log_density = site.read(hyper.anchor)
    assert (value > 0).all()
    torch.testing.assert_close(-log_density, hyper.anchor[site.start : site.stop].sum())
