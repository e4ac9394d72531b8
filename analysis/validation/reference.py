"""Posteriors of well-known data sets, beside NUTS on the same program and lme4's estimates."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from joblib import Parallel, delayed

from armed_pyro import ClusteredData, Fit, MixedEffects, fit, read_table
from armed_pyro.models.linear import linear

__all__ = ["REFERENCES", "Comparison", "Reference", "agreement", "compare", "compare_all"]

DRAWS = 4000


@dataclass(frozen=True)
class Reference:
    """A data set, its model, and the estimates of lme4 1.1-31 (REML; Laplace for binomial).

    Attributes
    ----------
    estimates : mapping of (str, str, str) to float
        lme4's estimates by factor, term and statistic (sd, cor).
    """

    name: str
    file: str
    outcome: str
    random: str
    clusters: tuple[str, ...]
    features: tuple[str, ...]
    estimates: Mapping[tuple[str, str, str], float]
    family: str = "gaussian"
    trials: str | None = None
    categorical: tuple[str, ...] = ()

    def fit(self, folder: Path, seed: int = 0) -> Fit:
        """The fit, with default settings and priors."""
        table = read_table(folder / self.file)
        for name in self.categorical:
            table[name] = table[name].astype(str)
        data = ClusteredData.from_frame(
            table,
            outcome=self.outcome,
            clusters=list(self.clusters),
            features=list(self.features),
            trials=self.trials,
        )
        model = MixedEffects(linear(data.n_features), self.random, self.family, bayesian_head=True)
        return fit(model, data, seed=seed, progress=False)


REFERENCES = (
    Reference(
        "sleepstudy",
        "sleepstudy.csv",
        "Reaction",
        "(1 + Days | Subject)",
        ("Subject",),
        ("Days",),
        {
            ("Subject", "Intercept", "sd"): 24.741,
            ("Subject", "Days", "sd"): 5.922,
            ("Subject", "Intercept,Days", "cor"): 0.066,
            ("Residual", "", "sd"): 25.592,
        },
    ),
    Reference(
        "Penicillin",
        "penicillin.csv",
        "diameter",
        "(1 | plate) + (1 | sample)",
        ("plate", "sample"),
        (),
        {
            ("plate", "Intercept", "sd"): 0.8467,
            ("sample", "Intercept", "sd"): 1.9316,
            ("Residual", "", "sd"): 0.5499,
        },
    ),
    Reference(
        "cbpp",
        "cbpp.csv",
        "incidence",
        "(1 | herd)",
        ("herd",),
        ("period",),
        {("herd", "Intercept", "sd"): 0.642},
        family="binomial",
        trials="size",
        categorical=("period",),
    ),
)


@dataclass(frozen=True, eq=False)
class Comparison:
    """A reference's quantities by the fit and by NUTS, their agreement, and the time of both.

    Attributes
    ----------
    table : pandas.DataFrame
        One row per quantity: mean, sd and median by the fit, by its guide alone and by NUTS; lme4's
        estimate; z (difference of the means in posterior sds of NUTS) and ratio of the sds.
    summary : dict of str to float or str
        Worst z and ratio, those of the random effects, k-hat, both verdicts, R-hat and ESS of NUTS,
        and the seconds of both. Those of NUTS are also scaled to the fit's Monte Carlo error.
    """

    table: pd.DataFrame
    summary: dict[str, object]


def compare(reference: Reference, folder: Path, *, draws: int, warmup: int) -> Comparison:
    """The fit beside four chains of NUTS with `draws` draws in total."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = time.perf_counter()
        fitted = reference.fit(folder)
        seconds = time.perf_counter() - start
        start = time.perf_counter()
        exact = fitted.refine("nuts", draws=draws, warmup=warmup, progress=False)
        nuts_seconds = time.perf_counter() - start
    if exact.refined is None:
        raise RuntimeError("NUTS left no draws")
    quality, size = exact.refined.quality, len(exact.refined)
    table, by_nuts = _quantities(fitted, DRAWS), _quantities(exact, size)
    by_guide = _quantities(
        replace(fitted, posterior=replace(fitted.posterior, refined=None)), DRAWS
    )
    table = table.join(by_guide, rsuffix="_guide").join(by_nuts, rsuffix="_nuts")
    table["z"] = (table["mean"] - table["mean_nuts"]) / table["sd_nuts"]
    table["ratio"] = table["sd"] / table["sd_nuts"]
    keys = [reference.estimates.get(key, np.nan) for key in table.index]
    table.insert(0, "lme4", keys)
    effects = agreement(fitted, exact)
    worst = table.loc[table.index.get_level_values("statistic") != "fixed"]
    # The warm-up of NUTS is paid once; its draws are scaled to the fit's effective sample size.
    per_draw = nuts_seconds / (draws + 4 * warmup)
    wanted = fitted.importance.effective
    same_error = per_draw * (4 * warmup + draws * wanted / quality["ess"])
    summary = {
        "data": reference.name,
        "max_z": float(worst["z"].abs().max()),
        "sd_ratio_low": float(worst["ratio"].min()),
        "sd_ratio_high": float(worst["ratio"].max()),
        **effects,
        "k_hat": fitted.importance.k_hat,
        "computation": fitted.diagnostics().computation.word,
        "model": fitted.diagnostics().model.word,
        "nuts_r_hat": quality["r_hat"],
        "nuts_ess": quality["ess"],
        "seconds": seconds,
        "nuts_seconds": nuts_seconds,
        "nuts_seconds_same_error": same_error,
        "time_ratio": seconds / same_error,
    }
    table.insert(0, "data", reference.name)
    return Comparison(table.reset_index(), summary)


def _quantities(fitted: Fit, draws: int) -> pd.DataFrame:
    """Mean, median and sd of sds, correlations and fixed effects by factor, term and statistic."""
    components = fitted.variance_components(draws=draws)
    components = components[components["statistic"].isin(["sd", "cor"])]
    fixed = fitted.fixed_effects(draws=draws).assign(factor="Fixed", statistic="fixed")
    whole = pd.concat([components, fixed]).set_index(["factor", "term", "statistic"])
    return whole[["mean", "median", "sd"]]


def agreement(fitted: Fit, exact: Fit) -> dict[str, float]:
    """Root mean square z of the random effects, and the range of their sds' ratios.

    Parameters
    ----------
    fitted, exact : Fit
        The fit, and the same fit with draws that count as the truth.
    """
    z, ratios = [], []
    size = DRAWS if exact.refined is None else len(exact.refined)
    drawn, truth = fitted.draws(DRAWS), exact.draws(size)
    for factor in fitted.model.factors:
        effects, exactly = drawn[factor.effect_site], truth[factor.effect_site]
        z.append(((effects.mean(0) - exactly.mean(0)) / exactly.std(0)).flatten())
        ratios.append((effects.std(0) / exactly.std(0)).flatten())
    ratio = torch.cat(ratios)
    return {
        "effects_rms_z": float((torch.cat(z) ** 2).mean().sqrt()),
        "effects_ratio_low": float(ratio.min()),
        "effects_ratio_high": float(ratio.max()),
    }


def compare_all(folder: Path, *, draws: int, warmup: int, workers: int) -> list[Comparison]:
    """`compare` for all references, in parallel."""
    return list(
        Parallel(n_jobs=workers)(
            delayed(compare)(reference, folder, draws=draws, warmup=warmup)
            for reference in REFERENCES
        )
    )
