"""The study of the adversary on digits: it runs, and its differences are paired by study."""

import numpy as np
import pandas as pd
import pytest

from armed_pyro.analysis.validation.adversary import SCORES, main, summary


def test_differences_are_paired_by_study():
    rng = np.random.default_rng(0)
    noise, gains = rng.normal(size=4), np.array([0.1, 0.3, 0.2, 0.4])
    numbers = {"used": 0.0, "probe": 0.2, "chance": 0.1, "own_accuracy": 0.1}
    parts = [
        pd.DataFrame({"study": range(4), "weight": weight, **numbers} | dict.fromkeys(SCORES, y))
        for weight, y in (("0.0", noise), ("1.0", noise + gains))
    ]
    table = summary(pd.concat(parts))
    assert table.loc["1.0", "auroc_new_diff"] == pytest.approx(0.25)
    assert table.loc["1.0", "auroc_new_se"] == pytest.approx(gains.std(ddof=1) / 2)
    assert table.loc["0.0", "log_loss_new_diff"] == 0


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_study_runs(tmp_path, capsys):
    main(["--smoke", "--seeds", "1", "--weights", "0,1", "--out", str(tmp_path)])
    assert "auroc_new" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "adversary.csv").set_index("weight")
    assert table.loc[[0, 1], "used"].tolist() == [0.0, 1.0]
    assert table["chance"].between(0.12, 0.13).all()  # eight sites
    assert table[list(SCORES)].notna().all(axis=None)
