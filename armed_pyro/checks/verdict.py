"""`Diagnostics`: two verdicts on a fit, on its computation and on its model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pandas as pd

from armed_pyro.checks.check import SEVERITY, Check, Part, Word

__all__ = ["Diagnostics", "Verdict"]


COMPUTATION: dict[Word, str] = {
    "pass": "trustworthy",
    "warn": "to be taken with care",
    "fail": "not trustworthy",
    "not checked": "not checked",
}


@dataclass(frozen=True)
class Verdict:
    """The verdict on one part of a fit.

    Attributes
    ----------
    part : {"computation", "model"}
        The part: whether the draws can be trusted, or whether the model fits the data.
    word : {"pass", "warn", "fail", "not checked"}
        The worst result of the part's checks; a note counts as "pass".
    misfits : tuple of Check
        The checks that warn or fail, failed checks first.
    unchecked : tuple of Check
        The checks that were not made.
    notes : tuple of Check
        The checks that found nothing wrong, but something that a reader must know.

    Examples
    --------
    >>> check = Check("computation", "training", "warn", "the steps ran out", advice="allow more")
    >>> print(Verdict.of("computation", [check]))
    Computation: to be taken with care: the steps ran out.
    """

    part: Part
    word: Word
    misfits: tuple[Check, ...] = ()
    unchecked: tuple[Check, ...] = ()
    notes: tuple[Check, ...] = ()

    @classmethod
    def of(cls, part: Part, checks: Iterable[Check]) -> Verdict:
        """The verdict of the checks of this part; others are ignored."""
        those = [check for check in checks if check.part == part]
        those.sort(key=lambda check: -SEVERITY.index(check.verdict))
        word: Word = those[0].verdict if those else "not checked"
        kinds: list[tuple[Word, ...]] = [("warn", "fail"), ("not checked",), ("note",)]
        found = [tuple(check for check in those if check.verdict in words) for words in kinds]
        return cls(part, "pass" if word == "note" else word, *found)

    @property
    def sentence(self) -> str:
        """The verdict in words, with all misfits and notes, and what was not checked."""
        if self.part == "computation":
            found = COMPUTATION[self.word]
            if self.word == "pass" and self.unchecked:
                found = "no fault found"
            text = _listed(found, self.misfits)
        elif self.word == "not checked":
            text = "not checked"
        else:
            wrong = [check for check in self.misfits if check.is_misfit]
            vague = [check for check in self.misfits if not check.is_misfit]
            serious = any(check.verdict == "fail" for check in wrong)
            found = "serious misfit found" if serious else "misfit found"
            text = _listed(found, wrong) if wrong else "no misfit found"
            if vague:
                text = _listed(f"{text}; the data say little", vague)
        if self.notes:
            text = _listed(f"{text}; note", self.notes)
        if self.unchecked:
            text += f" (not checked: {', '.join(check.name for check in self.unchecked)})"
        return text + "."

    def __str__(self) -> str:
        return f"{self.part.capitalize()}: {self.sentence}"

    def to_json(self) -> dict[str, Any]:
        """Word, sentence, and the names of misfits and of what was not checked."""
        return {
            "verdict": self.word,
            "sentence": self.sentence,
            "misfits": [check.name for check in self.misfits],
            "not_checked": {check.name: check.reason for check in self.unchecked},
        }


def _listed(title: str, checks: Sequence[Check]) -> str:
    """The title, followed by the reasons of the checks."""
    return ": ".join([title, *filter(None, ["; ".join(check.reason for check in checks)])])


@dataclass(frozen=True, eq=False)
class Diagnostics:
    """Two verdicts on a fit: whether its draws can be trusted, and whether its model misfits.

    Attributes
    ----------
    checks : tuple of Check
        All checks, failed checks first.
    clusters : pandas.DataFrame
        One row per cluster: factor, cluster, rows, and posterior predictive checks (statistic,
        replicated median and p-value of mean, sd, zeros). The nested factor also has k_hat, elpd
        (expected log density when the cluster is left out) and elpd_k_hat.
    figures : mapping of str to float or None
        k_hat, ess, elpd_loo, elpd_loo_se, p_loo, elpd_loo_bad (number of rows with k-hat above
        0.7), elpd_loco, elpd_loco_se, elpd_loco_bad (number of clusters with k-hat above 0.7), and
        the effective number of clusters of each factor.
    time : str
        Expected time of exact draws (NUTS) on this machine, in words; empty if they are not
        advised. It is printed and not saved, as it differs between machines.

    Examples
    --------
    >>> check = Check("computation", "training", "warn", "the steps ran out", advice="allow more")
    >>> print(Diagnostics((check,), pd.DataFrame()))
    Computation: to be taken with care: the steps ran out.
      -> allow more
    Model: not checked.
    """

    checks: tuple[Check, ...]
    clusters: pd.DataFrame = field(default_factory=pd.DataFrame)
    figures: Mapping[str, float | None] = field(default_factory=dict)
    time: str = ""

    @property
    def computation(self) -> Verdict:
        """Whether the draws can be trusted."""
        return Verdict.of("computation", self.checks)

    @property
    def model(self) -> Verdict:
        """Whether a misfit of the model was found."""
        return Verdict.of("model", self.checks)

    @property
    def failed(self) -> bool:
        """Whether either verdict is "fail"."""
        return "fail" in (self.computation.word, self.model.word)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Reasons of all checks that warn or fail."""
        return tuple(check.reason for check in self.checks if check.verdict in ("warn", "fail"))

    def to_frame(self) -> pd.DataFrame:
        """One row per check."""
        return pd.DataFrame([asdict(check) for check in self.checks])

    def to_json(self) -> dict[str, Any]:
        """Both verdicts, the checks and the figures as JSON values."""
        return {
            "computation": self.computation.to_json(),
            "model": self.model.to_json(),
            "checks": [_finite(asdict(check)) for check in self.checks],
            "figures": _finite(dict(self.figures)),
        }

    def __str__(self) -> str:
        lines = list(_lines(self.computation))
        if self.time:
            lines.append(f"     (exact draws will take about {self.time} on this machine)")
        return "\n".join([*lines, *_lines(self.model)])


def _lines(verdict: Verdict) -> Iterator[str]:
    """The verdict, and the advice of its misfits."""
    yield str(verdict)
    told = (*verdict.misfits, *verdict.notes)
    yield from dict.fromkeys(f"  -> {check.advice}" for check in told if check.advice)


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, with None for infinite or missing floats, which JSON cannot hold."""

    def value(number: Any) -> Any:
        if isinstance(number, tuple):
            return [value(item) for item in number]
        return None if isinstance(number, float) and not math.isfinite(number) else number

    return {name: value(number) for name, number in values.items()}
