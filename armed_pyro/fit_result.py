"""Fit: a fitted model with one method for each result."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import pandas as pd
from torch import nn

from armed_pyro._messages import check_probability
from armed_pyro._pyro_module import exclusive
from armed_pyro.checks import diagnostics
from armed_pyro.checks.verdict import Diagnostics
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.effects import comparisons, hypotheses, predictions
from armed_pyro.engine.schedule import History, Schedule
from armed_pyro.explain import attribution, boundaries, decode, invariance
from armed_pyro.guides.base import Guide
from armed_pyro.inference import refine
from armed_pyro.inference.importance_sampling import importance_draws, weighed
from armed_pyro.inference.posterior import ImportanceDraws, Posterior, RefinedDraws
from armed_pyro.plots.fit_plots import Plots
from armed_pyro.plots.report_pictures import report_pictures
from armed_pyro.prediction import adapt, export, predict, residuals, scores, survival
from armed_pyro.prediction.cluster_classifier import Classifiers, ClusterClassifier
from armed_pyro.program.model import MixedEffects
from armed_pyro.report.cells import as_text
from armed_pyro.report.results import Conclusion, Results, Verdicts
from armed_pyro.report.story import report
from armed_pyro.report.text import described, of_event, summarize
from armed_pyro.report.write import check_ending, write_report
from armed_pyro.storage import save
from armed_pyro.summaries import datatree, model_comparison, parameters, variance

__all__ = ["Fit", "compare", "compare_modes", "score_mode"]

P = ParamSpec("P")
Result = TypeVar("Result")


def _verb(
    function: Callable[Concatenate[Posterior, P], Result],
) -> Callable[Concatenate[Fit, P], Result]:
    """A function of a posterior as a method of `Fit`, with its signature and its documentation.

    A function that takes `classifiers` gets those of the fit.
    """
    posterior, *others = inspect.signature(function).parameters.values()
    shown = [parameter for parameter in others if parameter.name != "classifiers"]

    @wraps(function)
    def method(fit: Fit, /, *args: P.args, **kwargs: P.kwargs) -> Result:
        if len(shown) < len(others):
            kwargs.setdefault("classifiers", fit.classifiers)
        return exclusive(function)(fit.posterior, *args, **kwargs)

    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    method.__signature__ = inspect.signature(function).replace(parameters=[itself, *shown])  # type: ignore[attr-defined]
    hidden = rf"^({posterior.name}|classifiers) : .*\n(?:    .*\n)+"
    method.__doc__ = re.sub(hidden, "", inspect.getdoc(function) or "", flags=re.MULTILINE)
    return method


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
        """The training rows, or a sample of them (`sampled`)."""
        return self.posterior.data

    @cached_property
    def network(self) -> nn.Module:
        """E[y | fixed effects] as a torch module, of inputs on the scale of the data.

        Scales of inputs and outcome, link and posterior draws are inside; see
        `armed_pyro.prediction.export.PredictionModule`. ``fit.model.network`` is the bare network.
        """
        return export.PredictionModule(self.posterior, {}, 200, None)

    @property
    def plot(self) -> Plots:
        """Pictures, such as ``fit.plot.effects("Days")``, ``.caterpillar()`` and ``.ppc()``."""
        return Plots(self.posterior, self.classifiers)

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
        """Why training ended.

        "converged" or "validation" (both good), "steps", "interrupted" or "diverged".
        """
        return self.posterior.stopped

    @property
    def refined(self) -> RefinedDraws | None:
        """Draws that replace those of the guide; see `refine`."""
        return self.posterior.refined

    @property
    def sampled(self) -> bool:
        """Whether `data` is a sample, as for a `StreamedData`."""
        return self.posterior.sampled

    @property
    def converged(self) -> bool:
        """Whether the loss had stopped improving at the end."""
        return self.posterior.converged

    draws = _verb(Posterior.draws)
    hyperparameters = _verb(Posterior.hyperparameters)
    predict = _verb(predict.predict)
    export = _verb(export.export)
    concordance = _verb(survival.concordance)
    survival_calibration = _verb(survival.survival_calibration)
    survival = _verb(survival.survival)
    compare_modes = _verb(scores.compare_modes)
    score_mode = _verb(scores.score_mode)
    adapt = _verb(adapt.adapt)
    variance_components = _verb(variance.variance_components)
    fixed_effects = _verb(variance.fixed_effects)
    random_effects = _verb(variance.random_effects)
    coef = _verb(variance.coef)
    confint = _verb(parameters.confint)
    fitted = _verb(residuals.fitted)
    residuals = _verb(residuals.residuals)
    loo = _verb(model_comparison.loo)
    means = _verb(predictions.means)
    predictions = _verb(predictions.predictions)
    slopes = _verb(comparisons.slopes)
    comparisons = _verb(comparisons.comparisons)
    hypothesis = _verb(hypotheses.hypothesis)
    to_datatree = _verb(datatree.to_datatree)
    attribution = _verb(attribution.attribution)
    invariance = _verb(invariance.invariance)
    decoded = _verb(decode.decoded)
    boundaries = _verb(boundaries.boundaries)

    @property
    @exclusive
    def importance(self) -> ImportanceDraws:
        """The guide's draws with their importance weights.

        ValueError if the fit keeps a sample of its rows, and they were not weighted in training.
        """
        return self._weighed.importance or importance_draws(self.posterior)

    @cached_property
    def _weighed(self) -> Posterior:
        return weighed(self.posterior)

    @exclusive
    def diagnostics(self) -> Diagnostics:
        """Verdicts on computation and model; see `armed_pyro.checks.diagnostics.diagnose`."""
        return self._verdict

    @cached_property
    def _verdict(self) -> Diagnostics:
        return diagnostics.diagnose(self.posterior, lambda: self._weighed)

    @exclusive
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
        """The fit with better posterior draws, at the same network weights.

        All results of the new fit use these draws. Their quality is in ``refined.quality``, and
        `diagnostics` judges it.

        Parameters
        ----------
        method : {"psis", "nuts"}
            "psis" weighs draws of the guide. The weights are nested (a few particles for each
            cluster within each draw of the hyperparameters) and Pareto smoothed. "nuts" is the
            No-U-Turn sampler in the coordinates in which the guide is standard normal. It is slower
            by far, but right even if the guide is not (k-hat above 0.7).
        draws : int
            Number of draws, with NUTS over all chains. With very many clusters psis keeps fewer.
        chains, warmup : int
            Number of NUTS chains, and of warm-up steps per chain.
        seed : int, optional
            By default that of the training.
        progress : bool
            Whether to show a progress bar.

        Raises
        ------
        ValueError
            If the method is unknown, a number is too small, or the program has no latent site. If
            the fit keeps only a sample of its rows, and its draws were not weighed during training.

        Examples
        --------
        ``fit(model, data).refine().variance_components()``

        References
        ----------
        Vehtari et al. (2024), "Pareto smoothed importance sampling", JMLR 25(72).
        Hoffman et al. (2019), "NeuTra-lizing bad geometry in Hamiltonian Monte Carlo".
        """
        posterior = refine.refine(
            self.posterior,
            method,
            draws=draws,
            chains=chains,
            warmup=warmup,
            seed=seed,
            progress=progress,
        )
        return replace(self, posterior=posterior)

    @exclusive
    def classifier(self, factor: str) -> ClusterClassifier:
        """The classifier p(cluster | features) of a factor; trained at the first call.

        See `armed_pyro.prediction.cluster_classifier.train_classifier`.
        """
        return self.classifiers.of(self.posterior, factor)

    def compare(self, *others: Fit, names: Sequence[str] | None = None) -> pd.DataFrame:
        """Fits to the same outcomes, compared by leave-one-out cross-validation; see `loo`.

        Parameters
        ----------
        others : Fit
            The other fits.
        names : sequence of str, optional
            Names of all fits, this one first; by default ``fit 1``, ``fit 2``, ...

        Returns
        -------
        pandas.DataFrame
            ArviZ's table, best fit first: rank, elpd, p, elpd_diff with its standard error dse, and
            stacking weights.

        Raises
        ------
        ValueError
            If there is no other fit, outcomes differ, or there is not one distinct name per fit.

        Examples
        --------
        ``compare(linear, network, names=["linear", "network"])``
        """
        fits = (self, *others)
        names = [f"fit {n + 1}" for n in range(len(fits))] if names is None else list(names)
        if len(set(names)) != len(fits) or len(names) != len(fits):
            raise ValueError(f"names= must be {len(fits)} distinct names, found {names!r}")
        pairs = zip(names, fits, strict=True)
        return model_comparison.compare_loo({name: fit.posterior for name, fit in pairs})

    def __repr__(self) -> str:
        return f"Fit of {described(self.posterior)}"

    def _repr_html_(self) -> str:
        from html import escape

        tables = {"Variance components": self.variance_components()}
        if self.model.has_fixed_effects:
            tables = {f"Fixed effects{of_event(self.model)}": self.fixed_effects(), **tables}
        shown = "".join(
            f"<p>{escape(title)}</p>{as_text(table).to_html(index=False, max_rows=20)}"
            for title, table in tables.items()
        )
        return f"<p>{escape(repr(self))}</p>{shown}"

    @exclusive
    def summary(self, *, prob: float = 0.9) -> None:
        """Print the program, data, variance components, fixed effects and convergence."""
        print(summarize(self.results(prob=prob)))

    @exclusive
    def results(self, *, prob: float = 0.9) -> Results:
        """The tables and the verdict, for `armed_pyro.report`."""
        check_probability(prob)
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

    def report(
        self,
        path: str | Path,
        *,
        title: str = "",
        prob: float = 0.9,
        evaluation: pd.DataFrame | None = None,
    ) -> None:
        """Write a report for readers: HTML in one file, or Word, by the ending of the path.

        It has the question in words, the two verdicts and what was not checked, the main effects
        as pictures, the variance components in sentences, a table and a picture, predictive and
        residual plots, all checks, priors, a methods text with references, versions and the seed.

        Parameters
        ----------
        path : str or Path
            The file, which ends in ``.html`` or ``.docx``. A browser prints HTML to PDF.
        title : str
            Title of the report.
        prob : float
            Probability of all intervals.
        evaluation : pandas.DataFrame, optional
            A table of scores on held-out rows, which is shown as it is.

        Raises
        ------
        ImportError
            If matplotlib is not installed, or python-docx for Word.
        ValueError
            If the path has another ending, or is a folder.

        Examples
        --------
        ``fit(model, data).report("report.html", title="Sleep deprivation")``
        """
        check_ending(Path(path))
        content = report(
            self.results(prob=prob),
            self.random_effects(prob=prob),
            title=title,
            evaluation=evaluation,
            pictures=report_pictures(self.plot, prob=prob),
        )
        write_report(content, Path(path))

    @exclusive
    def save(
        self,
        folder: str | Path,
        *,
        draws: int = 1000,
        prob: float = 0.9,
        quote_formulas: bool = False,
    ) -> None:
        """Write the fit to a folder, completely or not at all; `load` reads it.

        The folder is made if needed. A fit in it is replaced; other files are kept.

        Parameters
        ----------
        draws : int
            Draws in ``posterior.nc``, which are compressed, and in single precision where rounding
            stays below a thousandth of their sd. Groups of more than 4 MB, such as log-likelihoods
            of over 1,000 rows, are left out: `to_datatree` of a loaded fit draws them again.
        prob : float
            Probability of the intervals in ``variance_components.csv`` and ``fixed_effects.csv``.
        quote_formulas : bool
            Whether labels in both tables that a spreadsheet would take as formulas get a leading
            apostrophe; see `write_table`.

        Raises
        ------
        ValueError
            If the folder holds other files but no fit, or the program has a user-defined guide,
            term, family or prior, which could not be read again. Nothing is written then.
        OSError
            If the disk has too little space. Nothing is left of what was written.
        """
        check_probability(prob)
        save.check_saveable(self.posterior, folder)
        save.save(
            self.posterior,
            folder,
            classifiers=self.classifiers,
            variance_components=self.variance_components(prob=prob),
            fixed_effects=self.fixed_effects(prob=prob),
            verdict=self.diagnostics().to_json(),
            draws=draws,
            prob=prob,
            quote_formulas=quote_formulas,
        )

    @classmethod
    @exclusive
    def load(
        cls,
        folder: str | Path,
        net: nn.Module | None = None,
        *,
        data: ClusteredData | None = None,
        verify: bool = True,
    ) -> Fit:
        """Read a fit that `save` wrote; on the CPU its predictions are equal to the bit.

        Parameters
        ----------
        net : torch.nn.Module, optional
            A network of the fit's architecture; a copy of it gets the weights of the fit. Not
            needed for networks that are registered by name (``linear``, ``dense``).
        data : ClusteredData, optional
            The training rows of a fit to a dataset, whose inputs are not saved: results about the
            training rows need them, predictions of other rows do not.
        verify : bool
            Whether every file must be as it was saved, by its SHA-256 in the manifest, and the
            network must have the fit's outputs at fixed inputs. False is for files that were
            changed on purpose. A fit of a version that kept no sums is read with a warning.

        Raises
        ------
        ValueError
            If the folder holds no fit, a file is missing, changed, damaged or of a newer version,
            or the network is unknown, has other parameters or computes something else.
        """
        return cls(*save.load(folder, net, data=data, verify=verify))


# The same as functions: ``compare_modes(fit, held_out)``.
compare = Fit.compare
compare_modes = Fit.compare_modes
score_mode = Fit.score_mode
