"""Features that are linear combinations of earlier ones: dropped from linear fixed effects."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from armed_pyro._messages import listing
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.data.columns import check_varying
from armed_pyro.data.feature_scaling import FeatureScaling
from armed_pyro.program.plan import Plan

__all__ = ["dropped"]

# Share of a column's norm that must be left beside earlier columns; R's `lm` and lme4 have it too.
TOLERANCE = 1e-7
# Beyond this number of features, networks' features are not searched for copies.
MOST_COMPARED = 2000


def dropped(model: Plan, data: ClusteredData) -> tuple[str, ...]:
    """Names of the features that linear fixed effects leave out, with a warning that says why.

    As in lme4, these are the later ones of linearly dependent columns. No column is left out where
    there are fewer rows than columns: the prior then chooses among the solutions. Networks keep all
    columns, with a warning for copies; a constant feature is an error for them.
    """
    if not data.feature_names:
        return ()
    if not model.linear:
        check_varying(data.feature_names, (data.features != data.features[0]).any(dim=0))
        _warn_of_copies(data)
        return ()
    names = list(data.feature_names)
    matrix = FeatureScaling.of(data).standardise(data.features).numpy()
    if len(matrix) <= matrix.shape[1]:
        return ()
    # Columns in the place of the intercept come first, so that none of them is dropped.
    ones = model.data_facts().intercept_columns
    order = [*ones, *(place for place in range(len(names)) if place not in ones)]
    names, matrix = [names[place] for place in order], matrix[:, order]
    if model.has_intercept:
        names, matrix = ["Intercept", *names], np.column_stack([np.ones(len(matrix)), matrix])
    kept = independent_columns(matrix)
    left_out = [place for place in range(len(names)) if place not in set(kept)]
    if left_out:
        reasons = "; ".join(_reason(place, kept, matrix, names) for place in left_out[:5])
        more = f"; and {len(left_out) - 5} more" if len(left_out) > 5 else ""
        warnings.warn(
            f"the fixed effects are rank deficient: dropped {listing(names[i] for i in left_out)} "
            f"({reasons}{more}); predictions do not use them",
            UserWarning,
            stacklevel=4,
        )
    return tuple(names[place] for place in left_out)


def independent_columns(matrix: Float[np.ndarray, "rows columns"]) -> list[int]:
    """Positions of the columns that do not depend linearly on the columns before them."""
    basis, kept = np.empty((matrix.shape[1], len(matrix))), list[int]()
    for place, column in enumerate(matrix.T):
        rest, done = column.copy(), basis[: len(kept)]
        for _ in range(2):  # once more for the rounding errors of the first time
            rest -= (done @ rest) @ done
        norm = np.linalg.norm(rest)
        if norm > TOLERANCE * np.linalg.norm(column):
            basis[len(kept)] = rest / norm
            kept.append(place)
    return kept


def _reason(
    place: int, kept: list[int], matrix: Float[np.ndarray, "rows columns"], names: list[str]
) -> str:
    """Why a column is dropped: the columns of which it is a combination."""
    column, earlier = matrix[:, place], [k for k in kept if k < place]
    if (column == column[0]).all():
        return f"{names[place]!r} is constant"
    weights = np.linalg.lstsq(matrix[:, earlier], column, rcond=None)[0]
    parts = [names[k] for k, w in zip(earlier, weights, strict=True) if abs(w) > 1e-6]
    features = [name for name in parts if name != "Intercept"]
    kind = "a copy of" if len(features) == 1 else "a combination of"
    return f"{names[place]!r} is {kind} {listing(features, 5)}"


def _warn_of_copies(data: ClusteredData) -> None:
    if len(data.feature_names) > MOST_COMPARED or data.n_rows < 2:
        return
    copies, first = list[str](), dict[bytes, str]()
    for name, column in zip(data.feature_names, data.features.T, strict=True):
        original = first.setdefault(_fingerprint(column), name)
        if original != name:
            copies.append(f"{name!r} of {original!r}")
    if copies:
        warnings.warn(
            f"features that are copies of others, up to origin and unit: {', '.join(copies[:5])}; "
            "the network keeps them, but what it attributes to each of them is arbitrary",
            UserWarning,
            stacklevel=5,
        )


def _fingerprint(column: Float[Tensor, " rows"]) -> bytes:
    """Bytes that are equal for columns that differ in origin and unit only."""
    values = (column - column.mean()).double()
    values = values / values.norm()
    sign = torch.sign(values[values.abs().argmax()])
    return bytes((sign * values * 1e7).round().to(torch.int64).numpy().tobytes())
