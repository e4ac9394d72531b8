"""`AveragedWeights`: the mean of a network's weights over the latest steps of its training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["AveragedWeights"]

# Of t steps about the last t / LATEST count.
LATEST = 4


class AveragedWeights:
    r"""Polynomial-decay average of a network's weights and buffers.

    .. math:: \bar w_t = \bar w_{t-1} + \frac{a}{t + a - 1} (w_t - \bar w_{t-1}), \quad a = 4

    At a constant learning rate the weights fluctuate around a point, and held-out rows see more of
    these fluctuations than of the progress. The mean has little of them, and follows without a
    horizon that would have to be chosen.

    References
    ----------
    Shamir and Zhang (2013), Stochastic gradient descent for non-smooth optimization, ICML.

    Examples
    --------
    >>> network = nn.Linear(1, 1)
    >>> averaged = AveragedWeights(network)
    >>> for value in (1.0, 2.0, 3.0):
    ...     _ = nn.init.constant_(network.weight, value)
    ...     averaged.add()
    >>> round(averaged.tensors["weight"].item(), 3), network.weight.item()
    (2.6, 3.0)
    """

    def __init__(self, network: nn.Module) -> None:
        self.network, self.steps = network, 0
        self.tensors = {name: value.clone() for name, value in self._present().items()}

    @torch.no_grad()
    def add(self) -> None:
        """Add the network's present weights; whole numbers, such as counts, are the latest ones."""
        self.steps += 1
        share = LATEST / (self.steps + LATEST - 1)
        for name, value in self._present().items():
            if value.is_floating_point():
                self.tensors[name].lerp_(value, share)
            else:
                self.tensors[name].copy_(value)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The network with the averaged weights."""
        before = {name: value.clone() for name, value in self._present().items()}
        self._put(self.tensors)
        try:
            yield
        finally:
            self._put(before)

    def state(self) -> dict[str, Tensor]:
        """All tensors, for a checkpoint."""
        tensors = {f"averaged.{name}": value for name, value in self.tensors.items()}
        return {**tensors, "averaged_steps": torch.tensor(self.steps)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back the tensors of `state`."""
        self.steps = int(tensors["averaged_steps"])
        for name, value in self.tensors.items():
            value.copy_(tensors[f"averaged.{name}"])

    def _present(self) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in self.network.state_dict().items()}

    @torch.no_grad()
    def _put(self, tensors: Mapping[str, Tensor]) -> None:
        for name, value in self._present().items():
            value.copy_(tensors[name])
