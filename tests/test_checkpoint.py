"""Checkpoints: files that are whole or refused, and runs that go on as if nothing had happened."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from armed_pyro import Adversary, ClusteredData, Known, MixedEffects, Priors, Schedule, fit
from armed_pyro.engine.adam import Adam
from armed_pyro.engine.checkpoint import Checkpoint, module_tensors, restore_module
from armed_pyro.storage.manifest import VERSION

SCHEDULE = Schedule(steps=12, window=4, stages=0, batch_size=10)


def make_data(seed=0, n_sites=6, relabel=False):
    rng = np.random.default_rng(seed)
    site = np.repeat(np.arange(n_sites), 5)
    x = rng.normal(size=(len(site), 1))
    y = x[:, 0] + rng.normal(size=n_sites)[site] + rng.normal(size=len(site))
    # The same rows and labels, but other rows belong together.
    site = np.tile(np.arange(n_sites), 5) if relabel else site
    return ClusteredData.from_arrays(x, y, {"site": site})


def make_model(**options):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Dropout(0.2), nn.Linear(3, 1))
    return MixedEffects(net, "(1 | site)", **options)


def run(path=None, *, model=None, data=None, schedule=SCHEDULE, seed=0, **options):
    return fit(
        make_model() if model is None else model,
        make_data() if data is None else data,
        schedule=schedule,
        seed=seed,
        checkpoint=path,
        progress=False,
        **options,
    )


def state(result):
    return module_tensors("model", result.model) | module_tensors("guide", result.guide)


def assert_same(one, other):
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


# ------------------------------------------------------------------------------------- the file


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "new" / "folder" / "run.checkpoint"
    tensors = {"a": torch.arange(6.0).reshape(2, 3).mT, "n": torch.tensor(3), "e": torch.empty(0)}
    Checkpoint(tensors, {"step": 7, "best": float("inf")}).write(path)
    read = Checkpoint.read(path)
    assert_same(read.tensors, tensors)
    assert read.record == {"step": 7, "best": float("inf")}
    assert [one.name for one in path.parent.iterdir()] == [path.name], "nothing may be left over"


def damage_empty(path):
    path.write_bytes(b"")


def damage_truncated(path):
    path.write_bytes(path.read_bytes()[:-20])


def damage_garbage(path):
    path.write_bytes(b"not a checkpoint at all" * 10)


def damage_foreign(path):
    save_file({"weight": torch.ones(2)}, path)


def damage_header(path):
    content = path.read_bytes()
    path.write_bytes(content.replace(b"record", b"recorf", 1))


def test_a_checkpoint_of_a_guide_of_another_version_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "run.checkpoint"
    with monkeypatch.context() as patched:
        patched.setattr("armed_pyro.engine.checkpoint.VERSION", VERSION - 1)
        Checkpoint({"weight": torch.ones(2)}, {}).write(path)
    with pytest.raises(ValueError, match=rf"version {VERSION - 1}, .* version {VERSION}: delete"):
        Checkpoint.read(path)


@pytest.mark.parametrize(
    "damage", [damage_empty, damage_truncated, damage_garbage, damage_foreign, damage_header]
)
def test_a_damaged_file_is_refused_with_its_name(tmp_path, damage):
    path = tmp_path / "run.checkpoint"
    run(path)
    damage(path)
    with pytest.raises(ValueError, match=r"run\.checkpoint is damaged or not a checkpoint"):
        run(path, resume=True)


def test_a_failed_write_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "run.checkpoint"
    Checkpoint({"a": torch.ones(1)}, {}).write(path)

    def fail(*arguments, **options):
        raise OSError("disk full")

    monkeypatch.setattr("armed_pyro.engine.checkpoint.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        Checkpoint({"a": torch.zeros(1)}, {}).write(path)
    assert Checkpoint.read(path).tensors["a"] == 1


def test_module_and_optimizer_states_are_put_back():
    def make():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
        return net, Adam(dict(net.named_parameters()))

    def train(net, adam, seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(5):
            x = torch.randn(8, 2, generator=generator)
            net.zero_grad()
            net(x).pow(2).mean().backward()
            gradient = adam.joined({name: one.grad for name, one in net.named_parameters()})
            adam(dict(net.named_parameters()), gradient, torch.tensor(0.01))

    net, adam = make()
    train(net, adam, 1)
    kept = module_tensors("net", net) | module_tensors("adam", adam)
    kept = {name: one.clone() for name, one in kept.items()}
    train(net, adam, 2)
    other, its_adam = make()
    restore_module("net", other, kept)
    restore_module("adam", its_adam, kept)
    train(other, its_adam, 2)
    assert_same(module_tensors("", other), module_tensors("", net))


# --------------------------------------------------------------------------------------- resume


def cut_short(path, monkeypatch, *, windows=1, **options):
    """A run killed after some windows of steps."""
    write, left = Checkpoint.write, [windows]

    def interrupt(checkpoint, target):
        write(checkpoint, target)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(path, **options)


@pytest.mark.parametrize("validated", [False, True])
def test_a_run_cut_short_goes_on_to_the_same_parameters(tmp_path, validated, monkeypatch):
    options = {"validation": make_data(seed=5)} if validated else {}
    whole = run(**options)
    path = tmp_path / "run.checkpoint"
    cut_short(path, monkeypatch, **options)
    assert len(Checkpoint.read(path).record["history"]["loss"]) == SCHEDULE.window
    resumed = run(path, resume=True, **options)
    assert_same(state(resumed), state(whole))
    assert (resumed.history, resumed.stopped) == (whole.history, whole.stopped)


def linear(random="(1 | site)", family="poisson", **options):
    torch.manual_seed(1)
    return MixedEffects(nn.Linear(1, 1), random, family, bayesian_head=True, **options)


def counts():
    rng = np.random.default_rng(3)
    labels = {"site": np.repeat(np.arange(6), 5), "batch": np.arange(30) % 4}
    return ClusteredData.from_arrays(rng.normal(size=(30, 1)), rng.poisson(3, 30), labels)


KNOWN = Priors(sd=Known(1.0), residual_sd=Known(1.0))
WINDOWS = Schedule(steps=240, window=8, stages=2, net_learning_rate=0.03)
SETTLED = {
    "linear": ({"model": linear("(1 + x0 | site)"), "data": counts()}, None),
    "crossed": ({"model": linear("(1 | site) + (1 | batch)"), "data": counts()}, None),
    "mini-batches": ({"model": linear(), "data": counts()}, 900),
    "network": ({"model": make_model(), "validation": None}, None),
    "validated": ({"model": make_model(), "validation": make_data(seed=5)}, None),
    "adversary": (
        {"model": make_model(adversary=Adversary("site", ["1"])), "validation": None},
        None,
    ),
    "nothing-latent": ({"model": make_model(priors=KNOWN), "validation": None}, None),
}


# A linear program is settled before its first window, after which there is a checkpoint.
LINEAR = ("linear", "crossed", "mini-batches")


@pytest.mark.parametrize(
    ("name", "after"), [(name, after) for name in SETTLED for after in (int(name in LINEAR), 2)]
)
def test_a_run_cut_short_once_settled_goes_on_to_the_same_parameters(
    name, after, tmp_path, monkeypatch
):
    options, largest = SETTLED[name]
    if largest is not None:
        monkeypatch.setattr("armed_pyro.inference.phases.LARGEST_STEP", largest)
    whole = run(schedule=WINDOWS, refine=False, **options)
    history, path = whole.history, tmp_path / "run.checkpoint"
    windows = after + (history.step.index(history.settled) + 1 if history.settled else 0)
    assert windows < len(history.step)
    cut_short(path, monkeypatch, windows=windows, schedule=WINDOWS, refine=False, **options)
    assert len(Checkpoint.read(path).record["history"]["r_hat"]) == after
    resumed = run(path, resume=True, schedule=WINDOWS, refine=False, **options)
    assert_same(state(resumed), state(whole))
    assert (resumed.history, resumed.stopped) == (whole.history, whole.stopped)


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    path = tmp_path / "run.checkpoint"
    whole = run(path, validation=make_data(seed=5))
    again = run(path, resume=True, validation=make_data(seed=5))
    assert_same(state(again), state(whole))
    assert again.history == whole.history


def test_resume_without_a_file_starts_anew(tmp_path):
    path = tmp_path / "run.checkpoint"
    assert_same(state(run(path, resume=True)), state(run()))
    assert path.exists()


def test_without_resume_a_file_is_overwritten(tmp_path):
    path = tmp_path / "run.checkpoint"
    run(path, seed=3)
    assert_same(state(run(path)), state(run()))


OTHER = {
    "rows": {"data": make_data(n_sites=7)},
    "outcome": {"data": make_data(seed=1)},
    "clusters": {"data": make_data(relabel=True)},
    "seed": {"seed": 1},
    "schedule": {"schedule": Schedule(steps=12, window=4, stages=0, batch_size=9)},
    "fewer steps": {"schedule": Schedule(steps=11, window=4, stages=0, batch_size=10)},
    "validation": {"validation": make_data(seed=5)},
    "terms": {"model": MixedEffects(make_model().net, "(1 + x0 | site)")},
    "network": {"model": MixedEffects(nn.Linear(1, 1), "(1 | site)")},
    "priors": {"model": make_model(priors=Priors(cor=2.0, fixed_sd=1.0))},
    "fixed_weight": {"model": make_model(fixed_weight=1.0)},
    "bayesian_head": {"model": make_model(bayesian_head=True)},
    "adversary": {"model": make_model(adversary=Adversary("site", ["1"], weight=2.0))},
}


@pytest.mark.parametrize("changed", OTHER)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, changed):
    path = tmp_path / "run.checkpoint"
    run(path)
    with pytest.raises(ValueError, match="belongs to another run"):
        run(path, resume=True, **OTHER[changed])


def test_resume_needs_a_checkpoint():
    with pytest.raises(ValueError, match="checkpoint"):
        run(resume=True)


SCRIPT = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from test_checkpoint import Schedule, run
run(sys.argv[2], schedule=Schedule(steps=int(sys.argv[3]), window=4, stages=0, batch_size=10))
"""


def test_a_killed_run_goes_on_to_the_same_parameters(tmp_path):
    steps, path = 80, tmp_path / "run.checkpoint"
    schedule = Schedule(steps=steps, window=4, stages=0, batch_size=10)
    here = os.path.dirname(__file__)  # noqa: PTH120
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, here, str(path), str(steps)])
    try:
        deadline = time.monotonic() + 120
        while not path.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    taken = len(Checkpoint.read(path).record["history"]["loss"])
    assert 0 < taken < steps
    assert_same(state(run(path, resume=True, schedule=schedule)), state(run(schedule=schedule)))
