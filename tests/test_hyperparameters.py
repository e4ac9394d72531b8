"""Hyperparameters: q(theta) is found by noisy steps however many there are."""

import numpy as np
import pytest
import torch
from torch import nn

from armed_pyro import ClusteredData, HalfNormal, MixedEffects, Priors, Slopes
from armed_pyro.engine.adam import Adam
from armed_pyro.guides.hyperparameters import Hyperparameters

DRAWS, RATE = 8, 0.03  # of a step once the network is settled


def hyperparameters_of(width: int) -> Hyperparameters:
    """The sds of slopes on so many hidden units, and the residual's."""
    x = np.random.default_rng(0).normal(size=(400, 2))
    groups = [row % 4 for row in range(400)]
    data = ClusteredData.from_arrays(x, x[:, 0], {"g": groups})
    net = nn.Sequential(nn.Linear(2, width), nn.ELU(), nn.Linear(width, 1)).double()
    hyper = Hyperparameters(MixedEffects(net, [Slopes("g", on="1")]).bind(data))
    hyper.train_shape()
    return hyper


@pytest.mark.parametrize(("width", "most"), [(3, 0.05), (64, 1.0)])
def test_steps_at_full_rate_come_near_a_normal_posterior_of_many_hyperparameters(width, most):
    hyper = hyperparameters_of(width)
    size = hyper.size
    torch.manual_seed(0)
    noise = 0.3 * torch.randn(size, size, dtype=torch.double).tril(-1) / size**0.5
    zeros, identity = torch.zeros(size).double(), torch.eye(size).double()
    hyper.set_normal(zeros, identity)
    posterior = torch.distributions.MultivariateNormal(zeros, scale_tril=identity + noise)
    parameters = dict(hyper.named_parameters())
    adam, divergences = Adam(parameters, eps=1e-4), []
    for _ in range(200):
        guide = hyper.distribution().expand([DRAWS])
        theta = guide.push(torch.randn(DRAWS, size, dtype=torch.double))
        divergence = (guide.log_prob(theta) - posterior.log_prob(theta)).mean()
        gradients = torch.autograd.grad(divergence, [*parameters.values()])
        named = dict(zip(parameters, gradients, strict=True))
        adam(parameters, adam.joined(named), torch.tensor(RATE))
        divergences.append(divergence.item())
    # 16 nats at 65 hyperparameters, were their matrices moved as fast as those of few.
    assert np.mean(divergences[-100:]) < most


@pytest.mark.filterwarnings("ignore:the prior of g_sd")
@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("origin", [0.0, 2000.0])
@pytest.mark.parametrize("bar", ["|", "||"])
def test_sites_at_zero_follow_from_coordinates_at_the_means(classes, origin, bar):
    """D at x = 0 is M D M', and the density gains the map's |det|, here by automatic gradients."""
    rng = np.random.default_rng(0)
    x, y = rng.normal([origin, 0], size=(60, 2)), rng.normal(size=60)
    x[:, 1] = np.arange(60) % 2  # not centred
    y = (np.arange(60) % classes).astype(str) if classes else y
    data = ClusteredData.from_arrays(x, y, {"g": np.arange(60) % 6})
    family = "categorical" if classes else "gaussian"
    priors = Priors(sd=HalfNormal({"Intercept": 5.0}))
    net = nn.Linear(2, classes or 1).double()
    model = MixedEffects(net, f"(1 + x0 + x1 {bar} g)", family, priors=priors).bind(data)
    (factor,), hyper = model.factors, Hyperparameters(model)
    theta = 0.5 * torch.randn(hyper.size, generator=torch.Generator().manual_seed(1)).double()

    def free(theta):
        """The sites, correlations by their elements below the diagonal."""
        values, _ = hyper._read(theta)
        below = torch.ones(3, 3).tril(-1).bool()
        parts = [v[below] if "cholesky" in k else v.reshape(-1) for k, v in values.items()]
        return torch.cat(parts)

    values, log_densities = hyper._read(theta)
    jacobian = torch.autograd.functional.jacobian(free, theta)
    expected = -torch.linalg.slogdet(jacobian)[1]
    torch.testing.assert_close(sum(log_densities.values()), expected, rtol=1e-5, atol=1e-4)
    at_means = {site.name: site.read(theta)[0] for site in hyper.sites}
    if bar == "|":
        root = at_means["g_sd"][:, None] * factor._correlation_cholesky(at_means)
        torch.testing.assert_close(factor.covariance(values), root @ root.T, rtol=1e-6, atol=1e-6)
    else:
        columns, sd = max(1, classes - 1), values["g_sd"]
        torch.testing.assert_close(factor.effect_sd(values)[:columns], at_means["g_sd"][:columns])
        ratios = sd[columns : 2 * columns] / sd[:columns]
        torch.testing.assert_close(ratios, at_means["g_sd"][columns : 2 * columns])
        assert torch.equal(sd[2 * columns :], at_means["g_sd"][2 * columns :])
