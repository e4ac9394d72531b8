"""Training steps, taken eagerly or as one compiled graph of loss, gradients and update."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from armed_pyro.engine.compiler import Recording, TensorFunction, capture, compile_graph
from armed_pyro.rows.batch import Membership, Rows

__all__ = ["COMPILE_MODES", "CompileMode", "Loss", "Steps"]

for record in (Membership, Rows):
    pytree.register_dataclass(record)

CompileMode = Literal["auto", "always", "never"]
COMPILE_MODES: tuple[CompileMode, ...] = get_args(CompileMode)

# Expected seconds of compiling, and of recording a step's kernels on a GPU.
COMPILING, RECORDING = 20.0, 1.0
# Number of first steps, which are slower than later steps and are not timed.
WARM_UP = 3
# Largest difference between the compiled and the eager loss; relative for losses above 1.
AGREEMENT = 1e-3
UPDATE = "optimizer"
TENSOR = object()  # marks the place of a tensor among the inputs


@dataclass(frozen=True)
class Loss:
    """Parts of the objective, each a mean over rows; training minimises `total`."""

    total: Float[Tensor, ""]  # -elbo + lambda_F * fixed + adversarial
    elbo: Float[Tensor, ""]  # estimate of the evidence lower bound, divided by the number of rows
    fixed: Float[Tensor, ""]  # -log p(y | fixed effects alone)
    adversarial: Float[Tensor, ""]  # sum of the adversaries' cross-entropies
    accuracy: Float[Tensor, " adversaries"]  # fraction of rows whose cluster each one predicts

    def joined(self) -> Float[Tensor, " numbers"]:
        """All parts as one vector without gradients, from which `of` makes the loss again."""
        return torch.cat([getattr(self, part.name).detach().reshape(-1) for part in fields(self)])

    @classmethod
    def of(cls, numbers: Float[Tensor, " numbers"]) -> Loss:
        """The loss with these parts."""
        total, elbo, fixed, adversarial = numbers[:4].unbind()
        return cls(total, elbo, fixed, adversarial, numbers[4:])


Objective: TypeAlias = Callable[..., Loss]
Taken: TypeAlias = tuple[Loss, Tensor]  # the loss of a step, and the norm of its gradient


class Steps:
    """Takes steps of an objective: its loss, the gradients, and the optimizer's update.

    With "auto", steps run eagerly for as long as compiling is expected to take (20 seconds). If
    enough steps remain, the step is then captured as one graph, compiled, and compared with an
    eager step from the same random state. A step that cannot be compiled stays eager, and one
    warning says why.

    On a GPU, the kernels of the captured graph are recorded and launched together (`Recording`).
    The recording comes first, as it takes only a second; compiling follows if it is expected to
    save time.

    The program and guide stay ordinary Pyro, since only their tensor operations are compiled.
    Random numbers, dropout and running statistics of batch normalisation equal those of the eager
    step.

    The objective runs the `modules`, whose parameters and buffers are inputs of the graph. `update`
    is called with the trained parameters, their gradients (tensor or None), both by name in
    `modules`, and a factor of the rates. It changes the parameters and its own buffers in place,
    and returns the norm of the gradient. "always" compiles at the second step with the same shapes;
    steps whose number of rows always changes stay eager.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], update: nn.Module, mode: CompileMode = "auto"
    ) -> None:
        self.modules, self.mode = nn.ModuleDict({**modules, UPDATE: update}), mode
        # Collected once: walking through the modules takes as long as a small step.
        self._parts = list(self.modules.modules())
        self._parameters = dict(self.modules.named_parameters())
        self._device = next(iter(self._parameters.values())).device
        self._key: Any = None
        self._graph: _Graph | None = None
        self._seconds: list[float] = []
        self.problem = ""  # the reason why steps are not compiled

    @property
    def compiled(self) -> bool:
        """Whether steps run as a graph, compiled or recorded."""
        return self._graph is not None

    @property
    def seconds(self) -> float:
        """Median time of the last 100 steps, since steps were last compiled or recorded."""
        return statistics.median(self._seconds[-100:]) if self._seconds else float("nan")

    def __call__(
        self, objective: Objective, *inputs: Any, factor: float = 1.0, remaining: int = 0
    ) -> Taken:
        """Take one step, at learning rates times `factor`, with `remaining` steps to follow.

        The values of tensors among the objective's inputs may change from step to step. If
        anything else changes, such as their shapes or the objective, the step is compiled anew.
        """
        leaves, structure = pytree.tree_flatten(inputs)
        # A graph is compiled for the tensors' shape, type and device, and for other values.
        constants = [(x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x for x in leaves]
        key = (objective, structure, constants, self._trained())
        if key != self._key:
            self._key, self._graph, self._seconds = key, None, []
        elif self._due(remaining):
            self._graph = self._compile(objective, inputs)
            self._seconds = []
        start, rate = time.perf_counter(), torch.full((), factor, device=self._device)
        if self._graph is None:
            taken = self._eager(objective, inputs, rate)
        else:
            taken = self._graph(leaves, rate)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._seconds.append(time.perf_counter() - start)
        return taken

    def _eager(self, objective: Objective, inputs: Sequence[Any], factor: Tensor) -> Taken:
        trained = {name: p for name, p in self._parameters.items() if p.requires_grad}
        for parameter in trained.values():
            parameter.grad = None
        loss = objective(*inputs)
        if loss.total.requires_grad:  # a frozen program may have nothing to train
            loss.total.backward()
        gradients = {name: parameter.grad for name, parameter in trained.items()}
        return loss, self.modules[UPDATE](trained, gradients, factor)

    def _trained(self) -> tuple[bool, ...]:
        """The modules in training mode, and the parameters that are trained."""
        training = tuple(module.training for module in self._parts)
        return training + tuple(p.requires_grad for p in self._parameters.values())

    def _due(self, remaining: int) -> bool:
        """Whether the step is compiled or recorded now."""
        trains = any(parameter.requires_grad for parameter in self._parameters.values())
        done = self._graph is not None and self._graph.is_compiled
        if self.mode == "never" or self.problem or not trains or done:
            return False
        if self.mode == "always":
            return True
        taken = sum(self._seconds[WARM_UP:])
        expected = RECORDING if self._records() else COMPILING
        return taken >= max(1.0, expected) and remaining * self.seconds > 2 * expected

    def _records(self) -> bool:
        """Whether the next graph is recorded without being compiled."""
        return self.mode == "auto" and self._device.type == "cuda" and self._graph is None

    def _compile(self, objective: Objective, inputs: Sequence[Any]) -> _Graph | None:
        """A new graph; the present one, after a warning, if the new graph fails."""
        try:
            graph = _Graph(self.modules, objective, inputs, is_compiled=not self._records())
            self.problem = graph.disagreement(partial(self._eager, objective, inputs), inputs)
            if not self.problem:
                return graph
        except Exception as error:  # the compiler raises errors of many kinds
            first = str(error).strip().split("\n")[0]
            self.problem = f"{type(error).__name__}: {first[:200]}"
        warnings.warn(
            f"training steps are not compiled ({self.problem}); they run "
            f"{'eagerly' if self._graph is None else 'as recorded'}",
            UserWarning,
            stacklevel=4,
        )
        return self._graph


class _Step(nn.Module):
    """Modules whose `forward` is a training step."""

    def __init__(self, modules: nn.ModuleDict, objective: Objective) -> None:
        super().__init__()
        self.parts, self.objective = modules, objective

    def forward(
        self, trained: Mapping[str, Tensor], inputs: Sequence[Any], factor: Tensor
    ) -> Taken:
        loss = self.objective(*inputs)
        gradients = torch.autograd.grad(loss.total, list(trained.values()), allow_unused=True)
        named = dict(zip(trained, gradients, strict=True))
        return loss, self.parts[UPDATE](trained, named, factor)


class _Graph:
    """A step as a graph, for one objective and inputs of fixed shapes."""

    def __init__(
        self, modules: nn.ModuleDict, objective: Objective, inputs: Sequence[Any], is_compiled: bool
    ) -> None:
        self.is_compiled = is_compiled
        self._module = _Step(modules, objective)
        parameters = dict(modules.named_parameters())
        trained = {name: p for name, p in parameters.items() if p.requires_grad}
        named: dict[str, Tensor] = {**trained, **parameters, **dict(modules.named_buffers())}
        self._trained = list(trained)
        # Detached tensors share the memory of parameters and buffers, which change in place.
        self._names, self._state = list(named), [values.detach() for values in named.values()]
        leaves, self._structure = pytree.tree_flatten(inputs)
        self._template = [TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._unit = torch.ones((), device=self._state[0].device)
        example = [*self._state, *_tensors(leaves), self._unit]
        with self._state_kept():
            graph = capture(self._step, example, trained=len(self._trained))
            self._run = self._runnable(graph, example)

    def _runnable(self, graph: torch.fx.GraphModule, example: Sequence[Tensor]) -> TensorFunction:
        """The graph, compiled if it is to be, and recorded on a GPU."""
        run = compile_graph(graph, example) if self.is_compiled else graph
        if not self._unit.is_cuda:
            return run
        try:
            return Recording(run, example, fixed=len(self._state))
        except RuntimeError:  # an operation that waits for values cannot be recorded
            return run

    def _step(self, *flat: Tensor) -> list[Tensor]:
        """The step as a function of the state, the tensors of the inputs, and the factor."""
        state = dict(zip(self._names, flat, strict=False))
        tensors = iter(flat[len(state) : -1])
        leaves = [next(tensors) if leaf is TENSOR else leaf for leaf in self._template]
        inputs = pytree.tree_unflatten(leaves, self._structure)
        trained = {name: state[name] for name in self._trained}
        inside = {f"parts.{name}": values for name, values in state.items()}
        loss, norm = functional_call(self._module, inside, (trained, inputs, flat[-1]))
        return [torch.cat([loss.joined(), norm.detach().reshape(1)])]

    def __call__(self, leaves: Sequence[Any], factor: Tensor) -> Taken:
        with torch.no_grad():
            (joined,) = self._run(*self._state, *_tensors(leaves), factor)
        joined = joined.cpu()  # one wait for a GPU, not one per result
        return Loss.of(joined[:-1]), joined[-1]

    def disagreement(self, eager: Callable[[Tensor], Taken], inputs: Sequence[Any]) -> str:
        """The difference to an eager step from the same state, in words; empty if there is none."""
        leaves, results = pytree.tree_leaves(inputs), []
        for step in (partial(self, leaves), eager):
            with self._state_kept():
                loss, norm = step(self._unit)
                results.append((float(loss.total.detach()), float(norm)))
        for name, value, expected in zip(("loss", "gradient's norm"), *results, strict=True):
            if not abs(value - expected) <= AGREEMENT * (1 + abs(expected)):
                return f"the compiled {name} is {value:.6g}, the eager one {expected:.6g}"
        return ""

    @contextmanager
    def _state_kept(self) -> Iterator[None]:
        """Restore parameters, buffers and the random state at the end."""
        before = [values.clone() for values in self._state]
        devices = [self._unit.device] if self._unit.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            yield
        for values, saved in zip(self._state, before, strict=True):
            values.copy_(saved)


def _tensors(leaves: Sequence[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
