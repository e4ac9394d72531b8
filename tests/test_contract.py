"""The contract: what every family, every kind of term and every program must pass.

Each case is one fit of five steps to forty rows; a new family, term or program is added to the
tables below.
"""

import copy
import warnings
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
import torch
from pyro import poutine
from torch import nn

from armed_pyro import (
    Adversary,
    ClusteredData,
    FilterScaleBias,
    Fit,
    MixedEffects,
    Schedule,
    Slopes,
    fit,
)
from armed_pyro.families import FAMILIES
from armed_pyro.models.dense import dense
from armed_pyro.models.linear import linear
from armed_pyro.objective import NestedBound, Objective

# Random effects, and the number of terms of each factor.
KINDS = {
    "none": ((), {}),
    "intercept": ("(1 | site)", {"site": 1}),
    "correlated": ("(1 + x | site)", {"site": 2}),
    "independent": ("(1 + x || site)", {"site": 2}),
    "slope": ("(0 + x | site)", {"site": 1}),
    "nested": ("(1 | site/arm)", {"site": 1, "site:arm": 1}),
    "crossed": ("(1 + x | site) + (1 | batch)", {"site": 2, "batch": 1}),
    "hidden": (Slopes("site", on="1"), {"site": 4}),
    "hidden-correlated": (["(1 | site)", Slopes("site", on="1", correlated=True)], {"site": 5}),
    "filters": (["(1 | batch)", FilterScaleBias("site", at="1")], {"batch": 1, "site": 8}),
    "hidden-crossed": (["(1 | batch)", Slopes("site", on="1")], {"batch": 1, "site": 4}),
}


def small(n_features, n_outputs):
    return dense(n_features, n_outputs, hidden=(4,))


# Network, whether its last layer is latent, whether an adversary plays.
PROGRAMS = {
    "linear": (linear, True, False),
    "linear-plain": (linear, False, False),
    "dense": (small, False, True),
    "dense-head": (small, True, False),
}
EVERYWHERE = [
    ("linear", "intercept"),
    ("linear", "correlated"),
    ("linear", "independent"),
    ("linear", "nested"),
    ("linear", "crossed"),
    ("dense", "hidden"),
    ("dense", "filters"),
]
HERE_AND_THERE = [
    ("linear", "none"),
    ("linear", "slope"),
    ("linear-plain", "correlated"),
    ("dense", "none"),
    ("dense", "hidden-correlated"),
    ("dense-head", "hidden-crossed"),
    ("dense-head", "filters"),
]
CASES = [(family, *pair) for family in FAMILIES for pair in EVERYWHERE]
CASES += [(family, *pair) for family in ("bernoulli", "categorical") for pair in HERE_AND_THERE]
OUTCOMES = dict(zip(FAMILIES, ["y", "won", "hits", "grade", "count", "count"], strict=True))


def make_frame(n=40):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"x": rng.normal(3, 2, n), "sex": rng.permutation(["f", "m"] * (n // 2))})
    frame["site"] = [f"s{i % 5}" for i in range(n)]
    frame["batch"] = np.arange(n) % 4
    frame["arm"] = (np.arange(n) // 5) % 2
    frame["y"] = 100 + 20 * rng.normal(size=n)
    frame["won"] = rng.permutation(["no", "yes"] * (n // 2))
    frame["trials"], frame["hits"] = 6, rng.binomial(6, 0.4, n)
    frame["grade"] = rng.permutation(["low", "mid", "top", "top"] * (n // 4))
    frame["count"] = rng.poisson(3, n)
    return frame


FRAME = make_frame()


@dataclass(frozen=True)
class Case:
    family: str
    result: Fit
    net: nn.Module
    widths: dict[str, int]  # effects a cluster, by factor
    head: bool

    @property
    def rows(self):
        return self.result.model.encode(self.result.data).all()


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request):
    family, program, kind = request.param
    make, head, game = PROGRAMS[program]
    random, terms = KINDS[kind]
    torch.manual_seed(0)
    net = make(2, 3 if family == "categorical" else 1)
    data = ClusteredData.from_frame(
        FRAME,
        outcome=OUTCOMES[family],
        clusters=["site", "batch", "arm"],
        features=["x", "sex"],
        trials="trials" if family == "binomial" else None,
    )
    model = MixedEffects(
        net,
        random,
        family,
        Adversary("batch", ["1"]) if game else (),
        bayesian_head=head,
        fixed_weight=1.0 if game else 0.0,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="there are fewer rows")
        result = fit(model, data, schedule=Schedule(steps=5, window=5), progress=False)
    columns = 2 if family == "categorical" else 1
    # Effects on filters are shared by the predictor's columns.
    shared = {"site"} if kind == "filters" else set()
    widths = {name: n * (1 if name in shared else columns) for name, n in terms.items()}
    return Case(family, result, net, widths, head)


def test_sites_have_their_shapes_and_a_finite_log_density(case):
    model, rows = case.result.model, case.rows
    torch.manual_seed(0)
    guide = poutine.trace(case.result.guide).get_trace(rows)
    trace = poutine.trace(poutine.replay(model, trace=guide)).get_trace(rows)
    sizes = {"site": 5, "batch": 4, "site:arm": 10}
    for factor, width in case.widths.items():
        assert trace.nodes[f"{factor}_sd"]["value"].shape == (width,)
        assert (trace.nodes[f"{factor}_sd"]["value"] > 0).all()
        assert trace.nodes[f"{factor}_effect"]["value"].shape == (sizes[factor], width)
        assert trace.nodes[f"{factor}_effect"]["fn"].batch_shape == (sizes[factor],)
        if f"{factor}_cor" in trace.nodes:
            cor = trace.nodes[f"{factor}_cor"]["value"]
            assert cor.shape == (width, width)
            torch.testing.assert_close(cor.diagonal(), torch.ones_like(cor.diagonal()))
    assert trace.nodes[OUTCOMES[case.family]]["is_observed"]
    assert trace.nodes[OUTCOMES[case.family]]["fn"].batch_shape == (len(FRAME),)
    for one in (trace, guide):
        one.compute_log_prob()
        assert torch.isfinite(torch.as_tensor(one.log_prob_sum()))
    latent = {name for name in trace.stochastic_nodes if not trace.nodes[name]["is_observed"]}
    guided = {
        name
        for name in guide.stochastic_nodes
        if not guide.nodes[name]["infer"].get("is_auxiliary")
    }
    plates = {name for name in latent | guided if "Subsample" in str(trace.nodes.get(name))}
    assert latent - plates == guided - plates


def test_attributions_are_finite_and_every_factor_has_sds_of_slopes(case):
    found = case.result.attribution(draws=5)
    names = {
        "importance",
        "slope",
        *(f"{one}_{kind}" for one in case.widths for kind in ("sd", "slope")),
    }
    assert set(found.posterior.data_vars) == names
    assert all(np.isfinite(one).all() for one in found.posterior.data_vars.values())
    columns = len(case.result.model.data_facts().columns)
    assert len(found.table()) == 2 * columns


def test_every_parameter_gets_a_finite_gradient(case):
    model, guide, rows = case.result.model, copy.deepcopy(case.result.guide), case.rows
    guide.requires_grad_(True)  # of a linear program, only the hyperparameters were trained
    torch.manual_seed(0)
    total = sum(Objective(model, guide)(rows).total for _ in range(4))
    parameters = [*model.named_parameters(prefix="model"), *guide.named_parameters(prefix="guide")]
    gradients = torch.autograd.grad(
        total, [one for _, one in parameters], allow_unused=True, materialize_grads=False
    )
    replaced = f"model.net.{model.head_path()}".rstrip(".") if case.head else "-"
    for (name, parameter), gradient in zip(parameters, gradients, strict=True):
        if name.startswith(replaced) or not parameter.numel():
            continue
        assert gradient is not None, f"{name} is not trained"
        assert torch.isfinite(gradient).all(), name


def test_once_settled_the_hyperparameters_get_a_finite_gradient_and_the_network_none(case):
    model, guide = case.result.model, copy.deepcopy(case.result.guide)
    guide.settle()
    rows = model.compute(model.encode(case.result.data)).all()
    torch.manual_seed(0)
    total = NestedBound(model, guide, 2 if guide.nested() else 1)(rows, 4).total
    trained = [(n, one) for n, one in guide.named_parameters() if one.requires_grad and one.numel()]
    names = {name for name, _ in trained}
    wanted = {f"hyperparameters.{n}" for n, p in guide.hyperparameters.named_parameters()}
    assert wanted <= names or not guide.hyperparameters.size
    if trained:
        gradients = torch.autograd.grad(total, [one for _, one in trained], retain_graph=True)
        for name, gradient in zip(names, gradients, strict=True):
            assert torch.isfinite(gradient).all(), name
        if any(factor.filters for factor in model.factors):
            return  # effects inside the network make it run: `fit` holds its weights
        network = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
        assert all(one is None for one in network)


def test_draws_have_their_shapes(case):
    draws = case.result.draws(3)
    for factor, width in case.widths.items():
        clusters = len(case.result.model.facts.levels[factor])
        assert draws[f"{factor}_effect"].shape == (3, clusters, width)
        assert draws[f"{factor}_sd"].shape == (3, 1, width)
    assert all(torch.isfinite(one).all() for one in draws.values())


def test_seen_clusters_are_predicted(case):
    prediction = case.result.predict(FRAME, draws=4)
    classes = (3,) if case.family == "categorical" else ()
    assert prediction.expected.shape == (4, len(FRAME), *classes)
    assert prediction.outcome.shape == (4, len(FRAME))
    assert np.isfinite(prediction.expected).all()
    assert np.isfinite(prediction.outcome).all()
    assert set(prediction.unseen) == {""}


@pytest.mark.parametrize("mode", ["population", "marginal", "membership", "nearest"])
def test_unseen_clusters_are_predicted(case, mode):
    rows = FRAME.head(4).assign(site=["new", "new", "s0", "s1"], batch=[9, 0, 9, 1])
    prediction = case.result.predict(rows, unseen=mode, draws=4)
    assert np.isfinite(prediction.expected).all()
    new = {"site": [1, 1, 0, 0], "batch": [1, 0, 1, 0], "site:arm": [1, 1, 0, 0]}
    expected = np.any([new[factor] for factor in case.widths] or [[0] * 4], axis=0)
    assert list(prediction.unseen != "") == list(expected)


def test_new_clusters_are_adapted_to(case):
    if not case.widths:
        pytest.skip("there are no random effects")
    rows = FRAME.head(8).assign(site=["new", "new2"] * 4, batch=9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that so few draws cannot follow the support
        adapted = case.result.adapt(rows, draws=4)
    prediction = adapted.predict(rows)
    assert np.isfinite(prediction.expected).all()
    assert set(prediction.unseen) == {"adapt"}
    assert np.isfinite(adapted.table()[["mean", "sd", "lower", "upper"]].to_numpy()).all()


def test_the_tables_are_finite(case):
    table = case.result.variance_components(draws=20)
    assert np.isfinite(table[["mean", "median", "sd", "lower", "upper"]].to_numpy()).all()
    counts = (
        table[table["statistic"] == "sd"].groupby("factor").size().drop("Residual", errors="ignore")
    )
    assert dict(counts) == case.widths
    assert case.result.fixed_effects(draws=20).empty is not case.head


def test_what_is_saved_is_loaded(case, tmp_path, monkeypatch):
    if case.family != "gaussian":
        # Draws take most of the time, and are stored alike for every family.
        needed = ["observed_data", "constant_data"]
        monkeypatch.setattr("armed_pyro.storage._groups", lambda fit, draws: needed)
    case.result.save(tmp_path / "run", draws=2)
    loaded = Fit.load(tmp_path / "run", case.net)
    rows = FRAME.assign(site=FRAME["site"].replace("s0", "new"))
    for data in (FRAME, rows):
        one = case.result.predict(data, unseen="marginal", draws=4)
        other = loaded.predict(data, unseen="marginal", draws=4)
        np.testing.assert_array_equal(one.expected, other.expected)
        np.testing.assert_array_equal(one.outcome, other.outcome)
    pd.testing.assert_frame_equal(
        case.result.variance_components(draws=20), loaded.variance_components(draws=20)
    )


def test_every_kind_and_program_is_covered():
    assert {kind for *_, kind in CASES} == set(KINDS)
    assert {program for _, program, _ in CASES} == set(PROGRAMS)
