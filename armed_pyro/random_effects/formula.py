"""lme4's syntax for random effects."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import accumulate

from armed_pyro.random_effects.terms import FilterScaleBias, RandomEffects, Term

__all__ = ["parse_terms"]

_TERM = re.compile(r"^\s*\(?([^()|]+?)(\|\|?)([^()|]+?)\)?\s*$")
_GRAMMAR = "write it as '(1 + x | site)', '(1 + x || site)', '(0 + x | site)' or '(1 | a/b)'"


def parse_terms(terms: str | Term | Iterable[str | Term]) -> tuple[Term, ...]:
    """Random-effect terms from lme4's syntax.

    ``(1 + x | g)`` is a correlated intercept and slope; the intercept is implied, and ``0 +``
    removes it. ``(1 + x || g)`` makes them independent. ``(1 | a/b)`` is nested, short for
    ``(1 | a)`` and ``(1 | a:b)``. One string may hold several terms, joined by ``+``.

    Raises
    ------
    ValueError
        If a string does not follow the syntax, or two terms of a factor have the same column.

    Examples
    --------
    >>> [str(term) for term in parse_terms("(1 + age | site) + (1 | school/class)")]
    ['(1 + age | site)', '(1 | school)', '(1 | school:class)']
    """
    parsed: list[Term] = []
    for term in [terms] if isinstance(terms, str | Term) else terms:
        if isinstance(term, Term):
            parsed.append(term)
        elif isinstance(term, str):
            pieces = re.findall(r"\([^()]*\)", term) if term.strip().startswith("(") else [term]
            rest = re.sub(r"\([^()]*\)", "", term).replace("+", "").strip()
            if not pieces or (rest and term.strip().startswith("(")):
                raise ValueError(f"cannot read the random-effect term {term!r}: {_GRAMMAR}")
            for piece in pieces:
                parsed += _parse(piece)
        else:
            raise TypeError(f"a random-effect term is a string or a Term, not {term!r}")
    _check_overlap(parsed)
    return tuple(parsed)


def _parse(text: str) -> list[Term]:
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
    if not all(path):
        raise ValueError(f"a grouping factor is missing in the term {text!r}: {_GRAMMAR}")
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
