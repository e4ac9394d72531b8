"""One training run: steps, stopping, the last good state, and going on from a checkpoint."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from armed_pyro.checkpoint import (
    Checkpoint,
    module_tensors,
    optimizer_tensors,
    restore_module,
    restore_optimizer,
)
from armed_pyro.data import ClusteredData
from armed_pyro.fitted import Fit
from armed_pyro.guides import Guide
from armed_pyro.objective import Loss, Objective
from armed_pyro.program import MixedEffects
from armed_pyro.rows import Rows, RowSource
from armed_pyro.schedule import History, Plateau, Schedule

__all__ = ["DivergenceError", "Run"]


class DivergenceError(RuntimeError):
    """The loss or its gradient is no longer finite, or has run away.

    Attributes
    ----------
    fit : Fit
        The fit at the start of the window of steps with the lowest mean loss.

    Examples
    --------
    >>> def fitted_or_last_good_state(model, data):
    ...     try:
    ...         return fit(model, data)
    ...     except DivergenceError as error:
    ...         return error.fit
    """

    def __init__(self, message: str, fit: Fit) -> None:
        super().__init__(message)
        self.fit = fit


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
    ) -> None:
        self.model, self.guide, self.data, self.source = model, guide, data, source
        self.validation, self.schedule, self.seed = validation, schedule, seed
        self.objective = Objective(model, guide)
        guided, trained = list(guide.parameters()), list(model.parameters())
        self.optimizer = torch.optim.Adam(
            [
                # The noise of the gradient vanishes where the guide is exact: what is below a
                # hundredth of a nat a unit is no reason to move, and must not be scaled up.
                {"params": guided, "base": schedule.learning_rate, "eps": 0.01 / len(source)},
                {"params": trained, "base": schedule.net_learning_rate},
            ],
            lr=schedule.learning_rate,
            betas=(0.9, 0.99),
            fused=True,
        )
        self.plateau = self._new_plateau()
        # Whether the network is settled by validation, and only the guide still moves.
        self.settling = False
        self.history = History()
        self.order = torch.empty(0, dtype=torch.long)
        self.best: dict[str, Tensor] = {}
        # Where to return to from divergence: a state, and the mean loss of the window after it.
        self.good, self.good_loss = self._state(), math.inf
        self.stopped = ""

    @property
    def step(self) -> int:
        """Steps taken."""
        return len(self.history.loss)

    def train(self, path: Path | None, report: Callable[[int, str], None]) -> None:
        """Take steps until convergence or until they run out."""
        window = self.schedule.window_steps(len(self.source))
        while not self.stopped:
            self.model.train(not self.settling)
            count = min(window, self.schedule.steps - self.step)
            before = self._state()
            losses = [self._step() for _ in range(count)]
            self._close_window(losses)
            mean = float(np.mean(self.history.loss[-count:]))
            if mean < self.good_loss:
                self.good, self.good_loss = before, mean
            report(self.step, self._status())
            if path is not None:
                self.save().write(path)
        if self.best:
            self._return_to(self.best)
        self.model.eval()

    def _step(self) -> Loss:
        rate = self.schedule.rate(self.step) * self.schedule.decay**self.plateau.cuts
        guided, trained = self.optimizer.param_groups
        guided["lr"] = rate * guided["base"]
        trained["lr"] = 0.0 if self.settling else rate * trained["base"]
        try:
            loss = self.objective(self._next_batch(), self.step / self.schedule.steps)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            cause = f"a covariance matrix is degenerate{self._not_finite()}"
            raise self._divergence(cause) from error
        if not torch.isfinite(loss.total):
            raise self._divergence(self._blame(loss))
        self.optimizer.zero_grad(set_to_none=True)
        loss.total.backward()
        for group in self.optimizer.param_groups:
            # Apart, so that a strong adversary does not slow the guide down.
            norm = torch.nn.utils.clip_grad_norm_(group["params"], self.schedule.clip)
            if not torch.isfinite(norm):
                raise self._divergence("its gradient is not finite")
        self.optimizer.step()
        self.history.loss.append(float(loss.total.detach()))
        self.history.elbo.append(float(loss.elbo))
        first, last = self.history.loss[0], self.history.loss[-1]
        if last > first + 1e4 * (1 + abs(first)):
            raise self._divergence(f"it grew from {first:.4g} to {last:.4g}")
        return loss

    def _next_batch(self) -> Rows:
        size, n = self.schedule.batch(len(self.source)), len(self.source)
        if size == n:
            return self.source.all()
        if len(self.order) < size:
            # A fresh shuffle; the few rows left over would make a batch of another size.
            self.order = torch.randperm(n)
        index, self.order = self.order[:size], self.order[size:]
        dense = len(self.source) if self.guide.every_cluster() else None
        return self.source.batch(index.to(self.source.x.device), dense_up_to=dense)

    def _close_window(self, losses: list[Loss]) -> None:
        self.history.step.append(self.step)
        self.history.rate.append(self.optimizer.param_groups[0]["lr"] / self.schedule.learning_rate)
        accuracy = torch.stack([loss.accuracy for loss in losses]).mean(0)
        self.history.adversary_accuracy.append(accuracy.tolist())
        if self.validation is not None:
            self.history.validation.append(self._validate(self.validation))
        if self.validation is None or self.settling:
            self.plateau.training(np.array(self.history.loss[-len(losses) :]))
        else:
            value = self.history.validation[-1]
            best, cut = self.plateau.validation(value)
            if best:
                self.best = self._state()
            elif cut and self.best:
                self._return_to(self.best)
        if self.plateau.cuts == 0 and self.schedule.rate(self.step) == 1:
            # Later, at falling rates, the guide is left to settle.
            self.guide.refresh(self.model, self.source)
        if self.schedule.stages and self.plateau.cuts >= self.schedule.stages:
            if self.validation is not None and not self.settling:
                self._settle()
            else:
                self.stopped = "validation" if self.settling else "converged"
        elif self.step >= self.schedule.steps:
            self.stopped = "steps"

    def _new_plateau(self) -> Plateau:
        # A hundredth of a nat a window is beyond what any posterior summary can show.
        return Plateau(tolerance=0.01 / len(self.source), patience=self.schedule.patience)

    def _settle(self) -> None:
        """Hold the network at its best; a guide stopped with it would not be a posterior yet."""
        if self.best:
            self._return_to(self.best)
        self.best, self.settling, self.plateau = {}, True, self._new_plateau()
        self.guide.refresh(self.model, self.source)

    def _validate(self, rows: Rows) -> float:
        self.model.eval()
        with torch.no_grad():
            latents = self.guide.center(self.model.clusters())
            counts = {name: len(one.index) for name, one in rows.memberships.items()}
            latents = self.model.extend(latents, counts, population=True)
            log_prob = self.model.log_likelihood(rows, latents).mean()
        self.model.train()
        return -float(log_prob)

    def _divergence(self, cause: str) -> DivergenceError:
        """The error to raise, after going back to the last good state."""
        self._return_to(self.best or self.good)
        self.model.eval()
        self.stopped = "diverged"
        return DivergenceError(
            f"the loss diverged at step {self.step + 1}: {cause}. Try a lower learning rate "
            f"(now {self.schedule.learning_rate} for the guide, "
            f"{self.schedule.net_learning_rate} for the network), and look for extreme values "
            "in features and outcome. The error's `fit` attribute holds the last good state.",
            self.result(),
        )

    def _blame(self, loss: Loss) -> str:
        parts = {
            "the evidence lower bound": loss.elbo,
            "the likelihood under fixed effects alone": loss.fixed,
            "the adversaries' cross-entropy": loss.game,
        }
        bad = [name for name, value in parts.items() if not math.isfinite(float(value))]
        return f"{' and '.join(bad) or 'the total'} is not finite{self._not_finite()}"

    def _not_finite(self) -> str:
        bad = [name for name, one in self._state().items() if not torch.isfinite(one).all()]
        return f"; parameters not finite: {', '.join(bad[:3])}" if bad else ""

    def _status(self) -> str:
        text = f"loss {np.mean(self.history.loss[-50:]):.4f}"
        if self.history.validation:
            text += f", validation {self.history.validation[-1]:.4f}"
        for game, accuracy in zip(
            self.model.adversaries, self.history.adversary_accuracy[-1], strict=True
        ):
            counts = self.source.counts[game.factor]
            chance = float(counts.max() / counts.sum())
            text += f", adversary of {game.factor} {accuracy:.2f} (chance {chance:.2f})"
        return text

    def _state(self) -> dict[str, Tensor]:
        return module_tensors("model", self.model) | module_tensors("guide", self.guide)

    def _return_to(self, state: dict[str, Tensor]) -> None:
        restore_module("model", self.model, state)
        restore_module("guide", self.guide, state)

    def save(self) -> Checkpoint:
        """Everything needed to go on as if nothing had happened."""
        tensors = self._state() | optimizer_tensors(self.optimizer)
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        tensors["order"] = self.order
        tensors["random"] = torch.get_rng_state()
        if self.source.x.is_cuda:
            tensors["random_cuda"] = torch.cuda.get_rng_state(self.source.x.device)
        record = {
            "run": self._identity(),
            "history": self.history.to_json(),
            "plateau": self.plateau.to_json(),
            "settling": self.settling,
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
        self._return_to(tensors)
        self.good = self._state()
        restore_optimizer(self.optimizer, tensors)
        start = "best."
        self.best = {k[len(start) :]: v for k, v in tensors.items() if k.startswith(start)}
        self.order = tensors["order"]
        torch.set_rng_state(tensors["random"])
        if "random_cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random_cuda"], self.source.x.device)
        self.history = History(**record["history"])
        self.plateau = Plateau.from_json(record["plateau"])
        self.settling, self.stopped = record["settling"], record["stopped"]

    def _identity(self) -> dict[str, Any]:
        model = self.model
        shapes = {name: list(one.shape) for name, one in self._state().items()}
        return {
            "data": _digest(self.source.all(), model),
            "validation": None if self.validation is None else _digest(self.validation, model),
            "terms": [str(term) for term in model.terms],
            "family": model.family.name,
            "adversary": [game.settings() for game in model.adversaries],
            "priors": repr(model.priors),
            "fixed_weight": model.fixed_weight,
            "network or guide": shapes,
            "schedule": self.schedule.to_json(),
            "seed": self.seed,
        }

    def result(self) -> Fit:
        """The fit in its present state."""
        return Fit(
            self.model, self.guide, self.data, self.history, self.schedule, self.seed, self.stopped
        )


def _digest(rows: Rows, model: MixedEffects) -> str:
    """Hash of rows, with the scales and labels they were encoded by."""
    facts = json.dumps(model.data_facts().to_json(), default=str)
    digest = hashlib.sha256(facts.encode())
    codes = [one.position for one in rows.memberships.values()]
    for one in (rows.x, rows.y, rows.trials, rows.offset, rows.weights, *codes):
        digest.update(b"none" if one is None else one.double().cpu().numpy().tobytes())
    return digest.hexdigest()
