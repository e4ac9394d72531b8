"""tune(): folds, standard errors, the rule of one standard error, and scores with known truth."""

import inspect
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from armed_pyro import (
    Adversary,
    ClusteredData,
    DivergenceError,
    Fit,
    MixedEffects,
    Priors,
    Schedule,
    fit,
    tune,
)
from armed_pyro.cli import app
from armed_pyro.data.simulate import wages
from armed_pyro.data.stratify import cluster_folds
from armed_pyro.families.simulate import mixed_model
from armed_pyro.models.dense import dense
from armed_pyro.models.linear import linear
from armed_pyro.tuning import folds
from armed_pyro.tuning.result import Scored, choose, score_table
from armed_pyro.tuning.settings import changed, distances, grid_of, setting_names

QUICK = Schedule(steps=150)


def linear_model(data: ClusteredData, family: str = "gaussian") -> MixedEffects:
    return MixedEffects(linear(data.n_features), "(1 | site)", family, bayesian_head=True)


def two_layers(data: ClusteredData, **settings: object) -> MixedEffects:
    game = Adversary("site", taps=["1"], weight=2.0, hidden=[4])
    return MixedEffects(
        dense(data.n_features, hidden=(4,)), "(1 | site)", adversary=game, **settings
    )


# --- folds


def test_folds_of_clusters_are_whole_even_and_random() -> None:
    codes = np.repeat(np.arange(23), np.arange(1, 24))
    fold = cluster_folds(codes, 4, seed=0)
    of_cluster = pd.Series(fold).groupby(codes)
    assert (of_cluster.min() == of_cluster.max()).all()
    assert sorted(np.bincount(of_cluster.first())) == [5, 6, 6, 6]
    assert np.ptp(np.bincount(fold)) <= 23 + 3 * 4  # a block of sizes differs by less than 4
    assert (cluster_folds(codes, 4, seed=1) != fold).any()


def test_folds_of_crossed_factors_hold_out_clusters_of_one_factor() -> None:
    pupil, item = np.divmod(np.arange(200), 10)
    school = pupil // 5
    clusters = {"pupil": pupil, "item": item, "school": school}
    data = ClusteredData.from_arrays(np.zeros((200, 1)), np.arange(200.0), clusters)
    tested = []
    for part in folds.make_folds(data, "clusters", "pupil", 4, support=3, seed=0):
        assert part.support is not None
        held = set(part.test.grouping("pupil").levels)
        assert held.isdisjoint(part.train.grouping("pupil").levels)
        assert held == set(part.support.grouping("pupil").levels)
        assert part.support.grouping("pupil").counts.tolist() == [3] * len(held)
        assert part.train.grouping("item").n_clusters == 10
        assert part.train.grouping("school").n_clusters == 4
        tested += [*part.test.row_labels, *part.support.row_labels]
    assert sorted(tested) == list(range(200))
    # A class is new with its school, and the cells of two factors can be held out.
    for part in folds.make_folds(data, "clusters", "school", 2, support=0, seed=0):
        held = part.test.grouping("pupil").levels
        assert set(held).isdisjoint(part.train.grouping("pupil").levels)
    cells = next(folds.make_folds(data, "clusters", "school:item", 4, support=0, seed=0))
    held = cells.test.grouping("school:item").levels
    assert set(held).isdisjoint(cells.train.grouping("school:item").levels)


def test_a_support_of_all_rows_is_refused() -> None:
    data, _ = mixed_model("gaussian", 6, 3)
    with pytest.raises(ValueError, match="support=3 leaves no row of the held-out clusters"):
        next(folds.make_folds(data, "clusters", "site", 2, support=3, seed=0))


# --- the table and the choice


def test_standard_errors_are_those_of_leaving_out_clusters() -> None:
    rng = np.random.default_rng(0)
    rows = rng.integers(2, 30, 80).astype(float)
    common = rng.normal(size=80) * rows
    sums = common + rng.normal(size=(3, 80)) * rows**0.5 + np.array([[0.0], [0.1], [0.3]]) * rows
    loss = rows * rng.gamma(4.0, 0.25, (3, 80))
    grid = [{"a": k} for k in range(3)]
    table = score_table(grid, Scored(rows, sums, loss), "rmse", classes=False)
    np.testing.assert_allclose(table["log_score"], sums.sum(1) / rows.sum())
    np.testing.assert_allclose(table["rmse"], np.sqrt(loss.sum(1) / rows.sum()))

    def jackknife(statistic: object) -> np.ndarray:
        left = np.array([statistic(np.delete(np.arange(80), k)) for k in range(80)])  # type: ignore[operator]
        return np.sqrt(79 / 80 * ((left - left.mean(0)) ** 2).sum(0))

    best = int(table["rmse"].argmin())
    expected = {
        "log_score_se": jackknife(lambda c: sums[:, c].sum(1) / rows[c].sum()),
        "rmse_se": jackknife(lambda c: np.sqrt(loss[:, c].sum(1) / rows[c].sum())),
        "difference_se": jackknife(
            lambda c: (r := np.sqrt(loss[:, c].sum(1) / rows[c].sum())) - r[best]
        ),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(table[name], value, rtol=0.05, atol=1e-12)


def test_accuracy_is_one_minus_the_loss_and_higher_is_better() -> None:
    rows, loss = np.full(10, 4.0), np.zeros((2, 10))
    loss[0, :5], loss[1, :2] = 2.0, 2.0
    scored = Scored(rows, -loss, loss)
    table = score_table([{"a": 0}, {"a": 1}], scored, "accuracy", classes=True)
    assert table["accuracy"].tolist() == [0.75, 0.9]
    assert table["difference"].tolist() == pytest.approx([-0.15, 0.0])
    # Three clusters differ, each by 2 of 40 rows.
    expected = math.sqrt(10 / 9 * (3 * (0.05 - 0.015) ** 2 + 7 * 0.015**2))
    assert table["difference_se"][0] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("difference", "error", "distance", "chosen"),
    [
        ([-0.5, -0.1, 0.0], [0.2, 0.2, 0.0], [0, 1, 2], 1),  # the default is too far off
        ([-0.1, -0.1, 0.0], [0.2, 0.2, 0.0], [0, 1, 2], 0),
        ([-0.1, -0.05, 0.0], [0.2, 0.2, 0.0], [1, 1, 2], 1),  # as near: the better
        ([-0.1, -0.1, 0.0], [0.05, 0.05, 0.0], [0, 1, 2], 2),
        ([math.nan, -0.1, 0.0], [math.nan, 0.2, 0.0], [0, 1, 2], 1),  # a fit diverged
        ([-0.1, -0.1, 0.0], [math.nan] * 3, [0, 1, 2], 2),  # a single cluster has no error
    ],
)
def test_the_nearest_to_the_default_within_one_error_is_chosen(
    difference: list[float], error: list[float], distance: list[int], chosen: int
) -> None:
    table = pd.DataFrame({"difference": difference, "difference_se": error})
    assert choose(table, distance, "log_score") == (2, chosen)
    assert choose(table.assign(difference=-table["difference"]), distance, "rmse") == (2, chosen)


def test_the_default_is_the_models_value_or_the_first() -> None:
    data, _ = mixed_model("gaussian", 4, 5)
    grid = grid_of({"fixed_weight": [3.0, 0.0, 1.0], "adversary_weight": [1.0, 2.0]})
    by_model = distances(grid, two_layers(data))
    expected = {3.0: 1, 0.0: 0, 1.0: 1}, {1.0: 1, 2.0: 0}
    assert by_model == [expected[0][s["fixed_weight"]] + expected[1][s["adversary_weight"]]
                        for s in grid]  # fmt: skip
    assert distances([{"width": 8}, {"width": 32}, {"width": 16}], None) == [0, 1, 2]


# --- settings


def test_a_program_is_made_again_with_every_argument() -> None:
    data, _ = mixed_model("gaussian", 4, 5)
    model = two_layers(data, priors=Priors(fixed_sd=3.0), dtype=torch.float32, fixed_weight=0.5)
    new = changed(model, {"fixed_weight": 2.0, "adversary_weight": 0.1})
    assert (new.fixed_weight, model.fixed_weight) == (2.0, 0.5)
    assert (new.adversaries[0].weight, model.adversaries[0].weight) == (0.1, 2.0)
    assert new.adversaries[0].hidden == (4,)
    assert (new.priors.fixed_sd, new.dtype, new.terms) == (3.0, torch.float32, model.terms)
    names = set(inspect.signature(MixedEffects).parameters) - {"net"}
    games = {f"adversary_{name}" for name in inspect.signature(Adversary).parameters}
    games.remove("adversary_pool")  # which the taps hold
    assert set(setting_names(model)) == names | games


@pytest.mark.parametrize(
    ("over", "error", "message"),
    [
        ({}, ValueError, "1 combination"),
        ({"fixed_weight": [1.0]}, ValueError, "1 combination"),
        ({"fixed_weight": 1.0}, TypeError, r"write \{'fixed_weight': \[1.0, ...\]\}"),
        ({"random": "(1 | site)"}, TypeError, "write {'random'"),
        ({"width": [1, 2]}, ValueError, "no setting 'width': it has 'random'.*need a function"),
        ({"adversary_weight": [0, 1]}, ValueError, "as it has no adversary"),
        ({"fixed_weight": [0, -1]}, ValueError, "must not be negative"),
        ({"family": ["gaussian", "bernoulli"]}, ValueError, "all be of classes"),
    ],
)
def test_impossible_settings_are_refused(over: object, error: type, message: str) -> None:
    data, _ = mixed_model("gaussian", 6, 5)
    with pytest.raises(error, match=message):
        tune(linear_model(data), data, over=over)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"by": "cluster"}, "`by` must be 'clusters' or 'rows'"),
        ({"folds": 7}, "7 folds of the 6 clusters of 'site' are not possible"),
        ({"folds": 1}, "1 folds of the 6 clusters"),
        ({"factor": "sit"}, "Did you mean 'site'"),
        ({"by": "rows", "support": 2}, "use it with by='clusters'"),
        ({"criterion": "accuracy"}, "must be 'log_score' or 'rmse'"),
        ({"workers": 0}, "`workers` must be at least 1"),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    data, _ = mixed_model("gaussian", 6, 5)
    with pytest.raises(ValueError, match=message):
        tune(linear_model(data), data, over={"fixed_weight": [0, 1]}, **arguments)  # type: ignore[arg-type]


def test_a_fitted_model_is_refused() -> None:
    data, _ = mixed_model("gaussian", 6, 5)
    fitted = fit(linear_model(data), data, schedule=Schedule(steps=5), progress=False).model
    with pytest.raises(ValueError, match="has seen the rows that would be held out"):
        tune(fitted, data, over={"fixed_weight": [0, 1]})


@pytest.mark.slow
def test_a_feature_that_is_constant_in_a_fold_is_named() -> None:
    rng, site = np.random.default_rng(0), np.repeat(np.arange(6), 5)
    features = np.column_stack([rng.normal(size=30), site == 2])
    data = ClusteredData.from_arrays(
        features, rng.normal(size=30), {"site": site}, feature_names=["age", "rare"]
    )
    over = {"fixed_weight": [0.0, 1.0]}
    with pytest.raises(ValueError, match=r"of a fold cannot be fitted: .*'rare'.* raise `folds`"):
        tune(two_layers(data), data, over=over, folds=2, workers=1, progress=False)


# --- scores with known truth


@pytest.mark.slow
@pytest.mark.parametrize("case", ["clusters", "rows", "support"])
def test_scores_are_those_of_the_true_distribution(case: str) -> None:
    sd, residual_sd, support = 1.0, 0.5, 3 if case == "support" else 0
    data, _ = mixed_model("gaussian", 60, 12, sd=[sd], dispersion=residual_sd, seed=3)
    over = {"random": ["(1 | site)", "(1 + x0 | site)"]}
    tuning = tune(
        linear_model(data), data, "rows" if case == "rows" else "clusters", over, folds=3,
        support=support, schedule=QUICK, workers=1, progress=False,
    )  # fmt: skip
    n = {"clusters": 0, "rows": 8, "support": 3}[case]  # rows of the cluster that are known
    variance = residual_sd**2 + sd**2 / (1 + n * sd**2 / residual_sd**2)
    row = tuning.table.iloc[0]
    assert row["rmse"] == pytest.approx(math.sqrt(variance), abs=4 * row["rmse_se"])
    expected = -0.5 * (math.log(2 * math.pi * variance) + 1)
    assert row["log_score"] == pytest.approx(expected, abs=4 * row["log_score_se"])
    # The slopes do not vary: the simpler program is nearest to the default.
    assert dict(tuning.chosen) == {"random": "(1 | site)"}
    assert tuning.model.facts is None
    assert "(1 | site)" in str(tuning)


def test_a_conflict_within_and_between_clusters_chooses_cluster_means() -> None:
    data, truth = wages(90, 5, seed=4)
    model = MixedEffects(linear(data.n_features), "(1 | id)", bayesian_head=True)
    tuning = tune(
        model, data, over={"between": [None, True]}, criterion="rmse", folds=2, schedule=QUICK,
        workers=1, progress=False,
    )  # fmt: skip
    assert tuning.chosen == {"between": True}
    without, means = (tuning.table.iloc[row] for row in (0, 1))
    assert without["rmse"] > 2 * truth.new_person_sd
    # Estimated from 45 people, 10 coefficients add up to a fifth to the error.
    limit = 1.2 * truth.new_person_sd
    assert truth.new_person_sd - 4 * means["rmse_se"] < means["rmse"] < limit + 2 * means["rmse_se"]
    assert without["difference"] > 4 * without["difference_se"]


@pytest.mark.slow
def test_counts_that_vary_more_than_poisson_choose_the_negative_binomial() -> None:
    chosen = {}
    for name, dispersion in {"poisson": 1.0, "negative_binomial": 0.8}.items():
        data, _ = mixed_model(name, 40, 10, sd=[0.4], dispersion=dispersion, seed=1)
        tuning = tune(
            linear_model(data, "poisson"), data, over={"family": ["poisson", "negative_binomial"]},
            folds=2, schedule=QUICK, workers=1, progress=False,
        )  # fmt: skip
        chosen[name] = tuning.chosen["family"]
    assert chosen == {"poisson": "poisson", "negative_binomial": "negative_binomial"}


@pytest.mark.slow
def test_a_function_makes_programs_and_workers_change_nothing() -> None:
    data, _ = mixed_model("bernoulli", 12, 15, coefficients=[0.0, 2.0], seed=2)

    def make(settings: object) -> MixedEffects:
        net = nn.Sequential(linear(1))
        with torch.no_grad():
            net[0].weight.fill_(settings["slope"])  # type: ignore[index]
        net.requires_grad_(False)
        return MixedEffects(net, "(1 | site)", "bernoulli")

    settings = {"folds": 2, "schedule": Schedule(steps=30), "criterion": "accuracy"}
    over, silent = {"slope": [0.0, 1.0]}, {"progress": False}
    results = [tune(make, data, over=over, workers=n, **settings, **silent) for n in (1, 2)]  # type: ignore[arg-type]
    pd.testing.assert_frame_equal(results[0].table, results[1].table)
    assert results[0].chosen == {"slope": 1.0}
    assert results[0].table["accuracy"][1] > 0.7
    assert results[0].model.network[0].weight.item() == 1.0


def test_settings_whose_fit_diverges_are_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    data, _ = mixed_model("gaussian", 8, 6)

    def fit_or_diverge(model: MixedEffects, *args: object, **options: object) -> object:
        if model.fixed_weight > 1:
            raise DivergenceError("the loss is not finite", None)  # type: ignore[arg-type]
        return fit(model, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("armed_pyro.tuning.folds.fit", fit_or_diverge)
    settings = {"folds": 2, "schedule": Schedule(steps=20), "workers": 1, "progress": False}
    tuning = tune(linear_model(data), data, over={"fixed_weight": [0, 5]}, **settings)  # type: ignore[arg-type]
    assert tuning.table["failed"].tolist() == [0, 2]
    assert tuning.chosen == {"fixed_weight": 0}
    assert "2 fits diverged" in str(tuning)
    with pytest.raises(RuntimeError, match="the loss is not finite"):
        tune(linear_model(data), data, over={"fixed_weight": [4, 5]}, **settings)  # type: ignore[arg-type]


def test_one_network_is_stopped_in_each_fold_by_what_is_held_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, _ = mixed_model("gaussian", 8, 6, seed=0)
    schedules = []

    def fitted(model: MixedEffects, train: ClusteredData, **options: Any) -> Fit:
        schedules.append(options["schedule"])
        return fit(model, train, **{**options, "schedule": Schedule(steps=5, stages=0)})

    monkeypatch.setattr(folds, "fit", fitted)
    model = MixedEffects(dense(data.n_features, hidden=(4,)), "(1 | site)")
    settings = {"over": {"fixed_weight": [0, 1]}, "folds": 2, "workers": 1, "progress": False}
    for by in ("clusters", "rows"):
        tune(model, data, by, **settings)  # type: ignore[arg-type]
        assert {(made.folds, made.fold_by) for made in schedules} == {(1, by)}
        schedules.clear()
    tune(model, data, schedule=Schedule(steps=5, folds=3), **settings)  # type: ignore[arg-type]
    assert {made.folds for made in schedules} == {3}


# --- the command line


def command(path: Path, *more: object) -> Any:
    arguments = ["tune", path, "--outcome", "y", "--random", "(1 | site)", "--folds", 2]
    arguments += ["--steps", 20, "--workers", 1, *more]
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    site = np.repeat(np.arange(8), 6)
    frame = pd.DataFrame({"site": [f"s{k}" for k in site], "x": rng.normal(size=48)})
    frame["y"] = frame["x"] + rng.normal(size=8)[site] + rng.normal(size=48)
    path = tmp_path_factory.mktemp("tune") / "rows.csv"
    frame.to_csv(path, index=False)
    return path


def test_the_command_scores_options_as_tune_scores_settings(rows: Path, tmp_path: Path) -> None:
    table = tmp_path / "scores.csv"
    over = ["--over", "random = (1 | site); (1 + x | site)", "--out", table]
    done = command(rows, *over)
    assert done.exit_code == 0, done.output
    data = ClusteredData.from_frame(pd.read_csv(rows), outcome="y", clusters=["site"])
    expected = tune(
        linear_model(data), data, over={"random": ["(1 | site)", "(1 + x | site)"]}, folds=2,
        schedule=Schedule(steps=20), workers=1, progress=False,
    )  # fmt: skip
    scores = pd.read_csv(table)
    assert scores["random"].tolist() == ["(1 | site)", "(1 + x | site)"]
    np.testing.assert_allclose(scores["log_score"], expected.table["log_score"], atol=1e-6)
    chosen = scores["random"][expected.chosen_row]
    assert f"Options of fit: --random '{chosen}'" in done.stdout


def test_a_formula_says_what_the_options_say(rows: Path, tmp_path: Path) -> None:
    """Slopes that are tried need not be features."""
    tables = {}
    over = ["--over", "random = (1 | site); (1 + x | site)", "--steps", 20, "--folds", 2]
    long = ["--outcome", "y", "--random", "(1 | site)", "--features", "1"]
    for name, program in {"formula": ["y ~ 1 + (1 | site)"], "options": long}.items():
        path = tmp_path / f"{name}.csv"
        words = ["tune", rows, *program, *over, "--workers", 1, "--out", path]
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exit_code == 0, done.output
        tables[name] = pd.read_csv(path)
    assert len(tables["formula"]) == 2
    pd.testing.assert_frame_equal(tables["formula"], tables["options"])


def test_the_command_makes_every_program(rows: Path) -> None:
    over = ["--over", "hidden = 4; 4,3", "--over", "between = no; yes"]
    over += ["--over", "adversary-weight=1"]
    done = command(rows, "--net", "dense", "--adversary", "site", *over, "--by", "rows")
    assert done.exit_code == 0, done.output
    lines = [line.split() for line in done.stdout.splitlines()]
    settings = {(line[1], line[2]) for line in lines if len(line) > 4 and line[0] == "1"}
    assert settings == {("no", "4"), ("yes", "4"), ("no", "4,3"), ("yes", "4,3")}


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ("fixed-weight: 1", "must be an option and its values, such as"),
        ("outcome = y; x", "the options are 'random', 'net'"),
        ("fixed-weight = 0; much", "--over: fixed-weight must be a number, found 'much'"),
        ("between = yes; perhaps", "--over: between must be auto, yes or no"),
        ("fixed-weight = 1", "a choice needs at least 2"),
        ("adversary-weight = 0; 1", "--adversary-weight needs --adversary"),
        ("family = gaussian; normals", "normals"),
    ],
)
def test_the_command_names_wrong_values(rows: Path, over: str, message: str) -> None:
    done = command(rows, "--over", over)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
