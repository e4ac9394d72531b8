"""A training step of the spirals' network, written in several ways to be timed side by side."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import pyro
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from armed_pyro import Adversary, ClusteredData, MixedEffects, Schedule, Slopes
from armed_pyro.data.simulate import spirals
from armed_pyro.engine.compiled_step import CompileMode
from armed_pyro.engine.processes import ALONE
from armed_pyro.engine.shards import Share
from armed_pyro.guides.crossed import choose_guide
from armed_pyro.inference.training_run import Run
from armed_pyro.inference.training_task import TrainingTask
from armed_pyro.networks.adversary import reverse_gradient
from armed_pyro.program.model import trains_network
from armed_pyro.random_effects.terms import Term
from armed_pyro.rows.passes import Passes

__all__ = [
    "Step",
    "Task",
    "compiled",
    "eager",
    "interleaved",
    "program_step",
    "stock",
    "torch_loop",
]

Step = Callable[[], object]
RATE = 0.005


@dataclass(frozen=True)
class Task:
    """The spirals' program: three hidden layers, an intercept and slopes on the last of them.

    Attributes
    ----------
    width, batch : int
        Units in each hidden layer, and rows per step.
    clusters, rows : int
        Number of clusters, and of rows in each.
    device : str
        Where the steps are taken.
    """

    width: int
    batch: int
    clusters: int = 10
    rows: int = 1000
    device: str = "cpu"

    def data(self) -> ClusteredData:
        """Rows of the spirals."""
        return spirals(self.clusters, self.rows, seed=0)[0]

    def network(self) -> nn.Sequential:
        """Three hidden layers with the module paths "1", "3", "5"."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            sizes = [2, self.width, self.width, self.width]
            layers: list[nn.Module] = []
            for before, after in itertools.pairwise(sizes):
                layers += [nn.Linear(before, after), nn.ELU()]
            return nn.Sequential(*layers, nn.Linear(self.width, 1))

    def program(self, *, game: bool = True) -> MixedEffects:
        """The program, with or without its adversary."""
        adversary = Adversary("site", taps=["1", "3", "5"], weight=0.1)
        random: list[str | Term] = ["(1 | site)", Slopes("site", on="5")]
        return MixedEffects(
            self.network(), random, "bernoulli", adversary if game else (), fixed_weight=1.0
        )


def compiled(task: Task) -> Step:
    """The program's step as `fit` takes it, compiled."""
    return _task_step(task, "always")


def eager(task: Task) -> Step:
    """The program's step as `fit` takes it, not compiled."""
    return _task_step(task, "never")


def _task_step(task: Task, mode: CompileMode) -> Step:
    data = task.data()
    torch.manual_seed(0)
    schedule = Schedule(batch_size=task.batch, net_learning_rate=RATE)
    step = program_step(task.program(), data, schedule, mode, task.device)
    for _ in range(3):  # compiling happens in the second step
        step()
    return step


def program_step(
    model: MixedEffects,
    data: ClusteredData,
    schedule: Schedule,
    mode: CompileMode,
    device: str = "cpu",
) -> Step:
    """A training step of a program as `fit` takes it, with a linear network frozen."""
    model = model.bind(data).to(device)
    source = model.encode(data)
    with pyro.validation_enabled(False):
        guide = choose_guide(model, source).to(device)
        share = Share(ALONE, source, ())
        run = Run(TrainingTask(model, guide, data, source, share, schedule, compile=mode))
        if not trains_network(model):
            run.freeze()
    model.train(run.phase.trains_network)

    def step() -> object:
        with pyro.validation_enabled(False):
            return run.take_step()

    return step


def torch_loop(task: Task, *, game: bool) -> Step:
    """A step of a hand-written loop for the network, with an adversary (`game`) or without."""
    data, net = task.data(), task.network().to(task.device)
    x = torch.as_tensor(data.features, dtype=torch.float32, device=task.device)
    x = (x - x.mean(0)) / x.std(0)
    if data.outcome is None:
        raise ValueError("the spirals have no outcome")
    y = data.outcome.float().to(task.device)
    site = torch.as_tensor(data.grouping("site").codes, device=task.device)
    torch.manual_seed(0)
    classifier = nn.Sequential(
        nn.Linear(3 * task.width, 32), nn.ReLU(), nn.Linear(32, task.clusters)
    ).to(task.device)
    parameters = [*net.parameters(), *(classifier.parameters() if game else ())]
    adam = torch.optim.Adam(parameters, lr=RATE, fused=True)
    orders, strength = _orders(len(x), task.batch), torch.tensor(0.1, device=task.device)

    def step() -> Tensor:
        index = next(orders).to(task.device)
        hidden, activations = x[index], []
        for layer in net:
            hidden = layer(hidden)
            if isinstance(layer, nn.ELU):
                activations.append(hidden)
        loss = binary_cross_entropy_with_logits(hidden[:, 0], y[index])
        if game:
            seen = reverse_gradient(torch.cat(activations, -1), strength)
            loss = loss + cross_entropy(classifier(seen), site[index])
        adam.zero_grad()
        loss.backward()
        adam.step()
        return loss

    return step


def _orders(n: int, size: int) -> Iterator[Tensor]:
    """Numbers below n in random order, `size` at a time, without end."""
    while True:
        yield from torch.randperm(n)[: n // size * size].split(size)


def stock(task: Task) -> Step:
    """A step of Pyro's SVI with AutoNormal, on the same program without an adversary."""
    data = task.data()
    model = task.program(game=False).bind(data).to(task.device)
    source = model.encode(data)
    model.train()
    batches = Passes(lambda generator: source.batches(task.batch, generator))
    with pyro.settings.context(module_local_params=True):
        loss = Trace_ELBO()(model, AutoNormal(model))
        loss(source.batch(torch.arange(task.batch, device=task.device)))
        adam = torch.optim.Adam(loss.parameters(), lr=RATE, fused=True)

    def step() -> Tensor:
        rows = next(batches)
        with pyro.settings.context(module_local_params=True):
            value: Tensor = loss(rows)
        adam.zero_grad()
        value.backward()
        adam.step()
        return value

    return step


def interleaved(
    steps: Mapping[str, Step], rounds: int = 15, seconds: float = 0.05
) -> dict[str, float]:
    """Median seconds of each kind of step, timed in turns so that all share the machine's load.

    Parameters
    ----------
    rounds : int
        Number of turns for each kind.
    seconds : float
        Shortest duration of a turn.
    """
    counts = {}
    for name, step in steps.items():
        step()
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            step()
            count += 1
        counts[name] = count
    durations: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(counts[name]):
                step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            durations[name].append((time.perf_counter() - start) / counts[name])
    return {name: statistics.median(times) for name, times in durations.items()}
