"""`Family`: all that the library asks about the distribution of an outcome."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyro.distributions as dist
import torch
from jaxtyping import Bool, Float
from numpy.random import Generator
from torch import Tensor

from armed_pyro._messages import listing
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.distributions.survival_densities import Survival
from armed_pyro.priors import Priors
from armed_pyro.rows.batch import Rows
from armed_pyro.rows.censoring import INTERVAL, RIGHT

__all__ = ["Family", "Labelled", "Parameter", "arrays", "mean_offset", "outcome_of"]

# The linear predictor: one column, or one for every class but the first.
Eta = Float[Tensor, "... rows columns"]
# One value per row.
RowValues = Float[Tensor, " rows"]
# One value per posterior draw.
Draws = Float[Tensor, " draws"]
# Values of a family's parameters by name, shape "..." or "... 1" (a 1 in the place of the rows).
Parameters = Mapping[str, Tensor]
# Standardised units per unit of the outcome, in the program's precision.
Unit = Float[Tensor, " 1"]
# The same two for simulated data: predictors or outcomes, and values of the parameters.
Array = np.ndarray
Numbers = Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Labelled:
    """Draws of a quantity with one value per label of a dimension."""

    dim: str
    labels: tuple[str, ...]
    values: Float[Tensor, "draws labels"]


class Parameter(ABC):
    """A parameter that all rows share, such as a residual sd: one latent site.

    The site is in standardised units. Methods of `Family` get the value on the outcome's scale.
    `name` is the name of the site, and of the parameter in tables and files. `start` is the guide's
    initial value, in standardised units; it must lie inside the prior's support.

    `link` is the link of its predictor, if it gets one, "log" or "logit"; empty if it cannot have
    one. In formulas it is called `alias`, or `name` if that is empty.
    """

    name: str
    start: float = 0.7
    link: ClassVar[str] = "log"
    alias: ClassVar[str] = ""

    @abstractmethod
    def sample(self, priors: Priors, unit: Unit) -> Tensor:
        """Sample the latent site from its prior."""

    @abstractmethod
    def describe(self, priors: Priors, spread: float) -> str:
        """The prior as text in units of the outcome; `spread` is one standardised unit in these."""

    def known(self, priors: Priors, unit: Unit) -> Tensor | None:
        """The value, if the prior fixes the parameter; None if it is estimated."""
        return None

    def simulated(self, dispersion: float) -> float:
        """The value in simulated data, where a single number stands for all parameters."""
        return dispersion

    def original(self, value: Tensor, spread: float) -> Tensor:
        """The latent value on the outcome's scale; by default the value itself."""
        return value


@dataclass(frozen=True)
class Family(ABC):
    r"""p(y | eta, parameters): the distribution of an outcome given its linear predictor.

    The predictor eta has shape "... rows columns": one column, or one for every class but the
    first. The outcome, eta and parameters are on the outcome's original scale.

    A family must define `outside`, `center`, `distribution`, `mean` and `residual_variance`. All
    other members have defaults, which suit an outcome that is neither a count nor a class. Settings
    of a family, such as fixed degrees of freedom, are fields of its dataclass: numbers, texts or
    `ScalePrior`s, which are saved with a fit.

    Examples
    --------
    >>> from armed_pyro.families.registry import family_named
    >>> family = family_named("negative_binomial")
    >>> family.integer, family.is_quadratic, [parameter.name for parameter in family.parameters]
    (True, False, ['shape'])
    """

    name: ClassVar[str]  # in calls, files and messages
    support: ClassVar[str]  # possible outcomes in words
    # Whether outcomes are whole numbers. A residual is then drawn at random between the values of
    # the distribution function at y - 1 and y.
    integer: ClassVar[bool] = False
    # Whether log p(y | eta) is quadratic in its single column eta, with mean eta and curvature
    # `precision`. The guide's conditional of the random effects is then exact.
    is_quadratic: ClassVar[bool] = False
    # Whether outcomes are classes: predictions are scored by accuracy and area under the curve.
    is_class: ClassVar[bool] = False
    is_probability: ClassVar[bool] = False  # whether the mean (of one trial) is a probability
    # Meaning of exp(coefficient), such as "odds ratio"; empty if it has none.
    coefficient_ratio: ClassVar[str] = ""
    # Whether outcomes are codes of any number of classes; the first has no column of the predictor.
    multiclass: ClassVar[bool] = False
    # Whether `expected` is the probability of every class, in a last dimension.
    has_class_probabilities: ClassVar[bool] = False
    # Whether outcomes may be censored or truncated, as those of `CensorableFamily`.
    can_be_censored: ClassVar[bool] = False
    needs_trials: ClassVar[bool] = False  # whether every row needs a number of trials
    # Whether `residual_variance` depends on the mean outcome; `marginal_mean` is then required.
    needs_mean: ClassVar[bool] = False
    # Of each cluster's outcomes, for posterior predictive checks: of "mean", "sd", "zeros".
    statistics: ClassVar[tuple[str, ...]] = ("mean", "sd")
    # Whether `precision_weighted` can divide a residual variance by the weights of the rows.
    has_residual_variance: ClassVar[bool] = False
    # The reason, if single rows cannot tell the sd of an effect of every row, (1 | row), apart.
    no_row_effects: ClassVar[str] = ""
    # Whether log p(y | eta) is concave in eta, so that the guide may weigh rows by its curvature.
    # Otherwise the guide takes `information`, which must be defined.
    is_log_concave: ClassVar[bool] = True
    no_residuals: ClassVar[str] = ""  # the reason, if residuals cannot be checked
    # Advice for outcomes that vary more than the family allows.
    if_overdispersed: ClassVar[str] = "another family: the outcomes vary more than it allows"
    # Advice for residuals with heavier tails than the family's, and for more or fewer zeros.
    if_heavy_tails: ClassVar[str] = "a family with heavier tails, or look at the outlying rows"
    if_more_zeros: ClassVar[str] = "another family, which models zeros apart"
    # Whether the variance is the mean, so that overdispersion alone makes more zeros.
    is_equidispersed: ClassVar[bool] = False

    def __str__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{self.name}({settings})" if settings else self.name

    # --- the outcome's data -----------------------------------------------------------------

    @abstractmethod
    def outside(self, y: RowValues, data: ClusteredData) -> Bool[Tensor, " rows"]:
        """True for each outcome outside the family's support."""

    @abstractmethod
    def center(self, data: ClusteredData) -> Float[Tensor, " columns"]:
        """Predictor of the mean outcome, without offset; the network's output is added to it."""

    def check(self, data: ClusteredData) -> None:
        """Raise a `ValueError` if outcomes or trials are missing, or outcomes are `outside`."""
        if self.needs_trials and data.trials is None:
            raise ValueError(
                f"family {self.name!r} needs the number of trials of each row: name its column "
                "with trials='...' (command line: --trials COLUMN)"
            )
        if data.trials is not None and not self.needs_trials:
            raise ValueError(
                f"family {self.name!r} has no trials: leave trials= (--trials) out, or choose "
                "family 'binomial'"
            )
        if not self.can_be_censored and (data.status is not None or data.entry is not None):
            raise ValueError(
                f"family {self.name!r} has no censored outcomes (status, upper, entry): choose "
                "weibull, loglogistic, lognormal, exponential or piecewise_exponential for times, "
                "gaussian, student or gamma for measurements with detection limits, or leave the "
                "columns out"
            )
        y = outcome_of(data)
        if data.classes is not None and not (self.is_probability and len(data.classes) == 2):
            family = "bernoulli" if len(data.classes) == 2 else "categorical"
            ordered = ", or 'ordinal' if they have an order" if len(data.classes) > 2 else ""
            raise ValueError(
                f"the outcome {data.outcome_name!r} has {len(data.classes)} labels "
                f"({listing(data.classes, 3)}), but family {self.name!r} needs {self.support}; "
                f"use family {family!r} for labels (command line: --family {family}){ordered}, or "
                "turn the column into numbers if its values are measurements"
            )
        bad = self.outside(y, data)
        if bad.shape != (data.n_rows,):
            raise ValueError(
                f"family {self.name!r} needs one outcome per row, found the shape "
                f"{tuple(y.shape)} of {data.outcome_name!r}: fit each column by itself, or choose "
                "the column of the event's indicators"
            )
        if data.status is not None:  # lower ends at 0 of positive outcomes say nothing
            bad &= ~((y == 0) & ((data.status == RIGHT) | (data.status == INTERVAL)))
        if bad.any():
            rows = data.row_labels[bad.numpy()]
            raise ValueError(
                f"family {self.name!r} needs {self.support}, but the outcome "
                f"{data.outcome_name!r} is outside that range in {int(bad.sum())} row(s), e.g. "
                f"row(s) {listing(rows, 3)} with {listing(y[bad][:3].tolist())}: correct the rows "
                "or choose another family"
            )

    @property
    def is_censored(self) -> bool:
        """Whether outcomes of the training data may be censored or truncated; by default not."""
        return False

    def survivor(self, eta: Eta, parameters: Parameters, rows: Rows) -> Survival | None:
        """The survivor function and quantiles of exact outcomes; None, the default, without one."""
        return None

    def bound(self, data: ClusteredData) -> Family:
        """The family with the settings that it takes from the training data; by default itself."""
        return self

    def codes(self, y: Array) -> Array:
        """Positions of outcomes among the classes; by default the outcomes themselves."""
        return y

    def class_labels(self, classes: tuple[str, ...] | None) -> tuple[str, ...] | None:
        """Labels of the classes, if `classes` are those of the data; None for 0, 1, ..."""
        return classes

    def columns(self, data: ClusteredData) -> tuple[str, ...]:
        """Names of the predictor's columns; by default a single column with an empty name."""
        return ("",)

    def spread(self, data: ClusteredData) -> float:
        """Predictor units per standardised unit; 1 by default."""
        return 1.0

    # --- the program ------------------------------------------------------------------------

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """Parameters besides eta, in the order in which they are sampled; none by default."""
        return ()

    @property
    def predicted(self) -> tuple[str, ...]:
        """Parameters with predictors of their own, in the last columns of eta; none by default."""
        return ()

    @property
    def without_predictors(self) -> Family:
        """The family whose parameters are the same in all rows; by default itself."""
        return self

    def effect_scale(self) -> float:
        """Default prior scale of the sds of random effects, in standardised units."""
        return 2.5

    def outputs(self, columns: int) -> int:
        """Number of outputs that a network needs for `columns` columns of the predictor."""
        return columns

    def contrasts(self, output: Float[Tensor, "rows outputs"]) -> Float[Tensor, "rows columns"]:
        """The columns of the predictor, computed from the network's output."""
        return output

    @abstractmethod
    def distribution(self, eta: Eta, parameters: Parameters, rows: Rows) -> dist.TorchDistribution:
        """p(y | eta, parameters), with batch shape "... rows".

        Raises
        ------
        ValueError
            If a parameter, or the trials of the rows, are missing.
        """

    @abstractmethod
    def mean(
        self, eta: Eta, rows: Rows
    ) -> Float[Tensor, "... rows"] | Float[Tensor, "... rows classes"]:
        """E[y | eta]; the probability of every class where outcomes are classes."""

    def expected(self, eta: Eta, parameters: Parameters, rows: Rows) -> Tensor:
        """E[y | eta, parameters], as `mean`; override it if the mean depends on the parameters."""
        return self.mean(eta, rows)

    def average(
        self, eta: Eta, parameters: Parameters, rows: Rows
    ) -> Float[Tensor, "... rows"] | Float[Tensor, "... rows classes"]:
        """E[y | eta, parameters] as a number where classes have an order; else `expected`."""
        return self.expected(eta, parameters, rows)

    def information(self, eta: Eta, parameters: Parameters, rows: Rows) -> Tensor | None:
        """Fisher information of eta, "... rows columns"; None if it is that of the curvature."""
        return None

    def parameter_information(
        self, name: str, eta: Eta, parameters: Parameters, rows: Rows
    ) -> Tensor | None:
        """Fisher information "... rows" of the link of a parameter; None, the default, if unknown.

        It is then estimated from simulated outcomes.
        """
        return None

    def exceedances(self, eta: Eta, parameters: Parameters) -> tuple[Tensor, Tensor, float] | None:
        """P(y > boundary) "... rows boundaries" of ordered classes; None if they have no order.

        Also its derivative in eta, and the sd of the latent noise.
        """
        return None

    def precision(self, parameters: Parameters) -> Tensor | None:
        """Curvature of -log p(y | eta) in eta, or its mean, in the units of the parameters.

        The guide scales its precision of the random effects by this value, so that it follows the
        parameters. None, the default, stands for a curvature that depends on eta. A quadratic
        family must return its curvature, 1 / Var(y | eta), whenever its parameters are known.
        """
        return None

    def precision_weighted(self, parameters: Parameters, weights: RowValues) -> Parameters:
        """Parameters "... rows" of rows whose residual variance is divided by their weights."""
        raise NotImplementedError(f"family {self.name!r} has no residual variance")

    def if_misfit(self, y: Array) -> str:
        """Advice if the distribution misses outcomes as these, or residuals are skewed."""
        return "try another family, or transform the outcome"

    # --- results and checks -----------------------------------------------------------------

    @abstractmethod
    def residual_variance(self, parameters: Parameters, mean: Draws) -> Draws:
        """Variance of an observation on the scale of eta (Nakagawa, Johnson, Schielzeth 2017).

        `mean` is that of `marginal_mean`, or zeros unless `needs_mean`.
        """

    def marginal_mean(
        self, eta: Float[Tensor, "draws rows columns"], variance: Float[Tensor, "draws columns"]
    ) -> Float[Tensor, "draws columns"]:
        """Mean outcome over the rows, and over normal random effects with this variance."""
        raise NotImplementedError(f"family {self.name!r} needs no mean outcome")

    def residual_rows(self, parameters: Parameters) -> dict[str, Draws]:
        """Rows of the factor "Residual" in the table of variance components, by statistic.

        They are the parameters by their names, unless a family overrides this.
        """
        return dict(parameters)

    def labelled(self, parameters: Parameters) -> dict[str, Labelled]:
        """Quantities with labels that `Fit.to_datatree` adds to the parameters; none by default."""
        return {}

    def cdf(self, y: RowValues, eta: Eta, parameters: Parameters, rows: Rows) -> RowValues | None:
        """P(Y <= y | eta, parameters) in double precision; None, the default, if it is unknown.

        Residuals cannot be checked without it, which the verdict on the model then says.
        """
        return None

    def cdf_range(
        self, y: RowValues, eta: Eta, parameters: Parameters, rows: Rows
    ) -> tuple[Array, Array] | None:
        """P(Y < y) and P(Y <= y) in one draw, equal where Y is continuous; None as of `cdf`.

        A uniform number between the two is a randomised quantile of the outcome.
        """
        upper = self.cdf(y, eta, parameters, rows)
        if upper is None:
            return None
        at = upper.double().cpu().numpy()
        if not self.integer:
            return at, at
        lower = self.cdf(y - 1, eta, parameters, rows)
        assert lower is not None  # for mypy, as `upper` is not None
        return lower.double().cpu().numpy(), at

    def simulate(self, rng: Generator, eta: Array, parameters: Numbers, trials: int) -> Array:
        """Outcomes drawn given eta "rows columns", for simulated data; by default `distribution`'s.

        Every row has this number of trials, where the family needs them.
        """
        values = {name: torch.tensor(value).double() for name, value in parameters.items()}
        n = len(eta)
        rows = Rows(torch.zeros(n, 0), None, {}, trials=torch.full((n,), float(trials)).double())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(rng.integers(2**31)))
            return self.distribution(torch.from_numpy(eta), values, rows).sample().numpy()

    def value(self, parameters: Parameters, name: str) -> Tensor:
        """The value of a parameter, or a `ValueError` if it is missing."""
        if name not in parameters:
            raise ValueError(f"family {self.name!r} needs its {name}")
        return parameters[name]


def arrays(*values: Tensor) -> tuple[Array, ...]:
    """Tensors as float64 arrays, for scipy."""
    return tuple(value.detach().double().cpu().numpy() for value in values)


def outcome_of(data: ClusteredData) -> RowValues:
    """The outcome of the data, or a `ValueError` if there is none."""
    if data.outcome is None:
        raise ValueError(f"the outcome {data.outcome_name!r} is missing from the data")
    return data.outcome


def without_offset(data: ClusteredData) -> RowValues:
    """The outcome less the rows' offset."""
    y = outcome_of(data)
    return y if data.offset is None else y - data.offset


def varying(spread: float, data: ClusteredData) -> float:
    """The spread of the outcome, or a `ValueError` if it is 0."""
    if spread == 0:
        raise ValueError(f"the outcome {data.outcome_name!r} is the same in every row")
    return spread


def mean_offset(data: ClusteredData) -> Float[Tensor, ""]:
    """Mean of the rows' offset; 0 without an offset."""
    return torch.zeros(()) if data.offset is None else data.offset.mean()
