"""ADNIMERGE.csv: its quirks read, subjects chosen, features encoded by training rows alone."""

import numpy as np
import pandas as pd
import pytest

from armed_pyro.analysis.applications.mci_subjects import (
    CATEGORIES,
    NUMBERS,
    TRUE_FEATURES,
    encoder,
    filled_diagnoses,
    read_adnimerge,
    simulated_subjects,
    subject_folds,
)

# By subject: the baseline's DX_bl, and the diagnoses at each month; what it is to become of it.
VISITS = {
    1: ("LMCI", {"bl": "MCI", "m12": "MCI", "m24": "Dementia"}, 1.0),
    2: ("EMCI", {"bl": "MCI", "m12": None, "m24": "MCI", "m36": "Dementia"}, 0.0),
    3: ("LMCI", {"bl": "MCI", "m12": "MCI"}, None),
    4: ("CN", {"bl": "CN", "m24": "Dementia"}, None),
    5: ("LMCI", {"bl": "MCI", "m06": "Dementia", "m12": "MCI", "m24": "MCI"}, 1.0),
    6: ("LMCI", {"bl": "MCI", "m18": "MCI", "m24": None, "m36": "MCI"}, 0.0),
    7: ("LMCI", {"bl": "MCI", "m18": "MCI", "m24": None, "m36": "Dementia"}, None),
    8: ("EMCI", {"bl": None, "m06": "MCI", "m48": "CN"}, 0.0),
    9: ("AD", {"bl": "Dementia", "m24": "Dementia"}, None),
    10: ("LMCI", {"bl": "MCI", "m03": None, "m60": "MCI"}, 0.0),
}
SITES = {1: 7, 2: 7, 3: 7, 4: 7, 5: 2, 6: 2, 7: 2, 8: 2, 9: 7, 10: 3}


def visits() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = []
    for rid, (baseline, diagnoses, _) in VISITS.items():
        for code, dx in diagnoses.items():
            row = {"RID": rid, "SITE": SITES[rid], "VISCODE": code, "DX": dx, "DX_bl": baseline}
            row |= {"EXAMDATE": "2008-01-01", "M": 0 if code == "bl" else int(code[1:])}
            row |= {name: round(float(rng.normal(50, 10)), 2) for name in NUMBERS}
            row |= dict(zip(CATEGORIES, ("Male", "Unknown", "White", "Married"), strict=True))
            rows.append(row)
    table = pd.DataFrame(rows).astype({"ABETA": object, "TAU": object, "PTAU": object})
    first = (table["RID"] == 1) & (table["VISCODE"] == "bl")
    table.loc[first, ["ABETA", "TAU", "PTAU"]] = [">1700", "<80", "<8"]
    table.loc[(table["RID"] == 2) & (table["VISCODE"] == "bl"), ["FDG", "ABETA"]] = [np.nan, "<200"]
    table.loc[(table["RID"] == 5) & (table["VISCODE"] == "bl"), "ABETA"] = ""
    # Visits in no order, and one of them twice.
    return pd.concat([table, table.iloc[[3]]]).sample(frac=1, random_state=0)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "ADNIMERGE.csv"
    renamed = {name: name.replace("RAVLT_", "RAVLT.") for name in NUMBERS}
    visits().rename(columns=renamed).to_csv(path, index=False)
    return path


def test_gaps_are_filled_within_a_subject_where_neighbours_agree():
    subject = pd.Series([1, 1, 1, 1, 2, 2, 2, 2])
    dx = pd.Series(["MCI", None, None, "MCI", None, "CN", None, "MCI"])
    found = filled_diagnoses(subject, dx)
    assert found.isna().tolist() == [False, False, False, False, True, False, True, False]
    assert found.iloc[1] == found.iloc[2] == "MCI"


def test_subjects_and_their_conversion(file):
    found = read_adnimerge(file, sites=2)
    wanted = {rid: value for rid, (*_, value) in VISITS.items() if value is not None}
    assert found.table["converted"].to_dict() == wanted
    assert list(found.excluded.values()) == [2]  # 3 and 7; 4 and 9 had no MCI
    large = found.table["large"]
    assert set(found.table["SITE"][large]) == {7, 2}
    assert set(found.table["SITE"][~large]) == {3}


def test_baseline_values_and_limits(file):
    table = read_adnimerge(file).table
    assert table.loc[1, ["ABETA", "TAU", "PTAU"]].tolist() == [1700.0, 80.0, 8.0]
    assert table.loc[2, "ABETA"] == 200.0
    assert np.isnan(table.loc[2, "FDG"])
    assert np.isnan(table.loc[5, "ABETA"])
    own = visits()
    own = own[(own["RID"] == 6) & (own["VISCODE"] == "bl")].iloc[0]
    assert table.loc[6, "MMSE"] == own["MMSE"]
    assert table.loc[6, "RAVLT_immediate"] == own["RAVLT_immediate"]
    assert table["PTETHCAT"].isna().all()


def test_what_is_wrong_with_a_file_is_said(file, tmp_path):
    table = visits()
    other = tmp_path / "other.csv"
    table.drop(columns="FAQ").to_csv(other, index=False)
    with pytest.raises(ValueError, match="lacks the columns FAQ"):
        read_adnimerge(other)
    table.assign(MMSE="high").to_csv(other, index=False)
    with pytest.raises(ValueError, match=r"MMSE of subject .* is 'high'"):
        read_adnimerge(other)
    table[table["DX_bl"] == "CN"].to_csv(other, index=False)
    with pytest.raises(ValueError, match="0 subjects with MCI"):
        read_adnimerge(other)


# ----------------------------------------------------------------------------- encoding


def test_simulated_subjects_have_37_features_and_the_sites_they_should():
    table, _ = simulated_subjects(seed=3)
    assert table["large"].sum() == 392
    assert table.groupby("large")["SITE"].nunique().tolist() == [34, 20]
    fold = next(subject_folds(table, 5, 0))
    assert fold.train.n_features == 37
    assert fold.unseen.n_rows == 300
    assert set(fold.unseen.grouping("site").levels).isdisjoint(fold.train.grouping("site").levels)
    sizes = [one.n_rows for one in (fold.train, fold.validation, fold.test)]
    assert sum(sizes) == 392
    assert 0.75 < fold.train.n_rows / (sizes[0] + sizes[1]) < 0.85
    assert {"PTGENDER_Male", "missingindicator_FDG", *TRUE_FEATURES} <= set(
        fold.train.feature_names
    )


def test_every_subject_of_a_training_site_is_tested_once():
    table, _ = simulated_subjects(seed=4)
    folds = list(subject_folds(table, 4, 0))
    tested = np.concatenate([fold.test.row_labels for fold in folds])
    assert sorted(tested) == sorted(table.index[table["large"]])
    for fold in folds:
        parts = [set(one.row_labels) for one in (fold.train, fold.validation, fold.test)]
        assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]


def test_missing_values_are_imputed_from_training_rows_alone():
    table, _ = simulated_subjects(seed=5)
    fold = next(subject_folds(table, 5, 0))
    median = table.loc[fold.train.row_labels, "FDG"].median()
    for rows in (fold.train, fold.test, fold.unseen):
        names = list(rows.feature_names)
        fdg = rows.features[:, names.index("FDG")].numpy()
        told = rows.features[:, names.index("missingindicator_FDG")].numpy() == 1
        missing = table.loc[rows.row_labels, "FDG"].isna().to_numpy()
        assert (told == missing).all()
        np.testing.assert_allclose(fdg[missing], median)


def test_rare_and_new_categories_are_no_errors():
    table, _ = simulated_subjects(seed=6)
    table.loc[table.index[-1], "PTRACCAT"] = "Hawaiian/Other PI"
    fitted = encoder(table).fit(table.iloc[:300])
    with pytest.warns(UserWarning, match="unknown categories"):
        encoded = fitted.transform(table)
    assert encoded.notna().all(axis=None)
    assert not any("Hawaiian" in name for name in encoded)


def test_simulated_effects_are_those_of_a_logistic_regression():
    from statsmodels.discrete.discrete_model import Logit

    table, truth = simulated_subjects(40_000, 68, site_sd=0.0, seed=7)
    names = list(NUMBERS)
    complete = table[names].fillna(table[names].mean())
    z = ((complete - complete.mean()) / complete.std()).assign(one=1.0)
    result = Logit(table["converted"].to_numpy(), z).fit(disp=0)
    for name in names:
        wanted = truth.effects.get(name, 0.0)
        assert result.params[name] == pytest.approx(wanted, abs=4.5 * result.bse[name])


def test_probes_tell_the_sites_rate_and_mislead_at_other_sites():
    table, truth = simulated_subjects(seed=8, probes=2)
    means = table.groupby("SITE")["probe1"].mean()
    rate = 1 / (1 + np.exp(-truth.intercept))
    assert np.corrcoef(means[:20], rate[:20])[0, 1] > 0.9
    assert abs(np.corrcoef(means[20:], rate[20:])[0, 1]) < 0.5
    assert table["probe2"].corr(table["probe1"]) < 0.95
    with pytest.raises(ValueError, match="at least 100 and 68 subjects"):
        simulated_subjects(50, 300)
