"""One long normal vector given by its precision: density, draws, derivatives."""

import pytest
import torch
from torch.distributions import MultivariateNormal

from armed_pyro.distributions.whitened import PrecisionNormal

SIZE = 4


def natural(*batch, seed=0):
    torch.manual_seed(seed)
    A = torch.randn(*batch, SIZE, SIZE + 2).double()
    return torch.eye(SIZE).double() + A @ A.mT, torch.randn(*batch, SIZE).double()


def dense(precision, pull):
    return MultivariateNormal(
        torch.linalg.solve(precision, pull[..., None])[..., 0], precision_matrix=precision
    )


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("batch", [(), (3, 1)])
def test_density_of_any_value(batch, trained):
    precision, pull = natural(*batch)
    q = PrecisionNormal(precision.requires_grad_(trained), pull)
    value = torch.randn(*batch, SIZE).double()
    expected = dense(precision, pull).log_prob(value)
    torch.testing.assert_close(q.log_prob(value), expected)
    torch.testing.assert_close(q.mean, dense(precision, pull).mean)


def test_draws_and_their_density():
    precision, pull = natural()
    q = PrecisionNormal(precision, pull)
    noise = torch.randn(50_000, SIZE).double()
    value = q.push(noise)
    torch.testing.assert_close(q.log_prob(value), dense(precision, pull).log_prob(value))
    covariance = torch.linalg.inv(precision)
    sd = covariance.diagonal().sqrt()
    error = (value.T.cov() - covariance).abs() / sd / sd[:, None]
    assert error.max() < 5 * (2 / len(noise)) ** 0.5


@pytest.mark.parametrize("batch", [(), (2, 1)])
def test_first_and_second_derivatives_are_right(batch):
    precision, pull = natural(*batch)
    value = torch.randn(*batch, SIZE).double()

    def density(half, pull, value):
        # Symmetric, whatever the difference quotient adds to one element.
        return PrecisionNormal(0.5 * (half + half.mT), pull).log_prob(value)

    given = [one.requires_grad_(True) for one in (precision, pull, value)]
    assert torch.autograd.gradcheck(density, given)
    assert torch.autograd.gradgradcheck(density, given)


def test_derivatives_are_those_of_the_way_by_the_cholesky_factor():
    precision, pull = natural(3)
    value = torch.randn(3, SIZE).double()
    found = []
    for density in (PrecisionNormal, dense):
        given = [one.clone().requires_grad_(True) for one in (precision, pull)]
        total = density(*given).log_prob(value).sum()
        by_precision, by_pull = torch.autograd.grad(total, given)
        # Only the symmetric part says something of a symmetric matrix.
        found.append((by_precision + by_precision.mT, by_pull))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_shared_precision_gets_the_gradient_of_all():
    precision, pull = natural()
    pulls = pull + torch.randn(3, 1, SIZE).double()
    value = torch.randn(3, 1, SIZE).double()
    shared = precision.clone().requires_grad_(True)
    (one,) = torch.autograd.grad(PrecisionNormal(shared, pulls).log_prob(value).sum(), shared)
    apart = precision.expand(3, 1, SIZE, SIZE).clone().requires_grad_(True)
    (other,) = torch.autograd.grad(PrecisionNormal(apart, pulls).log_prob(value).sum(), apart)
    torch.testing.assert_close(one, other.sum((0, 1)))


def test_expanded_it_is_the_same():
    precision, pull = natural()
    q = PrecisionNormal(precision, pull)
    wide = q.expand((3, 1))
    assert wide.batch_shape == (3, 1)
    assert wide.expand((3, 1)) is wide
    value = torch.randn(3, 1, SIZE).double()
    torch.testing.assert_close(wide.log_prob(value), q.log_prob(value))
    assert wide.rsample().shape == (3, 1, SIZE)


def test_judged_by_another_distribution():
    """Where what is trained is held, gradients stick the landing."""
    precision, pull = natural()
    trained = precision.clone().requires_grad_(True)
    q = PrecisionNormal(trained, pull, PrecisionNormal(precision, pull))
    value = q.push(torch.randn(SIZE).double())
    torch.testing.assert_close(q.log_prob(value), dense(precision, pull).log_prob(value))
