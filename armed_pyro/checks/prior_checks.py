"""Checks of what the data say of each parameter, and what only its prior says."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from armed_pyro.checks.check import Check, severity
from armed_pyro.checks.quantities import reported
from armed_pyro.inference.nested_weights import log_prior
from armed_pyro.inference.posterior import Posterior
from armed_pyro.program.units import original_variances
from armed_pyro.random_effects.grouping_factor import Factor
from armed_pyro.summaries.importance_statistics import prior_sensitivity

__all__ = [
    "boundary_checks",
    "coefficient_checks",
    "effective_clusters",
    "sensitivity_checks",
    "variance_checks",
]


Draws = Mapping[str, Tensor]
# Uncertainty that the data leave of an sd, relative to its prior's. With a half-t prior and
# balanced clusters whose means are known well, 2 clusters leave 0.64 or more, 3 clusters 0.51 to
# 0.68, 5 clusters 0.18 to 0.47.
MOSTLY_PRIOR, PRIOR_ALONE = 0.55, 0.62
PRIOR_DRAWS = 2000
NEAR_ZERO = 0.1  # posterior share of an sd near zero that is worth a note
# Sensitivity to power scaling that Kallioinen et al. (2024) call noticeable; the shift of an
# estimate in posterior sds, if its prior counts twice, that matters.
SENSITIVE, SHIFTED = 0.05, 0.3
# Posterior sd of a coefficient relative to its prior's: beyond 0.5 the prior has a quarter of the
# information, beyond 0.9 four fifths.
VAGUE, VERY_VAGUE = 0.5, 0.9


def effective_clusters(posterior: Posterior) -> dict[str, float]:
    """(sum n_k)^2 / sum n_k^2 by factor: the equivalent number of clusters of equal size."""
    counts = posterior.model.data_facts().counts
    names = [factor.name for factor in posterior.model.clustered_factors]
    return {
        name: float(counts[name].sum() ** 2 / (counts[name].double() ** 2).sum()) for name in names
    }


def variance_checks(posterior: Posterior, latents: Draws) -> Iterator[Check]:
    """Checks that the data, and not only the prior, say how large each sd is."""
    for factor in posterior.model.factors:
        with posterior.model.seeded(posterior.seed):
            shares = _prior_shares(factor, latents)
        if not shares:
            continue  # fixed by the prior
        term = max(shares, key=lambda name: shares[name])
        share, total = shares[term], len(posterior.model.data_facts().levels[factor.name])
        verdict = severity(share, MOSTLY_PRIOR, PRIOR_ALONE)
        source = "the rows" if factor.smooth else f"{total} clusters of {factor.name}"
        reason = f"{source} tell how large the sd of {term} is"
        if verdict != "pass":
            reason = f"the sd of {factor.name}[{term}] is mostly a guess from its prior"
        yield Check(
            "model",
            f"sd of {factor.name}" if factor.smooth else f"clusters of {factor.name}",
            verdict,
            f"{reason} (uncertainty {share:.0%} of the prior's"
            f"{'' if factor.smooth else f', {total} clusters'})",
            share,
            "uncertainty of the worst sd, as a share of its prior's",
            MOSTLY_PRIOR,
            advice=""
            if verdict == "pass"
            else "more rows, or a prior that you can justify"
            if factor.smooth
            else f"more clusters, {factor.name!r} as a feature, or a prior that you can justify",
            is_misfit=False,
        )


def _prior_shares(factor: Factor, latents: Draws) -> dict[str, float]:
    r"""Uncertainty of each term's sd that the data leave, relative to that of the prior.

    .. math:: \min\left(\frac{\log(q_{95} / q_{50})}{\log(q^0_{95} / q^0_{50})},
              \frac{P_0(q_5 < sd < q_{95})}{0.9}\right)

    with posterior quantiles q, and the prior's quantiles and probability with index 0. The first is
    large if the data give no upper limit, the second if the limit is beyond what the prior allows.
    """
    if factor.sd(latents).dim() < 3:
        return {}
    draws = _columns(latents[factor.sd_site], len(factor.sd_names))
    prior = factor.prior.density(factor.prior_scale).sample(torch.Size([PRIOR_DRAWS]))
    before = _columns(prior, len(factor.sd_names))
    grouped, shares = _units(factor), dict[str, float]()
    for place, term in enumerate(factor.sd_names):
        if term in grouped:
            continue
        low, middle, high = np.quantile(draws[:, place], [0.05, 0.5, 0.95])
        prior_middle, prior_high = np.quantile(before[:, place], [0.5, 0.95])
        upper = math.log(high / middle) / math.log(prior_high / prior_middle)
        inside = np.mean((before[:, place] > low) & (before[:, place] < high)) / 0.9
        shares[term] = float(np.fmin(upper, inside)) if np.isfinite(upper) else math.nan
    return shares


def _columns(values: Tensor, terms: int) -> Float[np.ndarray, "draws terms"]:
    return values.reshape(-1, terms).double().cpu().numpy()


def _units(factor: Factor) -> set[str]:
    """Terms of a hidden layer's units or filters, which are interpreted together, not singly."""
    names = [name for block in factor.blocks if block.width > 1 for name in block.names]
    return {term for term in factor.terms if any(term.startswith(name) for name in names)}


def boundary_checks(posterior: Posterior, latents: Draws) -> Iterator[Check]:
    """Checks that sds can be told from zero, on the original scale and at x = 0, as in tables."""
    for factor in posterior.model.factors:
        if factor.sd(latents).dim() < 3:
            continue  # fixed by the prior
        sds = original_variances(factor, dict(latents)).sqrt().double().cpu().numpy()
        grouped = _units(factor)
        for place, term in zip(factor.first_of_sd, factor.sd_names, strict=True):
            if factor.smooth:
                yield _boundary(term, sds[:, place], f"a straight line may do in place of {term}")
            elif term not in grouped:
                yield _boundary(f"{factor.name}[{term}]", sds[:, place])


def _boundary(name: str, sds: Float[np.ndarray, " draws"], advice: str = "") -> Check:
    # A uniform posterior on (0, a) has 18% of its mass below a fifth of its 90% quantile.
    low, median, high = (float(q) for q in np.quantile(sds, [0.05, 0.5, 0.95]))
    near = float(np.mean(sds < 0.2 * np.quantile(sds, 0.9)))
    verdict = severity(near if np.isfinite(sds).all() else math.nan, NEAR_ZERO)
    if verdict == "warn":  # a small sd is no fault of the model: the interval says all
        verdict = "note"
    can = "cannot" if verdict != "pass" else "can"
    return Check(
        "model",
        f"boundary of {name}",
        verdict,
        f"the sd of {name} {can} be told from zero: {median:.3g} [{low:.3g}, {high:.3g}], "
        f"{near:.0%} of its posterior lies near zero",
        near,
        "share of the posterior below a fifth of its 90% quantile",
        NEAR_ZERO,
        interval=(low, high),
        advice=""
        if verdict == "pass"
        else advice or f"report the interval, not the estimate; keep {name} if the design has it",
        is_misfit=False,
    )


def sensitivity_checks(posterior: Posterior, latents: Draws) -> Iterator[Check]:
    """Check that the priors hardly move the estimates."""
    units = {
        f"{factor.name}_sd[{term}]" for factor in posterior.model.factors for term in _units(factor)
    }
    distances = prior_sensitivity(posterior, latents)
    shifts = _prior_shifts(posterior, latents)
    if not posterior.model.linear:
        # Coefficients of a network's last layer, and beside it, are interpreted together with it.
        units |= {f"fixed_effect[{term}]" for term in posterior.model.network_terms()}
    names = [name for name in distances if name in shifts and name not in units]
    if not names:
        return
    moved = [name for name in names if distances[name] > SENSITIVE and shifts[name] >= SHIFTED]
    worst = max(moved or names, key=lambda name: shifts[name])
    shown = ", ".join(moved[:3]) + (", ..." if len(moved) > 3 else "")
    shift = shifts[worst]
    verdict = severity(shift, SHIFTED, noise=not moved)
    reason = f"the priors hardly move the estimates: {worst} by {shift:.2f} posterior sds"
    if moved:
        reason = f"the priors influence {shown}: they move {worst} by {shift:.2f} posterior sds"
    yield Check(
        "model",
        "prior sensitivity",
        verdict,
        f"{reason} if they count twice (power-scaling sensitivity {distances[worst]:.2f})",
        shift,
        "shift of the estimate if the priors count twice, in posterior sds",
        SHIFTED,
        advice=""
        if verdict == "pass"
        else "the data say little of it, or contradict the prior: justify the prior, or change it",
        is_misfit=False,
    )


def _prior_shifts(posterior: Posterior, latents: Draws) -> dict[str, float]:
    """Shift of every quantity's mean if all priors are squared, to first order, in posterior sds.

    The mean of h moves by Cov(h, log prior) log 2 for each doubling of the prior's power.
    """
    prior = log_prior(posterior.model, latents).double().cpu().numpy()
    if not np.isfinite(prior).all():
        raise ValueError("the prior's density is not finite in some draws")
    shifts = dict[str, float]()
    for name, draws in reported(posterior, latents).items():
        spread = float(draws.std())
        if len(draws) == len(prior) and spread > 0:
            moved = float(np.mean((draws - draws.mean()) * (prior - prior.mean())))
            shifts[name] = abs(moved) * math.log(2) / spread
    return shifts


def coefficient_checks(posterior: Posterior, latents: Draws) -> Iterator[Check]:
    """Check that the data, and not only the prior, determine each coefficient of a linear model."""
    model = posterior.model
    if not model.linear:
        return
    terms = model.fixed_terms()
    draws = latents["fixed_effect"].reshape(-1, len(terms)).double()
    prior = model.fixed_prior().stddev
    ratios = dict(zip(terms, (draws.std(0) / prior).tolist(), strict=True))
    if not torch.isfinite(draws).all():
        raise ValueError("the draws of the coefficients are not finite")
    if not ratios:
        return
    worst = max(ratios, key=lambda name: ratios[name])
    vague = [name for name, ratio in ratios.items() if ratio >= VAGUE]
    shown = ", ".join(vague[:3]) + (", ..." if len(vague) > 3 else "")
    verdict = severity(ratios[worst], VAGUE, VERY_VAGUE)
    reason = "the data determine all coefficients"
    if vague:
        reason = f"the coefficients of {shown} are mostly their prior"
    yield Check(
        "model",
        "coefficients",
        verdict,
        f"{reason} (posterior sd of {worst} {ratios[worst]:.0%} of the prior's)",
        ratios[worst],
        "posterior sd of the worst coefficient, as a share of its prior's",
        VAGUE,
        advice=""
        if not vague
        else "see the checks of the design: collinear columns or separation; or leave them out",
        is_misfit=False,
    )
