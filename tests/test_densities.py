"""Count densities in log parameters are those of scipy, and of torch."""

import numpy as np
import pyro.distributions as dist
import torch
from scipy import special, stats

from armed_pyro.distributions.outcome_densities import (
    LogitBinomial,
    LogNegativeBinomial,
    LogPoisson,
)

Y = torch.tensor([0.0, 1.0, 3.0, 20.0], dtype=torch.float64)
ETA = torch.linspace(-3, 4, 12, dtype=torch.float64).reshape(3, 1, 4)


def test_poisson():
    expected = stats.poisson.logpmf(Y.numpy(), np.exp(ETA.numpy()))
    np.testing.assert_allclose(LogPoisson(ETA).log_prob(Y), expected, rtol=1e-10)
    wide = LogPoisson(ETA[:, :, :1]).expand((3, 2, 4))
    assert wide.batch_shape == (3, 2, 4)
    np.testing.assert_allclose(wide.log_prob(Y), LogPoisson(wide.log_rate).log_prob(Y))


def test_binomial():
    trials = torch.tensor([1.0, 1.0, 7.0, 20.0], dtype=torch.float64)
    expected = stats.binom.logpmf(Y.numpy(), trials.numpy(), special.expit(ETA.numpy()))
    found = LogitBinomial(trials, ETA)
    np.testing.assert_allclose(found.log_prob(Y), expected, rtol=1e-7)
    assert found.expand((5, 3, 1, 4)).log_prob(Y).shape == (5, 3, 1, 4)
    torch.manual_seed(0)
    draws = found.sample((4000,))
    spread = (found.variance / 4000).sqrt()
    assert ((draws.mean(0) - found.mean).abs() < 5 * spread + 1e-12).all()


def test_negative_binomial():
    shape = torch.tensor([0.2, 1.0, 30.0], dtype=torch.float64)[:, None, None]
    mean = np.exp(ETA.numpy())
    p = shape.numpy() / (shape.numpy() + mean)
    expected = stats.nbinom.logpmf(Y.numpy(), shape.numpy(), p)
    found = LogNegativeBinomial(ETA, shape)
    np.testing.assert_allclose(found.log_prob(Y), expected, rtol=1e-9)
    torch.testing.assert_close(found.mean, ETA.exp().expand(3, 1, 4))
    assert found.expand((3, 5, 4)).log_prob(Y).shape == (3, 5, 4)


def test_extreme_predictors_stay_finite():
    eta = torch.tensor([-800.0, 300.0], dtype=torch.float64, requires_grad=True)
    shape = torch.tensor(0.5, dtype=torch.float64)
    value = LogNegativeBinomial(eta, shape).log_prob(torch.tensor([2.0, 2.0]))
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(eta.grad).all()


def test_draws_are_those_of_torch():
    torch.manual_seed(0)
    one = LogPoisson(ETA).sample((2000,))
    assert (one.mean(0) - ETA.exp()).abs().max() < 4.5 * ETA.exp().max().sqrt() / 2000**0.5
    assert isinstance(LogPoisson(ETA), dist.Poisson)
