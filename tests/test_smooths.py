"""Smooth terms: the basis against smoothing splines, fits against exact posteriors and REML."""

import json

import numpy as np
import pandas as pd
import pytest
import scipy
import torch
from typer.testing import CliRunner

import armed_pyro
from armed_pyro import ClusteredData, Fit, MixedEffects, model
from armed_pyro.cli import app
from armed_pyro.data.formula_functions import evaluate
from armed_pyro.data.penalised_spline import cardinal, roughness_root
from armed_pyro.data.schema import Schema
from armed_pyro.models.linear import linear
from armed_pyro.random_effects.formula import parse_terms
from armed_pyro.random_effects.model_formula import ModelFormula
from armed_pyro.random_effects.smooth import Smooth

TABLE = pd.DataFrame({"x": [0.0, 1.0, 3.0, 4.0, 6.0, 7.5, 9.0, 10.0]})


def curved(n: int = 150, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    x, g = rng.uniform(0, 10, n), np.arange(n) % 15
    truth = np.sin(x) + 0.1 * x
    y = truth + rng.normal(0, 0.5, 15)[g] + rng.normal(0, 0.4, n)
    return pd.DataFrame({"y": y, "x": x, "g": g, "truth": truth})


# ------------------------------------------------------------------------------ the basis


def test_roughness_is_the_integral_of_the_squared_second_derivative():
    rng = np.random.default_rng(0)
    knots = np.sort(rng.uniform(0, 5, 7))
    for values in rng.normal(size=(3, 7)):
        spline = scipy.interpolate.CubicSpline(knots, values, bc_type="natural")
        second = spline.derivative(2)
        # It is linear between knots, where Simpson's rule is exact for its square.
        middle = second((knots[:-1] + knots[1:]) / 2) ** 2
        ends = second(knots) ** 2
        exact = (np.diff(knots) * (ends[:-1] + 4 * middle + ends[1:]) / 6).sum()
        assert np.square(roughness_root(knots) @ values).sum() == pytest.approx(exact, rel=1e-9)


def test_columns_have_unit_mean_square_and_no_trend():
    z, _ = evaluate("s(x, k=6)", TABLE)
    assert z.shape == (8, 4)
    assert np.square(z).sum(1).mean() == pytest.approx(1)
    line = np.column_stack([np.ones(8), TABLE["x"]])
    np.testing.assert_allclose(line.T @ z, 0, atol=1e-12)


def test_with_a_knot_at_every_row_the_penalised_fit_is_the_smoothing_spline():
    rng = np.random.default_rng(1)
    x = np.sort(rng.uniform(0, 10, 30))
    y = np.sin(x) + rng.normal(0, 0.3, 30)
    z, state = evaluate("s(x, k=30)", pd.DataFrame({"x": x}))
    knots = np.asarray(state["s(x, k=30)"]["knots"])
    np.testing.assert_allclose(knots, x)
    # With u = 1 in one place and 0 elsewhere, the curve's roughness is c^2, the same for all.
    to_knots = np.asarray(state["s(x, k=30)"]["map"]).reshape(30, 28)
    rough = roughness_root(knots) @ to_knots
    c2 = (rough.T @ rough)[0, 0]
    np.testing.assert_allclose(rough.T @ rough, c2 * np.eye(28), atol=1e-6 * c2)
    lam = 0.4
    design = np.column_stack([np.ones(30), x, z])
    penalty = np.diag([0, 0, *([lam * c2] * 28)])
    ours = design @ np.linalg.solve(design.T @ design + penalty, design.T @ y)
    np.testing.assert_allclose(
        ours, scipy.interpolate.make_smoothing_spline(x, y, lam=lam)(x), atol=1e-6
    )


def test_knots_are_kept_and_new_rows_go_on_in_straight_lines():
    _, state = evaluate("s(x, k=5)", TABLE)
    new = pd.DataFrame({"x": [2.0, 11.0, 12.0, 13.0, -1.0, -2.0, -3.0]})
    z, again = evaluate("s(x, k=5)", new, state)
    assert again == state
    alone, _ = evaluate("s(x, k=5)", new.iloc[:1], state)
    np.testing.assert_allclose(alone[0], z[0], rtol=1e-12)
    for part in (z[1:4], z[4:7]):
        np.testing.assert_allclose(np.diff(part, 2, axis=0), 0, atol=1e-12)
    knots = np.asarray(state["s(x, k=5)"]["knots"])
    np.testing.assert_allclose(cardinal(knots, knots), np.eye(5), atol=1e-12)


# ------------------------------------------------------------------------------ formulas


def test_the_line_is_fixed_and_the_curve_is_random():
    read = ModelFormula.read("y ~ z + s(x, k=5) + (1 | g) + s(w, by=f)")
    assert read.features == "z + x + w:f"
    assert read.random == ("(1 | g)", "s(x, k=5)", "s(w, by=f)")
    assert read.slopes(["x", "w", "f", "z"]) == "s(x, k=5) + s(w) + f"
    assert read.cluster_columns(["g"]) == ["g"]
    assert [type(term) for term in parse_terms(read.random)][1:] == [Smooth, Smooth]
    term = Smooth("s(w, by=f, k=7)")
    assert (term.variable, term.by, term.columns) == ("w", "f", "s(w, k=7)")


@pytest.mark.parametrize(
    ("formula", "message"),
    [
        ("y ~ x * s(x)", "which is a random effect"),
        ("y ~ x - s(x)", "cannot be subtracted"),
        ("y ~ s(log(x))", "cannot read the smooth term"),
        ("y ~ s(x, by=2)", "cannot read the smooth term"),
        ("y ~ s(x, by=z) + (1 | g)", "by=z is not a categorical column"),
        ("y ~ f + s(x, by=C(f, Sum))", "cannot read the smooth term"),
        ("y ~ x + (s(x) | g)", "stands in a sum of terms"),
        ("y ~ s(x, k=2)", "at least 3 knots"),
        ("y ~ s(few)", "3 distinct values, fewer than the 10 knots"),
        ("y ~ s(x, knots=[-5, 2, 3])", "outside the range"),
        ("y ~ s(x, knots=[2, 2, 3])", "not distinct"),
        ("y ~ s(x, df=3)", "has 'df'"),
    ],
)
def test_wrong_smooth_terms_are_named(formula, message):
    table = curved().assign(few=np.arange(150) % 3, z=1.0 * np.arange(150))
    with pytest.raises(ValueError, match=message):
        model(formula, table).fit()


def test_a_program_made_from_parts_needs_the_columns():
    table = curved()
    data = ClusteredData.from_frame(table, outcome="y", clusters=["g"], features="x")
    program = MixedEffects(linear(1, 1), ["(1 | g)", "s(x)"])
    with pytest.raises(ValueError, match=r"pass slopes='s\(x\)'"):
        program.bind(data)
    columns = {"outcome": "y", "clusters": ["g"], "features": "x", "slopes": "s(x)"}
    bound = program.bind(ClusteredData.from_frame(table, **columns))
    assert [len(factor.terms) for factor in bound.factors] == [1, 8]
    assert bound.factors[1].sd_names == ("s(x)",)
    assert [factor.name for factor in bound.clustered_factors] == ["g"]


# ------------------------------------------------------------------------------ exact posteriors


def test_the_posterior_of_a_curve_is_the_exact_one():
    table = curved(120)[["y", "x"]]
    result = model("y ~ s(x, k=8)", table).fit(progress=False)
    n, facts = len(table), result.model.data_facts()
    y = (table["y"].to_numpy() - facts.center[0]) / facts.spread
    line = np.column_stack([np.ones(n), (table["x"] - table["x"].mean()) / table["x"].std()])
    z, _ = evaluate("s(x, k=8)", table)
    fixed = result.model.priors.fixed_sd**2 * line @ line.T
    curve = z @ z.T
    sds, sigmas = np.exp(np.linspace(-3, 2.5, 70)), np.exp(np.linspace(-1.4, -0.2, 40))
    prior = scipy.stats.t(3)
    log_p, means = np.zeros((70, 40)), np.zeros((70, 40))
    for i, sd in enumerate(sds):
        values, vectors = np.linalg.eigh(fixed + sd**2 * curve)
        rotated, at_5 = vectors.T @ y, (fixed + sd**2 * curve)[5] @ vectors
        for j, sigma in enumerate(sigmas):
            total = values + sigma**2
            log_p[i, j] = -0.5 * (np.log(total).sum() + (rotated**2 / total).sum())
            log_p[i, j] += prior.logpdf(sd) + prior.logpdf(sigma) + np.log(sd * sigma)
            means[i, j] = at_5 @ (rotated / total)
    weight = np.exp(log_p - log_p.max())
    weight /= weight.sum()
    draws = result.hyperparameters(4000)
    sampled = {"s(x)": draws["s(x, k=8)_sd"], "residual": draws["residual_sd"]}
    exact = {"s(x)": (weight.sum(1), sds), "residual": (weight.sum(0), sigmas)}
    for name, (p, grid) in exact.items():
        mean = p @ np.log(grid)
        sd = np.sqrt(p @ np.log(grid) ** 2 - mean**2)
        found = sampled[name].flatten().log()
        # Four standard errors of 2,000 effective draws.
        assert abs(float(found.mean()) - mean) < 0.09 * sd
        assert float(found.std()) == pytest.approx(sd, rel=0.07)
    expected = facts.center[0] + facts.spread * (weight * means).sum()
    shown = result.predict(table, draws=4000)
    assert abs(shown.mean[5] - expected) < 0.09 * shown.to_frame()["sd"].iloc[5]


def reml(table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """REML estimates of the sds of curve, clusters and rows, and the curve at the rows."""
    n, y = len(table), table["y"].to_numpy()
    line = np.column_stack([np.ones(n), table["x"]])
    z, _ = evaluate("s(x)", table)
    clusters = pd.get_dummies(table["g"]).to_numpy(float)
    parts = [z @ z.T, clusters @ clusters.T, np.eye(n)]

    def solved(log_sd):
        v = sum(np.exp(2 * s) * part for s, part in zip(log_sd, parts, strict=True))
        root = scipy.linalg.cho_factor(v)
        xvx = line.T @ scipy.linalg.cho_solve(root, line)
        beta = np.linalg.solve(xvx, line.T @ scipy.linalg.cho_solve(root, y))
        return root, xvx, beta, scipy.linalg.cho_solve(root, y - line @ beta)

    def loss(log_sd):
        root, xvx, beta, left = solved(log_sd)
        size = np.log(np.diag(root[0])).sum() + 0.5 * np.linalg.slogdet(xvx)[1]
        return size + 0.5 * (y - line @ beta) @ left

    best = scipy.optimize.minimize(loss, np.log([1, 0.5, 0.5]), method="Nelder-Mead").x
    _, _, beta, left = solved(best)
    return np.exp(best), line @ beta + np.exp(2 * best[0]) * parts[0] @ left


@pytest.fixture(scope="module")
def sine():
    table = curved(400)
    program = model("y ~ s(x) + (1 | g)", table[["y", "x", "g"]])
    return table, program.fit(progress=False)


def test_a_smooth_beside_random_intercepts_agrees_with_reml_and_the_truth(sine):
    table, result = sine
    sds, curve = reml(table)
    components = result.variance_components().query("statistic == 'sd'").set_index("factor")
    assert components.index.tolist() == ["g", "s(x)", "Residual"]
    for name, estimate in zip(("s(x)", "g", "Residual"), sds, strict=True):
        row = components.loc[name]
        # Posterior medians lie above REML's modes, by skewness and by the prior.
        assert abs(row["median"] - estimate) < 0.7 * row["sd"]
    typical = pd.DataFrame({"x": table["x"], "g": 99})
    with pytest.warns(UserWarning, match="no cluster of 'g'"):
        shown = result.predict(typical, unseen="population", prob=0.9).to_frame()
    # Between two curves of the same data: a tenth of a posterior sd is 1% of its mean square.
    assert np.abs(shown["mean"].to_numpy() - curve).max() < 0.25 * shown["sd"].min()
    inside = (shown["lower"] < table["truth"]) & (table["truth"] < shown["upper"])
    assert inside.mean() > 0.6
    icc = result.variance_components().query("statistic == 'icc'")
    assert icc["factor"].tolist() == ["g"]
    assert result.random_effects()["factor"].unique().tolist() == ["g"]
    assert "s(x)_sd[s(x)]" in result.confint().index


def test_effects_follow_the_curve_and_integrate_over_clusters_only(sine):
    _, result = sine
    slopes = result.slopes("x", by="x", at={"x": [2.0, 5.0, 8.0]}).to_frame()
    truth = np.cos([2.0, 5.0, 8.0]) + 0.1
    assert (np.abs(slopes["mean"] - truth) < 4 * slopes["sd"]).all()
    at = {"x": [1.0, 4.0]}
    typical = result.predictions(by="x", at=at, rest="mean").draws.mean(0)
    average = result.predictions(by="x", at=at, rest="mean", unseen="marginal").draws.mean(0)
    np.testing.assert_allclose(typical, average, rtol=1e-4)  # the link is the identity
    assert abs(typical[0] - typical[1]) > 0.5


# ------------------------------------------------------------------------------ other families


@pytest.fixture(scope="module")
def counts():
    rng = np.random.default_rng(2)
    n = 500
    x, g, f = rng.uniform(0, 10, n), np.arange(n) % 25, rng.choice(["a", "b"], n)
    eta = 1 + np.where(f == "a", np.sin(x), 0.1 * x - 1) + rng.normal(0, 0.3, 25)[g]
    table = pd.DataFrame({"y": rng.poisson(np.exp(eta)), "x": x, "g": g, "f": f})
    program = model("y ~ f + s(x, by=f, k=8) + (1 | g)", table, family="poisson")
    return table, program.fit(progress=False)


def test_every_level_has_its_curve(counts):
    _, result = counts
    assert result.data.feature_names == ("f[T.b]", "x:f[a]", "x:f[b]")
    sds = result.variance_components().query("statistic == 'sd' and factor != 'g'")
    assert sds["term"].tolist() == ["s(x, by=f, k=8)[f[a]]", "s(x, by=f, k=8)[f[b]]"]
    assert sds["lower"].iloc[0] > sds["median"].iloc[1]  # a sine, and a straight line
    at = {"f": ["a", "b"], "x": [1.0, 4.5, 8.0]}
    shown = result.predictions(by=["f", "x"], at=at, rest="mean", scale="link").to_frame()
    x = shown["x"].to_numpy()
    truth = 1 + np.where(shown["f"] == "a", np.sin(x), 0.1 * x - 1)
    assert (np.abs(shown["mean"] - truth) < 3.5 * shown["sd"]).all()
    assert result.diagnostics().computation.word == "pass"


def test_a_smooth_is_saved_with_its_knots(counts, tmp_path):
    table, result = counts
    result.save(tmp_path)
    loaded = Fit.load(tmp_path)
    new = table.head(7).assign(x=[0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 11.0])
    before, after = (each.predict(new).mean for each in (result, loaded))
    np.testing.assert_array_equal(before, after)
    assert [str(term) for term in loaded.model.terms] == ["(1 | g)", "s(x, by=f, k=8)"]
    schema = result.data.schema
    again = Schema.from_json(json.loads(json.dumps(schema.to_json())))
    assert again.calls == schema.calls


def test_the_command_line_and_the_report_know_smooth_terms(tmp_path):
    curved(120).drop(columns="truth").to_csv(tmp_path / "rows.csv", index=False)
    run, call = tmp_path / "run", CliRunner()
    rows = str(tmp_path / "rows.csv")
    options = ["--steps", "40", "--out", str(run)]
    done = call.invoke(app, ["fit", rows, "y ~ s(x, k=6) + (1 | g)", *options])
    assert done.exit_code == 0, done.output
    assert "s(x, k=6)" in (run / "variance_components.csv").read_text("utf-8")
    done = call.invoke(app, ["predict", str(run), rows, "--out", str(tmp_path / "p.csv")])
    assert done.exit_code == 0, done.output
    done = call.invoke(app, ["report", str(run), "--out", str(tmp_path / "r.html")])
    assert done.exit_code == 0, done.output
    assert "depart from their straight lines" in (tmp_path / "r.html").read_text("utf-8")


def test_a_network_may_have_a_smooth_beside_it():
    program = model("y ~ s(x, k=6) + (1 | g)", curved(60)[["y", "x", "g"]], net="dense")
    result = program.fit(steps=10, validation=None, progress=False)
    assert np.isfinite(result.predict(curved(5)).mean).all()


def test_several_classes_have_a_curve_each():
    rng = np.random.default_rng(3)
    x = rng.uniform(0, 10, 90)
    label = np.where(np.sin(x) > 0.5, "up", np.where(x > 5, "late", "early"))
    table = pd.DataFrame({"y": label, "x": x, "g": np.arange(90) % 10})
    program = model("y ~ s(x, k=6) + (1 | g)", table, family="categorical")
    factor = program.program.bind(program.data).factors[1]
    assert factor.sd_names == ("s(x, k=6)[late]", "s(x, k=6)[up]")
    values = factor.sd({factor.sd_site: torch.tensor([1.0, 2.0])})
    # Effects are ordered by coefficient, then by class.
    assert values.tolist() == [1.0, 2.0] * 4
    assert factor.terms[:2] == ("s(x, k=6)[1][late]", "s(x, k=6)[1][up]")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gaussian", "bernoulli"])
def test_intervals_of_curves_cover_on_average(family):
    """Nychka's coverage: over the function, 90% intervals hold the truth in 90% of the places."""
    shares = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        table = curved(300, seed)
        truth = table["truth"] - table["truth"].mean()
        if family == "bernoulli":
            table["y"] = 1.0 * (rng.random(300) < 1 / (1 + np.exp(-2 * truth)))
        columns = ["y", "x"] if family == "bernoulli" else ["y", "x", "g"]
        formula = "y ~ s(x)" if family == "bernoulli" else "y ~ s(x) + (1 | g)"
        result = armed_pyro.model(formula, table[columns], family=family).fit(progress=False)
        grid = pd.DataFrame({"x": np.linspace(0.2, 9.8, 25)})
        at = {"x": grid["x"].tolist()}
        shown = result.predictions(by="x", at=at, rest="mean", scale="link", prob=0.9).to_frame()
        expected = np.sin(grid["x"]) + 0.1 * grid["x"]
        if family == "bernoulli":
            expected = 2 * (expected - table["truth"].mean())
        shares.append(((shown["lower"] < expected) & (expected < shown["upper"])).mean())
    error = np.std(shares, ddof=1) / np.sqrt(len(shares))
    assert abs(np.mean(shares) - 0.9) < 4 * error, (np.mean(shares), error)
