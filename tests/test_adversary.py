"""The adversary: reversed gradients, warm-up, and no place in the density."""

import numpy as np
import pytest
import torch
from pyro import poutine
from torch import nn
from torch.nn.functional import cross_entropy

from armed_pyro import Adversary, ClusteredData, MixedEffects, StructuredGuide
from armed_pyro.inference.objective import Objective
from armed_pyro.networks.adversary import reverse_gradient

N, FEATURES = 60, 3


def make_data(shape=(FEATURES,), seed=0):
    rng = np.random.default_rng(seed)
    clusters = {"site": np.arange(N) % 4, "batch": rng.permutation(np.arange(N) % 3)}
    return ClusteredData.from_arrays(rng.normal(size=(N, *shape)), rng.normal(size=N), clusters)


def make_net(seed=0):
    torch.manual_seed(seed)
    layers = [nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)]
    return nn.Sequential(*layers).double()


def bind(*games, net=None, data=None, **settings):
    data = make_data() if data is None else data
    net = make_net() if net is None else net
    torch.manual_seed(1)
    model = MixedEffects(net, "(1 | site)", adversary=games, **settings).bind(data)
    return model, model.encode(data)


def net_gradient(model, loss):
    model.zero_grad()
    loss.backward(retain_graph=True)
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.net.named_parameters()
    }


def play(model, rows, strength=1.0, game=0):
    """Cross-entropy of one adversary on activations that still know the network."""
    activations = {}
    x = rows.x
    for path, module in model.net.named_children():
        x = activations[path] = module(x)
    one = model.adversaries[game]
    codes = rows.memberships[one.factor].position
    return one(activations, codes, torch.tensor(strength).double()), activations, codes


def test_reversal():
    x = torch.randn(3, requires_grad=True)
    y = reverse_gradient(x, torch.tensor(2.5))
    assert torch.equal(x, y)
    (y * torch.tensor([1.0, 2, 3])).sum().backward()
    torch.testing.assert_close(x.grad, -2.5 * torch.tensor([1.0, 2, 3]))


@pytest.mark.parametrize("strength", [0.0, 1.0, 5.0])
def test_the_network_gets_the_gradient_reversed_and_the_adversary_as_it_is(strength):
    model, source = bind(Adversary("site", taps=["1", "3"], hidden=(6,)))
    played, activations, codes = play(model, source.all(), strength)
    (game,) = model.adversaries
    seen = torch.cat([activations["1"], activations["3"]], -1)
    plain = cross_entropy(game.classifier(seen), codes)
    torch.testing.assert_close(played.cross_entropy, plain)
    assert played.accuracy == (game.classifier(seen).argmax(-1) == codes).double().mean()

    reversed_, ordinary = (net_gradient(model, one) for one in (played.cross_entropy, plain))
    for name in reversed_:
        torch.testing.assert_close(reversed_[name], -strength * ordinary[name])
    assert (ordinary["0.weight"] != 0).any()
    assert (ordinary["2.weight"] != 0).any()
    own = list(game.classifier.parameters())
    for one, other in zip(
        torch.autograd.grad(played.cross_entropy, own, retain_graph=True),
        torch.autograd.grad(plain, own),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("tap", "reached"), [("1", {"0"}), ("2", {"0", "2"}), ("3", {"0", "2"}), ("0", {"0"})]
)
def test_the_gradient_reaches_what_is_before_the_tap(tap, reached):
    model, source = bind(Adversary("site", taps=[tap]))
    played, _, _ = play(model, source.all())
    gradient = net_gradient(model, played.cross_entropy)
    assert {name.split(".")[0] for name, g in gradient.items() if (g != 0).any()} == reached


def test_in_the_objective_the_game_is_added_with_the_networks_gradient_reversed():
    game = Adversary("site", taps=["1", "3"], weight=3.0)
    model, source = bind(game)
    guide = StructuredGuide(model, source)
    rows, losses, gradients = source.all(), {}, {}
    for progress in (0.0, 0.25, 0.5, 1.0):
        torch.manual_seed(2)
        losses[progress] = Objective(model, guide)(rows, progress)
        gradients[progress] = net_gradient(model, losses[progress].total)
    played, _, _ = play(model, rows)
    torch.testing.assert_close(losses[1.0].adversarial, played.cross_entropy)
    torch.testing.assert_close(losses[1.0].total, losses[1.0].adversarial - losses[1.0].elbo)
    assert losses[1.0].accuracy.tolist() == [played.accuracy.item()]
    minus = net_gradient(model, played.cross_entropy)
    for progress, strength in [(0.25, 0.75), (0.5, 1.5), (1.0, 3.0)]:
        for name, gradient in gradients[progress].items():
            added = gradient - gradients[0.0][name]
            torch.testing.assert_close(added, strength * minus[name])


def test_the_strength_rises_linearly_during_the_warm_up_and_then_stays():
    game = Adversary("site", taps=["1"], weight=2.0)
    shares = (0, 0.25, 0.5, 1, 1.5)
    assert [game.strength(share) for share in shares] == [0, 0.5, 1, 2, 2]


@pytest.mark.parametrize(
    ("settings", "epoch", "steps", "expected"),
    [
        ({}, 1, 20_000, 5),
        ({}, 98, 20_000, 490),
        ({}, 1000, 20_000, 2000),  # a tenth of the steps
        ({"warmup_epochs": 2.5}, 3, 20_000, 8),
        ({"warmup": 1.0, "warmup_epochs": 50}, 10, 200, 200),
        ({"warmup": 0.0}, 10, 200, 0),
        ({"warmup_epochs": 0.0}, 10, 200, 0),
    ],
)
def test_the_warm_up_is_measured_in_epochs_up_to_a_share_of_the_steps(
    settings, epoch, steps, expected
):
    game = Adversary("site", taps=["1"], **settings)
    assert game.warmup_steps(epoch, steps) == expected


def test_several_adversaries_warm_up_each_at_its_own_pace():
    games = [Adversary("site", taps=["1"], weight=2.0), Adversary("batch", taps=["1"], weight=5.0)]
    model, source = bind(*games)
    guide, rows, gradients = StructuredGuide(model, source), source.all(), {}
    for shares in [(0.0, 0.0), (0.5, 1.0)]:
        torch.manual_seed(2)
        loss = Objective(model, guide)(rows, torch.tensor(shares))
        gradients[shares] = net_gradient(model, loss.total)
    played = [net_gradient(model, play(model, rows, game=n)[0].cross_entropy) for n in (0, 1)]
    for name, gradient in gradients[0.5, 1.0].items():
        added = gradient - gradients[0.0, 0.0][name]
        torch.testing.assert_close(added, 1.0 * played[0][name] + 5.0 * played[1][name])


def test_an_automatic_weight_has_no_strength_before_a_fit():
    with pytest.raises(ValueError, match="'auto', which fit"):
        Adversary("site", taps=["1"], weight="auto").strength(1.0)


def test_the_game_is_no_part_of_the_density():
    with_, source = bind(Adversary("site", taps=["1"]), Adversary("batch", taps=["3"]))
    without, plain = bind(linear_effects=False)
    torch.manual_seed(0)
    trace = poutine.trace(without).get_trace(plain)
    again = poutine.trace(poutine.replay(with_, trace=trace)).get_trace(source)
    assert again.log_prob_sum().item() == trace.log_prob_sum().item()
    assert {name for name, node in again.nodes.items() if node["type"] == "sample"} == {
        name for name, node in trace.nodes.items() if node["type"] == "sample"
    }
    assert not any("classifier" in name or "adversar" in name for name in again.nodes)


def test_several_adversaries_on_several_factors():
    model, source = bind(
        Adversary("site", taps=["1"]), Adversary("batch", taps=["1", "3"], hidden=())
    )
    site, batch = model.adversaries
    assert [p.shape for p in batch.classifier.parameters()] == [(3, 9), (3,)]
    assert [p.shape for p in site.classifier.parameters()] == [(32, 5), (32,), (4, 32), (4,)]
    assert all(p.dtype == torch.float64 for p in batch.parameters())
    loss = Objective(model, StructuredGuide(model, source))(source.all())
    both = [play(model, source.all(), game=game)[0] for game in (0, 1)]
    torch.testing.assert_close(loss.adversarial, both[0].cross_entropy + both[1].cross_entropy)
    assert loss.accuracy.tolist() == [one.accuracy.item() for one in both]


@pytest.mark.parametrize("dense_up_to", [0, 100])
def test_the_game_in_a_mini_batch_uses_the_rows_own_clusters(dense_up_to):
    model, source = bind(Adversary("batch", taps=["3"]))
    index = torch.tensor([5, 17, 44, 20, 1])
    rows = source.batch(index, dense_up_to=dense_up_to)
    loss = Objective(model, StructuredGuide(model, source))(rows)
    logits = model.adversaries[0].classifier(model.net[:4](rows.x))
    expected = cross_entropy(logits, source.codes["batch"][index])
    torch.testing.assert_close(loss.adversarial, expected.detach())


def test_feature_maps_are_pooled():
    class Convolutional(nn.Module):
        def __init__(self):
            super().__init__()
            self.maps = nn.Conv2d(1, 4, 3)
            self.head = nn.Linear(4, 1)

        def forward(self, x):
            return self.head(torch.relu(self.maps(x)).mean((2, 3)))

    data = make_data((1, 6, 6))
    model, source = bind(Adversary("site", taps=["maps"]), net=Convolutional(), data=data)
    rows, (game,) = source.all(), model.adversaries
    loss = Objective(model, StructuredGuide(model, source))(rows)
    logits = game.classifier(model.net.maps(rows.x).mean((2, 3)))
    expected = cross_entropy(logits, rows.memberships["site"].position)
    torch.testing.assert_close(loss.adversarial.float(), expected.detach())


def test_training_makes_clusters_unreadable():
    """Against a fixed adversary's game, reversed steps raise its cross-entropy."""
    model, source = bind(Adversary("site", taps=["1"]))
    rows, net = source.all(), model.net
    optimiser = torch.optim.SGD(net.parameters(), lr=0.5)
    start = play(model, rows)[0].cross_entropy.item()
    for _ in range(20):
        optimiser.zero_grad()
        play(model, rows)[0].cross_entropy.backward()
        optimiser.step()
    assert play(model, rows)[0].cross_entropy.item() > start


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"taps": []}, "at least one module path"),
        ({"taps": ["1"], "weight": -1.0}, "must not be negative, not -1"),
        ({"taps": ["1"], "warmup": 2.0}, "from 0 to 1, not 2"),
        ({"taps": ["1"], "weight": "most"}, "a number or 'auto', not 'most'"),
        ({"taps": ["1"], "weight": float("nan")}, "not nan"),
        ({"taps": ["1"], "warmup_epochs": -1.0}, "at least 0, not -1"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        Adversary("site", **arguments)


def test_unknown_names():
    with pytest.raises(ValueError, match=r"no module '11' \(nearest: '1'\)"):
        bind(Adversary("site", taps=["11"]))
    with pytest.raises(ValueError, match=r"grouping factor 'siet'.*'site'"):
        bind(Adversary("siet", taps=["1"]))
    game = Adversary("site", taps=["1"])
    with pytest.raises(ValueError, match="when its model is bound"):
        game.logits({"1": torch.zeros(1, 1)}, torch.ones(()))


def test_settings_make_the_same_adversary():
    game = Adversary("site", taps=("1", "3"), weight=2, hidden=[8, 4], warmup=0.2)
    assert Adversary(**game.settings()).settings() == game.settings()
