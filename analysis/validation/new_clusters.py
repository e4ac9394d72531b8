"""Cases of `unseen_clusters`: simulated clusters, held-out countries, spirals of unseen radius."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int

from armed_pyro import (
    ClusteredData,
    Fit,
    MixedEffects,
    Prediction,
    Schedule,
    Slopes,
    crps,
    fit,
    score_mode,
)
from armed_pyro.analysis.applications.fertility import load, split
from armed_pyro.analysis.applications.mixedlm import MixedModel
from armed_pyro.analysis.rivals.rival import outcomes
from armed_pyro.data.simulate import spirals
from armed_pyro.models.dense import dense
from armed_pyro.models.linear import linear

__all__ = [
    "FAMILIES",
    "KS",
    "YEARS",
    "Countries",
    "Simulation",
    "coverage_rows",
    "learning_rows",
    "spiral_rows",
]

PROB = 0.9
FAMILIES = ("gaussian", "bernoulli", "poisson")
# Labelled rows of each new cluster of a simulation, and first years known of each country.
KS = (0, 1, 2, 5, 10, 20, 50)
YEARS = (0, 1, 3, 5, 10)
REFIT_ROWS, TEST_ROWS = 20, 10
SHOWN = ("Brazil", "China", "Sweden", "Nigeria", "Korea, Rep.", "Mexico", "India", "Rwanda",
         "Poland", "Kenya", "Bangladesh", "Egypt, Arab Rep.")  # fmt: skip
# Standard deviations of the random intercept and of the slope on the first feature.
SDS: Mapping[str, tuple[float, float]] = {
    "gaussian": (1.0, 0.5),
    "bernoulli": (1.0, 0.5),
    "poisson": (0.6, 0.3),
}


@dataclass(frozen=True)
class Simulation:
    r"""Seen and unseen clusters of one population, with known expected outcomes.

    .. math:: \eta_i = f(x_i) + u_{0k} + u_{1k} x_{i1}, \quad x_i \sim N(0, I_2)

    Attributes
    ----------
    family : str
    network : bool
        Whether f is sin(2 x1) + x2^2 / 2, to be learned by a network, or x1 / 2 + x2 / 2.
    seen, unseen, rows : int
        Number of seen and of unseen clusters, and rows of each seen cluster. Unseen clusters have
        50 rows to learn from and 10 to predict.
    seed : int
        Seed of the data and of the fit.
    steps : int
        Limit of the training steps.
    """

    family: str
    network: bool
    seed: int
    seen: int = 50
    unseen: int = 300
    rows: int = 30
    steps: int = 1000

    @property
    def name(self) -> str:
        """Name of the case in tables."""
        return f"{self.family}, {'network' if self.network else 'linear'}"

    def data(self) -> tuple[ClusteredData, ClusteredData, Float[np.ndarray, " rows"]]:
        """Rows of seen clusters, rows of unseen clusters, and expected outcomes of the latter."""
        rows, expected, new = self._rows()
        return rows.take(~new), rows.take(new), expected[new]

    def refit_data(self) -> ClusteredData:
        """Rows of seen clusters, and the first 20 rows of each unseen cluster."""
        rows, _, new = self._rows()
        first = np.flatnonzero(new)[_within(int(new.sum())) < REFIT_ROWS]
        return rows.take(np.concatenate([np.flatnonzero(~new), first]))

    def _rows(self) -> tuple[ClusteredData, Float[np.ndarray, " rows"], Bool[np.ndarray, " rows"]]:
        """All rows, their expected outcomes, and whether their clusters are unseen."""
        rng = np.random.default_rng([self.seed, FAMILIES.index(self.family), self.network])
        sizes = [self.rows] * self.seen + [KS[-1] + TEST_ROWS] * self.unseen
        site = np.repeat(np.arange(len(sizes)), sizes)
        x = rng.normal(size=(len(site), 2))
        u = rng.normal(size=(len(sizes), 2)) * SDS[self.family]
        f = np.sin(2 * x[:, 0]) + 0.5 * x[:, 1] ** 2 if self.network else 0.5 * x.sum(1)
        f = f * (0.6 if self.family == "poisson" else 1.0)
        eta = f + u[site, 0] + u[site, 1] * x[:, 0]
        mean = {"gaussian": eta, "bernoulli": 1 / (1 + np.exp(-eta)), "poisson": np.exp(eta)}
        mu = mean[self.family]
        y = {
            "gaussian": lambda: rng.normal(mu),
            "bernoulli": lambda: rng.binomial(1, mu).astype(float),
            "poisson": lambda: rng.poisson(mu).astype(float),
        }[self.family]()
        rows = ClusteredData.from_arrays(x, y, {"site": site}, outcome_name="y")
        return rows, mu, site >= self.seen

    def fit(self, data: ClusteredData, seed: int) -> Fit:
        """The program fitted to these rows."""
        torch.manual_seed(seed)
        # The last layer is latent, because intervals need the uncertainty of the network too.
        net = dense(2, hidden=(16,)) if self.network else linear(2)
        model = MixedEffects(net, "(1 + x0 | site)", self.family, bayesian_head=True)
        schedule = Schedule(steps=self.steps)
        return fit(model, data, schedule=schedule, seed=seed, progress=False)


def coverage_rows(case: Simulation, draws: int = 1000) -> Iterator[dict[str, Any]]:
    """Coverage of expected outcomes and of outcomes in unseen clusters, by mode."""
    train, new, mu = case.data()
    result = case.fit(train, case.seed)
    test, truth, _ = _last_rows(new, mu)
    for mode in ("population", "marginal"):
        made = result.predict(test, unseen=mode, draws=draws, prob=PROB)
        yield {"part": "1 coverage", "case": case.name, "mode": mode, "k": 0, "seed": case.seed,
               **scores(made, test, truth)}  # fmt: skip


def learning_rows(case: Simulation, draws: int = 1000) -> Iterator[dict[str, Any]]:
    """Error and coverage after k labelled rows of each unseen cluster, and after a refit at k = 20.

    `seconds` is the time to adapt to all unseen clusters, `seconds_one` the time to adapt to the
    first of them.
    """
    train, new, mu = case.data()
    result = case.fit(train, case.seed)
    test, truth, within = _last_rows(new, mu)
    common: dict[str, Any] = {"part": "2 learning", "case": case.name, "seed": case.seed}
    marginal = result.predict(test, unseen="marginal", draws=draws, prob=PROB)
    for k in KS:
        support = new.take(within < k)
        first = support.grouping("site").codes.numpy() == 0 if k else np.zeros(0, bool)
        seconds_one = _seconds(lambda: result.adapt(support.take(first), draws=draws))  # noqa: B023
        start = time.perf_counter()
        adapted = result.adapt(support, draws=draws)
        seconds = time.perf_counter() - start
        made = adapted.predict(test, prob=PROB)
        row = {"mode": "adapt", "k": k, "seconds": seconds, "seconds_one": seconds_one}
        if k == 0:
            row["equal"] = bool(np.array_equal(made.expected, marginal.expected))
        yield common | row | {"ess": adapted.quality["ess"]} | scores(made, test, truth)
    start = time.perf_counter()
    refit = case.fit(case.refit_data(), case.seed)
    seconds = time.perf_counter() - start
    made = refit.predict(test, draws=draws, prob=PROB)
    row = {"mode": "refit", "k": REFIT_ROWS, "seconds": seconds}
    yield common | row | scores(made, test, truth)


def scores(
    made: Prediction, test: ClusteredData, truth: Float[np.ndarray, " rows"]
) -> dict[str, float]:
    """Error of the mean, and coverage of expected outcomes and of outcomes with standard errors.

    An outcome counts as covered if its randomised probability integral transform is, because
    intervals of discrete outcomes hold more than they claim. Standard errors are over clusters.
    """
    y, site = outcomes(test), test.grouping("site").codes.numpy()
    lower, upper = made.interval(PROB)
    uniform = np.random.default_rng(0).random(len(y))
    pit = (made.outcome < y).mean(0) + uniform * (made.outcome == y).mean(0)
    of_mean = _by_cluster((lower <= truth) & (truth <= upper), site)
    of_outcome = _by_cluster(np.abs(pit - 0.5) <= PROB / 2, site)
    error = _by_cluster((made.mean - truth) ** 2, site)
    return {
        "rmse": float(np.sqrt(error.mean())),
        "coverage_mean": float(of_mean.mean()),
        "coverage_mean_se": float(of_mean.std(ddof=1) / np.sqrt(len(of_mean))),
        "coverage": float(of_outcome.mean()),
        "coverage_se": float(of_outcome.std(ddof=1) / np.sqrt(len(of_outcome))),
    }


def _by_cluster(
    values: Float[np.ndarray, " rows"], site: Int[np.ndarray, " rows"]
) -> Float[np.ndarray, " clusters"]:
    return np.bincount(site, values) / np.bincount(site)


def _last_rows(
    new: ClusteredData, mu: Float[np.ndarray, " rows"]
) -> tuple[ClusteredData, Float[np.ndarray, " rows"], Int[np.ndarray, " rows"]]:
    """The last ten rows of each cluster, their expected outcomes, and positions in the clusters."""
    within = _within(new.n_rows)
    last = within >= KS[-1]
    return new.take(last), mu[last], within


def _within(n_rows: int) -> Int[np.ndarray, " rows"]:
    """Position of each row of the unseen clusters within its cluster."""
    return np.arange(n_rows) % (KS[-1] + TEST_ROWS)


def _seconds(call: Any) -> float:
    """The shortest of three runs, because the first fills caches that later runs reuse."""
    took = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):
            start = time.perf_counter()
            call()
            took.append(time.perf_counter() - start)
    return min(took)


class Countries:
    """The fertility panel with a fifth of its countries held out, and two models of the others.

    Parameters
    ----------
    seed : int
        Seed of the split and the fit.
    steps : int
        Limit of the training steps.
    every : int
        Only every n-th country is used, for a trial run.
    """

    def __init__(self, seed: int, steps: int, every: int = 1) -> None:
        table = load()
        names = sorted(table["country"].unique())[::every]
        parts = split(table[table["country"].isin(names)], seed)
        self.train = pd.concat([parts.train, parts.later])
        # Countries that have ten years to forecast after the first ten.
        held = parts.unseen.assign(place=parts.unseen.groupby("country").cumcount())
        sizes = held.groupby("country")["place"].transform("max")
        self.held = held[sizes >= YEARS[-1] + 10]
        self.test = self.held[self.held["place"] >= YEARS[-1]]
        data = ClusteredData.from_frame(
            self.train, outcome="fertility", clusters=["country"], features=["decade"]
        )
        model = MixedEffects(linear(1), "(1 + decade | country)", bayesian_head=True)
        schedule = Schedule(steps=steps, batch_size=len(self.train))
        self.fit: Fit = fit(model, data, schedule=schedule, seed=seed, progress=False)
        self.classical = MixedModel(
            self.train, "fertility", "country", "decade", "decade", prob=PROB
        )

    def rows(self, draws: int) -> Iterator[dict[str, Any]]:
        """Scores of each mode and of MixedLM on the years after the tenth, by years known."""
        base: dict[str, Any] = {"part": "3 fertility", "case": "years 11 on"}
        for mode in ("population", "marginal", "membership", "nearest"):
            yield base | {"mode": mode, "k": 0} | self._scored(mode, None, draws)
        for k in YEARS:
            support = self.held[self.held["place"] < k]
            if k:
                yield base | {"mode": "adapt", "k": k} | self._scored("adapt", support, draws)
            made = self.classical.forecast(self.test, "marginal", support).loc[self.test.index]
            y = made["fertility"].to_numpy()
            half = (made["upper"] - made["lower"]).to_numpy() / 2
            # Quantiles of the normal predictive distribution, one for each draw of the other modes.
            z = torch.special.ndtri((torch.arange(draws).double() + 0.5) / draws).numpy()
            normal = made["mean"].to_numpy() + z[:, None] * half / self.classical.quantile
            yield base | {
                "mode": "MixedLM",
                "k": k,
                "rmse": float(np.sqrt(((y - made["mean"]) ** 2).mean())),
                "coverage": float(((made["lower"] <= y) & (y <= made["upper"])).mean()),
                "crps": float(crps(normal, y).mean()),
            }

    def _scored(self, mode: str, support: pd.DataFrame | None, draws: int) -> dict[str, float]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scored = score_mode(self.fit, self.test, mode, support=support, draws=draws, prob=PROB)
        names = ("rmse", "coverage", "mean_coverage", "crps", "log_score", "elpd")
        return {name: scored.summary[name] for name in names}

    def curves(self, k: int, draws: int) -> pd.DataFrame:
        """Predictions of all years for six held-out countries, given their first k years."""
        full = set(self.held["country"])
        names = [name for name in (*SHOWN, *sorted(full)) if name in full]
        chosen = list(dict.fromkeys(names))[:6]
        rows = self.held[self.held["country"].isin(chosen)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = self.fit.adapt(rows[rows["place"] < k], draws=draws)
        made = adapted.predict(rows, prob=PROB)
        lower, upper = made.interval(of="outcome")
        population = self.fit.predict(rows, unseen="population", draws=draws)
        return rows.assign(
            mean=made.mean,
            lower=lower,
            upper=upper,
            population=population.mean,
            held_out=rows["place"] >= k,
            unseen=True,
        )


def spiral_rows(
    seed: int, *, seen: int = 10, unseen: int = 20, rows: int = 400, steps: int = 1500
) -> Iterator[dict[str, Any]]:
    """Accuracy in unseen clusters of a network with random effects, by mode, and of one without.

    Yields
    ------
    dict
        One per mode and unseen cluster; "conventional" is the network without random effects.
    """
    data, truth = spirals(seen + unseen, rows, seed=seed)
    train, test = data.hold_out_clusters("site", labels=list(range(seen, seen + unseen)))
    base: dict[str, Any] = {"part": "4 spirals", "case": f"{seen} seen, {unseen} unseen"}
    for random in (False, True):
        torch.manual_seed(seed)
        net = torch.nn.Sequential(
            torch.nn.Linear(2, 32), torch.nn.ELU(), torch.nn.Linear(32, 32), torch.nn.ELU(),
            torch.nn.Linear(32, 1),
        )  # fmt: skip
        terms: list[str | Slopes] = ["(1 | site)", Slopes("site", on="3")]
        model = MixedEffects(net, terms if random else (), "bernoulli")
        schedule = Schedule(steps=steps, batch_size=256, stages=1, net_learning_rate=0.005)
        result = fit(model, train, schedule=schedule, seed=seed, refine=False, progress=False)
        for mode in _spiral_modes(random):
            pooled, unseen_mode = mode != "membership by row", mode.removesuffix(" by row")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made = result.predict(
                    replace(test, outcome=None),
                    unseen=unseen_mode if random else None,
                    pooled=pooled,
                    draws=200,
                )
            right = ((made.mean > 0.5) == outcomes(test)).reshape(unseen, rows).mean(1)
            for cluster, share in enumerate(right):
                name = mode if random else "conventional"
                radius = float(truth.radius[seen + cluster])
                yield base | {"mode": name, "seed": seed, "radius": radius, "accuracy": share}


def _spiral_modes(random: bool) -> tuple[str, ...]:
    if not random:
        return ("conventional",)
    return ("population", "marginal", "membership", "membership by row", "nearest")
