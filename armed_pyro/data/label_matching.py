"""The rule by which labels of a new table are those that training saw."""

from __future__ import annotations

import datetime
import numbers
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int

from armed_pyro._messages import listing, unknown

# Text that a reader of CSV files may take for a whole number, and number columns may have become.
_WHOLE = re.compile(r"(-?)0*(\d+)(\.0*)?")
_MIDNIGHT = re.compile(r"(\d{4}-\d{2}-\d{2})[ T]00:00:00(\.0+)?")
MIXED = "mixed"  # the kind of labels of several types
# A text label without any of these is its own key.
_REWRITTEN = re.compile(r"\d|true|false", re.IGNORECASE)


def label_text(label: Any) -> str:
    """A label as text, the same for whatever type a column has: whole numbers have no point.

    >>> label_text(101.0), label_text(np.int8(101)), label_text("01"), label_text(0.5)
    ('101', '101', '01', '0.5')
    """
    if isinstance(label, float | np.floating) and float(label).is_integer():
        return str(int(label))
    text = str(label)
    return _MIDNIGHT.sub(r"\1", text) if isinstance(label, datetime.date) else text


def label_key(label: Any) -> str:
    """Text that labels of different types share if they may be the same label.

    Whole numbers are compared without leading zeros and decimals, ``TRUE`` as ``true``, dates
    without a time of 0:00, and the parts of ``"a:b"`` one by one.

    >>> [label_key(label) for label in ("01", 1.0, "101.0:1.0", "1.10", "K", True)]
    ['1', '1', '101:1', '1.10', 'K', 'true']
    """
    text = label_text(label)
    if _REWRITTEN.search(text) is None:
        return text
    return ":".join(map(_part_key, _MIDNIGHT.sub(r"\1", text).split(":")))


def _part_key(text: str) -> str:
    if whole := _WHOLE.fullmatch(text):
        sign, digits, _ = whole.groups()
        return digits if digits == "0" else sign + digits
    return text.lower() if text.lower() in ("true", "false") else text


def match_labels(labels: pd.Index, known: pd.Index, what: str) -> Int[np.ndarray, " labels"]:
    """Position in `known` of each of these distinct labels; -1 for a label that is new.

    A label is a known one if it equals that one: text as text, numbers by value. Any other label
    is the known one with the same `label_key`: 1 and 1.0 are "01", and "101.0:1.0" is "101:1".

    Raises
    ------
    ValueError
        If a label could be two known ones (1, where "1" and "01" are known), or two labels could
        be the same known one. `what` names the labels in the message.

    Examples
    --------
    >>> match_labels(pd.Index([1, 2, 7]), pd.Index(["01", "02", "K"]), "site").tolist()
    [0, 1, -1]
    """
    kinds = _kind(labels), _kind(known)
    if kinds[0] == kinds[1] != MIXED:
        places = known.get_indexer(labels).astype(np.int64)
    else:
        # True == 1 == 1.0 in Python, and a column of objects may hold all of them.
        by_value = {(_kind_of(label), label): place for place, label in enumerate(known)}
        found = [by_value.get((_kind_of(label), label), -1) for label in labels]
        places = np.array(found, dtype=np.int64)
    new = np.flatnonzero(places < 0).tolist()
    unmatched = [(place, label_key(labels[place])) for place in new]
    # A column of numbers, or text that no reader rewrites, has no other way to be written.
    if kinds != ("number", "number") and any(
        not isinstance(labels[place], str) or _REWRITTEN.search(key) for place, key in unmatched
    ):
        by_key = defaultdict[str, list[int]](list)
        for place, label in enumerate(known):
            by_key[label_key(label)].append(place)
        for place, key in unmatched:
            candidates = by_key.get(key, [])
            if len(candidates) > 1:
                raise ValueError(
                    f"The {what} has the label {listing(labels[[place]])}, which could be "
                    f"{listing(known[candidates])} of the training data. Write the labels as "
                    "they were written there, as text."
                )
            places[place] = candidates[0] if candidates else -1
        _check_distinct(labels, known, places, what)
    return places


def _check_distinct(
    labels: pd.Index, known: pd.Index, places: Int[np.ndarray, " labels"], what: str
) -> None:
    values, counts = np.unique(places[places >= 0], return_counts=True)
    for twice in values[counts > 1][:1].tolist():
        raise ValueError(
            f"The {what} has the labels {listing(labels[places == twice])}, which both could be "
            f"{listing(known[[twice]])} of the training data. Write each cluster or category in "
            "one way, and a new one under another name."
        )


def _kind(labels: pd.Index) -> str:
    """Kind of all labels: "number", "text", ...; `MIXED` for a mixture."""
    if labels.dtype == object:
        kinds = set(map(_kind_of, labels))
        return kinds.pop() if len(kinds) == 1 else MIXED
    if isinstance(labels.dtype, pd.StringDtype):
        return "text"
    if pd.api.types.is_bool_dtype(labels.dtype):
        return "bool"
    return "number" if pd.api.types.is_numeric_dtype(labels.dtype) else str(labels.dtype)


def _kind_of(label: Any) -> str:
    if isinstance(label, bool | np.bool_):
        return "bool"
    if isinstance(label, numbers.Number):
        return "number"
    return "text" if isinstance(label, str) else type(label).__name__


def under_known_labels(labels: pd.Index, known: pd.Index, what: str) -> pd.Index:
    """These labels, each known one as it is written in `known`; see `match_labels`.

    >>> under_known_labels(pd.Index([1, 7]), pd.Index(["01", "K"]), "site").tolist()
    ['01', 7]
    """
    places = match_labels(labels, known, what)
    if (places < 0).all():
        return labels
    if (places >= 0).all():
        return known.take(places)
    pairs: Sequence[tuple[Any, int]] = list(zip(labels, places, strict=True))
    return pd.Index([label if place < 0 else known[place] for label, place in pairs])


def places_of(labels: Any, known: pd.Index, factor: str) -> Int[np.ndarray, " labels"]:
    """Positions of a factor's labels in `known`; ValueError for the first label that is new."""
    chosen = pd.Index(labels).unique()
    places = match_labels(chosen, known, f"labels= for {factor!r}")
    if missing := chosen[places < 0].tolist():
        raise unknown(f"cluster of {factor!r} called", missing[0], known)
    return places
