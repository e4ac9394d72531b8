"""Wording of messages: lists, counts, and names that do not exist."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
from rich.console import Console

INTEGER, REAL = (int, np.integer), (int, float, np.integer, np.floating)


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


def check_type(value: Any, kind: type | tuple[type, ...], what: str, advice: str = "") -> None:
    """Raise TypeError unless a value is of this kind, or of one of these.

    >>> check_type(3, str, "outcome", "Name a column.")
    Traceback (most recent call last):
    ...
    TypeError: outcome must be a str, found an int (3). Name a column.
    """
    if isinstance(value, kind) and not (isinstance(value, bool) and kind in (INTEGER, REAL)):
        return
    kinds = (int,) if kind == INTEGER else (float,) if kind == REAL else kind
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    names = ["None" if k is type(None) else _with_article(k.__name__) for k in kinds]
    shown = repr(value)
    shown = f" ({shown})" if len(shown) <= 60 and "\n" not in shown else ""
    found = "None" if value is None else _with_article(type(value).__name__) + shown
    raise TypeError(f"{what} must be {' or '.join(names)}, found {found}. {advice}".strip())


def _with_article(name: str) -> str:
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def check_probability(prob: Any, what: str = "`prob`") -> None:
    """Raise an error unless a number lies strictly between 0 and 1.

    >>> check_probability(95)
    Traceback (most recent call last):
    ...
    ValueError: `prob` must lie between 0 and 1, not 95: write 0.95
    """
    check_type(prob, REAL, what)
    if not 0 < prob < 1:
        hint = f": write {prob / 100:g}" if 2 <= prob < 100 else ""
        raise ValueError(f"{what} must lie between 0 and 1, not {prob:g}{hint}")


def progress_console() -> Console:
    """Where progress is shown: on stderr, so that a closed output ends no computation."""
    return Console(stderr=True, soft_wrap=True)


def listing(items: Iterable[Any], most: int = 10) -> str:
    """Items as text, at most `most` of them, followed by the number of the rest.

    >>> listing(["a", "b", "c"], most=2)
    "'a', 'b' and 1 more"
    """
    shown = [repr(item.item() if isinstance(item, np.generic) else item) for item in items]
    rest = f" and {len(shown) - most} more" if len(shown) > most else ""
    return ", ".join(shown[:most]) + rest if shown else "none"


def cause(error: BaseException) -> str:
    """The first line of an error's message, or its name.

    >>> cause(ValueError("the draws are not finite")), cause(ZeroDivisionError())
    ('the draws are not finite', 'ZeroDivisionError')
    """
    return str(error).strip().partition("\n")[0] or type(error).__name__


def count_rows(count: int) -> str:
    """A number of rows as text: ``1 row``, ``2 rows``."""
    return f"{count} row" if count == 1 else f"{count} rows"
