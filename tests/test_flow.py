"""The flow of the hyperparameters: its density, closed-form slope, and normal special case."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal

from armed_pyro import ClusteredData, MixedEffects
from armed_pyro.distributions.flow import AutoregressiveNormal, CoupledNormal, FlowParameters
from armed_pyro.guides.hyperparameters import Hyperparameters

VECTORS = ("anchor", "shift", "log_scale", "skew", "log_tail")
NAMES = [one.name for one in dataclasses.fields(FlowParameters)]
HELD = ("anchor", "frame")
# Of a component, by those before it.
COUPLINGS = [name for name in NAMES if name not in (*VECTORS, "frame")]


def make(size, seed=0, spread=0.3, **given):
    """A flow with random parameters, those `given` excepted."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return spread * torch.randn(shape, generator=random, dtype=torch.float64)

    frame = (torch.eye(size, dtype=torch.float64) + normal(size, size)).tril()
    parameters = {"frame": frame.tril(-1) + torch.diag(frame.diagonal().abs() + 0.3)}
    parameters |= {name: normal(size) for name in VECTORS}
    parameters |= {name: normal(size, size).tril(-1) for name in COUPLINGS}
    return AutoregressiveNormal(FlowParameters(**parameters | given))


def make_normal(size, seed=0, **given):
    """Of random anchor and frame, and no shape."""
    shape = dict.fromkeys(VECTORS[1:], torch.zeros(size).double())
    shape |= dict.fromkeys(COUPLINGS, torch.zeros(size, size).double())
    return make(size, seed, **shape | given)


def make_standard(size, **given):
    anchor, frame = torch.zeros(size).double(), torch.eye(size).double()
    return make_normal(size, **{"anchor": anchor, "frame": frame} | given)


def with_gradients(q):
    leaves = {name: one.clone().requires_grad_(True) for name, one in vars(q.parameters).items()}
    return AutoregressiveNormal(FlowParameters(**leaves)), leaves


# ----------------------------------------------------------------------------------- the density


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_density_of_one_component_integrates_to_one(seed):
    q = make(1, seed)
    grid = torch.linspace(-400, 400, 4_000_001, dtype=torch.float64)
    density = q.log_prob(grid[:, None]).exp()
    assert torch.trapezoid(density, grid).item() == pytest.approx(1, abs=1e-6)


def test_the_density_of_two_components_integrates_to_one():
    frame = torch.tensor([[0.7, 0.0], [0.4, 1.2]]).double()
    log_tail = torch.tensor([-0.2, -0.1]).double()  # light tails, or the grid would be endless
    q = make(2, 3, spread=0.2, frame=frame, log_tail=log_tail)
    one, other = (torch.linspace(-9, 9, 1201, dtype=torch.float64) for _ in range(2))
    grid = torch.stack(torch.meshgrid(one, other, indexing="ij"), -1)
    density = q.log_prob(grid).exp()
    total = torch.trapezoid(torch.trapezoid(density, other), one)
    assert total.item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_density_is_that_of_the_noise_over_the_jacobian(size, seed):
    q = make(size, seed)
    noise = torch.randn(6, size, generator=torch.Generator().manual_seed(seed)).double()
    for one in noise:
        jacobian = torch.autograd.functional.jacobian(q.push, one)
        expected = -0.5 * (one**2).sum() - 0.5 * size * np.log(2 * np.pi)
        expected = expected - torch.linalg.slogdet(jacobian).logabsdet
        # A copy: not its own draw, but a value like any other.
        torch.testing.assert_close(q.log_prob(q.push(one).clone()), expected)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_a_value_was_made_of_is_found(seed):
    q = make(4, seed)
    noise = torch.randn(50, 4, generator=torch.Generator().manual_seed(seed)).double()
    torch.testing.assert_close(q._pull(q.push(noise)), noise, rtol=1e-8, atol=1e-8)


def test_without_shape_it_is_the_normal_distribution_of_anchor_and_frame():
    q = make_normal(3)
    p = q.parameters
    dense = MultivariateNormal(p.anchor, scale_tril=p.frame)
    value = torch.randn(7, 3).double()
    torch.testing.assert_close(q.log_prob(value), dense.log_prob(value))
    own = q.rsample((7,))
    torch.testing.assert_close(q.log_prob(own), dense.log_prob(own))
    noise = torch.randn(7, 3).double()
    torch.testing.assert_close(q.push(noise), p.anchor + noise @ p.frame.mT)


def test_skew_shifts_the_median_against_the_mean_and_tail_makes_tails_heavy():
    n = 100_000
    torch.manual_seed(0)
    kurtosis = {}
    for log_tail in (-0.3, 0.0, 0.3):
        z = make_standard(1, log_tail=torch.tensor([log_tail]).double()).rsample((n,))[:, 0]
        z = (z - z.mean()) / z.std()
        kurtosis[log_tail] = float((z**4).mean())
    # The standard error of a normal sample's kurtosis is sqrt(24 / n) = 0.015.
    assert kurtosis[-0.3] < 2.8 < kurtosis[0.0] < 3.2 < kurtosis[0.3]
    z = make_standard(1, skew=torch.tensor([0.5]).double()).rsample((n,))[:, 0]
    assert (z.mean() - z.median()) / z.std() > 0.05


@pytest.mark.parametrize(
    ("name", "follows"),
    [
        ("twist", lambda s: 0.8 * math.tanh(s)),
        ("bow", lambda s: 0.8 * math.tanh(s) ** 2),
    ],
)
def test_the_scale_follows_an_earlier_component(name, follows):
    q = make_standard(2, **{name: torch.tensor([[0.0, 0.0], [0.8, 0.0]]).double()})
    torch.manual_seed(0)
    first, second = q.rsample((200_000,)).unbind(-1)
    for middle in (-1.0, 0.0, 1.0):
        sd = second[(first - middle).abs() < 0.1].std()
        assert sd.log().item() == pytest.approx(follows(middle), abs=0.05)


# ------------------------------------------------------------------------- draws of its own


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_its_own_draw_has_the_density_of_a_foreign_value(size, seed):
    q = make(size, seed)
    torch.manual_seed(seed)
    own = q.rsample((8,))
    torch.testing.assert_close(q.log_prob(own), q.log_prob(own.clone()), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_its_own_draw_has_the_slope_of_a_foreign_value(size, seed):
    """In closed form, against automatic differentiation of the density."""
    q = make(size, seed)
    noise = torch.randn(8, size, generator=torch.Generator().manual_seed(seed)).double()
    value = q.push(noise).detach().requires_grad_(True)
    (expected,) = torch.autograd.grad(q.log_prob(value).sum(), value)
    by_x = expected @ q.parameters.frame
    torch.testing.assert_close(q._slope(noise), by_x, rtol=1e-7, atol=1e-8)


def test_gradients_of_its_own_draw_hold_its_parameters_fixed():
    """d log q(theta) by the parameters is slope' d theta: the path, and no score."""
    q, leaves = with_gradients(make(3))
    leaves = {name: one for name, one in leaves.items() if name not in HELD}
    torch.manual_seed(0)
    own = q.rsample((5,))
    got = torch.autograd.grad(q.log_prob(own).sum(), list(leaves.values()), retain_graph=True)
    slope = (q._slope(q._pull(own)) @ torch.linalg.inv(q.parameters.frame)).detach()
    expected = torch.autograd.grad((slope * own).sum(), list(leaves.values()))
    for name, one, other in zip(leaves, got, expected, strict=True):
        torch.testing.assert_close(one, other, msg=name)
    # The same by the distribution whose parameters are held.
    again, leaves = with_gradients(make(3))
    leaves = {name: one for name, one in leaves.items() if name not in HELD}
    torch.manual_seed(0)
    own = again.rsample((5,))
    values = {name: value.detach() for name, value in vars(again.parameters).items()}
    held = type(again)(FlowParameters(**values))
    assert not any(one.requires_grad for one in vars(held.parameters).values())
    other = torch.autograd.grad(held.log_prob(own).sum(), list(leaves.values()))
    for name, one, two in zip(leaves, got, other, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-9, msg=name)


def test_gradients_of_a_foreign_value_reach_its_parameters():
    leaves = with_gradients(make(3))[1]
    value = torch.randn(5, 3).double()
    assert torch.autograd.gradcheck(
        lambda *values: AutoregressiveNormal(
            FlowParameters(**dict(zip(leaves, values, strict=True)))
        ).log_prob(value),
        tuple(leaves.values()),
    )


def test_where_it_is_the_posterior_the_gradient_vanishes_in_every_draw():
    """Sticking the landing, for all kinds of parameters."""
    q, leaves = with_gradients(make(3))
    target = make(3)
    torch.manual_seed(1)
    own = q.rsample((4,))
    difference = (target.log_prob(own) - q.log_prob(own)).sum()
    leaves = {name: one for name, one in leaves.items() if name not in HELD}
    for name, one in zip(leaves, torch.autograd.grad(difference, leaves.values()), strict=True):
        assert one.abs().max() < 1e-9, name


def test_a_later_draw_replaces_the_one_it_knows():
    q = make(2)
    first, second = q.rsample((3,)), q.rsample((3,))
    for value in (first, second):
        torch.testing.assert_close(q.log_prob(value), q.log_prob(value.clone()))


# ------------------------------------------------------------------------------------- the shapes


@pytest.mark.parametrize("batch", [(), (4,), (4, 1)])
def test_it_expands(batch):
    q = make(3)
    assert q.event_shape == (3,)
    wide = q.expand(batch)
    assert wide.batch_shape == batch
    own = wide.rsample((2,))
    assert own.shape == (2, *batch, 3)
    assert wide.log_prob(own).shape == (2, *batch)
    torch.testing.assert_close(wide.log_prob(own), q.log_prob(own.clone()))
    assert q.expand(()) is q


def test_of_no_components_the_density_is_one():
    q = make_standard(0)
    own = q.rsample((4,))
    assert own.shape == (4, 0)
    assert torch.equal(q.log_prob(own), torch.zeros(4).double())
    assert torch.equal(q.log_prob(own.clone()), torch.zeros(4).double())


# ------------------------------------------------------------------------- without shape


@pytest.mark.parametrize("size", [1, 4])
def test_without_shape_it_is_the_coupled_normal(size):
    """Values, densities and gradients, of own draws and of given values."""
    zeros = {name: torch.zeros(size).double() for name in ("skew", "log_tail")}
    zeros |= {name: torch.zeros(size, size).double() for name in ("twist", "bow")}
    noise = torch.randn(5, size, generator=torch.Generator().manual_seed(2)).double()
    found = []
    for kind in (AutoregressiveNormal, CoupledNormal):
        _, leaves = with_gradients(make(size, **zeros))
        q = kind(FlowParameters(**leaves)).expand((5,))
        value = q.push(noise)
        own, given = q.log_prob(value), q.log_prob(value.detach())
        trained = [leaves[name] for name in ("shift", "log_scale", "coupling")]
        gradients = torch.autograd.grad(
            (value**2).sum() + (own * torch.arange(5)).sum(), trained, retain_graph=True
        )
        scores = torch.autograd.grad(given.sum(), trained)
        # What stands on and above the diagonal of A is not looked at.
        below = [one.tril(-1) if one.dim() == 2 else one for one in (*gradients, *scores)]
        found.append((value, own, given, *below))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_shape_that_was_saved_is_there_again():
    data = ClusteredData.from_arrays([[0.0], [1.0]] * 10, [0.0, 1.0] * 10, {"g": [0, 1] * 10})
    model = MixedEffects(nn.Linear(1, 1).double(), "(1 | g)").bind(data)
    first, second = (Hyperparameters(model) for _ in range(2))
    assert isinstance(first.distribution(), CoupledNormal)
    first.train_shape()
    with torch.no_grad():
        first.skew.fill_(0.2)
    second.load_state_dict(first.state_dict())
    q = second.distribution()
    assert isinstance(q, AutoregressiveNormal)
    assert torch.equal(q.parameters.skew, first.skew)
    plain = Hyperparameters(model)
    plain.load_state_dict(Hyperparameters(model).state_dict())
    assert isinstance(plain.distribution(), CoupledNormal)
