"""Formulas: design matrices against formulaic's and patsy's, in training and for new rows."""

import json

import formulaic
import numpy as np
import pandas as pd
import patsy
import pytest

from armed_pyro import ClusteredData
from armed_pyro.data.formula import parse_features
from armed_pyro.data.formula_functions import evaluate
from armed_pyro.data.schema import Schema


def make_table(n: int = 80, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "y": rng.normal(size=n),
            "x": rng.normal(5, 1, n),
            "z": rng.uniform(1, 3, n),
            "my w": rng.exponential(size=n) + 0.1,
            "f": rng.choice(list("abc"), n),
            "h": rng.choice(["lo", "hi"], n),
            "k": rng.choice([1, 2, 3, 4], n),
            "g": np.arange(n) % 6,
        }
    )


# By our formula, formulaic's where it is written in another way.
FORMULAS = {
    "x": "",
    "x + z": "",
    "x - 1": "",
    "0 + x + z": "",
    "x + 0": "",
    "-1 + f": "",
    "f": "",
    "f + h": "",
    "0 + f + h": "",
    "x*z": "",
    "x:z": "",
    "x:f": "",
    "f:h": "",
    "f*h": "",
    "0 + f:h": "",
    "0 + f*x": "",
    "f*h*x": "",
    "x*z - x:z": "",
    "(x + z + f)^2": "",
    "(x + z + f)**2 - z:f": "",
    "(x + z)*h": "",
    "f/x": "",
    "f/h": "",
    "f/h/x": "",
    "(f + h)/x": "",
    "f/(x + z)": "",
    "x %in% f": "x:f",
    "f + x %in% f": "f + f:x",
    "`my w` + x": "",
    "`my w`*f": "",
    "log(x)": "",
    "log(`my w`)*h": "",
    "log2(x) + log10(z)": "",
    "log1p(z)": "np.log1p(z)",
    "exp(z)": "",
    "sqrt(x)": "np.sqrt(x)",
    "abs(x - 5)": "np.abs(x - 5)",
    "log(x + 2*z)": "",
    "I(x^2)": "I(x**2)",
    "I(x**2) + I(x/z)": "",
    "I(-x + 3*z**2) : f": "I(-x + 3*z**2):f",
    "I(2^-1*x)": "I(x/2)",
    "poly(x, 2)": "",
    "poly(x, degree=3)*f": "",
    "poly(x, 3, raw=TRUE)": "poly(x, 3, raw=True)",
    "poly(log(x), 2)": "",
    "scale(x)": "",
    "scale(log(x))*h": "",
    "center(x) + center(z)": "",
    "I(center(x)**2)": "",
    "bs(x, df=4)": "",
    "bs(x, 5)*h": "bs(x, df=5)*h",
    "bs(x, knots=[4.5, 5.5], degree=2)": "",
    "bs(x, knots=c(4.5, 5.5)):f": "bs(x, knots=[4.5, 5.5]):f",
    "cr(x, df=4)": "cr(x, df=4, constraints='center')",
    "cr(x, knots=[4.5, 5.5])*h": "cr(x, knots=[4.5, 5.5], constraints='center')*h",
    "cc(x, df=3)": "cc(x, df=3, constraints='center')",
    "factor(k)*x": "C(k)*x",
    "C(k)": "",
    "C(f, Treatment('b'))": "C(f, contr.treatment('b'))",
    "C(f, contr.treatment(base='c'))*x": "C(f, contr.treatment('c'))*x",
    "C(k, Treatment(3))": "C(k, contr.treatment(3))",
    "C(f, Sum)": "C(f, contr.sum)",
    "C(f, sum)*C(h, sum)": "C(f, contr.sum)*C(h, contr.sum)",
    "C(f, contr.helmert)*x": "",
    "C(k, Poly)": "C(k, contr.poly)",
    "0 + C(f, Sum)": "0 + C(f, contr.sum)",
    "C(f, levels=['c', 'a', 'b'])": "",
    "C(f, Poly, levels=['c', 'a', 'b'])": "C(f, contr.poly, levels=['c', 'a', 'b'])",
    "C(f, Sum):x + x": "C(f, contr.sum):x + x",
    "poly(x, 2):poly(z, 2)": "",
}


def without_intercept(matrix: pd.DataFrame) -> np.ndarray:
    return matrix.drop(columns="Intercept", errors="ignore").to_numpy(dtype=float)


@pytest.mark.parametrize("formula", FORMULAS)
def test_designs_are_formulaics(formula):
    table = make_table()
    data = ClusteredData.from_frame(table, outcome="y", clusters=["g"], features=formula)
    expected = formulaic.model_matrix(FORMULAS[formula] or formula, table)
    assert data.intercept == ("Intercept" in expected)
    np.testing.assert_allclose(data.features.numpy(), without_intercept(expected), atol=1e-10)
    schema = Schema.from_json(json.loads(json.dumps(data.schema.to_json())))
    # Inside the range of training, where all means, norms and knots would change.
    new = make_table(30, seed=1).assign(x=lambda t: 5 + 0.3 * (t["x"] - 4.8))
    np.testing.assert_allclose(
        ClusteredData.encode(new, schema).features.numpy(),
        without_intercept(expected.model_spec.get_model_matrix(new)),
        atol=1e-10,
    )


def test_there_are_sixty():
    assert len(FORMULAS) >= 60


@pytest.mark.parametrize(
    ("formula", "of_patsy"),
    {
        "scale(x)": "standardize(x, ddof=1)",
        "C(f, Treatment('b'))*x": "C(f, Treatment('b'))*x",
        "C(f, Sum)*h": "C(f, Sum)*h",
        "C(f, Helmert)": "C(f, Helmert)",
        "C(k, Poly)": "C(k, Poly)",
        "bs(x, df=5)": "bs(x, df=5)",
        "cr(x, df=5)": "cr(x, df=5, constraints='center')",
        "cc(x, df=5)": "cc(x, df=5, constraints='center')",
        "(f + h + x)^3 - f:h:x": "(f + h + x)**3 - f:h:x",
        "f/(x + z)": "f/(x + z)",
    }.items(),
)
def test_designs_span_what_patsys_do(formula, of_patsy):
    table = make_table()
    data = ClusteredData.from_frame(table, outcome="y", clusters=["g"], features=formula)
    ours = np.column_stack([np.ones(len(table)), data.features.numpy()])
    theirs = np.asarray(patsy.dmatrix(of_patsy, table))
    assert ours.shape == theirs.shape
    for first, second in ((ours, theirs), (theirs, ours)):
        solved = np.linalg.lstsq(first, second, rcond=None)[0]
        np.testing.assert_allclose(first @ solved, second, atol=1e-8)


def natural_basis(x: np.ndarray, knots: np.ndarray) -> np.ndarray:
    """Truncated powers of natural cubic splines (Hastie, Tibshirani, Friedman 2009, eq. 5.4)."""

    def d(k: int) -> np.ndarray:
        powers = np.clip(x - knots[k], 0, None) ** 3 - np.clip(x - knots[-1], 0, None) ** 3
        return powers / (knots[-1] - knots[k])

    columns = [d(k) - d(len(knots) - 2) for k in range(len(knots) - 2)]
    return np.column_stack([np.ones_like(x), x, *columns])


def test_natural_splines_have_rs_knots_and_are_straight_outside():
    x = make_table()["x"].to_numpy()
    values, state = evaluate("ns(x, df=4)", pd.DataFrame({"x": x}))
    knots = np.array(state["ns(x, df=4)"]["knots"])
    np.testing.assert_allclose(knots, np.quantile(x, [0, 0.25, 0.5, 0.75, 1]))
    wide = np.linspace(x.min() - 2, x.max() + 2, 200)
    basis, _ = evaluate("ns(x, df=4)", pd.DataFrame({"x": wide}), state)
    assert values.shape[1] == 4
    expected = natural_basis(wide, knots)
    solved = np.linalg.lstsq(expected, basis, rcond=None)[0]
    np.testing.assert_allclose(expected @ solved, basis, atol=1e-8)
    assert np.linalg.matrix_rank(np.column_stack([np.ones(200), basis])) == 5


def test_orthogonal_polynomials_are_orthonormal():
    values, _ = evaluate("poly(x, 3)", make_table())
    np.testing.assert_allclose(values.T @ values, np.eye(3), atol=1e-10)
    np.testing.assert_allclose(values.sum(0), 0, atol=1e-10)


def test_offsets_are_expressions():
    table = make_table()
    features = "x + offset(log(z)) + offset(`my w`)"
    data = ClusteredData.from_frame(table, outcome="y", clusters=["g"], features=features)
    assert data.feature_names == ("x",)
    np.testing.assert_allclose(data.offset.numpy(), np.log(table["z"]) + table["my w"])
    new = ClusteredData.encode(table.head(3)[["x", "z", "my w", "g"]], data.schema)
    np.testing.assert_allclose(new.offset.numpy(), data.offset.numpy()[:3])
    with pytest.raises(ValueError, match="no column 'z'"):
        ClusteredData.encode(table.drop(columns="z"), data.schema)


def test_a_dot_is_all_other_columns():
    table = make_table().drop(columns="k")
    data = ClusteredData.from_frame(table, outcome="y", clusters=["g"], features=". - z + log(z)")
    assert data.feature_names == ("x", "my w", "f[T.b]", "f[T.c]", "h[T.lo]", "log(z)")


@pytest.mark.parametrize(
    ("formula", "terms"),
    {
        "(a + b)^40": (("a",), ("b",), ("a", "b")),
        "(a + b + c)/d": (("a",), ("b",), ("c",), ("a", "b", "c", "d")),
        "a %in% b": (("a", "b"),),
        "b + (0 + a)": (("b",), ("a",)),
        "a - (b - c) + b": (("a",), ("c",), ("b",)),
        "(1 + a):b": (("b",), ("a", "b")),
        "I( x ** 2 ) + I(x^2)": (("I(x^2)",),),
        "poly(x,2) + poly( x, 2 )": (("poly(x, 2)",),),
    }.items(),
)
def test_algebra_of_terms(formula, terms):
    assert parse_features(formula).terms == terms


def test_columns_of_a_formula_are_those_of_the_table():
    formula = parse_features("log(x)*C(f, Sum) + bs(z, df=4) + within(w | g) + offset(log(t))")
    assert formula.columns == ("x", "f", "z", "w")
    assert formula.offset_columns == ("t",)


def test_a_reference_level_is_the_first():
    data = ClusteredData.from_frame(
        make_table(), outcome="y", clusters=["g"], features="C(f, ref='c') * x"
    )
    assert data.feature_names[:2] == ("f[T.a]", "f[T.b]")
    assert list(data.schema.levels["f"]) == ["c", "a", "b"]


def test_a_column_that_no_logarithm_has():
    table = make_table()
    table.loc[7, "z"] = 0.0
    with pytest.raises(
        ValueError, match=r"log\(z\) is not a finite number in 1 row, such as row 7"
    ):
        ClusteredData.from_frame(table, outcome="y", clusters=["g"], features="log(z)")


def test_values_beyond_the_boundary_knots_are_told():
    data = ClusteredData.from_frame(
        make_table(), outcome="y", clusters=["g"], features="bs(x, df=4)"
    )
    with pytest.warns(UserWarning, match=r"1 of 2 values are outside the boundary knots of bs\(\)"):
        ClusteredData.encode(make_table().head(2).assign(x=[5.0, 50.0]), data.schema)
