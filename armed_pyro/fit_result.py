"""Fit: a fitted model with one method for each result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from torch import Tensor, nn

from armed_pyro.checks import diagnostics
from armed_pyro.checks.verdict import Diagnostics
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.engine.schedule import History, Schedule
from armed_pyro.explain import attribution, boundaries, decode, invariance
from armed_pyro.explain.attribution import Attribution
from armed_pyro.explain.boundaries import Boundaries, Extent
from armed_pyro.explain.decode import DecodedEffects
from armed_pyro.explain.invariance import Invariance
from armed_pyro.guides.base import Guide
from armed_pyro.inference import refine
from armed_pyro.inference.draws import ImportanceDraws, RefinedDraws
from armed_pyro.inference.importance_sampling import importance_draws, weighed
from armed_pyro.inference.posterior import Posterior
from armed_pyro.prediction import adapt, predict, scores
from armed_pyro.prediction.adapt import Adapted
from armed_pyro.prediction.cluster_classifier import Classifiers, ClusterClassifier
from armed_pyro.prediction.result import Prediction
from armed_pyro.prediction.scores import ClusterScores
from armed_pyro.program.model import MixedEffects
from armed_pyro.report.results import Conclusion, Results, Verdicts
from armed_pyro.report.text import summarize
from armed_pyro.storage import save
from armed_pyro.summaries import datatree, variance

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["Fit", "compare_modes", "score_mode"]


@dataclass(frozen=True, eq=False)
class Fit:
    """A fitted model, with one method for each result.

    Attributes
    ----------
    posterior : Posterior
        The program, its guide, the training rows and the draws, from which all results are made.
    classifiers : Classifiers
        Trained classifiers of the clusters, by factor; see `classifier`.

    Examples
    --------
    ``fit(model, data).variance_components()``
    """

    posterior: Posterior
    classifiers: Classifiers = field(default_factory=Classifiers)

    @property
    def model(self) -> MixedEffects:
        """The bound program with its trained network and adversaries."""
        return self.posterior.model

    @property
    def guide(self) -> Guide:
        """The approximate posterior."""
        return self.posterior.guide

    @property
    def data(self) -> ClusteredData:
        """The training rows, or a sample of them: see `sampled`."""
        return self.posterior.data

    @property
    def history(self) -> History:
        """Record of the training."""
        return self.posterior.history

    @property
    def schedule(self) -> Schedule:
        """Length and learning rates of the training."""
        return self.posterior.schedule

    @property
    def seed(self) -> int:
        """Seed of the training, and default seed of the draws."""
        return self.posterior.seed

    @property
    def stopped(self) -> str:
        """Why training ended: "converged", "validation" (both good), "steps" or "diverged"."""
        return self.posterior.stopped

    @property
    def refined(self) -> RefinedDraws | None:
        """Draws that replace those of the guide; see `refine`."""
        return self.posterior.refined

    @property
    def sampled(self) -> bool:
        """Whether `data` is only a sample of the training rows, as for a `StreamedData`."""
        return self.posterior.sampled

    @property
    def converged(self) -> bool:
        """Whether the loss had stopped improving when training ended."""
        return self.posterior.converged

    def draws(self, n: int = 1000, *, seed: int | None = None) -> dict[str, Tensor]:
        """n joint posterior draws of all latent sites; see `Posterior.draws`."""
        return self.posterior.draws(n, seed=seed)

    def hyperparameters(self, n: int = 1000, *, seed: int | None = None) -> dict[str, Tensor]:
        """n joint posterior draws of all sites but the random effects.

        See `Posterior.hyperparameters`.
        """
        return self.posterior.hyperparameters(n, seed=seed)

    @property
    def importance(self) -> ImportanceDraws:
        """The guide's draws with their importance weights.

        Raises
        ------
        ValueError
            If the fit keeps only a sample of its rows, and the draws were not weighted in training.
        """
        return self._weighed.importance or importance_draws(self.posterior)

    @cached_property
    def _weighed(self) -> Posterior:
        return weighed(self.posterior)

    def diagnostics(self) -> Diagnostics:
        """Two verdicts: whether the draws can be trusted, and whether the model misfits.

        See `armed_pyro.checks.diagnostics.diagnose`.
        """
        return self._verdict

    @cached_property
    def _verdict(self) -> Diagnostics:
        return diagnostics.diagnose(self.posterior, lambda: self._weighed)

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
        """The fit with better posterior draws, by importance weights or by NUTS.

        See `armed_pyro.inference.refine.refine`.
        """
        options: dict[str, Any] = {"chains": chains, "warmup": warmup, "progress": progress}
        posterior = refine.refine(self.posterior, method, draws=draws, seed=seed, **options)
        return replace(self, posterior=posterior)

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
        others: bool = True,
    ) -> Prediction:
        """E[y | x, cluster] and y for new rows, with their posterior uncertainty.

        See `armed_pyro.prediction.predict.predict`.
        """
        return predict.predict(
            self.posterior,
            data,
            unseen=unseen,
            support=support,
            pooled=pooled,
            draws=draws,
            prob=prob,
            seed=seed,
            others=others,
            classifiers=self.classifiers,
        )

    def compare_modes(
        self,
        data: ClusteredData | pd.DataFrame,
        *,
        modes: Sequence[str] | None = None,
        support: ClusteredData | pd.DataFrame | None = None,
        factor: str | None = None,
        draws: int = 1000,
        prob: float = 0.9,
        seed: int | None = None,
    ) -> pd.DataFrame:
        """Scores of the predictions for new clusters, one row per mode.

        See `armed_pyro.prediction.scores.compare_modes`.
        """
        return scores.compare_modes(
            self.posterior,
            data,
            modes=modes,
            support=support,
            factor=factor,
            draws=draws,
            prob=prob,
            seed=seed,
            classifiers=self.classifiers,
        )

    def score_mode(
        self,
        data: ClusteredData | pd.DataFrame,
        mode: str,
        *,
        support: ClusteredData | pd.DataFrame | None = None,
        factor: str | None = None,
        draws: int = 1000,
        prob: float = 0.9,
        seed: int | None = None,
    ) -> ClusterScores:
        """Scores of one mode by cluster; see `armed_pyro.prediction.scores.score_mode`."""
        return scores.score_mode(
            self.posterior,
            data,
            mode,
            support=support,
            factor=factor,
            draws=draws,
            prob=prob,
            seed=seed,
            classifiers=self.classifiers,
        )

    def adapt(
        self,
        support: ClusteredData | pd.DataFrame,
        *,
        draws: int = 1000,
        seed: int | None = None,
        update_seen: bool = False,
    ) -> Adapted:
        """The posterior of new clusters given a few labelled rows, without further training.

        See `armed_pyro.prediction.adapt.adapt`.
        """
        return adapt.adapt(self.posterior, support, draws=draws, seed=seed, update_seen=update_seen)

    def classifier(self, factor: str) -> ClusterClassifier:
        """The classifier p(cluster | features) of a factor; trained at the first call.

        See `armed_pyro.prediction.cluster_classifier.train_classifier`.
        """
        return self.classifiers.of(self.posterior, factor)

    def variance_components(
        self, *, draws: int = 4000, prob: float = 0.9, seed: int | None = None
    ) -> pd.DataFrame:
        """Table of sds, correlations, variances, shares, ICCs and R2.

        See `armed_pyro.summaries.variance.variance_components`.
        """
        return variance.variance_components(self.posterior, draws=draws, prob=prob, seed=seed)

    def fixed_effects(
        self, *, draws: int = 4000, prob: float = 0.9, seed: int | None = None
    ) -> pd.DataFrame:
        """Table of the latent fixed effects on the original scale; empty for a plain network.

        See `armed_pyro.summaries.variance.fixed_effects`.
        """
        return variance.fixed_effects(self.posterior, draws=draws, prob=prob, seed=seed)

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
        """Importance of features for the fixed effects, and sds of their slopes over clusters.

        See `armed_pyro.explain.attribution.attribution`.
        """
        return attribution.attribution(
            self.posterior, method, data=data, layer=layer, columns=columns, draws=draws, seed=seed
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
        """Accuracy of probes that predict the cluster from the network's features, against chance.

        See `armed_pyro.explain.invariance.invariance`.
        """
        return invariance.invariance(
            self.posterior,
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
        """An image under every cluster's random effects, and along their largest component.

        See `armed_pyro.explain.decode.decoded`.
        """
        return decode.decoded(
            self.posterior,
            row,
            shape=shape,
            of=of,
            factor=factor,
            columns=columns,
            draws=draws,
            seed=seed,
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
        """E[y | x, cluster] over two features, for every cluster.

        See `armed_pyro.explain.boundaries.boundaries`.
        """
        return boundaries.boundaries(
            self.posterior,
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
        """Draws, predictions, log-likelihoods and data as an ArviZ tree, on the original scale.

        See `armed_pyro.summaries.datatree.to_datatree`.
        """
        return datatree.to_datatree(self.posterior, draws=draws, groups=groups, seed=seed)

    def summary(self, *, prob: float = 0.9) -> None:
        """Print the program, data, variance components, fixed effects and convergence."""
        print(summarize(self.results(prob=prob)))

    def results(self, *, prob: float = 0.9) -> Results:
        """The tables and the verdict, for `armed_pyro.report`."""
        found = self.diagnostics()
        conclusions: dict[str, Conclusion] = {
            verdict.part: Conclusion(verdict.word, verdict.sentence)
            for verdict in (found.computation, found.model)
        }
        return Results(
            posterior=self.posterior,
            prob=prob,
            variance_components=self.variance_components(prob=prob),
            fixed_effects=self.fixed_effects(prob=prob),
            verdicts=Verdicts(conclusions, found.to_frame(), found.figures, str(found)),
        )

    def save(self, folder: str | Path, *, draws: int = 1000, prob: float = 0.9) -> None:
        """Write the fit to a folder; see `armed_pyro.storage.save.save`."""
        save.check_saveable(self.posterior, folder)
        save.save(
            self.posterior,
            folder,
            classifiers=self.classifiers,
            variance_components=self.variance_components(prob=prob),
            verdict=self.diagnostics().to_json(),
            draws=draws,
        )

    @classmethod
    def load(cls, folder: str | Path, net: nn.Module | None = None) -> Fit:
        """Read a fit from a folder; see `armed_pyro.storage.save.load`."""
        return cls(*save.load(folder, net))


# The same as functions: ``compare_modes(fit, held_out)``.
compare_modes = Fit.compare_modes
score_mode = Fit.score_mode
