"""`Evidence`: the score of a network by rows that it was not trained on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from armed_pyro.engine.checkpoint import module_tensors, restore_module
from armed_pyro.guides.base import Guide
from armed_pyro.inference.marginal_mode import climb_to_mode, start_at_mode
from armed_pyro.inference.marginal_weights import exact_likelihood
from armed_pyro.program.model import MixedEffects
from armed_pyro.program.predictor import modulates
from armed_pyro.rows.in_memory import HeldRows

__all__ = ["Evidence"]

# Multiplications of a joint draw of all random effects beyond which the mode is not searched for.
MOST_WORK = 2**24


@dataclass(eq=False)
class Evidence:
    r"""-log-density of held-out rows given the network's outputs for them, per row.

    .. math:: -\frac{1}{n} \max_\theta \Big[\log p(\theta)
        + \log \int p(y \mid f, u, \theta) \, p(u \mid \theta) \, du\Big]

    The hyperparameters are those of the held-out rows, because the posterior is settled on such
    outputs: those of the training follow a network that explains its own rows too well, and their
    first values have nothing to do with it. Rows of a cluster count together, so that the score
    judges the network within clusters as well as between them.

    Attributes
    ----------
    model : MixedEffects
        The program whose network is trained.
    guide : Guide
        The guide of the held-out rows, which each call moves to their mode.
    rows : HeldRows
        The held-out rows.
    started : bool
        Whether the guide is at a mode already.
    """

    model: MixedEffects
    guide: Guide
    rows: HeldRows
    started: bool = False

    @classmethod
    def of(cls, model: MixedEffects, guide: Guide, rows: HeldRows) -> Evidence | None:
        """The score by these rows, whose guide this is; None if the search would take too long."""
        searchable = guide.nested() is not None or not model.factors
        if not searchable or modulates(model) or guide.work() > MOST_WORK:
            return None
        guide.settle()
        return cls(model, guide, rows)

    def loss(self, seed: int) -> float:
        """The score of the network in its present state; the same random numbers in every call."""
        model, training = self.model, self.model.training
        model.eval()
        with model.seeded(seed), torch.enable_grad():
            rows = model.compute(self.rows)
            closed = exact_likelihood(model, self.guide, rows)
            if not self.started:
                # One round gives the units; each call then climbs further.
                start_at_mode(model, self.guide, rows, closed, rounds=1)
                self.started = True
            total = climb_to_mode(model, self.guide, rows, closed)
        model.train(training)
        return -total / len(rows)

    def state(self) -> dict[str, Tensor]:
        """The guide's tensors, for a checkpoint."""
        return module_tensors("evidence", self.guide) if self.started else {}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Put back the tensors of `state`."""
        own = {name: value for name, value in tensors.items() if name.startswith("evidence.")}
        self.started = bool(own)
        if own:
            restore_module("evidence", self.guide, own)
