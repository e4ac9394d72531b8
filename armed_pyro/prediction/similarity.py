"""Which seen cluster each new one resembles: pooled evidence, its certainty, and warnings."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from armed_pyro._messages import listing
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.inference.posterior import Posterior
from armed_pyro.prediction.cluster_classifier import Classifiers, ClusterClassifier
from armed_pyro.prediction.unseen import EffectSource, generator
from armed_pyro.random_effects.grouping_factor import Factor

__all__ = ["Evidence", "FactorEvidence", "Resembling", "gather", "merge", "warn_if_alien"]


Latents = Mapping[str, Tensor]
ALIEN = 0.01


@dataclass(frozen=True, eq=False)
class FactorEvidence:
    r"""Sums over the rows of each new cluster of one factor.

    .. math:: \log p(k \mid x_{1..n}) = \log \pi_k
        + \frac{1 + (n - 1) \rho}{n} \sum_i [\log p(k \mid x_i) - \log \pi_k] + const

    with rho the classifier's `pooling`: at 1 the rows are independent given the cluster.

    Attributes
    ----------
    classifier : ClusterClassifier
    labels : pandas.Index
        The new clusters.
    rows : Float[ndarray, "new"]
    log_ratio : Float[ndarray, "new clusters"]
        Sums of log p(k | x) - log pi_k.
    position : Float[ndarray, "new q"]
        Sums of the features, in the classifier's coordinates.

    Examples
    --------
    ``gather(fit, rows).factors["site"].probability()``
    """

    classifier: ClusterClassifier
    labels: pd.Index
    rows: Float[np.ndarray, " new"]
    log_ratio: Float[np.ndarray, "new clusters"]
    position: Float[np.ndarray, "new q"]

    def probability(self) -> Float[np.ndarray, "new clusters"]:
        """p(k | features of all rows of the cluster)."""
        one, n = self.classifier, self.rows[:, None]
        logits = self.log_ratio * (1 + (n - 1) * one.pooling) / n + one.log_prior.cpu().numpy()
        logits = logits - logits.max(1, keepdims=True)
        weights = np.exp(logits)
        return weights / weights.sum(1, keepdims=True)

    def distance(self) -> tuple[Float[np.ndarray, " new"], Float[np.ndarray, " new"]]:
        """Distance to the nearest seen cluster's centre, and how unusual that is (p-value).

        In within-cluster standard deviations (Mahalanobis), less what chance contributes. The
        p-value compares it with those of the seen clusters to their own nearest others, by a
        predictive t-test; it is at least 1 / (clusters + 1) unless all of them are nearer.
        """
        one = self.classifier
        centers, counts = one.centers.double().cpu().numpy(), one.counts.double().cpu().numpy()
        means = self.position / self.rows[:, None]
        new = _nearest(means, self.rows, centers, counts, exclude=False)
        seen = _nearest(centers, counts, centers, counts, exclude=True)
        k = len(seen)
        spread = np.sqrt(seen.var(ddof=1) * (1 + 1 / k) + 1 / self.rows)
        p_value = stats.t.sf((new - seen.mean()) / spread, k - 1)
        # Nearest distances have heavier tails than t: nothing is unusual that one cluster in k is.
        return new, np.where(new > seen.max(), p_value, np.maximum(p_value, 1 / (k + 1)))


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the features say of every new cluster, by factor.

    Examples
    --------
    ``gather(fit, rows).table()``
    """

    factors: Mapping[str, FactorEvidence]
    levels: Mapping[str, pd.Index]

    def table(self) -> pd.DataFrame:
        """One row for each new cluster.

        Returns
        -------
        pandas.DataFrame
            Columns factor, cluster, rows, nearest (the seen cluster with the highest probability),
            probability, entropy (in nats; 0 is certain), distance (to the nearest cluster's
            features, in standard deviations within clusters), p_value (of that distance), alien
            (p-value below 0.01: no seen cluster is like this one).
        """
        parts = []
        for name, one in self.factors.items():
            chance = one.probability()
            distance, p_value = one.distance()
            entropy = stats.entropy(chance, axis=1) if len(chance) else np.zeros(0)
            parts.append(
                pd.DataFrame(
                    {
                        "factor": name,
                        "cluster": one.labels.astype(object),
                        "rows": one.rows.astype(int),
                        "nearest": self.levels[name].astype(object)[chance.argmax(1)],
                        "probability": chance.max(1),
                        "entropy": entropy,
                        "distance": distance,
                        "p_value": p_value,
                        "alien": p_value < ALIEN,
                    }
                )
            )
        return pd.concat(parts, ignore_index=True)


@dataclass(frozen=True, eq=False)
class Resembling(EffectSource):
    r"""In every posterior draw the effects of a seen cluster, k ~ p(k | x): a mixture posterior.

    Attributes
    ----------
    seed : int
        The clusters drawn for a new one are made from this seed and its label.
    evidence : Evidence
    nearest : bool
        Whether k is the most probable cluster instead.

    Examples
    --------
    ``fit.predict(rows, unseen="membership")``
    """

    latents: Latents
    seed: int
    evidence: Evidence
    nearest: bool = False

    def effects(self, factor: Factor, labels: pd.Index) -> tuple[Tensor, list[str]]:
        seen = self.latents[factor.effect_site]
        draws, mode = len(seen), "nearest" if self.nearest else "membership"
        if not len(labels):
            return seen[:, :0], []
        one = self.evidence.factors[factor.name]
        chance = one.probability()[one.labels.get_indexer(labels)]
        if self.nearest:
            chosen = np.broadcast_to(chance.argmax(1)[:, None], (len(labels), draws))
        else:
            edges = np.cumsum(chance, 1)
            chosen = np.stack(
                [
                    np.searchsorted(
                        edge, generator(self.seed, factor.name, str(label)).random(draws)
                    )
                    for edge, label in zip(edges, labels, strict=True)
                ]
            ).clip(max=chance.shape[1] - 1)
        index = torch.as_tensor(chosen.copy(), device=seen.device).mT
        picked = index[..., None].expand(-1, -1, seen.shape[-1])
        return seen.gather(1, picked), [mode] * len(labels)


def gather(posterior: Posterior, data: ClusteredData, classifiers: Classifiers) -> Evidence:
    """Evidence of the features of these rows; classifiers that are missing are trained."""
    model, facts = posterior.model, posterior.model.data_facts()
    levels = facts.levels_with(data)
    source = model.encode(data, levels)
    found = {}
    for factor in model.factors:
        name, seen = factor.name, len(facts.levels[factor.name])
        labels = levels[name][seen:]
        index = (source.codes[name] >= seen).nonzero()[:, 0]
        if not len(labels):
            continue
        classifier = classifiers.of(posterior, name)
        codes, x = source.codes[name][index] - seen, source.x[index]
        ratio = classifier.log_prob(x) - classifier.log_prior
        position = classifier.position(x).double()

        def summed(values: Tensor, codes: Tensor = codes, n: int = len(labels)) -> np.ndarray:
            zero = values.new_zeros(n, values.shape[1])
            return zero.index_add(0, codes, values).cpu().numpy()

        rows = torch.bincount(codes, minlength=len(labels)).double().cpu().numpy()
        found[name] = FactorEvidence(classifier, labels, rows, summed(ratio), summed(position))
    return Evidence(found, {name: facts.levels[name] for name in found})


def merge(first: Evidence, second: Evidence) -> Evidence:
    """Evidence of both sets of rows."""
    factors = dict(first.factors)
    for name, two in second.factors.items():
        one = factors.get(name)
        if one is None:
            factors[name] = two
            continue
        labels = one.labels.append(two.labels[~two.labels.isin(one.labels)])
        places = labels.get_indexer(one.labels), labels.get_indexer(two.labels)

        def joined(
            a: np.ndarray,
            b: np.ndarray,
            places: tuple[np.ndarray, np.ndarray] = places,
            n: int = len(labels),
        ) -> np.ndarray:
            total = np.zeros((n, *a.shape[1:]))
            total[places[0]] += a
            total[places[1]] += b
            return total

        factors[name] = FactorEvidence(
            one.classifier,
            labels,
            joined(one.rows, two.rows),
            joined(one.log_ratio, two.log_ratio),
            joined(one.position, two.position),
        )
    return Evidence(factors, {**first.levels, **second.levels})


def warn_if_alien(table: pd.DataFrame) -> None:
    """Warn of new clusters whose features are like no seen cluster's."""
    for factor, rows in table[table["alien"]].groupby("factor"):
        warnings.warn(
            f"no cluster of {factor!r} seen in training has features like those of "
            f"{listing(rows['cluster'], 5)}: membership in one of them says little there; prefer "
            "'marginal', or 'adapt' with a few labelled rows",
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
    """Distance to the nearest centre (other than one's own), less its expectation under chance."""
    nearest = np.empty(len(means))
    for start in range(0, len(means), 256):  # "new clusters q" values would not always fit
        part = slice(start, start + 256)
        square = ((means[part, None] - centers) ** 2).sum(-1)
        square -= means.shape[1] * (1 / rows[part, None] + 1 / counts)
        if exclude:
            own = np.arange(len(means))[part]
            square[np.arange(len(own)), own] = np.inf
        nearest[part] = np.sqrt(np.maximum(square.min(1), 0))
    return nearest
