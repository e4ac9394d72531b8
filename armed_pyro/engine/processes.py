"""Processes that fit one model together, started by torchrun: who they are, and what they agree on.

Each process is given the same data. The network is trained on shares of them
(`armed_pyro.engine.shards`):
mini-batches, validation and pseudo-observations. What comes after it, when the network's outputs
are computed once and held, is a small part of the work of a network worth sharing, and each process
does all of it, with the same random numbers: nothing has to be exchanged, but it takes no less time
and memory than one process does. A program without a network to train is fitted like that from the
start.
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
    "local_device",
    "mixed",
]


DistributedMode = Literal["auto", "never"]
DISTRIBUTED_MODES: tuple[DistributedMode, ...] = get_args(DistributedMode)

# What torchrun tells each process.
TOLD = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def join(device: torch.device) -> Processes:
    """The processes that fit together with this one: those `torchrun` started, or it alone.

    Joins them if that has not been done yet: by gloo, and by NCCL for tensors on a GPU.
    """
    if not dist.is_available():
        return Processes()
    if not dist.is_initialized():
        if not all(name in os.environ for name in TOLD) or int(os.environ["WORLD_SIZE"]) < 2:
            return Processes()
        dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl")
        atexit.register(_leave)
    return Processes(dist.get_rank(), dist.get_world_size())


def first_process() -> bool:
    """Whether this process is the one to write files: the first, or the only one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return os.environ.get("RANK", "0") == "0" or not all(name in os.environ for name in TOLD)


def local_device() -> str:
    """The GPU of this process: of those that it sees, the one with its number on the machine."""
    if "LOCAL_RANK" not in os.environ:
        return "cuda"
    return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@dataclass(frozen=True)
class Processes:
    """Processes that fit one model together; alone, all of this does nothing.

    Attributes
    ----------
    rank, size : int
        This process's number, from 0, and how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Whether there is more than one."""
        return self.size > 1

    def total(self, part: Tensor) -> Tensor:
        """The sum of every process's part."""
        if not self.several:
            return part
        whole = part.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(whole)
        return whole

    def gather(self, own: Tensor, most: int) -> list[Tensor]:
        """Every process's tensor, padded with -1 to `most` rows."""
        padded = own.new_full((most, *own.shape[1:]), -1)
        padded[: len(own)] = own
        found = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(found, padded)
        return found

    def same(self, *modules: nn.Module) -> None:
        """Give every process the first one's parameters and buffers."""
        if self.several:
            for module in modules:
                for one in module.state_dict().values():
                    held = one.detach().contiguous()
                    dist.broadcast(held, 0)
                    one.copy_(held)

    def check_same(self, value: object, problem: str) -> None:
        """Raise ValueError if the processes do not agree on a value, which is told by its repr."""
        if self.several:
            found = hashlib.sha256(repr(value).encode()).digest()
            codes = self.gather(torch.tensor(list(found), dtype=torch.long), len(found))
            if any(not torch.equal(one, codes[0]) for one in codes):
                raise ValueError(problem)

    @contextmanager
    def common_numbers(self, *seed: int) -> Iterator[None]:
        """Random numbers inside are the same in every process."""
        with torch.random.fork_rng():
            torch.manual_seed(mixed(*seed))
            yield

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raise ConnectionError where a step fails because another process has ended."""
        try:
            yield
        except RuntimeError as error:
            if self.several and _is_lost(error):
                raise ConnectionError(
                    f"process {self.rank} of {self.size} lost another process of this run, which "
                    "has ended early: what that one printed says why"
                ) from error
            raise


def _is_lost(error: RuntimeError) -> bool:
    text = str(error)
    return isinstance(error, dist.DistError) or "gloo" in text or "NCCL" in text


def mixed(*numbers: int) -> int:
    """A seed that follows from several numbers."""
    state = np.random.SeedSequence([one % 2**64 for one in numbers]).generate_state(1, np.uint64)
    return int(state[0] >> 1)


ALONE = Processes()
