"""`TrainingTask`: a bound program and its guide, the rows, and the settings of their training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.engine.checkpoint import digest, module_tensors, restore_module
from armed_pyro.engine.compiled_step import CompileMode
from armed_pyro.engine.schedule import Schedule
from armed_pyro.engine.shards import Share
from armed_pyro.guides.base import Guide
from armed_pyro.inference.evidence import Evidence
from armed_pyro.inference.network_training import NetworkTraining, measured
from armed_pyro.program.model import MixedEffects, can_overfit, log_likelihoods
from armed_pyro.program.predictor import modulates
from armed_pyro.rows.batch import Rows
from armed_pyro.rows.in_memory import HeldRows
from armed_pyro.rows.source import RowSource

__all__ = ["TrainingTask"]

# Values of the inputs in one batch, and its fewest rows: activations take many times as much.
MOST_BATCH, SMALLEST_BATCH = 2**23, 32

# Draws that integrate the random effects out of a validation loss: if the network runs once for all
# of them, and if it runs once per draw.
SCORED, FEW_SCORED, MOST_SCORED = 100, 8, 2**24


@dataclass(frozen=True, eq=False)
class TrainingTask:
    """The bound program and its guide, trained in place; rows and settings of a training run."""

    model: MixedEffects
    guide: Guide
    data: ClusteredData  # the rows that the posterior keeps: all, or a sample
    source: RowSource  # all rows
    share: Share  # the rows that this process trains the network on
    schedule: Schedule
    validation: HeldRows | None = None  # their loss decides when the network's training ends
    seed: int = 0
    compile: CompileMode = "auto"
    weights: Sequence[dict[str, Any]] = ()  # tried for the adversaries, for the history
    network_only: bool = False  # whether the run ends with the network's training
    network_trained: bool = False  # whether it begins after the network's training
    keeps_snapshots: bool = False  # whether the network is kept after many windows, not at its best
    training: NetworkTraining = field(default_factory=NetworkTraining)
    evidence: Evidence | None = None  # the score of held-out rows; None takes their log-likelihood
    weighed: bool = False  # whether importance weights correct the guide afterwards

    @property
    def by_epochs(self) -> bool:
        """Whether held-out rows, looked at after every epoch, end the training of a network."""
        return self.validation is not None and can_overfit(self.model)

    @property
    def network_batch(self) -> int:
        """Rows of a step of the network.

        Few rows are divided into batches, too, if an epoch is to have several steps or rows are
        read in each. Unless the schedule says so, a batch of images is no larger than fits.
        """
        schedule, n = self.schedule, len(self.source)
        inputs = self.source.inputs if isinstance(self.source, HeldRows) else None
        if not self.by_epochs and inputs is None:
            return schedule.batch(n)
        size = schedule.stopped_batch(n)
        if inputs is None or schedule.batch_size is not None:
            return size
        return min(size, max(SMALLEST_BATCH, MOST_BATCH // max(1, inputs.spec.values)))

    def state(self) -> dict[str, Tensor]:
        """Copies of all parameters and buffers of program and guide."""
        return module_tensors("model", self.model) | module_tensors("guide", self.guide)

    def learned(self) -> dict[str, Tensor]:
        """Copies of the tensors of network, adversaries and guide."""
        kept = ("model.net.", "model._adversaries.", "guide.")
        return {name: tensor for name, tensor in self.state().items() if name.startswith(kept)}

    def return_to(self, state: dict[str, Tensor]) -> None:
        """Put back the tensors of `state`."""
        restore_module("model", self.model, state)
        restore_module("guide", self.guide, state)

    def validation_loss(self, rows: HeldRows, share: Share) -> float:
        r"""Mean of -log p(y_i | training rows), the random effects integrated out.

        .. math:: -\frac{1}{n} \sum_i \log \frac{1}{S} \sum_s p(y_i \mid u_s, \theta_s)

        The S draws are the guide's, those of new clusters' effects from N(0, D). They come from
        the same random numbers in every call, so that differences between calls have little noise.
        """
        self.model.eval()
        with self.model.seeded(self.seed):
            counts = {name: len(counted) for name, counted in rows.counts.items()}
            effects = sum(counts[f.name] * len(f.terms) for f in self.model.factors)
            affordable = max(FEW_SCORED, MOST_SCORED // max(1, effects, len(rows)))
            n = FEW_SCORED if modulates(self.model) else min(SCORED, affordable)
            draws = self.guide.draws(self.model.clusters(), n)
            latents = self.model.extend(draws, counts, population=False)

            def log_prob(rows: Rows) -> Tensor:
                parts = log_likelihoods(self.model, rows, latents).values()
                by_draw = torch.stack([part.expand(n, -1) for part in parts]).sum(0)
                return by_draw.logsumexp(0) - math.log(n)

            if self.training.monitor == "log_score":
                loss = -share.mean_over_rows(log_prob, rows)
            else:
                loss = share.agreed(self._monitored(rows.all(), latents))
        self.model.train()
        return loss

    def _monitored(self, rows: Rows, latents: dict[str, Tensor]) -> float:
        """The measure `NetworkTraining.monitor` of the expected outcomes."""
        eta = self.model.predictor(rows, latents, return_fixed=False).eta
        expected = self.model.expected(eta, latents, rows)
        shape = expected.shape[-2:] if self.model.family.has_class_probabilities else [len(rows)]
        return measured(self.training.monitor, expected.reshape(-1, *shape).mean(0), rows.outcome())

    def identity(self) -> dict[str, Any]:
        """Settings that a checkpoint shares with the run that resumes from it, as JSON values."""
        model, encoding = self.model, self.model.data_facts().to_json()
        return {
            "data": digest(self.source, encoding),
            "validation": self.validation and digest(self.validation, encoding),
            "terms": [*map(str, model.terms), *model.parameter_texts()],
            "family": model.family.name,
            "adversary": [adversary.settings() for adversary in model.adversaries],
            "priors": repr(model.priors),
            "weights": [model.fixed_weight, repr(model.others)],
            "network or guide": {name: list(t.shape) for name, t in self.state().items()},
            "schedule": self.schedule.to_json(),
            "training": [self.training.precision, self.training.accumulate, self.training.monitor],
            "seed": self.seed,
            "layout of the optimizers' state": 2,
            "processes": self.share.processes.size,
        }
