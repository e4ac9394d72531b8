"""``within(x | g)`` and ``between(x | g)``: means of clusters, their encoding, fits and files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from torch import nn
from typer.testing import CliRunner, Result

from armed_pyro import ClusteredData, Fit, MixedEffects, StreamedData, fit
from armed_pyro.cli import app
from armed_pyro.data.cluster_means import ClusterMeans, ClusterSums
from armed_pyro.data.grouping import Grouping
from armed_pyro.data.own_means import encoded_by, with_own_means
from armed_pyro.data.schema import Schema
from armed_pyro.prediction.predict import predict_table
from armed_pyro.streaming.parquet_table import TableBlocks

BOTH = "within(x | g) + between(x | g) + z"


def panel(
    clusters: int, rows: int, seed: int, *, within: float = 1.0, between: float = -1.0
) -> pd.DataFrame:
    """Slopes on deviations from, and on, the clusters' true means of x, which have variance 1."""
    rng = np.random.default_rng(seed)
    g = np.repeat(np.arange(clusters), rows)
    mean = 3 + rng.normal(size=clusters)[g]
    deviation = rng.normal(size=len(g))
    y = within * deviation + between * mean + 0.5 * rng.normal(size=clusters)[g]
    y = y + 0.5 * rng.normal(size=len(g))
    return pd.DataFrame(
        {
            "y": y,
            "x": mean + deviation,
            "z": rng.normal(size=len(g)),
            "s": np.where(rng.random(len(g)) < 0.3 + 0.4 * (g % 2), "m", "f"),
            "g": [f"g{k}" for k in g],
            "h": np.arange(len(g)) % 2,
        }
    )


def encoded(table: pd.DataFrame, features: str | list[str] = BOTH) -> ClusteredData:
    return ClusteredData.from_frame(table, outcome="y", clusters=["g", "h"], features=features)


def command(arguments: list[str]) -> Result:
    return CliRunner().invoke(app, arguments)


def column(data: ClusteredData, name: str) -> np.ndarray:
    return np.asarray(data.features[:, data.feature_names.index(name)])


def linear(data: ClusteredData) -> MixedEffects:
    return MixedEffects(nn.Linear(data.n_features, 1), "(1 | g)", bayesian_head=True)


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return panel(40, 5, 0)


@pytest.fixture(scope="module")
def fitted(table: pd.DataFrame) -> Fit:
    data = encoded(table[~table.g.isin(["g0", "g1", "g2"])])
    return fit(linear(data), data, progress=False)


def test_moments_are_unbiased_in_unbalanced_clusters():
    rng, estimates = np.random.default_rng(0), []
    sizes = rng.integers(1, 9, size=60)
    grouping = Grouping.from_labels(np.repeat(np.arange(60), sizes))
    for _ in range(200):
        x = 100 + np.repeat(0.8 * rng.normal(size=60), sizes) + 1.5 * rng.normal(size=sizes.sum())
        estimates.append(np.concatenate(ClusterSums.of(x[:, None], grouping).moments()))
    mean, error = np.mean(estimates, 0), np.std(estimates, 0) / 200**0.5
    assert (abs(mean - [2.25, 0.64]) < 3.5 * error).all()


def test_means_are_the_expectation_given_the_rows():
    # With normal means and rows, E[mean | rows] by the conditional of a joint normal.
    rng = np.random.default_rng(1)
    grouping = Grouping.from_labels(np.repeat(np.arange(30), rng.integers(2, 6, size=30)))
    codes = grouping.codes.numpy()
    x = rng.normal(size=30)[codes] + rng.normal(size=len(codes))
    means = ClusterMeans.of(("x",), ClusterSums.of(x[:, None], grouping))
    covariance = means.between[0] * (codes[:, None] == codes) + means.within[0] * np.eye(len(x))
    inverse = np.linalg.inv(covariance)
    grand = inverse.sum(0) @ x / inverse.sum()  # generalised least squares
    first = np.array([(codes == k) * means.between[0] for k in range(30)])
    expected = grand + first @ inverse @ (x - grand)
    assert np.allclose(means.grand[0], grand)
    assert np.allclose(means.means[:, 0], expected)


def test_reliability_is_one_for_constants_and_zero_without_variance_between():
    grouping = Grouping.from_labels(np.repeat(np.arange(4), 3))
    constant, same = np.repeat([1e6, 1e6 + 1, 1e6 + 2, 1e6 + 5], 3), np.tile([0.0, 1, 2], 4)
    means = ClusterMeans.of(("c", "s"), ClusterSums.of(np.stack([constant, same], 1), grouping))
    assert means.reliability(np.array([1.0, 5.0])).tolist() == [[1, 0], [1, 0]]
    assert np.allclose(means.means[:, 0], constant[::3], atol=1e-6)
    assert np.allclose(means.means[:, 1], 1.0)


def test_sums_of_blocks_are_the_sums_of_all_rows():
    rng = np.random.default_rng(2)
    x, labels = 1e5 + rng.normal(size=(200, 2)), rng.integers(9, size=200)
    whole = ClusterSums.of(x, Grouping.from_labels(labels))
    joined = None
    for start in range(0, 200, 60):
        rows = slice(start, start + 60)
        block = ClusterSums.of(x[rows], Grouping.from_labels(labels[rows]), origin=whole.origin)
        joined = block if joined is None else joined.plus(block)
    order = joined.levels.argsort()
    assert np.allclose(joined.total[order], whole.total)
    assert np.allclose(joined.moments(), whole.moments(), rtol=1e-9)


def test_coefficients_are_slopes_of_the_true_means():
    """Shrunk means remove the bias of plain means of three rows, 4/3 of a unit here."""
    shrunk, plain = [], []
    for seed in range(12):
        table = panel(300, 3, seed)
        data = encoded(table)
        x = np.column_stack([np.ones(len(table)), data.features])
        shrunk.append(np.linalg.lstsq(x, table.y.to_numpy(), rcond=None)[0][1:3])
        mean = table.groupby("g").x.transform("mean")
        x = np.column_stack([np.ones(len(table)), table.x - mean, mean])
        plain.append(np.linalg.lstsq(x, table.y.to_numpy(), rcond=None)[0][1:])
    mean, error = np.mean(shrunk, 0), np.std(shrunk, 0) / 12**0.5
    assert (abs(mean - [1, -1]) < 3.5 * error).all()
    assert np.mean(plain, 0)[1] - -1 > 10 * error[1]


def test_names_levels_products_and_nested_factors(table):
    data = encoded(table, "within(x | g) * s + between(factor(s) | g) + between(x | g/h)")
    assert data.feature_names == (
        "within(x | g)",
        "s[T.m]",
        "between(s[T.m] | g)",
        "between(x | g)",
        "between(x | g:h)",
        "within(x | g):s[T.m]",
    )
    product = column(data, "within(x | g)") * column(data, "s[T.m]")
    assert np.allclose(column(data, "within(x | g):s[T.m]"), product)
    assert data.continuous == (True, False, True, True, True, True)
    shares = pd.Series(column(data, "between(s[T.m] | g)")).groupby(table.g).nunique()
    assert (shares == 1).all()
    cells = pd.Series(column(data, "between(x | g:h)")).groupby([table.g, table.h]).nunique()
    assert (cells == 1).all()


def test_within_and_between_sum_to_x(table):
    for features in (BOTH, ["within(x | g)", "between(x|g)", "z"]):
        data = encoded(table, features)
        total = column(data, "within(x | g)") + column(data, "between(x | g)")
        assert np.allclose(total, table.x)
    assert encoded(table, ["within(x | g/h)"]).feature_names == ("within(x | g:h)",)


def test_random_slopes_on_deviations(table):
    data = encoded(table)
    model = MixedEffects(nn.Linear(3, 1), "(1 + within(x | g) | g)").bind(data)
    assert model.factors[0].terms == ("Intercept", "within(x | g)")


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ("within(x | k)", "no grouping factor 'k'"),
        ("between(q | g)", "no column 'q'"),
        ("within(x * 2 | g)", "takes a single column"),
        ("between(log(x) | g)", "takes a single column"),
    ],
)
def test_messages(table, features, message):
    with pytest.raises(ValueError, match=message):
        encoded(table, features)


def test_new_tables_keep_the_means_of_training_and_get_their_own(table):
    data = encoded(table.query("g != 'g0'"))
    rows = table.query("g in ['g0', 'g1']").iloc[:-1].drop(columns="y")
    new = ClusteredData.encode(rows, data.schema)
    between = pd.Series(column(new, "between(x | g)"), rows.g)
    training = pd.Series(column(data, "between(x | g)"), table.query("g != 'g0'").g)
    assert between["g1"].iloc[0] == training["g1"].iloc[0]
    means = data.schema.means["g"]
    expected = means.grand[0] + means.reliability(np.array([5.0]))[0, 0] * (
        table.query("g == 'g0'").x.mean() - means.grand[0]
    )
    assert np.allclose(between["g0"], expected)
    single = ClusteredData.encode(rows.iloc[:1], data.schema)
    share = means.reliability(np.array([1.0]))[0, 0]
    assert 0.3 < share < 0.7
    assert np.isclose(
        column(single, "between(x | g)")[0],
        means.grand[0] + share * (rows.x.iloc[0] - means.grand[0]),
    )


def test_labels_are_matched_by_the_rule_of_all_labels(table):
    numbers = table.assign(g=table.g.str.slice(1).astype(int))
    data = encoded(numbers)
    as_text = numbers.assign(g=numbers.g.map("{}.0".format))
    again = ClusteredData.encode(as_text.query("g in ['3.0', '4.0']"), data.schema)
    kept = np.flatnonzero(numbers.g.isin([3, 4]))
    assert np.allclose(again.features, data.features[kept])


def test_a_schema_survives_json(table):
    data = encoded(table, BOTH + " + between(s | g:h)")
    again = ClusteredData.encode(table, Schema.from_json(data.schema.to_json()))
    assert np.array_equal(again.features, data.features)
    older = encoded(table, "x").schema.to_json()
    del older["means"], older["cluster_columns"]
    assert Schema.from_json(older).columns == ("x",)


def test_frequencies_count_as_rows():
    table = panel(10, 4, 3).assign(n=lambda t: 1 + np.arange(len(t)) % 3)
    repeated = table.loc[table.index.repeat(table.n)].drop(columns="n")
    options = {"outcome": "y", "clusters": ["g"], "features": "between(x | g)"}
    weighted = ClusteredData.from_frame(table, weights="n", **options)
    copies = ClusteredData.from_frame(repeated, **options)
    assert np.allclose(np.repeat(weighted.features, table.n, axis=0), copies.features)


def test_a_fit_takes_means_of_its_training_rows_only(table):
    data = encoded(table)
    training, held_out = data.split_rows(0.3, seed=0)
    own = with_own_means(training)
    assert not np.allclose(own.features, training.features)
    direct = encoded(table.loc[training.row_labels])
    assert np.allclose(own.features, direct.features)
    result = fit(linear(training), training, progress=False)
    assert np.allclose(result.data.features, direct.features)
    made = result.predict(held_out).expected
    rows = table.loc[held_out.row_labels]
    assert np.array_equal(made, result.predict(rows).expected)
    again = encoded_by(held_out, own.schema)
    assert set(column(again, "between(x | g)")) <= set(column(own, "between(x | g)"))


def test_a_fit_is_saved_with_its_means(table, fitted, tmp_path):
    fitted.save(tmp_path / "run")
    again = Fit.load(tmp_path / "run", nn.Linear(3, 1))
    options = {"unseen": "marginal", "draws": 50}
    expected = fitted.predict(table, **options).expected
    assert np.array_equal(again.predict(table, **options).expected, expected)
    assert np.array_equal(again.data.features, fitted.data.features)


def test_blocks_of_a_table_have_the_means_of_the_whole_table(table, fitted, tmp_path, monkeypatch):
    rows = table.sample(frac=1, random_state=0).drop(columns="y")
    rows.to_parquet(tmp_path / "rows.parquet", index=False)
    monkeypatch.setattr("armed_pyro.prediction.predict.BLOCK_VALUES", 7 * 50 * 2)
    monkeypatch.setattr("armed_pyro.prediction.predict.EVIDENCE_ROWS", 30)
    options = {"unseen": "marginal", "draws": 50}
    blocks, _ = predict_table(
        fitted.posterior, TableBlocks.open(tmp_path / "rows.parquet"), **options
    )
    parts = [part.expected for part in blocks]
    assert len(parts) > 3
    expected = fitted.predict(rows, **options).expected
    assert np.allclose(np.concatenate(parts, 1), expected, atol=1e-6)


def test_streamed_rows_are_those_in_memory(table, tmp_path):
    table.to_parquet(tmp_path / "rows.parquet", index=False)
    features = BOTH + " + between(s | g)"
    options = {"outcome": "y", "clusters": ["g"], "features": features}
    streamed = StreamedData.scan(tmp_path / "rows.parquet", **options)
    held = ClusteredData.from_frame(table, **options)
    assert streamed.feature_names == held.feature_names
    with streamed.encoded(("g",), 0) as rows:
        sample = rows.sample("g")
    order = np.argsort(sample.row_labels)
    assert np.allclose(sample.features[order], held.features)


def test_streamed_blocks_are_added(table, tmp_path, monkeypatch):
    monkeypatch.setattr("armed_pyro.streaming.scan.BLOCK_ROWS", 33)
    test_streamed_rows_are_those_in_memory(table, tmp_path)


def test_adapted_clusters_keep_the_means_of_their_support(table, fitted):
    new = table.query("g == 'g0'")
    adapted = fitted.adapt(new.iloc[:2])
    data = fitted.posterior.encode(new.iloc[2:], adapted.support)
    support_mean = column(adapted.support, "between(x | g)")[0]
    assert (column(data, "between(x | g)") == support_mean).all()
    more = adapted.adapt(new.iloc[2:4])
    at_once = fitted.adapt(new.iloc[:4])
    assert np.allclose(more.support.features, at_once.support.features)
    made = more.predict(new.iloc[4:]).expected
    assert np.allclose(made, at_once.predict(new.iloc[4:]).expected)
    direct = fitted.predict(new.iloc[4:], unseen="adapt", support=new.iloc[:4]).expected
    assert np.allclose(direct, made)


def test_command_line(table, tmp_path: Path):
    table.query("g not in ['g0', 'g1']").to_csv(tmp_path / "train.csv", index=False)
    table.drop(columns="y").to_csv(tmp_path / "new.csv", index=False)
    run = str(tmp_path / "run")
    features = "within(x | g), between(x | h), z"
    settings = ["--outcome", "y", "--random", "(1 | g)", "--features", features, "--out", run]
    assert command(["fit", str(tmp_path / "train.csv"), *settings]).exit_code == 0
    made = ["--unseen", "marginal", "--out", str(tmp_path / "made.csv")]
    assert command(["predict", run, str(tmp_path / "new.csv"), *made]).exit_code == 0
    predicted = pd.read_csv(tmp_path / "made.csv")
    loaded = Fit.load(run)
    assert loaded.data.feature_names == ("within(x | g)", "between(x | h)", "z")
    expected = loaded.predict(pd.read_csv(tmp_path / "new.csv"), unseen="marginal")
    assert np.allclose(predicted["mean"], expected.to_frame()["mean"], rtol=1e-4)
