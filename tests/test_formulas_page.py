"""docs/formulas.md: its examples run, and its tables are true."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from armed_pyro import ClusteredData
from armed_pyro.data.formula import parse_features
from armed_pyro.data.formula_functions import FUNCTIONS
from armed_pyro.random_effects.formula import parse_terms

PAGE = Path(__file__).resolve().parents[1] / "docs" / "formulas.md"
TEXT = PAGE.read_text("utf-8")


@pytest.fixture(scope="module")
def page():
    """Names that the examples of the page define, run one after the other."""
    names = {"__name__": "formulas_page"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for number, code in enumerate(
            re.findall(r"^```python\n(.*?)^```$", TEXT, re.DOTALL | re.M)
        ):
            exec(compile(code, f"{PAGE} (example {number + 1})", "exec"), names)
    return names


def test_the_examples_run(page):
    effects = page["fit"].fixed_effects().set_index("term")
    assert abs(effects.loc["Days", "mean"] - 10) < 4 * effects.loc["Days", "sd"]
    assert page["by_label"]["unseen"].tolist() == ["", "marginal", "membership"]
    assert page["shaped"].data.feature_names[:5] == (
        *(f"ns(Days, df=3)[{n}]" for n in (1, 2, 3)),
        "C(dose, Poly)[.L]",
        "C(dose, Poly)[.Q]",
    )
    assert len(page["slopes"].to_frame()) == 3
    assert np.isfinite(page["predicted"].mean).all()


def cells(heading: str) -> list[str]:
    """The code in the first column of the table below a heading."""
    table = TEXT.partition(f"\n## {heading}\n")[2].partition("\n## ")[0].replace("\\|", "|")
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    return [
        code for row in rows for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", row.split(" | ")[0])
    ]


def test_every_function_of_the_list_is_on_the_page():
    assert [name for name in FUNCTIONS if not re.search(rf"`{name}[`(]", TEXT)] == []


def test_every_formula_of_the_page_can_be_read():
    rng = np.random.default_rng(0)
    table = pd.DataFrame({name: rng.uniform(1, 30, 90) for name in ("z", "days", "y")})
    table["g"] = np.arange(90) % 5
    formulas = [code for code in cells("Functions") if "(" in code and "..." not in code]
    assert len(formulas) > 15
    for formula in formulas:
        x = rng.choice(["b", "low", "mid", "high"] if "low" in formula else ["b", "c", "d"], 90)
        if "low" in formula:
            x = rng.choice(["low", "mid", "high"], 90)
        numbers = not formula.startswith("C(x")
        frame = table.assign(x=rng.uniform(1, 30, 90) if numbers else x)
        if formula == "factor(x)":
            frame["x"] = np.arange(90) % 3
        ClusteredData.from_frame(frame, outcome="y", clusters=["g"], features=f"z + {formula}")
    for formula in (code for code in cells("Terms") if "kg" not in code):
        parse_features(formula, lambda: ["a"])
    for formula in cells("Random effects"):
        parse_terms(formula)
