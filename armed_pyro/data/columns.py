"""Values of columns and arrays: checked, and turned into numbers or codes."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from pandas.api import types as dtypes
from torch import Tensor

from armed_pyro._messages import check_known, count_rows, listing, unknown
from armed_pyro.data.grouping import code_labels
from armed_pyro.data.label_matching import match_labels
from armed_pyro.rows.array_inputs import ArrayInputs

Missing = Literal["error", "drop"]

# A number with an optional fraction, thousands, per cent or limit of detection.
_NUMBER = r"[<>~]?\s*[+-]?(\d{1,3}([ .,']\d{3})+|\d+)?([.,]\d+)?([eE][+-]?\d+)?\s*%?"
# A path of a file with an extension of images, arrays, sounds or documents.
_FILE = (
    r".+\.(png|jpe?g|tiff?|bmp|gif|webp|svs|dcm|nii|nii\.gz|npy|npz|h5|hdf5|zarr|pt|pth|mat|"
    r"wav|mp3|flac|txt|pdf|json)"
)
_MISSING_MARKS = (
    *("", ".", "-", "--", "?", "*", "na", "n/a", "nan", "null", "none", "nd", "n.d."),
    *("missing", "unknown", "not available", "not recorded", "#value!", "#div/0!", "#ref!"),
)


def code_outcome(
    outcome: Any, classes: Sequence[Any] | None, what: str, event: Any = None
) -> tuple[Tensor | None, tuple[Any, ...] | None]:
    """An outcome as numbers; or, if it is boolean or text or has classes, as codes and classes.

    With an `event` it has classes, and the event is the second of two.
    """
    if outcome is None:
        return None, None if classes is None else tuple(classes)
    values = np.asarray(outcome)
    if values.ndim == 2 and values.shape[1] == 1:
        # A column: against predictors of shape (rows,) it would be compared with every row.
        outcome = values = values[:, 0]
    numbers = values.ndim != 1 or values.dtype.kind in "iuf"
    if event is None and classes is None and numbers:
        return finite_tensor(outcome, what), None
    codes, levels = code_labels(outcome, what)
    known = tuple(levels.tolist() if classes is None else classes)
    if event is not None:
        known = tuple(event_last(pd.Index(known), event, what).tolist())
    check_known(f"class of the {what} called", levels, known)
    positions = [known.index(level) for level in levels]
    return torch.tensor(positions, dtype=torch.float64)[codes], known


def event_last(classes: pd.Index, event: Any, what: str) -> pd.Index:
    """Two classes with the event, the class whose probability is modelled, as the second.

    Without an event, the classes as they are.

    >>> event_last(pd.Index(["case", "control"]), "case", "outcome").tolist()
    ['control', 'case']
    """
    if event is None:
        return classes
    if len(classes) != 2:
        raise ValueError(
            f"event={event!r} names one of two labels, but the {what} has {len(classes)}: "
            f"{listing(classes)}. Leave event= (command line: --event) out."
        )
    (place,) = match_labels(pd.Index([event]), classes, what)
    if place < 0:
        raise unknown(f"label of the {what} for event=", event, classes)
    return classes.take([1 - place, place])


def finite_tensor(values: Any, what: str, *, per_row: bool = False) -> Tensor:
    """Float[Tensor, "rows ..."] of finite numbers, checked.

    Up to two dimensions the result is float64. With more, types are kept, and arrays are not
    copied.
    """
    try:
        # NumPy first: torch would read a list of numbers in single precision.
        tensor = _as_tensor(np.asarray(values) if isinstance(values, list) else values)
    except (TypeError, ValueError) as error:
        kind = getattr(values, "dtype", type(values).__name__)
        raise ValueError(f"The {what} must be numbers, found {kind}; encode them first.") from error
    if per_row and tensor.ndim != 1:
        raise ValueError(f"The {what} must be one number per row, found {tuple(tensor.shape)}.")
    if tensor.is_complex():
        raise ValueError(f"The {what} must be real numbers, found {tensor.dtype}.")
    if tensor.ndim <= 2:
        tensor = tensor.to(torch.float64)
    if not tensor.is_floating_point():
        return tensor
    # In parts: a mask of all values could need gigabytes.
    if wrong := sum(int((~torch.isfinite(part)).sum()) for part in tensor.split(1024)):
        raise ValueError(
            f"The {what} has {wrong} missing or infinite values; fill them in, or leave those "
            "rows out."
        )
    return tensor


def _as_tensor(values: Any) -> Tensor:
    """An array as a tensor that shares its memory, which may be read-only and is never written."""
    if isinstance(values, np.ndarray) and values.dtype in (np.uint16, np.uint32):
        values = values.astype(np.int32 if values.dtype == np.uint16 else np.int64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.as_tensor(values)


def named_features(
    features: Any, names: Sequence[str] | None
) -> tuple[Tensor, tuple[str, ...], ArrayInputs | None]:
    """An array of features, and the names of its columns; no names for images.

    Several arrays, as a tuple or dict, are inputs without features.
    """
    if isinstance(features, Mapping) or (
        isinstance(features, tuple) and all(hasattr(part, "shape") for part in features)
    ):
        inputs = ArrayInputs.of(features)
        return torch.zeros(len(inputs), 0, dtype=torch.float64), (), inputs
    x = finite_tensor(features, "features")
    if x.ndim < 2:
        raise ValueError(
            f"features must have the shape (rows, features) or more dimensions, found "
            f"{tuple(x.shape)}. A single feature is x[:, None]."
        )
    width = x.shape[1] if x.ndim == 2 else 0
    names = tuple(names or (f"x{i}" for i in range(width)))
    if len(names) != width or len(set(names)) != width:
        raise ValueError(
            f"feature_names must be {width} distinct names for features of shape "
            f"{tuple(x.shape)}, found {list(names)}."
        )
    return x, names, None


def check_rows(values: Tensor, valid: Tensor, what: str, expected: str, labels: pd.Index) -> None:
    """Raise ValueError, with the first invalid row, unless all rows' values are valid."""
    if not bool(valid.all()):
        row = int((~valid).nonzero()[0])
        raise ValueError(
            f"The {what} must be {expected}; {int((~valid).sum())} of {count_rows(len(valid))} are "
            f"not, such as {values[row].item()} in row {listing(labels[[row]])}. Correct them, or "
            "leave those rows out."
        )


def check_trials(trials: Tensor, labels: pd.Index) -> None:
    """Raise ValueError unless every row has a positive whole number of trials."""
    valid = (trials >= 1) & (trials % 1 == 0)
    check_rows(trials, valid, "trials", "positive whole numbers", labels)


def check_varying(names: Sequence[str], varying: Tensor) -> None:
    """Raise ValueError if a feature is the same in all training rows."""
    if constant := ", ".join(repr(names[int(i)]) for i in (~varying).nonzero()):
        raise ValueError(f"Constant in all training rows: {constant}. Leave them out.")


def column_names(names: Sequence[str], what: str) -> tuple[str, ...]:
    """A list of column names as a tuple."""
    listed: object = names
    if isinstance(listed, str) or not isinstance(listed, Iterable) or set(map(type, names)) - {str}:
        raise TypeError(f"{what} must be a list of column names, found {names!r}.")
    return tuple(names)


def pick(table: pd.DataFrame, names: Collection[str]) -> pd.DataFrame:
    """The named columns of a table, each once."""
    check_known("column", names, table.columns)
    return table[list(dict.fromkeys(names))]


# How to leave rows out, of training tables and of tables to predict.
TRAINING = "missing='drop' (command line: --missing drop)"
NEW = (
    "ClusteredData.encode(table, fit.data.schema, missing='drop') (command line: armed-pyro "
    "predict --missing empty, which keeps their place)"
)


def complete_rows(table: pd.DataFrame, missing: Missing, remedy: str = TRAINING) -> pd.DataFrame:
    """The rows without missing values; other rows are an error, or dropped with a warning."""
    if missing not in ("error", "drop"):
        raise ValueError(f"missing must be 'error' or 'drop', found {missing!r}.")
    holes = table.isna()
    if not (affected := int(holes.any(axis=1).sum())):
        return table
    counts = holes.sum()
    where = ", ".join(f"{name!r} ({count_rows(int(n))})" for name, n in counts[counts > 0].items())
    share = f"{affected} of {count_rows(len(table))}"
    if affected == len(table):
        raise ValueError(f"Every row has missing values, in {where}. Leave those columns out.")
    if missing == "error":
        raise ValueError(
            f"Missing values in {where}: {share}. Fill them in, or leave those rows out with "
            f"{remedy}."
        )
    warnings.warn(f"Dropped {share} for missing values in {where}.", stacklevel=4)
    return table[~holes.any(axis=1)]


def check_finite(table: pd.DataFrame, remedy: str = TRAINING) -> None:
    """Raise ValueError if a numeric column has infinite values."""
    numeric = table.select_dtypes("number")
    counts = numeric.apply(lambda column: int(np.isinf(column.to_numpy(dtype=float)).sum()))
    if where := ", ".join(f"{n!r} ({count_rows(c)})" for n, c in counts.items() if c):
        raise ValueError(
            f"Infinite values in {where}. Replace them by finite ones, or by missing values and "
            f"leave those rows out with {remedy}."
        )


def is_categorical(column: pd.Series) -> bool:
    """Whether a column is boolean, text or categorical, rather than numeric."""
    return (
        isinstance(column.dtype, pd.CategoricalDtype)
        or dtypes.is_bool_dtype(column.dtype)
        or dtypes.is_object_dtype(column.dtype)
        or dtypes.is_string_dtype(column.dtype)
    )


def check_not_numbers(column: pd.Series) -> None:
    """Raise ValueError if a column of text is a column of numbers that was read as text.

    These are numbers with a fraction, such as "1,5", or numbers beside a mark for missing values.
    Whole numbers beside words ("1", "2", "K") are categories.
    """
    if isinstance(column.dtype, pd.CategoricalDtype) or dtypes.is_bool_dtype(column.dtype):
        return
    distinct = dict.fromkeys(value.strip() for value in column if isinstance(value, str))
    texts = pd.Series(list(distinct), dtype=object)
    numbers = texts[texts.str.fullmatch(_NUMBER) & texts.str.contains(r"\d")]
    others = texts[~texts.isin(numbers)]
    fractions = numbers[numbers.str.contains(r"[.,%<>]")]
    marked = len(others) > 0 and others.str.lower().isin(_MISSING_MARKS).all() and len(numbers) > 2
    if not marked and (2 * len(fractions) < len(texts) or len(fractions) < 2):
        return
    example = fractions if len(fractions) else numbers
    cause = "" if others.empty else f", beside {listing(others, 3)}"
    raise ValueError(
        f"The feature {column.name!r} is text, but holds numbers, such as {listing(example, 3)}"
        f"{cause}. Convert it to numbers (decimal commas: pandas.read_csv(..., decimal=','); marks "
        "of missing values: na_values=[...]), or declare its values categories with "
        "categorical=[...] (command line: --categorical)."
    )


def check_not_paths(column: pd.Series) -> None:
    """Raise ValueError if a column of text holds paths of files, as of images."""
    if isinstance(column.dtype, pd.CategoricalDtype) or dtypes.is_bool_dtype(column.dtype):
        return
    texts = dict.fromkeys(value for value in column if isinstance(value, str))
    distinct = pd.Series(list(texts), dtype=object)
    paths = distinct[distinct.str.fullmatch(_FILE, case=False)]
    if len(paths) < 2 or 2 * len(paths) < len(distinct):
        return
    raise ValueError(
        f"The feature {column.name!r} holds paths of files, such as {listing(paths, 2)}, which "
        "would become categories. Let a torch.utils.data.Dataset read the files, and pass it to "
        "ClusteredData.from_dataset(dataset, table=table, outcome=..., clusters=[...])."
    )


def as_numbers(column: pd.Series, role: str) -> np.ndarray:
    """Float64[ndarray, "rows"], a copy of a column that must hold numbers."""
    if dtypes.is_numeric_dtype(column.dtype) and not dtypes.is_complex_dtype(column.dtype):
        return column.to_numpy(dtype=np.float64, copy=True)
    advice = "Convert it to numbers first."
    if dtypes.is_datetime64_any_dtype(column.dtype):
        advice = "Compute a number first, such as the days since a fixed date."
    raise ValueError(
        f"The {role} column {column.name!r} holds {column.dtype}, such as {listing(column[:1])}; "
        f"expected numbers. {advice}"
    )


def known_codes(column: pd.Series, levels: pd.Index, what: str) -> np.ndarray:
    """Int64[ndarray, "rows"], the position of each label in `levels`; all labels must be there.

    Labels are compared as by `match_labels`.
    """
    if isinstance(column.dtype, pd.CategoricalDtype):
        column = column.astype(column.cat.categories.dtype)
    present, labels = pd.factorize(column)
    codes = match_labels(pd.Index(labels), levels, what)[present]
    if (new := codes < 0).any():
        raise ValueError(
            f"The {what} has categories that training did not: "
            f"{listing(column[new].unique())}, in {count_rows(int(new.sum()))}. Known: "
            f"{listing(levels)}. Recode these rows, or leave them out."
        )
    return codes


def with_times(clusters: Sequence[str], times: Sequence[str]) -> tuple[str, ...]:
    """The columns of clusters, and of times of processes, each once."""
    names = *column_names(clusters, "clusters"), *column_names(times, "times")
    return tuple(dict.fromkeys(names))
