"""The analysis of unseen clusters runs, and its summary says what its rows say."""

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("statsmodels")

from armed_pyro.analysis.validation import unseen_clusters
from armed_pyro.analysis.validation.new_clusters import KS, Simulation, coverage_rows


def test_the_smoke_run_writes_the_table_and_figures(tmp_path):
    unseen_clusters.main(["--smoke", "--parts", "4", "--out", str(tmp_path)])
    table = pd.read_csv(tmp_path / "unseen_clusters.csv")
    modes = ["conventional", "population", "marginal", "membership", "membership by row", "nearest"]
    assert list(table["mode"]) == modes
    assert table["accuracy"].between(0, 1).all()
    assert table["gain"][0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "part_4.csv", "unseen_clusters.csv", "spirals.png"
    }  # fmt: skip


def test_the_claim_needs_two_standard_errors():
    records = pd.DataFrame(
        {
            "part": "4 spirals",
            "case": "c",
            "mode": np.repeat(["conventional", "marginal", "membership"], 4),
            "seed": [0, 1, 2, 3] * 3,
            "radius": np.tile([0.5, 1.0, 1.5, 2.0], 3),
            "accuracy": [0.7, 0.7, 0.7, 0.7, 0.6, 0.9, 0.7, 0.7, 0.8, 0.81, 0.79, 0.8],
        }
    )
    table = unseen_clusters.summarise(records).set_index("mode")
    assert table.loc["membership", "gain"] == pytest.approx(0.1)
    assert table.loc["membership", "better_than_conventional"] == "holds"
    assert table.loc["marginal", "better_than_conventional"] == "does not hold"


def test_simulated_clusters_are_what_they_say():
    case = Simulation("gaussian", False, 0, seen=10, unseen=200, rows=20, steps=20)
    train, new, mu = case.data()
    assert (train.n_rows, new.n_rows) == (200, 200 * (KS[-1] + 10))
    residual = new.outcome.numpy() - mu
    assert residual.std() == pytest.approx(1.0, rel=0.03)
    rows = list(coverage_rows(case, 50))
    assert [row["mode"] for row in rows] == ["population", "marginal"]
    assert rows[0]["coverage_mean"] < rows[1]["coverage_mean"]
