"""`Fit.plot`: what the pictures show is what the tables say."""

import numpy as np
import pandas as pd
import pytest

from armed_pyro import Fit, model

matplotlib = pytest.importorskip("matplotlib")


def make_table(n: int = 240) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"site": np.arange(n) % 12, "age": rng.normal(60, 8, n)})
    table["arm"] = rng.choice(["control", "low", "high"], n)
    table["score"] = 0.1 * table["age"] + rng.normal(size=12)[table["site"]] + rng.normal(size=n)
    odds = np.exp(0.5 * (table["score"] - 6))
    table["ill"] = np.where(rng.random(n) < odds / (1 + odds), "yes", "no")
    return table


@pytest.fixture(scope="module")
def fitted() -> Fit:
    table = make_table()
    made = model("score ~ poly(age, 2) + arm + (age | site)", table[table["site"] < 9])
    return made.fit(steps=60, progress=False)


@pytest.fixture(scope="module")
def binary() -> Fit:
    made = model("ill ~ age + (1 | site)", make_table(), family="bernoulli")
    return made.fit(steps=60, progress=False)


def labelled(figure) -> bool:
    """Whether every visible panel has a named axis, and nothing lies outside the page."""
    figure.canvas.draw()
    shown = [axes for axes in figure.axes if axes.get_visible()]
    return bool(shown) and all(axes.get_xlabel() for axes in shown)


def test_effects_are_predictions(fitted):
    figure = fitted.plot.effects("age", points=5, by="arm")
    assert labelled(figure)
    (axes,) = figure.axes
    lines = [line for line in axes.get_lines() if len(line.get_xdata()) == 5]
    age = fitted.data.table["age"]
    at = {"age": np.linspace(age.min(), age.max(), 5).tolist(), "arm": ["control", "high", "low"]}
    table = fitted.predictions(at=at, rest="mean").to_frame()
    for line, (name, part) in zip(lines, table.groupby("arm", sort=False), strict=True):
        assert line.get_label() == name
        np.testing.assert_allclose(line.get_ydata(), part["mean"])
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("age", "expected score")


def test_effects_of_a_category(binary, fitted):
    figure = fitted.plot.effects("arm")
    (axes,) = figure.axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["control", "high", "low"]
    assert binary.plot.effects("age").axes[0].get_ylabel() == "P(ill = yes)"
    with pytest.raises(ValueError, match="no variable 'agee'"):
        fitted.plot.effects("agee")


def test_a_caterpillar_is_sorted(fitted):
    figure = fitted.plot.caterpillar()
    assert labelled(figure)
    first, second = figure.axes
    table = fitted.random_effects().set_index("cluster")
    means = table[table["term"] == "Intercept"]["mean"].sort_values()
    dots = next(line for line in first.get_lines() if line.get_marker() == "o")
    np.testing.assert_allclose(dots.get_xdata(), means)
    assert [tick.get_text() for tick in first.get_yticklabels()] == [str(c) for c in means.index]
    assert second.get_xlabel() == "effect on age"
    with pytest.raises(ValueError, match="no grouping factor 'school'"):
        fitted.plot.caterpillar("school")


def test_predictive_checks_count_every_row(fitted, binary):
    for fit, name in ((fitted, "score"), (binary, "ill")):
        figure = fit.plot.ppc(draws=20)
        assert labelled(figure)
        observed = figure.axes[0].patches[0].get_data()
        assert observed.values.sum() == fit.data.n_rows
        assert figure.axes[0].get_xlabel() == name


def test_residuals_by_family(fitted, binary):
    assert len([axes for axes in fitted.plot.residuals().axes if axes.get_visible()]) == 5
    figure = binary.plot.residuals()
    assert labelled(figure)
    assert figure.axes[0].get_xlabel() == "P(ill = yes)"


def test_variance_trace_and_modes(fitted):
    figure = fitted.plot.variance()
    dots = next(line for line in figure.axes[0].get_lines() if line.get_marker() == "o")
    table = fitted.variance_components().query("statistic == 'sd'")
    np.testing.assert_allclose(dots.get_xdata(), table["median"][::-1])
    trace = fitted.plot.trace().axes[0].get_lines()[0]
    assert len(trace.get_xdata()) == len(fitted.history.loss)
    table = make_table()
    figure = fitted.plot.unseen(table[table["site"] >= 9], modes=["population", "marginal"])
    assert labelled(figure)
    shown = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert sorted(shown) == ["marginal", "population"]
