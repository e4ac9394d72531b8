"""Fits as labelled data: the numbers of the posterior, and what ArviZ and NetCDF make of them."""

import datetime
import sys
import types
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
import xarray as xr
from pyro.infer import Predictive
from torch import nn

from armed_pyro import (
    Adversary,
    ClusteredData,
    HalfNormal,
    Known,
    MixedEffects,
    Priors,
    RandomEffects,
    Schedule,
    Slopes,
    fit,
)
from armed_pyro.data.xarray_names import label_values, variable_name
from armed_pyro.report import text as report_text
from armed_pyro.summaries import datatree
from armed_pyro.summaries.datatree import GROUPS, arviz_api, to_datatree

SCHEDULE = Schedule(steps=30)
DRAWS = 300


def quick(model, data, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # fewer rows than parameters
        return fit(model, data, schedule=SCHEDULE, progress=False, **options)


def make_frame(seed=0, n_clusters=5, size=8):
    rng = np.random.default_rng(seed)
    site = np.repeat(np.arange(n_clusters), size)
    n = len(site)
    x = rng.normal(3, 2, n)
    effect = rng.normal(size=(n_clusters, 2))
    y = 100 + 5 * x + 10 * effect[site, 0] + 2 * effect[site, 1] * x + rng.normal(0, 4, n)
    return pd.DataFrame({"y": y, "x": x, "site": [f"s{one}" for one in site]})


@pytest.fixture(scope="module")
def gaussian():
    """Correlated slopes on an uncentred feature, latent fixed effects, known prior scales."""
    data = ClusteredData.from_frame(make_frame(), outcome="y", clusters=["site"])
    priors = Priors(sd=HalfNormal({"Intercept": 20.0, "x": 3.0}), residual_sd=HalfNormal(7.0))
    net = nn.Linear(1, 1, dtype=torch.float64)
    model = MixedEffects(net, "(1 + x | site)", bayesian_head=True, priors=priors)
    return quick(model, data)


@pytest.fixture(scope="module")
def tree(gaussian):
    return gaussian.to_datatree(draws=DRAWS)


@pytest.fixture(scope="module")
def bernoulli():
    """A network with slopes on a hidden layer, an adversary, and more than one kind of term."""
    rng = np.random.default_rng(1)
    site = np.repeat(np.arange(4), 10)
    x = rng.normal(size=(40, 2))
    data = ClusteredData.from_arrays(x, rng.integers(0, 2, 40), {"site": site})
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    terms = ["(1 + x0 | site)", Slopes("site", on="1")]
    return quick(MixedEffects(net, terms, "bernoulli", Adversary("site", ["1"])), data)


@pytest.fixture(scope="module")
def categorical():
    rng = np.random.default_rng(2)
    frame = pd.DataFrame(
        {
            "kind": rng.choice(["a", "b", "c"], 40),
            "x": rng.normal(size=40),
            "site": np.repeat(pd.date_range("2024-01-01", periods=4), 10),
        }
    )
    data = ClusteredData.from_frame(frame, outcome="kind", clusters=["site"])
    torch.manual_seed(0)
    return quick(MixedEffects(nn.Linear(1, 3), "(1 + x | site)", "categorical"), data)


def one_chain(variable):
    assert variable.dims[:2] == ("chain", "draw")
    assert variable.sizes["chain"] == 1
    return variable.to_numpy()[0]


# ---------------------------------------------------------------------------------- the numbers


def test_all_groups_have_the_schemas_dimensions_and_labels(tree):
    assert list(tree.children) == list(GROUPS)
    sizes = {"chain": 1, "draw": DRAWS, "site": 5, "site_term": 2, "site_term_bis": 2}
    for group in ("posterior", "prior"):
        assert dict(tree[group].sizes) == {**sizes, "fixed_term": 2}
        variables = tree[group].data_vars
        assert {name: one.dims[2:] for name, one in variables.items()} == {
            "site_effect": ("site", "site_term"),
            "site_sd": ("site_term",),
            "site_cor": ("site_term", "site_term_bis"),
            "residual_sd": (),
            "fixed_effect": ("fixed_term",),
        }
        assert all(np.isfinite(one).all() for one in variables.values())
    posterior = tree["posterior"]
    assert posterior["site"].values.tolist() == ["s0", "s1", "s2", "s3", "s4"]
    assert posterior["site_term"].values.tolist() == ["Intercept", "x"]
    assert posterior["fixed_term"].values.tolist() == ["Intercept", "x"]
    for group in ("posterior_predictive", "log_likelihood", "prior_predictive"):
        assert tree[group]["y"].dims == ("chain", "draw", "row")
        assert tree[group]["row"].values.tolist() == list(range(40))


def test_variances_are_those_of_the_variance_components(gaussian, tree):
    table = gaussian.variance_components(draws=DRAWS)
    mean = table.set_index(["factor", "term", "statistic"])["mean"]
    posterior = tree["posterior"].dataset.mean(["chain", "draw"])
    for term in ("Intercept", "x"):
        expected = mean["site", term, "sd"]
        assert float(posterior["site_sd"].sel(site_term=term)) == pytest.approx(expected, rel=1e-9)
    cor = posterior["site_cor"].sel(site_term="Intercept", site_term_bis="x")
    assert float(cor) == pytest.approx(mean["site", "Intercept,x", "cor"], rel=1e-9)
    expected = mean["Residual", "", "sd"]
    assert float(posterior["residual_sd"]) == pytest.approx(expected, rel=1e-9)
    fixed = gaussian.fixed_effects(draws=DRAWS).set_index("term")["mean"]
    np.testing.assert_allclose(posterior["fixed_effect"], fixed[["Intercept", "x"]], rtol=1e-9)


def test_effects_are_in_the_units_of_the_data(gaussian, tree):
    u = gaussian.draws(DRAWS)["site_effect"].numpy()
    x = gaussian.data.features[:, 0].numpy()
    spread = gaussian.data.outcome.numpy().std(ddof=1)
    # The slope refers to (x - mean) / sd, and the intercept to x = mean.
    slope = spread * u[..., 1] / x.std(ddof=1)
    intercept = spread * u[..., 0] - slope * x.mean()
    effect = one_chain(tree["posterior"]["site_effect"])
    np.testing.assert_allclose(effect, np.stack([intercept, slope], -1), rtol=1e-6)


def test_the_likelihood_is_that_of_the_posterior_draws(gaussian, tree):
    """Normal density by hand, from nothing but the tree."""
    posterior, constant = tree["posterior"], tree["constant_data"]
    x = constant["features"].sel(feature="x")
    fixed = posterior["fixed_effect"]
    effect = posterior["site_effect"].sel(site=constant["site"])
    mean = fixed.sel(fixed_term="Intercept") + fixed.sel(fixed_term="x") * x
    mean = mean + effect.sel(site_term="Intercept") + effect.sel(site_term="x") * x
    sd = posterior["residual_sd"]
    y = tree["observed_data"]["y"]
    sd, mean, y = xr.broadcast(sd, mean.drop_vars("site"), y)
    expected = scipy.stats.norm.logpdf(y, mean, sd)
    found = tree["log_likelihood"]["y"].transpose(*mean.dims)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    # The predictive draws are of the same densities: standardised, they are N(0, 1).
    z = (tree["posterior_predictive"]["y"].transpose(*mean.dims) - mean) / sd
    assert scipy.stats.kstest(z.to_numpy().ravel(), "norm").pvalue > 0.01


@pytest.mark.parametrize("bar", ["|", "||"])
def test_prior_draws_follow_the_printed_prior(gaussian, bar):
    """What a user sets, what is printed and what is drawn are one thing, in the data's units."""
    model = gaussian.model
    if bar == "||":
        model = MixedEffects(model.net, "(1 + x || site)", priors=model.priors, bayesian_head=True)
        model = quick(model, gaussian.data).model
    shown = report_text.priors(model)
    assert shown["site_sd[Intercept]"] == "HalfNormal(20)"
    assert shown["site_sd[x]"] == "HalfNormal(3)"
    assert shown["residual_sd"] == "HalfNormal(7)"
    prior = datatree.latent_dataset(model, prior_draws(model, 4000), 4000)
    for term, scale in (("Intercept", 20.0), ("x", 3.0)):
        draws = prior["site_sd"].sel(site_term=term).to_numpy().ravel()
        assert scipy.stats.kstest(draws, scipy.stats.halfnorm(scale=scale).cdf).pvalue > 0.01
        # Effects at x = 0: u / sd is standard normal.
        u = prior["site_effect"].sel(site_term=term, site="s0").to_numpy().ravel()
        assert scipy.stats.kstest(u / draws, "norm").pvalue > 0.01
    if bar == "|":  # LKJ(1) of two terms is uniform, at x = 0
        cor = prior["site_cor"][..., 0, 1].to_numpy().ravel()
        assert scipy.stats.kstest(cor, scipy.stats.uniform(-1, 2).cdf).pvalue > 0.01
    residual = prior["residual_sd"].to_numpy().ravel()
    assert scipy.stats.kstest(residual, scipy.stats.halfnorm(scale=7).cdf).pvalue > 0.01
    # The fixed effects: per sd of x in sds of y, and the intercept at the mean of x.
    facts = model.data_facts()
    (mean,), (sd,), (center,) = facts.feature_mean, facts.feature_scale, facts.center
    intercept, slope = (prior["fixed_effect"][..., i].to_numpy().ravel() for i in range(2))
    for z in (slope * sd, intercept + mean * slope - center):
        assert scipy.stats.kstest(z / facts.spread / 2.5, "norm").pvalue > 0.01


def prior_draws(model, n):
    torch.manual_seed(3)
    rows = model.data_facts().one_row(model.reference())
    rows = replace(rows, memberships=model.clusters().memberships)
    memberships = {k: replace(m, position=m.index[:1]) for k, m in rows.memberships.items()}
    sites = Predictive(model, num_samples=n, parallel=True)(replace(rows, memberships=memberships))
    sites.pop(model.data_facts().outcome_name)
    return sites


def test_prior_draws_have_the_scale_that_was_asked_for(gaussian):
    """HalfNormal(s): mean s sqrt(2 / pi), standard deviation s sqrt(1 - 2 / pi)."""
    n = 4000
    prior = gaussian.to_datatree(draws=n, groups=["prior"], seed=3)["prior"]
    error = np.sqrt((1 - 2 / np.pi) / n)

    def check(values, scale):
        assert abs(float(values.mean()) / scale - np.sqrt(2 / np.pi)) < 4 * error

    check(prior["site_sd"].sel(site_term="x"), 3.0)
    check(prior["residual_sd"], 7.0)
    check(prior["site_sd"].sel(site_term="Intercept"), 20.0)
    # Effects are drawn from it: E u^2 = scale^2 = 9; Var u^2 = 8 scale^4 for a half-normal scale.
    effect = one_chain(prior["site_effect"].sel(site_term="x", site="s0"))
    assert abs((effect**2).mean() / 9 - 1) < 4 * np.sqrt(8 / n)


def test_draws_follow_the_seed(gaussian, tree):
    again = gaussian.to_datatree(draws=DRAWS, seed=gaussian.seed)
    assert again.identical(tree)
    other = gaussian.to_datatree(draws=DRAWS, seed=5)
    for group in ("posterior", "posterior_predictive", "log_likelihood", "prior_predictive"):
        for name in tree[group].data_vars:
            assert not tree[group][name].equals(other[group][name]), (group, name)


def test_the_global_generator_is_left_alone(gaussian):
    state = torch.get_rng_state()
    gaussian.to_datatree(draws=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_blocks_of_rows_give_the_same_likelihood(gaussian, tree, monkeypatch):
    blocks = list(datatree._blocks(gaussian, 2**21))
    assert len(blocks) > 1
    assert sum(map(len, blocks)) == 40
    monkeypatch.setattr(
        datatree, "_blocks", lambda fit, draws, **_: fit.model.encode(fit.data).chunks(7)
    )
    groups = ["log_likelihood", "prior_predictive"]
    cut = gaussian.to_datatree(draws=DRAWS, groups=groups)
    np.testing.assert_allclose(cut["log_likelihood"]["y"], tree["log_likelihood"]["y"], rtol=1e-9)
    assert cut["prior_predictive"]["y"].shape == tree["prior_predictive"]["y"].shape


# -------------------------------------------------------------------------------- other programs


def test_independent_terms_are_uncorrelated_in_the_full_matrix(bernoulli):
    posterior = bernoulli.to_datatree(draws=20, groups=["posterior"])["posterior"]
    terms = ["Intercept", "x0", "1[0]", "1[1]", "1[2]"]
    assert posterior["site_term"].values.tolist() == terms
    cor = one_chain(posterior["site_cor"])
    np.testing.assert_allclose(cor[:, range(5), range(5)], 1, rtol=1e-6)
    linked = np.zeros((5, 5), dtype=bool)
    linked[:2, :2] = True
    assert (cor[:, ~linked & ~np.eye(5, dtype=bool)] == 0).all()
    assert (cor[:, 0, 1] != 0).all()
    assert "residual_sd" not in posterior
    assert "fixed_effect" not in posterior


def test_independent_terms_alone_have_no_correlations():
    frame = make_frame(3)
    data = ClusteredData.from_frame(frame, outcome="y", clusters=["site"])
    result = quick(MixedEffects(nn.Linear(1, 1), "(1 + x || site)"), data)
    posterior = result.to_datatree(draws=10, groups=["posterior"])["posterior"]
    assert "site_cor" not in posterior
    sd = result.draws(10)["site_sd"][:, 0].numpy()
    scale = frame.y.std() / np.array([1, frame.x.std()])
    np.testing.assert_allclose(one_chain(posterior["site_sd"]), sd * scale, rtol=1e-5)


def test_classes_are_codes_with_labels(categorical):
    tree = categorical.to_datatree(draws=20)
    for group in ("observed_data", "posterior_predictive", "prior_predictive"):
        outcome = tree[group]["kind"]
        assert outcome.dtype == np.int64
        assert outcome.attrs["classes"] == ["a", "b", "c"]
        assert set(np.unique(outcome)) <= {0, 1, 2}
    posterior = tree["posterior"]
    assert posterior["site_term"].values.tolist() == [
        "Intercept[b]", "Intercept[c]", "x[b]", "x[c]"
    ]  # fmt: skip
    cor = one_chain(posterior["site_cor"])
    assert (cor[:, 0, 2] != 0).all(), "intercept and slope of one class are correlated"
    assert (cor[:, [0, 0, 1, 2], [1, 3, 2, 3]] == 0).all(), "classes are not"
    assert posterior["site"].dtype.kind == "M"
    # The class's probability by hand, from the predictor.
    rows = categorical.model.encode(categorical.data).all()
    with torch.no_grad():
        eta = categorical.model.predictor(rows, categorical.draws(20)).eta
    logits = torch.cat([torch.zeros_like(eta[..., :1]), eta], -1).numpy()
    y = tree["observed_data"]["kind"].to_numpy()
    expected = scipy.special.log_softmax(logits, -1)[:, np.arange(40), y]
    np.testing.assert_allclose(one_chain(tree["log_likelihood"]["kind"]), expected, rtol=1e-4)


@pytest.mark.parametrize("family", ["gaussian", "bernoulli"])
def test_a_plain_network_has_predictions_only(family):
    rng = np.random.default_rng(4)
    y = rng.integers(0, 2, 30) if family == "bernoulli" else rng.normal(size=30)
    data = ClusteredData.from_arrays(rng.normal(size=(30, 1)), y, {})
    torch.manual_seed(0)
    tree = quick(MixedEffects(nn.Linear(1, 1), family=family), data).to_datatree(draws=10)
    latent = ["prior", "posterior"] if family == "gaussian" else []
    assert sorted(tree.children) == sorted({*GROUPS} - {"prior", "posterior"} | {*latent})
    for group in ("posterior_predictive", "log_likelihood", "prior_predictive"):
        assert tree[group]["outcome"].shape == (1, 10, 30)
    assert len(np.unique(tree["posterior_predictive"]["outcome"][0, :, 0])) > 1


def test_known_quantities_have_as_many_draws_as_others():
    frame = make_frame(5)
    data = ClusteredData.from_frame(frame, outcome="y", clusters=["site"])
    priors = Priors(sd=Known(6.0), residual_sd=Known(2.0))
    tree = quick(MixedEffects(nn.Linear(1, 1), "(1 | site)", priors=priors), data).to_datatree(
        draws=10
    )
    for group in ("posterior", "prior"):
        np.testing.assert_allclose(tree[group]["site_sd"], np.full((1, 10, 1), 6.0), rtol=1e-5)
        np.testing.assert_allclose(tree[group]["residual_sd"], np.full((1, 10), 2.0), rtol=1e-5)


@pytest.mark.parametrize("family", ["binomial", "poisson", "negative_binomial"])
def test_counts_are_integers_and_roles_are_kept(family):
    rng = np.random.default_rng(6)
    roles = {"offset": rng.normal(size=40), "weights": rng.uniform(0.5, 2, 40)}
    if family == "binomial":
        roles["trials"] = np.full(40, 5)
    data = ClusteredData.from_arrays(
        np.zeros((40, 0)), rng.integers(0, 5, 40), {"site": np.repeat([True, False], 20)}, **roles
    )
    result = quick(MixedEffects(nn.Linear(0, 1), "(1 | site)", family), data)
    tree = result.to_datatree(draws=30)
    assert tree["observed_data"]["outcome"].dtype == np.int64
    assert tree["posterior_predictive"]["outcome"].dtype == np.int64
    constant = tree["constant_data"]
    for name, values in roles.items():
        np.testing.assert_array_equal(constant[name], values)
    assert "features" not in constant
    assert ("shape" in tree["posterior"]) is (family == "negative_binomial")
    # A row's weight multiplies its log-likelihood.
    unweighted = result.model.log_likelihood(
        result.model.encode(ClusteredData(**{**vars(data), "weights": None})).all(),
        result.draws(30),
    )
    expected = (unweighted.detach() * torch.tensor(roles["weights"])).numpy()
    np.testing.assert_allclose(one_chain(tree["log_likelihood"]["outcome"]), expected, rtol=1e-4)


def test_counts_beyond_the_integers_stay_as_they_are():
    assert datatree._counts(np.array([1.0, 1e300]), True).dtype == np.float64
    assert datatree._counts(np.array([1.0, np.inf]), True).dtype == np.float64
    assert datatree._counts(np.array([1.0, 3.0]), True).dtype == np.int64


def test_images_have_axes():
    rng = np.random.default_rng(7)
    x = rng.normal(size=(20, 1, 2, 3))
    data = ClusteredData.from_arrays(x, rng.normal(size=20), {"site": np.repeat([1, 2], 10)})
    net = nn.Sequential(nn.Flatten(), nn.Linear(6, 1))
    tree = quick(MixedEffects(net, "(1 | site)"), data).to_datatree(draws=2)
    features = tree["constant_data"]["features"]
    assert features.dims == ("row", "axis_1", "axis_2", "axis_3")
    np.testing.assert_allclose(features, x)


# ------------------------------------------------------------------------------ names and labels


def test_nested_factors_and_odd_names_survive_netcdf(tmp_path):
    rng = np.random.default_rng(8)
    frame = pd.DataFrame(
        {
            "km/h": rng.normal(size=40),
            "draw": np.repeat(["u", "v", "w", "z"], 10),
            "class": np.tile(np.repeat([1, 2], 5), 4),
        },
        index=pd.Index([f"row {i}" for i in range(40)], name="id"),
    )
    data = ClusteredData.from_frame(frame, outcome="km/h", clusters=["draw", "class"])
    model = MixedEffects(nn.Linear(0, 1), "(1 | draw/class)")
    tree = quick(model, data).to_datatree(draws=10)
    tree.to_netcdf(tmp_path / "tree.nc", engine="h5netcdf")
    with xr.open_datatree(tmp_path / "tree.nc", engine="h5netcdf") as read:
        posterior = read["posterior"]
        assert posterior["draw_"].values.tolist() == ["u", "v", "w", "z"]
        assert posterior["draw:class"].values.tolist()[:3] == ["u:1", "u:2", "v:1"]
        assert posterior["draw_effect"].dims == ("chain", "draw", "draw_", "draw_term")
        assert posterior["draw:class_effect"].dims[2:] == ("draw:class", "draw:class_term")
        assert read["observed_data"]["km_h"].dims == ("row",)
        assert read["observed_data"]["row"].values.tolist() == frame.index.tolist()
        assert read["constant_data"]["class"].values.tolist() == frame["class"].tolist()
        assert read["constant_data"]["draw_"].values.tolist() == frame["draw"].tolist()


LABELS = {
    "int": pd.Index([3, 1, 2]),
    "float": pd.Index([0.5, 1.5, 2.5]),
    "bool": pd.Index([False, True]),
    "text": pd.Index(["b", "", "é"]),
    "object": pd.Index(["b", "a"], dtype=object),
    "nullable": pd.Index([1, 2, 3], dtype="Int64"),
    "numpy": pd.Index([np.int64(2), np.int64(5)], dtype=object),
    "timestamp": pd.date_range("2024-01-01", periods=3, freq="h"),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_survive_netcdf(tmp_path, kind):
    labels = LABELS[kind]
    values = label_values(labels)
    assert values.dtype.kind in "ifbUM"
    xr.Dataset({"u": ("site", np.arange(len(labels)))}, {"site": values}).to_netcdf(
        tmp_path / "labels.nc", engine="h5netcdf"
    )
    with xr.open_dataset(tmp_path / "labels.nc", engine="h5netcdf") as read:
        assert pd.Index(read["site"].to_numpy()).tolist() == labels.tolist()


def test_other_labels_become_text():
    zoned = pd.date_range("2024-01-01", periods=2, tz="Europe/Berlin")
    assert label_values(zoned).tolist() == [
        "2024-01-01 00:00:00+01:00",
        "2024-01-02 00:00:00+01:00",
    ]
    date = pd.Index([datetime.date(2024, 1, 1)], dtype=object)
    assert label_values(date).tolist() == ["2024-01-01"]
    assert label_values(pd.Index([1, "1"], dtype=object)).tolist() == ["1", "'1'"]
    pairs = pd.MultiIndex.from_tuples([("a", 1), ("b", 2)])
    assert label_values(pairs).tolist() == ["('a', 1)", "('b', 2)"]
    assert label_values(pd.Index([])).dtype.kind == "U"


def test_names_that_the_schema_reserves_are_changed():
    assert variable_name("site") == "site"
    assert variable_name("weights") == "weights_"
    assert variable_name("a/b/c") == "a_b_c"


# ------------------------------------------------------------------------------ groups and errors


def test_a_choice_of_groups_comes_alone(gaussian):
    tree = to_datatree(gaussian.posterior, draws=2, groups=["observed_data", "posterior"])
    assert sorted(tree.children) == ["observed_data", "posterior"]
    assert list(to_datatree(gaussian.posterior, draws=2, groups="prior").children) == ["prior"]


def test_an_unknown_group_is_refused_with_the_known_ones(gaussian):
    with pytest.raises(ValueError, match=r"predictve'.*mean 'posterior_predictive'.*prior"):
        gaussian.to_datatree(groups=["posterior", "posterior_predictve"])


def test_a_single_draw_is_refused(gaussian):
    with pytest.raises(ValueError, match="at least 2, not 1"):
        gaussian.to_datatree(draws=1)


def test_the_loss_trace_and_settings_are_kept(gaussian, tree):
    stats = tree["sample_stats"]
    np.testing.assert_array_equal(stats["loss"], gaussian.history.loss)
    np.testing.assert_array_equal(stats["elbo"], gaussian.history.elbo)
    assert stats["step"].values.tolist() == list(range(1, 31))
    assert stats.attrs["stopped"] == "steps"
    assert stats.attrs["seed"] == 0
    assert '"steps": 30' in stats.attrs["schedule"]


def test_constant_data_hold_all_groupings():
    rng = np.random.default_rng(9)
    clusters = {"site": np.repeat([1, 2], 10), "batch": np.tile(["a", "b"], 10)}
    data = ClusteredData.from_arrays(rng.normal(size=(20, 1)), rng.normal(size=20), clusters)
    model = MixedEffects(nn.Linear(1, 1), RandomEffects("site"))
    constant = quick(model, data).to_datatree(draws=2)["constant_data"]
    for name, labels in clusters.items():
        assert constant[name].values.tolist() == labels.tolist()


# ------------------------------------------------------------------------------------------ ArviZ


def test_arviz_has_the_api_of_version_one():
    az = arviz_api()
    for name in ("summary", "loo", "plot_forest", "plot_ppc_dist"):
        assert callable(getattr(az, name))
    assert not hasattr(az, "InferenceData")


def test_arviz_of_version_one_is_taken_as_it_is(monkeypatch):
    newer = types.SimpleNamespace(__version__="1.2.0")
    monkeypatch.setitem(sys.modules, "arviz", newer)
    assert arviz_api() is newer


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")
def test_arviz_summarises_the_posterior(tree):
    table = arviz_api().summary(
        tree, var_names=["site_sd", "residual_sd"], ci_prob=0.9, ci_kind="eti", round_to="none"
    )
    assert table.index.tolist() == ["site_sd[Intercept]", "site_sd[x]", "residual_sd"]
    expected = tree["posterior"]["site_sd"].sel(site_term="x").mean()
    assert float(table.loc["site_sd[x]", "mean"]) == pytest.approx(float(expected))


def test_without_constants_arviz_has_nothing_to_warn_of(gaussian, tree):
    varying = gaussian.to_datatree(draws=DRAWS, constants=False)
    pairs = varying["posterior"]["site_cor"]
    assert pairs["site_pair"].to_numpy().tolist() == ["Intercept,x"]
    full = tree["posterior"]["site_cor"].sel(site_term="Intercept", site_term_bis="x")
    np.testing.assert_array_equal(pairs.sel(site_pair="Intercept,x"), full)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = arviz_api().summary(varying)
    assert "site_cor[Intercept,x]" in table.index
    assert not table.drop(columns="r_hat").isna().to_numpy().any()  # r_hat needs several chains


def test_known_quantities_are_constants():
    data = ClusteredData.from_frame(make_frame(5), outcome="y", clusters=["site"])
    priors = Priors(sd=Known(6.0), residual_sd=Known(2.0))
    result = quick(MixedEffects(nn.Linear(1, 1), "(1 | site)", priors=priors), data)
    tree = result.to_datatree(draws=10, constants=False)
    for group in ("posterior", "prior"):
        assert list(tree[group].data_vars) == ["site_effect"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_arviz_loo_reads_the_likelihood(tree):
    loo = arviz_api().loo(tree, pointwise=True)
    assert loo.n_data_points == 40
    log_likelihood = one_chain(tree["log_likelihood"]["y"])
    in_sample = scipy.special.logsumexp(log_likelihood, 0) - np.log(DRAWS)
    assert loo.elpd < in_sample.sum(), "leaving a row out cannot make it likelier"


@pytest.mark.parametrize("name", ["gaussian", "bernoulli", "categorical"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")
def test_arviz_plots_the_tree_read_from_netcdf(name, request, tmp_path):
    import matplotlib.pyplot as plt

    result = request.getfixturevalue(name)
    tree = result.to_datatree(draws=20)
    tree.to_netcdf(tmp_path / "tree.nc", engine="h5netcdf")
    az = arviz_api()
    with xr.open_datatree(tmp_path / "tree.nc", engine="h5netcdf") as read:
        for group in tree.children:
            xr.testing.assert_equal(read[group].dataset, tree[group].dataset)
        az.plot_forest(read, var_names=["site_effect"], ci_kind="eti", ci_probs=(0.5, 0.9))
        az.plot_ppc_dist(read, num_samples=5)
        az.plot_ppc_dist(read, group="prior_predictive", num_samples=5)
    plt.close("all")
