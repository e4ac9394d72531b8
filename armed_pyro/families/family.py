"""`Family`: all that the library asks about the distribution of an outcome."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import pyro.distributions as dist
import torch
from jaxtyping import Bool, Float
from numpy.random import Generator
from torch import Tensor

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.priors import Priors
from armed_pyro.rows.batch import Rows

__all__ = [
    "Draws",
    "Eta",
    "Family",
    "Parameter",
    "Parameters",
    "RowValues",
    "arrays",
    "listed",
    "mean_offset",
    "outcome_of",
]

# The linear predictor: one column, or one for every class but the first.
Eta = Float[Tensor, "... rows columns"]
# One value per row.
RowValues = Float[Tensor, " rows"]
# One value per posterior draw.
Draws = Float[Tensor, " draws"]
# Values of a family's parameters by name, shape "..." or "... 1" (a 1 in the place of the rows).
Parameters = Mapping[str, Tensor]


class Parameter(ABC):
    """A parameter that all rows share, such as a residual sd: one latent site.

    The site is in standardised units. Methods of `Family` get the value on the outcome's scale.

    Attributes
    ----------
    name : str
        Name of the site, and of the parameter in tables and files.
    start : float
        Initial value of the guide, in standardised units. It must lie inside the prior's support.

    Examples
    --------
    >>> from armed_pyro.families.gaussian import ResidualSd
    >>> ResidualSd().describe(Priors(), spread=2.0)
    'HalfStudentT(3, 2)'
    """

    name: str
    start: float = 0.7

    @abstractmethod
    def sample(self, priors: Priors, unit: Float[Tensor, " 1"]) -> Tensor:
        """Sample the latent site from its prior.

        Parameters
        ----------
        priors : Priors
            The program's priors.
        unit : Float[Tensor, "1"]
            Standardised units per unit of the outcome, in the program's precision.
        """

    @abstractmethod
    def describe(self, priors: Priors, spread: float) -> str:
        """The prior as text, in the units of the outcome.

        Parameters
        ----------
        priors : Priors
            The program's priors.
        spread : float
            Outcome units per standardised unit.
        """

    def known(self, priors: Priors, unit: Float[Tensor, " 1"]) -> Tensor | None:
        """The value, if the prior fixes the parameter; None if it is estimated."""
        return None

    def original(self, value: Tensor, spread: float) -> Tensor:
        """The latent value on the outcome's scale; by default the value itself."""
        return value


@dataclass(frozen=True)
class Family(ABC):
    r"""p(y | eta, parameters): the distribution of an outcome given its linear predictor.

    The predictor eta has shape "... rows columns": one column, or one for every class but the
    first. The outcome and eta are on the outcome's original scale.

    A family is one file in ``armed_pyro/families/`` and one line in the registry there. It must
    define `outside`, `center`, `distribution`, `mean` and `residual_variance`. All other members
    have defaults, which suit an outcome that is neither a count nor a class. Settings of a family,
    such as fixed degrees of freedom, are fields of its dataclass: numbers, texts or `ScalePrior`s,
    which are saved with a fit.

    Attributes
    ----------
    name : str
        Name of the family, in calls, files and messages.
    support : str
        Possible outcomes in words, for messages.
    integer : bool
        Whether outcomes are whole numbers. A residual is then drawn at random between the values
        of the distribution function at y - 1 and y.
    is_quadratic : bool
        Whether log p(y | eta) is quadratic in its single column eta, with mean eta and curvature
        `precision`. The guide's conditional of the random effects is then exact.
    is_class : bool
        Whether an outcome is one of two or more classes. Predictions are then scored by accuracy
        and area under the curve.
    is_probability : bool
        Whether the mean (of one trial) is a probability.
    multiclass : bool
        Whether outcomes are codes of any number of classes, with one column of the predictor for
        each class but the first.
    needs_trials : bool
        Whether every row needs a number of trials.
    needs_mean : bool
        Whether `residual_variance` depends on the mean outcome; `marginal_mean` must then be
        given.
    statistics : tuple of {"mean", "sd", "zeros"}
        Statistics of each cluster's outcomes that the posterior predictive checks compare.
    no_residuals : str
        Reason why residuals cannot be checked, in words; empty where they can.

    Examples
    --------
    >>> from armed_pyro.families.registry import family_named
    >>> family = family_named("negative_binomial")
    >>> family.integer, family.is_quadratic, [parameter.name for parameter in family.parameters]
    (True, False, ['shape'])
    """

    name: ClassVar[str]
    support: ClassVar[str]
    integer: ClassVar[bool] = False
    is_quadratic: ClassVar[bool] = False
    is_class: ClassVar[bool] = False
    is_probability: ClassVar[bool] = False
    multiclass: ClassVar[bool] = False
    needs_trials: ClassVar[bool] = False
    needs_mean: ClassVar[bool] = False
    statistics: ClassVar[tuple[str, ...]] = ("mean", "sd")
    no_residuals: ClassVar[str] = ""

    def __str__(self) -> str:
        values = [(field.name, getattr(self, field.name)) for field in fields(self)]
        settings = ", ".join(f"{name}={value!r}" for name, value in values)
        return f"{self.name}({settings})" if settings else self.name

    # --- the outcome's data -----------------------------------------------------------------

    @abstractmethod
    def outside(self, y: Float[Tensor, " rows"], data: ClusteredData) -> Bool[Tensor, " rows"]:
        """True for each outcome outside the family's support."""

    @abstractmethod
    def center(self, data: ClusteredData) -> Float[Tensor, " columns"]:
        """Predictor of the mean outcome, without offset; the network's output is added to it."""

    def check(self, data: ClusteredData) -> None:
        """Check that the outcome suits the family.

        Raises
        ------
        ValueError
            If outcomes or trials are missing, or outcomes lie outside the support; the message
            names the rows.
        """
        if self.needs_trials and data.trials is None:
            raise ValueError(
                f"family {self.name!r} needs the number of trials of each row: name its column "
                "with trials='...' (command line: --trials COLUMN)"
            )
        y = outcome_of(data)
        if data.classes is not None and len(data.classes) != 2:
            raise ValueError(
                f"the outcome {data.outcome_name!r} has {len(data.classes)} labels "
                f"({listed(data.classes)}), but family {self.name!r} needs {self.support}; "
                "use family 'categorical' for labels"
            )
        bad = self.outside(y, data)
        if bad.any():
            rows = data.row_labels[bad.numpy()]
            raise ValueError(
                f"family {self.name!r} needs {self.support}, but the outcome "
                f"{data.outcome_name!r} is outside that range in {int(bad.sum())} row(s), e.g. "
                f"row(s) {listed(rows)} with {listed(y[bad][:3].tolist())}: correct the rows or "
                "choose another family"
            )

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

        Parameters
        ----------
        eta : Float[Tensor, "... rows columns"]
            The predictor.
        parameters : mapping of str to Tensor
            Values on the outcome's scale.
        rows : Rows
            The rows, for their trials.

        Raises
        ------
        ValueError
            If a parameter or the trials are missing.
        """

    @abstractmethod
    def mean(
        self, eta: Eta, rows: Rows
    ) -> Float[Tensor, "... rows"] | Float[Tensor, "... rows classes"]:
        """E[y | eta]; the probability of every class where outcomes are classes."""

    def precision(self, parameters: Parameters) -> Tensor | None:
        """Curvature of -log p(y | eta) in eta, or its mean, in the units of the parameters.

        The guide scales its precision of the random effects by this value, so that it follows the
        parameters. None, the default, stands for a curvature that depends on eta. A quadratic
        family must return its curvature, 1 / Var(y | eta), whenever its parameters are known.
        """
        return None

    # --- results and checks -----------------------------------------------------------------

    @abstractmethod
    def residual_variance(self, parameters: Parameters, mean: Draws) -> Draws:
        """Variance of an observation on the scale of eta (Nakagawa, Johnson, Schielzeth 2017).

        Parameters
        ----------
        parameters : mapping of str to Float[Tensor, "draws"]
            Values on the outcome's scale.
        mean : Float[Tensor, "draws"]
            Mean outcome, as returned by `marginal_mean`; zeros unless `needs_mean`.
        """

    def marginal_mean(
        self, eta: Float[Tensor, "draws rows columns"], variance: Float[Tensor, "draws columns"]
    ) -> Float[Tensor, "draws columns"]:
        """Mean outcome over the rows, and over normal random effects with this variance."""
        raise NotImplementedError(f"family {self.name!r} needs no mean outcome")

    def residual_rows(self, parameters: Parameters) -> dict[str, Draws]:
        """Rows of the factor "Residual" in the table of variance components, by statistic."""
        return {}

    def cdf(self, y: RowValues, eta: Eta, parameters: Parameters, rows: Rows) -> RowValues | None:
        """P(Y <= y | eta, parameters) in double precision; None, the default, if it is unknown.

        Residuals cannot be checked without it, which the verdict on the model then says.
        """
        return None

    def simulate(
        self, rng: Generator, eta: np.ndarray, parameters: Mapping[str, float], trials: int
    ) -> np.ndarray:
        """Outcomes drawn given the predictor, for simulated data; by default by `distribution`.

        Parameters
        ----------
        rng : Generator
            Source of the random numbers.
        eta : Float[ndarray, "rows columns"]
            The predictor.
        parameters : mapping of str to float
            Values on the outcome's scale.
        trials : int
            Trials of every row, where the family needs them.
        """
        values = {name: torch.tensor(value).double() for name, value in parameters.items()}
        n = len(eta)
        rows = Rows(torch.zeros(n, 0), None, {}, trials=torch.full((n,), float(trials)).double())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(rng.integers(2**31)))
            return self.distribution(torch.from_numpy(eta), values, rows).sample().numpy()

    def value(self, parameters: Parameters, name: str) -> Tensor:
        """The value of a parameter.

        Raises
        ------
        ValueError
            If the parameter is missing.
        """
        if name not in parameters:
            raise ValueError(f"family {self.name!r} needs its {name}")
        return parameters[name]


def arrays(*values: Tensor) -> tuple[np.ndarray, ...]:
    """Tensors as float64 arrays, for scipy."""
    return tuple(value.detach().double().cpu().numpy() for value in values)


def listed(values: Sequence[Any], most: int = 3) -> str:
    """The first `most` values as text, followed by dots if there are more."""
    shown = ", ".join(str(value) for value in list(values)[:most])
    return shown + (", ..." if len(values) > most else "")


def outcome_of(data: ClusteredData) -> Float[Tensor, " rows"]:
    """The outcome of the data.

    Raises
    ------
    ValueError
        If the data have no outcome.
    """
    if data.outcome is None:
        raise ValueError(f"the outcome {data.outcome_name!r} is missing from the data")
    return data.outcome


def mean_offset(data: ClusteredData) -> Float[Tensor, ""]:
    """Mean of the rows' offset; 0 without an offset."""
    return torch.zeros(()) if data.offset is None else data.offset.mean()
