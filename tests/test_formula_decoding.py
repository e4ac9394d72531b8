"""Columns behind functions are recovered from encoded rows, so that saved fits have effects."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from armed_pyro import ClusteredData, Fit, model
from armed_pyro.data.decoding import decoded


def make_table(n: int = 60) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"x": rng.uniform(1, 9, n).round(3), "g": np.arange(n) % 6})
    table["f"] = rng.choice(list("abc"), n)
    table["days"] = rng.integers(1, 30, n).astype(float)
    table["y"] = rng.normal(size=n) + table["x"]
    return table


@pytest.mark.parametrize(
    "call",
    [
        *("log(x)", "log2(x)", "log10(x)", "log1p(x)", "exp(x)", "sqrt(x)", "scale(x)"),
        *("center(x)", "poly(x, 3)", "poly(x, 2, raw=True)", "bs(x, df=5)", "ns(x, df=4)"),
        *("cr(x, df=4)", "bs(x, knots=[3], degree=1)", "ns(x, df=1)"),
    ],
)
def test_numbers(call):
    table = make_table()
    data = ClusteredData.from_frame(table, outcome="y", clusters=["g"], features=f"{call} * f")
    frame = decoded(replace(data, table=None))
    np.testing.assert_allclose(frame["x"], table["x"], rtol=1e-9)
    assert frame["f"].tolist() == table["f"].tolist()


@pytest.mark.parametrize("formula", ["C(f, Sum)", "C(f, Helmert) + x", "0 + C(f, Poly)"])
def test_categories(formula):
    table = make_table()
    data = ClusteredData.from_frame(table, outcome="y", clusters=["g"], features=formula)
    assert decoded(replace(data, table=None))["f"].tolist() == table["f"].tolist()


def test_offsets_and_slopes():
    data = ClusteredData.from_frame(
        make_table(), outcome="y", clusters=["g"], features="f + offset(log(days))", slopes="log(x)"
    )
    frame = decoded(replace(data, table=None))
    np.testing.assert_allclose(frame["days"], make_table()["days"], rtol=1e-9)
    np.testing.assert_allclose(frame["x"], make_table()["x"], rtol=1e-9)


@pytest.mark.parametrize("call", ["I(x**2)", "abs(x - 5)", "cc(x, df=4)", "log(x + 1)"])
def test_what_has_no_inverse_is_left_out(call):
    data = ClusteredData.from_frame(make_table(), outcome="y", clusters=["g"], features=call)
    assert "x" not in decoded(replace(data, table=None))


def test_a_saved_fit_has_effects(tmp_path):
    made = model("y ~ ns(x, df=3) + C(f, Sum) + (1 | g)", make_table())
    fitted = made.fit(steps=30, progress=False)
    fitted.save(tmp_path / "run")
    loaded = Fit.load(tmp_path / "run")
    for of in (fitted, loaded):
        assert of.data.schema is not None
    first, second = fitted.slopes("x", seed=0), loaded.slopes("x", seed=0)
    np.testing.assert_allclose(first.to_frame()["mean"], second.to_frame()["mean"], rtol=1e-6)
    first, second = fitted.means("f", seed=0), loaded.means("f", seed=0)
    np.testing.assert_allclose(first.to_frame()["mean"], second.to_frame()["mean"], rtol=1e-6)
