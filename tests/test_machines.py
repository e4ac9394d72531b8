"""Machines of Milliken and Johnson (1984), table 23.1: effects of every level of a factor."""

import pandas as pd
import pytest

from armed_pyro import model

# Scores of three runs of six workers on each machine.
SCORES = {
    "A": "52 52.8 53.1 51.8 52.8 53.1 60 60.2 58.4 51.1 52.3 50.3 50.9 51.8 51.4 46.4 44.8 49.2",
    "B": "62.1 62.6 64 59.7 60 59 68.6 65.8 69.7 63.2 62.8 62.2 64.8 65 65.4 43.7 44.2 43",
    "C": "67.5 67.2 66.9 61.5 61.7 62.3 70.8 70.6 71 64.1 66.2 64 72.1 72 71.1 62 61.4 60.5",
}


def test_all_levels_of_a_factor_vary_as_in_lme4():
    """``(0 + Machine | Worker)``: lme4's REML gives 4.08, 8.63, 4.39, and 0.96."""
    rows = [
        (machine, f"worker {place // 3}", float(score))
        for machine, scores in SCORES.items()
        for place, score in enumerate(scores.split())
    ]
    table = pd.DataFrame(rows, columns=["Machine", "Worker", "score"])
    result = model("score ~ Machine + (0 + Machine | Worker)", table).fit(progress=False)
    components = result.variance_components()
    sds = components[components["statistic"] == "sd"].set_index("term")[["median", "sd"]]
    assert list(sds.index) == ["Machine[A]", "Machine[B]", "Machine[C]", ""]
    for (term, row), expected in zip(sds.iterrows(), [4.08, 8.63, 4.39, 0.96], strict=True):
        # The posterior of an sd of six workers is skewed: its median is above the mode.
        assert row["median"] == pytest.approx(expected, abs=0.35 * row["sd"]), term
