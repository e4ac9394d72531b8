"""Processes that fit one model together, started by torchrun, and their communication.

All processes get the same data. The network is trained on shares of the rows
(`armed_pyro.engine.shards`): mini-batches, validation and pseudo-observations. After that, the
network's outputs are computed once, and each process does all further work with the same random
numbers. This needs no communication, but as much time and memory as one process alone. It is a
small part of a fit with a large network. A program without a network to train is fitted in this
way from the start.
"""

from __future__ import annotations

import atexit
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = [
    "ALONE",
    "DISTRIBUTED_MODES",
    "DistributedMode",
    "Processes",
    "first_process",
    "join",
    "leave",
    "local_device",
    "mixed",
]

DistributedMode = Literal["auto", "never"]
DISTRIBUTED_MODES: tuple[DistributedMode, ...] = get_args(DistributedMode)

# Environment variables that torchrun sets in each process.
TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def join(device: torch.device) -> Processes:
    """The processes that `torchrun` started, this one included, or this process alone.

    The first call connects them, by gloo and for tensors on a GPU by NCCL.
    """
    if not dist.is_available():
        return ALONE
    if not dist.is_initialized():
        if not _torchrun() or int(os.environ["WORLD_SIZE"]) < 2:
            return ALONE
        dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl")
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
    return Processes(dist.get_rank(), dist.get_world_size())


def leave() -> None:
    """Disconnect this process from the others, once all of them call it.

    Without that, a process may still be in use of connections when another has ended, and abort.
    """
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def first_process() -> bool:
    """Whether this process writes files: it is the first or the only process."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return not _torchrun() or os.environ["RANK"] == "0"


def local_device() -> str:
    """The GPU with the number that this process has on its machine."""
    if "LOCAL_RANK" not in os.environ:
        return "cuda"
    return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"


def _torchrun() -> bool:
    """Whether torchrun started this process."""
    return all(name in os.environ for name in TORCHRUN)


@dataclass(frozen=True)
class Processes:
    """Processes that fit one model together; the methods of a single process do nothing."""

    rank: int = 0  # this process's number, from 0
    size: int = 1  # number of processes

    @property
    def first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Whether there is more than one process."""
        return self.size > 1

    def total(self, part: Tensor) -> Tensor:
        """The sum of all processes' parts."""
        if not self.several:
            return part
        whole = part.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(whole)
        return whole

    def gather(self, part: Tensor, most: int) -> list[Tensor]:
        """Every process's part, padded with -1 to `most` rows."""
        padded = part.new_full((most, *part.shape[1:]), -1)
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return parts

    def same(self, *modules: nn.Module) -> None:
        """Copy the first process's parameters and buffers to all processes."""
        tensors = [value for module in modules for value in module.state_dict().values()]
        for values in tensors if self.several else ():
            first = values.detach().contiguous()
            dist.broadcast(first, 0)
            values.copy_(first)

    def check_same(self, value: object, problem: str) -> None:
        """Raise ValueError with a message if the repr of a value differs between processes."""
        if self.several:
            digest = hashlib.sha256(repr(value).encode()).digest()
            digests = self.gather(torch.tensor(list(digest), dtype=torch.long), len(digest))
            if any(not torch.equal(other, digests[0]) for other in digests):
                raise ValueError(problem)

    @contextmanager
    def common_numbers(self, *seed: int) -> Iterator[None]:
        """Random numbers drawn inside are the same in every process."""
        with torch.random.fork_rng(enabled=self.several):
            if self.several:
                torch.manual_seed(mixed(*seed))
            yield

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raise ConnectionError if the code inside fails because another process has ended."""
        try:
            yield
        except RuntimeError as error:
            text = str(error)
            from_connection = "gloo" in text or "NCCL" in text
            if self.several and (from_connection or isinstance(error, dist.DistError)):
                raise ConnectionError(
                    f"process {self.rank} of {self.size} lost another process of this run, which "
                    "has ended early: its output says why"
                ) from error
            raise


def mixed(*numbers: int) -> int:
    """A seed that depends on all of the numbers."""
    sequence = np.random.SeedSequence([number % 2**64 for number in numbers])
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


ALONE = Processes()
