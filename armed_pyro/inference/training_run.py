"""One training run: steps, stopping, the last good state, and going on from a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.engine.checkpoint import Checkpoint, digest, module_tensors, restore_module
from armed_pyro.engine.compiled_step import CompileMode, Steps
from armed_pyro.engine.loss import Loss
from armed_pyro.engine.pace import Pace
from armed_pyro.engine.processes import ALONE
from armed_pyro.engine.schedule import MOVING, History, Plateau, Schedule, split_r_hat
from armed_pyro.engine.shards import Share
from armed_pyro.guides.base import Guide
from armed_pyro.inference.cluster_adam import LazyAdam
from armed_pyro.inference.divergence import TrainingDiverged, blame, not_finite
from armed_pyro.inference.marginal_mode import LARGEST_STEP, particles_needed, start_at_mode
from armed_pyro.inference.objective import NestedBound, Objective
from armed_pyro.inference.optimizers import Optimizers
from armed_pyro.inference.posterior import Posterior
from armed_pyro.program.model import MixedEffects, log_likelihoods, trains_network
from armed_pyro.program.predictor import modulates, row_cost
from armed_pyro.rows.batch import Rows
from armed_pyro.rows.in_memory import HeldRows
from armed_pyro.rows.shuffle import Shuffle
from armed_pyro.rows.source import RowSource

__all__ = ["Run"]


# Multiplications of a draw of all random effects beyond which the guide is not trained further.
MOST_WORK = 2**27
MOST_READ = 2**18  # rows read from files for one step then


class Run:
    """State of one training run; advances by windows of steps."""

    def __init__(
        self,
        model: MixedEffects,
        guide: Guide,
        data: ClusteredData,
        source: RowSource,
        validation: Rows | None,
        schedule: Schedule,
        seed: int,
        compile: CompileMode = "auto",  # noqa: A002
        share: Share | None = None,
    ) -> None:
        self.model, self.guide, self.data, self.source = model, guide, data, source
        self.share = (
            Share.of(ALONE, source, model.network if trains_network(model) else None)
            if share is None
            else share
        )
        self.validation, self.schedule, self.seed = validation, schedule, seed
        self.compile: CompileMode = compile
        self.plateau = self._new_plateau()
        # The rows as a settled network sees them, from when on only the guide is trained.
        self.settled: RowSource | None = None
        self.filters = modulates(model)
        self.trains, self.held = trains_network(model), list[torch.nn.Parameter]()
        self.iterates: list[np.ndarray] = []
        self.history, self.shuffle = History(), Shuffle()
        self.best: dict[str, Tensor] = {}
        # Where to return to from divergence: a state, and the mean loss of the window after it.
        self.good, self.good_loss = self._state(), math.inf
        self.stopped, self.factor = "", 1.0
        counts = [(game.factor, source.counts[game.factor]) for game in model.adversaries]
        self._chances = [(name, float(one.max() / one.sum())) for name, one in counts]
        self._prepare()

    @property
    def step(self) -> int:
        """Steps taken."""
        return len(self.history.loss)

    @property
    def pace(self) -> Pace:
        """How the guide is trained once the network is settled."""
        return Pace.of(len(self.source) * self.history.particles, network=self.filters)

    def train(self, path: Path | None, report: Callable[[int, str], None]) -> None:
        """Take steps until convergence or until they run out."""
        if not self.step and not self.trains:
            self._settle()
        while not self.stopped and not self._kept():
            settled = None if self.settled is None else self.pace.window
            self.model.train(self.settled is None)
            self.shuffle = self.share.reshuffled(self.shuffle, self.seed, self.step)
            window = self.schedule.window_steps(len(self.source), settled)
            before = self._state()
            losses = [self.take_step() for _ in range(min(window, self.schedule.steps - self.step))]
            self._close_window(losses)
            mean = float(np.mean(self.history.loss[-len(losses) :]))
            if mean < self.good_loss:
                self.good, self.good_loss = before, mean
            report(self.step, self.history.status(self._chances))
            if path is not None and self.share.processes.first:
                self.save().write(path)
        if self.best:
            self._return_to(self.best)
        self._release()

    def _kept(self) -> bool:
        """Stop at the mode, where steps would take too long: importance weights do the rest."""
        dear = self.guide.draw_cost() > MOST_WORK and self.schedule.stages > 0
        if self.settled is None or not dear:
            return False
        with torch.no_grad():
            bound = NestedBound(self.model, self.guide, self.history.particles)
            loss = bound(self._settled_rows(self.settled), 1)
        self.history.loss.append(float(loss.total))
        self.history.elbo.append(float(loss.elbo))
        self.iterates = [self.guide.hyperparameters.shift.detach().cpu().numpy().copy()]
        self.plateau.cuts = self.schedule.stages
        self._close_window([loss])
        return True

    def take_step(self) -> Loss:
        """One step of training: its loss, after what it changed."""
        rate = self.schedule.rate(self.step) * self.schedule.decay**self.plateau.cuts
        try:
            loss, norm = self._take(rate)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise self._divergence("a covariance matrix is degenerate") from error
        total = float(loss.total.detach())
        if not math.isfinite(total):
            raise self._divergence(blame(loss))
        if not math.isfinite(norm):
            raise self._divergence("its gradient is not finite")
        self.factor = rate
        if self.settled is not None:
            self.iterates.append(self.guide.hyperparameters.shift.detach().cpu().numpy().copy())
        self.history.loss.append(total)
        self.history.elbo.append(float(loss.elbo))
        first, last = self.history.loss[0], self.history.loss[-1]
        if last > first + 1e4 * (1 + abs(first)):
            raise self._divergence(f"it grew from {first:.4g} to {last:.4g}")
        return loss

    def _take(self, rate: float) -> tuple[Loss, Tensor]:
        """The loss of one step, and the length of its gradient, by which parameters changed."""
        remaining = self.schedule.steps - self.step
        if self.settled is None:
            progress = self.source.like.new_full((), self.step / self.schedule.steps)
            rows = self.share.weigh(self._next_batch())
            loss, norm = self.steps(
                self.objective, rows, progress, factor=rate, remaining=remaining
            )
            return self.share.mean(loss), norm
        rows = self._settled_rows(self.settled)
        bound = NestedBound(self.model, self.lazy.guide, self.history.particles)
        draws = max(1, min(self.pace.draws, self._most_rows() // max(1, len(rows))))
        return self.steps(self.lazy.reading(bound), rows, draws, factor=rate, remaining=remaining)

    def _most_rows(self) -> int:
        """Rows in a step of the settled network."""
        most = LARGEST_STEP // (2 * self.history.particles * row_cost(self.model))
        return most if isinstance(self.settled, HeldRows) else min(most, MOST_READ)

    def _settled_rows(self, settled: RowSource) -> Rows:
        most, nested = self._most_rows(), self.guide.nested()
        if len(settled) <= most:
            return settled.all()
        if nested is None:
            return self._next_batch()
        clusters = len(settled.counts[nested.name])
        share = max(1, clusters * most // (2 * len(settled)))
        chosen = self.shuffle.take(share, clusters)
        return settled.whole_clusters(nested.name, chosen.to(settled.like.device))

    def _next_batch(self) -> Rows:
        source = self.share.rows
        size, n = self.schedule.batch(len(self.source)), len(self.source)
        if size == n:
            return source.all()
        # As many as `_prepare` makes room for, but where a step finds out itself which it needs.
        sampled = source.sampled(self.share.together(size))
        whole = self.lazy.tables.keys() >= sampled and not self.share.several
        dense = n if whole or self.guide.needs_all_clusters() else 4 * self.share.together(size)
        return self.shuffle.batch(source, self.share.batch(size), dense)

    def _close_window(self, losses: list[Loss]) -> None:
        self.history.step.append(self.step)
        self.history.compiled.append(self.steps.compiled)
        self.history.seconds.append(self.steps.seconds)
        self.history.rate.append(self.factor)
        accuracy = torch.stack([loss.accuracy.cpu() for loss in losses]).mean(0).tolist()
        if self.settled is not None and self.history.adversary_accuracy:
            accuracy = self.history.adversary_accuracy[-1]  # the game is over
        self.history.adversary_accuracy.append(accuracy)
        self.share.average_buffers(self.model.network)
        if self.validation is not None:
            self.history.validation.append(self._validate(self.validation))
        if self.settled is not None:
            # In posterior sds, also where the frame is not that of the mode.
            sds = self.guide.hyperparameters.log_scale.detach().exp().cpu().numpy()
            r_hat, drift = split_r_hat(np.stack(self.iterates[-2 * len(losses) :]) / sds)
            self.history.r_hat.append(r_hat)
            self.history.drift.append(drift)
        if self.validation is None or self.settled is not None:
            # The loss may stand still while the guide still moves.
            moving = self.settled is not None and self.history.r_hat[-1] >= MOVING
            if self.plateau.training(np.array(self.history.loss[-len(losses) :]), moving=moving):
                self.iterates = []
        else:
            value = self.history.validation[-1]
            best, cut = self.plateau.validation(value)
            if best:
                self.best = self._state()
            elif cut and self.best:
                self._return_to(self.best)
        known = self.settled is not None and self.guide.exact(self.model)
        if self.plateau.cuts == 0 and self.schedule.rate(self.step) == 1 and not known:
            # Later, at falling rates, the guide is left to settle.
            with self.share.common_numbers(self.seed, self.step):
                self.guide.refresh(self.model, self.share.rows)
        if self.schedule.stages and self.plateau.cuts >= self.schedule.stages:
            if self.settled is None:
                self._settle()
            else:
                by_validation = self.validation is not None and self.trains
                self.stopped = "validation" if by_validation else "converged"
        if self.step >= self.schedule.steps and not self.stopped:
            self.stopped = "steps"

    def _new_plateau(self) -> Plateau:
        # A hundredth of a nat a window is beyond what any posterior summary can show.
        return Plateau(tolerance=0.01 / len(self.source), patience=self.schedule.patience)

    def _prepare(self) -> None:
        """Objective, compiler and optimizers, of what is trained from now on."""
        schedule, n = self.schedule, len(self.source)
        # The noise of the gradient vanishes where the guide is exact: what is below a hundredth of
        # a nat a unit is no reason to move, and must not be scaled up.
        eps = 0.01 / n
        # Settled, nothing is trained of clusters whose effects follow from the hyperparameters.
        batches = self.settled is None or (self.guide.nested() is None and n > self._most_rows())
        size = schedule.batch(n) if batches else n
        self.lazy = LazyAdam.of(self.guide, self.source, self.share.together(size), eps)
        guide = self.lazy.guide
        modules = {"model": self.model, "guide": guide}
        objective = self.share.averaged(
            Objective(self.model, guide), modules, len(self.model.adversaries)
        )
        self.objective = self.lazy.reading(objective)
        mode: CompileMode = "never" if self.share.several else self.compile
        rate = 1.0 if self.settled is None else self.pace.rate
        if self.settled is not None and not batches and n > self._most_rows():
            # The noise of some clusters' gradient is not to move the guide away from the mode.
            rate *= (self._most_rows() / (2 * n)) ** 0.5
        schedule = replace(schedule, learning_rate=rate * schedule.learning_rate)
        self.optimizers = Optimizers(self.model, self.lazy, schedule, eps)
        self.steps = Steps({"model": self.model, "guide": guide}, self.optimizers, mode)

    def _settle(self) -> None:
        """Hold the network, and bring the guide to the posterior given it."""
        if self.best:
            self._return_to(self.best)
        self.best = {}
        self.share.settle(self.seed, self.step)
        rows = self._hold_network()
        start_at_mode(self.model, self.guide, rows)
        wanted = 1
        if self.guide.nested() is not None and not self.filters:
            wanted = self.schedule.particles or particles_needed(self.model, self.guide, rows)
        self.history.particles = wanted
        self.history.settled = self.step
        self.plateau = self._new_plateau()
        self._prepare()
        self.good, self.good_loss = self._state(), math.inf

    def _hold_network(self) -> RowSource:
        """The rows as the network sees them from now on."""
        self.lazy.release()
        self.model.eval()
        # Effects inside the network make it run on, but not learn.
        self.held = [one for one in self.model.parameters() if one.requires_grad]
        self.model.requires_grad_(False)
        self.guide.train_hyperparameters_only()
        self.settled = self.share.compute(self.model.compute, self.source)
        self.share = self.share.ended(self.settled)
        return self.settled

    def _release(self) -> None:
        """The network as it is given back: for evaluation, its weights free again."""
        self.lazy.release()
        self.model.eval()
        for one in self.held:
            one.requires_grad_(True)

    def _validate(self, rows: Rows) -> float:
        self.model.eval()
        with torch.no_grad():
            counts = {name: len(one.index) for name, one in rows.memberships.items()}
            center = self.guide.center(self.model.clusters())
            latents = self.model.extend(center, counts, population=True)

            def log_prob(some: Rows) -> Tensor:
                return torch.stack([*log_likelihoods(self.model, some, latents).values()]).sum(0)

            mean = self.share.mean_over_rows(log_prob, rows)
        self.model.train()
        return -mean

    def _divergence(self, cause: str) -> TrainingDiverged:
        """The error to raise, after going back to the last good state."""
        cause += not_finite(self._state())
        self._return_to(self.best or self.good)
        self._release()
        self.stopped = "diverged"
        return TrainingDiverged(
            f"the loss diverged at step {self.step + 1}: {cause}. Try a lower learning rate "
            f"(now {self.schedule.learning_rate} for the guide, "
            f"{self.schedule.net_learning_rate} for the network), and look for extreme values "
            "in features and outcome. The error's `fit` attribute holds the last good state.",
            self.result(),
        )

    def _state(self) -> dict[str, Tensor]:
        return module_tensors("model", self.model) | module_tensors("guide", self.guide)

    def _return_to(self, state: dict[str, Tensor]) -> None:
        restore_module("model", self.model, state)
        restore_module("guide", self.guide, state)

    def save(self) -> Checkpoint:
        """Everything needed to go on as if nothing had happened."""
        tensors = self._state() | module_tensors("optimizers", self.optimizers) | self.lazy.state()
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        tensors["order"] = self.shuffle.order
        shape = len(self.iterates), self.guide.hyperparameters.size
        tensors["iterates"] = torch.tensor(np.array(self.iterates).reshape(shape))
        tensors["random"] = torch.get_rng_state()
        if self.source.like.is_cuda:
            tensors["random_cuda"] = torch.cuda.get_rng_state(self.source.like.device)
        record = {
            "run": self._identity(),
            "history": self.history.to_json(),
            "plateau": self.plateau.to_json(),
            "stopped": self.stopped,
        }
        return Checkpoint(tensors, record)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to a checkpoint of the same run."""
        tensors, record = checkpoint.tensors, checkpoint.record
        own = self._identity()
        changed = sorted(name for name in own if own[name] != record["run"].get(name))
        if changed:
            raise ValueError(
                f"the checkpoint belongs to another run (other {', '.join(changed)}): resume with "
                "the same data, model, schedule and seed, or delete the checkpoint"
            )
        self.history = History(**record["history"])
        self._return_to(tensors)
        if self.history.settled is not None:
            self._hold_network()
            self._prepare()
        self.good = self._state()
        restore_module("optimizers", self.optimizers, tensors)
        self.lazy.restore(tensors)
        self.iterates = list(tensors["iterates"].numpy())
        start = "best."
        self.best = {k[len(start) :]: v for k, v in tensors.items() if k.startswith(start)}
        self.shuffle.order = tensors["order"]
        torch.set_rng_state(tensors["random"])
        if "random_cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random_cuda"], self.source.like.device)
        self.plateau = Plateau.from_json(record["plateau"])
        self.stopped = record["stopped"]

    def _identity(self) -> dict[str, Any]:
        model, encoding = self.model, self.model.data_facts().to_json()
        shapes = {name: list(one.shape) for name, one in self._state().items()}
        return {
            "data": digest(self.source, encoding),
            "validation": self.validation and digest(self.validation, encoding),
            "terms": [str(term) for term in model.terms],
            "family": str(model.family),
            "adversary": [game.settings() for game in model.adversaries],
            "priors": repr(model.priors),
            "weights": [model.fixed_weight, repr(model.others)],
            "network or guide": shapes,
            "schedule": self.schedule.to_json(),
            "seed": self.seed,
            "processes": self.share.processes.size,
        }

    def result(self) -> Posterior:
        """The posterior as far as it is known."""
        return Posterior(
            self.model, self.guide, self.data, self.history, self.schedule, self.seed, self.stopped
        )
