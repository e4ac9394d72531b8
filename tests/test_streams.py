"""Tables predicted block by block, and the command that does it."""

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from armed_pyro import ClusteredData, Fit, MixedEffects, Schedule, fit
from armed_pyro.cli import app
from armed_pyro.models.linear import linear
from armed_pyro.prediction.predict import predict_table
from armed_pyro.prediction.unseen import MODES
from armed_pyro.streaming.parquet_table import TableBlocks

SHORT = Schedule(steps=20, window=10, stages=0)


def table(n=400, sites=8, first=0, seed=0):
    rng = np.random.default_rng(seed)
    site = rng.integers(first, first + sites, n)
    site[:sites] = np.arange(first, first + sites)
    effect = np.random.default_rng(9).normal(size=100)
    x = rng.normal(size=n) + effect[site]
    y = x + effect[site] + 0.5 * rng.normal(size=n)
    return pd.DataFrame({"x": x, "z": rng.normal(size=n), "site": [f"s{k}" for k in site],
                         "arm": site % 2, "y": y})  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    data = ClusteredData.from_frame(
        table(), outcome="y", clusters=["site", "arm"], features=["x", "z"]
    )
    model = MixedEffects(linear(2), "(1 + x | arm/site)", bayesian_head=True)
    result = fit(model, data, schedule=SHORT, refine=False, progress=False)
    result.classifier("arm:site")
    folder = tmp_path_factory.mktemp("fit") / "run"
    result.save(folder, draws=20)
    return folder


@pytest.fixture(scope="module")
def rows():
    """Half of the clusters are new, and the rows are in no order."""
    return table(300, sites=8, first=4, seed=2).drop(columns="y")


def call(*arguments):
    return CliRunner().invoke(app, [str(one) for one in arguments])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_blocks_give_what_the_whole_table_gives(run, rows, tmp_path, monkeypatch, mode, suffix):
    result = Fit.load(run)
    support = table(40, sites=3, first=8, seed=5) if mode == "adapt" else None
    whole = result.predict(rows, unseen=mode, support=support, draws=40)
    path = tmp_path / f"rows{suffix}"
    rows.to_csv(path, index=False) if suffix == ".csv" else rows.to_parquet(path)
    monkeypatch.setattr("armed_pyro.prediction.predict.BLOCK_VALUES", 40 * 5 * 37)
    monkeypatch.setattr("armed_pyro.prediction.predict.EVIDENCE_ROWS", 50)
    opened = TableBlocks.open(path)
    told = []
    parts, membership = predict_table(
        result.posterior, opened, unseen=mode, support=support, draws=40,
        report=lambda *one: told.append(one),
    )  # fmt: skip
    parts = list(parts)
    assert len(parts) == 9
    expected = np.concatenate([part.expected for part in parts], 1)
    np.testing.assert_allclose(expected, whole.expected, rtol=1e-4, atol=1e-5)
    assert list(np.concatenate([part.unseen for part in parts])) == list(whole.unseen)
    assert told[0] == ("listing clusters", 300, 300)
    if mode in ("membership", "nearest"):
        key = membership.columns.drop(["entropy", "distance", "p_value", "probability"])
        left = membership.sort_values("cluster", ignore_index=True)[key]
        right = whole.membership.sort_values("cluster", ignore_index=True)[key]
        pd.testing.assert_frame_equal(left, right)
        assert told[-1] == ("comparing clusters", 300, 300)


def test_row_by_row_membership_in_blocks(run, rows, tmp_path, monkeypatch):
    result = Fit.load(run)
    whole = result.predict(rows, unseen="membership", pooled=False, draws=10)
    rows.to_parquet(tmp_path / "rows.parquet")
    monkeypatch.setattr("armed_pyro.prediction.predict.BLOCK_VALUES", 10 * 5 * 41)
    opened = TableBlocks.open(tmp_path / "rows.parquet")
    parts, _ = predict_table(result.posterior, opened, unseen="membership", pooled=False, draws=10)
    expected = np.concatenate([part.expected for part in parts], 1)
    np.testing.assert_allclose(expected, whole.expected, rtol=1e-4, atol=1e-5)


def test_the_command_predicts_with_support(run, rows, tmp_path):
    rows.to_parquet(tmp_path / "rows.parquet")
    table(40, sites=3, first=8, seed=5).to_csv(tmp_path / "first.csv", index=False)
    pred = tmp_path / "pred.parquet"
    done = call("predict", run, tmp_path / "rows.parquet", "--unseen", "adapt", "--support",
                tmp_path / "first.csv", "--draws", 30, "--out", pred)  # fmt: skip
    assert done.exit_code == 0, done.output
    found = pd.read_parquet(pred)
    new = rows.site.str[1:].astype(int) >= 8
    labelled = rows.site.isin(["s8", "s9", "s10"])
    assert (found.unseen == np.where(labelled, "adapt", np.where(new, "marginal", ""))).all()


def test_the_command_reports_membership_and_compares_modes(run, tmp_path):
    known = table(300, sites=8, first=4, seed=2)
    known.to_csv(tmp_path / "rows.csv", index=False)
    pred = tmp_path / "pred.csv"
    done = call("predict", run, tmp_path / "rows.csv", "--unseen", "membership", "--compare",
                "--draws", 30, "--out", pred)  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "calibration error" in done.stdout
    modes = pd.read_csv(tmp_path / "pred.csv.modes.csv")
    assert list(modes["mode"])[:3] == ["population", "marginal", "membership"]
    membership = pd.read_csv(tmp_path / "pred.csv.membership.csv")
    assert set(membership["factor"]) == {"arm:site"}
    assert sorted(membership["cluster"]) == ["0:s10", "0:s8", "1:s11", "1:s9"]
    assert {p.name for p in tmp_path.iterdir()} == {
        "rows.csv", "pred.csv", "pred.csv.modes.csv", "pred.csv.membership.csv"
    }  # fmt: skip


def test_errors_leave_nothing_behind(run, rows, tmp_path):
    rows.to_parquet(tmp_path / "rows.parquet")
    first = table(40, sites=3, first=8, seed=5)
    first.drop(columns="y").to_csv(tmp_path / "blind.csv", index=False)
    first.assign(site="s99").to_csv(tmp_path / "other.csv", index=False)
    table(40, sites=3, first=1).to_csv(tmp_path / "seen.csv", index=False)
    before = {path.name for path in tmp_path.iterdir()}
    command = ["predict", run, tmp_path / "rows.parquet", "--out", tmp_path / "deep" / "pred.csv"]
    for more, message in [
        ([], "not seen in training"),
        (["--unseen", "adapt"], "--support FILE"),
        (["--unseen", "marginal", "--support", tmp_path / "other.csv"], "used by the mode 'adapt'"),
        (["--unseen", "adapt", "--support", tmp_path / "blind.csv"], "no outcome 'y'"),
        (["--unseen", "adapt", "--support", tmp_path / "other.csv"], "not in the data to predict"),
        (["--unseen", "adapt", "--support", tmp_path / "seen.csv"], "training saw"),
        (["--unseen", "marginal", "--by-row"], "--by-row is for"),
        (["--unseen", "marginal", "--compare"], "rows have no 'y'"),
    ]:
        done = call(*command, *more)
        assert done.exit_code == 2, (more, done.output)
        assert message in done.stderr, (more, done.stderr)
        assert "Traceback" not in done.output
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_bad_row_late_in_the_table_leaves_no_file(run, rows, tmp_path, monkeypatch):
    rows.assign(x=rows.x.where(rows.index < 250)).to_parquet(tmp_path / "rows.parquet")
    monkeypatch.setattr("armed_pyro.prediction.predict.BLOCK_VALUES", 20 * 5 * 37)
    done = call("predict", run, tmp_path / "rows.parquet", "--unseen", "marginal", "--draws", 20,
                "--out", tmp_path / "pred.parquet")  # fmt: skip
    assert done.exit_code == 2
    assert "Missing values in 'x'" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["rows.parquet"]


def test_a_damaged_parquet_file_is_said(run, tmp_path):
    (tmp_path / "rows.parquet").write_text("no table")
    done = call("predict", run, tmp_path / "rows.parquet", "--out", tmp_path / "pred.csv")
    assert done.exit_code == 2
    assert "not a readable Parquet file" in done.stderr
