"""`NetworkTraining`: a user's optimizer, schedule of rates, precision, callbacks and measure."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args

import torch
from torch import Tensor, nn

from armed_pyro.networks.tap import module_at

__all__ = [
    "Callback",
    "CsvLog",
    "Monitor",
    "NetworkTraining",
    "TensorBoardLog",
    "TrainingArguments",
    "TrainingRecord",
    "measured",
]

OptimizerFactory = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
SchedulerFactory = Callable[[torch.optim.Optimizer], Any]
Precision = Literal["full", "bf16-mixed"]
Monitor = Literal["log_score", "auroc", "accuracy", "rmse", "mae"]


@dataclass(frozen=True)
class TrainingRecord:
    """The state of a training after a window of steps, as callbacks see it.

    Attributes
    ----------
    step : int
        Steps taken.
    phase : {"network", "guide"}
        Whether the network is trained, or frozen.
    loss, elbo : float
        Means over the window of the objective and of the evidence lower bound, per row.
    rate : float
        Factor of the learning rates.
    validation : float or None
        The measure of held-out rows that stops the network; lower is better.
    adversary_accuracy, adversary_chance : tuple of float
        Share of rows whose cluster each adversary predicts, and that of the largest cluster.

    Examples
    --------
    >>> TrainingRecord(100, "network", 1.2, -1.1, 1.0, None, (), ()).phase
    'network'
    """

    step: int
    phase: Literal["network", "guide"]
    loss: float
    elbo: float
    rate: float
    validation: float | None
    adversary_accuracy: tuple[float, ...]
    adversary_chance: tuple[float, ...]


# Called after every window of steps; True ends the phase.
Callback = Callable[[TrainingRecord], bool | None]


class TrainingArguments(TypedDict, total=False):
    """The keyword arguments of `armed_pyro.fit` that make a `NetworkTraining`."""

    optimizer: OptimizerFactory | None
    scheduler: SchedulerFactory | None
    parameter_groups: Mapping[str, Mapping[str, Any]]
    callbacks: Sequence[Callback]
    precision: Precision
    accumulate: int
    monitor: Monitor


@dataclass(frozen=True, eq=False)
class NetworkTraining:
    """How a network is trained, beside the `Schedule`; `armed_pyro.fit` documents the fields.

    Examples
    --------
    >>> training = NetworkTraining(optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1))
    >>> training.of_user
    True
    """

    optimizer: OptimizerFactory | None = None
    scheduler: SchedulerFactory | None = None
    parameter_groups: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    callbacks: Sequence[Callback] = ()
    precision: Precision = "full"
    accumulate: int = 1
    monitor: Monitor = "log_score"

    def __post_init__(self) -> None:
        for name, kinds in {"precision": Precision, "monitor": Monitor}.items():
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(
                    f"`{name}` is {getattr(self, name)!r}, but must be one of "
                    f"{', '.join(get_args(kinds))}"
                )
        if self.accumulate < 1:
            raise ValueError(f"`accumulate` must be at least 1, not {self.accumulate}")
        for name in ("optimizer", "scheduler"):
            if not (getattr(self, name) is None or callable(getattr(self, name))):
                raise TypeError(
                    f"`{name}` must be a function that makes it, as the network is copied first: "
                    "optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-3)"
                )

    @property
    def of_user(self) -> bool:
        """Whether torch's optimizers train the network, in place of the library's Adam."""
        chosen = self.optimizer or self.scheduler or self.parameter_groups
        return bool(chosen) or self.accumulate > 1

    def groups(self, model: nn.Module, network: nn.Module) -> list[dict[str, Any]]:
        """The trained parameters by group: those of the named modules, the rest, adversaries."""
        left = {id(p): p for p in model.parameters() if p.requires_grad}
        groups: list[dict[str, Any]] = []

        def add(name: str, module: nn.Module, settings: Mapping[str, Any]) -> None:
            parameters = [left.pop(id(p)) for p in module.parameters() if id(p) in left]
            if parameters:
                groups.append({"params": parameters, "name": name, **settings})

        # Inner modules first, whose settings are the more special ones.
        for path in sorted(self.parameter_groups, key=lambda path: -path.count(".")):
            add(path, module_at(network, path), self.parameter_groups[path])
        add("network", network, {})
        add("adversary", model, {})
        return groups


class CsvLog:
    """A callback that appends every record to a CSV file.

    Examples
    --------
    ``fit(model, data, callbacks=[CsvLog("training.csv")])``
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __call__(self, record: TrainingRecord) -> None:
        values = asdict(record)
        for name in ("adversary_accuracy", "adversary_chance"):
            values[name] = " ".join(f"{value:.4f}" for value in values[name])
        new = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(values))
            if new:
                writer.writeheader()
            writer.writerow(values)


class TensorBoardLog:
    """A callback that writes every record for TensorBoard, which must be installed.

    Examples
    --------
    ``fit(model, data, callbacks=[TensorBoardLog("runs/first")])``
    """

    def __init__(self, folder: str | Path) -> None:
        from torch.utils.tensorboard import SummaryWriter  # an optional dependency

        self.writer = SummaryWriter(str(folder))

    def __call__(self, record: TrainingRecord) -> None:
        numbers = {"loss": record.loss, "elbo": record.elbo, "rate": record.rate}
        if record.validation is not None:
            numbers["validation"] = record.validation
        numbers |= {f"adversary {n}": a for n, a in enumerate(record.adversary_accuracy)}
        for name, value in numbers.items():
            self.writer.add_scalar(f"{record.phase}/{name}", value, record.step)
        self.writer.flush()


def measured(monitor: Monitor, expected: Tensor, y: Tensor) -> float:
    """A measure of predictions, the lower the better: rates and areas with a minus.

    `expected` are expected outcomes "rows", or probabilities of classes "rows classes".
    """
    from sklearn.metrics import roc_auc_score  # slow to import

    mean, outcome = expected.double().cpu(), y.double().cpu()
    if monitor in ("rmse", "mae"):
        if mean.dim() > 1:
            raise ValueError(f"monitor={monitor!r} needs numbers, and the outcome has classes")
        off = mean - outcome
        return float(off.square().mean().sqrt() if monitor == "rmse" else off.abs().mean())
    if monitor == "accuracy":
        named = mean.argmax(-1) if mean.dim() > 1 else (mean > 0.5).double()
        return -float((named == outcome).double().mean())
    if mean.dim() > 1:
        present = [k for k in range(mean.shape[1]) if 0 < int((outcome == k).sum()) < len(outcome)]
        areas = [roc_auc_score((outcome == k).numpy(), mean[:, k].numpy()) for k in present]
        return -float(sum(areas) / max(1, len(areas)))
    if not bool(((outcome == 0) | (outcome == 1)).all()):
        raise ValueError("monitor='auroc' needs an outcome with two values or classes")
    # With a single class there is no area; every ranking is as good as chance.
    both = outcome.unique().numel() > 1
    return -float(roc_auc_score(outcome.numpy(), mean.numpy())) if both else -0.5
