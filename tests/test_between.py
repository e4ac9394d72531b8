"""``MixedEffects(between=...)``: clusters' means of features beside a network."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from armed_pyro import ClusteredData, Fit, MixedEffects, Schedule, StreamedData, fit
from armed_pyro.cli import app
from armed_pyro.data.grouping import Grouping
from armed_pyro.distributions.intercept_regression import InterceptRegression
from armed_pyro.fitting import _bound
from armed_pyro.prediction.predict import predict_table
from armed_pyro.program.mundlak import slopes_apart
from armed_pyro.streaming.parquet_table import TableBlocks

SHORT = Schedule(steps=60)
NAMES = ("between(x | g)", "between(s[T.m] | g)")


def panel(seed: int, family: str = "gaussian", *, clusters: int = 80, gap: float = -2.0):
    """A slope of 1 within clusters, and 1 + gap on the clusters' true means of x."""
    rng = np.random.default_rng(seed)
    g = np.repeat(np.arange(clusters), 6)
    mean, deviation = rng.normal(size=clusters)[g], rng.normal(size=len(g))
    constant = rng.normal(size=clusters)[g]
    eta = deviation + (1 + gap) * mean + 0.5 * constant + 0.5 * rng.normal(size=clusters)[g]
    draw = {
        "gaussian": lambda: eta + 0.5 * rng.normal(size=len(g)),
        "bernoulli": lambda: (rng.random(len(g)) < 1 / (1 + np.exp(-eta))).astype(int),
        "poisson": lambda: rng.poisson(np.exp(0.5 * eta)),
        "categorical": lambda: np.array(["a", "b", "c"])[
            np.argmax(np.stack([0 * eta, eta, -eta], 1) + rng.gumbel(size=(len(g), 3)), 1)
        ],
    }
    return pd.DataFrame(
        {
            "y": draw[family](),
            "x": 3 + mean + deviation,
            "c": constant,
            "s": np.where(rng.random(len(g)) < 0.3 + 0.4 * (g % 2), "m", "f"),
            "g": [f"g{k}" for k in g],
        }
    )


def encoded(table: pd.DataFrame) -> ClusteredData:
    return ClusteredData.from_frame(table, outcome="y", clusters=["g"])


def network(features: int = 3, outputs: int = 1) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(features, 6), nn.ReLU(), nn.Linear(6, outputs))


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return panel(0)


@pytest.fixture(scope="module")
def linear_fit(table: pd.DataFrame) -> Fit:
    data = encoded(table[~table.g.isin(["g0", "g1"])])
    model = MixedEffects(nn.Linear(3, 1), "(1 | g)", bayesian_head=True, between=True)
    return fit(model, data, progress=False)


@pytest.fixture(scope="module")
def network_fit(table: pd.DataFrame) -> Fit:
    data = encoded(table[~table.g.isin(["g0", "g1"])])
    model = MixedEffects(network(), "(1 | g)", between=True)
    return fit(model, data, schedule=SHORT, progress=False)


# --- the regression and the test --------------------------------------------------------------


def test_intercept_regression_is_reml_of_statsmodels():
    statsmodels = pytest.importorskip("statsmodels.api")
    rng = np.random.default_rng(0)
    codes = np.repeat(np.arange(60), rng.integers(2, 9, 60))
    x = np.column_stack([np.ones(len(codes)), rng.normal(size=(len(codes), 2))])
    y = x @ [1, 2, 3] + 0.7 * rng.normal(size=60)[codes] + rng.normal(size=len(codes))
    ours = InterceptRegression.of(y, x, codes)
    theirs = statsmodels.MixedLM(y, x, codes).fit(reml=True)
    assert np.allclose(ours.estimate, theirs.fe_params, atol=1e-4)
    assert np.allclose(np.sqrt(np.diag(ours.covariance)), theirs.bse_fe, rtol=2e-3)
    assert np.isclose(ours.intercept_sd**2, theirs.cov_re.item(), rtol=5e-3)
    assert np.isclose(ours.variance, theirs.scale, rtol=1e-3)


def test_left_out_clusters_are_predicted_from_the_others():
    rng = np.random.default_rng(1)
    codes, x = np.repeat(np.arange(12), 4), np.column_stack([np.ones(48), rng.normal(size=48)])
    y, weight = rng.normal(size=48), rng.uniform(0.5, 2, size=48)
    weight /= weight.mean()
    whole = InterceptRegression(y, x, codes, weight, 0.7)
    rest = codes != 5
    others = InterceptRegression(
        y[rest], x[rest], np.unique(codes[rest], return_inverse=True)[1], weight[rest], 0.7
    )
    assert np.allclose(whole.left_out()[~rest], x[~rest] @ others.estimate)


def test_intervals_of_both_slopes_hold_the_truth():
    held = np.zeros(2)
    for seed in range(150):
        table = panel(seed, clusters=40)
        x = table[["x", "c"]].to_numpy()
        grouping = Grouping.from_labels(table.g)
        apart = slopes_apart(table.y.to_numpy(), x, ("x", "c"), grouping)
        assert apart.names == ("x",)
        held += [
            abs(apart.within[0] - 1) < 1.645 * apart.within_se[0],
            abs(apart.between[0] + 1) < 1.645 * apart.between_se[0],
        ]
    # Three standard errors of a share of 0.9; the means' own error is not in the intervals.
    assert (held / 150 > 0.9 - 3 * (0.9 * 0.1 / 150) ** 0.5).all()


@pytest.mark.parametrize("family", ["gaussian", "bernoulli", "poisson", "categorical"])
def test_auto_finds_the_features_whose_slopes_differ(family):
    outputs = 3 if family == "categorical" else 1
    for seed in range(3):
        data = encoded(panel(seed, family))
        bound = MixedEffects(network(outputs=outputs), "(1 | g)", family).bind(data)
        assert bound.facts.between.names == ("between(x | g)",)
        assert "slopes of x differ" in bound.facts.between.note


@pytest.mark.parametrize("family", ["gaussian", "bernoulli", "poisson"])
def test_auto_adds_nothing_without_a_conflict(family):
    for seed in range(30):
        data = encoded(panel(seed, family, gap=0.0))
        facts = MixedEffects(network(), "(1 | g)", family).bind(data).data_facts()
        assert facts.between_names == ()
        assert facts.between.note.startswith("off for g")


# --- the choice -------------------------------------------------------------------------------


def test_linear_programs_have_no_means_by_default(table):
    data = encoded(table)
    assert (
        MixedEffects(nn.Linear(3, 1), "(1 | g)", bayesian_head=True).bind(data).facts.between
        is None
    )
    auto = MixedEffects(nn.Linear(3, 1), "(1 | g)", bayesian_head=True, between="auto").bind(data)
    assert auto.fixed_terms() == ("Intercept", "x", "c", "s[T.m]", "between(x | g)")
    off = MixedEffects(network(), "(1 | g)", between=False, linear_effects=False).bind(data)
    assert off.facts.between is None
    assert not off.has_fixed_effects


def test_the_network_keeps_its_modules(table):
    net = network()
    bound = MixedEffects(net, "(1 | g)", between=True, linear_effects=False).bind(encoded(table))
    assert list(bound.net.state_dict()) == list(net.state_dict())
    assert bound.fixed_terms() == NAMES


def test_every_factor_with_an_intercept_has_means(table):
    data = ClusteredData.from_frame(
        table.assign(h=np.arange(len(table)) % 20, x=table.x + np.arange(len(table)) % 20),
        outcome="y",
        clusters=["g", "h"],
    )
    model = MixedEffects(network(), ["(1 | g)", "(1 | h)"], between=True).bind(data)
    assert {"between(x | g)", "between(x | h)"} <= set(model.fixed_terms())
    slopes = MixedEffects(network(), ["(1 | g)", "(0 + x | h)"], between=True).bind(data)
    means = [name for name in slopes.fixed_terms() if name.startswith("between(")]
    assert means
    assert all(name.endswith("| g)") for name in means)


@pytest.mark.parametrize(
    ("random", "features", "message"),
    [
        ("(0 + x0 | g)", torch.randn(30, 3), "no random intercept"),
        ("(1 | g)", torch.randn(30, 1, 3, 3), "no feature with a name"),
    ],
)
def test_means_that_cannot_be_are_an_error(random, features, message):
    y = np.random.default_rng(0).normal(size=30)
    data = ClusteredData.from_arrays(features, y, {"g": np.arange(30) % 5})
    width = features[0].numel()
    net = nn.Sequential(nn.Flatten(), nn.Linear(width, 1))
    with pytest.raises(ValueError, match=message):
        MixedEffects(net, random, between=True).bind(data)
    assert MixedEffects(net, random, between="auto").bind(data).data_facts().between is None
    with pytest.raises(ValueError, match="must be True, False or 'auto'"):
        MixedEffects(net, random, between="yes")


# --- the fit ----------------------------------------------------------------------------------


def test_estimates_are_those_of_the_formula(table, linear_fit):
    data = ClusteredData.from_frame(
        table[~table.g.isin(["g0", "g1"])],
        outcome="y",
        clusters=["g"],
        features="x + c + s + between(x | g) + between(s | g)",
    )
    formula = fit(
        MixedEffects(nn.Linear(5, 1), "(1 | g)", bayesian_head=True), data, progress=False
    )
    ours = linear_fit.fixed_effects().set_index("term")
    theirs = formula.fixed_effects().set_index("term")
    assert set(ours.index) == set(theirs.index)
    gap = (ours["mean"] - theirs["mean"]).abs() / theirs["sd"]
    assert (gap.drop("between(s[T.m] | g)") < 0.2).all()
    truth = pd.Series({"x": 1.0, "between(x | g)": -2.0, "c": 0.5})
    known = ours.loc[truth.index]
    assert ((known["mean"] - truth).abs() < 3.5 * known["sd"]).all()


def test_coefficients_are_in_original_units(table, linear_fit):
    rows = table[table.g.isin(["g0", "g1", "g5"])]
    data = linear_fit.posterior.encode(rows)
    means = linear_fit.model.facts.between.extended(data)["g"]
    places = means.levels.get_indexer(rows.g)
    x = np.column_stack([np.ones(len(rows)), data.features, means.means[places]])
    latents = linear_fit.draws(200)
    batch = linear_fit.model.encode(data, linear_fit.model.facts.levels_with(data)).all()
    fixed = {"fixed_effect": latents["fixed_effect"]}
    eta = linear_fit.model.predictor(batch, fixed).eta[..., 0]
    effects = linear_fit.fixed_effects(draws=200)["mean"].to_numpy()
    assert np.allclose(eta.mean(0), x @ effects, atol=1e-4)


def test_new_clusters_are_predicted_better(table):
    new = [f"g{k}" for k in range(20)]
    held_out = table[table.g.isin(new)]
    data = encoded(table[~table.g.isin(new)])
    errors = {}
    for between in (True, False):
        model = MixedEffects(nn.Linear(3, 1), "(1 | g)", bayesian_head=True, between=between)
        made = fit(model, data, progress=False).predict(held_out, unseen="marginal")
        errors[between] = np.sqrt(np.mean((made.expected.mean(0) - held_out.y) ** 2))
    assert errors[True] < 0.6 * errors[False]
    # The true mean of a new cluster is known from six rows, with a variance of 1 / 7.
    assert errors[True] < 1.3 * np.sqrt(0.5**2 + 0.5**2 + 2**2 / 7)


def test_the_variance_of_the_fixed_part_holds_both(table, network_fit):
    posterior = network_fit.posterior
    rows = posterior.model.encode(posterior.data).all()
    latents = posterior.draws(50)
    with torch.no_grad():
        eta = posterior.model.predictor(rows, {"fixed_effect": latents["fixed_effect"]}).eta
    table = network_fit.variance_components(draws=50)
    means = table.set_index(["factor", "statistic"])["mean"]
    fixed = float(eta[..., 0].var(1).mean())
    residual = latents["residual_sd"].square().mean() * posterior.model.data_facts().spread ** 2
    total = fixed + means["g", "variance"] + float(residual)
    assert np.isclose(means["Fixed", "share"], fixed / total, rtol=0.02)


def test_a_latent_last_layer_and_means(table):
    data = encoded(table)
    model = MixedEffects(network(), "(1 | g)", bayesian_head=True, between=True)
    result = fit(model, data, schedule=SHORT, progress=False)
    assert result.fixed_effects()["term"].tolist()[-2:] == [*NAMES]
    assert "fixed_term" in result.to_datatree(draws=20)["posterior"].dims
    assert len(result.attribution(draws=20).table()) >= 3
    assert result.diagnostics().model.word in ("pass", "warn", "fail", "note")


@pytest.mark.slow
def test_classes_have_effects_of_means_each():
    data = encoded(panel(0, "categorical"))
    model = MixedEffects(network(outputs=3), "(1 | g)", "categorical", between=True)
    result = fit(model, data, schedule=SHORT, progress=False)
    terms = result.fixed_effects()["term"].tolist()
    assert terms == [f"{name}[{c}]" for name in NAMES for c in ("b", "c")]
    assert result.predict(data).expected.shape[-1] == 3


# --- prediction and files ---------------------------------------------------------------------


def test_new_clusters_have_shrunk_means_of_their_own_rows(table, network_fit):
    rows = table[table.g.isin(["g0", "g1", "g2"])].drop(columns="y")
    model, between = network_fit.model, network_fit.model.facts.between

    def x_mean(part: pd.DataFrame, label: str) -> float:
        data = network_fit.posterior.encode(part)
        means = between.extended(data)["g"]
        return float(means.means[means.levels.get_loc(label), 0])

    means = between.means["g"]
    share = means.reliability(np.array([1.0]))[0, 0]
    single = rows[rows.g == "g0"].iloc[:1]
    expected = means.grand[0] + share * (single.x.iloc[0] - means.grand[0])
    assert np.isclose(x_mean(single, "g0"), expected)
    assert x_mean(rows.iloc[:-3], "g2") == x_mean(rows, "g2")
    data = network_fit.posterior.encode(rows)
    batch = model.encode(data, model.facts.levels_with(data))
    assert batch.means.shape == (len(rows), 2)
    # Rows that are taken from encoded rows keep the means of all of them.
    part = data.take(np.arange(2))
    again = model.encode(part, model.facts.levels_with(part)).means
    assert torch.equal(again, batch.means[:2])


def test_saved_fits_have_the_means(table, network_fit, tmp_path):
    network_fit.save(tmp_path / "run")
    again = Fit.load(tmp_path / "run", network())
    options = {"unseen": "marginal", "draws": 50}
    expected = network_fit.predict(table, **options).expected
    assert np.array_equal(again.predict(table, **options).expected, expected)
    assert again.fixed_effects().equals(network_fit.fixed_effects())
    assert "Clusters' means: means of features: 2 of g" in _summary(again)


def test_fits_saved_before_load_without_means(table, tmp_path):
    data = encoded(table)
    model = MixedEffects(network(), "(1 | g)", between=False)
    result = fit(model, data, schedule=SHORT, progress=False)
    result.save(tmp_path / "run")
    path = tmp_path / "run" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["model"]["between"], manifest["facts"]["between"], manifest["checksums"]
    for name in ("cluster_columns", "means"):
        del manifest["facts"]["schema"][name]
    path.write_text(json.dumps(manifest))
    again = Fit.load(tmp_path / "run", network())
    assert np.array_equal(again.predict(data).expected, result.predict(data).expected)


def _summary(result: Fit) -> str:
    from armed_pyro.report.text import summarize

    return summarize(result.results())


def test_blocks_of_a_table_have_the_means_of_the_whole_table(
    table, network_fit, tmp_path, monkeypatch
):
    rows = table.sample(frac=1, random_state=0).drop(columns="y")
    rows.to_parquet(tmp_path / "rows.parquet", index=False)
    monkeypatch.setattr("armed_pyro.prediction.predict.BLOCK_VALUES", 11 * 50 * 2)
    monkeypatch.setattr("armed_pyro.prediction.predict.EVIDENCE_ROWS", 30)
    options = {"unseen": "marginal", "draws": 50}
    opened = TableBlocks.open(tmp_path / "rows.parquet")
    parts, _ = predict_table(network_fit.posterior, opened, **options)
    made = [part.expected for part in parts]
    assert len(made) > 3
    expected = network_fit.predict(rows, **options).expected
    assert np.allclose(np.concatenate(made, 1), expected, atol=1e-6)


def test_adapted_clusters_keep_the_means_of_their_support(table, network_fit):
    new = table[table.g == "g0"]
    adapted = network_fit.adapt(new.iloc[:2])
    kept = network_fit.posterior.encode(new.iloc[3:], adapted.support).cluster_means["g"]
    means = adapted.support.cluster_means["g"]
    assert (kept.means[kept.levels.get_loc("g0")] == means.means[means.levels.get_loc("g0")]).all()
    more, at_once = adapted.adapt(new.iloc[2:4]), network_fit.adapt(new.iloc[:4])
    made = more.predict(new.iloc[4:]).expected
    assert np.allclose(made, at_once.predict(new.iloc[4:]).expected)
    direct = network_fit.predict(new.iloc[4:], unseen="adapt", support=new.iloc[:4]).expected
    assert np.allclose(direct, made)


def test_streamed_rows_have_the_means_of_rows_in_memory(table, tmp_path):
    table.to_parquet(tmp_path / "rows.parquet", index=False)
    data = encoded(table)
    streamed = StreamedData.scan(tmp_path / "rows.parquet", outcome="y", clusters=["g"])
    model = MixedEffects(network(), "(1 | g)", between=True)
    held = model.bind(data)
    expected = held.encode(data).all()
    with _bound(model, streamed, torch.device("cpu"), 0, progress=False) as (bound, _, source):
        rows = source.all()
        assert bound.fixed_terms() == held.fixed_terms()
        order = torch.argsort(rows.x[:, 0])
        wanted = torch.argsort(expected.x[:, 0])
        assert torch.allclose(rows.means[order], expected.means[wanted], atol=1e-5)
        chosen = torch.arange(3)
        whole = source.whole_clusters("g", chosen)
        assert whole.means.shape == (18, 2)
    auto = replace_choice(model)
    with _bound(auto, streamed, torch.device("cpu"), 0, progress=False) as (bound, _, _):
        linear = ("linear(x)", "linear(c)", "linear(s[T.m])")
        assert bound.fixed_terms() == (*linear, "between(x | g)")


def replace_choice(model: MixedEffects) -> MixedEffects:
    return MixedEffects(model.network, model.terms, between="auto")


def test_checkpoints_tell_other_means_apart(table):
    rows = (
        MixedEffects(network(), "(1 | g)", between=True).bind(encoded(table)).encode(encoded(table))
    )
    other = replace(rows, means=rows.means + 1)
    assert list(rows.fingerprint()) != list(other.fingerprint())


def test_command_line(table, tmp_path):
    table.to_csv(tmp_path / "rows.csv", index=False)
    run = str(tmp_path / "run")
    settings = ["--outcome", "y", "--random", "(1 | g)", "--between", "yes", "--steps", "50"]
    made = CliRunner().invoke(app, ["fit", str(tmp_path / "rows.csv"), *settings, "--out", run])
    assert made.exit_code == 0
    assert "between(x | g)" in made.stdout
    assert Fit.load(run).fixed_effects()["term"].tolist()[-2:] == [*NAMES]


@pytest.mark.parametrize(("clusters", "rows"), [(6000, 4), (40, 700)])
def test_large_data_are_tested_in_a_sample(clusters, rows):
    rng = np.random.default_rng(0)
    g = np.repeat(np.arange(clusters), rows)
    mean, deviation = rng.normal(size=clusters)[g], rng.normal(size=len(g))
    y = deviation - mean + rng.normal(size=len(g))
    data = ClusteredData.from_arrays((mean + deviation)[:, None], y, {"g": g})
    facts = MixedEffects(network(features=1), "(1 | g)").bind(data).data_facts()
    assert facts.between_names == ("between(x0 | g)",)
    # Means are over all rows.
    assert len(facts.between.means["g"].levels) == clusters
