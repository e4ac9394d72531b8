"""`TorchUpdate`: the update of a network by a user's optimizer of torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from armed_pyro.engine.adam import Update
from armed_pyro.engine.schedule import Schedule
from armed_pyro.inference.network_training import NetworkTraining

__all__ = ["TorchUpdate"]


class TorchUpdate(Update):
    """Steps of a torch optimizer, at its own rates times the factor of the library's cuts.

    Of `accumulate` batches, the mean gradient is one step. Schedulers are told of every step.
    """

    held: Float[Tensor, " width"]
    count: Float[Tensor, ""]

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        model: nn.Module,
        network: nn.Module,
        training: NetworkTraining,
        schedule: Schedule,
    ) -> None:
        super().__init__(tuple(parameters), [p.numel() for p in parameters.values()])
        groups = training.groups(model, network)
        if training.optimizer is None:
            self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
                groups,
                lr=schedule.net_learning_rate,
                betas=(0.9, 0.99),
                weight_decay=schedule.weight_decay,
            )
        else:
            self.optimizer = training.optimizer(groups)
        self.scheduler = None if training.scheduler is None else training.scheduler(self.optimizer)
        self.accumulate = training.accumulate
        like = next(iter(parameters.values())).detach()
        self.register_buffer("held", like.new_zeros(sum(self.widths)))
        self.register_buffer("count", like.new_zeros(()))

    @torch.no_grad()
    def forward(
        self,
        parameters: Mapping[str, Tensor],
        gradient: Float[Tensor, " width"],
        rate: Float[Tensor, ""],
    ) -> None:
        if not float(rate):  # the gradient is not finite
            return
        self.held.add_(gradient, alpha=1 / self.accumulate)
        self.count.add_(1)
        if int(self.count) % self.accumulate:
            return
        for name, part in zip(self.names, self.held.split(self.widths), strict=True):
            parameters[name].grad = part.reshape(parameters[name].shape).clone()
        before = [group["lr"] for group in self.optimizer.param_groups]
        for group, base in zip(self.optimizer.param_groups, before, strict=True):
            group["lr"] = base * float(rate)
        self.optimizer.step()
        for group, base in zip(self.optimizer.param_groups, before, strict=True):
            group["lr"] = base
        if self.scheduler is not None:
            self.scheduler.step()
        self.held.zero_()

    def state(self) -> dict[str, Tensor]:
        """The optimizer's and scheduler's numbers as tensors, for a checkpoint."""
        state = self.optimizer.state_dict()
        tensors = {
            f"torch.{number}.{name}": torch.as_tensor(value).clone()
            for number, values in state["state"].items()
            for name, value in values.items()
            if isinstance(value, (Tensor, int, float))
        }
        rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        tensors["torch.rates"] = torch.tensor(rates, dtype=torch.float64)
        for name, value in self._of_scheduler().items():
            tensors[f"torch.scheduler.{name}"] = torch.tensor(value, dtype=torch.float64)
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back the numbers of `state`."""
        saved: dict[int, dict[str, Any]] = {}
        for key, value in tensors.items():
            kind, *rest = key.split(".")
            if kind == "torch" and len(rest) == 2 and rest[0].isdigit():
                saved.setdefault(int(rest[0]), {})[rest[1]] = value.clone()
        content = self.optimizer.state_dict()
        self.optimizer.load_state_dict({**content, "state": saved})
        for group, rate in zip(
            self.optimizer.param_groups, tensors["torch.rates"].tolist(), strict=True
        ):
            group["lr"] = rate
        if self.scheduler is not None:
            present = self._of_scheduler()
            numbers = {
                name: _as_before(tensors[f"torch.scheduler.{name}"].tolist(), value)
                for name, value in present.items()
            }
            self.scheduler.load_state_dict({**self.scheduler.state_dict(), **numbers})

    def _of_scheduler(self) -> dict[str, Any]:
        """The scheduler's numbers and lists of numbers, by name."""
        if self.scheduler is None:
            return {}
        found: dict[str, Any] = {}
        for name, value in self.scheduler.state_dict().items():
            values = value if isinstance(value, list) else [value]
            if values and all(isinstance(part, (bool, int, float)) for part in values):
                found[name] = value
        return found


def _as_before(value: Any, like: Any) -> Any:
    """A number, or list of numbers, of the type that it had."""
    if isinstance(like, list):
        return [type(kind)(part) for part, kind in zip(value, like, strict=True)]
    return type(like)(value)
