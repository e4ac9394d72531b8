"""Replications of designs with known truth: bias and coverage of the variance components."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from joblib import Parallel, delayed
from rich.progress import track
from scipy.special import expit

from armed_pyro import ClusteredData, Fit, MixedEffects, Schedule, fit
from armed_pyro.families.simulate import mixed_model
from armed_pyro.models.dense import dense
from armed_pyro.models.linear import linear

__all__ = ["BAD", "DESIGNS", "Design", "replications", "summary", "verdicts"]

PROB = 0.9
# Small networks are fitted hundreds of times to a few thousand rows, for which this is enough.
QUICK = Schedule(window=40, net_learning_rate=0.01)
# Bias is that of the posterior median. With few clusters, the posterior of an sd is skewed and its
# mean rightly lies above the truth.
COLUMNS = ["design", "seed", "parameter", "truth", "mean", "median", "sd", "lower", "upper"]


@dataclass(frozen=True)
class Design:
    """A simulated design.

    Attributes
    ----------
    family : str
        gaussian, bernoulli or poisson.
    clusters, rows : int
        Number of clusters, and of rows in each.
    sd : tuple of float
        Standard deviation of the random intercept, and of the slope on x0 if there is one.
    network : bool
        Whether the fixed effects are nonlinear, and fitted by a network.
    """

    family: str
    clusters: int
    rows: int
    sd: tuple[float, ...] = (1.0,)
    network: bool = False

    @property
    def name(self) -> str:
        """The design in words."""
        effects = "intercept" if len(self.sd) == 1 else "intercept + slope"
        kind = "network" if self.network else "linear"
        variance = f"sd {self.sd[0]:.3g}"
        return f"{self.family} {self.clusters}x{self.rows} {kind}, {effects}, {variance}"

    def simulate(self, seed: int) -> tuple[ClusteredData, dict[str, float]]:
        """A data set, and the truth by parameter."""
        truth = {f"sd[{term}]": sd for term, sd in zip(["Intercept", "x0"], self.sd, strict=False)}
        if len(self.sd) > 1:
            truth["cor[Intercept,x0]"] = 0.3
        if self.family == "gaussian":
            truth["sd[Residual]"] = 1.0
        if self.network:
            return self._nonlinear(seed), truth
        data, _ = mixed_model(
            self.family,
            self.clusters,
            self.rows,
            sd=self.sd,
            cor=0.3 if len(self.sd) > 1 else 0.0,
            coefficients=(-0.2, 0.7),
            seed=seed,
        )
        return data, truth | {"fixed[x0]": 0.7}

    def _nonlinear(self, seed: int) -> ClusteredData:
        rng = np.random.default_rng(seed)
        site = np.repeat(np.arange(self.clusters), self.rows)
        x = rng.uniform(-2, 2, size=(len(site), 2))
        effects = self.sd[0] * rng.normal(size=self.clusters)
        eta = np.sin(2 * x[:, 0]) + 0.5 * x[:, 1] ** 2 - 0.7 + effects[site]
        if self.family == "gaussian":
            y = eta + rng.normal(size=len(site))
        elif self.family == "bernoulli":
            y = (rng.random(len(site)) < expit(eta)).astype(float)
        else:
            y = rng.poisson(np.exp(eta)).astype(float)
        return ClusteredData.from_arrays(x, y, {"site": site}, feature_names=["x0", "x1"])

    def fit(self, data: ClusteredData, seed: int) -> Fit:
        """The fit that a user of this design would make."""
        random = "(1 | site)" if len(self.sd) == 1 else "(1 + x0 | site)"
        if not self.network:
            model = MixedEffects(linear(1), random, self.family, bayesian_head=True)
            return fit(model, data, seed=seed, progress=False)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            net = dense(2, hidden=(12, 12))
        model = MixedEffects(net, random, self.family, bayesian_head=True)
        train, validation = data.split_rows(0.2, seed=seed)
        return fit(model, train, validation=validation, schedule=QUICK, seed=seed, progress=False)


# 20 to 10,000 clusters of 2 to 50 rows. In the last design the true variance is 10, and LMMNN, lme4
# and MC-GMENN give 5.4, 5.8 and 6.2.
DESIGNS = (
    Design("gaussian", 20, 50),
    Design("gaussian", 100, 5, (1.0, 0.5)),
    Design("gaussian", 10_000, 2),
    Design("bernoulli", 20, 50),
    Design("bernoulli", 200, 10),
    Design("poisson", 20, 20),
    Design("poisson", 200, 5, (0.8, 0.4)),
    Design("poisson", 2_000, 4, (0.7,)),
    Design("gaussian", 100, 10, network=True),
    Design("bernoulli", 200, 15, network=True),
    Design("poisson", 100, 10, (0.7,), network=True),
    Design("bernoulli", 10_000, 10, (10**0.5,)),
)


def replications(design: Design, folder: Path, n: int, *, workers: int = 1) -> pd.DataFrame:
    """Estimates from n simulated data sets, one row per data set and parameter.

    Parameters
    ----------
    design : Design
        The design to simulate.
    folder : path
        Folder for the estimates of each data set. Those that it already holds are not computed
        again, so a run that was killed continues.
    n : int
        Number of data sets.
    workers : int
        Number of processes.
    """
    path = folder / f"{design.name.replace(' ', '_').replace(',', '')}.csv"
    done = set(pd.read_csv(path)["seed"]) if path.exists() else set()
    seeds = [seed for seed in range(n) if seed not in done]
    jobs = Parallel(n_jobs=workers, return_as="generator_unordered")(
        delayed(_estimate)(design, seed) for seed in seeds
    )
    for table in track(jobs, total=len(seeds), description=design.name, disable=not seeds):
        table.to_csv(path, mode="a", header=not path.exists(), index=False)
    whole = pd.read_csv(path)
    return whole[whole["seed"] < n]


def _estimate(design: Design, seed: int) -> pd.DataFrame:
    torch.set_num_threads(1)
    data, truth = design.simulate(seed)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = design.fit(data, seed)
        seconds = time.perf_counter() - start
        estimates = dict(_parameters(fitted))
        diagnostics = fitted.diagnostics()
    rows = [
        {"design": design.name, "seed": seed, "parameter": name, "truth": truth[name], **values}
        for name, values in estimates.items()
        if name in truth
    ]
    return pd.DataFrame(rows)[COLUMNS].assign(
        seconds=seconds,
        computation=diagnostics.computation.word,
        model=diagnostics.model.word,
        k_hat=diagnostics.figures.get("k_hat"),
        reasons="; ".join(diagnostics.reasons),
    )


def _parameters(fitted: Fit) -> Iterator[tuple[str, dict[str, float]]]:
    keep = ["mean", "median", "sd", "lower", "upper"]
    table = fitted.variance_components(prob=PROB)
    for row in table[table["statistic"].isin(["sd", "cor"])].to_dict("records"):
        label = row["term"] if row["factor"] != "Residual" else "Residual"
        yield f"{row['statistic']}[{label}]", {name: row[name] for name in keep}
    for row in fitted.fixed_effects(prob=PROB).to_dict("records"):
        yield f"fixed[{row['term']}]", {name: row[name] for name in keep}


def summary(estimates: pd.DataFrame) -> pd.DataFrame:
    """Relative bias and coverage by design and parameter, each with its standard error.

    Parameters
    ----------
    estimates : pandas.DataFrame
        Table that `replications` gives, for one design or several.
    """
    records = []
    for (design, parameter), part in estimates.groupby(["design", "parameter"], sort=False):
        truth, n = part["truth"].iloc[0], len(part)
        inside = (part["lower"] <= part["truth"]) & (part["truth"] <= part["upper"])
        records.append(
            {
                "design": design,
                "parameter": parameter,
                "replications": n,
                "truth": truth,
                "bias": part["median"].mean() / truth - 1,
                "bias_se": part["median"].std() / abs(truth) / n**0.5,
                "bias_of_mean": part["mean"].mean() / truth - 1,
                "coverage": inside.mean(),
                "coverage_se": (inside.mean() * (1 - inside.mean()) / n) ** 0.5,
                "k_hat": part["k_hat"].median(),
                "passed": (part[["computation", "model"]] == "pass").all(axis=1).mean(),
                "seconds": part["seconds"].median(),
            }
        )
    return pd.DataFrame(records)


# --- fits that cannot be trusted -----------------------------------------------------------------


def _bimodal(rng: np.random.Generator, clusters: int) -> Any:
    return rng.choice([-2.0, 2.0], clusters) + 0.3 * rng.normal(size=clusters)


@dataclass(frozen=True)
class Bad:
    """A case in which a fit must not pass: its defect, its data and its settings."""

    name: str
    family: str
    clusters: int
    rows: int
    steps: int = 20_000

    def fit(self, seed: int) -> Fit:
        """The fit to data with this seed."""
        rng = np.random.default_rng(seed)
        site = np.repeat(np.arange(self.clusters), self.rows)
        x = rng.normal(size=(len(site), 1))
        effects = rng.normal(size=self.clusters)
        if self.name == "bimodal random effects":
            effects = _bimodal(rng, self.clusters)
        eta = 0.3 + 0.7 * x[:, 0] + effects[site]
        y = eta + rng.normal(size=len(site))
        if self.name == "complete separation":
            y = (x[:, 0] > 0).astype(float)
        elif self.name == "overdispersed counts":
            y = rng.poisson(np.exp(eta + rng.normal(size=len(site)))).astype(float)
        elif self.name == "counts as gaussian":
            y = rng.poisson(np.exp(eta)).astype(float)
        data = ClusteredData.from_arrays(x, y, {"site": site})
        model = MixedEffects(linear(1), "(1 | site)", self.family, bayesian_head=True)
        return fit(model, data, schedule=Schedule(steps=self.steps), seed=seed, progress=False)


BAD = (
    Bad("far too few steps", "gaussian", 20, 10, steps=5),
    Bad("two clusters", "gaussian", 2, 30),
    Bad("complete separation", "bernoulli", 20, 10),
    Bad("overdispersed counts", "poisson", 40, 10),
    Bad("counts as gaussian", "gaussian", 40, 10),
    Bad("bimodal random effects", "gaussian", 40, 10),
)


def verdicts(cases: Sequence[Bad], n: int) -> pd.DataFrame:
    """Verdicts and first reason for each case, n times."""
    records = []
    for case in track(cases, description="bad cases"):
        for seed in range(n):
            diagnostics = case.fit(seed).diagnostics()
            reason = diagnostics.reasons[0] if diagnostics.reasons else ""
            words = [diagnostics.computation.word, diagnostics.model.word]
            records.append([case.name, seed, *words, reason])
    return pd.DataFrame(records, columns=["case", "seed", "computation", "model", "reason"])
