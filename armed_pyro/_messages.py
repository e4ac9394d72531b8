"""Words for messages: listings, counts, names that are not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import numpy as np


def unknown(what: str, name: Any, known: Iterable[Any]) -> ValueError:
    """The error for a name that is not among the known ones, with the nearest of them."""
    options = list(known)
    nearest = difflib.get_close_matches(str(name), [str(option) for option in options], n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return ValueError(f"There is no {what} {name!r}.{hint} There are: {listing(options)}.")


def listing(items: Iterable[Any], most: int = 10) -> str:
    """Items as text, ten at the most."""
    shown = [repr(item.item() if isinstance(item, np.generic) else item) for item in items]
    rest = f" and {len(shown) - most} more" if len(shown) > most else ""
    return ", ".join(shown[:most]) + rest if shown else "none"


def count_rows(count: int) -> str:
    """A number of rows as text: ``1 row``, ``2 rows``."""
    return f"{count} row" if count == 1 else f"{count} rows"
