"""Surfaces over two features: the same as predictions, and figures of them."""

import sys

import numpy as np
import pytest
import torch

from armed_pyro import ClusteredData, MixedEffects, Schedule, Slopes, fit
from armed_pyro.explain.boundaries import plane
from armed_pyro.families.simulate import mixed_model
from armed_pyro.models.dense import dense
from armed_pyro.models.linear import linear

BRIEF = Schedule(steps=4, window=2, stages=0)
FAMILIES = ["gaussian", "bernoulli", "binomial", "categorical", "poisson"]


def fitted(family, net=None, random="(1 + x0 | site)"):
    beta = [[0.0, 0.5], [1.0, 0.0], [0.0, 1.0], [0.3, 0.3]]
    beta = beta if family == "categorical" else [row[0] for row in beta]
    data, _ = mixed_model(family, 5, 10, sd=[1.0, 0.5], coefficients=beta)
    net = linear(3, 3 if family == "categorical" else 1) if net is None else net
    model = MixedEffects(net, random, family, bayesian_head=isinstance(net, torch.nn.Linear))
    return fit(model, data, schedule=BRIEF, seed=3, refine=False, progress=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_surfaces_are_predictions(family):
    result = fitted(family)
    of = None
    if family == "categorical":
        of = 1
        with pytest.raises(ValueError, match="name one of the classes"):
            result.boundaries(("x2", "x0"))
    found = result.boundaries(("x2", "x0"), of=of, size=4, draws=50)
    assert found.surface.dims == ("site", "x0", "x2")
    middle = dict(
        zip(result.data.feature_names, result.data.features.mean(0).tolist(), strict=True)
    )
    axes = {name: found.surface[name].to_numpy() for name in ("x2", "x0")}
    for name, values in axes.items():
        column = result.data.features[:, result.data.feature_names.index(name)]
        assert (values[0], values[-1]) == (float(column.min()), float(column.max()))
    sites = result.data.grouping("site").levels.to_numpy()
    rows = plane(axes, middle, {"site": sites})
    new = plane(axes, middle, {"site": np.array([77])})
    if family == "binomial":
        rows, new = (
            ClusteredData.from_arrays(
                one.features, None, {"site": one.grouping("site").labels()},
                feature_names=one.feature_names, trials=np.ones(one.n_rows),
            )
            for one in (rows, new)
        )  # fmt: skip
    mean = result.predict(rows, draws=50).mean
    fixed = result.predict(new, unseen="population", draws=50).mean
    mean, fixed = (one[:, 1] if of is not None else one for one in (mean, fixed))
    np.testing.assert_allclose(found.surface, mean.reshape(5, 4, 4), rtol=1e-5)
    np.testing.assert_allclose(found.fixed, fixed.reshape(4, 4), rtol=1e-5)
    shares = family in ("bernoulli", "binomial", "categorical")
    assert found.level == (0.5 if shares else None)
    assert found.surface.name == {True: "P(y)", False: "E(y)"}[shares].replace(
        "y", "y = 1" if of else "y"
    )
    assert found.plot(result.data).axes


def test_other_factors_are_left_out_and_hidden_slopes_are_in():
    data, _ = mixed_model("bernoulli", 6, 20, coefficients=[0, 1.0, 1.0])
    crossed = ClusteredData.from_arrays(
        data.features,
        data.outcome,
        {"site": data.grouping("site").labels(), "batch": np.arange(data.n_rows) % 4},
    )
    torch.manual_seed(0)
    random = [Slopes("site", on="1"), "(1 | batch)"]
    model = MixedEffects(dense(2, hidden=(5,)), random, "bernoulli")
    result = fit(model, crossed, schedule=BRIEF, refine=False, progress=False)
    site = result.boundaries(("x0", "x1"), size=3, draws=20)
    batch = result.boundaries(("x0", "x1"), factor="batch", size=3, draws=20)
    assert (len(site.surface), len(batch.surface)) == (6, 4)
    np.testing.assert_allclose(site.fixed, batch.fixed, rtol=1e-6)

    # An intercept moves every point alike on the logit's scale; slopes do not.
    def spread(found):
        logit = np.log(found.surface / (1 - found.surface)) - np.log(
            found.fixed / (1 - found.fixed)
        )
        return float(logit.std(("x0", "x1")).max())

    assert spread(batch) < 0.05 < spread(site) or spread(batch) < spread(site) / 3


def test_figures_have_a_panel_for_each_cluster_and_a_boundary(tmp_path):
    result = fitted("bernoulli")
    found = result.boundaries(("x0", "x1"), size=20, draws=20, extent=((-9, 9), (-9, 9)))
    figure = found.plot(result.data, clusters=[3, 1])
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == ["fixed effects", "site 3", "site 1"]
    points = [axis.collections for axis in figure.axes[:3]]
    # A line in each panel; points in the clusters' own.
    assert [len(one) for one in points] == [1, 2, 2]
    count = int((result.data.grouping("site").labels() == 3).sum())
    assert len(points[1][1].get_offsets()) == count
    figure.savefig(tmp_path / "boundaries.png")
    assert (tmp_path / "boundaries.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="cluster of 'site'"):
        found.plot(clusters=[9])
    with pytest.raises(ValueError, match="have none"):
        found.plot(plane({"x0": np.zeros(2), "x1": np.zeros(2)}, {"x0": 0, "x1": 0, "x2": 0}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features": ("x0", "x9")}, "feature"),
        ({"features": ("x0", "x0")}, "two different features"),
        ({"factor": "batch"}, "grouping factor"),
        ({"size": 1}, "at least 2"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    given = {"features": ("x0", "x1")} | arguments
    with pytest.raises(ValueError, match=message):
        fitted("gaussian").boundaries(given.pop("features"), **given)


def test_random_effects_and_matplotlib_are_needed(monkeypatch):
    with pytest.raises(ValueError, match="no random effects"):
        fitted("gaussian", random=()).boundaries(("x0", "x1"))
    found = fitted("gaussian").boundaries(("x0", "x1"), size=3, draws=5)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"needs matplotlib.*armed_pyro\[analysis\]"):
        found.plot()
