"""Prediction: posterior draws for new rows, as tables and labelled ArviZ data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float, Shaped

from armed_pyro._messages import check_probability
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.data.xarray_names import (
    FactorNames,
    factor_names,
    label_values,
    unique_names,
    variable_name,
)

__all__ = ["NewEffects", "Prediction", "Reconstructed"]


@dataclass(frozen=True, eq=False)
class NewEffects:
    """Random effects of the clusters of one factor that were not seen in training."""

    labels: pd.Index  # the clusters
    terms: tuple[str, ...]
    values: Float[np.ndarray, "draws new terms"]  # on the original scale
    modes: tuple[str, ...]  # mode used for each cluster


@dataclass(frozen=True, eq=False)
class Reconstructed:
    """Posterior mean and sd of every row's reconstructed features.

    Draws are not kept: each would take as much memory as the rows.
    """

    mean: Float[np.ndarray, "rows ..."]
    sd: Float[np.ndarray, "rows ..."]


@dataclass(frozen=True, eq=False)
class Prediction:
    """Posterior draws of the expected outcome and of the outcome, one column per row.

    Rows of a cluster share its random effects in every draw, so the draws have the joint predictive
    distribution of the rows.

    Attributes
    ----------
    expected : Float[ndarray, "draws rows"] or Float[ndarray, "draws rows classes"]
        E[y | draw] in units of the outcome, or the probability of every class.
    outcome : Float[ndarray, "draws rows"]
        Draws of y; class codes for categorical outcomes.
    unseen : Shaped[ndarray, "rows"]
        Mode used for rows in clusters not seen in training; empty for rows in seen clusters.
    row_labels, outcome_name, classes
        Labels of the rows, name of the outcome, and labels of the classes if it has any.
    prob : float
        Probability of the (equal-tailed) intervals.
    new : mapping of str to NewEffects
        Random effects of the new clusters, by factor; empty if each row was a separate cluster.
    membership : pandas.DataFrame or None
        For the modes "membership" and "nearest", the seen cluster that each new cluster resembles;
        see `armed_pyro.prediction.similarity.evidence_table`.
    others : mapping of str to Reconstructed
        The program's other outcomes, by name.
    interval_of : {"expected", "outcome"}
        Whether the intervals of `to_frame` are those of E[y] or of y.
    names : mapping of str to FactorNames
        Names of each grouping factor's dimensions and variables in `to_datatree`.

    Examples
    --------
    >>> draws = np.array([[1.0, 4.0], [3.0, 6.0]])
    >>> modes = np.array(["", "marginal"])
    >>> prediction = Prediction(draws, draws, modes, pd.Index(["a", "b"]), "y", None, 0.5)
    >>> prediction.to_frame()[["mean", "lower", "upper"]]
       mean  lower  upper
    a   2.0    1.5    2.5
    b   5.0    4.5    5.5
    """

    expected: Float[np.ndarray, "draws rows ..."]
    outcome: Float[np.ndarray, "draws rows"]
    unseen: Shaped[np.ndarray, " rows"]
    row_labels: pd.Index
    outcome_name: str
    classes: tuple[str, ...] | None
    prob: float
    new: Mapping[str, NewEffects] = field(default_factory=dict)
    membership: pd.DataFrame | None = None
    others: Mapping[str, Reconstructed] = field(default_factory=dict)
    names: Mapping[str, FactorNames] = field(default_factory=dict)
    interval_of: str = "expected"

    @property
    def mean(self) -> Float[np.ndarray, "rows ..."]:
        """Posterior mean of the expected outcome."""
        return self.expected.mean(0)

    @property
    def sd(self) -> Float[np.ndarray, "rows ..."]:
        """Posterior standard deviation of the expected outcome."""
        return self.expected.std(0, ddof=1)

    def interval(
        self, prob: float | None = None, *, of: str = "expected"
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ends of the equal-tailed interval, with the probability of the prediction by default.

        It is the credible interval of E[y], or the predictive interval of y (of="outcome").
        """
        if of not in ("expected", "outcome"):
            raise ValueError(f"`of` is 'expected' or 'outcome', not {of!r}")
        prob = self.prob if prob is None else prob
        check_probability(prob)
        tail = (1 - prob) / 2
        draws = self.expected if of == "expected" else self.outcome
        return tuple(np.quantile(draws, [tail, 1 - tail], axis=0))

    def expected_rating(self, values: Sequence[float] | None = None) -> pd.DataFrame:
        """Mean of ordered classes as numbers: the sum of value times probability.

        Parameters
        ----------
        values : sequence of float, optional
            The number of each class, in order; by default the labels if they are numbers, and
            otherwise 1, 2, ...

        Returns
        -------
        pandas.DataFrame
            Columns mean, sd, lower, upper of the expected rating, one row per predicted row.

        Raises
        ------
        ValueError
            If the outcome has no classes with probabilities, or `values` has another length.

        Examples
        --------
        >>> draws = np.array([[[0.5, 0.5]], [[0.25, 0.75]]])
        >>> codes, modes = np.zeros((2, 1)), np.array([""])
        >>> prediction = Prediction(draws, codes, modes, pd.Index([7]), "y", ("2", "4"), 0.9)
        >>> prediction.expected_rating()["mean"].tolist()
        [3.25]
        """
        if self.expected.ndim != 3:
            raise ValueError("the outcome has no classes: its mean is in to_frame()")
        count = self.expected.shape[2]
        if values is None:
            try:
                values = [float(label) for label in self.classes or ()]
            except ValueError:
                values = []
            values = values or list(range(1, count + 1))
        if len(values) != count:
            raise ValueError(f"`values` has {len(values)} numbers for {count} classes: give each")
        rating = self.expected @ np.asarray(values, dtype=float)
        tail = (1 - self.prob) / 2
        lower, upper = np.quantile(rating, [tail, 1 - tail], axis=0)
        columns = {"mean": rating.mean(0), "sd": rating.std(0, ddof=1)}
        columns |= {"lower": lower, "upper": upper}
        return pd.DataFrame(columns, index=self.row_labels)

    def to_frame(self) -> pd.DataFrame:
        """Table with mean, sd, lower, upper (by class for categorical outcomes) and unseen.

        The sd and the interval are those of E[y], or of y if `interval_of` is "outcome". For an
        outcome with two labels, `event` is the label that the probabilities are of.
        """
        lower, upper = self.interval(of=self.interval_of)
        event: dict[str, np.ndarray] = {}
        sd = self.sd if self.interval_of == "expected" else self.outcome.std(0, ddof=1)
        columns = {"mean": self.mean, "sd": sd, "lower": lower, "upper": upper}
        if self.expected.ndim == 3:
            names = self.classes or tuple(map(str, range(self.expected.shape[2])))
            columns = {
                f"{column}[{name}]": values[:, code]
                for code, name in enumerate(names)
                for column, values in columns.items()
            }
        elif self.classes is not None:
            event = {"event": np.full(len(self.unseen), self.classes[1], dtype=object)}
        return pd.DataFrame({**columns, "unseen": self.unseen, **event}, index=self.row_labels)

    def to_dataset(self) -> xr.Dataset:
        """Draws with dimensions chain, draw, row (and class); other outcomes without draws.

        Another outcome ``image`` gives ``image_expected``, the posterior mean of every value of a
        row, and ``image_expected_sd``.
        """
        dims = ("chain", "draw", "row")
        coords: dict[str, object] = {"row": self.row_labels.to_numpy()}
        expected_dims = (*dims, "class")[: self.expected.ndim + 1]
        if self.expected.ndim == 3:
            coords["class"] = list(self.classes or range(self.expected.shape[2]))
        variables: dict[str, object] = {
            self.outcome_name: (dims, self.outcome[None]),
            f"{self.outcome_name}_expected": (expected_dims, self.expected[None]),
            "unseen": ("row", self.unseen),
        }
        for name, other in self.others.items():
            axes = ("row", *(f"axis_{i}" for i in range(1, other.mean.ndim)))
            variables[f"{name}_expected"] = (axes, other.mean)
            variables[f"{name}_expected_sd"] = (axes, other.sd)
        return xr.Dataset(variables, coords)

    def to_datatree(self, observed: ClusteredData | None = None) -> xr.DataTree:
        """Draws in ArviZ's schema: the groups predictions and predictions_constant_data.

        ``predictions`` has the variables of `to_dataset`, the random effects of new clusters as
        ``<factor>_effect`` (chain, draw, <factor>, <factor>_term), and the mode used for each
        cluster as ``<factor>_mode``.

        The clusters of `observed`, the predicted rows, go to ``predictions_constant_data``. Their
        outcomes, if known, go to ``observed_data``, for ArviZ's predictive checks
        (``group="predictions"``).

        Examples
        --------
        ``fit.predict(rows, unseen="marginal").to_datatree()["predictions"]``
        """
        outcome, row = variable_name(self.outcome_name), label_values(self.row_labels)
        predictions = self.to_dataset().rename({self.outcome_name: outcome})
        draw = np.arange(len(self.expected))
        predictions = predictions.assign_coords(chain=[0], draw=draw, row=row)
        named = self.names or factor_names({name: name for name in self.new}, [outcome])
        for name, effects in self.new.items():
            names = named[name]
            cluster, term = names.cluster, names.term
            dims = ("chain", "draw", cluster, term)
            predictions[names.effect] = (dims, effects.values[None])
            predictions[names.mode] = (cluster, np.array(effects.modes, dtype=np.str_))
            coords = {cluster: label_values(effects.labels), term: list(effects.terms)}
            predictions = predictions.assign_coords(coords)
        predictions.attrs = {"inference_library": "armed_pyro", "creation_library": "armed_pyro"}
        groups = {"predictions": predictions}
        if observed is not None:
            columns = unique_names((n for n in observed.groupings if n not in named), [outcome])
            columns |= {name: names.cluster for name, names in named.items()}
            clusters = {
                columns[name]: ("row", label_values(grouping.levels)[grouping.codes.numpy()])
                for name, grouping in observed.groupings.items()
            }
            groups["predictions_constant_data"] = xr.Dataset(clusters, {"row": row})
            if observed.outcome is not None:
                values = {outcome: ("row", observed.outcome.numpy())}
                groups["observed_data"] = xr.Dataset(values, {"row": row})
        return xr.DataTree.from_dict(groups)
