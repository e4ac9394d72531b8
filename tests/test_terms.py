"""Random-effect terms: lme4's syntax, and the columns they stand for."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from armed_pyro import ClusteredData, RandomEffects, Slopes
from armed_pyro.families.gaussian import Gaussian
from armed_pyro.networks.taps import tapped
from armed_pyro.program.data_spec import Facts
from armed_pyro.random_effects.formula import parse_terms


@pytest.fixture(scope="module")
def facts():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "y": rng.normal(size=60),
            "age": rng.normal(50, 10, 60),
            "dose": rng.normal(-2, 0.5, 60),
            "sex": rng.choice(["f", "m", "x"], 60),
            "site": rng.choice(list("abcd"), 60),
        }
    )
    data = ClusteredData.from_frame(frame, outcome="y", clusters=["site"])
    return Facts.of(data, Gaussian(), ["site"])


def layout(facts, term, widths=None):
    (parsed,) = parse_terms(term)
    return parsed.block(facts.design_scaling, widths or {})


SYNTAX = {
    "(1 | site)": [RandomEffects("site")],
    "1 | site": [RandomEffects("site")],
    "  ( 1|site )  ": [RandomEffects("site")],
    "(1 + x | site)": [RandomEffects("site", ("x",))],
    "(x | g)": [RandomEffects("g", ("x",))],
    "(x + 1 | g)": [RandomEffects("g", ("x",))],
    "(x + z + x | g)": [RandomEffects("g", ("x", "z"))],
    "(1 + x || site)": [RandomEffects("site", ("x",), correlated=False)],
    "(0 + x | g)": [RandomEffects("g", ("x",), intercept=False)],
    "(x - 1 | g)": [RandomEffects("g", ("x",), intercept=False)],
    "(-1 + x + z || g)": [RandomEffects("g", ("x", "z"), intercept=False, correlated=False)],
    "(1 + sex[T.m] | g)": [RandomEffects("g", ("sex[T.m]",))],
    "(1 + x:z | g)": [RandomEffects("g", ("x:z",))],
    "(1 | a/b)": [RandomEffects("a"), RandomEffects("a:b")],
    "(1 + x || a / b/c)": [
        RandomEffects(name, ("x",), correlated=False) for name in ("a", "a:b", "a:b:c")
    ],
    "(1 | a : b)": [RandomEffects("a:b")],
    "(1 | site<b>)": [RandomEffects("site<b>")],
    "(1 + x | site-id/2nd)": [
        RandomEffects("site-id", ("x",)),
        RandomEffects("site-id:2nd", ("x",)),
    ],
    "(1 | my site)": [RandomEffects("my site")],
    "(1 + 2nd + a#b | g)": [RandomEffects("g", ("2nd", "a#b"))],
    "(1 | site) + (1 | batch)": [RandomEffects("site"), RandomEffects("batch")],
    "(1 | g) + (0 + x | g)": [
        RandomEffects("g"),
        RandomEffects("g", ("x",), intercept=False),
    ],
}


@pytest.mark.parametrize("text", SYNTAX)
def test_syntax(text):
    assert parse_terms(text) == tuple(SYNTAX[text])


@pytest.mark.parametrize("text", SYNTAX)
def test_a_term_prints_as_it_can_be_read(text):
    for term in SYNTAX[text]:
        assert parse_terms(str(term)) == (term,)


def test_strings_and_terms_mix():
    slopes = Slopes("site", on="3")
    terms = parse_terms(["(1 | site)", slopes, RandomEffects("batch")])
    assert terms == (RandomEffects("site"), slopes, RandomEffects("batch"))
    assert parse_terms(slopes) == (slopes,)
    assert parse_terms(()) == ()
    assert str(slopes) == "Slopes('site', on='3')"
    assert str(Slopes("site", on="3", correlated=True)).endswith("correlated=True)")


@pytest.mark.parametrize(
    "text",
    [
        *("", "()", "x", "(x)", "(1 | )", "( | g)", "(1 | g", "(1 ||| g)", "(1 | g | h)"),
        *("(1 | a*b)", "(1 | a/)", "(1 | g) + x", "(1 | g) - (x | g)"),
    ],
)
def test_bad_syntax_shows_the_grammar(text):
    with pytest.raises(ValueError, match=r"[Ww]rite it as '\(1 \+ x \| site\)'"):
        parse_terms(text)


@pytest.mark.parametrize("text", ["(0 | g)", "(1 - 1 | g)"])
def test_a_term_has_a_column(text):
    with pytest.raises(ValueError, match="neither an intercept nor a slope"):
        parse_terms(text)


def test_other_types_are_refused():
    with pytest.raises(TypeError, match="a string or a Term, not 3"):
        parse_terms([3])


@pytest.mark.parametrize(
    ("terms", "column"),
    [
        (["(1 + x | g)", "(1 | g)"], "1"),
        ("(1 + x | g) + (0 + x | g)", "x"),
        ([Slopes("g", on="3"), Slopes("g", on="3", correlated=True)], "layer 3"),
        ("(1 | a/b) + (1 | a)", "1"),
    ],
)
def test_duplicates(terms, column):
    with pytest.raises(ValueError, match=rf"both give .* the column '{column}'.*write '0 \+'"):
        parse_terms(terms)


def test_a_layer_called_1_is_no_intercept():
    assert len(parse_terms(["(1 | g)", Slopes("g", on="1")])) == 2


def test_the_same_columns_in_two_factors_are_no_duplicates():
    assert len(parse_terms("(1 + x | a) + (1 + x | b)")) == 2


# ------------------------------------------------------------------------------------- columns


def test_columns_of_a_correlated_term_are_centred(facts):
    block = layout(facts, "(1 + age + dose | site)")
    assert block.names == ("Intercept", "age", "dose")
    x = torch.randn(5, 4, dtype=torch.float64)
    expected = torch.cat([torch.ones(5, 1), x[:, :2]], 1)
    torch.testing.assert_close(block.columns(x, {}), expected)


def test_a_slope_without_intercept_vanishes_at_zero(facts):
    block = layout(facts, "(0 + age | site)")
    at_zero = facts.scaling.standardise(torch.zeros(1, 4))
    torch.testing.assert_close(
        block.columns(at_zero, {})[:, -1], torch.zeros(1, dtype=torch.float64)
    )


@pytest.mark.parametrize(
    "term",
    [
        "(1 | site)",
        "(1 + age | site)",
        "(1 + age + sex + dose | site)",
        "(1 + age + dose || site)",
        "(0 + dose | site)",
        "(0 + age + dose | site)",
    ],
)
def test_effects_go_back_to_original_units(facts, term):
    """phi_internal(x)' u == phi_original(x)' (M u) for every row and every u."""
    block, rng = layout(facts, term), torch.Generator().manual_seed(0)
    raw = torch.randn(20, 4, dtype=torch.float64, generator=rng) * 30 + 7
    effects = torch.randn(len(block.names), dtype=torch.float64, generator=rng)
    internal = block.columns(facts.scaling.standardise(raw), {}) @ effects
    place = {name: raw[:, i] for i, name in enumerate(facts.feature_names)}
    original = torch.stack([place.get(name, torch.ones(20).double()) for name in block.names], 1)
    torch.testing.assert_close(internal, original @ (block.to_original @ effects))


def test_a_categorical_slope_brings_its_contrasts(facts):
    assert layout(facts, "(1 + sex | site)").names == ("Intercept", "sex[T.m]", "sex[T.x]")
    assert layout(facts, "(1 + sex[T.x] | site)").names == ("Intercept", "sex[T.x]")
    assert layout(facts, "(sex + sex[T.x] | site)").names == ("Intercept", "sex[T.m]", "sex[T.x]")


def test_contrasts_are_neither_centred_nor_scaled(facts):
    block = layout(facts, "(1 + sex | site)")
    assert torch.equal(block.to_original, torch.eye(3, dtype=torch.float64))


def test_unknown_slope_names_the_nearest(facts):
    with pytest.raises(ValueError, match=r"slope on 'aeg'.*nearest: 'age'.*age, dose, sex\[T\.m\]"):
        layout(facts, "(1 + aeg | site)")
    with pytest.raises(ValueError, match=r"not among the features; the features"):
        layout(facts, "(1 + qqqq | site)")


@pytest.mark.parametrize("correlated", [False, True])
def test_slopes_on_a_layer_are_its_activations(facts, correlated):
    net, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1)), torch.randn(5, 4)
    term = Slopes("site", on="1", correlated=correlated)
    assert term.layers() == ("1",)
    block = term.block(facts.scaling, {"1": 3})
    assert block.names == ("1[0]", "1[1]", "1[2]")
    assert block.covariance.diagonal is not correlated
    with tapped(net, term.layers()) as activations:
        net(x)
    torch.testing.assert_close(block.columns(x, activations), torch.relu(net[0](x)))


def test_slopes_on_feature_maps_are_pooled(facts):
    block = Slopes("site", on="0").block(facts.scaling, {"0": 2})
    maps = torch.randn(5, 2, 3, 3)
    torch.testing.assert_close(block.columns(torch.zeros(5), {"0": maps}), maps.mean((2, 3)))


def test_one_column_has_no_correlations(facts):
    assert layout(facts, "(1 | site)").covariance.diagonal
    assert layout(facts, "(0 + age | site)").covariance.diagonal
    assert not layout(facts, "(age | site)").covariance.diagonal
    assert layout(facts, "(age || site)").covariance.diagonal
