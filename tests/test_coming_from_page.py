"""docs/coming_from.md: every line in the column of this library runs."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import armed_pyro
from armed_pyro import Exponential, Priors, compare, model
from armed_pyro.formula_model import Model

PAGE = Path(__file__).resolve().parents[1] / "docs" / "coming_from.md"
ROWS = [re.split(r" (?<!\\)\| ", line.strip("| ")) for line in PAGE.read_text("utf-8").splitlines()]
LINES = [row[4].strip("`").replace("\\|", "|") for row in ROWS if len(row) == 5 and "(" in row[4]]


def make_table(n: int = 120) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"g": np.arange(n) % 10, "h": np.arange(n) // 20, "a": np.arange(n) % 5})
    table["b"] = np.arange(n) % 3
    table = table.assign(x=rng.normal(size=n), z=rng.normal(size=n))
    table["y"] = table["x"] + rng.normal(size=10)[table["g"]] + rng.normal(size=n)
    table["f"], table["dose"] = rng.choice(list("abc"), n), rng.integers(1, 4, n)
    table["ill"] = np.where(table["y"] > 0, "yes", "no")
    table["n"], table["k"] = 9, rng.integers(0, 10, n)
    table["t"], table["count"] = rng.uniform(1, 5, n), rng.poisson(3, n)
    table["w"], table["s"] = rng.uniform(1, 2, n), rng.uniform(0.5, 1, n)
    return table


@pytest.fixture(scope="module")
def names():
    d = make_table()
    fitted = model("y ~ x + f + (x | g)", d).fit(steps=50, progress=False)
    return {
        "d": d,
        "model": model,
        "Priors": Priors,
        "Exponential": Exponential,
        "compare": compare,
        "fit": fitted,
        "other": model("y ~ x + (1 | g)", d).fit(steps=50, progress=False),
        "binary": model("ill ~ x + (1 | g)", d, family="bernoulli").fit(steps=50, progress=False),
        "new": d.head(3),
        "unknown": d.head(3).assign(g=99),
    }


def test_there_are_thirty_tasks():
    assert len(LINES) >= 30
    assert len(set(LINES)) == len(LINES)


@pytest.mark.filterwarnings("ignore:no cluster of", "ignore:.*Pareto", "ignore:PSIS")
@pytest.mark.parametrize("line", LINES)
def test_each_line_runs(names, line):
    made = eval(line, dict(names))
    if isinstance(made, Model):
        bound = made.program.bind(made.data)
        assert bound.factors
        assert bound.data_facts().outcome_name in ("y", "ill", "k", "count", "f")
        assert made.formula in line.replace("\\", "")
    else:
        assert made is not None


def test_what_the_lines_mean(names):
    modes = armed_pyro.model("y ~ x + (x || g)", names["d"]).program
    assert [str(term) for term in modes.terms] == ["(1 + x || g)"]
    assert (
        names["fit"].predict(names["unknown"], unseen="marginal").unseen.tolist()
        == ["marginal"] * 3
    )
