"""The start at the mode of the marginal posterior, against dense computations of it."""

import math
from dataclasses import replace

import numpy as np
import pyro
import pytest
import torch
from scipy import optimize, stats
from torch import nn

from armed_pyro import ClusteredData, HalfNormal, Known, MixedEffects, Priors, Slopes, fit
from armed_pyro.guides.crossed import choose_guide
from armed_pyro.guides.noise import gaussian_noise
from armed_pyro.inference.marginal_mode import WIDEST, particles_needed, start_at_mode
from armed_pyro.inference.nested_weights import weigh

K, PER = 12, 6
N = K * PER
FLAT = Priors(sd=HalfNormal(30.0), residual_sd=HalfNormal(30.0), fixed_sd=5.0)
pytestmark = pytest.mark.filterwarnings("ignore:there are fewer rows")


@pytest.fixture(autouse=True)
def as_in_a_fit():
    with pyro.validation_enabled(False):
        yield


def make_data(family="gaussian", per=PER, clusters=K, sd=1.0, seed=0):
    rng = np.random.default_rng(seed)
    site = np.repeat(np.arange(clusters), per)
    batch = rng.permutation(np.arange(len(site)) % 4)
    x = rng.normal(size=(len(site), 2))
    eta = 0.5 + x[:, 0] + sd * rng.normal(size=clusters)[site]
    eta = eta + sd * (0.7 * rng.normal(size=clusters)[site] * x[:, 0] + rng.normal(size=4)[batch])
    outcomes = {
        "gaussian": 10 + 3 * (eta + 0.8 * rng.normal(size=len(site))),
        "bernoulli": (rng.random(len(site)) < 1 / (1 + np.exp(-eta))).astype(float),
        "poisson": rng.poisson(np.exp(np.minimum(eta, 6))).astype(float),
    }
    return ClusteredData.from_arrays(x, outcomes[family], {"site": site, "batch": batch})


def started(random, family="gaussian", data=None, priors=FLAT, net=None, head=True, seed=0):
    """A settled program and its guide, at the mode."""
    data = make_data(family) if data is None else data
    torch.manual_seed(seed)
    net = nn.Linear(2, 1).double() if net is None else net
    model = MixedEffects(net, random, family, priors=priors, bayesian_head=head).bind(data)
    model.eval()
    source = model.compute(model.encode(data))
    guide = choose_guide(model, source)
    guide.settle()
    start_at_mode(model, guide, source)
    return model, guide, source


def covariance_of(guide):
    return (guide.hyperparameters.frame @ guide.hyperparameters.frame.T).numpy()


# ----------------------------------------------------------------- log p(theta | y), independently


def read(guide, theta):
    """Parts of theta, by site."""
    return {site.name: theta[site.start : site.stop] for site in guide.hyperparameters.sites}


def log_half_normal(log_sd, scale):
    """In the coordinate log sd: with its Jacobian."""
    return np.sum(stats.halfnorm.logpdf(np.exp(log_sd), scale=scale) + log_sd)


class Dense:
    """log p(theta, y) up to a constant, from the matrices of the whole model."""

    def __init__(self, model, guide, source):
        self.model, self.guide, self.facts = model, guide, model.data_facts()
        x = source.x.numpy()
        self.X = np.column_stack([np.ones(len(x)), x])
        self.y = source.y.numpy()
        self.Z = {}
        for factor in model.factors:
            phi, code = factor.design(source.x, {}).numpy(), source.codes[factor.name].numpy()
            Z = np.zeros((len(x), code.max() + 1, phi.shape[1]))
            Z[np.arange(len(x)), code] = phi
            self.Z[factor.name] = Z

    def at_zero(self, factor, coordinates):
        """log sds and the inverse tanh of the correlation at x = 0, from a guide's coordinates."""
        shift, first, second = factor.from_zero[0, 1].item(), *coordinates[:2]
        if not factor.groups:  # log sd at the means, and log ratio of the sds at x = 0
            intercept = first - 0.5 * np.log1p((shift * np.exp(second)) ** 2)
            return np.array([intercept, intercept + second])
        sd, r = np.exp([first, second]), np.tanh(coordinates[2])
        M = np.array([[1, -shift], [0, 1]])
        D = M @ (np.outer(sd, sd) * [[1, r], [r, 1]]) @ M.T
        sd = np.sqrt(D.diagonal())
        return np.array([*np.log(sd), np.arctanh(D[0, 1] / sd.prod())])

    def read(self, theta):
        """Parts of theta, by site, at x = 0; and the log of the volume of the map from theta."""
        parts, volume = read(self.guide, theta), 0.0
        for factor in self.model.factors:
            if factor.from_zero is not None:
                sites = [factor.sd_site, f"{factor.name}_cor_cholesky"][: 1 + len(factor.groups)]
                at = np.concatenate([parts[site] for site in sites])
                zero = self.at_zero(factor, at)
                if factor.groups:  # |dD / d coordinates| at the means, over the same at x = 0
                    for sign, (*log_sd, z) in ((1, at), (-1, zero)):
                        volume += sign * (3 * sum(log_sd) + np.log(1 - np.tanh(z) ** 2))
                parts |= dict(zip(sites, np.split(zero, [2]), strict=False))
        return {**parts, "volume": volume}

    def covariance(self, factor, parts):
        sd = np.diag(np.exp(parts[f"{factor.name}_sd"]))
        R = np.eye(len(sd))
        if factor.groups:
            R[0, 1] = R[1, 0] = np.tanh(parts[f"{factor.name}_cor_cholesky"].item())
        T = np.eye(len(sd)) if factor.from_zero is None else factor.from_zero.numpy()
        return T @ sd @ R @ sd @ T.T

    def log_prior(self, parts):
        spread, total = self.facts.spread, parts["volume"]
        for factor in self.model.factors:
            total += log_half_normal(parts[f"{factor.name}_sd"], factor.prior_scale.numpy())
            if factor.groups:  # LKJ(1) of two effects: r = tanh(.) is uniform
                total += np.log(1 - np.tanh(parts[f"{factor.name}_cor_cholesky"].item()) ** 2)
        if "residual_sd" in parts:
            total += log_half_normal(parts["residual_sd"], 30 / spread)
        return total + stats.norm.logpdf(parts["fixed_effect"], scale=5.0).sum()

    def gaussian(self, theta):
        parts = self.read(theta)
        V = np.exp(2 * parts["residual_sd"].item()) * np.eye(len(self.y))
        for factor in self.model.factors:
            Z = self.Z[factor.name]
            V += np.einsum("nki,ij,mkj->nm", Z, self.covariance(factor, parts), Z)
        y = (self.y - self.facts.center[0]) / self.facts.spread
        residual = y - self.X @ parts["fixed_effect"]
        log_det = np.linalg.slogdet(V)[1]
        return self.log_prior(parts) - 0.5 * (log_det + residual @ np.linalg.solve(V, residual))

    def bernoulli(self, theta, nodes=120):
        """By quadrature over a single random intercept."""
        parts, (factor,) = self.read(theta), self.model.factors
        node, weight = np.polynomial.hermite.hermgauss(nodes)
        u = math.sqrt(2) * np.exp(parts["site_sd"].item()) * node
        eta = (self.facts.center[0] + self.X @ parts["fixed_effect"])[:, None] + u
        log_prob = -np.logaddexp(0, np.where(self.y[:, None] > 0, -eta, eta))
        by_cluster = np.einsum("nk,nq->kq", self.Z[factor.name][..., 0], log_prob)
        return self.log_prior(parts) + np.log(np.exp(by_cluster) @ weight).sum()


def mode_and_covariance(density, start):
    found = optimize.minimize(lambda theta: -density(theta), start, method="BFGS", tol=1e-8)
    n, step, mode = len(start), 1e-3, found.x
    hessian = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            a, b = np.eye(n)[i] * step, np.eye(n)[j] * step
            corners = density(mode + a + b) - density(mode + a - b)
            corners += density(mode - a - b) - density(mode - a + b)
            hessian[i, j] = corners / (4 * step**2)
    return mode, np.linalg.inv(-hessian)


def start_of(guide):
    return np.zeros(guide.hyperparameters.size)


PROGRAMS = {
    "intercept": "(1 | site)",
    "independent": "(1 + x0 || site)",
    "correlated": "(1 + x0 | site)",
    "crossed": "(1 | site) + (1 | batch)",
    "crossed-slopes": "(1 + x0 | site) + (1 | batch)",
}


def test_the_mode_under_a_prior_at_zero_is_exact():
    """In coordinates at the features' means, with the volume of the map to x = 0."""
    model, guide, source = started("(1 + x0 | site)")
    mode, covariance = mode_and_covariance(Dense(model, guide, source).gaussian, start_of(guide))
    np.testing.assert_allclose(guide.hyperparameters.anchor.numpy(), mode, rtol=0, atol=1e-3)
    sd = np.sqrt(np.diag(covariance))
    assert (np.abs(covariance_of(guide) - covariance) / sd / sd[:, None]).max() < 0.03


@pytest.mark.parametrize("name", PROGRAMS)
def test_with_gaussian_outcomes_it_is_the_mode_of_the_exact_marginal_posterior(name):
    # The default scale of a correlated intercept's sd holds at the features' means.
    priors = replace(FLAT, sd=HalfNormal()) if name == "correlated" else FLAT
    model, guide, source = started(PROGRAMS[name], priors=priors)
    mode, covariance = mode_and_covariance(Dense(model, guide, source).gaussian, start_of(guide))
    np.testing.assert_allclose(guide.hyperparameters.anchor.numpy(), mode, rtol=0, atol=1e-3)
    sd = np.sqrt(np.diag(covariance))
    assert sd.max() < WIDEST
    error = np.abs(covariance_of(guide) - covariance) / sd / sd[:, None]
    assert error.max() < 0.02
    # A normal distribution there: nothing is left of what was before.
    q = guide.hyperparameters.distribution()
    torch.testing.assert_close(q.push(torch.zeros_like(q.parameters.shift)), q.parameters.anchor)
    assert not any(one.any() for one in guide.hyperparameters.parameters())


@pytest.mark.parametrize("per", [3, 10])
def test_with_binary_outcomes_it_is_that_of_quadrature(per):
    """Not that of a Laplace approximation, which is off by a good part of a posterior sd."""
    data = make_data("bernoulli", per=per, clusters=40)
    model, guide, source = started("(1 | site)", "bernoulli", data)
    density = Dense(model, guide, source).bernoulli
    mode, covariance = mode_and_covariance(density, start_of(guide))
    sd = np.sqrt(np.diag(covariance))
    assert (np.abs(guide.hyperparameters.anchor.numpy() - mode) < 0.02 * sd).all()
    error = np.abs(covariance_of(guide) - covariance) / sd / sd[:, None]
    assert error.max() < 0.05


def test_without_random_effects_it_is_the_mode_of_the_posterior():
    model, guide, source = started((), "poisson")
    X, y = np.column_stack([np.ones(N), source.x.numpy()]), source.y.numpy()

    def density(beta):
        eta = model.data_facts().center[0] + X @ beta
        return (y * eta - np.exp(eta)).sum() + stats.norm.logpdf(beta, scale=5.0).sum()

    mode, covariance = mode_and_covariance(density, np.zeros(3))
    np.testing.assert_allclose(guide.hyperparameters.anchor.numpy(), mode, rtol=0, atol=1e-3)
    np.testing.assert_allclose(covariance_of(guide), covariance, rtol=0.02, atol=1e-6)


@pytest.mark.parametrize(
    ("random", "family", "limit"),
    [
        ("(1 + x0 | site)", "gaussian", 64),
        ("(1 | site) + (1 | batch)", "gaussian", 64),
        ("(1 | site)", "poisson", 71 * 16),
        ((), "poisson", 64),
    ],
)
def test_rows_taken_in_pieces_have_the_same_mode(random, family, limit, monkeypatch):
    _, whole, _ = started(random, family)
    sizes = []
    monkeypatch.setattr("armed_pyro.inference.marginal_mode.LARGEST_STEP", limit)
    monkeypatch.setattr("armed_pyro.inference.marginal_mode.weigh", recorded(sizes))
    _, pieces, _ = started(random, family)
    if family == "gaussian" or not random:
        assert max(sizes) < N / 2, "some pieces are needed"
    one, other = whole.hyperparameters, pieces.hyperparameters
    sd = np.sqrt(np.diag(covariance_of(whole)))
    # The noise of the other sites is another, which matters where there is any.
    slack = 0.05 if family == "poisson" and random else 1e-3
    assert (np.abs((one.anchor - other.anchor).numpy()) < slack * sd + 1e-4).all()
    error = np.abs(covariance_of(pieces) - covariance_of(whole)) / sd / sd[:, None]
    assert error.max() < slack + 1e-3


def test_searched_among_some_clusters_it_is_that_of_all(monkeypatch):
    data = make_data(per=10, clusters=300)
    _, whole, _ = started("(1 + x0 | site)", data=data)
    sizes = []
    monkeypatch.setattr("armed_pyro.inference.marginal_mode.SEARCHED", 1000)
    monkeypatch.setattr("armed_pyro.inference.marginal_mode.weigh", recorded(sizes))
    _, some, _ = started("(1 + x0 | site)", data=data)
    # A search among a third of the rows, and a few Newton steps with all.
    assert sizes.count(1000) > 8
    assert 1 <= sizes.count(3000) <= 10
    assert set(sizes) == {1000, 3000}
    one, other = whole.hyperparameters, some.hyperparameters
    sd = np.sqrt(np.diag(covariance_of(whole)))
    assert (np.abs((one.anchor - other.anchor).numpy()) < 0.1 * sd).all()
    # The curvature is that of the sample, scaled up: 100 clusters tell it to some 10%.
    ratio = np.sqrt(np.diag(covariance_of(some))) / sd
    assert (np.abs(np.log(ratio)) < 0.4).all()


def test_what_is_known_well_is_searched_for_in_its_own_units(monkeypatch):
    """Posterior sds from 0.005 to 0.1: in the same units for all the search takes twice as long."""
    rng = np.random.default_rng(0)
    n = 20_000
    site, batch = rng.integers(2000, size=n), rng.integers(40, size=n)
    x = rng.normal(size=(n, 2))
    y = x[:, 0] + 0.4 * rng.normal(size=2000)[site] + rng.normal(size=40)[batch]
    labels = {"site": site, "batch": batch}
    data = ClusteredData.from_arrays(x, y + rng.normal(size=n), labels)
    sizes = []
    monkeypatch.setattr("armed_pyro.inference.marginal_mode.weigh", recorded(sizes))
    model, guide, source = started("(1 | site) + (1 | batch)", data=data)
    assert len(sizes) <= 13
    found = {name: one.clone() for name, one in guide.hyperparameters.named_buffers()}
    sd = np.sqrt(np.diag(covariance_of(guide)))
    assert sd.max() / sd.min() > 15
    monkeypatch.setattr("armed_pyro.inference.marginal_mode.SEARCH_SCALE", 0.01)
    start_at_mode(model, guide, source)
    assert (np.abs((guide.hyperparameters.anchor - found["anchor"]).numpy()) < 0.02 * sd).all()
    assert (np.abs(np.sqrt(np.diag(covariance_of(guide))) / sd - 1) < 0.02).all()


def recorded(sizes):
    def wrapped(model, guide, rows, noise):
        sizes.append(len(rows))
        return weigh(model, guide, rows, noise)

    return wrapped


# -------------------------------------------------------------------------- what it has to bear


def test_counts_that_a_first_newton_step_overshoots_find_their_mode():
    """From 0, the step for a count of 700 is 699 on the log scale."""
    rng = np.random.default_rng(0)
    site, x = np.repeat(np.arange(K), PER), rng.normal(size=(N, 3))
    eta = x[:, 0] + rng.normal(size=K)[site] * (1 + 0.5 * x[:, 1])
    data = ClusteredData.from_arrays(x, rng.poisson(np.exp(eta)), {"site": site})
    assert data.outcome.max() > 700

    def once(seed):
        net = nn.Linear(3, 1).double()
        random = "(1 + x0 + x1 + x2 | site)"
        model, guide, source = started(random, "poisson", data, Priors(), net, seed=seed)
        noise = gaussian_noise(guide, source.all(), 300, model.reference())
        with torch.no_grad():
            weighted = weigh(model, guide, source.all(), noise)
        return guide.hyperparameters.anchor.numpy(), covariance_of(guide), weighted

    (one, covariance, weighted), (other, _, _) = once(0), once(1)
    sd = np.sqrt(np.diag(covariance))
    assert (sd > 0.02).all()
    assert (np.abs(one - other) < sd).all(), "it is a mode, whatever the noise"
    # The effects are where their posterior is, too, and draws of them are plausible.
    assert weighted.latents["site_effect"].mean(0).abs().max() < 5
    total = weighted.total()
    assert total.median() - total.mean() < 10
    assert total.median() > -200


def no_difference_between_sites():
    """Every site has the same rows."""
    rng = np.random.default_rng(0)
    x, y = np.tile(rng.normal(size=(PER, 2)), (K, 1)), np.tile(rng.normal(size=PER), K)
    return ClusteredData.from_arrays(x, y, {"site": np.repeat(np.arange(K), PER)})


def no_difference_within_sites():
    rng = np.random.default_rng(0)
    site = np.repeat(np.arange(K), PER)
    return ClusteredData.from_arrays(
        rng.normal(size=(N, 2)), rng.normal(size=K)[site], {"site": site}
    )


def almost_all_the_same(family):
    rng = np.random.default_rng(0)
    y = 1.0 * (np.arange(N) < 1) + (family == "poisson")
    return ClusteredData.from_arrays(
        rng.normal(size=(N, 2)), y, {"site": np.repeat(np.arange(K), PER)}
    )


@pytest.mark.parametrize(
    ("dtype", "priors"),
    [(torch.float32, Priors()), (torch.float64, FLAT)],
    ids=["single", "double-flat"],
)
@pytest.mark.parametrize("random", ["(1 | site)", "(1 + x0 | site)"])
@pytest.mark.parametrize("case", ["between", "within", "bernoulli", "poisson"])
def test_a_standard_deviation_of_zero_is_no_reason_to_fail(case, random, dtype, priors):
    family = case if case in ("bernoulli", "poisson") else "gaussian"
    data = {"between": no_difference_between_sites, "within": no_difference_within_sites}.get(
        case, lambda: almost_all_the_same(family)
    )()
    net = nn.Linear(2, 1, dtype=dtype)
    model, guide, source = started(random, family, data, priors, net)
    hyper = guide.hyperparameters
    assert torch.isfinite(hyper.anchor).all()
    assert torch.isfinite(hyper.frame).all()
    assert (hyper.frame.diagonal() > 0).all()
    assert (covariance_of(guide).diagonal() <= (WIDEST * 1.01) ** 2 * hyper.size).all()
    draws = guide.draws(model.clusters(), 50)
    assert all(torch.isfinite(one).all() for one in draws.values())
    assert particles_needed(model, guide, source) in (1, 16, 32)
    if case == "between":
        sd = guide.center(source.all())["site_sd"]
        assert (sd < 0.3).all(), "there is no sd between sites to be found"


def test_what_cannot_be_searched_is_left_alone():
    net = nn.Sequential(nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 1)).double()
    data = make_data()
    model = MixedEffects(net, Slopes("site", on="1")).bind(data)
    source = model.compute(model.encode(data))
    guide = choose_guide(model, source)
    assert guide.nested() is None
    before = {name: one.clone() for name, one in guide.state_dict().items()}
    start_at_mode(model, guide, source)
    assert all(torch.equal(one, before[name]) for name, one in guide.state_dict().items())
    assert particles_needed(model, guide, source) == 1


def test_nothing_to_search_for():
    known = Priors(sd=Known(1.0), residual_sd=Known(1.0))
    model, guide, source = started("(1 | site)", priors=known, head=False)
    assert guide.hyperparameters.size == 0
    assert particles_needed(model, guide, source) == 1


@pytest.mark.parametrize("error", [torch.linalg.LinAlgError, ArithmeticError])
def test_a_search_that_fails_leaves_a_guide_that_can_be_trained(error, monkeypatch):
    def fail(*arguments):
        raise error("a matrix is degenerate")

    monkeypatch.setattr("armed_pyro.inference.marginal_mode.weigh", fail)
    _, guide, source = started("(1 | site)")
    hyper = guide.hyperparameters
    torch.testing.assert_close(hyper.frame, 0.1 * torch.eye(hyper.size).double())
    assert torch.isfinite(hyper.anchor).all()
    assert all(torch.isfinite(one).all() for one in guide.center(source.all()).values())


# ------------------------------------------------------------------------------- particles_needed


@pytest.mark.parametrize("random", ["(1 | site)", "(1 + x0 | site)", "(1 | site) + (1 | batch)"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_particle_is_enough_where_the_conditional_is_exact(random, dtype):
    model, guide, source = started(random, net=nn.Linear(2, 1, dtype=dtype))
    assert particles_needed(model, guide, source) == 1


@pytest.mark.parametrize(("random", "expected"), [("(1 | site)", 1), ((), 1)])
def test_that_takes_a_look_at_some_of_many_clusters_only(random, expected, monkeypatch):
    model, guide, source = started(random)
    sizes = []
    monkeypatch.setattr("armed_pyro.inference.marginal_mode.LARGEST_STEP", 256 * N // 3)
    monkeypatch.setattr("armed_pyro.inference.marginal_mode.weigh", recorded(sizes))
    assert particles_needed(model, guide, source) == expected
    assert sizes == [N // 3] * bool(random), "a third of the rows, in whole clusters"


@pytest.mark.parametrize(("random", "expected"), [("(1 | site)", 16), ("(1 + x0 | site)", 32)])
def test_binary_outcomes_of_few_rows_need_many(random, expected, monkeypatch):
    data = make_data("bernoulli", per=3, clusters=40)
    model, guide, source = started(random, "bernoulli", data)
    assert particles_needed(model, guide, source) == expected
    monkeypatch.setattr("armed_pyro.inference.marginal_mode.LARGEST_STEP", 256 * 60)
    assert particles_needed(model, guide, source) == expected


@pytest.mark.parametrize("n_features", [50, 90])
def test_nearly_as_many_coefficients_as_rows_have_no_mode(n_features):
    """The density grows without bound as the rows are interpolated: such fits diverged."""
    rng = np.random.default_rng(0)
    site, x = np.arange(60) % 10, rng.normal(size=(60, n_features))
    y = x[:, 0] + rng.normal(size=10)[site] + rng.normal(size=60)
    data = ClusteredData.from_arrays(x, y, {"site": site})
    net = nn.Linear(n_features, 1, dtype=torch.float64)
    fitted = fit(MixedEffects(net, "(1 | site)", bayesian_head=True), data, progress=False)
    assert np.isfinite(fitted.fixed_effects()["mean"]).all()
    # Draws of an approximation that misses the posterior are not passed off as right.
    sd = fitted.variance_components().set_index("factor").loc["Residual", "median"].iloc[0]
    assert 0.5 < sd < 2 or fitted.diagnostics().computation.word == "fail"
