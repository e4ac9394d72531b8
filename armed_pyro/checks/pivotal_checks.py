"""Checks of what is pivotal if the model is right: random effects and residuals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import scipy
import torch
from jaxtyping import Float
from torch import Tensor

from armed_pyro.checks.check import LEVEL, Check, severity
from armed_pyro.checks.quantile_residuals import MOST_DRAWS, QuantileResiduals
from armed_pyro.checks.rank_tests import holm
from armed_pyro.families.family import Family
from armed_pyro.guides.base import selected
from armed_pyro.inference.posterior import Posterior
from armed_pyro.random_effects.grouping_factor import Factor

__all__ = ["Shape", "effect_shapes", "normality_checks", "residual_check", "uniformity"]


Draws = Mapping[str, Tensor]
# Larger factors are checked in a sample of this many clusters.
MOST_CLUSTERS = 500
# Skewness of a gamma with shape 7; excess kurtosis of a t with 9 degrees of freedom; excess
# kurtosis between a semicircle (-1) and a triangle (-0.6). Normal intervals hold up to these.
SKEWED, LONG_TAILS, FLAT = 0.75, 1.5, -0.8
# Distance of residuals from uniform, the error of a predicted probability, that matters.
MISSED, MISSED_BY_FAR = 0.05, 0.1


@dataclass(frozen=True)
class Shape:
    """Departure of a term's random effects from a normal distribution.

    Attributes
    ----------
    term : str
        The term.
    statistic : {"skewness", "excess kurtosis"}
        What departs.
    value : float
        Its mean over posterior draws; 0 for a normal distribution.
    interval : (float, float)
        90% interval over clusters, for normal effects of this value.
    p : float
        p-value of a normal distribution, the median over draws.

    Examples
    --------
    >>> Shape("Intercept", "skewness", 0.9, (0.5, 1.3), 1e-4).size
    1.2
    """

    term: str
    statistic: str
    value: float
    interval: tuple[float, float]
    p: float

    @property
    def size(self) -> float:
        """The departure, relative to the size that matters."""
        if self.statistic == "skewness":
            return abs(self.value) / SKEWED
        return max(self.value / LONG_TAILS, self.value / FLAT)


def normality_checks(posterior: Posterior, latents: Draws) -> Iterator[Check]:
    """Checks that the random effects of every factor are normal."""
    shapes = [
        effect_shapes(f, latents, seed=posterior.seed) for f in posterior.model.clustered_factors
    ]
    tests = [shape for each in shapes for shape in each]
    # Two tests of each term, as the median over draws is not uniform: twice Holm's p.
    adjusted = (2 * holm(np.array([shape.p for shape in tests]))).clip(max=1)
    p_of = dict(zip(map(id, tests), adjusted.tolist(), strict=True))
    for factor, each in zip(posterior.model.clustered_factors, shapes, strict=True):
        name = f"normality of {factor.name}"
        if each:
            yield _normality(name, factor, each, [p_of[id(shape)] for shape in each])
        elif len(posterior.model.data_facts().levels[factor.name]) < 8:
            reason = f"{factor.name!r} has fewer than 8 clusters"
            yield Check("model", name, "not checked", reason)


def _normality(name: str, factor: Factor, shapes: list[Shape], p: list[float]) -> Check:
    """The verdict on the worst term of a factor."""
    noise = [value > LEVEL for value in p]
    place = max(range(len(shapes)), key=lambda i: (not noise[i], shapes[i].size))
    worst = shapes[place]
    verdict = severity(worst.size, 1.0, 2.0, noise=noise[place])
    found = f"{worst.statistic} {worst.value:.2f} of {worst.term}, p = {p[place]:.2g}"
    reason = f"random effects of {factor.name} look normal ({found})"
    advice = ""
    if verdict != "pass":
        flat = worst.statistic == "excess kurtosis" and worst.value < 0
        kind = "skewed" if worst.statistic == "skewness" else "long-tailed"
        kind = "in groups" if flat else kind
        reason = f"random effects of {factor.name} are {kind}, not normal ({found})"
        groups = (
            "look at their histogram: groups of clusters point to a missing feature of clusters"
        )
        tails = "look at their histogram: a few outlying clusters, or an outcome to transform"
        advice = groups if flat else tails
    limit = SKEWED if worst.statistic == "skewness" else LONG_TAILS if worst.value > 0 else FLAT
    effect = f"{worst.statistic} of the random effects"
    return Check(
        "model", name, verdict, reason, worst.value, effect, limit, p[place], worst.interval, advice
    )


def effect_shapes(factor: Factor, latents: Draws, *, seed: int = 0) -> list[Shape]:
    r"""Skewness and excess kurtosis of the random effects of each term.

    In one posterior draw, :math:`z_k = L^{-1} u_k` are independent standard normal if the program
    is correct, which makes them pivotal. Values are means over draws, p-values medians over draws.
    Large factors are checked in a sample of their clusters. Factors with fewer than 8 clusters are
    not checked; kurtosis is not checked with fewer than 20.

    References
    ----------
    Yuan and Johnson (2012), Biometrics 68(1): goodness-of-fit diagnostics for Bayesian
    hierarchical models.
    """
    effects = latents[factor.effect_site]
    if effects.dim() < 3 or effects.shape[1] < 8:
        return []
    generator = torch.Generator().manual_seed(seed)
    clusters = torch.randperm(effects.shape[1], generator=generator)[:MOST_CLUSTERS]
    draws = selected(latents, slice(MOST_DRAWS))
    draws[factor.effect_site] = draws[factor.effect_site][:, clusters]
    by_draw = factor.whitened(draws).double().cpu().numpy()
    if not np.isfinite(by_draw).all():
        raise ValueError("the random effects' draws are not finite")
    n, shapes = by_draw.shape[1], []
    for place, term in enumerate(factor.terms):
        values = by_draw[..., place]
        skewness = float(scipy.stats.skew(values, axis=1, bias=False).mean())
        p = float(np.median(scipy.stats.skewtest(values, axis=1).pvalue))
        shapes.append(Shape(term, "skewness", skewness, _within(skewness, (6 / n) ** 0.5), p))
        if n >= 20:  # the test is inaccurate for fewer clusters
            kurtosis = float(scipy.stats.kurtosis(values, axis=1, bias=False).mean())
            p = float(np.median(scipy.stats.kurtosistest(values, axis=1).pvalue))
            interval = _within(kurtosis, (24 / n) ** 0.5)
            shapes.append(Shape(term, "excess kurtosis", kurtosis, interval, p))
    return shapes


def _within(value: float, error: float) -> tuple[float, float]:
    """90% interval of a value with a normal error."""
    return value - 1.645 * error, value + 1.645 * error


def residual_check(family: Family, residuals: QuantileResiduals) -> Check:
    """Check that quantile residuals are uniform."""
    if family.no_residuals:
        reason = f"family {family.name!r}: {family.no_residuals}"
        return Check("model", "residuals", "not checked", reason)
    if residuals.z is None:
        reason = f"family {family.name!r} gives no distribution function"
        advice = "add the method `cdf` to the family, so that its residuals can be checked"
        return Check("model", "residuals", "not checked", reason, advice=advice)
    p, distance, error = uniformity(residuals.z)
    verdict = severity(distance, MISSED, MISSED_BY_FAR, noise=p > LEVEL)
    fits = "fits" if verdict == "pass" else "misses"
    return Check(
        "model",
        "residuals",
        verdict,
        f"the distribution of family {str(family)!r} {fits} the outcomes: its probabilities are "
        f"off by up to {distance:.3f} (quantile residuals against uniform, p = {p:.2g})",
        distance,
        "largest error of a predicted probability (Kolmogorov-Smirnov distance)",
        MISSED,
        p,
        (max(0.0, distance - error), distance + error),
        "" if verdict == "pass" else family.if_misfit(residuals.outcome),
    )


def uniformity(z: Float[np.ndarray, "rows draws"]) -> tuple[float, float, float]:
    r"""Uniformity of :math:`\Phi(z)`: p-value, Kolmogorov-Smirnov distance and its error.

    The p-value is the median over draws, the distance the mean; the error is half of its 90%
    interval for this number of rows.
    """
    tests = [scipy.stats.kstest(draw, "norm") for draw in z.T]
    p = float(np.median([test.pvalue for test in tests]))
    error = 0.82 / len(z) ** 0.5  # 1.645 sqrt(1/4 / n), where the distributions differ most
    return p, float(np.mean([test.statistic for test in tests])), error
