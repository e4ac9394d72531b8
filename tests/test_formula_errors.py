"""Formulas that cannot be read: clear errors, and no execution, whatever the text."""

import random
import sys
import time

import numpy as np
import pandas as pd
import pytest

from armed_pyro import ClusteredData
from armed_pyro.data.formula import parse_features
from armed_pyro.data.formula_syntax import parse, text_of
from armed_pyro.random_effects.formula import parse_terms
from armed_pyro.random_effects.model_formula import ModelFormula

BAD = {
    "": "names nothing",
    "x +": "ends too early",
    "+": "ends too early",
    "* x": "'\\*' is out of place",
    "x z": "an operator is missing before 'z'",
    "x (z)": "calls 'x', which is not a function",
    "(x": "'\\)' is missing at the end",
    "x)": "'\\)' is out of place",
    "x, z": "',' is out of place",
    "`x": "not closed",
    "'x": "not closed",
    "x ? z": "'\\?' has no meaning",
    "x; z": "';' has no meaning",
    "{x}": "'{' has no meaning",
    "x^2": r"not its square. Write I\(x\*\*2\), or poly\(x, 2\)",
    "x:x": "not its square",
    "log(x)^2": r"Write I\(log\(x\)\*\*2\)",
    "x^z": "exponent must be a whole number",
    "(x + z)^1.5": "exponent must be a whole number",
    "(x + z)^-1": "exponent must be a whole number",
    "2": "only 1 and 0",
    "2*x": "scales a column by a number",
    "'x'": "which is no column",
    "x | g": "belong to the model",
    "(1 | g)": "belong to the model",
    "y ~ x": "Give only what stands right of '~'",
    "np.log(x)": r"Write log\(...\)",
    "foo(x)": "The functions are log, log2",
    "log()": "takes one column",
    "log(x, 2)": "takes one column",
    "log(2)": "names no column",
    "log('x')": "needs a column",
    "log(poly(x, 2))": "several columns",
    "log(C(f))": "cannot stand inside",
    "I(x:z)": "only the arithmetic",
    "I(x | z)": "only the arithmetic",
    "poly(x)^2": "not its square",
    "poly(x, 0)": "degree must be a whole number",
    "poly(x, z)": "degree must be a whole number",
    "poly(x, z=2)": "expected poly",
    "poly(x, 2, raw=1)": "raw must be True or False",
    "bs(x)": "either df or knots",
    "bs(x, df=4, knots=[5])": "either df or knots",
    "bs(x, df=2)": "at least the degree",
    "bs(x, knots=[z])": "knots must be numbers",
    "ns(x, df=1000)": "whole number from 1 to 100",
    "C()": "expected C",
    "C(log(x))": "expected C",
    "C(f, Foo)": "names the contrasts 'Foo'",
    "C(f, Sum(2), 3)": "expected C",
    "C(f, Treatment(x + 1))": "in the place of a level",
    "C(f, ref='a') + C(f, ref='b')": "in two ways",
    "factor(x, 2)": "expected factor",
    "offset(x):z": "in a product",
    "x - offset(z)": "no sum of offset",
    "within(x)": "takes a single column",
    "between(x + z | g)": "takes a single column",
    "log(x) + `log(x)`": "would have the same name",
    "+".join(["("] * 3000): "nested too deeply",
    "(" * 500 + "x" + ")" * 500: "nested too deeply",
    ":".join(f"x{n}" for n in range(300)): "nested too deeply",
    "(" + "+".join(f"x{n}" for n in range(40)) + ")^20": "more than 5000 terms",
}


@pytest.mark.parametrize("formula", BAD)
def test_bad_formulas(formula):
    with pytest.raises(ValueError, match=BAD[formula]):
        parse_features(formula)


def test_there_are_forty():
    assert len(BAD) >= 40


def make_table() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    columns = {"y": rng.normal(size=20), "x": rng.normal(size=20), "g": np.arange(20) % 4}
    return pd.DataFrame(
        {**columns, "f": list("ab") * 10, "c": 1.0, "i": [0, 1] * 10, "log(x)": 2.0}
    )


@pytest.mark.parametrize(
    ("formula", "message"),
    {
        "log(f)": "holds (object|str|string), such as 'a'",
        "log(q)": "no column 'q'",
        "I(x/0)": "not a finite number in 20 rows",
        "scale(c)": "constant in the training rows",
        "poly(i, 2)": "2 distinct values, but at least 3",
        "ns(i, df=4)": "too few distinct values",
        "bs(x, knots=[99])": "not inside the range",
        "C(f, ref='z')": "level 'z', which the training rows do not have. There are: 'a', 'b'",
        "C(f, levels=['a'])": "leaves out 'b'",
        "C(f, levels=['a', 'a'])": "every level once",
        "log(x)": r"a column 'log\(x\)', which is also a call",
        "log(y)": "The outcome 'y' is also listed as a feature",
        "offset(y) + i": "The outcome 'y' is also listed as a feature",
    }.items(),
)
def test_formulas_that_do_not_suit_the_table(formula, message):
    with pytest.raises(ValueError, match=message):
        ClusteredData.from_frame(make_table(), outcome="y", clusters=["g"], features=formula)


@pytest.mark.parametrize(
    ("formula", "message"),
    {
        "x + (1 | g)": "has no outcome",
        "~ x": "an outcome is missing before",
        "y ~ x ~ z": "several '~'",
        "log(y) ~ x": "Compute the outcome first",
        "y + z ~ x": "expected the name of a column",
        "y ~ x + (1 | g": "is missing at the end",
        "y ~ x - (1 | g)": "cannot be subtracted",
        "y ~ x * (1 | g)": "belong to the model",
        "y | foo(n) ~ x": "expected trials",
    }.items(),
)
def test_bad_formulas_of_models(formula, message):
    with pytest.raises(ValueError, match=message):
        parse_features(ModelFormula.read(formula).features)


def test_levels_have_a_single_order():
    table, terms = make_table(), "C(f, ref='b')"
    options = {"outcome": "y", "clusters": ["g"], "features": "C(f, ref='a') + i"}
    with pytest.raises(ValueError, match="slopes orders the levels of 'f' in two ways"):
        ClusteredData.from_frame(table, slopes=terms, **options)
    assert parse_features("x + C(f, ref='a') - factor(f)").orders == ()


def test_terms_without_sense():
    for text, message in {
        "(x^2 | g)": "not its square",
        "(offset(x) | g)": "has an offset",
        "(1 | a + b)": "grouping factor",
        "(foo(x) | g)": "not a function of formulas",
        "(. | g)": "stands for all other columns",
    }.items():
        with pytest.raises(ValueError, match=message):
            parse_terms(text)


PIECES = [
    *("x", "z", "f", "`a b`", "g", ".", "0", "1", "2", "-1", "1e3", "'t'", "[", "]", "{", "\\"),
    *("+", "-", "*", "/", ":", "^", "**", "%in%", "~", "|", "||", "(", ")", ",", "=", "@", "\n"),
    *("log(", "poly(", "bs(", "C(", "I(", "offset(", "within(", "factor(", "scale(", "df=3", "\0"),
    *("__import__('os').system('true')", "open('trap', 'w')", "eval(", "lambda: 0", "é", "😀", "`"),
    *(
        "x.__class__",
        "Sum",
        "Treatment(",
        "knots=[1]",
        "np.exp(",
        "True",
        "ns(",
        "ref='a'",
        "f'{x}'",
    ),
]
SOUND = [
    "x + z * f",
    "y ~ x + poly( x , 2 ) * C( f , Sum ) + ( 1 + z | g )",
    "( 0 + log( x ) | g ) + ( 1 | a / b )",
    "0 + ( x + z + f ) ^ 2 - x : z + offset( log( z ) )",
    "within( x | g ) + between( x | g ) + bs( x , df = 4 )",
    "y | trials( n ) ~ I( x ** 2 - 3 ) + ( x || g )",
]


FORBIDDEN = {"exec", "compile", "import", "open", "os.system", "subprocess.Popen"}
watched: list[str] = []  # events while a text is read, noted if there is a first one


def hook(event: str, arguments: tuple[object, ...]) -> None:
    if watched and event in FORBIDDEN:
        watched.append(f"{event} {arguments}"[:200])


sys.addaudithook(hook)


def test_the_hook_sees_code_that_is_run():
    watched.append("start")
    try:
        eval("1 + 1")
        assert len(watched) > 1
    finally:
        watched.clear()


def fuzz(count: int) -> int:
    """Number of random texts that could be read; anything else than ValueError fails."""
    made, read, slowest, longest = random.Random(0), 0, 0.0, 0
    watched.append("start")
    try:
        for _ in range(count):
            pieces = made.choices(PIECES, k=made.randint(1, 9))
            if made.random() < 0.7:  # a sound formula with a change or two
                pieces = SOUND[made.randrange(len(SOUND))].split()
                for _ in range(made.randint(0, 2)):
                    pieces.insert(made.randint(0, len(pieces)), made.choice(PIECES))
            text = " ".join(pieces)
            for reader in (parse_features, parse_terms, ModelFormula.read):
                start = time.perf_counter()
                try:
                    reader(text)
                    read += 1
                except ValueError as error:
                    longest = max(longest, len(str(error)))
                slowest = max(slowest, time.perf_counter() - start)
        seen = watched[1:]
    finally:
        watched.clear()
    assert seen == []
    assert slowest < 2
    assert longest < 2000
    return read


def test_random_texts_are_read_or_refused():
    assert fuzz(300) > 30


@pytest.mark.slow
def test_many_random_texts_are_read_or_refused():
    assert fuzz(5000) > 500


def test_random_formulas_are_encoded_or_refused():
    """Grammatical formulas, through to the design: only ValueError, and texts that read as one."""
    made = random.Random(1)
    table = make_table().rename(columns={"log(x)": "z"}).assign(z=lambda t: t["x"] ** 2 + 1)
    atoms = [
        "x",
        "z",
        "f",
        "i",
        "log(z)",
        "poly(x, 2)",
        "C(f, Sum)",
        "scale(x)",
        "I(x*z)",
        "ns(x, 3)",
    ]
    encoded, messages = 0, list[str]()
    for _ in range(60):
        text = made.choice(atoms)
        for _ in range(made.randint(0, 3)):
            text = f"{text} {made.choice(['+', ':', '*', '/', '-'])} {made.choice(atoms)}"
        tree = parse(text)
        assert text_of(parse(text_of(tree))) == text_of(tree)
        try:
            ClusteredData.from_frame(table, outcome="y", clusters=["g"], features=text)
            encoded += 1
        except ValueError as error:
            messages.append(str(error))
    assert encoded > 30
    assert not [message for message in messages if "formulaic" in message or "axis" in message]
