"""Test of confounding over several fits: whether models rank probes above true features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd
import scipy
from jaxtyping import Float

from armed_pyro._messages import check_known
from armed_pyro.explain.attribution import Attribution

FEWEST = 2  # fits per model


@dataclass(frozen=True, eq=False)
class ProbeTest:
    """Comparison of the importance of probes and of true features, model by model.

    Attributes
    ----------
    table : pandas.DataFrame
        One row per model: model; fits; true_first, the share of fits in which every true feature
        is more important than every probe; margin, the median of log(importance of the least
        important true feature / importance of the most important probe); p_true_first,
        p_probe_first, p_difference (see `probe_test`); verdict: "true features first",
        "a probe first" or "undecided".
    pairs : pandas.DataFrame
        One row per model, true feature and probe: model, true, probe, above (share of fits in which
        the true feature is more important), log_ratio (median), p_above, p_below (one-sided).
    level : float
        Level of the verdicts.

    Examples
    --------
    >>> from armed_pyro import ProbeTest, probe_test
    >>> fits = [{"x": 2.0, "probe": 1.0}, {"x": 3.0, "probe": 1.0}]
    >>> ranks: ProbeTest = probe_test({"network": fits}, true=["x"], probes=["probe"])
    >>> ranks.pairs[["true", "probe", "above", "p_above"]]  # two fits are too few
      true  probe  above  p_above
    0    x  probe    1.0     0.25
    """

    table: pd.DataFrame
    pairs: pd.DataFrame
    level: float

    def __str__(self) -> str:
        lines = []
        for row in self.table.to_dict("records"):
            shown = min(row["p_true_first"], row["p_probe_first"])
            lines.append(
                f"{row['model']}: {row['verdict']} (p = {shown:.2g}); every true feature before "
                f"every probe in {row['true_first']:.0%} of {row['fits']} fits"
            )
        return "\n".join(lines)


def probe_test(
    importances: Mapping[str, Sequence[Attribution | Mapping[str, float]]],
    *,
    true: Sequence[str],
    probes: Sequence[str],
    reference: str | None = None,
    level: float = 0.05,
) -> ProbeTest:
    r"""Test whether models use features that are known to carry only cluster information.

    For fit f, true feature t and probe s let :math:`d_{fts} = \log(I_{ft} / I_{fs})`, with I the
    importances. The null hypothesis of Wilcoxon's signed-rank test over the fits is that
    :math:`d_{fts}` is symmetric about zero: neither feature is more important than the other.

    - p_true_first tests "not every true feature is more important than every probe". It is the
      largest one-sided p-value over pairs (an intersection-union test, which needs no correction).
    - p_probe_first tests "no probe is more important than a true feature". It is the smallest
      p-value of the other side, times the number of pairs (Bonferroni).
    - p_difference (two-sided) tests whether the margins :math:`\min_t \min_s d_{fts}` have the same
      distribution as those of the model `reference` (by default the first), paired by fit.

    The test treats fits as independent. Fits to overlapping folds of a data set are not quite
    independent, and describe that data set only: use several data sets or seeds for wider claims.
    With n fits no one-sided p-value is below :math:`2^{-n}`, so a verdict at the 5% `level` needs
    at least five fits.

    `importances` are results of `Fit.attribution`, or numbers by feature, of each model's fits;
    position f is the same fold or seed for all models. The `true` features affect the outcome, and
    the `probes` carry only cluster information.

    Raises
    ------
    ValueError
        If features are missing or on both lists, or models have different numbers of fits or
        fewer than two.

    References
    ----------
    Nguyen, Treacher, Montillo (2023), IEEE TPAMI 45(7), for the probes.
    Berger (1982), Technometrics 24(4): intersection-union tests.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> def fits(probe):
    ...     return [{"x": x, "probe": x * probe} for x in rng.lognormal(0, 0.3, size=8)]
    >>> print(probe_test({"A": fits(1.5), "B": fits(0.5)}, true=["x"], probes=["probe"]))
    A: a probe first (p = 0.0039); every true feature before every probe in 0% of 8 fits
    B: true features first (p = 0.0039); every true feature before every probe in 100% of 8 fits
    """
    if not true or not probes or set(true) & set(probes):
        raise ValueError(
            f"`true` and `probes` must each name at least one feature, and none in common, not "
            f"{list(true)} and {list(probes)}"
        )
    if not 0 < level < 1:
        raise ValueError(f"`level` must lie between 0 and 1, not {level}")
    if not importances:
        raise ValueError("give the importances of at least one model")
    counts = {model: len(fits) for model, fits in importances.items()}
    if len(set(counts.values())) > 1 or min(counts.values()) < FEWEST:
        raise ValueError(
            f"every model needs the same fits, at least {FEWEST}, paired by fold or seed, not "
            f"{counts}"
        )
    first = next(iter(importances)) if reference is None else reference
    check_known("model", [first], importances)
    ratios = {model: _log_ratios(fits, true, probes) for model, fits in importances.items()}
    margins = {model: ratio.min(1) for model, ratio in ratios.items()}
    records, pairs = [], []
    for model, ratio in ratios.items():
        above = [_signed_rank(d, "greater") for d in ratio.T]
        below = [_signed_rank(d, "less") for d in ratio.T]
        for (t, s), d, up, down in zip(product(true, probes), ratio.T, above, below, strict=True):
            pairs.append([model, t, s, float((d > 0).mean()), np.median(d), up, down])
        p_true, p_probe = max(above), min(1.0, len(below) * min(below))
        verdict = "true features first" if p_true <= level else "undecided"
        difference = margins[model] - margins[first]
        record = {
            "model": model,
            "fits": len(ratio),
            "true_first": float((margins[model] > 0).mean()),
            "margin": float(np.median(margins[model])),
            "p_true_first": p_true,
            "p_probe_first": p_probe,
            "p_difference": np.nan if model == first else _signed_rank(difference, "two-sided"),
            "verdict": "a probe first" if p_probe <= level else verdict,
        }
        records.append(record)
    names = ["model", "true", "probe", "above", "log_ratio", "p_above", "p_below"]
    table = pd.DataFrame(records)
    table.attrs["reference"] = first
    return ProbeTest(table, pd.DataFrame(pairs, columns=names), level)


def _log_ratios(
    fits: Sequence[Attribution | Mapping[str, float]], true: Sequence[str], probes: Sequence[str]
) -> Float[np.ndarray, "fits pairs"]:
    """Values d of every fit, one column per pair of true feature and probe."""
    rows = []
    for fit in fits:
        by_feature = _by_feature(fit)
        check_known("feature", (*true, *probes), by_feature)
        log = {}
        for name in (*true, *probes):
            value = by_feature[name]
            if not value >= 0:
                raise ValueError(f"an importance must be at least 0, not {value} ({name})")
            # An importance of exactly zero, as of a dead unit, would have no logarithm.
            log[name] = np.log(max(value, 1e-300))
        rows.append([log[t] - log[s] for t, s in product(true, probes)])
    return np.array(rows)


def _by_feature(importance: Attribution | Mapping[str, float]) -> Mapping[str, float]:
    """Importances per sd of the feature, summed over the columns of the predictor."""
    if not isinstance(importance, Attribution):
        return importance
    values = importance.table().groupby("feature")["importance"].sum()
    return {str(name): float(value) for name, value in values.items()}


def _signed_rank(differences: Float[np.ndarray, " fits"], alternative: str) -> float:
    """P-value of Wilcoxon's signed-rank test; 1 if all differences are zero."""
    if not differences.any():
        return 1.0
    return float(scipy.stats.wilcoxon(differences, alternative=alternative).pvalue)
