"""Random effects of clusters not seen in training: the modes, and the sources of draws."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from armed_pyro._messages import check_type, listing
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.data.grouping import Grouping
from armed_pyro.prediction.cell_draws import CellDraws
from armed_pyro.prediction.label_noise import label_noise
from armed_pyro.program.model import MixedEffects
from armed_pyro.random_effects.covariance import Latents
from armed_pyro.random_effects.grouping_factor import Factor

__all__ = [
    "MODES",
    "RESEMBLING",
    "EffectSource",
    "Marginal",
    "Population",
    "check_mode",
    "new_clusters",
    "one_cluster_per_row",
    "warn_if_all_new",
]

MODES: Mapping[str, str] = {
    "population": "random effects zero: the fixed effects alone, with no cluster uncertainty",
    "marginal": "random effects drawn from N(0, D): a new cluster of the same population",
    "membership": "those of a seen cluster, drawn by how much the new one's features resemble it",
    "nearest": "those of the seen cluster that the new one's features resemble most",
    "adapt": "their posterior given a few labelled rows of the new clusters (the support)",
}
RESEMBLING = ("membership", "nearest")  # the modes that compare features


class EffectSource(ABC):
    """Source of the random effects of new clusters, one draw for each posterior draw."""

    latents: Latents  # posterior draws of all sites, including the effects of seen clusters

    @abstractmethod
    def effects(
        self, factor: Factor, labels: pd.Index
    ) -> tuple[Float[Tensor, "draws new terms"], list[str]]:
        """Effects of these new clusters, in standardised units, and the mode used for each.

        The effects of a cluster depend on its label, and not on the other labels of the call; those
        of a process at new cells are joint with all cells of earlier calls. New cells of seen
        clusters have the mode "".
        """


@dataclass(frozen=True, eq=False)
class Population(EffectSource):
    """u = 0: the fixed effects alone."""

    latents: Latents
    seed: int = 0  # of processes of seen clusters at new times
    _cells: CellDraws = field(default_factory=CellDraws, repr=False)

    def effects(self, factor: Factor, labels: pd.Index) -> tuple[Tensor, list[str]]:
        if factor.process is not None:
            return self._cells.effects(factor, labels, self.latents, "population", self.seed)
        seen = self.latents[factor.effect_site]
        zero = seen.new_zeros(len(seen), len(labels), seen.shape[-1])
        return zero, ["population"] * len(labels)


@dataclass(frozen=True, eq=False)
class Marginal(EffectSource):
    r"""u = L z with :math:`L L^\top = D` of the same posterior draw and z standard normal."""

    latents: Latents
    seed: int  # the noise z of a cluster is a function of this seed and its label
    _kept: dict[tuple[str, str], np.ndarray] = field(default_factory=dict, repr=False)
    _cells: CellDraws = field(default_factory=CellDraws, repr=False)

    def effects(self, factor: Factor, labels: pd.Index) -> tuple[Tensor, list[str]]:
        if factor.process is not None:
            return self._cells.effects(factor, labels, self.latents, "marginal", self.seed)
        seen = self.latents[factor.effect_site]
        noise = label_noise(self.seed, factor.name, labels, seen, self._kept)
        effects = factor.effects_of(self.latents, noise)
        return effects, ["marginal"] * len(labels)


def new_clusters(model: MixedEffects, data: ClusteredData) -> dict[str, pd.Index]:
    """Labels of the clusters not seen in training, for each factor with random effects."""
    facts = model.data_facts()
    levels = facts.levels_with(data)
    return {f.name: levels[f.name][len(facts.levels[f.name]) :] for f in model.factors}


def check_mode(
    unseen: str | None,
    new: Mapping[str, pd.Index],
    trained: Mapping[str, pd.Index],
    *,
    support: bool = False,
) -> None:
    """Check that the mode is one of `MODES`, is set if clusters are new, and has its support.

    `trained` has the clusters of the training data, which the message shows beside the new ones.

    >>> check_mode("marginal", {"site": pd.Index(["s9"])}, {"site": pd.Index(["s1", "s2"])})
    """
    modes = "\n".join(f"  {name}: {meaning}" for name, meaning in MODES.items())
    check_type(unseen, (str, type(None)), "`unseen`")
    if unseen is not None and unseen not in MODES:
        raise ValueError(f"unknown mode {unseen!r} for unseen clusters; the modes are\n{modes}")
    if support and unseen != "adapt":
        raise ValueError(
            f"support rows are used by the mode 'adapt' only, found the mode {unseen!r}: pass "
            "unseen='adapt' (command line: --unseen adapt), or leave the support out"
        )
    some_new = any(map(len, new.values()))
    if unseen is None and some_new:
        lines = [
            f"{len(labels)} of {factor!r} "
            f"({listing(sorted(map(str, labels)), 5)}; training had {listing(trained[factor], 3)})"
            for factor, labels in new.items()
            if len(labels)
        ]
        raise ValueError(
            f"the rows have clusters that were not seen in training: {'; '.join(lines)}. Say with "
            f"unseen=... (command line: --unseen) what to assume of them:\n{modes}"
        )
    if unseen == "adapt" and not support and some_new:
        raise ValueError(
            "the mode 'adapt' needs labelled rows of the new clusters: pass support=rows (command "
            "line: --support FILE). Without such rows, use 'marginal', which then gives the same"
        )


def warn_if_all_new(
    model: MixedEffects, labels: Mapping[str, pd.Index], new: Mapping[str, pd.Index]
) -> None:
    """Warn of each factor all of whose clusters in the rows, `labels`, are new.

    Labels that are written differently than in training have this effect, too. Clusters inside
    clusters that are all new are not mentioned.
    """
    told: list[str] = []
    for factor in model.factors:
        name = factor.name
        some = name in new and len(labels[name])
        if factor.process is not None or not some or len(new[name]) < len(labels[name]):
            continue
        if not any(name.startswith(f"{outer}:") for outer in told):
            warnings.warn(
                f"no cluster of {name!r} in these rows was seen in training, so that none gets "
                f"its estimated random effects. The rows have {listing(labels[name], 3)}; training "
                f"had {listing(model.data_facts().levels[name], 3)}",
                UserWarning,
                stacklevel=3,
            )
        told.append(name)


def one_cluster_per_row(model: MixedEffects, data: ClusteredData, start: int = 0) -> ClusteredData:
    """The same rows, each row of a new cluster as a separate cluster, named by the row's number.

    The rows are numbered from `start`.
    """
    facts, groupings = model.data_facts(), dict(data.groupings)
    levels = facts.levels_with(data)
    for factor in model.factors:
        grouping = data.grouping(factor.name)
        labels = grouping.labels().astype(object)
        ends = [""] * len(labels)
        if factor.process is not None:  # a cell keeps its time
            ends = [f":{str(label).rpartition(':')[2]}" for label in labels]
        codes = model.encode(data, levels).codes[factor.name].cpu().numpy()
        seen = codes < len(facts.levels[factor.name])
        rows = np.arange(start, start + len(labels))
        by_row = [
            label if known else f"{str(label).removesuffix(end)} (row {row}){end}"
            for label, known, row, end in zip(labels, seen, rows, ends, strict=True)
        ]
        groupings[factor.name] = Grouping.from_labels(pd.Series(by_row, dtype=object), factor.name)
    return replace(data, groupings=groupings)
