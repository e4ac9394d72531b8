"""Pareto smoothing and sensitivity to priors, against ArviZ; shapes, against torch."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import xarray as xr

from armed_pyro.distributions.shapes import broadcast_shape
from armed_pyro.inference.psis import pareto_smooth
from armed_pyro.summaries.importance_statistics import _moved


@pytest.mark.parametrize("draws", [30, 100, 225, 226, 1000, 4000])
@pytest.mark.parametrize("scale", [0.01, 1.0, 5.0])
def test_smoothed_weights_are_those_of_arviz(draws, scale):
    from arviz_stats.base import array_stats

    ratios = scale * np.random.default_rng(draws).standard_t(5, size=(5, draws))
    log_weights, k_hat = pareto_smooth(ratios)
    expected, expected_k = array_stats.psislw(-ratios, axis=-1)
    assert np.abs(k_hat - expected_k).max() < 1e-12
    assert np.abs(log_weights - expected).max() < 1e-11


def test_many_sets_are_smoothed_as_each_alone():
    ratios = np.random.default_rng(0).normal(size=(300, 1000))
    log_weights, k_hat = pareto_smooth(ratios)
    for place in (0, 150, 299):
        alone, k_alone = pareto_smooth(ratios[[place]])
        assert np.array_equal(log_weights[place], alone[0])
        assert k_hat[place] == k_alone[0]


def test_bounded_weights_have_no_tail_and_are_kept():
    ratios = np.minimum(np.random.default_rng(0).normal(size=(2, 1000)), 0)
    log_weights, k_hat = pareto_smooth(ratios)
    assert (k_hat == -np.inf).all()
    assert np.allclose(log_weights - log_weights.max(1, keepdims=True), ratios)


def test_one_dominant_draw_is_never_trusted():
    ratios = np.random.default_rng(0).normal(size=(2, 1000))
    ratios[0, 3] = 2000
    log_weights, k_hat = pareto_smooth(ratios)
    assert k_hat[0] == np.inf
    assert k_hat[1] < 0.7
    assert np.allclose(np.exp(log_weights).sum(1), 1)


@pytest.mark.filterwarnings("ignore")
def test_distances_of_scaled_priors_are_those_of_arviz():
    """The weights' tails differ a little: ArviZ estimates how dependent the draws are."""
    from arviz_stats import psense

    rng = np.random.default_rng(1)
    sd, other = np.exp(0.5 * rng.normal(size=1000)), rng.normal(size=1000)
    log_prior = -0.5 * sd**2
    tree = xr.DataTree.from_dict(
        {
            "posterior": xr.Dataset(
                {name: (("chain", "draw"), x[None]) for name, x in {"a": sd, "b": other}.items()}
            ),
            "log_prior": xr.Dataset({"p": (("chain", "draw"), log_prior[None])}),
        }
    )
    expected = psense(tree, group="prior", alphas=(0.8, 1.25))
    scaled = [np.exp(pareto_smooth((p - 1) * log_prior[None])[0][0]) for p in (0.8, 1.25)]
    assert _moved(sd, scaled) == pytest.approx(float(expected["a"]), rel=0.02)
    assert _moved(other, scaled) == pytest.approx(float(expected["b"]), rel=0.05)
    assert np.isnan(_moved(np.ones(1000), scaled))


def test_shapes_are_those_of_torch_without_its_symbols():
    for shapes in [((3, 1), (4,)), ((), (2, 1, 5)), ((1,), (7, 1), (1, 2))]:
        assert broadcast_shape(*shapes) == torch.broadcast_shapes(*shapes)
    with pytest.raises(ValueError, match="shape mismatch"):
        broadcast_shape((2,), (3,))
    code = (
        "import sys; from armed_pyro.distributions.shapes import broadcast_shape; "
        "broadcast_shape((2, 1), (3,)); print('sympy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
