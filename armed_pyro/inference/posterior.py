"""Posterior: a bound program, its guide, and the weighted or refined draws behind every result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from armed_pyro.data.absent_columns import (
    absent_columns,
    warn_of_absent,
    with_new_column,
    with_new_grouping,
)
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.data.files import as_pandas
from armed_pyro.data.own_means import encoded_by, extended_by
from armed_pyro.engine.schedule import History, Schedule
from armed_pyro.guides.base import Guide, selected
from armed_pyro.inference.psis import pareto_smooth, systematic
from armed_pyro.program.model import MixedEffects
from armed_pyro.rows.batch import Membership

__all__ = ["METHODS", "ImportanceDraws", "Posterior", "RefinedDraws"]

METHODS: Mapping[str, str] = {
    "psis": "importance-weighted draws of the guide, Pareto smoothed",
    "nuts": "Hamiltonian Monte Carlo in the guide's coordinates, the network frozen",
}


@dataclass(frozen=True, eq=False)
class RefinedDraws:
    """Posterior draws that replace the guide's.

    `quality` holds k_hat and ess (psis), or r_hat, ess and divergences (nuts); the worst over all
    sites.

    Examples
    --------
    >>> pool = {"site_sd": torch.tensor([[[0.1]], [[0.2]]])}
    >>> RefinedDraws("psis", pool, index=torch.tensor([1, 1, 0])).latents["site_sd"].flatten()
    tensor([0.2000, 0.2000, 0.1000])
    """

    method: str  # one of `METHODS`
    # Candidate draws of all latent sites, in a guide's shapes. Random effects may be drawn for the
    # first draws only.
    pool: Mapping[str, Tensor]
    quality: Mapping[str, float] = field(default_factory=dict)
    # Position of each draw in the pool; None takes the whole pool in order. Resampled effects are
    # not copied: with very many clusters a second copy may not fit.
    index: Int[Tensor, " draws"] | None = None

    def __len__(self) -> int:
        return len(self._index())

    @property
    def latents(self) -> dict[str, Tensor]:
        """Joint draws of all latent sites, in the shapes that a guide returns."""
        return selected(self.pool, self._index())

    def stored(self) -> dict[str, Tensor]:
        """What a saved fit keeps: all draws, also those without random effects."""
        return dict(self.pool) if self.index is None else self.latents

    def choose(self, n: int) -> dict[str, Tensor]:
        """n draws at random; with repeats only if there are fewer than n."""
        size = len(self)
        chosen = torch.randperm(size)[:n] if n <= size else torch.randint(size, (n,))
        return selected(self.pool, self._index()[chosen])

    def _index(self) -> Int[Tensor, " draws"]:
        if self.index is not None:
            return self.index
        return torch.arange(min(site.shape[0] for site in self.pool.values() if site.dim() > 1))


@dataclass(frozen=True, eq=False)
class ImportanceDraws:
    """Proposed draws with nested importance weights.

    `k_hat` is the shape of the weights' tail; below 0.7 the weights are reliable (Vehtari et al.
    2024). `cluster_k_hat` is that of each cluster's particles over all draws. Of more than 500
    clusters it is computed for 500 at random and nan for the others.

    Where log p(y | theta) has a closed form, `latents` are the hyperparameters alone, and
    `clusters` belongs to the draws at `index`, which have equal weights.

    Examples
    --------
    >>> none = np.zeros((4, 0))
    >>> equal = ImportanceDraws({}, np.log(np.full(4, 0.25)), 0.1, none, np.zeros(0))
    >>> equal.effective, equal.resample(4)
    (4.0, tensor([0, 1, 2, 3]))
    """

    latents: Mapping[str, Tensor]  # the nested effects are resampled within each draw
    log_weights: Float[np.ndarray, " draws"]  # Pareto smoothed, normalised
    k_hat: float
    # log p(y_k | theta) where k-hat is computed
    clusters: Float[np.ndarray, "draws watched"] = field(default_factory=lambda: np.zeros((0, 0)))
    cluster_k_hat: Float[np.ndarray, " clusters"] = field(default_factory=lambda: np.zeros(0))
    index: Int[Tensor, " chosen"] | None = None  # None: the rows of `clusters` are all draws

    @property
    def weights(self) -> Float[np.ndarray, " draws"]:
        """Normalised weights."""
        return np.exp(self.log_weights)

    @property
    def effective(self) -> float:
        """Effective sample size, 1 / sum of squared weights."""
        return float(1 / np.sum(self.weights**2))

    @cached_property
    def left_out(self) -> tuple[Float[np.ndarray, "watched draws"], Float[np.ndarray, " watched"]]:
        """Log-weights of the rows of `clusters` without each watched cluster, and their k-hat."""
        whole = self.log_weights if self.index is None else 0.0
        return pareto_smooth(whole - self.clusters.T)

    def of_clusters(self, draws: Float[np.ndarray, "draws ..."]) -> Float[np.ndarray, "chosen ..."]:
        """A quantity of all draws, at the draws of the rows of `clusters`."""
        return draws if self.index is None else draws[self.index.cpu().numpy()]

    def resample(self, n: int) -> Int[Tensor, " n"]:
        """Positions of n draws; systematically, one of weight w floor(n w) or ceil(n w) times."""
        return torch.as_tensor(systematic(self.weights, n, float(torch.rand(()))))


@dataclass(frozen=True, eq=False)
class Posterior:
    """p(theta, u | y) of a trained program, as draws of its guide or refined draws.

    Tables, predictions, checks and files are all made from a `Posterior`; `armed_pyro.Fit` has one
    method for each of them.

    Examples
    --------
    ``fit(model, data).posterior.draws(100)["site_sd"]``
    """

    model: MixedEffects  # bound, with its trained network and adversaries
    guide: Guide
    data: ClusteredData  # the training rows, or a sample of them: see `sampled`
    history: History
    schedule: Schedule
    seed: int  # of the training; default of all draws
    # "converged" or "validation" (both good), "steps", "interrupted" or "diverged"
    stopped: str
    importance: ImportanceDraws | None = None  # the guide's draws, weighted
    refined: RefinedDraws | None = None  # draws that replace the guide's

    @property
    def sampled(self) -> bool:
        """Whether `data` is a sample of the training rows, as after a fit to `StreamedData`."""
        return 0 < self.data.n_rows < self.model.data_facts().n_rows

    @property
    def converged(self) -> bool:
        """Whether the loss had stopped improving when training ended."""
        return self.stopped in ("converged", "validation")

    def draws(self, n: int = 1000, *, seed: int | None = None) -> dict[str, Tensor]:
        """n joint posterior draws of all latent sites, in standardised units.

        Random effects have shape "n clusters terms", other sites "n 1 ...". The seed is by default
        that of the training.
        """
        with self.model.seeded(self.seed if seed is None else seed):
            if self.refined is not None:
                return self.refined.choose(n)
            return self.guide.draws(self.model.clusters(), n)

    def hyperparameters(self, n: int = 1000, *, seed: int | None = None) -> dict[str, Tensor]:
        """n joint posterior draws as from `draws`, without the random effects.

        Each site has shape "n 1 ...". The seed is by default that of the training. Memory does not
        grow with the number of clusters.
        """
        effects = {factor.effect_site for factor in self.model.factors}
        with self.model.seeded(self.seed if seed is None else seed):
            if self.refined is not None:
                pool = {k: v for k, v in self.refined.pool.items() if k not in effects}
                return replace(self.refined, pool=pool).choose(n) if pool else {}
            clusters, nested = self.model.clusters(), self.guide.nested()
            if nested is not None:
                # The guide draws the nested effects of the first cluster only.
                first = clusters.memberships[nested.name].index[:1]
                single = Membership(first, first[:0], complete=False)
                memberships = {**clusters.memberships, nested.name: single}
                clusters = replace(clusters, memberships=memberships)
            drawn = self.guide.draws(clusters, n)
            return {site: draws for site, draws in drawn.items() if site not in effects}

    def encode(
        self, data: ClusteredData | pd.DataFrame, known: ClusteredData | None = None
    ) -> ClusteredData:
        """New rows in the encoding of the training table; ValueError without one.

        A column of inner clusters may be absent; see `armed_pyro.data.absent_columns`. New clusters
        that have rows in `known`, encoded before, have the means of features that they have there.
        """
        factors = self.model.factor_names()
        schema = self.model.data_facts().schema
        if known is not None and schema is not None:
            schema = extended_by(schema, known)
        if isinstance(data, ClusteredData):
            absent = absent_columns(factors, data.groupings)
            warn_of_absent(factors, absent)
            rows = with_new_grouping(encoded_by(data, schema), absent)
            return self.with_means(rows, known)
        if schema is None:
            raise ValueError(
                "the model was fitted to arrays, so it cannot read a table: pass "
                "ClusteredData.from_arrays(...) with the same features"
            )
        table = as_pandas(data)
        absent = absent_columns(factors, table.columns, schema.clusters)
        warn_of_absent(factors, absent)
        rows = ClusteredData.encode(with_new_column(table, absent), schema)
        return self.with_means(rows, known)

    def with_means(self, rows: ClusteredData, known: ClusteredData | None = None) -> ClusteredData:
        """Rows with the clusters' means that the program adds to its predictor; see `encode`.

        A new cluster keeps the mean of these rows when further rows are taken from them.
        """
        facts = self.model.data_facts()
        between = facts.between
        if between is None or rows.feature_names != facts.feature_names:
            return rows
        if known is not None:
            rows = replace(rows, cluster_means=between.extended(known))
        return replace(rows, cluster_means=between.extended(rows))
