"""Taps: activations by module path, with hooks that are removed again."""

import pytest
import torch
from torch import nn

from armed_pyro.networks.taps import module_at, pooled, tapped


def make_net():
    return nn.Sequential(
        nn.Linear(3, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 2), nn.Tanh()), nn.Linear(2, 1)
    )


def hooks_of(net):
    return [
        hook
        for module in net.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]


def test_outputs_and_inputs():
    net, x = make_net(), torch.randn(5, 3)
    with tapped(net, ["1", "2.0", "1"], ["3", ""]) as record:
        output = net(x)
    assert set(record) == {"1", "2.0", "<3", "<"}
    torch.testing.assert_close(record["1"], net[1](net[0](x)))
    torch.testing.assert_close(record["2.0"], net[2][0](record["1"]))
    torch.testing.assert_close(net[3](record["<3"]), output)
    assert record["<"] is x
    assert hooks_of(net) == []


def test_the_whole_network_is_the_empty_path():
    net = make_net()
    assert module_at(net, "") is net
    with tapped(net, [""]) as record:
        assert net(torch.ones(2, 3)) is record[""]


def test_hooks_go_when_the_network_fails():
    net = make_net()
    with pytest.raises(RuntimeError), tapped(net, ["1"], ["3"]):
        net(torch.ones(2, 7))
    assert hooks_of(net) == []


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("2.00", r"'2\.00' \(nearest: '2\.0'\); its module paths are: 0, 1, 2, 2\.0"),
        ("conv", "'conv'; its"),
    ],
)
def test_unknown_path(path, message):
    net = make_net()
    with pytest.raises(ValueError, match=message), tapped(net, ["1", path]):
        pytest.fail("entered")
    assert hooks_of(net) == []


def test_a_single_module_has_no_paths():
    with pytest.raises(ValueError, match="none, as it is a single module"):
        module_at(nn.Linear(2, 1), "head")


def test_feature_maps_are_averaged_over_space():
    maps = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(pooled(maps), maps.mean((2, 3)))
    torch.testing.assert_close(pooled(maps[..., 0]), maps[..., 0].mean(-1))
    assert pooled(maps[..., 0, 0]).shape == (2, 3)


def test_gradients_pass_through_taps():
    net, x = make_net(), torch.randn(5, 3)
    with tapped(net, ["1"]) as record:
        net(x)
    record["1"].sum().backward()
    assert net[0].weight.grad is not None
    assert net[3].weight.grad is None
