"""`adversary_checks`: whether the adversaries have hidden their clusters, by fresh probes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from armed_pyro.checks import rank_tests
from armed_pyro.checks.check import LEVEL, Check, severity
from armed_pyro.checks.findings import unchecked
from armed_pyro.inference.posterior import Posterior
from armed_pyro.inference.probing import probes_of

__all__ = ["adversary_checks"]


NAME, EFFECT = "adversary", "clusters read by a fresh probe, (accuracy - chance) / (1 - chance)"
# Effects from which the cluster counts as partly and as plainly readable.
WARN, FAIL = 0.1, 0.5


def adversary_checks(posterior: Posterior) -> Iterator[Check]:
    """Whether fresh probes read the clusters that the adversaries should hide; see `FreshProbe`.

    The p-value is that of an accuracy of at most chance, or of at most what the outcome itself
    allows if that is more. Without an adversary there is no check.
    """
    games = posterior.model.adversaries
    if not games:
        return
    probes = probes_of(posterior)
    if not probes:
        factors = ", ".join(dict.fromkeys(game.factor for game in games))
        yield unchecked(NAME, f"too few rows in each cluster of {factors} for a fresh probe")
        return
    p_values = rank_tests.holm(np.array([probe.p_above for probe in probes]))
    tests = sorted(zip(probes, p_values, strict=True), key=lambda test: -test[0].effect)
    probe, p = next((test for test in tests if test[1] <= LEVEL), tests[0])
    word = severity(probe.effect, WARN, FAIL, noise=bool(p > LEVEL))
    weight = next(game.weight for game in games if game.factor == probe.factor)
    hidden = "reads" if word != "pass" else "reads little of"
    yield Check(
        "model",
        NAME,
        word,
        f"a fresh probe {hidden} {probe.factor} from the layers of the adversary ({probe})",
        effect=probe.effect,
        effect_name=EFFECT,
        threshold=WARN,
        p=float(p),
        advice="" if word == "pass" else _advice(posterior, probe.factor, weight),
    )


def _advice(posterior: Posterior, factor: str, weight: float | str) -> str:
    """What to do where the adversary lost."""
    tried = [r["weight"] for r in posterior.history.weights if r["factor"] == factor]
    needed = f"the features that tell {factor} are needed for the outcome"
    if tried:
        return (
            f"do not call these features independent of {factor}: of the weights up to "
            f"{max(tried):g} none hid it without worse predictions, so that {needed}, or the "
            "training is too short for the adversary"
        )
    return (
        f"raise the weight of the adversary of {factor} (now {weight}), or let weight='auto' "
        f"choose it; if predictions of new clusters get worse, {needed}"
    )
