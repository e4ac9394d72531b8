"""Wording of messages: lists, counts, and names that do not exist."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np


def unknown(what: str, name: Any, known: Iterable[Any]) -> ValueError:
    """The error for a name that does not exist, with the nearest existing name.

    >>> unknown("column", "agee", ["age", "sex"])
    ValueError("There is no column 'agee'. Did you mean 'age'? There are: 'age', 'sex'.")
    """
    options = list(known)
    folded = {str(option).casefold(): str(option) for option in options}
    nearest = difflib.get_close_matches(str(name).casefold(), folded, n=1)
    hint = f" Did you mean {folded[nearest[0]]!r}?" if nearest else ""
    return ValueError(f"There is no {what} {name!r}.{hint} There are: {listing(options)}.")


def check_known(what: str, names: Iterable[Any], known: Collection[Any]) -> None:
    """Raise `unknown` for the first of these names that does not exist."""
    for name in names:
        if name not in known:
            raise unknown(what, name, known)


def listing(items: Iterable[Any], most: int = 10) -> str:
    """Items as text, at most `most` of them, followed by the number of the rest.

    >>> listing(["a", "b", "c"], most=2)
    "'a', 'b' and 1 more"
    """
    shown = [repr(item.item() if isinstance(item, np.generic) else item) for item in items]
    rest = f" and {len(shown) - most} more" if len(shown) > most else ""
    return ", ".join(shown[:most]) + rest if shown else "none"


def check_prob(prob: float, name: str = "`prob`") -> None:
    """Raise ValueError if a probability or share is not between 0 and 1.

    >>> check_prob(95)
    Traceback (most recent call last):
    ValueError: `prob` must lie between 0 and 1, not 95: write 0.95
    """
    if not 0 < prob < 1:
        hint = f": write {prob / 100:g}" if 2 <= prob < 100 else ""
        raise ValueError(f"{name} must lie between 0 and 1, not {prob:g}{hint}")


def count_rows(count: int) -> str:
    """A number of rows as text: ``1 row``, ``2 rows``."""
    return f"{count} row" if count == 1 else f"{count} rows"
