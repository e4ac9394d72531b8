"""Graphs of operations: errors that a GPU would wait for become NaN."""

import pytest
import torch

from armed_pyro.engine import compiler
from armed_pyro.engine.compiler import capture


def solved(matrix: torch.Tensor) -> list[torch.Tensor]:
    root = torch.linalg.cholesky(matrix)
    (slope,) = torch.autograd.grad(root.diagonal(dim1=-2, dim2=-1).log().sum(), matrix)
    return [torch.cholesky_inverse(root) @ matrix, slope]


def test_a_matrix_without_a_factor_gives_nan_where_an_error_would_make_a_gpu_wait():
    definite, other = torch.eye(3) + 0.5, torch.diag(torch.tensor([1.0, -1.0, 1.0]))
    graph = capture(solved, [torch.stack([definite, definite])], trained=1)
    with pytest.raises(torch.linalg.LinAlgError):
        graph(torch.stack([definite, other]))
    compiler._nan_where_cholesky_fails(graph.graph)
    graph.recompile()
    both = graph(torch.stack([definite, other]))
    for found, wanted in zip(both, solved(definite[None].requires_grad_()), strict=True):
        torch.testing.assert_close(found[0], wanted[0])
        assert found[1].isnan().any()
