"""Training and evaluation mode of networks, in which frozen parts are never trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["evaluated", "frozen_parts", "train_except"]


def frozen_parts(net: nn.Module) -> frozenset[str]:
    """Paths of the modules that a training must leave in evaluation mode.

    These are modules in evaluation mode inside a network in training mode, and modules with
    parameters none of which is trained, with all that is in them: the running statistics of a
    frozen backbone belong to its weights.
    """
    frozen: set[str] = set()
    for path, module in net.named_modules():
        parameters = list(module.parameters())
        untrained = bool(parameters) and not any(p.requires_grad for p in parameters)
        if untrained or (net.training and not module.training):
            frozen.update(f"{path}.{name}".strip(".") for name, _ in module.named_modules())
    return frozenset(frozen)


def train_except(net: nn.Module, frozen: frozenset[str]) -> None:
    """Training mode for all modules but the frozen ones."""
    for path, module in net.named_modules():
        module.training = path not in frozen


@contextmanager
def evaluated(net: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the context; afterwards each module's mode is that of before."""
    before = {module: module.training for module in net.modules()}
    net.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training
