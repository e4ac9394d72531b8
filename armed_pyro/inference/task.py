"""The task of a training run: its inputs, which do not change during the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.engine.checkpoint import digest, module_tensors, restore_module
from armed_pyro.engine.compiled_step import CompileMode
from armed_pyro.engine.schedule import Schedule
from armed_pyro.engine.shards import Share
from armed_pyro.guides.base import Guide
from armed_pyro.program.model import MixedEffects, log_likelihoods
from armed_pyro.rows.batch import Rows
from armed_pyro.rows.source import RowSource

__all__ = ["TrainingTask"]


@dataclass(frozen=True, eq=False)
class TrainingTask:
    """The bound program and its guide, trained in place; rows and settings of a training run."""

    model: MixedEffects
    guide: Guide
    data: ClusteredData  # the rows that the posterior keeps: all, or a sample
    source: RowSource  # all rows
    share: Share  # the rows that this process trains the network on
    schedule: Schedule
    validation: Rows | None = None  # their loss decides when the network's training ends
    seed: int = 0
    compile: CompileMode = "auto"

    def state(self) -> dict[str, Tensor]:
        """Copies of all parameters and buffers of program and guide."""
        return module_tensors("model", self.model) | module_tensors("guide", self.guide)

    def return_to(self, state: dict[str, Tensor]) -> None:
        """Put back the tensors of `state`."""
        restore_module("model", self.model, state)
        restore_module("guide", self.guide, state)

    def validation_loss(self, rows: Rows, share: Share) -> float:
        """Mean of -log p(y_i) at the guide's centre, with zero effects for new clusters."""
        self.model.eval()
        with torch.no_grad():
            counts = {name: len(m.index) for name, m in rows.memberships.items()}
            center = self.guide.center(self.model.clusters())
            latents = self.model.extend(center, counts, population=True)

            def log_prob(rows: Rows) -> Tensor:
                return torch.stack([*log_likelihoods(self.model, rows, latents).values()]).sum(0)

            mean = share.mean_over_rows(log_prob, rows)
        self.model.train()
        return -mean

    def identity(self) -> dict[str, Any]:
        """Settings that a checkpoint shares with the run that resumes from it, as JSON values."""
        model, encoding = self.model, self.model.data_facts().to_json()
        return {
            "data": digest(self.source, encoding),
            "validation": self.validation and digest(self.validation, encoding),
            "terms": [str(term) for term in model.terms],
            "family": model.family.name,
            "adversary": [adversary.settings() for adversary in model.adversaries],
            "priors": repr(model.priors),
            "weights": [model.fixed_weight, repr(model.others)],
            "network or guide": {name: list(t.shape) for name, t in self.state().items()},
            "schedule": self.schedule.to_json(),
            "seed": self.seed,
            "layout of the optimizers' state": 2,
            "processes": self.share.processes.size,
        }
