"""Cluster invariance: whether fresh probes can read the cluster from the learned features."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import calinski_harabasz_score, davies_bouldin_score
from sklearn.model_selection import StratifiedKFold
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from armed_pyro._messages import listing
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.inference.posterior import Posterior
from armed_pyro.networks.taps import head_path, pooled, tapped
from armed_pyro.program.model import MixedEffects

__all__ = ["Invariance", "invariance"]


MOST_ROWS = 5000
# Outcomes with more values than FEW are cut into so many groups of like outcomes.
FEW, BINS = 10, 10
PROBES: Mapping[str, Callable[[int], Any]] = {
    "linear": lambda seed: LogisticRegression(max_iter=1000),
    "network": lambda seed: MLPClassifier(
        (32,), solver="lbfgs", alpha=1.0, max_iter=200, random_state=seed
    ),
}


@dataclass(frozen=True, eq=False)
class Invariance:
    """How well the clusters of a factor can be read from a network's features.

    Attributes
    ----------
    factor : str
        The grouping factor.
    table : pandas.DataFrame
        One row a layer and probe (linear, network): layer, probe, accuracy (cross-validated),
        chance (mean accuracy for permuted clusters), p; chance_within and p_within, for clusters
        permuted among rows of like outcome, missing without outcomes; p_leak, the larger p-value.
    clustering : pandas.DataFrame
        One row a layer and labelling ("cluster", "outcome"): layer, by, davies_bouldin,
        calinski_harabasz. Features that do not tell the labels apart have a large Davies-Bouldin
        and a small Calinski-Harabasz index.

    Examples
    --------
    >>> from torch import nn
    >>> from armed_pyro import Invariance, MixedEffects, Schedule, fit
    >>> from armed_pyro.data.simulate import mixed_model
    >>> data, _ = mixed_model()
    >>> model = MixedEffects(nn.Linear(1, 1), "(1 | site)", bayesian_head=True)
    >>> result = fit(model, data, schedule=Schedule(steps=20), refine=False, progress=False)
    >>> found: Invariance = result.invariance(permutations=99)  # of the last layer's input, x
    >>> bool((found.table["p_leak"] > 0.05).all())
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
    r"""Accuracy of fresh probes that read the cluster from the learned features, against chance.

    A linear probe (logistic regression) and a small network (32 units) are trained on each
    layer's standardised activations, apart from the fit's own adversary, and judged by rows that
    they were not trained on. The null hypothesis of ``p`` is that clusters and activations are
    independent; of ``p_within``, that they are given the outcome. Neither alone shows a leak:
    clusters whose outcomes differ may rightly be read from features that predict the outcome, and
    independent features depend on the cluster given the outcome where both bear on it. That of
    ``p_leak`` is that one of the two holds. In each fold the held-out rows'
    clusters are permuted (among rows of one class, or of one tenth of a continuous outcome) and
    compared with the probe's answers again, which is exact; the p-value is m times the smallest
    of the m folds' (Bonferroni), at least m / (permutations + 1). Two folds are therefore the
    most powerful; more of them leave more rows for training.

    Parameters
    ----------
    posterior : Posterior
        The fitted program.
    data : ClusteredData or table, optional
        Rows, of seen or unseen clusters; by default the training rows. Of more than 5,000, a
        random sample is used.
    factor : str, optional
        Grouping factor; that of the adversary or of the random effects, if not given.
    layers : sequence of str, optional
        Module paths; feature maps are averaged over space. By default the adversary's taps or,
        without one, the input of the last linear layer.
    folds : int
        Folds m, each with the clusters' shares of all rows.
    permutations : int
        Permutations of each fold.
    seed : int, optional
        Seed of folds, probes and permutations; the fit's own by default.

    Raises
    ------
    ValueError
        If there is no such layer or factor, there is one cluster only, or one has fewer rows
        than there are folds.

    References
    ----------
    Nguyen, Treacher, Montillo (2023), IEEE TPAMI 45(7), for the two indices: Davies
    and Bouldin (1979); Caliński and Harabasz (1974).
    Ojala and Garriga (2010), "Permutation tests for studying classifier performance", JMLR 11.

    Examples
    --------
    ``print(fit.invariance())``
    """
    model, seed = posterior.model, posterior.seed if seed is None else seed
    given = posterior.data if data is None else posterior.encode(data)
    if permutations < 1:
        raise ValueError(f"`permutations` must be at least 1, not {permutations}")
    if given.n_rows > MOST_ROWS:
        chosen = np.random.default_rng([seed, 19]).permutation(given.n_rows)[:MOST_ROWS]
        given = given.take(np.sort(chosen))
    factor = _factor(model, factor, given)
    codes = given.grouping(factor).codes.numpy()
    _check_clusters(given, factor, folds)
    alike = _strata(given)
    labels, groups = {"cluster": codes}, {"": np.zeros_like(codes)}
    if alike is not None:
        labels["outcome"] = groups["_within"] = alike
    reading = _Reading(codes, groups, folds, permutations, seed)
    tests, indices = [], []
    for layer, features in activations(model, given, _layers(model, factor, layers)).items():
        for name, probe in PROBES.items():
            found = reading.test(probe(seed), features)
            # Missing p-values are passed over.
            leak = float(np.fmax(found["p"], found["p_within"]))
            tests.append({"layer": layer, "probe": name} | found | {"p_leak": leak})
        for by, label in labels.items():
            indices.append({"layer": layer, "by": by} | _indices(features, label))
    return Invariance(factor, pd.DataFrame(tests), pd.DataFrame(indices))


@torch.no_grad()
def activations(
    model: MixedEffects, data: ClusteredData, layers: Sequence[str]
) -> dict[str, Float[np.ndarray, "rows width"]]:
    """What modules give for the rows, by path; under ``"<path"``, what they get.

    Raises
    ------
    ValueError
        If the network has no such module, or does not run it.
    """
    source = model.encode(data, model.data_facts().levels_with(data))
    inputs = [layer[1:] for layer in layers if layer.startswith("<")]
    outputs = [layer for layer in layers if not layer.startswith("<")]
    pieces: dict[str, list[np.ndarray]] = {layer: [] for layer in layers}
    for part in source.x.split(1024):
        with tapped(model.network, outputs, inputs) as record:
            model.network(part)
        for layer in layers:
            if layer not in record:
                raise ValueError(f"the network never runs its module {layer!r}: nothing to probe")
            pieces[layer].append(pooled(record[layer]).double().cpu().numpy())
    return {layer: np.concatenate(parts) for layer, parts in pieces.items()}


def _factor(model: MixedEffects, factor: str | None, data: ClusteredData) -> str:
    games = [game.factor for game in model.adversaries]
    known = [*games, *model.factor_names(), *data.groupings]
    if factor is None and not known:
        raise ValueError("the data have no grouping factor whose clusters could be read")
    return known[0] if factor is None else factor


def _layers(model: MixedEffects, factor: str, layers: Sequence[str] | None) -> tuple[str, ...]:
    if layers is not None:
        if isinstance(layers, str) or not layers:
            raise ValueError(f"`layers` is a list of at least one module path, not {layers!r}")
        return tuple(layers)
    taps = [path for game in model.adversaries if game.factor == factor for path in game.taps]
    return tuple(dict.fromkeys(taps)) or (f"<{head_path(model.network)}",)


def _check_clusters(data: ClusteredData, factor: str, folds: int) -> None:
    grouping = data.grouping(factor)
    if folds < 2:
        raise ValueError(f"`folds` must be at least 2, not {folds}")
    if grouping.n_clusters < 2:
        raise ValueError(
            f"the rows are all of one cluster of {factor!r}: there is nothing to tell apart; give "
            "rows of at least two clusters"
        )
    small = grouping.levels[(grouping.counts < folds).numpy()]
    if len(small):
        raise ValueError(
            f"cluster(s) of {factor!r} with fewer rows than the {folds} folds: {listing(small)}; "
            "leave them out, or ask for fewer folds"
        )


def _strata(data: ClusteredData) -> Int[np.ndarray, " rows"] | None:
    """Rows of like outcome: its classes, or tenths of it."""
    outcome = data.outcome
    if outcome is None or outcome.dim() > 1:
        return None
    values, codes = np.unique(outcome.numpy(), return_inverse=True)
    if data.classes is not None or len(values) <= FEW:
        return codes
    return pd.qcut(outcome.numpy(), BINS, labels=False, duplicates="drop")


@dataclass(frozen=True)
class _Reading:
    """How a probe's reading of the clusters is tested.

    Attributes
    ----------
    codes : Int[ndarray, "rows"]
        Clusters to read.
    groups : mapping of str to Int[ndarray, "rows"]
        Rows whose clusters are exchangeable under each null hypothesis, by suffix.
    """

    codes: Int[np.ndarray, " rows"]
    groups: Mapping[str, Int[np.ndarray, " rows"]]
    folds: int
    permutations: int
    seed: int

    def test(self, probe: Any, features: Float[np.ndarray, "rows width"]) -> dict[str, float]:
        """Cross-validated accuracy, its mean under permutation, and p-values."""
        rng, codes = np.random.default_rng([self.seed, 23]), self.codes
        found = {"accuracy": 0.0}
        for name in ("", "_within"):
            found |= (
                {f"chance{name}": 0.0, f"p{name}": 1.0}
                if name in self.groups
                else {f"chance{name}": np.nan, f"p{name}": np.nan}
            )
        # Stratified by cluster and nothing else: every permutation might have been drawn.
        split = StratifiedKFold(self.folds, shuffle=True, random_state=self.seed)
        for train, held in split.split(features, codes):
            with warnings.catch_warnings():
                # A network that has not quite converged is a probe all the same.
                warnings.simplefilter("ignore", ConvergenceWarning)
                trained = make_pipeline(StandardScaler(), probe).fit(features[train], codes[train])
            answers, truth = trained.predict(features[held]), codes[held]
            hits = float((answers == truth).sum())
            found["accuracy"] += hits / len(codes)
            for name, groups in self.groups.items():
                by_chance = np.array(
                    [
                        (answers == _permuted(rng, truth, groups[held])).sum()
                        for _ in range(self.permutations)
                    ]
                )
                found[f"chance{name}"] += float(by_chance.mean()) / len(codes)
                p = (1 + float((by_chance >= hits).sum())) / (self.permutations + 1)
                found[f"p{name}"] = min(found[f"p{name}"], self.folds * p)
        return found


def _permuted(
    rng: np.random.Generator, codes: Int[np.ndarray, " rows"], groups: Int[np.ndarray, " rows"]
) -> Int[np.ndarray, " rows"]:
    """Clusters permuted among the rows of each group."""
    shuffled = np.empty_like(codes)
    # By group, first in the given and then in random order.
    shuffled[np.argsort(groups, kind="stable")] = codes[
        np.lexsort((rng.permutation(len(codes)), groups))
    ]
    return shuffled


def _indices(
    features: Float[np.ndarray, "rows width"], labels: Int[np.ndarray, " rows"]
) -> dict[str, float]:
    """Both indices; missing where features or labels do not vary."""
    count = len(np.unique(labels))
    if not 1 < count < len(labels) or not features.std(0).any():
        return {"davies_bouldin": np.nan, "calinski_harabasz": np.nan}
    return {
        "davies_bouldin": float(davies_bouldin_score(features, labels)),
        "calinski_harabasz": float(calinski_harabasz_score(features, labels)),
    }
