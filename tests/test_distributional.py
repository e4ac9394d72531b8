"""Parameters with predictors: densities, estimates of known truth and by maximum likelihood."""

import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import optimize, stats
from torch import nn
from typer.testing import CliRunner

from armed_pyro import ClusteredData, Fit, Known, MixedEffects, Priors, Schedule, fit, model
from armed_pyro.cli import app
from armed_pyro.families.distributional import family_with_predictors
from armed_pyro.families.registry import family_named
from armed_pyro.program.working import derivatives
from armed_pyro.random_effects.formula import parse_terms
from armed_pyro.random_effects.parameter_formula import ParameterFormula
from armed_pyro.rows.batch import Rows
from armed_pyro.summaries.parameters import parameters

F64 = torch.float64


def rows_of(n, trials=None):
    trials = None if trials is None else torch.full((n,), float(trials)).to(F64)
    return Rows(torch.zeros(n, 0), None, {}, trials=trials)


def predictors(n, columns, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 0.7, (n, columns)))


# --- densities ------------------------------------------------------------------------------------

SCIPY = {
    "gaussian": (["sigma"], lambda y, e: stats.norm.logpdf(y, e[:, 0], np.exp(e[:, 1]))),
    "student": (
        ["nu", "sigma"],
        lambda y, e: stats.t.logpdf(y, np.exp(e[:, 1]), e[:, 0], np.exp(e[:, 2])),
    ),
    "negative_binomial": (
        ["shape"],
        lambda y, e: stats.nbinom.logpmf(
            y, np.exp(e[:, 1]), np.exp(e[:, 1]) / (np.exp(e[:, 1]) + np.exp(e[:, 0]))
        ),
    ),
    "gamma": (
        ["shape"],
        lambda y, e: stats.gamma.logpdf(y, np.exp(e[:, 1]), scale=np.exp(e[:, 0] - e[:, 1])),
    ),
    "hurdle(lognormal)": (
        ["hu", "sigma"],
        lambda y, e: np.where(
            y == 0,
            stats.logistic.logcdf(e[:, 1]),
            stats.logistic.logsf(e[:, 1])
            + stats.lognorm.logpdf(np.where(y == 0, 1, y), np.exp(e[:, 2]), scale=np.exp(e[:, 0])),
        ),
    ),
    "zero_inflated(poisson)": (
        ["zi"],
        lambda y, e: np.logaddexp(
            np.where(y == 0, stats.logistic.logcdf(e[:, 1]), -np.inf),
            stats.logistic.logsf(e[:, 1]) + stats.poisson.logpmf(y, np.exp(e[:, 0])),
        ),
    ),
}


@pytest.mark.parametrize("name", SCIPY)
def test_density_with_parameters_of_rows_is_scipys(name):
    names, log_density = SCIPY[name]
    family = family_with_predictors(family_named(name), names)
    eta = predictors(200, 1 + len(names))
    density = family.distribution(eta, {}, rows_of(200))
    torch.manual_seed(0)
    y = density.sample()
    expected = log_density(y.numpy(), eta.numpy())
    np.testing.assert_allclose(density.log_prob(y), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["gaussian", "student", "lognormal", "gamma"])
def test_distribution_function_is_the_integral_of_the_density(name):
    names = ["shape"] if name == "gamma" else ["sigma"]
    family = family_with_predictors(family_named(name), names)
    eta, parameters = predictors(5, 2), {"nu": torch.tensor([4.0]).to(F64)}
    y = family.distribution(eta, parameters, rows_of(5)).sample()
    at = torch.linspace(0, 1, 20001, dtype=F64)[:, None]
    if name in ("gaussian", "student"):
        grid = y - 200 * (1 - at)
        step = 200 * torch.ones_like(grid)
    else:  # over log y
        grid = torch.exp(y.log() - 60 * (1 - at))
        step = 60 * grid
    density = family.distribution(eta, parameters, rows_of(5)).log_prob(grid).exp()
    below = torch.trapezoid(density * step, at, dim=0)
    # Student's tail goes on below the grid.
    np.testing.assert_allclose(family.cdf(y, eta, parameters, rows_of(5)), below, atol=2e-4)


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("gaussian", ["sigma"]),
        ("student", ["sigma"]),
        ("gamma", ["shape"]),
        ("zero_inflated(poisson)", ["zi"]),
        ("hurdle(gamma)", ["hu", "shape"]),
        ("negative_binomial", ["shape"]),
        ("beta", ["phi"]),
    ],
)
def test_information_is_the_mean_square_of_the_score(name, names):
    family = family_with_predictors(family_named(name), names)
    n, copies = 4, 40_000
    eta = predictors(n, 1 + len(names))
    parameters = {"nu": torch.tensor(5.0).to(F64)} if name == "student" else {}
    leaf = eta.expand(copies, n, -1).clone().requires_grad_()
    density = family.distribution(leaf, parameters, rows_of(n))
    torch.manual_seed(1)
    with torch.no_grad():
        y = density.sample()
    (score,) = torch.autograd.grad(density.log_prob(y).sum(), leaf)
    square = score[..., 1:] ** 2
    error = square.std(0) / copies**0.5
    # A simulated information has the noise of 32 outcomes; its mean over copies has far less.
    known = family.information(eta.expand(4000, n, -1), parameters, rows_of(n))[..., 1:]
    noise = known.std(0) / 4000**0.5
    z = (known.mean(0) - square.mean(0)) / (error**2 + noise**2).sqrt()
    assert z.abs().max() < 4.5


def test_extreme_predictors_have_finite_densities_and_gradients_in_single_precision():
    for name, names in {"gaussian": ["sigma"], "zero_inflated(negative_binomial)": ["zi"]}.items():
        family = family_with_predictors(family_named(name), names)
        eta = torch.tensor([[0.0, 60.0], [0.0, -60.0]], requires_grad=True)
        shared = {"shape": torch.tensor(2.0)}
        y = torch.tensor([1.0, 3.0])
        value = family.distribution(eta, shared, rows_of(2)).log_prob(y)
        (gradient,) = torch.autograd.grad(value.sum(), eta)
        assert torch.isfinite(value).all()
        assert torch.isfinite(gradient).all()


# --- estimates ------------------------------------------------------------------------------------


def simulated(clusters=20, rows=12, seed=1):
    """Rows with log sd -0.5 + 0.2 (z - 5) + v, where u and v of a cluster have correlation 0.6."""
    rng = np.random.default_rng(seed)
    g = np.repeat(np.arange(clusters), rows)
    x, z = rng.normal(size=len(g)), rng.normal(5, 2, size=len(g))
    root = np.linalg.cholesky([[1, 0.6], [0.6, 1]])
    u = rng.normal(size=(clusters, 2)) @ root.T * [1.0, 0.4]
    sd = np.exp(-0.5 + 0.2 * (z - 5) + u[g, 1])
    y = 2 + x + u[g, 0] + sd * rng.normal(size=len(g))
    return pd.DataFrame({"y": y, "x": x, "z": z, "g": g, "log_sd": np.log(sd)})


@pytest.fixture(scope="module")
def correlated():
    table = simulated()
    formulas = ["y ~ x + (1 |c| g)", "sigma ~ z + (1 |c| g)"]
    return table, model(formulas, table).fit(progress=False)


def in_sds(table, truth):
    """Distance of each estimate from the truth in posterior sds."""
    return (table["mean"] - truth) / table["sd"]


def test_known_truth_is_recovered(correlated):
    _, fitted = correlated
    fixed = fitted.fixed_effects().set_index("term")
    truth = pd.Series({"Intercept": 2.0, "x": 1.0, "sigma_Intercept": -1.5, "sigma_z": 0.2})
    assert in_sds(fixed, truth).abs().max() < 2.5
    table = fitted.variance_components()
    sds = table[(table.factor == "g") & (table.statistic == "sd")].set_index("term")
    truth = pd.Series({"Intercept": 1.0, "sigma_Intercept": 0.4})
    assert in_sds(sds, truth).abs().max() < 2.5
    cor = table[table.statistic == "cor"].iloc[0]
    assert cor.term == "Intercept,sigma_Intercept"
    assert abs(cor["mean"] - 0.6) < 2.5 * cor["sd"]
    assert fitted.posterior.refined.quality["k_hat"] < 0.7
    assert not fitted.diagnostics().failed


def test_residual_variance_is_the_mean_over_rows_and_new_clusters(correlated):
    table, fitted = correlated
    components = fitted.variance_components().set_index(["factor", "statistic"])
    share = components.loc[("Residual", "share"), "median"].item()
    random = components.loc[("g", "variance")].query("term == 'Intercept'")["median"].item()
    ratio = components.loc[("Residual", "share"), "median"].item()
    of_random = components.loc[("g", "share"), "median"].item()
    truth = np.exp(2 * (-0.5 + 0.2 * (table.z - 5)) + 2 * 0.4**2).mean()
    assert 0 < share < 1
    # The ratio of the two shares is that of the two variances.
    assert ratio / of_random * random == pytest.approx(truth, rel=0.35)


def test_intervals_of_outcomes_follow_the_parameter(correlated):
    table, fitted = correlated
    frame = fitted.predict(table, draws=400, interval="outcome").to_frame()
    inside = ((table.y > frame.lower) & (table.y < frame.upper)).to_numpy()
    wide = (table.log_sd > table.log_sd.median()).to_numpy()
    for rows in (wide, ~wide):
        assert abs(inside[rows].mean() - 0.9) < 4 * np.sqrt(0.09 / rows.sum())
    width = (frame.upper - frame.lower).to_numpy()
    assert np.corrcoef(np.log(width), table.log_sd)[0, 1] > 0.9


def test_what_is_saved_is_loaded_and_predicts_new_and_adapted_clusters(correlated, tmp_path):
    table, fitted = correlated
    fitted.save(tmp_path / "run", draws=20)
    loaded = Fit.load(tmp_path / "run")
    assert loaded.model.predictors == {"sigma": "z"}
    pd.testing.assert_frame_equal(fitted.fixed_effects(), loaded.fixed_effects())
    new = pd.DataFrame({"x": [0.0] * 2, "z": [5.0, 9.0], "g": [100, 101]})
    before = fitted.predict(new, unseen="marginal", draws=50).to_frame()
    after = loaded.predict(new, unseen="marginal", draws=50).to_frame()
    pd.testing.assert_frame_equal(before, after)
    support = table[table.g < 2].assign(g=lambda rows: rows.g + 100)
    adapted = loaded.predict(new, unseen="adapt", support=support, draws=200, interval="outcome")
    seen = loaded.predict(new.assign(g=[0, 1]), draws=200, interval="outcome")
    # Adapted to the rows of two seen clusters, new ones are predicted nearly as these.
    for column in ("mean", "upper"):
        one, other = adapted.to_frame()[column], seen.to_frame()[column]
        assert (one - other).abs().max() < 0.35 * seen.to_frame()["sd"].min() + 0.1


def test_posterior_agrees_with_maximum_likelihood_in_closed_form():
    table = simulated(40, 6, seed=4)
    table["y"] = 2 + table.x + (table.y - 2 - table.x)
    rng = np.random.default_rng(7)
    u = rng.normal(size=40)[table.g.to_numpy()]
    table["y"] = 2 + table.x + u + np.exp(-0.5 + 0.2 * (table.z - 5)) * rng.normal(size=len(table))
    x = np.column_stack([np.ones(len(table)), table.x])
    z = np.column_stack([np.ones(len(table)), table.z - 5])
    y, by_cluster = table.y.to_numpy(), [np.flatnonzero(table.g == k) for k in range(40)]

    def minus_log_likelihood(theta):
        mean, sd = x @ theta[:2], np.exp(z @ theta[2:4])
        total = 0.0
        for rows in by_cluster:
            # Woodbury: V = diag(sd^2) + exp(2 t) 1 1'.
            precision, residual = sd[rows] ** -2, (y - mean)[rows]
            inside = np.exp(-2 * theta[4]) + precision.sum()
            square = (precision * residual**2).sum() - (precision @ residual) ** 2 / inside
            log_det = 2 * np.log(sd[rows]).sum() + np.log(inside) + 2 * theta[4]
            total += 0.5 * (square + log_det)
        return total

    best = optimize.minimize(minus_log_likelihood, np.array([2, 1, -0.5, 0.2, 0.0]), method="BFGS")
    errors = np.sqrt(np.diag(best.hess_inv))
    fitted = model(["y ~ x + (1 | g)", "sigma ~ I(z - 5)"], table).fit(progress=False)
    fixed = fitted.fixed_effects()
    assert (np.abs(fixed["median"] - best.x[:4]) / errors[:4]).max() < 0.35
    np.testing.assert_allclose(fixed["sd"], errors[:4], rtol=0.2)
    components = fitted.variance_components()
    sd = components[components.statistic == "sd"]["median"].iloc[0]
    assert abs(np.log(sd) - best.x[4]) < 0.6 * errors[4]


def test_zero_inflation_agrees_with_statsmodels():
    counts = pytest.importorskip("statsmodels.discrete.count_model")
    rng = np.random.default_rng(3)
    x, w = rng.normal(size=(2, 800))
    zero = rng.uniform(size=800) < 1 / (1 + np.exp(0.7 - w))
    table = pd.DataFrame({"x": x, "w": w, "y": rng.poisson(np.exp(0.8 + 0.4 * x)) * ~zero})
    design = [np.column_stack([np.ones(800), column]) for column in (x, w)]
    reference = counts.ZeroInflatedPoisson(table.y, design[0], exog_infl=design[1])
    expected = reference.fit(disp=0, method="bfgs", maxiter=200)
    fitted = model(["y ~ x", "zi ~ w"], table, family="zero_inflated(poisson)").fit(progress=False)
    fixed = fitted.fixed_effects().set_index("term")
    order = ["zi_Intercept", "zi_w", "Intercept", "x"]
    np.testing.assert_allclose(
        (fixed.loc[order, "mean"].to_numpy() - expected.params.to_numpy()) / expected.bse,
        0,
        atol=0.3,
    )
    np.testing.assert_allclose(fixed.loc[order, "sd"].to_numpy() / expected.bse, 1, atol=0.15)


def test_a_spread_that_depends_on_a_feature_is_told_with_the_formula():
    table = simulated(20, 20, seed=2)
    fitted = model("y ~ x + z + (1 | g)", table).fit(progress=False, steps=200)
    checks = {check.name: check for check in fitted.diagnostics().checks}
    assert checks["spread"].verdict != "pass"
    assert (
        "sigma ~ z (parameters={'sigma': 'z'}, --parameter 'sigma ~ z')" in checks["spread"].advice
    )


# --- programs and commands ------------------------------------------------------------------------


def test_effects_act_on_their_own_columns():
    table = simulated(4, 5)
    formulas = ["y ~ x + (1 + x | g)", "sigma ~ z + (0 + z | g)"]
    made = model(formulas, table)
    bound = made.program.bind(made.data)
    (factor,) = bound.factors
    assert factor.terms == ("Intercept", "x", "sigma_z")
    assert bound.fixed_terms() == ("Intercept", "x", "sigma_Intercept", "sigma_z")
    rows = bound.encode(made.data).all()
    effects = torch.randn(4, 3, dtype=F64)
    latents = {"fixed_effect": torch.randn(4, dtype=F64), "g_effect": effects}
    eta = bound.predictor(rows, latents).eta
    spread, facts = torch.tensor([bound.facts.spread, 1.0]), bound.facts
    x = (table.x - facts.feature_mean[0]) / facts.feature_scale[0]
    z = (table.z - facts.slope_mean[0]) / facts.slope_scale[0]
    of_slope = table.z / facts.slope_scale[0]  # without an intercept slopes are not centred
    x, z, of_slope = (torch.from_numpy(v.to_numpy()) for v in (x, z, of_slope))
    u, beta = effects[table.g.to_numpy()], latents["fixed_effect"]
    mean = beta[0] + beta[1] * x + u[:, 0] + u[:, 1] * x
    sigma = beta[2] + beta[3] * z + u[:, 2] * of_slope
    expected = torch.tensor(facts.center) + spread * torch.stack([mean, sigma], -1)
    torch.testing.assert_close(eta, expected)
    design = bound.fixed_design(rows, bound.run_network(rows)[1])
    linear = torch.einsum("nfc,f->nc", design, beta)
    fixed = bound.predictor(rows, {"fixed_effect": beta}).eta
    torch.testing.assert_close(torch.tensor(facts.center) + spread * linear, fixed)


def test_coefficients_are_those_of_the_table_as_it_is():
    table = simulated(4, 5).assign(f=lambda t: np.where(np.arange(len(t)) % 2, "a", "b"))
    for predictor in ("z", "0 + z", "0 + f", "1 + f", "z + f"):
        made = model(["y ~ x", f"sigma ~ {predictor}"], table)
        bound = made.program.bind(made.data)
        latents = {"fixed_effect": torch.randn(1, 1, len(bound.fixed_terms()), dtype=F64)}
        from armed_pyro.program.units import original_fixed_effects

        values = dict(
            zip(bound.fixed_terms(), original_fixed_effects(bound, latents)[0], strict=True)
        )
        eta = bound.predictor(bound.encode(made.data).all(), latents).eta[0, :, 1]
        total = torch.zeros(len(table), dtype=F64)
        for name, value in values.items():
            term = name.removeprefix("sigma_")
            if term == name:
                continue
            column = {"Intercept": 1.0, "z": table.z}.get(term)
            if column is None:
                column = table.f == re.sub(r"f\[(T\.)?(.*)\]", r"\2", term)
            total += value * torch.from_numpy(np.broadcast_to(column, len(table)).astype(float))
        torch.testing.assert_close(eta, total)


def test_weights_as_precisions_divide_the_variance_of_each_row():
    table = simulated(4, 5).assign(w=np.linspace(0.5, 4, 20))
    made = model(["y ~ x", "sigma ~ z"], table, weights="w", weights_kind="precision")
    bound = made.program.bind(made.data)
    rows, eta = bound.encode(made.data).all(), predictors(20, 2)
    expected = eta[:, 1].exp() / torch.from_numpy(table.w.to_numpy()).sqrt()
    torch.testing.assert_close(bound.density(eta, {}, rows).stddev, expected)
    ((_, parameters),) = bound.by_draw(eta[None], {}, rows)
    drawn = bound.family.distribution(eta, parameters, rows).stddev
    torch.testing.assert_close(drawn, expected)


def test_censored_rows_have_the_tail_beyond_their_limit():
    table = simulated(6, 10).assign(event=np.arange(60) % 3 > 0)
    made = model(["event(y, event) ~ x", "sigma ~ z"], table.astype({"event": int}))
    bound = made.program.bind(made.data)
    rows, eta = bound.encode(made.data).all(), predictors(60, 2)
    y, mean, sd = table.y.to_numpy(), eta[:, 0].numpy(), eta[:, 1].exp().numpy()
    exact, tail = stats.norm.logpdf(y, mean, sd), stats.norm.logsf(y, mean, sd)
    found = bound.density(eta, {}, rows).log_prob(rows.outcome())
    np.testing.assert_allclose(found, np.where(table.event, exact, tail), rtol=1e-7)
    slope, information = derivatives(bound, eta, {}, rows)
    expected = np.stack([sd**-2, np.full(60, 2.0)], 1)
    squares = np.where(table.event.to_numpy()[:, None], expected, slope.numpy() ** 2)
    np.testing.assert_allclose(information, squares, rtol=1e-7)
    # d log S / d eta of a normal tail is the inverse Mills ratio over the sd.
    z = (y - mean) / sd
    mills = np.exp(stats.norm.logpdf(z) - stats.norm.logsf(z))
    score = np.where(table.event, z / sd, mills / sd)
    np.testing.assert_allclose(slope[:, 0], score, rtol=1e-6)


def test_a_network_has_a_further_output_for_the_parameter():
    table = simulated(10, 20)
    made = model(["y ~ x + z + (1 | g)", "sigma ~ net + (1 | g)"], table, net="dense")
    assert made.program.network[-1].out_features == 2
    fitted = made.fit(steps=20, progress=False, validation=None)
    assert fitted.fixed_effects().empty or "sigma_Intercept" not in set(fitted.fixed_effects().term)
    terms = set(fitted.variance_components(draws=50).query("factor == 'g'").term)
    assert {"Intercept", "sigma_Intercept"} <= terms
    data = ClusteredData.from_frame(table, outcome="y", clusters=["g"], features=["x"])
    narrow = MixedEffects(nn.Linear(1, 1), "(1 | g)", parameters={"sigma": "net"})
    with pytest.raises(ValueError, match=r"has 1 output\(s\).*with those of sigma, needs 2"):
        narrow.bind(data)


def test_commands_and_streamed_rows_take_predictors(tmp_path):
    table = simulated(8, 15).drop(columns="log_sd")
    path = tmp_path / "rows.parquet"
    table.to_parquet(path)
    common = ["fit", str(path), "y ~ x + z + (1 | g)", "--steps", "30", "--draws", "20"]
    streamed = ["--memory", "1kb", "--batch-size", "120", "--parameter", "sigma ~ z + (1 | g)"]
    done = CliRunner().invoke(app, [*common, *streamed, "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    one = Fit.load(tmp_path / "run").fixed_effects()
    made = model(["y ~ x + z + (1 | g)", "sigma ~ z + (1 | g)"], table)
    other = made.fit(steps=30, progress=False).fixed_effects()
    assert list(one.term) == ["Intercept", "x", "z", "sigma_Intercept", "sigma_z"]
    assert list(other.term) == list(one.term)
    assert ((one["mean"] - other["mean"]).abs() / one["sd"]).max() < 1
    done = CliRunner().invoke(
        app, [*common, "--sigma", "z", "--parameter", "sigma ~ x", "--out", str(tmp_path / "no")]
    )
    assert done.exit_code
    assert "has two predictors" in done.output


def test_labels_of_terms_are_read():
    (term,) = parse_terms("(1 + x |c| g)")
    assert (term.group, term.slopes, term.factor) == ("c", ("x",), "g")
    assert str(term) == "(1 + x |c| g)"
    assert parse_terms(str(term)) == (term,)
    read = ParameterFormula.read("nu", "1 + x + (1 |c| g)")
    assert str(read.random[0]) == "nu ~ (1 |c| g)"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parameters": {"sgma": "1"}}, "no parameter of family 'gaussian'.*'sgma'.*'sigma'"),
        ({"parameters": {"sigma": "1", "residual_sd": "x"}}, "two predictors"),
        ({"parameters": {"sigma": "0"}}, "no fixed effect"),
        ({"parameters": {"sigma": "x +"}}, "as the predictor of 'sigma'"),
        ({"parameters": {"sigma": "1 + q"}}, r"has 'q', which is not among.*slopes=\['q'\]"),
        ({"parameters": {"sigma": "1"}, "priors": Priors(residual_sd=Known(1.0))}, "is Known"),
        ({"parameters": {"zi": "1"}, "family": "poisson"}, "no parameter with a predictor"),
    ],
)
def test_wrong_predictors_are_refused(settings, message):
    data = ClusteredData.from_frame(
        simulated(4, 5).assign(y=lambda t: t.y.abs().round() if "family" in settings else t.y),
        outcome="y",
        clusters=["g"],
        features=["x"],
    )
    with pytest.raises(ValueError, match=message):
        MixedEffects(nn.Linear(1, 1), "(1 | g)", bayesian_head=True, **settings).bind(data)


def test_standard_errors_and_a_predictor_of_sigma_exclude_each_other():
    table = simulated(4, 5).assign(se=1.0)
    made = model(["y ~ x", "sigma ~ z"], table, se="se")
    with pytest.raises(ValueError, match="known standard errors"):
        fit(made.program, made.data, schedule=Schedule(steps=1), progress=False)


def test_the_page_runs_and_finds_what_was_simulated():
    page = Path(__file__).resolve().parents[1] / "docs" / "distributional.md"
    (code,) = re.findall(r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.DOTALL | re.M)
    names = {"__name__": "distributional_page"}
    exec(compile(code, str(page), "exec"), names)
    fixed = names["result"].fixed_effects(prob=0.99).set_index("term")
    truth = {"age": 0.5, "sigma_Intercept": 1.5 - 0.02 * 40, "sigma_age": 0.02}
    for term, value in truth.items():
        assert fixed.lower[term] < value < fixed.upper[term]


@pytest.mark.slow
def test_sleepstudy_agrees_with_glmmtmb():
    frame = pd.read_csv(Path(os.environ["ARMED_PYRO_REFERENCE_DATA"]) / "sleepstudy.csv")
    fitted = model(["Reaction ~ Days + (Days | Subject)", "sigma ~ Days"], frame)
    fitted = fitted.fit(progress=False)
    # glmmTMB models the log variance.
    fixed = fitted.fixed_effects().set_index("term")
    for term, reference in {"sigma_Intercept": 5.620 / 2, "sigma_Days": 0.170 / 2}.items():
        assert abs(fixed["median"][term] - reference) < 0.3 * fixed["sd"][term]
    table = fitted.variance_components().query("factor == 'Subject'").set_index("term")
    sds, cor = table[table.statistic == "sd"], table[table.statistic == "cor"].iloc[0]
    assert abs(sds["median"]["Days"] - 6.20) < 0.3 * sds["sd"]["Days"]
    assert abs(cor["median"] + 0.04) < 0.5 * cor["sd"]
    # The likelihood of 18 subjects is skewed: its mode is below the posterior median.
    assert 0 < sds["median"]["Intercept"] - 26.37 < 0.7 * sds["sd"]["Intercept"]


@pytest.mark.slow
def test_owls_agrees_with_glmmtmb():
    table = pd.read_csv(Path(os.environ["ARMED_PYRO_REFERENCE_DATA"]) / "owls.csv")
    formula = "SiblingNegotiation ~ FoodTreatment * SexParent + (1 | Nest)"
    family, offset = "zero_inflated(poisson)", "logBroodSize"
    made = model([formula, "zi ~ 1"], table, family=family, offset=offset)
    fixed = made.fit(progress=False).fixed_effects()
    reference = np.array([0.870, -0.269, -0.079, 0.096, -1.053])
    assert (np.abs(fixed["median"] - reference) / fixed["sd"]).max() < 0.3


@pytest.mark.slow
def test_the_guide_agrees_with_nuts():
    table = simulated(12, 10, seed=5)
    fitted = model(["y ~ x + (1 |c| g)", "sigma ~ z + (1 |c| g)"], table).fit(progress=False)
    nuts = fitted.refine("nuts", draws=1000, chains=2, warmup=300, progress=False)
    first, second = (parameters(result.posterior) for result in (fitted, nuts))
    for name, draws in second.items():
        assert abs(first[name].mean() - draws.mean()) < 0.2 * draws.std(), name
        assert abs(np.log(first[name].std() / draws.std())) < 0.2, name
