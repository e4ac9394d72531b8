"""Power and size of the checks of a model: how often faults are reported, and right models.

Each design has 25 clusters of 10 rows, with a feature x that has mean 0 in every cluster. A fault
counts as found if its check warns or fails. The classical test of the same fault is applied to
the same data; where its p-value is below 1e-4, the fault must be found in 95% of the data sets.
Healthy designs are fitted with the program that generated them.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import statsmodels.api as sm
import torch
from joblib import Parallel, delayed
from scipy import stats

from armed_pyro import ClusteredData, MixedEffects, fit
from armed_pyro.models.linear import linear

__all__ = ["FAULTS", "HEALTHY", "Design", "faults_found", "healthy_warned", "main"]


CLUSTERS, ROWS = 25, 10
CLEAR = 1e-4  # classical p-value below which a fault is clear

Array = np.ndarray
Classical = Callable[[Array, Array, Array], float]


@dataclass(frozen=True)
class Design:
    """One way to draw data, and the model that is fitted to them.

    Attributes
    ----------
    name : str
        Name of the design.
    family, random : str
        Family and random effects of the fitted program.
    draw : callable
        Table of the data for a random generator.
    check : str
        Name of the check that has to find the fault; empty for healthy designs.
    classical : callable, optional
        p-value of the classical test, from y, x and cluster.
    """

    name: str
    family: str
    random: str
    draw: Callable[[np.random.Generator], pd.DataFrame]
    check: str = ""
    classical: Classical | None = None


# ------------------------------------------------------------------------------ simulated data


def _balanced(rng: np.random.Generator, clusters: int = CLUSTERS, rows: int = ROWS) -> pd.DataFrame:
    """x with mean 0 in every cluster, clusters g, and a predictor with random intercepts."""
    g = np.repeat(np.arange(clusters), rows)
    x = rng.normal(size=(clusters, rows))
    x = (x - x.mean(1, keepdims=True)).ravel()
    eta = 0.5 + 0.7 * x + 0.8 * rng.normal(size=clusters)[g]
    return pd.DataFrame({"x": x, "g": g, "eta": eta})


def _slope(rng: np.random.Generator) -> pd.DataFrame:
    table = _balanced(rng)
    slopes = rng.normal(size=CLUSTERS)[table.g]
    return table.assign(y=table.eta + slopes * table.x + rng.normal(size=len(table)))


def _square(rng: np.random.Generator) -> pd.DataFrame:
    table = _balanced(rng)
    return table.assign(y=table.eta + 2 * table.x**2 + rng.normal(size=len(table)))


def _spread(rng: np.random.Generator) -> pd.DataFrame:
    table = _balanced(rng)
    return table.assign(y=table.eta + np.exp(0.8 * table.x) * rng.normal(size=len(table)))


def _series(rng: np.random.Generator) -> pd.DataFrame:
    table, rho = _balanced(rng), 0.8
    errors = rng.normal(size=(CLUSTERS, ROWS))
    for t in range(1, ROWS):
        errors[:, t] = rho * errors[:, t - 1] + np.sqrt(1 - rho**2) * errors[:, t]
    return table.assign(y=table.eta + errors.ravel())


def _overdispersed(rng: np.random.Generator) -> pd.DataFrame:
    table = _balanced(rng)
    return table.assign(y=rng.negative_binomial(2, 2 / (2 + np.exp(table.eta))).astype(float))


# ----------------------------------------------------------------------------- classical tests


def _least_squares(y: Array, columns: Array, g: Array) -> tuple[float, int]:
    """Residual sum of squares and degrees of freedom, with one intercept for each cluster."""
    design = np.column_stack([pd.get_dummies(g).to_numpy(float), columns])
    beta, _, rank, _ = np.linalg.lstsq(design, y)
    return float(((y - design @ beta) ** 2).sum()), len(y) - rank


def _f_test(small: tuple[float, int], large: tuple[float, int]) -> float:
    df = small[1] - large[1]
    ratio = (small[0] - large[0]) / df / (large[0] / large[1])
    return float(stats.f.sf(ratio, df, large[1]))


def _slope_test(y: Array, x: Array, g: Array) -> float:
    by_cluster = pd.get_dummies(g).to_numpy(float) * x[:, None]
    return _f_test(_least_squares(y, x[:, None], g), _least_squares(y, by_cluster, g))


def _square_test(y: Array, x: Array, g: Array) -> float:
    both = np.column_stack([x, x**2])
    return _f_test(_least_squares(y, x[:, None], g), _least_squares(y, both, g))


def _within_residuals(y: Array, x: Array, g: Array) -> Array:
    design = np.column_stack([pd.get_dummies(g).to_numpy(float), x])
    return y - design @ np.linalg.lstsq(design, y)[0]


def _spread_test(y: Array, x: Array, g: Array) -> float:
    """Breusch and Pagan's test, in Koenker's form."""
    residuals = _within_residuals(y, x, g)
    return float(sm.stats.diagnostic.het_breuschpagan(residuals, sm.add_constant(x))[1])


def _series_test(y: Array, x: Array, g: Array) -> float:
    """Correlation of neighbouring residuals, with the bias -1 / rows of fitted intercepts."""
    residuals = _within_residuals(y, x, g).reshape(CLUSTERS, ROWS)
    products = (residuals[:, 1:] * residuals[:, :-1]).sum()
    r = products / (residuals**2).sum() * ROWS / (ROWS - 1) + 1 / ROWS
    return float(stats.norm.sf(r * np.sqrt(CLUSTERS * (ROWS - 1))))


def _dispersion_test(y: Array, x: Array, g: Array) -> float:
    """Pearson's chi-square of a poisson regression with one intercept for each cluster."""
    kept = np.isin(g, np.flatnonzero(np.bincount(g, y) > 0))
    design = np.column_stack([pd.get_dummies(g[kept]).to_numpy(float), x[kept]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = sm.GLM(y[kept], design, sm.families.Poisson()).fit()
    return float(stats.chi2.sf(result.pearson_chi2, result.df_resid))


FAULTS = (
    Design("slope of sd 1", "gaussian", "(1 | g)", _slope, "left-out slopes", _slope_test),
    Design("2 x^2", "gaussian", "(1 | g)", _square, "non-linearity", _square_test),
    Design("sd exp(0.8 x)", "gaussian", "(1 | g)", _spread, "spread", _spread_test),
    Design("AR(1) 0.8", "gaussian", "(1 | g)", _series, "autocorrelation", _series_test),
    Design(
        "negative binomial",
        "poisson",
        "(1 | g)",
        _overdispersed,
        "dispersion",
        _dispersion_test,
    ),
)


# ------------------------------------------------------------------------------- right models


def _outcome(rng: np.random.Generator, family: str, eta: Array) -> Array:
    """Outcomes for a predictor with one column, or one for each class but the first."""
    if family == "categorical":
        logits = np.column_stack([np.zeros(len(eta)), eta])
        return (logits + rng.gumbel(size=logits.shape)).argmax(1).astype(float)
    eta = eta[:, 0]
    if family == "gaussian":
        return eta + rng.normal(size=len(eta))
    if family == "bernoulli":
        return rng.binomial(1, 1 / (1 + np.exp(-eta))).astype(float)
    if family == "binomial":
        return rng.binomial(8, 1 / (1 + np.exp(-eta))).astype(float)
    if family == "poisson":
        return rng.poisson(np.exp(eta)).astype(float)
    return rng.negative_binomial(2, 2 / (2 + np.exp(eta))).astype(float)


def _table(rng: np.random.Generator, kind: str) -> pd.DataFrame:
    """x, g and, where factors are crossed, h."""
    clusters, rows = {"few large": (8, 60), "many small": (150, 3)}.get(kind, (CLUSTERS, ROWS))
    table = _balanced(rng, clusters, rows)[["x", "g"]]
    if kind == "many small":  # sizes differ, and x differs between clusters
        kept = rng.random(len(table)) < rng.uniform(0.4, 1, clusters)[table.g]
        table = table[kept].reset_index(drop=True)
        table["x"] += rng.normal(size=clusters)[table.g]
    if kind == "crossed":
        table["h"] = rng.integers(15, size=len(table))
    return table


def _predictor(rng: np.random.Generator, table: pd.DataFrame, kind: str, slope: float) -> Array:
    """Predictor with random effects of its own."""
    clusters = table.g.max() + 1
    eta = 0.5 + slope * table.x + 0.8 * rng.normal(size=clusters)[table.g]
    if kind == "slopes":
        eta += 0.5 * rng.normal(size=clusters)[table.g] * table.x
    if kind == "crossed":
        eta += 0.6 * rng.normal(size=15)[table.h]
    return eta.to_numpy()


def _healthy(family: str, kind: str) -> Callable[[np.random.Generator], pd.DataFrame]:
    slopes = (0.7, -0.7) if family == "categorical" else (0.7,)

    def draw(rng: np.random.Generator) -> pd.DataFrame:
        table = _table(rng, kind)
        eta = [_predictor(rng, table, kind, slope) for slope in slopes]
        return table.assign(y=_outcome(rng, family, np.column_stack(eta)))

    return draw


RANDOM = {"slopes": "(1 + x | g)", "crossed": "(1 | g) + (1 | h)"}
KINDS = ("balanced", "few large", "many small", "slopes", "crossed")
FAMILIES = (
    "gaussian",
    "bernoulli",
    "binomial",
    "poisson",
    "negative_binomial",
    "categorical",
)
HEALTHY = tuple(
    Design(f"{family}, {kind}", family, RANDOM.get(kind, "(1 | g)"), _healthy(family, kind))
    for family in FAMILIES
    for kind in KINDS
)


# ----------------------------------------------------------------------------------- the runs


def _checks(design: Design, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The data set of this seed, and the checks of its fit."""
    torch.set_num_threads(1)
    table = design.draw(np.random.default_rng(seed))
    factors = [name for name in ("g", "h") if name in table]
    data = ClusteredData.from_frame(
        table.assign(trials=8),
        outcome="y",
        clusters=factors,
        features=["x"],
        trials="trials" if design.family == "binomial" else None,
    )
    outputs = 3 if design.family == "categorical" else 1
    model = MixedEffects(linear(1, outputs), design.random, design.family, bayesian_head=True)
    return table, fit(model, data, seed=seed, progress=False).diagnostics().to_frame()


def _fault(design: Design, seed: int) -> dict[str, object]:
    table, checks = _checks(design, seed)
    assert design.classical is not None
    reported = checks[checks.verdict.isin(["warn", "fail"]) & (checks.part == "model")]
    this = checks[checks.name == design.check].iloc[0]
    return {
        "design": design.name,
        "seed": seed,
        "classical p": design.classical(*(table[c].to_numpy() for c in ("y", "x", "g"))),
        "found": design.check in set(reported.name),
        "effect": this.effect,
        "p": this.p,
        "also": ", ".join(name for name in reported.name if name != design.check),
    }


def _right(design: Design, seed: int) -> dict[str, object]:
    _, checks = _checks(design, seed)
    reported = checks[checks.verdict.isin(["warn", "fail"])]
    computation = reported.part == "computation"
    return {
        "design": design.name,
        "seed": seed,
        "model": (~computation & reported.is_misfit.astype(bool)).any(),
        "computation": computation.any(),
        "data say little": (~computation & ~reported.is_misfit.astype(bool)).any(),
        "reported": ", ".join(reported.name),
    }


def _run(
    one: Callable[[Design, int], dict[str, object]],
    designs: Sequence[Design],
    data_sets: int,
    workers: int,
) -> pd.DataFrame:
    jobs = [delayed(one)(design, seed) for design in designs for seed in range(data_sets)]
    return pd.DataFrame(Parallel(n_jobs=workers)(jobs))


def faults_found(
    data_sets: int = 100, designs: Sequence[Design] = FAULTS, *, workers: int = 1
) -> pd.DataFrame:
    """One row per data set with a fault: the classical p-value, and whether it was found."""
    return _run(_fault, designs, data_sets, workers)


def healthy_warned(data_sets: int = 20, *, workers: int = 1) -> pd.DataFrame:
    """One row per data set of a right model: whether either verdict warns, and what is named."""
    return _run(_right, HEALTHY, data_sets, workers)


def _summary(faults: pd.DataFrame) -> Iterator[dict[str, object]]:
    for design, rows in faults.groupby("design", sort=False):
        clear = rows[rows["classical p"] < CLEAR]
        yield {
            "design": design,
            "data sets": len(rows),
            "classical p < 1e-4": len(clear),
            "found of these": clear["found"].mean(),
            "found of all": rows["found"].mean(),
            "median effect": rows["effect"].median(),
        }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line: print both tables, and write one CSV file for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=100, help="data sets of each fault")
    parser.add_argument("--healthy", type=int, default=20, help="data sets of each right model")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results/verdict_power"))
    parser.add_argument("--smoke", action="store_true", help="one data set of two faults only")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.smoke:
        options.faults, options.healthy = 1, 0
    if options.faults:
        designs = FAULTS[:2] if options.smoke else FAULTS
        faults = faults_found(options.faults, designs, workers=options.workers)
        faults.to_csv(options.out / "faults.csv", index=False)
        print(pd.DataFrame(_summary(faults)).round(3).to_string(index=False))
        also = faults["also"][faults["also"] != ""].value_counts()
        print(f"\nreported besides:\n{also.to_string()}" if len(also) else "")
    if options.healthy:
        healthy = healthy_warned(options.healthy, workers=options.workers)
        healthy.to_csv(options.out / "healthy.csv", index=False)
        parts = ["model", "computation", "data say little"]
        print(healthy.groupby("design", sort=False)[parts].mean().round(3).to_string())
        print(healthy[parts].mean().round(4).to_string())
        print(healthy["reported"][healthy["reported"] != ""].value_counts().to_string())


if __name__ == "__main__":
    main()
