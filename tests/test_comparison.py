"""Comparison: tables say what the fits' scores say; runs by name, on a table, on ADNI's file."""

from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t, ttest_rel
from sklearn.metrics import roc_auc_score

pytest.importorskip("statsmodels")

from armed_pyro import Schedule
from armed_pyro.analysis import compare as command
from armed_pyro.analysis.applications import mci_conversion
from armed_pyro.analysis.applications.mci_subjects import TRUE_FEATURES, simulated_subjects
from armed_pyro.analysis.rivals.architectures import Dense
from armed_pyro.analysis.rivals.comparison import (
    RANDOMISED,
    SEEN,
    UNSEEN,
    Comparison,
    Study,
    ablations,
    auroc_claims,
    compare,
    joined,
    row_folds,
)
from armed_pyro.analysis.rivals.contenders import NAMES, Tuned, contenders, programs
from armed_pyro.analysis.rivals.linear_mixed import LinearMixed
from armed_pyro.analysis.rivals.rival import Setting, outcomes
from armed_pyro.analysis.rivals.scores import IMAGE_METRICS, METRICS
from armed_pyro.families.simulate import mixed_model

SETTING = Setting("quick", "quick", Dense((4,)), Schedule(steps=60, batch_size=64, window=20))


def made(auroc: dict[str, list[float]], kinds=(SEEN,), *, data_sets: bool = False) -> Comparison:
    """Scores that are known; other metrics are 0.5."""
    rows = [
        {"data": unit if data_sets else 0, "fold": 0 if data_sets else unit, "model": model,
         "rows": kind, **dict.fromkeys(METRICS, 0.5), "auroc": value, "ratio": 0.25}
        for kind in kinds
        for model, values in auroc.items()
        for unit, value in enumerate(values)
    ]  # fmt: skip
    return Comparison(pd.DataFrame(rows), pd.DataFrame(), pd.DataFrame())


SCORES = {
    "conventional": [0.70, 0.72, 0.69, 0.71, 0.73],
    "ARMED": [0.80, 0.83, 0.78, 0.82, 0.82],
    "without adversary": [0.79, 0.84, 0.77, 0.83, 0.81],
}


STEPS = [0.05, 0.06, 0.04, 0.05, 0.05]


@pytest.mark.parametrize("data_sets", [False, True])
def test_gains_are_paired(data_sets):
    table = made(SCORES, data_sets=data_sets).table()
    row = table[(table["model"] == "ARMED") & (table["metric"] == "auroc")].iloc[0]
    difference = np.subtract(SCORES["ARMED"], SCORES["conventional"])
    assert row["mean"] == pytest.approx(np.mean(SCORES["ARMED"]))
    assert row["gain"] == pytest.approx(difference.mean())
    inflation = 1 / 5 + (0.0 if data_sets else 0.25)
    half = t.ppf(0.975, 4) * np.sqrt(inflation * difference.var(ddof=1))
    assert row["gain_upper"] - row["gain"] == pytest.approx(half)
    if data_sets:
        assert row["gain_p"] == pytest.approx(ttest_rel(*list(SCORES.values())[1::-1]).pvalue)


def test_the_adversary_is_said_to_help_only_where_it_does():
    found = made(SCORES, (SEEN, UNSEEN))
    judged = ablations(found).set_index(["ablation", "rows"])["verdict"]
    assert judged["adversary: ARMED", SEEN] == "no evidence"
    assert judged["ARMED over conventional", UNSEEN] == "helps"
    worse = {**SCORES, "without adversary": np.add(SCORES["ARMED"], STEPS)}
    table = made(worse).table().set_index(["metric", "model"])["adversary"]
    assert table["auroc", "ARMED"] == "harms"
    assert table["auroc", "conventional"] == table["brier", "ARMED"] == ""
    better = {**SCORES, "without adversary": np.subtract(SCORES["ARMED"], STEPS)}
    assert made(better).table().set_index(["metric", "model"])["adversary"]["auroc", "ARMED"] == (
        "helps"
    )


def test_gains_of_randomised_clusters_are_over_the_right_ones():
    known, random = made(SCORES), made({"ARMED": [0.71, 0.70, 0.72, 0.70, 0.72]}, (RANDOMISED,))
    found = joined([known, random])
    table = found.table()
    row = table[(table["rows"] == RANDOMISED) & (table["metric"] == "auroc")].iloc[0]
    assert row["gain"] == pytest.approx(0.71 - np.mean(SCORES["ARMED"]))
    judged = ablations(found).set_index("ablation").loc["right clusters: ARMED"]
    assert judged["difference"] == pytest.approx(-row["gain"])
    assert judged["verdict"] == "helps"


def test_intervals_of_means_stay_within_the_metrics_limits():
    table = made({"conventional": [0.93, 1.0], "ARMED": [0.98, 0.99]}).table()
    auroc = table[table["metric"] == "auroc"]
    assert ((auroc["lower"] > 0) & (auroc["upper"] < 1)).all()


def test_without_the_reference_there_are_no_gains():
    table = made({"ARMED": SCORES["ARMED"]}).table()
    assert table["gain"].isna().all()
    assert table["mean"].notna().all()


# ------------------------------------------------------------------------- on simulated rows


@pytest.fixture(scope="module")
def found() -> Comparison:
    data, _ = mixed_model("bernoulli", 12, 25, sd=[1.5], coefficients=[0.0, 1.0, -1.0], seed=1)
    seen, unseen = data.hold_out_clusters("site", labels=[9, 10, 11])
    rivals = contenders(SETTING, ["conventional", "MeNet", "linear mixed model"])
    study = Study("rows", SETTING, partial(row_folds, seen, unseen))
    return joined([part for *_, part in compare(study.folds(3, 0), rivals)])


def test_every_model_is_scored_in_every_fold(found):
    counts = found.scores.groupby(["model", "rows"]).size()
    assert (counts == 3).all()
    assert ("conventional", RANDOMISED) not in counts.index
    assert ("MeNet", RANDOMISED) in counts.index
    row = found.scores.iloc[0]
    own = found.predictions.query(
        "model == @row.model and fold == @row.fold and rows == @row['rows']"
    )
    assert row["auroc"] == pytest.approx(roc_auc_score(own["y"], own["p"]))
    chosen = own["p"] >= row["threshold"]
    assert row["sensitivity"] == pytest.approx(chosen[own["y"] == 1].mean())
    assert row["ratio"] == pytest.approx(75 / 150)


def test_delong_takes_each_seen_row_once_and_each_unseen_rows_mean(found):
    table = found.delong().set_index(["rows", "model"])
    own = found.predictions[found.predictions["model"] == "MeNet"]
    seen = own[own["rows"] == SEEN]
    assert len(seen) == 225
    assert table["auroc"][SEEN, "MeNet"] == pytest.approx(roc_auc_score(seen["y"], seen["p"]))
    mean = own[own["rows"] == UNSEEN].groupby("row")[["y", "p"]].mean()
    assert table["auroc"][UNSEEN, "MeNet"] == pytest.approx(roc_auc_score(mean["y"], mean["p"]))
    assert (table["lower"] < table["auroc"]).all()


def test_knowing_the_cluster_helps_where_clusters_differ(found):
    judged = ablations(found).set_index("ablation")
    assert judged.loc["right clusters: linear mixed model", "difference"] > 0.03


def test_tuning_takes_the_version_with_the_lowest_validation_loss():
    data, _ = mixed_model("bernoulli", 8, 40, coefficients=[0.0, 2.0], seed=2)
    train, validation = data.split_rows(0.3, seed=0)
    # A prior that allows of no effects, and one that does.
    narrow, wide = (replace(LinearMixed(SETTING), prior_sd=sd) for sd in (0.01, 2.0))
    for candidates in ((narrow, wide), (wide, narrow)):
        model = Tuned(candidates)
        assert model.name == "linear mixed model"
        chosen = model.train(train, validation, 0)
        expected = wide.train(train, validation, 0).predict(validation)
        np.testing.assert_allclose(chosen.predict(validation), expected)
    with pytest.raises(ValueError, match="needs validation rows"):
        Tuned((wide,)).train(train, None, 0)


def test_a_model_without_a_name_is_refused():
    assert [one.name for one in contenders(SETTING)] == list(NAMES)
    with pytest.raises(ValueError, match=r"'ARMED'"):
        contenders(SETTING, ["ARMD"])


# --------------------------------------------------------------------------------- scripts


def test_compare_runs_on_a_table(tmp_path):
    data, _ = mixed_model("bernoulli", 10, 20, coefficients=[0.0, 1.0], seed=3)
    table = pd.DataFrame(data.features.numpy(), columns=["x"])
    table = table.assign(
        site=data.grouping("site").labels(), ill=outcomes(data), z=1.5 * table["x"]
    )
    path = tmp_path / "rows.csv"
    table.to_csv(path, index=False)
    columns = ["--outcome", "ill", "--cluster", "site", "--features", "x"]
    options = ["--models", "conventional,LMMNN", "--smoke", "--out", str(tmp_path)]
    command.main([str(path), *columns, *options])
    names = {one.name for one in (tmp_path / "rows").iterdir()}
    assert names == {
        "scores.csv", "comparison.csv", "delong.csv", "ablations.csv", "feature_use.csv",
        "predictions.csv", "comparison.png", "claims.csv",
    }  # fmt: skip
    scores = pd.read_csv(tmp_path / "rows" / "scores.csv")
    assert set(scores["rows"]) == {SEEN, UNSEEN, RANDOMISED}
    assert set(pd.read_csv(tmp_path / "rows" / "feature_use.csv").columns) == {
        "data", "fold", "model", "x"
    }  # fmt: skip
    with pytest.raises(ValueError, match="outcome with two values"):
        command.table_study(path, "x", "site", None, 0.2, 0)
    with pytest.raises(SystemExit):
        command.main([str(path)])


@pytest.mark.slow
def test_several_applications_are_compared_in_turn(tmp_path, capsys):
    """Of images the error of rebuilding is scored, where the network has a decoder."""
    options = ["--smoke", "--models", "conventional,ARMED", "--out", str(tmp_path)]
    command.main(["ad_diagnosis", "melanoma", *options])
    assert {one.name for one in tmp_path.iterdir()} == {"ad_diagnosis", "melanoma"}
    plain, rebuilt = (
        pd.read_csv(tmp_path / name / "comparison.csv") for name in ("ad_diagnosis", "melanoma")
    )
    assert set(plain["metric"]) == set(METRICS)
    assert set(rebuilt["metric"]) == {*METRICS, *IMAGE_METRICS}
    mse = rebuilt[rebuilt["metric"] == "image mse"].set_index(["rows", "model"])
    assert set(mse.index) == {
        (SEEN, "conventional"), (SEEN, "ARMED"), (UNSEEN, "conventional"), (UNSEEN, "ARMED"),
        (RANDOMISED, "ARMED"),
    }  # fmt: skip
    assert ((mse["lower"] > 0) & (mse["lower"] < mse["mean"])).all()
    scores = pd.read_csv(tmp_path / "melanoma" / "scores.csv")
    # Every fold is a data set of its own.
    assert set(scores["data"]) == {0, 1}
    claims = pd.read_csv(tmp_path / "melanoma" / "claims.csv")
    assert list(claims["claim"]) == [
        "AUROC, seen clusters: ARMED ahead of conventional",
        "AUROC, unseen clusters: ARMED not behind conventional",
    ]
    assert "images rebuilt" in capsys.readouterr().out


@pytest.mark.parametrize("name", list(command.APPLICATIONS))
def test_every_application_has_a_study(name):
    study = command.APPLICATIONS[name](0, smoke=True)
    fold = next(study.folds(3, 0))
    assert fold.unseen is not None
    assert fold.train.grouping(study.setting.factor).n_clusters > 2
    network = study.setting.network(fold.train.features.shape[1:], 0)
    assert network(fold.train.features[:2].float()).shape == (2, 1)


def test_the_smoke_run_of_mci_conversion_writes_its_tables(tmp_path):
    options = ["--smoke", "--data-sets", "1", "--models", "conventional,ARMED"]
    mci_conversion.main([*options, "--out", str(tmp_path)])
    recovery = pd.read_csv(tmp_path / "recovery.csv")
    assert set(recovery["model"]) == {"ARMED", "best possible"}
    judged = pd.read_csv(tmp_path / "claims.csv")
    assert judged["claim"].str.contains("ahead of conventional").sum() == 1
    probes = pd.read_csv(tmp_path / "probes" / "probes.csv")
    assert set(probes["model"]) == {"conventional", "ARMED"}
    use = pd.read_csv(tmp_path / "probes" / "feature_use.csv")
    assert {*TRUE_FEATURES, "probe1"} <= set(use.columns)


@pytest.mark.slow
def test_the_claims_hold_on_simulated_subjects(tmp_path):
    models = "conventional,domain adversarial,ARMED,without adversary"
    options = ["--untuned", "--data-sets", "6", "--folds", "3", "--models", models]
    mci_conversion.main([*options, "--out", str(tmp_path)])
    judged = pd.read_csv(tmp_path / "claims.csv").set_index("claim")
    ahead = judged[judged.index.str.contains("ARMED ahead of|ARMED not behind")]
    assert len(ahead) == 3
    assert (ahead["holds"] == "holds").all()
    found = judged.loc["correlation with true site intercepts at least 0.8: ARMED"]
    assert found["mean"] >= 0.8
    probes = pd.read_csv(tmp_path / "probes" / "probes.csv").set_index("model")
    assert probes.loc["ARMED", "true_first"]
    assert not probes.loc["conventional", "true_first"]
    assert probes.loc["conventional", "upper"] < 0
    # Of 18 fits each, so that a share's standard error is 0.12 at most.
    share = probes["fits_true_first"]
    assert share["ARMED"] - share["conventional"] > 0.25


def test_mci_conversion_reads_adnis_file(tmp_path):
    table, _ = simulated_subjects(150, 80, seed=1)
    months = {"bl": "MCI", "m12": "MCI", "m24": None}
    visits = pd.concat(
        [
            table.drop(columns=["converted", "large"]).assign(
                RID=table.index, VISCODE=code, DX_bl="LMCI",
                DX=dx or np.where(table["converted"] == 1, "Dementia", "MCI"),
            )
            for code, dx in months.items()
        ]
    )  # fmt: skip
    path = tmp_path / "ADNIMERGE.csv"
    visits.to_csv(path, index=False)
    options = ["--smoke", "--models", "conventional,linear mixed model", "--out", str(tmp_path)]
    mci_conversion.main(["--data", str(path), *options])
    scores = pd.read_csv(tmp_path / "scores.csv")
    assert set(scores["rows"]) == {SEEN, UNSEEN, RANDOMISED}
    linear = scores[scores["model"] == "linear mixed model"]
    assert linear.query("rows == 'seen'")["auroc"].mean() > 0.7


def test_claims_are_judged_by_their_intervals():
    scores = {
        "conventional": [0.80, 0.81, 0.82], "domain adversarial": [0.84, 0.80, 0.86],
        "ARMED": [0.85, 0.87, 0.86],
    }  # fmt: skip
    found = made(scores, (SEEN, UNSEEN), data_sets=True)
    best = {"model": "best possible", "seen": 0.9, "unseen": 0.85}
    recovery = pd.DataFrame(
        [{"data": k, "model": "ARMED", "correlation": c} for k, c in enumerate([0.84, 0.86, 0.85])]
        + [{"data": k, "model": "MeNet", "correlation": c} for k, c in enumerate([0.7, 0.9, 0.83])]
        + [{"data": k, **best} for k in range(3)]
    )
    judged = mci_conversion.claims(found, recovery).set_index("claim")["holds"]
    assert judged["AUROC, seen clusters: ARMED ahead of conventional"] == "holds"
    assert judged["AUROC, seen clusters: ARMED ahead of domain adversarial"] == "not shown"
    assert judged["correlation with true site intercepts at least 0.8: ARMED"] == "holds"
    assert judged["correlation with true site intercepts at least 0.8: MeNet"] == "not shown"


def test_a_claim_does_not_hold_where_its_interval_lies_beyond_the_limit():
    behind = {**SCORES, "ARMED": np.subtract(SCORES["conventional"], STEPS)}
    judged = auroc_claims(made(behind, (SEEN, UNSEEN), data_sets=True))
    assert list(judged["holds"]) == ["does not hold", "does not hold"]
    level = {**SCORES, "ARMED": np.add(SCORES["conventional"], [0.001, 0, -0.002, 0, 0.001])}
    judged = auroc_claims(made(level, (SEEN, UNSEEN), data_sets=True))
    assert list(judged["holds"]) == ["not shown", "holds"]
    assert not len(auroc_claims(made({"ARMED": SCORES["ARMED"]})))


def test_probes_are_ranked_by_their_use():
    rng = np.random.default_rng(0)
    level = {
        "conventional": {"probe1": 2.0, "probe2": 0.1},
        "ARMED": {"probe1": 0.3, "probe2": 0.1},
    }
    use = [
        {"data": data, "fold": 0, "model": model, **dict.fromkeys(TRUE_FEATURES, 1.0)}
        | {name: value + rng.normal(0, 0.05) for name, value in probes.items()}
        for data in range(4)
        for model, probes in level.items()
    ]
    table = mci_conversion.probe_table(
        Comparison(pd.DataFrame(), pd.DataFrame(), pd.DataFrame(use))
    ).set_index("model")
    assert table["true_first"].to_dict() == {"conventional": False, "ARMED": True}
    assert table.loc["ARMED", "lower"] > 0 > table.loc["conventional", "upper"]
    assert table["fits_true_first"].tolist() == [0.0, 1.0]


def test_grids_vary_the_adversary_of_models_that_have_one():
    sizes = {one.name: len(mci_conversion.tuned(one).candidates) for one in programs(SETTING)}
    assert sizes == {
        "conventional": 2, "cluster input": 2, "domain adversarial": 4, "ARMED": 4,
        "without adversary": 2,
    }  # fmt: skip
