"""Normal distributions of many independent Markov chains of points, each in linear time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from armed_pyro.distributions.whitened import LOG_SQRT_2PI, Pushforward

__all__ = ["ChainNormal", "Chains", "predicted_variance"]

Points = Float[Tensor, "... points"]


@dataclass(frozen=True)
class Chains:
    """The points of independent chains, and the order in which recursions go through them.

    A recursion takes the first points of all chains at once, then the second ones, with the longest
    chains first: `steps` are the points in this order, and `sizes` are the numbers of chains that
    have a first point, a second, and so on. `place` is the inverse of `steps`. `previous` and
    `following` are each point's neighbours in its chain; the number of points stands for none.

    >>> chains = Chains.of(np.array([0, 0, 1]), np.array([2.0, 1.0, 5.0]))
    >>> chains.previous.tolist(), chains.sizes
    ([1, 3, 3], (2, 1))
    """

    steps: Int[Tensor, " points"]
    place: Int[Tensor, " points"]
    previous: Int[Tensor, " points"]
    following: Int[Tensor, " points"]
    sizes: tuple[int, ...]
    ordered: bool = False  # whether the points are in the order of `steps`, the fastest

    @classmethod
    def of(cls, chain: Int[np.ndarray, " points"], time: Float[np.ndarray, " points"]) -> Chains:
        """The chains of points with these numbers of their chain, in order of time."""
        n = len(chain)
        order = np.lexsort((time, chain))
        starts = np.flatnonzero(np.diff(chain[order], prepend=-1))
        lengths = np.diff(starts, append=n)
        rank = np.arange(n) - np.repeat(starts, lengths)
        first = rank == 0
        last = np.append(first[1:], True)[:n]
        previous, following = np.full(n, n), np.full(n, n)
        previous[order[~first]] = order[:-1][~first[1:]] if n else order
        following[order[~last]] = order[1:][~last[:-1]] if n else order
        # Chains keep their place in every step: those of equal length are in order of their number.
        steps = order[np.lexsort((chain[order], np.repeat(-lengths, lengths), rank))]
        place = np.empty(n, dtype=np.int64)
        place[steps] = np.arange(n)
        sizes = tuple(np.bincount(rank).tolist()) if n else ()
        as_tensor = torch.as_tensor
        neighbours = as_tensor(previous), as_tensor(following)
        return cls(as_tensor(steps), as_tensor(place), *neighbours, sizes)

    def to(self, device: torch.device) -> Chains:
        """The same chains on this device."""
        order = self.steps.to(device), self.place.to(device)
        neighbours = self.previous.to(device), self.following.to(device)
        return Chains(*order, *neighbours, self.sizes, self.ordered)

    def in_order(self) -> Chains:
        """The same chains of the points ``values[..., steps]``."""
        same = torch.arange(len(self.steps), device=self.steps.device)
        place = torch.cat([self.place, same.new_tensor([len(same)])])
        neighbours = place[self.previous[self.steps]], place[self.following[self.steps]]
        return Chains(same, same, *neighbours, self.sizes, True)

    def split(self, values: Points) -> tuple[Tensor, ...]:
        """The first points of all chains, the second ones, ..."""
        values = values if self.ordered else values.index_select(-1, self.steps)
        return values.split(self.sizes, -1)

    def joined(self, parts: Sequence[Tensor]) -> Points:
        """The points of which `split` gives these parts."""
        values = torch.cat(list(parts), -1)
        return values if self.ordered else values.index_select(-1, self.place)

    def before(self, values: Points) -> Points:
        """The values of each point's predecessor; 0 for the first point."""
        result: Tensor = _Neighbour.apply(values, self, False)  # type: ignore[no-untyped-call]
        return result

    def after(self, values: Points) -> Points:
        """The values of each point's successor; 0 for the last point."""
        result: Tensor = _Neighbour.apply(values, self, True)  # type: ignore[no-untyped-call]
        return result

    def total(self, values: Points) -> Float[Tensor, "... chains"]:
        """Sums over the points of each chain, the longest chains first."""
        result: Tensor = _Total.apply(values, self)  # type: ignore[no-untyped-call]
        return result

    def forwards(self, coefficient: Points, addend: Points) -> Points:
        """x with :math:`x_i = c_i x_{i-1} + b_i`, and 0 before the first point."""
        result: Tensor = _Recursion.apply(coefficient, addend, self, False)  # type: ignore[no-untyped-call]
        return result

    def backwards(self, coefficient: Points, addend: Points) -> Points:
        """x with :math:`x_i = c_i x_{i+1} + b_i`, and 0 after the last point."""
        result: Tensor = _Recursion.apply(coefficient, addend, self, True)  # type: ignore[no-untyped-call]
        return result


class _Neighbour(torch.autograd.Function):
    """Values of neighbours in one direction; the gradient goes in the other one."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, chains: Chains, reverse: bool) -> Tensor:
        ctx.settings = chains, reverse
        if not chains.ordered:
            edge = values.new_zeros(*values.shape[:-1], 1)
            index = chains.following if reverse else chains.previous
            return torch.cat([values, edge], -1).index_select(-1, index)
        parts, sizes = chains.split(values), chains.sizes
        if reverse:
            pairs = zip([*parts[1:], values[..., :0]], sizes, strict=True)
            return torch.cat([pad(part, (0, n - part.shape[-1])) for part, n in pairs], -1)
        first = values.new_zeros(*values.shape[:-1], *sizes[:1])
        pairs = zip(parts, sizes[1:], strict=False)
        return torch.cat([first, *(part[..., :n] for part, n in pairs)], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        chains, reverse = ctx.settings
        return chains.before(gradients[0]) if reverse else chains.after(gradients[0]), None, None


class _Total(torch.autograd.Function):
    """Sums over chains."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, chains: Chains) -> Tensor:
        ctx.chains = chains
        total = values.new_zeros(*values.shape[:-1], *(chains.sizes[:1] or (0,)))
        for part in chains.split(values):
            total[..., : part.shape[-1]] += part
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        chains = ctx.chains
        return chains.joined([gradients[0][..., :n] for n in chains.sizes]), None


class _Recursion(torch.autograd.Function):
    """A linear recursion; its gradient is the recursion in the other direction."""

    @staticmethod
    def forward(
        ctx: Any, coefficient: Tensor, addend: Tensor, chains: Chains, reverse: bool
    ) -> Tensor:
        shape = torch.broadcast_shapes(coefficient.shape, addend.shape)
        factors, terms = chains.split(coefficient), chains.split(addend.expand(shape))
        parts, state = list[Tensor](), addend.new_zeros(*shape[:-1], 0)
        pairs = list(zip(factors, terms, strict=True))
        for factor, term in reversed(pairs) if reverse else pairs:
            n = min(term.shape[-1], state.shape[-1])
            near = torch.addcmul(term[..., :n], factor[..., :n], state[..., :n])
            state = torch.cat([near, term[..., n:]], -1) if n < term.shape[-1] else near
            parts.append(state)
        values = chains.joined(parts[::-1] if reverse else parts)
        ctx.save_for_backward(coefficient, values)
        ctx.settings = chains, reverse, addend.shape
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        coefficient, values = ctx.saved_tensors
        chains, reverse, shape = ctx.settings
        if reverse:
            adjoint = chains.forwards(chains.before(coefficient), gradients[0])
            neighbour = chains.after(values)
        else:
            adjoint = chains.backwards(chains.after(coefficient), gradients[0])
            neighbour = chains.before(values)
        by_coefficient = (adjoint * neighbour).sum_to_size(coefficient.shape)
        return by_coefficient, adjoint.sum_to_size(shape), None, None


def predicted_variance(
    chains: Chains, decay: Points, innovation: Points, information: Points
) -> Points:
    r"""Variance of each point given the observations before it.

    .. math:: p_i = a_i^2 \frac{p_{i-1}}{1 + g_{i-1} p_{i-1}} + q_i

    with the `decay` a, the variance q of the `innovation`, and the `information` g, the precision
    of a point's own observation. The first point has :math:`p_i = q_i`.
    """
    result: Tensor = _Riccati.apply(decay, innovation, information, chains)  # type: ignore[no-untyped-call]
    return result


class _Riccati(torch.autograd.Function):
    """`predicted_variance`; its gradient is a linear recursion backwards."""

    @staticmethod
    def forward(
        ctx: Any, decay: Tensor, innovation: Tensor, information: Tensor, chains: Chains
    ) -> Tensor:
        shape = torch.broadcast_shapes(decay.shape, innovation.shape, information.shape)
        arrays = (decay.square(), innovation, information)
        split = [chains.split(part.expand(shape)) for part in arrays]
        parts, left = list[Tensor](), None
        for square, noise, known in zip(*split, strict=True):
            n = noise.shape[-1]
            variance = noise if left is None else torch.addcmul(noise, square, left[..., :n])
            parts.append(variance)
            left = variance / (1 + known * variance)
        values = chains.joined(parts)
        ctx.save_for_backward(decay, information, values)
        ctx.chains, ctx.shape = chains, innovation.shape
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        decay, information, values = ctx.saved_tensors
        chains = ctx.chains
        share = 1 / (1 + information * values)
        following = chains.after(decay.expand(values.shape)).square()
        adjoint = chains.backwards(following * share.square(), gradients[0])
        by_decay = 2 * decay * chains.before(values * share) * adjoint
        pulled = following * chains.after(adjoint)
        by_information = -pulled * (values * share).square()
        return (
            by_decay.sum_to_size(decay.shape),
            adjoint.sum_to_size(ctx.shape),
            by_information.sum_to_size(information.shape),
            None,
        )


class ChainNormal(Pushforward):
    r"""Values of points, each normal given its predecessor's, or its successor's.

    .. math:: u_i \mid u_{i-1} \sim N(b_i + c_i u_{i-1}, s_i^2)

    with the successor in the place of the predecessor if `reverse`. c is the `coefficient`, s the
    `scale` and b the `base`. The batch shape is "... points" and the event has one element: the
    log-density of a point is that given its neighbour, and their sum is the joint log-density.
    """

    def __init__(
        self,
        chains: Chains,
        coefficient: Points,
        scale: Points,
        base: Points | None = None,
        *,
        reverse: bool = False,
        batch: torch.Size | None = None,
    ) -> None:
        self.chains, self.coefficient, self.scale = chains, coefficient, scale
        self.base = torch.zeros_like(scale) if base is None else base
        self.reverse = reverse
        self.dtype, self.device = scale.dtype, scale.device
        implied = torch.broadcast_shapes(coefficient.shape, scale.shape, self.base.shape)
        super().__init__(batch or implied, torch.Size([1]), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> ChainNormal:
        shape = torch.Size(batch_shape)
        if shape == self.batch_shape:
            return self
        parts = (self.chains, self.coefficient, self.scale, self.base)
        return ChainNormal(*parts, reverse=self.reverse, batch=shape)

    @property
    def mean(self) -> Float[Tensor, "... points 1"]:
        """Mean of every point."""
        return self._solved(self.base.expand(self.batch_shape))[..., None]

    def push(self, noise: Float[Tensor, "... points 1"]) -> Float[Tensor, "... points 1"]:
        return self._solved(self.base + self.scale * noise[..., 0])[..., None]

    def noise(self, value: Float[Tensor, "... points 1"]) -> Float[Tensor, "... points 1"]:
        """The noise of which `push` makes this value."""
        values = value[..., 0]
        near = self.chains.after(values) if self.reverse else self.chains.before(values)
        return ((values - self.base - self.coefficient * near) / self.scale)[..., None]

    def log_prob(self, value: Float[Tensor, "... points 1"]) -> Points:
        return -0.5 * self.noise(value)[..., 0].square() - self.scale.log() - LOG_SQRT_2PI

    def _solved(self, addend: Points) -> Points:
        solve = self.chains.backwards if self.reverse else self.chains.forwards
        return solve(self.coefficient, addend)
