"""How a settled network's guide is trained: draws a step, steps a window, and their length."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Pace"]


# Log-likelihoods in one step up to which they take less time than what is done around them.
CHEAP = 2**17


@dataclass(frozen=True)
class Pace:
    """Draws of the hyperparameters a step, steps a window, factor of the learning rate.

    Four times the draws halve the noise of a gradient; steps may then be twice as long, and half
    as many.

    Examples
    --------
    >>> Pace.of(180, network=False)
    Pace(draws=32, window=12, rate=2.0)
    >>> Pace.of(10_000, network=False)
    Pace(draws=8, window=25, rate=1.0)
    """

    draws: int
    window: int
    rate: float

    @classmethod
    def of(cls, likelihoods: int, *, network: bool) -> Pace:
        """The pace where a draw takes so many log-likelihoods.

        Parameters
        ----------
        likelihoods : int
            Rows, times draws of the random effects given the hyperparameters.
        network : bool
            Whether the network runs once a draw, because of effects inside it.
        """
        if network:
            return cls(draws=2, window=25, rate=1.0)
        many = cls(draws=32, window=12, rate=2.0)
        return many if likelihoods * many.draws <= CHEAP else cls(draws=8, window=25, rate=1.0)
