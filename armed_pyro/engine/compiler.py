"""Captures a function of tensors as a graph of operations, and compiles or records the graph."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from armed_pyro.engine.cache_folder import private_cache

__all__ = ["Recording", "TensorFunction", "capture", "compile_graph"]

TensorFunction: TypeAlias = Callable[..., Sequence[Tensor]]

# Settings of torch's compiler. Random numbers are equal to those of the eager step. On a CPU,
# C++ calls the kernels: called from Python, a small step took 1.3 to 1.8 times as long.
CPU: dict[str, Any] = {"fallback_random": True, "cpp_wrapper": True}
# On a GPU, a `Recording` launches the kernels. The compiler must not reorder them, as the order
# decides which random numbers each kernel draws.
GPU: dict[str, Any] = {"fallback_random": True, "reorder_for_peak_memory": False}
# Runs before a recording, in which libraries set themselves up.
WARM_UP = 3


def capture(
    function: TensorFunction, inputs: Sequence[Tensor], *, trained: int = 0
) -> torch.fx.GraphModule:
    """The graph of a function's operations, including gradients in its first `trained` inputs.

    The function runs once. It may change its inputs in place. Its operations must not depend on
    the tensors' values.
    """
    ready = [tensor.detach().requires_grad_(k < trained) for k, tensor in enumerate(inputs)]
    # cuDNN's batch normalisation changes running statistics in place without declaring it, so
    # that the change would be missing in the graph.
    with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):
        graph = make_fx(function)(*ready)
    if any(tensor.is_cuda for tensor in inputs):
        _nan_where_cholesky_fails(graph.graph)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _nan_where_cholesky_fails(graph: torch.fx.Graph) -> None:
    """Mark failed Cholesky factors by NaN instead of an error, for which a GPU would wait."""
    aten = torch.ops.aten
    for check in graph.find_nodes(op="call_function", target=aten._linalg_check_errors.default):
        info = check.args[0]
        factor = next(user for user in info.args[0].users if user.args[1] == 0)
        with graph.inserting_before(info.next):  # before every reader of the factor
            failed = graph.call_function(aten.gt.Scalar, (info, 0))
            for _ in range(2):
                failed = graph.call_function(aten.unsqueeze.default, (failed, -1))
            marked = graph.call_function(aten.masked_fill.Scalar, (factor, failed, math.nan))
        factor.replace_all_uses_with(
            marked, delete_user_cb=lambda user, marked=marked: user is not marked
        )
        graph.erase_node(check)


def compile_graph(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> TensorFunction:
    """The graph, compiled for inputs of these shapes by torch's compiler, and run once.

    `torch.compile` is not used: it traces the graph again, and it adds 0.1 to 0.2 ms to every call,
    half the duration of a small step (docs/benchmarks.md).

    PermissionError if others may write to the compiler's cache; see `private_cache`.
    """
    # This import takes half a second and 200 MB, and short fits do not need it.
    import torch._inductor

    settings = GPU if any(tensor.is_cuda for tensor in inputs) else CPU
    logger = logging.getLogger("torch._inductor")
    with private_cache(), warnings.catch_warnings(), torch.no_grad(), ExitStack() as at_end:
        warnings.simplefilter("ignore")
        at_end.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.ERROR)
        run: Any = torch._inductor.standalone_compile(
            graph,
            list(inputs),
            dynamic_shapes="from_example_inputs",
            options={"config_patches": settings},
        )
        run(*inputs)
    return cast("TensorFunction", run)


class Recording:
    """A function's kernels, recorded as a CUDA graph and launched together in every call.

    Launching the kernels of a small step one by one takes longer than running them. Random
    numbers continue from the generator's state, as if the function ran. The function must not
    wait for values. It may change its first `fixed` inputs in place; their memory must stay the
    same in all calls. The other inputs are copied to the memory that the recording reads.
    """

    def __init__(self, function: TensorFunction, inputs: Sequence[Tensor], *, fixed: int) -> None:
        # Tensors that the function holds must stay in memory: the recording reads them, too.
        self._function, self._fixed = function, fixed
        self._copies = [tensor.clone() for tensor in inputs[fixed:]]
        recorded = (*inputs[:fixed], *self._copies)
        with torch.no_grad(), torch.cuda.device(inputs[0].device):
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
