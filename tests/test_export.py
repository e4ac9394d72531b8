"""Fits as torch modules and files, checked against their predictions."""

import numpy as np
import pytest
import torch
from torch import nn

from armed_pyro import ClusteredData, MixedEffects, Schedule, Slopes, fit

ROWS, SITES = 90, 6
BRIEF = Schedule(steps=40, folds=3)


def rows(family="gaussian", seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(3, 2, size=(ROWS, 2))
    site = np.arange(ROWS) % SITES
    eta = x[:, 0] - 3 + (1 + x[:, 1] - 3) * rng.normal(size=SITES)[site]
    y = {
        "gaussian": 100 + 10 * eta,
        "bernoulli": (eta > 0).astype(float),
        "categorical": np.array(["a", "b", "c"])[np.digitize(eta, [-1, 1])],
    }[family]
    return ClusteredData.from_arrays(x, y, {"site": [f"s{k}" for k in site]})


def network(outputs=1):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, outputs))


def fitted(family, net=None, terms="(1 + x1 | site)", data=None, **settings):
    data = rows(family) if data is None else data
    net = network(3 if family == "categorical" else 1) if net is None else net
    model = MixedEffects(net, terms, family, **{"between": False, **settings})
    return fit(model, data, schedule=BRIEF, progress=False), data


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "family",
    ["gaussian", pytest.param("bernoulli", marks=SLOW), pytest.param("categorical", marks=SLOW)],
)
def test_the_network_takes_raw_inputs_and_gives_expected_outcomes(family):
    result, data = fitted(family)
    expected = result.predict(
        ClusteredData.from_arrays(data.features, None, {"site": ["new"] * ROWS}),
        unseen="population",
        draws=200,
    ).expected.mean(0)
    actual = result.network(data.features.float()).numpy()
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    assert not any(m._forward_hooks for m in result.network.modules())


@pytest.mark.parametrize("linear", [pytest.param(False, marks=pytest.mark.slow), True])
def test_files_hold_the_effects_of_a_cluster(tmp_path, linear):
    net = nn.Linear(2, 1).double() if linear else None
    result, data = fitted("bernoulli", net=net, bayesian_head=linear)
    path = result.export(tmp_path / "model.pt2", clusters={"site": "s2"})
    module = torch.export.load(path).module()
    here = ClusteredData.from_arrays(data.features[:7], None, {"site": ["s2"] * 7})
    expected = result.predict(here, draws=200).expected.mean(0)
    np.testing.assert_allclose(module(data.features[:7]).numpy(), expected, atol=1e-5)
    population = result.export(tmp_path / "fixed.pt2")
    fixed = torch.export.load(population).module()(data.features[:7]).numpy()
    assert np.abs(fixed - expected).max() > 1e-2


@pytest.mark.slow
def test_a_latent_last_layer_and_images_are_exported(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (ROWS, 1, 4, 4)).astype(np.uint8)
    y = images.mean((1, 2, 3)) + rng.normal(size=ROWS)
    data = ClusteredData.from_arrays(images, y, {"site": np.arange(ROWS) % SITES})
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.Tanh(), nn.Linear(4, 1))
    result, _ = fitted("gaussian", net=net, terms="(1 | site)", data=data, bayesian_head=True)
    result.export(tmp_path / "model.pt2", clusters={"site": 3})
    loaded = torch.export.load(tmp_path / "model.pt2").module()(torch.from_numpy(images))
    assert loaded.shape == (ROWS,)


def test_named_inputs_are_one_dict(tmp_path):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(5, 1)

        def forward(self, image, age):
            return self.head(torch.cat([image.flatten(1), age], 1))

    rng = np.random.default_rng(0)
    arrays = {"image": rng.normal(size=(ROWS, 2, 2)), "age": rng.normal(size=(ROWS, 1))}
    arrays = {name: values.astype(np.float32) for name, values in arrays.items()}
    y = arrays["age"][:, 0] + rng.normal(size=ROWS)
    data = ClusteredData.from_arrays(arrays, y, {"site": np.arange(ROWS) % SITES})
    result, _ = fitted("gaussian", net=Both(), terms="(1 | site)", data=data)
    path = result.export(tmp_path / "model.pt2")
    module = torch.export.load(path).module()
    few = {name: torch.from_numpy(values[:5]) for name, values in arrays.items()}
    np.testing.assert_allclose(module(few), result.network(few), atol=1e-6)


def test_what_cannot_be_exported_is_said(tmp_path):
    result, _ = fitted("gaussian", terms=["(1 | site)", Slopes("site", on="1")])
    with pytest.raises(ValueError, match="the chosen clusters act on hidden layers"):
        result.export(tmp_path / "model.pt2", clusters={"site": "s1"})
    with pytest.raises(ValueError, match=r"must end in \.pt2 or \.onnx, found 'model\.bin'"):
        result.export(tmp_path / "model.bin")
    with pytest.raises(ValueError, match="no random effects of 'batch'"):
        result.export(tmp_path / "model.pt2", clusters={"batch": 1})
