"""Held-out countries forecast from their first years, and spirals of unseen radius, by mode."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from armed_pyro import ClusteredData, Fit, MixedEffects, Schedule, Slopes, fit, score_mode
from armed_pyro.analysis.classical import MixedModel
from armed_pyro.analysis.fertility import load, split
from armed_pyro.data.simulate import spirals
from armed_pyro.models.linear import linear
from armed_pyro.prediction.scores import crps

__all__ = ["YEARS", "Countries", "spiral_rows"]

YEARS = (0, 1, 3, 5, 10)
PROB = 0.9
SHOWN = ("Brazil", "China", "Sweden", "Nigeria", "Korea, Rep.", "Mexico", "India", "Rwanda",
         "Poland", "Kenya", "Bangladesh", "Egypt, Arab Rep.")  # fmt: skip


class Countries:
    """The fertility panel with a fifth of its countries held out, and two models of the others.

    Parameters
    ----------
    seed : int
        Of the split and the fit.
    steps : int
        Most training steps.
    every : int
        Only every so many countries, for a trial.
    """

    def __init__(self, seed: int, steps: int, every: int = 1) -> None:
        table = load()
        names = sorted(table["country"].unique())[::every]
        parts = split(table[table["country"].isin(names)], seed)
        self.train = pd.concat([parts.train, parts.later])
        # Countries of which there are years to forecast after the first ten.
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
        """Scores of every mode and of MixedLM, by years known, on the years after the tenth."""
        base: dict[str, Any] = {"part": "3 fertility", "case": "years 11 on"}
        for mode in ("population", "marginal", "membership", "nearest"):
            yield base | {"mode": mode, "k": 0} | self._scored(mode, None, draws)
        for k in YEARS:
            support = self.held[self.held["place"] < k]
            if k:
                yield base | {"mode": "adapt", "k": k} | self._scored("adapt", support, draws)
            known = copy.copy(self.classical)
            known.train = pd.concat([self.train, support])
            made = known.forecast(self.test, "marginal").loc[self.test.index]
            y = made["fertility"].to_numpy()
            half = (made["upper"] - made["lower"]).to_numpy() / 2
            # Normal predictive distributions: as many quantiles as there are draws.
            z = torch.special.ndtri((torch.arange(draws).double() + 0.5) / draws).numpy()
            normal = made["mean"].to_numpy() + z[:, None] * half / known.quantile
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
            found = score_mode(self.fit, self.test, mode, support=support, draws=draws, prob=PROB)
        names = ("rmse", "coverage", "mean_coverage", "crps", "log_score", "elpd")
        return {name: found.summary[name] for name in names}

    def curves(self, k: int, draws: int) -> pd.DataFrame:
        """Predictions of all years for six held-out countries, from their first k."""
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
        One a mode and unseen cluster; "conventional" is the same network without random effects.
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
            y = test.outcome.numpy() if test.outcome is not None else np.zeros(0)
            right = ((made.mean > 0.5) == y).reshape(unseen, rows).mean(1)
            for cluster, share in enumerate(right):
                name = mode if random else "conventional"
                radius = float(truth.radius[seen + cluster])
                yield base | {"mode": name, "seed": seed, "radius": radius, "accuracy": share}


def _spiral_modes(random: bool) -> tuple[str, ...]:
    if not random:
        return ("conventional",)
    return ("population", "marginal", "membership", "membership by row", "nearest")
