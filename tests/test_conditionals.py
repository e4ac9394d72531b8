"""Random effects in whitened coordinates: densities, draws, and by whom draws are judged."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from armed_pyro.distributions.small_matrices import multiply, precision_root, solve, sum_last
from armed_pyro.distributions.whitened import Pushforward, WhitenedDiagonal, WhitenedNormal

SIZES = [1, 2, 3, 4, 5, 7]
KINDS = ["full", "diagonal"]


def lower(*shape):
    matrix = torch.randn(*shape, shape[-1]).double().tril()
    matrix.diagonal(dim1=-2, dim2=-1).abs_().add_(0.1)
    return matrix


def make(kind="full", terms=3, seed=0, clusters=4):
    torch.manual_seed(seed)
    mean = torch.randn(clusters, terms).double()
    if kind == "diagonal":
        scale, root = torch.rand(clusters, terms).double() + 0.1, torch.rand(terms).double() + 1
        return WhitenedDiagonal(scale, mean, root.expand(clusters, terms))
    scale, A = lower(clusters, terms), torch.randn(clusters, terms, terms).double()
    root = torch.linalg.cholesky(torch.eye(terms).double() + A @ A.mT)
    return WhitenedNormal(scale, mean, root)


def covariance(q):
    """L (C C')^-1 L', written out."""
    scale, root = q.scale, q.root
    if isinstance(q, WhitenedDiagonal):
        scale, root = torch.diag_embed(scale), torch.diag_embed(root)
    return scale @ torch.linalg.inv(root @ root.mT) @ scale.mT


def dense(q):
    return MultivariateNormal(q.mean, covariance(q))


# ----------------------------------------------------------------------------------- densities


@pytest.mark.parametrize("terms", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_density_is_that_of_a_multivariate_normal(kind, terms):
    q = make(kind, terms)
    assert (q.batch_shape, q.event_shape) == ((4,), (terms,))
    value = q.mean + torch.randn(5, 4, terms).double()
    torch.testing.assert_close(q.log_prob(value), dense(q).log_prob(value))


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_is_that_of_the_whitened_effects_scaled(kind):
    q = make(kind)
    scale = q.scale if kind == "full" else torch.diag_embed(q.scale)
    torch.testing.assert_close(q.mean, torch.einsum("kij,kj->ki", scale, q.mean_whitened))
    torch.testing.assert_close(q.push(torch.zeros(4, 3).double()), q.mean)


@pytest.mark.parametrize("terms", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_draws_have_its_moments(kind, terms):
    q, n = make(kind, terms), 40_000
    torch.manual_seed(1)
    draws = q.rsample((n,))
    assert draws.shape == (n, 4, terms)
    V = covariance(q)
    sd = V.diagonal(dim1=-2, dim2=-1).sqrt()
    assert ((draws.mean(0) - q.mean).abs() < 4.5 * sd / math.sqrt(n)).all()
    centred = draws - q.mean
    error = torch.einsum("nki,nkj->kij", centred, centred) / n - V
    bound = ((sd[:, :, None] * sd[:, None, :]) ** 2 + V**2) / n
    assert (error.abs() < 4.5 * bound.sqrt()).all()


@pytest.mark.parametrize("terms", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_its_own_draw_has_the_density_of_a_foreign_value(kind, terms):
    q = make(kind, terms)
    own = q.rsample((5,))
    torch.testing.assert_close(q.log_prob(own), dense(q).log_prob(own))
    torch.testing.assert_close(q.log_prob(own), q.log_prob(own.clone()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_later_draw_replaces_the_one_it_knows(kind):
    q = make(kind)
    first, second = q.rsample((5,)), q.rsample((5,))
    for value in (first, second):
        torch.testing.assert_close(q.log_prob(value), dense(q).log_prob(value))


@pytest.mark.parametrize("kind", KINDS)
def test_one_scale_serves_many_clusters_and_draws(kind):
    """L of each draw of the hyperparameters, C of each cluster, means of each particle."""
    torch.manual_seed(0)
    shape = (2, 1, 1, 3) if kind == "diagonal" else (2, 1, 1, 3, 3)
    scale = torch.rand(shape).double() + 0.1 if kind == "diagonal" else lower(2, 1, 1, 3)
    root = 1 + torch.rand(4, 3).double() if kind == "diagonal" else lower(4, 3)
    mean = torch.randn(2, 5, 4, 3).double()
    q = (WhitenedDiagonal if kind == "diagonal" else WhitenedNormal)(scale, mean, root)
    value = q.rsample()
    assert value.shape == (2, 5, 4, 3)
    expected = MultivariateNormal(q.mean, covariance(q)).log_prob(value)
    torch.testing.assert_close(q.log_prob(value), expected)
    torch.testing.assert_close(q.log_prob(value.clone()), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_it_expands(kind):
    q = make(kind)
    assert q.expand((4,)) is q
    wide = q.expand((5, 4))
    assert wide.batch_shape == (5, 4)
    own = wide.rsample((2,))
    assert own.shape == (2, 5, 4, 3)
    torch.testing.assert_close(wide.log_prob(own), dense(q).log_prob(own))
    value = torch.randn(5, 4, 3).double()
    torch.testing.assert_close(wide.log_prob(value), dense(q).log_prob(value))


# ---------------------------------------------------------------------------- gradients, the judge


def test_a_pushforward_draws_by_pushing_normal_noise():
    q = make()
    torch.manual_seed(3)
    draws = q.rsample((2,))
    torch.manual_seed(3)
    noise = torch.randn(2, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(draws, q.push(noise))
    assert isinstance(q, Pushforward)


@pytest.mark.parametrize("kind", KINDS)
def test_own_draws_are_judged_by_the_one_that_is_held(kind):
    judge, first = make(kind, seed=1), make(kind, seed=0)
    held = type(first)(first.scale, judge.mean_whitened, judge.root)
    q = type(first)(first.scale, first.mean_whitened, first.root, held)
    own = q.rsample((5,))
    torch.testing.assert_close(q.log_prob(own), dense(held).log_prob(own))
    torch.testing.assert_close(q.log_prob(own.clone()), dense(first).log_prob(own))
    wide = q.expand((5, 4))
    own = wide.rsample()
    torch.testing.assert_close(wide.log_prob(own), dense(held).log_prob(own))


@pytest.mark.parametrize("kind", KINDS)
def test_held_at_itself_gradients_follow_the_draw_only(kind):
    """They stick the landing: no score of the trained parameters."""
    fixed = make(kind)
    mean, root = (one.clone().requires_grad_(True) for one in (fixed.mean_whitened, fixed.root))
    held = type(fixed)(fixed.scale, mean.detach(), root.detach())
    q = type(fixed)(fixed.scale, mean, root, held)
    own = q.rsample((5,))
    got = torch.autograd.grad(q.log_prob(own).sum(), [mean, root], retain_graph=True)
    value = own.detach().requires_grad_(True)
    (slope,) = torch.autograd.grad(dense(fixed).log_prob(value).sum(), value)
    expected = torch.autograd.grad((slope * own).sum(), [mean, root])
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)
        assert one.abs().max() > 1e-3
    # At the posterior, nothing is left to do in any draw.
    own = q.rsample((5,))
    difference = (dense(fixed).log_prob(own) - q.log_prob(own)).sum()
    for one in torch.autograd.grad(difference, [mean, root]):
        assert one.abs().max() < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_judge_gradients_of_own_draws_are_those_of_their_density(kind):
    """By L, m and C, through draw and density, as automatic differentiation has it."""
    fixed = make(kind)
    leaves = [
        one.clone().requires_grad_(True) for one in (fixed.scale, fixed.mean_whitened, fixed.root)
    ]
    q = type(fixed)(*leaves)
    torch.manual_seed(2)
    own = q.rsample((5,))
    got = torch.autograd.grad(
        q.log_prob(own).sum(), leaves, retain_graph=True, materialize_grads=True, allow_unused=True
    )
    expected = torch.autograd.grad(
        q.log_prob(own * 1).sum(), leaves, materialize_grads=True, allow_unused=True
    )
    for one, other in zip(got, expected, strict=True):
        if one.dim() == 3:  # what stands above the diagonal of a triangular matrix is not looked at
            one, other = one.tril(), other.tril()
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_standard_deviation_near_zero_is_safe(kind):
    sds = torch.tensor([1e-12, 1.0])
    scale = (torch.diag(sds) if kind == "full" else sds).requires_grad_(True)
    root = torch.eye(2) if kind == "full" else torch.ones(3, 2)
    q = (WhitenedNormal if kind == "full" else WhitenedDiagonal)(scale, torch.zeros(3, 2), root)
    own = q.rsample()
    log_prob = q.log_prob(own)
    log_prob.sum().backward()
    assert torch.isfinite(log_prob).all()
    assert torch.isfinite(scale.grad).all()
    # log |C| - log |L| - noise' noise / 2, of which only the middle one is large.
    noise = own / sds
    expected = -sds.log().sum() - 0.5 * (noise**2).sum(-1) - math.log(2 * math.pi)
    torch.testing.assert_close(log_prob.detach(), expected)


# -------------------------------------------------------------------------- few and many terms


@pytest.mark.parametrize("terms", SIZES)
def test_small_matrices_are_multiplied_and_solved_as_by_linear_algebra(terms):
    torch.manual_seed(0)
    matrix, vector = lower(2, 4, terms), torch.randn(5, 2, 4, terms).double()
    torch.testing.assert_close(multiply(matrix, vector), (matrix @ vector[..., None])[..., 0])
    full = torch.randn(2, 4, terms, terms).double()
    torch.testing.assert_close(multiply(full, vector), (full @ vector[..., None])[..., 0])
    solved = solve(matrix, vector[..., None], upper=False)[..., 0]
    torch.testing.assert_close((matrix @ solved[..., None])[..., 0], vector)
    torch.testing.assert_close(sum_last(vector), vector.sum(-1))


def test_the_sum_over_no_terms_is_zero():
    assert torch.equal(sum_last(torch.ones(3, 0)), torch.zeros(3))


# ----------------------------------------------------------------------------- the precision's root


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_root_is_that_of_the_precision(dtype):
    A = torch.randn(5, 3, 3, dtype=dtype)
    root = precision_root(A @ A.mT)
    torch.testing.assert_close(root @ root.mT, torch.eye(3, dtype=dtype) + A @ A.mT)
    assert torch.equal(root, root.tril())


def test_sds_far_too_large_leave_a_root_where_rounding_leaves_none():
    """One row tells of two effects' sum only; the rest is lost beside it."""
    torch.manual_seed(0)
    phi = torch.randn(200, 1, 3)
    scale = 10 ** torch.linspace(0, 8, 200)[:, None, None] * torch.randn(200, 3, 3).tril()
    whitened = scale.mT @ (phi.mT @ phi) @ scale
    bad = torch.linalg.cholesky_ex(whitened + torch.eye(3)).info > 0
    assert 10 < bad.sum() < 190
    root = precision_root(whitened)
    assert torch.isfinite(root).all()
    assert (root.diagonal(dim1=-2, dim2=-1) > 0).all()
    precision = whitened + torch.eye(3)
    error = (root @ root.mT - precision).abs().amax((1, 2)) / precision.abs().amax((1, 2))
    assert error.max() < 3e-5
    # No pivot of I + L'AL is below 1, of which rounding in an ordinary factor knows nothing.
    assert (root.diagonal(dim1=-2, dim2=-1) >= 1).all()
    small = scale.abs().amax((1, 2)) < 10
    exact = torch.linalg.cholesky(whitened[small].double() + torch.eye(3))
    torch.testing.assert_close(root[small], exact.float(), rtol=1e-3, atol=1e-3)


def test_what_is_not_finite_has_no_root():
    assert precision_root(torch.full((2, 3, 3), math.nan)).diagonal(dim1=1, dim2=2).isnan().all()
