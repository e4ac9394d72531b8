"""`held_out_checks`: whether predictions of rows that the network has not seen hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import scipy
from torch import Tensor

from armed_pyro.checks.check import LEVEL, Check, severity
from armed_pyro.inference.posterior import Posterior
from armed_pyro.program.model import can_overfit

__all__ = ["held_out_checks"]

# Rows per trained weight below which a network could memorise its rows. With 3 rows per weight, 90%
# intervals of a network without held-out rows held 80%.
ROWS_PER_WEIGHT = 10
EXPECTED = 0.9
# Coverage of 90% intervals below which the check warns and fails. Intervals of a normal outcome
# hold as much if the sd that the fit claims is 13% and 22% too small.
WARN_COVERAGE, FAIL_COVERAGE = 0.85, 0.8
# Excess of the log score that the fit claims over that of held-out rows, in nats per row; those of
# a normal outcome with these errors of its sd.
WARN_EXCESS, FAIL_EXCESS = 0.15, 0.33
HOLD_OUT = 'let fit hold rows out, validation="auto", or pass rows'
SMALLER = (
    "use a smaller network or more weight decay, Schedule(weight_decay=...); of several validation "
    'schemes validation="auto" judges all rows'
)


def held_out_checks(posterior: Posterior, latents: Mapping[str, Tensor]) -> Iterator[Check]:
    """Checks of the log score and of 90% intervals of rows that the network was not trained on.

    Without such rows the check fails if the network could memorise its rows: every other check
    looks at outcomes that the network may have learnt by heart.
    """
    if not can_overfit(posterior.model):
        return
    found = posterior.history.held_out
    if not found:
        yield _nothing_held_out(posterior)
        return
    rows = found["rows"]
    coverage, error = found.get("coverage"), found.get("coverage_se")
    if coverage is not None and error is not None and rows is not None:
        # At the expected coverage few outcomes may lie outside, which a sample's own error misses.
        error = max(error, float(np.sqrt(EXPECTED * (1 - EXPECTED) / rows)))
        p = float(scipy.special.ndtr((coverage - EXPECTED) / error))
        verdict = severity(1 - coverage, 1 - WARN_COVERAGE, 1 - FAIL_COVERAGE, noise=p > LEVEL / 2)
        yield Check(
            "model",
            "held-out coverage",
            verdict,
            f"90% intervals hold {coverage:.0%} of {rows:.0f} rows that the network has not seen",
            1 - coverage,
            "share of held-out rows outside their 90% intervals",
            1 - WARN_COVERAGE,
            p,
            (1 - coverage - 1.645 * error, 1 - coverage + 1.645 * error),
            advice="" if verdict == "pass" else SMALLER,
        )
    claimed, score, error = found["claimed"], found["score"], found["excess_se"]
    if claimed is not None and score is not None and error is not None:
        excess = claimed - score
        p = float(scipy.special.ndtr(-excess / error)) if error > 0 else float(excess <= 0)
        verdict = severity(excess, WARN_EXCESS, FAIL_EXCESS, noise=p > LEVEL / 2)
        yield Check(
            "model",
            "held-out log score",
            verdict,
            f"rows that the network has not seen have a mean log score of {score:.2f}, and the fit "
            f"claims {claimed:.2f}",
            excess,
            "nats per row by which the claimed log score is too high",
            WARN_EXCESS,
            p,
            (excess - 1.645 * error, excess + 1.645 * error),
            advice="" if verdict == "pass" else SMALLER,
        )


def _nothing_held_out(posterior: Posterior) -> Check:
    """The check of a network without held-out rows."""
    weights = sum(p.numel() for p in posterior.model.network.parameters() if p.requires_grad)
    rows = posterior.model.data_facts().n_rows
    reason = f"no rows were held out from the training of the network's {weights} weights"
    if rows >= ROWS_PER_WEIGHT * weights or posterior.history.validation:
        return Check("model", "held-out rows", "not checked", f"{reason} on {rows} rows")
    return Check(
        "model",
        "held-out rows",
        "fail",
        f"{reason}, which may have memorised the {rows} rows: intervals may be far too narrow",
        rows / weights,
        "rows per trained weight",
        float(ROWS_PER_WEIGHT),
        advice=HOLD_OUT,
        is_misfit=False,
    )
