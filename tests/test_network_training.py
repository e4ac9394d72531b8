"""Training of a network as its user wants it: optimizers, callbacks, precision, warm start."""

from dataclasses import FrozenInstanceError, replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from armed_pyro import Adversary, ClusteredData, MixedEffects, Schedule, fit
from armed_pyro.inference.network_training import CsvLog, NetworkTraining, measured

ROWS, SITES = 120, 6
BRIEF = Schedule(steps=40, stages=0, window=10)
QUIET = {"validation": None, "progress": False, "compile": "never", "refine": False}


def table(seed=0, sites=SITES):
    rng = np.random.default_rng(seed)
    site = np.arange(ROWS) % sites
    frame = pd.DataFrame({"a": rng.normal(size=ROWS), "b": rng.normal(5, 2, size=ROWS)})
    frame["site"] = [f"s{k + 100 * seed}" for k in site]
    frame["y"] = np.sin(frame["a"]) + rng.normal(size=sites)[site] + 0.2 * rng.normal(size=ROWS)
    return frame


def rows(seed=0, **settings):
    return ClusteredData.from_frame(table(seed, **settings), outcome="y", clusters=["site"])


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))


def program(**settings):
    return MixedEffects(
        network(), "(1 | site)", **{"linear_effects": False, "between": False, **settings}
    )


def weights(result):
    return nn.utils.parameters_to_vector(result.model.network.parameters())


def test_adam_of_torch_takes_the_steps_of_the_library():
    """Without decay both are Adam, by other code."""
    schedule = replace(BRIEF, weight_decay=0.0)
    ours = fit(program(), rows(), schedule=schedule, **QUIET)
    theirs = fit(
        program(),
        rows(),
        schedule=schedule,
        optimizer=lambda groups: torch.optim.Adam(groups, lr=0.005, betas=(0.9, 0.99)),
        **QUIET,
    )
    np.testing.assert_allclose(theirs.history.loss, ours.history.loss, rtol=2e-4)
    np.testing.assert_allclose(weights(theirs).detach(), weights(ours).detach(), atol=2e-4)


def test_groups_have_their_settings():
    made = []

    def optimizer(groups):
        made.append(groups)
        return torch.optim.SGD(groups, lr=0.1)

    game = Adversary("site", ["1"], weight=0.1)
    result = fit(
        program(adversary=game),
        rows(),
        schedule=BRIEF,
        optimizer=optimizer,
        parameter_groups={"0": {"lr": 0.0}},
        **QUIET,
    )
    assert [group["name"] for group in made[0]] == ["0", "network", "adversary"]
    assert [len(group["params"]) for group in made[0]] == [2, 2, 4]
    before = network()
    assert torch.equal(result.model.network[0].weight, before[0].weight)
    assert not torch.equal(result.model.network[2].weight, before[2].weight)
    with pytest.raises(ValueError, match="no module '7'"):
        fit(program(), rows(), schedule=BRIEF, parameter_groups={"7": {}}, **QUIET)


def test_the_scheduler_sets_the_rate():
    rates = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    fit(
        program(),
        rows(),
        schedule=BRIEF,
        optimizer=lambda groups: Watched(groups, lr=0.1),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 10, 0.5),
        **QUIET,
    )
    expected = 0.1 * 0.5 ** (np.arange(40) // 10) * [BRIEF.rate(n) for n in range(40)]
    np.testing.assert_allclose(rates, expected)


def test_accumulated_batches_are_one_step():
    steps = []

    class Counted(torch.optim.SGD):
        def step(self, closure=None):
            steps.append(sum(p.grad.square().sum() for p in self.param_groups[0]["params"]))
            return super().step(closure)

    settings = {"optimizer": lambda groups: Counted(groups, lr=0.0), **QUIET}
    fit(program(), rows(), schedule=replace(BRIEF, batch_size=30), accumulate=4, **settings)
    assert len(steps) == 10


def test_callbacks_see_records_and_may_stop(tmp_path):
    seen = []

    def stop_at_20(record):
        seen.append(record)
        return record.step >= 20

    log = CsvLog(tmp_path / "log.csv")
    game = Adversary("site", ["1"], weight=0.1)
    result = fit(
        program(adversary=game), rows(), schedule=BRIEF, callbacks=[stop_at_20, log], **QUIET
    )
    assert [record.step for record in seen[:2]] == [10, 20]
    assert result.history.settled == 20
    assert {record.phase for record in seen[:2]} == {"network"}
    assert all(record.phase == "guide" for record in seen[2:])
    assert seen[0].adversary_chance == pytest.approx([1 / SITES])
    np.testing.assert_allclose(seen[0].loss, np.mean(result.history.loss[:10]))
    with pytest.raises(FrozenInstanceError):
        seen[0].step = 1
    logged = pd.read_csv(tmp_path / "log.csv")
    assert logged["step"].tolist() == [record.step for record in seen]
    np.testing.assert_allclose(logged["loss"], [record.loss for record in seen])


def optimizing(path, steps, resume=False):
    return fit(
        program(),
        rows(),
        schedule=replace(BRIEF, steps=steps),
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=0.01, amsgrad=True),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60),
        checkpoint=path,
        resume=resume,
        **QUIET,
    )


def test_a_finished_run_goes_on_with_more_steps_and_the_optimizers_state(tmp_path, monkeypatch):
    # At a constant factor of the rates, the longer run is the shorter one continued.
    monkeypatch.setattr(Schedule, "rate", lambda self, step: 1.0)
    whole = optimizing(tmp_path / "whole.safetensors", 40)
    path = tmp_path / "parts.safetensors"
    first = optimizing(path, 20)
    assert (first.posterior.stopped, len(first.history.loss)) == ("steps", 20)
    longer = optimizing(path, 40, resume=True)
    assert longer.history.loss == whole.history.loss
    assert torch.equal(weights(longer), weights(whole))


def test_mixed_precision_trains_and_predicts_in_full():
    result = fit(program(), rows(), schedule=BRIEF, precision="bf16-mixed", **QUIET)
    full = fit(program(), rows(), schedule=BRIEF, **QUIET)
    assert result.history.loss != full.history.loss
    np.testing.assert_allclose(result.history.loss[-1], full.history.loss[-1], rtol=0.05)
    assert not result.model.mixed_precision
    assert result.model.run_network(result.model.encode(rows()).all())[0].dtype == torch.float32


def test_networks_of_low_precision_are_fitted_saved_and_loaded(tmp_path):
    net = network().bfloat16()
    game = Adversary("site", ["1"], weight=0.1)
    model = MixedEffects(net, "(1 | site)", adversary=game, linear_effects=False, between=False)
    result = fit(model, rows(), schedule=replace(BRIEF, steps=200), **QUIET)
    assert result.model.network[0].weight.dtype == torch.bfloat16
    assert result.posterior.draws(5)["site_sd"].dtype == torch.float64
    assert result.history.loss[-1] < result.history.loss[0]
    result.save(tmp_path)
    loaded = type(result).load(tmp_path, network())
    np.testing.assert_array_equal(loaded.predict(rows()).expected, result.predict(rows()).expected)


def test_warm_start_begins_at_the_earlier_network_in_its_scales():
    earlier = fit(program(), rows(), schedule=replace(BRIEF, steps=400), **QUIET)
    new = ClusteredData.encode(table(1, sites=4), earlier.data.schema, outcome_required=True)
    frozen = {"optimizer": lambda groups: torch.optim.SGD(groups, lr=0.0), **QUIET}
    warm = fit(program(), new, schedule=BRIEF, warm_start=earlier, **frozen)
    assert torch.equal(weights(warm), weights(earlier))
    assert warm.model.data_facts().feature_mean == earlier.model.data_facts().feature_mean
    assert set(warm.random_effects()["cluster"]) == {"s100", "s101", "s102", "s103"}
    np.testing.assert_allclose(
        warm.predict(new, unseen="population").expected.mean(0)
        - warm.random_effects()["mean"].to_numpy()[new.grouping("site").codes],
        earlier.predict(new, unseen="population").expected.mean(0),
        atol=0.15,
    )
    other = ClusteredData.from_frame(table(1), outcome="y", clusters=["site"], features=["a"])
    with pytest.raises(ValueError, match=r"feature_names is \('a',\), but was"):
        fit(
            MixedEffects(nn.Linear(1, 1), "(1 | site)"),
            other,
            schedule=BRIEF,
            warm_start=earlier,
            **QUIET,
        )


@pytest.mark.parametrize(
    ("monitor", "expected", "y"),
    [
        ("rmse", [1.0, 2.0], 0.5**0.5),
        ("mae", [1.0, 2.0], 0.5),
        ("accuracy", [0.9, 0.2], -0.5),
    ],
)
def test_measures_of_held_out_rows(monitor, expected, y):
    outcome = torch.tensor([1.0, 1.0])
    assert measured(monitor, torch.tensor(expected), outcome) == pytest.approx(y)


def test_areas_under_the_curve():
    rng = np.random.default_rng(0)
    y, p = rng.integers(2, size=50), rng.random(50)
    area = measured("auroc", torch.tensor(p), torch.tensor(y))
    assert area == pytest.approx(-roc_auc_score(y, p))
    classes, chance = rng.integers(3, size=50), rng.dirichlet([1, 1, 1], size=50)
    mean = np.mean([roc_auc_score(classes == k, chance[:, k]) for k in range(3)])
    found = measured("auroc", torch.tensor(chance), torch.tensor(classes))
    assert found == pytest.approx(-mean)
    with pytest.raises(ValueError, match="two values or classes"):
        measured("auroc", torch.tensor(p), torch.tensor(p))


def test_the_monitor_stops_a_network():
    data = rows()
    chosen = fit(
        program(), data, schedule=Schedule(steps=60, folds=1), monitor="rmse", progress=False
    )
    assert 0 < chosen.history.fold_validation[0] < data.outcome.std()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"precision": "fp8"}, ValueError, "`precision` is 'fp8', but must be one of full"),
        ({"monitor": "loss"}, ValueError, "`monitor` is 'loss', but must be one of log_score"),
        ({"accumulate": 0}, ValueError, "`accumulate` must be at least 1"),
        ({"optimizer": torch.optim.SGD([torch.zeros(1)])}, TypeError, "a function that makes it"),
    ],
)
def test_settings_that_cannot_be_used(settings, error, message):
    with pytest.raises(error, match=message):
        NetworkTraining(**settings)
