"""One training step as a compiled graph: loss, gradients and update without Python in between."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from armed_pyro.engine.compiler import RECORDED, capture, compiler_problem, lower
from armed_pyro.engine.cuda_graph import Recording
from armed_pyro.engine.loss import Loss
from armed_pyro.engine.skeletons import filled, skeleton

__all__ = ["COMPILE_MODES", "CompileMode", "Steps"]


CompileMode = Literal["auto", "always", "never"]
COMPILE_MODES: tuple[CompileMode, ...] = get_args(CompileMode)

# Seconds that compiling is expected to take where nothing is known of it.
EXPECTED = 20.0
# The same of recording a step's kernels as they are, on a GPU.
RECORDING = 1.0
# Of the first steps some are slow for reasons of their own.
WARM_UP = 3
# Largest difference of a compiled loss from that of the same step run eagerly, beside 1.
AGREEMENT = 1e-3
UPDATE = "optimizer"
Objective = Callable[..., Loss]


class Steps:
    """Takes an objective's steps: the loss, its gradients, and what an optimizer makes of them.

    With "auto", steps run eagerly until they have taken as long as compiling is expected to take
    (20 seconds, a few if the compiler's cache holds it); if there are enough steps to come, the
    step is then captured as one graph, compiled, and compared with an eager one from the same
    random state. A step that cannot be compiled goes on eagerly, with one line that says why.

    On a GPU the captured graph's kernels are recorded, to be launched together (`Recording`): at
    first as they are, which takes a second, and compiled once that, too, is expected to pay.

    Program and guide stay ordinary Pyro: what is compiled is what they do to tensors. Random
    numbers, dropout and running statistics of batch normalisation are those of the eager step.

    Parameters
    ----------
    modules : mapping of str to torch.nn.Module
        What the objective runs: their parameters and buffers are inputs of the graph.
    update : torch.nn.Module
        Takes what is trained, its gradients (tensor or None), both by name in `modules`, and a
        factor; changes parameters and its own buffers in place, as a part of the step; gives the
        length of the gradient.
    mode : {"auto", "always", "never"}
        "always" compiles at the second step of a kind, "never" does not. Steps whose rows differ
        in number from one to the next stay eager.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], update: nn.Module, mode: CompileMode = "auto"
    ) -> None:
        self.modules, self.mode = nn.ModuleDict({**modules, UPDATE: update}), mode
        # Walking through modules in every step would take as long as a small step does.
        self._parts = list(self.modules.modules())
        self._parameters = dict(self.modules.named_parameters())
        self._device = next(iter(self._parameters.values())).device
        self._key: Any = None
        self._graph: _Graph | None = None
        self._seconds: list[float] = []
        # Of compiling: read from the journal once a key, not in every step.
        self._expected: float | None = None
        self.problem = ""

    @property
    def compiled(self) -> bool:
        """Whether the last step ran as a graph, compiled or recorded."""
        return self._graph is not None

    @property
    def seconds(self) -> float:
        """Median time of the latest steps of the kind that runs now."""
        return statistics.median(self._seconds[-100:]) if self._seconds else float("nan")

    def __call__(
        self, objective: Objective, *inputs: Any, factor: float = 1.0, remaining: int = 0
    ) -> tuple[Loss, Tensor]:
        """One step: its loss, and the length of the gradient.

        Parameters
        ----------
        objective : callable
            Gives the loss; told apart from others by its equality and hash.
        *inputs : Tensor, Rows or number
            Its arguments. Tensors may change from step to step, their shapes and all else only at
            the price of compiling anew.
        factor : float
            Of the update's rates.
        remaining : int
            Steps still to come.
        """
        tensors: list[Tensor] = []
        key = (objective, tuple(skeleton(one, tensors) for one in inputs), self._trained())
        if key != self._key:
            self._key, self._graph, self._seconds, self._expected = key, None, [], None
        elif self._due(key, remaining):
            self._graph = self._compile(key, tensors, inputs)
            self._seconds, self._expected = [], None
        start, rate = time.perf_counter(), torch.full((), factor, device=self._device)
        if self._graph is None:
            taken = self._eager(objective, inputs, rate)
        else:
            taken = self._graph(tensors, rate)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._seconds.append(time.perf_counter() - start)
        return taken

    def _eager(
        self, objective: Objective, inputs: Sequence[Any], factor: Tensor
    ) -> tuple[Loss, Tensor]:
        trained = {name: one for name, one in self._parameters.items() if one.requires_grad}
        for one in trained.values():
            one.grad = None
        loss = objective(*inputs)
        if loss.total.requires_grad:  # there may be nothing to train once the network is settled
            loss.total.backward()
        gradients = {name: one.grad for name, one in trained.items()}
        return loss, self.modules[UPDATE](trained, gradients, factor)

    def _trained(self) -> tuple[bool, ...]:
        training = tuple(one.training for one in self._parts)
        return training + tuple(one.requires_grad for one in self._parameters.values())

    def _due(self, key: Any, remaining: int) -> bool:
        trains = any(one.requires_grad for one in self._parameters.values())
        lowered = self._graph is not None and self._graph.lowered
        if self.mode == "never" or self.problem or not trains or lowered:
            return False
        if self.mode == "always":
            return True
        steps = self._seconds[WARM_UP:]
        if not steps or sum(steps) < 1.0:
            return False
        if self._expected is None:
            journal = _Journal.of(self.modules, key)
            self._expected = RECORDING if self._records() else journal.expected()
        return sum(steps) >= self._expected and remaining * self.seconds > 2 * self._expected

    def _records(self) -> bool:
        """Whether the step is only to be recorded next, and not compiled."""
        return self.mode == "auto" and self._device.type == "cuda" and self._graph is None

    def _compile(self, key: Any, tensors: list[Tensor], inputs: Sequence[Any]) -> _Graph | None:
        objective, skeletons, _ = key
        lowered = not self._records()
        self.problem = compiler_problem() if lowered else ""
        try:
            if not self.problem:
                graph = _Graph(self.modules, objective, skeletons, tensors, lowered=lowered)
                eager = partial(self._eager, objective, inputs)
                self.problem = graph.disagreement(eager, tensors)
                if not self.problem:
                    if lowered:  # next time from the compiler's cache, as fast as it is captured
                        _Journal.of(self.modules, key).record(2 * graph.capture_seconds)
                    return graph
        except Exception as error:  # the compiler's own errors are of all kinds
            first = str(error).strip().split("\n")[0]
            self.problem = f"{type(error).__name__}: {first[:200]}"
        warnings.warn(
            f"training steps are not compiled ({self.problem}); they run "
            f"{'eagerly' if self._graph is None else 'as recorded'}",
            UserWarning,
            stacklevel=4,
        )
        return self._graph


# --- the graph ------------------------------------------------------------------------------------


class _Graph:
    """A step compiled for these modules, this objective and inputs of these shapes."""

    def __init__(
        self,
        modules: nn.ModuleDict,
        objective: Objective,
        skeletons: Sequence[Any],
        tensors: Sequence[Tensor],
        *,
        lowered: bool,
    ) -> None:
        self.modules, self.lowered = modules, lowered
        parameters = dict(modules.named_parameters())
        self.trained = {name: one for name, one in parameters.items() if one.requires_grad}
        self.held = {name: one for name, one in parameters.items() if not one.requires_grad}
        self.buffers = dict(modules.named_buffers())
        # Their memory stays the same, whatever is written into it.
        state = (*self.trained.values(), *self.held.values(), *self.buffers.values())
        self._state = [one.detach() for one in state]

        def step(*flat: Tensor) -> list[Tensor]:
            return [self._step(objective, skeletons, flat)]

        self._one = torch.ones((), device=self._state[0].device)
        example = [*self._state, *tensors, self._one]
        with self._kept(tensors):
            start = time.perf_counter()
            graph = capture(step, example, trained=len(self.trained))
            self.capture_seconds = time.perf_counter() - start
            self._run = self._compiled(graph, example)

    def _compiled(
        self, graph: torch.fx.GraphModule, example: Sequence[Tensor]
    ) -> Callable[..., Sequence[Tensor]]:
        if not self._one.is_cuda:
            return lower(graph, example)
        run = lower(graph, example, RECORDED) if self.lowered else graph
        try:
            return Recording(run, example, fixed=len(self._state))
        except RuntimeError:  # something in it waits for values
            return run

    def _step(
        self,
        objective: Objective,
        skeletons: Sequence[Any],
        flat: Sequence[Tensor],
    ) -> Float[Tensor, " parts"]:
        from torch.nn.utils.stateless import _reparametrize_module

        given = iter(flat)
        trained, held, buffers = (
            {name: next(given) for name in some} for some in (self.trained, self.held, self.buffers)
        )
        *tensors, factor = given
        with _reparametrize_module(self.modules, trained | held | buffers):
            loss = objective(*(filled(one, tensors) for one in skeletons))
            found: Sequence[Tensor | None] = torch.autograd.grad(
                loss.total, list(trained.values()), allow_unused=True
            )
            gradients = dict(zip(trained, found, strict=True))
            norm: Tensor = self.modules[UPDATE](trained, gradients, factor)
        scalars = torch.stack([loss.total.detach(), loss.elbo, loss.fixed, loss.game, norm])
        return torch.cat([scalars, loss.accuracy])

    def __call__(self, tensors: Sequence[Tensor], factor: Tensor) -> tuple[Loss, Tensor]:
        with torch.no_grad():
            (joined,) = self._run(*self._state, *tensors, factor)
        parts = joined.cpu()  # to wait for a GPU once is enough
        total, elbo, fixed, game, norm = parts[:5].unbind()
        return Loss(total, elbo, fixed, game, parts[5:]), norm

    def disagreement(
        self, eager: Callable[[Tensor], tuple[Loss, Tensor]], tensors: Sequence[Tensor]
    ) -> str:
        """How a compiled step differs from an eager one from the same state; empty if not."""
        found = []
        for step in (partial(self, tensors), eager):
            with self._kept(tensors):
                loss, norm = step(self._one)
                found.append((float(loss.total.detach()), float(norm)))
        for what, mine, eagers in zip(("loss", "gradient's length"), *found, strict=True):
            if not abs(mine - eagers) <= AGREEMENT * (1 + abs(eagers)):
                return f"the compiled {what} is {mine:.6g}, the eager one {eagers:.6g}"
        return ""

    @contextmanager
    def _kept(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Afterwards parameters, buffers and random numbers are what they were."""
        before = [one.clone() for one in self._state]
        with _random_state_kept(tensors):
            yield
        for one, value in zip(self._state, before, strict=True):
            one.copy_(value)


@contextmanager
def _random_state_kept(tensors: Sequence[Tensor]) -> Iterator[None]:
    devices = {one.device for one in tensors if one.is_cuda}
    with torch.random.fork_rng(devices=list(devices)):
        yield


# --- how long compiling takes ----------------------------------------------------


@dataclass(frozen=True)
class _Journal:
    """A file beside the compiler's cache with the seconds that compiling a step takes."""

    path: Path

    @classmethod
    def of(cls, modules: nn.Module, key: Any) -> _Journal:
        """The file of this step: of programs, shapes and versions, not of their values."""
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        objective, skeletons, trained = key
        state = [(name, tuple(one.shape)) for name, one in modules.state_dict().items()]
        settings = {k: v for k, v in vars(objective).items() if isinstance(v, (int, float, str))}
        text = repr((type(objective).__name__, settings, skeletons, trained, state))
        digest = hashlib.sha256(f"{torch.__version__} {text}".encode()).hexdigest()[:24]
        return cls(Path(cache_dir()) / "armed_pyro" / f"{digest}.json")

    def expected(self) -> float:
        """Seconds it is expected to take."""
        try:
            return float(json.loads(self.path.read_text("utf-8"))["seconds"])
        except (OSError, ValueError, KeyError):
            return EXPECTED

    def record(self, seconds: float) -> None:
        """Keep how long it will take the next time."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps({"seconds": seconds}), encoding="utf-8")
        except OSError:
            return
