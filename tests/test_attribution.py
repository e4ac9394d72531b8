"""Attributions: against coefficients, differences of the predictor, and known cluster effects."""

import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from armed_pyro import ClusteredData, FilterScaleBias, Fit, MixedEffects, Schedule, Slopes, fit
from armed_pyro.explain.attribution import attribution
from armed_pyro.families.simulate import mixed_model
from armed_pyro.models.dense import dense
from armed_pyro.models.linear import linear
from armed_pyro.rows.batch import Membership, Rows

SHORT = Schedule(steps=40, window=20, stages=0)


def fitted(net, random, data, family="gaussian", **settings):
    schedule = settings.pop("schedule", SHORT)
    model = MixedEffects(net, random, family, **settings)
    return fit(model, data, schedule=schedule, seed=1, refine=False, progress=False)


def by_feature(found, **settings):
    return found.table(**settings).set_index("feature")


@pytest.fixture(scope="module")
def straight():
    """A linear mixed model, whose attributions are its coefficients."""
    data, _ = mixed_model(
        "gaussian", 12, 15, sd=[1.0, 0.5], coefficients=[0, 2.0, -1.0, 0.3], dispersion=0.5
    )
    scaled = ClusteredData.from_arrays(
        data.features * torch.tensor([10.0, 1.0, 0.1]),
        data.outcome,
        {"site": data.grouping("site").labels()},
        feature_names=["dose", "age", "rate"],
    )
    schedule = Schedule(steps=200)
    head = {"bayesian_head": True, "schedule": schedule}
    return fitted(linear(3), "(1 + dose | site)", scaled, **head)


@pytest.fixture(scope="module")
def bent():
    """A network with slopes on a hidden layer, on an input and inside."""
    data, _ = mixed_model("gaussian", 6, 20, sd=[1.0, 0.5], coefficients=[0, 1.0, 1.0])
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1))
    random = ["(1 + x0 | site)", Slopes("site", on="3"), FilterScaleBias("site", at="1")]
    return fitted(net.double(), random, data)


def test_gradients_of_a_linear_model_are_its_coefficients(straight):
    found = by_feature(straight.attribution(draws=500), units="original")
    coefficients = straight.fixed_effects(draws=500).set_index("term").loc[found.index]
    for name, column in {"slope": "mean", "slope_lower": "lower", "slope_upper": "upper"}.items():
        np.testing.assert_allclose(found[name], coefficients[column], rtol=1e-5)
    np.testing.assert_allclose(found["importance"], found["slope"].abs(), rtol=1e-3)
    per_sd = by_feature(straight.attribution(draws=500)).loc[found.index]
    sds = pd.Series(straight.data.features.std(0).numpy(), straight.data.feature_names)
    np.testing.assert_allclose(per_sd["slope"], found["slope"] * sds.loc[found.index], rtol=1e-5)


def test_most_important_first_per_sd_not_per_unit(straight):
    found = straight.attribution()
    # Per unit of the feature, that with the least sd comes first.
    assert list(found.table()["feature"]) == ["dose", "age", "rate"]
    assert list(found.table(units="original")["feature"])[-1] == "dose"


def test_the_sd_of_a_random_slope_is_the_variance_component(straight):
    found = by_feature(straight.attribution(draws=400), units="original")
    table = straight.variance_components(draws=400).set_index(["term", "statistic"])
    expected = table.loc[("dose", "sd"), ["mean", "lower", "upper"]].to_numpy(float)
    names = ["site_sd", "site_sd_lower", "site_sd_upper"]
    np.testing.assert_allclose(found.loc["dose", names].to_numpy(float), expected, rtol=1e-5)
    assert (found.loc[["age", "rate"], names] == 0).all(axis=None)


def test_cluster_slopes_are_the_random_effects(straight):
    found = straight.attribution(draws=50)
    effects = straight.to_datatree(draws=50, groups=["posterior"])["posterior"]["site_effect"]
    slopes = found.posterior["site_slope"].sel(feature="dose") / found.posterior["scale"][0]
    np.testing.assert_allclose(slopes, effects.sel(site_term="dose"), rtol=1e-5)
    np.testing.assert_array_equal(found.posterior["site"], straight.data.grouping("site").levels)


@pytest.mark.parametrize("name", ["straight", "bent"])
def test_integrated_gradients_sum_to_differences_of_the_predictor(name, request):
    result = request.getfixturevalue(name)
    model = result.model
    found = result.attribution("integrated", draws=300)
    assert found.rows.dims == ("row", "feature")
    source = model.encode(result.data)
    latents = {k: v for k, v in result.draws(300).items() if k == "fixed_effect"}
    with torch.no_grad():
        rows = source.all()
        fixed = model.predictor(rows, latents).fixed.reshape(-1, len(rows)).mean(0)
        middle = replace(rows, x=rows.x.mean(0, keepdim=True).expand_as(rows.x))
        base = model.predictor(middle, latents).fixed.reshape(-1, len(rows)).mean(0)
    np.testing.assert_allclose(found.rows.sum("feature"), fixed - base, rtol=1e-5, atol=1e-6)
    # The mean over rows of a linear part's size is known.
    if name == "straight":
        x = source.x - source.x.mean(0)
        slope = result.attribution(draws=300).posterior["importance"].mean(("chain", "draw"))
        expected = x.abs().mean(0).numpy() * slope.to_numpy()
        importance = found.posterior["importance"].mean(("chain", "draw"))
        np.testing.assert_allclose(importance, expected, rtol=1e-6)


def test_slopes_of_clusters_are_derivatives_of_the_predictor(bent):
    """Of a program with effects everywhere, by differences; filters' to first order."""
    model, draws = bent.model, 3
    found = bent.attribution(draws=draws)
    latents = bent.draws(draws)
    (factor,) = model.factors
    mean = model.encode(bent.data).x.mean(0)
    everyone = {"site": Membership(torch.arange(6), torch.arange(6))}
    step = 1e-4

    def eta(shift, effects):
        rows = Rows((mean + shift).expand(6, 2), None, everyone)
        with torch.no_grad():
            return model.predictor(rows, {factor.effect_site: effects}).eta[..., 0]

    for feature in range(2):
        shift = step * torch.eye(2, dtype=torch.float64)[feature]
        # Central differences in the effects' size keep what is linear in them.
        small = step * latents[factor.effect_site]
        up = eta(shift, small) - eta(shift, -small)
        down = eta(-shift, small) - eta(-shift, -small)
        slope = (up - down) / (4 * step * step)
        expected = found.posterior["site_slope"][0, :, :, feature]
        np.testing.assert_allclose(expected, slope, rtol=1e-3, atol=1e-4)
        fixed = (eta(shift, 0 * small) - eta(-shift, 0 * small))[0, 0] / (2 * step)
        assert float(found.posterior["slope"][feature]) == pytest.approx(float(fixed), rel=1e-4)


def test_where_layers_have_slopes_the_sd_is_that_of_the_clusters(bent):
    found = bent.attribution(draws=50).posterior
    np.testing.assert_allclose(found["site_sd"], found["site_slope"].std("site", ddof=1), rtol=1e-6)


def test_point_estimates_have_no_interval(bent):
    table = bent.attribution().table()
    assert table[["importance_lower", "slope_upper"]].isna().all(axis=None)
    assert (table["site_sd_lower"] < table["site_sd_upper"]).all()
    assert table["feature"].tolist() in (["x0", "x1"], ["x1", "x0"])


def test_a_latent_last_layer_gives_intervals():
    data, _ = mixed_model("bernoulli", 6, 30, coefficients=[0, 2.0, 0.0])
    torch.manual_seed(0)
    result = fitted(dense(2, hidden=(6,)), "(1 | site)", data, "bernoulli", bayesian_head=True)
    for method in ("gradient", "integrated"):
        table = result.attribution(method, draws=100).table()
        assert (table["importance_lower"] < table["importance_upper"]).all()
        assert (table["site_sd"] == 0).all()


def test_each_class_has_a_column():
    data, _ = mixed_model("categorical", 5, 30, coefficients=[[0, 0], [1.0, 0], [0, 1.0]])
    result = fitted(linear(2, 3), "(1 + x0 | site)", data, "categorical")
    found = result.attribution(draws=20)
    assert found.posterior["site_slope"].dims == ("chain", "draw", "site", "feature", "column")
    assert len(found.table()) == 4
    weight = result.model.network.weight.detach()
    expected = (weight[1:] - weight[:1]).mT
    np.testing.assert_allclose(found.posterior["slope"], expected, rtol=1e-6)
    one = result.attribution(draws=20, columns=["2"])
    xr_one = found.posterior.sel(column=["2"])
    for name in xr_one.data_vars:
        np.testing.assert_allclose(one.posterior[name], xr_one[name])


# --- images ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures():
    """A blob in the upper left decides the outcome; one in the lower right is noise."""
    rng = np.random.default_rng(0)
    n = 200
    x = 0.1 * rng.normal(size=(n, 1, 8, 8))
    signal, other = rng.random((2, n)) < 0.5
    x[signal, :, 1:3, 1:3] += 1
    x[other, :, 5:7, 5:7] += 1
    site = np.arange(n) % 5
    data = ClusteredData.from_arrays(x.astype("float32"), signal.astype(float), {"site": site})
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 4, 2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(64, 1),
    )  # fmt: skip
    schedule = Schedule(steps=80, stages=0, net_learning_rate=0.01)
    with pytest.warns(UserWarning, match="fewer rows"):
        return fitted(net, "(1 | site)", data, "bernoulli", schedule=schedule)


@pytest.mark.parametrize("method", ["gradient", "integrated"])
def test_images_are_attributed_to_where_the_signal_is(pictures, method):
    found = pictures.attribution(method, draws=10)
    dims = ("axis_1", "axis_2", "axis_3")
    assert found.posterior["importance"].dims == dims
    assert found.posterior["importance"].shape == (1, 8, 8)
    size = np.abs(found.rows.to_numpy())
    assert size[..., :4, :4].sum() > 2 * size[..., 4:, 4:].sum()
    assert found.table()["feature"].iloc[0] in {f"0,{i},{j}" for i in range(4) for j in range(4)}


def test_grad_cam_is_its_equation(pictures):
    net, x = pictures.model.network, pictures.data.features[:5]
    maps = net[:3](x).detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(net[3:](maps).sum(), maps)
    weights = gradient.mean((2, 3), keepdim=True)
    expected = (weights * maps).sum(1, keepdim=True).clamp(min=0).detach()
    expected = nn.functional.interpolate(expected, (8, 8), mode="bilinear")[:, 0]
    found = pictures.attribution("grad_cam", data=pictures.data.take(range(5)), layer="2", draws=5)
    assert found.rows.dims == ("row", "axis_1", "axis_2")
    np.testing.assert_allclose(found.rows, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.posterior["importance"], expected.mean(0), rtol=1e-4)


def test_a_saved_fit_has_the_same_attributions(straight, tmp_path):
    straight.save(tmp_path, draws=10)
    loaded = Fit.load(tmp_path)
    found, same = (one.attribution(draws=20).posterior for one in (straight, loaded))
    for name in found.data_vars:
        np.testing.assert_allclose(found[name], same[name], rtol=1e-6)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "shap"}, "method"),
        ({"method": "grad_cam"}, "needs `layer`"),
        ({"layer": "1"}, "no other method"),
        ({"method": "grad_cam", "layer": "1"}, "needs images"),
        ({"columns": ["low"]}, "column of the predictor"),
        ({"draws": 1}, "at least 2"),
    ],
)
def test_bad_arguments_are_refused(bent, arguments, message):
    with pytest.raises(ValueError, match=message):
        attribution(bent.posterior, **arguments)


def test_bad_tables_are_refused(bent):
    found = bent.attribution("integrated", draws=5)
    with pytest.raises(ValueError, match="no original units"):
        found.table(units="original")
    for bad in ({"units": "cm"}, {"prob": 1.0}):
        with pytest.raises(ValueError, match=r"unit|prob"):
            found.table(**bad)


def test_rows_and_features_are_needed(bent):
    with pytest.raises(ValueError, match="no rows to explain"):
        attribution(bent.posterior, data=bent.data.take([]))
    data, _ = mixed_model("gaussian", 4, 10, coefficients=[0.0])
    with pytest.raises(ValueError, match="no features"):
        fitted(linear(0), "(1 | site)", data).attribution()


def test_captum_is_optional(bent, monkeypatch):
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    bent.attribution(draws=5)
    with pytest.raises(ImportError, match=r"integrated.*needs captum.*armed_pyro\[analysis\]"):
        bent.attribution("integrated", draws=5)


@pytest.mark.slow
def test_slopes_on_a_hidden_layer_tell_which_feature_varies():
    """The slope on x0 has the sd 1 over clusters, that on x1 none; the prior knows neither."""
    data, truth = mixed_model(
        "gaussian", 15, 60, sd=[0.5, 1.0], coefficients=[0, 1.0, 1.0], dispersion=0.3
    )
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    schedule = Schedule(steps=1200, stages=1, batch_size=128, net_learning_rate=0.01)
    random = ["(1 | site)", Slopes("site", on="1")]
    result = fitted(net, random, data, schedule=schedule, fixed_weight=1.0)
    found = result.attribution()
    table = by_feature(found, units="original")
    assert table.loc["x0", "site_sd"] > 4 * table.loc["x1", "site_sd"]
    assert table.loc["x0", "site_sd"] == pytest.approx(truth.effects[:, 1].std(ddof=1), rel=0.3)
    scale = float(found.posterior["scale"].sel(feature="x0"))
    slopes = found.posterior["site_slope"].sel(feature="x0").mean(("chain", "draw")) / scale
    assert np.corrcoef(slopes, truth.effects[:, 1])[0, 1] > 0.95
