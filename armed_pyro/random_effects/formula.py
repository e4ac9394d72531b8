"""Random-effect terms read from lme4's syntax."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from itertools import accumulate

from armed_pyro.data.cluster_columns import without_calls
from armed_pyro.data.formula import without_factor
from armed_pyro.random_effects.terms import FilterScaleBias, RandomEffects, Term

__all__ = ["parse_terms"]

_TERM = re.compile(r"^\s*\(?([^()|]+?)(\|\|?)([^()|]+?)\)?\s*$")
_GRAMMAR = "write it as '(1 + x | site)', '(1 + x || site)', '(0 + x | site)' or '(1 | a/b)'"
# First of Unicode's private characters, which stand for names in backticks.
_FIRST = 0xE000


def parse_terms(terms: str | Term | Iterable[str | Term]) -> tuple[Term, ...]:
    """Random-effect terms from lme4's syntax.

    ``(1 + x | g)`` is a correlated intercept and slope; the intercept is implied, and ``0 +``
    removes it. ``(1 + x || g)`` makes them independent. ``(1 | a/b)`` is nested, short for
    ``(1 | a)`` and ``(1 | a:b)``. Names with other characters than letters are in backticks;
    ``factor(x)`` is x, which the data must hold as categories: ``categorical=["x"]`` in
    `ClusteredData.from_frame`; the command line does that by itself. A slope may be on
    ``within(x | g)``, if that is a feature. One string may hold several terms, joined by ``+``.

    Raises
    ------
    ValueError
        If a string does not follow the syntax, or two terms of a factor have the same column.

    Examples
    --------
    >>> [str(term) for term in parse_terms("(1 + age | site) + (1 | school/class)")]
    ['(1 + age | site)', '(1 | school)', '(1 | school:class)']
    """
    if terms is None:
        raise TypeError("random effects are text such as '(1 | site)' or terms; () has none")
    parsed: list[Term] = []
    for term in [terms] if isinstance(terms, str | Term) else terms:
        if not isinstance(term, str | Term):
            raise TypeError(f"a random-effect term is a string or a Term, not {term!r}")
        parsed += _parse(term) if isinstance(term, str) else [term]
    _check_overlap(parsed)
    return tuple(parsed)


def _parse(text: str) -> list[Term]:
    """Terms of a string, which may join several in parentheses."""
    names: list[str] = []

    def stand_in(match: re.Match[str]) -> str:
        names.append(match[1])
        return chr(_FIRST + len(names) - 1)

    # Each name in backticks is one private character while the string is read.
    bare, categorical = without_factor(without_calls(text)[0])
    plain = re.sub("`([^`]+)`", stand_in, bare)
    try:
        terms = _parse_terms(plain)
    except ValueError as error:
        message = str(error)
        for place, name in enumerate(names):
            for shown in (chr(_FIRST + place), f"\\u{_FIRST + place:04x}"):
                message = message.replace(shown, f"`{name}`")
        raise ValueError(message) from None

    def restored(name: str) -> str:
        return "".join(names[ord(c) - _FIRST] if ord(c) >= _FIRST else c for c in name)

    whole = list[Term]()
    for term in terms:
        slopes = tuple(map(restored, term.slopes))
        factors = tuple(name for name in slopes if name in categorical)
        factor = restored(term.factor)
        whole.append(replace(term, factor=factor, slopes=slopes, categorical=factors))
    return whole


def _parse_terms(text: str) -> list[RandomEffects]:
    if not text.strip().startswith("("):
        return _parse_term(text)
    pieces = re.findall(r"\([^()]*\)", text)
    if not pieces or re.sub(r"\([^()]*\)", "", text).replace("+", "").strip():
        raise ValueError(f"cannot read the random-effect term {text!r}: {_GRAMMAR}")
    return [term for piece in pieces for term in _parse_term(piece)]


def _parse_term(text: str) -> list[RandomEffects]:
    match = _TERM.match(text)
    if match is None:
        raise ValueError(f"cannot read the random-effect term {text!r}: {_GRAMMAR}")
    left, bar, right = match.groups()
    pieces = [piece.strip() for piece in re.sub(r"-\s*1\b", "+ 0", left).split("+")]
    pieces = [piece for piece in pieces if piece]
    bad = [piece for piece in pieces if re.search(r"[*/^(]", piece)]
    if bad or not pieces:
        raise ValueError(
            f"cannot read {bad[0] if bad else left!r} in the term {text!r}: slopes are names of "
            f"features joined by '+'; {_GRAMMAR}"
        )
    slopes = tuple(dict.fromkeys(piece for piece in pieces if piece not in ("0", "1")))
    intercept = "0" not in pieces
    path = [name.strip() for name in right.split("/")]
    if not all(path) or re.search(r"[*^+]", right):
        raise ValueError(
            f"cannot read the grouping factor {right!r} in the term {text!r}: {_GRAMMAR}"
        )
    factors = [re.sub(r"\s*:\s*", ":", factor) for factor in accumulate(path, "{}:{}".format)]
    return [RandomEffects(factor, slopes, intercept, bar == "|") for factor in factors]


def _check_overlap(terms: list[Term]) -> None:
    taken: dict[tuple[str, str], Term] = {}
    for term in terms:
        # A layer's path may be "1", which is also the name of the intercept.
        kind = "filters of" if isinstance(term, FilterScaleBias) else "layer"
        names = tuple(f"{kind} {path}" for path in term.layers())
        if isinstance(term, RandomEffects):
            names = (*(("1",) if term.intercept else ()), *term.slopes)
        for name in names:
            other = taken.setdefault((term.factor, name), term)
            if other is not term:
                raise ValueError(
                    f"{other} and {term} both give {term.factor!r} the column {name!r}: "
                    "write '0 +' in one of them, or join them"
                )
