"""Labels of new tables are those of training, whatever type a reader gave the column."""

import warnings

import numpy as np
import pandas as pd
import pytest
from torch import nn

from armed_pyro import ClusteredData, MixedEffects, Schedule, fit
from armed_pyro.data.grouping import Grouping
from armed_pyro.data.label_matching import match_labels

SHORT = Schedule(steps=20, window=10, stages=0)
WHOLE = {
    "int": lambda codes: codes,
    "int8": lambda codes: codes.astype(np.int8),
    "float": lambda codes: codes.astype(float),
    "text": lambda codes: codes.astype(str),
    "string": lambda codes: pd.Series(codes).astype("string").to_numpy(object),
    "padded": lambda codes: np.array([f"{code:02d}" for code in codes]),
    "categorical": lambda codes: pd.Categorical(codes),
    "categories of text": lambda codes: pd.Categorical(codes.astype(str)),
    "mixed": lambda codes: np.array([c if c % 2 else str(c) for c in codes], dtype=object),
}


def index(kind, codes):
    return pd.Series(WHOLE[kind](np.asarray(codes))).unique()


@pytest.mark.parametrize("new", WHOLE)
@pytest.mark.parametrize("known", WHOLE)
def test_whole_numbers_match_in_any_type(known, new):
    labels, seen = pd.Index(index(new, [3, 1, 7])), pd.Index(index(known, [1, 2, 3]))
    assert match_labels(labels, seen, "site").tolist() == [2, 0, -1]


@pytest.mark.parametrize(
    ("labels", "known", "places"),
    [
        ([1, 2], ["1", "2", "K"], [0, 1]),  # one word makes a column text
        (["1", "K"], [1, 2], [0, -1]),
        (["01", "1"], ["1", "01"], [1, 0]),  # text equals text first
        (["1.10", "1.1"], ["1.1", "1.10"], [1, 0]),
        (["1.10"], ["1.1"], [-1]),
        ([1.5], ["1.5"], [0]),
        (["a", "A"], ["A"], [-1, 0]),
        ([True, False], ["TRUE", "FALSE"], [0, 1]),
        ([True], [1, 0], [-1]),
        ([1], [True, False], [-1]),
        (["101.0:1.0"], ["101:1"], [0]),
        (["01:a"], ["1:a", "1:b"], [0]),
        (["2020-01-02"], pd.to_datetime(["2020-01-01", "2020-01-02"]), [1]),
        (pd.to_datetime(["2020-01-02 10:30"]), ["2020-01-02 10:30:00"], [0]),
        (["00012345678901234567890"], ["12345678901234567890"], [0]),
        ([], ["a"], []),
    ],
)
def test_other_labels(labels, known, places):
    assert match_labels(pd.Index(labels), pd.Index(known), "site").tolist() == places


@pytest.mark.parametrize(
    ("labels", "known"),
    [([1], ["01", "1"]), (["001"], ["01", "1"]), (["01", "1"], [1, 2]), (["01", "1"], ["1"])],
)
def test_padded_codes_that_could_be_two_clusters_are_refused(labels, known):
    with pytest.raises(ValueError, match="could be"):
        match_labels(pd.Index(labels), pd.Index(known), "site")


def test_labels_of_cells_do_not_depend_on_the_columns_types():
    by_type = [
        Grouping.from_labels(pd.Series(outer)).cross(Grouping.from_labels(pd.Series(inner)))
        for outer, inner in [
            ([101, 102], [1, 2]),
            ([101.0, 102.0], [1, 2.0]),
            (["101", "102"],) * 2,
        ]
    ]
    assert [g.levels.tolist() for g in by_type[:2]] == [["101:1", "102:2"]] * 2
    assert by_type[2].levels.tolist() == ["101:101", "102:102"]


def codes(seed=0):
    rng = np.random.default_rng(seed)
    n = 96
    site, arm = np.arange(n) // 12 + 1, np.arange(n) % 3 + 1
    inner = np.arange(n) // 4 % 3 + 1
    y = site + 2.0 * inner + arm + rng.normal(size=n)
    return pd.DataFrame({"y": y, "site": site, "inner": inner, "arm": arm})


def written(kind, frame, *columns):
    return frame.assign(**{name: WHOLE[kind](frame[name].to_numpy()) for name in columns})


KINDS = ("int", "float", "text", "padded", "categorical", "mixed")


@pytest.fixture(scope="module", params=["int", "float", "text", "padded", "mixed"])
def trained(request):
    """A fit to nested clusters and a categorical feature; the feature is text for numbers too."""
    frame = written(request.param, codes(), "site", "inner")
    frame = written("text" if request.param in ("int", "float") else request.param, frame, "arm")
    data = ClusteredData.from_frame(frame, outcome="y", clusters=["site", "inner"])
    model = MixedEffects(nn.Linear(2, 1), "(1 | site/inner)", bayesian_head=True)
    result = fit(model, data, schedule=SHORT, refine=False, progress=False)
    return result, result.predict(frame.drop(columns="y"), draws=20).mean


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", [("site",), ("inner",), ("site", "inner"), ("arm",)])
def test_a_fit_knows_clusters_and_levels_in_any_type(trained, kind, which):
    result, expected = trained
    new = written(kind, codes().drop(columns="y"), *which)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = result.predict(new, draws=20)
    np.testing.assert_allclose(made.mean, expected, rtol=1e-6)


def test_a_table_in_which_no_cluster_is_known_is_told_so(trained):
    result, _ = trained
    new = codes().assign(site=[f"site {k}" for k in codes().site])
    with pytest.warns(UserWarning, match=r"no cluster of 'site'.*'site 1', .*training had") as told:
        result.predict(new, draws=20, unseen="marginal")
    assert len([w for w in told if "no cluster" in str(w.message)]) == 1, "of inner clusters, too"
    some = new.assign(site=np.where(codes().site == 1, "1", new.site))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result.predict(some, draws=20, unseen="marginal")


def test_the_inner_column_of_new_clusters_may_be_absent(trained):
    result, _ = trained
    new = codes().drop(columns="inner").assign(site=lambda t: t.site + 50)
    with pytest.warns(UserWarning, match="no column 'inner'.*one new cluster of 'site:inner'"):
        made = result.predict(new, draws=20, unseen="marginal")
    assert made.new["site:inner"].labels.tolist() == [f"{k}:(new)" for k in range(51, 59)]
    with pytest.warns(UserWarning, match="no column 'inner'"):
        seen = result.predict(codes().drop(columns="inner"), draws=20, unseen="population")
    assert set(seen.unseen) == {"population"}
    with pytest.raises(ValueError, match="no column 'site'"):
        result.predict(codes().drop(columns="site"), unseen="marginal")


def test_held_out_labels_match_in_any_type():
    data = ClusteredData.from_frame(codes(), outcome="y", clusters=["site"], features=["arm"])
    for labels in ([1, 2], ["1", "2"], [1.0, 2.0]):
        assert data.hold_out_clusters("site", labels=labels)[1].n_rows == 24
