"""Simulated clusters never seen in training: coverage of the modes, and learning from k rows."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from armed_pyro import ClusteredData, Fit, MixedEffects, Schedule, fit
from armed_pyro.models.dense import dense
from armed_pyro.models.linear import linear
from armed_pyro.prediction.adapt import joined
from armed_pyro.prediction.result import Prediction

__all__ = ["FAMILIES", "KS", "Simulation", "coverage_rows", "learning_rows"]

FAMILIES = ("gaussian", "bernoulli", "poisson")
KS = (0, 1, 2, 5, 10, 20, 50)
PROB = 0.9
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
        Clusters, and rows of a seen one; unseen ones have 50 to learn from and 10 to predict.
    seed : int
    steps : int
        Most training steps.
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
        """Of the case, in tables."""
        return f"{self.family}, {'network' if self.network else 'linear'}"

    def data(self) -> tuple[ClusteredData, ClusteredData, Float[np.ndarray, " rows"]]:
        """Rows of seen clusters, of unseen ones, and the latter's expected outcomes."""
        rng = np.random.default_rng([self.seed, FAMILIES.index(self.family), self.network])
        sizes = [self.rows] * self.seen + [KS[-1] + 10] * self.unseen
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
        everything = ClusteredData.from_arrays(x, y, {"site": site}, outcome_name="y")
        new = site >= self.seen
        return everything.take(~new), everything.take(new), mu[new]

    def fit(self, data: ClusteredData, seed: int) -> Fit:
        """The program fitted to these rows."""
        torch.manual_seed(seed)
        # A network's last layer is latent too, or its uncertainty would be missing.
        net = dense(2, hidden=(16,)) if self.network else linear(2)
        model = MixedEffects(net, "(1 + x0 | site)", self.family, bayesian_head=True)
        schedule = Schedule(steps=self.steps)
        return fit(model, data, schedule=schedule, seed=seed, progress=False)


def coverage_rows(case: Simulation, draws: int = 1000) -> Iterator[dict[str, Any]]:
    """Coverage of expected outcomes and outcomes of unseen clusters, by mode."""
    train, new, mu = case.data()
    result = case.fit(train, case.seed)
    test, truth, _ = _last_rows(new, mu)
    for mode in ("population", "marginal"):
        made = result.predict(test, unseen=mode, draws=draws, prob=PROB)
        yield {"part": "1 coverage", "case": case.name, "mode": mode, "k": 0, "seed": case.seed,
               **scores(made, test, truth)}  # fmt: skip


def learning_rows(case: Simulation, draws: int = 1000) -> Iterator[dict[str, Any]]:
    """Error and coverage after k labelled rows of every unseen cluster, and of a refit at k = 20.

    Seconds are those of adapting to all unseen clusters, and, as seconds_one, to one of them.
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
    support = new.take(within < 20)
    start = time.perf_counter()
    refit = case.fit(joined(result.posterior, train, support), case.seed)
    seconds = time.perf_counter() - start
    made = refit.predict(test, draws=draws, prob=PROB)
    yield common | {"mode": "refit", "k": 20, "seconds": seconds} | scores(made, test, truth)


def scores(
    made: Prediction, test: ClusteredData, truth: Float[np.ndarray, " rows"]
) -> dict[str, float]:
    """Error of the mean; coverage of expected outcomes and of outcomes, with standard errors.

    Outcomes are covered if their randomised probability integral transform is: intervals of
    discrete outcomes would hold more than they say. Standard errors are over clusters.
    """
    if test.outcome is None:
        raise ValueError("the rows have no outcome to compare predictions with")
    y, site = test.outcome.numpy(), test.grouping("site").codes.numpy()
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
    """The last ten rows of each cluster, their expected outcomes, and each row's place."""
    within = np.arange(new.n_rows) % (KS[-1] + 10)
    last = within >= KS[-1]
    return new.take(last), mu[last], within


def _seconds(call: Any) -> float:
    """The least of three runs: the first prepares what later ones reuse."""
    took = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):
            start = time.perf_counter()
            call()
            took.append(time.perf_counter() - start)
    return min(took)
