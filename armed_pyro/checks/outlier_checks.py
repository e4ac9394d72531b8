"""Checks of single clusters and rows: outliers, and clusters with a large influence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np
import pandas as pd
import scipy
from jaxtyping import Float
from torch import Tensor

from armed_pyro.checks.check import Check, severity
from armed_pyro.checks.findings import Kind, unchecked
from armed_pyro.checks.quantile_residuals import MOST_DRAWS, QuantileResiduals
from armed_pyro.checks.score_tests import Tested
from armed_pyro.checks.spread_checks import DISPERSION_FIRST
from armed_pyro.guides.base import selected
from armed_pyro.inference.posterior import Posterior

__all__ = ["outlier_checks"]


CLUSTERS = Kind("outlying clusters", "distance from the mean, in sds,", 3.0, 6.0)
ROWS = Kind("outlying rows", "size of the residual, in sds,", 4.0, 8.0)
INFLUENCE, INFLUENTIAL = "influence of clusters", 1.5
MOST_WORST = 20
MOST_EFFECTS = 2**22


def outlier_checks(
    posterior: Posterior,
    latents: Mapping[str, Tensor],
    residuals: QuantileResiduals,
) -> Iterator[Check]:
    """Checks of single clusters and rows."""
    yield from _clusters(posterior, latents)
    if residuals.z is not None:
        yield _rows(posterior, residuals, residuals.z)
    yield from _influence(posterior)


def _worst(
    effect: Float[np.ndarray, " units"], p: Float[np.ndarray, " units"], name: Callable[[int], str]
) -> list[Tested]:
    """Tests of the units with the smallest p-values, for Holm's correction of all units.

    Only these can be significant, and lists of thousands of tests would take time.
    """
    worst = np.argsort(p)[:MOST_WORST]
    factor = len(p) / len(worst)
    return [Tested(name(int(i)), float(effect[i]), min(1.0, float(p[i]) * factor)) for i in worst]


def _clusters(posterior: Posterior, latents: Mapping[str, Tensor]) -> Iterator[Check]:
    r"""Clusters whose whitened effects :math:`|L^{-1} u_k|^2` are too large for a chi-square."""
    tests = list[Tested]()
    for factor in posterior.model.clustered_factors:
        effects = latents[factor.effect_site]
        if effects.dim() < 3 or effects.shape[1] < 5 or effects.shape[-1] > 50:
            continue
        drawn = selected(
            latents, slice(max(5, min(MOST_DRAWS, MOST_EFFECTS // effects[0].numel())))
        )
        z = factor.whitened(drawn)
        squares = z.square().sum(-1).double().cpu().numpy()  # draws clusters
        p = np.median(scipy.stats.chi2.sf(squares, z.shape[-1]), axis=0)
        distance = np.sqrt(squares.mean(0))
        labels = posterior.model.data_facts().levels[factor.name]
        tests += _worst(distance, p, partial(_label, factor.name, labels))
    if not tests:
        if posterior.model.clustered_factors:
            yield unchecked(CLUSTERS.name, "too few clusters")
        return
    yield CLUSTERS.judge(
        tests,
        "no cluster lies far outside the others",
        "clusters far outside the others: {}",
        lambda test: (
            "look at the rows of these clusters: errors of the data, or a feature that sets them "
            "apart"
        ),
    )


def _label(factor: str, levels: pd.Index, place: int) -> str:
    return f"{levels[place]} ({factor})"


def _rows(
    posterior: Posterior, residuals: QuantileResiduals, z: Float[np.ndarray, "rows draws"]
) -> Check:
    if residuals.dispersed:
        return unchecked(ROWS.name, DISPERSION_FIRST)
    labels, first = posterior.data.row_labels, residuals.first
    z = z[first]
    p = np.median(2 * scipy.stats.norm.sf(np.abs(z)), axis=1)
    size = np.abs(z).mean(1)
    tests = _worst(size, p, lambda i: str(labels[residuals.index[first[i]]]))
    return ROWS.judge(
        tests,
        "no row is an outlier",
        "rows far from what is expected: {}",
        lambda test: "look at these rows: errors of the data, or a family with heavier tails",
    )


def _influence(posterior: Posterior) -> Iterator[Check]:
    """Shift of the fixed effects if a cluster is left out, by importance weights.

    Sds are not judged: without the cluster with the largest effect, an sd is always smaller.
    """
    nested, weighted = posterior.guide.nested_name(), posterior.importance
    if weighted is None or nested is None or not weighted.clusters.size:
        return
    value = weighted.latents.get("fixed_effect")
    if value is None:
        return
    draws = value.reshape(len(value), -1).double().cpu().numpy()
    mean = weighted.weights @ draws
    sd = np.sqrt(weighted.weights @ (draws - mean) ** 2)
    if not (sd > 0).any():
        return
    draws, mean, sd = draws[:, sd > 0], mean[sd > 0], sd[sd > 0]
    watched = np.flatnonzero(~np.isnan(weighted.cluster_k_hat))
    smoothed, k_hat = weighted.left_out
    # clusters quantities
    shift = np.abs(np.exp(smoothed) @ weighted.of_clusters(draws) - mean) / sd
    largest = shift.max(1)
    worst = int(largest.argmax())
    label = posterior.model.data_facts().levels[nested][watched[worst]]
    word = severity(float(largest[worst]), INFLUENTIAL)
    guess = " or more (its weights are unreliable)" if k_hat[worst] > 0.7 else ""
    reason = (
        f"without cluster {label} of {nested}, a fixed effect would move by "
        f"{largest[worst]:.1f} posterior sds{guess} (importance weights)"
    )
    advice = f"fit without cluster {label} and compare" if word != "pass" else ""
    yield Check(
        "model",
        INFLUENCE,
        word,
        reason,
        effect=float(largest[worst]),
        effect_name="shift of a fixed effect, in posterior sds",
        threshold=INFLUENTIAL,
        advice=advice,
        is_misfit=False,
    )
