"""The spirals' simulation: a tiny run's files and tables; the paper's claims in a slow test."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from armed_pyro.analysis.applications import spirals
from armed_pyro.analysis.rivals.rival import Setting

MODELS = set(spirals.PAPER_ACCURACY)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("spirals")
    spirals.main(["--smoke", "--jobs", "1", "--out", str(out)])
    return out


def test_smoke_writes_every_file(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    expected = {
        "fits.csv",
        "accuracy.csv",
        "feature_use.csv",
        "settings.json",
        "boundaries_smoke.png",
    }
    assert names == expected


def test_every_model_is_fitted_in_every_fold_of_both_variants(folder: Path) -> None:
    fits = pd.read_csv(folder / "fits.csv")
    assert not fits.duplicated(["variant", "setting", "model", "fold"]).any()
    assert len(fits) == 2 * 2 * len(MODELS)
    assert fits.accuracy.between(0, 1).all()
    assert (fits.seconds > 0).all()


def test_accuracy_table_has_the_models_the_papers_figures_and_the_best_possible(
    folder: Path,
) -> None:
    table = pd.read_csv(folder / "accuracy.csv")
    plain = table[table.variant == "spirals"].set_index("model")
    others = {"cluster randomised", "best possible", "best possible, cluster unknown"}
    assert set(plain.index) == MODELS | others
    assert plain.paper["ARMED"] == 0.788
    assert table[table.variant == "confounded"].paper.isna().all()
    assert plain.accuracy["best possible"] >= plain.accuracy.drop("best possible").max() - 0.03
    gain = plain.accuracy["ARMED"] - plain.accuracy["conventional"]
    assert plain.gain["ARMED"] == pytest.approx(gain)
    fitted = table[~table.model.str.startswith("best")]
    assert fitted[["accuracy", "se", "gain", "gain_se"]].notna().all(axis=None)


def test_models_beat_chance(folder: Path) -> None:
    fits = pd.read_csv(folder / "fits.csv")
    data, _ = spirals.Plan(4, 150, 2, 0, ()).data("spirals")
    four_errors = 4 * np.sqrt(0.25 / data.n_rows)
    means = fits[fits.variant == "spirals"].groupby("model").accuracy.mean()
    assert (means > 0.5 + four_errors).all(), means


def test_feature_use_has_every_feature_of_the_confounded_variant(folder: Path) -> None:
    use = pd.read_csv(folder / "feature_use.csv")
    columns = ["use_x1", "use_x2", "use_probe1", "use_probe2"]
    assert {"setting", "model", *columns, "probe_share", "true_first"} <= set(use.columns)
    assert set(use.model) == MODELS
    assert (use[columns] > 0).all(axis=None)
    assert use[["probe_share", "true_first"]].apply(lambda one: one.between(0, 1)).all(axis=None)


@pytest.mark.slow
@pytest.mark.parametrize("setting", [spirals.TUNED, spirals.CONVERGED], ids=["tuned", "converged"])
def test_armed_beats_the_conventional_network(setting: Setting) -> None:
    plan = spirals.Plan(10, 1000, 10, 7, (("spirals", setting),))
    wanted = {"conventional", "ARMED"}
    fits = pd.DataFrame(
        task.run()[0] for task in plan.tasks() if task.rival.name in wanted and task.fold < 5
    )
    folds = fits.pivot_table(index="fold", columns="model", values="accuracy")
    gain = folds["ARMED"] - folds["conventional"]
    assert folds["ARMED"].mean() > 0.8
    assert gain.mean() > 2 * gain.sem()
