"""The program: sites and shapes, its density against scipy's, and an unedited network."""

import copy
import dataclasses
import math
import warnings

import mpmath as mp
import numpy as np
import pandas as pd
import pytest
import torch
from pyro import poutine
from scipy import stats
from scipy.special import logsumexp
from torch import nn

from armed_pyro import (
    Adversary,
    ClusteredData,
    Exponential,
    HalfNormal,
    Known,
    MixedEffects,
    Priors,
    Slopes,
)
from armed_pyro.rows.in_memory import HeldRows

N, K = 48, 6
OUTCOMES = {
    "gaussian": lambda rng: rng.normal(100, 15, N),
    "bernoulli": lambda rng: rng.permutation(np.arange(N) % 2),
    "binomial": lambda rng: rng.integers(0, 5, N),
    "poisson": lambda rng: rng.poisson(3, N),
    "negative_binomial": lambda rng: rng.poisson(rng.gamma(2, 2, N)),
    "categorical": lambda rng: rng.permutation(np.arange(N) % 3).astype(str),
}


def make_data(family="gaussian", seed=0, **roles):
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "score": OUTCOMES[family](rng),
            "age": rng.normal(50, 10, N),
            "dose": rng.normal(-2, 0.5, N),
            "site": rng.permutation(np.arange(N) % K),
            "batch": rng.permutation(np.arange(N) % 4),
            **roles,
        }
    )
    if family == "binomial":
        frame["n"] = 5.0
    named = {role: role for role in ("offset", "weights") if role in roles}
    named |= {"trials": "n"} if family == "binomial" else {}
    return ClusteredData.from_frame(
        frame, outcome="score", clusters=["site", "batch"], features=["age", "dose"], **named
    )


def linear(family="gaussian"):
    torch.manual_seed(0)
    return nn.Linear(2, 3 if family == "categorical" else 1).double()


def deep():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()


def bind(random="(1 | site)", family="gaussian", net=None, data=None, **settings):
    data = make_data(family) if data is None else data
    model = MixedEffects(linear(family) if net is None else net, random, family, **settings)
    model = model.bind(data)
    return model, model.encode(data)


def trace_of(model, rows, seed=0):
    torch.manual_seed(seed)
    return poutine.trace(model).get_trace(rows)


def values_of(trace):
    return {
        name: node["value"].detach().numpy()
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and "Subsample" not in type(node["fn"]).__name__
    }


# --------------------------------------------------------------------------- sites and shapes


def test_sites_and_shapes():
    model, rows = bind("(1 + age | site) + (1 | batch)", bayesian_head=True)
    shapes = {name: value.shape for name, value in values_of(trace_of(model, rows)).items()}
    assert shapes == {
        "residual_sd": (),
        "fixed_effect": (3,),
        "site_sd": (2,),
        "site_cor_cholesky": (2, 2),
        "site_cor": (2, 2),
        "site_effect": (K, 2),
        "batch_sd": (1,),
        "batch_effect": (4, 1),
        "score": (N,),
    }
    assert model.fixed_terms() == ("Intercept", "age", "dose")
    assert model.linear


@pytest.mark.parametrize("family", OUTCOMES)
def test_every_family_has_its_own_dispersion(family):
    model, rows = bind(family=family)
    sites = set(values_of(trace_of(model, rows)))
    dispersion = {"gaussian": {"residual_sd"}, "negative_binomial": {"shape"}}.get(family, set())
    assert sites == {"site_sd", "site_effect", "score"} | dispersion


def test_classes_have_columns_of_effects():
    model, rows = bind("(1 + age | site)", "categorical", bayesian_head=True)
    values = values_of(trace_of(model, rows))
    assert values["site_effect"].shape == (K, 4)
    assert values["site_cor_cholesky_1"].shape == (2, 2)
    assert values["fixed_effect"].shape == (6,)
    assert model.fixed_terms()[:4] == ("Intercept[1]", "Intercept[2]", "age[1]", "age[2]")


def test_the_outcome_is_drawn_where_it_is_not_known():
    model, rows = bind("(1 | site)", "poisson")
    unknown = dataclasses.replace(rows.all(), y=None)
    trace = trace_of(model, unknown)
    assert not trace.nodes["score"]["is_observed"]
    assert trace.nodes["score"]["value"].shape == (N,)
    assert trace_of(model, rows).nodes["score"]["is_observed"]


def test_nested_and_crossed_factors():
    model, rows = bind("(1 | site/batch) + (1 | batch)")
    assert model.factor_names() == ("site", "site:batch", "batch")
    cells = model.data_facts().levels["site:batch"]
    assert values_of(trace_of(model, rows))["site:batch_effect"].shape == (len(cells), 1)


def test_no_random_effects():
    model, rows = bind(())
    assert set(values_of(trace_of(model, rows))) == {"residual_sd", "score"}


# ------------------------------------------------------------------------- density, by hand


def half_t(x, scale):
    return math.log(2) + stats.t.logpdf(x, 3, scale=scale)


def fixed_part(model, data):
    """Centre + spread * (net(standardised features) + offset), all in numpy."""
    facts, net = model.data_facts(), model.net
    X = data.features.numpy()
    x = (X - X.mean(0)) / X.std(0, ddof=1)
    f = x @ net.weight.detach().numpy().T + net.bias.detach().numpy()
    if facts.classes:
        f = f[:, 1:] - f[:, :1]
    offset = 0 if data.offset is None else data.offset.numpy()[:, None]
    return x, np.array(facts.center) + facts.spread * f + offset


def site_of(data):
    return data.groupings["site"].codes.numpy()


def test_density_with_correlated_slopes():
    data = make_data()
    model, rows = bind("(1 + age | site)", data=data, priors=Priors(cor=2.0))
    trace = trace_of(model, rows)
    v = values_of(trace)
    x, eta = fixed_part(model, data)
    r = v["site_cor"][0, 1]
    cov = np.outer(v["site_sd"], v["site_sd"]) * [[1, r], [r, 1]]
    expected = half_t(v["residual_sd"], 1) + half_t(v["site_sd"], 1).sum()
    # LKJ(2) of two terms: p(r) = 3/4 (1 - r^2), and dr/dL_21 = 1.
    expected += math.log(0.75 * (1 - r**2))
    expected += stats.multivariate_normal.logpdf(v["site_effect"], cov=cov).sum()
    u, y = v["site_effect"][site_of(data)], data.outcome.numpy()
    spread = y.std(ddof=1)
    mean = eta[:, 0] + spread * (u[:, 0] + u[:, 1] * x[:, 0])
    expected += stats.norm.logpdf(y, mean, v["residual_sd"] * spread).sum()
    assert trace.log_prob_sum().item() == pytest.approx(expected)


def counts_density(family, y, eta, v):
    if family == "poisson":
        return stats.poisson.logpmf(y, np.exp(eta))
    if family == "binomial":
        return stats.binom.logpmf(y, 5, 1 / (1 + np.exp(-eta)))
    if family == "bernoulli":
        return stats.bernoulli.logpmf(y, 1 / (1 + np.exp(-eta)))
    return np.array([negative_binomial(*row, v["shape"]) for row in zip(y, eta, strict=True)])


def negative_binomial(y, eta, shape):
    """By mpmath: scipy loses a hundredth of a nat per row at the large shape that is drawn."""
    with mp.workdps(50):
        y, mean, shape = mp.mpf(float(y)), mp.exp(mp.mpf(float(eta))), mp.mpf(float(shape))
        constant = mp.loggamma(y + shape) - mp.loggamma(shape) - mp.loggamma(y + 1)
        total = shape + mean
        return float(constant + shape * mp.log(shape / total) + y * mp.log(mean / total))


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("family", ["poisson", "binomial", "bernoulli", "negative_binomial"])
def test_density_of_counts(family, offset):
    roles = {"offset": np.linspace(-1, 1, N)} if offset else {}
    data = make_data(family, **roles)
    model, rows = bind("(1 + age || site)", family, data=data, priors=Priors(sd=HalfNormal()))
    trace = trace_of(model, rows)
    v = values_of(trace)
    _, eta = fixed_part(model, data)
    age = data.features[:, 0].numpy()
    mean, sd = age.mean(), age.std(ddof=1)
    expected = stats.halfnorm.logpdf(v["site_sd"], scale=2.5).sum()
    # Effects are those at the mean of age; those at age 0 are independent.
    at_zero = v["site_effect"] @ np.array([[1, 0], [-mean / sd, 1]])
    expected += stats.norm.logpdf(at_zero, 0, v["site_sd"]).sum()
    if family == "negative_binomial":
        expected += stats.invgamma.logpdf(v["shape"], 0.4, scale=0.3)
    u = v["site_effect"][site_of(data)]
    eta = eta[:, 0] + u[:, 0] + u[:, 1] * (age - mean) / sd
    expected += counts_density(family, data.outcome.numpy(), eta, v).sum()
    assert trace.log_prob_sum().item() == pytest.approx(expected)


def test_density_of_classes():
    data = make_data("categorical")
    prior = Priors(sd=Exponential(2.0))
    model, rows = bind("(1 | site)", "categorical", data=data, priors=prior)
    trace = trace_of(model, rows)
    v = values_of(trace)
    _, eta = fixed_part(model, data)
    eta = np.column_stack([np.zeros(N), eta + v["site_effect"][site_of(data)]])
    y = data.outcome.numpy().astype(int)
    expected = stats.expon.logpdf(v["site_sd"], scale=2).sum()
    expected += stats.norm.logpdf(v["site_effect"], 0, v["site_sd"]).sum()
    expected += (eta[np.arange(N), y] - logsumexp(eta, axis=1)).sum()
    assert trace.log_prob_sum().item() == pytest.approx(expected)


@pytest.mark.parametrize("family", ["gaussian", "categorical"])
def test_latent_fixed_effects_take_the_last_layers_place(family):
    data = make_data(family)
    model, rows = bind("(1 | site)", family, data=data, bayesian_head=True)
    trace = trace_of(model, rows)
    v = values_of(trace)
    X = data.features.numpy()
    x = np.column_stack([np.ones(N), (X - X.mean(0)) / X.std(0, ddof=1)])
    facts = model.data_facts()
    beta = v["fixed_effect"].reshape(3, -1)
    expected = np.array(facts.center) + facts.spread * x @ beta
    np.testing.assert_allclose(trace.nodes["_RETURN"]["value"].fixed, expected)


def test_latent_head_of_a_deep_network():
    model, rows = bind(net=deep(), bayesian_head=True)
    assert model.head_path() == "2"
    assert model.fixed_terms() == ("Intercept", "2[0]", "2[1]", "2[2]")
    assert not model.linear
    trace = trace_of(model, rows)
    hidden = torch.tanh(model.net[0](rows.x))
    beta, facts = trace.nodes["fixed_effect"]["value"], model.data_facts()
    expected = facts.center[0] + facts.spread * (beta[0] + hidden @ beta[1:])
    torch.testing.assert_close(trace.nodes["_RETURN"]["value"].fixed[:, 0], expected)


def test_predictor_is_vectorised_over_draws():
    model, rows = bind("(1 + age | site)", "categorical", bayesian_head=True)
    effects = torch.randn(5, K, 4).double()
    beta = torch.randn(5, 1, 6).double()
    latents = {"site_effect": effects, "fixed_effect": beta}
    eta = model.predictor(rows.all(), latents).eta
    assert eta.shape == (5, N, 2)
    one = model.predictor(rows.all(), {"site_effect": effects[3], "fixed_effect": beta[3, 0]})
    torch.testing.assert_close(eta[3], one.eta)


def test_log_likelihood_is_the_densitys_part():
    model, rows = bind("(1 | site)", data=make_data(weights=np.arange(N) % 3))
    trace = trace_of(model, rows)
    latents = {k: v["value"] for k, v in trace.nodes.items() if k in ("residual_sd", "site_effect")}
    trace.compute_log_prob()
    got = model.log_likelihood(rows.all(), latents)
    torch.testing.assert_close(got, trace.nodes["score"]["log_prob"])


# --------------------------------------------------------------------- offsets and row weights


@pytest.mark.parametrize("family", OUTCOMES)
def test_an_offset_shifts_the_predictor(family):
    shift = np.linspace(-1, 1, N)
    model, _ = bind(family=family)
    effects = {"site_effect": torch.ones(K, len(model.factors[0].terms)).double()}
    without = model.predictor(model.encode(make_data(family)).all(), effects)
    with_ = model.predictor(model.encode(make_data(family, offset=shift)).all(), effects)
    for one in ("eta", "fixed"):
        moved = getattr(with_, one) - getattr(without, one)
        expected = torch.from_numpy(shift)[:, None].expand_as(moved)
        torch.testing.assert_close(moved, expected)


def test_weight_two_is_a_row_twice():
    data = make_data(weights=np.where(np.arange(N) < 10, 2.0, 1.0))
    model, weighted = bind("(1 + age | site)", data=data)
    twice = torch.cat([torch.arange(N), torch.arange(10)])
    rows = weighted.all()
    copies = HeldRows(
        rows.x[twice],
        rows.y[twice],
        {name: codes[twice] for name, codes in weighted.codes.items()},
        weighted.counts,
    ).all()
    trace = trace_of(model, weighted)
    keep = [name for name in trace.nodes if name.endswith(("_sd", "_cholesky", "_effect"))]
    fixed = poutine.condition(model, data={name: trace.nodes[name]["value"] for name in keep})
    again = poutine.trace(fixed).get_trace(copies)
    assert again.log_prob_sum().item() == pytest.approx(trace.log_prob_sum().item())


def test_weight_zero_leaves_a_row_out():
    data = make_data(weights=np.r_[0.0, np.ones(N - 1)])
    model, rows = bind(data=data)
    before = trace_of(model, rows).log_prob_sum().item()
    other = dataclasses.replace(rows, y=rows.y + torch.eye(N).double()[0] * 1000)
    assert trace_of(model, other).log_prob_sum().item() == before


# ------------------------------------------------------------------------------ known sds


def test_known_sds_are_in_the_units_of_the_data():
    data = make_data()
    priors = Priors(sd=Known(12.0), residual_sd=Known(3.0))
    model, rows = bind("(1 + age || site)", data=data, priors=priors)
    trace = trace_of(model, rows)
    spread, sd = data.outcome.std(), data.features[:, 0].std()
    expected = {
        "site_sd": torch.stack([12 / spread, 12 * sd / spread]),
        "residual_sd": 3 / spread,
    }
    assert set(model.known()) == set(expected)
    for name, value in expected.items():
        assert trace.nodes[name]["is_observed"]
        torch.testing.assert_close(trace.nodes[name]["value"], value)
        torch.testing.assert_close(model.known()[name], value)
    latent = [n for n, node in trace.nodes.items() if node["type"] == "sample"]
    latent = [n for n in latent if not trace.nodes[n]["is_observed"] and n.endswith("_effect")]
    assert latent == ["site_effect"]


def test_priors_follow_the_data_when_their_units_change():
    """Metres or kilometres, grams or tonnes: the standardised program is the same."""
    rng = np.random.default_rng(0)
    x, y, site = rng.normal(3, 2, (N, 1)), rng.normal(size=N), np.arange(N) % K
    logs = []
    for unit, size in [(1, 1), (1000, 0.001)]:
        data = ClusteredData.from_arrays(x * unit, y * size, {"site": site})
        torch.manual_seed(0)
        net = nn.Linear(1, 1).double()
        model = MixedEffects(net, "(1 + x0 | site)").bind(data)
        trace = trace_of(model, model.encode(data))
        logs.append(trace.log_prob_sum().item() + N * math.log(size))
    assert logs[0] == pytest.approx(logs[1])


# ------------------------------------------------------------------- the network is not edited


def test_the_users_network_is_left_as_it_was():
    net = deep()
    before, names = copy.deepcopy(net.state_dict()), [name for name, _ in net.named_modules()]
    net.train()
    plan = MixedEffects(
        net,
        ["(1 | site)", Slopes("site", on="1")],
        adversary=Adversary("site", taps=["1"]),
        bayesian_head=True,
    )
    data = make_data()
    model = plan.bind(data)
    rows = model.encode(data)
    for _ in range(2):
        model(rows)
    assert net.training
    assert model.net is not net
    assert not {id(p) for p in model.parameters()} & {id(p) for p in net.parameters()}
    assert [name for name, _ in net.named_modules()] == names
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key])
    for one in (*net.modules(), *model.modules()):
        assert not one._forward_hooks
        assert not one._forward_pre_hooks
    assert plan.facts is None
    assert plan.factors == ()
    assert plan.adversaries[0].classifier is None
    assert model.adversaries[0] is not plan.adversaries[0]


def test_a_frozen_layer_stays_frozen_in_the_copy():
    net = deep()
    net[0].weight.requires_grad_(False)
    model, _ = bind(net=net)
    assert not model.net[0].weight.requires_grad
    assert model.net[2].weight.requires_grad


def test_batch_normalisation_is_not_moved_by_binding():
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    model, _ = bind(net=net, bayesian_head=True)
    assert model.net[1].num_batches_tracked == 0
    assert model.net.training


def test_hidden_layers_enter_the_predictor():
    model, rows = bind(["(1 | site)", Slopes("site", on="1")], net=deep())
    effects = torch.randn(K, 4).double()
    predictor = model.predictor(rows.all(), {"site_effect": effects})
    hidden = torch.tanh(model.net[0](rows.x))
    mine = effects[rows.codes["site"]]
    expected = model.data_facts().spread * (mine[:, 0] + (mine[:, 1:] * hidden).sum(1))
    torch.testing.assert_close((predictor.eta - predictor.fixed)[:, 0], expected)


class Counts(nn.Module):
    """How often the network was run, and on how many rows."""

    def __init__(self, net):
        super().__init__()
        self.net, self.rows = net, []

    def forward(self, x):
        self.rows.append(len(x))
        return self.net(x)


@pytest.mark.parametrize("head", [False, True])
def test_what_a_settled_network_makes_of_the_rows_is_computed_once(head):
    net = Counts(deep())
    random = ["(1 | site)", Slopes("site", on="net.1")]
    game = Adversary("batch", taps=["net.0"])
    model, source = bind(random, net=net, bayesian_head=head, adversary=game)
    model.eval()
    runs = model.network.rows
    runs.clear()
    computed = model.compute(source)
    assert sum(runs) == N
    assert not any(one.requires_grad for one in computed.computed.values())
    runs.clear()
    one = trace_of(model, computed)
    model.predictor(computed.batch(torch.tensor([3, 5])), values_for(model))
    assert not runs
    other = trace_of(model, source)
    assert runs == [N]
    torch.testing.assert_close(one.log_prob_sum(), other.log_prob_sum())
    mine, theirs = one.nodes["_RETURN"]["value"], other.nodes["_RETURN"]["value"]
    for name in ("eta", "fixed", "output"):
        torch.testing.assert_close(getattr(mine, name), getattr(theirs, name), msg=name)
    for path, values in theirs.activations.items():
        torch.testing.assert_close(mine.activations[path], values)


def values_for(model):
    """Zeros for all latent sites that the predictor needs."""
    latents = {one.effect_site: torch.zeros(K, len(one.terms)).double() for one in model.factors}
    if model.bayesian_head:
        latents["fixed_effect"] = torch.zeros(1, len(model.fixed_terms())).double()
    return latents


def test_a_batch_of_computed_rows_has_their_part_of_it():
    model, source = bind(["(1 | site)", Slopes("site", on="1")], net=deep())
    latents = {"site_effect": torch.randn(K, 4).double()}
    index = torch.tensor([40, 2, 17])
    computed = model.compute(source).batch(index)
    torch.testing.assert_close(
        model.predictor(computed, latents).eta, model.predictor(source.batch(index), latents).eta
    )


def test_many_rows_are_computed_a_block_at_a_time():
    net = Counts(nn.Linear(2, 1))
    data = make_data()
    model = MixedEffects(net, "(1 | site)").bind(data)
    source = model.encode(data)
    many = dataclasses.replace(
        source,
        x=source.x.repeat(200, 1),
        y=source.y.repeat(200),
        codes={name: one.repeat(200) for name, one in source.codes.items()},
    )
    model.network.rows.clear()
    computed = model.compute(many)
    assert sum(model.network.rows) == 200 * N
    assert max(model.network.rows) < 200 * N
    torch.testing.assert_close(computed.computed[""], model.network.net(many.x.float()))
    # Computed again, it is of the network as it is then.
    with torch.no_grad():
        model.network.net.bias += 1
    again = model.compute(computed)
    torch.testing.assert_close(again.computed[""], computed.computed[""] + 1)


def test_computing_does_not_move_batch_normalisation_or_the_mode():
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    model, source = bind(net=net)
    model.eval()
    model.compute(source)
    assert model.net[1].num_batches_tracked == 0
    assert not model.net.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_precision_of_the_program_is_not_the_networks(dtype):
    model, rows = bind("(1 + age | site)", net=nn.Linear(2, 1), bayesian_head=True, dtype=dtype)
    trace = trace_of(model, rows)
    values = [n["value"] for n in trace.nodes.values() if n["type"] == "sample"]
    assert {v.dtype for v in values if v.is_floating_point()} == {dtype}


# ------------------------------------------------------------------------------ new clusters


def test_new_clusters():
    model, rows = bind("(1 + age | site)")
    trace = trace_of(model, rows)
    latents = {k: n["value"] for k, n in trace.nodes.items() if n["type"] == "sample"}
    n = 20_000
    zeros = model.extend(latents, {"site": K + 3}, population=True)["site_effect"]
    assert torch.equal(zeros[:K], latents["site_effect"])
    assert (zeros[K:] == 0).all()
    drawn = model.extend(latents, {"site": K + n}, population=False)["site_effect"][K:]
    D = model.factors[0].covariance(latents)
    bound = ((D.diagonal()[:, None] * D.diagonal() + D**2) / n).sqrt()
    assert ((drawn.T @ drawn / n - D).abs() < 4.5 * bound).all()


def test_new_clusters_of_every_draw():
    model, _ = bind("(1 + age || site)")
    scale = torch.tensor([0.1, 3.0]).double()
    latents = {
        "site_sd": torch.stack([scale, 10 * scale])[:, None],
        "site_effect": torch.zeros(2, K, 2).double(),
    }
    drawn = model.extend(latents, {"site": K + 5000}, population=False)["site_effect"][:, K:]
    # The sds are those of effects at age 0.
    drawn = drawn @ torch.linalg.inv(model.factors[0].from_zero).mT
    torch.testing.assert_close(
        drawn.std(1) / latents["site_sd"][:, 0], torch.ones(2, 2).double(), rtol=0.06, atol=0
    )


# --------------------------------------------------------------------------------------- errors


class Skip(nn.Module):
    def __init__(self):
        super().__init__()
        self.skip, self.head = nn.Linear(2, 1, bias=False), nn.Linear(2, 1)

    def forward(self, x):
        return self.skip(x) + self.head(x)


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.spare = nn.Linear(2, 1), nn.Linear(2, 1)

    def forward(self, x):
        return self.used(x)


def positive_relu():
    net = nn.Sequential(nn.Linear(2, 1), nn.ReLU())
    nn.init.constant_(net[0].bias, 1.0)  # at zero features nothing gives it away
    return net


ERRORS = {
    "outputs": ({"net": nn.Linear(2, 2)}, r"2 output\(s\), but the outcome 'score'.* needs 1"),
    "classes": (
        {"net": nn.Linear(2, 2), "family": "categorical"},
        r"2 output\(s\).*'categorical' needs 3",
    ),
    "features": ({"net": nn.Linear(5, 1)}, r"cannot take the features.*\(rows, 2\) \(age, dose\)"),
    "sigmoid after the head": (
        {"net": nn.Sequential(nn.Linear(2, 1), nn.Sigmoid()), "bayesian_head": True},
        "something follows it",
    ),
    "relu after the head": (
        {"net": positive_relu(), "bayesian_head": True},
        "something follows it",
    ),
    "skip past the head": ({"net": Skip(), "bayesian_head": True}, "something follows it"),
    "head never run": ({"net": Unused(), "bayesian_head": True}, "something follows it"),
    "no linear layer": (
        {"net": nn.Sequential(nn.Bilinear(2, 2, 1)), "bayesian_head": True, "random": ()},
        r"needs a network with a torch\.nn\.Linear layer",
    ),
    "unused layer": (
        {"net": Unused(), "random": Slopes("site", on="spare")},
        "never runs its module 'spare'",
    ),
    "layer": (
        {"net": deep(), "random": Slopes("site", on="11")},
        r"no module '11' \(nearest: '1'\)",
    ),
    "slope": ({"random": "(1 + aeg | site)"}, r"'aeg'.*nearest: 'age'"),
    "factor": ({"random": "(1 | sight)"}, "grouping factor 'sight'.*'site'"),
    "prior's factor": (
        {"priors": Priors(sd={"sight": HalfNormal()})},
        "'sight'. Did you mean 'site'",
    ),
    "prior's term": (
        {"priors": Priors(sd=HalfNormal({"intercept": 1.0}))},
        "'intercept'. Did you mean 'Intercept'",
    ),
    "family": ({"family": "bernoulli"}, "outcomes 0 and 1"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_does_not_fit_together(name):
    settings, message = ERRORS[name]
    data = make_data("categorical" if settings.get("family") == "categorical" else "gaussian")
    with pytest.raises(ValueError, match=message):
        bind(**{"data": data, **settings})


@pytest.mark.parametrize(
    ("outcome", "factor", "head"),
    [
        ("residual_sd", "site", False),
        ("row", "site", False),
        ("fixed_effect", "site", True),
    ],
)
def test_outcomes_cannot_have_the_names_of_the_programs_sites(outcome, factor, head):
    data = ClusteredData.from_arrays(
        np.random.default_rng(0).normal(size=(N, 2)),
        np.arange(N),
        {factor: np.arange(N) % K},
        outcome_name=outcome,
    )
    with pytest.raises(ValueError, match=r"two quantities .* would be called"):
        bind(f"(1 | {factor})", data=data, bayesian_head=head)


@pytest.mark.parametrize(
    ("outcome", "factor"), [("site", "site"), ("site_sd", "site"), ("y", "row"), ("y", "draws")]
)
@pytest.mark.filterwarnings("ignore:names that are taken")
def test_factors_with_the_names_of_other_sites_get_names_of_their_own(outcome, factor):
    x, labels = np.random.default_rng(0).normal(size=(N, 2)), {factor: np.arange(N) % K}
    data = ClusteredData.from_arrays(x, np.arange(N), labels, outcome_name=outcome)
    model, *_ = bind(f"(1 | {factor})", data=data)
    trace = poutine.trace(model).get_trace(model.encode(data).all())  # an error if a name is twice
    assert trace.nodes[outcome]["is_observed"]
    assert trace.nodes[model.factors[0].effect_site]["value"].shape == (K, 1)


def test_bad_settings():
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, not function"):
        MixedEffects(lambda x: x)
    with pytest.raises(ValueError, match="must not be negative, not -1"):
        MixedEffects(linear(), fixed_weight=-1)


def test_an_unbound_model_says_so():
    _, rows = bind()
    with pytest.raises(ValueError, match=r"call model\.bind\(data\)"):
        MixedEffects(linear(), "(1 | site)")(rows)


@pytest.mark.parametrize(("width", "warns"), [(4, False), (40, True)])
def test_fewer_rows_than_parameters(width, warns):
    net = nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, 1)).double()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bind(net=net)
    messages = [str(one.message) for one in caught]
    assert any("fewer rows (48) than parameters" in text for text in messages) is warns


def test_rows_without_outcome_have_no_likelihood():
    model, rows = bind()
    latents = {"residual_sd": torch.ones(()).double()}
    with pytest.raises(ValueError, match="no outcome"):
        model.log_likelihood(dataclasses.replace(rows.all(), y=None), latents)
