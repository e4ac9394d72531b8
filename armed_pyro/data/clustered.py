"""Clustered data: features and outcome as tensors, and the labelled cluster of every row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
import xarray as xr

from armed_pyro._messages import check_type
from armed_pyro.data import censoring
from armed_pyro.data.clustered_rows import ClusteredRows
from armed_pyro.data.columns import (
    Missing,
    code_outcome,
    finite_tensor,
    named_features,
    with_times,
)
from armed_pyro.data.dataset_items import DatasetItems
from armed_pyro.data.dataset_rows import table_or_arrays
from armed_pyro.data.encoded_rows import encoded_rows
from armed_pyro.data.files import as_pandas
from armed_pyro.data.grouping import Grouping
from armed_pyro.data.schema import Schema, WeightsKind
from armed_pyro.data.training_checks import PER_ROW
from armed_pyro.data.weights import as_weights, weights_role


@dataclass(frozen=True, eq=False)
class ClusteredData(ClusteredRows):
    """Rows of features x_i and outcome y_i, each in one cluster of every grouping factor.

    The constructors are `from_frame`, `from_arrays` and `from_xarray`. New tables are encoded
    with the schema of the training data: ``ClusteredData.encode(new_table, data.schema)``.

    Attributes
    ----------
    features : Float64[Tensor, "rows features"] or Float[Tensor, "rows ..."]
        On the original scale, after categorical encoding. Images have more than two dimensions.
    feature_names, sources : tuple of str
        Names of the encoded columns (``"age"``, ``"sex[T.male]"``), and the table column that each
        came from (``"sex"``; ``"age:sex"``); empty for images.
    continuous : tuple of bool
        True for the encoded columns that are standardised. Dummies and columns of 0 and 1 are not.
    outcome_name : str
    outcome : Float64[Tensor, "rows"], Float[Tensor, "rows ..."] or None
        Numbers, or positions in `classes`; None where the outcome is to be predicted.
    classes : tuple or None
        Labels of an outcome that was boolean, text or categorical.
    groupings : mapping of str to Grouping
    trials, offset, weights : Float64[Tensor, "rows"] or None
        Binomial denominators; a known term of the predictor; weights of the `weights_kind`.
    row_labels : pd.Index
        Index of the table that the rows came from.
    schema : Schema or None
        Encoding of the table; None for arrays.
    slopes : Float64[Tensor, "rows columns"] or None
        Columns for random slopes alone, described by the other attributes named ``slope_...``.
    weights_kind : {"frequency", "precision", "se"}
        A row counts w times, has variance sigma^2 / w (as in lme4), or w is 1 / se^2, sigma 1.
    table : pandas.DataFrame or None
        The columns that the rows were made of, kept if functions made features from them.
    cluster_means : mapping of str to ClusterMeans
        Means that a fit with ``between`` adds to its predictor; set by `Posterior.encode`.
    fold : Int64[Tensor, "rows"] or None
        Number of the cross-fitted network that was trained without the row, in a fit's rows.
    inputs : LazyInputs or None
        What the network takes in place of the features: see `from_dataset`.
    status, upper, entry : Float64[Tensor, "rows"] or None
        Status of the outcome (0 censored from the right, 1 exact, 2 from the left, 3 in an
        interval), upper end of the interval, and value above which it could be observed.

    Examples
    --------
    >>> table = pd.DataFrame({"y": [1.0, 2.0, 3.0], "x": [0.5, 0.7, 0.1], "site": ["a", "b", "a"]})
    >>> data = ClusteredData.from_frame(table, outcome="y", clusters=["site"])
    >>> data.feature_names, data.grouping("site").n_clusters
    (('x',), 2)
    """

    @classmethod
    def from_frame(
        cls,
        frame: Any,
        *,
        outcome: str,
        clusters: Sequence[str],
        features: Sequence[str] | str | None = None,
        slopes: Sequence[str] | str = (),
        categorical: Sequence[str] = (),
        trials: str | None = None,
        offset: str | None = None,
        weights: str | None = None,
        event: Any = None,
        weights_kind: WeightsKind = "frequency",
        se: str | None = None,
        times: Sequence[str] = (),
        status: str | None = None,
        upper: str | None = None,
        entry: str | None = None,
        missing: Missing = "error",
    ) -> ClusteredData:
        """Encode a table: numbers as they are, categories by treatment coding.

        Boolean, text and categorical columns hold categories, and numeric columns do if they are
        in `categorical` or in ``factor()``. Their order is sorted or, for a categorical column, the
        column's own; the first category is the reference. The intercept is never a feature.

        Parameters
        ----------
        frame
            A pandas, polars or pyarrow table; the other parameters name its columns.
        outcome
            Column of the outcome; categories become codes into `classes`.
        clusters
            Columns of the grouping factors; row-wise splits go by the first.
        features
            Columns, or a formula of columns with ``+ : * ^``, such as ``"age * factor(dose)"``.
            ``"within(x | g) + between(x | g)"`` are the deviation of x from its mean in the cluster
            of g, and that mean: `armed_pyro.data.cluster_means`. ``"1"`` or ``[]`` is an intercept
            alone, and ``"0 + age"`` has no intercept. None and ``"."`` stand for every column that
            has no other role and does not identify rows.
        slopes
            Columns, or a formula, that random slopes may use beside the features, and that do not
            enter the network.
        categorical
            Numeric columns whose values are categories.
        trials, offset, weights
            Columns of row-wise numbers.
        event
            The label of a two-valued outcome whose probability is modelled. As in R, it is by
            default the second: of sorted labels the last, of a categorical column its second
            category, True, and 1.
        weights_kind
            "frequency" or "precision"; see the attribute.
        se
            Column of known standard errors in place of weights, y_i ~ N(eta_i, se_i^2), without a
            residual sd; in a meta-analysis, ``(1 | study)`` is the heterogeneity.
        times
            Columns of the times of processes such as ``ou(time | g)``, as numbers.
        status
            Column that says whether the outcome was observed: 1 or True for an event, 0 or False
            for an outcome that is only known to be larger (censored from the right), or the texts
            ``event``, ``right`` and ``left`` (only known to be smaller).
        upper
            Column of the upper ends of intervals, of which `outcome` is the lower end. Equal ends
            are an exact outcome; a missing or infinite end is open, as in R's ``interval2``.
        entry
            Column of the values above which an outcome could be observed (left truncation), such
            as the age at the start of observation.
        missing
            Treatment of rows with missing values: ``"error"``, or ``"drop"`` with a warning.

        Raises
        ------
        ValueError
            If a column cannot be used in its role; see `Schema.infer` and `encode`.
        """
        frame = as_pandas(frame)
        check_type(outcome, str, "outcome", "It is the name of a column.")
        weights, kind = weights_role(weights, weights_kind, se)
        roles: dict[str, Any] = {"trials": trials, "offset": offset, "weights": weights}
        roles |= {"status": status, "upper": upper, "entry": entry}
        censoring.check_observed(status, upper)
        for role, name in roles.items():
            check_type(name, (str, type(None)), role, "It is the name of a column.")
        schema = Schema.infer(
            frame,
            outcome=outcome,
            clusters=with_times(clusters, times),
            features=features,
            slopes=slopes,
            categorical=categorical,
            event=event,
            weights_kind=kind,
            times=times,
            **roles,
        )
        return cls.encode(frame, schema, outcome_required=True, missing=missing)

    @classmethod
    def encode(
        cls,
        frame: Any,
        schema: Schema,
        *,
        outcome_required: bool = False,
        missing: Missing = "error",
    ) -> ClusteredData:
        """Encode a table's rows, with the columns of a schema, as tensors and labelled levels.

        Unless `outcome_required`, a table whose outcome is absent or has missing values is encoded
        without an outcome, and weights may be absent too. `missing` is as in `from_frame`.

        Raises
        ------
        ValueError
            If the table has no rows, lacks a column, or has a column with missing or infinite
            values, text in place of numbers, or categories that the schema does not know.

        Examples
        --------
        >>> table = pd.DataFrame({"y": [1.0, 2.0], "x": [0.5, 0.7], "site": ["a", "b"]})
        >>> schema = Schema.infer(table, outcome="y", clusters=["site"])
        >>> ClusteredData.encode(table, schema).feature_names
        ('x',)
        """
        return cls(**encoded_rows(frame, schema, outcome_required, missing))

    @classmethod
    def from_arrays(
        cls,
        features: Any,
        outcome: Any,
        clusters: Mapping[str, Any],
        *,
        feature_names: Sequence[str] | None = None,
        outcome_name: str = "outcome",
        classes: Sequence[Any] | None = None,
        trials: Any = None,
        offset: Any = None,
        weights: Any = None,
        event: Any = None,
        weights_kind: WeightsKind = "frequency",
        se: Any = None,
        status: Any = None,
        upper: Any = None,
        entry: Any = None,
        row_labels: pd.Index | None = None,
    ) -> ClusteredData:
        """Take arrays or tensors of numbers as they are, and code the clusters' labels.

        Parameters
        ----------
        features
            Shape "rows features", converted to float64; "rows ..." with more dimensions, whose
            type is kept; or a tuple or dict of arrays, the arguments of the network. Images of
            whole numbers or large values are standardised by channel.
        outcome
            Shape "rows" of numbers, booleans or text; or None.
        clusters
            Labels of shape "rows" for each grouping factor.
        feature_names
            Names of the feature columns; ``x0``, ``x1``, ... by default.
        classes
            All labels of a categorical outcome, in order; needed where a label does not occur.
        trials, offset, weights
            Numbers of shape "rows".
        event
            As in `from_frame`.
        weights_kind, se
            As in `from_frame`, with standard errors of shape "rows".
        status, upper, entry
            As in `from_frame`, of shape "rows"; open ends of intervals are infinite.

        Raises
        ------
        ValueError
            If lengths differ, a shape is wrong, or a value is missing or infinite.
        """
        advice = "Pass {'site': labels}, with one label per row."
        check_type(clusters, Mapping, "clusters", advice)
        x, feature_names, inputs = named_features(features, feature_names)
        labels = pd.RangeIndex(len(x)) if row_labels is None else row_labels
        outcome, observed = censoring.observed_arrays(outcome, status, upper, entry, labels)
        y, classes = code_outcome(outcome, classes, f"outcome {outcome_name!r}", event)
        weights, kind = weights_role(weights, weights_kind, se)
        roles = {"trials": trials, "offset": offset, "weights": weights, **observed}
        per_row: dict[str, Any] = {
            k: None if v is None else finite_tensor(v, k, per_row=True) for k, v in roles.items()
        }
        per_row["weights"] = as_weights(per_row["weights"], kind, labels)
        fractional = ((x != 0) & (x != 1)).any(dim=0).tolist() if feature_names else ()
        return cls(
            features=x,
            feature_names=feature_names,
            sources=feature_names,
            continuous=tuple(fractional),
            outcome_name=outcome_name,
            outcome=y,
            classes=classes,
            groupings={
                k: Grouping.from_labels(v, f"grouping factor {k!r}") for k, v in clusters.items()
            },
            **per_row,
            row_labels=labels,
            schema=None,
            weights_kind=kind,
            inputs=inputs,
        )

    @classmethod
    def from_xarray(
        cls,
        dataset: xr.Dataset,
        *,
        outcome: str,
        clusters: Sequence[str],
        features: Sequence[str] | str | None = None,
        row_dim: str = "row",
        missing: Missing = "error",
        **roles: Any,
    ) -> ClusteredData:
        """Encode an xarray dataset whose variables share the dimension `row_dim`.

        One-dimensional variables are the columns of a table, as in `from_frame`, whose other
        parameters are `roles`. A feature variable with more dimensions must be the
        only feature, and is an array as in `from_arrays`; the coordinate of the second of two
        dimensions names the features. The coordinate of `row_dim` labels the rows.

        Raises
        ------
        ValueError
            If a variable or dimension does not exist, or an array is not the only feature.
        """
        parts = (dataset, outcome, clusters, features, row_dim, roles)
        table, chosen, arrays = table_or_arrays(*parts)
        if table is None:
            return cls.from_arrays(**arrays)
        settings: dict[str, Any] = {"features": chosen, "missing": missing, **roles}
        return cls.from_frame(table, outcome=outcome, clusters=clusters, **settings)

    @classmethod
    def from_dataset(
        cls,
        dataset: Any,
        *,
        outcome: Any = None,
        clusters: Any = (),
        table: Any = None,
        inputs: Any = None,
        slopes: Sequence[str] | str = (),
        collate: Callable[[list[Any]], Any] | None = None,
        augment: Callable[[Any], Any] | None = None,
        workers: int | None = None,
        schema: Schema | None = None,
        missing: Missing = "error",
        **roles: Any,
    ) -> ClusteredData:
        """Rows whose inputs a torch dataset loads when a network needs them; see `DatasetItems`.

        A network gets the inputs as they are, nothing standardised: a tensor as ``net(x)``, a tuple
        as ``net(*inputs)`` and a dict as ``net(**inputs)``.

        Parameters
        ----------
        dataset
            A map-style `torch.utils.data.Dataset`, or a `DataLoader`, with its collate and workers.
        outcome, trials, offset, weights, se
            A column of `table`; one value per item; or, where these are to be read from all items
            once, a position or key in an item (a text is a key without a table), or a function.
        clusters
            Columns of the table, or values as above by name of the grouping factor.
        table
            A table whose row i describes ``dataset[i]``.
        inputs
            The inputs in an item, or in a batch of `collate`: a position or key, several, or a
            function. By default all of it.
        slopes
            Columns or a formula of the table for random slopes, as in `from_frame`.
        collate
            Joins a list of items; by default torch's.
        augment
            Changes an item of a training batch; its random numbers follow from the seed.
        workers
            Processes that load ahead.
        schema
            Encoding of training rows, ``data.schema``, for rows to predict. The outcome and roles
            are then its columns, and the outcome may be absent.

        Raises
        ------
        TypeError, ValueError
            If items have no numbers, lengths differ, or a column cannot be used in its role.

        Examples
        --------
        >>> items = [(torch.full((1, 2, 2), float(i)), i % 3) for i in range(6)]
        >>> sites = {"site": ["a", "b", "a", "b", "a", "b"]}
        >>> data = ClusteredData.from_dataset(items, outcome=1, clusters=sites, inputs=0)
        >>> data.outcome.tolist(), data.take([4]).inputs.load().flatten().tolist()
        ([0.0, 1.0, 2.0, 0.0, 1.0, 2.0], [4.0, 4.0, 4.0, 4.0])
        """
        per_row = {name: roles.pop(name, None) for name in (*PER_ROW, "se")}
        reading: dict[str, Any] = {"inputs": inputs, "collate": collate, "augment": augment}
        items = DatasetItems.of(
            dataset, table, outcome, clusters, per_row, **reading, workers=workers
        )
        if schema is not None:
            rows = cls.encode(items.table, schema, missing=missing)
        else:
            settings: dict[str, Any] = {"clusters": items.clusters, "slopes": slopes, **roles}
            settings |= {"features": [], "missing": missing, **items.names}
            rows = cls.from_frame(items.table, **settings)
        places = rows.row_labels.to_numpy()
        loaded = items.inputs.take(torch.tensor(places))
        return replace(rows, inputs=loaded, row_labels=items.labels.take(places))
