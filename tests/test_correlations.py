"""Unconstrained coordinates of correlation matrices, against torch's."""

import pytest
import torch
from torch.distributions.transforms import CorrCholeskyTransform

from armed_pyro.distributions.cholesky_correlation import CorrelationCholesky


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_it_is_torchs_transform(size, shape):
    torch.manual_seed(0)
    x = torch.randn(*shape, size * (size - 1) // 2, dtype=torch.float64)
    own, other = CorrelationCholesky(), CorrCholeskyTransform()
    y = own(x)
    torch.testing.assert_close(y, other(x))
    torch.testing.assert_close(own.inv(y), x)
    torch.testing.assert_close(own.log_abs_det_jacobian(x, y), other.log_abs_det_jacobian(x, y))


def test_far_out_it_stays_a_correlation():
    y = CorrelationCholesky()(torch.tensor([50.0, -50.0, 50.0]))
    torch.testing.assert_close((y @ y.mT).diagonal(), torch.ones(3))
    assert (y.diagonal() > 0).all()
