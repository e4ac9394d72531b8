"""New clusters known from a few labelled rows: their posterior, without training anew."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from armed_pyro._messages import listing
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.data.grouping import Grouping, as_seen
from armed_pyro.guides.base import selected
from armed_pyro.inference.posterior import Posterior
from armed_pyro.inference.psis import pareto_smooth
from armed_pyro.prediction.chunks import new_effects, predict_chunks
from armed_pyro.prediction.new_clusters import condition
from armed_pyro.prediction.result import Prediction, Rebuilt
from armed_pyro.prediction.unseen import EffectSource, Marginal, new_clusters
from armed_pyro.random_effects.grouping_factor import Factor

__all__ = ["Adapted", "adapt", "check_support"]


Latents = Mapping[str, Tensor]
# Shape of the weights' tail up to which they are used; draws that a tail can be fitted to.
K_HAT, FEWEST_SMOOTHED = 0.7, 100


@dataclass(frozen=True, eq=False)
class Adapted:
    """A fit with the posterior of clusters that it learned of from labelled rows afterwards.

    Attributes
    ----------
    posterior : Posterior
        The fitted program.
    support : ClusteredData
        All labelled rows so far.
    latents : mapping of str to Tensor
        Joint posterior draws, reweighted by what the support says of the hyperparameters; seen
        clusters that were updated among them.
    labels : mapping of str to pandas.Index
        The new clusters, by factor.
    effects : mapping of str to Float[Tensor, "draws new terms"]
        Their effects in standardised units, one draw for each of `latents`.
    quality : mapping of str to float
        ess and k_hat of the draws' weights; reweighted (1, or 0 where the weights could not be
        relied upon and the draws are the fit's); efficiency, the lowest share of effective
        particles (1 for gaussian outcomes, where nothing is approximated).
    draws, seed, update_seen
        How it was made.

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
        """The posterior given these rows as well; the same as given all rows at once."""
        more = self.posterior.encode(support)
        return adapt(
            self.posterior,
            joined(self.posterior, self.support, more),
            draws=self.draws,
            seed=self.seed,
            update_seen=self.update_seen,
        )

    def predict(self, data: ClusteredData | pd.DataFrame, *, prob: float = 0.9) -> Prediction:
        """E[y] and y of new rows: of seen clusters, of those of the support, and of others.

        Clusters without labelled rows are drawn from N(0, D), as under "marginal", and rows say so.
        """
        rows, source = self.posterior.encode(data), self.source()
        settings: dict[str, Any] = {"draws": self.draws, "prob": prob, "seed": self.seed}
        parts = list(predict_chunks(self.posterior, rows, source, **settings))
        joint = [np.concatenate([getattr(part, name) for part in parts], 1)
                 for name in ("expected", "outcome")]  # fmt: skip
        return replace(
            parts[0],
            expected=joint[0],
            outcome=joint[1],
            unseen=np.concatenate([part.unseen for part in parts]),
            row_labels=rows.row_labels,
            new=new_effects(self.posterior.model, source, rows),
            others=Rebuilt.joined(parts),
        )

    def source(self) -> EffectSource:
        """Where new clusters get their effects from."""
        return _Posterior(
            self.latents, self.labels, self.effects, Marginal(self.latents, self.seed)
        )

    def table(self, *, prob: float = 0.9) -> pd.DataFrame:
        """Effects of the new clusters on the original scale.

        Returns
        -------
        pandas.DataFrame
            Columns factor, cluster, rows (labelled ones), term, mean, sd, lower, upper.
        """
        records: list[dict[str, Any]] = []
        tail = (1 - prob) / 2
        for factor in self.posterior.model.factors:
            grouping = self.support.grouping(factor.name)
            counts = pd.Series(grouping.counts.numpy(), index=grouping.levels)
            matrix = factor.to_original.double()
            values = (self.effects[factor.name].double() @ matrix.mT).cpu().numpy()
            lower, upper = np.quantile(values, [tail, 1 - tail], axis=0)
            for place, label in enumerate(self.labels[factor.name]):
                for t, term in enumerate(factor.terms):
                    one = values[:, place, t]
                    records.append(
                        {"factor": factor.name, "cluster": label, "rows": int(counts[label]),
                         "term": term, "mean": one.mean(), "sd": one.std(ddof=1),
                         "lower": lower[place, t], "upper": upper[place, t]}
                    )  # fmt: skip
        names = ["factor", "cluster", "rows", "term", "mean", "sd", "lower", "upper"]
        return pd.DataFrame(records, columns=names)


@dataclass(frozen=True, eq=False)
class _Posterior(EffectSource):
    """Effects of the adapted clusters; others are marginal."""

    latents: Latents
    labels: Mapping[str, pd.Index]
    known: Mapping[str, Tensor]
    others: Marginal

    def effects(self, factor: Factor, labels: pd.Index) -> tuple[Tensor, list[str]]:
        own = self.labels[factor.name]
        place = own.get_indexer(as_seen(labels, own)) if len(own) else np.full(len(labels), -1)
        unknown = place < 0
        rest, modes = self.others.effects(factor, labels[unknown])
        both = rest.new_empty(len(rest), len(labels), rest.shape[-1])
        both[:, torch.as_tensor(unknown)] = rest
        both[:, torch.as_tensor(~unknown)] = self.known[factor.name][:, place[~unknown]]
        names = iter(modes)
        return both, [next(names) if new else "adapt" for new in unknown]


def adapt(
    posterior: Posterior,
    support: ClusteredData | pd.DataFrame,
    *,
    draws: int = 1000,
    seed: int | None = None,
    update_seen: bool = False,
) -> Adapted:
    r"""Posterior of new clusters' effects given labelled rows, everything else as fitted.

    .. math:: p(\theta, u_{new} \mid y, y_{new}) \propto
        p(\theta \mid y) \, p(y_{new} \mid \theta) \, p(u_{new} \mid y_{new}, \theta)

    with theta all that the fit has draws of, effects of seen clusters among them. In every draw
    the new clusters' conditional is exact (gaussian outcomes), or found by Newton's method and
    corrected by particles; then the draws are resampled by the new rows' likelihood. New clusters
    that share rows (a new school in a new district) are known jointly. Without rows it is the mode
    "marginal", draw by draw.

    Parameters
    ----------
    posterior : Posterior
        The fitted program.
    support : ClusteredData or table
        Rows with outcomes, of clusters not seen in training; none is fine.
    draws : int
        Posterior draws.
    seed : int, optional
        Seed of the draws; the fit's own by default.
    update_seen : bool
        Whether rows of clusters seen in training are meant: their effects are then drawn anew given
        their training rows and these.

    Raises
    ------
    ValueError
        If rows have no outcome, or lie in seen clusters only and `update_seen` is not set.

    Examples
    --------
    ``fit.adapt(rows_with_outcomes).predict(rows_to_come)``
    """
    model, facts = posterior.model, posterior.model.data_facts()
    seed = posterior.seed if seed is None else seed
    if isinstance(support, pd.DataFrame) and support.empty:
        support = posterior.data.take([])
    support = posterior.encode(support)
    check_support(posterior, support, update_seen=update_seen)
    latents = dict(posterior.draws(draws, seed=seed))
    new = new_clusters(facts, model, support)
    marginal = Marginal(latents, seed)
    effects = {f.name: marginal.effects(f, new[f.name])[0].clone() for f in model.factors}
    quality = {"ess": float(draws), "k_hat": -np.inf, "reweighted": 1.0, "efficiency": 1.0}
    if support.n_rows and model.factors:
        weights = condition(posterior, support, latents, effects, new, seed, update_seen, quality)
        index = _resampled(weights, seed, quality)
        if index is not None:
            latents = selected(latents, index)
            effects = {k: v[index] for k, v in effects.items()}
    return Adapted(posterior, support, latents, new, effects, quality, draws, seed, update_seen)


def check_support(
    posterior: Posterior,
    support: ClusteredData,
    there: Mapping[str, pd.Index] | None = None,
    *,
    update_seen: bool = False,
) -> None:
    """Raise ValueError unless the rows have outcomes, of new clusters that the data have.

    Parameters
    ----------
    there : mapping of str to pandas.Index, optional
        New clusters among the rows to be predicted.
    """
    model, facts = posterior.model, posterior.model.data_facts()
    if support.outcome is None:
        raise ValueError(
            f"the support rows have no outcome {facts.outcome_name!r} in at least one of their "
            f"{support.n_rows} row(s): support is labelled rows; leave out those without one"
        )
    if not support.n_rows or not model.factors:
        return
    model.family.check(support)
    new = new_clusters(facts, model, support)
    is_new = np.zeros(support.n_rows, dtype=bool)
    for factor in model.factors:
        is_new |= pd.Index(
            as_seen(support.grouping(factor.name).levels, facts.levels[factor.name])
        ).isin(new[factor.name])[support.grouping(factor.name).codes.numpy()]
    if not update_seen and not is_new.all():
        first = model.factors[-1].name
        known = pd.unique(support.grouping(first).labels()[~is_new])
        raise ValueError(
            f"support is for new clusters, but {int((~is_new).sum())} of its rows are of clusters "
            f"that training saw: {listing(known, 5)} of {first!r}. If these are other clusters of "
            "the same name, rename them; if their new rows are to update what is known of them, "
            "use Fit.adapt(support, update_seen=True)"
        )
    if there is not None:
        for name, labels in new.items():
            missing = labels[~labels.isin(as_seen(there[name], labels))]
            if len(missing):
                raise ValueError(
                    f"the support has {len(missing)} cluster(s) of {name!r} that are not in the "
                    f"data to predict: {listing(missing, 5)}. Check the labels, leave these rows "
                    "out of the support, or use Fit.adapt(support), which takes any"
                )


def joined(posterior: Posterior, first: ClusteredData, second: ClusteredData) -> ClusteredData:
    """The rows of both."""
    if not first.n_rows or not second.n_rows:
        return first if first.n_rows else second
    both = (first, second)
    optional: dict[str, Any] = {}
    for role in ("outcome", "trials", "offset", "weights"):
        pair = [getattr(data, role) for data in both]
        if (pair[0] is None) != (pair[1] is None):
            raise ValueError(f"one set of support rows has {role}, another has none")
        optional[role] = None if pair[0] is None else torch.cat(pair)
    groupings = {}
    for name in dict.fromkeys([*first.groupings, *posterior.model.factor_names()]):
        one, two = first.grouping(name), second.grouping(name)
        two = Grouping(two.codes, as_seen(two.levels, one.levels))
        labels = np.concatenate([one.labels().astype(object), two.labels().astype(object)])
        groupings[name] = Grouping.from_labels(pd.Series(labels).infer_objects(), name)
    return replace(
        first,
        features=torch.cat([data.features for data in both]),
        groupings=groupings,
        row_labels=first.row_labels.append(second.row_labels),
        **optional,
    )


def _resampled(log_weights: Tensor, seed: int, quality: dict[str, float]) -> Tensor | None:
    """Draws by their weights; None where these are all equal or cannot be relied upon."""
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
            f"the support says more of the hyperparameters than the fit's {len(weights)} draws can "
            f"follow (k-hat {k_hat[0]:.2f}, effective draws {quality['ess']:.0f}): they are kept "
            "as fitted, and only the new clusters' effects are adapted; a new fit with these "
            "rows would use all they say",
            UserWarning,
            stacklevel=4,
        )
        return None
    edges = (np.arange(len(weights)) + np.random.default_rng([seed, 17]).random()) / len(weights)
    index = np.searchsorted(np.cumsum(weights), edges).clip(max=len(weights) - 1)
    return torch.as_tensor(index)
