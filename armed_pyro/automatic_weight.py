"""`WeightSearch`: the weight of an adversary, raised until a fresh probe reads nothing."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.engine.compiled_step import CompileMode
from armed_pyro.engine.schedule import Schedule
from armed_pyro.inference.probing import fresh_probe
from armed_pyro.inference.train import GuideFactory, progress_bar, train
from armed_pyro.networks.fresh_probe import FreshProbe
from armed_pyro.prediction.row_scores import row_scores
from armed_pyro.program.model import MixedEffects

__all__ = ["LEVELS", "WeightSearch", "with_weights"]

# Weights that are tried in this order. On digits with confounded sites, 5 cost 0.10 of the AUROC on
# new sites, and 25 cost 0.23.
LEVELS = (0.0, 0.3, 1.0, 3.0, 10.0)
# Share of the clusters whose predictions must not suffer, and of the other rows for stopping and
# probes.
SHARE = 0.25
# Number of clusters from which some of them are held out; otherwise rows are.
FEWEST_CLUSTERS = 8
# Posterior draws of a held-out log density.
DRAWS = 200


@dataclass(frozen=True, eq=False)
class _Parts:
    """Rows to train on, to stop by and to probe, and to measure the loss on."""

    training: ClusteredData
    stopping: ClusteredData
    judging: ClusteredData
    groups: Int[np.ndarray, " rows"]  # clusters of the rows that judge; or the rows themselves
    by: str  # "clusters" or "rows"

    @classmethod
    def of(cls, data: ClusteredData, factor: str, seed: int) -> _Parts:
        """Whole clusters judge; rows, if there are few clusters."""
        try:
            if data.grouping(factor).n_clusters < FEWEST_CLUSTERS:
                training, stopping = data.split_rows(SHARE, by=factor, seed=seed)
                return cls(training, stopping, stopping, np.arange(stopping.n_rows), "rows")
            rest, judging = data.hold_out_clusters(factor, fraction=SHARE, seed=seed)
            training, stopping = rest.split_rows(SHARE, by=factor, seed=seed)
        except ValueError as error:
            raise _cannot_choose(factor, str(error)) from error
        codes = judging.grouping(factor).codes.numpy()
        return cls(training, stopping, judging, codes, "clusters")


@dataclass(frozen=True, eq=False)
class _Tried:
    """Weights of the adversaries, with the held-out losses and the probes of a fit with them."""

    weights: Mapping[int, float]  # by the adversary's position
    probes: Mapping[int, FreshProbe]
    losses: Float[np.ndarray, " groups"]  # -log p(y) of a row, mean over each group

    def difference(self, admitted: Sequence[_Tried]) -> tuple[float, float]:
        """Mean difference of the losses to the best of the others, and its standard error."""
        if not admitted:
            return 0.0, 0.0
        best = min(admitted, key=lambda other: float(other.losses.mean()))
        differences = self.losses - best.losses
        return float(differences.mean()), float(differences.std(ddof=1) / len(differences) ** 0.5)

    def records(self, by: str, difference: float, error: float) -> list[dict[str, Any]]:
        """A record of each adversary, as JSON values."""
        return [
            {
                "adversary": place,
                "factor": probe.factor,
                "weight": self.weights[place],
                "accuracy": probe.accuracy,
                "se": probe.se,
                "chance": probe.chance,
                "held_out": by,
                "loss": float(self.losses.mean()),
                "loss_difference": difference,
                "loss_difference_se": error,
            }
            for place, probe in self.probes.items()
        ]

    def line(self) -> str:
        """The weights and their probes, for the progress bar."""
        parts = [
            f"{probe.factor} read at {probe.accuracy:.2f} (chance {probe.chance:.2f}) with weight "
            f"{self.weights[place]:g}"
            for place, probe in self.probes.items()
        ]
        return ", ".join([*parts, f"loss {self.losses.mean():.4f}"])

    def raised(self) -> dict[int, float]:
        """The next weights, where a probe reads the cluster and there is a larger weight."""
        reads = [place for place, probe in self.probes.items() if probe.reads]
        above = {
            place: [level for level in LEVELS if level > self.weights[place]] for place in reads
        }
        return {place: levels[0] for place, levels in above.items() if levels}


@dataclass(frozen=True, eq=False)
class WeightSearch:
    r"""The search for the weights of adversaries with ``weight="auto"``.

    For the weights 0, 0.3, 1, 3 and 10 in turn the program is fitted to a part of the rows. Fresh
    probes (`armed_pyro.networks.fresh_probe.FreshProbe`) then read the clusters from rows that did
    not train the network. An adversary whose probe is above chance by more than noise gets the next
    weight. The search ends when no probe is. It also ends when the loss on held-out clusters,

    .. math:: -\frac{1}{n} \sum_i \log p(y_i \mid x_i),

    exceeds the smallest loss before by more than the standard error of the difference over
    clusters. With fewer than 8 clusters, rows are held out in place of clusters.

    Of the weights whose loss is within a standard error of the smallest, and of these the weights
    whose probe is within a standard error of the lowest accuracy, the smallest is chosen. A weight
    that hides nothing is thus not paid for: 0 is chosen if no weight hides the cluster.

    Attributes
    ----------
    schedule, guide, device, compile, seed, progress
        As in `armed_pyro.fit`.

    Examples
    --------
    ``WeightSearch(schedule, guide, device).choose(model, data)``
    """

    schedule: Schedule | None
    guide: GuideFactory
    device: torch.device
    compile: CompileMode = "auto"
    seed: int = 0
    progress: bool = True

    def choose(
        self, model: MixedEffects, data: ClusteredData
    ) -> tuple[MixedEffects, list[dict[str, Any]]]:
        """A copy of the program with the chosen weights, and a record of every weight tried.

        A record has factor, weight, chosen, the probe's accuracy, se and chance, held_out ("rows"
        or "clusters"), loss, and its difference to the smallest loss before with a standard error.

        Raises
        ------
        ValueError
            If too few rows can be held out for a probe.
        """
        games = dict(enumerate(model.adversaries))
        weights = {place: LEVELS[0] for place, game in games.items() if game.weight == "auto"}
        parts = _Parts.of(data, games[min(weights)].factor, self.seed)
        admitted: list[_Tried] = []
        records: list[dict[str, Any]] = []
        with progress_bar("weighing", "weight", len(LEVELS), self.progress, fixed=False) as report:
            while weights:
                tried = self._try(model, weights, parts)
                difference, error = tried.difference(admitted)
                records += tried.records(parts.by, difference, error)
                report(1 + max(map(LEVELS.index, weights.values())), tried.line())
                if difference > error:
                    break
                admitted.append(tried)
                raised = tried.raised()
                weights = weights | raised if raised else {}
        chosen = _smallest(admitted).weights
        for record in records:
            record["chosen"] = record["weight"] == chosen[record["adversary"]]
        return with_weights(model, chosen), records

    def _try(self, model: MixedEffects, weights: Mapping[int, float], parts: _Parts) -> _Tried:
        """Fit the program with these weights, and judge it."""
        # The same initial weights of the classifiers every time.
        torch.manual_seed(self.seed)
        with warnings.catch_warnings():
            # The fit to all rows gives the same warnings, once.
            warnings.simplefilter("ignore")
            bound = with_weights(model, weights).bind(parts.training).to(self.device)
            posterior = train(
                bound,
                parts.training,
                validation=parts.stopping,
                schedule=self.schedule,
                guide=self.guide,
                refine=False,
                seed=self.seed,
                compile=self.compile,
                progress=False,
            )
        probes = dict(zip(weights, self._probes(bound, weights, parts), strict=True))
        losses = -row_scores(posterior, parts.judging, "marginal", draws=DRAWS).log_score
        rows = np.bincount(parts.groups)
        return _Tried(weights, probes, np.bincount(parts.groups, losses) / rows)

    def _probes(
        self, bound: MixedEffects, weights: Iterable[int], parts: _Parts
    ) -> Iterator[FreshProbe]:
        for place in weights:
            game = bound.adversaries[place]
            probe = fresh_probe(bound, game, parts.stopping, held_out=True, seed=self.seed)
            if probe is None:
                raise _cannot_choose(game.factor, "fewer than two clusters have two held-out rows")
            yield probe


def _smallest(tried: Sequence[_Tried]) -> _Tried:
    """The smallest weights with about the best loss and, among these, about the best probes."""
    admitted = []
    for weights in tried:
        difference, error = weights.difference(tried)
        admitted += [weights] if difference <= error else []
    bounds = {}
    for place in admitted[0].probes:
        best = min((t.probes[place] for t in admitted), key=lambda probe: probe.accuracy)
        bounds[place] = best.accuracy + best.se

    def reads_least(weights: _Tried) -> bool:
        return all(weights.probes[place].accuracy <= bound for place, bound in bounds.items())

    return next(filter(reads_least, admitted), admitted[-1])


def with_weights(model: MixedEffects, weights: Mapping[int, float]) -> MixedEffects:
    """A copy of the program whose adversaries at these positions have these weights."""
    copied = copy.deepcopy(model)
    for place, weight in weights.items():
        copied.adversaries[place].weight = weight
    return copied


def _cannot_choose(factor: str, reason: str) -> ValueError:
    return ValueError(
        f"the weight of the adversary of {factor!r} cannot be chosen automatically: {reason}. "
        "Give a number: Adversary(..., weight=1.0)"
    )
