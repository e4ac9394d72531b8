"""fit(), and Fit: a fitted model with one verb for each result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor, nn

from armed_pyro.checks import diagnostics
from armed_pyro.checks.diagnostics import Diagnostics
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.engine.compiled_step import CompileMode
from armed_pyro.engine.processes import (
    ALONE,
    DISTRIBUTED_MODES,
    DistributedMode,
    Processes,
    join,
    local_device,
)
from armed_pyro.engine.schedule import History, Schedule
from armed_pyro.explain import attribution, boundaries, decode, invariance
from armed_pyro.explain.attributed import Attribution
from armed_pyro.explain.boundaries import Boundaries, Extent
from armed_pyro.explain.decode import DecodedEffects
from armed_pyro.explain.invariance import Invariance
from armed_pyro.guides.base import Guide
from armed_pyro.guides.crossed import choose_guide
from armed_pyro.inference import refine
from armed_pyro.inference.divergence import TrainingDiverged
from armed_pyro.inference.draws import ImportanceDraws, RefinedDraws
from armed_pyro.inference.importance_sampling import importance_draws, weighed
from armed_pyro.inference.posterior import Posterior
from armed_pyro.inference.train import GuideFactory, train
from armed_pyro.prediction import adapt, predict, scores
from armed_pyro.prediction.adapt import Adapted
from armed_pyro.prediction.cluster_classifier import Classifiers, ClusterClassifier
from armed_pyro.prediction.result import Prediction
from armed_pyro.prediction.scores import ClusterScores
from armed_pyro.program.data_spec import Facts
from armed_pyro.program.model import MixedEffects
from armed_pyro.report import text
from armed_pyro.storage import save
from armed_pyro.streaming.on_disk import StreamedRows
from armed_pyro.streaming.streamed_data import StreamedData
from armed_pyro.summaries import datatree, variance

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["DivergenceError", "Fit", "compare_modes", "fit", "score_mode"]

NOT_FROM_FILES = (
    "rows that are read from a file as they are needed cannot be shared by several processes yet: "
    "read them into memory, as ClusteredData, or start one process"
)


@dataclass(frozen=True, eq=False)
class Fit:
    """A fitted model.

    Attributes
    ----------
    posterior : Posterior
        The program, its guide, the training rows and the draws, from which every verb reads.
    classifiers : Classifiers
        Classifiers of the clusters by factor; see `classifier`.

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
        """How the model was trained."""
        return self.posterior.schedule

    @property
    def seed(self) -> int:
        """Seed of the training, and of the draws unless another is given."""
        return self.posterior.seed

    @property
    def stopped(self) -> str:
        """Why training ended: "converged", "validation" (both good), "steps" or "diverged"."""
        return self.posterior.stopped

    @property
    def refined(self) -> RefinedDraws | None:
        """Draws that replace the guide's: see `refine`."""
        return self.posterior.refined

    @property
    def sampled(self) -> bool:
        """Whether `data` is a sample of the training rows, as of those of a `StreamedData`."""
        return self.posterior.sampled

    @property
    def converged(self) -> bool:
        """Whether the loss had stopped improving when training ended."""
        return self.posterior.converged

    def draws(self, n: int = 1000, *, seed: int | None = None) -> dict[str, Tensor]:
        """n joint posterior draws of all latent sites; see `Posterior.draws`."""
        return self.posterior.draws(n, seed=seed)

    def hyperparameters(self, n: int = 1000, *, seed: int | None = None) -> dict[str, Tensor]:
        """As `draws`, without the random effects; see `Posterior.hyperparameters`."""
        return self.posterior.hyperparameters(n, seed=seed)

    @property
    def importance(self) -> ImportanceDraws:
        """The guide's draws with their importance weights.

        Raises
        ------
        ValueError
            If the fit keeps only a sample of its rows, and they were not weighed during the fit.
        """
        return self._weighed.importance or importance_draws(self.posterior)

    @cached_property
    def _weighed(self) -> Posterior:
        return weighed(self.posterior)

    def diagnostics(self) -> Diagnostics:
        """Verdict on the fit, pass, warn or fail, with reasons and next steps.

        See `armed_pyro.checks.diagnostics.diagnose`.
        """
        return self._verdict

    @cached_property
    def _verdict(self) -> Diagnostics:
        return diagnostics.diagnose(self._weighed)

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
        better = refine.refine(
            self.posterior,
            method,
            draws=draws,
            chains=chains,
            warmup=warmup,
            seed=seed,
            progress=progress,
        )
        return replace(self, posterior=better)

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
            self.posterior,
            data,
            unseen=unseen,
            support=support,
            pooled=pooled,
            draws=draws,
            prob=prob,
            seed=seed,
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
        """One row for each mode: how well it predicts new clusters' outcomes.

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
        """The fit with the posterior of new clusters given a few labelled rows; no training.

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
        """Which features the fixed effects use, and how far clusters differ in their use.

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
        """Whether fresh probes can read the cluster from the network's features.

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
        """One image under every cluster's random effects, and along their largest component.

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
        """E[y | x, cluster] over two features, cluster by cluster.

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
        """Everything as labelled ArviZ data, on the original scale.

        See `armed_pyro.summaries.datatree.to_datatree`.
        """
        return datatree.to_datatree(self.posterior, draws=draws, groups=groups, seed=seed)

    def summary(self, *, prob: float = 0.9) -> None:
        """Print the program, data, variance components, fixed effects and convergence."""
        print(text.text(self, prob=prob))

    def save(self, folder: str | Path, *, draws: int = 1000, prob: float = 0.9) -> None:
        """Write the fit to a folder; see `armed_pyro.storage.save.save`."""
        save.check_target(self.posterior, folder)
        components = self.variance_components(prob=prob)
        verdict = self.diagnostics().to_json()
        save.save(self.posterior, folder, self.classifiers, components, verdict, draws=draws)

    @classmethod
    def load(cls, folder: str | Path, net: nn.Module | None = None) -> Fit:
        """Read a fit from a folder; see `armed_pyro.storage.save.load`."""
        return cls(*save.load(folder, net))


# As functions: ``compare_modes(fit, held_out)``.
compare_modes = Fit.compare_modes
score_mode = Fit.score_mode


class DivergenceError(RuntimeError):
    """The loss or its gradient is no longer finite, or has run away.

    Attributes
    ----------
    fit : Fit
        The fit at the start of the window of steps with the lowest mean loss.

    Examples
    --------
    >>> def fitted_or_last_good_state(model, data):
    ...     try:
    ...         return fit(model, data)
    ...     except DivergenceError as error:
    ...         return error.fit
    """

    def __init__(self, message: str, fit: Fit) -> None:
        super().__init__(message)
        self.fit = fit


def fit(
    model: MixedEffects,
    data: ClusteredData | StreamedData,
    *,
    validation: ClusteredData | None = None,
    schedule: Schedule | None = None,
    guide: GuideFactory = choose_guide,
    refine: bool = True,
    seed: int = 0,
    device: str = "auto",
    compile: CompileMode = "auto",  # noqa: A002
    distributed: DistributedMode = "auto",
    checkpoint: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Fit:
    r"""Minimise ``-ELBO + lambda_F (-log p(y | f)) + game`` over network, guide and adversaries.

    The model is copied: neither it nor its network changes. The same seed gives the same result
    to the bit on the same CPU and number of threads with ``compile="never"``; steps that are
    compiled round differently.

    Parameters
    ----------
    model : MixedEffects
        What to fit.
    data : ClusteredData or StreamedData
        Training rows, in memory or read from a file as they are needed. Of the latter the fit
        keeps a sample, whole clusters of at most 50,000 rows, by which it is checked.
    validation : ClusteredData, optional
        Rows whose loss decides when to cut the learning rates, when to stop training the network
        and which network is kept; the guide is then trained on until it has converged, too.
        Without them, the smoothed training loss decides.
    schedule : Schedule, optional
        Length and rates of training.
    guide : callable
        Makes the variational family from the bound model and its rows.
    refine : bool
        Whether the guide's draws are importance weighted in the end, where its Pareto k-hat
        allows it: `Fit.refine`.
    seed : int
        Seed of mini-batches and draws; torch's global generator is left as it was.
    device : str
        "auto" (CUDA if there is one), "cpu", "cuda", ...
    compile : {"auto", "always", "never"}
        Whether steps are compiled to one graph: "auto" where that is expected to pay, by the
        time that steps take; on a GPU they are recorded as a CUDA graph before that. What cannot
        be compiled runs as ordinary Pyro, and a warning says why.
    distributed : {"auto", "never"}
        With "auto", processes that `torchrun` started train the network together; every one has
        to be given the same data, and gets the same fit. See `armed_pyro.engine.processes`. With
        "never", each fits on its own.
    checkpoint : path, optional
        File to which the state is written after every window of steps.
    resume : bool
        Continue from `checkpoint` if the file exists; the result is that of an unbroken run.
    progress : bool
        Whether to show a progress bar.

    Raises
    ------
    ValueError
        Before training, if model and data do not fit together; or if `checkpoint` belongs to
        another run.
    DivergenceError
        If the loss is no longer finite; it holds the last good state, whose parameters are
        finite.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> site = np.repeat(np.arange(10), 5)
    >>> y = rng.normal(size=10)[site] + rng.normal(size=50)
    >>> data = ClusteredData.from_arrays(np.zeros((50, 0)), y, {"site": site})
    >>> model = MixedEffects(torch.nn.Linear(0, 1), "(1 | site)", bayesian_head=True)
    >>> fit(model, data, schedule=Schedule(steps=20), progress=False).model.terms[0].factor
    'site'
    """
    if distributed not in DISTRIBUTED_MODES:
        modes = ", ".join(DISTRIBUTED_MODES)
        raise ValueError(f"`distributed` is {distributed!r}, but must be one of {modes}")
    target = torch.device(_device(device))
    processes = ALONE if distributed == "never" else join(target)
    devices = [target] if target.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        # Binding draws the adversaries' first weights.
        torch.manual_seed(seed)
        settings: dict[str, Any] = {
            "validation": validation,
            "schedule": schedule,
            "guide": guide,
            "refine": refine,
            "seed": seed,
            "compile": compile,
            "processes": processes,
            "checkpoint": checkpoint,
            "resume": resume,
            "progress": progress,
        }
        try:
            return Fit(_train(model, data, target, processes, settings, progress=progress))
        except TrainingDiverged as error:
            raise DivergenceError(str(error), Fit(error.posterior)) from error


def _train(
    model: MixedEffects,
    data: ClusteredData | StreamedData,
    target: torch.device,
    processes: Processes,
    settings: Mapping[str, Any],
    *,
    progress: bool,
) -> Posterior:
    """Bind a copy of the model to the rows, and train it."""
    if isinstance(data, ClusteredData):
        return train(model.bind(data).to(target), data, **settings)
    if processes.several:
        raise ValueError(NOT_FROM_FILES)
    with data.encoded(model.factor_names(), settings["seed"], progress=progress) as table:
        bound = model.bind(Facts.of_encoded(table, model.family)).to(target)
        source = StreamedRows(table, bound.reference())
        sample = table.sample(bound.largest_factor())
        return train(bound, sample, source=source, **settings)


def _device(name: str) -> str:
    if name == "auto" or (name == "cuda" and torch.cuda.is_available()):
        return local_device() if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} was asked for, but torch finds no CUDA device here")
    return name
