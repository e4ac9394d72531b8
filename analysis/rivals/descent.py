"""Networks trained by gradient descent: what the rivals that are not programs share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from armed_pyro import ClusteredData, Schedule
from armed_pyro.analysis.rivals.rival import Setting, outcomes, run_to_layer

__all__ = ["FixedPredictor", "Rows", "Scaling", "descend"]


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows as tensors.

    Attributes
    ----------
    x : Float[Tensor, "rows ..."]
        Standardised features.
    codes : Int[Tensor, "rows"]
        Position of each row's cluster among the training clusters; their number for a cluster
        that training did not see.
    y : Float[Tensor, "rows"] or None
        Outcomes in their own units; None where they are not known.
    """

    x: Float[Tensor, "rows ..."]
    codes: Int[Tensor, " rows"]
    y: Float[Tensor, " rows"] | None

    def __len__(self) -> int:
        return len(self.x)

    def take(self, index: Int[Tensor, " taken"]) -> Rows:
        """The rows at these positions."""
        y = None if self.y is None else self.y[index]
        return Rows(self.x[index], self.codes[index], y)

    def outcome(self) -> Float[Tensor, " rows"]:
        """The outcomes; ValueError if they are not known."""
        if self.y is None:
            raise ValueError("the rows have no outcome")
        return self.y


@dataclass(frozen=True, eq=False)
class Scaling:
    """Standard units of features and outcome, the same as those of `armed_pyro.fit`.

    Features of a table become ``(x - mean) / sd``; columns of 0 and 1, and images, stay as they
    are.

    Attributes
    ----------
    mean, sd : Float[Tensor, "features"] or None
        None for images.
    """

    mean: Tensor | None
    sd: Tensor | None

    @classmethod
    def of(cls, data: ClusteredData) -> Scaling:
        """The scaling that the training rows give."""
        if not data.continuous:
            return cls(None, None)
        continuous = torch.tensor(data.continuous)
        mean, sd = data.features.mean(0), data.features.std(0)
        zeros, ones = torch.zeros_like(mean), torch.ones_like(sd)
        return cls(torch.where(continuous, mean, zeros), torch.where(continuous, sd, ones))

    def standardise(self, features: Tensor) -> Tensor:
        """The features in standard units."""
        if self.mean is None or self.sd is None:
            return features
        return (features.to(torch.float64) - self.mean) / self.sd


class FixedPredictor(nn.Module):
    """The setting's network on standardised features, and the outcome in standard units.

    The predictor of a binary outcome is its logit. The predictor of a gaussian outcome is the mean
    in standard deviations from the training mean.

    Parameters
    ----------
    setting : Setting
    data : ClusteredData
        Training rows.
    seed : int
        Seed of the network's first weights.

    Raises
    ------
    ValueError
        If the outcome is neither binary nor gaussian.
    """

    def __init__(self, setting: Setting, data: ClusteredData, seed: int) -> None:
        super().__init__()
        if setting.family not in ("bernoulli", "gaussian"):
            raise ValueError(
                f"this model takes outcomes of the families bernoulli and gaussian, not "
                f"{setting.family!r}: leave it out of the comparison"
            )
        self.binary = setting.family == "bernoulli"
        self.factor, self.last = setting.factor, setting.architecture.last
        self.scaling = Scaling.of(data)
        self.levels: pd.Index = data.grouping(setting.factor).levels
        self.feature_shape = tuple(data.features.shape[1:])
        self.net = setting.network(self.feature_shape, seed)
        y = torch.as_tensor(outcomes(data))
        self.center, self.spread = float(y.mean()), float(y.std())
        self.start = float(torch.logit(y.mean().clamp(0.001, 0.999))) if self.binary else 0.0

    @property
    def n_clusters(self) -> int:
        """Clusters seen in training."""
        return len(self.levels)

    @property
    def units(self) -> int:
        """Width of the penultimate layer."""
        x = torch.zeros(1, *self.feature_shape).to(next(self.net.parameters()))
        with torch.no_grad():
            return run_to_layer(self.net, x, self.last)[1].shape[1]

    def encode(self, data: ClusteredData) -> Rows:
        """The rows as tensors of the network's precision."""
        like = next(self.net.parameters())
        codes = torch.as_tensor(self.levels.get_indexer(data.grouping(self.factor).labels()))
        codes = torch.where(codes < 0, self.n_clusters, codes)
        y = None if data.outcome is None else data.outcome.to(like)
        return Rows(self.scaling.standardise(data.features).to(like), codes, y)

    def forward(self, rows: Rows) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows units"]]:
        """The predictor of the fixed effects, and the penultimate layer's activations."""
        output, hidden = run_to_layer(self.net, rows.x, self.last)
        return self.start + output[:, 0], hidden

    def target(self, rows: Rows) -> Float[Tensor, " rows"]:
        """Outcomes in the predictor's units."""
        y = rows.outcome()
        return y if self.binary else (y - self.center) / self.spread

    def mean(self, predictor: Tensor) -> Float[np.ndarray, " rows"]:
        """Expected outcomes for these predictors."""
        if self.binary:
            return torch.sigmoid(predictor).detach().numpy()
        return (self.center + self.spread * predictor).detach().numpy()

    def loss(self, predictor: Tensor, rows: Rows) -> Float[Tensor, ""]:
        """Mean -log p(y | predictor) of a binary outcome; half the squared error of a gaussian."""
        if self.binary:
            return binary_cross_entropy_with_logits(predictor, self.target(rows))
        return 0.5 * (self.target(rows) - predictor).square().mean()


def descend(
    module: nn.Module,
    rows: Rows,
    loss: Callable[[Rows], Tensor],
    schedule: Schedule,
    seed: int,
    *,
    held: Rows | None = None,
    held_loss: Callable[[Rows], Tensor] | None = None,
    after_window: Callable[[], None] = lambda: None,
) -> int:
    """Train a module by Adam on mini-batches, with the rates and stopping rule of `armed_pyro.fit`.

    Parameters
    ----------
    module : torch.nn.Module
        The module, which is trained in place. It is left in the state with the best validation
        loss, and in evaluation mode.
    rows : Rows
        Training rows.
    loss : callable
        Loss per row of a mini-batch.
    schedule : Schedule
        `net_learning_rate` is the rate of all parameters.
    seed : int
        Seed of the batches, and of what the loss draws.
    held : Rows, optional
        Validation rows, whose loss at the end of each window of steps decides when to stop.
    held_loss : callable, optional
        Their loss, if it is not `loss`.
    after_window : callable
        Called before the validation loss is computed, as for the E step of an EM algorithm.

    Returns
    -------
    int
        Steps taken.

    Raises
    ------
    FloatingPointError
        If the loss is no longer finite.
    """
    n = len(rows)
    size, window, plateau = schedule.batch(n), schedule.window_steps(n), schedule.plateau(n)
    parameters = [weight for weight in module.parameters() if weight.requires_grad]
    optimizer = torch.optim.Adam(parameters, betas=(0.9, 0.99))
    best, losses, order = copy.deepcopy(module.state_dict()), list[float](), torch.empty(0).long()
    step, validated = 0, False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        while step < schedule.steps and not (schedule.stages and plateau.cuts >= schedule.stages):
            module.train()
            rate = schedule.rate(step) * schedule.decay**plateau.cuts
            optimizer.param_groups[0]["lr"] = schedule.net_learning_rate * rate
            if len(order) < size:
                order = torch.randperm(n)
            index, order = order[:size], order[size:]
            optimizer.zero_grad()
            value = loss(rows.take(index))
            value.backward()
            nn.utils.clip_grad_norm_(parameters, schedule.clip)
            optimizer.step()
            losses.append(float(value.detach()))
            step += 1
            if not np.isfinite(losses[-1]):
                raise FloatingPointError(
                    f"the loss is {losses[-1]} at step {step}: try a lower learning rate than "
                    f"{schedule.net_learning_rate}"
                )
            if step % window and step < schedule.steps:
                continue
            module.eval()
            after_window()
            if held is None:
                plateau.training(np.array(losses[-window:]))
                continue
            with torch.no_grad():
                improved, cut = plateau.validation(float((held_loss or loss)(held)))
            if improved:
                best, validated = copy.deepcopy(module.state_dict()), True
            elif cut:
                module.load_state_dict(best)
    if validated:
        module.load_state_dict(best)
    module.eval()
    return step
