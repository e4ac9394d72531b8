"""`Check`: the result of one check of a fit, with its effect size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from armed_pyro._messages import cause

__all__ = [
    "BROKEN",
    "LEVEL",
    "SEVERITY",
    "Check",
    "Part",
    "Word",
    "checked",
    "failed",
    "severity",
]


Part = Literal["computation", "model"]
Word = Literal["pass", "note", "warn", "fail", "not checked"]
SEVERITY: tuple[Word, ...] = ("not checked", "pass", "note", "warn", "fail")
# Level of the tests of one kind together. Each part of the verdict has at most 20 kinds, so that a
# healthy fit warns in at most 2%.
LEVEL = 1e-3
# Errors of numerics, such as a rate that is not finite or a matrix that is not positive definite.
BROKEN = (ArithmeticError, ValueError, RuntimeError, np.linalg.LinAlgError)


@dataclass(frozen=True)
class Check:
    """The result of one check of a fit.

    A check warns or fails only if its effect exceeds the threshold, and is not noise. A "note"
    finds nothing wrong, but something that a reader of the tables must know. A check that cannot be
    computed fails; a check that does not apply, or that would take too long, is "not checked",
    which does not count as passed.

    Attributes
    ----------
    part : {"computation", "model"}
        Whether the check judges the draws, or the model that they come from.
    name : str
        Name of the check.
    verdict : {"pass", "note", "warn", "fail", "not checked"}
        Result.
    reason : str
        Result in a plain sentence; technical terms follow in brackets.
    effect : float or None
        Size of the fault.
    effect_name : str
        What the effect is, with its unit, such as "sd of the left-out slope, in residual sds".
    threshold : float or None
        Effect from which a check may warn.
    p : float or None
        p-value of the absence of the fault, corrected for the number of tests of its kind.
    interval : (float, float) or None
        90% interval of the effect.
    advice : str
        Next step, or the term to add; empty if the check passed.
    is_misfit : bool
        Whether a bad result means that the model contradicts the data. False if it means that the
        data say too little of a quantity.

    Raises
    ------
    ValueError
        If part or verdict are unknown, or a check without a finite effect is said to pass.

    Examples
    --------
    >>> Check("computation", "training", "pass", "training converged after 800 steps").verdict
    'pass'
    """

    part: Part
    name: str
    verdict: Word
    reason: str
    effect: float | None = None
    effect_name: str = ""
    threshold: float | None = None
    p: float | None = None
    interval: tuple[float, float] | None = None
    advice: str = ""
    is_misfit: bool = True

    def __post_init__(self) -> None:
        if self.part not in get_args(Part) or self.verdict not in SEVERITY:
            raise ValueError(f"unknown part {self.part!r} or verdict {self.verdict!r}")
        numbers = [*(self.interval or ()), self.effect, self.p]
        if self.verdict != "fail" and any(n is not None and not math.isfinite(n) for n in numbers):
            raise ValueError(f"{self.name} is not finite, so that it cannot be judged")


def severity(effect: float, warn: float, fail: float = math.inf, *, noise: bool = False) -> Word:
    """The verdict on an effect: "fail" from `fail` on or if it is NaN, "warn" from `warn` on.

    Parameters
    ----------
    effect, warn, fail : float
        Size of the fault, and the sizes from which the check warns and fails.
    noise : bool
        Whether the effect may be chance. The check then passes, if its effect is finite.

    Examples
    --------
    >>> severity(0.3, 0.2), severity(0.3, 0.2, noise=True), severity(math.nan, 0.2)
    ('warn', 'pass', 'fail')
    """
    if math.isnan(effect) or (noise and math.isinf(effect)):
        return "fail"
    if noise or effect < warn:
        return "pass"
    return "fail" if effect >= fail else "warn"


def failed(part: Part, name: str, reason: str) -> Check:
    """The check that could not be computed; it fails, as what it guards against may be true.

    Examples
    --------
    >>> failed("model", "residuals", "the predictions are not finite").verdict
    'fail'
    """
    advice = "find the cause first: look for values that overflow, such as an offset not logged"
    return Check(part, name, "fail", f"could not be computed: {reason}", advice=advice)


def checked(part: Part, name: str, checks: Callable[[], Iterable[Check]]) -> Iterator[Check]:
    """The checks that a function makes; if its numerics break, a failed check of this name.

    Examples
    --------
    >>> [check.verdict for check in checked("model", "tails", lambda: [1 / 0])]
    ['fail']
    """
    try:
        yield from checks()
    except BROKEN as error:
        yield failed(part, name, cause(error))
