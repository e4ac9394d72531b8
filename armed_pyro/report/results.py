"""The finished results of a fit, from which text and pages are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from armed_pyro.inference.posterior import Posterior


@dataclass(frozen=True)
class Conclusion:
    """The verdict on one part of a fit.

    Attributes
    ----------
    word : {"pass", "warn", "fail", "not checked"}
        The worst result of the part's checks.
    sentence : str
        The verdict in words.

    Examples
    --------
    >>> Conclusion("pass", "trustworthy.").word
    'pass'
    """

    word: str
    sentence: str


@dataclass(frozen=True, eq=False)
class Verdicts:
    """Whether the draws of a fit can be trusted, and whether its model misfits.

    Attributes
    ----------
    conclusions : mapping of str to Conclusion
        The verdicts on "computation" and "model".
    checks : pandas.DataFrame
        One row per check, with columns verdict, part, name, reason and advice among others.
    figures : mapping of str to float or None
        Numbers that are reported without a verdict.
    text : str
        Both verdicts in words, with advice.

    Examples
    --------
    ``fit.results().verdicts.text``
    """

    conclusions: Mapping[str, Conclusion]
    checks: pd.DataFrame
    figures: Mapping[str, float | None]
    text: str


@dataclass(frozen=True, eq=False)
class Results:
    """The tables and the verdicts of a fit; `prob` is the probability of the tables' intervals."""

    posterior: Posterior
    prob: float
    variance_components: pd.DataFrame
    fixed_effects: pd.DataFrame
    verdicts: Verdicts
