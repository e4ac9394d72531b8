"""Cluster invariance: whether probes can predict the cluster from the learned features."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from armed_pyro._messages import listing
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.inference.posterior import Posterior
from armed_pyro.networks.taps import head_path
from armed_pyro.program.activations import activations
from armed_pyro.program.model import MixedEffects

Codes = Int[np.ndarray, " rows"]
# Rows for the probes, at most.
MOST_ROWS = 5000
# Outcomes with more than FEW distinct values are cut into BINS groups of similar outcomes.
FEW, BINS = 10, 10


# scikit-learn is imported where it is used, as it is slow to import.
def _probe(name: str, seed: int) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier

    if name == "linear":
        return LogisticRegression(max_iter=1000)
    return MLPClassifier((32,), solver="lbfgs", alpha=1.0, max_iter=200, random_state=seed)


@dataclass(frozen=True, eq=False)
class Invariance:
    """Accuracy with which probes predict the clusters of a factor from a network's features.

    Attributes
    ----------
    factor : str
        The grouping factor.
    table : pandas.DataFrame
        One row per layer and probe (linear, network): layer, probe, accuracy (cross-validated),
        chance (mean accuracy for permuted clusters), p; chance_within and p_within, for clusters
        permuted among rows of similar outcome (NaN without outcomes); p_leak, the larger p-value.
    clustering : pandas.DataFrame
        One row per layer and labelling ("cluster", "outcome"): layer, by, davies_bouldin,
        calinski_harabasz. Features that do not separate the labels have a large Davies-Bouldin
        and a small Calinski-Harabasz index.

    Examples
    --------
    >>> from torch import nn
    >>> from armed_pyro import Invariance, MixedEffects, Schedule, fit
    >>> from armed_pyro.families.simulate import mixed_model
    >>> data, _ = mixed_model()
    >>> model = MixedEffects(nn.Linear(1, 1), "(1 | site)", bayesian_head=True)
    >>> result = fit(model, data, schedule=Schedule(steps=20), refine=False, progress=False)
    >>> probed: Invariance = result.invariance(permutations=99)  # the last layer's input is x
    >>> bool((probed.table["p_leak"] > 0.05).all())
    True
    """

    factor: str
    table: pd.DataFrame
    clustering: pd.DataFrame

    def __str__(self) -> str:
        def show(frame: pd.DataFrame) -> str:
            return frame.to_string(index=False, float_format=lambda value: f"{value:.3g}")

        return (
            f"Can {self.factor} be read from the features?\n{show(self.table)}\n"
            f"How far do labels separate the features?\n{show(self.clustering)}"
        )


def invariance(
    posterior: Posterior,
    data: ClusteredData | pd.DataFrame | None = None,
    *,
    factor: str | None = None,
    layers: Sequence[str] | None = None,
    folds: int = 2,
    permutations: int = 999,
    seed: int | None = None,
) -> Invariance:
    """Accuracy of probes that predict the cluster from the learned features, against chance.

    A linear probe (logistic regression) and a small network (32 units) are trained on each layer's
    standardised activations, independently of the fit's adversary, and are scored on held-out
    rows. The null hypothesis of ``p`` is that clusters and activations are independent. The null
    hypothesis of ``p_within`` is that they are independent given the outcome. Neither test alone
    shows a leak: if outcomes differ between clusters, features that predict the outcome also
    predict the cluster; and features that are independent of the cluster depend on it given the
    outcome, if both affect the outcome. The null hypothesis of ``p_leak`` is that one of the two
    holds.

    In each fold the clusters of the held-out rows are permuted and compared with the probe's
    predictions, which gives an exact test. For ``p_within`` they are permuted among rows of one
    class, or of one tenth of a continuous outcome. The p-value is m times the smallest of the m
    folds (Bonferroni), at least m / (permutations + 1). Two folds therefore have the highest power;
    more folds leave more rows for training.

    The rows of `data` may be of seen or unseen clusters; by default they are the training rows. Of
    more than 5,000, a random sample of 5,000 is used. The factor is by default that of the
    adversary or, without one, of the random effects. `layers` are module paths, by default the
    adversary's taps or, without one, the input of the last linear layer; feature maps are averaged
    over space. The default seed, of folds (stratified by cluster), probes and permutations, is that
    of the fit.

    Raises
    ------
    ValueError
        If there is no such layer or factor, there is a single cluster, or a cluster has fewer rows
        than there are folds.

    References
    ----------
    Nguyen, Treacher, Montillo (2023), IEEE TPAMI 45(7), for the two indices: Davies
    and Bouldin (1979); Caliński and Harabasz (1974).
    Ojala and Garriga (2010), "Permutation tests for studying classifier performance", JMLR 11.
    """
    model, seed = posterior.model, posterior.seed if seed is None else seed
    rows = posterior.data if data is None else posterior.encode(data)
    if permutations < 1:
        raise ValueError(f"`permutations` must be at least 1, not {permutations}")
    if rows.n_rows > MOST_ROWS:
        chosen = np.random.default_rng([seed, 19]).permutation(rows.n_rows)[:MOST_ROWS]
        rows = rows.take(np.sort(chosen))
    factor = _factor(model, factor, rows)
    codes = rows.grouping(factor).codes.numpy()
    _check_clusters(rows, factor, folds)
    alike = _strata(rows)
    labels, groups = {"cluster": codes}, {"": np.zeros_like(codes)}
    if alike is not None:
        labels["outcome"] = groups["_within"] = alike
    settings = {"folds": folds, "permutations": permutations, "seed": seed}
    tests, indices = [], []
    for layer, features in activations(model, rows, _layers(model, factor, layers)).items():
        for name in ("linear", "network"):
            scores = permutation_test(_probe(name, seed), features, codes, groups, **settings)
            # fmax ignores a p_within of NaN.
            leak = float(np.fmax(scores["p"], scores["p_within"]))
            tests.append({"layer": layer, "probe": name} | scores | {"p_leak": leak})
        for by, label in labels.items():
            indices.append({"layer": layer, "by": by} | _indices(features, label))
    return Invariance(factor, pd.DataFrame(tests), pd.DataFrame(indices))


def _factor(model: MixedEffects, factor: str | None, data: ClusteredData) -> str:
    """The factor asked for; by default that of the adversary, random effects or data."""
    adversarial = [adversary.factor for adversary in model.adversaries]
    known = [*adversarial, *model.grouping_names(), *data.groupings]
    if factor is None and not known:
        raise ValueError("the data have no grouping factor whose clusters could be predicted")
    return known[0] if factor is None else factor


def _layers(model: MixedEffects, factor: str, layers: Sequence[str] | None) -> tuple[str, ...]:
    """The layers asked for; by default the adversary's taps, or the input of the last layer."""
    if layers is not None:
        if isinstance(layers, str) or not layers:
            raise ValueError(f"`layers` is a list of at least one module path, not {layers!r}")
        return tuple(layers)
    taps = [path for a in model.adversaries if a.factor == factor for path in a.taps]
    return tuple(dict.fromkeys(taps)) or (f"<{head_path(model.network)}",)


def _check_clusters(data: ClusteredData, factor: str, folds: int) -> None:
    grouping = data.grouping(factor)
    if folds < 2:
        raise ValueError(f"`folds` must be at least 2, not {folds}")
    if grouping.n_clusters < 2:
        raise ValueError(
            f"the rows are all of one cluster of {factor!r}: give rows of at least two clusters"
        )
    small = grouping.levels[(grouping.counts < folds).numpy()]
    if len(small):
        raise ValueError(
            f"cluster(s) of {factor!r} with fewer rows than the {folds} folds: {listing(small)}; "
            "leave them out, or ask for fewer folds"
        )


def _strata(data: ClusteredData) -> Codes | None:
    """Groups of rows with similar outcome: its classes or its tenths."""
    outcome = data.outcome
    if outcome is None or outcome.dim() > 1:
        return None
    values, codes = np.unique(outcome.numpy(), return_inverse=True)
    if data.classes is not None or len(values) <= FEW:
        return codes
    return pd.qcut(outcome.numpy(), BINS, labels=False, duplicates="drop")


def permutation_test(
    probe: Any,
    features: Float[np.ndarray, "rows width"],
    codes: Codes,
    groups: Mapping[str, Codes],
    *,
    folds: int,
    permutations: int,
    seed: int,
) -> dict[str, float]:
    """Cross-validated accuracy of a probe of clusters, its mean under permutation, and p-values.

    `groups` are groups of rows whose clusters are exchangeable, by suffix of the null hypothesis.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rng, scores = np.random.default_rng([seed, 23]), {"accuracy": 0.0}
    for name in ("", "_within"):
        tested = name in groups
        scores |= {f"chance{name}": 0.0 if tested else np.nan}
        scores |= {f"p{name}": 1.0 if tested else np.nan}
    # Stratified by cluster only, so that the split could have produced every permutation of the
    # held-out clusters. Strata of cluster and outcome would fix how often the two coincide.
    split = StratifiedKFold(folds, shuffle=True, random_state=seed)
    for train, held in split.split(features, codes):
        with warnings.catch_warnings():
            # A probe that has not fully converged is still a valid one.
            warnings.simplefilter("ignore", ConvergenceWarning)
            trained = make_pipeline(StandardScaler(), probe).fit(features[train], codes[train])
        predicted, truth = trained.predict(features[held]), codes[held]
        hits = float((predicted == truth).sum())
        scores["accuracy"] += hits / len(codes)
        for name, alike in groups.items():
            drawn = (_permuted(rng, truth, alike[held]) for _ in range(permutations))
            by_chance = np.array([(predicted == clusters).sum() for clusters in drawn])
            scores[f"chance{name}"] += float(by_chance.mean()) / len(codes)
            p = (1 + float((by_chance >= hits).sum())) / (permutations + 1)
            scores[f"p{name}"] = min(scores[f"p{name}"], folds * p)
    return scores


def _permuted(rng: np.random.Generator, codes: Codes, groups: Codes) -> Codes:
    """Clusters permuted among the rows of each group."""
    shuffled = np.empty_like(codes)
    # Both sides are sorted by group; the right one is in random order within each group.
    random_order = np.lexsort((rng.permutation(len(codes)), groups))
    shuffled[np.argsort(groups, kind="stable")] = codes[random_order]
    return shuffled


def _indices(features: Float[np.ndarray, "rows width"], labels: Codes) -> dict[str, float]:
    """Davies-Bouldin and Calinski-Harabasz index; NaN if features or labels do not vary."""
    from sklearn import metrics

    scores = [metrics.davies_bouldin_score, metrics.calinski_harabasz_score]
    varied = 1 < len(np.unique(labels)) < len(labels) and features.std(0).any()
    values = [float(score(features, labels)) if varied else np.nan for score in scores]
    return dict(zip(("davies_bouldin", "calinski_harabasz"), values, strict=True))
