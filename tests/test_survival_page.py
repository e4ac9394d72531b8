"""docs/survival.md: its example runs, and finds what was simulated."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

PAGE = Path(__file__).resolve().parents[1] / "docs" / "survival.md"


@pytest.fixture(scope="module")
def page():
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.DOTALL | re.M)
    names = {"__name__": "survival_page"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(compile(code, str(PAGE), "exec"), names)
    return names


def test_the_example_finds_what_was_simulated(page):
    ratio = page["result"].fixed_effects(exponentiate=True, prob=0.99).set_index("term")
    assert ratio.loc["treated", "lower"] < np.exp(-0.8) < ratio.loc["treated", "upper"]
    rows = page["result"].variance_components(prob=0.99)
    sd = rows[(rows["factor"] == "clinic") & (rows["statistic"] == "sd")].iloc[0]
    assert sd["lower"] < 0.6 < sd["upper"]
    shape = rows[rows["statistic"] == "shape"].iloc[0]
    assert shape["lower"] < 1.4 < shape["upper"]


def test_new_clusters_have_wider_curves_in_which_treatment_helps(page):
    curves, result = page["curves"], page["result"]
    assert curves["survival"].dims == ("row", "time")
    assert (curves["unseen"] == "marginal").all()
    assert (curves["survival"].diff("time") < 0).all()
    assert (curves["lower"] < curves["survival"]).all()
    assert (curves["survival"] < curves["upper"]).all()
    assert curves["median"][1] > curves["median"][0]
    fixed = result.survival(page["new"], [1, 2, 5], unseen="population")
    assert ((curves["upper"] - curves["lower"]) > (fixed["upper"] - fixed["lower"])).all()


def test_seen_clusters_are_calibrated_and_in_order(page):
    table = page["calibration"]
    assert (
        (table["lower"] - 0.02 < table["predicted"]) & (table["predicted"] < table["upper"] + 0.02)
    ).all()
    assert 0.55 < page["order"] < 0.8
    assert page["result"].diagnostics().model.word == "pass"
