"""Influence of single clusters and rows on the fixed effects, by importance weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from armed_pyro.checks.check import Check, severity
from armed_pyro.guides.base import n_draws, selected
from armed_pyro.inference.posterior import Posterior
from armed_pyro.inference.psis import pareto_smooth
from armed_pyro.program.model import log_likelihoods
from armed_pyro.program.predictor import modulates

__all__ = ["cluster_influence", "row_influence"]


# Shift of a fixed effect, in posterior sds, that is reported.
INFLUENTIAL = 1.5
# Draws of rows, values of their log-likelihoods, and rows that are left out.
FEWEST_DRAWS, MOST_DRAWS, MOST_VALUES, MOST_LEFT_OUT = 100, 1000, 2**22, 100
UNRELIABLE = 0.7  # k-hat


def cluster_influence(posterior: Posterior) -> Iterator[Check]:
    """Shift of the fixed effects if a cluster is left out.

    Sds are not judged: without the cluster with the largest effect, an sd is always smaller.
    """
    nested, weighted = posterior.guide.nested_name(), posterior.importance
    if weighted is None or nested is None or not weighted.clusters.size:
        return
    draws = _fixed_effects(weighted.latents)
    if draws is None:
        return
    mean, sd = _moments(draws, weighted.weights)
    watched = np.flatnonzero(~np.isnan(weighted.cluster_k_hat))
    smoothed, k_hat = weighted.left_out
    shift = _shifts(np.exp(smoothed), weighted.of_clusters(draws), mean, sd)
    worst = int(shift.argmax())
    label = posterior.model.data_facts().levels[nested][watched[worst]]
    yield _judged("clusters", f"cluster {label} of {nested}", shift[worst], k_hat[worst])


def row_influence(
    posterior: Posterior, latents: Mapping[str, Tensor], index: Int[np.ndarray, " rows"]
) -> Iterator[Check]:
    r"""Shift of the fixed effects if a row of `index` is left out.

    .. math:: |E[\beta \mid y_{-i}] - E[\beta \mid y]| / sd(\beta \mid y), \quad
        w_s \propto 1 / p(y_i \mid \eta_s)

    Only the rows whose log-likelihoods vary most over the draws are left out, as the weights of
    the others are nearly equal. Nothing is said where most clusters of a factor are single rows:
    the effect of a row is fitted to it, so that its weights are those of few draws.
    `cluster_influence` integrates these effects out.
    """
    model, index = posterior.model, np.unique(index)
    most = min(MOST_DRAWS, max(FEWEST_DRAWS, MOST_VALUES // len(index)))
    drawn = selected(latents, slice(most))
    draws = _fixed_effects(drawn)
    of_rows = any(2 * len(ls) > posterior.data.n_rows for ls in model.data_facts().levels.values())
    if draws is None or n_draws(drawn) < FEWEST_DRAWS or modulates(model) or of_rows:
        return
    source = model.encode(posterior.data)
    rows = source.dense_batch(torch.from_numpy(index).to(source.like.device))
    with torch.no_grad():
        value = log_likelihoods(model, rows, drawn, others=False)[model.data_facts().outcome_name]
    by_row = value.reshape(-1, len(index)).double().cpu().numpy().T
    chosen = np.argsort(-by_row.std(1))[:MOST_LEFT_OUT]
    smoothed, k_hat = pareto_smooth(-by_row[chosen])
    mean, sd = _moments(draws, np.full(len(draws), 1 / len(draws)))
    shift = _shifts(np.exp(smoothed), draws, mean, sd)
    worst = int(shift.argmax())
    label = posterior.data.row_labels[index[chosen[worst]]]
    yield _judged("rows", f"row {label}", shift[worst], k_hat[worst])


def _fixed_effects(latents: Mapping[str, Tensor]) -> Float[np.ndarray, "draws effects"] | None:
    """Coefficients that vary over the draws; None if there are none."""
    value = latents.get("fixed_effect")
    if value is None or value.dim() < 2:
        return None
    draws = value.reshape(len(value), -1).double().cpu().numpy()
    varying = np.ptp(draws, axis=0) > 0
    return draws[:, varying] if varying.any() else None


def _moments(
    draws: Float[np.ndarray, "draws effects"], weights: Float[np.ndarray, " draws"]
) -> tuple[Float[np.ndarray, " effects"], Float[np.ndarray, " effects"]]:
    mean = weights @ draws
    return mean, np.sqrt(weights @ (draws - mean) ** 2)


def _shifts(
    weights: Float[np.ndarray, "units draws"],
    draws: Float[np.ndarray, "draws effects"],
    mean: Float[np.ndarray, " effects"],
    sd: Float[np.ndarray, " effects"],
) -> Float[np.ndarray, " units"]:
    """Largest shift over the effects, of each unit."""
    kept = sd > 0
    moved = np.abs(weights @ draws[:, kept] - mean[kept]) / sd[kept]
    return moved.max(1, initial=0.0)


def _judged(units: str, unit: str, shift: float, k_hat: float) -> Check:
    word = severity(float(shift), INFLUENTIAL)
    guess = " or more (its weights are unreliable)" if k_hat > UNRELIABLE else ""
    return Check(
        "model",
        f"influence of {units}",
        word,
        f"without {unit}, a fixed effect would move by {shift:.1f} posterior sds{guess} "
        "(importance weights)",
        effect=float(shift),
        effect_name="shift of a fixed effect, in posterior sds",
        threshold=INFLUENTIAL,
        advice="" if word == "pass" else f"fit without {unit} and compare",
        is_misfit=False,
    )
