"""Two processes, joined by gloo on one machine, fit what one does."""

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from torch import nn

from armed_pyro import (
    Adversary,
    ClusteredData,
    DivergenceError,
    MixedEffects,
    Schedule,
    Slopes,
    fit,
)
from armed_pyro.engine.checkpoint import Checkpoint, module_tensors
from armed_pyro.engine.processes import ALONE, Processes, join
from armed_pyro.engine.shards import Share
from armed_pyro.inference.cross_fitting import CrossFitting
from armed_pyro.inference.objective import Objective
from armed_pyro.program.model import trains_network
from test_objective import BATCH, CommonNoise, bind, deep, disturb, gradients, make_data

HERE = Path(__file__).parent
CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:there are fewer rows")


# -------------------------------------------------------------------------- two processes at once


def environment(rank, port, size=2):
    told = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return os.environ | {name: str(value) for name, value in told.items()}


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def start(job, *arguments, size=2):
    """The processes that do a job of this module."""
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import test_distributed as t; "
    code += f"t.work(t.{job}, *sys.argv[1:])"
    port, command = free_port(), [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen(command, env=environment(rank, port, size), **pipes)
        for rank in range(size)
    ]


def outcomes(started, seconds=300):
    """Exit code and output of each, once all have ended."""
    try:
        ends = [one.communicate(timeout=seconds) for one in started]
    finally:
        for one in started:
            one.kill()
    return [(one.returncode, *end) for one, end in zip(started, ends, strict=True)]


def results(job, *arguments, size=2):
    """What each process returned."""
    ended = outcomes(start(job, *arguments, size=size))
    assert all(code == 0 for code, _, _ in ended), "\n".join(error for _, _, error in ended)
    return [json.loads(text.splitlines()[-1]) for _, text, _ in ended]


def work(job, *arguments):
    torch.set_num_threads(1)
    print(json.dumps(job(*arguments)), flush=True)


# ------------------------------------------------------------------------------------ the gradients

PROGRAMS = {
    "slopes": (
        ["(1 | site)", Slopes("site", on="1")],
        {"bayesian_head": True, "fixed_weight": 0.7},
    ),
    "crossed": ("(1 + x0 || site) + (1 | batch)", {"fixed_weight": 0.3}),
    "counts": ("(1 | site)", {"family": "poisson"}),
}


def trained(model):
    """The network, if it is to be trained."""
    return model.network if trains_network(model) else None


def averaged(share, model, guide, noise, rows):
    """As `gradients`, by DistributedDataParallel from every process's rows."""
    noise.rows = rows = share.weigh(rows)
    parameters = dict(guide.named_parameters(prefix="guide"))
    parameters |= dict(model.named_parameters(prefix="model"))
    for one in parameters.values():
        one.grad = None
    # Kept, as it acts in `backward`.
    modules = {"model": model, "guide": guide}
    objective = share.averaged(Objective(model, guide), modules, len(model.adversaries))
    loss = objective(rows)
    loss.total.backward()
    mean = share.mean(loss)
    found = {name: one.grad for name, one in parameters.items() if one.grad is not None}
    parts = {"loss": mean.total, "elbo": mean.elbo, "fixed": mean.fixed, "game": mean.adversarial}
    return found | parts


def gradients_differ_by():
    """Largest differences from a single process, of the full batch and the mean of mini-batches."""
    processes, found = join(CPU), {}
    for name, (random, settings) in PROGRAMS.items():
        for sizes in ("balanced", "unbalanced"):
            with pytest.MonkeyPatch.context() as patch, pyro.validation_enabled(False):
                data = make_data(sizes, settings.get("family"), weights=True)
                game = Adversary("batch", taps=["1"], weight=2.0)
                model, source, guide = bind(random, data, net=deep(), adversary=game, **settings)
                disturb(guide)
                noise = CommonNoise(model, patch)
                expected = gradients(model, guide, noise, source.all())
                share = Share.of(processes, source, trained(model))
                full = averaged(share, model, guide, noise, share.rows.all())
                size = share.batch(2 * BATCH)
                count = max(map(len, share.places)) // size
                batches = [
                    averaged(
                        share,
                        model,
                        guide,
                        noise,
                        share.rows.batch(torch.arange(size) + i * size, dense_up_to=0),
                    )
                    for i in range(count)
                ]
            found[f"{name} {sizes}"] = {
                "sizes": [len(one) for one in share.places],
                "moved": max(float(one.abs().max()) for one in full.values()),
                "full": difference(full, expected),
                "mean": difference(
                    {key: torch.stack([one[key] for one in batches]).mean(0) for key in full},
                    expected,
                ),
                "one": difference(batches[0], expected),
            }
    return found


def difference(one, other):
    return max(float((one[name] - other[name]).abs().max()) for name in one)


# ----------------------------------------------------------------------------------------- the fits

QUICK = Schedule(steps=800, window=25, stages=1, patience=3, net_learning_rate=0.01, batch_size=100)


def clustered(family="bernoulli", clusters=12, size=25, seed=0):
    rng = np.random.default_rng(seed)
    site = np.repeat(np.arange(clusters), size)
    x = rng.normal(size=(len(site), 2))
    eta = x[:, 0] - np.abs(x[:, 1]) + rng.normal(size=clusters)[site]
    y = rng.normal(eta) if family == "gaussian" else rng.random(len(eta)) < 1 / (1 + np.exp(-eta))
    return ClusteredData.from_arrays(x, y.astype(float), {"site": site})


def network(*layers):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 8), *layers, nn.ReLU(), nn.Linear(8, 1))


def adversarial(*layers):
    return MixedEffects(
        network(*layers), "(1 | site)", "bernoulli", Adversary("site", [str(len(layers) + 1)])
    )


def summary(result, data):
    sds = result.draws(1000)["site_sd"]
    return {
        "stopped": result.stopped,
        "settled": result.history.settled,
        "steps": len(result.history.loss),
        "loss": result.history.loss[-1],
        "validation": result.history.validation,
        "sd": [float(sds.mean()), float(sds.std())],
        "mean": result.predict(data, draws=200).mean.tolist(),
        "state": state(result),
    }


def state(result):
    tensors = module_tensors("model", result.model) | module_tensors("guide", result.guide)
    return {name: one.double().flatten().tolist() for name, one in tensors.items()}


def fitted(path, distributed="auto"):
    """A fit by validation, cut short after some windows and resumed, and one without an end."""
    data = clustered()
    rows, held_out = data.split_rows(0.25, seed=0)
    settings = {"schedule": QUICK, "progress": False, "distributed": distributed}
    settings |= {"validation": held_out, "compile": "never", "refine": False}
    whole = fit(adversarial(), rows, **settings)
    file = Path(path) / f"{distributed}.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Share, "reshuffled", interrupted(Share.reshuffled, QUICK.window))
        with pytest.raises(KeyboardInterrupt):
            fit(adversarial(), rows, checkpoint=file, **settings)
    join(CPU).total(torch.zeros(1))  # the first one has written
    after = len(Checkpoint.read(file).record["history"]["loss"])
    resumed = fit(adversarial(), rows, checkpoint=file, resume=True, **settings)
    return {
        "whole": summary(whole, held_out),
        "resumed": summary(resumed, held_out),
        "cut after": after,
    }


def interrupted(method, last):
    """As a kill at this step would end all processes."""

    def reshuffled(share, shuffle, seed, step):
        if step == last:
            raise KeyboardInterrupt
        return method(share, shuffle, seed, step)

    return reshuffled


def linear(distributed="auto"):
    data = clustered("gaussian")
    model = MixedEffects(nn.Linear(2, 1), "(1 | site)", bayesian_head=True)
    schedule = Schedule(steps=200, window=20)
    options = {"schedule": schedule, "progress": False, "distributed": distributed}
    return summary(fit(model, data, compile="never", **options), data)


def cross_fitted(path, distributed="auto"):
    """Networks that parts of the clusters stop, whole and resumed before the second phase."""
    data = clustered("gaussian")
    model = MixedEffects(network(), "(1 | site)")
    schedule = Schedule(steps=100, window=10, folds=3, net_learning_rate=0.03)
    options = {"schedule": schedule, "progress": False, "distributed": distributed}
    options |= {"compile": "never", "refine": False}
    whole = fit(model, data, **options)
    file = Path(path) / f"folds-{distributed}.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CrossFitting, "finish", interrupted_finish)
        with pytest.raises(KeyboardInterrupt):
            fit(model, data, checkpoint=file, **options)
    join(CPU).total(torch.zeros(1))  # the first one has written
    resumed = fit(model, data, checkpoint=file, resume=True, **options)
    record = {"folds": whole.history.fold_steps, "held_out": whole.history.held_out}
    return {"whole": summary(whole, data) | record, "resumed": summary(resumed, data) | record}


def interrupted_finish(self):
    raise KeyboardInterrupt


def other_things(path):
    """What else processes have in common, and what ends them together."""
    rank, found, data = int(os.environ["RANK"]), {}, clustered()
    options = {"schedule": replace(QUICK, steps=60, window=20), "progress": False}
    options |= {"compile": "never", "refine": False, "validation": None}
    normed = fit(adversarial(nn.BatchNorm1d(8)), data, **options)
    found["norm"] = state(normed)
    found["divided"] = error_of(adversarial(Broken(torch.inf)), data, **options)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(Objective, "__call__", degenerate)
        found["degenerate"] = error_of(adversarial(), data, **options)
    found["data"] = error_of(adversarial(), clustered(seed=rank), **options)
    if rank == 0:
        fit(adversarial(), data, checkpoint=Path(path) / "0", distributed="never", **options)
    file = Path(path) / str(rank)
    found["file"] = error_of(adversarial(), data, checkpoint=file, resume=True, **options)
    found["few"] = error_of(adversarial(), clustered(), distributed="always", **options)
    return found


def error_of(model, data, **options):
    try:
        fit(model, data, **options)
    except (DivergenceError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


class Broken(nn.Module):
    """No number for the rows that only the second process has."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        if self.value is None and os.environ.get("RANK") == "1" and self.training:
            raise ValueError("this layer is broken")
        return x * self.value if os.environ.get("RANK") == "1" and self.training else x


def degenerate(*_):
    raise torch.linalg.LinAlgError("not positive-definite")


def broken():
    fit(adversarial(Broken(None)), clustered(), schedule=QUICK, progress=False, compile="never")


# ------------------------------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Results of all jobs in both processes, which take long to start."""
    return results("everything", tmp_path_factory.mktemp("distributed"))


def everything(path):
    return {
        "gradients": gradients_differ_by(),
        "fitted": fitted(path),
        "linear": linear(),
        "other": other_things(path),
    }


def test_gradients_are_those_of_one_process(both):
    for found in (one["gradients"] for one in both):
        assert found.keys() == {f"{n} {s}" for n in PROGRAMS for s in ("balanced", "unbalanced")}
        for name, one in found.items():
            assert one["moved"] > 0.1, name
            assert one["full"] < 1e-8, name
            assert sum(one["sizes"]) == 48
    # Without regard to clusters where these are too uneven.
    assert {max(one["sizes"]) for one in both[0]["gradients"].values()} == {24}


def test_gradients_of_batches_of_some_clusters_average_to_the_full_one(both):
    for found in (one["gradients"] for one in both):
        for name, one in found.items():
            assert one["mean"] < 1e-6 < 1e-3 < one["one"], name  # single precision weights


def test_both_processes_have_the_same_fit(both):
    one, other = (result["fitted"]["whole"] for result in both)
    assert one == other
    assert len(one["validation"]) > 2
    assert one["settled"] is not None
    assert both[0]["linear"] == both[1]["linear"]
    assert both[0]["other"]["norm"] == both[1]["other"]["norm"]


def test_a_run_cut_short_goes_on_to_the_same_parameters(both):
    for one in both:
        assert one["fitted"]["cut after"] == QUICK.window
        assert one["fitted"]["resumed"] == one["fitted"]["whole"]


def test_two_processes_fit_what_one_does(both, tmp_path):
    two, one = both[0]["fitted"]["whole"], fitted(tmp_path, "never")["whole"]
    assert two["stopped"] == one["stopped"] == "validation"
    (mean, sd), (other, _) = two["sd"], one["sd"]
    assert abs(mean - other) < 0.5 * sd
    assert np.abs(np.array(two["mean"]) - one["mean"]).mean() < 0.06
    assert abs(min(two["validation"]) - min(one["validation"])) < 0.03


@pytest.mark.slow
def test_several_processes_cross_fit_the_same_networks(tmp_path):
    first, second = results("cross_fitted", tmp_path)
    assert first == second
    assert first["whole"] == first["resumed"]
    assert len(first["whole"]["folds"]) == 3
    # Mini-batches differ from those of one process, but not what they lead to.
    one = cross_fitted(tmp_path, "never")["whole"]
    assert first["whole"]["held_out"]["rows"] == one["held_out"]["rows"] == 300
    assert abs(first["whole"]["held_out"]["score"] - one["held_out"]["score"]) < 0.1
    assert np.corrcoef(first["whole"]["mean"], one["mean"])[0, 1] > 0.95


def test_a_linear_program_is_fitted_as_by_one_process(both):
    two, one = both[0]["linear"], linear("never")
    assert abs(two["sd"][0] - one["sd"][0]) < 0.1 * one["sd"][1]
    np.testing.assert_allclose(two["mean"], one["mean"], atol=1e-4)


def test_divergence_in_one_process_ends_both_with_one_message(both):
    for kind in ("divided", "degenerate"):
        one, other = (result["other"][kind] for result in both)
        assert one == other
        assert one.startswith("DivergenceError: the loss diverged at step 1: ")


def test_processes_with_different_data_or_files_are_refused(both):
    for result in (one["other"] for one in both):
        assert result["data"].startswith("ValueError: the processes that torchrun started have")
        assert "only some of the processes find the checkpoint" in result["file"]
        assert "must be one of auto, never" in result["few"]


@pytest.mark.slow
def test_an_error_in_one_process_ends_both_with_a_message():
    (first, _, lost), (second, _, own) = outcomes(start("broken"), seconds=120)
    assert first != 0
    assert second != 0
    assert "ValueError: this layer is broken" in own
    assert "ConnectionError: process 0 of 2 lost another process of this run" in lost


def train(path):
    """A longer fit with a checkpoint, which it goes on from."""
    data, schedule = clustered(clusters=30, size=40), replace(QUICK, window=10, patience=20)
    options = {"schedule": schedule, "checkpoint": path, "resume": True, "refine": False}
    result = fit(adversarial(), data, validation=data, progress=False, **options)
    return summary(result, data)


@pytest.mark.slow
def test_killed_processes_go_on_to_the_same_parameters(tmp_path):
    whole = results("train", tmp_path / "whole")
    path, started = tmp_path / "cut", start("train", tmp_path / "cut")
    deadline = time.monotonic() + 200
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    for one in started:
        one.kill()
    outcomes(started)
    assert 0 < len(Checkpoint.read(path).record["history"]["loss"]) < whole[0]["steps"]
    assert results("train", path) == whole


@pytest.mark.slow
def test_the_command_line_under_torchrun_writes_one_fit(tmp_path):
    data, table = clustered(size=20), tmp_path / "rows.csv"
    frame = pd.DataFrame(data.features.numpy(), columns=["a", "b"])
    site = np.repeat(np.arange(12), 20)
    frame.assign(y=data.outcome.numpy().astype(int), site=site).to_csv(table, index=False)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(free_port()), "-m", "armed_pyro.cli", "fit", str(table)]
    command += ["--outcome", "y", "--random", "(1 | site)", "--family", "bernoulli"]
    command += ["--net", "dense", "--hidden", "4", "--steps", "300", "--draws", "50"]
    command += ["--adversary", "site", "--validate-rows", "0.2", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Next: armed-pyro report") == 1
    names = {one.name for one in (tmp_path / "run").iterdir()}
    assert {"manifest.json", "model.safetensors", "evaluation.csv"} <= names
    assert "checkpoint.safetensors" not in names
    again = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert again.returncode != 0
    assert "holds a fit: choose another folder" in again.stderr


# -------------------------------------------------------------------------------- without processes


class Parts:
    """Shares of a source, as each of several processes would get them."""

    def __new__(cls, model, source, size):
        return [Share.of(Processes(rank, size), source, trained(model)) for rank in range(size)]


@pytest.mark.parametrize("size", [2, 3, 5])
def test_shares_are_whole_clusters_of_about_equal_size(size):
    data = clustered(clusters=40, size=6)
    model = adversarial().bind(data)
    source = model.encode(data)
    shares = Parts(model, source, size)
    rows = torch.cat([share.places[share.processes.rank] for share in shares])
    assert torch.equal(rows.sort().values, torch.arange(len(source)))
    owners = [set(share.rows.codes["site"].tolist()) for share in shares]
    assert sum(map(len, owners)) == len(set.union(*owners)) == 40
    for share in shares:
        assert abs(len(share.rows) - len(source) / size) <= 6
        assert torch.equal(share.rows.counts["site"], source.counts["site"])
        own = share.places[share.processes.rank]
        assert torch.equal(share.rows.x, source.x[own])
        assert torch.equal(share.rows.y, source.y[own])


def test_rows_are_shared_at_random_where_a_network_normalises_batches():
    data = clustered(clusters=40, size=6)
    model = adversarial(nn.BatchNorm1d(8)).bind(data)
    for share in Parts(model, model.encode(data), 2):
        assert len(share.rows) == 120
        assert len(share.rows.codes["site"].unique()) > 35


def test_a_process_alone_or_without_a_network_has_all_rows():
    data = clustered()
    model = adversarial().bind(data)
    source = model.encode(data)
    share = Share.of(ALONE, source, trained(model))
    assert share.rows is source
    assert (share.several, share.batch(7)) == (False, 7)
    rows = source.batch(torch.arange(7), dense_up_to=0)
    assert share.weigh(rows) is rows
    linear = MixedEffects(nn.Linear(2, 1), "(1 | site)", bayesian_head=True).bind(data)
    assert not Share.of(Processes(1, 2), source, trained(linear)).several


def test_fewer_rows_than_processes_are_refused():
    data = clustered(clusters=3, size=2)
    model = adversarial().bind(data)
    with pytest.raises(ValueError, match="6 rows cannot be shared by 7 processes"):
        Share.of(Processes(0, 7), model.encode(data), trained(model))
