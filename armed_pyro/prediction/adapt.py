"""Posterior of new clusters given a few labelled rows, without further training."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from armed_pyro._messages import check_probability, listing
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.data.grouping import Grouping
from armed_pyro.data.label_matching import match_labels, under_known_labels
from armed_pyro.data.own_means import joined_tables, with_joint_means
from armed_pyro.data.training_checks import PER_ROW
from armed_pyro.guides.base import selected
from armed_pyro.inference.posterior import Posterior
from armed_pyro.inference.psis import pareto_smooth, systematic
from armed_pyro.prediction.cell_draws import CellDraws
from armed_pyro.prediction.chunks import new_effects, predict_rows
from armed_pyro.prediction.new_clusters import condition
from armed_pyro.prediction.result import Prediction
from armed_pyro.prediction.unseen import EffectSource, Marginal, new_clusters
from armed_pyro.random_effects.covariance import Latents
from armed_pyro.random_effects.grouping_factor import Factor
from armed_pyro.rows.inputs import JoinedInputs

__all__ = ["Adapted", "adapt", "check_support_in", "encoded_support", "joined"]

# Importance weights are used up to this Pareto k-hat (Vehtari et al. 2024); above it they are
# dominated by a few draws.
K_HAT = 0.7
# With fewer draws no generalised Pareto tail can be fitted, and the raw weights are used.
FEWEST_SMOOTHED = 100


@dataclass(frozen=True, eq=False)
class Adapted:
    """A fit, and the posterior of clusters that it knows from labelled rows seen after training.

    Attributes
    ----------
    support : ClusteredData
        All labelled rows so far.
    latents : mapping of str to Tensor
        Joint posterior draws, resampled by the likelihood of the support. They include the new
        effects of seen clusters if `update_seen` is set.
    labels : mapping of str to pandas.Index
        The new clusters, by factor.
    effects : mapping of str to Float[Tensor, "draws new terms"]
        Their effects in standardised units, one draw for each of `latents`.
    quality : mapping of str to float
        ess and k_hat of the draws' weights; reweighted (1, or 0 if the weights were unreliable and
        the fit's draws were kept); efficiency, the lowest share of effective particles (1 for
        gaussian outcomes, where the posterior is exact).
    posterior, draws, seed, update_seen
        The arguments of `adapt`.

    Examples
    --------
    ``adapted: Adapted = fit.adapt(first_rows)``, then
    ``adapted.adapt(more_rows).predict(later_rows)``
    """

    posterior: Posterior
    support: ClusteredData
    latents: Latents
    labels: Mapping[str, pd.Index]
    effects: Mapping[str, Tensor]
    quality: Mapping[str, float]
    draws: int
    seed: int
    update_seen: bool

    def adapt(self, support: ClusteredData | pd.DataFrame) -> Adapted:
        """The posterior given these rows and all earlier ones, as if all had come at once."""
        rows = joined(self.posterior, self.support, self.posterior.encode(support))
        rows = with_joint_means(rows, self.posterior.model.data_facts().schema)
        rows = self.posterior.encode(replace(rows, cluster_means={}))
        settings: dict[str, Any] = {"draws": self.draws, "seed": self.seed}
        return adapt(self.posterior, rows, update_seen=self.update_seen, **settings)

    def predict(self, data: ClusteredData | pd.DataFrame, *, prob: float = 0.9) -> Prediction:
        """E[y] and y of new rows, in seen clusters, clusters of the support, and other clusters.

        Clusters without labelled rows are drawn from N(0, D), as in the mode "marginal";
        `Prediction.unseen` names the mode of every row.
        """
        rows, source = self.posterior.encode(data, self.support), self.source()
        settings: dict[str, Any] = {"draws": self.draws, "prob": prob, "seed": self.seed}
        made = predict_rows(self.posterior, rows, source, **settings)
        return replace(made, new=new_effects(self.posterior.model, source, rows))

    def source(self) -> EffectSource:
        """The source of the new clusters' effects."""
        marginal = Marginal(self.latents, self.seed)
        return AdaptedEffects.of(self.latents, self.labels, self.effects, marginal)

    def table(self, *, prob: float = 0.9) -> pd.DataFrame:
        """Effects of the new clusters on the original scale, one row per cluster and term.

        The columns are factor, cluster, rows (number of labelled rows), term, mean, sd, lower and
        upper.
        """
        check_probability(prob)
        records: list[tuple[Any, ...]] = []
        tail = (1 - prob) / 2
        for factor in self.posterior.model.factors:
            grouping = self.support.grouping(factor.name)
            counts = pd.Series(grouping.counts.numpy(), index=grouping.levels)
            matrix = factor.to_original.double()
            values = (self.effects[factor.name].double() @ matrix.mT).cpu().numpy()
            for i, label in enumerate(self.labels[factor.name]):
                for j, term in enumerate(factor.terms):
                    sample = values[:, i, j]
                    ends = np.quantile(sample, [tail, 1 - tail])
                    name = (factor.name, label, int(counts[label]), term)
                    records.append((*name, sample.mean(), sample.std(ddof=1), *ends))
        names = ["factor", "cluster", "rows", "term", "mean", "sd", "lower", "upper"]
        return pd.DataFrame(records, columns=names)


@dataclass(frozen=True, eq=False)
class AdaptedEffects(EffectSource):
    """Posterior effects of the adapted clusters, and marginal effects of all other new clusters."""

    latents: Latents
    labels: Mapping[str, pd.Index]
    known: Mapping[str, Tensor]
    others: Marginal
    cells: CellDraws

    @classmethod
    def of(
        cls,
        latents: Latents,
        labels: Mapping[str, pd.Index],
        known: Mapping[str, Tensor],
        others: Marginal,
    ) -> AdaptedEffects:
        """The source; new cells of processes are drawn given the known ones."""
        return cls(latents, labels, known, others, CellDraws(dict(labels), dict(known)))

    def effects(self, factor: Factor, labels: pd.Index) -> tuple[Tensor, list[str]]:
        if factor.process is not None:
            return self.cells.effects(factor, labels, self.latents, "marginal", self.others.seed)
        adapted = self.labels[factor.name]
        place = match_labels(labels, adapted, f"grouping factor {factor.name!r}")
        unknown = place < 0
        rest, _ = self.others.effects(factor, labels[unknown])
        both = rest.new_empty(len(rest), len(labels), rest.shape[-1])
        both[:, torch.as_tensor(unknown)] = rest
        both[:, torch.as_tensor(~unknown)] = self.known[factor.name][:, place[~unknown]]
        return both, np.where(unknown, "marginal", "adapt").tolist()


def adapt(
    posterior: Posterior,
    support: ClusteredData | pd.DataFrame,
    *,
    draws: int = 1000,
    seed: int | None = None,
    update_seen: bool = False,
) -> Adapted:
    r"""Posterior of new clusters' effects given labelled rows, without further training.

    .. math:: p(\theta, u_{new} \mid y, y_{new}) \propto
        p(\theta \mid y) \, p(y_{new} \mid \theta) \, p(u_{new} \mid y_{new}, \theta)

    where theta stands for all latent sites of the fit, including the effects of seen clusters. In
    every draw the conditional of the new clusters is exact (gaussian outcomes), or is found by
    Newton's method and corrected by particles. The draws are then resampled by the likelihood of
    the new rows. New clusters that share rows (a new school in a new district) have a joint
    posterior. Without rows the result is that of the mode "marginal", draw by draw.

    Parameters
    ----------
    support : ClusteredData or table
        Rows with outcomes, of clusters not seen in training. It may be empty.
    draws, seed : int
        Posterior draws, and their seed; by default that of the fit.
    update_seen : bool
        Whether the support may hold rows of clusters seen in training. Their effects are then drawn
        anew, given their training rows and the support.

    Raises
    ------
    ValueError
        If rows have no outcome, or if a row lies in seen clusters only and `update_seen` is False.

    Examples
    --------
    ``fit.adapt(rows_with_outcomes).predict(rows_to_come)``
    """
    model = posterior.model
    seed = posterior.seed if seed is None else seed
    support = encoded_support(posterior, support)
    _check(posterior, support, update_seen)
    latents: Latents = posterior.draws(draws, seed=seed)
    new = new_clusters(model, support)
    marginal = Marginal(latents, seed)
    effects: Latents = {f.name: marginal.effects(f, new[f.name])[0] for f in model.factors}
    quality = {"ess": float(draws), "k_hat": -np.inf, "reweighted": 1.0, "efficiency": 1.0}
    if support.n_rows and model.factors:
        options: dict[str, Any] = {"effects": effects, "update_seen": update_seen}
        made = condition(posterior, support, latents, seed, **options)
        latents, effects, quality["efficiency"] = made.latents, made.effects, made.efficiency
        index = _resampled(made.log_weights, seed, quality)
        if index is not None:
            latents = selected(latents, index)
            effects = {k: v[index] for k, v in effects.items()}
    return Adapted(posterior, support, latents, new, effects, quality, draws, seed, update_seen)


def encoded_support(posterior: Posterior, support: ClusteredData | pd.DataFrame) -> ClusteredData:
    """Labelled rows as `Posterior.encode` reads them; a table may be empty."""
    if isinstance(support, pd.DataFrame) and support.empty:
        support = posterior.data.take([])
    return posterior.encode(support)


def _check(posterior: Posterior, support: ClusteredData, update_seen: bool) -> None:
    """Check that the rows have outcomes, and do not lie in seen clusters only."""
    model, facts = posterior.model, posterior.model.data_facts()
    if support.outcome is None:
        raise ValueError(
            f"the support rows have no outcome {facts.outcome_name!r} in at least one of their "
            f"{support.n_rows} row(s): leave out the rows without an outcome"
        )
    if not support.n_rows or not model.factors:
        return
    model.family.check(support)
    is_new = np.zeros(support.n_rows, dtype=bool)
    for factor in model.factors:
        grouping = support.grouping(factor.name)
        seen, what = facts.levels[factor.name], f"grouping factor {factor.name!r}"
        new = match_labels(grouping.levels, seen, what) < 0
        if factor.process is not None:  # new times of a seen cluster are not new
            cells = factor.process.cells_of(grouping.levels)
            new = cells.cluster >= len(factor.process.cells.clusters)
        is_new |= new[grouping.codes.numpy()]
    if not update_seen and not is_new.all():
        first = model.factors[-1].name
        known = pd.unique(support.grouping(first).labels()[~is_new])
        raise ValueError(
            f"support is for new clusters, but {int((~is_new).sum())} of its rows are of clusters "
            f"that training saw: {listing(known, 5)} of {first!r}. If these are other clusters of "
            "the same name, rename them; if their new rows should update their effects, use "
            "Fit.adapt(support, update_seen=True)"
        )


def check_support_in(data: Mapping[str, pd.Index], support: Mapping[str, pd.Index]) -> None:
    """Raise ValueError if a new cluster of the support is not one of the data to predict."""
    for name, labels in support.items():
        what = f"grouping factor {name!r} of the support"
        missing = labels[match_labels(labels, data[name], what) < 0]
        if len(missing):
            raise ValueError(
                f"the support has {len(missing)} cluster(s) of {name!r} that are not in the "
                f"data to predict: {listing(missing, 5)}. Check the labels, leave these rows "
                "out of the support, or use Fit.adapt(support), which takes any cluster"
            )


def joined(posterior: Posterior, first: ClusteredData, second: ClusteredData) -> ClusteredData:
    """The rows of both data sets, those of the first one first.

    Raises ValueError if only one of them has outcomes, trials, offsets or weights.
    """
    if not first.n_rows or not second.n_rows:
        return first if first.n_rows else second
    both = (first, second)
    optional: dict[str, Any] = {}
    for role in ("outcome", *PER_ROW, "slopes"):
        pair = [getattr(data, role) for data in both]
        if (pair[0] is None) != (pair[1] is None):
            raise ValueError(f"one set of support rows has {role}, the other has none")
        optional[role] = None if pair[0] is None else torch.cat(pair)
    optional["fold"] = optional["inputs"] = None
    if first.inputs is not None and second.inputs is not None:
        optional["inputs"] = JoinedInputs.of(first.inputs, second.inputs)
    groupings = {}
    for name in dict.fromkeys([*first.groupings, *posterior.model.factor_names()]):
        left, right = first.grouping(name), second.grouping(name)
        levels = under_known_labels(right.levels, left.levels, f"grouping factor {name!r}")
        right = Grouping(right.codes, levels)
        labels = np.concatenate([left.labels().astype(object), right.labels().astype(object)])
        groupings[name] = Grouping.from_labels(pd.Series(labels).infer_objects(), name)
    return replace(
        first,
        features=torch.cat([data.features for data in both]),
        groupings=groupings,
        row_labels=first.row_labels.append(second.row_labels),
        table=joined_tables(first, second),
        cluster_means=second.cluster_means,
        **optional,
    )


def _resampled(log_weights: Tensor, seed: int, quality: dict[str, float]) -> Tensor | None:
    """Indices of draws, by systematic resampling; None if weights are equal or unreliable."""
    if log_weights.dim() == 0 or float(log_weights.max() - log_weights.min()) < 1e-9:
        return None
    if len(log_weights) < FEWEST_SMOOTHED:
        smoothed, k_hat = log_weights.log_softmax(0).numpy()[None], np.array([-np.inf])
    else:
        smoothed, k_hat = pareto_smooth(log_weights.numpy()[None])
    weights = np.exp(smoothed[0])
    quality["k_hat"], quality["ess"] = float(k_hat[0]), float(1 / np.sum(weights**2))
    if k_hat[0] > K_HAT or quality["ess"] < min(50, 0.1 * len(weights)):
        quality["reweighted"] = 0.0
        warnings.warn(
            "the support says more of the hyperparameters than importance weights of the fit's "
            f"{len(weights)} draws can express (k-hat {k_hat[0]:.2f}, effective draws "
            f"{quality['ess']:.0f}): the hyperparameters are kept as fitted, and only the new "
            "clusters' effects are adapted; fit again with these rows to update both",
            UserWarning,
            stacklevel=4,
        )
        return None
    uniform = np.random.default_rng([seed, 17]).random()
    return torch.as_tensor(systematic(weights, len(weights), uniform))
