"""Concrete networks, networks by name, and networks from a user's file."""

import pytest
import torch
from torch import nn

from armed_pyro.models.autoencoder import AutoencoderClassifier, autoencoder_program
from armed_pyro.models.convolutional import block_paths, convolutional, convolutional_program
from armed_pyro.models.dense import dense
from armed_pyro.models.linear import linear
from armed_pyro.networks.by_name import hidden_activations, network


def test_linear_is_float64_and_starts_at_zero():
    net = linear(3, 2)
    assert net.weight.dtype == torch.float64
    assert net(torch.ones(5, 3, dtype=torch.float64)).tolist() == [[0.0, 0.0]] * 5


@pytest.mark.filterwarnings("error")
def test_linear_needs_no_features():
    assert linear(0)(torch.zeros(4, 0, dtype=torch.float64)).shape == (4, 1)


def test_dense_has_linear_output_and_relu_paths():
    net = dense(3, 2, hidden=(8, 4))
    assert [type(one) for one in net] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    assert net(torch.zeros(5, 3)).shape == (5, 2)
    assert hidden_activations(net) == ("1", "3")


@pytest.mark.parametrize("net", [linear(3, 2), dense(3, 2, hidden=(5,))])
def test_a_network_is_made_again_from_its_record(net):
    record = net.armed_pyro_network
    again = network(record["name"], **record["arguments"])
    assert str(again) == str(net)
    assert again.armed_pyro_network == record


def test_dense_errors():
    with pytest.raises(ValueError, match="at least one feature"):
        dense(0)
    with pytest.raises(ValueError, match="positive widths"):
        dense(2, hidden=())
    with pytest.raises(ValueError, match="positive widths"):
        dense(2, hidden=(8, 0))


def test_initial_weights_follow_the_seed_and_leave_the_generator_alone():
    before = torch.get_rng_state()
    one, same, other = (network("dense", 2, seed=seed)[0].weight for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(before, torch.get_rng_state())


def test_unknown_networks():
    with pytest.raises(ValueError, match=r"no network 'dens'\. Did you mean 'dense'\?.*FILE\.py"):
        network("dens", 2)
    with pytest.raises(ValueError, match="cannot be made"):
        network("linear", 2, hidden=(8,))


OWN = """
from dataclasses import dataclass
import torch
from torch import nn
from neighbour import WIDTH

@dataclass
class Settings:
    width: int = 4

class Net(nn.Module):
    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.one = nn.Linear(n_features, WIDTH)
        self.two = nn.Linear(WIDTH, n_outputs)

    def forward(self, x):
        return self.two(torch.relu(self.one(x)))

def pair(first, second):
    return nn.Linear(first, second)

def only(n_features, depth=3):
    return nn.Linear(n_features, 1)

def ready(width=3):
    return nn.Linear(width, 1)

instance = nn.Linear(3, 1)
number = 3

def needs(more, than, two):
    return None

def fails(n_features):
    raise KeyError("no such thing")

def wrong():
    return 3
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "neighbour.py").write_text("WIDTH = 6\n")
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


@pytest.mark.parametrize("name", ["Net", "pair", "only", "ready", "instance"])
def test_own_networks(own, name):
    assert network(f"{own}:{name}", 3, 1)(torch.zeros(5, 3)).shape == (5, 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("number", "gives a int, expected a torch.nn.Module"),
        ("needs", "expected none, or \\(n_features, n_outputs\\)"),
        ("fails", "failed in line 36: KeyError: 'no such thing'"),
        ("wrong", "gives a int"),
        ("net", "no name in .*own.py 'net'. Did you mean 'Net'"),
        ("", "expected FILE.py:NAME"),
    ],
)
def test_own_network_errors(own, name, message):
    with pytest.raises(ValueError, match=message):
        network(f"{own}:{name}", 3, 1)


def test_own_file_errors(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        network(f"{tmp_path}/none.py:Net", 3)
    with pytest.raises(ValueError, match=r"expected FILE\.py:NAME"):
        network(f"{tmp_path}/none.py", 3)
    broken = tmp_path / "broken.py"
    broken.write_text("import torch\ndef (:\n")
    with pytest.raises(ValueError, match="cannot be loaded: SyntaxError"):
        network(f"{broken}:Net", 3)
    broken.write_text("import torch\nimport no_such_module\n")
    with pytest.raises(ValueError, match="in line 2: ModuleNotFoundError"):
        network(f"{broken}:Net", 3)


def test_hidden_activations(own):
    # Functions instead of modules: the linear layers but the last.
    assert hidden_activations(network(f"{own}:Net", 3)) == ("one",)
    tail = nn.Sequential(nn.Linear(2, 4), nn.GELU(), nn.Linear(4, 1), nn.Softplus())
    assert hidden_activations(tail) == ("1",)
    with pytest.raises(ValueError, match="hidden layers"):
        hidden_activations(linear(3))


# --- networks of images ---------------------------------------------------------------------------


def kinds(module):
    return [type(one).__name__ for one in module.modules() if not list(one.children())]


def test_the_papers_convolutional_network():
    net = convolutional((1, 64, 64)).eval()
    blocks = block_paths(net)
    assert blocks == tuple(f"block{number}" for number in range(1, 8))
    for number, path in enumerate(blocks, 1):
        layers = ["Conv2d", "BatchNorm2d", "PReLU"]
        # 64 pixels can be halved six times.
        layers += ["MaxPool2d"] * (number <= 6) + ["Dropout"] * (number % 2 == 0)
        assert kinds(net.get_submodule(path)) == layers
        assert net.get_submodule(path)[0].kernel_size == (3, 3)
    assert net.hidden[0].out_features == 512
    assert net(torch.zeros(2, 1, 64, 64)).shape == (2, 1)
    program = convolutional_program("site")
    (game,) = program.adversaries
    assert game.taps == blocks
    assert [str(one) for one in program.terms] == ["(1 | site)", "Slopes('site', on='hidden')"]
    assert program.family.name == "bernoulli"


def test_a_convolutional_network_of_any_size():
    net = convolutional((3, 5, 9), 4, widths=(2, 3, 4, 5), units=6)
    assert net(torch.zeros(2, 3, 5, 9)).shape == (2, 4)
    assert net.flat(net[:4](torch.zeros(2, 3, 5, 9))).shape == (2, net.hidden[0].in_features)
    program = convolutional_program("g", (1, 8, 8), 3, widths=(2,), units=2, adversary_weight=0.0)
    assert program.family.name == "categorical"
    assert program.adversaries == ()


def test_convolutional_errors():
    with pytest.raises(ValueError, match=r"\(channels, height, width\), not \(64, 64\)"):
        convolutional((64, 64))
    with pytest.raises(ValueError, match="positive numbers of filters"):
        convolutional((1, 8, 8), widths=())
    with pytest.raises(ValueError, match="positive numbers of filters"):
        convolutional((1, 8, 8), widths=(4, 0))


def test_the_papers_autoencoder_classifier():
    net = AutoencoderClassifier((1, 64, 64)).eval()
    convolutions = [one for one in net.encoder.modules() if isinstance(one, nn.Conv2d)]
    assert [(one.kernel_size, one.stride) for one in convolutions] == [((4, 4), (2, 2))] * 3
    x = torch.randn(2, 1, 64, 64)
    z = net.latents(net.encoder(x))
    assert z.shape == (2, 56)
    assert net.decoder(z).shape == x.shape
    torch.testing.assert_close(net(x), net.classifier(z))
    # Effects come after instance normalisation.
    norms = [name for name, one in net.named_modules() if isinstance(one, nn.InstanceNorm2d)]
    program = autoencoder_program("batch")
    assert [term.at for term in program.terms if hasattr(term, "at")] == norms
    (game,) = program.adversaries
    assert game.taps == ("encoder.conv1", "encoder.conv2", "encoder.conv3")
    (image,) = program.others
    assert (image.at, image.weight) == ("decoder", 1 / 4096)


def test_an_autoencoder_of_any_size():
    net = AutoencoderClassifier((2, 8, 12), 3, widths=(3, 4), latents=5)
    x = torch.randn(2, 2, 8, 12)
    assert net(x).shape == (2, 3)
    assert net.decoder(torch.zeros(2, 5)).shape == x.shape


def test_autoencoder_errors():
    with pytest.raises(ValueError, match=r"multiples of 8, not 20 and 16; pad or crop"):
        AutoencoderClassifier((1, 20, 16))
    with pytest.raises(ValueError, match="must be one or more positive numbers"):
        AutoencoderClassifier((1, 8, 8), widths=(2,), latents=0)
    with pytest.raises(ValueError, match=r"\(channels, height, width\)"):
        AutoencoderClassifier((8, 8))
