"""Networks as users bring them: taps that are right, frozen parts, outputs that are told of."""

import re
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from armed_pyro import Adversary, ClusteredData, MixedEffects, Schedule, Slopes, fit
from armed_pyro.networks.tap import Tap, channel_axis
from armed_pyro.networks.taps import run
from armed_pyro.program.units import original_covariance, original_variances

ROWS, SITES = 120, 6
BRIEF = Schedule(steps=30, folds=1)


class Attention(nn.Module):
    """Tokens "rows tokens 3" to one output, through a layer norm; returns a dict."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(3, 8)
        self.mix = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        h = self.up(x)
        h = self.norm(h + self.mix(h, h, h)[0])
        return {"hidden": h, "logits": self.head(h[:, 0])}


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Residual(nn.Module):
    """One ReLU that runs twice, after convolutions with a frozen batch normalisation."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv1d(3, 5, 3, padding=1), nn.Conv1d(5, 5, 3, padding=1)
        self.bn, self.relu, self.head = nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 1)

    def forward(self, x):
        h = self.relu(self.bn(self.one(x.mT)))
        return self.head(self.relu(h + self.two(h)).mean(-1))


def tokens(seed=0, family="gaussian"):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(ROWS, 7, 3)).astype(np.float32)
    site = np.arange(ROWS) % SITES
    y = x[:, 0, 0] + rng.normal(size=SITES)[site] + 0.3 * rng.normal(size=ROWS)
    y = (y > 0).astype(float) if family == "bernoulli" else y
    return ClusteredData.from_arrays(x, y, {"site": site})


def record(net, text, x=None):
    x = torch.randn(4, 7, 3) if x is None else x
    with torch.no_grad():
        return run(net.eval(), x, [text])[1][text]


def test_taps_are_pooled_over_tokens_not_over_features():
    net, x = Attention(), torch.randn(4, 7, 3)
    hidden = net.eval()(x)["hidden"]
    torch.testing.assert_close(record(net, "norm", x), hidden.mean(1))
    torch.testing.assert_close(record(net, "norm:first", x), hidden[:, 0])
    torch.testing.assert_close(record(net, "norm:last", x), hidden[:, -1])
    torch.testing.assert_close(record(net, "norm:max", x), hidden.amax(1))
    assert record(net, "mix[1]", x).shape == (4, 7)  # attention weights, channels unknown
    assert record(net, "mix", x).shape == (4, 8)


def test_taps_of_tuples_and_of_calls():
    x = torch.randn(4, 7, 3)
    lstm = Recurrent()
    torch.testing.assert_close(record(lstm, "lstm[0]:last", x), lstm.lstm(x)[0][:, -1])
    torch.testing.assert_close(record(lstm, "lstm", x), lstm.lstm(x)[0].mean(1))
    net = Residual().eval()
    first = net.relu(net.bn(net.one(x.mT)))
    torch.testing.assert_close(record(net, "relu#1", x), first.mean(-1))
    second = net.relu(first + net.two(first))
    torch.testing.assert_close(record(net, "relu#2", x), second.mean(-1))
    torch.testing.assert_close(record(net, "relu", x), second.mean(-1))


@pytest.mark.parametrize(
    ("net", "path", "shape", "axis"),
    [
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()), "1", (2, 4, 6, 6), 1),
        (nn.Sequential(nn.Linear(3, 4), nn.GELU()), "1", (2, 5, 4), -1),
        (nn.Sequential(nn.Linear(3, 5), nn.GELU()), "1", (2, 5, 7, 7), 1),  # the width decides
        (nn.Sequential(nn.Linear(3, 5), nn.GELU()), "", (2, 7, 5), -1),
        (nn.TransformerEncoderLayer(8, 2), "", (2, 5, 8), -1),
        (nn.Sequential(nn.ReLU(), nn.Linear(3, 5)), "0", (2, 3, 9), 1),  # nothing before it
    ],
)
def test_channels_lie_where_the_last_layer_puts_them(net, path, shape, axis):
    assert channel_axis(net, path, torch.zeros(shape)) == axis


def test_masked_tokens_do_not_count():
    values = torch.tensor([[[1.0], [3.0], [9.0]]])
    mask = torch.tensor([[1, 1, 0]])
    assert Tap("h", pool="masked").pooled(values, -1, mask).tolist() == [[2.0]]
    with pytest.raises(ValueError, match=r"averaged over the tokens of a mask.*found None"):
        Tap("h", pool="masked").pooled(values, -1)
    with pytest.raises(ValueError, match="pooled by 'middle', but must be one of mean, max"):
        Slopes("site", on="h", pool="middle")
    with pytest.raises(ValueError, match="without a single axis of tokens"):
        Tap("h", pool="last").pooled(torch.zeros(1, 2, 3, 3), 1)


def test_an_adversary_on_a_layer_norm_reads_features():
    data = tokens()
    model = MixedEffects(
        Attention(), "(1 | site)", adversary=Adversary("site", ["norm"]), output="logits"
    )
    bound = model.bind(data)
    activations = bound.run_network(bound.encode(data).all())[1]["norm"]
    assert activations.shape == (ROWS, 8)
    assert float(activations.std(0).min()) > 1e-3


def test_slopes_on_a_chosen_tensor_are_fitted_saved_and_loaded(tmp_path):
    data = tokens()
    terms = ["(1 | site)", Slopes("site", on="lstm[0]", pool="last")]
    result = fit(MixedEffects(Recurrent(), terms), data, schedule=BRIEF, progress=False)
    assert "lstm[0][3]" in set(result.variance_components()["term"])
    result.save(tmp_path)
    loaded = type(result).load(tmp_path, Recurrent())
    np.testing.assert_array_equal(loaded.predict(data).expected, result.predict(data).expected)


def test_a_module_that_runs_twice_must_be_named_by_call():
    net, data = Residual(), tokens()
    with pytest.raises(ValueError, match=r"runs its module 'relu' 2 times: name the call, from"):
        MixedEffects(net, Slopes("site", on="relu")).bind(data)
    MixedEffects(net, Slopes("site", on="relu#1")).bind(data)
    with pytest.raises(ValueError, match="never runs its module 'relu#3'"):
        MixedEffects(net, Slopes("site", on="relu#3")).bind(data)


def test_a_tap_without_variance_is_refused():
    net = nn.Sequential(nn.Flatten(), nn.Linear(21, 4), nn.ReLU(), nn.Linear(4, 1))
    with torch.no_grad():
        net[1].bias -= 1e3
    with pytest.raises(ValueError, match=r"'2', of 4 units, is the same in 64 training rows"):
        MixedEffects(net, adversary=Adversary("site", ["2"])).bind(tokens())


def test_torchscript_is_an_error_that_says_what_to_pass():
    scripted = torch.jit.trace(nn.Sequential(nn.Linear(3, 1)), torch.zeros(2, 3))
    data = ClusteredData.from_arrays(
        np.eye(3)[np.arange(9) % 3], np.arange(9.0), {"site": [0, 1, 2] * 3}
    )
    with pytest.raises(ValueError, match="compiled by TorchScript"):
        MixedEffects(scripted, Slopes("site", on="0")).bind(data)


@pytest.mark.parametrize("how", ["parameters", "mode"])
def test_frozen_parts_stay_in_evaluation_mode(how):
    net = Residual()
    net.bn.running_mean.fill_(1.0)
    if how == "parameters":
        net.bn.requires_grad_(False)
    else:
        net.bn.eval()
    result = fit(MixedEffects(net, "(1 | site)"), tokens(), schedule=BRIEF, progress=False)
    trained = result.model.network
    assert (trained.bn.running_mean == 1).all()
    assert not torch.equal(trained.one.weight, net.one.weight)
    other = fit(MixedEffects(Residual(), "(1 | site)"), tokens(), schedule=BRIEF, progress=False)
    assert not (other.model.network.bn.running_mean == 0).all()


@pytest.mark.parametrize("last", [nn.Sigmoid(), nn.Softmax(-1), None])
def test_probabilities_taken_for_logits_are_told(last):
    width = 2 if isinstance(last, nn.Softmax) else 1
    layers = [nn.Flatten(), nn.Linear(21, width), *([] if last is None else [last])]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        MixedEffects(nn.Sequential(*layers), "(1 | site)", "bernoulli").bind(
            tokens(family="bernoulli")
        )
    ends = [str(w.message) for w in told if "applies its own link" in str(w.message)]
    assert bool(ends) == (last is not None)
    if ends:
        assert f"ends in a {type(last).__name__.lower()}" in ends[0]


def test_two_outputs_of_a_binary_outcome_are_the_difference_of_logits():
    data = tokens(family="bernoulli")
    net = nn.Sequential(nn.Flatten(), nn.Linear(21, 2))
    with pytest.warns(UserWarning, match="difference, second minus first, is the predictor"):
        bound = MixedEffects(net, "(1 | site)", "bernoulli").bind(data)
    rows = bound.encode(data).all()
    logits = net(rows.x).double()
    eta = bound.predictor(rows, {}).eta
    center = torch.tensor(bound.data_facts().center, dtype=torch.float64)
    torch.testing.assert_close(eta[:, 0], center + logits[:, 1] - logits[:, 0])


def test_a_column_of_outcomes_is_the_outcome():
    x, y = np.arange(12.0)[:, None], np.arange(12.0) ** 0.5
    site = {"site": [0, 1, 2] * 4}
    column = ClusteredData.from_arrays(x, y[:, None], site)
    assert torch.equal(column.outcome, ClusteredData.from_arrays(x, y, site).outcome)
    wide = ClusteredData.from_arrays(x, np.stack([y, y], 1), site)
    with pytest.raises(ValueError, match=r"needs one outcome per row, found the shape \(12, 2\)"):
        MixedEffects(nn.Linear(1, 1), "(1 | site)").bind(wide)


def test_paths_of_files_are_no_categories():
    table = pd.DataFrame({"y": range(30), "site": list("abc") * 10})
    table["scan"] = [f"scans/{n % 15}.nii.gz" for n in range(30)]
    with pytest.raises(ValueError, match=r"'scan' holds paths of files.*from_dataset"):
        ClusteredData.from_frame(table, outcome="y", clusters=["site"], features=["scan"])
    table["scan"] = [f"dose 1.{n % 5}" for n in range(30)]  # a point is no extension
    ClusteredData.from_frame(table, outcome="y", clusters=["site"], features=["scan"])


def test_class_weights_are_told_and_their_offset_corrects_them():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(4000, 1)), (rng.random(4000) < 0.04).astype(float)
    site = rng.integers(20, size=4000)
    weights = np.where(y == 1, 10.0, 1.0)
    options = {"weights": weights * len(y) / weights.sum()}
    plain = ClusteredData.from_arrays(x, y, {"site": site}, **options)
    net = nn.Linear(1, 1).double()
    model = MixedEffects(net, "(1 | site)", "bernoulli", bayesian_head=True)
    with pytest.warns(UserWarning, match=r"class weights.*P\(y = 1.0\) will be 0\.2.*= 2\.303"):
        model.bind(plain)
    shifted = replace(plain, offset=torch.full((4000,), np.log(10.0)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = fit(model, shifted, schedule=Schedule(steps=300), progress=False)
    new = replace(plain, offset=torch.zeros(4000), weights=None)
    predicted = result.predict(new).expected.mean()
    se = (y.mean() * (1 - y.mean()) / len(y)) ** 0.5
    assert abs(predicted - y.mean()) < 3 * se


def test_images_of_whole_numbers_are_scaled_by_the_training_rows(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 4000, (ROWS, 2, 4, 4)).astype(np.uint16)
    images[:, 1] = 7
    site = {"site": np.arange(ROWS) % SITES}
    y = images[:, 0].mean((1, 2)) / 300 + rng.normal(size=SITES)[site["site"]]
    data = ClusteredData.from_arrays(images, y, site)
    net = nn.Sequential(nn.Flatten(), nn.Linear(32, 1))
    result = fit(MixedEffects(net, "(1 | site)"), data, schedule=BRIEF, progress=False)
    assert result.history.loss[0] < 10
    x = result.model.encode(data).x
    assert x.dtype == torch.float32
    np.testing.assert_allclose(x[:, 0].mean(), 0, atol=1e-4)
    np.testing.assert_allclose(x[:, 0].std(), 1, atol=1e-3)
    assert (x[:, 1] == 0).all()
    result.save(tmp_path)
    loaded = type(result).load(tmp_path, net)
    few = data.take([3, 5, 8])
    assert torch.equal(loaded.model.encode(few).x, x[[3, 5, 8]])
    floats = ClusteredData.from_arrays((images[:, :1] / 4000).astype(np.float32), y, site)
    bound = MixedEffects(nn.Sequential(nn.Flatten(), nn.Linear(16, 1)), "(1 | site)").bind(floats)
    assert torch.equal(bound.encode(floats).x, floats.features)  # as the user scaled them


def test_arrays_are_not_copied(tmp_path):
    memory = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.uint8, (ROWS, 1, 4, 4))
    memory[:] = 3
    memory[1] = 9
    memory.flush()
    images = np.load(tmp_path / "x.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = ClusteredData.from_arrays(images, np.arange(ROWS), {"site": np.arange(ROWS) % 5})
    assert data.features.dtype == torch.uint8
    assert data.features.data_ptr() == images.ctypes.data


def test_variances_of_independent_slopes_need_no_matrices():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden = nn.Sequential(nn.Linear(3, 2048), nn.ReLU())
            self.head = nn.Linear(2048, 1)

        def forward(self, x):
            return self.head(self.hidden(x))

    data = ClusteredData.from_arrays(
        np.random.default_rng(0).normal(size=(60, 3)), np.arange(60.0), {"site": np.arange(60) % 6}
    )
    (factor,) = MixedEffects(Wide(), Slopes("site", on="hidden")).bind(data).factors
    assert factor.diagonal
    latents = {"site_sd": torch.rand(4000, 1, 2048)}
    # The matrices of all draws would need 134 GB.
    variances = original_variances(factor, latents)
    few = {"site_sd": latents["site_sd"][:2]}
    expected = original_covariance(factor, few).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(variances[:2], expected)


def test_an_unknown_element_is_named():
    with pytest.raises(ValueError, match=re.escape("no element 'logit': it is a dict of")):
        MixedEffects(Attention(), "(1 | site)", output="logit").bind(tokens())
