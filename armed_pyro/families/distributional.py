"""`Distributional`: a family whose parameters have predictors, in further columns of eta."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from armed_pyro._messages import unknown
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.distributions.survival_densities import Survival
from armed_pyro.families.family import (
    Array,
    Draws,
    Eta,
    Family,
    Labelled,
    Parameter,
    Parameters,
    RowValues,
)
from armed_pyro.families.links import LARGEST_PREDICTOR, Link, Log, Logit
from armed_pyro.rows.batch import Rows
from armed_pyro.rows.censoring import Censoring

__all__ = ["Distributional", "family_with_predictors", "parameter_named"]

LINKS: Mapping[str, Link] = {"log": Log(), "logit": Logit()}
# Largest predictor of a parameter in size. A probability must not be rounded to 1.
LARGEST = {"log": LARGEST_PREDICTOR, "logit": 15.0}
# Outcomes that are simulated for the Fisher information of a parameter, over all draws of eta.
SIMULATED = 32
# Key of the rows' precisions among the parameters.
WEIGHTS = "weights of rows"


def parameter_named(family: Family, name: str) -> Parameter:
    """The parameter of this name or alias; a `ValueError` if it cannot have a predictor.

    >>> from armed_pyro.families.registry import family_named
    >>> parameter_named(family_named("gaussian"), "sigma").name
    'residual_sd'
    """
    able = {p.alias or p.name: p for p in family.parameters if p.link}
    names = able | {p.name: p for p in able.values()}
    if name in names:
        return names[name]
    if not able:
        raise ValueError(
            f"family {family.name!r} has no parameter with a predictor, found one of {name!r}: "
            "leave it out, or choose another family"
        )
    raise unknown(f"parameter of family {family.name!r} with a predictor", name, able)


class _Inside:
    """An attribute that the family inside answers."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Distributional | None, owner: type) -> Any:
        return self if instance is None else getattr(instance.base, self._name)


@final
@dataclass(frozen=True)
class Distributional(Family):
    r"""A family whose parameters theta differ between rows, each with a predictor.

    .. math:: y_i \sim p(y \mid \eta_i, \theta_{i1}, \theta_{i2}, \dots), \quad
        g_j(\theta_{ij}) = \eta_{i, c + j}

    The first c columns of eta are those of the family inside. The links g are log, or logit of
    probabilities. `MixedEffects(..., parameters=...)` makes it.

    Parameters
    ----------
    base : Family
        The family inside.
    predicted : tuple of str
        Names of the parameters, in the order of their columns.
    from_network : int
        Number of the first of these that are outputs of the network.

    Examples
    --------
    >>> from armed_pyro.families.registry import family_named
    >>> family = Distributional(family_named("gaussian"), ("residual_sd",))
    >>> eta = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    >>> family.distribution(eta, {}, Rows(torch.zeros(2, 0), None, {})).stddev
    tensor([1.0000, 2.7183])

    References
    ----------
    Rigby and Stasinopoulos (2005), "Generalized additive models for location, scale and shape",
    JRSS C 54(3).
    """

    base: Family
    predicted: tuple[str, ...] = ()
    from_network: int = 0

    name = _Inside()
    support = _Inside()
    integer = _Inside()
    is_class = _Inside()
    is_probability = _Inside()
    coefficient_ratio = _Inside()
    multiclass = _Inside()
    has_class_probabilities = _Inside()
    needs_trials = _Inside()
    needs_mean = _Inside()
    statistics = _Inside()
    has_residual_variance = _Inside()
    no_row_effects = _Inside()
    no_residuals = _Inside()
    if_overdispersed = _Inside()
    if_heavy_tails = _Inside()
    if_more_zeros = _Inside()
    is_equidispersed = _Inside()
    can_be_censored = _Inside()
    is_censored = _Inside()
    is_log_concave = False

    def __str__(self) -> str:
        return str(self.base)

    @property
    def without_predictors(self) -> Family:
        """The family inside."""
        return self.base

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """Those that all rows share."""
        return tuple(p for p in self.base.parameters if p.name not in self.predicted)

    def _predicted(self) -> list[Parameter]:
        return [parameter_named(self.base, name) for name in self.predicted]

    def labels(self) -> tuple[str, ...]:
        """Names of the parameters' columns."""
        return tuple(parameter.alias or parameter.name for parameter in self._predicted())

    # --- the outcome's data -----------------------------------------------------------------

    def outside(self, y: RowValues, data: ClusteredData) -> Bool[Tensor, " rows"]:
        return self.base.outside(y, data)

    def check(self, data: ClusteredData) -> None:
        """Raise a `ValueError` as the family inside does."""
        self.base.check(data)

    def bound(self, data: ClusteredData) -> Family:
        return Distributional(self.base.bound(data), self.predicted, self.from_network)

    def codes(self, y: Array) -> Array:
        return self.base.codes(y)

    def class_labels(self, classes: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return self.base.class_labels(classes)

    def columns(self, data: ClusteredData) -> tuple[str, ...]:
        return (*self.base.columns(data), *self.labels())

    def center(self, data: ClusteredData) -> Float[Tensor, " columns"]:
        """That of the family inside, then the links of the parameters' starting values."""
        spread = self.base.spread(data)
        starts = []
        for parameter in self._predicted():
            start = parameter.original(torch.tensor(parameter.start).double(), spread)
            starts.append(LINKS[parameter.link].of(start))
        inside = self.base.center(data)
        return torch.cat([inside, torch.stack(starts).to(inside)])

    def spread(self, data: ClusteredData) -> float:
        return self.base.spread(data)

    # --- the program ------------------------------------------------------------------------

    def effect_scale(self) -> float:
        return self.base.effect_scale()

    def outputs(self, columns: int) -> int:
        return self.base.outputs(columns - len(self.predicted)) + self.from_network

    def contrasts(self, output: Float[Tensor, "rows outputs"]) -> Float[Tensor, "rows columns"]:
        """The columns that the network gives: those of the family inside, and some parameters."""
        inside = output.shape[-1] - self.from_network
        base = self.base.contrasts(output[..., :inside])
        return torch.cat([base, output[..., inside:]], -1) if self.from_network else base

    def inside(self, eta: Eta, parameters: Parameters) -> tuple[Eta, Parameters]:
        """eta of the family inside, and its parameters, some of them "... rows"."""
        first = eta.shape[-1] - len(self.predicted)
        values = {name: value for name, value in parameters.items() if name != WEIGHTS}
        for place, parameter in enumerate(self._predicted()):
            most = LARGEST[parameter.link]
            column = eta[..., first + place].clamp(-most, most)
            values[parameter.name] = LINKS[parameter.link].inverse(column)
        if WEIGHTS in parameters:
            values = dict(self.base.precision_weighted(values, parameters[WEIGHTS]))
        return eta[..., :first], values

    def distribution(self, eta: Eta, parameters: Parameters, rows: Rows) -> dist.TorchDistribution:
        return self.base.distribution(*self.inside(eta, parameters), rows)

    def survivor(self, eta: Eta, parameters: Parameters, rows: Rows) -> Survival | None:
        return self.base.survivor(*self.inside(eta, parameters), rows)

    def mean(self, eta: Eta, rows: Rows) -> Tensor:
        return self.base.mean(self.inside(eta, {})[0], rows)

    def expected(self, eta: Eta, parameters: Parameters, rows: Rows) -> Tensor:
        return self.base.expected(*self.inside(eta, parameters), rows)

    def average(self, eta: Eta, parameters: Parameters, rows: Rows) -> Tensor:
        return self.base.average(*self.inside(eta, parameters), rows)

    def exceedances(self, eta: Eta, parameters: Parameters) -> tuple[Tensor, Tensor, float] | None:
        return self.base.exceedances(*self.inside(eta, parameters))

    def precision_weighted(self, parameters: Parameters, weights: RowValues) -> Parameters:
        return {**parameters, WEIGHTS: weights}

    def information(self, eta: Eta, parameters: Parameters, rows: Rows) -> Tensor:
        """Fisher information of every column, the diagonal of the matrix of a row.

        Of censored rows it is the squared score, whose expectation it is.
        """
        information = self._of_exact(eta, parameters, replace(rows, censoring=None))
        if rows.censoring is None or rows.y is None:
            return information
        with torch.enable_grad():
            leaf = eta.detach().requires_grad_(True)
            log_prob = self.distribution(leaf, parameters, rows).log_prob(rows.y.to(eta))
            (score,) = torch.autograd.grad(log_prob.sum(), leaf)
        exact = Censoring.of(rows.censoring).is_event[:, None]
        return torch.where(exact, information, score**2)

    def _of_exact(self, eta: Eta, parameters: Parameters, rows: Rows) -> Tensor:
        """Information of rows whose outcomes are exact."""
        inner, values = self.inside(eta, parameters)
        first = self.base.information(inner, values, rows)
        known = [
            self.base.parameter_information(name, inner, values, rows) for name in self.predicted
        ]
        columns = [None if value is None else value.expand(eta.shape[:-1]) for value in known]
        if first is not None and all(column is not None for column in columns):
            parts = [column[..., None] for column in columns if column is not None]
            return torch.cat([first.expand_as(inner), *parts], -1)
        every = self._simulated_information(eta, parameters, rows)
        start = inner.shape[-1]
        parts = [
            every[..., start + place : start + place + 1] if column is None else column[..., None]
            for place, column in enumerate(columns)
        ]
        return torch.cat(
            [every[..., :start] if first is None else first.expand_as(inner), *parts], -1
        )

    def _simulated_information(self, eta: Eta, parameters: Parameters, rows: Rows) -> Tensor:
        """Mean square of the scores of simulated outcomes, whose expectation is the information.

        The seed is fixed, so that the same predictor has the same information.
        """
        draws = max(1, eta.shape[:-2].numel())
        devices = [eta.device] if eta.is_cuda else []
        total = torch.zeros_like(eta)
        with (
            torch.random.fork_rng(devices=devices),
            torch.enable_grad(),
            pyro.validation_enabled(False),
        ):
            torch.manual_seed(0)
            leaf = eta.detach().requires_grad_(True)
            count = -(-SIMULATED // draws)
            for _ in range(count):
                density = self.distribution(leaf, parameters, rows)
                with torch.no_grad():
                    outcome = density.sample()
                (score,) = torch.autograd.grad(density.log_prob(outcome).sum(), leaf)
                total += torch.where(torch.isfinite(score), score, 0.0) ** 2
        return total / count

    def if_misfit(self, y: Array) -> str:
        return self.base.if_misfit(y)

    # --- results and checks -----------------------------------------------------------------

    def residual_variance(self, parameters: Parameters, mean: Draws) -> Draws:
        """That of the family inside, given values of all of its parameters."""
        return self.base.residual_variance(parameters, mean)

    def marginal_mean(
        self, eta: Float[Tensor, "draws rows columns"], variance: Float[Tensor, "draws columns"]
    ) -> Float[Tensor, "draws columns"]:
        return self.base.marginal_mean(eta, variance)

    def residual_rows(self, parameters: Parameters) -> dict[str, Draws]:
        return dict(parameters)

    def labelled(self, parameters: Parameters) -> dict[str, Labelled]:
        return self.base.labelled(parameters)

    def cdf(self, y: RowValues, eta: Eta, parameters: Parameters, rows: Rows) -> RowValues | None:
        return self.base.cdf(y, *self.inside(eta, parameters), rows)

    def cdf_range(
        self, y: RowValues, eta: Eta, parameters: Parameters, rows: Rows
    ) -> tuple[Array, Array] | None:
        return self.base.cdf_range(y, *self.inside(eta, parameters), rows)


def family_with_predictors(family: Family, names: Sequence[str], from_network: int = 0) -> Family:
    """The family with predictors of these parameters; itself without any."""
    base = family.without_predictors
    predicted = tuple(parameter_named(base, name).name for name in names)
    return Distributional(base, predicted, from_network) if predicted else base
