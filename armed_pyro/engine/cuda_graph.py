"""A recording of a function's GPU kernels, which launches all of them at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["Recording"]


# Runs before the recording, in which libraries set themselves up.
WARM_UP = 3


class Recording:
    """A function's kernels, recorded as a CUDA graph and launched together in every call.

    Launching the kernels of a small step one by one takes longer than running them. Random
    numbers continue from the generator's state, as if the function ran.

    Parameters
    ----------
    function : callable
        Maps tensors to tensors on one CUDA device. It must not wait for values. It may change its
        leading inputs in place.
    inputs : sequence of Tensor
        Inputs of the first runs.
    fixed : int
        Number of leading inputs whose memory stays the same in all calls. The others are copied
        to the memory that the recording reads.
    """

    def __init__(
        self,
        function: Callable[..., Sequence[Tensor]],
        inputs: Sequence[Tensor],
        *,
        fixed: int,
    ) -> None:
        # Tensors that the function holds must stay in memory: the recording reads them, too.
        self._function, self._fixed = function, fixed
        self._copies = [tensor.clone() for tensor in inputs[fixed:]]
        recorded = (*inputs[:fixed], *self._copies)
        device = inputs[0].device
        with torch.no_grad(), torch.cuda.device(device):
            aside, here = torch.cuda.Stream(), torch.cuda.current_stream()
            aside.wait_stream(here)
            with torch.cuda.stream(aside):
                for _ in range(WARM_UP):
                    function(*recorded)
            here.wait_stream(aside)
            self._graph = torch.cuda.CUDAGraph()
            # Without "thread_local", a thread that reads rows ahead would break the capture.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._results = tuple(function(*recorded))

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        for copy, values in zip(self._copies, inputs[self._fixed :], strict=True):
            copy.copy_(values)
        self._graph.replay()
        return [result.clone() for result in self._results]
