"""Small normalizing flows: a correlated normal, and one with skewness and varying scales."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from armed_pyro.distributions.whitened import LOG_SQRT_2PI, Pushforward

__all__ = ["AutoregressiveNormal", "CoupledNormal", "Flow", "FlowParameters"]


Vectors = Float[Tensor, "... size"]


@dataclass(frozen=True)
class FlowParameters:
    """Parameters of a `Flow`: a, F, m, l, A, C, B, k and t of `AutoregressiveNormal`.

    F is lower triangular; A, C and B are strictly so. a and F are not trained.
    """

    anchor: Float[Tensor, " size"]
    frame: Float[Tensor, "size size"]
    shift: Float[Tensor, " size"]
    log_scale: Float[Tensor, " size"]
    coupling: Float[Tensor, "size size"]
    twist: Float[Tensor, "size size"]
    bow: Float[Tensor, "size size"]
    skew: Float[Tensor, " size"]
    log_tail: Float[Tensor, " size"]


class Flow(Pushforward, ABC):
    """Distribution of theta = a + F x, with x a differentiable function of normal noise.

    The log-density of a draw that `push` has just made has only the gradient along the draw. The
    part that is left out has expectation zero, and the part that remains has variance zero where
    the flow equals the posterior (Roeder, Wu, Duvenaud 2017, "Sticking the landing", NeurIPS 30).
    F and a get no gradients.
    """

    def __init__(
        self,
        parameters: FlowParameters,
        batch_shape: torch.Size = torch.Size(),  # noqa: B008
    ) -> None:
        self.parameters = parameters
        self.dtype, self.device = parameters.shift.dtype, parameters.shift.device
        self._drawn: tuple[Tensor, Tensor, Tensor] | None = None
        super().__init__(batch_shape, parameters.shift.shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Flow:
        shape = torch.Size(batch_shape)
        return self if shape == self.batch_shape else type(self)(self.parameters, shape)

    def push(self, noise: Vectors) -> Vectors:
        x = self._framed(noise)
        value = self.parameters.anchor + x @ self.parameters.frame.mT
        self._drawn = (value, x, noise)
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        if self._drawn is None or self._drawn[0] is not value:
            return self._log_prob(self._pull(value))
        _, x, noise = self._drawn
        with torch.no_grad():
            density = self._log_prob(noise)
            if not x.requires_grad:
                return density
            slope = self._slope(noise)
        return density + (slope * (x - x.detach())).sum(-1)

    @abstractmethod
    def _framed(self, noise: Vectors) -> Vectors:
        """x as a function of the noise."""

    @abstractmethod
    def _log_prob(self, noise: Vectors) -> Float[Tensor, "..."]:
        """log q(theta) of the theta that this noise becomes."""

    @abstractmethod
    def _slope(self, noise: Vectors) -> Vectors:
        """d log q / d x: the gradient in the noise, solved by the map's triangular Jacobian."""

    @abstractmethod
    def _pull(self, value: Vectors) -> Vectors:
        """The noise that becomes this value."""

    def _solved_frame(self, value: Vectors) -> Vectors:
        """x - m."""
        p = self.parameters
        return _solve(p.frame, value - p.anchor, upper=False) - p.shift

    def _identity(self) -> Float[Tensor, "size size"]:
        return torch.eye(len(self.parameters.shift), dtype=self.dtype, device=self.device)


class CoupledNormal(Flow):
    r"""The normal flow: an `AutoregressiveNormal` without twist, bow, skewness and tails.

    .. math:: x_i = m_i + e^{l_i} \Big(\epsilon_i + \sum_{j<i} A_{ij} \epsilon_j\Big), \quad
        \epsilon \sim N(0, I), \quad \theta = a + F x
    """

    def _framed(self, noise: Vectors) -> Vectors:
        p = self.parameters
        return p.shift + p.log_scale.exp() * (noise + noise @ p.coupling.mT)

    def _log_prob(self, noise: Vectors) -> Float[Tensor, "..."]:
        p = self.parameters
        log_det = p.log_scale + p.frame.diagonal().log()
        return (-0.5 * noise**2 - LOG_SQRT_2PI - log_det).sum(-1)

    def _slope(self, noise: Vectors) -> Vectors:
        p = self.parameters
        upper = (self._identity() + p.coupling).mT
        return -_solve(upper, noise, upper=True) * (-p.log_scale).exp()

    def _pull(self, value: Vectors) -> Vectors:
        p = self.parameters
        scaled = self._solved_frame(value) * (-p.log_scale).exp()
        return _solve(self._identity() + p.coupling, scaled, upper=False)


class AutoregressiveNormal(Flow):
    r"""A normal distribution with skewness, tails, and scales that depend on earlier components.

    .. math::
        s_i &= \sinh(e^{t_i} \operatorname{asinh}(\epsilon_i) + k_i), \quad \epsilon \sim N(0, I) \\
        x_i &= m_i + e^{l_i + \sum_{j<i} (C_{ij} t_j + B_{ij} t_j^2)}
            \Big(s_i + \sum_{j<i} A_{ij} s_j\Big), \quad t_j = \tanh s_j, \quad \theta = a + F x

    F (lower triangular) and a are not trained, so the trained parameters are of order 1. The flow
    lets the scale of a fixed effect depend on the residual sd, and the log of an sd near zero be
    skewed by a sinh-arcsinh distribution (Jones and Pewsey 2009, Biometrika 96(4)).
    """

    def _framed(self, noise: Vectors) -> Vectors:
        p = self.parameters
        s = torch.sinh(p.log_tail.exp() * torch.asinh(noise) + p.skew)
        return p.shift + self._scale(s) * (s + s @ p.coupling.mT)

    def _scale(self, s: Vectors) -> Vectors:
        # tanh bounds the exponent: otherwise the scale would collapse in a tail.
        p = self.parameters
        t = torch.tanh(s)
        return (p.log_scale + t @ p.twist.mT + t**2 @ p.bow.mT).exp()

    def _log_prob(self, noise: Vectors) -> Float[Tensor, "..."]:
        p = self.parameters
        inner = p.log_tail.exp() * torch.asinh(noise) + p.skew
        log_det = torch.log(torch.cosh(inner)) + p.log_tail - 0.5 * torch.log1p(noise**2)
        log_det = log_det + self._scale(torch.sinh(inner)).log() + p.frame.diagonal().log()
        return (-0.5 * noise**2 - LOG_SQRT_2PI - log_det).sum(-1)

    def _slope(self, noise: Vectors) -> Vectors:
        p = self.parameters
        root, tail = torch.sqrt(1 + noise**2), p.log_tail.exp()
        inner = tail * torch.asinh(noise) + p.skew
        s, stretch = torch.sinh(inner), torch.cosh(inner) * tail / root
        by_noise = -noise - (torch.tanh(inner) * tail / root - noise / root**2)
        t = torch.tanh(s)
        # d log scale_i / d s_j
        bend = (p.twist + 2 * t[..., None, :] * p.bow) * (1 - t**2)[..., None, :]
        by_s = by_noise / stretch - bend.sum(-2)
        scale = self._scale(s)
        moved = (scale * (s + s @ p.coupling.mT))[..., None]
        jacobian = scale[..., None] * (self._identity() + p.coupling) + moved * bend
        return _solve(jacobian.mT, by_s, upper=True)

    def _pull(self, value: Vectors) -> Vectors:
        # Component by component: the scale of x_i depends on the s_j before it.
        p, x = self.parameters, self._solved_frame(value)
        s = torch.zeros_like(x)
        for i in range(x.shape[-1]):
            s_i = x[..., i] / self._scale(s)[..., i] - s @ p.coupling[i]
            s = torch.cat([s[..., :i], s_i[..., None], s[..., i + 1 :]], -1)
        return torch.sinh((torch.asinh(s) - p.skew) * (-p.log_tail).exp())


def _solve(matrix: Float[Tensor, "... size size"], vector: Vectors, *, upper: bool) -> Vectors:
    return torch.linalg.solve_triangular(matrix, vector[..., None], upper=upper)[..., 0]
