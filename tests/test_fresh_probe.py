"""The fresh probe: chance without information, and every kind of leak found."""

import json

import numpy as np
import pytest
import scipy
import torch
from torch import nn

from armed_pyro import Adversary, ClusteredData, MixedEffects, Schedule, fit
from armed_pyro.networks.fresh_probe import MOST_CLUSTERS, MOST_ROWS, FreshProbe

N, SITES = 240, 6


def noise(seed=0, n=N, width=4):
    return np.random.default_rng(seed).normal(size=(n, width))


def sites(n=N, k=SITES):
    return np.arange(n) % k


def test_features_without_clusters_are_read_at_chance():
    probes = [FreshProbe.of("site", noise(seed, width=8), sites(), seed=seed) for seed in range(25)]
    accuracy = np.array([probe.accuracy for probe in probes])
    # Stratified folds are a little below chance, and never above it by more than noise.
    assert abs(accuracy.mean() - 1 / SITES) < 0.03
    assert accuracy.std(ddof=1) < 1.5 * np.sqrt(1 / SITES * (1 - 1 / SITES) / N)
    # 5% of 25, and 4 are the 97% quantile of that binomial distribution.
    assert sum(probe.reads for probe in probes) <= 4
    assert all(probe.chance == pytest.approx(1 / SITES) for probe in probes)


def test_a_cluster_in_the_features_is_read():
    features = noise()
    features[:, 0] += 12 * sites()
    probe = FreshProbe.of("site", features, sites())
    assert probe.accuracy > 0.95
    assert probe.effect > 0.9
    assert probe.p < 1e-50
    assert probe.reads


def test_what_no_line_separates_is_read():
    site, features = sites(k=2), noise()
    sign = np.sign(features[:, 0]) * np.where(site == 1, 1, -1)
    features[:, 1] = np.abs(features[:, 1]) * sign
    assert FreshProbe.of("site", features, site).accuracy > 0.8


def test_figures_agree_with_the_binomial_distribution():
    features = noise()
    features[:, 0] += 0.8 * sites()
    probe = FreshProbe.of("site", features, sites())
    hits = round(probe.accuracy * N)
    assert probe.se == pytest.approx(np.sqrt(probe.accuracy * (1 - probe.accuracy) / N))
    assert probe.p == pytest.approx(scipy.stats.binom.sf(hits - 1, N, 1 / SITES))
    assert probe.effect == pytest.approx((probe.accuracy - 1 / 6) / (5 / 6))


def test_chance_is_the_share_of_the_largest_cluster():
    site = np.repeat([0, 1, 2], [160, 50, 30])
    probe = FreshProbe.of("site", noise(), site)
    assert probe.chance == pytest.approx(160 / 240)
    assert not probe.reads


def test_a_cluster_that_the_outcome_tells_is_no_leak_of_features_of_the_outcome():
    rng = np.random.default_rng(3)
    site = sites(n=1000, k=2)
    outcome = (rng.random(1000) < np.where(site == 1, 0.8, 0.2)).astype(float)
    features = outcome[:, None] + 0.01 * rng.normal(size=(1000, 1))
    probe = FreshProbe.of("site", features, site, outcome)
    assert probe.by_outcome == pytest.approx(0.8, abs=0.04)
    assert probe.p < 1e-6  # above the largest share,
    assert not probe.reads  # but no more than the outcome allows
    leak = np.column_stack([features[:, 0], site + 0.3 * rng.normal(size=1000)])
    assert FreshProbe.of("site", leak, site, outcome).reads


def test_continuous_outcomes_are_cut_into_tenths():
    rng = np.random.default_rng(4)
    site = sites(n=900, k=3)
    outcome = 10.0 * site + rng.normal(size=900)
    assert FreshProbe.of("site", noise(n=900), site, outcome).by_outcome > 0.9
    assert FreshProbe.of("site", noise(n=900), site, rng.normal(size=900)).by_outcome < 0.42


def test_large_data_are_sampled():
    many = np.arange(3 * MOST_CLUSTERS * 30) % (3 * MOST_CLUSTERS)
    probe = FreshProbe.of("site", noise(n=len(many), width=1), many)
    assert probe.clusters == MOST_CLUSTERS
    assert probe.rows <= MOST_ROWS


def test_clusters_of_one_row_are_left_out():
    site = np.concatenate([np.repeat([0, 1], 20), np.arange(2, 12)])
    probe = FreshProbe.of("site", noise(n=50), site)
    assert (probe.rows, probe.clusters) == (40, 2)
    assert FreshProbe.of("site", noise(n=10), np.arange(10)) is None
    assert FreshProbe.of("site", noise(n=10), np.zeros(10, dtype=int)) is None


def test_the_seed_fixes_the_probe_and_records_are_json():
    probe = FreshProbe.of("site", noise(), sites(), seed=3)
    assert FreshProbe.of("site", noise(), sites(), seed=3) == probe
    assert FreshProbe.from_json(json.loads(json.dumps(probe.to_json()))) == probe
    assert str(probe).startswith(f"accuracy {probe.accuracy:.3f} (se {probe.se:.3f}) on 240 held-")


def test_probes_of_several_networks_are_pooled_over_their_rows():
    first = FreshProbe("site", 0.5, 0.1, 0.25, 0.0, 0.3, 40, 4, held_out=True)
    second = FreshProbe("site", 0.8, 0.1, 0.5, 0.0, 0.6, 60, 2, held_out=True)
    pooled = FreshProbe.pooled([first, second])
    assert pooled.accuracy == pytest.approx(0.68)
    assert pooled.chance == pytest.approx(0.4)
    assert pooled.by_outcome == pytest.approx(0.48)
    assert pooled.se == pytest.approx(np.sqrt(0.68 * 0.32 / 100))
    assert pooled.p == pytest.approx(scipy.stats.binom.sf(67, 100, 0.4))
    assert (pooled.rows, pooled.clusters) == (100, 6)
    assert FreshProbe.pooled([first]).p == pytest.approx(scipy.stats.binom.sf(19, 40, 0.25))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("n_sites", "held_out"), [(12, True), pytest.param(6, False, marks=pytest.mark.slow)]
)
def test_cross_fitted_networks_are_probed_with_the_rows_held_out_from_each(n_sites, held_out):
    """Where they are of too few clusters, the training rows are probed."""
    rng = np.random.default_rng(0)
    site = np.arange(10 * n_sites) % n_sites
    x = np.column_stack([rng.normal(size=len(site)), site + 0.01 * rng.normal(size=len(site))])
    data = ClusteredData.from_arrays(x, x[:, 0] + rng.normal(size=len(site)), {"site": site})
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1))
    game = Adversary("site", ["1"], weight=0.0, warmup_epochs=3)
    schedule = Schedule(steps=200, folds=3, window=2, patience=2)
    model = MixedEffects(net, "(1 | site)", adversary=game)
    result = fit(model, data, schedule=schedule, refine=False, progress=False)
    (probe,) = [FreshProbe.from_json(record) for record in result.history.probes]
    assert result.model.fold_networks is not None
    assert (probe.rows, probe.clusters) == (data.n_rows, n_sites)
    assert probe.held_out is held_out
    # Each network leaves out four of twelve sites, which the probe tells from each other.
    assert probe.chance == pytest.approx(1 / 4 if held_out else 1 / 6)
    assert probe.accuracy > probe.chance + 3 * probe.se
    # The best look at the held-out rows is one after the warm-up.
    assert result.history.warmup[0] > 1
    assert min(result.history.fold_steps) > result.history.warmup[0]
