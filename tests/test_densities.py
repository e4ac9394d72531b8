"""Count densities in log parameters are those of scipy, and of torch."""

from itertools import product

import mpmath as mp
import numpy as np
import pyro.distributions as dist
import pytest
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


# ------------------------------------------------------- the ends of the parameters, by mpmath


def poisson(y, eta):
    return y * eta - mp.exp(eta) - mp.loggamma(y + 1)


def binomial(y, n, eta):
    constant = mp.loggamma(n + 1) - mp.loggamma(y + 1) - mp.loggamma(n - y + 1)
    return constant - y * mp.log1p(mp.exp(-eta)) - (n - y) * mp.log1p(mp.exp(eta))


def negative_binomial(y, eta, shape):
    mean = mp.exp(eta)
    constant = mp.loggamma(y + shape) - mp.loggamma(shape) - mp.loggamma(y + 1)
    return constant + shape * mp.log(shape / (shape + mean)) + y * mp.log(mean / (shape + mean))


def normal(y, mean, sd):
    return -(((y - mean) / sd) ** 2) / 2 - mp.log(sd) - mp.log(2 * mp.pi) / 2


COUNTS = (0.0, 1.0, 50.0, 1e4, 1e7)
SHAPES = (1e-3, 0.5, 15.9, 16.0, 1e3, 1e6, 1e10, 1e14)
CASES = {
    "poisson": (
        lambda y, eta: LogPoisson(eta).log_prob(y),
        poisson,
        list(product(COUNTS, (-40.0, -1.0, 0.0, 16.0))),
    ),
    "binomial": (
        lambda y, n, eta: LogitBinomial(n, eta).log_prob(y),
        binomial,
        [
            (share * n, n, eta)
            for share, n, eta in product(
                (0.0, 0.5, 1.0), (2.0, 1e3, 1e8), (-40.0, -21.0, -1.0, 0.0, 3.0, 21.0, 40.0)
            )
        ],
    ),
    "bernoulli": (
        lambda y, eta: dist.Bernoulli(logits=eta).log_prob(y),
        lambda y, eta: binomial(y, mp.mpf(1), eta),
        list(product((0.0, 1.0), (-40.0, -1.0, 0.0, 1.0, 40.0))),
    ),
    "negative_binomial": (
        lambda y, eta, shape: LogNegativeBinomial(eta, shape).log_prob(y),
        negative_binomial,
        list(product(COUNTS, (-10.0, 0.0, 4.0, 16.0), SHAPES)),
    ),
    "gaussian": (
        lambda y, mean, sd: dist.Normal(mean, sd).log_prob(y),
        normal,
        list(product((0.0, 6e6 + 1e-3), (6e6, 6e6 + 2e-3), (1e-3, 0.5))),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", CASES)
def test_densities_and_gradients_at_the_ends_of_their_parameters(family, dtype):
    """The error is rounding: of the outcome, of its mean and of the predictor."""
    density, exact, points = CASES[family]
    if family == "gaussian" and dtype == torch.float32:
        pytest.skip("single precision cannot hold these outcomes")
    eps = torch.finfo(dtype).eps
    with mp.workdps(60):
        for point in points:
            y, *rest = torch.tensor(point, dtype=dtype)
            rest = [value.clone().requires_grad_() for value in rest]
            value = density(y, *rest)
            value.backward()
            numbers = [mp.mpf(float(x.detach())) for x in (y, *rest)]
            expected = exact(*numbers)
            size = 1 + abs(point[0]) * 40 + abs(float(expected))
            if family in ("poisson", "negative_binomial"):
                size += np.exp(point[1]) * 40
            assert abs(float(value) - float(expected)) < 4 * eps * size, (point, value, expected)
            if family in ("gaussian", "binomial"):
                continue
            # The gradient in the shape counts per unit of its logarithm, the latent coordinate.
            for place, parameter in enumerate(rest):
                slope = mp.diff(
                    exact, tuple(numbers), tuple(int(k == place + 1) for k in range(len(numbers)))
                )
                unit = point[place + 1] if place else 1.0
                error = abs(float(parameter.grad) - float(slope)) * unit
                assert error < 8 * eps * size, (point, place, parameter.grad, slope)


def test_a_negative_binomial_becomes_a_poisson():
    expected = LogPoisson(ETA).log_prob(Y)
    for shape in (1e16, 1e30, 1e200):
        density = LogNegativeBinomial(ETA, torch.tensor(shape, dtype=torch.float64))
        torch.testing.assert_close(density.log_prob(Y), expected, rtol=1e-12, atol=1e-12)
