"""Cross-products: sums over nonzero entries, against products with the whole matrix."""

import pytest
import torch
from torch.nn.utils.stateless import _reparametrize_module

from armed_pyro import ClusteredData, MixedEffects
from armed_pyro.engine.compiler import capture
from armed_pyro.guides.cross_products import (
    DenseCrossProducts,
    SparseCrossProducts,
    cross_products,
)
from armed_pyro.guides.crossed import CrossedGuide

K, M = 7, 5


@pytest.fixture(autouse=True)
def always_sparse(monkeypatch):
    monkeypatch.setattr("armed_pyro.guides.cross_products.SPARSE", 0)


def matrix(terms=2, seed=0):
    """A third of the clusters' couplings are there; of one cluster none, of one effect none."""
    torch.manual_seed(seed)
    there = torch.rand(K, 1, M) < 0.35
    there[3], there[..., 2] = False, False
    # With several terms some of a coupling's elements may be zero.
    return torch.randn(K, terms, M).double() * there * (torch.rand(K, terms, M) < 0.8)


@pytest.mark.parametrize("terms", [1, 2, 5])
@pytest.mark.parametrize("batch", [(), (3, 1)])
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_sums_are_those_of_the_whole_matrix(kind, batch, terms):
    between = matrix(terms)
    found = cross_products(between) if kind == "sparse" else DenseCrossProducts(between)
    assert isinstance(found, SparseCrossProducts if kind == "sparse" else DenseCrossProducts)
    half = torch.randn(*batch, K, terms, terms).double()
    product = half @ between
    gram = torch.einsum("...ktm,...ktn->...mn", product, product)
    torch.testing.assert_close(found.gram(half), gram)
    effects, values = torch.randn(*batch, M).double(), torch.randn(*batch, K, terms).double()
    along = torch.einsum("ktm,...m->...kt", between, effects)
    torch.testing.assert_close(found.times(effects), along)
    across = torch.einsum("ktm,...kt->...m", between, values)
    torch.testing.assert_close(found.transpose_times(values), across)


def test_first_and_second_derivatives_are_right():
    half = torch.randn(K, 2, 2).double().requires_grad_(True)
    found = cross_products(matrix())
    assert torch.autograd.gradcheck(found.gram, half)
    assert torch.autograd.gradgradcheck(found.gram, half)


def test_a_pattern_holds_every_pair_once():
    between = matrix()
    pattern = SparseCrossProducts.found_in(between)
    there = (between != 0).any(1)
    assert len(pattern.cluster) == there.sum()
    counts = there.sum(1)
    assert len(pattern.first) == (counts * (counts + 1) // 2).sum()
    assert (pattern.cell.diff() >= 0).all()
    row, column = pattern.cell // M, pattern.cell % M
    assert (row >= column).all()


def test_they_are_dense_where_pairs_are_many(monkeypatch):
    monkeypatch.setattr("armed_pyro.guides.cross_products.SPARSE", 30)
    assert isinstance(cross_products(torch.ones(K, 1, M)), DenseCrossProducts)
    assert isinstance(cross_products(torch.eye(200)[:, None]), SparseCrossProducts)


def guide_of_few_rows():
    torch.manual_seed(1)
    codes = {"a": torch.arange(24) % 8, "b": torch.arange(24) % 6}
    data = ClusteredData.from_arrays(
        torch.randn(24, 1).numpy(),
        torch.randn(24).numpy(),
        {name: one.numpy() for name, one in codes.items()},
    )
    net = torch.nn.Linear(1, 1).double()
    model = MixedEffects(net, "(1 | a) + (1 | b)", bayesian_head=True).bind(data)
    source = model.encode(data)
    return CrossedGuide(model, source), source


@pytest.mark.filterwarnings("ignore:there are fewer rows")
def test_they_are_gathered_anew_when_rows_say_something_new():
    """As after a refresh, or a return to an earlier state."""
    guide, source = guide_of_few_rows()
    before = guide.center(source.all())["b_effect"]
    state = guide.between.clone()
    with torch.no_grad():
        guide.between.mul_(0.5)
    assert not torch.allclose(guide.center(source.all())["b_effect"], before)
    with torch.no_grad():
        guide.between.copy_(state)
    torch.testing.assert_close(guide.center(source.all())["b_effect"], before)
    # What was not there before may be now.
    with torch.no_grad():
        guide.between.copy_(torch.rand_like(state))
    dense = DenseCrossProducts(guide.between).gram(torch.ones(8, 1, 1).double())
    torch.testing.assert_close(guide._cross_products().gram(torch.ones(8, 1, 1).double()), dense)
    assert guide._cross_products() is guide._cross_products()


@pytest.mark.filterwarnings("ignore:there are fewer rows")
def test_a_step_captured_as_a_graph_follows_what_rows_say():
    guide, source = guide_of_few_rows()
    rows = source.all()
    guide.center(rows)

    def step(between):
        with _reparametrize_module(guide, {"between": between.clone()}):
            return [guide.center(rows)["b_effect"].detach()]

    graph = capture(step, [guide.between])
    other = 0.5 * guide.between
    (found,) = graph(other)
    with torch.no_grad():
        guide.between.copy_(other)
    torch.testing.assert_close(found, guide.center(rows)["b_effect"])
