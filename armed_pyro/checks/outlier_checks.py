"""Checks of single clusters and rows: outliers, and those with a large influence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np
import pandas as pd
import scipy
from jaxtyping import Float
from torch import Tensor

from armed_pyro.checks.check import Check
from armed_pyro.checks.findings import Kind, unchecked
from armed_pyro.checks.influence import cluster_influence, row_influence
from armed_pyro.checks.quantile_residuals import MOST_DRAWS, QuantileResiduals
from armed_pyro.checks.score_tests import Tested
from armed_pyro.checks.spread_checks import DISPERSION_FIRST
from armed_pyro.guides.base import selected
from armed_pyro.inference.posterior import Posterior

__all__ = ["outlier_checks"]


CLUSTERS = Kind("outlying clusters", "distance from the mean, in sds,", 3.0, 6.0)
ROWS = Kind("outlying rows", "size of the residual, in sds,", 4.0, 8.0)
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
    yield from cluster_influence(posterior)
    yield from row_influence(posterior, latents, residuals.index)


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
