"""Predictions for new rows, in clusters seen in training and in new ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float, Shaped

from armed_pyro.data import ClusteredData

if TYPE_CHECKING:
    from armed_pyro.fitted import Fit

__all__ = ["MODES", "Prediction", "predict", "predict_chunks"]

MODES: Mapping[str, str] = {
    "population": "random effects zero: the fixed effects alone, with no cluster uncertainty",
    "marginal": "random effects drawn from N(0, D): a new cluster of the same population",
}

# Values of the random effects' design times draws in a block of rows: about 100 MB.
BLOCK_VALUES = 2**24


@dataclass(frozen=True, eq=False)
class Prediction:
    """Posterior draws of the expected outcome and of the outcome, one column a row.

    Rows of one cluster share its random effects in every draw, so their joint distribution is
    the predictive one.

    Attributes
    ----------
    expected : Float[ndarray, "draws rows"] or Float[ndarray, "draws rows classes"]
        E[y | draw]: means, counts, or the probability of every class.
    outcome : Float[ndarray, "draws rows"]
        Draws of y itself; class codes for categorical outcomes.
    unseen : Shaped[ndarray, "rows"]
        Mode used for rows in clusters not seen in training; empty for seen ones.
    row_labels : pandas.Index
        Labels of the rows.
    classes : tuple or None
        Labels of the classes.
    prob : float
        Probability of the (equal-tailed) intervals.

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
        """Equal-tailed interval of the expected outcome, or of the outcome itself.

        Parameters
        ----------
        prob : float, optional
            Probability it holds; by default the prediction's own.
        of : {"expected", "outcome"}
            Credible interval of E[y], or predictive interval of y.
        """
        if of not in ("expected", "outcome"):
            raise ValueError(f"`of` is 'expected' or 'outcome', not {of!r}")
        tail = (1 - (self.prob if prob is None else prob)) / 2
        draws = self.expected if of == "expected" else self.outcome
        lower, upper = np.quantile(draws, [tail, 1 - tail], axis=0)
        return lower, upper

    def to_frame(self) -> pd.DataFrame:
        """Table with mean, sd, lower, upper (by class for categorical outcomes) and unseen."""
        lower, upper = self.interval()
        columns = {"mean": self.mean, "sd": self.sd, "lower": lower, "upper": upper}
        if self.expected.ndim == 3:
            names = self.classes or tuple(map(str, range(self.expected.shape[2])))
            columns = {
                f"{column}[{name}]": values[:, code]
                for code, name in enumerate(names)
                for column, values in columns.items()
            }
        return pd.DataFrame({**columns, "unseen": self.unseen}, index=self.row_labels)

    def to_dataset(self) -> xr.Dataset:
        """Draws with dimensions chain, draw, row (and class)."""
        dims = ("chain", "draw", "row")
        coords: dict[str, object] = {"row": self.row_labels.to_numpy()}
        expected_dims: tuple[str, ...] = dims
        if self.expected.ndim == 3:
            expected_dims = (*dims, "class")
            coords["class"] = list(self.classes or range(self.expected.shape[2]))
        return xr.Dataset(
            {
                self.outcome_name: (dims, self.outcome[None]),
                f"{self.outcome_name}_expected": (expected_dims, self.expected[None]),
                "unseen": ("row", self.unseen),
            },
            coords,
        )


def predict(
    fit: Fit,
    data: ClusteredData | pd.DataFrame,
    *,
    unseen: str | None = None,
    draws: int = 1000,
    prob: float = 0.9,
    seed: int | None = None,
) -> Prediction:
    r"""E[y | x, cluster] and y of new rows given every posterior draw.

    Parameters
    ----------
    fit : Fit
        The fit.
    data : ClusteredData or table
        New rows; a table is encoded as the training table was. The outcome is not needed.
    unseen : {"population", "marginal"}, optional
        What random effects clusters get that were not seen in training: zero, or one draw of
        :math:`N(0, D)` a cluster and posterior draw of D. Required if there are such clusters.
    draws : int
        Posterior draws.
    prob : float
        Probability of the intervals.
    seed : int, optional
        Seed of the draws; the fit's own by default.

    Raises
    ------
    ValueError
        If there are unseen clusters and no mode for them, or the rows do not match the training
        data.
    """
    parts = list(predict_chunks(fit, data, unseen=unseen, draws=draws, prob=prob, seed=seed))
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    return Prediction(
        np.concatenate([part.expected for part in parts], 1),
        np.concatenate([part.outcome for part in parts], 1),
        np.concatenate([part.unseen for part in parts]),
        first.row_labels.append([part.row_labels for part in parts[1:]]),
        first.outcome_name,
        first.classes,
        prob,
    )


def predict_chunks(
    fit: Fit,
    data: ClusteredData | pd.DataFrame,
    *,
    unseen: str | None = None,
    draws: int = 1000,
    prob: float = 0.9,
    seed: int | None = None,
    chunk: int | None = None,
) -> Iterator[Prediction]:
    """The same as `predict`, in blocks of consecutive rows, so that memory stays bounded.

    The expected outcomes do not depend on the blocks' size; the draws of the outcome about them
    use other random numbers.

    Parameters
    ----------
    chunk : int, optional
        Rows a block; by default so many that a block's arrays take about 100 MB.
    """
    if not 0 < prob < 1:
        raise ValueError(f"`prob` must lie between 0 and 1, not {prob}")
    if draws < 2:
        raise ValueError(f"a prediction needs at least 2 draws, not {draws}")
    model, facts = fit.model, fit.model.data_facts()
    data = encoded(fit, data)
    if not data.n_rows:
        raise ValueError("there are no rows to predict")
    levels = facts.levels_with(data)
    # Clusters of an adversary's factor may be new: the predictor does not use them.
    names = [factor.name for factor in model.factors]
    new = {name: set(levels[name][len(facts.levels[name]) :]) for name in names}
    _check_mode(unseen, {name: labels for name, labels in new.items() if labels})
    latents = fit.draws(draws, seed=seed)
    source = model.encode(data, levels)
    is_new = torch.zeros(len(source), dtype=torch.bool)
    for factor in model.factors:
        is_new |= (source.codes[factor.name] >= len(facts.levels[factor.name])).cpu()
    terms = sum(len(factor.terms) for factor in model.factors) + len(facts.columns)
    size = chunk or max(1, BLOCK_VALUES // (draws * terms))
    base = (fit.seed if seed is None else seed) + 1
    counts = {name: len(one) for name, one in levels.items()}
    with model.seeded(base):
        latents = model.extend(latents, counts, population=unseen == "population")
    for start, rows in zip(range(0, len(source), size), source.chunks(size), strict=True):
        stop = start + len(rows)
        # Not around the yield: the caller's own random numbers and gradients go on in between.
        with model.seeded(base + stop):
            eta = model.predictor(rows, latents).eta
            # Without latent sites all draws have the same predictor.
            eta = eta.expand(draws, *eta.shape[-2:])
            outcome = model.density(eta, latents, rows).sample()
            expected = model.family.mean(eta, rows)
        yield Prediction(
            expected.cpu().numpy(),
            outcome.cpu().numpy(),
            np.where(is_new[start:stop].numpy(), unseen or "", ""),
            data.row_labels[start:stop],
            facts.outcome_name,
            None if facts.classes is None else tuple(map(str, facts.classes)),
            prob,
        )


def encoded(fit: Fit, data: ClusteredData | pd.DataFrame) -> ClusteredData:
    """New rows as the training table was encoded.

    Raises
    ------
    ValueError
        If a table is given but the model was fitted to arrays.
    """
    if isinstance(data, ClusteredData):
        return data
    schema = fit.model.data_facts().schema
    if schema is None:
        raise ValueError(
            "the model was fitted to arrays, so it cannot read a table: pass "
            "ClusteredData.from_arrays(...) with the same features"
        )
    return schema.encode(data)


def _check_mode(unseen: str | None, new: Mapping[str, set[object]]) -> None:
    modes = "\n".join(f"  {name}: {meaning}" for name, meaning in MODES.items())
    if unseen is not None and unseen not in MODES:
        raise ValueError(f"unknown mode {unseen!r} for unseen clusters; the modes are\n{modes}")
    if new and unseen is None:
        lines = []
        for factor, labels in new.items():
            shown = ", ".join(sorted(map(str, labels))[:5]) + (", ..." if len(labels) > 5 else "")
            lines.append(f"{len(labels)} of {factor!r} ({shown})")
        raise ValueError(
            f"the rows have clusters that were not seen in training: {'; '.join(lines)}. Say with "
            f"unseen=... (command line: --unseen) what to assume of them:\n{modes}"
        )
