"""Check that features shift all thresholds of ordered categories alike (proportional odds)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import scipy
import torch
from jaxtyping import Float
from torch import Tensor

from armed_pyro.checks.check import Check
from armed_pyro.checks.findings import Kind, unchecked
from armed_pyro.checks.quantile_residuals import QuantileResiduals
from armed_pyro.checks.score_tests import Tested
from armed_pyro.guides.base import selected
from armed_pyro.inference.posterior import Posterior

__all__ = ["slope_differences", "threshold_checks"]

# Range of the slopes at different thresholds, in sds of the latent noise per sd of the feature. A
# range of 0.25 is a ratio of the odds ratios of exp(0.25 * 1.81) = 1.6 for the logit link.
PROPORTIONAL = Kind(
    "proportional odds", "range of the slopes by threshold, in latent sds per sd of x,", 0.25, 0.75
)
MOST_FEATURES = 100
FEWEST_ROWS = 10  # on either side of a boundary that is compared


def threshold_checks(
    posterior: Posterior, latents: Mapping[str, Tensor], residuals: QuantileResiduals
) -> list[Check]:
    """Brant's test of each feature; no check for families without thresholds."""
    model, family = posterior.model, posterior.model.family
    eta = torch.from_numpy(residuals.eta.transpose(1, 0, 2).copy())
    drawn = selected(latents, slice(len(eta)))
    parameters = {
        name: value.reshape(-1, 1).double()
        for name, value in model.family_parameters(drawn).items()
    }
    exceedances = family.exceedances(eta, parameters)
    if exceedances is None:
        return []
    above, density, noise_sd = exceedances
    code = family.codes(residuals.outcome)
    beyond = code[:, None] > np.arange(above.shape[-1])
    rows = beyond.sum(0)
    kept = np.flatnonzero(np.minimum(rows, len(code) - rows) >= FEWEST_ROWS)
    if len(kept) < 2:
        return [unchecked(PROPORTIONAL.name, f"fewer than two thresholds have {FEWEST_ROWS} rows")]
    p, f = above.numpy()[..., kept], density.numpy()[..., kept]
    tests = list[Tested]()
    for place, name in enumerate(residuals.names[:MOST_FEATURES]):
        x = residuals.features[:, place]
        if x.std() > 0:
            scaled = (x - x.mean()) / x.std()
            tests.append(slope_differences(name, scaled, beyond[:, kept], p, f, noise_sd))
    if not tests:
        return []
    return [
        PROPORTIONAL.judge(
            tests,
            "features shift all thresholds alike",
            "the thresholds are shifted differently by {}",
            lambda test: (
                f"family 'categorical', whose slopes of {test.subject} differ by category; or "
                "compare fits of the outcome split at each threshold (bernoulli)"
            ),
        )
    ]


def slope_differences(
    subject: str,
    x: Float[np.ndarray, " rows"],
    beyond: np.ndarray,
    p: Float[np.ndarray, "draws rows boundaries"],
    density: Float[np.ndarray, "draws rows boundaries"],
    noise_sd: float = 1.0,
) -> Tested:
    r"""Wald test that one-step estimates of a slope are the same at all thresholds.

    .. math:: \delta_j = \frac{\sum_i \tilde x_{ij} g_{ij} (1[y_i > j] - p_{ij})}
              {\sum_i \tilde x_{ij}^2 g_{ij} f_{ij}}, \quad g = \frac{f}{p (1 - p)}

    :math:`p_{ij} = P(y_i > j)` has the derivative :math:`f_{ij}` in eta, and x~ is x without its
    mean of weights g f, as thresholds are estimated. Indicators of two thresholds have the
    covariance :math:`p_{ik} (1 - p_{ij})`, j < k. The effect is the range of the slopes beyond
    that of noise, averaged over the posterior draws.

    References
    ----------
    Brant (1990), Biometrics 46(4): assessing proportionality in the proportional odds model.
    """
    count = p.shape[-1]
    score = density / (p * (1 - p)).clip(1e-12)
    weight = score * density
    statistics, ranges = list[float](), list[float]()
    contrast = np.column_stack([-np.ones(count - 1), np.eye(count - 1)])
    for draw_p, draw_score, draw_weight in zip(p, score, weight, strict=True):
        centred = x[:, None] - (draw_weight * x[:, None]).sum(0) / draw_weight.sum(0)
        column = centred * draw_score / (centred**2 * draw_weight).sum(0)
        slope = (column * (beyond - draw_p)).sum(0)
        covariance = np.empty((count, count))
        for j in range(count):
            for k in range(j, count):
                joint = column[:, j] * column[:, k] * draw_p[:, k] * (1 - draw_p[:, j])
                covariance[j, k] = covariance[k, j] = joint.sum()
        difference = contrast @ slope
        spread = contrast @ covariance @ contrast.T
        statistics.append(float(difference @ np.linalg.solve(spread, difference)))
        deviation = slope - slope.mean()
        noise = np.trace(covariance) - covariance.mean() * count
        share = max(0.0, 1 - noise / (deviation @ deviation))
        ranges.append(float(np.ptp(slope) * np.sqrt(share) / noise_sd))
    tail = float(np.median(scipy.stats.chi2.sf(statistics, count - 1)))
    return Tested(subject, float(np.mean(ranges)), tail)
