"""Networks that held-out rows stop, their outputs for rows not seen, and the check of these."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import scipy
import torch
from torch import nn

from armed_pyro import (
    ClusteredData,
    Fit,
    FitInterrupted,
    Known,
    MixedEffects,
    Priors,
    Schedule,
    fit,
)
from armed_pyro.checks.held_out_checks import held_out_checks
from armed_pyro.engine.checkpoint import module_tensors
from armed_pyro.engine.schedule import History
from armed_pyro.inference.cross_fitting import CrossFitting
from armed_pyro.inference.held_out import HeldOut
from armed_pyro.inference.out_of_sample import out_of_sample
from armed_pyro.inference.snapshots import Snapshots
from armed_pyro.inference.training_run import Run
from armed_pyro.program.fold_networks import FoldNetworks

pytestmark = pytest.mark.filterwarnings("ignore:there are fewer rows", "ignore:no cluster of")

SHORT = Schedule(steps=40, window=5, patience=2, folds=3)


def make_data(seed=0, n_sites=10, per_site=8, extra=()):
    rng = np.random.default_rng(seed)
    site = np.repeat(np.arange(n_sites), per_site)
    x = rng.normal(size=(len(site), 2))
    y = 0.5 * x[:, 0] + rng.normal(size=n_sites)[site] + rng.normal(size=len(site))
    return ClusteredData.from_arrays(x, y, {"site": site, **dict(extra)})


def make_model(random="(1 | site)", **options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)).double()
    return MixedEffects(net, random, **options)


def run(model=None, data=None, **options):
    settings = {"schedule": SHORT, "progress": False} | options
    data = make_data() if data is None else data
    return fit(make_model() if model is None else model, data, **settings)


class Constant(nn.Module):
    """A network with the same output everywhere."""

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value, dtype=torch.float64))

    def forward(self, x):
        return self.value.expand(len(x), 1)


# ------------------------------------------------------------------------------------- the parts


def held_out(data, random="(1 | site)", folds=5):
    model = make_model(random).bind(data)
    return HeldOut.of(model, model.encode(data), folds=folds, seed=0)


def test_whole_clusters_are_held_out_in_parts_of_equal_size():
    parts = held_out(make_data(n_sites=10))
    codes = np.repeat(np.arange(10), 8)
    assert parts.factor == "site"
    assert torch.equal(parts.fold, parts.of_cluster[codes])
    assert torch.bincount(parts.fold).tolist() == [16] * 5


def test_rows_are_held_out_if_clusters_are_few_or_there_are_none():
    for data, random in ((make_data(n_sites=4), "(1 | site)"), (make_data(), ())):
        parts = held_out(data, random)
        assert parts.factor is None
        assert np.ptp(torch.bincount(parts.fold).numpy()) <= 1


def test_rows_are_held_out_if_the_schedule_says_so():
    result = run(schedule=replace(SHORT, fold_by="rows"))
    folds = result.model.fold_networks
    assert folds.factor is None
    assert np.ptp(torch.bincount(result.data.fold).numpy()) <= 1
    # New rows get the mean of all networks, in seen clusters too.
    rows = result.model.encode(make_data(seed=1)).all()
    expected = torch.stack([network(rows.x) for network in folds.networks]).mean(0)
    torch.testing.assert_close(folds.run(rows, rows.x), expected)
    with pytest.raises(ValueError, match="`fold_by` must be"):
        Schedule(fold_by="sites")


def test_the_outer_of_nested_factors_is_divided_and_the_larger_of_crossed_ones():
    ward, item = np.arange(80) // 4, np.arange(80) % 7
    data = make_data(extra={"ward": ward, "item": item})
    assert held_out(data, ["(1 | site)", "(1 | ward)"]).factor == "site"
    assert held_out(data, ["(1 | site)", "(1 | item)"]).factor == "site"
    assert held_out(data, ["(1 | ward)", "(1 | item)"]).factor == "ward"


def test_a_single_part_is_a_fifth_of_the_rows():
    parts = held_out(make_data(), folds=1)
    assert parts.folds == 1
    assert (parts.fold == 0).sum() == 16


# --------------------------------------------------------- the networks of rows, and the lengths


def test_rows_get_the_network_that_left_them_out_and_new_clusters_the_mean():
    model = make_model().bind(make_data(n_sites=3))
    data = make_data(n_sites=5, per_site=2)
    rows = model.encode(data, model.data_facts().levels_with(data)).all()
    networks = FoldNetworks([Constant(1.0), Constant(4.0)], "site", torch.tensor([1, 0, 1]))
    expected = [4.0, 4.0, 1.0, 1.0, 4.0, 4.0] + 4 * [2.5]
    assert networks.run(rows, rows.x)[:, 0].tolist() == expected
    in_turn = [4.0, 4.0, 1.0, 1.0, 4.0, 4.0] + 4 * [1.0]
    assert networks.run(rows, rows.x, 0)[:, 0].tolist() == in_turn


def test_no_row_is_predicted_by_a_network_that_was_trained_on_its_cluster(monkeypatch):
    trained, make = [], CrossFitting._task

    def recorded(self, number):
        task = make(self, number)
        trained.append(set(task.source.codes["site"].tolist()))
        assert not trained[-1] & set(task.validation.codes["site"].tolist())
        return task

    monkeypatch.setattr(CrossFitting, "_task", recorded)
    networks = run().model.fold_networks
    assert len(networks) == len(trained) == 3
    for cluster, number in enumerate(networks.of_cluster.tolist()):
        assert cluster not in trained[number]


def test_the_length_of_a_network_is_chosen_by_the_other_parts():
    parts = held_out(make_data(), folds=3)
    fitting = CrossFitting.__new__(CrossFitting)
    fitting.held_out = parts
    fitting.task = type("Task", (), {"model": make_model()})()
    # The first part alone would stop at once, the others after two windows.
    fitting.losses = [[0.0, 9.0, 9.0, 9.0], [3.0, 2.0, 1.0, 4.0], [3.0, 2.0, 1.0]]
    assert fitting._windows()[0] == 2
    # The second is stopped by the first and the third, 3, 11, 10 and 10.
    assert fitting._windows()[1] == 0
    fitting.held_out = held_out(make_data(), folds=1)
    fitting.losses = fitting.losses[:1]
    assert fitting._windows() == [0]


def test_snapshots_are_spread_over_the_training_and_averaged():
    snapshots = Snapshots()
    for window in range(1000):
        state = {"weight": torch.tensor([float(window)]), "count": torch.tensor(window)}
        snapshots.add(window, state)
    kept = sorted(snapshots.states)
    assert len(kept) <= Snapshots.MOST
    assert set(np.diff(kept)) == {snapshots.stride}
    near = snapshots.near(500)
    assert abs(float(near["weight"]) - 500) <= snapshots.stride / 2
    assert near["count"] == near["weight"]
    again = Snapshots.restored(snapshots.tensors("s"), "s")
    assert (again.stride, sorted(again.states)) == (snapshots.stride, kept)


# ------------------------------------------------------------------------------------------- fits


def test_intervals_of_new_rows_hold_where_a_network_could_memorise():
    # 20 clusters of 10 rows: without held-out rows the intervals hold under a tenth.
    rng = np.random.default_rng(1)
    site = np.repeat(np.arange(20), 40)
    x = rng.normal(size=(len(site), 5))
    y = 0.3 * x[:, 0] + rng.normal(size=20)[site] + rng.normal(size=len(site))
    old = np.arange(len(site)) % 4 == 0
    data = ClusteredData.from_arrays(x[old], y[old], {"site": site[old]})
    new = ClusteredData.from_arrays(x[~old], y[~old], {"site": site[~old]})
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    result = fit(MixedEffects(net, "(1 | site)"), data, progress=False)
    predicted = result.predict(new, draws=1000)
    lower, upper = np.quantile(predicted.outcome, [0.05, 0.95], axis=0)
    inside = (lower <= y[~old]) & (y[~old] <= upper)
    by_site = inside.reshape(20, -1).mean(1)
    assert abs(inside.mean() - 0.9) < 0.03 + 3 * by_site.std() / 20**0.5
    checks = {check.name: check for check in held_out_checks(result.posterior, {})}
    assert {check.verdict for check in checks.values()} == {"pass"}
    record = result.history.held_out
    assert record["rows"] == 200
    assert abs(record["coverage"] - 0.9) < 3 * max(record["coverage_se"], 0.021)


@pytest.mark.parametrize(
    ("random", "data"),
    [
        ("(1 | site)", make_data()),
        ("(1 | site)", make_data(n_sites=3, per_site=20)),
        ((), make_data()),
    ],
    ids=["clusters", "rows", "no-factor"],
)
def test_networks_and_parts_are_saved_and_resumed(random, data, tmp_path, monkeypatch):
    path = tmp_path / "run.checkpoint"
    whole = run(make_model(random), data)
    assert len(whole.history.fold_steps) == len(whole.model.fold_networks) == 3
    saves, save = [], Run.save

    def interrupted(self):
        saves.append(1)
        if len(saves) == 8:
            raise KeyboardInterrupt
        return save(self)

    monkeypatch.setattr(Run, "save", interrupted)
    with pytest.raises(FitInterrupted) as caught:
        run(make_model(random), data, checkpoint=path)
    monkeypatch.undo()
    early = caught.value.fit
    assert early.stopped == "interrupted"
    assert early.model.data_facts().n_rows == data.n_rows
    assert np.isfinite(early.predict(data, draws=5).expected).all()
    early.save(tmp_path / "early", draws=5)
    resumed = run(make_model(random), data, checkpoint=path, resume=True)
    assert resumed.history == whole.history
    whole.save(tmp_path / "run", draws=10)
    loaded = Fit.load(tmp_path / "run", make_model().net)
    assert loaded.history.held_out == whole.history.held_out
    for other in (resumed, loaded):
        first, second = (
            module_tensors("", part.model) | module_tensors("", part.guide)
            for part in (whole, other)
        )
        assert all(torch.equal(first[name], second[name]) for name in first | second)
        for rows in (whole.data, make_data(seed=2, n_sites=3)):
            expected = whole.predict(rows, draws=20).expected
            np.testing.assert_array_equal(other.predict(rows, draws=20).expected, expected)


@pytest.mark.parametrize("head", [True, False])
def test_a_linear_layer_is_trained_as_before(head):
    torch.manual_seed(0)
    model = MixedEffects(nn.Linear(2, 1), "(1 | site)", bayesian_head=head)
    results = [run(copy.deepcopy(model), validation=v, refine=False) for v in ("auto", None)]
    states = [module_tensors("", one.model) | module_tensors("", one.guide) for one in results]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert results[0].history == results[1].history
    assert results[0].model.fold_networks is None
    assert not list(held_out_checks(results[0].posterior, {}))


def test_the_summary_says_what_was_held_out(capsys):
    for options, line in (
        ({}, "Networks: 3, each trained without a part of the clusters of site ("),
        ({"random": ()}, "Networks: 3, each trained without a part of the rows ("),
        ({"bayesian_head": True}, "Network: stopped after "),
    ):
        run(make_model(**options)).summary()
        assert line in capsys.readouterr().out


def test_activations_of_several_networks_are_never_mixed():
    result = run(make_model(bayesian_head=True))
    assert result.model.fold_networks is None
    assert len(result.history.fold_steps) == 1
    assert result.history.held_out["rows"] == 16  # two of ten clusters


def test_an_ensemble_adds_the_networks_disagreement_to_new_clusters_only():
    result = run(schedule=Schedule(steps=200, folds=3, net_learning_rate=0.05))
    seen, new = make_data(seed=3), make_data(seed=3, n_sites=30)
    new = new.take(np.arange(80, 240))
    options = {"draws": 300, "unseen": "population"}
    for rows, differs in ((seen, False), (new, True)):
        plain, ensemble = (
            result.predict(rows, network_uncertainty=choice, **options).expected.std(0)
            for choice in ("none", "ensemble")
        )
        assert (ensemble > plain + 1e-6).all() == differs
        assert np.array_equal(plain, ensemble) != differs
    with pytest.raises(ValueError, match="must be one of none, ensemble"):
        result.predict(seen, network_uncertainty="all")


# ------------------------------------------------------------------------------------- the check


def test_scores_of_left_out_rows_are_those_of_the_closed_form():
    # Known variances: y_i given the others is normal, with mean and variance in closed form.
    data = make_data(n_sites=30, per_site=6)
    priors = Priors(sd=Known(1.0), residual_sd=Known(1.0))
    torch.manual_seed(0)
    model = make_model(priors=priors, linear_effects=False)
    result = run(model, data, validation=None, schedule=Schedule(steps=30))
    rows = result.model.compute(result.model.encode(data))
    found = out_of_sample(result.posterior, rows, settled_on=True)
    with torch.no_grad():
        fixed = result.model.predictor(rows.all(), {}).fixed[:, 0].numpy()
    residual = (data.outcome.numpy() - fixed).reshape(30, 6)
    mean = (residual.sum(1, keepdims=True) - residual) / (1 + 5)
    sd = np.sqrt(1 + 1 / (1 + 5))
    z = (residual - mean) / sd
    assert found["score"] == pytest.approx(scipy.stats.norm.logpdf(z).mean() - np.log(sd), abs=0.02)
    inside = (abs(z) < scipy.stats.norm.ppf(0.95)).mean()
    assert found["coverage"] == pytest.approx(inside, abs=0.03)
    claimed = scipy.stats.norm.entropy() + np.log(sd)
    assert found["claimed"] == pytest.approx(-claimed, abs=0.05)


def verdicts(result, **record):
    history = History(held_out=record)
    posterior = copy.copy(result.posterior)
    object.__setattr__(posterior, "history", history)
    return {check.name: check.verdict for check in held_out_checks(posterior, {})}


def test_the_check_fails_by_the_size_of_the_fault_and_not_by_noise():
    result = run(validation=None, schedule=Schedule(steps=20))
    good = {"rows": 1000, "score": -1.4, "claimed": -1.38, "excess_se": 0.02}
    good |= {"coverage": 0.89, "coverage_se": 0.01}
    names = ("held-out coverage", "held-out log score")
    assert verdicts(result, **good) == dict.fromkeys(names, "pass")
    assert verdicts(result, **good | {"coverage": 0.83})[names[0]] == "warn"
    assert verdicts(result, **good | {"coverage": 0.7})[names[0]] == "fail"
    noisy = {"coverage": 0.7, "coverage_se": 0.1}
    assert verdicts(result, **good | noisy)[names[0]] == "pass"
    assert verdicts(result, **good | {"claimed": -1.2})[names[1]] == "warn"
    assert verdicts(result, **good | {"claimed": -0.9})[names[1]] == "fail"
    assert verdicts(result, **good | {"coverage": None}) == {names[1]: "pass"}


def test_a_network_without_held_out_rows_fails_if_it_could_memorise():
    result = run(validation=None, schedule=Schedule(steps=20))
    assert verdicts(result) == {"held-out rows": "fail"}  # 33 weights, 80 rows
    large = run(
        data=make_data(n_sites=20, per_site=20), validation=None, schedule=Schedule(steps=20)
    )
    assert verdicts(large) == {"held-out rows": "not checked"}


def test_snapshots_that_begin_late_keep_their_stride_in_a_checkpoint():
    snapshots = Snapshots()
    for window in range(7, 60):
        snapshots.add(window, {"weight": torch.tensor([float(window)])})
    again = Snapshots.restored(snapshots.tensors("kept"), "kept")
    assert again.stride == snapshots.stride
    assert sorted(again.states) == sorted(snapshots.states)
