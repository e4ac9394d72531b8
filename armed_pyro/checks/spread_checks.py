"""Checks of the residuals' law: spread, dispersion of counts, zeros, skewness and tails."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import scipy
from jaxtyping import Float

from armed_pyro.checks.check import Check
from armed_pyro.checks.findings import Kind, features_first, ratio, unchecked
from armed_pyro.checks.predictor_checks import MOST_FEATURES, PREDICTOR
from armed_pyro.checks.quantile_residuals import QuantileResiduals
from armed_pyro.checks.score_tests import (
    SPREAD_PER_LOG_SD,
    Tested,
    between_clusters,
    curve,
    curve_basis,
    curve_by_draw,
    moments,
    spread_scores,
    without_curve,
    without_slopes,
)
from armed_pyro.families.family import Family
from armed_pyro.inference.posterior import Posterior

__all__ = ["DISPERSION_FIRST", "dispersion_checks", "shape_checks", "spread_checks"]


SPREAD = Kind("spread", "sd of the log of the residual sd", 0.15, 0.6)
SPREAD_BY_FACTOR = Kind("spread by cluster", "sd of the clusters' log of the residual sd", 0.2, 0.6)
DISPERSION = Kind("dispersion", "variance relative to the family's", 1.2, 2.0, ratio)
ZEROS = Kind("zeros", "zeros relative to those expected", 1.2, 2.0, ratio)
SKEWNESS = Kind("skewness", "skewness", 0.4, 1.5)
DISPERSION_FIRST = "the dispersion is wrong; it has to be mended first"
CORRELATION_FIRST = "neighbouring residuals are correlated; this has to be mended first"
TAILS = Kind("tails", "excess kurtosis", 1.0, 6.0)


def dispersion_checks(
    posterior: Posterior, residuals: QuantileResiduals
) -> tuple[list[Check], QuantileResiduals]:
    """Checks of the dispersion of whole numbers and of zeros, and residuals of variance 1."""
    family = posterior.model.family
    if residuals.z is None or residuals.zeros is None:
        return [], residuals
    dispersion = _dispersion(residuals, residuals.z, family)
    zeros = _zeros(residuals, residuals.zeros, family)
    if dispersion.verdict in ("pass", "not checked"):
        return [dispersion, zeros], residuals
    # Zeros, spread and tails follow from the dispersion, and would be reported again.
    if family.is_equidispersed:
        allowed = overdispersed_zeros(residuals.outcome, residuals.zeros)
        zeros = _zeros(residuals, allowed, family)
    else:
        zeros = unchecked(ZEROS.name, DISPERSION_FIRST)
    return [dispersion, zeros], replace(residuals.cleaned(lambda z: z), dispersed=True)


def overdispersed_zeros(
    y: Float[np.ndarray, " rows"], zeros: Float[np.ndarray, "rows draws"]
) -> Float[np.ndarray, "rows draws"]:
    r"""P(y = 0) of negative binomial counts with the means of poisson counts.

    .. math:: P(y = 0) = (1 + \mu / s)^{-s}, \quad \mu = -\log P_{poisson}(y = 0), \quad
              1 / s = \frac{\sum (y - \mu)^2 - \mu}{\sum \mu^2}

    Zeros beyond these are more than overdispersion explains.
    """
    mean = -np.log(zeros.clip(1e-300, 1 - 1e-12))
    inverse = (((y[:, None] - mean) ** 2 - mean).sum(0) / (mean**2).sum(0)).clip(min=1e-6)
    return np.asarray(np.exp(-np.log1p(mean * inverse) / inverse))


def spread_checks(
    posterior: Posterior, residuals: QuantileResiduals
) -> tuple[list[Check], QuantileResiduals]:
    """Checks of where the spread differs, and the residuals divided by it."""
    family = posterior.model.family
    if residuals.z is None:
        return [], residuals
    if residuals.dispersed:
        return [unchecked(SPREAD.name, DISPERSION_FIRST)], residuals
    scores = spread_scores(residuals.z)
    scores -= scores.mean(0)  # the overall spread is tested as the dispersion
    tests, bases = [curve_by_draw(PREDICTOR, scores, residuals.eta[..., 0])], dict[str, Any]()
    for place, name in enumerate(residuals.names[:MOST_FEATURES]):
        basis = curve_basis(residuals.features[:, place])
        if basis.shape[1]:
            tests.append(curve(name, scores, basis))
            bases[name] = basis
    bases[PREDICTOR] = curve_basis(residuals.eta[..., 0].mean(1))
    ones = np.ones(len(scores))
    by_factor = [
        between_clusters(name, scores, ones, codes)
        for name, codes in residuals.codes.items()
        if not residuals.correlated
    ]
    clusters = [_log_sd(test) for test in by_factor if test]
    kind = "a residual sd" if family.parameters else "a dispersion"
    tests = features_first(SPREAD, list(map(_log_sd, tests)), PREDICTOR)
    checks = [
        SPREAD.judge(
            tests,
            "the residuals' spread is the same everywhere",
            "the residuals' spread depends on {}",
            lambda test: f"{kind} that depends on {test.subject}, or a transformed outcome",
        )
    ]
    if clusters:
        check = SPREAD_BY_FACTOR.judge(
            clusters,
            "the residuals' spread is the same in all clusters",
            "the residuals' spread differs between the clusters of {}",
            lambda test: f"{kind} that differs between the clusters of {test.subject}",
        )
        checks.append(check)
    if residuals.correlated:
        checks.append(unchecked(SPREAD_BY_FACTOR.name, CORRELATION_FIRST))
    rest = scores
    for misfit in SPREAD.misfits(tests):
        rest = without_curve(rest, bases[misfit.subject])
    for misfit in SPREAD_BY_FACTOR.misfits(clusters):
        rest = without_slopes(rest, ones, residuals.codes[misfit.subject])
    if rest is not scores:
        log_sd = (scores - rest) / SPREAD_PER_LOG_SD
        residuals = residuals.cleaned(lambda z: z / np.exp(log_sd))
    return checks, residuals


def shape_checks(residuals: QuantileResiduals, family: Family) -> Iterator[Check]:
    """Checks of skewness and tails."""
    if residuals.z is None:
        return
    if residuals.dispersed:
        yield unchecked(TAILS.name, DISPERSION_FIRST)
        return
    skewness, tails = moments(residuals.z)
    yield SKEWNESS.judge(
        [skewness],
        "the residuals are symmetric",
        "the residuals are skewed",
        lambda test: family.if_misfit(residuals.outcome),
    )
    yield TAILS.judge(
        [tails],
        "the residuals' tails are those of the family",
        "the residuals' tails are not those of the family",
        lambda test: (
            family.if_heavy_tails
            if test.effect > 0
            else "another family: the residuals have lighter tails than it"
        ),
    )


def _log_sd(test: Tested) -> Tested:
    """The test of `spread_scores` with its effect as a log-sd."""
    return Tested(test.subject, test.effect / SPREAD_PER_LOG_SD, test.p)


def _dispersion(residuals: QuantileResiduals, z: np.ndarray, family: Family) -> Check:
    """Sum of squared residuals, which is chi-square if the family is right."""
    total, n = (z**2).sum(0), len(z)
    chi2 = scipy.stats.chi2
    p = float(np.median(2 * np.minimum(chi2.sf(total, n), chi2.cdf(total, n)).clip(max=0.5)))

    def advice(test: Tested) -> str:
        if test.effect < 1:
            return "another family: the outcomes vary less than it allows"
        return family.if_overdispersed

    word = "more" if total.mean() > n else "less"
    return DISPERSION.judge(
        [Tested("", residuals.dispersion, p)],
        f"the outcomes vary as much as family {str(family)!r} allows",
        f"the outcomes vary {word} than family {str(family)!r} allows",
        advice,
    )


def _zeros(residuals: QuantileResiduals, zeros: np.ndarray, family: Family) -> Check:
    seen = float((residuals.outcome == 0).sum())
    expected, sd = zeros.sum(0), np.sqrt((zeros * (1 - zeros)).sum(0))
    if expected.mean() < 5 and seen < 5:
        return unchecked(ZEROS.name, f"{expected.mean():.1f} zeros are expected, {seen:.0f} seen")
    # A count of at least one, because a ratio with no zeros has no logarithm.
    p = float(np.median(2 * scipy.stats.norm.sf((np.abs(seen - expected) - 0.5) / sd.clip(1e-3))))
    test = Tested("", max(seen, 0.5) / max(0.5, float(expected.mean())), min(1.0, p))
    return ZEROS.judge(
        [test],
        "the zeros are as many as expected",
        f"{seen:.0f} outcomes are zero, {expected.mean():.0f} were expected",
        lambda test: (
            family.if_more_zeros
            if test.effect > 1
            else "another family, such as one of positive counts"
        ),
    )
