"""Estimators of scikit-learn: its own checks, pipelines, searches and metadata routing."""

import numpy as np
import pandas as pd
import pytest
import sklearn
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

from armed_pyro import (
    ClusteredData,
    MixedEffects,
    MixedEffectsClassifier,
    MixedEffectsRegressor,
    Schedule,
    fit,
)

LIGHT = {"steps": 20, "refine": False, "draws": 50}


@parametrize_with_checks([MixedEffectsRegressor(**LIGHT), MixedEffectsClassifier(**LIGHT)])
@pytest.mark.filterwarnings("ignore")
def test_checks_of_scikit_learn(estimator, check):
    check(estimator)


def make_rows(n=120, seed=0):
    rng = np.random.default_rng(seed)
    site = np.arange(n) % 12
    frame = pd.DataFrame({"dose": rng.normal(size=n), "age": rng.normal(50, 10, n)})
    effects = rng.normal(0, 2, 12)
    y = 1 + 2 * frame["dose"] + effects[site] + rng.normal(0, 0.5, n)
    return frame, y.to_numpy(), site


@pytest.fixture
def routing():
    with sklearn.config_context(enable_metadata_routing=True):
        yield


def test_the_numbers_are_those_of_a_fit():
    X, y, site = make_rows()
    model = MixedEffectsRegressor(random="(1 + dose | site)", steps=60, random_state=3)
    model.fit(X, y, groups=site)
    data = ClusteredData.from_arrays(X.to_numpy(), y, {"site": site}, feature_names=["dose", "age"])
    program = MixedEffects(nn.Linear(2, 1), "(1 + dose | site)", bayesian_head=True)
    seed = model.fit_.seed
    same = fit(program, data, schedule=Schedule(steps=60), seed=seed, progress=False)
    expected = same.predict(data, draws=400).mean
    np.testing.assert_allclose(model.predict(X, groups=site), expected, atol=0.05)
    assert model.fit_.coef()["dose"] == pytest.approx(2, abs=0.2)


def test_groups_help_and_new_groups_follow_the_mode():
    X, y, site = make_rows()
    model = MixedEffectsRegressor(steps=100, unseen="population").fit(X, y, groups=site)
    with_groups, without = model.score(X, y, groups=site), model.score(X, y)
    assert with_groups > 0.9
    assert without < with_groups - 0.1
    with pytest.warns(UserWarning, match="no cluster"):
        new = model.predict(X, groups=site + 100)
    np.testing.assert_allclose(new, model.predict(X), rtol=1e-6)
    marginal = clone(model).set_params(unseen="marginal").fit(X, y, groups=site)
    # The draws of a new group have the sd of the groups, so that their mean is near that.
    difference = marginal.predict(X) - model.predict(X)
    assert np.ptp(difference) < 1e-6
    assert abs(difference.mean()) < 5 * 2.5 / np.sqrt(400)


def test_several_factors_come_as_a_table():
    X, y, site = make_rows()
    groups = pd.DataFrame({"school": site // 3, "room": site % 3})
    model = MixedEffectsRegressor(random="(1 | school/room)", **LIGHT).fit(X, y, groups=groups)
    assert [factor.name for factor in model.fit_.model.factors] == ["school", "school:room"]
    assert model.predict(X, groups=groups).shape == (120,)
    with pytest.raises(ValueError, match="'room'"):
        model.fit(X, y, groups=groups[["school"]])
    with pytest.raises(ValueError, match="one label per row"):
        model.fit(X, y, groups=site)


def test_classes():
    X, y, site = make_rows(240)
    three = np.array(["low", "mid", "top"])[np.digitize(y, [0, 2])]
    for labels in (three, np.where(y > 1, "yes", "no")):
        model = MixedEffectsClassifier(**LIGHT).fit(X, labels, groups=site)
        shares = model.predict_proba(X, groups=site)
        np.testing.assert_allclose(shares.sum(axis=1), 1, rtol=1e-6)
        assert model.score(X, labels, groups=site) > 0.75
    assert model.fit_.model.family.name == "bernoulli"


def test_networks_of_ones_own():
    X, y, site = make_rows()

    def net(n_features, n_outputs):
        return nn.Sequential(nn.Linear(n_features, 4), nn.Tanh(), nn.Linear(4, n_outputs))

    model = MixedEffectsRegressor(net=net, **LIGHT).fit(X, y, groups=site)
    assert isinstance(model.fit_.model.network[1], nn.Tanh)


def test_pipelines_searches_and_groups_are_routed(routing):
    X, y, site = make_rows()
    y = y + 3 * X["dose"].to_numpy() ** 2
    model = MixedEffectsRegressor(**LIGHT).set_fit_request(groups=True)
    model.set_score_request(groups=True)
    pipe = make_pipeline(PolynomialFeatures(include_bias=False), StandardScaler(), model)
    grid = {"polynomialfeatures__degree": [1, 2]}
    search = GridSearchCV(pipe, grid, cv=GroupKFold(3))
    with pytest.warns(UserWarning, match="no cluster"):
        search.fit(X, y, groups=site)
    assert search.best_params_ == {"polynomialfeatures__degree": 2}
    best = search.best_estimator_[-1]
    assert [factor.name for factor in best.fit_.model.factors] == ["group"]
    assert best.fit_.model.data_facts().n_rows == 120
    by_row = cross_validate(pipe, X, y, params={"groups": site}, cv=2)
    assert (by_row["test_score"] > 0).all()


def test_forgotten_groups_are_told():
    X, y, _ = make_rows()
    with pytest.warns(UserWarning, match=r"set_fit_request\(groups=True\)"):
        model = MixedEffectsRegressor(**LIGHT).fit(X, y)
    assert model.fit_.model.factors == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"unseen": "adapt"}, "unseen="), ({"net": "densee"}, "dense"), ({"family": "g"}, "family")],
)
def test_wrong_parameters(options, message):
    X, y, site = make_rows()
    with pytest.raises(ValueError, match=message):
        MixedEffectsRegressor(**LIGHT | options).fit(X, y, groups=site)
