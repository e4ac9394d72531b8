"""`Effects`: labelled draws of predictions, comparisons, slopes or means; and `Hypothesis`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float

from armed_pyro._messages import check_known, check_probability
from armed_pyro._word import Document
from armed_pyro.effects.expression import evaluate

__all__ = ["MEASURES", "Effects", "Hypothesis", "Measure", "compared"]

Measure = Literal["difference", "ratio", "odds_ratio"]
MEASURES = ("difference", "ratio", "odds_ratio")
Pairs = Literal["pairwise", "reference", "sequential"]
PAIRS = ("pairwise", "reference", "sequential")
ESTIMATES = ["mean", "median", "sd", "lower", "upper"]


@dataclass(frozen=True, eq=False)
class Effects:
    """Posterior draws of labelled quantities, which are tables, contrasts and hypotheses.

    Attributes
    ----------
    labels : pandas.DataFrame
        One row per quantity: the values of the variables that it is at, ``term`` and ``contrast``
        of comparisons and slopes, ``class`` where the outcome has classes.
    draws : Float[ndarray, "draws quantities"]
        Posterior draws.
    title : str
        What the quantities are, with the clusters that they hold for.
    prob : float
        Probability of the intervals.
    simultaneous : bool
        Whether the intervals hold for all quantities at once.
    note : str
        What the draws leave out.

    Examples
    --------
    >>> labels = pd.DataFrame({"dose": ["low", "high"]})
    >>> means = Effects(labels, np.array([[1.0, 4.0], [3.0, 6.0]]), "Means of y", prob=0.5)
    >>> means.to_frame()[["dose", "mean", "lower", "upper"]]
       dose  mean  lower  upper
    0   low   2.0    1.5    2.5
    1  high   5.0    4.5    5.5
    """

    labels: pd.DataFrame
    draws: Float[np.ndarray, "draws quantities"]
    title: str
    prob: float = 0.9
    simultaneous: bool = False
    note: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def names(self) -> list[str]:
        """Name of every quantity: the labels that differ, joined by commas."""
        varying = [name for name in self.labels if len(self.labels[name].unique()) > 1]
        shown = varying or list(self.labels.columns[-1:])
        if not shown:
            return ["average"] * len(self)
        return [", ".join(map(_text, row)) for row in self.labels[shown].itertuples(index=False)]

    def to_frame(self, *, prob: float | None = None) -> pd.DataFrame:
        r"""The labels with mean, median, sd, lower and upper of the draws.

        Intervals are equal-tailed. If they are `simultaneous`, they are :math:`mean \pm c \, sd`
        with c the quantile of :math:`\max_j |\theta_j - mean_j| / sd_j` over the draws, so that
        all quantities lie within theirs at once with the probability `prob`.
        """
        prob = self.prob if prob is None else prob
        check_probability(prob)
        mean = self.draws.mean(0)
        sd = self.draws.std(0, ddof=1) if len(self.draws) > 1 else np.zeros_like(mean)
        tail = (1 - prob) / 2
        lower, median, upper = np.quantile(self.draws, [tail, 0.5, 1 - tail], axis=0)
        if self.simultaneous and len(self):
            scale = np.where(sd > 0, sd, 1.0)
            largest = (np.abs(self.draws - mean) / scale).max(1)
            half = np.quantile(largest, prob) * sd
            lower, upper = mean - half, mean + half
        estimates = dict(zip(ESTIMATES, (mean, median, sd, lower, upper), strict=True))
        frame = self.labels.reset_index(drop=True).assign(**estimates)
        frame.attrs["prob"] = prob
        return frame

    def contrasts(
        self,
        pairs: Pairs = "pairwise",
        *,
        measure: Measure = "difference",
        simultaneous: bool = True,
    ) -> Effects:
        """Each quantity compared with others, with intervals that hold for all of them at once.

        Parameters
        ----------
        pairs : {"pairwise", "reference", "sequential"}
            Later minus earlier of all pairs; all minus the first; each minus the one before. If the
            outcome has classes, within each class.
        measure : {"difference", "ratio", "odds_ratio"}
            How two quantities are compared.
        simultaneous : bool
            Whether the intervals are those of `to_frame` for several quantities at once.

        Raises
        ------
        ValueError
            If a setting is unknown, or there are fewer than two quantities.

        Examples
        --------
        ``fit.means("treatment").contrasts()``
        """
        check_known("value of pairs=", [pairs], PAIRS)
        columns = [name for name in self.labels if name != "class"]
        classes = self.labels["class"] if "class" in self.labels else pd.Series([""] * len(self))
        names = replace(self, labels=self.labels[columns]).names
        records, draws = [], list[np.ndarray]()
        for label in classes.unique():
            places = np.flatnonzero(classes == label)
            for low, high in _pairs(pairs, len(places)):
                first, second = places[low], places[high]
                record = {"contrast": contrast_text(names[second], names[first], measure)}
                records.append({**record, **({"class": label} if label != "" else {})})
                draws.append(compared(self.draws[:, second], self.draws[:, first], measure))
        if not draws:
            raise ValueError(f"contrasts need at least two quantities, found {len(self)}")
        return replace(
            self,
            labels=pd.DataFrame(records),
            draws=np.column_stack(draws),
            title=f"Contrasts of {self.title[:1].lower()}{self.title[1:]}",
            simultaneous=simultaneous,
        )

    def hypothesis(self, text: str) -> Hypothesis:
        """Posterior probability of a relation between quantities, or draws of an expression.

        The quantities are ``b1``, ``b2``, ... in the order of the table, and their `names`; see
        `armed_pyro.effects.expression.evaluate` for the grammar.

        Raises
        ------
        ValueError
            If the text cannot be read, or names an unknown quantity.

        Examples
        --------
        ``fit.means("dose").hypothesis("high - low > 5")``
        """
        values = {f"b{place + 1}": self.draws[:, place] for place in range(len(self))}
        names = self.names
        unique = {name for name in names if names.count(name) == 1}
        values |= {n: self.draws[:, i] for i, n in enumerate(names) if n in unique}
        return Hypothesis.of(text, values, self.prob)

    def to_dataset(self) -> xr.Dataset:
        """The draws (chain, draw, quantity) with the labels as coordinates."""
        coords: dict[str, Any] = {"chain": [0], "draw": np.arange(len(self.draws))}
        coords["quantity"] = self.names
        coords |= {
            f"{name}_label" if name in coords else str(name): (
                "quantity",
                self.labels[name].map(_text).to_numpy(dtype=np.str_),
            )
            for name in self.labels
        }
        return xr.Dataset({"effect": (("chain", "draw", "quantity"), self.draws[None])}, coords)

    def to_latex(self, *, digits: int = 3) -> str:
        """The table in LaTeX, with this number of significant digits."""
        return str(_rounded(self.to_frame(), digits).to_latex(index=False, escape=True))

    def to_csv(self, path: str | Path) -> None:
        """Write the table as CSV."""
        self.to_frame().to_csv(path, index=False)

    def to_word(self, path: str | Path, *, digits: int = 3) -> None:
        """Write the table as a document of Word, with its title; the path ends in ``.docx``."""
        if Path(path).suffix.lower() != ".docx":
            raise ValueError(f"the path must end in .docx, found {str(path)!r}")
        document = Document("a table for Word")
        document.heading(self._heading, 1)
        document.table(_rounded(self.to_frame(), digits).astype(str))
        if self.note:
            document.paragraph(self.note)
        document.save(path)

    def __repr__(self) -> str:
        table = _rounded(self.to_frame(), 4).to_string(index=False, max_rows=20)
        return "\n".join(filter(None, [self._heading, table, self.note]))

    def _repr_html_(self) -> str:
        from html import escape

        table = _rounded(self.to_frame(), 4).to_html(index=False, max_rows=20)
        note = f"<p>{escape(self.note)}</p>" if self.note else ""
        return f"<p>{escape(self._heading)}</p>{table}{note}"

    @property
    def _heading(self) -> str:
        kind = "simultaneous intervals" if self.simultaneous else "intervals"
        return f"{self.title}; {100 * self.prob:g}% {kind}"


@dataclass(frozen=True, eq=False)
class Hypothesis:
    """Draws of an expression, or of left minus right side of a relation.

    Attributes
    ----------
    text : str
        The expression.
    draws : Float[ndarray, "draws"]
        Posterior draws of left minus right side.
    probability : float
        Posterior probability of the relation; nan without one, and for an equation, whose
        probability is zero under a continuous posterior: read its interval.
    prob : float
        Probability of the interval.

    Examples
    --------
    >>> Hypothesis.of("a > 0", {"a": np.array([-1.0, 1.0, 2.0, 3.0])}, 0.5).probability
    0.75
    """

    text: str
    draws: Float[np.ndarray, " draws"]
    probability: float
    prob: float = 0.9

    @classmethod
    def of(cls, text: str, values: dict[str, np.ndarray], prob: float) -> Hypothesis:
        """Evaluate a text on named draws; see `armed_pyro.effects.expression.evaluate`."""
        check_probability(prob)
        found = evaluate(text, values)
        holds = {
            ">": found.draws > 0,
            ">=": found.draws >= 0,
            "<": found.draws < 0,
            "<=": found.draws <= 0,
        }
        probability = float(holds[found.relation].mean()) if found.relation in holds else np.nan
        return cls(text, found.draws, probability, prob)

    def to_frame(self) -> pd.DataFrame:
        """One row: hypothesis, mean, median, sd, lower, upper and probability."""
        labels = pd.DataFrame({"hypothesis": [self.text]})
        effects = Effects(labels, self.draws[:, None], "Hypothesis", self.prob)
        return effects.to_frame().assign(probability=self.probability)

    def __repr__(self) -> str:
        return _rounded(self.to_frame(), 4).to_string(index=False)

    def _repr_html_(self) -> str:
        return str(_rounded(self.to_frame(), 4).to_html(index=False))


def compared(
    high: Float[np.ndarray, "..."], low: Float[np.ndarray, "..."], measure: Measure
) -> Float[np.ndarray, "..."]:
    """high - low, high / low, or the ratio of the odds of two probabilities.

    >>> float(compared(np.array(0.5), np.array(0.2), "odds_ratio"))
    4.0
    """
    check_known("measure", [measure], MEASURES)
    if measure == "difference":
        return high - low
    if measure == "ratio":
        if not ((high > 0).all() and (low > 0).all()) and not (
            (high < 0).all() and (low < 0).all()
        ):
            raise ValueError("ratios need quantities of one sign; choose measure='difference'")
        return high / low
    if not all(((part > 0) & (part < 1)).all() for part in (high, low)):
        raise ValueError(
            "odds ratios need probabilities between 0 and 1, on the response scale; choose "
            "measure='difference' or 'ratio'"
        )
    return high / (1 - high) / (low / (1 - low))


def contrast_text(high: object, low: object, measure: Measure) -> str:
    """The comparison of two labelled quantities in words.

    >>> contrast_text("b", "a", "odds_ratio")
    'odds(b) / odds(a)'
    """
    check_known("measure", [measure], MEASURES)
    forms = {"difference": "{} - {}", "ratio": "{} / {}", "odds_ratio": "odds({}) / odds({})"}
    return forms[measure].format(_text(high), _text(low))


def _pairs(pairs: Pairs, n: int) -> Sequence[tuple[int, int]]:
    """Places of the lower and the higher quantity of each contrast."""
    if pairs == "pairwise":
        return list(combinations(range(n), 2))
    if pairs == "reference":
        return [(0, place) for place in range(1, n)]
    return [(place - 1, place) for place in range(1, n)]


def _text(value: object) -> str:
    """A label as text; numbers with at most six significant digits."""
    if isinstance(value, float | np.floating):
        return f"{value:.6g}"
    return str(value)


def _rounded(frame: pd.DataFrame, digits: int) -> pd.DataFrame:
    """The table with its numbers as text."""

    def shown(value: object) -> object:
        return f"{value:.{digits}g}" if isinstance(value, float | np.floating) else value

    return frame.apply(lambda column: column.map(shown))
