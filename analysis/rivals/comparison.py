"""Models compared on the same folds: the record of every fit, and tables and claims from it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from armed_pyro import ClusteredData, DivergenceError
from armed_pyro.analysis.rivals.contenders import NAMES
from armed_pyro.analysis.rivals.rival import (
    Rival,
    Setting,
    Trained,
    feature_use,
    outcomes,
    shuffled,
)
from armed_pyro.analysis.rivals.scores import (
    IMAGE_METRICS,
    METRICS,
    Estimate,
    binary_metrics,
    bounded,
    delong,
    image_metrics,
    resampled,
    youden_threshold,
)

__all__ = [
    "MARGIN",
    "RANDOMISED",
    "SEEN",
    "UNSEEN",
    "Comparison",
    "Fold",
    "Study",
    "ablations",
    "auroc_claims",
    "claim",
    "compare",
    "joined",
    "row_folds",
    "verdict",
]

SEEN, UNSEEN, RANDOMISED = "seen", "unseen", "seen, clusters randomised"
LIMITS = {**METRICS, **IMAGE_METRICS}
# Models with an adversary, each beside the same model without it.
GAMES = (("ARMED", "without adversary"), ("domain adversarial", "conventional"))
# A difference in AUROC that is too small to matter.
MARGIN = 0.01
# Claims about ARMED's AUROC: rows, wording, other model, limit of the difference.
CLAIMS = (
    (SEEN, "ahead of", "conventional", 0.0),
    (SEEN, "ahead of", "domain adversarial", 0.0),
    (UNSEEN, "not behind", "conventional", -MARGIN),
)


@dataclass(frozen=True, eq=False)
class Fold:
    """Rows of a fold: for training, for stopping and tuning, for tests in seen and unseen clusters.

    `data` is the label of the fold's data set, if each fold is a data set drawn independently.
    """

    number: int
    train: ClusteredData
    validation: ClusteredData
    test: ClusteredData
    unseen: ClusteredData | None
    data: int | None = None


@dataclass(frozen=True)
class Study:
    """Data and setting of a comparison.

    Attributes
    ----------
    name : str
    setting : Setting
        Network and training that all models share.
    folds : callable
        Takes the number of folds and a seed, and gives the folds.
    models : tuple of str
        Models that can take such data.

    Examples
    --------
    ``Study("spirals", setting, partial(row_folds, seen, unseen))``
    """

    name: str
    setting: Setting
    folds: Callable[[int, int], Iterator[Fold]]
    models: tuple[str, ...] = NAMES


def row_folds(
    seen: ClusteredData, unseen: ClusteredData | None, n: int, seed: int
) -> Iterator[Fold]:
    """Folds of rows within clusters; a fifth of each fold's training rows is for validation."""
    for number, (train, test) in enumerate(seen.folds(n, seed=seed)):
        kept, validation = train.split_rows(0.2, seed=seed)
        yield Fold(number, kept, validation, test, unseen)


@dataclass(frozen=True, eq=False)
class Comparison:
    """Every fit's scores and predictions.

    Attributes
    ----------
    scores : pandas.DataFrame
        One row per data set, fold, model and kind of rows: `METRICS`; `IMAGE_METRICS` of models
        that rebuild images; ratio (test rows over training rows), threshold, seconds and steps.
    predictions : pandas.DataFrame
        One row per test row of each of them: row, cluster, y, p.
    use : pandas.DataFrame
        |gradient at the mean| of every feature; one row per data set, fold and model.
    """

    scores: pd.DataFrame
    predictions: pd.DataFrame
    use: pd.DataFrame

    def table(self, reference: str = "conventional") -> pd.DataFrame:
        """Means with 95% intervals, and gains over a reference model, paired by fold.

        The unit is a fold, with Nadeau and Bengio's correction for shared training rows. With
        several data sets, the unit is the mean of a data set over its folds. Intervals of means
        stay within the metric's limits (`bounded`); those of gains are plain t intervals.

        Parameters
        ----------
        reference : str
            The model over which gains are taken.

        Returns
        -------
        pandas.DataFrame
            Columns rows, metric, model, mean, lower, upper, gain, gain_lower, gain_upper, gain_p,
            adversary. The last is the verdict (see `ablations`) on the adversary of a model that
            has one. For randomised clusters, the gain is over the same model with the right ones.
        """
        records = []
        for kind in self.scores["rows"].unique():
            for metric in self.metrics:
                units, ratio = self._units(kind, metric)
                # Randomised clusters are set against the same model with the right ones.
                known = self._units(SEEN, metric)[0] if kind == RANDOMISED else None
                for model in units:
                    other = units.get(reference) if known is None else known[model]
                    values = units[model].to_numpy()
                    row = {"rows": kind, "metric": metric, "model": model}
                    row |= _columns(bounded(values, ratio, LIMITS[metric]), "")
                    # Without the reference model there are no gains.
                    gains = values * np.nan if other is None else values - other.to_numpy()
                    gain = resampled(gains, ratio)
                    row |= _columns(gain, "gain_") | {"gain_p": gain.p}
                    row["adversary"] = ""
                    without = dict(GAMES).get(model)
                    if metric == "auroc" and kind != RANDOMISED and without in units:
                        row["adversary"] = verdict(self.difference(model, str(without), kind))
                    records.append(row)
        return pd.DataFrame(records).rename(columns={"gain_mean": "gain"})

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that were scored."""
        return tuple(name for name in LIMITS if name in self.scores)

    def difference(self, model: str, other: str, kind: str, metric: str = "auroc") -> Estimate:
        """Mean of a metric for the first model minus the second, paired by fold or data set."""
        units, ratio = self._units(kind, metric)
        return resampled((units[model] - units[other]).to_numpy(), ratio)

    def delong(self, reference: str = "conventional") -> pd.DataFrame:
        """AUROCs over all test rows, with intervals and tests that allow dependence in clusters.

        A row of a seen cluster is predicted by the fit that held it out. A row of an unseen cluster
        is predicted by the fits of all folds, and the mean is taken.

        Returns
        -------
        pandas.DataFrame
            Columns data, rows, model, auroc, lower, upper, gain, gain_lower, gain_upper, gain_p.
        """
        records = []
        for (data, kind), block in self.predictions.groupby(["data", "rows"], sort=False):
            chance = block.pivot_table(
                index=["row", "cluster", "y"], columns="model", values="p", sort=False
            ).dropna(axis=1)
            y = chance.index.get_level_values("y").to_numpy()
            if len(np.unique(y)) < 2:
                continue
            aurocs = delong(y, chance.to_numpy().T, chance.index.get_level_values("cluster"))
            names = list(chance)
            for place, model in enumerate(names):
                row = {"data": data, "rows": kind, "model": model}
                row |= _columns(aurocs.of(place), "")
                if reference in names and kind != RANDOMISED:
                    gain = aurocs.difference(place, names.index(reference))
                    row |= _columns(gain, "gain_") | {"gain_p": gain.p}
                records.append(row)
        return pd.DataFrame(records).rename(columns={"gain_mean": "gain", "mean": "auroc"})

    def _units(self, kind: str, metric: str) -> tuple[pd.DataFrame, float]:
        """A metric by fold or data set, with one column per model; and the correction's ratio."""
        block = self.scores[self.scores["rows"] == kind]
        several = len(block["data"].unique()) > 1
        index = ["data"] if several else ["data", "fold"]
        units = block.pivot_table(index=index, columns="model", values=metric, sort=False)
        return units, 0.0 if several else float(block["ratio"].mean())


def compare(
    folds: Iterator[Fold], rivals: Sequence[Rival], *, data: str | int = 0, seed: int = 0
) -> Iterator[tuple[Rival, Fold, Trained, Comparison]]:
    """Train every model on every fold, and score each as soon as it is trained.

    A model that diverges leaves a warning and no scores.

    Parameters
    ----------
    folds : iterator of Fold
    rivals : sequence of Rival
    data : str or int
        Label of the data set, unless the folds carry labels.
    seed : int
        Seed of networks and training, to which the fold's number is added.
    """
    for fold in folds:
        for rival in rivals:
            start = time.perf_counter()
            try:
                trained = rival.train(fold.train, fold.validation, seed + fold.number)
            except (DivergenceError, FloatingPointError) as error:
                message = f"{rival.name} diverged in fold {fold.number + 1}: {error}"
                warnings.warn(message, stacklevel=2)
                continue
            seconds = time.perf_counter() - start
            label = data if fold.data is None else fold.data
            yield rival, fold, trained, _scored(rival, fold, trained, label, seconds)


def joined(parts: Sequence[Comparison]) -> Comparison:
    """Several comparisons as one.

    Examples
    --------
    ``joined([scored for *_, scored in compare(folds, rivals)]).table()``
    """
    names = ("scores", "predictions", "use")
    return Comparison(
        *(pd.concat([getattr(part, name) for part in parts], ignore_index=True) for name in names)
    )


def ablations(comparison: Comparison) -> pd.DataFrame:
    """Paired differences in AUROC that show whether the adversary and the clusters help.

    The verdict is "helps" or "harms" if the 95% interval of the difference excludes zero, and
    "no evidence" otherwise.

    Returns
    -------
    pandas.DataFrame
        Columns ablation, rows, difference, lower, upper, p, verdict.
    """
    models, records = set(comparison.scores["model"]), []
    pairs = [("adversary: " + a, a, b) for a, b in GAMES if {a, b} <= models]
    if {"ARMED", "conventional"} <= models:
        pairs.append(("ARMED over conventional", "ARMED", "conventional"))
    for name, model, other in pairs:
        for kind in (SEEN, UNSEEN):
            if kind in set(comparison.scores["rows"]):
                records.append(_judged(name, kind, comparison.difference(model, other, kind)))
    table = comparison.table()
    randomised = table[(table["rows"] == RANDOMISED) & (table["metric"] == "auroc")]
    for row in randomised.itertuples():
        # The loss by randomising is the gain by knowing the right cluster.
        known = Estimate(-row.gain, -row.gain_upper, -row.gain_lower, row.gain_p)
        records.append(_judged(f"right clusters: {row.model}", SEEN, known))
    return pd.DataFrame(records)


def verdict(difference: Estimate) -> str:
    """Verdict on a difference that is positive if something helps.

    Examples
    --------
    >>> verdict(Estimate(0.02, -0.01, 0.05, 0.2))
    'no evidence'
    """
    return "helps" if difference.lower > 0 else "harms" if difference.upper < 0 else "no evidence"


def auroc_claims(comparison: Comparison) -> pd.DataFrame:
    """Claims that ARMED's AUROC is ahead in seen clusters, and not behind in unseen ones.

    Ahead means that the 95% interval of the paired difference lies above 0; not behind, that it
    lies above `-MARGIN`. See `claim` for the verdicts.

    Returns
    -------
    pandas.DataFrame
        Columns claim, mean, lower, upper, holds; no row for a claim whose model is missing.

    Examples
    --------
    ``auroc_claims(joined(parts))``
    """
    models, kinds = set(comparison.scores["model"]), set(comparison.scores["rows"])
    records = [
        claim(
            f"AUROC, {kind} clusters: ARMED {word} {other}",
            comparison.difference("ARMED", other, kind),
            limit,
        )
        for kind, word, other, limit in CLAIMS
        if {"ARMED", other} <= models and kind in kinds
    ]
    return pd.DataFrame(records, columns=["claim", "mean", "lower", "upper", "holds"])


def claim(name: str, estimate: Estimate, limit: float) -> dict[str, str | float]:
    """A claim that a quantity is above a limit, judged by its 95% interval.

    The claim holds if the interval lies above the limit, does not hold if it lies below, and is not
    shown otherwise.

    Examples
    --------
    >>> claim("more than half", Estimate(0.7, 0.6, 0.8, 0.0), 0.5)["holds"]
    'holds'
    """
    below = "does not hold" if estimate.upper < limit else "not shown"
    holds = "holds" if estimate.lower > limit else below
    return {"claim": name} | _columns(estimate, "") | {"holds": holds}


def _judged(name: str, kind: str, difference: Estimate) -> dict[str, str | float]:
    row = {"ablation": name, "rows": kind, "difference": difference.mean}
    interval = {"lower": difference.lower, "upper": difference.upper, "p": difference.p}
    return row | interval | {"verdict": verdict(difference)}


def _scored(
    rival: Rival, fold: Fold, trained: Trained, data: str | int, seconds: float
) -> Comparison:
    factor = rival.setting.factor
    threshold = youden_threshold(outcomes(fold.train), trained.predict(fold.train))
    kinds = {SEEN: fold.test}
    if fold.unseen is not None:
        kinds[UNSEEN] = fold.unseen
    if rival.clustered:
        levels = fold.train.grouping(factor).levels
        kinds[RANDOMISED] = shuffled(fold.test, factor, levels, fold.number)
    ratio = fold.test.n_rows / (fold.train.n_rows + fold.validation.n_rows)
    base = {"data": data, "fold": fold.number, "model": rival.name}
    scores, predictions = [], []
    for kind, rows in kinds.items():
        y, p = outcomes(rows), trained.predict(rows)
        scores.append(
            {**base, "rows": kind, **binary_metrics(y, p, threshold),
             **image_metrics(trained, rows, rival.setting), "threshold": threshold,
             "ratio": ratio, "seconds": seconds, "steps": trained.steps}
        )  # fmt: skip
        cluster = rows.grouping(factor).labels()
        frame = pd.DataFrame({"row": rows.row_labels, "cluster": cluster, "y": y, "p": p})
        predictions.append(frame.assign(**base, rows=kind))
    use = feature_use(trained, fold.train.feature_names)
    return Comparison(pd.DataFrame(scores), pd.concat(predictions), pd.DataFrame([base | use]))


def _columns(estimate: Estimate, prefix: str) -> dict[str, float]:
    return {f"{prefix}{name}": getattr(estimate, name) for name in ("mean", "lower", "upper")}
