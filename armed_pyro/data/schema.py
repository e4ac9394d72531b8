"""The schema of a table: how columns become tensors, the same way for every table."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from armed_pyro._messages import check_known, listing
from armed_pyro.data import categories, cluster_columns
from armed_pyro.data.categories import check_orders, contrast_of
from armed_pyro.data.censoring import with_open_ends, without_incomplete
from armed_pyro.data.cluster_columns import ClusterColumn, expanded
from armed_pyro.data.cluster_means import ClusterMeans, ClusterSums
from armed_pyro.data.columns import (
    NEW,
    TRAINING,
    Missing,
    as_numbers,
    check_finite,
    column_names,
    complete_rows,
    event_last,
    is_categorical,
    known_codes,
    pick,
)
from armed_pyro.data.default_features import default_features
from armed_pyro.data.files import as_pandas, natural_types
from armed_pyro.data.formula import Formula, Terms, parse_features
from armed_pyro.data.formula_functions import STATEFUL, CallState, evaluate
from armed_pyro.data.grouping import (
    Grouping,
    code_labels,
    index_from_json,
    index_to_json,
    warn_of_float_labels,
)
from armed_pyro.data.levels import levels_of
from armed_pyro.data.penalised_spline import check_features
from armed_pyro.data.training_checks import PER_ROW

# Meanings of row weights w: a row counts w times; its residual variance is sigma^2 / w; or its
# residual sd is known, w = 1 / se^2 and sigma = 1.
WeightsKind = Literal["frequency", "precision", "se"]


@dataclass(frozen=True, eq=False)
class Schema:
    """How the columns of a table become tensors, fixed once on the training table.

    Encoding a second table with the same schema gives the same feature columns, in the same order,
    with the same meaning. Feature terms are products of columns: ``(("age",), ("age", "sex"))``.
    The first of the `levels` of a categorical feature column is its reference. `indicators` are
    numeric feature columns that hold only 0 and 1, and are therefore not standardised. `classes`
    are the labels of a categorical outcome; None for a numeric outcome. Without an `intercept`, the
    first categorical feature has a column for every level. `slopes` are terms that only random
    slopes use. With the `weights_kind` "se", the column `weights` holds standard errors. `calls`
    are the columns of the terms that functions make, such as ``poly(age, 2)``, with what these
    learned from the training table; `offset_call` is an expression in ``offset()``. `times` are
    those of the `clusters` that hold the times of processes, as numbers.

    Examples
    --------
    >>> table = pd.DataFrame({"y": [1.0, 2.0], "sex": ["f", "m"], "site": ["a", "b"]})
    >>> schema = Schema.infer(table, outcome="y", clusters=["site"])
    >>> schema.design(table)[1]
    ('sex[T.m]',)
    """

    outcome: str
    terms: Terms
    levels: Mapping[str, pd.Index]
    indicators: tuple[str, ...]
    clusters: tuple[str, ...]
    trials: str | None = None
    offset: str | None = None
    weights: str | None = None
    classes: pd.Index | None = None
    # Schemas saved before there were the next fields lack them.
    intercept: bool = True
    slopes: Terms = ()
    weights_kind: WeightsKind = "frequency"
    cluster_columns: tuple[ClusterColumn, ...] = ()
    means: Mapping[str, ClusterMeans] = field(default_factory=dict)
    calls: Mapping[str, CallState] = field(default_factory=dict)
    offset_call: str | None = None
    times: tuple[str, ...] = ()
    # Columns that say how outcomes were observed; see `ClusteredData.from_frame`.
    status: str | None = None
    upper: str | None = None
    entry: str | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """The table columns that features, slopes and `offset_call` are made from, each once."""
        made, calls = self.cluster_columns, tuple(self.calls)
        whole = Formula(self.terms + self.slopes, made=made, calls=calls, offset=self.offset_call)
        return tuple(dict.fromkeys((*whole.columns, *whole.offset_columns)))

    @property
    def computed(self) -> bool:
        """Whether encoded rows do not hold the columns that they were computed from."""
        return bool(self.cluster_columns or self.calls or self.offset_call)

    @classmethod
    def infer(
        cls,
        frame: Any,
        *,
        outcome: str,
        clusters: Sequence[str],
        features: Sequence[str] | str | None = None,
        event: Any = None,
        slopes: Sequence[str] | str = (),
        categorical: Sequence[str] = (),
        weights_kind: WeightsKind = "frequency",
        times: Sequence[str] = (),
        **roles: Any,
    ) -> Schema:
        """Read categories, classes and kinds of columns off a training table.

        Rows with missing values are ignored here; `ClusteredData.encode` decides whether they are
        an error. `ClusteredData.from_frame` documents the parameters.

        Raises
        ------
        ValueError
            If a column is missing, has two roles, or is of a kind that cannot be used; if a
            categorical feature has a single level; or if the formula is more than products of
            columns.
        """
        table = as_pandas(frame)
        clusters, times = column_names(clusters, "clusters"), column_names(times, "times")
        reserved = [outcome, *clusters, *(name for name in roles.values() if name is not None)]
        formula = _features(features, table, reserved)
        extra = parse_features(slopes)
        _check_offsets(formula, extra, roles.get("offset"))
        only_slopes = tuple(term for term in extra.terms if term not in formula.terms)
        made = tuple(dict.fromkeys(formula.made + extra.made))
        calls = tuple(dict.fromkeys(formula.calls + extra.calls))
        _check_distinct(calls, table)
        columns = list(Formula(formula.terms + only_slopes, made=made, calls=calls).columns)
        named = column_names(categorical, "categorical")
        factors = {*formula.categorical, *extra.categorical, *named}
        check_known("feature for categorical=", sorted(factors), columns)
        _check_outcome(outcome, [*columns, *formula.offset_columns], clusters)
        used = [*reserved, *columns, *formula.offset_columns]
        table = natural_types(
            with_open_ends(pick(table, used), outcome, roles.get("upper")).dropna()
        )

        warn_of_float_labels(table[[name for name in clusters if name not in times]])
        orders = check_orders(formula.orders + extra.orders, "The formula of features and slopes")
        levels = levels_of(table, columns, factors, orders)
        classes = _classes(table[outcome], event)
        columns_of = expanded(made, levels)
        schema = cls(
            outcome=outcome,
            terms=_expanded(formula.terms, columns_of),
            levels=levels,
            indicators=tuple(
                name for name in columns if name not in levels and table[name].isin([0, 1]).all()
            ),
            clusters=clusters,
            **roles,
            classes=classes,
            intercept=formula.intercept,
            slopes=_expanded(only_slopes, columns_of),
            weights_kind=weights_kind,
            cluster_columns=tuple(column for parts in columns_of.values() for column in parts),
            calls={call: _learned(call, table) for call in calls},
            offset_call=formula.offset,
            times=times,
        )
        sums = schema.cluster_sums(table, schema.groupings(table)) if made else {}
        return schema.with_means(sums) if made else schema

    @property
    def numeric(self) -> set[str]:
        """Numeric columns of the terms that hold other values than 0 and 1."""
        names = Formula(self.terms + self.slopes).names
        categories = {name for name in self.calls if contrast_of(name) is not None}
        return set(names) - set(self.levels) - set(self.indicators) - categories

    def groupings(self, table: pd.DataFrame) -> dict[str, Grouping]:
        """The grouping of a table's rows by every cluster column."""
        return {
            name: Grouping.from_labels(table[name], f"cluster column {name!r}")
            for name in self.clusters
        }

    def cluster_sums(
        self,
        table: pd.DataFrame,
        groupings: Mapping[str, Grouping],
        like: Mapping[str, ClusterSums] | None = None,
    ) -> dict[str, ClusterSums]:
        """By factor, sums over a table's rows of the columns whose means `cluster_columns` hold.

        Sums that are to be added to others, `like`, have their origins.
        """
        made, weights = self.cluster_columns, self._frequencies(table)
        return cluster_columns.cluster_sums(made, self.levels, table, groupings, weights, like)

    def with_means(self, sums: Mapping[str, ClusterSums]) -> Schema:
        """The schema with the means, and the moments, of the rows that these sums are over."""
        made = self.cluster_columns
        means = {
            factor: ClusterMeans.of(cluster_columns.sources(made, factor), of_factor)
            for factor, of_factor in sums.items()
        }
        return replace(self, means=means)

    def with_new_means(self, sums: Mapping[str, ClusterSums]) -> Schema:
        """The schema with the means of new clusters beside those of the clusters that it knows."""
        means = {factor: self.means[factor].extended(new) for factor, new in sums.items()}
        return replace(self, means=means)

    def with_cluster_columns(
        self, table: pd.DataFrame, groupings: Mapping[str, Grouping]
    ) -> pd.DataFrame:
        """The table with its `cluster_columns`, as `design` needs it."""
        if not self.cluster_columns:
            return table
        return cluster_columns.with_cluster_columns(
            self.cluster_columns,
            self.levels,
            table,
            groupings,
            self.means,
            self._frequencies(table),
        )

    def _frequencies(self, table: pd.DataFrame) -> str | None:
        """The column of frequencies by which rows count, if the table has it."""
        counts = self.weights_kind == "frequency" and self.weights in table
        return self.weights if counts else None

    def continuous(self, sources: Terms) -> tuple[bool, ...]:
        """For the columns of these terms, whether they are standardised: see `numeric`."""
        numeric = self.numeric
        return tuple(not numeric.isdisjoint(source) for source in sources)

    def select(
        self, frame: Any, *, outcome_required: bool = False, missing: Missing = "error"
    ) -> pd.DataFrame:
        """The columns of this schema and the rows without missing values, checked.

        `ClusteredData.encode` documents the parameters.
        """
        table = as_pandas(frame)
        observed = {name for name in (self.outcome, self.status, self.upper, self.entry) if name}
        optional = set() if outcome_required else {*observed, self.weights}
        table = with_open_ends(table, self.outcome, self.upper)
        if not outcome_required:
            table = without_incomplete(table, observed, keep={*self.columns, *self.clusters})
        roles = [self.outcome, *self.clusters, *(getattr(self, role) for role in PER_ROW)]
        wanted = [name for name in (*roles, *self.columns) if name]
        table = pick(table, [name for name in wanted if name in table or name not in optional])
        if table.empty:
            raise ValueError("The table has no rows; at least one is needed.")
        remedy = TRAINING if outcome_required else NEW
        table = natural_types(complete_rows(table, missing, remedy))
        ends = () if self.upper is None else (self.outcome, self.upper)
        check_finite(table.drop(columns=[end for end in ends if end in table]), remedy)
        return table

    def outcomes(self, table: pd.DataFrame) -> Tensor | None:
        """Outcomes as numbers, with classes as codes; None if the table has no outcome."""
        if self.outcome not in table:
            return None
        if self.classes is None:
            return torch.from_numpy(as_numbers(table[self.outcome], "outcome"))
        codes = known_codes(table[self.outcome], self.classes, f"outcome {self.outcome!r}")
        return torch.from_numpy(codes.astype(np.float64))

    def design(self, table: pd.DataFrame) -> tuple[np.ndarray, tuple[str, ...], Terms]:
        """The features' design matrix, the names of its columns, and their terms.

        The intercept is never one of the columns.
        """
        return self._design(table, self.terms, intercept=self.intercept)

    def slope_design(self, table: pd.DataFrame) -> tuple[np.ndarray, tuple[str, ...], Terms]:
        """The same of the columns that only random slopes use, in treatment coding."""
        return self._design(table, self.slopes, intercept=True)

    def indicators_of(self, factor: str) -> tuple[str, ...]:
        """Names of the indicators of all levels of a categorical column."""
        return tuple(f"{factor}[{level}]" for level in self.levels[factor])

    def _design(
        self, table: pd.DataFrame, terms: Terms, *, intercept: bool
    ) -> tuple[np.ndarray, tuple[str, ...], Terms]:
        from formulaic import SimpleFormula  # slow to import
        from formulaic.parser.types import Factor, Term

        factors, made = {}, {}
        for name in Formula(terms).names:
            if name in self.calls:
                made[name] = self.call_values(name, table)
            elif name in self.levels:
                factors[name] = self._category(name, table)
            else:
                factors[name] = as_numbers(table[name], "feature")
        # Formulaic caches factors by their text. "+1" is the intercept under a text that, unlike
        # "1", is not the name of a column in a table made from an unlabelled array.
        ones = [Term([Factor("+1", eval_method="literal")])] * (intercept or not terms)
        # Factors are looked up, never evaluated: a saved formula must not execute code. The
        # intercept gives treatment coding; without it, the first factor gets all levels.
        products = [Term([Factor(n, eval_method="lookup") for n in term]) for term in terms]
        matrix = SimpleFormula([*ones, *products], _ordering="none").get_model_matrix(
            pd.DataFrame(factors, index=pd.RangeIndex(len(table))), context=made, output="numpy"
        )
        blocks = matrix.model_spec.structure[len(ones) :]
        names = tuple(name for block in blocks for name in block.columns)
        if repeated := [name for name, count in Counter(names).items() if count > 1]:
            raise ValueError(
                f"Two features would both be called {listing(repeated)}: a column has the name "
                "of an interaction. Rename that column."
            )
        sources = tuple(
            term for term, block in zip(terms, blocks, strict=True) for _ in block.columns
        )
        values = np.ascontiguousarray(matrix, dtype=np.float64)[:, len(ones) :].copy()
        return values, names, sources

    def _category(self, name: str, table: pd.DataFrame) -> pd.Categorical:
        """A categorical column with the levels of training."""
        codes = known_codes(table[name], self.levels[name], f"feature {name!r}")
        return pd.Categorical.from_codes(codes, categories=self.levels[name])

    def call_values(self, name: str, table: pd.DataFrame) -> Any:
        """The columns of one of `calls`, for formulaic."""
        from formulaic.materializers.types import FactorValues

        choice = contrast_of(name)
        if choice is not None and choice.contrast is not None:
            return categories.encoded(self._category(choice.column, table), choice.contrast)
        values, _ = evaluate(name, table, self.calls[name])
        rows = pd.RangeIndex(len(table))
        if not _several(name):
            return FactorValues(pd.Series(values[:, 0], index=rows), kind="numerical")
        columns = {str(n + 1): pd.Series(x, index=rows) for n, x in enumerate(values.T)}
        return FactorValues(columns, kind="numerical", format="{name}[{field}]")

    def offsets(self, table: pd.DataFrame) -> Tensor | None:
        """The known term of the predictor; None without one."""
        if self.offset_call is not None:
            values, _ = evaluate(f"I({self.offset_call})", table)
            return torch.from_numpy(values[:, 0].copy())
        if self.offset not in table:
            return None
        return torch.from_numpy(as_numbers(table[self.offset], "offset"))

    def to_json(self) -> dict[str, Any]:
        """The schema in JSON's types; `from_json` reads it back."""
        return {
            **vars(self),
            "terms": [list(term) for term in self.terms],
            "slopes": [list(term) for term in self.slopes],
            "levels": {name: index_to_json(index) for name, index in self.levels.items()},
            "indicators": list(self.indicators),
            "clusters": list(self.clusters),
            "times": list(self.times),
            "classes": None if self.classes is None else index_to_json(self.classes),
            "cluster_columns": [asdict(column) for column in self.cluster_columns],
            "means": {factor: means.to_json() for factor, means in self.means.items()},
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Schema:
        """Read a schema that `to_json` wrote."""
        try:
            classes = content["classes"]
            later = {"intercept": True, "slopes": [], "weights_kind": "frequency", "times": []}
            later |= {"cluster_columns": [], "means": {}, "calls": {}, "offset_call": None}
            later |= dict.fromkeys(("status", "upper", "entry"))
            values = {member.name: {**later, **content}[member.name] for member in fields(cls)}
            for name in ("terms", "slopes"):
                values[name] = tuple(tuple(term) for term in values[name])
            values["levels"] = {k: index_from_json(v) for k, v in values["levels"].items()}
            values |= {name: tuple(values[name]) for name in ("indicators", "clusters", "times")}
            values["classes"] = None if classes is None else index_from_json(classes)
            made = values["cluster_columns"]
            values["cluster_columns"] = tuple(ClusterColumn(**column) for column in made)
            values["means"] = {k: ClusterMeans.from_json(v) for k, v in values["means"].items()}
            return cls(**values)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"This is not a schema written by Schema.to_json ({error!r}); save the fit again."
            ) from error


def _expanded(
    terms: Terms, columns_of: Mapping[str, Iterable[ClusterColumn]]
) -> tuple[tuple[str, ...], ...]:
    """The terms with the columns of all levels in place of a categorical `ClusterColumn`."""
    choices = (
        [[c.name for c in columns_of[name]] if name in columns_of else [name] for name in term]
        for term in terms
    )
    return tuple(combination for names in choices for combination in itertools.product(*names))


def _features(
    features: Sequence[str] | str | None, table: pd.DataFrame, reserved: Collection[str]
) -> Formula:
    """The formula of features; ``.`` and None are all columns without another role."""

    def others() -> tuple[str, ...]:
        return default_features(table, reserved)

    if features is None or features == ".":
        return Formula(tuple((name,) for name in others()))
    formula = parse_features(features, others)
    check_features(formula.calls)
    return formula


def _check_offsets(formula: Formula, slopes: Formula, column: str | None) -> None:
    """Raise ValueError for an offset among the slopes, or in two places."""
    if slopes.offset is not None:
        raise ValueError(f"slopes have offset({slopes.offset}), which belongs to the features.")
    if formula.offset is not None and column is not None:
        raise ValueError(
            f"offset={column!r} stands beside offset({formula.offset}) in the features; write "
            "both in the formula."
        )


def _several(call: str) -> bool:
    """Whether a call makes columns with numbers, such as ``poly(x, 2)[1]``."""
    transform = STATEFUL.get(call.partition("(")[0])
    return transform is not None and not transform.single


def _learned(call: str, table: pd.DataFrame) -> CallState:
    """What the functions of a call learn from the training table."""
    return {} if contrast_of(call) is not None else evaluate(call, table)[1]


def _check_distinct(calls: Iterable[str], table: pd.DataFrame) -> None:
    """Raise ValueError for a table column that is called like a call of the formula."""
    for name in calls:
        if name in table:
            raise ValueError(
                f"The table has a column {name!r}, which is also a call of the formula: rename "
                f"the column, or write `{name}` in backticks for it."
            )


def _classes(outcome: pd.Series, event: Any) -> pd.Index | None:
    """Labels of an outcome that is categorical or has an event, the event last; None of numbers."""
    if event is None and not is_categorical(outcome):
        return None
    what = f"outcome {outcome.name!r}"
    return event_last(code_labels(outcome, what)[1], event, what)


def _check_outcome(outcome: str, features: Sequence[str], clusters: Sequence[str]) -> None:
    for role, members in [("feature", features), ("cluster", clusters)]:
        if outcome in members:
            raise ValueError(
                f"The outcome {outcome!r} is also listed as a {role}; take it off that list."
            )
