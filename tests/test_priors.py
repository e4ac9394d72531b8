"""Priors: densities against scipy, scales in the data's units, known sds."""

import math

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from scipy import stats

from armed_pyro import Exponential, HalfNormal, HalfStudentT, Known, Priors

DENSITIES = {
    "half-normal": (HalfNormal(), lambda x, s: stats.halfnorm.logpdf(x, scale=s)),
    "half-t": (HalfStudentT(), lambda x, s: math.log(2) + stats.t.logpdf(x, 3, scale=s)),
    "half-cauchy": (HalfStudentT(df=1.0), lambda x, s: stats.halfcauchy.logpdf(x, scale=s)),
    "exponential": (Exponential(), lambda x, s: stats.expon.logpdf(x, scale=s)),
}


@pytest.mark.parametrize("name", DENSITIES)
def test_density_is_scipys(name):
    prior, expected = DENSITIES[name]
    scale, x = torch.tensor([0.5, 2.0]).double(), torch.tensor([0.3, 4.0]).double()
    with poutine.condition(data={"sd": x}):
        trace = poutine.trace(prior.sample).get_trace("sd", scale)
    logs = expected(x.numpy(), scale.numpy())
    assert float(trace.log_prob_sum()) == pytest.approx(logs.sum())
    assert trace.nodes["sd"]["fn"].event_shape == (2,)


@pytest.mark.parametrize("name", DENSITIES)
def test_draws_follow_the_density(name):
    prior, expected = DENSITIES[name]
    torch.manual_seed(0)
    draws = prior.density(torch.tensor([2.0])).sample((2000,))[:, 0].numpy()
    grid = np.linspace(0, 2000, 400_001)
    cdf = np.cumsum(np.exp(expected(grid, 2.0))) * (grid[1] - grid[0])
    uniform = np.interp(draws, grid, cdf)
    assert stats.kstest(uniform, "uniform").pvalue > 1e-3


def test_scales_are_in_the_units_of_the_data():
    unit = torch.tensor([2.0, 4.0])
    terms = ["Intercept", "age"]
    assert HalfNormal().scales(terms, unit, 2.5).tolist() == [2.5, 2.5]
    assert HalfNormal(3.0).scales(terms, unit, 2.5).tolist() == [6, 12]
    assert HalfNormal({"age": 3.0}).scales(terms, unit, 2.5).tolist() == [2.5, 12]


def test_a_misspelt_term_is_an_error():
    with pytest.raises(ValueError, match=r"'aeg'.*Did you mean 'age'"):
        HalfNormal({"aeg": 1.0}).scales(["Intercept", "age"], torch.ones(2), 1.0)


def test_known_sds_are_no_latent_site():
    with poutine.trace() as tracer:
        value = Known(0.5).sample("sd", torch.tensor([0.5, 1.0]))
    assert value.tolist() == [0.5, 1.0]
    assert tracer.trace.nodes["sd"]["is_observed"]
    assert float(tracer.trace.log_prob_sum()) == 0
    assert Known(0.5).density(value).sample().tolist() == [0.5, 1.0]


def test_known_needs_every_sd():
    with pytest.raises(ValueError, match="Known needs the standard deviation"):
        Known()
    with pytest.raises(ValueError, match="no standard deviation for the term 'age'"):
        Known({"Intercept": 1.0}).scales(["Intercept", "age"], torch.ones(2), 1.0)
    both = Known({"Intercept": 1.0, "age": 2.0}).scales(["Intercept", "age"], torch.ones(2), 1.0)
    assert both.tolist() == [1, 2]


@pytest.mark.parametrize("kind", [HalfNormal, HalfStudentT, Exponential, Known])
@pytest.mark.parametrize("scale", [0.0, -1.0, {"age": 0.0}, float("nan")])
def test_scales_are_positive(kind, scale):
    with pytest.raises(ValueError, match="must be positive"):
        kind(scale)


@pytest.mark.parametrize("setting", [{"cor": 0.0}, {"fixed_sd": -1.0}])
def test_settings_are_positive(setting):
    with pytest.raises(ValueError, match="must be positive"):
        Priors(**setting)


def test_priors_by_factor():
    given = HalfNormal(2.0)
    assert Priors(sd=given).of("site") is given
    assert Priors(sd={"site": given}).of("site") is given
    assert Priors(sd={"site": given}).of("batch") == HalfStudentT()


@pytest.mark.parametrize(
    ("prior", "text"),
    [
        (HalfNormal(), "HalfNormal(2.5)"),
        (HalfStudentT(df=4), "HalfStudentT(4, 2.5)"),
        (Exponential(), "Exponential(mean 2.5)"),
        (Known(1.0), "known: 2.5"),
    ],
)
def test_describe(prior, text):
    assert prior.describe(2.5) == text


def test_vectorised_over_draws():
    with pyro.plate("draws", 5, dim=-2):
        assert HalfStudentT().sample("sd", torch.ones(3)).shape == (5, 1, 3)
        assert HalfStudentT().sample("residual_sd", torch.ones(())).shape == (5, 1)
