"""Random effects of clusters not seen in training: the modes, and where their draws come from."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.data.grouping import Grouping
from armed_pyro.program.data_spec import Facts
from armed_pyro.program.model import MixedEffects
from armed_pyro.random_effects.grouping_factor import Factor

__all__ = ["MODES", "EffectSource", "Marginal", "Population", "apart", "check_mode", "label_noise"]


Latents = Mapping[str, Tensor]

MODES: Mapping[str, str] = {
    "population": "random effects zero: the fixed effects alone, with no cluster uncertainty",
    "marginal": "random effects drawn from N(0, D): a new cluster of the same population",
    "membership": "those of a seen cluster, drawn by how much the new one's features resemble it",
    "nearest": "those of the seen cluster that the new one's features resemble most",
    "adapt": "their posterior given a few labelled rows of the new clusters (the support)",
}
# Bytes of noise that are kept for the next block of rows.
MOST_KEPT = 2**28


class EffectSource(ABC):
    """Where new clusters get their random effects from, given the posterior draws.

    Attributes
    ----------
    latents : mapping of str to Tensor
        Draws of all latent sites, which the seen clusters' effects are read off.
    """

    latents: Latents

    @abstractmethod
    def effects(
        self, factor: Factor, labels: pd.Index
    ) -> tuple[Float[Tensor, "draws new terms"], list[str]]:
        """Effects of these new clusters, in standardised units, and the mode used for each.

        They depend on a cluster's label, not on which others are asked for.
        """


@dataclass(frozen=True, eq=False)
class Population(EffectSource):
    """u = 0: the fixed effects alone.

    Examples
    --------
    ``fit.predict(rows, unseen="population")``
    """

    latents: Latents

    def effects(self, factor: Factor, labels: pd.Index) -> tuple[Tensor, list[str]]:
        seen = self.latents[factor.effect_site]
        zero = seen.new_zeros(len(seen), len(labels), seen.shape[-1])
        return zero, ["population"] * len(labels)


@dataclass(frozen=True, eq=False)
class Marginal(EffectSource):
    r"""u = L z with :math:`L L^\top = D` of the same posterior draw and z standard normal.

    Attributes
    ----------
    seed : int
        The noise z of a cluster is made from this seed and its label.

    Examples
    --------
    ``fit.predict(rows, unseen="marginal")``
    """

    latents: Latents
    seed: int
    _kept: dict[tuple[str, str], np.ndarray] = field(default_factory=dict, repr=False)

    def effects(self, factor: Factor, labels: pd.Index) -> tuple[Tensor, list[str]]:
        seen = self.latents[factor.effect_site]
        noise = label_noise(self.seed, factor.name, labels, seen, self._kept)
        return scaled(factor, self.latents, noise), ["marginal"] * len(labels)


def scaled(factor: Factor, latents: Latents, z: Float[Tensor, "draws new terms"]) -> Tensor:
    """u = L z, with L of the same draw."""
    scale = factor.scale(latents)  # which has a 1 in the clusters' place
    return scale * z if factor.diagonal else z @ scale.squeeze(-3).mT


def label_noise(
    seed: int,
    factor: str,
    labels: Sequence[object] | pd.Index,
    like: Float[Tensor, "draws clusters terms"],
    kept: dict[tuple[str, str], np.ndarray] | None = None,
) -> Float[Tensor, "draws new terms"]:
    """Standard normal noise of clusters, a function of seed, factor and label alone.

    So all rows of a cluster share it, in whichever order and blocks they come.

    Parameters
    ----------
    like : Tensor
        Effects of the seen clusters, which give draws, terms, precision and device.
    kept : dict, optional
        Noise made before, by factor and label; as much is added as memory allows.

    Examples
    --------
    >>> like = torch.zeros(2, 1, 1)
    >>> both = label_noise(0, "site", ["a", "b"], like)
    >>> bool((both[:, 1:] == label_noise(0, "site", ["b"], like)).all())
    True
    """
    draws, terms = like.shape[0], like.shape[-1]
    kept = {} if kept is None else kept
    pieces = []
    for label in labels:
        key = (factor, str(label))
        found = kept.get(key)
        if found is None:
            found = generator(seed, *key).standard_normal((draws, terms), dtype=np.float32)
            if len(kept) * found.nbytes < MOST_KEPT:
                kept[key] = found
        pieces.append(found)
    stacked = np.stack(pieces) if pieces else np.zeros((0, draws, terms), np.float32)
    return torch.from_numpy(stacked).to(like).transpose(0, 1)


def generator(seed: int, *names: str) -> np.random.Generator:
    """A generator of random numbers of its own for every seed and names."""
    text = "\0".join([str(seed), *names]).encode()
    key = int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key))


def new_clusters(facts: Facts, model: MixedEffects, data: ClusteredData) -> dict[str, pd.Index]:
    """Labels of the clusters that were not seen in training, by factor with random effects."""
    levels = facts.levels_with(data)
    return {f.name: levels[f.name][len(facts.levels[f.name]) :] for f in model.factors}


def check_mode(unseen: str | None, new: Mapping[str, pd.Index], *, support: bool = False) -> None:
    """Raise ValueError unless a mode is given where clusters are new, and is one of `MODES`.

    Examples
    --------
    >>> check_mode("marginal", {"site": pd.Index(["s9"])})
    """
    modes = "\n".join(f"  {name}: {meaning}" for name, meaning in MODES.items())
    if unseen is not None and unseen not in MODES:
        raise ValueError(f"unknown mode {unseen!r} for unseen clusters; the modes are\n{modes}")
    if support and unseen != "adapt":
        raise ValueError(
            f"support rows are used by the mode 'adapt' only, found the mode {unseen!r}: pass "
            "unseen='adapt' (command line: --unseen adapt), or leave the support out"
        )
    if unseen is None and any(len(labels) for labels in new.values()):
        lines = []
        for factor, labels in new.items():
            if len(labels):
                shown = ", ".join(sorted(map(str, labels))[:5]) + ", ..." * (len(labels) > 5)
                lines.append(f"{len(labels)} of {factor!r} ({shown})")
        raise ValueError(
            f"the rows have clusters that were not seen in training: {'; '.join(lines)}. Say with "
            f"unseen=... (command line: --unseen) what to assume of them:\n{modes}"
        )
    if unseen == "adapt" and not support and any(len(labels) for labels in new.values()):
        raise ValueError(
            "the mode 'adapt' needs labelled rows of the new clusters: pass support=rows (command "
            "line: --support FILE). Without any, the mode 'marginal' is what it would give"
        )


def apart(model: MixedEffects, data: ClusteredData, start: int = 0) -> ClusteredData:
    """The rows, each row of a new cluster as a cluster of its own.

    Parameters
    ----------
    start : int
        Number of the first row, by which the clusters are named.
    """
    facts, groupings = model.data_facts(), dict(data.groupings)
    levels = facts.levels_with(data)
    for factor in model.factors:
        grouping = data.grouping(factor.name)
        labels = grouping.labels().astype(object)
        codes = model.encode(data, levels).codes[factor.name].cpu().numpy()
        seen = codes < len(facts.levels[factor.name])
        rows = np.arange(start, start + len(labels))
        own = [
            one if known else f"{one} (row {row})"
            for one, known, row in zip(labels, seen, rows, strict=True)
        ]
        groupings[factor.name] = Grouping.from_labels(pd.Series(own, dtype=object), factor.name)
    return replace(data, groupings=groupings)
