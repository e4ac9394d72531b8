"""Kernels of a GPU recorded once and launched together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["Recording"]


WARM_UP = 3


class Recording:
    """A function's kernels, recorded once as a CUDA graph and launched together in every call.

    To launch the kernels of a small step one by one takes longer than they run. Random numbers
    go on from the generator's state, as if the function ran.

    Parameters
    ----------
    function : callable
        From tensors to tensors on one CUDA device; it may not wait for values. Calling it may
        change the first inputs in place.
    inputs : sequence of Tensor
        Inputs of some first runs.
    fixed : int
        Leading inputs that stay where they are in memory. Others are copied to where the
        recording reads them.
    """

    def __init__(
        self,
        function: Callable[..., Sequence[Tensor]],
        inputs: Sequence[Tensor],
        *,
        fixed: int,
    ) -> None:
        # What it reads beside its inputs has to stay in memory.
        self._function, self._fixed = function, fixed
        self._read = [one.clone() for one in inputs[fixed:]]
        given = (*inputs[:fixed], *self._read)
        device = inputs[0].device
        with torch.no_grad(), torch.cuda.device(device):
            aside, here = torch.cuda.Stream(), torch.cuda.current_stream()
            aside.wait_stream(here)
            with torch.cuda.stream(aside):
                for _ in range(WARM_UP):
                    function(*given)
            here.wait_stream(aside)
            self._graph = torch.cuda.CUDAGraph()
            # Other threads may read ahead meanwhile.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._written = tuple(function(*given))

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        for mine, given in zip(self._read, inputs[self._fixed :], strict=True):
            mine.copy_(given)
        self._graph.replay()
        return [one.clone() for one in self._written]
