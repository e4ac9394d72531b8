"""Functions of tensors as graphs of their operations, and these as compiled code."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from threading import Thread
from typing import Any, cast

import torch
from torch import Tensor

from armed_pyro.engine.shortcuts import shortcuts

__all__ = ["capture", "compiler_problem", "lower"]


# Random numbers are those of an eager step; and no Python between the kernels of a small one, whose
# results share one piece of memory. To compile headers once for many graphs, and line numbers for
# debuggers, takes longer than it saves where there is one graph.
SETTINGS: Mapping[str, Any] = {
    "fallback_random": True,
    "cpp_wrapper": True,
    "memory_planning": True,
    "cpp_cache_precompile_headers": False,
    "aot_inductor.enable_line_tables": False,
}
# Where kernels are launched from a recording, nothing runs between them either. In another order
# they would draw other random numbers.
RECORDED: Mapping[str, Any] = {"fallback_random": True, "reorder_for_peak_memory": False}


def compiler_problem() -> str:
    """Why nothing can be compiled on this machine; empty if it can."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except Exception as error:
        return f"no C++ compiler: {str(error).strip().split(chr(10))[0][:200]}"
    return ""


def capture(
    function: Callable[..., list[Tensor]], inputs: Sequence[Tensor], *, trained: int = 0
) -> torch.fx.GraphModule:
    """The operations on tensors that a function does, gradients by its first inputs included.

    It may change inputs in place, as it does here in a first run.

    Parameters
    ----------
    function : callable
        From tensors to tensors; it may not depend on their values otherwise than by operations.
    inputs : sequence of Tensor
        Inputs for a first run.
    trained : int
        Leading inputs by which the function takes gradients.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    from armed_pyro.engine.decompositions import DECOMPOSITIONS  # imports the compiler

    ready = [one.detach().requires_grad_(place < trained) for place, one in enumerate(inputs)]
    # cuDNN's batch normalisation changes its running statistics without declaring it.
    with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):
        graph = make_fx(function, decomposition_table=DECOMPOSITIONS)(*ready)
    if any(one.is_cuda for one in inputs):
        _mark_failures(graph.graph)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _mark_failures(graph: torch.fx.Graph) -> None:
    """NaN for factors of matrices that have none: to raise an error, a GPU's step would wait."""
    aten = torch.ops.aten
    for check in graph.find_nodes(op="call_function", target=aten._linalg_check_errors.default):
        info = check.args[0]
        factor = next(one for one in info.args[0].users if one.args[1] == 0)
        with graph.inserting_before(info.next):  # before all that reads the factor
            failed = graph.call_function(aten.gt.Scalar, (info, 0))
            for _ in range(2):
                failed = graph.call_function(aten.unsqueeze.default, (failed, -1))
            marked = graph.call_function(aten.masked_fill.Scalar, (factor, failed, math.nan))
        factor.replace_all_uses_with(
            marked, delete_user_cb=lambda user, marked=marked: user is not marked
        )
        graph.erase_node(check)


def lower(
    graph: torch.fx.GraphModule, inputs: Sequence[Tensor], settings: Mapping[str, Any] = SETTINGS
) -> Callable[..., Sequence[Tensor]]:
    """A graph as compiled code, after a first run of it.

    Parameters
    ----------
    graph : torch.fx.GraphModule
    inputs : sequence of Tensor
        Inputs for the first run; later ones have the same shapes.
    settings : mapping of str to value
        The compiler's.
    """
    from torch._guards import TracingContext, tracing
    from torch._inductor import config, cpu_vec_isa
    from torch._inductor.compile_fx import compile_fx
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    # Without an environment of shapes what is compiled is not kept on disk.
    known = config.get_config_copy()  # settings come and go with versions
    context = TracingContext(FakeTensorMode(shape_env=ShapeEnv()))
    with (
        warnings.catch_warnings(),
        _silent("torch._inductor"),
        torch.no_grad(),
        config.patch({name: one for name, one in settings.items() if name in known}),
        shortcuts(),
        tracing(context),
    ):
        warnings.simplefilter("ignore")  # the compiler's, of itself
        # What the processor can do is found out by compiling, once a machine: at the same time.
        probe = Thread(target=copy_context().run, args=(cpu_vec_isa.pick_vec_isa,), daemon=True)
        probe.start()
        run: Any = compile_fx(graph, list(inputs))
        run(*inputs)
    return cast("Callable[..., Sequence[Tensor]]", run)


@contextmanager
def _silent(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
