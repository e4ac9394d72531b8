"""A function of tensors as a graph of its operations, and the graph as compiled code."""

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

# The compiler's settings. Random numbers are those of the eager step. On a CPU the kernels are
# called from C++: from Python, a small step took 1.3 to 1.8 times as long.
CPU: dict[str, Any] = {"fallback_random": True, "cpp_wrapper": True}
# On a GPU the kernels are launched from a recording. In another order they would draw other
# numbers.
GPU: dict[str, Any] = {"fallback_random": True, "reorder_for_peak_memory": False}


def capture(
    function: Callable[..., list[Tensor]], inputs: Sequence[Tensor], *, trained: int = 0
) -> torch.fx.GraphModule:
    """The operations of a function on tensors, including gradients in its first inputs.

    The function runs once. It may change its inputs in place.

    Parameters
    ----------
    function : callable
        From tensors to tensors. Its operations may not depend on the tensors' values.
    inputs : sequence of Tensor
        Inputs of this run.
    trained : int
        Number of leading inputs in which the function takes gradients.
    """
    ready = [one.detach().requires_grad_(place < trained) for place, one in enumerate(inputs)]
    # cuDNN's batch normalisation changes its running statistics without declaring it.
    with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):
        graph = make_fx(function)(*ready)
    if any(one.is_cuda for one in inputs):
        _nan_where_cholesky_fails(graph.graph)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _nan_where_cholesky_fails(graph: torch.fx.Graph) -> None:
    """Replace the check of each Cholesky factor by NaN in it: a GPU would wait for the check."""
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
    """The graph as code of torch's compiler, which has run once.

    `torch.compile` would trace the graph a second time, which took half as long again, and adds
    0.2 ms to every call, as much as a small step takes.

    Parameters
    ----------
    graph : torch.fx.GraphModule
    inputs : sequence of Tensor
        Inputs of the first run. The code serves inputs of the same shapes.
    """
    # Half a second and 200 MB, which short fits do not need.
    import torch._inductor

    settings = GPU if any(one.is_cuda for one in inputs) else CPU
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
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
