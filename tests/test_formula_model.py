"""`model`: one formula in Python, in the shell and in scikit-learn; labels that are missing."""

import json

import numpy as np
import pandas as pd
import pytest
from torch import nn
from typer.testing import CliRunner

import armed_pyro
from armed_pyro import (
    Adversary,
    ClusteredData,
    Fit,
    MixedEffects,
    MixedEffectsRegressor,
    Schedule,
    StreamedData,
    fit,
    model,
)
from armed_pyro.cli import app
from armed_pyro.networks.by_name import network

FORMULA = "Reaction ~ Days + (Days | Subject)"


def call(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def sleep():
    rng = np.random.default_rng(0)
    subject = np.repeat(np.arange(18), 10)
    days = np.tile(np.arange(10.0), 18)
    intercept, slope = rng.normal(0, 25, 18), rng.normal(0, 6, 18)
    mean = 250 + intercept[subject] + (10 + slope[subject]) * days
    reaction = mean + rng.normal(0, 25, 180)
    labels = [f"s{number:02d}" for number in subject]
    return pd.DataFrame({"Reaction": reaction, "Days": days, "Subject": labels})


@pytest.fixture(scope="module")
def fitted(sleep):
    return model(FORMULA, sleep).fit(steps=150, progress=False, compile="never")


def test_the_long_way_gives_the_same(sleep, fitted):
    data = ClusteredData.from_frame(sleep, outcome="Reaction", clusters=["Subject"])
    program = MixedEffects(network("linear", 1), "(Days | Subject)", bayesian_head=True)
    schedule = Schedule(steps=150)
    long = fit(program, data, schedule=schedule, progress=False, compile="never")
    pd.testing.assert_frame_equal(long.fixed_effects(), fitted.fixed_effects())
    pd.testing.assert_frame_equal(long.variance_components(), fitted.variance_components())


def test_the_command_line_gives_the_same(sleep, fitted, tmp_path):
    sleep.to_csv(tmp_path / "sleep.csv", index=False)
    run = tmp_path / "run"
    more = ["--steps", "150", "--compile", "never", "--device", "cpu"]
    call("fit", str(tmp_path / "sleep.csv"), FORMULA, "--out", str(run), *more)
    table = pd.read_csv(run / "fixed_effects.csv")
    expected = fitted.fixed_effects()
    np.testing.assert_allclose(table["mean"], expected["mean"], rtol=1e-6)
    np.testing.assert_allclose(table["sd"], expected["sd"], rtol=1e-6)


def test_scikit_learn_gives_the_same(sleep, fitted):
    estimator = MixedEffectsRegressor("(Days | Subject)", steps=150, random_state=0)
    estimator.fit(sleep[["Days"]], sleep["Reaction"], groups=sleep["Subject"])
    made, expected = estimator.fit_.fixed_effects(), fitted.fixed_effects()
    # The seed is drawn from random_state, so that the draws differ; 1,000 draws and more of each.
    error = expected["sd"] * np.sqrt(2 / 1000)
    assert (np.abs(made["mean"] - expected["mean"]) < 5 * error).all()
    assert (np.abs(made["sd"] / expected["sd"] - 1) < 0.15).all()


def test_a_formula_stands_beside_no_other_option(sleep, tmp_path):
    sleep.to_csv(tmp_path / "sleep.csv", index=False)
    for more, message in (
        ([FORMULA, "--outcome", "Reaction"], "--outcome stands beside a formula"),
        (["--random", "(1 | Subject)"], "--outcome Y is missing"),
        (["--outcome", "Reaction"], "--random TERM is missing"),
        (["Reaction ~ Days", "--hold-out-clusters", "0.2"], "needs a random effect"),
        (["Days + (1 | Subject)"], "has no outcome"),
    ):
        command = ["fit", str(tmp_path / "sleep.csv"), *more, "--out", str(tmp_path / "run")]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 2
        assert message in " ".join(done.stderr.split())


def test_parts_of_a_formula(sleep):
    table = sleep.assign(n=5, w=1.5, dose=np.tile([1, 2, 3], 60), site=sleep["Subject"].str[-1])
    made = model(
        "Reaction | weights(w) ~ poly(Days, 2) + (C(dose, Sum) + log(w + Days) || Subject/site)",
        table,
        weights_kind="precision",
    )
    assert made.data.feature_names == ("poly(Days, 2)[1]", "poly(Days, 2)[2]")
    slopes = ("C(dose, Sum)[S.1]", "C(dose, Sum)[S.2]", "log(w + Days)")
    assert made.data.slope_names == slopes
    assert [str(term) for term in made.program.terms] == [
        "(1 + C(dose, Sum) + log(w + Days) || Subject)",
        "(1 + C(dose, Sum) + log(w + Days) || Subject:site)",
    ]
    factor = made.program.bind(made.data).factors[0]
    assert factor.terms == ("Intercept", "log(w + Days)", *slopes[:2])
    assert set(made.data.groupings) == {"Subject", "site"}
    assert made.data.weights is not None
    assert repr(made).startswith("Model('Reaction | weights(w)")


def test_without_an_intercept_every_level_has_an_effect(sleep):
    table = sleep.assign(dose=np.tile([1, 2, 3], 60))
    made = model("Reaction ~ Days + (0 + C(dose, Sum) | Subject)", table)
    (factor,) = made.program.bind(made.data).factors
    assert factor.terms == ("dose[1]", "dose[2]", "dose[3]")
    plain = model("Reaction ~ Days + (0 + factor(dose) | Subject)", table)
    assert made.program.terms == plain.program.terms


def waves(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 4), nn.Tanh(), nn.Linear(4, 1))


@pytest.mark.parametrize("net", [waves, "dense", nn.Linear(1, 1), nn.Linear])
def test_networks(sleep, net):
    made = model("Reaction ~ Days + (1 | Subject)", sleep, net=net, seed=3)
    assert not made.program.bayesian_head
    again = model("Reaction ~ Days + (1 | Subject)", sleep, net=net, seed=3)
    first, second = made.program.net.state_dict(), again.program.net.state_dict()
    assert all((first[name] == second[name]).all() for name in first)


def test_an_adversary_by_its_factor(sleep):
    table = sleep.assign(day=sleep["Days"] % 3)
    made = model("Reaction ~ Days + (1 | Subject)", table, net="dense", adversary="day")
    (adversary,) = made.program.adversaries
    assert (adversary.factor, adversary.taps) == ("day", ("1", "3"))
    chosen = Adversary("Subject", ["1"], weight=2.0)
    made = model("Reaction ~ Days + (1 | Subject)", table, net="dense", adversary=chosen)
    assert made.program.adversaries[0].weight == 2.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"net": 3}, "net must be 'linear'"),
        ({"net": lambda: 3}, "gives a int, expected a torch.nn.Module"),
        ({"family": "gauss"}, "unknown family"),
        ({"event": "yes"}, "event='yes' names one of two labels"),
    ],
)
def test_wrong_arguments(sleep, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        model(FORMULA, sleep, **arguments)


def test_wrong_settings_of_fit(sleep):
    with pytest.raises(TypeError, match="either schedule=, or its parts: steps"):
        model(FORMULA, sleep).fit(steps=3, schedule=Schedule())
    with pytest.raises(TypeError, match="stepz"):
        model(FORMULA, sleep).fit(stepz=3)
    with pytest.raises(ValueError, match=r"no column 'Dayz'\. Did you mean 'Days'"):
        model("Reaction ~ Dayz + (1 | Subject)", sleep)


def test_functions_survive_saving(sleep, tmp_path):
    formula = "Reaction ~ ns(Days, df=3) + offset(log(Days + 1)) + (scale(Days) | Subject)"
    made = model(formula, sleep).fit(steps=30, progress=False)
    made.save(tmp_path / "run")
    loaded = Fit.load(tmp_path / "run")
    new = sleep.head(4).assign(Days=[0.5, 3.0, 4.5, 20.0])
    options = {"draws": 50, "seed": 1}
    first, second = made.predict(new, **options), loaded.predict(new, **options)
    np.testing.assert_allclose(first.mean, second.mean, rtol=1e-6)
    # Rows one by one have the same knots and means as together.
    alone = [loaded.predict(new.iloc[[n]], **options).mean[0] for n in range(4)]
    np.testing.assert_allclose(alone, second.mean, rtol=1e-6)
    schema = json.loads((tmp_path / "run" / "manifest.json").read_text())["facts"]["schema"]
    assert schema["calls"]["scale(Days)"]["scale(Days)"]["center"] == [4.5]


def test_effects_of_a_variable_inside_functions(sleep):
    """The model is linear in Days through poly(Days, 1), so slopes are those of Days itself."""
    made = model("Reaction ~ poly(Days, 1) + (1 | Subject)", sleep).fit(steps=100, progress=False)
    slope = made.slopes("Days").to_frame()
    coefficient = made.fixed_effects().set_index("term").loc["poly(Days, 1)[1]"]
    norm = np.sqrt(((sleep["Days"] - 4.5) ** 2).sum())
    # Both are means over draws, of which there are at least 1,000.
    error = coefficient["sd"] / norm / np.sqrt(1000)
    assert abs(slope["mean"][0] - coefficient["mean"] / norm) < 4 * error
    assert slope["sd"][0] == pytest.approx(coefficient["sd"] / norm, rel=0.1)


def test_priors_do_not_depend_on_contrasts(sleep):
    """The prior of E[y] in every cell is that of treatment coding, whatever the contrasts."""
    table = sleep.assign(dose=np.tile(list("abc"), 60))
    covariances = []
    for features in ("dose * Days", "C(dose, Sum) * Days", "C(dose, Helmert) * Days"):
        made = model(f"Reaction ~ {features} + (1 | Subject)", table)
        bound = made.program.bind(made.data)
        assert bound.fixed_root is not None
        x = bound.data_facts().scaling.standardise(made.data.features[:30]).numpy()
        design = np.column_stack([np.ones(30), x])
        root = design @ bound.fixed_root.numpy()
        covariances.append(root @ root.T)
    np.testing.assert_allclose(covariances[1], covariances[0], atol=1e-8)
    np.testing.assert_allclose(covariances[2], covariances[0], atol=1e-8)


# ------------------------------------------------------------------------------ streamed tables


@pytest.mark.parametrize(
    "features", ["x + offset(log(days))", "log(x) * C(f, Sum) + I(x**2) + offset(log(days))"]
)
def test_streamed_tables_have_formulas(tmp_path, features):
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"x": rng.uniform(1, 9, 300), "days": rng.uniform(1, 20, 300)})
    table["f"], table["g"] = rng.choice(list("abc"), 300), np.arange(300) % 15
    table["y"] = rng.poisson(table["days"] * np.exp(-2 + rng.normal(0, 0.4, 15)[table["g"]]))
    table.to_parquet(tmp_path / "rows.parquet")
    roles = {"outcome": "y", "clusters": ["g"], "features": features}
    streamed = StreamedData.scan(tmp_path / "rows.parquet", **roles)
    held = ClusteredData.from_frame(table, **roles)
    assert streamed.feature_names == held.feature_names
    made = []
    for data in (streamed, held):
        net = network("linear", data.n_features)
        program = MixedEffects(net, "(1 | g)", "poisson", bayesian_head=True)
        result = fit(program, data, schedule=Schedule(steps=20), progress=False)
        made.append(result.fixed_effects())
    np.testing.assert_allclose(made[0]["mean"], made[1]["mean"], rtol=1e-4, atol=1e-4)


def test_streamed_tables_learn_nothing(tmp_path, sleep):
    sleep.to_parquet(tmp_path / "rows.parquet")
    roles = {"outcome": "Reaction", "clusters": ["Subject"]}
    with pytest.raises(ValueError, match=r"poly\(Days, 2\), which learns from all rows"):
        StreamedData.scan(tmp_path / "rows.parquet", features="poly(Days, 2)", **roles)


# ------------------------------------------------------------------------------ missing labels


@pytest.fixture(scope="module")
def told():
    """Two groups of clusters that their features tell apart, with effects near -3 and 3."""
    rng = np.random.default_rng(1)
    site = np.repeat(np.arange(12), 25)
    side = np.where(site < 6, -1.0, 1.0)
    table = pd.DataFrame({"site": [f"s{n}" for n in site]})
    table["x"] = 4 * side + rng.normal(size=len(site))
    table["z"] = rng.normal(size=len(site))
    table["y"] = table["z"] + 3 * side + 0.3 * rng.normal(size=len(site))
    return table, model("y ~ z + x + (1 | site)", table).fit(steps=150, progress=False)


def test_a_missing_label_is_an_unknown_identity(told):
    _, fitted = told
    rows = pd.DataFrame(
        {
            "z": [0.0, 0.0, 0.0, 0.0],
            "x": [-4.0, 4.0, 4.0, 4.0],
            "site": [None, None, "s99", "s11"],
        }
    )
    made = fitted.predict(rows, unseen="marginal", draws=200)
    assert made.unseen.tolist() == ["membership", "membership", "marginal", ""]
    alone = fitted.predict(rows.iloc[:2], draws=200)  # no mode is needed
    assert alone.unseen.tolist() == ["membership"] * 2
    np.testing.assert_allclose(alone.mean, made.mean[:2], rtol=1e-6)
    told_by_features = fitted.predict(
        rows.iloc[:2].assign(site=["a", "b"]), unseen="membership", draws=200
    )
    # As rows of clusters with features of their own, up to the draws of the seen cluster.
    spread = alone.sd + told_by_features.sd
    assert (np.abs(alone.mean - told_by_features.mean) < 5 * spread / np.sqrt(200)).all()
    new = fitted.predict(rows, unseen="marginal", draws=200).new["site"]
    assert new.modes.count("membership") == 2


@pytest.mark.parametrize("unseen", ["membership", "nearest", "population"])
def test_missing_labels_beside_every_mode(told, unseen):
    table, fitted = told
    rows = table.head(6).drop(columns="y").assign(site=["s0", None, "s98", "s98", None, "s99"])
    for pooled in (True, False):
        made = fitted.predict(rows, unseen=unseen, draws=50, pooled=pooled)
        expected = ["", "membership", unseen, unseen, "membership", unseen]
        assert made.unseen.tolist() == expected


def test_missing_labels_on_the_command_line(told, tmp_path):
    table, fitted = told
    rows = table.head(6).drop(columns="y").assign(site=["s0", None, "s99", "s1", None, "s0"])
    fitted.save(tmp_path / "run")
    rows.to_csv(tmp_path / "new.csv", index=False)
    out = tmp_path / "pred.csv"
    common = ["predict", str(tmp_path / "run"), str(tmp_path / "new.csv"), "--out", str(out)]
    call(*common, "--unseen", "population", "--draws", "100")
    written = pd.read_csv(out, keep_default_na=False)
    assert written["unseen"].tolist() == ["", "membership", "population", "", "membership", ""]
    made = fitted.predict(rows, unseen="population", draws=100)
    np.testing.assert_allclose(written["mean"].astype(float), made.mean, rtol=1e-5)


def test_training_needs_labels(told):
    table = told[0].copy()
    table.loc[3, "site"] = None
    with pytest.raises(ValueError, match="Missing values in 'site'"):
        model("y ~ z + (1 | site)", table)


def test_a_list_of_public_names():
    assert {"model", "Model"} <= set(armed_pyro.__all__)
