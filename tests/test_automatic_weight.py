"""The automatic weight: raised as long as the cluster is read, and not at the cost of the loss."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from armed_pyro import Adversary, ClusteredData, Fit, MixedEffects, Schedule, StreamedData, fit
from armed_pyro.automatic_weight import LEVELS, WeightSearch, _smallest, _Tried
from armed_pyro.guides.crossed import choose_guide
from armed_pyro.networks.fresh_probe import FreshProbe

SHORT = Schedule(steps=120, window=10, stages=1, net_learning_rate=0.02)


def table(leak, need=0.0, sites=12, n=240, seed=0):
    """x0 tells the outcome; x1 tells the site (times `leak`), and the outcome (times `need`)."""
    rng = np.random.default_rng(seed)
    site = np.arange(n) % sites
    place = np.linspace(-2, 2, sites)[rng.permutation(sites)]
    x = np.column_stack([rng.normal(size=n), leak * place[site] + 0.3 * rng.normal(size=n)])
    y = x[:, 0] + need * x[:, 1] + rng.normal(size=n)
    return ClusteredData.from_arrays(x, y, {"site": site})


def program(weight="auto", width=4, random="(1 | site)"):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 1))
    return MixedEffects(net, random, adversary=Adversary("site", ["1"], weight=weight))


def fitted(data, model=None, **settings):
    model = program() if model is None else model
    options = {"schedule": SHORT, "refine": False, "progress": False, "compile": "never"}
    return fit(model, data, **options | settings)


def tried(weight, accuracy, losses):
    """Weights as after a fit, with a probe of 100 rows at this accuracy."""
    se = (accuracy * (1 - accuracy) / 100) ** 0.5
    probe = FreshProbe("site", accuracy, se, 0.25, 0.0, None, 100, 4, held_out=True)
    return _Tried({0: weight}, {0: probe}, np.array(losses))


@pytest.mark.slow
def test_without_a_leak_the_weight_is_zero():
    model = program()
    result = fitted(table(leak=0.0))
    assert result.model.adversaries[0].weight == 0.0
    (record,) = result.history.weights
    assert record["chosen"]
    assert record["weight"] == 0
    assert record["held_out"] == "clusters"
    assert model.adversaries[0].weight == "auto", "the program of the user stays"


SCRIPTS = {
    # Accuracy of the probe (chance is 0.25) and mean loss with each weight; weights tried, and the
    # weight chosen.
    "hidden at 1": ([0.8, 0.6, 0.26, 0.2, 0.2], [1.0] * 5, 3, 1.0),
    "never hidden, but less with each weight": ([0.9, 0.8, 0.7, 0.6, 0.5], [1.0] * 5, 5, 10.0),
    "the loss suffers at 3": ([0.9, 0.8, 0.7, 0.3, 0.25], [1.0, 1.0, 1.0, 1.2, 1.0], 4, 1.0),
    "the loss suffers at once": ([0.9, 0.2, 0.2, 0.2, 0.2], [1.0, 1.1, 1.0, 1.0, 1.0], 2, 0.0),
    "no weight hides anything": ([0.9, 0.9, 0.9, 0.9, 0.9], [1.0] * 5, 5, 0.0),
    "the loss gains": ([0.9, 0.9, 0.9, 0.9, 0.9], [1.0, 0.9, 0.8, 0.8, 0.8], 5, 1.0),
    "nothing to hide": ([0.26, 0.2, 0.2, 0.2, 0.2], [1.0] * 5, 1, 0.0),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_weights_rise_while_the_cluster_is_read_and_the_loss_does_not_suffer(name, monkeypatch):
    accuracy, losses, n_tried, chosen = SCRIPTS[name]

    def scripted(search, model, weights, parts):
        place = LEVELS.index(weights[0])
        noise = 0.01 * np.random.default_rng(place).normal(size=30)
        return tried(weights[0], accuracy[place], losses[place] + noise - noise.mean())

    monkeypatch.setattr(WeightSearch, "_try", scripted)
    search = WeightSearch(SHORT, choose_guide, torch.device("cpu"), progress=False)
    model, records = search.choose(program(), table(leak=0.0))
    assert model.adversaries[0].weight == chosen
    assert [record["weight"] for record in records] == list(LEVELS[:n_tried])
    assert [record["weight"] for record in records if record["chosen"]] == [chosen]
    assert [record["accuracy"] for record in records] == accuracy[:n_tried]
    assert [record["loss"] for record in records] == pytest.approx(losses[:n_tried])


@pytest.mark.slow
def test_the_weight_stops_where_the_loss_suffers():
    """x1 tells the outcome and the site: hiding the site costs the outcome."""
    result = fitted(table(leak=1.0, need=1.0, n=480), program(random=()))
    records = result.history.weights
    assert records[-1]["loss_difference"] > records[-1]["loss_difference_se"]
    assert result.model.adversaries[0].weight < records[-1]["weight"]
    assert [record["chosen"] for record in records].count(True) == 1


def test_a_difference_of_losses_is_that_to_the_best_with_its_standard_error():
    first, second = tried(0.0, 0.6, [1.0, 2.0, 4.0]), tried(0.3, 0.5, [1.0, 1.0, 3.0])
    assert first.difference([]) == (0.0, 0.0)
    differences = np.array([0.5, 1.5, 1.0])
    mean, error = tried(1.0, 0.4, second.losses + differences).difference([first, second])
    assert mean == pytest.approx(1.0)
    assert error == pytest.approx(differences.std(ddof=1) / np.sqrt(3))


def test_the_smallest_weight_whose_probe_is_within_an_error_of_the_best_is_chosen():
    hidden = [
        tried(w, a, [1.0, 1.0]) for w, a in zip(LEVELS, (0.8, 0.5, 0.34, 0.30, 0.4), strict=True)
    ]
    assert _smallest(hidden).weights == {0: 1.0}  # 0.34 is within 0.30 + 0.046
    useless = [tried(w, 0.8, [1.0, 1.0]) for w in LEVELS]
    assert _smallest(useless).weights == {0: 0.0}


def test_weights_with_a_worse_loss_are_not_chosen():
    worse, best = tried(0.0, 0.3, [1.0, 2.0, 3.0]), tried(1.0, 0.5, [0.8, 1.9, 2.7])
    noise = tried(3.0, 0.3, [0.7, 2.1, 2.8])
    assert _smallest([worse, best]).weights == {0: 1.0}
    assert _smallest([worse, best, noise]).weights == {0: 3.0}


def test_weights_are_raised_up_to_the_largest():
    assert tried(0.0, 0.8, [1.0]).raised() == {0: LEVELS[1]}
    assert tried(LEVELS[-1], 0.8, [1.0]).raised() == {}
    assert tried(0.3, 0.25, [1.0]).raised() == {}, "the probe reads nothing"


@pytest.mark.slow
def test_with_few_clusters_rows_are_held_out():
    result = fitted(table(leak=0.0, sites=4, n=200))
    assert {record["held_out"] for record in result.history.weights} == {"rows"}


def test_too_few_rows_are_refused_with_the_way_on():
    with pytest.raises(ValueError, match=r"cannot be chosen automatically.*Give a number"):
        fitted(table(leak=0.0, sites=100, n=200))


def test_streamed_rows_are_refused_with_the_way_on(tmp_path):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"a": rng.normal(size=80), "b": rng.normal(size=80)})
    frame["y"], frame["site"] = rng.normal(size=80), np.arange(80) % 8
    frame.to_parquet(tmp_path / "rows.parquet")
    streamed = StreamedData.scan(tmp_path / "rows.parquet", outcome="y", clusters=["site"])
    with pytest.raises(ValueError, match="needs rows in memory"):
        fitted(streamed)


@pytest.mark.slow
def test_the_choice_is_saved_and_a_resumed_fit_keeps_it(tmp_path):
    data, path = table(leak=0.0), tmp_path / "run.checkpoint"
    whole = fitted(data, checkpoint=path)
    again = fitted(data, checkpoint=path, resume=True)
    whole.save(tmp_path / "run", draws=20)
    loaded = Fit.load(tmp_path / "run", net=program().net)
    for other in (again, loaded):
        assert other.model.adversaries[0].settings() == whole.model.adversaries[0].settings()
        assert other.history.weights == whole.history.weights
        assert other.history.probes == whole.history.probes
        assert other.history.loss == whole.history.loss
