"""docs/effects.md: its examples run, and find what the simulated trial has."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

PAGE = Path(__file__).resolve().parents[1] / "docs" / "effects.md"


@pytest.fixture(scope="module")
def page():
    """Names that the examples of the page define, run one after the other."""
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.DOTALL | re.M)
    names = {"__name__": "effects_page"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for number, code in enumerate(blocks):
            exec(compile(code, f"{PAGE} (example {number + 1})", "exec"), names)
    return names


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:no cluster of")
def test_the_examples_find_what_was_simulated(page):
    typical = page["typical"].to_frame().set_index("contrast")
    average = page["average"].to_frame().set_index("contrast")
    truth = np.exp([0.6, 1.2])
    wide = page["typical"].to_frame(prob=0.99)
    assert ((wide["lower"] < truth) & (truth < wide["upper"])).all()
    assert (average["median"] < typical["median"]).all()
    assert page["means"].to_frame()["arm"].tolist() == ["control", "low", "high"]
    assert page["contrasts"].to_frame()["contrast"].tolist() == [
        "low - control",
        "high - control",
        "high - low",
    ]
    assert 0.3 < page["better"].probability < 1
    assert page["slope"].to_frame()["upper"][0] < 0
    assert len(page["by_row"]) == 800
    assert page["site_3"].to_frame()["site"].tolist() == [3, 3]
    assert "conditional on the network" in repr(page["deep_slope"])
    assert set(page["table_of_fits"].index) == {"linear", "network"}
    assert page["probabilities"].shape == (800, 2)
    assert (page["predictive"]["upper"] <= 1).all()
