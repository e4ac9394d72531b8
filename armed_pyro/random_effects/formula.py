"""Random-effect terms read from lme4's syntax."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from armed_pyro.data.categories import contrast_of
from armed_pyro.data.cluster_columns import factor_path
from armed_pyro.data.formula import Formula, features_of
from armed_pyro.data.formula_syntax import (
    Call,
    Name,
    Node,
    Number,
    Operation,
    Sum,
    operands,
    parse,
    quoted_name,
    text_of,
)
from armed_pyro.random_effects.process_kernels import KERNELS
from armed_pyro.random_effects.smooth import Smooth, is_smooth, without_smooths
from armed_pyro.random_effects.terms import FilterScaleBias, Process, RandomEffects, Term

__all__ = ["fixed_and_random", "parse_terms", "slopes_formula", "terms_of", "with_all_levels"]

# What stands right of a bar; and words, with quotation marks or an encoded level.
_RIGHT = re.compile(r"(?<=\|)[^()|`]+(?=\)|$)")
_WORD = re.compile(r"`[^`]*`|\"[^\"]*\"|'[^']*'|[^\s+*/:^|()~,=`\"'\[\]-]+(?:\[[^\]]*\])?")
_GRAMMAR = "write it as '(1 + x | site)', '(1 + x || site)', '(0 + x | site)' or '(1 | a/b)'"


def parse_terms(terms: str | Term | Iterable[str | Term]) -> tuple[Term, ...]:
    """Random-effect terms from lme4's syntax.

    ``(1 + x | g)`` is a correlated intercept and slope; the intercept is implied, and ``0 +``
    removes it. ``(1 + x || g)`` makes them independent. ``(1 | a/b)`` is nested, short for
    ``(1 | a)`` and ``(1 | a:b)``. Terms of one factor with the same label, ``(1 |c| g)`` and
    ``(0 + x |c| g)``, are correlated, also those of parameters. Names with other characters than
    letters are in backticks.
    Left of the bar stands a formula of features, with products and functions, such as
    ``(x * z + poly(t, 2) | g)``. ``s(x)`` is a penalised spline, `Smooth`. The data need the
    columns of slopes and curves: `slopes_formula` names them for `ClusteredData.from_frame`;
    `armed_pyro.model` and the command line do that by themselves. One string may hold several
    terms, joined by ``+``. ``ou(time | g)``, ``ar1(time | g)`` and ``rw(time | g)`` are processes
    in time, one for every cluster of g; see `Process`.

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
        if isinstance(term, str):
            parsed += [part for node in _random(_tree(term), term) for part in terms_of(node)]
        else:
            parsed.append(term)
    _check_overlap(parsed)
    return tuple(parsed)


def slopes_formula(terms: str | Iterable[str], columns: Collection[str]) -> str:
    """The formula of all columns with slopes, for ``ClusteredData.from_frame(..., slopes=...)``.

    It is empty if there are only intercepts. Names that are no columns of the table are left out:
    they may be those of encoded features, such as ``sex[T.male]``.

    >>> slopes_formula(["(1 + age | site)", "(0 + log(dose) | batch)"], ["age", "dose"])
    'age + log(dose)'
    """
    listed = [terms] if isinstance(terms, str) else terms
    nodes = [node for text in listed for node in _random(_tree(text), text)]
    texts = [text for node in nodes for text in _slope_texts(node, columns)]
    return " + ".join(dict.fromkeys(texts))


def _slope_texts(node: Operation | Call, columns: Collection[str]) -> Sequence[str]:
    """The columns that one random term reads, as they are written."""
    return Smooth(text_of(node)).slopes if is_smooth(node) else _slopes_of(node).texts(columns)


def fixed_and_random(tree: Node) -> tuple[Node, list[Operation | Call]]:
    """The parts of a formula's right side: features, and random terms.

    Smooth terms are random, and leave their straight line to the features.

    >>> fixed, random = fixed_and_random(parse("z + s(x) + (1 | g)"))
    >>> text_of(fixed), [text_of(term) for term in random]
    ('z + x', ['1 | g', 's(x)'])
    """
    parts, smooths = without_smooths(_signed(tree))
    bars = [part for part, _ in parts if _is_bar(part)]
    if wrong := [part for part, sign in parts if _is_bar(part) and sign < 0]:
        raise ValueError(f"the random-effect term ({text_of(wrong[0])}) cannot be subtracted")
    fixed = [(part, sign) for part, sign in parts if not _is_bar(part)] or [(Number(1.0), 1)]
    nodes, signs = zip(*fixed, strict=True)
    return Sum(nodes, signs), [*(b for b in bars if isinstance(b, Operation | Call)), *smooths]


def _signed(node: Node, sign: int = 1) -> list[tuple[Node, int]]:
    """The parts of a sum, and of sums in it, with their signs."""
    if not isinstance(node, Sum):
        return [(node, sign)]
    pairs = zip(node.parts, node.signs, strict=True)
    return [pair for part, part_sign in pairs for pair in _signed(part, sign * part_sign)]


def _is_bar(node: Node) -> bool:
    """Whether a node is ``slopes | g``, or a process such as ``ou(time | g)``."""
    if isinstance(node, Call):
        return node.function in KERNELS
    return isinstance(node, Operation) and node.symbol in ("|", "||")


def _tree(text: str) -> Node:
    what, text = "the random-effect term ", _RIGHT.sub(_quoted_factors, text)
    try:
        return parse(text, what)
    except ValueError as error:
        lenient = _WORD.sub(_quoted_word, text)
        if lenient != text:
            return _tree(lenient)
        raise ValueError(f"{error} {_GRAMMAR[0].upper()}{_GRAMMAR[1:]}.") from None


def _quoted_factors(match: re.Match[str]) -> str:
    """The names right of a bar, in backticks if they have odd characters, such as ``site-id``."""
    pieces = re.split(r"([/:])", match[0])
    odd = [piece.strip() and not re.search(r"[+*^/:]", piece) for piece in pieces]
    names = [quoted_name(p.strip()) if o else p for p, o in zip(pieces, odd, strict=True)]
    return " " + "".join(names)


def _quoted_word(match: re.Match[str]) -> str:
    """A word in backticks if it is neither a name nor a number."""
    word = match[0]
    known = word[0] in "`\"'" or re.fullmatch(r"[\d.]+([eE]\d+)?|%in%", word)
    return word if known or "[" in word else quoted_name(word)


def _random(tree: Node, text: str) -> list[Operation | Call]:
    """The terms of a text, which may join several by ``+``."""
    parts = _signed(tree)
    terms = [part for part, sign in parts if isinstance(part, Operation | Call) and sign > 0]
    terms = [term for term in terms if _is_bar(term) or is_smooth(term)]
    if not terms or len(terms) < len(parts):
        raise ValueError(f"cannot read the random-effect term {text!r}: {_GRAMMAR}")
    return terms


def terms_of(bar: Operation | Call) -> Sequence[Term]:
    """The terms of ``x | a/b``, one for each grouping factor; or the smooth term ``s(x)``."""
    text = text_of(bar)
    if isinstance(bar, Call):
        return [Smooth(text)] if is_smooth(bar) else _processes(bar)
    bar, group = _unlabelled(bar)
    if any(_is_bar(side) for side in operands(bar)):
        raise ValueError(f"cannot read the random-effect term {text!r}: {_GRAMMAR}")
    factors = factor_path(bar.right)
    if factors is None:
        raise ValueError(
            f"cannot read the grouping factor {text_of(bar.right)!r} in the term {text!r}: "
            f"{_GRAMMAR}"
        )
    formula = _slopes_of(bar)
    slopes = tuple(dict.fromkeys(":".join(term) for term in formula.terms))
    categorical = tuple(name for name in slopes if name in formula.categorical)
    correlated = bar.symbol == "|"
    return [
        RandomEffects(
            factor, slopes, formula.intercept, correlated, categorical=categorical, group=group
        )
        for factor in factors
    ]


def _processes(call: Call) -> list[Process]:
    """The processes of ``ou(time | a/b)``, one for each grouping factor."""
    inside = call.arguments[0] if len(call.arguments) == 1 and not call.options else None
    if isinstance(inside, Operation) and inside.symbol == "|" and isinstance(inside.left, Name):
        factors = factor_path(inside.right)
        if factors is not None:
            return [Process(call.function, inside.left.name, factor) for factor in factors]
    raise ValueError(
        f"cannot read the process {text_of(call)!r}: write the column of times and the grouping "
        f"factor as '{call.function}(time | id)'"
    )


def _unlabelled(bar: Operation) -> tuple[Operation, str]:
    """The term without its label, and the label: ``(x | g)`` and ``c`` of ``(x |c| g)``."""
    left = bar.left
    if bar.symbol != "|" or not isinstance(left, Operation) or left.symbol != "|":
        return bar, ""
    if not isinstance(left.right, Name):
        return bar, ""
    return Operation("|", left.left, bar.right), left.right.name


def _slopes_of(bar: Operation | Call) -> Formula:
    """The formula left of a term's bar; that of no slope for a process."""
    if isinstance(bar, Call):
        return features_of(Number(1.0), f"the process {text_of(bar)!r}")
    what, (bar, _) = f"the random-effect term {text_of(bar)!r}", _unlabelled(bar)
    formula = features_of(bar.left, what)
    if formula.offset is not None:
        raise ValueError(f"{what} has an offset(), which has no effects.")
    if any(is_smooth(parse(call)) for call in formula.calls):
        raise ValueError(
            f"{what} has s(), a smooth term, which stands in a sum of terms: y ~ s(x) + (1 | g). "
            "Write ns(x, df=4) for curves that vary by cluster."
        )
    return with_all_levels(formula)


def with_all_levels(formula: Formula) -> Formula:
    """Without an intercept the first factor has an effect for every level, whatever its contrasts.

    >>> with_all_levels(features_of(parse("0 + C(x, Sum)"), "term")).terms
    (('x',),)
    """
    if formula.intercept:
        return formula
    for place, term in enumerate(formula.terms):
        choice = contrast_of(term[0]) if len(term) == 1 else None
        if choice is not None:
            terms = (*formula.terms[:place], (choice.column,), *formula.terms[place + 1 :])
            return replace(formula, terms=terms)
        if len(term) == 1 and term[0] in formula.categorical:
            return formula
    return formula


def _check_overlap(terms: list[Term]) -> None:
    taken: dict[tuple[str, str], Term] = {}
    for term in terms:
        # A layer's path may be "1", which is also the name of the intercept.
        kind = "filters of" if isinstance(term, FilterScaleBias) else "layer"
        names = tuple(f"{kind} {path}" for path in term.layers())
        if isinstance(term, Process):
            names = ("1",)
        if isinstance(term, RandomEffects):
            parameter = f"{term.parameter} ~ " if term.parameter else ""
            names = (*(("1",) if term.intercept else ()), *term.slopes)
            names = tuple(parameter + name for name in names)
        for name in names:
            other = taken.setdefault((term.factor, name), term)
            if other is not term:
                raise ValueError(
                    f"{other} and {term} both give {term.factor!r} the column {name!r}: "
                    "write '0 +' in one of them, or join them"
                )
