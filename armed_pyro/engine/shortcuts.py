"""What takes the compiler long without need, done faster; of versions without it, left alone."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

__all__ = ["shortcuts"]


Change = Callable[[Any], Any]


@contextmanager
def shortcuts() -> Iterator[None]:
    """The compiler inside takes half as long, and makes much the same of a graph.

    Examples
    --------
    >>> import gc
    >>> with shortcuts():
    ...     gc.isenabled()
    False
    """
    from torch._inductor import cpp_builder, dtype_propagation, sizevars

    handler = getattr(dtype_propagation, "DtypePropagationOpsHandler", None)
    places: list[tuple[Any, str, Change]] = [
        (sizevars, "simplify_index_in_vec_range", _simple_indices),
        (sizevars, "stride_at", _simple_strides),
        (cpp_builder, "_get_optimization_cflags", _second_level),
        (handler, "__init__", _once),
    ]
    with ExitStack() as stack:
        for place, name, change in places:
            original = getattr(place, name, None)
            if original is not None:
                stack.enter_context(mock.patch.object(place, name, change(original)))
        stack.enter_context(_uncollected())
        yield


def _simple_indices(simplify: Any) -> Any:
    """What is not rounded to whole vectors is as simple as it gets."""

    def quick(index: Any, variable: Any, length: int) -> Any:
        rounded = _rounded(index, variable)
        whole = any(not size.is_number or size % length == 0 for size in rounded)
        return simplify(index, variable, length) if whole else index

    return quick


def _simple_strides(stride: Any) -> Any:
    """A difference of sums is simple once it is expanded."""

    def quick(index: Any, variable: Any) -> Any:
        if not _rounded(index, variable) and not index.is_polynomial(variable):
            return stride(index, variable)
        return (index.xreplace({variable: variable + 1}) - index).expand()

    return quick


def _rounded(index: Any, variable: Any) -> list[Any]:
    """Numbers by which a variable is divided, and those of which remainders are taken."""
    from torch.utils._sympy.functions import FloorDiv, ModularIndexing

    found = index.atoms(FloorDiv, ModularIndexing)
    return [size for one in found if one.has(variable) for size in one.args[1:]]


def _second_level(flags: Any) -> Any:
    """Loops are written vectorised: a second level of optimisation finds as much as a third."""

    def quick(*given: Any, **named: Any) -> Any:
        compiling, linking = flags(*given, **named)
        return ["O2" if one == "O3" else one for one in compiling], linking

    return quick


def _once(make: Any) -> Any:
    """There is one instance, which would be filled in anew whenever it is asked for."""
    done: set[int] = set()

    def quick(self: Any) -> None:
        if id(self) not in done:
            make(self)
            done.add(id(self))

    return quick


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without looking for garbage among so many objects over and over."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
