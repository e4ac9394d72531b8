"""DuckDB as a fit uses it: it spills, and leaves nothing behind."""

from armed_pyro.streaming.database import database


def test_a_sort_spills_to_a_folder_that_is_removed(tmp_path):
    with database(10**6, tmp_path) as connection:
        connection.execute("CREATE TABLE t AS SELECT hash(range) AS x FROM range(9000000)")
        connection.execute("SELECT count(*) FROM (SELECT x FROM t ORDER BY x OFFSET 1)")
        assert any(path.is_file() for path in tmp_path.rglob("*"))
    assert list(tmp_path.iterdir()) == []
