"""Networks trained by gradient descent: what the rivals share that are no programs."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from armed_pyro import ClusteredData, Schedule
from armed_pyro.analysis.rivals import Setting
from armed_pyro.engine.schedule import Plateau
from armed_pyro.families.registry import family_named
from armed_pyro.networks.taps import pooled, tapped
from armed_pyro.program.data_spec import Facts
from armed_pyro.rows.batch import Rows
from armed_pyro.rows.shuffle import Passes
from armed_pyro.rows.source import RowSource

__all__ = ["FixedPredictor", "descend"]


class FixedPredictor(nn.Module):
    """The setting's network on standardised features, and its outcome in standard units.

    The predictor is the logit of a binary outcome, of which it is 0 before training that half
    are 1; of a gaussian outcome it is the mean in standard deviations from the training mean.

    Parameters
    ----------
    setting : Setting
    data : ClusteredData
        Training rows.
    seed : int
        Of the network's first weights.

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
        self.facts = Facts.of(data, family_named(setting.family), (setting.factor,))
        self.net = setting.network(data.features.shape[1:], seed)
        self.start = self.facts.center[0] if self.binary else 0.0

    @property
    def n_clusters(self) -> int:
        """Clusters seen in training."""
        return len(self.facts.levels[self.factor])

    def encode(self, data: ClusteredData) -> RowSource:
        """The rows as tensors; clusters not seen in training have codes from n_clusters on."""
        return self.facts.encode(data, next(self.net.parameters()), self.facts.levels_with(data))

    def forward(self, rows: Rows) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows units"]]:
        """The predictor of the fixed effects, and the penultimate layer's activations."""
        with tapped(self.net, [self.last]) as activations:
            output = self.net(rows.x)
        return self.start + output[:, 0], pooled(activations[self.last])

    def codes(self, rows: Rows) -> Tensor:
        """Cluster of each row."""
        member = rows.memberships[self.factor]
        return member.index[member.position]

    def target(self, rows: Rows) -> Float[Tensor, " rows"]:
        """Outcomes in the predictor's units."""
        y = rows.outcome()
        return y if self.binary else (y - self.facts.center[0]) / self.facts.spread

    def mean(self, predictor: Tensor) -> Float[np.ndarray, " rows"]:
        """Expected outcomes of these predictors."""
        if self.binary:
            return torch.sigmoid(predictor).detach().numpy()
        return (self.facts.center[0] + self.facts.spread * predictor).detach().numpy()

    def loss(self, predictor: Tensor, rows: Rows) -> Float[Tensor, ""]:
        """Mean -log p(y | predictor), of a gaussian outcome half the squared error."""
        if self.binary:
            return binary_cross_entropy_with_logits(predictor, self.target(rows))
        return 0.5 * (self.target(rows) - predictor).square().mean()


def descend(
    module: nn.Module,
    rows: RowSource,
    loss: Callable[[Rows], Tensor],
    schedule: Schedule,
    seed: int,
    *,
    held: Rows | None = None,
    held_loss: Callable[[Rows], Tensor] | None = None,
    after_window: Callable[[], None] = lambda: None,
) -> int:
    """Train a module by Adam on mini-batches, with the rates and the stopping of `armed_pyro.fit`.

    Parameters
    ----------
    module : torch.nn.Module
        Trained in place; left in the state with the best validation loss, and for evaluation.
    rows : RowSource
        Training rows.
    loss : callable
        Of a mini-batch, per row.
    schedule : Schedule
        `net_learning_rate` is the rate of all parameters.
    seed : int
        Of the batches, and of what the loss draws.
    held : Rows, optional
        Validation rows, whose loss at the end of each window of steps decides when to stop.
    held_loss : callable, optional
        Their loss, if it is not `loss`.
    after_window : callable
        Called before that: the E step of an EM algorithm.

    Returns
    -------
    int
        Steps taken.

    Raises
    ------
    FloatingPointError
        If the loss is no longer finite.
    """
    size, n = schedule.batch(len(rows)), len(rows)
    window, plateau = schedule.window_steps(n), Plateau(0.01 / n, schedule.patience)
    parameters = [one for one in module.parameters() if one.requires_grad]
    optimizer = torch.optim.Adam(parameters, betas=(0.9, 0.99))
    best, losses = copy.deepcopy(module.state_dict()), list[float]()
    batches = Passes(lambda generator: rows.batches(size, generator))
    step, found = 0, False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        while step < schedule.steps and not (schedule.stages and plateau.cuts >= schedule.stages):
            module.train()
            rate = schedule.rate(step) * schedule.decay**plateau.cuts
            optimizer.param_groups[0]["lr"] = schedule.net_learning_rate * rate
            optimizer.zero_grad()
            value = loss(next(batches))
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
                best, found = copy.deepcopy(module.state_dict()), True
            elif cut:
                module.load_state_dict(best)
    if found:
        module.load_state_dict(best)
    module.eval()
    return step
