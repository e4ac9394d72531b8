"""Survival curves, concordance and calibration, and the hazards of Cox regression."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from typer.testing import CliRunner

from armed_pyro import ClusteredData, Fit, model
from armed_pyro.cli import app
from armed_pyro.prediction.scores import evaluate
from armed_pyro.prediction.survival import harrell, kaplan_meier
from armed_pyro.priors import HalfNormal, Priors

duration = pytest.importorskip("statsmodels.duration.api")

SMALL = Priors(sd=HalfNormal(0.01), fixed_sd=20.0)


def hazards(n=500, seed=0):
    """Times whose hazard rises and falls, with a hazard ratio of exp(0.8)."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=n)
    # The cumulative hazard is log(1 + t^2) exp(0.8 x).
    t = np.sqrt(np.expm1(rng.exponential(size=n) / np.exp(0.8 * x)))
    end = rng.uniform(0.5, 4, n)
    frame = {"time": np.minimum(t, end), "died": (t <= end).astype(int), "x": x}
    return pd.DataFrame({**frame, "g": np.arange(n) % 10})


@pytest.fixture(scope="module")
def cox():
    """A piecewise-exponential fit, almost without frailty."""
    return model(
        "event(time, died) ~ x + (1 | g)",
        hazards(),
        family="piecewise_exponential(8)",
        priors=SMALL,
    ).fit(progress=False)


def test_the_hazard_ratio_is_that_of_cox_regression(cox):
    frame = hazards()
    reference = duration.PHReg(frame["time"], frame[["x"]], frame["died"], ties="efron").fit()
    row = cox.fixed_effects().set_index("term").loc["x"]
    assert abs(row["median"] - reference.params[0]) < 0.3 * row["sd"]
    assert row["sd"] == pytest.approx(reference.bse[0], rel=0.15)


def test_tables_have_the_hazards_of_the_pieces(cox):
    rows = cox.variance_components()
    family = cox.model.family
    names = [f"hazard[{label}]" for label in family.labels]
    assert rows["statistic"].isin(names).sum() == 8
    medians = rows.set_index("statistic").loc[names, "median"]
    assert np.prod(medians) == pytest.approx(1.0, rel=0.05)
    assert medians.iloc[0] < 0.5 * medians.iloc[3]  # the hazard 2 t / (1 + t^2) is 0 at first
    tree = cox.to_datatree(draws=10, groups=["posterior"])["posterior"]
    assert tree["hazard"].sizes["piece"] == 8


def test_a_hazard_of_the_wrong_form_is_told(cox):
    assert "no misfit found" in str(cox.diagnostics())
    wrong = model("event(time, died) ~ x + (1 | g)", hazards(), family="exponential", priors=SMALL)
    found = str(wrong.fit(progress=False).diagnostics())
    assert "no misfit found" not in found
    assert "weibull" in found


def test_curves_are_the_familys_survivor_function():
    rng = np.random.default_rng(1)
    frame = pd.DataFrame(
        {"t": rng.weibull(1.5, 60), "x": rng.normal(size=60), "g": np.arange(60) % 6}
    )
    fit = model("t ~ x + (1 | g)", frame, family="weibull").fit(steps=60, progress=False)
    new = frame.iloc[:3]
    made = fit.survival(new, [0.0, 0.5, 2.0], draws=200, prob=0.8)
    draws, shape = fit.draws(200), fit.draws(200)["shape"].flatten().double().numpy()
    rows = fit.model.encode(fit.data.take(slice(0, 3))).all()
    with torch.no_grad():
        eta = fit.model.predictor(rows, draws).eta[..., 0].double().numpy()
    for place, time in enumerate([0.0, 0.5, 2.0]):
        expected = stats.weibull_min.sf(time, shape[:, None], scale=np.exp(eta))
        np.testing.assert_allclose(made["survival"][:, place], expected.mean(0), rtol=1e-6)
        np.testing.assert_allclose(
            made["upper"][:, place], np.quantile(expected, 0.9, 0), rtol=1e-6
        )
    median = np.exp(eta) * np.log(2) ** (1 / shape[:, None])
    np.testing.assert_allclose(made["median"], median.mean(0), rtol=1e-6)
    assert fit.survival(new, draws=20).sizes["time"] == 50
    assert float(made["survival"].isel(time=0).min()) == 1.0
    with pytest.raises(ValueError, match="finite numbers"):
        fit.survival(new, [np.inf])


def test_curves_of_a_shape_that_depends_on_a_feature():
    rng = np.random.default_rng(4)
    x = rng.normal(size=80)
    frame = pd.DataFrame({"t": rng.weibull(np.exp(0.3 * x)), "x": x, "g": np.arange(80) % 8})
    formulas = ["t ~ x + (1 | g)", "shape ~ x"]
    fit = model(formulas, frame, family="weibull").fit(steps=40, progress=False)
    made, draws = fit.survival(frame[:3], [0.5], draws=100), fit.draws(100)
    rows = fit.model.encode(fit.data.take(slice(0, 3))).all()
    with torch.no_grad():
        eta = fit.model.predictor(rows, draws).eta.double().numpy()
    expected = stats.weibull_min.sf(0.5, np.exp(eta[..., 1]), scale=np.exp(eta[..., 0]))
    np.testing.assert_allclose(made["survival"][:, 0], expected.mean(0), rtol=1e-6)


def test_families_without_a_survivor_function_say_so():
    frame = pd.DataFrame({"n": [0, 1, 2, 3] * 5, "g": np.arange(20) % 5})
    fit = model("n ~ 1 + (1 | g)", frame, family="poisson").fit(steps=5, progress=False)
    with pytest.raises(ValueError, match="family 'poisson' has no survivor function"):
        fit.survival(frame)


def test_concordance_is_the_share_of_ordered_pairs():
    rng = np.random.default_rng(2)
    time, predicted = rng.integers(1, 20, 60).astype(float), rng.integers(0, 9, 60).astype(float)
    event = rng.uniform(size=60) < 0.6
    right = pairs = 0.0
    for i, j in itertools.permutations(range(60), 2):
        if event[i] and (time[i] < time[j] or (time[i] == time[j] and not event[j])):
            pairs += 1
            right += (predicted[i] < predicted[j]) + 0.5 * (predicted[i] == predicted[j])
    assert harrell(time, event.astype(float), predicted) == pytest.approx(right / pairs)
    assert np.isnan(harrell(time, np.zeros(60), predicted))


@pytest.mark.parametrize("late", [False, True], ids=["all", "late"])
def test_kaplan_and_meiers_estimate_is_that_of_statsmodels(late):
    rng = np.random.default_rng(3)
    time, event = rng.integers(2, 30, 80).astype(float), rng.uniform(size=80) < 0.7
    entry = rng.uniform(0, 2, 80) if late else None
    at = np.array([1.0, 5.5, 12.0, 28.0])
    made = kaplan_meier(time, event, at, entry=entry)
    options = {} if entry is None else {"entry": entry}
    reference = duration.SurvfuncRight(time, event.astype(int), **options)
    place = np.searchsorted(reference.surv_times, at, "right")
    expected = np.concatenate([[1.0], reference.surv_prob])[place]
    np.testing.assert_allclose(made["observed"], expected, rtol=1e-10)
    error = np.concatenate([[0.0], reference.surv_prob_se])[place][1:]
    share = expected[1:]
    width = np.exp(stats.norm.ppf(0.95) * error / (share * -np.log(share)))
    np.testing.assert_allclose(made["lower"][1:], share**width, rtol=1e-8)
    np.testing.assert_allclose(made["upper"][1:], share ** (1 / width), rtol=1e-8)


def test_held_out_rows_are_scored_by_their_order(cox):
    frame = hazards(seed=5)
    rows = ClusteredData.encode(frame, cox.data.schema)
    table = evaluate(cox.posterior, {"new": rows}, draws=50)
    assert list(table) == ["held_out", "rows", "unseen", "concordance"]
    expected = harrell(
        frame["time"].to_numpy(), frame["died"].to_numpy(float), -frame["x"].to_numpy()
    )
    # Effects of clusters are almost 0, and the order by the hazard is that by x.
    assert table["concordance"][0] == pytest.approx(expected, abs=0.01)
    assert cox.concordance(rows, draws=50) == pytest.approx(table["concordance"][0], abs=1e-3)
    calibration = cox.survival_calibration(rows, draws=50)
    assert ((calibration["observed"] - calibration["predicted"]).abs() < 0.06).all()


def test_the_command_line_takes_statuses_and_entries(tmp_path):
    frame = hazards(n=80).assign(start=0.01)
    frame["time"] = frame["time"] + 0.05
    frame.to_csv(tmp_path / "rows.csv", index=False)
    columns = ["--outcome", "time", "--status", "died", "--entry", "start", "--features", "x"]
    made = CliRunner().invoke(
        app,
        [
            *("fit", f"{tmp_path}/rows.csv", *columns, "--random", "(1 | g)"),
            *("--family", "weibull(hazard)", "--steps", "20", "--out", f"{tmp_path}/run"),
        ],
    )
    assert made.exit_code == 0, made.output
    fit = Fit.load(tmp_path / "run")
    assert fit.model.family.is_censored
    assert fit.data.entry.tolist() == [0.01] * 80
    patients = f"{tmp_path}/new.csv"
    frame[["x", "g"]].to_csv(patients, index=False)
    pred = ["predict", f"{tmp_path}/run", patients, "--out", f"{tmp_path}/pred.csv"]
    assert CliRunner().invoke(app, pred).exit_code == 0
    assert (pd.read_csv(tmp_path / "pred.csv")["mean"] > 0).all()
    both = CliRunner().invoke(
        app,
        [
            *("fit", f"{tmp_path}/rows.csv", "event(time, died) ~ x + (1 | g)", "--status", "died"),
            *("--family", "weibull", "--out", f"{tmp_path}/other"),
        ],
    )
    assert both.exit_code != 0
    assert "--status stands beside status(died) in the formula" in " ".join(both.output.split())
