"""Growth of the cost of a step with clusters, rows and terms, and of predictions with draws."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from armed_pyro import ClusteredData, Fit, MixedEffects, Schedule, fit
from armed_pyro.analysis.benchmarks.training_steps import Task, program_step
from armed_pyro.models.dense import dense

__all__ = ["Curve", "curves", "many_clusters", "predicting"]

BATCH = 1024


@dataclass(frozen=True)
class Curve:
    """Seconds by size.

    Attributes
    ----------
    what, name : str
        The operation that is timed, and the quantity that grows.
    sizes : sequence of int
        Sizes, ascending.
    seconds : callable
        Median seconds at a size.
    most : float or None
        Upper limit for the time at the largest size over that at the smallest.
    """

    what: str
    name: str
    sizes: Sequence[int]
    seconds: Callable[[int], float]
    most: float | None = None

    def measure(self) -> Mapping[int, float]:
        """Seconds at each size."""
        return {size: self.seconds(size) for size in self.sizes}


def curves(device: str, *, short: bool) -> Iterator[Curve]:
    """Curves of steps by clusters, rows and terms, and of predictions by draws."""

    def step(clusters: int, rows: int, terms: int) -> float:
        return _step(clusters, rows, terms, device)

    clusters = [100, 10_000] if short else [100, 1_000, 10_000, 100_000, 1_000_000]
    yield Curve("a step of 1,024 rows", "clusters", clusters, lambda k: step(k, BATCH, 2), 2.0)
    if short:
        return
    sizes = [256, 1024, 4096, 16_384]
    yield Curve("a step", "rows in a batch", sizes, lambda rows: step(1000, rows, 2))
    yield Curve("a step of 1,024 rows", "terms", [1, 2, 4, 8, 16], lambda t: step(1000, BATCH, t))
    fitted = _spirals()
    draws = [100, 300, 1000, 3000]
    yield Curve("predicting 10,000 rows", "draws", draws, lambda n: _predict(fitted, n))


def predicting(*, short: bool) -> float:
    """Seconds for 1,000 draws of the 10,000 rows of the spirals."""
    return _predict(_spirals(), 1000, 1 if short else 3)


def _step(clusters: int, batch: int, terms: int, device: str) -> float:
    """Median seconds of a compiled step of a dense network with an intercept and slopes."""
    model, data = many_clusters(clusters, batch, terms)
    step = program_step(model, data, Schedule(batch_size=batch), "always", device)
    times = []
    for place in range(110):
        start = time.perf_counter()
        step()
        if place >= 10:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def many_clusters(clusters: int, batch: int, terms: int) -> tuple[MixedEffects, ClusteredData]:
    """A dense network with an intercept and slopes by cluster, and four batches of rows or more."""
    rng = np.random.default_rng(0)
    n = max(4 * batch, 2 * clusters)
    site = np.concatenate([np.arange(clusters), rng.integers(0, clusters, n - clusters)])
    x = rng.normal(size=(n, 16)).astype(np.float32)
    y = x[:, 0] + rng.normal(size=n)
    data = ClusteredData.from_arrays(x, y, {"site": site})
    slopes = " + ".join(["1", *(f"x{place}" for place in range(terms - 1))])
    torch.manual_seed(0)
    return MixedEffects(dense(16, hidden=(32, 32)), f"({slopes} | site)"), data


def _spirals() -> Fit:
    task = Task(4, 32)
    schedule = Schedule(steps=200, batch_size=32, stages=0)
    return fit(task.program(), task.data(), schedule=schedule, refine=False, progress=False)


def _predict(fitted: Fit, draws: int, turns: int = 3) -> float:
    times = []
    for _ in range(turns):
        start = time.perf_counter()
        fitted.predict(fitted.data, draws=draws)
        times.append(time.perf_counter() - start)
    return statistics.median(times)
