"""`HeldOut`: the parts of the rows that are held out while a network is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from armed_pyro.program.model import MixedEffects
from armed_pyro.rows.in_memory import HeldRows
from armed_pyro.rows.source import RowSource
from armed_pyro.streaming.on_disk import StreamedRows

__all__ = ["HeldOut", "StreamedPart"]

# Fewest clusters of which whole ones are held out. Networks that never see one of two clusters
# would say nothing of new rows in it.
FEWEST_CLUSTERS = 5
# Parts of which one is held out, where one network alone is stopped.
SINGLE = 5
# Most rows of a file that stop a network.
MOST_STREAMED = 20_000


@dataclass(frozen=True, eq=False)
class HeldOut:
    """A division of the rows into parts, each held out from the training of one network.

    Attributes
    ----------
    fold : Int[Tensor, "rows"]
        Part of each row.
    folds : int
        Number of parts that are held out in turn: all of them, or the first one only.
    factor : str or None
        The factor whose clusters are never divided; None if rows are held out.
    of_cluster : Int[Tensor, "clusters"]
        Part of each of its clusters; empty without one.

    Examples
    --------
    >>> from armed_pyro import ClusteredData
    >>> from torch import nn
    >>> site = [row // 3 for row in range(30)]
    >>> data = ClusteredData.from_arrays([[0.0], [1.0]] * 15, [0.0, 1.0] * 15, {"site": site})
    >>> model = MixedEffects(nn.Linear(1, 1), "(1 | site)").bind(data)
    >>> held_out = HeldOut.of(model, model.encode(data), folds=5, seed=0)
    >>> held_out.factor, torch.bincount(held_out.fold).tolist()
    ('site', [6, 6, 6, 6, 6])
    """

    fold: Int[Tensor, " rows"]
    folds: int
    factor: str | None
    of_cluster: Int[Tensor, " clusters"]

    @classmethod
    def of(
        cls, model: MixedEffects, source: HeldRows, *, folds: int, seed: int, by_rows: bool = False
    ) -> HeldOut:
        """Divide the rows at random: by whole clusters if a factor has enough, else by rows.

        With `by_rows`, they are divided by rows whatever the clusters. With ``folds=1`` there are
        five parts, of which one is held out.
        """
        rng = np.random.default_rng([seed, 18])
        factor = None if by_rows else _dividing_factor(model, source)
        parts = SINGLE if folds == 1 else folds
        if factor is None:
            order = rng.permutation(len(source))
            fold = np.empty(len(source), dtype=np.int64)
            fold[order] = np.arange(len(source)) % parts
            none = torch.zeros(0, dtype=torch.long)
            held = cls(torch.from_numpy(fold), min(folds, len(source)), None, none)
        else:
            counts = source.counts[factor].cpu().numpy()
            of_cluster = torch.from_numpy(_balanced(counts, parts, rng))
            fold_of_rows = of_cluster[source.codes[factor].cpu()]
            held = cls(fold_of_rows, min(folds, len(counts)), factor, of_cluster)
        return held

    def split(self, number: int, source: RowSource) -> tuple[RowSource, HeldRows]:
        """The training rows of the network for this part, and the rows of the part."""
        assert isinstance(source, HeldRows)  # for mypy; others have a `StreamedPart`
        fold = self.fold.to(source.x.device)
        return _part(source, fold != number), _part(source, fold == number)


@dataclass(frozen=True, eq=False)
class StreamedPart:
    """One part of rows in files, which are held out in memory, and a source of the rest.

    The other fields are those of `HeldOut`: there is one part, and no networks to choose from.
    """

    rest: RowSource
    held: HeldRows
    folds: int = 1
    factor: None = None

    @classmethod
    def of(cls, model: MixedEffects, source: StreamedRows) -> StreamedPart:
        """About a fifth of the rows, at most `MOST_STREAMED`: whole clusters if they are enough."""
        factor = model.largest_factor()
        if factor is not None and len(source.counts[factor]) < FEWEST_CLUSTERS:
            factor = None
        rest, held = source.divided(factor, min(len(source) // SINGLE, MOST_STREAMED))
        return cls(rest, model.encode(held))

    @property
    def fold(self) -> Int[Tensor, " rows"]:
        """The part of each held-out row."""
        return torch.zeros(len(self.held), dtype=torch.long)

    @property
    def of_cluster(self) -> Int[Tensor, " clusters"]:
        """Empty, as the one network predicts every cluster."""
        return torch.zeros(0, dtype=torch.long)

    def split(self, number: int, source: RowSource) -> tuple[RowSource, HeldRows]:
        """The rest, and the part."""
        return self.rest, self.held


def _part(source: HeldRows, chosen: Tensor) -> HeldRows:
    """The chosen rows, with the numbers of rows that the clusters have among them."""
    part = source.take(chosen.nonzero()[:, 0])
    counts = {
        name: torch.bincount(part.codes[name], minlength=len(count))
        for name, count in source.counts.items()
    }
    return replace(part, counts=counts)


def _dividing_factor(model: MixedEffects, source: HeldRows) -> str | None:
    """The factor with most clusters of those with random effects that lie in no other factor."""
    names = [f.name for f in model.factors if len(source.counts[f.name]) >= FEWEST_CLUSTERS]
    outer = [
        name
        for name in names
        if not any(_inside(source.codes, name, other) for other in names if other != name)
    ]
    return max(outer, key=lambda name: len(source.counts[name]), default=None)


def _inside(codes: Mapping[str, Tensor], inner: str, outer: str) -> bool:
    """Whether every cluster of one factor lies in a single cluster of the other, not conversely."""
    pairs = torch.stack([codes[inner], codes[outer]]).unique(dim=1).shape[1]
    return pairs == len(codes[inner].unique()) > len(codes[outer].unique())


def _balanced(
    counts: Int[np.ndarray, " clusters"], parts: int, rng: np.random.Generator
) -> Int[np.ndarray, " clusters"]:
    """A part for every cluster: in random order of ties, the largest joins the smallest part."""
    shuffled = rng.permutation(len(counts))
    order = shuffled[np.argsort(-counts[shuffled], kind="stable")]
    sizes, of_cluster = np.zeros(parts), np.empty(len(counts), dtype=np.int64)
    for cluster in order:
        part = int(np.argmin(sizes))
        of_cluster[cluster] = part
        sizes[part] += counts[cluster]
    return of_cluster
