"""Time to a converged fit, beside Pyro's AutoNormal and NUTS on the same program."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyro
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn

from armed_pyro import ClusteredData, MixedEffects, Schedule, fit, read_table
from armed_pyro.analysis.benchmarks.crossed_reml import crossed_reml
from armed_pyro.analysis.benchmarks.training_steps import Task
from armed_pyro.engine.schedule import MOVING, split_r_hat
from armed_pyro.families.simulate import mixed_model
from armed_pyro.models.linear import linear
from armed_pyro.rows.passes import Passes

__all__ = ["Job", "Times", "compare", "insteval", "jobs"]

WARMUP, CHAINS = 400, 4


@dataclass(frozen=True, eq=False)
class Job:
    """A program, its data and schedule."""

    name: str
    model: MixedEffects
    data: ClusteredData
    schedule: Schedule


@dataclass(frozen=True)
class Times:
    """Seconds of the fit, of Pyro's AutoNormal, and of NUTS to the fit's Monte Carlo error."""

    ours: float
    stock: float
    nuts: float


def jobs(folder: str | None, *, short: bool) -> Iterator[Job]:
    """Jobs on the folder's sleepstudy and cbpp, or on data of their shape, and on the spirals."""
    plain = Schedule()
    if folder is None:
        slopes, _ = mixed_model("gaussian", 18, 10, sd=(1.0, 0.3), seed=1)
        yield Job("shape of sleepstudy", _linear(slopes, "(1 + x0 | site)"), slopes, plain)
        binary, _ = mixed_model("binomial", 15, 4, sd=(0.6,), seed=1)
        yield Job("shape of cbpp", _linear(binary, "(1 | site)", "binomial"), binary, plain)
    else:
        table = read_table(Path(folder) / "sleepstudy.csv")
        data = ClusteredData.from_frame(
            table, outcome="Reaction", clusters=["Subject"], features=["Days"]
        )
        yield Job("sleepstudy", _linear(data, "(1 + Days | Subject)"), data, plain)
        table = read_table(Path(folder) / "cbpp.csv").astype({"period": str})
        data = ClusteredData.from_frame(
            table, outcome="incidence", clusters=["herd"], features=["period"], trials="size"
        )
        yield Job("cbpp", _linear(data, "(1 | herd)", "binomial"), data, plain)
    if not short:
        task = Task(64, 256)
        schedule = Schedule(batch_size=256, net_learning_rate=0.005)
        yield Job("spirals", task.program(), task.data(), schedule)


def _linear(data: ClusteredData, random: str, family: str = "gaussian") -> MixedEffects:
    return MixedEffects(linear(data.n_features), random, family, bayesian_head=True)


def compare(job: Job, *, short: bool) -> Times:
    """Time the fit, Pyro's AutoNormal and NUTS one after the other, in this process.

    NUTS starts from the fit and runs in its coordinates with the network held fixed, which favours
    NUTS. Its draws count as independent if there are too few of them to estimate their effective
    number.
    """
    start = time.perf_counter()
    fitted = fit(job.model, job.data, schedule=job.schedule, progress=False)
    ours = time.perf_counter() - start
    stock = _stock(job)
    draws, warmup = (40, 10) if short or len(job.data.features) > 1000 else (1000, WARMUP)
    start = time.perf_counter()
    exact = fitted.refine("nuts", draws=draws, warmup=warmup, chains=CHAINS, progress=False)
    per_draw = (time.perf_counter() - start) / (draws + CHAINS * warmup)
    share = 1.0
    if exact.refined is not None and draws >= 1000:
        share = min(1.0, exact.refined.quality["ess"] / draws)
    return Times(ours, stock, per_draw * (CHAINS * WARMUP + fitted.importance.effective / share))


def _stock(job: Job) -> float:
    """Seconds until Pyro's SVI with AutoNormal has converged, by the stopping rule of `fit`.

    Learning rates fall once neither the loss nor the hyperparameters move.
    """
    torch.manual_seed(0)
    bound = job.model.bind(job.data)
    source, schedule = bound.encode(job.data), job.schedule
    size = schedule.batch(len(source))
    batches = Passes(lambda generator: source.batches(size, generator))
    plateau = schedule.plateau(len(source))
    rate = min(schedule.learning_rate, 0.01)  # AutoNormal is unstable at the guide's rate of 0.03
    start = time.perf_counter()
    with pyro.settings.context(module_local_params=True), pyro.validation_enabled(False):
        guide = AutoNormal(bound)
        loss = Trace_ELBO()(bound, guide)
        loss(source.batch(torch.arange(size)))
        adam = torch.optim.Adam(loss.parameters(), lr=rate, fused=True)
        effects = {factor.effect_site for factor in bound.factors}
        sites = [name for name, _ in guide.locs.named_parameters() if name not in effects]
        iterates: list[np.ndarray] = []
        for _ in range(schedule.steps // 100):
            losses = []
            for _ in range(100):
                rows = source.all() if size == len(source) else next(batches)
                value = loss(rows)
                adam.zero_grad()
                value.backward()
                torch.nn.utils.clip_grad_norm_(loss.parameters(), 10.0 * len(source))
                adam.step()
                losses.append(float(value.detach()) / len(source))
                iterates.append(_flat(guide.locs, sites))
            sds = _flat(guide.scales, sites)
            r_hat, _ = split_r_hat(np.stack(iterates[-2 * len(losses) :]) / sds)
            if plateau.training(np.array(losses), moving=r_hat >= MOVING):
                adam.param_groups[0]["lr"] *= schedule.decay
                iterates = []
            if plateau.cuts >= schedule.stages:
                break
    return time.perf_counter() - start


def _flat(module: nn.Module, sites: Sequence[str]) -> np.ndarray:
    """AutoNormal's parameters of these sites, as one vector."""
    with torch.no_grad():
        return np.concatenate([getattr(module, name).flatten().numpy() for name in sites])


def insteval(shrink: int) -> tuple[float, pd.DataFrame]:
    """Seconds to fit a design of InstEval's size, and its sds beside those of REML.

    Parameters
    ----------
    shrink : int
        Divisor of the design's rows, students and lecturers.

    Returns
    -------
    float
        Seconds.
    pandas.DataFrame
        One row per factor: truth, REML estimate, posterior median and sd.
    """
    rng = np.random.default_rng(0)
    n, students, lecturers, departments = 73_421 // shrink, 2972 // shrink, 1128 // shrink, 14
    codes = [rng.integers(0, students, n), rng.integers(0, lecturers, n)]
    codes.append(rng.integers(0, departments, lecturers)[codes[1]])
    x, sds = rng.normal(size=(n, 1)), [0.33, 0.51, 0.3, 1.18]
    y = 3.2 + 0.1 * x[:, 0] + sds[-1] * rng.normal(size=n)
    for code, sd, size in zip(codes, sds, (students, lecturers, departments), strict=False):
        y += sd * rng.normal(size=size)[code]
    names = ["student", "lecturer", "department"]
    data = ClusteredData.from_arrays(x, y, dict(zip(names, codes, strict=True)))
    model = _linear(data, " + ".join(f"(1 | {name})" for name in names))
    start = time.perf_counter()
    fitted = fit(model, data, progress=False)
    table = fitted.variance_components()
    seconds = time.perf_counter() - start
    posterior = table[table["statistic"] == "sd"].set_index("factor")[["median", "sd"]]
    reml = crossed_reml(y, x, codes)
    rows = {
        name: {"truth": truth, "reml": estimate, **posterior.loc[name].to_dict()}
        for name, truth, estimate in zip([*names, "Residual"], sds, reml, strict=True)
    }
    return seconds, pd.DataFrame(rows).T
