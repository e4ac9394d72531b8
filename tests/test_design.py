"""Fixed and random designs that mean what they mean in lme4."""

import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from armed_pyro import ClusteredData, Fit, MixedEffects, Schedule, fit
from armed_pyro.data.default_features import identifies_rows
from armed_pyro.data.formula import parse_features
from armed_pyro.data.schema import Schema
from armed_pyro.program.dependent import independent_columns
from armed_pyro.program.units import original_fixed_effects
from armed_pyro.random_effects.formula import parse_terms

# Productivity scores of nlme's Machines, three per worker and machine (Pinheiro and Bates 2000).
SCORES = {
    "A": "52 52.8 53.1 51.8 52.8 53.1 60 60.2 58.4 51.1 52.3 50.3 50.9 51.8 51.4 46.4 44.8 49.2",
    "B": "62.1 62.6 64 59.7 60 59 68.6 65.8 69.7 63.2 62.8 62.2 64.8 65 65.4 43.7 44.2 43",
    "C": "67.5 67.2 66.9 61.5 61.7 62.3 70.8 70.6 71 64.1 66.2 64 72.1 72 71.1 62 61.4 60.5",
}


def machines():
    return pd.DataFrame(
        [
            {"worker": place // 3 + 1, "machine": machine, "score": float(score)}
            for machine, scores in SCORES.items()
            for place, score in enumerate(scores.split())
        ]
    )


def frame(n=120, seed=0):
    rng = np.random.default_rng(seed)
    table = pd.DataFrame(
        {
            "x": rng.normal(5, 1, n),
            "z": rng.normal(2, 0.5, n),
            "f": rng.choice(list("abc"), n),
            "dose": rng.choice([1, 2, 3], n),
            "site": np.arange(n) % 12,
        }
    )
    return table.assign(y=2 * table["x"] + rng.normal(size=12)[table["site"]] + rng.normal(size=n))


def encode(table=None, **options):
    table = frame() if table is None else table
    return ClusteredData.from_frame(table, **({"outcome": "y", "clusters": ["site"]} | options))


def bind(data, random="(1 | site)", *, bias=True, head=True):
    net = nn.Linear(data.n_features, 1, bias=bias).double()
    return MixedEffects(net, random, bayesian_head=head).bind(data)


def phi(model, data):
    """Design of the first factor's random effects, by name of the effect, in original units."""
    (factor,) = model.factors
    rows = model.encode(data).all()
    design = factor.design(rows.slope_inputs(), {})
    design = design @ torch.linalg.inv(factor.to_original / model.data_facts().spread)
    return dict(zip(factor.terms, design.T.numpy(), strict=True))


# ------------------------------------------------------------------------------ random effects


@pytest.mark.parametrize("features", [["f", "x"], "0 + f + x", "x"])
def test_without_an_intercept_a_factor_has_all_its_levels(features):
    data = encode(features=features, slopes=["f"])
    columns = phi(bind(data, "(0 + x + f | site)"), data)
    assert list(columns) == ["f[a]", "f[b]", "f[c]", "x"]
    for level in "abc":
        np.testing.assert_allclose(columns[f"f[{level}]"], frame()["f"] == level, atol=1e-12)
    np.testing.assert_allclose(columns["x"], frame()["x"])


@pytest.mark.parametrize("features", [["f", "x"], "0 + f + x"])
def test_with_an_intercept_a_factor_has_contrasts(features):
    data = encode(features=features)
    columns = phi(bind(data, "(1 + f | site)"), data)
    assert next(iter(columns)) == "Intercept"
    assert [name.replace("T.", "") for name in columns][1:] == ["f[b]", "f[c]"]


def test_double_bars_keep_the_indicators_of_a_factor_correlated():
    """lme4: (1 + f + x + z || g) is (1 | g) + (0 + f | g) + (0 + x | g) + (0 + z | g)."""
    model = bind(encode(), "(1 + f + x + z || site)")
    (factor,) = model.factors
    assert factor.terms == ("Intercept", "x", "z", "f[a]", "f[b]", "f[c]")
    assert [group.places for group, _ in factor.groups] == [(3, 4, 5)]


def test_machines_as_in_lme4():
    """lme4 (REML): sds 4.08, 8.63, 4.39, residual 0.96; means 52.36, 60.32, 66.27."""
    data = ClusteredData.from_frame(
        machines(), outcome="score", clusters=["worker"], features="0 + machine"
    )
    model = MixedEffects(nn.Linear(3, 1).double(), "(0 + machine | worker)", bayesian_head=True)
    result = fit(model, data, progress=False)
    table = result.variance_components()
    sds = table[table["statistic"] == "sd"].set_index("term")["median"]
    assert sds.iloc[-1] == pytest.approx(0.96, abs=0.08)  # of the residual
    # Medians of six workers' sds lie above the estimates; each is in the interval.
    bounds = table[table["statistic"] == "sd"].set_index("term")
    for machine, sd in {"A": 4.08, "B": 8.63, "C": 4.39}.items():
        assert sds[f"machine[{machine}]"] == pytest.approx(sd, rel=0.2)
        row = bounds.loc[f"machine[{machine}]"]
        assert row["lower"] < sd < row["upper"]
    means = result.to_datatree(draws=500)["posterior"]["fixed_effect"].mean(("chain", "draw"))
    assert list(means["fixed_term"].values) == ["machine[A]", "machine[B]", "machine[C]"]
    np.testing.assert_allclose(means, [52.36, 60.32, 66.27], atol=0.7)


@pytest.mark.parametrize("features", [["x"], "1", []])
def test_slopes_on_columns_beside_the_features(features, tmp_path):
    table = frame()
    data = encode(features=features, slopes=["z", "f"])
    assert data.feature_names == (("x",) if features == ["x"] else ())
    assert data.slope_names == ("z", "f[T.b]", "f[T.c]")
    model = bind(data, "(1 + z + f | site)")
    columns = phi(model, data)
    np.testing.assert_allclose(columns["z"], table["z"], atol=1e-9)
    np.testing.assert_allclose(columns["f[T.c]"], table["f"] == "c", atol=1e-9)

    net = nn.Linear(data.n_features, 1).double()
    program = MixedEffects(net, "(1 + z + f | site)", bayesian_head=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = fit(program, data, schedule=Schedule(steps=30), progress=False)
        result.save(tmp_path / "run", draws=20)
    loaded = Fit.load(tmp_path / "run", net=nn.Linear(data.n_features, 1).double())
    new = table.head(15).drop(columns="y")
    np.testing.assert_array_equal(loaded.predict(new).mean, result.predict(new).mean)
    torch.testing.assert_close(loaded.data.slopes, data.slopes)
    with pytest.raises(ValueError, match="no column 'z'"):
        result.predict(new.drop(columns="z"))


def test_a_slope_on_no_column_says_where_to_name_it():
    with pytest.raises(ValueError, match=r"'z', which is not among.*slopes=\['z'\]"):
        bind(encode(features=["x"]), "(1 + z | site)")


@pytest.mark.parametrize(
    ("text", "factor", "slopes"),
    [
        ("(1 + `dose (mg)` | `my site`)", "my site", ("dose (mg)",)),
        ("(1 + `a+b` + x | g)", "g", ("a+b", "x")),
        ("(1 + factor(dose) | g)", "g", ("dose",)),
        ("(1 + factor(`d 1`) || g)", "g", ("d 1",)),
        ("(1 | `1`)", "1", ()),
    ],
)
def test_names_in_backticks(text, factor, slopes):
    (term,) = parse_terms(text)
    assert (term.factor, term.slopes) == (factor, slopes)
    assert term.categorical == (slopes if "factor(" in text else ())
    assert parse_terms(str(term)) == (term,)


def test_factor_needs_categories():
    table = frame()
    with pytest.raises(ValueError, match=r"takes 'dose' as categories.*categorical=\['dose'\]"):
        bind(encode(table, features=["dose"]), "(1 + factor(dose) | site)")
    data = encode(table, features=["dose"], categorical=["dose"])
    names = bind(data, "(0 + factor(dose) | site)").factors[0].terms
    assert names == ("dose[1]", "dose[2]", "dose[3]")


def test_errors_show_names_in_backticks():
    with pytest.raises(ValueError, match=r"term '1 \+ `my x`\^2 \| g' has `my x`\^2"):
        parse_terms("(1 + `my x`^2 | g)")


def test_a_nested_factor_needs_all_its_columns():
    table = frame().assign(room=np.arange(120) % 24)
    with pytest.raises(ValueError, match=r"no grouping factor 'room'.*Add 'room' to clusters"):
        bind(encode(table, features=["x"]), "(1 | site/room)")


# ------------------------------------------------------------------------------- fixed effects


def test_no_intercept_in_the_fixed_part():
    """The posterior of y = b x + u + e, without an intercept, has the mean of least squares."""
    rng = np.random.default_rng(3)
    x = rng.normal(5, 1, 400)
    y = 7 + 2 * x + rng.normal(size=400)
    site = np.arange(400) % 20
    data = encode(pd.DataFrame({"y": y, "x": x, "site": site}), features="0 + x")
    result = fit(MixedEffects(nn.Linear(1, 1).double(), "(1 | site)", bayesian_head=True), data,
                 progress=False)  # fmt: skip
    assert result.model.fixed_terms() == ("x",)
    slope = result.to_datatree(draws=500)["posterior"]["fixed_effect"]
    # Without the intercept, sites take up the constant: generalised least squares is the truth.
    table = result.variance_components().set_index(["factor", "statistic"])["median"]
    V = np.eye(400) * table["Residual", "sd"] ** 2
    V += table["site", "sd"] ** 2 * (site[:, None] == site)
    weight = np.linalg.solve(V, x)
    assert float(slope.mean()) == pytest.approx(
        weight @ y / (weight @ x), abs=3 * float(slope.std()) / 5
    )
    assert float(result.predict(data).mean.mean()) == pytest.approx(y.mean(), rel=0.02)


@pytest.mark.parametrize("features", ["0 + f + x", "0 + x + f"])
def test_all_levels_in_the_place_of_the_intercept(features):
    """Cell means are the intercept plus contrasts: the two codings predict the same."""
    cells, contrasts = encode(features=features), encode(features="f + x")
    first, second = bind(cells), bind(contrasts)
    assert set(first.fixed_terms()) == {"f[a]", "f[b]", "f[c]", "x"}
    torch.manual_seed(0)
    draws = {"fixed_effect": torch.randn(7, 4, dtype=torch.float64)}
    for model, data in [(first, cells), (second, contrasts)]:
        raw = data.features.double()
        if model.has_intercept:
            raw = torch.cat([torch.ones(len(raw), 1).double(), raw], 1)
        rows = model.encode(data).all()
        output, activations = model.run_network(rows)
        latents = {"fixed_effect": draws["fixed_effect"][:, None]}
        eta = model.fixed_predictor(rows, output, activations, latents)[..., 0]
        expected = original_fixed_effects(model, draws) @ raw.T
        torch.testing.assert_close(eta, expected)


def test_networks_refuse_to_be_without_an_intercept():
    data = encode(features="0 + x")
    for net in (nn.Linear(1, 1), nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 1))):
        with pytest.raises(ValueError, match="a meaning for linear fixed effects only"):
            MixedEffects(net.double(), "(1 | site)").bind(data)
    assert bind(data, bias=False, head=False).data_facts().center == (0.0,)


def test_dependent_columns_are_dropped():
    table = frame()
    table = table.assign(twice=2 * table["x"] + 3, k=0.1, sum=table["x"] + table["z"])
    data = encode(table, features=["x", "twice", "k", "z", "sum", "f"])
    with pytest.warns(UserWarning, match="dropped 'twice', 'k', 'sum'") as record:
        model = bind(data)
    message = str(record[0].message)
    assert "'twice' is a copy of 'x'" in message
    assert "'k' is constant" in message
    assert "'sum' is a combination of 'x', 'z'" in message
    assert model.fixed_terms() == ("Intercept", "x", "z", "f[T.b]", "f[T.c]")
    facts = type(model.data_facts()).from_json(model.data_facts().to_json())
    assert facts.dropped == ("twice", "k", "sum")


def test_an_empty_cell_is_dropped():
    table = frame().assign(h=lambda t: np.where(t["f"] == "a", "u", np.resize(["u", "v"], 120)))
    with pytest.warns(UserWarning, match=r"dropped.*'f\[T.c\]:h\[T.v\]'"):
        assert len(bind(encode(table, features="f * h")).fixed_terms()) == 5


def test_more_columns_than_rows_are_left_to_the_prior():
    rng = np.random.default_rng(0)
    table = pd.DataFrame(rng.normal(size=(30, 40))).add_prefix("x")
    table = table.assign(y=rng.normal(size=30), site=np.arange(30) % 5)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*rank deficient")
        assert len(bind(encode(table)).fixed_terms()) == 41


def test_independent_columns_are_those_of_the_rank():
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(50, 8)) * 10.0 ** rng.integers(-6, 6, 8)
    matrix[:, 3] = matrix[:, :3] @ [1e3, 1, 2]
    matrix[:, 6] = 0
    assert independent_columns(matrix) == [0, 1, 2, 4, 5, 7]


def test_networks_keep_copies_and_refuse_constants():
    table = frame()
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)).double()
    data = encode(table.assign(copy=5 - 2 * table["x"]), features=["x", "copy"])
    with pytest.warns(UserWarning, match="copies of others, up to origin and unit: 'copy' of 'x'"):
        assert MixedEffects(net, "(1 | site)").bind(data).data_facts().dropped == ()
    with pytest.raises(ValueError, match="Constant in all training rows: 'k'"):
        MixedEffects(net, "(1 | site)").bind(encode(table.assign(k=0.1), features=["x", "k"]))


# ------------------------------------------------------------------------------------ formulas


@pytest.mark.parametrize(
    "formula", ["x^2", "x**2", "z + x^3", "x:x", "x*x", "`a b`^2", "(x)^2", "factor(x):x"]
)
def test_a_power_of_a_column_is_refused(formula):
    with pytest.raises(ValueError, match=r"itself, not its square.*\*\*[23]"):
        parse_features(formula)


@pytest.mark.parametrize("formula", ["(x + z)^2", "x * z", "(x + z) * (x + f)"])
def test_products_of_sums_are_read(formula):
    assert ("x", "z") in parse_features(formula).terms or ("z", "x") in parse_features(
        formula
    ).terms


@pytest.mark.parametrize(
    "options",
    [{"features": "x + factor(dose)"}, {"categorical": ["dose"], "features": ["x", "dose"]}],
)
def test_numbers_as_categories(options):
    data = encode(**options)
    assert data.feature_names == ("x", "dose[T.2]", "dose[T.3]")
    schema = Schema.from_json(data.schema.to_json())
    again = ClusteredData.encode(frame().head(4).astype({"dose": float}), schema)
    torch.testing.assert_close(again.features, data.features[:4])


def test_categorical_columns_are_features():
    with pytest.raises(ValueError, match=r"categorical= 'dosis'\. Did you mean 'dose'"):
        encode(categorical=["dosis"])


def test_a_schema_of_before_is_read():
    stored = encode(features=["x", "f"]).schema.to_json()
    stored = {name: value for name, value in stored.items() if name not in ("intercept", "slopes")}
    schema = Schema.from_json(stored)
    assert (schema.intercept, schema.slopes) == (True, ())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([f"{i},5" for i in range(12)], r"decimal=','"),
        ([f"{i}.5" for i in range(11)] + ["<0.5"], "text, but holds numbers"),
        ([str(i) for i in range(11)] + ["unknown"], "beside 'unknown'.*na_values"),
        ([f"{i}%" for i in range(12)], "text, but holds numbers"),
    ],
)
def test_numbers_read_as_text_are_refused(values, message):
    table = frame().assign(v=values * 10)
    with pytest.raises(ValueError, match=message):
        encode(table)
    assert encode(table, categorical=["v"]).schema.levels["v"].size == 12


@pytest.mark.parametrize(
    "values", [["1", "2", "3", "K"], ["a,5", "b,5"], ["1.2.3", "1.2.4"], ["01", "02"]]
)
def test_codes_are_categories(values):
    table = frame().assign(v=np.resize(np.array(values, object), 120))
    assert encode(table).schema.levels["v"].size == len(values)


def test_columns_that_identify_rows_are_not_taken_by_default():
    n = 120
    table = frame().assign(
        rownames=np.arange(n)[::-1] * 7,
        number=np.arange(1, n + 1),
        name=[f"p{i}" for i in range(n)],
    )
    with pytest.warns(UserWarning, match="they identify rows.*'rownames', 'number', 'name'"):
        data = encode(table, features=".")
    assert "number" not in data.sources
    assert "x" in data.sources
    assert "number" in encode(table, features=["x", "number"]).sources


def test_what_identifies_rows():
    rng = np.random.default_rng(0)
    assert identifies_rows(pd.Series(rng.permutation(30), name="v"))
    assert not identifies_rows(pd.Series(np.arange(30) * 2, name="v"))
    assert not identifies_rows(pd.Series(np.arange(30) % 29, name="v"))
    assert not identifies_rows(pd.Series(np.arange(30.0), name="v"))
    assert not identifies_rows(pd.Series(list("abc"), name="v"))
    assert identifies_rows(pd.Series([3, 7, 5], name="Unnamed: 0"))


@pytest.mark.parametrize("features", ["1", [], "0", "-1"])
def test_an_intercept_alone_or_nothing(features):
    data = encode(features=features)
    assert data.n_features == 0
    assert bind(data).fixed_terms() == (() if features in ("0", "-1") else ("Intercept",))


@pytest.mark.parametrize(
    ("features", "message"), [("", "names nothing"), ("`. + x", "is not closed")]
)
def test_formulas_that_name_nothing(features, message):
    with pytest.raises(ValueError, match=message):
        encode(features=features)


def test_trials_belong_to_families_that_have_them():
    data = replace(encode(features=["x"]), trials=torch.ones(120).double())
    with pytest.raises(ValueError, match="'gaussian' has no trials"):
        bind(data)
