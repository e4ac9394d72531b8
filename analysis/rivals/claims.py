"""What is claimed of ARMED beside its rivals, and whether a comparison shows it."""

from __future__ import annotations

import pandas as pd

from armed_pyro.analysis.rivals.comparison import SEEN, UNSEEN, Comparison
from armed_pyro.analysis.rivals.scores import Estimate

__all__ = ["MARGIN", "auroc_claims", "claim"]

# A difference in AUROC that is too small to matter.
MARGIN = 0.01
CLAIMS = (
    (SEEN, "ahead of", "conventional", 0.0),
    (SEEN, "ahead of", "domain adversarial", 0.0),
    (UNSEEN, "not behind", "conventional", -MARGIN),
)


def auroc_claims(found: Comparison) -> pd.DataFrame:
    """Is ARMED's AUROC ahead in seen clusters, and not behind in unseen ones.

    Ahead: the 95% interval of the paired difference lies above 0. Not behind: above `-MARGIN`.
    A claim whose interval lies on the other side of that limit does not hold; otherwise it is not
    shown.

    Returns
    -------
    pandas.DataFrame
        Columns claim, mean, lower, upper, holds; no rows where a model is missing.

    Examples
    --------
    ``auroc_claims(joined(parts))``
    """
    models, kinds = set(found.scores["model"]), set(found.scores["rows"])
    records = [
        claim(f"AUROC, {kind} clusters: ARMED {word} {other}", difference, limit)
        for kind, word, other, limit in CLAIMS
        if {"ARMED", other} <= models and kind in kinds
        for difference in [found.difference("ARMED", other, kind)]
    ]
    return pd.DataFrame(records, columns=["claim", "mean", "lower", "upper", "holds"])


def claim(name: str, one: Estimate, limit: float) -> dict[str, str | float]:
    """One claim that a quantity is above a limit, judged by its interval.

    Examples
    --------
    >>> claim("more than half", Estimate(0.7, 0.6, 0.8, 0.0), 0.5)["holds"]
    'holds'
    """
    holds = "holds" if one.lower > limit else "does not hold" if one.upper < limit else "not shown"
    return {"claim": name, "mean": one.mean, "lower": one.lower, "upper": one.upper, "holds": holds}
