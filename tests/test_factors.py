"""Factors: covariance of the random effects, its sites, and the way back to original units."""

from contextlib import nullcontext

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from pyro import poutine
from torch import nn

from armed_pyro import ClusteredData, HalfNormal, Known, MixedEffects, Priors, Slopes
from armed_pyro.distributions.small_matrices import lower_triangular, sheared_diagonal
from armed_pyro.rows.batch import Membership

F64 = torch.float64


def make_data(n=120, classes=0, seed=0):
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "age": rng.normal(50, 10, n),
            "dose": rng.normal(-2, 0.5, n),
            "sex": rng.choice(["f", "m", "x"], n),
            "site": rng.permutation(np.arange(n) % 6),
        }
    )
    frame["y"] = rng.permutation(np.arange(n) % classes).astype(str) if classes else 0.0
    if not classes:
        frame["y"] = rng.normal(100, 15, n)
    return ClusteredData.from_frame(frame, outcome="y", clusters=["site"])


def bind(random, classes=0, net=None, **settings):
    net = nn.Linear(4, classes or 1).double() if net is None else net
    family = "categorical" if classes else "gaussian"
    data = make_data(classes=classes)
    return MixedEffects(net, random, family, **settings).bind(data), data


def draw(factor, n=None, seed=0):
    """Latent sites of a factor, once or n times."""
    membership = Membership(torch.arange(6), torch.arange(6))
    draws = pyro.plate("draws", n, dim=-2) if n else nullcontext()
    torch.manual_seed(seed)
    with poutine.trace() as tracer, draws:
        factor(membership)
    sites = {k: v["value"] for k, v in tracer.trace.nodes.items() if v["type"] == "sample"}
    return {k: v for k, v in sites.items() if k.startswith("site_")}


TERMS = {
    "intercept": "(1 | site)",
    "correlated": "(1 + age | site)",
    "correlated, several": "(1 + age + sex + dose | site)",
    "independent": "(1 + age + dose || site)",
    "no intercept": "(0 + age + dose | site)",
    "two terms": ["(1 | site)", "(0 + age + dose | site)"],
    "two correlated terms": ["(1 + dose | site)", "(0 + age + sex | site)"],
}


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("name", TERMS)
def test_back_transformation_is_exact(name, classes):
    """spread * phi_std' u == phi_original' (M u), for every row, every column and every u.

    With it M D M' is exactly the covariance of the original effects.
    """
    model, data = bind(TERMS[name], classes)
    (factor,) = model.factors
    rows, columns = model.encode(data).all(), max(1, classes - 1)
    effects = torch.randn(6, len(factor.terms), dtype=F64)
    phi = factor.design(rows.x, {})
    membership = rows.memberships["site"]
    internal = model.data_facts().spread * factor.contribution(phi, membership, effects)

    place = dict(zip(data.feature_names, data.features.T, strict=True))
    place |= {f"sex[{level}]": place[f"sex[T.{level}]"] for level in "mx"}
    place["sex[f]"] = 1 - place["sex[m]"] - place["sex[x]"]
    bare = [term.rpartition("[")[0] if classes else term for term in factor.terms[::columns]]
    raw = torch.stack([place.get(term, torch.ones(len(rows), dtype=F64)) for term in bare], 1)
    back = (effects @ factor.to_original.T)[membership.position].unflatten(1, (-1, columns))
    original = torch.einsum("nq,nqp->np", raw, back)
    torch.testing.assert_close(internal, original)


def test_original_covariance_matches_a_hand_computation():
    """Var(intercept at x = 0) = spread^2 (s0^2 + (m s1 / c)^2 - 2 r s0 s1 m / c)."""
    model, data = bind("(1 + age | site)")
    (factor,) = model.factors
    s0, s1, r = 0.7, 0.4, -0.3
    latents = {
        "site_sd": torch.tensor([s0, s1], dtype=F64),
        "site_cor_cholesky": torch.tensor([[1, 0], [r, (1 - r**2) ** 0.5]], dtype=F64),
    }
    age, spread = data.features[:, 0], data.outcome.std()
    m, c = age.mean(), age.std()
    D = factor.to_original @ factor.covariance(latents) @ factor.to_original.T
    expected = spread**2 * (s0**2 + (m * s1 / c) ** 2 - 2 * r * s0 * s1 * m / c)
    torch.testing.assert_close(D[0, 0], expected)
    torch.testing.assert_close(D[1, 1], (spread * s1 / c) ** 2)
    torch.testing.assert_close(D[0, 1], spread**2 * (r * s0 * s1 - m * s1**2 / c) / c)


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("name", TERMS)
def test_scale_is_a_root_of_the_covariance(name, classes):
    model, _ = bind(TERMS[name], classes)
    (factor,) = model.factors
    sites = draw(factor)
    scale, D = factor.scale(sites), factor.covariance(sites)
    torch.testing.assert_close(D, torch.diag(scale**2) if factor.diagonal else scale @ scale.T)
    sd, cor = sites["site_sd"], sites.get("site_cor", torch.eye(len(factor.terms)).double())
    move = torch.eye(len(sd)).double() if factor.from_zero is None else factor.from_zero
    torch.testing.assert_close(D, move @ (sd[:, None] * cor * sd) @ move.T)
    torch.testing.assert_close(D.diagonal().sqrt(), factor.effect_sd(sites))
    if not factor.diagonal:
        torch.testing.assert_close(scale, scale.tril())
        assert (scale.diagonal() > 0).all()


@pytest.mark.parametrize("classes", [0, 3])
def test_a_prior_that_is_set_holds_at_zero(classes):
    """The sds of tables are those of the sites, for correlated and independent terms."""
    prior = Priors(sd=HalfNormal({"Intercept": 20.0}))
    for bar in ("|", "||"):
        model, _ = bind(f"(1 + age {bar} site)", classes, priors=prior)
        (factor,) = model.factors
        sites = draw(factor)
        D = factor.to_original @ factor.covariance(sites) @ factor.to_original.T
        torch.testing.assert_close(D.diagonal().sqrt(), sites["site_sd"] / factor.unit)
        lines = factor.describe_priors()
        assert lines[f"site_sd[{factor.terms[0]}]"] == "HalfNormal(20)"
        assert lines[f"site_sd[{factor.terms[-1]}]"].endswith("scaled to the data")


@pytest.mark.parametrize("size", [2, 3, 5])
def test_scales_far_from_zero_keep_their_digits_in_single_precision(size):
    """T diag(sd) is singular to rounding, its Cholesky factor is not."""
    row = torch.cat([torch.ones(1), torch.linspace(300, 500, size - 1)]).double()
    sd = torch.linspace(1, 2, size).double()
    sd[0] = 1e-3
    matrix = torch.eye(size).double()
    matrix[0] = row
    exact = lower_triangular(matrix * sd)
    torch.testing.assert_close(sheared_diagonal(row, sd), exact, rtol=1e-6, atol=0)
    single = sheared_diagonal(row.float(), sd.float())
    torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=0)


def test_independent_effects_are_independent_at_zero():
    """As in lme4, though effects are those at the features' means inside."""
    (factor,) = bind("(1 + age + dose || site)")[0].factors
    D = factor.to_original @ factor.covariance(draw(factor)) @ factor.to_original.T
    torch.testing.assert_close(D, torch.diag(D.diagonal()), atol=1e-8, rtol=0)


@pytest.mark.parametrize("name", TERMS)
def test_sites_and_shapes(name):
    model, _ = bind(TERMS[name])
    (factor,) = model.factors
    size, sites = len(factor.terms), draw(factor)
    assert sites["site_sd"].shape == (size,)
    assert sites["site_effect"].shape == (6, size)
    assert factor.effect_site == "site_effect"
    correlated = name in ("correlated", "correlated, several", "no intercept", "two terms")
    assert ("site_cor_cholesky" in sites) is correlated
    if "site_cor" in sites:
        assert sites["site_cor"].shape == (size, size)
    vectors = draw(factor, n=3)
    assert vectors["site_sd"].shape == (3, 1, size)
    assert vectors["site_effect"].shape == (3, 6, size)


def test_terms_are_uncorrelated_with_each_other():
    model, _ = bind(TERMS["two correlated terms"])
    (factor,) = model.factors
    sites = ("site_cor_cholesky_0", "site_cor_cholesky_1")
    assert factor.sites()[3:] == sites
    cor = draw(factor)["site_cor"]
    assert (cor[:2, 2:] == 0).all()
    assert (cor[:2, :2] != 0).all()
    assert (cor[2:, 2:] != 0).all()


def test_every_class_has_effects_and_correlations_of_its_own():
    model, _ = bind("(1 + age | site)", classes=3)
    (factor,) = model.factors
    assert factor.terms == ("Intercept[1]", "Intercept[2]", "age[1]", "age[2]")
    assert [group.places for group, _ in factor.groups] == [(0, 2), (1, 3)]
    cor = draw(factor)["site_cor"]
    assert (cor[0, [1, 3]] == 0).all()
    assert (cor[1, [0, 2]] == 0).all()
    assert cor[0, 2] != 0
    effects = torch.arange(24.0).reshape(6, 4).double()
    membership = Membership(torch.arange(6), torch.tensor([5]))
    got = factor.contribution(torch.tensor([[1.0, 10]]).double(), membership, effects)
    assert got.tolist() == [[20 + 10 * 22, 21 + 10 * 23]]


@pytest.mark.parametrize("name", ["correlated", "independent", "two correlated terms"])
def test_effects_have_the_covariance_they_should(name):
    model, _ = bind(TERMS[name])
    (factor,) = model.factors
    sites = draw(factor)
    n = 20_000
    membership = Membership(torch.arange(n), torch.arange(n))
    latents = {k: v for k, v in sites.items() if k != "site_effect"}
    with poutine.condition(data=latents):
        torch.manual_seed(1)
        u = factor(membership)
    D = factor.covariance(sites)
    error = (u.T @ u / n - D).abs()
    bound = ((D.diagonal()[:, None] * D.diagonal() + D**2) / n).sqrt()
    assert (error < 4.5 * bound).all()


def test_priors_are_in_the_units_of_the_data():
    prior = HalfNormal({"Intercept": 20.0, "age": 0.3})
    model, data = bind("(1 + age + dose || site)", priors=Priors(sd=prior))
    (factor,) = model.factors
    spread, sd = data.outcome.std(), data.features.std(0)
    # Outcome units (per unit of the feature) to standardised ones; 1 where nothing was given.
    expected = torch.stack([20 / spread, 0.3 * sd[0] / spread, torch.ones_like(spread)])
    torch.testing.assert_close(factor.prior_scale, expected)
    lines = factor.describe_priors()
    assert lines["site_sd[Intercept]"] == "HalfNormal(20)"
    assert lines["site_sd[age]"] == "HalfNormal(0.3)"
    default = f"HalfNormal({float(spread / sd[1]):.4g}), scaled to the data"
    assert lines["site_sd[dose]"] == default
    assert "site_cor" not in lines


def test_default_priors_scale_with_the_data():
    model, data = bind("(1 + age | site)", priors=Priors(cor=2.0))
    (factor,) = model.factors
    spread, sd = float(data.outcome.std()), float(data.features[:, 0].std())
    assert factor.describe_priors() == {
        "site_sd[Intercept]": f"HalfStudentT(3, {spread:.4g}) at the mean of age, "
        "scaled to the data",
        "site_sd[age]": f"HalfStudentT(3, {spread / sd:.4g}), scaled to the data",
        "site_cor": "LKJ(2) at the mean of age",
    }


def test_known_sds():
    model, data = bind("(1 + age || site)", priors=Priors(sd=Known({"Intercept": 20.0, "age": 1})))
    (factor,) = model.factors
    sd = draw(factor)["site_sd"]
    spread = data.outcome.std()
    torch.testing.assert_close(sd, torch.stack([20 / spread, data.features[:, 0].std() / spread]))
    assert torch.equal(factor.known()["site_sd"], sd)
    with pytest.raises(ValueError, match=r"known, but its terms are correlated.*'\|\|'"):
        bind("(1 + age | site)", priors=Priors(sd=Known(1.0)))


def test_two_terms_cannot_share_a_column():
    with pytest.raises(ValueError, match=r"two terms of 'site' have the column 'sex\[T.m\]'"):
        bind(["(1 + sex | site)", "(0 + sex[T.m] | site)"])


def test_layers_and_inputs_in_one_factor():
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1)).double()
    model, data = bind(["(1 + age | site)", Slopes("site", on="1")], net=net)
    (factor,) = model.factors
    assert factor.terms == ("Intercept", "age", "1[0]", "1[1]", "1[2]")
    assert [group.places for group, _ in factor.groups] == [(0, 1)]
    rows = model.encode(data).all()
    hidden = net[:2](rows.x)
    phi = factor.design(rows.x, {"1": hidden})
    torch.testing.assert_close(phi[:, 2:], hidden)
