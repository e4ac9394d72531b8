"""Clustered data: constructors, subsets, splits, and the checks before training."""

import importlib.util
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
import xarray as xr

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.data.grouping import Grouping


def make_frame(n=60, n_sites=6, seed=0):
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "y": rng.normal(size=n),
            "age": rng.normal(50, 10, n),
            "smoker": rng.integers(0, 2, n),
            "sex": rng.permutation(["f", "m"] * (n // 2)),
            "site": np.arange(n) % n_sites,
        },
        index=[f"row{i}" for i in range(n)],
    )


def encode(frame, **options):
    return ClusteredData.from_frame(frame, **({"outcome": "y", "clusters": ["site"]} | options))


def rows_of(data):
    return list(data.row_labels)


# ------------------------------------------------------------------------------- from tables


def test_a_table_becomes_tensors_with_names_and_kinds():
    frame = make_frame()
    data = encode(frame)
    assert data.feature_names == ("age", "smoker", "sex[T.m]")
    assert data.sources == ("age", "smoker", "sex")
    assert data.continuous == (True, False, False)
    assert data.features.dtype == data.outcome.dtype == torch.float64
    expected = np.column_stack([frame["age"], frame["smoker"], frame["sex"] == "m"])
    np.testing.assert_array_equal(data.features, expected)
    np.testing.assert_array_equal(data.outcome, frame["y"])
    np.testing.assert_array_equal(data.groupings["site"].labels(), frame["site"])
    assert rows_of(data) == list(frame.index)
    assert (len(data), data.n_rows, data.n_features) == (60, 60, 3)
    assert data.classes is None
    data.features[0, 0] = 0.0
    data.outcome[0] = 0.0
    assert frame["age"].iloc[0] != 0 != frame["y"].iloc[0], "the user's table must not change"


def test_interactions_multiply_and_drop_the_reference_level():
    frame = make_frame()
    data = encode(frame, features="age * sex")
    assert data.feature_names == ("age", "sex[T.m]", "age:sex[T.m]")
    assert data.sources == ("age", "sex", "age:sex")
    assert data.continuous == (True, False, True)
    np.testing.assert_allclose(data.features[:, 2], frame["age"] * (frame["sex"] == "m"))


def test_a_cluster_column_is_a_feature_only_when_listed():
    frame = make_frame()
    assert "site" not in encode(frame).feature_names
    assert encode(frame, features=["age", "site"]).feature_names == ("age", "site")


def test_no_features_at_all():
    data = encode(make_frame(), features=[])
    assert data.features.shape == (60, 0)
    data.check_training()


@pytest.mark.parametrize(
    ("values", "classes"),
    [
        ([True, False], (False, True)),
        (["yes", "no"], ("no", "yes")),
        (pd.Categorical(["lo", "hi"], categories=["lo", "mid", "hi"]), ("lo", "hi")),
        (pd.array([True, False], dtype="boolean"), (False, True)),
    ],
)
def test_categorical_outcomes_become_codes(values, classes):
    frame = pd.DataFrame({"y": values, "x": [1.0, 2.5], "site": ["a", "b"]})
    data = encode(frame)
    assert data.classes == classes
    assert [data.classes[int(code)] for code in data.outcome] == list(values)
    assert data.outcome.dtype == torch.float64


@pytest.mark.parametrize(
    "labels",
    [
        [3, 1, 3],
        ["b", "a", "b"],
        [True, False, True],
        [1.5, 0.5, 1.5],
        pd.to_datetime(["2021-05-01", "2020-01-01", "2021-05-01"]),
        pd.to_datetime(["2021-05-01", "2020-01-01", "2021-05-01"]).tz_localize("Europe/Paris"),
        ["b", 1, "b"],
    ],
)
def test_cluster_labels_keep_their_type_and_order(labels):
    frame = pd.DataFrame({"y": [1.0, 2.0, 3.0], "site": pd.Series(labels)})
    grouping = encode(frame).groupings["site"]
    assert grouping.codes.tolist() == [1, 0, 1]
    assert grouping.codes.dtype == torch.int64
    assert grouping.levels.dtype == frame["site"].dtype
    assert grouping.labels().tolist() == frame["site"].to_numpy().tolist()
    assert grouping.counts.tolist() == [1, 2]
    assert grouping.n_clusters == 2


def test_labels_without_a_common_order_stay_in_order_of_appearance():
    labels = pd.Series(["b", 2, pd.Timestamp("2020-01-01").date(), 2], dtype=object)
    with pytest.raises(ValueError, match=r"cannot serve as labels.*astype\(str\)"):
        Grouping.from_labels(labels)
    with pytest.raises(ValueError, match="cannot serve as labels"):
        Grouping.from_labels(pd.Series([[1], [2]]))
    with pytest.raises(ValueError, match="has 1 missing labels among 2"):
        Grouping.from_labels(["a", None])


def test_row_numbers_are_read_by_column():
    frame = make_frame().assign(n=3, exposure=0.5, w=2.0)
    data = encode(frame, trials="n", offset="exposure", weights="w")
    assert data.feature_names == ("age", "smoker", "sex[T.m]")
    assert (data.trials == 3).all()
    assert (data.offset == 0.5).all()
    assert (data.weights == 2).all()


@pytest.mark.parametrize(
    ("role", "value", "message"),
    [
        ("trials", 0, r"trials must be positive whole numbers; 1 of 60 rows .* 0.0 in row 'row5'"),
        ("trials", 1.5, "trials must be positive whole numbers; 1 of 60 rows are not, such as 1.5"),
        ("weights", -1, "weights must be at least 0; 1 of 60 rows are not, such as -1.0"),
        ("weights", "a", "weights column 'w' holds .*; expected numbers"),
        ("offset", "a", "offset column 'w' holds .*; expected numbers"),
        ("trials", "a", "trials column 'w' holds .*; expected numbers"),
    ],
)
def test_bad_row_numbers(role, value, message):
    column = [1] * 60
    column[5] = value
    with pytest.raises(ValueError, match=message):
        encode(make_frame().assign(w=column), **{role: "w"})


def test_empty_tables_are_refused():
    with pytest.raises(ValueError, match="has no rows; at least one is needed"):
        encode(make_frame().iloc[:0])
    with pytest.raises(ValueError, match=r"Every row has missing values, in 'age' \(60 rows\)"):
        encode(make_frame().assign(age=np.nan), missing="drop")


def test_rows_dropped_are_announced_once_at_the_caller():
    frame = make_frame()
    frame.loc[["row1", "row2"], "site"] = np.nan
    with pytest.warns(UserWarning, match="Dropped 2 of 60 rows") as caught:
        data = encode(frame, missing="drop")
    assert len(caught) == 1
    assert len(data) == 58
    with pytest.raises(ValueError, match=r"Missing values in 'site' \(2 rows\): 2 of 60 rows"):
        encode(frame)


def test_arrow_and_polars_tables_are_accepted():
    frame = make_frame().reset_index(drop=True)
    tables = [pa.Table.from_pandas(frame)]
    if importlib.util.find_spec("polars"):
        tables.append(importlib.import_module("polars").from_pandas(frame))
    for table in tables:
        data = encode(table)
        np.testing.assert_array_equal(data.features, encode(frame).features)
        assert data.feature_names == ("age", "smoker", "sex[T.m]")


# ------------------------------------------------------------------------------- from arrays


def test_arrays_keep_images_in_single_precision():
    images = np.zeros((4, 1, 3, 3), dtype=np.float32)
    data = ClusteredData.from_arrays(images, images, {"site": ["a", "a", "b", "b"]})
    assert data.features.dtype == data.outcome.dtype == torch.float32
    assert data.features.shape == data.outcome.shape == (4, 1, 3, 3)
    assert (data.feature_names, data.continuous, data.n_features) == ((), (), 9)
    pixels = ClusteredData.from_arrays(images.astype(np.uint8), None, {})
    assert pixels.features.dtype == torch.uint8  # scaled when a network needs them


def test_arrays_of_numbers_become_doubles_with_names():
    x = torch.tensor([[0.0, 2.5], [1.0, 3.0]], dtype=torch.float32)
    data = ClusteredData.from_arrays(x, [1, 2], {"site": [7, 8]}, weights=np.array([1, 2]))
    assert data.feature_names == data.sources == ("x0", "x1")
    assert data.continuous == (False, True)
    assert data.features.dtype == data.outcome.dtype == data.weights.dtype == torch.float64
    assert data.groupings["site"].levels.tolist() == [7, 8]
    assert data.row_labels.equals(pd.RangeIndex(2))


def test_array_labels_are_found_or_given():
    x = np.ones((3, 1))
    found = ClusteredData.from_arrays(x, ["b", "a", "b"], {})
    assert (found.classes, found.outcome.tolist()) == (("a", "b"), [1, 0, 1])
    ordered = pd.Categorical(["b", "a", "b"], categories=["b", "a"])
    assert ClusteredData.from_arrays(x, ordered, {}).classes == ("b", "a")
    mixed = ClusteredData.from_arrays(x, None, {"site": ["b", 1, "b"]})
    assert mixed.groupings["site"].levels.tolist() == [1, "b"]
    coded = ClusteredData.from_arrays(x, None, {"site": torch.tensor([5, 4, 5])})
    assert coded.groupings["site"].labels().tolist() == [5, 4, 5]
    given = ClusteredData.from_arrays(x, [2, 2, 1], {}, classes=[2, 0, 1])
    assert (given.classes, given.outcome.tolist()) == ((2, 0, 1), [0, 0, 2])
    assert ClusteredData.from_arrays(x, None, {}, classes=["a", "b"]).classes == ("a", "b")
    with pytest.raises(ValueError, match=r"no class of the outcome 'y' called 'b'.*'a', 'c'"):
        ClusteredData.from_arrays(x, ["a", "a", "b"], {}, outcome_name="y", classes=["a", "c"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": np.ones(3)}, r"found \(3,\). A single feature is x\[:, None\]"),
        ({"features": [["a"], ["b"], ["c"]]}, "features must be numbers"),
        ({"features": np.ones((3, 1)) * 1j}, "features must be real numbers"),
        ({"features": [[np.nan], [1], [np.inf]]}, "features has 2 missing or infinite values"),
        ({"feature_names": ["a", "b"]}, "must be 1 distinct names"),
        ({"outcome": [1.0, 2.0]}, "'outcome' has 2 rows, the features have 3"),
        ({"clusters": {"site": ["a"]}}, "'site' has 1 rows, the features have 3"),
        ({"weights": np.ones((3, 1))}, r"weights must be one number per row, found \(3, 1\)"),
        ({"weights": [1, -1, 1]}, "weights must be at least 0; 1 of 3 rows"),
        ({"trials": [1, 0, 1]}, "trials must be positive whole numbers"),
    ],
)
def test_bad_arrays(changes, message):
    arrays = {"features": np.ones((3, 1)), "outcome": [1.0, 2.0, 3.0], "clusters": {}}
    with pytest.raises(ValueError, match=message):
        ClusteredData.from_arrays(**(arrays | changes))


# ------------------------------------------------------------------------------- from xarray


def make_dataset():
    rng = np.random.default_rng(0)
    return xr.Dataset(
        {
            "y": ("row", [0.5, 1.5, 2.5, 3.5]),
            "age": ("row", [30.0, 40.0, 50.0, 60.0]),
            "w": ("row", [1.0, 1.0, 1.0, 2.0]),
            "gene": (("gene_name", "row"), rng.normal(size=(2, 4))),
            "image": (("row", "i", "j"), rng.normal(size=(4, 2, 3)).astype("float32")),
        },
        coords={
            "row": list("abcd"),
            "site": ("row", ["s", "s", "t", "t"]),
            "gene_name": ["TP53", "MYC"],
        },
    )


def test_xarray_columns():
    dataset = make_dataset()
    data = ClusteredData.from_xarray(
        dataset[["y", "age", "w"]], outcome="y", clusters=["site"], weights="w"
    )
    assert data.feature_names == ("age",)
    assert rows_of(data) == list("abcd")
    assert data.weights.tolist() == [1, 1, 1, 2]
    squared = ClusteredData.from_xarray(
        dataset, outcome="y", clusters=["site"], features="age + age:w"
    )
    assert squared.feature_names == ("age", "age:w")


def test_xarray_arrays():
    dataset = make_dataset()
    options = {"outcome": "y", "clusters": ["site"]}
    genes = ClusteredData.from_xarray(dataset, features="gene", weights="w", **options)
    assert genes.feature_names == ("TP53", "MYC")
    np.testing.assert_array_equal(genes.features, dataset["gene"].transpose("row", "gene_name"))
    assert genes.weights.tolist() == [1, 1, 1, 2]
    images = ClusteredData.from_xarray(dataset, features=["image"], **options)
    assert images.features.shape == (4, 2, 3)
    assert images.features.dtype == torch.float32
    assert images.groupings["site"].labels().tolist() == ["s", "s", "t", "t"]
    assert rows_of(images) == list("abcd")
    unnamed = ClusteredData.from_xarray(
        dataset.drop_vars(["gene_name", "row"]), features="gene", **options
    )
    assert unnamed.feature_names == ("gene[0]", "gene[1]")
    assert rows_of(unnamed) == [0, 1, 2, 3]
    coder = ClusteredData.from_xarray(
        dataset, features="image", outcome="image", clusters=["site"], row_dim="row"
    )
    torch.testing.assert_close(coder.outcome, coder.features)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"row_dim": "rows"}, "no dimension 'rows'. Did you mean 'row'?"),
        ({"clusters": ["sit"]}, "called 'sit'. Did you mean 'site'?"),
        ({"features": ["imag"]}, "called 'imag'. Did you mean 'image'?"),
        ({"features": ["age", "image"]}, "must be the only feature"),
    ],
)
def test_bad_datasets(changes, message):
    options = {"outcome": "y", "clusters": ["site"]} | changes
    with pytest.raises(ValueError, match=message):
        ClusteredData.from_xarray(make_dataset(), **options)


# ---------------------------------------------------------------------- subsets and groupings


@pytest.mark.parametrize(
    "rows",
    [[7, 1, 1], np.array([7, 1, 1]), torch.tensor([7, 1, 1])],
    ids=["list", "numpy", "torch"],
)
def test_take_recodes_the_clusters(rows):
    data = encode(make_frame().assign(n=np.arange(1, 61)), trials="n")
    part = data.take(rows)
    assert rows_of(part) == ["row7", "row1", "row1"]
    assert part.trials.tolist() == [8, 2, 2]
    assert part.groupings["site"].levels.tolist() == [1]
    assert part.groupings["site"].codes.tolist() == [0, 0, 0]
    torch.testing.assert_close(part.features, data.features[[7, 1, 1]])
    torch.testing.assert_close(part.outcome, data.outcome[[7, 1, 1]])
    assert part.continuous == data.continuous


def test_take_by_mask_slice_and_nothing():
    data = encode(make_frame())
    mask = data.groupings["site"].codes == 2
    assert data.take(mask).groupings["site"].levels.tolist() == [2]
    assert rows_of(data.take(slice(2, 5))) == ["row2", "row3", "row4"]
    assert len(data.take([])) == 0
    assert data.take([]).groupings["site"].n_clusters == 0
    with pytest.raises(IndexError):
        data.take([60])


def test_interactions_of_factors_are_the_cells_that_occur():
    frame = pd.DataFrame(
        {"y": range(4), "school": ["b", "a", "b", "a"], "room": [1, 1, 2, 1], "x": [0.5, 1, 2, 3]}
    )
    data = encode(frame, clusters=["school", "room"])
    cells = data.grouping("school:room")
    assert cells.levels.tolist() == ["a:1", "b:1", "b:2"]
    assert cells.labels().tolist() == ["b:1", "a:1", "b:2", "a:1"]
    assert data.grouping("room") is data.groupings["room"]
    assert data.grouping("school:room:school").levels.tolist() == ["a:1:a", "b:1:b", "b:2:b"]
    for name, message in [("scool", "mean 'school'"), ("school:rom", "mean 'room'")]:
        with pytest.raises(ValueError, match=message):
            data.grouping(name)


def test_ambiguous_cells_are_refused():
    first = Grouping.from_labels(["a", "a:b"])
    second = Grouping.from_labels(["b:c", "c"])
    with pytest.raises(ValueError, match="both called 'a:b:c'"):
        first.cross(second)


# ----------------------------------------------------------------------------------- splits


def partition(first, second, whole):
    assert not set(rows_of(first)) & set(rows_of(second)), "overlap"
    assert set(rows_of(first)) | set(rows_of(second)) == set(rows_of(whole)), "rows lost"


@pytest.mark.parametrize("seed", range(5))
def test_split_rows_is_stratified_by_cluster_and_outcome(seed):
    frame = make_frame(n=600, n_sites=6).assign(y=np.tile([0] * 6 + [1] * 6 + [1] * 18, 20))
    data = encode(frame)
    training, validation = data.split_rows(0.3, seed=seed)
    partition(training, validation, data)
    assert abs(len(validation) - 180) <= 1
    cells = frame.groupby(["site", "y"]).size()
    found = frame.loc[rows_of(validation)].groupby(["site", "y"]).size()
    assert (abs(found - 0.3 * cells) <= 1.5).all()


def test_split_rows_depends_on_the_seed_alone():
    data = encode(make_frame())
    assert rows_of(data.split_rows(0.3, seed=1)[1]) == rows_of(data.split_rows(0.3, seed=1)[1])
    assert rows_of(data.split_rows(0.3, seed=1)[1]) != rows_of(data.split_rows(0.3, seed=2)[1])


def test_split_rows_favours_no_end_of_the_outcome():
    """With clusters of five, every fifth row of the sorted rows would always be at one end."""
    rng = np.random.default_rng(0)
    x = np.ones((5000, 1))
    y = rng.binomial(1, 0.2, 5000)
    data = ClusteredData.from_arrays(x, y, {"site": np.repeat(np.arange(1000), 5)})
    _, validation = data.split_rows(0.2, seed=0)
    assert len(validation) == 1000
    assert (validation.groupings["site"].counts == 1).all()
    rate = float(validation.outcome.mean())
    assert abs(rate - y.mean()) < 4 * np.sqrt(0.2 * 0.8 / 1000)
    pairs = ClusteredData.from_arrays(x, np.tile([0, 1], 2500), {"site": np.arange(5000) // 2})
    assert abs(float(pairs.split_rows(0.5, seed=0)[1].outcome.mean()) - 0.5) < 0.05


def test_every_cluster_of_every_factor_keeps_a_training_row():
    rng = np.random.default_rng(0)
    clusters = {"site": rng.integers(0, 40, 100), "item": rng.integers(0, 40, 100)}
    data = ClusteredData.from_arrays(rng.normal(size=(100, 1)), rng.normal(size=100), clusters)
    training, validation = data.split_rows(0.9, seed=0)
    for name in clusters:
        assert training.groupings[name].n_clusters == data.groupings[name].n_clusters
    assert len(training) + len(validation) == 100
    assert len(validation) > 0


def test_split_rows_by_another_factor():
    frame = make_frame(n=600).assign(batch=np.arange(600) // 100)
    data = encode(frame, clusters=["site", "batch"])
    _, validation = data.split_rows(0.25, by="batch", seed=0)
    assert validation.groupings["batch"].counts.tolist() == [25] * 6
    with pytest.raises(ValueError, match="Did you mean 'batch'"):
        data.split_rows(0.25, by="bacth", seed=0)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 20])
def test_bad_fractions(fraction):
    data = encode(make_frame())
    with pytest.raises(ValueError, match="fraction must lie between 0 and 1, not"):
        data.split_rows(fraction, seed=0)
    with pytest.raises(ValueError, match="fraction must lie between 0 and 1, not"):
        data.hold_out_clusters("site", fraction=fraction)


def test_a_split_without_validation_rows_is_refused():
    data = ClusteredData.from_arrays(np.ones((4, 1)), range(4), {"site": range(4)})
    with pytest.raises(ValueError, match="leaves no rows for validation"):
        data.split_rows(0.5, seed=0)


@pytest.mark.parametrize("clusters", [{"site": np.arange(103) % 7}, {}])
def test_folds_test_every_row_once(clusters):
    data = ClusteredData.from_arrays(
        np.random.default_rng(0).normal(size=(103, 1)), np.arange(103) % 3, clusters
    )
    tested = []
    for training, test in data.folds(5, seed=0):
        partition(training, test, data)
        tested += rows_of(test)
        assert len(test) in (20, 21)
        for grouping in test.groupings.values():
            assert grouping.counts.tolist() == pytest.approx([103 / 7 / 5] * 7, abs=1)
        assert torch.bincount(test.outcome.long()).tolist() == pytest.approx([103 / 15] * 3, abs=4)
    assert sorted(tested) == list(range(103))
    for n in (1, 104):
        with pytest.raises(ValueError, match="n must be between 2 and the 103 rows"):
            data.folds(n, seed=0)


def test_hold_out_whole_clusters():
    data = encode(make_frame())
    seen, unseen = data.hold_out_clusters("site", fraction=0.3, seed=1)
    partition(seen, unseen, data)
    assert unseen.groupings["site"].n_clusters == 2
    assert not set(seen.groupings["site"].levels) & set(unseen.groupings["site"].levels)
    chosen = [
        tuple(data.hold_out_clusters("site", fraction=0.3, seed=s)[1].groupings["site"].levels)
        for s in range(6)
    ]
    assert len(set(chosen)) > 1
    _, named = data.hold_out_clusters("site", labels=[4, 2])
    assert named.groupings["site"].levels.tolist() == [2, 4]
    assert data.hold_out_clusters("site", fraction=0.01)[1].groupings["site"].n_clusters == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": [9]}, "no cluster of 'site' called 9"),
        ({"labels": []}, "leaves no rows on one side"),
        ({"labels": range(6)}, "Holding out 6 of the 6 clusters"),
        ({}, "either fraction or labels"),
        ({"labels": [1], "fraction": 0.5}, "either fraction or labels"),
        ({"fraction": 0.95}, "leaves no rows on one side"),
    ],
)
def test_bad_hold_outs(options, message):
    with pytest.raises(ValueError, match=message):
        encode(make_frame()).hold_out_clusters("site", **options)


# ---------------------------------------------------------------------------- before training


def test_sound_data_pass():
    encode(make_frame()).check_training()


def test_what_cannot_be_trained_on_is_refused():
    data = encode(make_frame())
    cases = [
        (data.take([]), "no rows"),
        (replace(data, outcome=None), "needs the outcome 'y'"),
        (replace(data, outcome=torch.ones(60)), "outcome 'y' has one value in all rows"),
        (data.take(data.groupings["site"].codes == 2), "'site' has a single level, 2"),
    ]
    for bad, message in cases:
        with pytest.raises(ValueError, match=message):
            bad.check_training()
    counts = replace(data, outcome=torch.ones(60), trials=torch.arange(1, 61).double())
    counts.check_training()
