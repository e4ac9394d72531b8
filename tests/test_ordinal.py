"""Ordered categories: densities against scipy, estimates against clmm and statsmodels."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import nn
from typer.testing import CliRunner

from armed_pyro import (
    ClusteredData,
    Fit,
    HalfNormal,
    Known,
    MixedEffects,
    Priors,
    Schedule,
    fit,
)
from armed_pyro.checks.calibration import simulation_calibration
from armed_pyro.checks.threshold_checks import slope_differences
from armed_pyro.cli import app
from armed_pyro.families.ordinal import Ordinal
from armed_pyro.families.registry import family_named
from armed_pyro.families.simulate import mixed_model
from armed_pyro.rows.batch import Rows

F64 = torch.float64
CDFS = {
    "logit": stats.logistic.cdf,
    "probit": stats.norm.cdf,
    "cloglog": lambda x: -np.expm1(-np.exp(x)),
}
LABELS = ("awful", "poor", "fair", "good", "superb")
# R's ordinal::wine (Randall 1989): 8 ratings by each of 9 judges, two of each temperature (cold,
# warm) without and with contact of juice and skins.
WINE = "233444551213235423325544323232532343333332322454112223232223333412323244"


def rows_of(n):
    return Rows(torch.zeros(n, 0), None, {})


def random_case(link, n=200, dtype=F64):
    """A family of five categories, with eta, gaps and an outcome of each of n rows."""
    rng = np.random.default_rng(3)
    family = Ordinal(link, LABELS)
    eta = torch.from_numpy(rng.normal(0, 2, (n, 1))).to(dtype)
    gaps = rng.gamma(1.5, 1.0, (3, n))
    parameters = {f"threshold_gap_{k + 1}": torch.from_numpy(gaps[k]).to(dtype) for k in range(3)}
    return family, eta, parameters, torch.from_numpy(rng.integers(0, 5, n)).to(dtype)


def thresholds_of(parameters):
    """The thresholds from gaps, in numpy, with mean zero."""
    gaps = np.stack([value.double().numpy() for value in parameters.values()], -1)
    steps = np.concatenate([np.zeros((len(gaps), 1)), gaps.cumsum(1)], 1)
    return steps - steps.mean(1, keepdims=True)


@pytest.mark.parametrize("link", CDFS)
def test_density_and_cdf_are_scipys(link):
    family, eta, parameters, y = random_case(link)
    cuts = np.pad(thresholds_of(parameters), ((0, 0), (1, 1)), constant_values=(-np.inf, np.inf))
    below = CDFS[link](cuts - eta.numpy())
    code, row = y.long().numpy(), np.arange(len(y))
    expected = below[row, code + 1] - below[row, code]
    density = family.distribution(eta, parameters, rows_of(len(y)))
    np.testing.assert_allclose(density.log_prob(y).exp(), expected, rtol=1e-8, atol=1e-14)
    np.testing.assert_allclose(family.expected(eta, parameters, rows_of(len(y))).sum(-1), 1)
    values = {name: value[:1] for name, value in parameters.items()}
    cdf = family.cdf(y, eta, values, rows_of(len(y)))
    cuts = np.append(thresholds_of(values)[0], np.inf)
    np.testing.assert_allclose(cdf, CDFS[link](cuts[code] - eta[:, 0].numpy()), atol=1e-14)
    assert float(family.cdf(-torch.ones(1), eta[:1], values, rows_of(1))) == 0


@pytest.mark.parametrize("link", CDFS)
def test_gradients_are_finite_differences(link):
    family, eta, parameters, y = random_case(link, 30)

    def log_prob(eta, *gaps):
        values = dict(zip(parameters, gaps, strict=True))
        return family.distribution(eta, values, rows_of(len(y))).log_prob(y)

    inputs = [eta, *parameters.values()]
    inputs = [value.requires_grad_(True) for value in inputs]
    assert torch.autograd.gradcheck(log_prob, inputs)
    assert torch.autograd.gradgradcheck(lambda eta: log_prob(eta, *inputs[1:]), inputs[:1])


@pytest.mark.parametrize("link", CDFS)
def test_single_precision_is_near_double_precision_far_out(link):
    """Also at thresholds that nearly coincide, and predictors where 1 - F rounds to 0."""
    eta = torch.tensor([[-12.0], [-12.0], [12.0], [12.0], [0.3], [0.3]], dtype=F64)
    y = torch.tensor([0.0, 3.0, 0.0, 3.0, 1.0, 2.0], dtype=F64)
    family = Ordinal(link, LABELS[:4])
    gaps = {"threshold_gap_1": torch.tensor(1e-4, dtype=F64), "threshold_gap_2": torch.tensor(2.0)}
    results = []
    for dtype in (F64, torch.float32):
        at = eta.to(dtype).requires_grad_(True)
        values = {name: value.to(dtype) for name, value in gaps.items()}
        log_prob = family.distribution(at, values, rows_of(6)).log_prob(y.to(dtype))
        (slope,) = torch.autograd.grad(log_prob.sum(), at)
        assert torch.isfinite(log_prob).all()
        assert torch.isfinite(slope).all()
        results.append(log_prob.detach().double())
    torch.testing.assert_close(results[0], results[1], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("link", CDFS)
def test_information_and_moments_are_those_of_the_categories(link):
    family, eta, parameters, _ = random_case(link, 20)
    eta.requires_grad_(True)
    density = family.distribution(eta, parameters, rows_of(20))
    p, expected = density.probabilities.detach(), torch.zeros(20, dtype=F64)
    for code in range(5):
        log_prob = density.log_prob(torch.full((20,), float(code), dtype=F64))
        (slope,) = torch.autograd.grad(log_prob.sum(), eta, retain_graph=True)
        expected += p[:, code] * slope[:, 0] ** 2
    torch.testing.assert_close(density.information.detach(), expected)
    torch.manual_seed(0)
    n = 20_000
    y = density.sample((n,))
    error = (y.mean(0) - density.mean).detach()
    assert (error.abs() < 4.5 * (density.variance / n).sqrt()).all()


def test_categories_come_from_the_data():
    site = np.arange(6) % 2
    numbers = ClusteredData.from_arrays(np.zeros((6, 0)), [3, 4, 5, 3, 4, 7], {"site": site})
    family = Ordinal().bound(numbers)
    assert family.categories == ("3", "4", "5", "6", "7")
    assert (family.first, family.boundaries[0]) == (3, "3|4")
    order = pd.Categorical(["mid", "low", "high"] * 2, ["low", "mid", "high"], ordered=True)
    table = pd.DataFrame({"grade": order, "x": np.arange(6.0), "site": site})
    data = ClusteredData.from_frame(table, outcome="grade", clusters=["site"])
    assert Ordinal().bound(data).boundaries == ("low|mid", "mid|high")
    family = Ordinal("probit").bound(data)
    assert family.bound(numbers) is family


@pytest.mark.parametrize(
    ("y", "message"),
    [
        ([1, 2, 2.5, 3, 1, 2], "whole numbers"),
        ([2, 2, 2, 2, 2, 2], "single category"),
        ([1, 2, 3, 4, 5, 900], "at most 50 categories"),
    ],
)
def test_unsuitable_outcomes(y, message):
    data = ClusteredData.from_arrays(np.zeros((6, 0)), y, {"site": np.arange(6) % 2})
    with pytest.raises(ValueError, match=message):
        Ordinal().bound(data)


def test_two_categories_are_a_bernoulli_outcome():
    family, eta = Ordinal(categories=("no", "yes")), torch.randn(50, 1, dtype=F64)
    y = (torch.arange(50) % 2).to(F64)
    density = family.distribution(eta, {}, rows_of(50))
    reference = family_named("bernoulli").distribution(eta, {}, rows_of(50))
    torch.testing.assert_close(density.log_prob(y), reference.log_prob(y))
    assert family.parameters == ()
    assert family.labelled({}) == {}


def test_links_by_name():
    assert family_named("ordinal(cloglog)") == Ordinal("cloglog")
    with pytest.raises(ValueError, match="link of family 'ordinal'"):
        family_named("ordinal(log)")
    with pytest.raises(ValueError, match="single link"):
        family_named("gaussian(log)")
    with pytest.raises(ValueError, match="does not know its categories"):
        Ordinal().distribution(torch.zeros(1, 1), {}, rows_of(1))


def wine():
    condition = np.tile(np.arange(8) // 2, 9)
    return pd.DataFrame(
        {
            "rating": [int(digit) for digit in WINE],
            "temp": np.where(condition >= 2, "warm", "cold"),
            "contact": np.where(condition % 2 == 1, "yes", "no"),
            "judge": np.repeat(np.arange(1, 10), 8),
        }
    )


def fit_wine(family):
    torch.manual_seed(0)
    roles = {"outcome": "rating", "clusters": ["judge"], "features": ["temp", "contact"]}
    data = ClusteredData.from_frame(wine(), **roles)
    net = nn.Linear(2, 1).double()
    model = MixedEffects(net, "(1 | judge)", family=family, bayesian_head=True)
    return fit(model, data, seed=0, progress=False)


@pytest.mark.parametrize(
    ("family", "sd", "thresholds", "coefficients"),
    [
        ("ordinal", 1.135, [-1.623, 1.513, 4.227, 6.086], [3.062, 1.833]),
        ("ordinal(probit)", 0.663, [-0.926, 0.889, 2.467, 3.536], [1.800, 1.048]),
    ],
)
def test_wine_agrees_with_clmm(family, sd, thresholds, coefficients):
    """References: R's ordinal::clmm(rating ~ temp + contact + (1 | judge), nAGQ = 10)."""
    posterior = fit_wine(family).to_datatree()["posterior"]
    fixed = posterior["fixed_effect"].to_numpy()[0]
    drawn = posterior["threshold"].to_numpy()[0] - fixed[:, :1]
    assert list(posterior["threshold"]["boundary"].to_numpy()) == ["1|2", "2|3", "3|4", "4|5"]
    draws = np.column_stack([posterior["judge_sd"].to_numpy()[0], drawn, fixed[:, 1:]])
    expected = np.array([sd, *thresholds, *coefficients])
    error = (np.median(draws, 0) - expected) / draws.std(0)
    assert np.abs(error[1:]).max() < 0.3
    # The likelihood of nine judges' sd is skewed, and clmm's estimate is its mode, not its median.
    assert 0 < error[0] < 0.5


def test_without_random_effects_estimates_are_statsmodels():
    """statsmodels 0.14: OrderedModel(y, x, distr="logit"), 500 rows, with the sd held near 0."""
    from statsmodels.miscmodels.ordinal_model import OrderedModel

    rng = np.random.default_rng(5)
    x, site = rng.normal(size=(500, 1)), np.arange(500) % 10
    y = np.digitize(0.8 * x[:, 0] + rng.logistic(size=500), [-1.0, 0.5, 2.0])
    reference = OrderedModel(y, x, distr="logit").fit(method="bfgs", disp=False)
    cuts = reference.model.transform_threshold_params(reference.params)[1:-1]
    data = ClusteredData.from_arrays(x, y.astype(float), {"site": site})
    priors = Priors(sd=Known(1e-3))
    net = nn.Linear(1, 1).double()
    model = MixedEffects(net, "(1 | site)", "ordinal", priors=priors, bayesian_head=True)
    posterior = fit(model, data, seed=0, progress=False).to_datatree()["posterior"]
    fixed = posterior["fixed_effect"].to_numpy()[0]
    drawn = posterior["threshold"].to_numpy()[0] - fixed[:, :1]
    draws = np.column_stack([fixed[:, 1], drawn])
    expected = np.array([reference.params[0], *cuts])
    assert (np.abs(draws.mean(0) - expected) < 0.2 * draws.std(0)).all()
    assert draws[:, 0].std() == pytest.approx(float(reference.bse[0]), rel=0.15)


def test_known_truth_is_recovered_saved_and_predicted(tmp_path):
    truth = {f"threshold_gap_{k}": gap for k, gap in ((1, 1.5), (2, 1.0))}
    data, _ = mixed_model("ordinal", 30, 20, sd=[1.0], dispersion=truth, seed=2)
    net = nn.Linear(1, 1).double()
    model = MixedEffects(net, "(1 | site)", "ordinal", bayesian_head=True)
    result = fit(model, data, seed=0, progress=False)
    posterior = result.to_datatree()["posterior"]
    sites = {"site_sd": 1.0, **truth}
    for name, value in sites.items():
        draws = posterior[name].to_numpy()
        assert abs(draws.mean() - value) < 3 * draws.std()
    table = result.predict(data.take(slice(0, 3))).to_frame()
    assert table[[f"mean[{c}]" for c in "0123"]].to_numpy().sum(1) == pytest.approx(np.ones(3))
    result.save(tmp_path / "run")
    loaded = Fit.load(tmp_path / "run", net=net)
    assert loaded.posterior.model.family == result.posterior.model.family
    again = loaded.predict(data.take(slice(0, 3))).to_frame()
    pd.testing.assert_frame_equal(table, again)
    fitted = result.fitted()
    assert list(fitted.columns) == ["0", "1", "2", "3"]
    rating = fitted.to_numpy() @ np.arange(4.0)
    assert result.residuals().to_numpy() == pytest.approx(data.outcome.numpy() - rating)
    assert np.std(result.residuals("quantile")) == pytest.approx(1, abs=0.15)


@pytest.mark.slow
def test_nuts_agrees_on_wine():
    result = fit_wine("ordinal")
    refined = result.refine("nuts", draws=1500, chains=2, warmup=300, progress=False)
    names = ["judge_sd", "threshold", "fixed_effect"]
    first, second = (r.to_datatree()["posterior"] for r in (result, refined))
    for name in names:
        a, b = (
            first[name].to_numpy()[0],
            second[name].to_numpy().reshape(-1, *first[name].shape[2:]),
        )
        assert (np.abs(a.mean(0) - b.mean(0)) < 0.15 * b.std(0)).all()
        np.testing.assert_allclose(a.std(0), b.std(0), rtol=0.15)


def by_threshold(differs, seed=0):
    """Ratings 0 to 3 whose slope of x0 is 1, or 0 at the first threshold and 1.5 at the last."""
    rng = np.random.default_rng(seed)
    x, site = rng.normal(size=(800, 2)), np.arange(800) % 20
    effect = rng.normal(0, 0.7, 20)[site]
    slopes = np.array([0.0, 0.75, 1.5]) if differs else np.ones(3)
    cuts = np.array([-4.0, 0.0, 4.0]) if differs else np.array([-1.5, 0.0, 1.5])
    latent = effect + rng.logistic(size=800)
    y = (latent[:, None] > cuts - slopes * x[:, :1].clip(-2.5, 2.5)).sum(1)
    return ClusteredData.from_arrays(x, y.astype(float), {"site": site})


@pytest.mark.parametrize("differs", [False, True])
def test_proportional_odds_are_checked(differs):
    net = nn.Linear(2, 1).double()
    model = MixedEffects(net, "(1 | site)", "ordinal", bayesian_head=True)
    result = fit(model, by_threshold(differs), seed=0, progress=False)
    (check,) = [c for c in result.diagnostics().checks if c.name == "proportional odds"]
    if not differs:
        assert check.verdict == "pass"
        return
    assert check.verdict in ("warn", "fail")
    assert "x0" in check.reason
    assert "x1" not in check.reason
    assert "categorical" in check.advice
    assert "split at each threshold" in check.advice


def test_levels_of_the_test_of_proportional_odds():
    """At the true parameters p-values are uniform: below 0.1 in a tenth of 400 data sets."""
    rng, p_values = np.random.default_rng(1), []
    cuts = np.array([-1.5, 0.0, 1.5])
    for _ in range(400):
        x = rng.normal(size=300)
        p = stats.logistic.sf(cuts - x[:, None])
        beyond = (x + rng.logistic(size=300))[:, None] > cuts
        tested = slope_differences("x", x, beyond, p[None], (p * (1 - p))[None])
        p_values.append(tested.p)
    share = np.mean(np.array(p_values) < 0.1)
    assert abs(share - 0.1) < 4 * np.sqrt(0.1 * 0.9 / 400)


def test_the_page_runs():
    text = (Path(__file__).parents[1] / "docs" / "ordinal.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    frame = names["prediction"].to_frame()
    assert [c for c in frame if c.startswith("mean[")] == [f"mean[{c}]" for c in names["order"]]
    rating = names["prediction"].expected_rating()
    levels = frame[[f"mean[{c}]" for c in names["order"]]].to_numpy() @ np.arange(1.0, 5)
    assert rating["mean"].to_numpy() == pytest.approx(levels)
    with pytest.raises(ValueError, match="2 numbers for 4 classes"):
        names["prediction"].expected_rating([0, 1])


def test_command_line(tmp_path):
    wine().to_csv(tmp_path / "wine.csv", index=False)
    run = str(tmp_path / "run")
    arguments = [
        "fit",
        str(tmp_path / "wine.csv"),
        "--outcome",
        "rating",
        "--random",
        "(1 | judge)",
    ]
    arguments += ["--family", "ordinal(probit)", "--steps", "200", "--out", run]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "Categories" in done.output
    components = pd.read_csv(tmp_path / "run" / "variance_components.csv")
    assert "threshold[2|3]" in set(components["statistic"])
    predicted = tmp_path / "p.csv"
    done = CliRunner().invoke(
        app, ["predict", run, str(tmp_path / "wine.csv"), "--out", str(predicted)]
    )
    assert done.exit_code == 0, done.output
    assert "mean[5]" in pd.read_csv(predicted)


def test_ordered_labels_have_no_event():
    rng = np.random.default_rng(0)
    labels = pd.Categorical.from_codes(
        rng.integers(3, size=60), ["low", "mid", "high"], ordered=True
    )
    frame = pd.DataFrame({"y": labels, "x": rng.normal(size=60), "g": np.arange(60) % 6})
    data = ClusteredData.from_frame(frame, outcome="y", clusters=["g"])
    model = MixedEffects(nn.Linear(1, 1), "(1 | g)", "ordinal", bayesian_head=True)
    fitted = fit(model, data, schedule=Schedule(steps=20), progress=False)
    assert fitted.model.event is None
    assert "event" not in fitted.fixed_effects().attrs
    assert repr(fitted).startswith("Fit of y (ordinal")


@pytest.mark.slow
def test_ranks_of_the_truth_are_uniform():
    data, _ = mixed_model("ordinal", 25, 16, sd=[0.7], seed=1)
    net = nn.Linear(1, 1).double()
    priors = Priors(sd=HalfNormal(1.0))
    model = MixedEffects(net, "(1 | site)", "ordinal", priors=priors, bayesian_head=True)
    result = simulation_calibration(model, data, simulations=100, progress=False)
    assert result.passed, str(result)
