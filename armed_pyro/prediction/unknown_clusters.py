"""Rows whose cluster's label is missing: their identity is unknown, and their features tell of it.

A missing label is no new cluster: the row is of one of the clusters of the population, and most
likely of a seen one whose features it shares. Its random effects are therefore those of the mode
"membership", row by row, whatever the mode for new clusters is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import final

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.inference.posterior import Posterior
from armed_pyro.prediction.cluster_classifier import Classifiers
from armed_pyro.prediction.similarity import Resembling, gather_evidence
from armed_pyro.prediction.unseen import EffectSource
from armed_pyro.program.model import MixedEffects
from armed_pyro.random_effects.covariance import Latents
from armed_pyro.random_effects.grouping_factor import Factor

__all__ = ["filled", "named", "unknown_rows", "with_labels", "with_membership"]

MARK = "(unknown cluster, row"


def with_labels(table: pd.DataFrame, clusters: Collection[str], start: int = 0) -> pd.DataFrame:
    """The table with a label of its own for each row in the place of a missing label.

    The rows are numbered from `start`.

    >>> with_labels(pd.DataFrame({"site": ["a", None]}), ["site"])["site"].tolist()
    ['a', '(unknown cluster, row 1)']
    """
    columns: dict[str, pd.Series] = {}
    for name in clusters:
        if name in table and (missing := table[name].isna().to_numpy()).any():
            numbers = start + np.flatnonzero(missing)
            column = table[name].astype(object)
            column[missing] = [f"{MARK} {number})" for number in numbers]
            columns[name] = column
    return table.assign(**columns) if columns else table


def filled(frames: Iterable[pd.DataFrame], clusters: Collection[str]) -> Iterator[pd.DataFrame]:
    """Blocks of a table as `with_labels` gives them, with rows numbered from the first block."""
    start = 0
    for frame in frames:
        yield with_labels(frame, clusters, start)
        start += len(frame)


def _unknown(labels: Iterable[object]) -> Bool[np.ndarray, " labels"]:
    """Whether labels, also of cells ``a:b``, stand for a missing one."""
    return np.array([isinstance(x, str) and MARK in x for x in labels], dtype=bool)


def named(labels: pd.Index) -> pd.Index:
    """The labels that do not stand for a missing one."""
    return labels[~_unknown(labels)]


def unknown_rows(model: MixedEffects, data: ClusteredData) -> Bool[np.ndarray, " rows"]:
    """Rows whose cluster of some factor is unknown."""
    rows = np.zeros(data.n_rows, dtype=bool)
    for factor in model.factors:
        grouping = data.grouping(factor.name)
        rows |= _unknown(grouping.levels)[grouping.codes.numpy()]
    return rows


@final
@dataclass(frozen=True, eq=False)
class PartlyUnknown(EffectSource):
    """Effects of new clusters from one source, and of unknown ones from their features."""

    latents: Latents
    new: EffectSource
    unknown: Resembling

    def effects(
        self, factor: Factor, labels: pd.Index
    ) -> tuple[Float[Tensor, "draws new terms"], list[str]]:
        missing = _unknown(labels)
        if not missing.any():
            return self.new.effects(factor, labels)
        values, modes = self.unknown.effects(factor, labels[missing])
        others, other_modes = self.new.effects(factor, labels[~missing])
        order = np.argsort(np.concatenate([np.flatnonzero(missing), np.flatnonzero(~missing)]))
        joined, listed = torch.cat([values, others], 1), [*modes, *other_modes]
        return joined[:, torch.from_numpy(order)], [listed[place] for place in order]


def with_membership(
    posterior: Posterior,
    source: EffectSource,
    data: ClusteredData,
    classifiers: Classifiers,
    seed: int | None,
) -> EffectSource:
    """A source of effects that also knows those of unknown clusters in these rows."""
    rows = unknown_rows(posterior.model, data)
    if not rows.any():
        return source
    evidence = gather_evidence(posterior, data.take(rows), classifiers)
    seed = posterior.seed if seed is None else seed
    return PartlyUnknown(source.latents, source, Resembling(source.latents, seed, evidence))
