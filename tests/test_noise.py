"""Explicit noise: proposals whose ratios are right, lattices that fill evenly, given draws."""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from armed_pyro import ClusteredData, Known, MixedEffects, Priors, StructuredGuide
from armed_pyro.guides.crossed import CrossedGuide
from armed_pyro.guides.noise import (
    ALONG_ONE,
    PROPOSAL_DF,
    SHARE_ALONG_ONE,
    NoiseMessenger,
    gaussian_noise,
    proposal_noise,
)

pytestmark = pytest.mark.filterwarnings("ignore:there are fewer rows")

TERMS = {1: "(1 | site)", 2: "(1 + x0 | site)", 3: "(1 + x0 + x1 | site)"}
LIKE = torch.zeros((), dtype=torch.float64)


def make(random="(1 + x0 | site)", clusters=6, kind=StructuredGuide, head=True, **options):
    """A guide with something to tell, and its rows."""
    rng = np.random.default_rng(0)
    n = 4 * clusters
    labels = {"site": np.repeat(np.arange(clusters), 4), "batch": rng.permutation(np.arange(n) % 3)}
    x = rng.normal(size=(n, 2))
    y = x[:, 0] + rng.normal(size=clusters)[labels["site"]] + rng.normal(size=n)
    torch.manual_seed(0)
    net = nn.Linear(2, 1).double()
    data = ClusteredData.from_arrays(x, y, labels)
    model = MixedEffects(net, random, bayesian_head=head, **options).bind(data)
    source = model.encode(data)
    return kind(model, source), source.all()


def assert_moments_of_standard_normal_noise(noise, log_ratio):
    """Weighted by 1 / ratio, within 4.5 standard errors; draws in the first dimension."""
    weights = torch.exp(-log_ratio)
    n, size = noise.shape
    statistics = torch.cat(
        [
            torch.ones(n, 1).double() - 1 / weights[:, None],  # E[w] = 1
            noise,
            torch.einsum("ni,nj->nij", noise, noise).flatten(1)
            - torch.eye(size).double().flatten(),
            noise**3,
            noise**4 - 3,
        ],
        1,
    )
    values = weights[:, None] * statistics
    error = values.std(0) / math.sqrt(n)
    assert (values.mean(0).abs() < 4.5 * error + 1e-12).all()


# ----------------------------------------------------------------------------- hyperparameters


def test_noise_of_the_hyperparameters_is_a_mixture_with_its_ratio():
    """Multivariate t, or normal but for one coordinate, which is t with three times the scale."""
    guide, rows = make()
    size, n = guide.hyperparameters.size, 50_000
    torch.manual_seed(0)
    noise = proposal_noise(guide, rows, n, 1, LIKE)
    theta, ratio = noise.values["_theta"], noise.log_ratio["_theta"]
    assert theta.shape == (n, 1, 1, size)
    assert ratio.shape == (n,)
    theta = theta[:, 0, 0]
    zeros, identity = torch.zeros(size).double(), torch.eye(size).double()
    df = torch.tensor(PROPOSAL_DF).double()
    student = dist.MultivariateStudentT(df, zeros, identity).log_prob(theta)
    normal = dist.Normal(zeros, 1.0).log_prob(theta)
    along = dist.StudentT(df, zeros, ALONG_ONE).log_prob(theta)
    one = [along[:, i] + normal.sum(-1) - normal[:, i] - math.log(size) for i in range(size)]
    single = torch.logsumexp(torch.stack(one), 0)
    share = SHARE_ALONG_ONE
    mixture = torch.logaddexp(math.log(1 - share) + student, math.log(share) + single)
    torch.testing.assert_close(ratio, mixture - normal.sum(-1))
    assert_moments_of_standard_normal_noise(theta, ratio)
    of_t = PROPOSAL_DF / (PROPOSAL_DF - 2)
    expected = (1 - share) * of_t + share * (1 + (ALONG_ONE**2 * of_t - 1) / size)
    error = (theta**2).std(0) / math.sqrt(n)
    assert ((theta.var(0) - expected).abs() < 4.5 * error).all()


def test_light_noise_of_the_hyperparameters_is_normal():
    guide, rows = make()
    torch.manual_seed(0)
    noise = proposal_noise(guide, rows, 20_000, 1, LIKE, heavy=False)
    assert "_theta" not in noise.log_ratio
    theta = noise.values["_theta"][:, 0, 0]
    assert_moments_of_standard_normal_noise(theta, torch.zeros(20_000).double())


# ---------------------------------------------------------------------------------- the effects


@pytest.mark.parametrize("terms", TERMS)
def test_stretched_noise_of_the_effects_has_its_ratio(terms):
    guide, rows = make(TERMS[terms], clusters=2)
    n = 40_000
    torch.manual_seed(1)
    noise = proposal_noise(guide, rows, n, 1, LIKE)  # lattices of one point are random points
    effects, ratio = noise.values["site_effect"], noise.log_ratio["site_effect"]
    assert effects.shape == (n, 1, 2, terms)
    assert ratio.shape == (n, 1, 2)
    for k in range(2):
        assert_moments_of_standard_normal_noise(effects[:, 0, k], ratio[:, 0, k])
    assert effects.flatten().std() > 1.2
    torch.manual_seed(1)
    plain = proposal_noise(guide, rows, n, 1, LIKE, stretch=False)
    assert "site_effect" not in plain.log_ratio
    even = plain.values["site_effect"]
    # The same points, moved outwards one by one: density over normal density, by the slope.
    order = even.flatten().argsort()
    one, other = even.flatten()[order], effects.flatten()[order]
    assert (other.diff() >= 0).all()
    assert (other.abs() >= one.abs() * (1 - 1e-9)).all()
    assert_moments_of_standard_normal_noise(even[:, 0, 0], torch.zeros(n).double())


@pytest.mark.parametrize("particles", [4, 16, 32])
@pytest.mark.parametrize("terms", TERMS)
def test_every_effects_noise_is_spread_evenly_over_its_quantiles(terms, particles):
    guide, rows = make(TERMS[terms])
    torch.manual_seed(0)
    noise = proposal_noise(guide, rows, 50, particles, LIKE, stretch=False)
    u = torch.special.ndtr(noise.values["site_effect"])
    assert u.shape == (50, particles, 6, terms)
    gaps = u.sort(1).values.diff(dim=1)
    torch.testing.assert_close(gaps, torch.full_like(gaps, 1 / particles), rtol=1e-6, atol=1e-9)
    # Uniform by the shift, which is drawn anew for every draw, cluster and term.
    shift = (u.amin(1) * particles).flatten()
    assert abs(shift.mean() - 0.5) < 4.5 * math.sqrt(1 / 12 / len(shift))
    assert abs(shift.var() - 1 / 12) < 4.5 * math.sqrt(1 / 180 / len(shift))
    assert len(shift.unique()) == len(shift)


@pytest.mark.parametrize("terms", [1, 2, 3])
def test_lattices_integrate_smooth_functions_better_than_random_points(terms):
    guide, rows = make(TERMS[terms])
    particles, n = 32, 400
    torch.manual_seed(0)
    u = torch.special.ndtr(
        proposal_noise(guide, rows, n, particles, LIKE, stretch=False).values["site_effect"]
    )

    def value(u):
        return (1 + torch.sin(2 * math.pi * u) + 0.5 * (u - 0.5)).prod(-1)

    error = (value(u).mean(1) - 1).flatten()
    random = (value(torch.rand_like(u)).mean(1) - 1).flatten()
    # Unbiased, and with a small part of the variance.
    assert error.mean().abs() < 4.5 * error.std() / math.sqrt(len(error))
    assert error.var() < random.var() / (5 if terms == 3 else 20)


def test_extreme_quantiles_stay_finite_in_single_precision():
    guide, rows = make("(1 | site)")
    torch.manual_seed(0)
    like = torch.zeros((), dtype=torch.float32)
    noise = proposal_noise(guide, rows, 20_000, 16, like)
    for one in (*noise.values.values(), *noise.log_ratio.values()):
        assert one.dtype == torch.float32
        assert torch.isfinite(one).all()


# -------------------------------------------------------------------------- what is asked of noise


def test_gaussian_noise_has_one_particle_and_no_ratio():
    guide, rows = make()
    noise = gaussian_noise(guide, rows, 7, LIKE)
    shapes = {site: tuple(one.shape) for site, one in noise.values.items()}
    assert shapes == {"_theta": (7, 1, 1, guide.hyperparameters.size), "site_effect": (7, 1, 6, 2)}
    assert not noise.log_ratio


def test_only_the_largest_factor_has_particles():
    for kind in (StructuredGuide, CrossedGuide):
        guide, rows = make("(1 | batch) + (1 + x0 | site)", kind=kind)
        assert guide.nested().name == "site"
        noise = proposal_noise(guide, rows, 5, 8, LIKE)
        others = (
            {"_crossed": (5, 1, 1, 3)} if kind is CrossedGuide else {"batch_effect": (5, 1, 3, 1)}
        )
        assert {site: tuple(one.shape) for site, one in noise.values.items()} == {
            "_theta": (5, 1, 1, guide.hyperparameters.size),
            "site_effect": (5, 8, 6, 2),
            **others,
        }
        assert set(noise.log_ratio) == {"_theta", "site_effect"}


def test_what_is_known_has_no_noise():
    priors = Priors(sd=Known(1.0), residual_sd=Known(1.0))
    guide, rows = make("(1 | site)", head=False, priors=priors)
    noise = proposal_noise(guide, rows, 5, 8, LIKE)
    assert set(noise.values) == {"site_effect"}


# ----------------------------------------------------------------------------------- NoiseMessenger


@pytest.mark.parametrize("kind", [StructuredGuide, CrossedGuide])
def test_given_noise_makes_the_draws_that_sampling_with_it_makes(kind):
    guide, rows = make("(1 | batch) + (1 + x0 | site)", kind=kind)
    shapes = guide.noise_shapes(rows)
    torch.manual_seed(5)
    sampled = poutine.trace(guide).get_trace(rows)
    torch.manual_seed(5)
    order = [name for name in sampled.nodes if name in shapes]
    values = {site: torch.randn(shapes[site], dtype=torch.float64) for site in order}
    assert set(values) == set(shapes)
    with NoiseMessenger(values):
        given = poutine.trace(guide).get_trace(rows)
    assert sampled.nodes.keys() == given.nodes.keys()
    for name, value in sampled.nodes["_RETURN"]["value"].items():
        assert torch.equal(given.nodes["_RETURN"]["value"][name], value), name
    torch.testing.assert_close(given.log_prob_sum(), sampled.log_prob_sum())


@pytest.mark.parametrize("kind", [StructuredGuide, CrossedGuide])
def test_many_given_draws_are_the_single_ones(kind):
    guide, rows = make("(1 | batch) + (1 + x0 | site)", kind=kind)
    noise = gaussian_noise(guide, rows, 3, LIKE)
    with NoiseMessenger(noise.values):
        together = guide(rows)
    for draw in range(3):
        shapes = guide.noise_shapes(rows)
        single = {site: one[draw].reshape(shapes[site]) for site, one in noise.values.items()}
        with NoiseMessenger(single):
            alone = guide(rows)
        for name, value in alone.items():
            one = together[name][draw].reshape(value.shape)
            torch.testing.assert_close(one, value, msg=name)


def test_without_noise_for_a_site_it_is_sampled_as_ever():
    guide, rows = make("(1 | site)")
    values = {"_theta": torch.zeros(guide.hyperparameters.size).double()}
    with NoiseMessenger(values):
        one, other = guide(rows), guide(rows)
    assert torch.equal(one["site_sd"], other["site_sd"])
    assert not torch.equal(one["site_effect"], other["site_effect"])
