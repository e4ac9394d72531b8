"""Effects of variables against closed forms and the definitions of marginaleffects."""

import numpy as np
import pandas as pd
import pytest
import scipy.integrate
import torch
from torch import nn

from armed_pyro import (
    ClusteredData,
    Effects,
    FilterScaleBias,
    Fit,
    MixedEffects,
    Schedule,
    Slopes,
    fit,
)
from armed_pyro.summaries.parameters import parameters

SHORT = Schedule(steps=4, window=2, stages=0)
DRAWS = 60
OUTCOMES = {
    "gaussian": "y",
    "bernoulli": "won",
    "binomial": "hits",
    "poisson": "count",
    "categorical": "grade",
}


def make_frame(n=72, seed=0):
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "x": rng.normal(3.0, 2.0, n),
            "arm": rng.permutation(["b", "a", "c"] * (n // 3)),
            "female": (rng.random(n) < 0.3).astype(int),
            "site": np.arange(n) % 6,
            "trials": rng.integers(3, 9, n),
            "exposure": rng.normal(0, 0.3, n),
        }
    )
    frame["y"] = 5 + 2 * frame["x"] + rng.normal(0, 2, 6)[frame["site"]] + rng.normal(0, 1, n)
    frame["won"] = rng.random(n) < 0.4
    frame["hits"] = rng.binomial(frame["trials"], 0.4)
    frame["count"] = rng.poisson(3, n)
    frame["grade"] = rng.permutation(["low", "mid", "top"] * (n // 3))
    return frame


FRAME = make_frame()
X = FRAME["x"].to_numpy()


def run(family="gaussian", random="(1 + x | site)", features="x * arm + female", net=None, **more):
    roles = {name: more.pop(name) for name in ("offset", "weights") if name in more}
    data = ClusteredData.from_frame(
        more.pop("frame", FRAME),
        outcome=OUTCOMES[family],
        clusters=["site"],
        features=features,
        trials="trials" if family == "binomial" else None,
        **roles,
    )
    torch.manual_seed(0)
    outputs = 3 if family == "categorical" else 1
    head = net is None
    net = nn.Linear(data.n_features, outputs) if net is None else net(data.n_features)
    model = MixedEffects(net, random, family, bayesian_head=head, linear_effects=False)
    # One network, whose derivatives are known, in place of cross-fitted ones.
    return fit(model, data, validation=None, schedule=SHORT, progress=False)


FITS: dict[str, Fit] = {}


def fitted(family):
    """A short fit of the family, made once."""
    if family not in FITS:
        more = {"offset": "exposure"} if family == "poisson" else {}
        FITS[family] = run(family, **more)
    return FITS[family]


def coefficients(result):
    return parameters(result.posterior, DRAWS)


def population(result, x=X, arm=FRAME["arm"], female=FRAME["female"]):
    """The predictor without random effects, by hand from the coefficients: "draws rows"."""
    b = coefficients(result)
    x, arm, female = np.broadcast_arrays(x, np.asarray(arm), np.asarray(female))
    eta = b["Intercept"][:, None] + np.outer(b["x"], x) + np.outer(b["female"], female)
    for level in ("b", "c"):
        eta = eta + np.outer(b[f"arm[T.{level}]"], arm == level)
        eta = eta + np.outer(b[f"x:arm[T.{level}]"], x * (arm == level))
    return eta


def sigmoid(eta):
    return 1 / (1 + np.exp(-eta))


def read(verb, *args, **options):
    """Draws of a verb's quantities."""
    made = verb(*args, draws=DRAWS, **options)
    assert isinstance(made, Effects)
    assert len(made.to_frame()) == made.draws.shape[1]
    return made.draws


# ---------------------------------------------------------------------------------- linear


def test_gaussian_effects_are_sums_of_coefficients():
    result = fitted("gaussian")
    b = coefficients(result)
    slope = b["x"] + b["x:arm[T.b]"]
    for verb in (result.comparisons, result.slopes):
        np.testing.assert_allclose(
            read(verb, "x", at={"arm": "b"})[:, 0], slope, rtol=1e-5, atol=1e-6
        )
    both = read(result.comparisons, "arm", at={"x": [2.0, -1.0]})
    expected = [
        b[f"arm[T.{level}]"] + x * b[f"x:arm[T.{level}]"] for level in "bc" for x in (2.0, -1.0)
    ]
    np.testing.assert_allclose(both, np.column_stack(expected), rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(
        read(result.comparisons, "female")[:, 0], b["female"], rtol=1e-5, atol=2e-6
    )


def test_marginal_and_population_agree_without_a_link():
    result = fitted("gaussian")
    values = [read(result.predictions, by="arm", unseen=u) for u in ("population", "marginal")]
    np.testing.assert_allclose(*values, rtol=1e-5, atol=2e-6)


def test_effects_of_seen_clusters_have_their_random_slopes():
    result = fitted("gaussian")
    factor = result.model.factors[0]
    latents = result.draws(DRAWS)
    u = (latents["site_effect"].double() @ factor.to_original.mT).numpy()
    b = latents["fixed_effect"].double().numpy()[:, 0]
    scale = result.model.facts.spread / np.array(result.model.facts.feature_scale)
    names = list(result.model.fixed_terms())
    coefficient = {name: b[:, i + 1] * scale[i] for i, name in enumerate(names[1:])}
    arm, site = FRAME["arm"].to_numpy(), FRAME["site"].to_numpy()
    slope = coefficient["x"] + u[:, site, 1].mean(1)
    slope += sum(coefficient[f"x:arm[T.{k}]"] * (arm == k).mean() for k in "bc")
    np.testing.assert_allclose(
        read(result.slopes, "x", unseen=None)[:, 0], slope, rtol=1e-5, atol=1e-6
    )
    one = read(result.slopes, "x", unseen=None, at={"site": 4, "arm": "a"})[:, 0]
    np.testing.assert_allclose(one, coefficient["x"] + u[:, 4, 1], rtol=1e-5, atol=1e-6)


def test_means_weigh_categories_equally_at_the_mean_of_numbers():
    result = fitted("gaussian")
    made = result.means("arm", draws=DRAWS)
    expected = [
        np.mean([population(result, X.mean(), arm, female)[:, 0] for female in (0, 1)], axis=0)
        for arm in "abc"
    ]
    np.testing.assert_allclose(made.draws, np.column_stack(expected), rtol=1e-5, atol=2e-6)
    assert made.to_frame()["arm"].tolist() == ["a", "b", "c"]
    b = coefficients(result)
    contrast = made.contrasts()
    assert contrast.to_frame()["contrast"].tolist() == ["b - a", "c - a", "c - b"]
    step = b["arm[T.b]"] + X.mean() * b["x:arm[T.b]"]
    np.testing.assert_allclose(contrast.draws[:, 0], step, rtol=1e-5, atol=2e-6)


# ----------------------------------------------------------------------------------- links


def test_logit_effects():
    result = fitted("bernoulli")
    b, eta = coefficients(result), population(result)
    slope = b["x"][:, None] + sum(
        np.outer(b[f"x:arm[T.{k}]"], FRAME["arm"] == k) for k in ("b", "c")
    )
    p = sigmoid(eta)
    expected = (p * (1 - p) * slope).mean(1)
    np.testing.assert_allclose(read(result.slopes, "x")[:, 0], expected, rtol=1e-5, atol=1e-6)
    elastic = ((1 - p) * slope * X).mean(1)
    np.testing.assert_allclose(
        read(result.slopes, "x", "eyex")[:, 0], elastic, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(read(result.slopes, "x", scale="link")[:, 0], slope.mean(1), 1e-5)
    at_mean = read(result.comparisons, "female", rest="mean", measure="odds_ratio")[:, 0]
    np.testing.assert_allclose(at_mean, np.exp(b["female"]), rtol=1e-5, atol=2e-6)
    high, low = (sigmoid(population(result, female=value)).mean(1) for value in (1, 0))
    for measure, value in {
        "difference": high - low,
        "ratio": high / low,
        "odds_ratio": high / (1 - high) / (low / (1 - low)),
    }.items():
        made = read(result.comparisons, "female", measure=measure)[:, 0]
        np.testing.assert_allclose(made, value, rtol=1e-5, atol=2e-6)


def variances(result, x):
    """phi' D phi of the random intercept and slope, by draw."""
    b = coefficients(result)
    sds = b["site_sd[Intercept]"], b["site_sd[x]"]
    covariance = b["site_cor[Intercept,x]"] * sds[0] * sds[1]
    return (sds[0] ** 2)[:, None] + np.outer(2 * covariance, x) + np.outer(sds[1] ** 2, x**2)


def test_marginal_probabilities_are_integrals_over_new_clusters():
    result = fitted("bernoulli")
    grid = read(result.predictions, at={"x": [0.0, 4.0]}, unseen="marginal", rest="mean")
    typical = FRAME["arm"].mode()[0], FRAME["female"].mode()[0]
    for column, x in enumerate((0.0, 4.0)):
        eta = population(result, x, *typical)[:, 0]
        sd = np.sqrt(variances(result, np.array([x]))[:, 0])
        for draw in range(0, DRAWS, 6):

            def integrand(z, m=eta[draw], s=sd[draw]):
                return sigmoid(m + s * z) * np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)

            expected = scipy.integrate.quad(integrand, -10, 10, limit=200)[0]
            assert grid[draw, column] == pytest.approx(expected, abs=2e-4)


def test_log_link_effects_with_an_offset():
    result = fitted("poisson")
    eta = population(result) + FRAME["exposure"].to_numpy()
    np.testing.assert_allclose(
        read(result.predictions)[:, 0], np.exp(eta).mean(1), rtol=1e-5, atol=2e-6
    )
    ratio = read(result.comparisons, "x", 2, at={"arm": "a"}, measure="ratio")[:, 0]
    np.testing.assert_allclose(ratio, np.exp(2 * coefficients(result)["x"]), rtol=1e-5, atol=2e-6)
    marginal = np.exp(eta + variances(result, X) / 2).mean(1)
    sd = np.sqrt(variances(result, X)).max(1)
    made = read(result.predictions, unseen="marginal")[:, 0]
    ordinary = sd < 4  # beyond it, exp(u) is not integrated by any rule of this size
    assert ordinary.mean() > 0.5
    np.testing.assert_allclose(made[ordinary], marginal[ordinary], rtol=1e-3)
    table = result.fixed_effects(exponentiate=True, draws=DRAWS).set_index("term")
    assert table.loc["x", "mean"] == pytest.approx(np.exp(coefficients(result)["x"]).mean())
    assert table.attrs["quantity"] == "incidence-rate ratio"


def test_binomial_outcomes_are_shares():
    result = fitted("binomial")
    expected = sigmoid(population(result)).mean(1)
    np.testing.assert_allclose(read(result.predictions)[:, 0], expected, rtol=1e-5, atol=2e-6)


def test_classes_have_probabilities_that_sum_to_one():
    result = fitted("categorical")
    for unseen in ("population", "marginal"):
        made = result.predictions(at={"x": [1, 2]}, unseen=unseen, draws=DRAWS)
        assert made.to_frame()["class"].tolist() == ["low", "mid", "top"] * 2
        np.testing.assert_allclose(made.draws.reshape(DRAWS, 2, 3).sum(2), 1, rtol=1e-5, atol=2e-6)
    slopes = result.slopes("x", draws=DRAWS)
    np.testing.assert_allclose(slopes.draws.sum(1), 0, atol=1e-8)
    link = result.predictions(scale="link", draws=DRAWS)
    assert link.to_frame()["class"].tolist() == ["mid", "top"]
    contrasts = result.means("arm", draws=DRAWS).contrasts("reference").to_frame()
    assert contrasts["class"].tolist() == ["low"] * 2 + ["mid"] * 2 + ["top"] * 2


def test_sampled_marginal_means_are_those_of_many_new_clusters():
    """Where the integral has several dimensions, it is sampled; `predict` draws single clusters."""
    result = fitted("categorical")
    row = FRAME.head(1)
    made = result.predictions(data=row, unseen="marginal", draws=2000).draws.mean(0)
    many = pd.concat([row] * 20).assign(site=[f"new{k}" for k in range(20)])
    with pytest.warns(UserWarning, match="no cluster"):
        drawn = result.predict(many, unseen="marginal", draws=2000, seed=1).expected
    error = drawn.mean(1).std(0) / np.sqrt(2000)
    assert (np.abs(drawn.mean((0, 1)) - made) < 5 * error + 1e-3).all()


# ------------------------------------------------------------------------------- networks


class Waves(nn.Module):
    """A smooth network in single precision, with a hidden layer of three units."""

    def __init__(self, width):
        super().__init__()
        self.hidden = nn.Linear(width, 3)
        self.out = nn.Linear(3, 1)

    def forward(self, x):
        return self.out(torch.tanh(self.hidden(x)))


def gradient(result, rows=slice(None)):
    """d f / d x at u = 0 on the original scale, by autograd in double precision."""
    facts = result.model.facts
    data = result.data.take(rows)
    x = torch.tensor((data.features.numpy() - facts.feature_mean) / facts.feature_scale)
    x.requires_grad_(True)
    network = Waves(x.shape[1])
    network.load_state_dict(result.model.network.state_dict())
    (slope,) = torch.autograd.grad(network.double()(x).sum(), x)
    return (slope / torch.tensor(facts.feature_scale) * facts.spread).numpy()


def test_slopes_of_a_network_are_its_derivatives():
    result = run(net=Waves, features=["x", "female"], random="(1 | site)")
    expected = gradient(result)[:, 0]
    made = result.slopes("x", average=False, draws=DRAWS)
    np.testing.assert_allclose(made.draws, np.tile(expected, (DRAWS, 1)), rtol=1e-5, atol=1e-8)
    averaged = result.slopes("x", by="female", draws=DRAWS)
    by_hand = [expected[FRAME["female"] == value].mean() for value in (0, 1)]
    np.testing.assert_allclose(averaged.draws[0], by_hand, rtol=1e-5)
    assert "conditional on the network" in repr(averaged)
    assert result.model.network.hidden.weight.dtype == torch.float32


def test_comparisons_of_a_network_are_differences_of_its_predictions():
    result = run(net=Waves, features=["x", "arm"], random="(1 + x | site)", family="bernoulli")
    high, low = (
        result.predict(FRAME.assign(arm=arm), draws=DRAWS).expected.mean(1) for arm in ("c", "a")
    )
    made = read(result.comparisons, "arm", ("a", "c"), unseen=None)[:, 0]
    np.testing.assert_allclose(made, high - low, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_effects_on_filters_reach_marginal_predictions():
    def net(width):
        return nn.Sequential(nn.Linear(width, 2), nn.Tanh(), nn.Linear(2, 1))

    filters = FilterScaleBias("site", at="0")
    result = run(net=net, features=["x", "female"], random=[filters, "(1 | site)"])
    made = result.predictions(data=FRAME.head(2), unseen="marginal", draws=400).draws.mean(0)[0]
    many = pd.concat([FRAME.head(2)] * 10).assign(site=[f"new{k // 2}" for k in range(20)])
    with pytest.warns(UserWarning, match="no cluster"):
        drawn = result.predict(many, unseen="marginal", draws=400, seed=1).expected.mean(1)
    assert abs(drawn.mean() - made) < 5 * drawn.std() / 20 + 1e-3


def test_slopes_on_hidden_layers_widen_marginal_predictions():
    """The predictor's variance over new clusters against draws of many new clusters."""

    def net(width):
        return nn.Sequential(nn.Linear(width, 3), nn.Tanh(), nn.Linear(3, 1))

    random = [Slopes("site", on="1"), "(1 | site)"]
    result = run(net=net, features=["x", "female"], random=random, family="bernoulli")
    row = FRAME.head(1)
    made = result.predictions(data=row, unseen="marginal", draws=400).draws.mean()
    many = pd.concat([row] * 40).assign(site=[f"new{k}" for k in range(40)])
    with pytest.warns(UserWarning, match="no cluster"):
        drawn = result.predict(many, unseen="marginal", draws=400, seed=1).expected
    assert abs(drawn.mean() - made) < 5 * drawn.mean(1).std() / 20 + 1e-3
    slopes = [result.slopes("x", unseen=u, draws=50).draws.mean() for u in ("population", None)]
    assert np.isfinite(slopes).all()


# ------------------------------------------------------------------ marginaleffects' rows


def test_rows_are_those_of_marginaleffects():
    """Observed, counterfactual, at the mean, balanced; averages and units."""
    result = fitted("bernoulli")
    units = result.predictions(average=False, draws=DRAWS)
    np.testing.assert_allclose(units.draws, sigmoid(population(result)), rtol=1e-5, atol=2e-6)
    assert units.to_frame()["row"].tolist() == list(range(72))
    by = result.predictions(by=["arm", "female"], draws=DRAWS)
    cells = by.to_frame()[["arm", "female"]].itertuples(index=False)
    for place, (arm, female) in enumerate(cells):
        cell = ((FRAME["arm"] == arm) & (FRAME["female"] == female)).to_numpy()
        np.testing.assert_allclose(by.draws[:, place], units.draws[:, cell].mean(1))
    counterfactual = read(result.predictions, at={"arm": ["c", "a"]})
    expected = [sigmoid(population(result, arm=arm)).mean(1) for arm in ("c", "a")]
    np.testing.assert_allclose(counterfactual, np.column_stack(expected), rtol=1e-5, atol=2e-6)
    typical = sigmoid(population(result, X.mean(), FRAME["arm"].mode()[0], 0))
    np.testing.assert_allclose(read(result.predictions, rest="mean"), typical, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("contrast", "ends"),
    [
        ("sd", (X.mean() - X.std(ddof=1) / 2, X.mean() + X.std(ddof=1) / 2)),
        ("2sd", (X.mean() - X.std(ddof=1), X.mean() + X.std(ddof=1))),
        ("iqr", np.quantile(X, [0.25, 0.75])),
        ("minmax", (X.min(), X.max())),
        ((1, 4), (1, 4)),
        (None, (X, X + 1)),
        (-2.5, (X, X - 2.5)),
    ],
)
def test_contrasts_of_numbers(contrast, ends):
    result = fitted("bernoulli")
    low, high = (sigmoid(population(result, end)).mean(1) for end in ends)
    made = read(result.comparisons, "x", contrast)
    np.testing.assert_allclose(made[:, 0], high - low, rtol=1e-5, atol=2e-6)


def test_contrasts_of_categories():
    result = fitted("gaussian")
    for contrast, names in {
        "reference": ["b - a", "c - a"],
        "pairwise": ["b - a", "c - a", "c - b"],
        "sequential": ["b - a", "c - b"],
        ("c", "a"): ["a - c"],
    }.items():
        made = result.comparisons("arm", contrast, draws=DRAWS)
        assert made.to_frame()["contrast"].tolist() == names
        assert made.to_frame()["term"].unique().tolist() == ["arm"]


def test_frequencies_weigh_the_averages():
    frame = FRAME.assign(n=np.arange(72) % 3)
    result = run(frame=frame, weights="n")
    eta = population(result)
    expected = eta @ frame["n"].to_numpy() / frame["n"].sum()
    np.testing.assert_allclose(read(result.predictions)[:, 0], expected, rtol=1e-5, atol=2e-6)


def test_other_tables_and_groups_that_are_no_variables():
    result = fitted("gaussian")
    table = FRAME.head(10).assign(region=list("uvuvuvuvuu"), site="elsewhere")
    made = result.predictions(data=table, by="region", draws=DRAWS)
    eta = population(result, table["x"], table["arm"], table["female"])
    south = (table["region"] == "u").to_numpy()
    np.testing.assert_allclose(made.draws[:, 0], eta[:, south].mean(1), rtol=1e-5, atol=2e-6)
    with pytest.raises(ValueError, match="clusters that were not seen"):
        result.predictions(data=table, unseen=None)


def test_fits_of_arrays_have_variables_by_their_names():
    x = np.column_stack([X, FRAME["female"]])
    data = ClusteredData.from_arrays(x, FRAME["y"], {"site": FRAME["site"]})
    model = MixedEffects(nn.Linear(2, 1), "(1 | site)", bayesian_head=True)
    result = fit(model, data, schedule=SHORT, progress=False)
    b = parameters(result.posterior, DRAWS)
    for variable in ("x0", "x1"):
        made = read(result.comparisons, variable)
        np.testing.assert_allclose(made[:, 0], b[variable], rtol=1e-5, atol=2e-6)
        np.testing.assert_allclose(
            read(result.slopes, variable)[:, 0], b[variable], rtol=1e-5, atol=1e-6
        )


def test_without_random_effects_or_latent_weights_there_is_one_value():
    result = run(net=Waves, features=["x"], random=(), family="bernoulli")
    made = result.comparisons("x", draws=10)
    assert made.to_frame()["sd"].tolist() == pytest.approx([0.0], abs=1e-12)


def test_loaded_fits_say_the_same(tmp_path):
    result = fitted("bernoulli")
    result.save(tmp_path / "run", draws=10)
    read_again = Fit.load(tmp_path / "run", nn.Linear(result.data.n_features, 1))
    for verb in ("predictions", "comparisons"):
        args = ("arm",) if verb == "comparisons" else ()
        first, second = (getattr(r, verb)(*args, draws=DRAWS).draws for r in (result, read_again))
        np.testing.assert_allclose(first, second, rtol=1e-12)


@pytest.mark.parametrize("where", ["formula", "program"])
def test_clusters_keep_their_means_while_a_variable_changes(where):
    """The effect of x is that within clusters; new clusters of a table do not move either."""
    within = where == "formula"
    features = "within(x | site) + between(x | site)" if within else ["x"]
    data = ClusteredData.from_frame(FRAME, outcome="y", clusters=["site"], features=features)
    options = {} if within else {"between": True}
    net = nn.Linear(data.n_features, 1)
    model = MixedEffects(net, "(1 | site)", bayesian_head=True, **options)
    result = fit(model, data, schedule=SHORT, progress=False)
    slope = coefficients(result)["within(x | site)" if within else "x"]
    new = FRAME.head(12).assign(site=list("uvw") * 4)
    for rows in ({}, {"data": new}, {"rest": "mean"}):
        made = read(result.comparisons, "x", **rows)[:, 0]
        np.testing.assert_allclose(made, slope, rtol=1e-5, atol=2e-6)
        made = read(result.slopes, "x", **rows)[:, 0]
        np.testing.assert_allclose(made, slope, rtol=1e-5, atol=2e-6)


# ------------------------------------------------------------------------------- messages


def test_the_event_and_the_clusters_are_named():
    result = fitted("bernoulli")
    text = repr(result.comparisons("x", draws=DRAWS))
    assert "P(won = True)" in text
    assert "random effects zero" in text
    html = result.predictions(draws=DRAWS, unseen="marginal")._repr_html_()
    assert "new clusters" in html
    assert "<table" in html


def test_taken_names_of_variables_are_followed_by_an_underscore():
    frame = FRAME.rename(columns={"arm": "class", "female": "mean"})
    result = run(frame=frame, features="x + class + mean")
    table = result.predictions(by=["class", "mean"], draws=DRAWS).to_frame()
    assert list(table)[:3] == ["class_", "mean_", "mean"]
    assert table["mean"].between(-50, 50).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: r.predictions(at={"z": [1]}), "'z'"),
        (lambda r: r.predictions(at={"arm": ["d"]}), "categories that training did not"),
        (lambda r: r.predictions(at={"arm": []}), "no values"),
        (lambda r: r.predictions(by="region"), "region"),
        (lambda r: r.predictions(rest="typical"), "rest="),
        (lambda r: r.predictions(unseen="adapt"), "unseen='adapt'"),
        (lambda r: r.predictions(scale="logit"), "scale"),
        (lambda r: r.predictions(prob=95), r"write 0\.95"),
        (lambda r: r.comparisons("arm", "sd"), "reference, pairwise, sequential"),
        (lambda r: r.comparisons("x", "pairwise"), "2sd"),
        (lambda r: r.comparisons("x", (1, 2, 3)), "two values"),
        (lambda r: r.comparisons("x", measure="odds_ratio"), "probabilities between 0 and 1"),
        (lambda r: r.comparisons("x", measure="log"), "measure"),
        (lambda r: r.slopes("arm"), r"comparisons\('arm'\)"),
        (lambda r: r.slopes("x", "eyx"), "kind of slope"),
        (lambda r: r.means("x"), "no levels"),
        (lambda r: r.predictions().contrasts(), "at least two"),
        (lambda r: r.fixed_effects(exponentiate=True), "mean nothing"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(fitted("gaussian"))


def test_variables_in_products_only_need_the_table():
    result = run(features="x:female + arm", random="(1 | site)")
    with pytest.raises(ValueError, match="data=table"):
        result.comparisons("x")
    made = result.comparisons("x", data=FRAME, draws=DRAWS).draws[:, 0]
    expected = coefficients(result)["x:female"] * FRAME["female"].mean()
    np.testing.assert_allclose(made, expected, rtol=1e-5, atol=2e-6)


def test_images_have_no_variables():
    images = torch.randn(24, 1, 4, 4)
    data = ClusteredData.from_arrays(images, FRAME["y"][:24], {"site": FRAME["site"][:24]})
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 1))
    result = fit(MixedEffects(net, "(1 | site)"), data, schedule=SHORT, progress=False)
    with pytest.raises(ValueError, match="images"):
        result.predictions()
