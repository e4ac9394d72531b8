"""Length and rates of training, the rule that ends it, and its record."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

__all__ = ["MOVING", "History", "Pace", "Plateau", "Schedule", "split_r_hat"]

# R-hat of the iterates from which on the guide moves: the halves differ by half a posterior sd.
MOVING = 1.05
# Windows without a new best loss after which a moving guide is taken to fluctuate around a point;
# at the same rate it would do so without end.
WANDERING = 20
# Fewest steps between two looks at held-out rows; an epoch of 100 rows has three steps.
SHORTEST = 10
# Log-likelihoods in one step up to which they take less time than the rest of the step.
CHEAP = 2**17
# Settings of the steps of the guide once the network is frozen.
OF_GUIDE = ("steps", "window", "stages", "patience", "learning_rate", "particles")


@dataclass(frozen=True)
class Schedule:
    r"""Length and rates of training.

    The learning rates are multiplied by `decay` whenever the loss has stopped improving; after
    `stages` such cuts the fit has converged. If `steps` run out first, the rates fall linearly
    over the last fifth of the steps and the fit is marked as not converged.

    Attributes
    ----------
    steps : int
        Largest number of steps.
    batch_size : int or None
        Rows per step; None takes all rows up to 4,096, and 1,024 beyond.
    learning_rate : float
        Adam's rate for the guide; doubled with few rows once the network is frozen.
    net_learning_rate : float
        Adam's rate for the network and the adversaries.
    window : int or None
        Steps over which the loss is averaged before it is compared with the previous window; None
        takes an epoch, but at least 100 steps, and 12 or 25 steps once the network is frozen.
    decay : float
        Factor of the rates at each cut.
    stages : int
        Number of cuts until convergence; 0 trains for `steps` steps, whatever the loss.
    patience : int
        With validation data: windows without improvement of the validation loss before a cut.
    particles : int or None
        Draws of each cluster's random effects per step, once the network is frozen. Several draws
        tighten the bound if the random effects are not normal given the hyperparameters. None
        takes 1, 16 or 32, by the loss of the bound with a single draw.
    clip : float
        Largest norm of the gradient of the loss per row. A rare draw of a small residual sd has a
        gradient a thousand times the usual one, which would stall Adam for hundreds of steps.
    folds : int
        Parts into which `fit` divides the rows for a network, if no validation rows are given. Each
        part is predicted by a network that was trained on the others and stopped by this part. With
        1, a single network is stopped by a fifth of the rows.
    fold_by : {"clusters", "rows"}
        Whether the parts are whole clusters, where there are at least five, or single rows.
        Clusters stop a network where new clusters are predicted best, and make the variance
        components those of new clusters. Rows stop it where new rows of the same clusters are
        predicted best, by networks that know the clusters: better for these rows, while new
        clusters may differ by more than the fit says.
    weight_decay : float
        Weights of a network that can overfit shrink by this fraction of the learning rate per step
        (AdamW); its biases do not. With held-out rows, 0, 0.1 and 1 predicted alike.

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
    folds: int = 5
    fold_by: Literal["clusters", "rows"] = "clusters"
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        for name in ("steps", "learning_rate", "net_learning_rate", "decay", "patience", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive, not {getattr(self, name)}")
        if not self.weight_decay >= 0:
            raise ValueError(f"`weight_decay` must not be negative, not {self.weight_decay}")
        if self.fold_by not in ("clusters", "rows"):
            raise ValueError(f"`fold_by` must be 'clusters' or 'rows', not {self.fold_by!r}")
        for name in ("batch_size", "window", "particles", "folds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, not {value}")

    @property
    def sets_guide(self) -> bool:
        """Whether it asks for steps of the guide other than the default ones."""
        return any(getattr(self, name) != getattr(Schedule, name) for name in OF_GUIDE)

    def batch(self, n_rows: int) -> int:
        """Rows per step for data with `n_rows` rows."""
        if self.batch_size is None:
            return n_rows if n_rows <= 4096 else 1024
        return min(self.batch_size, n_rows)

    def window_steps(self, n_rows: int, frozen: int | None = None) -> int:
        """Steps per window for data with `n_rows` rows; by default `frozen`, if it is not None."""
        return self.window or frozen or max(100, n_rows // self.batch(n_rows))

    def stopped_batch(self, n_rows: int) -> int:
        """Rows per step of a network that held-out rows stop: an epoch has about 16 steps or more.

        With all rows in a step, the best network would be reached between two looks.

        >>> [Schedule().stopped_batch(n) for n in (20, 100, 1000, 4096, 10_000)]
        [20, 32, 62, 256, 1024]
        """
        if self.batch_size is not None or n_rows > 4096:
            return self.batch(n_rows)
        return min(n_rows, max(32, min(256, n_rows // 16)))

    def stopped_window(self, n_rows: int) -> int:
        """Steps between two looks at the held-out rows: an epoch, but at least `SHORTEST`."""
        return self.window or max(SHORTEST, n_rows // self.stopped_batch(n_rows))

    def plateau(self, n_rows: int) -> Plateau:
        """The rule that cuts the rates for data with `n_rows` rows."""
        return Plateau(tolerance=0.01 / n_rows, patience=self.patience)

    def rate(self, step: int) -> float:
        """Factor by which the learning rates fall as the steps run out."""
        start = 0.8 * self.steps
        return 1.0 if step <= start else max(0.02, (self.steps - step) / (self.steps - start))

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Pace:
    """Draws per step, steps per window and factor of the rate, once the network is frozen.

    Four times the draws halve the noise of a gradient. Steps may then be twice as long, and half
    as many suffice.

    >>> Pace.of(180, network=False)
    Pace(draws=32, window=12, rate=2.0)
    >>> Pace.of(10_000, network=False)
    Pace(draws=8, window=25, rate=1.0)
    """

    draws: int  # of the hyperparameters, per step
    window: int  # steps
    rate: float  # factor of the learning rate

    @classmethod
    def of(cls, likelihoods: int, *, network: bool) -> Pace:
        """The pace for a number of log-likelihoods per draw of the hyperparameters.

        Each row has one for every draw of the random effects given the hyperparameters. `network`
        tells whether the network runs once per draw, because of effects inside it.
        """
        if network:
            return cls(draws=2, window=25, rate=1.0)
        many = cls(draws=32, window=12, rate=2.0)
        return many if likelihoods * many.draws <= CHEAP else cls(draws=8, window=25, rate=1.0)


@dataclass
class Plateau:
    """Decides from windows of the loss whether the rates are cut, and counts the cuts.

    The rates are cut if the mean training loss is not lower than in the last window by more than
    the standard error of the difference and by more than `tolerance`. With validation losses, they
    are cut once `patience` windows have passed since the best loss.
    """

    tolerance: float
    patience: int
    cuts: int = 0
    previous: list[float] | None = None  # mean and squared standard error of the last window
    best: float = math.inf
    waited: int = 0

    def training(self, losses: np.ndarray, *, moving: bool = False) -> bool:
        """Whether the rates are cut after a window of training losses.

        While the guide moves, there is no cut before `WANDERING` windows without a new best loss.
        """
        mean, variance = float(losses.mean()), float(losses.var() / len(losses))
        better = mean < self.best - self.tolerance
        self.best, self.waited = (mean, 0) if better else (self.best, self.waited + 1)
        if moving and self.waited < WANDERING:
            return False
        last, self.previous = self.previous, [mean, variance]
        if last is None:
            return False
        slack = max(self.tolerance, math.sqrt(variance + last[1]))
        return self._cut(last[0] - mean < slack)

    def validation(self, loss: float) -> tuple[bool, bool]:
        """Whether a validation loss is the best so far, and whether the rates are cut after it."""
        if loss < self.best - 1e-6 * abs(self.best if math.isfinite(self.best) else 0.0):
            self.best, self.waited = loss, 0
            return True, False
        self.waited += 1
        return False, self._cut(self.waited >= self.patience)

    def _cut(self, stalled: bool) -> bool:
        """Count a cut if the loss has stalled."""
        if stalled:
            self.cuts += 1
            self.previous, self.waited = None, 0
        return stalled


def split_r_hat(iterates: Float[np.ndarray, "steps size"]) -> tuple[float, float]:
    r"""R-hat of the two halves of a stretch of iterates, and the distance of the halves' means.

    .. math:: \hat R = \sqrt{1 + B / W}, \quad B = (\bar m_1 - \bar m_2)^2 / 2, \quad
        W = 1 + \overline{Var}(m)

    Iterates m are means of the guide, in posterior sds, so this is the R-hat of draws from the
    guides. Both results are the largest over components; NaN for fewer than four iterates. Source:
    Dhaka et al. (2020), "Robust, accurate stochastic optimization for variational inference",
    NeurIPS.
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
    """Record of a fit: losses of every step, and other quantities of every window."""

    loss: list[float] = field(default_factory=list)  # objective per row, at every step
    elbo: list[float] = field(default_factory=list)  # evidence lower bound per row, at every step
    step: list[int] = field(default_factory=list)  # last step of each window
    rate: list[float] = field(default_factory=list)  # factor of the learning rates
    validation: list[float] = field(default_factory=list)  # -log p(y | fit) per validation row
    # Fraction of training rows whose cluster each adversary predicted, mean over the window.
    adversary_accuracy: list[list[float]] = field(default_factory=list)
    warmup: list[int] = field(default_factory=list)  # steps of each adversary's warm-up
    # Records of the fresh probes (`networks.fresh_probe`), one for each adversary, at the end.
    probes: list[dict[str, Any]] = field(default_factory=list)
    # Weights that were tried where they are chosen automatically: see `automatic_weight`.
    weights: list[dict[str, Any]] = field(default_factory=list)
    settled: int | None = None  # step after which the network was frozen
    particles: int = 1  # draws of each cluster's random effects per step after `settled`
    # `split_r_hat` of the iterates of q(theta), for each window after `settled`.
    r_hat: list[float] = field(default_factory=list)
    drift: list[float] = field(default_factory=list)
    # For each network that was stopped by a held-out part of the rows: its steps, its validation
    # loss, and why its training ended. Empty if no rows were held out.
    fold_steps: list[int] = field(default_factory=list)
    fold_validation: list[float] = field(default_factory=list)
    fold_stopped: list[str] = field(default_factory=list)  # "validation" or "steps"
    # Accuracy of the adversaries of the network that the program keeps, after cross-fitting.
    fold_accuracy: list[list[float]] = field(default_factory=list)
    # Log score and coverage of rows that the network was not trained on; see `out_of_sample`.
    held_out: dict[str, float | None] = field(default_factory=dict)
    compiled: list[bool] = field(default_factory=list)  # whether steps ran compiled
    seconds: list[float] = field(default_factory=list, compare=False)  # median time of a step

    def status(self, games: Sequence[tuple[str, float]]) -> str:
        """The latest losses, and the strengths of the adversaries, in one line.

        `games` has the factor and the weight of every adversary. Their accuracies are not shown:
        those of the classifiers in training are too low to tell whether they succeed.
        """
        text = f"loss {np.mean(self.loss[-50:]):.4f}"
        if self.validation:
            text += f", validation {self.validation[-1]:.4f}"
        for (factor, weight), warmup in zip(games, self.warmup, strict=True):
            share = min(1.0, len(self.loss) / warmup) if warmup else 1.0
            text += f", adversary of {factor} at weight {share * weight:.2g}"
            text += f" of {weight:.2g}" * (share < 1)
        return text

    def to_json(self) -> dict[str, Any]:
        """The record as JSON values."""
        return asdict(self)
