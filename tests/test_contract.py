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
    Diagnostics,
    FilterScaleBias,
    Fit,
    MixedEffects,
    Schedule,
    Slopes,
    fit,
)
from armed_pyro.families.registry import FAMILIES
from armed_pyro.inference.objective import NestedBound, Objective
from armed_pyro.models.autoencoder import autoencoder_program
from armed_pyro.models.convolutional import convolutional_program
from armed_pyro.models.dense import dense
from armed_pyro.models.linear import linear


def of_kind(family):
    """The name of a family, without its link or the family inside, and its predictors."""
    return family.partition("+")[0].partition("(")[0]


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
# Further families of the same kinds, which differ in their densities: fewer programs.
FURTHER = {
    "student": [("linear", "crossed"), ("dense", "hidden")],
    "lognormal": [("linear", "correlated")],
    "gamma": [("linear", "nested"), ("dense", "hidden")],
    "beta": [("linear", "crossed")],
    "zero_one_inflated_beta": [("dense", "hidden")],
    "negative_binomial1": [("linear", "correlated")],
    "beta_binomial": [("linear", "nested")],
    "zero_inflated": [("linear", "crossed"), ("dense", "hidden")],
    "hurdle(gamma)": [("linear", "correlated"), ("dense", "hidden")],
    "hurdle(negative_binomial)": [("linear", "nested")],
    "bernoulli(probit)": [("linear", "crossed")],
    "binomial(cloglog)": [("dense", "hidden")],
    "poisson(sqrt)": [("linear", "correlated")],
    "exponential": [("linear", "correlated")],
    "weibull": [("linear", "crossed"), ("dense", "hidden")],
    "weibull(hazard)": [("linear", "nested")],
    "loglogistic": [("linear", "nested"), ("dense", "hidden")],
    "piecewise_exponential": [("linear", "correlated"), ("dense", "hidden")],
}
HEAD_OF_CLASSES = ("categorical", "dense-head")  # 12 s: each of 8 effects is a mode of two columns
# Families whose parameters have predictors, and their random effects by factor.
PREDICTED = {
    "gaussian+sigma": ({"sigma": "x + (1 | site)"}, {"site": 1}),
    "gaussian+network": ({"sigma": "net"}, {}),
    "student+both": ({"nu": "1", "sigma": "x + (1 + x |c| site)"}, {"site": 2}),
    "zero_inflated+zi": ({"zi": "sex + (1 | batch)"}, {"batch": 1}),
    "hurdle(gamma)+both": ({"hu": "x", "shape": "net + (1 | site)"}, {"site": 1}),
}
FURTHER |= {
    "gaussian+sigma": [("dense", "hidden")],
    "gaussian+network": [("linear", "none")],
    "student+both": [("linear", "intercept")],
    "zero_inflated+zi": [("linear", "crossed")],
    "hurdle(gamma)+both": [("linear", "intercept")],
}
FIRST = [name for name in FAMILIES if name not in {of_kind(other) for other in FURTHER}]
FIRST += ["gaussian", "bernoulli", "binomial", "poisson"]
WIDE = {"gaussian", "bernoulli", "categorical"}
SOME = [("linear", "correlated"), ("linear", "crossed"), ("dense", "hidden")]
CASES = [(name, *pair) for name in FIRST for pair in (EVERYWHERE if name in WIDE else SOME)]
CASES += [(family, *pair) for family, pairs in FURTHER.items() for pair in pairs]
CASES += [(family, *pair) for family in ("bernoulli", "categorical") for pair in HERE_AND_THERE]
# Effects on filters run the network once a cluster, whatever the family.
ON_FILTERS = {"gaussian", "bernoulli", "categorical"}
CASES = [
    (family, program, kind)
    for family, program, kind in CASES
    if kind != "filters" or (family in ON_FILTERS and (family, program) != HEAD_OF_CLASSES)
]
OUTCOMES = {
    "gaussian": "y",
    "bernoulli": "won",
    "binomial": "hits",
    "categorical": "grade",
    "ordinal": "grade",
    "student": "y",
    "lognormal": "cost",
    "gamma": "cost",
    "beta": "share",
    "zero_one_inflated_beta": "part",
    "beta_binomial": "hits",
    "hurdle(gamma)": "claim",
    "bernoulli(probit)": "won",
    "binomial(cloglog)": "hits",
    **dict.fromkeys(("exponential", "weibull", "weibull(hazard)"), "waited"),
    **dict.fromkeys(("loglogistic", "piecewise_exponential"), "waited"),
}
CENSORED = {"status": "seen", "entry": "started"}
OUTCOMES = {
    name: OUTCOMES.get(name.partition("+")[0], "count") for name in {case[0] for case in CASES}
}


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
    frame["cost"], frame["share"] = rng.gamma(2, 3, n), rng.beta(2, 3, n)
    empty = rng.permutation(n) < n // 4
    frame["claim"] = np.where(empty, 0, frame["cost"])
    frame["waited"], frame["started"] = rng.gamma(2, 3, n) + 0.5, 0.4 * (np.arange(n) % 2)
    frame["seen"] = rng.permutation(["event", "right", "event", "left"] * (n // 4))
    frame["part"] = np.where(empty, np.arange(n) % 2, frame["share"])
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
    parameters, further = PREDICTED.get(family, ({}, {}))
    outputs = sum(text.startswith("net") for text in parameters.values())
    net = make(2, 3 if family == "categorical" else 1 + outputs)
    data = ClusteredData.from_frame(
        FRAME,
        outcome=OUTCOMES[family],
        clusters=["site", "batch", "arm"],
        features=["x", "sex"],
        trials="trials" if OUTCOMES[family] == "hits" else None,
        **(CENSORED if OUTCOMES[family] == "waited" else {}),
    )
    model = MixedEffects(
        net,
        random,
        family.partition("+")[0],
        Adversary("batch", ["1"]) if game else (),
        bayesian_head=head,
        fixed_weight=1.0 if game else 0.0,
        parameters=parameters,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="there are fewer rows")
        result = fit(model, data, schedule=Schedule(steps=5, window=5), progress=False)
    columns = 2 if family == "categorical" else 1
    # Effects on filters are shared by the predictor's columns.
    shared = {"site"} if kind == "filters" else set()
    widths = {name: n * (1 if name in shared else columns) for name, n in terms.items()}
    widths |= {name: widths.get(name, 0) + n for name, n in further.items()}
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
    columns = len(case.result.model.network_columns)
    assert len(found.table()) == 2 * columns


def test_every_parameter_gets_a_finite_gradient(case):
    model, guide, rows = copy.deepcopy((case.result.model, case.result.guide, case.rows))
    model.cross_fit(None)  # while a network is trained, it has no fold networks
    guide.requires_grad_(True)  # of a linear program, only the hyperparameters were trained
    guide.hyperparameters.train_shape()  # until then they have no shape that could be trained
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
    classes = (3,) if case.family in ("categorical", "ordinal") else ()
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
    latent = case.head or any(not f.from_network for f in case.result.model.parameter_formulas)
    assert case.result.fixed_effects(draws=20).empty is not latent


def test_what_is_saved_is_loaded(case, tmp_path, monkeypatch):
    if case.family != "gaussian":
        # Draws take most of the time, and are stored alike for every family.
        needed = ["observed_data", "constant_data"]
        monkeypatch.setattr("armed_pyro.storage.save._groups", lambda fit, draws: needed)
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


def test_every_kind_program_and_family_is_covered():
    assert {of_kind(name) for name, *_ in CASES} == set(FAMILIES)
    assert {kind for *_, kind in CASES} == set(KINDS)
    assert {program for _, program, _ in CASES} == set(PROGRAMS)


# --- programs of images ---------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(x + self.bn2(self.conv2(out)))


class ResNet(nn.Module):
    """Laid out as torchvision's classifiers are: nothing of it was written for this library."""

    def __init__(self, num_classes=1, channels=4):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, stride=2, padding=1), nn.ReLU())
        self.layer1 = ResidualBlock(channels)
        self.layer2 = ResidualBlock(channels)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x):
        x = self.layer2(self.layer1(self.stem(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def residual_program(factor, image):
    terms = [f"(1 | {factor})", Slopes(factor, on="avgpool"), FilterScaleBias(factor, at="stem")]
    game = Adversary(factor, ["layer1", "layer2"])
    return MixedEffects(ResNet(), terms, "bernoulli", game, fixed_weight=1.0)


def convolutional_small(factor, image):
    return convolutional_program(factor, image, widths=(3, 4, 5), units=6)


def autoencoder_small(factor, image):
    return autoencoder_program(factor, image, widths=(3, 4), latents=5, units=4)


def make_images(site, outcome=True):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(len(site), 1, 8, 8)).astype("float32")
    label = rng.permutation(["no", "yes"] * (len(site) // 2)) if outcome else None
    return ClusteredData.from_arrays(x, label, {"site": site}, outcome_name="label")


IMAGES = make_images(np.arange(40) % 4)


@pytest.fixture(
    scope="module",
    params=[convolutional_small, autoencoder_small, residual_program],
    ids=["convolutional", "autoencoder", "residual"],
)
def image_case(request):
    torch.manual_seed(0)
    model = request.param("site", (1, 8, 8))
    before = copy.deepcopy(model.network.state_dict())
    schedule = Schedule(steps=6, window=3, batch_size=20)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="there are fewer rows")
        result = fit(model, IMAGES, schedule=schedule, progress=False)
    for name, one in model.network.state_dict().items():  # the user's network is left alone
        torch.testing.assert_close(one, before[name])
    assert not any(one._forward_hooks for one in result.model.network.modules())
    return result, model.network


def test_image_programs_predict_seen_and_unseen_clusters(image_case):
    result, _ = image_case
    names = [one.name for one in result.model.others]
    seen = result.predict(make_images(np.arange(40) % 4, outcome=False), draws=4)
    assert set(seen.unseen) == {""}
    new = make_images(np.arange(8) % 4 + 2)
    for mode in ("population", "marginal", "membership", "nearest"):
        found = result.predict(new, unseen=mode, draws=4)
        assert list(found.unseen) == ["", "", mode, mode] * 2
        for one in (seen, found):
            assert np.isfinite(one.expected).all()
            assert list(one.others) == names
            for other in one.others.values():
                assert other.mean.shape == (one.expected.shape[1], 1, 8, 8)
                assert np.isfinite(other.mean).all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that so few draws cannot follow the support
        adapted = result.adapt(make_images(np.arange(8) % 2 + 10), draws=4)
    prediction = adapted.predict(make_images(np.arange(8) % 2 + 10))
    assert set(prediction.unseen) == {"adapt"}
    assert np.isfinite(prediction.expected).all()
    assert list(prediction.others) == names


def test_image_programs_are_saved_and_loaded(image_case, tmp_path, monkeypatch):
    result, net = image_case
    # The checks take most of the time.
    monkeypatch.setattr(Fit, "diagnostics", lambda fit: Diagnostics(()))
    result.save(tmp_path / "run", draws=2)
    loaded = Fit.load(tmp_path / "run", net)
    new = make_images(np.arange(8) % 4 + 2)
    one = result.predict(new, unseen="marginal", draws=4)
    other = loaded.predict(new, unseen="marginal", draws=4)
    np.testing.assert_array_equal(one.expected, other.expected)
    for name, value in one.others.items():
        np.testing.assert_array_equal(value.mean, other.others[name].mean)
    tree = result.to_datatree(draws=2)
    for name in ["label", *one.others]:
        for group in ("posterior_predictive", "log_likelihood", "observed_data"):
            assert np.isfinite(tree[group][name].to_numpy()).all(), (group, name)


def test_gradients_reach_every_random_effect_weight_and_hyperparameter(image_case):
    model, guide = image_case[0].model, copy.deepcopy(image_case[0].guide)
    model.train()
    guide.requires_grad_(True)
    rows = model.encode(IMAGES).all()
    torch.manual_seed(0)
    total = Objective(model, guide)(rows).total
    (pseudo,) = guide.pseudo
    gradient = torch.autograd.grad(total, pseudo.location, retain_graph=True)[0]
    assert gradient.shape == (4, len(model.factors[0].terms))
    assert (gradient != 0).all()
    shift = torch.autograd.grad(total, guide.hyperparameters.shift, retain_graph=True)[0]
    assert (shift != 0).all()
    names, weights = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(total, weights, allow_unused=True)
    missing = [name for name, one in zip(names, found, strict=True) if one is None]
    assert missing == []
    assert all(torch.isfinite(one).all() for one in found)


def test_the_adversarys_gradient_reaches_every_tapped_layer_reversed(image_case):
    model = image_case[0].model.train()
    rows = model.encode(IMAGES).all()
    (game,) = model.adversaries
    codes, strength = rows.memberships["site"].position, torch.tensor(0.7)
    activations = model.predictor(rows, {}).activations
    tapped = [activations[path] for path in game.taps]  # pooled: rows, channels
    loss = game.forward(activations, codes, strength).cross_entropy
    reversed_ = torch.autograd.grad(loss, tapped, retain_graph=True)
    pooled = torch.cat(tapped, -1)
    plain = nn.functional.cross_entropy(game.classifier(pooled), codes)
    for one, other in zip(
        reversed_, torch.autograd.grad(plain, tapped, retain_graph=True), strict=True
    ):
        assert (one != 0).any(0).all()  # every channel
        torch.testing.assert_close(one, -0.7 * other)
    # And the weights before the first tapped layer.
    first = next(model.network.parameters())
    assert torch.autograd.grad(loss, first)[0].abs().sum() > 0
