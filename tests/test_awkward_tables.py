"""Tables on which other readers stumble: nothing is merged, and errors come before training."""

import gzip
import json
import warnings

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from armed_pyro import ClusteredData, MixedEffects, Schedule, fit
from armed_pyro.data.files import read_table
from armed_pyro.data.xarray_names import variable_name
from armed_pyro.networks.by_name import network
from armed_pyro.streaming.parquet_table import TableBlocks


def frame(rows=12, **columns):
    rng = np.random.default_rng(0)
    made = {"y": rng.normal(size=rows), "x": rng.normal(size=rows), "site": ["a", "b", "c"] * 4}
    return pd.DataFrame(made | columns)


def write(path, labels):
    lines = [f"{k / 7:.3f},{k % 5},{label}" for k, label in enumerate(labels)]
    path.write_text("\n".join(["y,x,site", *lines]) + "\n")
    return path


def levels(path, **options):
    table = read_table(path, labels=["site"])
    data = ClusteredData.from_frame(table, outcome="y", clusters=["site"], **options)
    return data.grouping("site").levels.tolist()


# ----------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    "labels",
    [["0.1", "0.10"], ["007", "7"], ["-0", "0"], ["1e3", "1000"], ["1", "1.0"], ["+1", "1"]],
)
def test_labels_stay_as_they_are_written(tmp_path, labels):
    path = write(tmp_path / "t.csv", labels * 4)
    assert levels(path) == sorted(labels)


def test_labels_that_are_plain_whole_numbers_are_numbers(tmp_path):
    assert levels(write(tmp_path / "t.csv", ["10", "9", "-3", "0"] * 3)) == [-3, 0, 9, 10]


def test_clusters_of_a_file_are_the_same_at_prediction(tmp_path):
    """A new file with one word among the labels has the same clusters as before."""
    table = read_table(write(tmp_path / "t.csv", ["001", "002", "003"] * 4), labels=["site"])
    data = ClusteredData.from_frame(table, outcome="y", clusters=["site"])
    new = read_table(write(tmp_path / "n.csv", ["002", "K", "001"]), labels=["site"])
    assert new["site"].tolist() == ["002", "K", "001"]
    model = MixedEffects(network("linear", 1), "(1 | site)", bayesian_head=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        result = fit(model, data, schedule=Schedule(steps=5), progress=False)
        unseen = result.predict(new, unseen="population", draws=5).to_frame()["unseen"]
    assert unseen.tolist() == ["", "population", ""]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_large_whole_numbers_beside_a_blank_stay_apart(tmp_path, kind):
    ids = [2**53, 2**53 + 1, 2**53 + 2]
    path = tmp_path / f"t.{kind}"
    if kind == "csv":
        write(path, [*(str(value) for value in ids * 4), ""])
    else:
        n = 3 * 4 + 1
        columns = {"y": np.arange(n) / 7, "x": np.arange(n) % 5.0}
        pq.write_table(pa.table({**columns, "site": pa.array([*ids * 4, None], pa.int64())}), path)
    for table in (read_table(path), read_table(path, labels=["site"])):
        with pytest.warns(UserWarning, match="Dropped 1 of 13 rows"):
            data = ClusteredData.from_frame(table, outcome="y", clusters=["site"], missing="drop")
        assert data.grouping("site").levels.tolist() == ids
    blocks = TableBlocks.open(path).blocks(5)
    assert pd.concat(blocks)["site"].dropna().unique().tolist() == ids


def test_floats_that_cannot_be_exact_labels_are_an_error():
    with pytest.raises(ValueError, match=r"column 'site' has floating-point .* 2\^53"):
        ClusteredData.from_frame(
            frame(site=[2.0**53, 2.0**53 + 2, 1.0] * 4), outcome="y", clusters=["site"]
        )


def test_fractions_as_labels_are_said_aloud():
    with pytest.warns(UserWarning, match=r"'site' are floating-point numbers such as 0\.1"):
        ClusteredData.from_frame(frame(site=[0.1, 0.2, 1.0] * 4), outcome="y", clusters=["site"])


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("a\0b", "cluster column 'site' cannot serve.*NUL"),
        (2**70, "cluster column 'site' cannot serve.*64 bits"),
        ("\ud800", "column 'site' has text that is not valid Unicode"),
        (object(), "cluster column 'site' cannot serve.*object"),
    ],
)
def test_labels_that_files_cannot_hold(label, message):
    with pytest.raises(ValueError, match=message):
        ClusteredData.from_frame(
            frame(site=pd.Series([label, "b", "c"] * 4, dtype=object)),
            outcome="y",
            clusters=["site"],
        )


@pytest.mark.parametrize(("label", "message"), [("a\0b", "NUL"), ("\ud800", "surrogates")])
def test_labels_of_rows_that_files_cannot_hold(label, message):
    data = ClusteredData.from_frame(
        frame().set_axis([label, *range(11)]), outcome="y", clusters=["site"]
    )
    with pytest.raises(ValueError, match=f"labels of rows cannot be saved.*{message}"):
        data.check_training()


def test_names_that_files_cannot_hold():
    table = frame().set_axis(pd.Index(["y", "\ud800", "site"], dtype=object), axis=1)
    with pytest.raises(ValueError, match="names must be valid Unicode"):
        ClusteredData.from_frame(table, outcome="y", clusters=["site"])
    table = frame().rename(columns={"x": "a\0b"})
    data = ClusteredData.from_frame(table, outcome="y", clusters=["site"])
    with pytest.raises(ValueError, match=r"names of columns cannot be saved.*NUL"):
        data.check_training()


def test_names_of_paths_are_names():
    assert [variable_name(name) for name in (".", "..", "a.b", "/")] == ["_.", "_..", "a.b", "_"]


# ---------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"x": np.r_[1e200, np.ones(11)]}, r"column 'x' \(features\) has numbers up to 1e\+200"),
        ({"x": np.arange(12) * 1e-150}, r"column 'x' \(features\) has numbers up to 1.1e-149"),
        ({"y": np.r_[-1e300, np.ones(11)]}, r"column 'y' \(outcome\) has numbers up to 1e\+300"),
    ],
)
def test_numbers_too_large_or_small_are_named_before_training(columns, message):
    with pytest.raises(ValueError, match=message):
        ClusteredData.from_frame(frame(**columns), outcome="y", clusters=["site"]).check_training()


def test_text_that_would_fill_the_memory_is_no_feature():
    many = 12_000
    table = pd.DataFrame({"y": np.arange(many) / 7, "site": ["a", "b"] * (many // 2)})
    table["who"] = [f"person {k}" for k in range(many)]
    with pytest.raises(ValueError, match=r"'who' has 12000 levels, which would be .* 1\.2 GB"):
        ClusteredData.from_frame(table, outcome="y", clusters=["site"], features=["who"])


def test_weights_of_zero_leave_nothing_to_train_on():
    data = ClusteredData.from_frame(frame(w=0.0), outcome="y", clusters=["site"], weights="w")
    with pytest.raises(ValueError, match="all weights are 0"):
        MixedEffects(torch.nn.Linear(1, 1), "(1 | site)").bind(data)


def test_an_impossible_offset_is_named_before_training():
    table = frame(y=["u", "v", "w"] * 4, o=np.r_[1e11, np.zeros(11)])
    data = ClusteredData.from_frame(table, outcome="y", clusters=["site"], offset="o")
    with pytest.raises(ValueError, match=r"offset 'o' goes up to 1e\+11 in size"):
        MixedEffects(torch.nn.Linear(1, 3), "(1 | site)", "categorical").bind(data)


# ------------------------------------------------------------------------------------------ files


def test_bare_carriage_returns_end_lines(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b"y,site\r1,a\r2,b\r")
    assert read_table(path).to_dict("list") == {"y": [1, 2], "site": ["a", "b"]}


def damaged_gzip():
    content = bytearray(gzip.compress(b"a,b\n" + b"1,2\n" * 5000, mtime=0))
    content[30] ^= 255
    return bytes(content)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"y,site\n1,a\0b\n2,a\n", "is not text: byte 10 is 0"),
        ("t.csv", "y,site\n1,a\n".encode("utf-16"), "is not UTF-8"),
        ("t.csv.gz", damaged_gzip(), "is not a whole gzip file"),
        ("t.csv", b'y,site\n1,"a\n', "is not a comma-separated table"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} {message}"):
        read_table(tmp_path / name)


@pytest.mark.parametrize("notes", [b"{", b"[]", b'{"columns": 3, "index_columns": ["no"]}'])
def test_damaged_notes_for_pandas_do_not_matter(tmp_path, notes):
    table = pa.table({"y": [1.0, 2.0], "site": ["a", "b"]})
    path = tmp_path / "t.parquet"
    pq.write_table(table.replace_schema_metadata({b"pandas": notes}), path)
    expected = {"y": [1.0, 2.0], "site": ["a", "b"]}
    assert read_table(path).to_dict("list") == expected
    assert next(TableBlocks.open(path).blocks(10)).to_dict("list") == expected


@pytest.mark.parametrize("values", [["a", "b", "a"], [3, 1, 3], [True, False, True]])
def test_dictionary_columns_are_what_they_hold(tmp_path, values):
    path = tmp_path / "t.parquet"
    site = pa.array(values * 4).dictionary_encode()
    pq.write_table(pa.table({"y": np.arange(12.0), "site": site}), path)
    whole = read_table(path)
    data = ClusteredData.from_frame(whole, outcome="y", clusters=["site"], features=[])
    model = MixedEffects(network("linear", 0), "(1 | site)", bayesian_head=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        result = fit(model, data, schedule=Schedule(steps=5), progress=False)
    new = pd.concat(TableBlocks.open(path).blocks(5))
    predicted = result.predict(new.drop(columns="y"), draws=5).to_frame()
    assert predicted["unseen"].tolist() == [""] * 12
    json.dumps(result.model.data_facts().to_json())
