"""One training step of the spirals' network, written in four ways, to be timed side by side."""

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
from armed_pyro.guides.crossed import choose_guide
from armed_pyro.inference.training_run import Run
from armed_pyro.networks.adversary import reverse_gradient
from armed_pyro.random_effects.terms import Term
from armed_pyro.rows.shuffle import Passes

__all__ = ["Step", "Task", "compiled", "eager", "interleaved", "stock", "torch_loop"]

Step = Callable[[], object]
RATE = 0.005


@dataclass(frozen=True)
class Task:
    """The spirals' program: three hidden layers, an intercept and slopes on the last of them.

    Attributes
    ----------
    width, batch : int
        Units in each hidden layer; rows a step.
    clusters, rows : int
        Clusters, and rows in each.
    device : str
        Where the steps are taken.
    """

    width: int
    batch: int
    clusters: int = 10
    rows: int = 1000
    device: str = "cpu"

    def data(self) -> ClusteredData:
        """The spirals."""
        return spirals(self.clusters, self.rows, seed=0)[0]

    def network(self) -> nn.Sequential:
        """Three hidden layers, "1", "3", "5"."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            sizes = [2, self.width, self.width, self.width]
            layers: list[nn.Module] = []
            for one, other in itertools.pairwise(sizes):
                layers += [nn.Linear(one, other), nn.ELU()]
            return nn.Sequential(*layers, nn.Linear(self.width, 1))

    def program(self, *, game: bool = True) -> MixedEffects:
        """The program, with its adversary or without."""
        adversary = Adversary("site", taps=["1", "3", "5"], weight=0.1)
        random: list[str | Term] = ["(1 | site)", Slopes("site", on="5")]
        return MixedEffects(
            self.network(), random, "bernoulli", adversary if game else (), fixed_weight=1.0
        )


def compiled(task: Task) -> Step:
    """The program's step as `fit` takes it, compiled."""
    return _run(task, "always")


def eager(task: Task) -> Step:
    """The same without compiling."""
    return _run(task, "never")


def _run(task: Task, mode: CompileMode) -> Step:
    data = task.data()
    torch.manual_seed(0)
    model = task.program().bind(data).to(task.device)
    source = model.encode(data)
    schedule = Schedule(batch_size=task.batch, net_learning_rate=RATE)
    with pyro.validation_enabled(False):
        guide = choose_guide(model, source).to(task.device)
        run = Run(model, guide, data, source, None, schedule, 0, mode)
    model.train()

    def step() -> object:
        with pyro.validation_enabled(False):
            return run.take_step()

    for _ in range(3):  # the second step of a kind is compiled
        step()
    return step


def torch_loop(task: Task, *, game: bool) -> Step:
    """The network alone in a loop written by hand: with an adversary beside it, or conventional."""
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
    """Pyro's own SVI with AutoNormal on the same program, without an adversary."""
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
    """Median seconds of each kind of step, timed in turns so that all see the same machine.

    Parameters
    ----------
    rounds : int
        Turns of each kind.
    seconds : float
        Least duration of a turn.
    """
    counts = {}
    for name, step in steps.items():
        step()
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            step()
            count += 1
        counts[name] = count
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(counts[name]):
                step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            found[name].append((time.perf_counter() - start) / counts[name])
    return {name: statistics.median(times) for name, times in found.items()}
