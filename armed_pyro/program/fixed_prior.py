r"""Prior of latent fixed effects, the same for every reference level of a factor.

The coefficients of a linear program with an intercept are a linear map B of independent normals.
They are those of the function

.. math:: f(x) = \alpha + \sum_t z_t(x)^\top g_t - mean(\sum_t z_t^\top g_t), \quad
    \alpha \sim N(0, s^2), \quad g_t \sim N(0, 2^{-F_t} s^2 I)

over the terms t of the formula: z_t has one entry for every combination of levels of the term's
:math:`F_t` factors, times its other features, (x - mean) / sd. The difference of two levels of a
factor has the sd s = `Priors.fixed_sd`. Levels are exchangeable, so the prior of f does not depend
on the reference level; columns of 0 and 1 are factors of two levels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from armed_pyro.data.categories import contrast_of
from armed_pyro.data.formula import Terms
from armed_pyro.data.schema import Schema
from armed_pyro.program.data_spec import Facts
from armed_pyro.program.plan import Plan

__all__ = ["describe", "root"]

Array = np.ndarray
# With more columns than this, fixed effects are independent: the map B costs their number cubed.
MOST_COLUMNS = 1000


def describe(model: Plan) -> str:
    """The prior as text."""
    facts, sd = model.data_facts(), model.priors.fixed_sd
    unit = "sd of the outcome" if facts.spread != 1 else "link scale"
    if facts.linear_names:
        p = len(facts.linear_names)
        text = f"Normal(0, {sd / p**0.5:.4g}) ({unit}, per sd of a feature, beside the network)"
        others = len(model.fixed_terms()) > p * len(facts.columns)
        return f"{text}; of other effects Normal(0, {sd:.4g})" if others else text
    text = f"Normal(0, {sd:.4g}) ({unit}, per sd of the feature"
    if model.fixed_root is None:
        return f"{text}; Intercept at the features' means)" if facts.feature_mean else f"{text})"
    return f"{text}, or between levels; Intercept at the features' means)"


def root(model: Plan) -> Float[Tensor, "terms terms"] | None:
    """Cholesky factor of B B', whose rows are `Plan.fixed_terms`; None for independent effects.

    They are independent without columns of 0 and 1, and where the map is not known: for weights of
    a network's last layer, without an intercept or all levels of a factor in its place, if columns
    were dropped, beyond `MOST_COLUMNS`, in formulas whose terms lack those that they contain, and
    in fits that were saved before there was this prior. Effects of clusters' means always are, and
    those of p features beside a network, whose variances are divided by p: x'beta then has the same
    prior however many there are.
    """
    facts, columns = model.data_facts(), len(model.data_facts().columns)
    if facts.linear_names:
        return _beside(model)
    if not model.linear:
        return None
    means, intercept = len(facts.between_names), model.has_intercept
    n = len(model.fixed_terms()) // columns - means
    whole = n == intercept + len(facts.feature_names) and (intercept or facts.intercept_columns)
    if not (whole and facts.feature_average) or n > MOST_COLUMNS:
        return None
    mean, scale = np.array(facts.feature_mean), np.array(facts.feature_scale)
    ones = [1.0] * intercept
    average = np.array([*ones, *((np.array(facts.feature_average) - mean) / scale)])
    matrix = _coefficients(facts, mean, scale, intercept=intercept)
    if matrix is None:
        return None
    matrix[:, 1:] -= np.outer(matrix[:, 0], average @ matrix[:, 1:])
    if np.allclose(matrix @ matrix.T, np.eye(n), atol=1e-9):
        return None
    upper = np.linalg.qr(matrix.T, mode="r")
    lower = torch.from_numpy((np.sign(np.diag(upper))[:, None] * upper).T.copy())
    lower = torch.block_diag(lower, torch.eye(means, dtype=torch.float64))
    return torch.kron(lower, torch.eye(columns, dtype=torch.float64))


def _beside(model: Plan) -> Float[Tensor, "terms terms"]:
    """Root of the prior with features beside a network: a diagonal."""
    facts, columns = model.data_facts(), len(model.data_facts().columns)
    linear, means = len(facts.linear_names), len(facts.between_names)
    sd = torch.ones(len(model.fixed_terms()) // columns, dtype=torch.float64)
    first = len(sd) - means - linear
    sd[first : first + linear] = linear**-0.5
    return torch.diag(sd.repeat_interleave(columns))


def _coefficients(
    facts: Facts, mean: Array, scale: Array, *, intercept: bool
) -> Float[Array, "terms effects"] | None:
    """Coefficients of a constant and of the entries of all z_t."""
    schema = None if facts.schema is None else _without_numeric_calls(facts.schema, facts)
    terms = () if schema is None else _by_column(schema.terms)
    factors = {} if schema is None else _factors(schema, terms)
    if schema is None or (not factors and all(len(term) == 1 for term in terms)):
        return np.eye(1 + len(mean)) if intercept else None
    numeric = {name for term in terms for name in term} - factors.keys()
    units = dict(zip(facts.feature_names, zip(mean, scale, strict=True), strict=True))
    if not numeric <= units.keys():
        return None  # A product with a column that is no feature itself, and has no known scale.
    units = {name: units[name] for name in sorted(numeric)}
    table = _probe(terms, factors, units)
    made, names, _ = schema.design(table)
    if {*names} != {*facts.feature_names}:
        return None
    design = (made[:, [names.index(name) for name in facts.feature_names]] - mean) / scale
    constant = np.ones(len(design))
    design = np.column_stack([constant, design]) if intercept else design
    for centred in (True, False):
        effects = [constant]
        for term in terms:
            product = np.full(len(table), 2.0 ** (-sum(name in factors for name in term) / 2))
            for name in numeric.intersection(term):
                center, unit = units[name]
                product = product * (table[name].to_numpy() - centred * center) / unit
            inside = [_indicators(table[n], factors[n]) for n in term if n in factors]
            effects += [np.prod([product, *c], axis=0) for c in itertools.product(*inside)]
        wanted = np.column_stack(effects)
        solution, _, rank, _ = np.linalg.lstsq(design, wanted, rcond=None)
        if rank == design.shape[1] and np.allclose(design @ solution, wanted, atol=1e-8):
            return cast("Array", solution)
    return None


def _without_numeric_calls(schema: Schema, facts: Facts) -> Schema:
    """The schema with the columns that functions make as if they were columns of the table.

    ``poly(x, 2):z`` becomes ``poly(x, 2)[1]:z`` and ``poly(x, 2)[2]:z``. Calls with contrasts stay.
    """
    numeric = [name for name in schema.calls if contrast_of(name) is None]
    pairs = list(zip(facts.sources, facts.feature_names, strict=True))
    parts = {call: [name for source, name in pairs if source == call] or [call] for call in numeric}
    terms = tuple(
        expanded
        for term in schema.terms
        for expanded in itertools.product(*(parts.get(name, [name]) for name in term))
    )
    kept = {name: state for name, state in schema.calls.items() if name not in numeric}
    return replace(schema, terms=terms, calls=kept)


def _by_column(terms: Terms) -> Terms:
    """The terms with the column x in the place of ``C(x, Sum)``, whose levels are the same."""
    choices = {name: contrast_of(name) for term in terms for name in term}
    columns = {name: name if c is None else c.column for name, c in choices.items()}
    return tuple(tuple(columns[name] for name in term) for term in terms)


def _factors(schema: Schema, terms: Terms) -> dict[str, pd.Index]:
    """Levels of the features that are factors, or hold only 0 and 1."""
    used = {name for term in terms for name in term}
    factors = {**schema.levels, **{name: pd.Index([0.0, 1.0]) for name in schema.indicators}}
    return {name: levels for name, levels in factors.items() if name in used}


def _indicators(column: pd.Series, levels: pd.Index) -> list[Array]:
    return [(column == level).to_numpy(dtype=float) for level in levels]


def _probe(
    terms: Terms, factors: Mapping[str, pd.Index], units: Mapping[str, tuple[float, float]]
) -> pd.DataFrame:
    """Rows that identify every column of the design: each cell of each term, several times."""
    rng = np.random.default_rng(0)
    times = len({frozenset(units).intersection(term) for term in terms}) + 2
    blocks = []
    for term in terms:
        inside = {name: len(factors[name]) for name in term if name in factors}
        size = math.prod(inside.values())
        cells = np.unravel_index(np.tile(np.arange(size), times), (*inside.values(), 1))
        places = dict(zip(inside, cells, strict=False))
        n = times * size
        columns: dict[str, Any] = {
            name: levels.take(places.get(name, rng.integers(len(levels), size=n)))
            for name, levels in factors.items()
        }
        for name, (center, unit) in units.items():
            columns[name] = center + unit * rng.normal(size=n)
        blocks.append(pd.DataFrame(columns))
    return pd.concat(blocks, ignore_index=True)
