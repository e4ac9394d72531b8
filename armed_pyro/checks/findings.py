"""`Kind`: from the tests of one kind to a `Check`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from armed_pyro.checks.check import LEVEL, Check, Word, severity
from armed_pyro.checks.score_tests import Tested, adjusted

__all__ = ["Kind", "amount", "features_first", "ratio", "unchecked"]


MOST_NAMED = 3


def amount(effect: float) -> float:
    """Size of an effect that is 0 without a misfit."""
    return abs(effect)


def ratio(effect: float) -> float:
    """Size of an effect that is 1 without a misfit, such as a ratio of variances."""
    return max(effect, 1 / effect) if effect > 0 else np.inf


@dataclass(frozen=True)
class Kind:
    """A kind of misfit, for which one or more subjects are tested.

    Attributes
    ----------
    name : str
        Name of the check.
    effect_name : str
        What the effect is, with its unit.
    warn, fail : float
        Sizes of the effect from which the check warns and fails.
    size : callable
        Size of an effect: `amount` or `ratio`.

    Examples
    --------
    >>> kind = Kind("slopes", "sd of the slope", 0.2, 0.5)
    >>> tests = [Tested("age", 0.3, 1e-6), Tested("sex", 0.0, 0.4)]
    >>> check = kind.judge(tests, "no slope", "a slope on {}", lambda test: f"add {test.subject}")
    >>> print(check.verdict, "-", check.reason, "-", check.advice)
    warn - a slope on age (sd of the slope 0.30, p = 2e-06) - add age
    """

    name: str
    effect_name: str
    warn: float
    fail: float
    size: Callable[[float], float] = field(default=amount)

    def misfits(self, tests: Iterable[Tested]) -> list[Tested]:
        """The tests that report a misfit, largest effect first, with corrected p-values."""
        misfits = [
            test
            for test in adjusted(list(tests))
            if test.p <= LEVEL and self.size(test.effect) >= self.warn
        ]
        return sorted(misfits, key=lambda test: -self.size(test.effect))

    def judge(
        self,
        tests: Iterable[Tested],
        passed: str,
        found: str,
        advice: Callable[[Tested], str],
    ) -> Check:
        """The check of all tests of this kind.

        Parameters
        ----------
        tests : iterable of Tested
            The tests, with p-values that are not corrected.
        passed : str
            Result in words if no misfit is found.
        found : str
            Result in words otherwise, with ``{}`` in the place of the subjects.
        advice : callable
            Term to add or step to take for a misfit.
        """
        tests = list(tests)
        corrected, misfits = adjusted(tests), self.misfits(tests)
        if not corrected:
            return unchecked(self.name, "there is nothing to test")
        if not all(np.isfinite([test.effect, test.p]).all() for test in corrected):
            raise ValueError(f"a test of {self.name} is not finite")
        worst = misfits[0] if misfits else corrected[0]
        figures = f"{self.effect_name} {worst.effect:.2f}, p = {worst.p:.1g}"
        word: Word = severity(self.size(worst.effect), self.warn, self.fail, noise=not misfits)
        if misfits:
            more = len(misfits) - MOST_NAMED
            names = ", ".join(test.subject for test in misfits[:MOST_NAMED])
            subjects = f"{names} and {more} more" if more > 0 else names
            reason = f"{found.format(subjects)} ({figures})"
        else:
            reason = f"{passed} ({figures})"
        return Check(
            "model",
            self.name,
            word,
            reason,
            effect=worst.effect,
            effect_name=self.effect_name,
            threshold=self.warn,
            p=worst.p,
            advice="; ".join(dict.fromkeys(advice(test) for test in misfits[:MOST_NAMED])),
        )


def features_first(kind: Kind, tests: Sequence[Tested], predictor: str) -> list[Tested]:
    """The tests without those of the predictor, if a feature shows the misfit as well.

    Parameters
    ----------
    kind : Kind
        The kind of misfit.
    tests : sequence of Tested
        Tests of the features, and of the predictor.
    predictor : str
        How the subjects of tests of the predictor begin.
    """
    features = [test for test in tests if not test.subject.startswith(predictor)]
    found = any(not test.subject.startswith(predictor) for test in kind.misfits(tests))
    return features if found else list(tests)


def unchecked(name: str, reason: str) -> Check:
    """A check of the model that was not made, and why."""
    return Check("model", name, "not checked", reason)
