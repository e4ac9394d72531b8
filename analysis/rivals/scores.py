"""Scores of predicted probabilities and of rebuilt images, with intervals and tests."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Shaped
from scipy.stats import norm, rankdata, t
from sklearn.metrics import (
    balanced_accuracy_score,
    brier_score_loss,
    calinski_harabasz_score,
    davies_bouldin_score,
    log_loss,
    recall_score,
    roc_auc_score,
    roc_curve,
)

from armed_pyro import ClusteredData
from armed_pyro.analysis.rivals.rival import Setting, Trained, run_to_layer

__all__ = [
    "IMAGE_METRICS",
    "METRICS",
    "DeLong",
    "Estimate",
    "binary_metrics",
    "bounded",
    "calibration_error",
    "delong",
    "image_metrics",
    "latents",
    "resampled",
    "youden_threshold",
]

# Each metric with its largest possible value; the smallest is 0.
METRICS: Mapping[str, float] = {
    "auroc": 1.0,
    "balanced accuracy": 1.0,
    "sensitivity": 1.0,
    "specificity": 1.0,
    "brier": 1.0,
    "ece": 1.0,
    "log loss": math.inf,
}
IMAGE_METRICS: Mapping[str, float] = dict.fromkeys(
    ("image mse", "davies-bouldin", "calinski-harabasz"), math.inf
)


def youden_threshold(y: Float[np.ndarray, " rows"], p: Float[np.ndarray, " rows"]) -> float:
    """The threshold with the highest sensitivity + specificity - 1; class 1 is p at or above it.

    Examples
    --------
    >>> youden_threshold(np.array([0, 0, 1, 1]), np.array([0.1, 0.3, 0.4, 0.9]))
    0.4
    """
    false_positive, sensitivity, thresholds = roc_curve(y, p)
    return float(thresholds[np.argmax(sensitivity - false_positive)])


def calibration_error(
    y: Float[np.ndarray, " rows"], p: Float[np.ndarray, " rows"], bins: int = 10
) -> float:
    r"""Expected calibration error.

    .. math:: \sum_b \frac{n_b}{n} \, |\bar y_b - \bar p_b|

    over bins of equal width.

    References
    ----------
    Guo, Pleiss, Sun, Weinberger (2017), "On calibration of modern neural networks", ICML.

    Examples
    --------
    >>> round(calibration_error(np.array([0, 1, 1, 1]), np.array([0.72, 0.72, 0.78, 0.78])), 6)
    0.0
    """
    place = np.minimum((p * bins).astype(int), bins - 1)
    return float(np.abs(np.bincount(place, y - p)).sum() / len(y))


def binary_metrics(
    y: Float[np.ndarray, " rows"], p: Float[np.ndarray, " rows"], threshold: float
) -> dict[str, float]:
    """`METRICS` of probabilities of class 1, with this threshold between the classes.

    The AUROC is missing if all rows are of one class.

    Examples
    --------
    >>> y, p = np.array([0, 0, 1, 1]), np.array([0.1, 0.6, 0.4, 0.9])
    >>> {k: binary_metrics(y, p, 0.5)[k] for k in ("auroc", "sensitivity", "specificity")}
    {'auroc': 0.75, 'sensitivity': 0.5, 'specificity': 0.5}
    """
    both, chosen = len(np.unique(y)) == 2, p >= threshold
    return {
        "auroc": float(roc_auc_score(y, p)) if both else np.nan,
        "balanced accuracy": float(balanced_accuracy_score(y, chosen)) if both else np.nan,
        "sensitivity": float(recall_score(y, chosen, zero_division=np.nan)),
        "specificity": float(recall_score(y, chosen, pos_label=0, zero_division=np.nan)),
        "brier": float(brier_score_loss(y, p, pos_label=1)),
        "ece": calibration_error(y, p),
        "log loss": float(log_loss(y, p, labels=[0, 1])),
    }


def image_metrics(trained: Trained, data: ClusteredData, setting: Setting) -> dict[str, float]:
    """`IMAGE_METRICS` of a model that rebuilds its features; empty for any other model.

    The mean squared error is per value, in the features' units. The two indices describe how the
    latents are grouped by cluster. Latents that do not tell the clusters apart have a large
    Davies-Bouldin and a small Calinski-Harabasz index; rows whose clusters are randomised show how
    large and how small these can be.

    Examples
    --------
    ``image_metrics(trained, fold.test, rival.setting)["image mse"]``
    """
    if trained.rebuild is None:
        return {}
    error = trained.rebuild(data) - data.features.numpy()
    place = latents(trained, data, setting.architecture.last)
    codes = data.grouping(setting.factor).codes.numpy()
    apart = 1 < len(np.unique(codes)) < len(codes)
    return {
        "image mse": float(np.square(error).mean()),
        "davies-bouldin": float(davies_bouldin_score(place, codes)) if apart else math.nan,
        "calinski-harabasz": float(calinski_harabasz_score(place, codes)) if apart else math.nan,
    }


@torch.no_grad()
def latents(trained: Trained, data: ClusteredData, layer: str) -> Float[np.ndarray, "rows width"]:
    """Activations of a module of the network, for the rows.

    Examples
    --------
    ``latents(trained, fold.test, "latents")``
    """
    like = next(trained.net.parameters())
    x = trained.standardise(data.features).to(like)
    return run_to_layer(trained.net.eval(), x, layer)[1].double().numpy()


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95% interval, and the p-value of the hypothesis that it is zero."""

    mean: float
    lower: float
    upper: float
    p: float


def resampled(values: Float[np.ndarray, " resamples"], ratio: float) -> Estimate:
    r"""Mean over resamples, with the corrected resampled t test of Nadeau and Bengio.

    .. math:: t = \bar d \, \big/ \sqrt{(1 / J + ratio) \, s^2}, \quad J - 1
              \text{ degrees of freedom}

    Folds share training rows, so the variance of their mean exceeds that of J independent values
    by about `ratio`, the test rows over the training rows. Data sets that were drawn independently
    have the ratio 0, which gives the ordinary paired t test. Missing values are left out. There is
    no interval if fewer than two values are left, or if all are equal.

    References
    ----------
    Nadeau, Bengio (2003), "Inference for the generalization error", Machine Learning 52.

    Examples
    --------
    >>> gain = resampled(np.array([0.1, 0.2, 0.3]), ratio=0.0)
    >>> round(gain.mean, 3), round(gain.p, 3)
    (0.2, 0.074)
    """
    values = values[~np.isnan(values)]
    if len(values) < 2:
        return Estimate(float(values.mean()) if len(values) else np.nan, np.nan, np.nan, np.nan)
    mean, freedom = float(values.mean()), len(values) - 1
    error = float(np.sqrt((1 / len(values) + ratio) * values.var(ddof=1)))
    if np.ptp(values) < 1e-12:
        # Two or three equal differences of a few rows are no proof, whatever t would say.
        return Estimate(mean, np.nan, np.nan, 1.0 if abs(mean) < 1e-12 else np.nan)
    half = float(t.ppf(0.975, freedom)) * error
    p = float(2 * t.sf(abs(mean) / error, freedom))
    return Estimate(mean, mean - half, mean + half, p)


def bounded(values: Float[np.ndarray, " resamples"], ratio: float, most: float = 1.0) -> Estimate:
    r"""Mean over resamples of a quantity between 0 and `most`, with an interval in this range.

    .. math:: g(\bar v) \pm t_{J - 1} \, g'(\bar v) \, se, \quad
              g(v) = \log v - \log (1 - v / most)

    The ends are taken back to the quantity's scale, and se is the standard error of `resampled`.
    This is the delta method, on the logit scale for a proportion such as an AUROC, and on the log
    scale for a quantity without an upper limit. The mean is the plain mean of the values. Far from
    the limits, the interval is the plain t interval; there is none where `resampled` has none. The
    p-value, as in `resampled`, is for a mean of zero.

    Parameters
    ----------
    values : Float[ndarray, "resamples"]
        Values from 0 to `most`, both included.
    ratio : float
        See `resampled`.
    most : float
        Largest possible value; infinity if there is no limit.

    Raises
    ------
    ValueError
        If a value is out of range.

    Examples
    --------
    >>> auroc = bounded(np.array([0.9, 0.98, 0.99]), ratio=0.0)
    >>> round(auroc.lower, 3), round(auroc.mean, 3), round(auroc.upper, 3)
    (0.535, 0.957, 0.998)
    """
    out = values[(values < 0) | (values > most)]
    if len(out):
        raise ValueError(f"the values must lie between 0 and {most}, but there is {out[0]}")
    plain = resampled(values, ratio)
    mean, free = plain.mean, 1 - plain.mean / most
    if math.isnan(plain.lower) or min(mean, free) <= 0:
        return Estimate(mean, math.nan, math.nan, plain.p)
    # On the scale of g; exp(g) = v / (1 - v / most).
    half = (plain.upper - mean) / (mean * free)
    odds = np.exp(np.log(mean / free) + np.array([-half, half]))
    lower, upper = odds / (1 + odds / most)
    return Estimate(mean, float(lower), float(upper), plain.p)


@dataclass(frozen=True, eq=False)
class DeLong:
    """AUROCs of several models on the same rows, and their covariance matrix.

    Attributes
    ----------
    auroc : Float[ndarray, "models"]
    covariance : Float[ndarray, "models models"]
    """

    auroc: Float[np.ndarray, " models"]
    covariance: Float[np.ndarray, "models models"]

    def of(self, model: int) -> Estimate:
        """AUROC of a model, with an interval symmetric on the logit scale and p for AUROC = 0.5."""
        auroc, variance = float(self.auroc[model]), float(self.covariance[model, model])
        if not 0 < auroc < 1 or variance == 0:
            return Estimate(auroc, np.nan, np.nan, np.nan)
        logit, error = np.log(auroc / (1 - auroc)), np.sqrt(variance) / (auroc * (1 - auroc))
        lower, upper = (
            1 / (1 + np.exp(-(logit + sign * norm.ppf(0.975) * error))) for sign in (-1, 1)
        )
        p = 2 * norm.sf(abs(auroc - 0.5) / np.sqrt(variance))
        return Estimate(auroc, float(lower), float(upper), float(p))

    def difference(self, model: int, other: int) -> Estimate:
        """AUROC of the first model minus that of the second, with DeLong's test."""
        contrast = np.zeros(len(self.auroc))
        contrast[model] += 1
        contrast[other] -= 1
        mean = float(contrast @ self.auroc)
        error = float(np.sqrt(max(contrast @ self.covariance @ contrast, 0.0)))
        half = float(norm.ppf(0.975)) * error
        p = float(2 * norm.sf(abs(mean) / error)) if error > 0 else 1.0
        return Estimate(mean, mean - half, mean + half, p)


def delong(
    y: Float[np.ndarray, " rows"],
    scores: Float[np.ndarray, "models rows"],
    clusters: Shaped[np.ndarray, " rows"] | None = None,
) -> DeLong:
    r"""AUROCs and their covariance from structural components.

    .. math:: V^{10}_i = \frac{1}{n} \sum_j \psi(s_i, s_j), \quad
              V^{01}_j = \frac{1}{m} \sum_i \psi(s_i, s_j), \quad
              \psi = 1[s_i > s_j] + \tfrac12 1[s_i = s_j]

    i runs over the m rows of class 1 and j over the n rows of class 0; this is DeLong's estimator.
    Rows within a cluster may be dependent. Therefore, with K clusters, :math:`(V^{10} - AUROC) / m`
    and :math:`(V^{01} - AUROC) / n` are summed within each cluster, and the covariance is
    K / (K - 1) times the sum of the products of these sums. This is Obuchowski's estimator with the
    same factor for both classes, so that no variance can become negative.

    Parameters
    ----------
    y : Float[ndarray, "rows"]
        Classes, 0 and 1.
    scores : Float[ndarray, "models rows"]
        Higher scores say that class 1 is more likely.
    clusters : Shaped[ndarray, "rows"], optional
        Labels of the rows' clusters.

    Raises
    ------
    ValueError
        If there are not both classes among the rows.

    References
    ----------
    DeLong, DeLong, Clarke-Pearson (1988), Biometrics 44; Obuchowski (1997), Biometrics 53.

    Examples
    --------
    >>> y, scores = np.array([0, 1, 0, 1]), np.array([[1.0, 2.0, 3.0, 4.0]])
    >>> delong(y, scores).auroc
    array([0.75])
    """
    positive = np.asarray(y) == 1
    m, n = int(positive.sum()), int((~positive).sum())
    if m == 0 or n == 0:
        raise ValueError(f"an AUROC needs rows of both classes, found {m} of 1 and {n} of 0")
    rank = rankdata(scores, axis=1)
    components = np.empty(scores.shape)
    components[:, positive] = (rank[:, positive] - rankdata(scores[:, positive], axis=1)) / n
    components[:, ~positive] = 1 - (rank[:, ~positive] - rankdata(scores[:, ~positive], axis=1)) / m
    auroc = components[:, positive].mean(1)
    first, second = (
        np.where(rows, components - auroc[:, None], 0.0) / rows.sum()
        for rows in (positive, ~positive)
    )
    if clusters is None:
        covariance = m / max(m - 1, 1) * first @ first.T + n / max(n - 1, 1) * second @ second.T
    else:
        _, codes = np.unique(clusters, return_inverse=True)
        total = np.stack([np.bincount(codes, component) for component in first + second])
        count = total.shape[1]
        covariance = count / max(count - 1, 1) * total @ total.T
    return DeLong(auroc, covariance)
