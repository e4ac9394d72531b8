"""`FreshProbe`: how well a new classifier reads the cluster from a network's frozen activations."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import scipy
from jaxtyping import Float, Int

__all__ = ["FreshProbe"]

Features = Float[np.ndarray, "rows width"]
Codes = Int[np.ndarray, " rows"]
Split = Sequence[tuple[Codes, Codes]]  # rows to train on and to score, by fold
# Rows and clusters of a probe, at most; those of larger data are a random sample.
MOST_ROWS, MOST_CLUSTERS = 2000, 100
FOLDS = 5
# Groups of similar outcomes, where outcomes have more values than this.
GROUPS = 10
# Probability that a probe without information is taken to read the cluster.
NOISE = 0.05


@dataclass(frozen=True)
class FreshProbe:
    r"""Accuracy with which a new classifier reads a factor's clusters from frozen activations.

    The classifier averages the probabilities of a logistic regression and of a network with 32
    units. It is trained and scored by cross-validation on rows that did not train the network. It
    shares nothing with the adversary, whose accuracy says how well it reads activations that
    changed while it learned.

    Attributes
    ----------
    factor : str
        The grouping factor.
    accuracy, se : float
        Share of rows whose cluster is read, and its standard error :math:`\sqrt{a (1 - a) / n}`.
    chance : float
        Share of the largest cluster: the accuracy of always naming it.
    p : float
        p-value of an accuracy of at most `chance`, by the binomial distribution.
    by_outcome : float or None
        Accuracy of naming each outcome's most frequent cluster. Features of the outcome allow as
        much, so that no adversary should get below it. Continuous outcomes are cut into tenths.
        None without outcomes.
    rows, clusters : int
        Rows and clusters of the probe: at most 2,000 and 100, drawn at random.
    held_out : bool
        Whether the rows did not train the network.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> site = np.arange(200) % 4
    >>> told = FreshProbe.of("site", site[:, None] + 0.1 * rng.normal(size=(200, 1)), site)
    >>> hidden = FreshProbe.of("site", rng.normal(size=(200, 1)), site)
    >>> told.reads, hidden.reads, told.chance
    (True, False, 0.25)
    """

    factor: str
    accuracy: float
    se: float
    chance: float
    p: float
    by_outcome: float | None
    rows: int
    clusters: int
    held_out: bool

    @classmethod
    def of(
        cls,
        factor: str,
        features: Features,
        codes: Codes,
        outcome: Float[np.ndarray, " rows"] | None = None,
        *,
        held_out: bool = True,
        seed: int = 0,
    ) -> FreshProbe | None:
        """The probe of these rows; None without two clusters of at least two rows each."""
        from sklearn.model_selection import StratifiedKFold  # slow to import

        kept = _sampled(codes, np.random.default_rng([seed, 37]))
        codes, features = np.unique(codes[kept], return_inverse=True)[1], features[kept]
        counts = np.bincount(codes)
        if len(counts) < 2:
            return None
        folds = StratifiedKFold(min(FOLDS, counts.min()), shuffle=True, random_state=seed)
        split = list(folds.split(features, codes))
        hits = int((_predicted(features, codes, split, seed) == codes).sum())
        n, chance, by_outcome = len(codes), float(counts.max() / len(codes)), None
        if outcome is not None:
            by_outcome = float((_named_by_outcome(outcome[kept], codes, split) == codes).mean())
        accuracy = hits / n
        return cls(
            factor=factor,
            accuracy=accuracy,
            se=math.sqrt(accuracy * (1 - accuracy) / n),
            chance=chance,
            p=float(scipy.stats.binomtest(hits, n, chance, alternative="greater").pvalue),
            by_outcome=by_outcome,
            rows=n,
            clusters=len(counts),
            held_out=held_out,
        )

    @classmethod
    def pooled(cls, probes: Sequence[FreshProbe]) -> FreshProbe:
        """The probe of all rows of several probes, each of its own network and clusters.

        Chance is the mean over rows. The binomial distribution of all hits is then a little wider
        than theirs.
        """
        rows = np.array([probe.rows for probe in probes])
        n = int(rows.sum())

        def mean(values: Sequence[float]) -> float:
            return float(np.dot(rows, values) / n)

        accuracy, chance = mean([p.accuracy for p in probes]), mean([p.chance for p in probes])
        by_outcome = [probe.by_outcome for probe in probes if probe.by_outcome is not None]
        hits = round(accuracy * n)
        return replace(
            probes[0],
            accuracy=accuracy,
            se=math.sqrt(accuracy * (1 - accuracy) / n),
            chance=chance,
            p=float(scipy.stats.binomtest(hits, n, chance, alternative="greater").pvalue),
            by_outcome=mean(by_outcome) if len(by_outcome) == len(probes) else None,
            rows=n,
            clusters=sum(probe.clusters for probe in probes),
        )

    @property
    def effect(self) -> float:
        """(accuracy - chance) / (1 - chance): 0 at chance, 1 if every cluster is read."""
        return (self.accuracy - self.chance) / (1 - self.chance)

    @property
    def p_above(self) -> float:
        """p-value of an accuracy of at most `chance`, or of `by_outcome` if that is more."""
        floor = max(self.chance, self.by_outcome or 0.0)
        hits = round(self.accuracy * self.rows)
        return float(scipy.stats.binomtest(hits, self.rows, floor, alternative="greater").pvalue)

    @property
    def reads(self) -> bool:
        """Whether the cluster is read by more than noise, and better than from the outcome."""
        return self.p_above <= NOISE

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values, from which `from_json` makes the probe again."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> FreshProbe:
        """The probe of a record of `to_json`."""
        return cls(**record)

    def __str__(self) -> str:
        rows = f"{self.rows} {'held-out' if self.held_out else 'training'} rows"
        text = (
            f"accuracy {self.accuracy:.3f} (se {self.se:.3f}) on {rows}, chance {self.chance:.3f}"
        )
        return (
            text if self.by_outcome is None else f"{text}, from the outcome {self.by_outcome:.3f}"
        )


def _sampled(codes: Codes, rng: np.random.Generator) -> Int[np.ndarray, " kept"]:
    """Places of the rows that are used, in order."""
    levels, counts = np.unique(codes, return_counts=True)
    usable = levels[counts > 1]
    if len(usable) > MOST_CLUSTERS:
        usable = rng.choice(usable, MOST_CLUSTERS, replace=False)
    rows = np.flatnonzero(np.isin(codes, usable))
    if len(rows) <= MOST_ROWS:
        return rows
    rows = np.sort(rng.choice(rows, MOST_ROWS, replace=False))
    levels, counts = np.unique(codes[rows], return_counts=True)
    return rows[np.isin(codes[rows], levels[counts > 1])]


def _predicted(features: Features, codes: Codes, split: Split, seed: int) -> Codes:
    """Cross-validated predictions of the clusters."""
    # scikit-learn is imported where it is used, as it is slow to import.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    # An adversary hides linear differences first, which a network still reads through.
    probes = (
        LogisticRegression(C=0.1, max_iter=500),
        MLPClassifier((32,), solver="lbfgs", alpha=1.0, max_iter=200, random_state=seed),
    )
    predicted = np.empty_like(codes)
    with warnings.catch_warnings():
        # A probe that has not fully converged is still a valid one.
        warnings.simplefilter("ignore", ConvergenceWarning)
        for train, held in split:
            chance = 0.0
            for probe in probes:
                trained = make_pipeline(StandardScaler(), probe).fit(features[train], codes[train])
                chance = chance + trained.predict_proba(features[held])
            predicted[held] = np.unique(codes[train])[np.argmax(chance, 1)]
    return predicted


def _named_by_outcome(outcome: Float[np.ndarray, " rows"], codes: Codes, split: Split) -> Codes:
    """Cross-validated predictions: the most frequent cluster of each group of outcomes."""
    groups = np.unique(outcome, return_inverse=True)[1]
    if groups.max() >= GROUPS:
        edges = np.unique(np.quantile(outcome, np.arange(1, GROUPS) / GROUPS))
        groups = np.searchsorted(edges, outcome, side="right")
    predicted = np.empty_like(codes)
    for train, held in split:
        table = np.zeros((groups.max() + 1, codes.max() + 1), dtype=int)
        np.add.at(table, (groups[train], codes[train]), 1)
        predicted[held] = table.argmax(1)[groups[held]]
    return predicted
