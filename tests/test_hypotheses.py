"""The grammar of hypotheses, simultaneous intervals, and tables of effects."""

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from scipy import stats

from armed_pyro import Effects, Hypothesis
from armed_pyro.effects.expression import evaluate

A, B = np.array([1.0, 2.0, 4.0]), np.array([2.0, -1.0, 0.5])
VALUES = {"a": A, "b": B, "x[T.m]": A + B, "x": A * B, "two words": B - A, "exp": A, "1e3": B}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", A),
        ("a - b > 0", A - B),
        ("a > b + 1", A - (B + 1)),
        ("2*a - b/4 + .5", 2 * A - B / 4 + 0.5),
        ("-a^2", -(A**2)),
        ("a ** -1", 1 / A),
        ("2^3^2", np.full(3, 512.0)),
        ("a - b - 1", A - B - 1),
        ("a / b / 2", A / B / 2),
        ("--a", A),
        ("x[T.m] - x", A + B - A * B),
        ("`two words` * 1e3", (B - A) * 1000),
        ("`1e3`", B),
        ("exp(log(a)) + sqrt(a) + abs(b)", A + np.sqrt(A) + np.abs(B)),
        ("exp + a", 2 * A),
        ("((a))<=(b)", A - B),
        ("1.5e-1 * a", 0.15 * A),
        ("3", np.full(3, 3.0)),
    ],
)
def test_expressions(text, expected):
    np.testing.assert_allclose(evaluate(text, VALUES).draws, expected)


@pytest.mark.parametrize(
    "text",
    [
        "", "a +", "a b", "(a", "a)", "a > b > 0", "c", "`c`", "`a", "a..b", "2a", "a; b",
        "a = = b", "__import__('os')", "a.__class__", "lambda: a", "a[0]", "a if b else a",
        "exec(a)", "log a", "a @ b", "a // b", "a,b", "x[T.f]", "a\x00", "'a'", "log(b)",
        "a / (b - b)", "(" * 500 + "a", "a" * 3000, "a" + "^a" * 100, "1e", "exp()", "a > ",
        "ab", "a1",
    ],
)  # fmt: skip
def test_bad_expressions_are_errors_of_ours(text):
    with pytest.raises(ValueError, match=r"cannot read|not a finite number|characters"):
        evaluate(text, VALUES)


def test_random_texts_never_give_another_error():
    """A fuzz of 3,000 texts made of the grammar's own pieces."""
    rng = np.random.default_rng(0)
    pieces = [*VALUES, *"+-*/^()<>=.` 1e_[]", "**", ">=", "log(", "exp(", "\n", "é", "\\", "0"]
    read = 0
    for _ in range(3000):
        text = "".join(rng.choice(pieces, rng.integers(1, 9)))
        try:
            read += evaluate(text, VALUES).draws.shape == (3,)
        except ValueError:
            continue
    assert read > 50


def effects(draws, **labels):
    return Effects(pd.DataFrame(labels), draws, "Means of y")


def test_probabilities_of_hypotheses():
    draws = np.random.default_rng(0).normal([0.0, 1.0], 1, size=(4000, 2))
    made = effects(draws, arm=["old", "new"])
    found = made.hypothesis("new - old > 0")
    assert found.probability == (draws[:, 1] > draws[:, 0]).mean()
    assert found.probability == pytest.approx(stats.norm.cdf(1 / np.sqrt(2)), abs=0.02)
    assert made.hypothesis("b2 - b1 < 0").probability == pytest.approx(1 - found.probability)
    equal = made.hypothesis("new = old")
    assert np.isnan(equal.probability)
    table = equal.to_frame()
    assert list(table) == [
        "hypothesis", "mean", "median", "sd", "lower", "upper", "probability",
    ]  # fmt: skip
    assert table["mean"][0] == pytest.approx((draws[:, 1] - draws[:, 0]).mean())
    assert isinstance(found, Hypothesis)
    assert "new - old > 0" in repr(found)
    assert "<table" in found._repr_html_()


def test_names_that_are_not_unique_have_numbers_only():
    made = effects(np.ones((5, 3)), arm=["a", "a", "b"])
    assert made.hypothesis("b3 - b1").draws.tolist() == [0.0] * 5
    with pytest.raises(ValueError, match="there is no 'a'"):
        made.hypothesis("a > 0")


def test_simultaneous_intervals_hold_for_all_contrasts_at_once():
    """Independent normal means: the intervals of all six contrasts are Tukey's."""
    draws = np.random.default_rng(1).normal(size=(40_000, 4))
    contrasts = effects(draws, arm=list("abcd")).contrasts()
    table = contrasts.to_frame(prob=0.95)
    tukey = stats.studentized_range.ppf(0.95, 4, np.inf)  # of the range of four standard normals
    np.testing.assert_allclose(table["upper"] - table["mean"], tukey, rtol=0.02)
    inside = (contrasts.draws > table["lower"].to_numpy()) & (
        contrasts.draws < table["upper"].to_numpy()
    )
    assert inside.all(1).mean() == pytest.approx(0.95, abs=0.001)
    pointwise = effects(draws, arm=list("abcd")).contrasts(simultaneous=False).to_frame(prob=0.95)
    assert (pointwise["upper"] < table["upper"]).all()
    np.testing.assert_allclose(pointwise["upper"], 1.96 * np.sqrt(2), rtol=0.05)


def test_contrasts_by_measure_and_pairs():
    made = effects(np.array([[0.2, 0.5, 0.8]] * 4), dose=[1.0, 2.0, 3.0])
    ratio = made.contrasts("sequential", measure="ratio")
    np.testing.assert_allclose(ratio.draws[0], [2.5, 1.6])
    odds = made.contrasts("reference", measure="odds_ratio")
    np.testing.assert_allclose(odds.draws[0], [4.0, 16.0])
    assert odds.to_frame()["contrast"].tolist() == ["odds(2) / odds(1)", "odds(3) / odds(1)"]
    with pytest.raises(ValueError, match="ratios need"):
        effects(np.array([[-1.0, 1.0]]), dose=[1, 2]).contrasts(measure="ratio")
    with pytest.raises(ValueError, match="pairs="):
        made.contrasts("all")


def test_effects_are_tables_datasets_latex_and_csv(tmp_path):
    made = effects(np.random.default_rng(0).normal(size=(50, 2)), arm=["a_1", "b<2>"])
    dataset = made.to_dataset()
    assert isinstance(dataset, xr.Dataset)
    assert dataset["effect"].dims == ("chain", "draw", "quantity")
    assert dataset["arm"].to_numpy().tolist() == ["a_1", "b<2>"]
    assert r"a\_1" in made.to_latex()
    made.to_csv(tmp_path / "effects.csv")
    read = pd.read_csv(tmp_path / "effects.csv")
    pd.testing.assert_frame_equal(read, made.to_frame(), check_dtype=False)
    assert "b&lt;2&gt;" in made._repr_html_()
    assert "90% intervals" in repr(made)
    assert len(repr(effects(np.zeros((5, 5000)), row=range(5000)))) < 3000
    assert len(made) == 2
