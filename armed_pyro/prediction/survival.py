"""Survival curves, median times and concordance of predicted times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from armed_pyro._messages import check_probability
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.data.xarray_names import label_values
from armed_pyro.distributions.survival_densities import Survival
from armed_pyro.inference.posterior import Posterior
from armed_pyro.prediction.chunks import predict_rows
from armed_pyro.prediction.cluster_classifier import Classifiers
from armed_pyro.prediction.predict import effect_source
from armed_pyro.rows.batch import Rows
from armed_pyro.rows.censoring import EVENT, RIGHT

__all__ = ["concordance", "harrell", "kaplan_meier", "survival", "survival_calibration"]

# Times of a curve, if none are given.
TIMES = 50

Array = np.ndarray


def survival(
    posterior: Posterior,
    data: ClusteredData | pd.DataFrame,
    times: Sequence[float] | None = None,
    *,
    unseen: str | None = None,
    support: ClusteredData | pd.DataFrame | None = None,
    draws: int = 1000,
    prob: float = 0.9,
    seed: int | None = None,
    classifiers: Classifiers | None = None,
) -> xr.Dataset:
    r"""Survival curves :math:`S(t) = P(y > t \mid x, cluster)` and median times, with bands.

    The curve of a row in a new cluster depends on the mode `unseen`, as in `Fit.predict`: with
    "marginal", the band includes the differences between clusters.

    Parameters
    ----------
    data : ClusteredData or table
        New rows; their times and statuses are not needed.
    times : sequence of float, optional
        Times of the curves; by default 50 from 0 to the largest time of the training rows.
    unseen, support
        Source of the random effects of new clusters, as in `Fit.predict`.
    draws, seed : int
        Posterior draws, and their seed; by default that of the fit.
    prob : float
        Probability of the bands, pointwise and equal-tailed.
    classifiers : Classifiers, optional
        Classifiers for "membership" and "nearest"; a missing one is trained.

    Returns
    -------
    xarray.Dataset
        ``survival``, ``lower`` and ``upper`` (row, time): the posterior mean of S(t) and its band;
        ``median``, ``median_lower`` and ``median_upper`` (row) of the median time.

    Raises
    ------
    ValueError
        If the family is not one of measurements or times with a survivor function, times are not
        finite, or as `Fit.predict`.

    Examples
    --------
    ``fit.survival(patients, times=[1, 2, 5]).survival.sel(time=5)``
    """
    check_probability(prob)
    data = posterior.encode(data)
    source, _ = effect_source(
        posterior,
        data,
        unseen,
        support=support,
        draws=draws,
        seed=seed,
        classifiers=classifiers,
    )
    # Outcomes that the rows may have are of no use here.
    rows = replace(data, outcome=None, status=None, upper=None, entry=None)
    made = predict_rows(posterior, rows, source, draws=draws, seed=seed, outcomes=False)
    eta = torch.from_numpy(made.outcome).double()[..., None]  # "draws rows 1"
    parameters = {
        name: value.reshape(-1, 1).double().cpu()
        for name, value in posterior.model.family_parameters(source.latents).items()
    }
    exact, grid = Rows(torch.zeros(eta.shape[1], 0), None, {}), _times(posterior, times)
    tail = [(1 - prob) / 2, (1 + prob) / 2]
    density = posterior.model.family.survivor(eta, parameters, exact)
    if density is None:
        raise ValueError(
            f"family {posterior.model.family.name!r} has no survivor function: curves need a "
            "family of times, such as weibull"
        )
    curves = [_summary(_survival(density, time, eta), tail) for time in grid]
    half = _summary(density.quantile(torch.full(eta.shape[1:2], 0.5).double()).numpy(), tail)
    names = ("survival", "lower", "upper")
    values = {
        name: (("row", "time"), np.stack([curve[place] for curve in curves], 1))
        for place, name in enumerate(names)
    }
    medians = zip(("median", "median_lower", "median_upper"), half, strict=True)
    coords = {"row": label_values(data.row_labels), "time": grid, "unseen": ("row", made.unseen)}
    return xr.Dataset({**values, **{name: ("row", value) for name, value in medians}}, coords)


def concordance(
    posterior: Posterior,
    data: ClusteredData | pd.DataFrame | None = None,
    *,
    unseen: str | None = None,
    draws: int = 1000,
    seed: int | None = None,
) -> float:
    r"""Share of comparable pairs of rows whose expected times have the order of their events.

    A pair is comparable if the earlier of its two times is an event. 1/2 is chance, 1 a perfect
    order. Of the training rows, the default, it is too high, as each row helped to fit its own
    prediction.

    Parameters
    ----------
    data : ClusteredData or table, optional
        Rows with times and statuses; by default the training rows.
    unseen : str, optional
        Source of the random effects of new clusters, as in `Fit.predict`.
    draws, seed : int
        Posterior draws, and their seed; by default that of the fit.

    Raises
    ------
    ValueError
        If rows have no outcome, no pair is comparable, or as `Fit.predict`.

    References
    ----------
    Harrell, Lee and Mark (1996), Statistics in Medicine 15(4).

    Examples
    --------
    ``fit.concordance(held_out, unseen="marginal")``
    """
    rows = posterior.data if data is None else posterior.encode(data)
    if rows.outcome is None:
        raise ValueError("the rows have no outcome, with which predictions could be compared")
    source, _ = effect_source(posterior, rows, unseen, draws=draws, seed=seed)
    made = predict_rows(posterior, rows, source, draws=draws, seed=seed, outcomes=False)
    status = None if rows.status is None else rows.status.numpy()
    share = harrell(rows.outcome.numpy(), status, made.mean)
    if np.isnan(share):
        raise ValueError("no row has an event before the time of another row: nothing to compare")
    return share


def survival_calibration(
    posterior: Posterior,
    data: ClusteredData | pd.DataFrame | None = None,
    times: Sequence[float] | None = None,
    *,
    unseen: str | None = None,
    draws: int = 1000,
    prob: float = 0.9,
    seed: int | None = None,
) -> pd.DataFrame:
    r"""Mean predicted survival of rows beside the share that survived, by Kaplan and Meier.

    Parameters
    ----------
    data : ClusteredData or table, optional
        Rows with times and statuses; by default the training rows.
    times : sequence of float, optional
        By default the deciles of the observed times.
    unseen : str, optional
        Source of the random effects of new clusters, as in `Fit.predict`.
    draws, seed : int
        Posterior draws, and their seed; by default that of the fit.
    prob : float
        Probability of the intervals.

    Returns
    -------
    pandas.DataFrame
        Columns time, predicted, observed, lower and upper (interval of the observed share, by
        Greenwood's variance of its log(-log)).

    Raises
    ------
    ValueError
        If rows have no outcome, or outcomes are censored otherwise than from the right.

    References
    ----------
    Kaplan and Meier (1958), JASA 53(282); Kalbfleisch and Prentice (1980), section 1.3.

    Examples
    --------
    ``fit.survival_calibration(held_out, unseen="marginal")``
    """
    rows = posterior.data if data is None else posterior.encode(data)
    if rows.outcome is None:
        raise ValueError("the rows have no outcome, with which predictions could be compared")
    status = torch.full_like(rows.outcome, EVENT) if rows.status is None else rows.status
    if bool((status > EVENT).any()):
        raise ValueError(
            "outcomes are censored from the left or in intervals, where the estimate of Kaplan and "
            "Meier is not defined: look at the residuals, Fit.residuals('quantile')"
        )
    y = rows.outcome.numpy()
    grid = np.quantile(y, np.arange(1, 10) / 10) if times is None else np.asarray(times, float)
    settings = {"unseen": unseen, "draws": draws, "prob": prob, "seed": seed}
    curves = survival(posterior, rows, [*grid], **settings)  # type: ignore[arg-type]
    entry = None if rows.entry is None else rows.entry.numpy()
    observed = kaplan_meier(y, status.numpy() == EVENT, grid, entry=entry, prob=prob)
    predicted = curves["survival"].mean("row").to_numpy()
    return observed.assign(predicted=predicted)[["time", "predicted", "observed", "lower", "upper"]]


def harrell(time: Array, status: Array | None, predicted: Array) -> float:
    """Harrell's concordance of predicted times; ties of predictions count half. NaN without pairs.

    >>> harrell(np.array([1.0, 2, 3]), np.array([1.0, 0, 1]), np.array([1.5, 1.0, 4.0]))
    0.5
    """
    status = np.full(len(time), EVENT) if status is None else status
    known = (status == EVENT) | (status == RIGHT)
    time, event, predicted = time[known], status[known] == EVENT, predicted[known]
    right = pairs = 0.0
    for place in np.flatnonzero(event):
        later = (time > time[place]) | ((time == time[place]) & ~event)
        above = predicted[later] - predicted[place]
        right += (above > 0).sum() + 0.5 * (above == 0).sum()
        pairs += later.sum()
    return float(right / pairs) if pairs else float("nan")


def kaplan_meier(
    time: Array,
    event: Array,
    at: Float[Array, " times"],
    *,
    entry: Array | None = None,
    prob: float = 0.9,
) -> pd.DataFrame:
    """Share of rows without an event by these times, with its interval.

    >>> kaplan_meier(np.array([1.0, 2, 3]), np.array([True, False, True]), np.array([1.5]))[
    ...     ["time", "observed"]
    ... ].round(3)
       time  observed
    0   1.5     0.667
    """
    from scipy import special  # slow to import

    moments = np.unique(time[event])
    start = np.full(len(time), -np.inf) if entry is None else entry
    at_risk = np.array([((time >= t) & (start < t)).sum() for t in moments])
    events = np.array([((time == t) & event).sum() for t in moments])
    with np.errstate(divide="ignore", invalid="ignore"):
        log_share = np.concatenate([[0.0], np.cumsum(np.log1p(-events / at_risk))])
        variance = np.cumsum(events / (at_risk * (at_risk - events)))
        variance = np.concatenate([[0.0], variance])
        place = np.searchsorted(moments, at, "right")
        share, spread = np.exp(log_share[place]), np.sqrt(variance[place]) / -log_share[place]
        width = np.exp(special.ndtri((1 + prob) / 2) * np.where(np.isfinite(spread), spread, 0))
    return pd.DataFrame(
        {"time": at, "observed": share, "lower": share**width, "upper": share ** (1 / width)}
    )


def _times(posterior: Posterior, times: Sequence[float] | None) -> Float[Array, " times"]:
    if times is None:
        outcome = posterior.data.outcome
        if outcome is None or not len(outcome):
            raise ValueError("the fit was kept without its rows: give the times of the curves")
        return np.linspace(min(0.0, float(outcome.min())), float(outcome.max()), TIMES)
    grid = np.asarray(times, dtype=float)
    if grid.ndim != 1 or not len(grid) or not np.isfinite(grid).all():
        raise ValueError(f"times= must be a list of finite numbers, found {times!r}")
    return grid


def _survival(density: Survival, time: float, eta: Tensor) -> Float[Array, "draws rows"]:
    """S(t) of every draw and row."""
    if density.positive and time <= 0:
        return np.ones(eta.shape[:2])
    value = torch.full(eta.shape[1:2], time, dtype=eta.dtype)
    return density.log_survival(value).exp().numpy()


def _summary(values: Array, tail: list[float]) -> tuple[Array, Array, Array]:
    """Mean and ends of the band of every row."""
    lower, upper = np.quantile(values, tail, axis=0)
    return values.mean(0), lower, upper
