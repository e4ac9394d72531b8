"""How long and how fast to train, when to stop, and the record of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float

__all__ = ["MOVING", "History", "Plateau", "Schedule", "split_r_hat"]


# Windows without a best one after which a guide that moves is taken to wander: at this rate it
# would go on for ever.
WANDERING = 20


@dataclass(frozen=True)
class Schedule:
    r"""Length and rates of training.

    The learning rates are multiplied by `decay` whenever the loss has stopped improving; after
    `stages` such cuts the fit has converged. If `steps` run out first, the rates fall linearly
    over the last fifth of the steps and the fit is marked as not converged.

    Attributes
    ----------
    steps : int
        Most steps to take.
    batch_size : int or None
        Rows a step; None takes all rows up to 4,096, and 1,024 beyond.
    learning_rate : float
        Adam's rate for the guide; twice that where rows are few and the network is settled.
    net_learning_rate : float
        Adam's rate for the network and the adversaries.
    window : int or None
        Steps over which the loss is averaged before it is compared with the window before; None
        takes an epoch, but at least 100 steps, and 12 or 25 once the network is settled.
    decay : float
        Factor of the rates at each cut.
    stages : int
        Cuts until convergence; 0 trains for `steps` steps at falling rates, whatever the loss.
    patience : int
        With validation data: windows without improvement of the validation loss before a cut.
    particles : int or None
        Draws of each cluster's random effects a step, once the network is settled; more than one
        make the bound tight where the random effects are not normal given the hyperparameters.
        None takes 1, 16 or 32, by how much a single one loses.
    clip : float
        Largest norm of the gradient, of the loss per row. A rare draw of a small residual sd has
        a gradient a thousand times the usual one, which would halt Adam for hundreds of steps.

    Examples
    --------
    >>> Schedule(steps=500).rate(step=0)
    1.0
    """

    steps: int = 20_000
    batch_size: int | None = None
    learning_rate: float = 0.03
    net_learning_rate: float = 0.005
    window: int | None = None
    decay: float = 0.25
    stages: int = 3
    patience: int = 5
    particles: int | None = None
    clip: float = 1.0

    def __post_init__(self) -> None:
        positive = ("steps", "learning_rate", "net_learning_rate", "decay", "patience", "clip")
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive, not {getattr(self, name)}")
        for name in ("batch_size", "window", "particles"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, not {value}")

    def batch(self, n_rows: int) -> int:
        """Rows a step for data of this size."""
        if self.batch_size is None:
            return n_rows if n_rows <= 4096 else 1024
        return min(self.batch_size, n_rows)

    def window_steps(self, n_rows: int, settled: int | None = None) -> int:
        """Steps of one window for data of this size; `settled` of them once the network is."""
        return self.window or settled or max(100, n_rows // self.batch(n_rows))

    def plateau(self, n_rows: int) -> Plateau:
        """The rule that cuts the rates, and ends training after `stages` cuts, for so many rows.

        Examples
        --------
        >>> plateau = Schedule().plateau(1000)
        >>> plateau.training(np.array([1.0, 1.0])), plateau.training(np.array([1.0, 1.0]))
        (False, True)
        """
        return Plateau(tolerance=0.01 / n_rows, patience=self.patience)

    def rate(self, step: int) -> float:
        """Factor of the learning rates owed to the steps running out."""
        start = 0.8 * self.steps
        return 1.0 if step <= start else max(0.02, (self.steps - step) / (self.steps - start))

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return asdict(self)


@dataclass
class Plateau:
    """Decides from window means whether the loss still improves, and counts the cuts.

    A window of the training loss counts as no improvement if it is not lower than the last by
    more than its standard error and by more than `tolerance`; a window of the validation loss,
    if `patience` windows have passed since the best.
    """

    tolerance: float
    patience: int
    cuts: int = 0
    previous: tuple[float, float] | None = None
    best: float = math.inf
    waited: int = 0

    def training(self, losses: np.ndarray, *, moving: bool = False) -> bool:
        """Take in one window of training losses; True if the rates are to be cut.

        Parameters
        ----------
        losses : ndarray
        moving : bool
            The guide still moves; unless it only wanders, without a best window for long, that is
            no reason to cut.
        """
        mean, variance = float(losses.mean()), float(losses.var() / len(losses))
        better = mean < self.best - self.tolerance
        self.best, self.waited = (mean, 0) if better else (self.best, self.waited + 1)
        if moving and self.waited < WANDERING:
            return False
        last, self.previous = self.previous, (mean, variance)
        if last is None:
            return False
        slack = max(self.tolerance, math.sqrt(variance + last[1]))
        return self._cut(last[0] - mean < slack)

    def validation(self, loss: float) -> tuple[bool, bool]:
        """Take in one validation loss; whether it is the best, and whether rates are to be cut."""
        if loss < self.best - 1e-6 * abs(self.best if math.isfinite(self.best) else 0.0):
            self.best, self.waited = loss, 0
            return True, False
        self.waited += 1
        return False, self._cut(self.waited >= self.patience)

    def _cut(self, stalled: bool) -> bool:
        if stalled:
            self.cuts += 1
            self.previous, self.waited = None, 0
        return stalled

    def to_json(self) -> dict[str, Any]:
        """The state as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Plateau:
        """The state that `to_json` wrote."""
        previous = values["previous"]
        return cls(**{**values, "previous": None if previous is None else tuple(previous)})


def split_r_hat(iterates: Float[np.ndarray, "steps size"]) -> tuple[float, float]:
    r"""Whether a stretch of iterates has stopped moving: R-hat of its halves, and their distance.

    .. math:: \hat R = \sqrt{1 + B / W}, \quad B = (\bar m_1 - \bar m_2)^2 / 2, \quad
        W = 1 + \overline{Var}(m)

    of draws from the guides that the iterates are the means of, whose posterior sd is 1: the
    largest over components, as is the distance of the halves' means, in posterior sds.

    References
    ----------
    Dhaka et al. (2020), "Robust, accurate stochastic optimization for variational inference",
    NeurIPS.

    Examples
    --------
    >>> split_r_hat(np.array([[0.0], [0.0], [1.0], [1.0]]))
    (1.224744871391589, 1.0)
    """
    n = len(iterates) // 2
    if n < 2:
        return math.nan, math.nan
    halves = np.stack([iterates[:n], iterates[n : 2 * n]])
    means, within = halves.mean(1), 1 + halves.var(1, ddof=1).mean(0)
    r_hat = np.sqrt(1 + means.var(0, ddof=1) / within)
    return float(r_hat.max(initial=1.0)), float(np.abs(means[1] - means[0]).max(initial=0.0))


@dataclass
class History:
    """Record of a fit: per step the loss, per window the rest.

    Attributes
    ----------
    loss, elbo : list of float
        Objective and evidence lower bound, each per row, at every step.
    step : list of int
        Last step of each window.
    rate : list of float
        Factor of the learning rates in each window.
    validation : list of float
        -log p(y | fit) per validation row at the end of each window.
    adversary_accuracy : list of list of float
        Share of training rows whose cluster each adversary named, mean of the window.
    settled : int or None
        Steps after which the network was held fixed and only the guide was trained.
    particles : int
        Draws of each cluster's random effects a step from then on.
    r_hat, drift : list of float
        For each window from then on, `split_r_hat` of the iterates of q(theta).
    compiled : list of bool
        Whether the steps of each window ran compiled at its end.
    seconds : list of float
        Median time of a step then.
    """

    loss: list[float] = field(default_factory=list)
    elbo: list[float] = field(default_factory=list)
    step: list[int] = field(default_factory=list)
    rate: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    adversary_accuracy: list[list[float]] = field(default_factory=list)
    settled: int | None = None
    particles: int = 1
    r_hat: list[float] = field(default_factory=list)
    drift: list[float] = field(default_factory=list)
    compiled: list[bool] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list, compare=False)

    def status(self, chances: Sequence[tuple[str, float]]) -> str:
        """How training goes, in a line.

        Parameters
        ----------
        chances : sequence of (str, float)
            Every adversary's factor, and the accuracy of always naming its largest cluster.
        """
        text = f"loss {np.mean(self.loss[-50:]):.4f}"
        if self.validation:
            text += f", validation {self.validation[-1]:.4f}"
        accuracies = self.adversary_accuracy[-1] if chances else []
        for (factor, chance), accuracy in zip(chances, accuracies, strict=True):
            text += f", adversary of {factor} {accuracy:.2f} (chance {chance:.2f})"
        return text

    def to_json(self) -> dict[str, Any]:
        """The record as JSON values."""
        return asdict(self)


MOVING = 1.05  # R-hat of the iterates: half a posterior sd
