"""Captures a function of tensors as a graph of operations, and compiles the graph."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

__all__ = ["capture", "compile_graph"]

# Settings of torch's compiler. Random numbers are equal to those of the eager step. On a CPU,
# C++ calls the kernels: called from Python, a small step took 1.3 to 1.8 times as long.
CPU: dict[str, Any] = {"fallback_random": True, "cpp_wrapper": True}
# On a GPU, a recording launches the kernels (`cuda_graph.py`). The compiler must not reorder them,
# as the order decides which random numbers each kernel draws.
GPU: dict[str, Any] = {"fallback_random": True, "reorder_for_peak_memory": False}


def capture(
    function: Callable[..., list[Tensor]], inputs: Sequence[Tensor], *, trained: int = 0
) -> torch.fx.GraphModule:
    """The graph of a function's operations on tensors, gradients in its first inputs included.

    The function runs once. It may change its inputs in place.

    Parameters
    ----------
    function : callable
        Maps tensors to tensors. Its operations must not depend on the tensors' values.
    inputs : sequence of Tensor
        Inputs of this run.
    trained : int
        Number of leading inputs in which the function takes gradients.
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


def compile_graph(
    graph: torch.fx.GraphModule, inputs: Sequence[Tensor]
) -> Callable[..., Sequence[Tensor]]:
    """The graph, compiled by torch's compiler and run once.

    `torch.compile` is not used: it traces the graph again, and it adds 0.1 to 0.2 ms to every call,
    half the duration of a small step (docs/benchmarks.md).

    Parameters
    ----------
    graph : torch.fx.GraphModule
    inputs : sequence of Tensor
        Inputs of the first run. The compiled code takes inputs of the same shapes only.
    """
    # This import takes half a second and 200 MB, and short fits do not need it.
    import torch._inductor

    settings = GPU if any(tensor.is_cuda for tensor in inputs) else CPU
    with warnings.catch_warnings(), _errors_only("torch._inductor"), torch.no_grad():
        warnings.simplefilter("ignore")
        run: Any = torch._inductor.standalone_compile(
            graph,
            list(inputs),
            dynamic_shapes="from_example_inputs",
            options={"config_patches": settings},
        )
        run(*inputs)
    return cast("Callable[..., Sequence[Tensor]]", run)


@contextmanager
def _errors_only(name: str) -> Iterator[None]:
    """Silence a logger's messages below errors."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
