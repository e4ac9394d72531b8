"""The finished results of a fit, from which text and pages are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from armed_pyro.inference.posterior import Posterior


@dataclass(frozen=True, eq=False)
class Verdict:
    """The answer to "Can the fit be trusted?".

    Attributes
    ----------
    verdict : {"pass", "warn", "fail"}
        The worst answer of all checks.
    checks : pandas.DataFrame
        One row per check, with columns verdict, name, reason and advice among others.
    figures : mapping of str to float or None
        Numbers that are reported without a verdict.
    brief : str
        The verdict in words, and the checks that did not pass.
    """

    verdict: str
    checks: pd.DataFrame
    figures: Mapping[str, float | None]
    brief: str


@dataclass(frozen=True, eq=False)
class Results:
    """The tables and the verdict of a fit; `prob` is the probability of the tables' intervals."""

    posterior: Posterior
    prob: float
    variance_components: pd.DataFrame
    fixed_effects: pd.DataFrame
    verdict: Verdict
