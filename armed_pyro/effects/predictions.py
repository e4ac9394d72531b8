"""Expected outcomes at observed, typical or chosen values, averaged or row by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from armed_pyro._messages import check_probability
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.effects.averages import Groups, averaged, labelled, title_of
from armed_pyro.effects.expectation import Expectation, Scale, Unseen
from armed_pyro.effects.grid import At, Rest, levels_of, make_grid, variable_kind
from armed_pyro.effects.network_jackknife import NetworkUncertainty
from armed_pyro.effects.result import Effects
from armed_pyro.inference.posterior import Posterior

__all__ = ["means", "names_of", "predictions"]


def names_of(by: str | Sequence[str] | None) -> tuple[str, ...]:
    """One name, several or none as a tuple."""
    return () if by is None else (by,) if isinstance(by, str) else tuple(by)


def predictions(
    posterior: Posterior,
    *,
    at: At | None = None,
    by: str | Sequence[str] | None = None,
    rest: Rest = "observed",
    average: bool = True,
    data: ClusteredData | pd.DataFrame | None = None,
    unseen: Unseen = "population",
    scale: Scale = "response",
    draws: int = 1000,
    prob: float = 0.9,
    seed: int | None = None,
    network_uncertainty: NetworkUncertainty = "none",
) -> Effects:
    r"""Average of E[y | x] over rows, with some variables at chosen values.

    .. math:: \frac{1}{n} \sum_i E[y \mid x_i^{at}, \theta_d] \quad \text{for every draw d}

    Parameters
    ----------
    at : mapping of str to values, optional
        Values of variables, or of a grouping factor: ``{"Days": [0, 9]}``. There is one average for
        every combination.
    by : str or sequence of str, optional
        Variables, or other columns of a table `data`, within whose values is averaged.
    rest : {"observed", "mean", "balanced"}
        The other variables: each row's own values; one typical row, of means of numbers and most
        frequent values of all others; or every combination of categories, with means of numbers.
    average : bool
        Whether to average; otherwise there is one quantity for each row and value of `at`.
    data : ClusteredData or table, optional
        The rows, by default those of the training.
    unseen : {"population", "marginal", None}
        Random effects: zero; integrated over N(0, D), as for a new cluster of the population; or
        those of each row's own cluster, which training has seen (None).
    scale : {"response", "link"}
        E[y], or the linear predictor. Of binomial outcomes the response is the share of successes.
    draws, seed : int
        Posterior draws, and their seed; by default that of the fit.
    prob : float
        Probability of the intervals.
    network_uncertainty : {"none", "jackknife"}
        Whether the draws hold the uncertainty of a network's weights: the delete-a-group jackknife
        over the parts of the clusters or rows on which the networks were cross-fitted, with as many
        degrees of freedom as there are parts less one (`NetworkJackknife`).

    Raises
    ------
    ValueError
        If a variable, level or setting is unknown, the features are images, or a cluster is new
        although `unseen` is None.

    References
    ----------
    Arel-Bundock, Greifer, Heiss (2024), "How to interpret statistical models using
    marginaleffects for R and Python", Journal of Statistical Software 111(9).

    Examples
    --------
    ``fit.predictions(at={"Days": [0, 9]}).to_frame()``
    """
    check_probability(prob)
    columns = names_of(by)
    grid = make_grid(posterior, data, at, rest, columns)
    expectation = Expectation.of(grid, unseen, scale, draws, seed, network_uncertainty)
    groups = Groups.of(grid, columns, average=average)
    values = averaged(expectation, [grid.encode()], groups)
    labels, by_draw = labelled(groups, expectation.labels, values)
    what = "Average expectations" if average else "Expectations"
    return Effects(labels, by_draw, title_of(what, expectation), prob, note=expectation.note)


def means(
    posterior: Posterior,
    factor: str | Sequence[str],
    *,
    at: At | None = None,
    rest: Rest = "balanced",
    data: ClusteredData | pd.DataFrame | None = None,
    unseen: Unseen = "population",
    scale: Scale = "response",
    draws: int = 1000,
    prob: float = 0.9,
    seed: int | None = None,
    network_uncertainty: NetworkUncertainty = "none",
) -> Effects:
    """Estimated marginal means: `predictions` at every level of a categorical variable.

    `contrasts` of the result compares the levels, with simultaneous intervals. By default the other
    categories are equally weighted and numbers are at their means (``rest="balanced"``, as in
    emmeans); with "observed", the averages are over the rows.

    Parameters
    ----------
    factor : str or sequence of str
        Categorical variables, or variables of 0 and 1. Of several, there is one mean for each
        combination.
    at : mapping of str to values, optional
        Values of further variables.
    rest, data, unseen, scale, draws, prob, seed, network_uncertainty
        As in `predictions`.

    Raises
    ------
    ValueError
        As in `predictions`, and if a variable holds other numbers than 0 and 1.

    References
    ----------
    Searle, Speed, Milliken (1980), "Population marginal means in the linear model", The American
    Statistician 34(4).

    Examples
    --------
    ``fit.means("treatment").contrasts()``
    """
    names = names_of(factor)
    grid = make_grid(posterior, data)
    levels: dict[str, Any] = {}
    for name in names:
        kind = variable_kind(grid, name)
        if kind == "number":
            raise ValueError(
                f"{name!r} holds numbers, which have no levels: choose some with "
                f"predictions(at={{{name!r}: [...]}})"
            )
        levels[name] = [0, 1] if kind == "binary" else levels_of(grid, name)
    return predictions(
        posterior,
        at={**levels, **(at or {})},
        rest=rest,
        data=data,
        unseen=unseen,
        scale=scale,
        draws=draws,
        prob=prob,
        seed=seed,
        network_uncertainty=network_uncertainty,
    )
