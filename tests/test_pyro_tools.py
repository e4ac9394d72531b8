"""Pyro's own tools work on the program as it is."""

import dataclasses
import math

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn

from armed_pyro import Adversary, ClusteredData, Known, MixedEffects, Priors, StructuredGuide

N, K = 40, 5


def make_data(seed=0):
    rng = np.random.default_rng(seed)
    site, x = rng.permutation(np.arange(N) % K), rng.normal(size=(N, 1))
    y = 3 + 2 * x[:, 0] + rng.normal(size=K)[site] + rng.normal(size=N)
    return ClusteredData.from_arrays(x, y, {"site": site}, outcome_name="weight")


def bind(random="(1 + x0 | site)", **settings):
    data = make_data()
    torch.manual_seed(0)
    model = MixedEffects(nn.Linear(1, 1).double(), random, **settings).bind(data)
    return model, model.encode(data)


def without_outcome(source):
    return dataclasses.replace(source.all(), y=None)


SITES = {
    "residual_sd": (1,),
    "fixed_effect": (1, 2),
    "site_sd": (1, 2),
    "site_cor": (1, 2, 2),
    "site_cor_cholesky": (1, 2, 2),
    "site_effect": (K, 2),
    "weight": (N,),
}


def test_render_model():
    model, rows = bind(bayesian_head=True, adversary=Adversary("site", taps=[""]))
    source = pyro.render_model(model, model_args=(rows,), render_distributions=True).source
    for name in SITES:
        assert name in source
    assert "site_sd -> site_effect" in source
    assert "site_effect -> weight" in source
    assert "label=row" in source
    assert "classifier" not in source


def test_shapes_of_a_trace():
    model, rows = bind(bayesian_head=True)
    text = poutine.trace(model).get_trace(rows).format_shapes()
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert f"site_effect dist {K} | 2" in lines
    assert f"weight dist {N} |" in lines


def test_nuts_finds_the_conjugate_posterior():
    """Known sds, fixed network: u_k | y ~ N(s2 sum(r) / (s2 n + v), s2 v / (s2 n + v))."""
    priors = Priors(sd=Known(1.2), residual_sd=Known(0.9))
    model, source = bind("(1 | site)", priors=priors)
    model.requires_grad_(False)
    torch.manual_seed(0)
    mcmc = MCMC(NUTS(model), num_samples=150, warmup_steps=50, disable_progbar=True)
    mcmc.run(source)
    draws = mcmc.get_samples()["site_effect"][..., 0] * model.data_facts().spread
    rows = source.all()
    residual = rows.y - model.predictor(rows, {}).eta[:, 0]
    code, s2, v = source.codes["site"], 1.2**2, 0.9**2
    n = torch.bincount(code)
    mean = s2 * torch.zeros(K).double().index_add_(0, code, residual) / (s2 * n + v)
    sd = (s2 * v / (s2 * n + v)).sqrt()
    effective = mcmc.diagnostics()["site_effect"]["n_eff"][:, 0]
    assert (effective > 50).all()
    assert ((draws.mean(0) - mean).abs() < 4 * sd / effective.sqrt()).all()
    assert ((draws.std(0) / sd).log().abs() < 4 / (2 * effective).sqrt()).all()


def test_nuts_runs_with_every_kind_of_site():
    model, source = bind(bayesian_head=True)
    torch.manual_seed(0)
    kernel = NUTS(model, max_tree_depth=4)
    mcmc = MCMC(kernel, num_samples=5, warmup_steps=5, disable_progbar=True)
    mcmc.run(source)
    draws = mcmc.get_samples()
    assert set(draws) == {
        "residual_sd",
        "fixed_effect",
        "site_sd",
        "site_cor_cholesky",
        "site_effect",
    }
    assert all(torch.isfinite(one).all() for one in draws.values())


@pytest.mark.parametrize("parallel", [True, False])
def test_prior_predictive(parallel):
    model, source = bind(bayesian_head=True)
    torch.manual_seed(0)
    draws = Predictive(model, num_samples=7, parallel=parallel)(without_outcome(source))
    assert {name: tuple(one.shape[1:]) for name, one in draws.items()} == SITES
    assert all(len(one) == 7 and torch.isfinite(one).all() for one in draws.values())
    assert (draws["weight"].std(0) > 0).all()


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("how", ["draws", "guide"])
def test_posterior_predictive(how, parallel):
    model, source = bind(bayesian_head=True)
    guide, n = StructuredGuide(model, source), 150
    torch.manual_seed(0)
    if how == "draws":
        draws = guide.draws(model.clusters(), n)
        tool = Predictive(model, posterior_samples=draws, parallel=parallel)
    else:
        tool = Predictive(model, guide=guide, num_samples=n, parallel=parallel)
    got = tool(without_outcome(source))
    assert got["weight"].shape == (n, N)
    # y ~ N(eta, residual_sd): standardised by the draws' own predictor it is N(0, 1).
    draws = draws if how == "draws" else {name: got[name] for name in SITES if name != "weight"}
    eta = model.predictor(source.all(), draws).eta[..., 0]
    noise = (got["weight"] - eta) / (draws["residual_sd"] * model.data_facts().spread)
    assert noise.mean().item() == pytest.approx(0, abs=4.5 / math.sqrt(n * N))
    assert noise.var().item() == pytest.approx(1, abs=4.5 * math.sqrt(2 / (n * N)))


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("head", [True, False])
def test_stock_svi(head, local):
    """SVI with Pyro's AutoNormal and Adam trains guide and network."""
    model, source = bind("(1 | site)", bayesian_head=head)
    before = model.net.weight.clone()
    torch.manual_seed(0)
    with pyro.settings.context(module_local_params=local):
        svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
        losses = [svi.step(source) for _ in range(100)]
    model_names = [name for name in pyro.get_param_store() if not name.startswith("AutoNormal")]
    pyro.clear_param_store()
    assert np.mean(losses[-30:]) < np.mean(losses[:10]) - 5
    assert torch.equal(model.net.weight, before) is head
    assert model_names == []


def test_stock_svi_as_a_torch_module():
    model, source = bind()
    with pyro.settings.context(module_local_params=True):
        loss = Trace_ELBO()(model, AutoNormal(model))
        start = loss(source).item()
        adam = torch.optim.Adam(loss.parameters(), lr=0.05)
        for _ in range(100):
            adam.zero_grad()
            loss(source).backward()
            adam.step()
        assert loss(source).item() < start
