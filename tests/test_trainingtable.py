"""Which tables the command line streams."""

import pandas as pd
import pytest

from armed_pyro import ClusteredData
from armed_pyro.cli.fit import byte_size, bytes_needed, outputs, training_rows
from armed_pyro.families.registry import family_named
from armed_pyro.streaming.parquet_table import TableBlocks
from armed_pyro.streaming.streamed_data import StreamedData

ROLES = {"outcome": "y", "clusters": ["g"]}


def write(folder, suffix=".parquet"):
    frame = pd.DataFrame({"y": [0.0, 1, 2, 4], "x": [1.0, 3, 2, 0], "g": [0, 0, 1, 1]})
    path = folder / f"rows{suffix}"
    frame.to_parquet(path) if suffix == ".parquet" else frame.to_csv(path, index=False)
    return path


def test_a_parquet_table_is_streamed_where_memory_is_too_small(tmp_path):
    table = TableBlocks.open(write(tmp_path))
    assert table.columns == ("y", "x", "g")
    rows = training_rows(table, 1000, tmp_path / "new", **ROLES)
    assert isinstance(rows, StreamedData)
    assert rows.memory == 1000
    assert isinstance(training_rows(table, 10**10, tmp_path, **ROLES), ClusteredData)
    assert bytes_needed(table) == 500_000_000 + 64 * 4 * 3


def test_csv_is_never_streamed(tmp_path):
    table = TableBlocks.open(write(tmp_path, ".csv"))
    assert isinstance(training_rows(table, 1000, tmp_path, **ROLES), ClusteredData)


@pytest.mark.parametrize(
    ("text", "size"), [("2GB", 2 * 10**9), ("500 mb", 5 * 10**8), ("1.5g", 15 * 10**8), ("7", 7)]
)
def test_sizes(text, size):
    assert byte_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "0GB", "-1GB", "2 gigs", "1.2.3GB"])
def test_no_sizes(text):
    with pytest.raises(ValueError, match="expected a size such as 2GB"):
        byte_size(text)


def test_outputs_of_a_categorical_outcome(tmp_path):
    frame = pd.DataFrame({"y": [0.0, 1, 2, 2], "x": [1.0, 3, 2, 0], "g": [0, 0, 1, 1]})
    family = family_named("categorical")
    assert outputs(ClusteredData.from_frame(frame, **ROLES), family) == 3
    for name, one in {"numbers": frame, "text": frame.assign(y=list("abcc"))}.items():
        one.to_parquet(tmp_path / f"{name}.parquet")
    with pytest.raises(ValueError, match="must be text or categories"):
        outputs(StreamedData.scan(tmp_path / "numbers.parquet", **ROLES), family)
    text = StreamedData.scan(tmp_path / "text.parquet", **ROLES)
    assert outputs(text, family) == 3
    assert outputs(text, family_named("gaussian")) == 1
