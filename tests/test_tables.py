"""Schemas of tables, labels in JSON, and table files."""

import datetime
import gzip
import json
import warnings

import numpy as np
import pandas as pd
import pytest
import torch

from armed_pyro import ClusteredData
from armed_pyro._messages import unknown
from armed_pyro.data.files import as_pandas, read_table, write_table
from armed_pyro.data.formula import parse_features
from armed_pyro.data.grouping import index_from_json, index_to_json
from armed_pyro.data.schema import Schema


def make_frame():
    return pd.DataFrame(
        {
            "y": ["no", "yes", "no", "yes", "yes", "no"],
            "age": [30.0, 41, 52, 63, 74, 85],
            "smoker": [0, 1, 1, 0, 0, 1],
            "sex": pd.Categorical(["m", "f", "m", "f", "m", "f"], categories=["m", "f", "x"]),
            "drug": [True, True, False, False, True, False],
            "site": ["a", "a", "b", "b", "c", "c"],
        }
    )


def infer(frame=None, **options):
    frame = make_frame() if frame is None else frame
    return Schema.infer(frame, **({"outcome": "y", "clusters": ["site"]} | options))


# ------------------------------------------------------------------------------------ schemas


def test_a_schema_survives_json_and_encodes_alike():
    frame = make_frame()
    schema = infer(frame, features="age * sex + drug + smoker")
    stored = json.loads(json.dumps(schema.to_json()))
    loaded = Schema.from_json(stored)
    assert loaded.to_json() == schema.to_json()
    first, second = (
        ClusteredData.encode(frame, s, outcome_required=True) for s in (schema, loaded)
    )
    torch.testing.assert_close(first.features, second.features)
    torch.testing.assert_close(first.outcome, second.outcome)
    assert first.feature_names == second.feature_names
    assert first.classes == second.classes == ("no", "yes")
    assert set(first.feature_names) == {
        "age", "sex[T.f]", "drug[T.True]", "smoker", "age:sex[T.f]",
    }  # fmt: skip


def test_a_new_table_is_encoded_as_the_training_table_was():
    schema = infer()
    whole = ClusteredData.encode(make_frame(), schema)
    part = make_frame().iloc[[4, 0]].astype({"age": int, "sex": "str"})
    part = part[["site", "drug", "sex", "age", "smoker"]].assign(other=1)
    data = ClusteredData.encode(part, schema)
    assert data.outcome is None
    assert data.classes == ("no", "yes")
    assert data.feature_names == whole.feature_names
    assert data.continuous == whole.continuous == (True, False, False, False)
    torch.testing.assert_close(data.features, whole.features[[4, 0]])
    assert data.row_labels.tolist() == [4, 0]
    assert data.groupings["site"].levels.tolist() == ["a", "c"]
    unseen = ClusteredData.encode(part.assign(site="z"), schema)
    assert unseen.groupings["site"].levels.tolist() == ["z"]


def test_indicators_are_remembered():
    data = ClusteredData.encode(make_frame().assign(smoker=0.5), infer())
    assert dict(zip(data.feature_names, data.continuous, strict=True))["smoker"] is False


def test_categories_never_seen_are_listed():
    new = make_frame().astype({"sex": "str"})
    new.loc[[1, 3, 4], "sex"] = ["x", "u", "x"]
    message = (
        "feature 'sex' has categories that training did not: 'x', 'u', in 3 rows. Known: 'm', 'f'"
    )
    with pytest.raises(ValueError, match=message):
        ClusteredData.encode(new, infer())
    with pytest.raises(ValueError, match=r"outcome 'y' has categories .* 'maybe', in 6 rows"):
        ClusteredData.encode(make_frame().assign(y="maybe"), infer())


def test_what_a_new_table_may_lack():
    frame = make_frame().assign(n=2, w=1.0)
    schema = infer(frame, trials="n", weights="w")
    assert ClusteredData.encode(frame.drop(columns=["y", "w"]), schema).weights is None
    assert ClusteredData.encode(frame.assign(y=[None, *frame["y"][1:]]), schema).outcome is None
    for column in ["n", "age", "site"]:
        with pytest.raises(ValueError, match=f"no column '{column}'"):
            ClusteredData.encode(frame.drop(columns=column), schema)
    for column in ["y", "w"]:
        with pytest.raises(ValueError, match=f"no column '{column}'"):
            ClusteredData.encode(frame.drop(columns=column), schema, outcome_required=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"outcome": "Y"}, "There is no column 'Y'"),
        ({"clusters": ["sites"]}, "no column 'sites'. Did you mean 'site'"),
        ({"features": ["age", "smokr"]}, "Did you mean 'smoker'"),
        ({"features": "age + smokr"}, "Did you mean 'smoker'"),
        ({"weights": "aage"}, "Did you mean 'age'"),
        ({"features": ["age", "y"]}, "outcome 'y' is also listed as a feature"),
        ({"features": "age:y"}, "outcome 'y' is also listed as a feature"),
        ({"clusters": ["site", "y"]}, "outcome 'y' is also listed as a cluster"),
    ],
)
def test_bad_roles(options, message):
    with pytest.raises(ValueError, match=message):
        infer(**options)


def test_names_must_come_in_lists():
    with pytest.raises(TypeError, match="clusters must be a list of column names, found 'site'"):
        infer(clusters="site")
    with pytest.raises(TypeError, match="features must be a list of column names"):
        infer(features=[1])


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (["k"] * 6, "Feature 'v' has a single level, 'k', in the 6 rows"),
        (["k"] * 5 + [None], "Feature 'v' has a single level, 'k', in the 5 rows"),
        (pd.date_range("2020-01-01", periods=6), "feature column 'v' holds datetime64.*days since"),
        (np.arange(6) * 1j, "feature column 'v' holds complex128.*expected numbers"),
        ([[1]] * 6, "feature 'v' cannot serve as labels"),
    ],
)
def test_columns_that_cannot_be_features(column, message):
    with pytest.raises(ValueError, match=message):
        infer(make_frame().assign(v=column))


def test_numbers_given_as_objects_are_numbers():
    frame = make_frame()
    frame["age"] = frame["age"].astype(object)
    frame.loc[0, "age"] = None
    with pytest.warns(UserWarning, match="Dropped 1 of 6 rows"):
        data = ClusteredData.encode(frame, infer(frame), missing="drop")
    assert "age" in data.feature_names
    with pytest.raises(ValueError, match=r"feature column 'age' holds .* such as 'old'; expected"):
        ClusteredData.encode(make_frame().assign(age="old"), infer())


def test_nullable_and_arrow_columns():
    frame = make_frame()
    for backend in ["numpy_nullable", "pyarrow"]:
        data = ClusteredData.encode(frame.convert_dtypes(dtype_backend=backend), infer())
        torch.testing.assert_close(data.features, ClusteredData.encode(frame, infer()).features)


def test_missing_values_are_an_error_or_dropped_aloud():
    frame = make_frame()
    frame.loc[[0, 2], "age"] = np.nan
    frame.loc[[2], "site"] = None
    schema = infer(frame)
    message = (
        r"Missing values in 'site' \(1 row\), 'age' \(2 rows\): 2 of 6 rows.*missing='drop'\) "
        r"\(command line: armed-pyro predict --missing empty"
    )
    with pytest.raises(ValueError, match=message):
        ClusteredData.encode(frame, schema)
    with pytest.warns(UserWarning, match=r"Dropped 2 of 6 rows .*'age' \(2 rows\)") as caught:
        data = ClusteredData.encode(frame, schema, missing="drop")
    assert len(caught) == 1
    assert data.row_labels.tolist() == [1, 3, 4, 5]
    with pytest.raises(ValueError, match="missing must be 'error' or 'drop', found 'ignore'"):
        ClusteredData.encode(frame, schema, missing="ignore")
    with pytest.raises(ValueError, match=r"Every row has missing values.*'age' \(6 rows\)"):
        ClusteredData.encode(frame.assign(age=np.nan), schema, missing="drop")


def test_categories_of_dropped_rows_are_not_levels():
    frame = make_frame().astype({"sex": "str"})
    frame.loc[0, ["sex", "age"]] = ["rare", np.nan]
    assert infer(frame).levels["sex"].tolist() == ["f", "m"]


def test_values_outside_the_columns_in_use_do_not_matter():
    frame = make_frame().assign(other=[np.nan, np.inf, 1, 2, 3, 4])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(ClusteredData.encode(frame, infer(frame, features=["age"]))) == 6


def test_infinite_values_are_an_error():
    frame = make_frame().assign(dose=[1.0, np.inf, -np.inf, 2, 3, 4])
    with pytest.raises(ValueError, match=r"Infinite values in 'dose' \(2 rows\)"):
        ClusteredData.encode(frame, infer(frame))


def test_tables_that_cannot_be_read_as_columns():
    frame = make_frame()
    with pytest.raises(ValueError, match="must be distinct; these are not: 'age'"):
        infer(pd.concat([frame, frame[["age"]]], axis=1))
    with pytest.raises(ValueError, match="names must be text, found 0"):
        infer(frame.rename(columns={"age": 0}))
    with pytest.raises(ValueError, match="no rows"):
        ClusteredData.encode(frame.iloc[:0], infer())
    with pytest.raises(TypeError, match="Expected a pandas, polars or pyarrow table, found dict"):
        as_pandas({"a": [1]})


def test_odd_column_names_are_only_names():
    names = ["1", "log", "C", "np.log(age)", "my col", "__import__('os')", "+", "Intercept"]
    frame = make_frame()[["y", "site", "age"]]
    for i, name in enumerate(names):
        frame[name] = np.arange(6.0) ** (i + 1)
    data = ClusteredData.encode(frame, infer(frame))
    assert data.feature_names == ("age", *names)
    np.testing.assert_array_equal(data.features, frame[["age", *names]])


def test_a_column_named_like_an_interaction():
    frame = make_frame().assign(**{"age:smoker": 2.0})
    schema = infer(frame, features="age:smoker + `age:smoker`")
    with pytest.raises(ValueError, match="would both be called 'age:smoker'"):
        ClusteredData.encode(frame, schema)


# ----------------------------------------------------------------------------------- formulas


@pytest.mark.parametrize(
    ("formula", "terms"),
    [
        ("age", [("age",)]),
        ("a + `my col`:b", [("a",), ("my col", "b")]),
        ("a * b", [("a",), ("b",), ("a", "b")]),
        ("(a + b)^2", [("a",), ("b",), ("a", "b")]),
        ("0 + a.b", [("a.b",)]),
        ("a*b - a:b - 1", [("a",), ("b",)]),
        ("1", []),
        (["b", "a", "b"], [("b",), ("a",)]),
    ],
)
def test_formulas(formula, terms):
    assert list(parse_features(formula).terms) == terms


@pytest.mark.parametrize("formula", ["np.log(age)", "open('x', 'w')", "f(age)", "age.mean()"])
def test_formulas_never_execute(formula):
    with pytest.raises(ValueError, match=r"not a function of formulas.*Compute the column\s+first"):
        parse_features(f"sex + {formula}")


def test_a_stored_formula_never_executes(tmp_path):
    trap = f"open({str(tmp_path / 'trap')!r}, 'w')"
    stored = infer().to_json() | {"terms": [[trap]], "levels": {}}
    with pytest.raises(ValueError, match="no column"):
        ClusteredData.encode(make_frame(), Schema.from_json(stored))
    data = ClusteredData.encode(make_frame().assign(**{trap: 1.0}), Schema.from_json(stored))
    assert data.features.flatten().tolist() == [1.0] * 6
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize(
    ("formula", "message"),
    [
        ("y ~ age", "has a '~'"),
        ("age | site", r"random=\[...\]"),
        ("age +", "Expected column names joined by"),
        ("age, sex", "or a list of names"),
        ("age sex", "an operator is missing"),
        ("2:age", "scales a column by a number"),
        (".", "stands for all other columns"),
    ],
)
def test_bad_formulas(formula, message):
    with pytest.raises(ValueError, match=message):
        parse_features(formula)


# ------------------------------------------------------------------------------ labels in JSON


@pytest.mark.parametrize(
    "index",
    [
        pd.Index([1, 2]),
        pd.Index([1, 2], dtype="int8"),
        pd.Index([0.1, 1e300]),
        pd.Index([False, True]),
        pd.Index(["a", "ü"]),
        pd.Index(["a", 1, 2.5, True], dtype=object),
        pd.Index([np.int64(1), np.str_("b")], dtype=object),
        pd.Index([datetime.date(2020, 1, 2)], dtype=object),
        pd.to_datetime(["2020-01-01 10:00:00.123456789", "2021-01-01"], format="ISO8601"),
        pd.to_datetime(["2020-03-29 01:59", "2020-10-25 02:30"], utc=True).tz_convert(
            "Europe/Paris"
        ),
        pd.Index([1, 2], dtype="Int64"),
        pd.Index(["a"], dtype="string"),
        pd.Index(["a"], dtype="large_string[pyarrow]"),
        pd.Index([], dtype="int64"),
        pd.Index([], dtype=object),
    ],
    ids=str,
)
def test_labels_survive_json_with_their_type(index):
    loaded = index_from_json(json.loads(json.dumps(index_to_json(index))))
    pd.testing.assert_index_equal(loaded, index, exact=True)
    assert [type(v) for v in loaded] == [
        type(v.item() if isinstance(v, np.generic) and index.dtype == object else v) for v in index
    ]


def test_labels_that_json_cannot_hold():
    with pytest.raises(TypeError, match=r"label Interval.*astype\(str\)"):
        index_to_json(pd.interval_range(0, 3))
    frame = make_frame().assign(site=pd.cut(make_frame()["age"], 2))
    with pytest.raises(ValueError, match="cluster column 'site' cannot serve as labels"):
        ClusteredData.encode(frame, infer(frame))


@pytest.mark.parametrize(
    "content",
    [{}, [], {"dtype": "int64"}, {"dtype": "nonsense", "values": []}, {"dtype": 1, "values": [1]}],
)
def test_bad_stored_labels(content):
    with pytest.raises(ValueError, match="Expected labels as written by index_to_json"):
        index_from_json(content)


def test_bad_stored_schemas():
    with pytest.raises(ValueError, match=r"not a schema written by Schema.to_json.*'classes'"):
        Schema.from_json({"outcome": "y"})


def test_unknown_names_the_nearest_and_shortens_lists():
    message = str(unknown("column", "ag", ["age", *(f"x{i}" for i in range(20))]))
    assert message.startswith("There is no column 'ag'. Did you mean 'age'? There are: 'age'")
    assert message.endswith("'x8' and 11 more.")
    assert str(unknown("column", "q", [])) == "There is no column 'q'. There are: none."


# -------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "t.parquet", "t.PQ"])
def test_tables_survive_a_file(tmp_path, name):
    frame = pd.DataFrame(
        {"x": [0.1 + 0.2, 1e-300], "k": [1, 2], "s": ["a,b", "ü"], "b": [True, False]}
    )
    write_table(frame, tmp_path / name)
    pd.testing.assert_frame_equal(read_table(tmp_path / name), frame)
    write_table(frame.iloc[:1], tmp_path / name)
    assert len(read_table(str(tmp_path / name))) == 1
    assert [path.name for path in tmp_path.iterdir()] == [name]
    if name.endswith("gz"):
        assert gzip.decompress((tmp_path / name).read_bytes()).startswith(b"x,k,s,b")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "t.parquet"
    write_table(pd.DataFrame({"a": [1]}), path)
    with pytest.raises(Exception, match="complex"):
        write_table(pd.DataFrame({"a": [1j]}), path)
    assert read_table(path)["a"].tolist() == [1]
    assert [p.name for p in tmp_path.iterdir()] == ["t.parquet"]


def test_unnamed_row_names_and_marks_of_byte_order(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b'\xef\xbb\xbf"",a,b\nr1,1,2\nr2,3,4\n')
    frame = read_table(path)
    assert list(frame.columns) == ["a", "b"]
    assert list(frame.index) == ["r1", "r2"]
    path.write_bytes(b"\xef\xbb\xbfa,b\r\n1,2\r\n")
    assert list(read_table(path).columns) == ["a", "b"]
    path.write_text("a\n1\n")
    assert read_table(path)["a"].tolist() == [1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"", "is empty"),
        ("t.csv", b"\n\n", "not a comma-separated table"),
        ("t.csv", b"a,b\n", r"has a header \('a', 'b'\) but no rows"),
        ("t.csv", b"a;b\n1;2\n", "delimited by semicolons, expected commas.*sep=';'"),
        ("t.csv", b"a\tb\n1\t2\n", r"delimited by tabs, expected commas.*sep='\\t'"),
        ("t.csv", b"a|b\n1|2\n", "delimited by bars"),
        ("t.csv", b"a,b,a\n1,2,3\n", "repeated column names in its header: 'a'"),
        ("t.csv", b"a,b\n1,caf\xe9\n", "not UTF-8: byte 9 cannot be decoded.*iconv"),
        ("t.csv", b"caf\xe9,b\n1,2\n", "not UTF-8: byte 3 cannot be decoded.*iconv"),
        ("t.csv", b"a,b\n1,2,3\n4,5,6\n", "as many fields as the header"),
        ("t.csv", b"a,b\n1,2\n4,5,6\n", "as many fields as the header"),
        ("t.csv.gz", b"a,b\n1,2\n", "not a whole gzip file"),
        ("t.csv.gz", gzip.compress(b"a,b\n1,2\n" * 99, mtime=0)[:-9], "not a whole gzip file"),
        ("t.parquet", b"PAR1 and no more", "not a readable Parquet file"),
        ("t.parquet", b"a,b\n1,2\n", "not a readable Parquet file.*rename it"),
        ("t.xlsx", b"a", "suffix '.xlsx'; expected .csv, .csv.gz, .parquet or .pq"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_table(path)


def test_no_such_file(tmp_path):
    (tmp_path / "patients.csv").write_text("a\n1\n")
    with pytest.raises(ValueError, match=r"no file .*patient.csv'. Did you mean 'patients.csv'"):
        read_table(tmp_path / "patient.csv")
    with pytest.raises(ValueError, match="Check the path"):
        read_table(tmp_path / "nowhere" / "t.csv")
    with pytest.raises(ValueError, match="Cannot tell the format"):
        write_table(pd.DataFrame(), tmp_path / "t.txt")
