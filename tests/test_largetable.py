"""The table larger than memory, and fits of some of its rows in two ways."""

import numpy as np
import pandas as pd
import pytest

from armed_pyro.analysis.benchmarks import large_table


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("large") / "rows.parquet"
    large_table.write(path, 8000, 160, features=3, seed=1)
    return path


def test_the_same_seed_gives_the_same_rows_in_random_order(path, tmp_path):
    options = ["--rows", "8000", "--clusters", "160", "--features", "3", "--seed", "1"]
    large_table.main([*options, "--out", str(tmp_path / "again.parquet")])
    frame = pd.read_parquet(path)
    assert frame.equals(pd.read_parquet(tmp_path / "again.parquet"))
    assert list(frame) == ["y", "g", "x0", "x1", "x2"]
    assert abs(np.corrcoef(frame.g[1:], frame.g[:-1])[0, 1]) < 0.05


def test_streamed_and_in_memory_only_monte_carlo_error_tells_fits_apart(path, monkeypatch):
    monkeypatch.setattr(large_table, "SORTED_AT_ONCE", 100_000)  # many files
    monkeypatch.setattr("armed_pyro.streaming.scan.BLOCK_ROWS", 500)
    monkeypatch.setattr("armed_pyro.inference.importance_sampling.MOST_AT_ONCE", 1000)
    monkeypatch.setattr("armed_pyro.inference.importance_sampling.MOST_DRAWS", 1000)
    monkeypatch.setattr("armed_pyro.inference.importance_sampling.PIECE", 1000 * 1000)
    table = large_table.agreement(path, 100).set_index("quantity")
    assert {"g_sd[0]", "g_sd[1]", "residual_sd[0]", "fixed_effect[3]"} <= set(table.index)
    single = table.drop(index="effects")
    assert (single.z.abs() < 4).all()
    # Both fits weigh the same draws of theta by sums of the rows, so a part of the error is common.
    assert 0.2 < table.z["effects"] < 1.4
    assert list(path.parent.iterdir()) == [path]
