"""A first pass over a table in blocks tells what one over the whole table does."""

import numpy as np
import pandas as pd
import pytest
import torch

from armed_pyro import ClusteredData
from armed_pyro.streaming.parquet_table import TableBlocks
from armed_pyro.streaming.scan import complete_blocks, scan

ROLES = {"outcome": "y", "clusters": ["site", "ward"], "features": "age * sex + flag"}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr("armed_pyro.streaming.scan.BLOCK_ROWS", 7)


def table(n=100):
    rng = np.random.default_rng(3)
    return pd.DataFrame(
        {
            "y": rng.normal(size=n),
            "site": rng.integers(5, 12, size=n),
            "ward": np.array(["z", "a", "m"])[np.arange(n) * 3 // n],  # by turns, in file order
            "age": rng.normal(size=n),
            "sex": np.where(np.arange(n) < 80, "m", "f"),  # one level for many blocks
            "flag": (np.arange(n) > 50).astype(int),
        }
    )


def scanned(frame, folder, **options):
    frame.to_parquet(folder / "rows.parquet")
    table = TableBlocks.open(folder / "rows.parquet")
    return scan(table, memory=10**8, folder=folder, **{**ROLES, **options})


def test_schema_levels_and_counts_are_those_of_the_table_in_memory(tmp_path):
    frame = table()
    found, data = scanned(frame, tmp_path), ClusteredData.from_frame(frame, **ROLES)
    assert found.schema.to_json() == data.schema.to_json()
    assert found.schema.indicators == ("flag",)
    assert found.n_rows == 100
    for name, grouping in data.groupings.items():
        assert found.levels[name].equals(grouping.levels)
        assert torch.equal(found.counts[name], grouping.counts)


def test_a_classified_outcome_has_the_classes_of_all_blocks(tmp_path):
    frame = table().assign(y=np.where(np.arange(100) < 90, "no", "yes"))
    assert scanned(frame, tmp_path).schema.classes.tolist() == ["no", "yes"]


@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, r"Missing values in 'age', first in row 73 of .*rows\.parquet"),
                           (np.inf, r"Infinite values in 'age', first in row 73")],
)  # fmt: skip
def test_bad_values_are_told_by_the_row_of_the_file(value, message, tmp_path):
    frame = table()
    frame.loc[[73, 90], "age"] = value
    with pytest.raises(ValueError, match=message):
        scanned(frame, tmp_path)


def test_rows_with_missing_values_are_dropped_with_a_warning(tmp_path):
    frame = table()
    frame.loc[[7, 8, 9, 10, 11, 12, 13, 99], "age"] = np.nan  # a whole block, and a last row
    with pytest.warns(UserWarning, match="Dropped 8 of 100 rows"):
        found = scanned(frame, tmp_path, missing="drop")
    assert found.n_rows == 92
    kept = frame.dropna()
    assert found.counts["site"].tolist() == kept.site.value_counts().sort_index().tolist()
    path = TableBlocks.open(tmp_path / "rows.parquet")
    blocks = list(complete_blocks(path, ["age", "y"]))
    assert np.array_equal(np.concatenate([one.index for one in blocks]), kept.index)


def test_a_column_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="There is no column 'agee'"):
        scanned(table(), tmp_path, features="agee")


def test_a_feature_with_a_single_level_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="'sex' has a single level"):
        scanned(table().assign(sex="m"), tmp_path)
