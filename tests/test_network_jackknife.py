"""Effects of networks with the jackknife's uncertainty: its variance, errors and coverage."""

import numpy as np
import pandas as pd
import pytest
import torch

from armed_pyro import model
from armed_pyro.effects.network_jackknife import NetworkJackknife
from armed_pyro.networks.taps import run


def waves(seed: int = 0, n: int = 400, clusters: int = 40) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    a, b, g = rng.normal(size=n), rng.normal(size=n), np.arange(n) % clusters
    y = np.sin(1.5 * a) + 0.5 * b + rng.normal(0, 0.5, clusters)[g] + rng.normal(0, 0.5, n)
    return pd.DataFrame({"a": a, "b": b, "y": y, "g": g})


@pytest.fixture(scope="module")
def deep():
    program = model("y ~ a + b + (1 | g)", waves(n=200, clusters=20), net="dense")
    return program.fit(steps=60, progress=False)


def outputs(result, data) -> np.ndarray:
    """The output of every network for these rows, in units of the outcome."""
    bound = result.model
    x = bound.encode(data).all().x.to(bound.network_reference().dtype)
    with torch.no_grad():
        each = [run(network, x)[0][:, 0] for network in bound.fold_networks.networks]
    return np.stack([e.double().numpy() for e in each]) * bound.data_facts().spread


def test_the_variance_is_that_of_the_delete_a_group_jackknife(deep):
    at = {"a": [-1.0, 1.0]}
    settings = {"by": "a", "at": at, "draws": 4000}
    without = deep.predictions(**settings).draws
    added = deep.predictions(**settings, network_uncertainty="jackknife").draws - without
    x = deep.data.features.numpy()
    trained = outputs(deep, deep.data)
    # Straight lines are those of the latent linear effects.
    line = np.column_stack([np.ones(len(x)), x])
    slopes = np.linalg.lstsq(line, (trained - trained.mean(0)).T, rcond=None)[0][1:]
    theta = []
    for value in at["a"]:
        frame = pd.DataFrame(x, columns=["a", "b"]).assign(a=value)
        rows = deep.posterior.encode(frame.assign(g=deep.data.groupings["g"].labels()))
        moved = (frame.to_numpy() - x.mean(0)).mean(0)
        theta.append(outputs(deep, rows).mean(1) - moved @ slopes)
    errors = np.array(theta) - np.mean(theta, axis=1, keepdims=True)
    expected = 4 / 5 * errors @ errors.T
    # t with 4 degrees of freedom has twice the variance of its scale: compare robustly, by the
    # quartiles, whose standard error is 2.5% of the scale with 4,000 draws.
    quartile = 0.7407  # of t with 4 degrees of freedom
    for place in range(2):
        found = np.subtract(*np.quantile(added[:, place], [0.75, 0.25])) / 2 / quartile
        assert found == pytest.approx(np.sqrt(expected[place, place]), rel=0.1)
    correlation = expected[0, 1] / np.sqrt(expected[0, 0] * expected[1, 1])
    assert np.corrcoef(added.T)[0, 1] == pytest.approx(correlation, abs=0.1)


def test_comparisons_slopes_and_means_take_it_and_say_so(deep):
    for verb, variable in ((deep.slopes, "a"), (deep.comparisons, "a")):
        conditional = verb(variable)
        whole = verb(variable, network_uncertainty="jackknife")
        assert "conditional on the network" in conditional.note
        assert "jackknife" in whole.note
        assert whole.to_frame()["sd"][0] > conditional.to_frame()["sd"][0]
        # The estimate stays: the weights have mean zero.
        width = whole.to_frame()["sd"][0]
        assert abs(whole.draws.mean() - conditional.draws.mean()) < 0.2 * width
    with pytest.raises(ValueError, match="network_uncertainty"):
        deep.slopes("a", network_uncertainty="laplace")


def test_a_single_network_has_no_jackknife_and_a_linear_model_needs_none():
    program = model("y ~ a + b + (1 | g)", waves(n=80, clusters=8), net="dense")
    single = program.fit(steps=10, progress=False, validation=None)
    with pytest.raises(ValueError, match="this fit has a single network"):
        single.slopes("a", network_uncertainty="jackknife")
    linear = model("y ~ a + b + (1 | g)", waves(n=80, clusters=8)).fit(steps=20, progress=False)
    same = linear.slopes("a", network_uncertainty="jackknife")
    np.testing.assert_array_equal(same.draws, linear.slopes("a").draws)
    assert NetworkJackknife.of(linear.posterior, "jackknife", 10, 0) is None


@pytest.mark.slow
def test_intervals_of_slopes_cover():
    """90% intervals of average and local slopes hold the truth, over data sets."""
    inside, sharp = [], []
    for seed in range(20):
        table = waves(seed)
        result = model("y ~ a + b + (1 | g)", table, net="dense").fit(progress=False)
        at = {"a": [-1.0, 0.0, 1.0]}
        truth = [0.5, *(1.5 * np.cos(1.5 * np.array(at["a"])))]
        for kind, kept in (("jackknife", inside), ("none", sharp)):
            parts = [
                result.slopes("b", network_uncertainty=kind),
                result.slopes("a", by="a", at=at, network_uncertainty=kind),
            ]
            frame = pd.concat([part.to_frame(prob=0.9) for part in parts])
            kept.append(((frame["lower"] < truth) & (truth < frame["upper"])).mean())
    error = np.std(inside, ddof=1) / np.sqrt(len(inside))
    # Curves of networks are smoothed at their bends, so that a local slope is biased there.
    assert np.mean(inside) > 0.8 - 2 * error, (np.mean(inside), error, np.mean(sharp))
    assert np.mean(inside) > np.mean(sharp)
