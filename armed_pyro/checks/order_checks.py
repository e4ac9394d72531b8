"""Checks of autocorrelation within clusters."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
from jaxtyping import Float, Int

from armed_pyro.checks.check import Check
from armed_pyro.checks.findings import Kind, unchecked
from armed_pyro.checks.predictor_checks import within
from armed_pyro.checks.quantile_residuals import QuantileResiduals
from armed_pyro.checks.score_tests import Tested, lag_one
from armed_pyro.inference.posterior import Posterior

__all__ = ["order_checks"]


AUTOCORRELATION = Kind("autocorrelation", "correlation of neighbours", 0.15, 0.6)
TIME = re.compile(
    r"(time|date|day|week|month|year|age|visit|wave|session|trial|hour|minute|second)s?"
    r"($|[^a-z])|^t$",
    re.IGNORECASE,
)
BY_ROW = "the order of the rows"


def _sorted(y: Float[np.ndarray, " rows"], codes: Int[np.ndarray, " rows"]) -> bool:
    """Whether the rows are sorted by outcome, which makes neighbours alike in any model."""
    steps = np.diff(y)[np.diff(codes) == 0]
    steps = steps[steps != 0]
    return len(steps) > 0 and not 0.05 < (steps > 0).mean() < 0.95


def order_checks(
    posterior: Posterior, residuals: QuantileResiduals
) -> tuple[list[Check], QuantileResiduals]:
    """The check of autocorrelation, and the residuals with a mark if it found one."""
    check = _order(posterior, residuals)
    return [check], replace(residuals, correlated=check.verdict in ("warn", "fail"))


def _order(posterior: Posterior, residuals: QuantileResiduals) -> Check:
    """Correlation of neighbouring residuals, by row and by columns whose names are of times."""
    first = residuals.first
    factors = [factor.name for factor in posterior.model.clustered_factors]
    clusters = {name: residuals.codes[name][first] for name in factors}
    clusters = clusters or {"": np.zeros(len(first), dtype=int)}
    orders = {BY_ROW: residuals.index[first].astype(float)}
    for place, name in enumerate(residuals.names):
        if TIME.search(residuals.sources[place]):
            orders[name] = residuals.features[first, place]
    tests = list[Tested]()
    for name, codes in clusters.items():
        known = set[bytes]()
        for order, values in orders.items():
            sort = np.lexsort((values, codes))
            tied = (np.diff(values[sort]) == 0) & (np.diff(codes[sort]) == 0)
            varies = within(values, codes).var() > 0
            if sort.tobytes() in known or not varies or tied.mean() > 0.5:
                continue
            if order == BY_ROW and _sorted(residuals.outcome[first][sort], codes[sort]):
                continue
            known.add(sort.tobytes())
            subject = f"{order} within {name}" if name else order
            for column in residuals.mean:
                test = lag_one(subject, column.values[first], codes, values)
                tests += [test] if test else []
    if not tests:
        reason = "too few clusters have several rows, or the rows are sorted by outcome"
        return unchecked(AUTOCORRELATION.name, reason)
    return AUTOCORRELATION.judge(
        tests,
        "neighbouring residuals are not correlated",
        "neighbouring residuals are correlated in {}",
        lambda test: (
            "a trend in time (a spline, or a random slope on time) or correlated residuals "
            "(AR(1)); standard errors are too small"
            if test.effect > 0
            else "look at the order of the rows: neighbours deviate in opposite directions"
        ),
    )
