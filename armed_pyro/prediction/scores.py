"""Scores of predictions: of held-out rows, and of new clusters by mode."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import scipy
import torch
import xarray as xr
from jaxtyping import Float, Int

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.data.xarray_names import label_values, variable_name
from armed_pyro.guides.base import n_draws
from armed_pyro.inference.posterior import Posterior
from armed_pyro.prediction.adapt import adapt, joined
from armed_pyro.prediction.chunks import predict_rows, with_new_effects
from armed_pyro.prediction.cluster_classifier import Classifiers
from armed_pyro.prediction.new_clusters import condition
from armed_pyro.prediction.predict import effect_source
from armed_pyro.prediction.result import Prediction
from armed_pyro.prediction.survival import harrell
from armed_pyro.prediction.unseen import EffectSource, Marginal, new_clusters, one_cluster_per_row
from armed_pyro.program.blocks import BLOCK_VALUES, values_per_row
from armed_pyro.rows.censoring import EVENT

__all__ = ["ClusterScores", "compare_modes", "crps", "evaluate", "log_densities", "score_mode"]

# The mode of the ARMED paper: "membership" with each row as a separate cluster.
BY_ROW = "membership by row"
# Scores that compare predictions with exact outcomes.
OF_EXACT = ("rmse", "coverage", "mean_coverage", "crps", "mean_p", "sd_p", "pit_distance")
ByRow = Float[np.ndarray, " rows"]
ByCluster = Float[np.ndarray, " clusters"]
DrawsByRow = Float[np.ndarray, "draws rows"]


@dataclass(frozen=True, eq=False)
class ClusterScores:
    """Scores of one mode on the outcomes of new clusters.

    `table` has one row per cluster: factor, cluster, rows; rmse (of the posterior mean); coverage
    and width of the predictive intervals of outcomes; crps (continuous ranked probability score,
    mean over rows; not for classes); log_score (mean log predictive density of a row); elpd (joint
    log predictive density of all rows of the cluster); mean_p and sd_p (mid-p-values of the mean
    and standard deviation of the cluster's outcomes, among replicated outcomes).

    References
    ----------
    Gneiting and Raftery (2007), JASA 102(477): strictly proper scoring rules.
    Czado, Gneiting, Held (2009), Biometrics 65(4): randomised PIT of counts.
    """

    mode: str
    table: pd.DataFrame
    # Probability integral transform of every outcome, randomised if it is discrete. Uniform if
    # predictions are calibrated; NaN for classes.
    pit: ByRow
    summary: Mapping[str, float]  # scores over all rows and clusters
    row_labels: pd.Index  # of `pit`

    def to_dataset(self) -> xr.Dataset:
        """Scores with the dimensions <factor> and row, labelled as in `Prediction.to_datatree`."""
        factor = variable_name(str(self.table["factor"].iloc[0]))
        columns = self.table.drop(columns=["factor", "cluster"])
        values = {str(name): (factor, column.to_numpy()) for name, column in columns.items()}
        labels = label_values(pd.Index(self.table["cluster"].tolist()))
        coords = {factor: labels, "row": label_values(self.row_labels)}
        return xr.Dataset({**values, "pit": ("row", self.pit)}, coords, {"unseen": self.mode})


def compare_modes(
    posterior: Posterior,
    data: ClusteredData | pd.DataFrame,
    *,
    modes: Sequence[str] | None = None,
    support: ClusteredData | pd.DataFrame | None = None,
    factor: str | None = None,
    draws: int = 1000,
    prob: float = 0.9,
    seed: int | None = None,
    classifiers: Classifiers | None = None,
) -> pd.DataFrame:
    """Scores of the predictions for new clusters, one row per mode.

    Parameters
    ----------
    data : ClusteredData or table
        Rows with outcomes; rows of new clusters are scored. They should not include rows of the
        support.
    modes : sequence of str, optional
        By default all modes that apply: "adapt" needs support, "membership" and "nearest" need
        features. "membership by row" treats each row as a separate cluster.
    support : ClusteredData or table, optional
        Labelled rows of the new clusters, for "adapt".
    factor : str, optional
        The grouping factor whose new clusters are scored; by default the first with new clusters.
    draws, prob, seed, classifiers
        See `armed_pyro.prediction.predict.predict`.

    Returns
    -------
    pandas.DataFrame
        Columns mode, clusters, rows, rmse (or accuracy and auroc), coverage, mean_coverage (of the
        intervals of the clusters' means), width, crps, log_score, elpd, elpd_diff (difference to
        the mode with the highest elpd), elpd_diff_se (its standard error over clusters), and
        pit_distance (Kolmogorov distance of the clusters' mean_p from the uniform distribution).
        Censored outcomes have Harrell's concordance in place of rmse, coverage, crps and
        pit_distance.

    Raises
    ------
    ValueError
        If the outcome is not known, or no cluster is new.

    Examples
    --------
    ``compare_modes(fit, held_out)``
    """
    rows = posterior.encode(data)
    if modes is None:
        modes = ["population", "marginal"]
        modes += ["membership", BY_ROW, "nearest"] if rows.n_features else []
        modes += ["adapt"] if support is not None else []
    options: dict[str, Any] = {"factor": factor, "draws": draws, "prob": prob, "seed": seed}
    options["classifiers"] = Classifiers() if classifiers is None else classifiers
    with warnings.catch_warnings():
        # The warning of alien clusters is not needed: the table shows how membership performs.
        warnings.filterwarnings("ignore", message="no cluster of")
        for_adapt = {"adapt": support}
        made = [score_mode(posterior, rows, m, support=for_adapt.get(m), **options) for m in modes]
    table = pd.DataFrame([{"mode": scores.mode, **scores.summary} for scores in made])
    elpd = np.stack([scores.table["elpd"].to_numpy() for scores in made])
    best = elpd[elpd.sum(1).argmax()]
    table["elpd_diff"] = (elpd - best).sum(1)
    table["elpd_diff_se"] = np.sqrt(elpd.shape[1]) * (elpd - best).std(1, ddof=1)
    return table


def score_mode(
    posterior: Posterior,
    data: ClusteredData | pd.DataFrame,
    mode: str,
    *,
    support: ClusteredData | pd.DataFrame | None = None,
    factor: str | None = None,
    draws: int = 1000,
    prob: float = 0.9,
    seed: int | None = None,
    classifiers: Classifiers | None = None,
) -> ClusterScores:
    """Scores of one mode by cluster; see `compare_modes` for the parameters and errors.

    Examples
    --------
    ``score_mode(fit, held_out, "marginal").summary["elpd"]``
    """
    model, facts = posterior.model, posterior.model.data_facts()
    if mode == "adapt" and support is not None:
        support = posterior.encode(support)
    rows = posterior.encode(data, support if isinstance(support, ClusteredData) else None)
    if rows.outcome is None:
        raise ValueError(
            f"scores compare predictions with outcomes, but the rows have no {facts.outcome_name!r}"
        )
    model.family.check(rows)
    new = new_clusters(model, rows)
    named = [name for name, labels in new.items() if len(labels)]
    factor = factor or next(iter(named), None)
    if factor not in named:
        what = f"cluster of {factor!r}" if factor else "cluster"
        raise ValueError(f"no {what} is new in these rows: there is nothing to compare modes on")
    codes = model.encode(rows, facts.levels_with(rows)).codes[factor].cpu().numpy()
    codes = codes - len(facts.levels[factor])
    y, rows, codes = rows.outcome.numpy()[codes >= 0], rows.take(codes >= 0), codes[codes >= 0]
    unseen, pooled = ("membership", False) if mode == BY_ROW else (mode, True)
    seed = posterior.seed if seed is None else seed
    if unseen == "adapt" and isinstance(support, ClusteredData):
        source: EffectSource = adapt(posterior, support, draws=draws, seed=seed).source()
    else:
        support = None
        options: dict[str, Any] = {"draws": draws, "seed": seed, "classifiers": classifiers}
        source, _ = effect_source(posterior, rows, unseen, pooled=pooled, **options)
    used = rows if pooled else one_cluster_per_row(model, rows)
    log_rows = log_densities(posterior, used, source, draws)
    made = predict_rows(posterior, used, source, draws=draws, prob=prob, seed=seed)
    # log E[prod_i p(y_i | draw)] of each cluster, as the mean over draws.
    by_cluster = np.stack([np.bincount(codes, row_values) for row_values in log_rows])
    elpd = scipy.special.logsumexp(by_cluster, axis=0) - np.log(len(log_rows))
    if unseen in ("marginal", "adapt"):
        exact = _joint_log_density(posterior, rows, support, factor, new[factor], draws, seed)
        elpd = np.where(np.isnan(exact), elpd, exact)
    scores, summary = _scored(codes, y, made, log_rows, elpd)
    pit = _pit(y, made, seed)
    if rows.status is not None and bool((rows.status != EVENT).any()):
        scores, summary = _of_censored(scores), _of_censored(summary)
        summary["concordance"] = harrell(y, rows.status.numpy(), made.mean)
        pit = np.full_like(pit, np.nan)
    table = pd.DataFrame({"factor": factor, "cluster": new[factor].astype(object), **scores})
    return ClusterScores(mode, table, pit, summary, rows.row_labels)


def crps(draws: DrawsByRow, y: ByRow) -> ByRow:
    """Continuous ranked probability score E|X - y| - E|X - X'| / 2, estimated without bias.

    Examples
    --------
    >>> crps(np.array([[0.0], [2.0]]), np.array([1.0])).tolist()
    [0.0]
    """
    n = len(draws)
    order = np.sort(draws.astype(float), 0)
    weight = 2 * np.arange(1, n + 1) - n - 1
    spread = (weight[:, None] * order).sum(0) / (n * (n - 1))
    return np.abs(draws - y).mean(0) - spread


def _scored(
    codes: Int[np.ndarray, " rows"],
    y: ByRow,
    made: Prediction,
    log_rows: DrawsByRow,
    elpd: ByCluster,
) -> tuple[dict[str, Any], dict[str, float]]:
    """Scores of every cluster, and over all rows."""
    mean, outcome, n = made.mean, made.outcome.astype(float), len(elpd)
    counts = np.bincount(codes, minlength=n)
    table: dict[str, Any] = {"rows": counts}
    summary = {"clusters": float(n), "rows": float(len(y))}

    def add(name: str, by_row: ByRow, scale: Callable[[Any], Any] = np.asarray) -> None:
        table[name] = scale(np.bincount(codes, by_row, minlength=n) / np.maximum(counts, 1))
        summary[name] = float(scale(by_row.mean()))

    if mean.ndim == 1:
        lower, upper = np.quantile(outcome, [(1 - made.prob) / 2, (1 + made.prob) / 2], axis=0)
        p_values = _replicated(outcome, y, codes, n)
        add("rmse", (y - mean) ** 2, np.sqrt)
        add("coverage", ((lower <= y) & (y <= upper)).astype(float))
        summary["mean_coverage"] = float((np.abs(p_values["mean"] - 0.5) <= made.prob / 2).mean())
        add("width", upper - lower)
        add("crps", crps(outcome, y))
        table |= {f"{name}_p": value for name, value in p_values.items()}
        summary["pit_distance"] = float(scipy.stats.kstest(p_values["mean"], "uniform").statistic)
    if mean.ndim == 2 or set(np.unique(y)) <= {0.0, 1.0}:
        chance = mean if mean.ndim == 2 else np.stack([1 - mean, mean], 1)
        add("accuracy", (chance.argmax(1) == y).astype(float))
        if chance.shape[1] == 2 and 0 < y.mean() < 1:
            from sklearn import metrics  # slow to import

            summary["auroc"] = float(metrics.roc_auc_score(y, chance[:, 1]))
    add("log_score", scipy.special.logsumexp(log_rows, axis=0) - np.log(len(log_rows)))
    return table | {"elpd": elpd}, summary | {"elpd": float(elpd.sum())}


def _of_censored(scores: Mapping[str, Any]) -> dict[str, Any]:
    """The scores that need no exact outcomes."""
    return {name: value for name, value in scores.items() if name not in OF_EXACT}


def _pit(y: ByRow, made: Prediction, seed: int) -> np.ndarray:
    """Randomised probability integral transforms; NaN for classes."""
    if made.expected.ndim == 3:
        return np.full(len(y), np.nan)
    uniform = np.random.default_rng([seed, 23]).random(len(y))
    return (made.outcome < y).mean(0) + uniform * (made.outcome == y).mean(0)


def _replicated(
    outcome: DrawsByRow, y: ByRow, codes: Int[np.ndarray, " rows"], n: int
) -> dict[str, ByCluster]:
    """Mid-p-values of each cluster's mean and standard deviation among replicated outcomes."""
    order = np.argsort(codes, kind="stable")
    starts = np.searchsorted(codes[order], np.arange(n))
    counts = np.bincount(codes, minlength=n)

    def moments(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean = np.add.reduceat(values[..., order], starts, -1) / counts
        square = np.add.reduceat(values[..., order] ** 2, starts, -1) / counts
        return mean, np.sqrt(np.maximum(square - mean**2, 0))

    p_values = {}
    for name, actual, drawn in zip(("mean", "sd"), moments(y), moments(outcome), strict=True):
        # Equal values whose sums were taken in another order differ in the last bits.
        tie = np.isclose(drawn, actual, rtol=1e-9, atol=1e-12)
        p_values[name] = ((drawn < actual) & ~tie).mean(0) + 0.5 * tie.mean(0)
    p_values["sd"] = np.where(counts > 1, p_values["sd"], np.nan)
    return p_values


@torch.no_grad()
def log_densities(
    posterior: Posterior, data: ClusteredData, source: EffectSource, draws: int
) -> DrawsByRow:
    """Return log p(y_i | draw) of every row."""
    model = posterior.model
    levels = model.data_facts().levels_with(data)
    rows = model.encode(data, levels)
    latents, _ = with_new_effects(model, source, levels, rows)
    n = n_draws(latents) or draws
    pieces = [
        model.log_likelihood(part, latents).expand(n, -1).double().cpu().numpy()
        for part in rows.chunks(max(1, BLOCK_VALUES // (n * values_per_row(model))))
    ]
    return np.concatenate(pieces, 1)


def _joint_log_density(
    posterior: Posterior,
    data: ClusteredData,
    support: ClusteredData | None,
    factor: str,
    labels: pd.Index,
    draws: int,
    seed: int,
) -> ByCluster:
    """Return log p(y_k | support) of each cluster, its effects integrated out in every draw.

    NaN if the cluster shares rows with another new cluster of the factor. A mean over draws of the
    effects, too, would be too noisy for clusters with many rows.
    """
    both = data if support is None else joined(posterior, support, data)
    whole = _evidence(posterior, both, factor, draws, seed)
    part = {} if support is None else _evidence(posterior, support, factor, draws, seed)
    missing, nothing = np.full(draws, np.nan), np.zeros(draws)

    def total(evidence: Mapping[str, np.ndarray], otherwise: np.ndarray) -> ByCluster:
        values = [evidence.get(str(label), otherwise) for label in labels]
        return scipy.special.logsumexp(values, axis=1)

    return total(whole, missing) - total(part, nothing)


def _evidence(
    posterior: Posterior, data: ClusteredData, factor: str, draws: int, seed: int
) -> dict[str, Float[np.ndarray, " draws"]]:
    """Return log p(y_k | draw) of each new cluster without connections to others of its factor."""
    model, by_label = posterior.model, {}
    latents, new = posterior.draws(draws, seed=seed), new_clusters(model, data)
    number = [f.name for f in model.factors].index(factor)
    seen = len(model.data_facts().levels[factor])
    for groups, evidence in condition(posterior, data, latents, seed).evidence:
        for place, nodes in enumerate(groups):
            clusters = [cluster for f, cluster in nodes if f == number]
            if len(clusters) == 1:
                value = evidence[:, place].double().cpu().numpy()
                by_label[str(new[factor][clusters[0] - seen])] = np.broadcast_to(value, draws)
    return by_label


def evaluate(
    posterior: Posterior,
    held_out: Mapping[str, ClusteredData],
    *,
    prob: float = 0.9,
    draws: int = 1000,
) -> pd.DataFrame:
    """Scores of the predictions of held-out rows with outcomes, one row per set.

    New clusters among the rows are predicted by the mode "marginal". The columns are held_out (name
    of the set), rows and unseen (rows in clusters not seen in training). Outcomes with classes have
    also auroc (one class against the rest), accuracy and log_loss; censored outcomes have Harrell's
    concordance; other outcomes have rmse and coverage (share of outcomes inside their predictive
    interval).
    """
    records, settings = [], {"prob": prob, "draws": draws}
    source = Marginal(posterior.draws(draws), posterior.seed)
    for name, data in held_out.items():
        if data.outcome is None:
            raise ValueError(f"the held-out rows {name!r} have no outcome to compare with")
        made, y = predict_rows(posterior, data, source, **settings), data.outcome.numpy()
        unseen = int((made.unseen != "").sum())
        record: dict[str, Any] = {"held_out": name, "rows": len(y), "unseen": unseen}
        if posterior.model.family.is_class:
            codes = posterior.model.family.codes(y).astype(int)
            record |= _class_scores(codes, made.mean)
        elif data.status is not None:
            record["concordance"] = harrell(y, data.status.numpy(), made.mean)
        else:
            lower, upper = made.interval(of="outcome")
            record["rmse"] = float(np.sqrt(((y - made.mean) ** 2).mean()))
            record["coverage"] = float(((lower <= y) & (y <= upper)).mean())
        records.append(record)
    return pd.DataFrame(records)


def _class_scores(y: np.ndarray, mean: np.ndarray) -> dict[str, float]:
    from sklearn import metrics  # slow to import

    probability = mean if mean.ndim == 2 else np.stack([1 - mean, mean], 1)
    # The AUROC of a class is undefined if all rows, or none, are of that class.
    areas = [
        metrics.roc_auc_score(y == code, probability[:, code])
        for code in range(1 if mean.ndim == 1 else 0, probability.shape[1])
        if 0 < (y == code).sum() < len(y)
    ]
    labels = np.arange(probability.shape[1])
    return {
        "auroc": float(np.mean(areas)) if areas else float("nan"),
        "accuracy": float(metrics.accuracy_score(y, probability.argmax(1))),
        "log_loss": float(metrics.log_loss(y, probability, labels=labels)),
    }
