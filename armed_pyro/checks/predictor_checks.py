"""Checks of the predictor: curves, and left-out slopes and factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from armed_pyro.checks.check import Check
from armed_pyro.checks.cluster_mean_checks import cluster_mean_checks
from armed_pyro.checks.findings import Kind, features_first, unchecked
from armed_pyro.checks.quantile_residuals import MeanResiduals, QuantileResiduals
from armed_pyro.checks.score_tests import (
    Tested,
    between_clusters,
    curve,
    curve_basis,
    curve_by_draw,
    without_curve,
    without_slopes,
)
from armed_pyro.inference.posterior import Posterior
from armed_pyro.random_effects.design import InputBlock
from armed_pyro.random_effects.grouping_factor import Factor

__all__ = ["MOST_FEATURES", "PREDICTOR", "predictor_checks", "within"]


# Tables with more features are checked in the first of them.
MOST_FEATURES = 100

CURVE = Kind("non-linearity", "sd of the curve, in residual sds,", 0.12, 0.5)
SLOPES = Kind("left-out slopes", "sd of the slopes, in residual sds per sd of x,", 0.15, 0.6)
FACTORS = Kind("left-out factors", "sd of the intercepts, in residual sds,", 0.15, 0.6)
PREDICTOR = "the predictor"


def predictor_checks(
    posterior: Posterior, latents: Mapping[str, Tensor], residuals: QuantileResiduals
) -> tuple[list[Check], QuantileResiduals]:
    """Checks of what the predictor leaves out, and the residuals without it."""
    curves, residuals = _curves(posterior, residuals)
    slopes, residuals = _slopes(posterior, residuals)
    factors, residuals = _factors(posterior, residuals)
    checks = [curves, *slopes, *factors, *cluster_mean_checks(posterior, latents, residuals)]
    if (more := len(residuals.names) - MOST_FEATURES) > 0:
        checks.append(unchecked("further features", f"{more} features beyond the first 100"))
    return checks, residuals


def _label(subject: str, column: MeanResiduals) -> str:
    return f"{subject} (class {column.column})" if column.column else subject


def _curves(posterior: Posterior, residuals: QuantileResiduals) -> tuple[Check, QuantileResiduals]:
    tests, bases = list[Tested](), dict[str, np.ndarray]()
    for c, column in enumerate(residuals.mean):
        predictor = residuals.eta[..., c]
        subject = _label(PREDICTOR, column)
        tests.append(curve_by_draw(subject, column.values, predictor, column.slope))
        for place, name in enumerate(residuals.names[:MOST_FEATURES]):
            basis = curve_basis(residuals.features[:, place], column.slope)
            if basis.shape[1]:
                tests.append(curve(_label(name, column), column.values, basis))
                bases[tests[-1].subject] = basis
    linear, factors = posterior.model.linear, posterior.model.clustered_factors
    tests = features_first(CURVE, tests, PREDICTOR)

    def advice(test: Tested) -> str:
        name = test.subject.partition(" (class ")[0]
        if name == PREDICTOR:
            return "another link or a transformed outcome"
        if not linear:
            return f"a larger network or longer training, as {name} is not used fully"
        return f"add I({name}**2) or a spline of {name}"

    found = "the residuals still depend on {}"
    check = CURVE.judge(tests, "no curve is left in the residuals", found, advice)
    for misfit in CURVE.misfits(tests):
        basis = bases.get(misfit.subject, curve_basis(residuals.eta.mean((1, 2))))
        # The random intercepts have absorbed a part of the curve's clusters' means.
        columns = [basis, *(_within(basis, residuals.codes[f.name]) for f in factors)]
        residuals = residuals.cleaned(partial(without_curve, basis=np.hstack(columns)))
        residuals = residuals.recentred(factor.name for factor in factors)
    return check, residuals


def within(
    x: Float[np.ndarray, " rows"],
    codes: Int[np.ndarray, " rows"],
    weight: Float[np.ndarray, " rows"] | None = None,
) -> Float[np.ndarray, " rows"]:
    """x without its (weighted) mean in each cluster."""
    weight = np.ones(len(x)) if weight is None else weight
    total = np.bincount(codes, weight)
    return np.asarray(x - (np.bincount(codes, weight * x) / np.where(total, total, 1))[codes])


def _within(basis: np.ndarray, codes: Int[np.ndarray, " rows"]) -> np.ndarray:
    return np.column_stack([within(column, codes) for column in basis.T])


def _slope_columns(factors: Sequence[Factor], name: str) -> set[int]:
    """Features on which this factor has random slopes already."""
    return {
        int(column)
        for factor in factors
        if factor.name == name
        for block in factor.linear
        if isinstance(block, InputBlock)
        for column in block.index.tolist()
    }


def _slopes(
    posterior: Posterior, residuals: QuantileResiduals
) -> tuple[list[Check], QuantileResiduals]:
    factors = posterior.model.clustered_factors
    tests, terms = list[Tested](), dict[str, str]()
    columns, candidates = dict[str, tuple[np.ndarray, np.ndarray]](), False
    for factor in factors:
        codes = residuals.codes[factor.name]
        present = _slope_columns(factors, factor.name)
        for place, name in enumerate(residuals.names[:MOST_FEATURES]):
            x = residuals.features[:, place]
            if place in present or within(x, codes).var() < 1e-6 * x.var():
                continue
            candidates = True
            for column in residuals.mean:
                a = column.slope * within(x, codes, column.slope**2)
                subject = _label(f"{name} by {factor.name}", column)
                terms[subject] = f"add (0 + {residuals.sources[place]} | {factor.name})"
                test = between_clusters(subject, column.values, a, codes)
                tests += [test] if test else []
                columns[subject] = a, codes
    if not tests:
        if not candidates:
            return [], residuals
        reason = "the features vary within fewer than 5 clusters"
        return [unchecked(SLOPES.name, reason)], residuals
    check = SLOPES.judge(
        tests,
        "no random slope is missing",
        "a random slope is missing: {}",
        lambda test: terms[test.subject],
    )
    for misfit in SLOPES.misfits(tests):
        a, codes = columns[misfit.subject]
        residuals = residuals.cleaned(partial(without_slopes, a=a, codes=codes))
        residuals = residuals.recentred(factor.name for factor in factors)
    return [check], residuals


def _factors(
    posterior: Posterior, residuals: QuantileResiduals
) -> tuple[list[Check], QuantileResiduals]:
    """Grouping factors of the data that the program leaves out."""
    modelled = {factor.name for factor in posterior.model.clustered_factors}
    tests = list[Tested]()
    for name, codes in residuals.codes.items():
        for column in residuals.mean if name not in modelled else ():
            subject = _label(name, column)
            test = between_clusters(subject, column.values, column.slope, codes)
            tests += [test] if test else []
    if not tests:
        return [], residuals
    check = FACTORS.judge(
        tests,
        "no grouping factor of the data is missing",
        "the residuals differ between the clusters of {}, which the model leaves out",
        lambda test: f"add (1 | {test.subject.partition(' (class ')[0]})",
    )
    for misfit in FACTORS.misfits(tests):
        codes = residuals.codes[misfit.subject.partition(" (class ")[0]]
        remove = partial(without_slopes, a=np.ones(len(codes)), codes=codes)
        residuals = residuals.cleaned(remove)
    return [check], residuals
