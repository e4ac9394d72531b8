"""Resemblance of new clusters to seen ones: pooled evidence, its certainty, and warnings."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import scipy
import torch
from jaxtyping import Float
from torch import Tensor

from armed_pyro._messages import listing
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.data.label_matching import label_text
from armed_pyro.inference.posterior import Posterior
from armed_pyro.prediction.cell_draws import CellDraws
from armed_pyro.prediction.cluster_classifier import Classifiers, ClusterClassifier
from armed_pyro.prediction.label_noise import generator
from armed_pyro.prediction.unseen import EffectSource
from armed_pyro.random_effects.covariance import Latents
from armed_pyro.random_effects.grouping_factor import Factor

__all__ = [
    "Evidence",
    "FactorEvidence",
    "Resembling",
    "evidence_table",
    "gather_evidence",
    "merge_evidence",
    "warn_if_alien",
]

# A new cluster is alien if the p-value of its distance to all seen clusters is below this.
ALIEN = 0.01


@dataclass(frozen=True, eq=False)
class FactorEvidence:
    r"""Evidence p(k | features) for each new cluster of a factor, as sums over its rows.

    .. math:: \log p(k \mid x_{1..n}) = \log \pi_k
        + \frac{1 + (n - 1) \rho}{n} \sum_i [\log p(k \mid x_i) - \log \pi_k] + const

    with rho the `pooling` of the classifier: at 1 the rows are independent given the cluster.
    """

    classifier: ClusterClassifier
    seen: pd.Index  # labels of the seen clusters
    labels: pd.Index  # labels of the new clusters
    rows: Float[np.ndarray, " new"]  # number of rows of each
    log_ratio: Float[np.ndarray, "new clusters"]  # sums of log p(k | x) - log pi_k
    position: Float[np.ndarray, "new q"]  # sums of features, in the classifier's coordinates

    def probability(self) -> Float[np.ndarray, "new clusters"]:
        """p(k | features of all rows of the cluster)."""
        n, log_prior = self.rows[:, None], self.classifier.log_prior.cpu().numpy()
        logits = self.log_ratio * (1 + (n - 1) * self.classifier.pooling) / n + log_prior
        return scipy.special.softmax(logits, 1)

    def distance(self) -> tuple[Float[np.ndarray, " new"], Float[np.ndarray, " new"]]:
        """Distance to the centre of the nearest seen cluster, and its p-value.

        The distance is in within-cluster standard deviations (Mahalanobis), corrected for sampling
        error of the centres. A predictive t-test compares it with the distances of the seen
        clusters to their nearest neighbours. The p-value is at least 1 / (clusters + 1) unless all
        of these are smaller.
        """
        centers = self.classifier.centers.double().cpu().numpy()
        counts = self.classifier.counts.double().cpu().numpy()
        means = self.position / self.rows[:, None]
        new = _nearest(means, self.rows, centers, counts, exclude=False)
        seen = _nearest(centers, counts, centers, counts, exclude=True)
        k = len(seen)
        spread = np.sqrt(seen.var(ddof=1) * (1 + 1 / k) + 1 / self.rows)
        p_value = scipy.stats.t.sf((new - seen.mean()) / spread, k - 1)
        # Nearest distances have heavier tails than t. Without the lower bound, a new cluster could
        # be called alien although a seen cluster is as far from its neighbours.
        return new, np.where(new > seen.max(), p_value, np.maximum(p_value, 1 / (k + 1)))


Evidence = Mapping[str, FactorEvidence]  # by factor; factors without new clusters are left out


def evidence_table(evidence: Evidence) -> pd.DataFrame:
    """Most probable seen cluster and its certainty, one row per new cluster.

    The columns are factor, cluster, rows, nearest (the seen cluster with the highest probability),
    probability, entropy (in nats; 0 is certain), distance (to the nearest seen cluster's features,
    in standard deviations within clusters), p_value (of that distance), and alien (p-value below
    0.01: the features resemble no seen cluster's).
    """
    parts = []
    for name, of_factor in evidence.items():
        chance = of_factor.probability()
        distance, p_value = of_factor.distance()
        columns = {
            "factor": name,
            "cluster": of_factor.labels.astype(object),
            "rows": of_factor.rows.astype(int),
            "nearest": of_factor.seen.astype(object)[chance.argmax(1)],
            "probability": chance.max(1),
            "entropy": scipy.stats.entropy(chance, axis=1),
            "distance": distance,
            "p_value": p_value,
            "alien": p_value < ALIEN,
        }
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


@dataclass(frozen=True, eq=False)
class Resembling(EffectSource):
    """u = u_k of the same posterior draw, with a seen cluster k drawn from p(k | x)."""

    latents: Latents
    seed: int  # the clusters k of a new cluster are drawn from this seed and its label
    evidence: Evidence
    nearest: bool = False  # whether k is always the most probable cluster
    _cells: CellDraws = field(default_factory=CellDraws, repr=False)

    def effects(self, factor: Factor, labels: pd.Index) -> tuple[Tensor, list[str]]:
        seen = self.latents[factor.effect_site]
        draws, mode = len(seen), "nearest" if self.nearest else "membership"
        if factor.process is not None:  # a path from the prior
            return self._cells.effects(factor, labels, self.latents, mode, self.seed)
        if not len(labels):
            return seen[:, :0], []
        evidence = self.evidence[factor.name]
        chance = evidence.probability()[evidence.labels.get_indexer(labels)]
        if self.nearest:
            chosen = np.broadcast_to(chance.argmax(1)[:, None], (len(labels), draws))
        else:
            places = []
            for edges, label in zip(np.cumsum(chance, 1), labels, strict=True):
                uniform = generator(self.seed, factor.name, label_text(label)).random(draws)
                places.append(np.searchsorted(edges, uniform))
            chosen = np.stack(places).clip(max=chance.shape[1] - 1)
        index = torch.as_tensor(chosen.copy(), device=seen.device).mT
        picked = index[..., None].expand(-1, -1, seen.shape[-1])
        return seen.gather(1, picked), [mode] * len(labels)


def gather_evidence(
    posterior: Posterior, data: ClusteredData, classifiers: Classifiers
) -> Evidence:
    """Evidence of the features of these rows; a missing classifier is trained."""
    model, facts = posterior.model, posterior.model.data_facts()
    levels = facts.levels_with(data)
    source = model.encode(data, levels)
    by_factor = {}
    for factor in model.factors:
        if factor.process is not None:
            continue  # new times are no clusters that could resemble others
        name, seen = factor.name, len(facts.levels[factor.name])
        labels = levels[name][seen:]
        index = (source.codes[name] >= seen).nonzero()[:, 0]
        if not len(labels):
            continue
        classifier = classifiers.of(posterior, name)
        codes, x = source.codes[name][index] - seen, source.x[index]
        rows = torch.bincount(codes, minlength=len(labels)).double().cpu().numpy()
        by_row = (classifier.log_prob(x) - classifier.log_prior, classifier.position(x).double())
        sums = [
            values.new_zeros(len(labels), values.shape[1]).index_add(0, codes, values).cpu().numpy()
            for values in by_row
        ]
        by_factor[name] = FactorEvidence(classifier, facts.levels[name], labels, rows, *sums)
    return by_factor


def merge_evidence(first: Evidence, second: Evidence) -> Evidence:
    """Evidence of both sets of rows together."""
    added = {name: _added(first[name], second[name]) for name in first.keys() & second.keys()}
    return {**first, **second, **added}


def _added(left: FactorEvidence, right: FactorEvidence) -> FactorEvidence:
    labels = left.labels.append(right.labels[~right.labels.isin(left.labels)])
    sums = []
    for name in ("rows", "log_ratio", "position"):
        a, b = getattr(left, name), getattr(right, name)
        total = np.zeros((len(labels), *a.shape[1:]))
        total[: len(a)] += a
        total[labels.get_indexer(right.labels)] += b
        sums.append(total)
    return FactorEvidence(left.classifier, left.seen, labels, *sums)


def warn_if_alien(table: pd.DataFrame) -> None:
    """Warn of new clusters in `evidence_table` whose features resemble no seen cluster's."""
    for factor, rows in table[table["alien"]].groupby("factor"):
        warnings.warn(
            f"no cluster of {factor!r} seen in training has features like those of "
            f"{listing(rows['cluster'], 5)}: a seen cluster's effects are a poor guess there; "
            "prefer 'marginal', or 'adapt' with a few labelled rows",
            UserWarning,
            stacklevel=4,
        )


def _nearest(
    means: Float[np.ndarray, "new q"],
    rows: Float[np.ndarray, " new"],
    centers: Float[np.ndarray, "clusters q"],
    counts: Float[np.ndarray, " clusters"],
    *,
    exclude: bool,
) -> Float[np.ndarray, " new"]:
    """Distance to the nearest centre, or nearest other centre, corrected for sampling error."""
    nearest = np.empty(len(means))
    for start in range(0, len(means), 256):  # all "new clusters q" at once may not fit in memory
        part = slice(start, start + 256)
        square = ((means[part, None] - centers) ** 2).sum(-1)
        square -= means.shape[1] * (1 / rows[part, None] + 1 / counts)
        if exclude:
            same = np.arange(len(means))[part]
            square[np.arange(len(same)), same] = np.inf
        nearest[part] = np.sqrt(np.maximum(square.min(1), 0))
    return nearest
