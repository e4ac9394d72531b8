"""Fit: a fitted model, and the verbs that read results off it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from torch import Tensor, nn

from armed_pyro.checks import diagnostics
from armed_pyro.checks.diagnostics import Diagnostics
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.engine.schedule import History, Schedule
from armed_pyro.explain import attribution, boundaries, invariance
from armed_pyro.explain import decode as decoded
from armed_pyro.explain.attributed import Attribution
from armed_pyro.explain.boundaries import Boundaries, Extent
from armed_pyro.explain.decode import DecodedEffects
from armed_pyro.explain.invariance import Invariance
from armed_pyro.guides.base import Guide
from armed_pyro.inference import refine as refinement
from armed_pyro.inference.draws import ImportanceDraws, RefinedDraws
from armed_pyro.inference.importance_sampling import importance_draws
from armed_pyro.prediction import adapt as adaptation
from armed_pyro.prediction import cluster_classifier as membership
from armed_pyro.prediction import predict
from armed_pyro.prediction.adapt import Adapted
from armed_pyro.prediction.cluster_classifier import ClusterClassifier
from armed_pyro.prediction.result import Prediction
from armed_pyro.program.model import MixedEffects
from armed_pyro.report import text as summary
from armed_pyro.rows.batch import Membership
from armed_pyro.storage import save as storage
from armed_pyro.summaries import datatree, variance

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["Fit"]


@dataclass(frozen=True, eq=False)
class Fit:
    """A fitted model.

    Attributes
    ----------
    model : MixedEffects
        The bound program with its trained network and adversaries.
    guide : Guide
        The approximate posterior.
    data : ClusteredData
        The training rows, or a sample of them: see `sampled`.
    history : History
        Record of the training.
    schedule : Schedule
        How it was trained.
    seed : int
        Seed of the training, and of the draws unless another is given.
    stopped : str
        Why training ended: "converged", "validation" (both good), "steps" (they ran out),
        "diverged".
    refined : RefinedDraws, optional
        Draws that replace the guide's: see `refine`.
    classifiers : dict of str to ClusterClassifier
        Those of the clusters that have been trained, by factor: see `classifier`.
    """

    model: MixedEffects
    guide: Guide
    data: ClusteredData
    history: History
    schedule: Schedule
    seed: int
    stopped: str
    refined: RefinedDraws | None = None
    classifiers: dict[str, ClusterClassifier] = field(default_factory=dict)

    @property
    def sampled(self) -> bool:
        """Whether `data` is a sample of the training rows, as of those of a `StreamedData`."""
        return 0 < self.data.n_rows < self.model.data_facts().n_rows

    @property
    def converged(self) -> bool:
        """Whether the loss had stopped improving when training ended."""
        return self.stopped in ("converged", "validation")

    def draws(self, n: int = 1000, *, seed: int | None = None) -> dict[str, Tensor]:
        """n joint posterior draws of all latent sites, in standardised units.

        Returns
        -------
        dict of str to Tensor
            Random effects "n clusters terms"; other sites "n 1 ...".
        """
        with self.model.seeded(self.seed if seed is None else seed):
            if self.refined is not None:
                return self.refined.choose(n)
            return self.guide.draws(self.model.clusters(), n)

    def hyperparameters(self, n: int = 1000, *, seed: int | None = None) -> dict[str, Tensor]:
        """As `draws`, without the random effects, which many clusters have too many of.

        Returns
        -------
        dict of str to Tensor
            Sites "n 1 ...".
        """
        effects = {factor.effect_site for factor in self.model.factors}
        with self.model.seeded(self.seed if seed is None else seed):
            if self.refined is not None:
                given = self.refined.pool.items()
                some = {name: one for name, one in given if name not in effects}
                return replace(self.refined, pool=some).choose(n) if some else {}
            clusters, nested = self.model.clusters(), self.guide.nested()
            if nested is not None:
                first = clusters.memberships[nested.name].index[:1]
                own = Membership(first, first[:0], complete=False)
                clusters = replace(clusters, memberships={**clusters.memberships, nested.name: own})
            drawn = self.guide.draws(clusters, n)
            return {name: one for name, one in drawn.items() if name not in effects}

    @cached_property
    def importance(self) -> ImportanceDraws:
        """The guide's draws with their importance weights; see `armed_pyro.inference.refine`."""
        if self.sampled:
            raise ValueError("the fit keeps only a sample of its rows: fit with refine=True")
        return importance_draws(self)

    def diagnostics(self) -> Diagnostics:
        """Verdict on the fit, pass, warn or fail, with reasons and next steps.

        See `armed_pyro.checks.diagnostics.diagnose`.
        """
        return self._verdict

    @cached_property
    def _verdict(self) -> Diagnostics:
        return diagnostics.diagnose(self)

    def refine(
        self,
        method: str = "psis",
        *,
        draws: int = 4000,
        chains: int = 4,
        warmup: int = 500,
        seed: int | None = None,
        progress: bool = True,
    ) -> Fit:
        """The fit with better posterior draws: importance weighted, or by NUTS.

        See `armed_pyro.inference.refine.refine`.
        """
        return refinement.refine(
            self,
            method,
            draws=draws,
            chains=chains,
            warmup=warmup,
            seed=seed,
            progress=progress,
        )

    def predict(
        self,
        data: ClusteredData | pd.DataFrame,
        *,
        unseen: str | None = None,
        support: ClusteredData | pd.DataFrame | None = None,
        pooled: bool = True,
        draws: int = 1000,
        prob: float = 0.9,
        seed: int | None = None,
    ) -> Prediction:
        """E[y | x, cluster] and y for new rows, with their posterior uncertainty.

        See `armed_pyro.prediction.predict.predict`.
        """
        return predict.predict(
            self,
            data,
            unseen=unseen,
            support=support,
            pooled=pooled,
            draws=draws,
            prob=prob,
            seed=seed,
        )

    def adapt(
        self,
        support: ClusteredData | pd.DataFrame,
        *,
        draws: int = 1000,
        seed: int | None = None,
        update_seen: bool = False,
    ) -> Adapted:
        """The fit with the posterior of new clusters given a few labelled rows; no training.

        See `armed_pyro.prediction.adapt.adapt`.
        """
        return adaptation.adapt(self, support, draws=draws, seed=seed, update_seen=update_seen)

    def classifier(self, factor: str) -> ClusterClassifier:
        """The classifier p(cluster | features) of a factor; trained at the first call.

        See `armed_pyro.prediction.cluster_classifier.train_classifier`.
        """
        if factor not in self.classifiers:
            self.classifiers[factor] = membership.train_classifier(self, factor)
        return self.classifiers[factor]

    def variance_components(
        self, *, draws: int = 4000, prob: float = 0.9, seed: int | None = None
    ) -> pd.DataFrame:
        """Table of sds, correlations, variances, shares, ICCs and R2.

        See `armed_pyro.summaries.variance.variance_components`.
        """
        return variance.variance_components(self, draws=draws, prob=prob, seed=seed)

    def fixed_effects(
        self, *, draws: int = 4000, prob: float = 0.9, seed: int | None = None
    ) -> pd.DataFrame:
        """Table of the latent fixed effects on the original scale; empty for a plain network.

        See `armed_pyro.summaries.variance.fixed_effects`.
        """
        return variance.fixed_effects(self, draws=draws, prob=prob, seed=seed)

    def attribution(
        self,
        method: str = "gradient",
        *,
        data: ClusteredData | pd.DataFrame | None = None,
        layer: str | None = None,
        columns: Sequence[str] | None = None,
        draws: int = 1000,
        seed: int | None = None,
    ) -> Attribution:
        """Which features the fixed effects use, and how far clusters differ in their use.

        See `armed_pyro.explain.attribution.attribution`.
        """
        return attribution.attribution(
            self, method, data=data, layer=layer, columns=columns, draws=draws, seed=seed
        )

    def invariance(
        self,
        data: ClusteredData | pd.DataFrame | None = None,
        *,
        factor: str | None = None,
        layers: Sequence[str] | None = None,
        folds: int = 2,
        permutations: int = 999,
        seed: int | None = None,
    ) -> Invariance:
        """Whether fresh probes can read the cluster from the network's features.

        See `armed_pyro.explain.invariance.invariance`.
        """
        return invariance.invariance(
            self,
            data,
            factor=factor,
            layers=layers,
            folds=folds,
            permutations=permutations,
            seed=seed,
        )

    def decoded(
        self,
        row: ClusteredData | pd.DataFrame,
        *,
        shape: Sequence[int] | None = None,
        of: str | None = None,
        factor: str | None = None,
        columns: Sequence[str] | None = None,
        draws: int = 100,
        seed: int | None = None,
    ) -> DecodedEffects:
        """One image under every cluster's random effects, and along their largest component.

        See `armed_pyro.explain.decode.decoded`.
        """
        return decoded.decoded(
            self, row, shape=shape, of=of, factor=factor, columns=columns, draws=draws, seed=seed
        )

    def boundaries(
        self,
        features: tuple[str, str],
        *,
        factor: str | None = None,
        of: Any = None,
        extent: Extent | None = None,
        size: int = 60,
        draws: int = 200,
        seed: int | None = None,
    ) -> Boundaries:
        """E[y | x, cluster] over two features, cluster by cluster.

        See `armed_pyro.explain.boundaries.boundaries`.
        """
        return boundaries.boundaries(
            self,
            features,
            factor=factor,
            of=of,
            extent=extent,
            size=size,
            draws=draws,
            seed=seed,
        )

    def to_datatree(
        self, *, draws: int = 1000, groups: Sequence[str] | None = None, seed: int | None = None
    ) -> xr.DataTree:
        """Everything as labelled ArviZ data, on the original scale.

        See `armed_pyro.summaries.datatree.to_datatree`.
        """
        return datatree.to_datatree(self, draws=draws, groups=groups, seed=seed)

    def summary(self, *, prob: float = 0.9) -> None:
        """Print the program, data, variance components, fixed effects and convergence."""
        print(summary.text(self, prob=prob))

    def save(self, folder: str | Path, *, draws: int = 1000, prob: float = 0.9) -> None:
        """Write the fit to a folder; see `armed_pyro.storage.save.save`."""
        storage.save(self, folder, draws=draws, prob=prob)

    @classmethod
    def load(cls, folder: str | Path, net: nn.Module | None = None) -> Fit:
        """Read a fit from a folder; see `armed_pyro.storage.save.load`."""
        return storage.load(folder, net)
