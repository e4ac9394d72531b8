"""How well the outcomes of new clusters are predicted, cluster by cluster and mode by mode."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float, Int
from scipy import stats
from scipy.special import logsumexp
from sklearn import metrics

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.data.xarray_names import label_values, variable_name
from armed_pyro.inference.posterior import Posterior
from armed_pyro.prediction.adapt import adapt, check_support, joined
from armed_pyro.prediction.chunks import extended, predict_chunks
from armed_pyro.prediction.cluster_classifier import Classifiers
from armed_pyro.prediction.new_clusters import condition
from armed_pyro.prediction.result import Prediction
from armed_pyro.prediction.sources import effect_source
from armed_pyro.prediction.unseen import EffectSource, apart, new_clusters
from armed_pyro.program.blocks import BLOCK_VALUES

__all__ = ["ClusterScores", "compare_modes", "crps", "score_mode"]


# The paper's way, beside the modes themselves.
BY_ROW = "membership by row"


@dataclass(frozen=True, eq=False)
class ClusterScores:
    """Scores of one mode on the outcomes of new clusters.

    Attributes
    ----------
    mode : str
    table : pandas.DataFrame
        One row a cluster: factor, cluster, rows; rmse (of the posterior mean); coverage and width
        of the predictive intervals of outcomes; crps (continuous ranked probability score, means
        over rows; not for classes); log_score (mean log predictive density of a row); elpd (log
        predictive density of all the cluster's rows jointly); mean_p and sd_p (mid-p-values of the
        mean and standard deviation of the cluster's outcomes among replications of them).
    pit : Float[ndarray, "rows"]
        Probability integral transform of every outcome, randomised where it is discrete: uniform if
        predictions are calibrated. Not for classes.
    summary : mapping of str to float
        Over all rows and clusters.
    row_labels : pandas.Index
        Of `pit`.

    Examples
    --------
    ``score_mode(fit, held_out, "marginal").table``

    References
    ----------
    Gneiting and Raftery (2007), JASA 102(477): strictly proper scoring rules.
    Czado, Gneiting, Held (2009), Biometrics 65(4): randomised PIT of counts.
    """

    mode: str
    table: pd.DataFrame
    pit: Float[np.ndarray, " rows"]
    summary: Mapping[str, float]
    row_labels: pd.Index

    def to_dataset(self) -> xr.Dataset:
        """Scores with the dimensions <factor> and row, to stand beside `Prediction.to_datatree`."""
        factor = variable_name(str(self.table["factor"].iloc[0]))
        columns = self.table.drop(columns=["factor", "cluster"])
        values = {str(name): (factor, one.to_numpy()) for name, one in columns.items()}
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
    """One row for each mode: how well it predicts the new clusters' outcomes.

    Parameters
    ----------
    posterior : Posterior
        The fitted program.
    data : ClusteredData or table
        Rows with outcomes; those of new clusters are scored. The support's should not be among
        them.
    modes : sequence of str, optional
        By default all that apply: "adapt" with support only, "membership" and "nearest" with
        features only. "membership by row" takes each row as a cluster of its own.
    support : ClusteredData or table, optional
        Labelled rows of the new clusters, for "adapt".
    factor : str, optional
        The grouping factor whose new clusters are scored; the first that has any.

    Returns
    -------
    pandas.DataFrame
        Columns mode, clusters, rows, rmse (or accuracy and auroc), coverage, mean_coverage (of the
        intervals of the clusters' means), width, crps, log_score, elpd, elpd_diff (to the mode with
        the highest) with its standard error over clusters, and pit_distance (largest gap between
        the distribution of the clusters' mean_p and the uniform one, Kolmogorov's).

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
    settings: dict[str, Any] = {"factor": factor, "draws": draws, "prob": prob, "seed": seed}
    settings["classifiers"] = Classifiers() if classifiers is None else classifiers
    with warnings.catch_warnings():
        # Of clusters like no seen one: the table shows what membership is worth.
        warnings.filterwarnings("ignore", message="no cluster of")
        made = [
            score_mode(
                posterior, rows, mode, support=support if mode == "adapt" else None, **settings
            )
            for mode in modes
        ]
    table = pd.DataFrame([{"mode": one.mode, **one.summary} for one in made])
    elpd = np.stack([one.table["elpd"].to_numpy() for one in made])
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
    """Scores of one mode; see `compare_modes` for the parameters."""
    model, facts = posterior.model, posterior.model.data_facts()
    rows = posterior.encode(data)
    if rows.outcome is None:
        raise ValueError(
            f"scores compare predictions with outcomes, but the rows have no {facts.outcome_name!r}"
        )
    model.family.check(rows)
    new = new_clusters(facts, model, rows)
    named = [name for name, labels in new.items() if len(labels)]
    factor = factor or next(iter(named), None)
    if factor not in named:
        raise ValueError(
            f"no cluster of {factor or 'any factor'!r} is new in these rows: there is nothing to "
            "compare modes on"
        )
    codes = model.encode(rows, facts.levels_with(rows)).codes[factor].cpu().numpy()
    seen = len(facts.levels[factor])
    rows = rows.take(codes >= seen)
    codes = codes[codes >= seen] - seen
    unseen, pooled = ("membership", False) if mode == BY_ROW else (mode, True)
    seed = posterior.seed if seed is None else seed
    if unseen == "adapt" and support is not None:
        given = posterior.encode(support)
        check_support(posterior, given)
        source: EffectSource = adapt(posterior, given, draws=draws, seed=seed).source()
    else:
        given = None
        source, _ = effect_source(
            posterior,
            rows,
            unseen,
            pooled=pooled,
            draws=draws,
            seed=seed,
            classifiers=classifiers,
        )
    used = rows if pooled else apart(model, rows)
    parts = predict_chunks(posterior, used, source, draws=draws, prob=prob, seed=seed)
    log_rows = _log_densities(posterior, used, source, draws)
    made = list(parts)
    elpd = _by_draws(log_rows, codes)
    if unseen in ("marginal", "adapt"):
        exact = _nested(posterior, rows, given, factor, new[factor], draws, seed)
        elpd = np.where(np.isnan(exact), elpd, exact)
    return _scored(mode, factor, new[factor], codes, rows, made, log_rows, elpd, prob, seed)


def crps(
    draws: Float[np.ndarray, "draws rows"], y: Float[np.ndarray, " rows"]
) -> Float[np.ndarray, " rows"]:
    """Continuous ranked probability score E|X - y| - E|X - X'| / 2, without bias by the draws.

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
    mode: str,
    factor: str,
    labels: pd.Index,
    codes: Int[np.ndarray, " rows"],
    data: ClusteredData,
    parts: list[Prediction],
    log_rows: Float[np.ndarray, "draws rows"],
    elpd: Float[np.ndarray, " clusters"],
    prob: float,
    seed: int,
) -> ClusterScores:
    assert data.outcome is not None  # for mypy: checked before
    y, n = data.outcome.numpy(), len(labels)
    mean = np.concatenate([part.mean for part in parts])
    outcome = np.concatenate([part.outcome for part in parts], 1).astype(float)
    counts = np.bincount(codes, minlength=n)

    def average(values: np.ndarray) -> np.ndarray:
        return np.bincount(codes, values, minlength=n) / np.maximum(counts, 1)

    row_score = logsumexp(log_rows, axis=0) - np.log(len(log_rows))
    table: dict[str, Any] = {"factor": factor, "cluster": labels.astype(object), "rows": counts}
    summary = {"clusters": float(n), "rows": float(len(y))}
    if mean.ndim == 1:
        lower, upper = np.quantile(outcome, [(1 - prob) / 2, (1 + prob) / 2], axis=0)
        inside = ((lower <= y) & (y <= upper)).astype(float)
        ranked = crps(outcome, y)
        table |= {
            "rmse": np.sqrt(average((y - mean) ** 2)),
            "coverage": average(inside),
            "width": average(upper - lower),
            "crps": average(ranked),
        }
        p_values = _replicated(outcome, y, codes, n)
        table |= {f"{name}_p": value for name, value in p_values.items()}
        summary |= {
            "rmse": float(np.sqrt(((y - mean) ** 2).mean())),
            "coverage": float(inside.mean()),
            "mean_coverage": float((np.abs(p_values["mean"] - 0.5) <= prob / 2).mean()),
            "width": float((upper - lower).mean()),
            "crps": float(ranked.mean()),
            "pit_distance": float(stats.kstest(p_values["mean"], "uniform").statistic),
        }
    if mean.ndim == 2 or set(np.unique(y)) <= {0.0, 1.0}:
        chance = mean if mean.ndim == 2 else np.stack([1 - mean, mean], 1)
        right = (chance.argmax(1) == y).astype(float)
        table["accuracy"] = average(right)
        summary["accuracy"] = float(right.mean())
        if chance.shape[1] == 2 and 0 < y.mean() < 1:
            summary["auroc"] = float(metrics.roc_auc_score(y, chance[:, 1]))
    table |= {"log_score": average(row_score), "elpd": elpd}
    summary |= {"log_score": float(row_score.mean()), "elpd": float(elpd.sum())}
    uniform = np.random.default_rng([seed, 23]).random(len(y))
    pit = (outcome < y).mean(0) + uniform * (outcome == y).mean(0)
    pit = pit if mean.ndim == 1 else np.full(len(y), np.nan)
    return ClusterScores(mode, pd.DataFrame(table), pit, summary, data.row_labels)


def _replicated(
    outcome: Float[np.ndarray, "draws rows"],
    y: Float[np.ndarray, " rows"],
    codes: Int[np.ndarray, " rows"],
    n: int,
) -> dict[str, Float[np.ndarray, " clusters"]]:
    """Mid-p-values of each cluster's mean and standard deviation among the replications."""
    order = np.argsort(codes, kind="stable")
    starts = np.searchsorted(codes[order], np.arange(n))
    counts = np.bincount(codes, minlength=n)

    def moments(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean = np.add.reduceat(values[..., order], starts, -1) / counts
        square = np.add.reduceat(values[..., order] ** 2, starts, -1) / counts
        return mean, np.sqrt(np.maximum(square - mean**2, 0))

    found = {}
    for name, own, others in zip(("mean", "sd"), moments(y), moments(outcome), strict=True):
        # Sums in another order differ in the last bits.
        tie = np.isclose(others, own, rtol=1e-9, atol=1e-12)
        found[name] = ((others < own) & ~tie).mean(0) + 0.5 * tie.mean(0)
    found["sd"] = np.where(counts > 1, found["sd"], np.nan)
    return found


@torch.no_grad()
def _log_densities(
    posterior: Posterior, data: ClusteredData, source: EffectSource, draws: int
) -> Float[np.ndarray, "draws rows"]:
    """log p(y_i | draw)."""
    model = posterior.model
    levels = model.data_facts().levels_with(data)
    rows = model.encode(data, levels)
    latents, _ = extended(model, source, levels, rows)
    n = max([0, *(one.shape[0] for one in latents.values() if one.dim() > 1)]) or draws
    terms = sum(len(factor.terms) for factor in model.factors) + 1
    pieces = [
        model.log_likelihood(part, latents).expand(n, -1).double().cpu().numpy()
        for part in rows.chunks(max(1, BLOCK_VALUES // (n * terms)))
    ]
    return np.concatenate(pieces, 1)


def _by_draws(
    log_rows: Float[np.ndarray, "draws rows"], codes: Int[np.ndarray, " rows"]
) -> Float[np.ndarray, " clusters"]:
    """log E[prod_i p(y_i | draw)] of each cluster, by the mean over draws."""
    sums = np.stack([np.bincount(codes, one) for one in log_rows])
    return logsumexp(sums, axis=0) - np.log(len(sums))


def _nested(
    posterior: Posterior,
    data: ClusteredData,
    support: ClusteredData | None,
    factor: str,
    labels: pd.Index,
    draws: int,
    seed: int,
) -> Float[np.ndarray, " clusters"]:
    """log p(y_k | support), with the effects integrated out in every draw; nan where tied.

    The mean over draws alone would need very many draws where a cluster has many rows.
    """
    both = data if support is None else joined(posterior, support, data)
    whole = _evidence(posterior, both, factor, draws, seed)
    part = {} if support is None else _evidence(posterior, support, factor, draws, seed)
    nothing = np.zeros(draws)
    return np.array(
        [
            np.nan
            if str(label) not in whole
            else logsumexp(whole[str(label)]) - logsumexp(part.get(str(label), nothing))
            for label in labels
        ]
    )


def _evidence(
    posterior: Posterior, data: ClusteredData, factor: str, draws: int, seed: int
) -> dict[str, Float[np.ndarray, " draws"]]:
    """log p(y_k | draw) of each new cluster that shares no row with others of its factor."""
    model, facts = posterior.model, posterior.model.data_facts()
    latents = dict(posterior.draws(draws, seed=seed))
    if not model.factors:
        return {}
    new = new_clusters(facts, model, data)
    effects = {
        one.name: latents[one.effect_site].new_zeros(draws, len(new[one.name]), len(one.terms))
        for one in model.factors
    }
    parts: list[Any] = []
    condition(posterior, data, latents, effects, new, seed, False, {"efficiency": 1.0}, parts)
    names, found = [one.name for one in model.factors], {}
    number, seen = names.index(factor), len(facts.levels[factor])
    for groups, evidence in parts:
        for place, nodes in enumerate(groups):
            own = [cluster for f, cluster in nodes if f == number]
            if len(own) == 1:
                value = evidence[:, place].double().cpu().numpy()
                found[str(new[factor][own[0] - seen])] = np.broadcast_to(value, draws)
    return found
