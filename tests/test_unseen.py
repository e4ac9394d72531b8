"""Modes for clusters not seen in training: explicit, one draw a cluster, labelled results."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from armed_pyro import ClusteredData, MixedEffects, Schedule, Slopes, fit
from armed_pyro.prediction.chunks import predict_chunks
from armed_pyro.prediction.label_noise import label_noise
from armed_pyro.prediction.predict import effect_source
from armed_pyro.prediction.unseen import MODES, check_mode, one_cluster_per_row

SHORT = Schedule(steps=20, window=10, stages=0)


def table(schools=12, districts=4, rows=6, seed=0):
    """Schools nested in districts, crossed with years."""
    rng = np.random.default_rng(seed)
    school = np.repeat(np.arange(schools), rows)
    n = len(school)
    frame = pd.DataFrame(
        {
            "x": rng.normal(size=n) + 0.5 * (school % 3),
            "z": rng.normal(size=n),
            "school": [f"s{k}" for k in school],
            "district": [f"d{k % districts}" for k in school],
            "year": np.arange(n) % 5,
        }
    )
    frame["y"] = frame.x + rng.normal(size=schools)[school] + 0.5 * rng.normal(size=n)
    frame["won"] = (rng.random(n) < 0.5).astype(int)
    return frame


FRAME = table()


def trained(random, family="gaussian", outcome="y", net=None, head=True):
    data = ClusteredData.from_frame(
        FRAME, outcome=outcome, clusters=["school", "district", "year"], features=["x", "z"]
    )
    torch.manual_seed(0)
    model = MixedEffects(net or nn.Linear(2, 1), random, family, bayesian_head=head)
    return fit(model, data, schedule=SHORT, refine=False, progress=False)


@pytest.fixture(scope="module")
def nested():
    return trained(["(1 | school)", "(1 | district)"])


@pytest.fixture(scope="module")
def layered():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(2, 6), nn.ELU(), nn.Linear(6, 1))
    return trained(["(1 + x | school)", Slopes("school", on="1")], "bernoulli", "won", net, False)


def rows(**columns):
    n = max(len(values) for values in columns.values())
    return FRAME.drop(columns=["y", "won"]).head(n).assign(**columns)


def support(**columns):
    n = max(len(values) for values in columns.values())
    return FRAME.head(n).assign(**columns)


def test_nothing_is_assumed_silently(nested):
    with pytest.raises(ValueError, match="not seen in training") as caught:
        nested.predict(rows(school=["s1", "new", "s2"], district=["d1", "d1", "elsewhere"]))
    message = str(caught.value)
    assert "1 of 'school' ('new'; training had 's0'" in message
    assert "1 of 'district' ('elsewhere'; training had" in message
    assert all(f"{mode}: {meaning}" in message for mode, meaning in MODES.items())


def test_every_mode_of_the_design_exists():
    assert list(MODES) == ["population", "marginal", "membership", "nearest", "adapt"]


def test_a_mode_out_of_place_is_refused(nested):
    new = rows(school=["new"])
    with pytest.raises(ValueError, match="needs labelled rows"):
        nested.predict(new, unseen="adapt")
    with pytest.raises(ValueError, match="'adapt' only, found the mode 'marginal'"):
        nested.predict(new, unseen="marginal", support=support(school=["new"]))
    with pytest.raises(ValueError, match="unknown mode 'x'"):
        check_mode("x", {}, {})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("which", ["nested", "layered"])
def test_all_rows_of_a_new_cluster_share_its_draw(which, mode, request):
    result = request.getfixturevalue(which)
    one = rows(school=["new"] * 4, x=[0.3] * 4, z=[1.0] * 4)
    two = pd.concat([one.head(2), one.head(2).assign(school="other"), one.tail(2)])
    given = {"support": support(school=["new", "other"])} if mode == "adapt" else {}
    made = result.predict(two, unseen=mode, draws=60, **given)
    np.testing.assert_allclose(made.expected[:, [0] * 4], made.expected[:, [0, 1, 4, 5]], rtol=1e-5)
    assert set(made.unseen) == {mode}
    if mode not in ("population", "nearest"):
        assert not np.allclose(made.expected[:, 0], made.expected[:, 2])


@pytest.mark.parametrize("mode", ["marginal", "membership"])
def test_a_clusters_draw_depends_on_its_label_alone(nested, mode):
    both = rows(school=["new", "other"], x=[1.0, 2.0])
    alone = rows(school=["new"], x=[1.0])
    first = nested.predict(both, unseen=mode, draws=30)
    second = nested.predict(alone, unseen=mode, draws=30)
    np.testing.assert_allclose(first.expected[:, 0], second.expected[:, 0], rtol=1e-5)
    other_seed = nested.predict(alone, unseen=mode, draws=30, seed=5)
    assert not np.allclose(second.expected, other_seed.expected)


def test_label_noise_is_standard_normal_and_its_own_for_every_label_and_factor():
    like = torch.zeros(4000, 1, 2, dtype=torch.float64)
    noise = label_noise(3, "site", [f"s{k}" for k in range(10)], like)
    assert noise.shape == (4000, 10, 2)
    flat = noise.flatten(1)
    assert float(flat.mean(0).abs().max()) < 4.5 / np.sqrt(4000)
    correlation = torch.corrcoef(flat.T) - torch.eye(20)
    assert float(correlation.abs().max()) < 4.5 / np.sqrt(4000)
    other = label_noise(3, "batch", ["s0"], like)[:, 0, 0]
    assert abs(float(torch.corrcoef(torch.stack([other, noise[:, 0, 0]]))[0, 1])) < 0.07
    fewer = label_noise(3, "site", ["s4"], like[:7])
    assert torch.equal(fewer[:, 0], noise[:7, 4]), "a draw's noise does not depend on their number"


@pytest.mark.parametrize("mode", ["marginal", "membership", "nearest", "adapt"])
def test_each_factor_is_seen_or_not_on_its_own(nested, mode):
    """New school in a known district, known school in a new one, both new, both known."""
    four = rows(school=["new", "s1", "new2", "s1"], district=["d1", "d9", "d9", "d1"], x=[0.0] * 4)
    given = {"support": support(school=["new", "new2"], district=["d1", "d9"])}
    given = given if mode == "adapt" else {}
    made = nested.predict(four, unseen=mode, draws=40, **given)
    assert list(made.unseen) == [mode, mode, mode, ""]
    assert list(made.new["school"].labels) == ["new", "new2"]
    assert list(made.new["district"].labels) == ["d9"]
    if mode == "adapt":
        return  # the seen clusters' draws are reweighted
    latents, facts = nested.draws(40), nested.model.data_facts()
    school = dict(zip(["new", "new2"], made.new["school"].values[:, :, 0].T, strict=True))
    school["s1"] = latents["school_effect"][:, facts.levels["school"].get_loc("s1"), 0].numpy()
    school["s1"] = school["s1"] * facts.spread
    district = {"d9": made.new["district"].values[:, 0, 0]}
    district["d1"] = latents["district_effect"][:, 1, 0].numpy() * facts.spread
    fixed = nested.predict(four.assign(school="a", district="b"), unseen="population", draws=40)
    for place, (s, d) in enumerate(zip(four.school, four.district, strict=True)):
        expected = fixed.expected[:, place] + school[s] + district[d]
        np.testing.assert_allclose(made.expected[:, place], expected, rtol=2e-3, atol=2e-4)


def test_nested_new_levels():
    result = trained("(1 | district/school)")
    four = rows(district=["d1", "d1", "d9", "d0"], school=["s1", "new", "s1", "s1"])
    for mode in ("population", "marginal", "membership", "nearest"):
        made = result.predict(four, unseen=mode, draws=20)
        assert list(made.unseen) == ["", mode, mode, mode], "s1 is known in d1 alone"
        assert list(made.new["district:school"].labels) == ["d0:s1", "d1:new", "d9:s1"]
    labelled = support(district=["d1", "d9"], school=["new", "s1"])
    made = result.predict(four, unseen="adapt", support=labelled, draws=20)
    assert list(made.unseen) == ["", "adapt", "adapt", "marginal"]


@pytest.mark.parametrize("mode", ["population", "marginal", "membership", "nearest"])
def test_blocks_and_order_do_not_matter(nested, mode):
    new = FRAME.assign(school=[f"n{k % 7}" for k in range(len(FRAME))])
    data = ClusteredData.encode(new, nested.data.schema)
    whole = nested.predict(data, unseen=mode, draws=9)
    order = np.random.default_rng(0).permutation(len(FRAME))
    shuffled = nested.predict(data.take(order), unseen=mode, draws=9)
    np.testing.assert_allclose(shuffled.expected, whole.expected[:, order], rtol=1e-4, atol=1e-5)
    source, _ = effect_source(nested.posterior, data, mode, draws=9)
    parts = [
        part.expected
        for start in range(0, len(FRAME), 10)
        for part in predict_chunks(
            nested.posterior, data.take(slice(start, start + 10)), source, draws=9
        )
    ]
    np.testing.assert_allclose(np.concatenate(parts, 1), whole.expected, rtol=1e-4, atol=1e-5)


def test_rows_apart_are_clusters_of_their_own(nested):
    data = ClusteredData.encode(rows(school=["new", "new", "s1"]), nested.data.schema)
    labels = one_cluster_per_row(nested.model, data, start=7).grouping("school").labels()
    assert list(labels) == ["new (row 7)", "new (row 8)", "s1"]


def test_the_tree_keeps_the_clusters(layered):
    data = ClusteredData.encode(FRAME.assign(school=["a", "b", "s0"] * 24), layered.data.schema)
    made = layered.predict(data, unseen="marginal", draws=12)
    tree = made.to_datatree(data)
    effect = tree["predictions"]["school_effect"]
    assert effect.dims == ("chain", "draw", "school", "school_term")
    assert list(effect["school"].values) == ["a", "b"]
    assert list(effect["school_term"].values)[:3] == ["Intercept", "x", "1[0]"]
    assert tree["predictions"]["won"].dims == ("chain", "draw", "row")
    assert list(tree["predictions"]["school_mode"].values) == ["marginal"] * 2
    assert list(tree["predictions_constant_data"]["school"].values[:3]) == ["a", "b", "s0"]
    np.testing.assert_array_equal(tree["observed_data"]["won"], FRAME.won)
    # What the effects are: on the original scale, those that the expected outcomes have.
    at_zero = layered.predict(data, unseen="population", draws=12)
    assert not np.allclose(at_zero.expected[:, 0], made.expected[:, 0])


def test_a_tree_can_be_written(nested, tmp_path):
    made = nested.predict(rows(school=["new", "s1"]), unseen="marginal", draws=5)
    made.to_datatree().to_netcdf(tmp_path / "p.nc", engine="h5netcdf")
    assert (tmp_path / "p.nc").stat().st_size > 0
