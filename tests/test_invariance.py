"""Probes of the cluster: chance where nothing leaks, and every kind of leak found."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from armed_pyro import Adversary, ClusteredData, MixedEffects, Schedule, fit
from armed_pyro.explain.invariance import MOST_ROWS, activations, permutation_test

BRIEF = Schedule(steps=5, window=5, stages=0)
N, SITES = 400, 5
RNG = np.random.default_rng(0)
SITE = np.arange(N) % SITES
NOISE = RNG.normal(size=(N, 4))
LABEL = RNG.integers(0, 2, N).astype(float)


def fitted(features, label=LABEL, site=SITE, net=None, family="bernoulli", **settings):
    """A fit whose module "0" hands the features on."""
    data = ClusteredData.from_arrays(features, label, {"site": site})
    torch.manual_seed(0)
    if net is None:
        net = nn.Sequential(nn.Identity(), nn.Linear(features.shape[1], 1))
    model = MixedEffects(net, "(1 | site)", family, **settings)
    return fit(model, data, schedule=BRIEF, refine=False, progress=False)


def by_probe(found):
    return found.table.set_index("probe")


def test_features_without_clusters_are_read_at_chance():
    result = fitted(NOISE)
    table = by_probe(result.invariance(layers=["0"]))
    error = np.sqrt(0.2 * 0.8 / N)
    assert (abs(table["chance"] - 1 / SITES) < 3 * error).all()
    assert (abs(table["accuracy"] - 1 / SITES) < 3 * error).all()
    assert (table[["p", "p_within"]] > 0.05).all(axis=None)


def test_features_that_hold_the_cluster_are_read():
    leak = NOISE.copy()
    leak[:, 0] += 12 * SITE
    table = by_probe(fitted(leak).invariance(layers=["0"]))
    assert (table["accuracy"] > 0.97).all()
    # The least that two folds and 999 permutations allow.
    assert table[["p", "p_within"]].to_numpy() == pytest.approx(0.002)


def test_a_network_reads_what_no_line_separates():
    site = np.arange(N) % 2
    leak = NOISE.copy()
    leak[:, 1] = np.abs(leak[:, 1]) * np.sign(leak[:, 0]) * np.where(site == 1, 1, -1)
    table = by_probe(fitted(leak, site=site).invariance(layers=["0"]))
    assert table.loc["linear", "p"] > 0.05
    assert table.loc["network", "accuracy"] > 0.85
    assert table.loc["network", "p_within"] < 0.01


def test_clusters_read_from_the_outcome_alone_are_legitimate():
    """Classes are as different between clusters as can be; features know the class only."""
    rng = np.random.default_rng(1)
    label = (rng.random(N) < np.linspace(0.05, 0.95, SITES)[SITE]).astype(float)
    known = np.column_stack([label + 0.3 * rng.normal(size=N), rng.normal(size=N)])
    found = fitted(known, label).invariance(layers=["0"])
    table = by_probe(found)
    assert (table["p"] < 0.01).all()
    assert (table["p_within"] > 0.05).all()
    assert (table["chance_within"] > table["chance"] + 0.05).all()
    # The same features, with clusters in them as well.
    known[:, 1] += 2 * SITE
    assert (by_probe(fitted(known, label).invariance(layers=["0"]))["p_within"] < 0.01).all()
    outcome = found.clustering.set_index("by")
    assert outcome.loc["outcome", "davies_bouldin"] < outcome.loc["cluster", "davies_bouldin"]


def test_independent_features_depend_on_the_cluster_given_the_outcome():
    """A feature and the cluster both bear on the outcome: that is no leak."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(4 * N, 1))
    site = np.arange(len(x)) % 2
    label = (x[:, 0] + 3 * site - 1.5 > 0).astype(float)
    table = by_probe(fitted(x, label, site).invariance(layers=["0"]))
    assert (table["p_leak"] == table[["p", "p_within"]].max(axis=1)).all()
    assert (table["p_leak"] > 0.05).all()


def test_tenths_of_a_continuous_outcome_stand_for_classes():
    rng = np.random.default_rng(2)
    y = SITE + rng.normal(size=N)
    known = np.column_stack([y + 0.5 * rng.normal(size=N)])
    table = by_probe(fitted(known, y, family="gaussian").invariance(layers=["0"]))
    assert (table["p"] < 0.01).all()
    assert (table["chance_within"] > table["chance"] + 0.05).all()


def test_p_values_are_valid():
    """Under either null hypothesis a p-value is at most a with probability a."""
    times, ps = 100, []
    for seed in range(times):
        rng = np.random.default_rng(seed)
        codes = rng.permutation(np.arange(60) % 3)
        groups = {"": np.zeros(60, dtype=int), "_within": rng.integers(0, 2, 60)}
        settings = {"folds": 2, "permutations": 99, "seed": seed}
        features = rng.normal(size=(60, 3))
        ps.append(permutation_test(LogisticRegression(), features, codes, groups, **settings))
    p = pd.DataFrame(ps)[["p", "p_within"]].to_numpy()
    for level in (0.05, 0.1, 0.2):
        most = level + 3 * np.sqrt(level * (1 - level) / times)
        assert ((p <= level).mean(0) <= most).all()


def test_indices_of_two_points_a_cluster():
    """By hand: centres at 0 and 10, members 1 away from theirs."""
    x = np.array([[-1.0], [1.0], [9.0], [11.0]])
    site = np.array([0, 0, 1, 1])
    label = np.array([0.0, 1.0, 0.0, 1.0])
    net = nn.Sequential(nn.Identity(), nn.Linear(1, 1))
    found = fitted(x, label, site, net).invariance(layers=["0"]).clustering.set_index("by")
    # (1 + 1) / 10; between-cluster over within-cluster mean squares, (100 / 1) / (4 / 2).
    assert found.loc["cluster", "davies_bouldin"] == pytest.approx(0.2)
    assert found.loc["cluster", "calinski_harabasz"] == pytest.approx(50)
    assert found.loc["outcome", "davies_bouldin"] > 1


def test_feature_maps_are_averaged_over_space():
    x = RNG.normal(size=(N, 1, 6, 6)).astype("float32")
    x += SITE[:, None, None, None]
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(48, 1))
    result = fitted(x, net=net)
    read = activations(result.model, result.data, ["0", "<2"])
    assert read["0"].shape == (N, 3)
    maps = result.model.network[0](result.data.features).detach()
    np.testing.assert_allclose(read["0"], maps.mean((2, 3)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(read["<2"], maps.flatten(1), rtol=1e-5, atol=1e-6)
    table = by_probe(result.invariance(layers=["0"], permutations=99))
    assert (table["accuracy"] > 0.8).all()


def test_layers_are_the_taps_or_the_last_hidden_ones():
    result = fitted(NOISE)
    assert list(result.invariance(permutations=9).table["layer"].unique()) == ["<1"]
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    game = Adversary("site", ["0", "1"])
    result = fitted(NOISE, net=net, adversary=game)
    found = result.invariance(permutations=9)
    assert list(found.table["layer"].unique()) == ["0", "1"]
    assert found.factor == "site"
    assert "Can site be read" in str(found)


def test_new_clusters_are_read_too():
    result = fitted(NOISE)
    new = ClusteredData.from_arrays(NOISE + 20 * SITE[:, None], None, {"site": SITE + 100})
    new = replace(new, outcome_name="outcome")
    found = result.invariance(new, layers=["0"], permutations=99)
    assert (found.table["accuracy"] > 0.97).all()
    assert found.table["p_within"].isna().all()
    assert list(found.clustering["by"]) == ["cluster"]


def test_large_data_are_sampled():
    many = np.random.default_rng(3).normal(size=(MOST_ROWS + 500, 1))
    site, label = np.arange(len(many)) % 2, (many[:, 0] > 0).astype(float)
    found = fitted(many, label, site).invariance(layers=["0"], permutations=9)
    # So many rows would not do for an accuracy on a grid of 1 / 5,500.
    assert (found.table["accuracy"] * MOST_ROWS % 1 < 1e-6).mean() == pytest.approx(1)


def test_features_that_do_not_vary_have_no_indices():
    net = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 1))
    nn.init.zeros_(net[0].weight)
    net[0].requires_grad_(False)
    found = fitted(NOISE, net=net).invariance(layers=["0"], permutations=9)
    assert found.clustering[["davies_bouldin", "calinski_harabasz"]].isna().all(axis=None)
    assert (found.table["p"] > 0.05).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": ["7"]}, "no module '7'"),
        ({"layers": []}, "at least one module path"),
        ({"layers": "0"}, "list"),
        ({"factor": "batch"}, "batch"),
        ({"folds": 1}, "at least 2"),
        ({"folds": 100}, r"fewer rows than the 100 folds"),
        ({"permutations": 0}, "at least 1"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        fitted(NOISE).invariance(**arguments)


def test_one_cluster_and_tiny_clusters_are_refused():
    result = fitted(NOISE)
    with pytest.raises(ValueError, match="all of one cluster"):
        result.invariance(result.data.take(np.flatnonzero(SITE == 2)))
    rows = np.append(np.flatnonzero(SITE == 2), np.flatnonzero(SITE == 4)[:1])
    with pytest.raises(ValueError, match="fewer rows than the 2 folds: 4"):
        result.invariance(result.data.take(rows))


@pytest.mark.slow
def test_an_adversary_hides_the_cluster():
    """A feature tells the cluster, another the outcome; without an adversary both are learned."""
    rng = np.random.default_rng(4)
    sites, n = 4, 2000
    site = np.arange(n) % sites
    risk = np.linspace(-2, 2, sites)
    x = np.column_stack([rng.normal(size=n), risk[site] + 0.3 * rng.normal(size=n)])
    y = (rng.random(n) < 1 / (1 + np.exp(-x[:, 0] - risk[site]))).astype(float)
    data = ClusteredData.from_arrays(x, y, {"site": site})
    train, held = data.split_rows(0.5, seed=0)
    accuracy = {}
    for weight in (0.0, 3.0):
        torch.manual_seed(1)
        # One unit: it cannot hand on the outcome's feature and the cluster's side by side.
        net = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1))
        game = Adversary("site", ["0"], weight=weight)
        # Random effects would explain what the cluster's feature does: there are none.
        model = MixedEffects(net, (), "bernoulli", game)
        schedule = Schedule(steps=800, stages=0, batch_size=128, net_learning_rate=0.02)
        result = fit(model, train, schedule=schedule, refine=False, progress=False)
        accuracy[weight] = by_probe(result.invariance(held))
    # Chance is 1/4.
    free, hidden = accuracy[0.0].loc["linear"], accuracy[3.0].loc["linear"]
    assert free["accuracy"] > 0.5
    assert free["p_leak"] < 0.01
    assert hidden["accuracy"] < 0.25 + 3 * np.sqrt(0.25 * 0.75 / held.n_rows)
    assert hidden["p_leak"] > 0.05
