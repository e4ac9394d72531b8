"""``MixedEffects(linear_effects=...)``: latent linear effects of the features beside a network."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from armed_pyro import Adversary, ClusteredData, Fit, MixedEffects, Priors, Schedule, fit
from armed_pyro.checks.simulation import held
from armed_pyro.models.dense import dense
from armed_pyro.models.linear import linear
from armed_pyro.program.fixed_prior import describe
from armed_pyro.program.linear_effects import MOST_FEATURES

SHORT = Schedule(steps=60, folds=2)


def table(seed=0, clusters=12, rows=8, scale=(1.0, 20.0), first=0):
    """Slopes of 1 and 0.1, and intercepts and residuals of sd 1 and 0.5."""
    rng = np.random.default_rng(seed)
    g = np.repeat(np.arange(clusters), rows)
    x = rng.normal(size=(len(g), 2)) * scale + 3
    y = x[:, 0] + 0.1 * x[:, 1] + rng.normal(size=clusters)[g] + 0.5 * rng.normal(size=len(g))
    frame = pd.DataFrame({"y": y, "a": x[:, 0], "b": x[:, 1], "g": [f"g{first + k}" for k in g]})
    return ClusteredData.from_frame(frame, outcome="y", clusters=["g"])


def program(net=None, family="gaussian", **options):
    torch.manual_seed(0)
    net = dense(2, hidden=(6,)) if net is None else net
    return MixedEffects(net, "(1 | g)", family, **options)


@pytest.fixture(scope="module")
def result():
    return fit(program(), table(), schedule=SHORT, progress=False)


def test_the_predictor_is_the_network_and_the_features():
    model = program(priors=Priors(fixed_sd=3.0)).bind(table())
    rows = model.encode(table()).all()
    assert model.fixed_terms() == ("linear(a)", "linear(b)")
    beta = torch.tensor([[[0.5, -2.0]]]).double()
    with torch.no_grad():
        output, _ = model.run_network(rows)
        eta = model.predictor(rows, {"fixed_effect": beta[0]}).fixed
    facts = model.data_facts()
    expected = facts.center[0] + facts.spread * (output.double() + rows.x @ beta[0].mT)
    torch.testing.assert_close(eta.reshape(-1, 1), expected)


@pytest.mark.parametrize("features", [1, 4, 25])
def test_the_prior_of_all_effects_together_does_not_depend_on_their_number(features):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, features)), rng.normal(size=60)
    data = ClusteredData.from_arrays(x, y, {"g": np.arange(60) // 5})
    model = program(dense(features, hidden=(3,)), priors=Priors(fixed_sd=1.5)).bind(data)
    sd = model.fixed_prior().stddev
    assert float(sd.square().sum()) == pytest.approx(1.5**2)
    assert f"Normal(0, {1.5 / features**0.5:.4g})" in describe(model)


def test_means_of_clusters_keep_their_prior_and_come_last():
    model = program(between=True).bind(table())
    assert model.fixed_terms() == ("linear(a)", "linear(b)", "between(a | g)", "between(b | g)")
    half = 2.5 * 2**-0.5
    assert model.fixed_prior().stddev.tolist() == pytest.approx([half, half, 2.5, 2.5])
    assert "of other effects Normal(0, 2.5)" in describe(model)


def test_each_class_has_effects_of_its_own():
    rng = np.random.default_rng(0)
    y = np.array(["u", "v", "w"])[rng.integers(3, size=60)]
    x, g = rng.normal(size=(60, 2)), np.arange(60) // 5
    data = ClusteredData.from_arrays(x, y, {"g": g}, feature_names=["a", "b"])
    model = program(dense(2, 3, hidden=(4,)), "categorical").bind(data)
    names = [f"linear({x})[{c}]" for x in "ab" for c in model.data_facts().columns]
    assert list(model.fixed_terms()) == names
    assert model.fixed_prior().stddev.numel() == len(names)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, True),
        ({"linear_effects": False}, False),
        ({"bayesian_head": True}, False),
        ({"bayesian_head": True, "linear_effects": True}, True),
        ({"adversary": Adversary("g", ["1"])}, False),
        ({"adversary": Adversary("g", ["1"]), "linear_effects": True}, True),
        ({"net": linear(2), "bayesian_head": True}, False),
        ({"net": dense(2).requires_grad_(False)}, False),
    ],
)
def test_networks_that_give_their_output_alone_have_them_by_default(options, expected):
    names = program(**options).bind(table()).data_facts().linear_names
    assert names == (("a", "b") if expected else ())


def test_images_and_many_features_have_none_by_default():
    rng = np.random.default_rng(0)
    y, g = rng.normal(size=40), {"g": np.arange(40) // 4}
    wide = ClusteredData.from_arrays(rng.normal(size=(40, MOST_FEATURES + 1)), y, g)
    images = ClusteredData.from_arrays(rng.normal(size=(40, 1, 3, 3)), y, g)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(9, 3), nn.ReLU(), nn.Linear(3, 1))
    assert not program(dense(MOST_FEATURES + 1)).bind(wide).data_facts().linear_names
    assert not program(flat).bind(images).data_facts().linear_names
    with pytest.raises(ValueError, match="there is no feature with a name"):
        program(flat, linear_effects=True).bind(images)
    with pytest.raises(ValueError, match="this one is linear itself"):
        program(linear(2), bayesian_head=True, linear_effects=True).bind(table())
    with pytest.raises(TypeError, match="linear_effects"):
        program(linear_effects="yes")


def test_effects_are_in_units_of_the_data(result):
    data, coef = table(), result.coef()
    moved = data.features.clone()
    moved[:, 1] += 10
    frame = pd.DataFrame({"a": moved[:, 0], "b": moved[:, 1], "g": data.grouping("g").labels()})
    shifted = ClusteredData.encode(frame, data.schema)
    model, scale = result.model, result.model.data_facts()
    rows = [model.encode(part).all() for part in (data, shifted)]
    with torch.no_grad():
        outputs = [model.run_network(part)[0].double() for part in rows]
    network = scale.spread * (outputs[1] - outputs[0]).mean()
    means = [result.predict(part, draws=4000).mean.mean() for part in (data, shifted)]
    assert means[1] - means[0] == pytest.approx(float(network) + 10 * coef["linear(b)"], rel=0.05)


def test_attributions_have_both_parts(result):
    found = result.attribution(data=table(), draws=400)
    data = table()
    rows = result.model.encode(data).all()
    slope = found.posterior["slope"].mean(("chain", "draw"))
    x = rows.x.mean(0, keepdim=True)
    latents = {"fixed_effect": result.posterior.draws(400)["fixed_effect"].mean(0, True)}
    point = result.model.data_facts().one_row(result.model.reference())
    for place, name in enumerate(("a", "b")):
        step = torch.zeros_like(x)
        step[0, place] = 1e-4
        ends = []
        for at in (x - step, x + step):
            at_row = type(point)(at, None, {})
            with torch.no_grad():
                output, activations = result.model.run_network(at_row)
                eta = result.model.fixed_predictor(at_row, output, activations, latents)
            ends.append(float(eta.reshape(())))
        assert float(slope.sel(feature=name).squeeze()) == pytest.approx(
            (ends[1] - ends[0]) / 2e-4, rel=0.02, abs=0.01
        )


def test_a_saved_fit_has_them_and_an_earlier_one_has_none(result, tmp_path):
    result.save(tmp_path / "new", draws=20)
    loaded = Fit.load(tmp_path / "new")
    expected = result.predict(table(), draws=20).expected
    np.testing.assert_array_equal(loaded.predict(table(), draws=20).expected, expected)
    fit(program(linear_effects=False), table(), schedule=SHORT, progress=False).save(
        tmp_path / "old", draws=20
    )
    path = tmp_path / "old" / "manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    del manifest["model"]["linear_effects"], manifest["facts"]["linear_names"]
    path.write_text(json.dumps(manifest), "utf-8")
    earlier = Fit.load(tmp_path / "old", verify=False)
    assert not earlier.model.data_facts().linear_names
    assert "fixed_effect" not in earlier.posterior.draws(2)


def test_the_summary_and_calibration_know_them(result, capsys):
    result.summary()
    printed = capsys.readouterr().out
    assert "and latent linear effects, on 2 feature(s)" in printed
    assert "Fixed effects: a network, and linear effects" in printed
    assert held(program(), table()).data_facts().linear_names == ("a", "b")
    assert not held(program(linear_effects=False), table()).data_facts().linear_names


@pytest.mark.slow
def test_a_linear_truth_is_learnt_as_by_a_linear_program():
    squares = {True: [], False: [], None: []}
    for seed in range(4):
        data = table(seed, clusters=15, rows=8, scale=(1.0, 1.0))
        test = table(100, clusters=40, rows=20, scale=(1.0, 1.0), first=100)
        truth = test.features @ torch.tensor([1.0, 0.1]).double()
        for choice in squares:
            torch.manual_seed(seed)
            net = linear(2) if choice is None else dense(2)
            options = {} if choice is None else {"linear_effects": choice}
            model = MixedEffects(net, "(1 | g)", bayesian_head=choice is None, **options)
            made = fit(model, data, seed=seed, progress=False)
            error = made.predict(test, unseen="population", draws=500).mean - truth.numpy()
            squares[choice].append(np.var(error))
    mean = {choice: np.mean(values) for choice, values in squares.items()}
    assert mean[True] < 0.7 * mean[False]
    assert mean[True] < mean[None] + 0.02
