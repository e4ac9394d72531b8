"""Test of confounding: whether models rank probes above features that matter, over several fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

from armed_pyro._messages import unknown
from armed_pyro.explain.attributed import Attribution

__all__ = ["ProbeTest", "probe_test"]


FEWEST = 2


@dataclass(frozen=True, eq=False)
class ProbeTest:
    """Ranks of probes among the features that matter, model by model.

    Attributes
    ----------
    table : pandas.DataFrame
        One row a model: model; fits; true_first, the share of fits in which every true feature
        comes before every probe; margin, the median of log(least important true feature / most
        important probe); p_true_first, p_probe_first, p_difference (see `probe_test`); verdict:
        "true features first", "a probe first" or "undecided".
    pairs : pandas.DataFrame
        One row a model, true feature and probe: model, true, probe, above (the share of fits in
        which the true feature comes first), log_ratio (median), p_above, p_below (one-sided).
    level : float
        Level of the verdicts.

    Examples
    --------
    >>> from armed_pyro import ProbeTest, probe_test
    >>> fits = [{"x": 2.0, "probe": 1.0}, {"x": 3.0, "probe": 1.0}]
    >>> found: ProbeTest = probe_test({"network": fits}, true=["x"], probes=["probe"])
    >>> found.pairs[["true", "probe", "above", "p_above"]]  # two fits are too few
      true  probe  above  p_above
    0    x  probe    1.0     0.25
    """

    table: pd.DataFrame
    pairs: pd.DataFrame
    level: float

    def __str__(self) -> str:
        lines = []
        for one in self.table.to_dict("records"):
            shown = min(one["p_true_first"], one["p_probe_first"])
            lines.append(
                f"{one['model']}: {one['verdict']} (p = {shown:.2g}); every true feature before "
                f"every probe in {one['true_first']:.0%} of {one['fits']} fits"
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
    r"""Whether models use features that are known to carry cluster information only.

    For fit f, true feature t and probe s let :math:`d_{fts} = \log(I_{ft} / I_{fs})` with I the
    importances. Wilcoxon's signed-rank test over the fits has the null hypothesis that
    :math:`d_{fts}` is symmetric about zero, that is, that neither feature comes before the other.

    - p_true_first: of "not every true feature comes before every probe", the largest one-sided
      p-value over pairs (an intersection-union test, which needs no correction).
    - p_probe_first: of "no probe comes before a true feature", the smallest of the other side,
      times the number of pairs (Bonferroni).
    - p_difference: two-sided, of the fits' margins, :math:`\min_t \min_s d_{fts}`, having the same
      distribution as those of the reference model, paired by fit.

    Fits count as independent. Those to overlapping folds of one data set are not quite, and
    describe that data set: use several data sets or seeds for claims beyond it. With n fits no
    one-sided p-value is below :math:`2^{-n}`: five fits at least for a verdict at the 5% level.

    Parameters
    ----------
    importances : mapping of str to sequence of Attribution or mapping
        By model, the importance of every feature in each fit: `Fit.attribution`, or numbers by
        feature. Position f is the same fold or seed for all models.
    true, probes : sequence of str
        Features that matter, and features that only tell the cluster.
    reference : str, optional
        Model that the others are compared with; the first, if not given.
    level : float
        Level of the verdicts.

    Raises
    ------
    ValueError
        If features are missing or on both lists, models have different numbers of fits, or there
        are fewer than two.

    References
    ----------
    Nguyen, Treacher, Montillo (2023), IEEE TPAMI 45(7), for the probes.
    Berger (1982), Technometrics 24(4): intersection-union tests.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> def fits(probe):
    ...     return [{"x": one, "probe": one * probe} for one in rng.lognormal(0, 0.3, size=8)]
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
    if first not in importances:
        raise unknown("model", first, importances)
    ratios = {model: _log_ratios(fits, true, probes) for model, fits in importances.items()}
    margins = {model: one.min(1) for model, one in ratios.items()}
    records, pairs = [], []
    for model, ratio in ratios.items():
        above = [_signed_rank(one, "greater") for one in ratio.T]
        below = [_signed_rank(one, "less") for one in ratio.T]
        for (one, other), d, up, down in zip(
            product(true, probes), ratio.T, above, below, strict=True
        ):
            pairs.append([model, one, other, float((d > 0).mean()), np.median(d), up, down])
        p_true, p_probe = max(above), min(1.0, len(below) * min(below))
        verdict = "true features first" if p_true <= level else "undecided"
        record = {
            "model": model,
            "fits": len(ratio),
            "true_first": float((margins[model] > 0).mean()),
            "margin": float(np.median(margins[model])),
            "p_true_first": p_true,
            "p_probe_first": p_probe,
            "p_difference": np.nan
            if model == first
            else _signed_rank(margins[model] - margins[first], "two-sided"),
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
    rows = []
    for one in fits:
        by_feature = _by_feature(one)
        for name in (*true, *probes):
            if name not in by_feature:
                raise unknown("feature", name, by_feature)
            if not by_feature[name] >= 0:
                raise ValueError(f"an importance is at least 0, not {by_feature[name]} ({name})")
        # A dead unit's importance of exactly zero is less than any other's.
        log = {name: np.log(max(by_feature[name], 1e-300)) for name in (*true, *probes)}
        rows.append([log[t] - log[s] for t, s in product(true, probes)])
    return np.array(rows)


def _by_feature(one: Attribution | Mapping[str, float]) -> Mapping[str, float]:
    """Importances per sd of the feature; of several columns of the predictor, their sum."""
    if not isinstance(one, Attribution):
        return one
    values = one.table().groupby("feature")["importance"].sum()
    return {str(name): float(value) for name, value in values.items()}


def _signed_rank(differences: Float[np.ndarray, " fits"], alternative: str) -> float:
    if not differences.any():
        return 1.0
    return float(stats.wilcoxon(differences, alternative=alternative).pvalue)
