"""The benchmark: what is timed does what it says, and REML is REML."""

import itertools
import json
import time

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm

from armed_pyro.analysis.benchmarks import benchmark, training_steps
from armed_pyro.analysis.benchmarks.benchmark import Figure, Options
from armed_pyro.analysis.benchmarks.crossed_reml import crossed_reml
from armed_pyro.analysis.benchmarks.training_steps import Task

SMALL = Task(width=4, batch=16, clusters=3, rows=40)


def test_reml_of_one_factor_is_the_closed_form():
    """Balanced: residual variance is MSW, that of clusters (MSB - MSW) / n."""
    rng = np.random.default_rng(0)
    code = np.repeat(np.arange(30), 8)
    y = rng.normal(0, 1.5, 30)[code] + rng.normal(size=240)
    groups = y.reshape(30, 8)
    within = groups.var(1, ddof=1).mean()
    between = 8 * groups.mean(1).var(ddof=1)
    expected = np.sqrt([(between - within) / 8, within])
    # A second factor with one level is the intercept, which REML takes out.
    found = crossed_reml(y, np.zeros((240, 0)), [code, np.zeros(240, int)])
    np.testing.assert_allclose(found[[0, 2]], expected, rtol=1e-3)


def test_reml_of_crossed_factors_is_that_of_statsmodels():
    rng = np.random.default_rng(1)
    a, b = np.arange(600) % 12, rng.integers(0, 20, 600)
    x = rng.normal(size=(600, 1))
    y = x[:, 0] + rng.normal(0, 0.8, 12)[a] + rng.normal(0, 1.6, 20)[b] + rng.normal(size=600)
    found = crossed_reml(y, x, [a, b])
    table = pd.DataFrame({"y": y, "x": x[:, 0], "a": a, "b": b, "all": 1})
    formula = {"a": "0 + C(a)", "b": "0 + C(b)"}
    model = sm.MixedLM.from_formula("y ~ x", groups="all", vc_formula=formula, data=table)
    best = model.fit(reml=True)
    expected = np.sqrt([*best.vcomp, best.scale])
    np.testing.assert_allclose(found, expected, rtol=2e-3)


def contender(name):
    return {
        "eager": lambda: training_steps.eager(SMALL),
        "torch loop with adversary": lambda: training_steps.torch_loop(SMALL, game=True),
        "conventional torch loop": lambda: training_steps.torch_loop(SMALL, game=False),
        "Pyro": lambda: training_steps.stock(SMALL),
    }[name]()


def number(loss):
    return float(getattr(loss, "total", loss).detach())


@pytest.mark.parametrize(
    "name", ["eager", "torch loop with adversary", "conventional torch loop", "Pyro"]
)
def test_what_is_timed_trains(name):
    step = contender(name)
    losses = [number(step()) for _ in range(200)]
    assert np.isfinite(losses).all()
    assert np.mean(losses[-40:]) < np.mean(losses[:40])


def test_turns_are_taken_and_medians_tell_slow_from_fast():
    order = []

    def sleeping(name, seconds):
        def step():
            order.append(name)
            time.sleep(seconds)

        return step

    steps = {"slow": sleeping("slow", 0.004), "fast": sleeping("fast", 0.001)}
    found = training_steps.interleaved(steps, rounds=3, seconds=0.01)
    assert found["slow"] > 1.5 * found["fast"]
    # After the counting, in turns: slow, fast, slow, fast, ...
    changes = sum(one != other for one, other in itertools.pairwise(order))
    assert changes >= 6


def test_targets_are_the_most_that_a_figure_may_be(tmp_path):
    figures = [Figure("a", "met", 0.9, "x", 1.0), Figure("a", "missed", 1.1, "x", 1.0)]
    figures.append(Figure("a", "none", 1.1, "s"))
    assert [one.met for one in figures] == [True, False, None]
    benchmark.write(figures, tmp_path)
    written = json.loads((tmp_path / "benchmark.json").read_text("utf-8"))
    assert [one["met"] for one in written["figures"]] == [True, False, None]
    assert {"torch", "cores"} <= written["machine"].keys()
    assert pd.read_csv(tmp_path / "benchmark.csv")["value"].tolist() == [0.9, 1.1, 1.1]


def test_parts_are_checked(tmp_path):
    with pytest.raises(SystemExit, match="unknown part 'memory'"):
        benchmark.main(["--parts", "memory", "--out", str(tmp_path)])


@pytest.mark.slow
def test_a_crossed_design_is_near_reml():
    figures = {one.what: one for one in benchmark.crossed(Options(short=True, data=None))}
    off = [one.value for what, one in figures.items() if "posterior sds" in what]
    assert len(off) == 4
    assert max(off) < 1.0
