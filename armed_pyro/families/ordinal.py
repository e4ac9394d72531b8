"""Ordered categories, such as ratings, by a cumulative link."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.random import Generator
from torch import Tensor

from armed_pyro._messages import check_known, listing
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.distributions.ordered_categorical import LINKS, CumulativeLink, OrderedCategorical
from armed_pyro.families.family import (
    Array,
    Draws,
    Eta,
    Family,
    Labelled,
    Numbers,
    Parameter,
    Parameters,
    RowValues,
    Unit,
    mean_offset,
    outcome_of,
)
from armed_pyro.priors import HalfStudentT, Priors
from armed_pyro.rows.batch import Rows

__all__ = ["Ordinal", "ThresholdGap"]

# A gap is the difference of two thresholds, each StudentT(3, 0, 2.5) by brms' default.
GAP_SCALE = 5.0
# Numbers with more values than this are measurements.
MOST_CATEGORIES = 50


class ThresholdGap(Parameter):
    """Distance between two neighbouring thresholds; `number` 1 is between the first two."""

    def __init__(self, number: int, count: int) -> None:
        self.name = f"threshold_gap_{number}"
        # Thresholds of categories of equal probability cover about 4 units.
        self.start = 4.0 / (count + 1)

    def sample(self, priors: Priors, unit: Unit) -> Tensor:
        return HalfStudentT().sample(self.name, unit.new_tensor(GAP_SCALE))

    def describe(self, priors: Priors, spread: float) -> str:
        return HalfStudentT().describe(GAP_SCALE)


@dataclass(frozen=True)
class Ordinal(Family):
    r"""Ordered categories: a latent variable eta + noise is cut at ordered thresholds.

    .. math:: P(y \le j) = F(c_j - \eta), \quad c_1 < c_2 < \dots < c_{C-1}, \quad \sum_j c_j = 0

    F is the distribution of the link: logistic (proportional odds), normal, or ``F(x) = 1 -
    exp(-exp(x))`` of the complementary log-log. A larger eta makes higher categories more probable.

    The predictor has an intercept, so the thresholds have mean zero; thresholds of R's ``ordinal``,
    which has no intercept, are ``c_j`` minus the intercept. Latent sites are the C - 2 gaps
    between neighbouring thresholds, each HalfStudentT(3, 5). Tables and `Fit.to_datatree` have
    the thresholds, labelled by the two categories that they separate.

    The outcome has whole numbers, or labels in the order of a categorical column (sorted if it is
    text). Predictions are the probability of every category.

    Parameters
    ----------
    link : {"logit", "probit", "cloglog"}
        The link; by name ``"ordinal(probit)"``.
    categories : tuple of str
        Labels of the categories in order; set when a program is bound to data.
    first : int
        The outcome of the first category; set when a program is bound to data.

    Raises
    ------
    ValueError
        If the link is unknown.

    References
    ----------
    McCullagh (1980), "Regression models for ordinal data", JRSS B 42(2).

    Examples
    --------
    >>> family = Ordinal("probit", categories=("low", "mid", "high"))
    >>> family.boundaries
    ('low|mid', 'mid|high')
    >>> gap = {"threshold_gap_1": torch.tensor(2.0)}
    >>> family.thresholds(gap).tolist()
    [-1.0, 1.0]
    """

    link: str = "logit"
    categories: tuple[str, ...] = ()
    first: int = 0

    name = "ordinal"
    support = "ordered labels, or whole numbers"
    integer = True
    is_class = True
    is_probability = True
    has_class_probabilities = True
    statistics = ("mean", "sd")
    no_row_effects = "the latent variable's own variance"

    def __post_init__(self) -> None:
        check_known("link of family 'ordinal'", [self.link], LINKS)

    @property
    def coefficient_ratio(self) -> str:  # type: ignore[override]
        """Odds ratios of higher categories for the logit link; no other link has a ratio."""
        return "odds ratio" if self.link == "logit" else ""

    @property
    def _link(self) -> CumulativeLink:
        return LINKS[self.link]

    # --- the outcome's data ---------------------------------------------------------------

    def bound(self, data: ClusteredData) -> Ordinal:
        """The family with the categories of these data, unless it has categories already."""
        if self.categories:
            return self
        self.check(data)
        if data.classes is not None:
            return replace(self, categories=tuple(map(str, data.classes)))
        y = outcome_of(data)
        first, last = int(y.min()), int(y.max())
        return replace(self, categories=tuple(map(str, range(first, last + 1))), first=first)

    def check(self, data: ClusteredData) -> None:
        """Raise a `ValueError` unless outcomes are ordered categories, of which two occur."""
        super().check(replace(data, classes=None))
        y = outcome_of(data)
        present = torch.unique(y)
        if len(present) < 2:
            raise ValueError(
                f"the outcome {data.outcome_name!r} has a single category: nothing to model"
            )
        if data.classes is None and float(present[-1] - present[0]) >= MOST_CATEGORIES:
            raise ValueError(
                f"family 'ordinal' needs at most {MOST_CATEGORIES} categories, but the outcome "
                f"{data.outcome_name!r} has numbers from {present[0]:g} to {present[-1]:g}: choose "
                "family 'gaussian' for measurements or 'negative_binomial' for counts, or group "
                "the values"
            )
        if self.categories and data.classes is not None:
            labels = tuple(map(str, data.classes))
            if labels != self.categories:
                raise ValueError(
                    f"the outcome {data.outcome_name!r} has the categories {listing(labels, 6)}, "
                    f"but the family has {listing(self.categories, 6)}: give the same, in order"
                )

    def outside(self, y: RowValues, data: ClusteredData) -> Bool[Tensor, " rows"]:
        bad = ~torch.isfinite(y) | (y != y.round())
        if self.categories:
            bad = bad | (y < self.first) | (y >= self.first + len(self.categories))
        return bad

    def center(self, data: ClusteredData) -> Float[Tensor, " columns"]:
        """Predictor with the data's category shares, if thresholds have mean zero."""
        family = self.bound(data)
        code = (outcome_of(data) - family.first).long()
        counts = torch.bincount(code, minlength=len(family.categories)).double() + 0.5
        below = (counts.cumsum(0) / counts.sum())[:-1]
        return -(self._link.quantile(below).mean() + mean_offset(data)).reshape(1)

    def codes(self, y: Array) -> Array:
        return np.asarray(y) - self.first

    def class_labels(self, classes: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return self.categories or classes

    # --- the program ------------------------------------------------------------------------

    @property
    def boundaries(self) -> tuple[str, ...]:
        """Labels of the thresholds: the two categories that each separates."""
        return tuple(f"{a}|{b}" for a, b in zip(self.categories, self.categories[1:], strict=False))

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        count = len(self.categories) - 2
        return tuple(ThresholdGap(k + 1, count) for k in range(count))

    def thresholds(self, parameters: Parameters) -> Float[Tensor, "... boundaries"]:
        """The ordered thresholds, with mean zero, in a new last dimension."""
        if len(self.categories) < 2:
            raise ValueError(
                "family 'ordinal' does not know its categories yet: bind the program to data, or "
                "give them as Ordinal(categories=('low', 'mid', 'high'))"
            )
        names = [parameter.name for parameter in self.parameters]
        if not names:
            return torch.zeros(1)
        gaps = torch.stack([self.value(parameters, name) for name in names], -1)
        steps = torch.cat([torch.zeros_like(gaps[..., :1]), gaps.cumsum(-1)], -1)
        return steps - steps.mean(-1, keepdim=True)

    def distribution(self, eta: Eta, parameters: Parameters, rows: Rows) -> OrderedCategorical:
        thresholds = self.thresholds(parameters).to(eta.device)
        return OrderedCategorical(eta[..., 0], thresholds, self._link, self.first)

    def mean(self, eta: Eta, rows: Rows) -> Tensor:
        raise ValueError(
            "the mean of family 'ordinal' depends on its thresholds: use expected() or rating()"
        )

    def expected(self, eta: Eta, parameters: Parameters, rows: Rows) -> Tensor:
        """Probability of each category, shape "... rows categories"."""
        return self.distribution(eta, parameters, rows).probabilities

    def average(self, eta: Eta, parameters: Parameters, rows: Rows) -> Tensor:
        """The expected rating: the mean of the categories as numbers."""
        return self.distribution(eta, parameters, rows).mean

    # --- results and checks -----------------------------------------------------------------

    def information(self, eta: Eta, parameters: Parameters, rows: Rows) -> Tensor:
        return self.distribution(eta, parameters, rows).information[..., None]

    def exceedances(self, eta: Eta, parameters: Parameters) -> tuple[Tensor, Tensor, float]:
        gap = self.thresholds(parameters) - eta
        return 1 - self._link.cdf(gap), self._link.density(gap), self._link.variance**0.5

    def residual_variance(self, parameters: Parameters, mean: Draws) -> Draws:
        return torch.full_like(mean, self._link.variance)

    def residual_rows(self, parameters: Parameters) -> dict[str, Draws]:
        return {
            f"threshold[{boundary}]": self.thresholds(parameters)[..., place]
            for place, boundary in enumerate(self.boundaries)
            if parameters
        }

    def labelled(self, parameters: Parameters) -> dict[str, Labelled]:
        if not parameters:
            return {}
        return {"threshold": Labelled("boundary", self.boundaries, self.thresholds(parameters))}

    def cdf(self, y: RowValues, eta: Eta, parameters: Parameters, rows: Rows) -> RowValues:
        thresholds = self.thresholds(parameters).double().expand(*y.shape, -1)
        code, last = (y - self.first).long(), thresholds.shape[-1]
        cuts = thresholds.gather(-1, code.clamp(0, last - 1)[:, None])[:, 0]
        below = self._link.cdf(cuts - eta[..., 0].double())
        one, zero = torch.ones_like(below), torch.zeros_like(below)
        return torch.where(code < 0, zero, torch.where(code >= last, one, below))

    def simulate(self, rng: Generator, eta: Array, parameters: Numbers, trials: int) -> Array:
        """By default of four categories, 0 to 3, whose thresholds are gaps of 1 apart."""
        family = self if self.categories else replace(self, categories=tuple("0123"))
        gaps = {p.name: 1.0 for p in family.parameters} | dict(parameters)
        return super(Ordinal, family).simulate(rng, eta, gaps, trials)
