"""`QuantileResiduals`: residuals of posterior draws, with the rows' features and clusters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pyro
import scipy
import torch
from jaxtyping import Float, Int
from torch import Tensor

from armed_pyro.checks.frequencies import counted
from armed_pyro.checks.score_tests import without_slopes
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.families.family import Family
from armed_pyro.guides.base import n_draws, selected
from armed_pyro.inference.posterior import Posterior
from armed_pyro.program.model import MixedEffects
from armed_pyro.program.predictor import modulates
from armed_pyro.rows.batch import Rows
from armed_pyro.rows.in_memory import HeldRows

__all__ = ["MOST_DRAWS", "MeanResiduals", "QuantileResiduals"]


# Larger data are checked in whole clusters of about this number of rows.
MOST_ROWS = 50_000
MOST_DRAWS, FEWEST_DRAWS = 40, 10
MOST_VALUES = 2**19  # rows times draws
LARGEST = 8.0  # beyond it, 1 - Phi(z) is smaller than the rounding of a distribution function

Draws = Mapping[str, Tensor]
Residuals = Float[np.ndarray, "rows draws"]


@dataclass(frozen=True, eq=False)
class MeanResiduals:
    """Residuals of one column of the predictor, for tests of the predictor.

    Attributes
    ----------
    column : str
        Name of the column; empty unless the outcome has classes.
    values : Float[ndarray, "rows draws"]
        Residuals with mean 0 and variance 1: quantile residuals, or, for families without
        residuals, the score d log p(y | eta) / d eta divided by its sd.
    slope : Float[ndarray, "rows"]
        Shift of the residual per unit of the predictor, relative to its root mean square.
    """

    column: str
    values: Float[np.ndarray, "rows draws"]
    slope: Float[np.ndarray, " rows"]


@dataclass(frozen=True, eq=False)
class QuantileResiduals:
    r"""Randomised quantile residuals of posterior draws, on the normal scale.

    .. math:: z_{id} = \Phi^{-1}(F(y_i \mid \eta_{id}, \theta_d)), \quad (\theta_d, \eta_d) \sim
              p(\theta, \eta \mid y)

    If the program is right, the residuals of one draw are independent standard normal, whatever
    the draw: they are pivotal. For whole numbers, F is drawn at random between its values at y - 1
    and y.

    Attributes
    ----------
    z : Float[ndarray, "rows draws"] or None
        Residuals; None if the family has no distribution function, or its outcomes are classes.
    mean : tuple of MeanResiduals
        Residuals for tests of the predictor, by its columns.
    eta : Float[ndarray, "rows draws columns"]
        Predictor.
    zeros : Float[ndarray, "rows draws"] or None
        P(y_i = 0) of whole numbers other than classes.
    dispersion : float
        Sum of the squared scores relative to their information, which is (y - mu)^2 / Var(y) for
        counts; 1 if the family is right, or has no scores.
    outcome : Float[ndarray, "rows"]
        Outcome.
    names, sources : tuple of str
        Names of the features, and of the table's columns that they come from.
    features : Float[ndarray, "rows features"]
        Features on their original scale; without columns for images.
    codes : mapping of str to Int[ndarray, "rows"]
        Cluster of each row for every grouping factor of the data, numbered without gaps.
    clusters : mapping of str to Int[ndarray, "clusters"]
        Clusters that the codes number, as positions among those of the training data.
    index : Int[ndarray, "rows"]
        Positions of the rows in the data, ascending; a row of frequency f stands f times.
    dispersed : bool
        Whether the dispersion was found to be wrong, and the residuals were divided by their sd.
    correlated : bool
        Whether neighbours were found to be correlated.

    References
    ----------
    Dunn and Smyth (1996), JCGS 5(3): randomized quantile residuals. Yuan and Johnson (2012),
    Biometrics 68(1): goodness-of-fit diagnostics for Bayesian hierarchical models.
    """

    z: Float[np.ndarray, "rows draws"] | None
    mean: tuple[MeanResiduals, ...]
    eta: Float[np.ndarray, "rows draws columns"]
    zeros: Float[np.ndarray, "rows draws"] | None
    dispersion: float
    outcome: Float[np.ndarray, " rows"]
    names: tuple[str, ...]
    sources: tuple[str, ...]
    features: Float[np.ndarray, "rows features"]
    codes: Mapping[str, Int[np.ndarray, " rows"]]
    clusters: Mapping[str, Int[np.ndarray, " clusters"]]
    index: Int[np.ndarray, " rows"]
    dispersed: bool = False
    correlated: bool = False

    @property
    def first(self) -> Int[np.ndarray, " distinct"]:
        """Places of the first of each row's copies, for tests of single rows and of their order."""
        return np.unique(self.index, return_index=True)[1]

    def cleaned(self, remove: Callable[[Residuals], Residuals]) -> QuantileResiduals:
        """Residuals without a misfit that was found, with a mean square of 1 in every draw.

        The tests that follow then find further misfits only: without this, a left-out curve would
        also be reported as a spread that depends on x, and as heavy tails.

        Parameters
        ----------
        remove : callable
            Maps residuals to residuals without the misfit.
        """

        def values(column: MeanResiduals) -> MeanResiduals:
            left = remove(column.values)
            return replace(column, values=left / np.sqrt((left**2).mean(0)))

        mean = tuple(map(values, self.mean))
        return replace(self, mean=mean, z=None if self.z is None else mean[0].values)

    def recentred(self, factors: Iterable[str]) -> QuantileResiduals:
        """Residuals whose means in the clusters of these factors are new draws of N(0, 1 / rows).

        A posterior draw of the random intercepts has the uncertainty of the whole residual. After
        a large part of it was removed, their noise is too large for what is left, and looks like
        a correlation within clusters.
        """
        rng, residuals = np.random.default_rng(0), self
        for name in factors:
            residuals = residuals.cleaned(partial(_recentred, codes=self.codes[name], rng=rng))
        return residuals

    @classmethod
    def of(cls, posterior: Posterior, latents: Draws, *, seed: int = 0) -> QuantileResiduals:
        """Residuals of the first draws, in at most about 50,000 rows of the training data.

        Parameters
        ----------
        posterior : Posterior
            The fitted program.
        latents : mapping of str to Tensor
            Posterior draws, as returned by `Fit.draws`.
        seed : int
            Seed of the rows, and of the residuals of whole numbers.

        Raises
        ------
        ValueError
            If predictions are not finite.
        """
        model, data = posterior.model, posterior.data
        source = model.encode(data)
        index = _chosen(posterior, seed)
        most = FEWEST_DRAWS if modulates(model) else max(FEWEST_DRAWS, MOST_VALUES // len(index))
        drawn = selected(latents, slice(min(MOST_DRAWS, most)))
        rows = source.dense_batch(torch.from_numpy(index).to(source.like.device))
        with torch.no_grad():
            eta = model.predictor(rows, drawn, return_fixed=False).eta
            eta = eta.reshape(-1, *eta.shape[-2:])
            # Without random effects the predictor of a network is the same in all draws.
            eta = eta.expand(max(len(eta), n_draws(drawn)), *eta.shape[-2:])
            parameters = {
                name: value.reshape(-1, 1).double()
                for name, value in model.family_parameters(drawn).items()
            }
            parameters = dict(model.row_parameters(parameters, rows))
            mean = model.family.expected(eta, parameters, rows)
        finite = torch.isfinite(mean)
        if not finite.all():
            share = 1 - finite.double().mean()
            raise ValueError(f"predictions are not finite numbers in {share:.0%} of the rows")
        z, zeros = _quantiles(model, eta, drawn, rows, seed)
        information = _information(model.family, eta, parameters, rows)
        columns = _mean_residuals(model, eta, parameters, rows, z, information)
        dispersion = 1.0
        if zeros is not None:
            score = _score(model.family, eta, parameters, rows)
            dispersion = _dispersion(score[..., :1], information[..., :1])
        codes = _codes(data, source, index)
        table = bool(data.feature_names) and data.features.dim() == 2
        features = data.features[index].double().numpy() if table else np.zeros((len(index), 0))
        return cls(
            z,
            columns,
            eta.double().cpu().numpy().transpose(1, 0, 2),
            zeros,
            dispersion,
            rows.outcome().double().cpu().numpy(),
            data.feature_names if table else (),
            data.sources if table else (),
            features,
            {name: codes for name, (_, codes) in codes.items()},
            {name: clusters for name, (clusters, _) in codes.items()},
            index,
        )


def _codes(
    data: ClusteredData, source: HeldRows, index: Int[np.ndarray, " rows"]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Clusters among the rows, and each row's place among these, for every factor of the data.

    The clusters of the program's factors are numbered as in the training data.
    """
    groupings = {name: grouping.codes for name, grouping in data.groupings.items()}
    return {
        name: np.unique(values.cpu().numpy()[index], return_inverse=True)
        for name, values in {**groupings, **source.codes}.items()
    }


def _recentred(
    z: Residuals, codes: Int[np.ndarray, " rows"], rng: np.random.Generator
) -> Residuals:
    sizes = np.bincount(codes)
    left = without_slopes(z, np.ones(len(codes)), codes)
    square = (left**2).mean(0)
    # Residuals within clusters have 1 - clusters / rows of the variance.
    left = left * np.sqrt((1 - len(sizes) / len(codes)) / np.where(square > 0, square, 1))
    return left + (rng.normal(size=(len(sizes), z.shape[1])) / np.sqrt(sizes)[:, None])[codes]


def _chosen(posterior: Posterior, seed: int) -> Int[np.ndarray, " rows"]:
    """All rows as often as they count, or those of whole clusters of the largest factor."""
    data = posterior.data
    index = counted(data, np.arange(data.n_rows), MOST_ROWS, seed)
    if len(index) <= MOST_ROWS:
        return index
    factor = posterior.model.largest_factor()
    # Without clusters, blocks of neighbouring rows keep the order of the rows.
    codes = index // 100 if factor is None else data.grouping(factor).codes.numpy()[index]
    order = np.random.default_rng(seed).permutation(int(codes.max()) + 1)
    rows = np.bincount(codes, minlength=len(order))[order].cumsum()
    kept = order[: max(1, int(np.searchsorted(rows, MOST_ROWS, "right")))]
    return index[np.isin(codes, kept)][:MOST_ROWS]


def _quantiles(
    model: MixedEffects, eta: Tensor, latents: Draws, rows: Rows, seed: int
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Quantile residuals, and P(y = 0) of whole numbers; None where they do not exist."""
    family = model.family
    if family.no_residuals:
        return None, None
    y = rows.outcome().double()
    rng, z, zeros = np.random.default_rng(seed), list[np.ndarray](), list[np.ndarray]()
    for predictor, parameters in model.by_draw(eta, latents, rows):
        ends = family.cdf_range(y, predictor, parameters, rows)
        if ends is None:
            return None, None
        lower, quantile = ends
        if (lower < quantile).any():  # outcomes with a probability of their own
            quantile = lower + rng.uniform(size=len(y)) * (quantile - lower)
        if family.integer and not family.has_class_probabilities:
            none = family.cdf(torch.zeros_like(y), predictor, parameters, rows)
            assert none is not None  # for mypy, as `ends` is not None
            zeros.append(none.cpu().numpy())
        z.append(scipy.special.ndtri(quantile).clip(-LARGEST, LARGEST))
    residuals = np.column_stack(z)
    if not np.isfinite(residuals).all():
        raise ValueError("the distribution function of the outcome is not finite")
    return residuals, np.column_stack(zeros) if zeros else None


def _dispersion(
    score: Float[np.ndarray, "draws rows 1"], information: Float[np.ndarray, "draws rows 1"]
) -> float:
    """Squared scores relative to their expectation; rows of little information weigh less."""
    weight = 1 / (information + 0.25 * information.mean())
    return float((weight * score**2).sum() / (weight * information).sum())


def _mean_residuals(
    model: MixedEffects,
    eta: Tensor,
    parameters: Draws,
    rows: Rows,
    z: np.ndarray | None,
    information: Float[np.ndarray, "draws rows columns"],
) -> tuple[MeanResiduals, ...]:
    """Quantile residuals if there are any, otherwise scores; and how eta shifts them."""
    family, columns = model.family, model.data_facts().outcome_columns
    if z is not None:
        return (MeanResiduals(columns[0], z, _relative(information[..., 0].mean(0))),)
    score = _score(family, eta, parameters, rows)
    if not np.isfinite(score).all():
        raise ValueError("the score of the outcome is not finite")
    residuals = list[MeanResiduals]()
    for c, column in enumerate(columns):
        values = (score[..., c] / np.sqrt(information[..., c])).T
        if (
            not family.is_class
        ):  # the information is that of an exponential family, which this need not be
            values /= np.sqrt((values**2).mean(0))
        slope = _relative(information[..., c].mean(0))
        residuals.append(MeanResiduals(column, values, slope))
    return tuple(residuals)


def _relative(information: Float[np.ndarray, " rows"]) -> Float[np.ndarray, " rows"]:
    return np.sqrt(information / information.mean())


def _score(family: Family, eta: Tensor, parameters: Draws, rows: Rows) -> np.ndarray:
    """d log p(y | eta) / d eta, shape "draws rows columns"."""
    with torch.enable_grad(), pyro.validation_enabled(False):
        eta = eta.double().detach().requires_grad_(True)
        log_prob = family.distribution(eta, parameters, rows).log_prob(rows.outcome().double())
        return np.asarray(torch.autograd.grad(log_prob.sum(), eta)[0].cpu().numpy())


def _information(family: Family, eta: Tensor, parameters: Draws, rows: Rows) -> np.ndarray:
    """Fisher information of eta, shape "draws rows columns", at least 1e-6 of its mean.

    In exponential families the curvature of log p(y | eta) is linear in y, and therefore its
    expectation is the curvature at y = E[y]. A family whose curvature is not known gives ones.
    """
    eta = eta.double().detach()
    precision = family.precision(parameters)
    if precision is not None:
        relative = precision / precision.mean(-1, keepdim=True)
        return np.broadcast_to(relative[..., None].cpu().numpy(), eta.shape)
    information = family.information(eta, parameters, rows)
    if information is not None:
        return _positive(information.expand_as(eta))
    mean = family.expected(eta, parameters, rows).detach()
    if family.multiclass:
        values = (mean * (1 - mean))[..., 1:]
    else:
        with torch.enable_grad(), pyro.validation_enabled(False):
            eta.requires_grad_(True)
            log_prob = family.distribution(eta, parameters, rows).log_prob(mean)
            (slope,) = torch.autograd.grad(log_prob.sum(), eta, create_graph=True)
            if not slope.requires_grad:
                return np.ones(eta.shape)
            (curvature,) = torch.autograd.grad(slope.sum(), eta)
        values = -curvature
    return _positive(values)


def _positive(values: Tensor) -> np.ndarray:
    """Information as an array, at least 1e-6 of its mean; ones if it is not positive."""
    information = values.detach().double().cpu().numpy()
    if not np.isfinite(information).all() or information.mean() <= 0:
        return np.ones(information.shape)
    return np.asarray(information.clip(1e-6 * information.mean()))
