"""Kinds of processes in time: a value depends on the one before it, and on the time between."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor

from armed_pyro.distributions.penalised import PenalisedAutocorrelation, penalised_range

__all__ = ["KERNELS", "Kernel", "kernel_named"]

Gaps = Float[Tensor, " points"]
# P(range < median gap between times) a priori.
SHORT = 0.05
# P(phi > 0.5) = 0.75 a priori: -log(1 / 3) / sqrt(0.5).
AUTOCORRELATION_RATE = math.log(3.0) / math.sqrt(0.5)
# Deviation of a time from a whole number of steps, in steps.
IRREGULAR = 1e-3


@dataclass(frozen=True)
class Kernel(ABC):
    r"""A process with sd 1, :math:`z(t + d) = a(d) z(t) + \sqrt{q(d)} \epsilon`.

    `unit` is the shortest and `typical` the median gap between neighbouring times of a cluster in
    the training rows. `label` is the start of the sites' names.
    """

    name: ClassVar[str]  # in formulas
    quantity: ClassVar[str | None] = None  # of the site beside the sd; None without one
    label: str
    unit: float
    typical: float

    @property
    def site(self) -> str | None:
        """Name of the site beside the sd."""
        return None if self.quantity is None else f"{self.label}_{self.quantity}"

    def problem(self, times: Float[np.ndarray, " points"], origin: float) -> str:
        """What is wrong with times at which the process is not defined; empty if nothing."""
        return ""

    @abstractmethod
    def sample(self, like: Tensor) -> dict[str, Tensor]:
        """Sample the sites from their priors, in the precision and device of `like`."""

    @abstractmethod
    def start(self) -> dict[str, Tensor]:
        """Initial values of a guide, by site."""

    @abstractmethod
    def describe(self) -> dict[str, str]:
        """Priors as text, by quantity."""

    @abstractmethod
    def step(self, parameter: Tensor, gap: Gaps) -> tuple[Tensor, Tensor]:
        """a and q "... points" of points this long after the point before them.

        The `parameter`, "... 1", is that of the site; 1 without one.
        """

    @abstractmethod
    def first(self, gap: Gaps) -> Tensor:
        """Variance of points without a point before them."""

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class OrnsteinUhlenbeck(Kernel):
    r"""Correlation :math:`\exp(-d / \rho)` at any distance d in time.

    rho, the range, is the time after which the correlation is 1/e.
    """

    name = "ou"
    quantity = "range"

    def sample(self, like: Tensor) -> dict[str, Tensor]:
        rate = like.new_full((1,), -math.log(SHORT) * self.typical**0.5)
        site = f"{self.label}_range"
        return {site: pyro.sample(site, penalised_range(rate).to_event(1))}

    def start(self) -> dict[str, Tensor]:
        return {f"{self.label}_range": torch.tensor([3 * self.typical], dtype=torch.float64)}

    def describe(self) -> dict[str, str]:
        text = f"PenalisedComplexity(P(range < {self.typical:.4g}) = {SHORT:g})"
        return {f"{self.label}_range": text}

    def step(self, parameter: Tensor, gap: Gaps) -> tuple[Tensor, Tensor]:
        rate = -gap / parameter
        return rate.exp(), -torch.expm1(2 * rate)

    def first(self, gap: Gaps) -> Tensor:
        return torch.ones_like(gap)


@dataclass(frozen=True)
class Autoregressive(Kernel):
    r"""Correlation :math:`\phi^d` at times that are whole numbers of steps apart, -1 < phi < 1.

    The step is the shortest gap in the training rows.
    """

    name = "ar1"
    quantity = "phi"

    def problem(self, times: Float[np.ndarray, " points"], origin: float) -> str:
        steps = (times - origin) / self.unit
        wrong = np.abs(steps - np.round(steps)) > IRREGULAR
        if not wrong.any():
            return ""
        return (
            f"ar1 needs times that are whole numbers of steps of {self.unit:.6g} apart, found "
            f"{times[wrong][0]:.6g}: use ou(time | cluster), the same process at any times, or "
            "number the visits"
        )

    def sample(self, like: Tensor) -> dict[str, Tensor]:
        site, rate = f"{self.label}_phi", like.new_full((1,), AUTOCORRELATION_RATE)
        prior = dist.Independent(PenalisedAutocorrelation(rate), 1)
        return {site: pyro.sample(site, prior)}

    def start(self) -> dict[str, Tensor]:
        return {f"{self.label}_phi": torch.tensor([0.5], dtype=torch.float64)}

    def describe(self) -> dict[str, str]:
        return {f"{self.label}_phi": "PenalisedComplexity(P(phi > 0.5) = 0.75)"}

    def step(self, parameter: Tensor, gap: Gaps) -> tuple[Tensor, Tensor]:
        steps = (gap / self.unit).round()
        size = parameter.abs().clamp(min=1e-12).log() * steps
        odd = (steps % 2 == 1) & (parameter < 0)
        return torch.where(odd, -1.0, 1.0) * size.exp(), -torch.expm1(2 * size)

    def first(self, gap: Gaps) -> Tensor:
        return torch.ones_like(gap)


@dataclass(frozen=True)
class RandomWalk(Kernel):
    r"""Increments with variance :math:`sd^2 d` over a time d, measured in shortest gaps.

    The walk starts at 0 one shortest gap before a cluster's first time.
    """

    name = "rw"

    def sample(self, like: Tensor) -> dict[str, Tensor]:
        return {}

    def start(self) -> dict[str, Tensor]:
        return {}

    def describe(self) -> dict[str, str]:
        return {}

    def step(self, parameter: Tensor, gap: Gaps) -> tuple[Tensor, Tensor]:
        ones = torch.ones_like(parameter)
        return ones * torch.ones_like(gap), ones * gap / self.unit

    def first(self, gap: Gaps) -> Tensor:
        return torch.ones_like(gap)


KERNELS: dict[str, type[Kernel]] = {
    kind.name: kind for kind in (OrnsteinUhlenbeck, Autoregressive, RandomWalk)
}


def kernel_named(name: str) -> type[Kernel]:
    """The kind of process with this name."""
    if name not in KERNELS:
        raise ValueError(f"unknown process {name!r}: choose one of {', '.join(KERNELS)}")
    return KERNELS[name]
