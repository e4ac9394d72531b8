"""Membership of new clusters in seen ones: classifier, evidence, calibration, warnings."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from armed_pyro import ClusteredData, Fit, MixedEffects, Schedule, fit
from armed_pyro.prediction.cluster_classifier import (
    _architecture,
    _pooling,
    _temperature,
    calibration_error,
    train_classifier,
)
from armed_pyro.prediction.similarity import evidence_table, gather_evidence, merge_evidence
from armed_pyro.prediction.unseen import one_cluster_per_row

SHORT = Schedule(steps=20, window=10, stages=0)
CENTERS = np.array([-3.0, -1.0, 1.0, 3.0])


def table(rows=100, centers=CENTERS, names="abcd", seed=0):
    """Clusters that differ in the mean of one of two features, and in the outcome's."""
    rng = np.random.default_rng(seed)
    cluster = np.repeat(np.arange(len(centers)), rows)
    x = np.asarray(centers)[cluster] + rng.normal(size=len(cluster))
    y = 2.0 * cluster + x + 0.1 * rng.normal(size=len(cluster))
    site = np.array(list(names))[cluster]
    return pd.DataFrame({"x": x, "z": rng.normal(size=len(x)), "site": site, "y": y})


@pytest.fixture(scope="module")
def trained():
    data = ClusteredData.from_frame(table(), outcome="y", clusters=["site"])
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    model = MixedEffects(net, "(1 | site)")
    return fit(model, data, schedule=SHORT, refine=False, progress=False)


def best_posterior(x, prior=None):
    logits = -0.5 * (x[:, None] - CENTERS) ** 2
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def test_the_classifier_is_near_the_best_possible_and_calibrated(trained):
    one = trained.classifier("site")
    fresh = table(1000, seed=5)
    data = ClusteredData.encode(fresh, trained.data.schema)
    probability = one.log_prob(trained.model.encode(data).x).exp().numpy()
    best = best_posterior(fresh["x"].to_numpy())
    assert np.abs(probability - best).mean() < 0.05
    codes = data.grouping("site").codes.numpy()
    own = -np.log(probability[np.arange(len(codes)), codes])
    ideal = -np.log(best[np.arange(len(codes)), codes])
    assert own.mean() < ideal.mean() + 0.08  # 280 rows to learn from
    assert calibration_error(probability, codes) < 0.07  # 60 rows give the temperature
    # The same, as it judged itself by the 60 rows that it had kept for that.
    assert one.report["rows"] == pytest.approx(60, abs=2)
    assert one.report["accuracy"] == pytest.approx((best.argmax(1) == codes).mean(), abs=0.15)
    assert 0 <= one.report["ece"] < 0.25
    assert one.report["chance"] == 0.25


def test_temperature_cools_an_overconfident_classifier():
    rng = np.random.default_rng(0)
    codes = torch.as_tensor(rng.integers(0, 2, 4000))
    logits = torch.zeros(4000, 2, dtype=torch.float64)
    right = torch.as_tensor(rng.random(4000) < 0.8)  # but it says 98%
    logits[torch.arange(4000), torch.where(right, codes, 1 - codes)] = 4.0
    temperature = _temperature(logits, codes)
    assert temperature == pytest.approx(4.0 / math.log(0.8 / 0.2), rel=0.1)


def test_calibration_error_by_hand():
    probability = np.tile([0.9, 0.1], (1000, 1))
    codes = (np.arange(1000) % 10 >= 6).astype(int)  # right in 60%
    assert calibration_error(probability, codes) == pytest.approx(0.3, abs=0.02)


def test_pooling_is_full_where_rows_are_independent_and_least_where_they_say_nothing(trained):
    assert trained.classifier("site").pooling > 0.5
    rng = np.random.default_rng(0)
    codes = torch.as_tensor(np.repeat(np.arange(6), 50))
    prior = torch.full((6,), -np.log(6.0)).double()
    # Each row speaks for the same cluster, wrongly and a little: 50 of them would be sure.
    bias = torch.zeros(300, 6).double()
    bias[:, 2] = 0.2
    assert _pooling(bias, codes, prior) == 0.0
    x = torch.as_tensor(0.3 * codes.numpy() + rng.normal(size=300))
    ratio = -0.5 * (x[:, None] - 0.3 * torch.arange(6)) ** 2
    ratio = torch.log_softmax(ratio, 1) - prior
    assert _pooling(ratio, codes, prior) > 0.5


def test_it_is_trained_once_and_on_training_rows_only(trained):
    assert trained.classifier("site") is trained.classifier("site")
    again = train_classifier(trained.posterior, "site")
    for name, one in trained.classifier("site").tensors().items():
        assert torch.equal(one, again.tensors()[name]), "the seed decides"


def test_its_architecture_follows_the_network():
    data = ClusteredData.from_frame(table(), outcome="y", clusters=["site"])
    net = nn.Sequential(nn.Linear(2, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 1))
    bound = MixedEffects(net, "(1 | site)").bind(data)
    before = [one.clone() for one in bound.network.parameters()]
    made = _architecture(bound, 4)
    assert [tuple(one.shape) for one in made.parameters()][-2:] == [(4, 5), (4,)]
    assert made[0].out_features == 7
    assert all(torch.equal(a, b) for a, b in zip(before, bound.network.parameters(), strict=True))
    linear = MixedEffects(nn.Linear(2, 1), "(1 | site)").bind(data)
    assert len(list(_architecture(linear, 4).parameters())) == 4, "one hidden layer"


def test_pooled_evidence_is_the_sum_of_the_rows(trained):
    new = table(20, centers=[1.0], names="n", seed=3)
    data = ClusteredData.encode(new, trained.data.schema)
    one = gather_evidence(trained.posterior, data, trained.classifiers)["site"]
    classifier = trained.classifier("site")
    log_p = classifier.log_prob(trained.model.encode(data, {"site": pd.Index([*"abcdn"])}).x)
    share = (1 + 19 * classifier.pooling) / 20
    logits = classifier.log_prior + share * (log_p - classifier.log_prior).sum(0)
    np.testing.assert_allclose(one.probability()[0], torch.softmax(logits, 0), rtol=1e-6)
    assert one.probability()[0].argmax() == 2
    halves = [
        gather_evidence(trained.posterior, data.take(part), trained.classifiers)
        for part in (slice(0, 8), slice(8, 20))
    ]
    both = merge_evidence(*halves)["site"]
    np.testing.assert_allclose(both.probability(), one.probability(), rtol=1e-6)
    np.testing.assert_allclose(both.distance()[0], one.distance()[0], rtol=1e-6)


def test_one_rows_evidence_is_its_class_probability(trained):
    new = table(3, centers=[1.0], names="n", seed=3)
    data = ClusteredData.encode(new, trained.data.schema)
    alone = gather_evidence(
        trained.posterior, one_cluster_per_row(trained.model, data), trained.classifiers
    )["site"]
    x = trained.model.encode(data, {"site": pd.Index([*"abcdn"])}).x
    np.testing.assert_allclose(
        alone.probability(), trained.classifier("site").log_prob(x).exp(), rtol=1e-5
    )


def test_membership_is_the_mixture_of_the_seen_clusters_posteriors(trained):
    draws = 4000
    new = table(1, centers=[0.0], names="n", seed=3).assign(x=0.0)
    made = trained.predict(new, unseen="membership", draws=draws)
    chance = gather_evidence(
        trained.posterior, ClusteredData.encode(new, trained.data.schema), trained.classifiers
    )["site"].probability()[0]
    assert chance.max() < 0.8, "there must be something to mix"
    seen = trained.draws(draws)["site_effect"][..., 0].double() * trained.model.facts.spread
    mean = float((seen.mean(0) * torch.as_tensor(chance)).sum())
    second = float(((seen**2).mean(0) * torch.as_tensor(chance)).sum())
    effect = made.new["site"].values[:, 0, 0]
    error = effect.std() / np.sqrt(draws)
    assert effect.mean() == pytest.approx(mean, abs=4 * error)
    assert (effect**2).mean() == pytest.approx(second, abs=4 * (effect**2).std() / np.sqrt(draws))
    # In every draw it is one of the clusters' effects in that draw.
    gap = (torch.as_tensor(effect)[:, None] - seen).abs().min(1).values
    assert float(gap.max()) < 1e-5 * float(seen.abs().max())


def test_nearest_is_one_cluster_in_all_draws(trained):
    new = table(10, centers=[1.0], names="n", seed=3)
    made = trained.predict(new, unseen="nearest", draws=50)
    seen = trained.draws(50)["site_effect"][:, 2, 0].numpy() * trained.model.facts.spread
    np.testing.assert_allclose(made.new["site"].values[:, 0, 0], seen, rtol=1e-5)
    assert made.membership.loc[0, "nearest"] == "c"


def test_more_rows_make_it_surer_and_row_by_row_does_not(trained):
    entropy = []
    for n in (1, 4, 16):
        new = table(40, centers=[1.0], names="n", seed=8).head(n)
        entropy.append(trained.predict(new, unseen="membership", draws=2).membership["entropy"][0])
    assert entropy[2] < 0.3 * entropy[0]
    single = trained.predict(new, unseen="membership", pooled=False, draws=2)
    assert len(single.membership) == 16
    assert single.membership["entropy"].mean() > 3 * entropy[2]
    assert single.new == {}
    assert set(single.unseen) == {"membership"}


def test_a_cluster_like_no_seen_one_is_warned_of(trained):
    near = table(50, centers=[1.2], names="n", seed=3)
    far = table(50, centers=[30.0], names="f", seed=4)
    odd = table(50, centers=[1.0], names="z", seed=4).assign(z=lambda t: t.z + 25)
    with pytest.warns(UserWarning, match=r"features like those of 'f', 'z'"):
        made = trained.predict(pd.concat([near, far, odd]), unseen="membership", draws=2)
    assert made.membership["alien"].tolist() == [True, False, True]
    assert made.membership["cluster"].tolist() == ["f", "n", "z"]


def test_alien_is_rarely_said_of_clusters_of_the_same_kind():
    """30 clusters with means from a normal distribution, 200 new ones from the same."""
    rng = np.random.default_rng(1)
    names = [f"s{k:03d}" for k in range(230)]
    centers = rng.normal(size=(230, 2))
    site = np.repeat(np.arange(230), 20)
    x = centers[site] + rng.normal(size=(len(site), 2))
    y = rng.normal(size=230)[site] + rng.normal(size=len(site))
    data = ClusteredData.from_arrays(x, y, {"site": np.array(names)[site]})
    seen, unseen = data.hold_out_clusters("site", labels=names[30:])
    model = MixedEffects(nn.Linear(2, 1), "(1 | site)")
    result = fit(model, seen, schedule=SHORT, refine=False, progress=False)
    table = evidence_table(gather_evidence(result.posterior, unseen, result.classifiers))
    # That one lies further off than all 30 has the probability 1 / 31, on average over the 30.
    assert table["alien"].mean() < 0.06


def test_a_classifier_is_saved_with_the_fit(trained, tmp_path):
    trained.classifier("site")
    trained.save(tmp_path / "run", draws=10)
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    loaded = Fit.load(tmp_path / "run", net)
    assert list(loaded.classifiers) == ["site"]
    new = table(5, centers=[1.0, -2.0], names="nm", seed=3)
    one, other = (r.predict(new, unseen="membership", draws=9) for r in (trained, loaded))
    np.testing.assert_array_equal(one.expected, other.expected)
    pd.testing.assert_frame_equal(one.membership, other.membership)
    assert loaded.classifier("site").report == trained.classifier("site").report


def test_without_rows_features_or_factor_there_is_an_error(trained):
    bare = Fit(replace(trained.posterior, data=trained.data.take([])))
    with pytest.raises(ValueError, match="neither one nor the training rows"):
        bare.predict(table(2, centers=[0.0], names="n"), unseen="membership")
    with pytest.raises(ValueError, match="no grouping factor 'sites'"):
        trained.classifier("sites")
    data = ClusteredData.from_frame(table(), outcome="y", clusters=["site"], features=[])
    model = MixedEffects(Constant(), "(1 | site)")
    result = fit(model, data, schedule=SHORT, refine=False, progress=False)
    with pytest.raises(ValueError, match="has none"):
        result.predict(table(2, centers=[0.0], names="n"), unseen="nearest")


class Constant(nn.Module):
    """A network that reads nothing."""

    def __init__(self):
        super().__init__()
        self.level = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.level.expand(len(x), 1)
