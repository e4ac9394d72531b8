"""Files of encoded rows: DuckDB sorts them, shuffles them uniformly, and leaves nothing behind."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy import stats

from armed_pyro.streaming.row_file import Layout, database, put_in_order

LAYOUT = Layout(2, ("y", "weights"), ("site", "dose"))
MEMORY = 10**6


def written(folder, n, seed=0):
    rng = np.random.default_rng(seed)
    columns = {
        "x0": rng.normal(size=n),
        "x1": rng.normal(size=n),
        "y": np.arange(n, dtype=float),
        "weights": rng.random(n),
        "cluster0": rng.integers(7, size=n),
        "cluster1": rng.integers(2**31 - 1, size=n),
        "row": np.arange(n),
        "key": rng.integers(2**63, size=n),
    }
    table = pa.table({name: pa.array(one) for name, one in columns.items()})
    pq.write_table(table.cast(LAYOUT.schema), folder / "rows.parquet", row_group_size=1000)
    return columns


def test_columns_become_the_rows_they_were_made_of(tmp_path):
    columns = written(tmp_path, 20)
    counts = {name: torch.ones(1) for name in LAYOUT.factors}
    like, scaling = torch.zeros(0, dtype=torch.float64), (np.array([1.0, 2.0]), np.array([0.0, 3]))
    rows = LAYOUT.held(pq.read_table(tmp_path / "rows.parquet"), counts, like, scaling)
    assert rows.x.dtype == torch.float64
    np.testing.assert_allclose(rows.x[:, 0], columns["x0"], rtol=1e-6)
    np.testing.assert_allclose(rows.x[:, 1], 2 * columns["x1"] + 3, rtol=1e-6)
    np.testing.assert_allclose(rows.y, columns["y"])
    np.testing.assert_allclose(rows.weights, columns["weights"])
    assert rows.trials is None
    assert rows.offset is None
    for place, name in enumerate(LAYOUT.factors):  # codes beyond what single precision holds, too
        assert np.array_equal(rows.codes[name].numpy(), columns[f"cluster{place}"])


def test_rows_are_sorted_by_the_rank_of_their_cluster_and_then_as_they_were(tmp_path):
    columns = written(tmp_path, 70_000)
    ranks = np.array([3, 0, 6, 1, 2, 5, 4])
    source, target = tmp_path / "rows.parquet", tmp_path / "sorted.parquet"
    put_in_order(source, target, LAYOUT, MEMORY, factor="site", ranks=ranks)
    found = pq.read_table(target)
    assert found.column_names == LAYOUT.schema.names[:-2]
    order = np.argsort(ranks[columns["cluster0"]], kind="stable")
    for name in found.column_names:
        wanted = columns[name][order].astype(LAYOUT.schema.field(name).type.to_pandas_dtype())
        assert np.array_equal(found[name].to_numpy(), wanted)
    assert pq.read_metadata(target).row_group(0).num_rows == LAYOUT.group_rows
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.parquet", "sorted.parquet"]


def mixed_means(values):
    """Means of stretches of 100 values, in units of what a random order would give them."""
    n = len(values)
    spread = np.sqrt((n**2 - 1) / 12 / 100 * (1 - 100 / n))
    return (values.reshape(-1, 100).mean(1) - (n - 1) / 2) / spread


def test_a_shuffle_mixes_rows_that_were_far_apart(tmp_path):
    n = 6000
    written(tmp_path, n)
    put_in_order(tmp_path / "rows.parquet", tmp_path / "mixed.parquet", LAYOUT, MEMORY)
    found = pq.read_table(tmp_path / "mixed.parquet")["y"].to_numpy()
    assert np.array_equal(np.sort(found), np.arange(n))
    # Of a random order neither neighbours nor place and value are correlated.
    for one, other in [(found[1:], found[:-1]), (found, np.arange(n))]:
        assert abs(np.corrcoef(one, other)[0, 1]) * np.sqrt(n) < 4
    assert stats.kstest(mixed_means(found), "norm").pvalue > 0.001
    in_order = np.random.default_rng(0).permuted(np.arange(n).reshape(6, 1000), axis=1).ravel()
    assert stats.kstest(mixed_means(in_order), "norm").pvalue < 1e-6  # so this can fail


@pytest.mark.parametrize("name", ["rows[1]*.parquet", "it's ?.parquet"])
def test_odd_characters_in_paths_are_no_patterns(name, tmp_path):
    written(tmp_path, 10)
    (tmp_path / "rows.parquet").rename(tmp_path / name)
    put_in_order(tmp_path / name, tmp_path / f"new {name}", LAYOUT, MEMORY)
    assert pq.read_metadata(tmp_path / f"new {name}").num_rows == 10


def test_a_sort_spills_to_a_folder_that_is_removed(tmp_path):
    with database(MEMORY, tmp_path) as connection:
        connection.execute("CREATE TABLE t AS SELECT hash(range) AS x FROM range(9000000)")
        connection.execute("SELECT count(*) FROM (SELECT x FROM t ORDER BY x OFFSET 1)")
        spilled = list(tmp_path.rglob("*"))
        assert len(spilled) > 1
    assert list(tmp_path.iterdir()) == []
