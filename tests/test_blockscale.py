"""Block-diagonal scales, against the matrix written out."""

import pytest
import torch

from armed_pyro.guides.block_scale import BlockScale

CLUSTERS = (3, 2)


def scale(terms, batch=()):
    torch.manual_seed(0)
    blocks = [torch.randn(*batch, t, t).double().tril() for t in terms]
    m = sum(k * t for k, t in zip(CLUSTERS, terms, strict=True))
    found = BlockScale(blocks, CLUSTERS)
    each = [one for one, k in zip(blocks, CLUSTERS, strict=True) for _ in range(k)]
    flat = [torch.block_diag(*parts) for parts in zip(*map(flattened, each), strict=True)]
    whole = torch.stack(flat).reshape(*batch, m, m)
    return found, whole


def flattened(block):
    return block.reshape(-1, *block.shape[-2:])


@pytest.mark.parametrize("batch", [(), (4, 1)])
@pytest.mark.parametrize("terms", [(1, 1), (2, 1), (2, 3)])
def test_products_are_those_of_the_whole_matrix(terms, batch):
    found, whole = scale(terms, batch)
    m = whole.shape[-1]
    vector = torch.randn(*batch, m).double()
    torch.testing.assert_close(found.times(vector), (whole @ vector[..., None])[..., 0])
    torch.testing.assert_close(
        found.transpose_times(vector), (whole.mT @ vector[..., None])[..., 0]
    )
    A = torch.randn(*batch, m, m).double()
    symmetric = A @ A.mT
    torch.testing.assert_close(found.both(symmetric), whole.mT @ symmetric @ whole)
    diagonal = (whole.mT @ symmetric @ whole).diagonal(dim1=-2, dim2=-1)
    own = symmetric.diagonal(dim1=-2, dim2=-1)
    bound = found.diagonal_bound(own)
    assert (bound >= diagonal - 1e-9).all()
    if terms == (1, 1):
        torch.testing.assert_close(bound, diagonal)


def test_a_known_scale_beside_one_that_is_drawn():
    known, drawn = torch.full((1, 1), 2.0), torch.rand(4, 1, 1, 1)
    found = BlockScale([known, drawn], CLUSTERS).times(torch.ones(5))
    assert found.shape == (4, 1, 5)
    assert (found[..., :3] == 2).all()
    torch.testing.assert_close(found[..., 3:], drawn[..., 0].expand(4, 1, 2))
    assert BlockScale([known, drawn], CLUSTERS).both(torch.ones(5, 5)).shape == (4, 1, 5, 5)
    wide = torch.diag_embed(torch.tensor([2.0, 3.0]))
    found = BlockScale([wide, drawn], CLUSTERS).times(torch.ones(8))
    assert found.shape == (4, 1, 8)
