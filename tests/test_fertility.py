import numpy as np
import pandas as pd
import pytest

from armed_pyro import Fit, Schedule
from armed_pyro.analysis.applications import fertility
from armed_pyro.analysis.applications.mixedlm import MixedModel


@pytest.fixture(scope="module")
def table():
    return fertility.load()


@pytest.fixture(scope="module")
def parts(table):
    return fertility.split(table, seed=0)


def test_countries_without_aggregates(table):
    words = "World|income|area|Area|members|small states|Euro|Arab World|region|IDA|IBRD|&|\\(IFC"
    countries = table["country"].drop_duplicates()
    assert not countries[countries.str.contains(words)].tolist()
    assert countries.size == 206
    assert {"United States", "Micronesia, Fed. Sts.", "Channel Islands"} <= set(countries)


def test_rows(table):
    assert not table.duplicated(["country", "year"]).any()
    assert table["fertility"].between(0.5, 10).all()
    assert table["year"].min() == 1960
    assert table["year"].max() == 2011
    np.testing.assert_allclose(table["decade"], (table["year"] - 1990) / 10)
    assert set(table.loc[table["period"] == "2004", "year"]) == set(range(2004, 2012))


def test_another_edition_of_the_panel_is_refused(monkeypatch):
    monkeypatch.setattr(fertility, "AGGREGATES", {"WLD": "World"})
    with pytest.raises(ValueError, match=r"WLD.*bring AGGREGATES up to date"):
        fertility.load()


def test_split_holds_out_countries_and_years(table, parts):
    assert parts.train["year"].max() == 2003
    assert parts.later["year"].min() == 2004
    assert set(parts.later["country"]) <= set(parts.train["country"])
    assert not set(parts.unseen["country"]) & set(parts.train["country"])
    assert parts.unseen["country"].nunique() == round(206 / 5)


def test_mixed_model_predicts_as_its_joint_normal(parts):
    few = parts.train[parts.train["country"].isin(parts.train["country"].unique()[:12])]
    model = MixedModel(few, "fertility", "country", "decade", "decade", prob=0.9)
    fitted = model.forecast(few, "marginal")
    np.testing.assert_allclose(fitted["mean"], model.result.fittedvalues, atol=1e-6)
    new = parts.unseen[parts.unseen["country"] == parts.unseen["country"].iloc[0]]
    wide, narrow = model.forecast(new, "marginal"), model.forecast(new, "population")
    z = np.column_stack([np.ones(len(new)), new["decade"]])
    variance = ((wide["upper"] - wide["lower"]) / 2 / 1.6448536) ** 2
    variance -= ((narrow["upper"] - narrow["lower"]) / 2 / 1.6448536) ** 2
    np.testing.assert_allclose(variance, (z @ model.covariance * z).sum(1))
    np.testing.assert_allclose(wide["mean"], narrow["mean"])


def test_autocorrelation_pairs_consecutive_years_of_a_country():
    rows = pd.DataFrame({"country": ["a"] * 3 + ["b"] * 2, "year": [1960, 1961, 1962, 1960, 1962]})
    # Pairs (1, -1) and (-1, 1): b has a gap, and a's last year does not meet b's first.
    assert fertility.autocorrelation(rows, np.array([1.0, -1, 1, -0.5, -0.5])) == pytest.approx(-1)


def test_smoke_run_writes_everything(tmp_path, capsys):
    fertility.main(["--smoke", "--out", str(tmp_path)])
    columns = {
        "variance_components.csv": "model statistic kind estimate sd lower upper",
        "evaluation.csv": "model countries years mode rows rmse coverage width interval_score",
        "horizons.csv": "model horizon rows rmse coverage width interval_score lag1",
    }
    for name, expected in columns.items():
        assert list(pd.read_csv(tmp_path / name)) == expected.split()
    evaluation = pd.read_csv(tmp_path / "evaluation.csv")
    assert evaluation["model"].nunique() == 5
    assert len(evaluation) == 5 * 5
    assert set(evaluation["mode"].dropna()) == {"marginal", "population"}
    for name in ("country_effects", "curves", "predictive_check", "horizons"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    assert Fit.load(tmp_path / "run").model.data_facts().outcome_name == "fertility"
    printed = capsys.readouterr().out
    assert "OECD members" in printed
    assert "evaluation.csv" in printed


@pytest.mark.slow
def test_linear_program_agrees_with_reml(parts):
    schedule = Schedule(steps=3000, batch_size=len(parts.train))
    result = fertility.train_program(parts.train, [fertility.SLOPE], schedule, 0, ())
    ours = fertility.components("ours", result).set_index("statistic")
    reml = MixedModel(parts.train, "fertility", "country", "decade", "decade").components()
    for name in ("sd Intercept", "sd decade"):
        distance = abs(ours.loc[name, "estimate"] - reml[name])
        assert distance < max(0.05 * reml[name], 0.5 * ours.loc[name, "sd"])
    assert ours.loc["residual sd", "estimate"] == pytest.approx(reml["residual sd"], rel=0.02)
    name = "cor Intercept,decade"
    assert abs(ours.loc[name, "estimate"] - reml[name]) < 0.5 * ours.loc[name, "sd"]
    forecast = fertility.forecast_with(result)(parts.unseen, "marginal")
    assert 0.80 < fertility.score(forecast)["coverage"] < 0.97
