"""Checks of the weights and offsets of rows against a family, before training."""

from __future__ import annotations

import warnings

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.families.family import Family

__all__ = ["check_offset", "check_weights"]

# A sum of frequency weights further than this factor from the number of rows changes every standard
# error by over a fifth.
FAR = 1.5
# An offset above this on a log link is an expected count of 5e21; on the logit link, certainty.
LARGEST_OFFSET = 50.0
# Beyond this, in either direction, no family but the gaussian has a finite likelihood.
IMPOSSIBLE_OFFSET = 1e4


def check_weights(data: ClusteredData, family: Family) -> None:
    """Refuse precisions without a residual variance; warn of a sum far from the number of rows."""
    if data.weights is None:
        return
    if data.weights_kind != "frequency":
        if not family.has_residual_variance:
            given = "standard errors" if data.weights_kind == "se" else "weights as precisions"
            raise ValueError(
                f"family {family.name!r} has no residual variance, which {given} need: use family "
                "'gaussian', or frequency weights"
            )
        return
    _tell_of_class_weights(data, family)
    total, n = float(data.weights.sum()), data.n_rows
    if not total:
        raise ValueError("all weights are 0, so that no row counts: give positive weights")
    if not n / FAR <= total <= n * FAR:
        warnings.warn(
            f"the weights sum to {total:.4g} for {n} rows. As frequency weights, the default, they "
            f"count as {total:.4g} independent rows, and standard errors follow that number. If "
            "they are precisions, such as 1 / sd^2 (lme4, statsmodels), use "
            "weights_kind='precision' (command line: --weights-kind precision); divide sampling "
            "weights by their mean",
            UserWarning,
            stacklevel=7,
        )


def _tell_of_class_weights(data: ClusteredData, family: Family) -> None:
    """Warn of weights that the outcome's class alone decides, as they shift its probability."""
    y, weights = data.outcome, data.weights
    if not family.is_class or y is None or weights is None:
        return
    classes, codes = y.unique(return_inverse=True)
    if not 2 <= len(classes) <= 20:
        return
    by_class = weights.new_zeros(len(classes)).index_copy(0, codes, weights)
    if bool((weights != by_class[codes]).any()) or bool((by_class == by_class[0]).all()):
        return
    total = weights.new_zeros(len(classes)).index_add(0, codes, weights)
    share, shifted = float((codes == 1).double().mean()), float(total[1] / total.sum())
    names = list(classes.tolist() if data.classes is None else data.classes)
    correction = "leave the weights out"
    if len(classes) == 2 and bool((by_class > 0).all()):
        shift = float((by_class[1] / by_class[0]).log())
        correction += (
            f", or give the training rows an offset of log(w1 / w0) = {shift:.4g}, and predict "
            "without it (logit link), which gives the probabilities of the population"
        )
    warnings.warn(
        f"the weights depend on the outcome alone (class weights), so that P(y = {names[1]}) will "
        f"be {shifted:.3g} on average in place of its share of the rows, {share:.3g}; {correction}",
        UserWarning,
        stacklevel=8,
    )


def check_offset(data: ClusteredData, family: Family) -> None:
    """Warn of an offset that looks like an exposure, not like its logarithm.

    ValueError for one with which no outcome is possible.
    """
    if data.offset is None or family.is_quadratic:
        return
    named = data.schema is not None and (data.schema.offset or data.schema.offset_call)
    name = f"offset {named!r}" if named else "offset"
    largest, extreme = float(data.offset.max()), float(data.offset.abs().max())
    if extreme > IMPOSSIBLE_OFFSET:
        raise ValueError(
            f"the {name} goes up to {extreme:.4g} in size on the link scale of family "
            f"{family.name!r}, expected at most {IMPOSSIBLE_OFFSET:g}: give the logarithm of an "
            "exposure, and correct or leave out rows with an offset that stands for a missing one"
        )
    if largest > LARGEST_OFFSET:
        warnings.warn(
            f"the {name} goes up to {largest:.4g} on the link scale of family {family.name!r}: it "
            "looks like an exposure that was not logged; give its logarithm",
            UserWarning,
            stacklevel=7,
        )
