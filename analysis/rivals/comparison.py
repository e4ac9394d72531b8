"""Models compared on the same folds: records of every fit, and the tables made of them."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from armed_pyro import ClusteredData, DivergenceError
from armed_pyro.analysis.rivals.contenders import NAMES
from armed_pyro.analysis.rivals.rebuilt import IMAGE_METRICS, image_metrics
from armed_pyro.analysis.rivals.rival import (
    Rival,
    Setting,
    Trained,
    feature_use,
    outcomes,
    shuffled,
)
from armed_pyro.analysis.rivals.scores import (
    METRICS,
    Estimate,
    binary_metrics,
    bounded,
    delong,
    resampled,
    youden_threshold,
)

__all__ = [
    "RANDOMISED",
    "SEEN",
    "UNSEEN",
    "Comparison",
    "Fold",
    "Study",
    "ablations",
    "compare",
    "joined",
    "row_folds",
    "verdict",
]

SEEN, UNSEEN, RANDOMISED = "seen", "unseen", "seen, clusters randomised"
LIMITS = {**METRICS, **IMAGE_METRICS}
# With an adversary, and the same model without.
GAMES = (("ARMED", "without adversary"), ("domain adversarial", "conventional"))


@dataclass(frozen=True, eq=False)
class Fold:
    """Rows of one fold: to train on, to stop and tune by, to test in seen and unseen clusters.

    `data` is the label of the fold's data set, where each fold is one drawn apart.
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
        Number of folds and seed to the folds.
    models : tuple of str
        Those that take such data.

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
        One row a data set, fold, model and kind of rows: `METRICS`, of models that rebuild
        images `IMAGE_METRICS`, ratio (test rows over training rows), threshold, seconds.
    predictions : pandas.DataFrame
        One row a test row of each: row, cluster, y, p.
    use : pandas.DataFrame
        |gradient at the mean| of every feature, one row a data set, fold and model.
    """

    scores: pd.DataFrame
    predictions: pd.DataFrame
    use: pd.DataFrame

    def table(self, reference: str = "conventional") -> pd.DataFrame:
        """Means with 95% intervals, and gains over a reference model, paired by fold.

        The unit is a fold, with Nadeau and Bengio's correction for shared training rows, or, where
        there are several data sets, a data set's mean over folds. Intervals of means stay within
        the metric's limits (`bounded`); those of gains are plain t intervals.

        Parameters
        ----------
        reference : str
            Model that gains are over.

        Returns
        -------
        pandas.DataFrame
            Columns rows, metric, model, mean, lower, upper, gain, gain_lower, gain_upper, gain_p;
            and adversary, the verdict (see `ablations`) on the adversary of a model that has one.
            Of randomised clusters the gain is over the same model with the right ones.
        """
        records = []
        for kind in self.scores["rows"].unique():
            for metric in self.metrics:
                units, ratio = self._units(kind, metric)
                # Against the same model with the clusters known, where they are randomised.
                known = self._units(SEEN, metric)[0] if kind == RANDOMISED else None
                for model in units:
                    other = units.get(reference) if known is None else known[model]
                    values = units[model].to_numpy()
                    row = {"rows": kind, "metric": metric, "model": model}
                    row |= _columns(bounded(values, ratio, LIMITS[metric]), "")
                    # Without the reference there is nothing to gain over.
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
        """Those that there are scores of."""
        return tuple(name for name in LIMITS if name in self.scores)

    def difference(self, model: str, other: str, kind: str, metric: str = "auroc") -> Estimate:
        """One model's mean of a metric minus another's, paired by fold or data set."""
        units, ratio = self._units(kind, metric)
        return resampled((units[model] - units[other]).to_numpy(), ratio)

    def delong(self, reference: str = "conventional") -> pd.DataFrame:
        """AUROCs over all test rows, with intervals and tests for rows dependent within clusters.

        Each seen row was predicted by the one fit that it was held out of, each unseen row by
        every fold's, of which the mean is taken.

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
            found = delong(y, chance.to_numpy().T, chance.index.get_level_values("cluster"))
            names = list(chance)
            for place, model in enumerate(names):
                row = {"data": data, "rows": kind, "model": model}
                row |= _columns(found.of(place), "")
                if reference in names and kind != RANDOMISED:
                    gain = found.difference(place, names.index(reference))
                    row |= _columns(gain, "gain_") | {"gain_p": gain.p}
                records.append(row)
        return pd.DataFrame(records).rename(columns={"gain_mean": "gain", "mean": "auroc"})

    def _units(self, kind: str, metric: str) -> tuple[pd.DataFrame, float]:
        """A metric by fold or data set, one column a model; and the correction's ratio."""
        block = self.scores[self.scores["rows"] == kind]
        several = len(block["data"].unique()) > 1
        index = ["data"] if several else ["data", "fold"]
        units = block.pivot_table(index=index, columns="model", values=metric, sort=False)
        return units, 0.0 if several else float(block["ratio"].mean())


def compare(
    folds: Iterator[Fold], rivals: Sequence[Rival], *, data: str | int = 0, seed: int = 0
) -> Iterator[tuple[Rival, Fold, Trained, Comparison]]:
    """Train every model on every fold, and score each as soon as it is trained.

    A model that diverges leaves no scores, and a warning.

    Parameters
    ----------
    folds : iterator of Fold
    rivals : sequence of Rival
    data : str or int
        Label of the data set, unless the folds have their own.
    seed : int
        Seed of networks and training; the fold's number is added.
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
    """Comparisons as one.

    Examples
    --------
    ``joined([scored for *_, scored in compare(folds, rivals)]).table()``
    """
    names = ("scores", "predictions", "use")
    return Comparison(
        *(pd.concat([getattr(part, name) for part in parts], ignore_index=True) for name in names)
    )


def ablations(found: Comparison) -> pd.DataFrame:
    """Does the adversary help, and do the clusters: the paired differences that say so.

    Verdicts are "helps" or "harms" where the 95% interval of the difference in AUROC excludes
    zero, otherwise "no evidence".

    Returns
    -------
    pandas.DataFrame
        Columns ablation, rows, difference, lower, upper, p, verdict.
    """
    models, records = set(found.scores["model"]), []
    pairs = [("adversary: " + a, a, b) for a, b in GAMES if {a, b} <= models]
    if {"ARMED", "conventional"} <= models:
        pairs.append(("ARMED over conventional", "ARMED", "conventional"))
    for name, model, other in pairs:
        for kind in (SEEN, UNSEEN):
            if kind in set(found.scores["rows"]):
                records.append(_judged(name, kind, found.difference(model, other, kind)))
    table = found.table()
    randomised = table[(table["rows"] == RANDOMISED) & (table["metric"] == "auroc")]
    for row in randomised.itertuples():
        # The other way round: what knowing the right cluster brings.
        known = Estimate(-row.gain, -row.gain_upper, -row.gain_lower, row.gain_p)
        records.append(_judged(f"right clusters: {row.model}", SEEN, known))
    return pd.DataFrame(records)


def verdict(one: Estimate) -> str:
    """What a difference says of the better being higher.

    Examples
    --------
    >>> verdict(Estimate(0.02, -0.01, 0.05, 0.2))
    'no evidence'
    """
    return "helps" if one.lower > 0 else "harms" if one.upper < 0 else "no evidence"


def _judged(name: str, kind: str, one: Estimate) -> dict[str, str | float]:
    row = {"ablation": name, "rows": kind, "difference": one.mean}
    return row | {"lower": one.lower, "upper": one.upper, "p": one.p, "verdict": verdict(one)}


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


def _columns(one: Estimate, prefix: str) -> dict[str, float]:
    return {f"{prefix}mean": one.mean, f"{prefix}lower": one.lower, f"{prefix}upper": one.upper}
