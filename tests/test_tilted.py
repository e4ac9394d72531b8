"""Draws given an observation: values, densities and gradients beside automatic ones."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from armed_pyro.distributions.observed_normal import ObservedNormal
from armed_pyro.distributions.whitened import WhitenedNormal

CLUSTERS = 6
# Beyond eight terms products are the library's.
TERMS = [1, 2, 3, 5, 9]
DRAWS = [None, 4]


def parameters(terms, draws=None, seed=0):
    """L, tau, B, C, m and what moves m, with draws of L and tau or without."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64)

    batch = () if draws is None else (draws, 1)
    scale = normal(*batch, terms, terms).tril()
    scale.diagonal(dim1=-2, dim2=-1).abs_().add_(0.1)
    base, trained = normal(CLUSTERS, terms, terms), normal(CLUSTERS, terms, terms)
    location = normal(CLUSTERS, terms)
    return scale, normal(*batch).exp(), base, trained, location


def noise_for(terms, draws=None):
    shape = (CLUSTERS, terms) if draws is None else (draws, CLUSTERS, terms)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def automatic(scale, tau, base, trained, location):
    """The same distribution, written out by its mean and precision."""
    root = base @ trained
    precision = tau[..., None, None] * (root @ root.mT)
    terms = location.shape[-1]
    lower = torch.linalg.cholesky(torch.eye(terms).double() + scale.mT @ precision @ scale)
    pull = scale.mT @ (precision @ location[..., None])
    return WhitenedNormal(scale, torch.cholesky_solve(pull, lower)[..., 0], lower)


@pytest.mark.parametrize("terms", TERMS)
def test_it_is_the_posterior_of_a_normal_prior_and_a_normal_observation(terms):
    scale, tau, base, trained, location = parameters(terms)
    q = ObservedNormal(scale, tau, base, trained, location)
    A = tau * (base @ trained) @ (base @ trained).mT
    covariance = torch.linalg.inv(torch.linalg.inv(scale @ scale.mT) + A)
    mean = (covariance @ A @ location[..., None])[..., 0]
    assert (q.batch_shape, q.event_shape) == ((CLUSTERS,), (terms,))
    torch.testing.assert_close(q.mean, mean)
    own = q.rsample()
    expected = MultivariateNormal(mean, (covariance + covariance.mT) / 2).log_prob(own)
    torch.testing.assert_close(q.log_prob(own), expected)
    torch.testing.assert_close(q.log_prob(own.clone()), expected)


@pytest.mark.parametrize("draws", DRAWS)
@pytest.mark.parametrize("terms", TERMS)
def test_gradients_are_those_of_a_draw_judged_by_one_that_is_held(terms, draws):
    """By C, m, tau, L, and what moves m: only the last three move the density, too."""
    scale, tau, base, trained, location = parameters(terms, draws)
    moved = torch.zeros_like(location)
    leaves = [one.requires_grad_(True) for one in (trained, location, tau, scale, moved)]
    fixed, noise = location.detach(), noise_for(terms, draws)
    q = ObservedNormal(scale, tau, base, trained, location, fixed + moved)
    first = automatic(scale, tau, base, trained, location + moved)
    first.detached = automatic(scale, tau, base, trained.detach(), fixed + moved)
    found = []
    for one in (q, first):
        value = one.push(noise)
        density = one.log_prob(value)
        total = (value**3).sum() + (density * density.detach().sin()).sum()
        gradients = torch.autograd.grad(total, leaves)
        # What stands above the diagonal of L is not looked at.
        found.append((value, density, *gradients[:3], gradients[3].tril(), gradients[4]))
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected)


def test_single_draws_are_the_vectorised_ones():
    given, noise = parameters(2, 4), noise_for(2, 4)
    q = ObservedNormal(*given)
    assert q.batch_shape == (4, CLUSTERS)
    values = q.push(noise)
    densities = q.log_prob(values)
    for draw in range(4):
        scale, tau, *others = given
        one = ObservedNormal(scale[draw, 0], tau[draw, 0], *others)
        value = one.push(noise[draw])
        torch.testing.assert_close(value, values[draw])
        torch.testing.assert_close(one.log_prob(value), densities[draw])


def test_it_can_be_expanded_to_draws():
    wide = ObservedNormal(*parameters(3)).expand((5, CLUSTERS))
    own = wide.rsample()
    assert own.shape == (5, CLUSTERS, 3)
    torch.testing.assert_close(wide.log_prob(own), wide.log_prob(own.clone()))


@pytest.mark.parametrize("sd", [1e-12, 1e4])
def test_extreme_sds_are_safe_in_single_precision(sd):
    _, tau, base, trained, location = (one.float() for one in parameters(2))
    scale = torch.diag(torch.tensor([sd, 1.0])).requires_grad_(True)
    trained.requires_grad_(True)
    q = ObservedNormal(scale, tau, base, trained, location)
    own = q.rsample()
    total = q.log_prob(own).sum() + own.sum()
    assert math.isfinite(total.item())
    for one in torch.autograd.grad(total, [scale, trained]):
        assert one.isfinite().all()
