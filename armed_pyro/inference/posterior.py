"""Posterior: a bound program, its guide, and the draws behind every result."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pandas as pd
from torch import Tensor

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.engine.schedule import History, Schedule
from armed_pyro.guides.base import Guide
from armed_pyro.inference.draws import ImportanceDraws, RefinedDraws
from armed_pyro.program.model import MixedEffects
from armed_pyro.rows.batch import Membership

__all__ = ["Posterior"]


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
    stopped: str  # "converged" or "validation" (both good), "steps" or "diverged"
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

        Each site has shape "n 1 ...". Memory does not grow with the number of clusters.
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

    def encode(self, data: ClusteredData | pd.DataFrame) -> ClusteredData:
        """New rows in the encoding of the training table; ValueError without one."""
        if isinstance(data, ClusteredData):
            return data
        schema = self.model.data_facts().schema
        if schema is None:
            raise ValueError(
                "the model was fitted to arrays, so it cannot read a table: pass "
                "ClusteredData.from_arrays(...) with the same features"
            )
        return ClusteredData.encode(data, schema)
