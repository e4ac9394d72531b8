"""Facts: what is remembered of the training data, and rows encoded with it."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from armed_pyro import ClusteredData, MixedEffects
from armed_pyro.families.registry import family_named
from armed_pyro.program.data_spec import Facts


def make_frame(n=40, seed=0):
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "y": rng.normal(100, 15, n),
            "kind": rng.permutation(np.arange(n) % 3).astype(str),
            "age": rng.normal(50, 10, n),
            "sex": rng.choice(["f", "m"], n),
            "smoker": rng.integers(0, 2, n),
            "site": np.arange(n) % 4,
            "ward": rng.choice(["u", "v"], n),
        }
    )


def make_data(frame=None, outcome="y", **roles):
    frame = make_frame() if frame is None else frame
    return ClusteredData.from_frame(
        frame,
        outcome=outcome,
        clusters=["site", "ward"],
        features=["age", "sex", "smoker"],
        **roles,
    )


def make_facts(outcome="y", family="gaussian"):
    return Facts.of(make_data(outcome=outcome), family_named(family), ["site", "site:ward"])


def test_only_continuous_features_are_standardised():
    data, facts = make_data(), make_facts()
    x = facts.scaling.standardise(data.features)
    assert facts.feature_names == ("age", "sex[T.m]", "smoker")
    assert x[:, 0].mean() == pytest.approx(0, abs=1e-12)
    assert x[:, 0].std() == pytest.approx(1)
    torch.testing.assert_close(x[:, 1:], data.features[:, 1:])


def test_sizes_scales_and_labels():
    data, facts = make_data(), make_facts()
    assert facts.n_rows == 40
    assert facts.center == (pytest.approx(data.outcome.mean().item()),)
    assert facts.spread == pytest.approx(data.outcome.std().item())
    assert facts.levels["site"].tolist() == [0, 1, 2, 3]
    assert facts.counts["site"].tolist() == [10] * 4
    assert set(facts.levels["site:ward"]) <= {f"{s}:{w}" for s in range(4) for w in "uv"}
    assert make_facts("kind", "categorical").columns == ("1", "2")


@pytest.mark.parametrize(("outcome", "family"), [("y", "gaussian"), ("kind", "categorical")])
def test_facts_survive_json(outcome, family):
    facts = make_facts(outcome, family)
    text = json.dumps(facts.to_json())
    loaded = Facts.from_json(json.loads(text))
    assert json.dumps(loaded.to_json()) == text
    assert loaded.feature_mean == facts.feature_mean
    assert loaded.levels["site"].dtype == facts.levels["site"].dtype
    assert loaded.classes == facts.classes
    data, like = make_data(outcome=outcome), torch.zeros(())
    first, second = facts.encode(data, like), loaded.encode(data, like)
    torch.testing.assert_close(first.x, second.x, rtol=0, atol=0)
    assert torch.equal(first.codes["site:ward"], second.codes["site:ward"])


def test_a_fit_of_before_there_were_averages_keeps_its_priors_and_effects():
    """Its guide has independent effects at x = 0, and its fixed effects were independent."""
    values = make_facts().to_json()
    assert len(values.pop("feature_average")) == len(values["feature_names"])
    earlier = Facts.from_json(values)
    net = nn.Linear(len(earlier.feature_names), 1)
    random = [f"(1 + {earlier.feature_names[0]} || site)"]
    model = MixedEffects(net, random, bayesian_head=True).bind(earlier)
    assert model.fixed_root is None
    assert model.factors[0].diagonal


@pytest.mark.parametrize("like", [torch.zeros((), dtype=torch.float32), torch.zeros(()).double()])
def test_rows_get_the_networks_precision(like):
    frame = make_frame().assign(n=3, e=0.5, w=2)
    facts = make_facts()
    source = facts.encode(make_data(frame, trials="n", offset="e", weights="w"), like)
    for one in (source.x, source.y, source.trials, source.offset, source.weights):
        assert one.dtype == like.dtype
    assert (source.trials[0], source.offset[0], source.weights[0]) == (3, 0.5, 2)


def test_new_rows_keep_the_training_codes_and_scales():
    facts, frame = make_facts(), make_frame()
    new = ClusteredData.encode(frame[frame.site > 1], make_data().schema)
    source = facts.encode(new, torch.zeros(()).double())
    assert source.codes["site"].unique().tolist() == [2, 3]
    assert source.counts["site"].tolist() == [0, 0, 10, 10]
    np.testing.assert_allclose(
        source.x[:, 0], (frame.age[frame.site > 1] - frame.age.mean()) / frame.age.std()
    )


def test_new_clusters_are_coded_after_the_known_ones():
    facts, frame = make_facts(), make_frame()
    new = ClusteredData.encode(frame.assign(site=frame.site + 2), make_data().schema)
    with pytest.raises(ValueError, match="cluster 4 of 'site' was not seen in training"):
        facts.encode(new, torch.zeros(()))
    levels = facts.levels_with(new)
    assert levels["site"].tolist() == [0, 1, 2, 3, 4, 5]
    source = facts.encode(new, torch.zeros(()), levels)
    assert source.codes["site"].tolist() == (frame.site + 2).tolist()


def test_other_features_are_refused():
    other = ClusteredData.from_frame(
        make_frame(), outcome="y", clusters=["site", "ward"], features=["age", "smoker"]
    )
    with pytest.raises(
        ValueError, match=r"missing: \['sex\[T.m\]'\].*ClusteredData\.encode\(table, data\.schema\)"
    ):
        make_facts().encode(other, torch.zeros(()))


def test_clusters_without_rows():
    rows = make_facts().clusters(torch.zeros(()))
    assert len(rows) == 0
    assert rows.memberships["site"].index.tolist() == [0, 1, 2, 3]


def test_images_are_left_as_they_are():
    images = np.random.default_rng(0).normal(5, 3, (12, 1, 4, 4)).astype(np.float32)
    data = ClusteredData.from_arrays(images, np.arange(12.0), {"site": np.arange(12) % 3})
    facts = Facts.of(data, family_named("gaussian"), ["site"])
    assert facts.feature_shape == (1, 4, 4)
    torch.testing.assert_close(facts.scaling.standardise(data.features), torch.from_numpy(images))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.assign(site=1), "single level"),
    ],
)
def test_unfit_training_data_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Facts.of(make_data(change(make_frame())), family_named("gaussian"), ["site"])


def test_labels_that_became_text_are_still_those_seen():
    train = pd.DataFrame({"y": [1.0, 2, 3, 5], "site": [308, 308, 309, 309]})
    data = ClusteredData.from_frame(train, outcome="y", clusters=["site"])
    facts = Facts.of(data, family_named("gaussian"), ["site"])
    new = ClusteredData.encode(pd.DataFrame({"site": ["309", "new", "308", "309"]}), data.schema)
    levels = facts.levels_with(new)
    assert list(levels["site"]) == [308, 309, "new"]
    assert facts.encode(new, torch.zeros(()), levels).codes["site"].tolist() == [1, 2, 0, 1]
