"""Predictions: seen clusters, every mode for unseen ones, and the tables they become."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from armed_pyro import Adversary, ClusteredData, MixedEffects, Schedule, fit
from armed_pyro.prediction.chunks import predict_chunks
from armed_pyro.prediction.predict import effect_source
from armed_pyro.prediction.unseen import MODES

PLAIN = ("population", "marginal")  # the others are in test_membership and test_adaptation
SHORT = Schedule(steps=4, window=2, stages=0)


def make_frame(n=48, seed=0):
    """Rows of 4 sites and 3 batches; `arm` is nested in `site`."""
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "x": rng.normal(5.0, 2.0, n),
            "sex": rng.permutation(["f", "m"] * (n // 2)),
            "site": [f"s{i % 4}" for i in range(n)],
            "batch": [f"b{i % 3}" for i in range(n)],
            "arm": [f"a{(i // 4) % 2}" for i in range(n)],
        },
        index=[f"row{i}" for i in range(n)],
    )
    frame["y"] = 10 + 3 * frame["x"] + 2.0 * (frame["site"] == "s1") + rng.normal(size=n)
    frame["won"] = (rng.random(n) < 0.4).astype(int)
    frame["trials"] = rng.integers(3, 9, n)
    frame["hits"] = rng.binomial(frame["trials"], 0.4)
    frame["grade"] = rng.permutation(["low", "mid", "top"] * (n // 3))
    frame["count"] = rng.poisson(3, n)
    return frame


FRAME = make_frame()
FEATURES = ["x", "sex"]


def run(random="(1 | site)", *, outcome="y", family="gaussian", head=True, frame=FRAME, **options):
    roles = {k: options.pop(k) for k in ("trials", "offset") if k in options}
    clusters = ["site", "batch", "arm"]
    data = ClusteredData.from_frame(
        frame, outcome=outcome, clusters=clusters, features=FEATURES, **roles
    )
    torch.manual_seed(0)
    net = nn.Linear(2, 3 if family == "categorical" else 1)
    model = MixedEffects(net, random, family, bayesian_head=head, **options)
    return fit(model, data, schedule=SHORT, progress=False)


@pytest.fixture(scope="module")
def site_fit():
    return run()


@pytest.fixture(scope="module")
def plain_fit():
    """Fixed effects without uncertainty, so that all spread is the random effects'."""
    return run(head=False)


def at(**columns):
    """New rows like the first ones, with these columns changed."""
    n = max(len(values) for values in columns.values())
    return FRAME.drop(columns="y").head(n).assign(**columns)


def linear_part(result, frame, draws, seed=None):
    """Fixed effects and random intercepts by hand, on the scale of y: "draws rows"."""
    facts, latents = result.model.facts, result.draws(draws, seed=seed)
    x = np.column_stack([frame["x"], frame["sex"] == "m"])
    x = (x - np.array(facts.feature_mean)) / np.array(facts.feature_scale)
    x = np.column_stack([np.ones(len(x)), x])
    fixed = latents["fixed_effect"][:, 0].double().numpy() @ x.T
    return fixed, {k: v[..., 0].double().numpy() for k, v in latents.items() if "effect" in k}


def on_scale(result, standardised):
    facts = result.model.facts
    return facts.center[0] + facts.spread * standardised


# --------------------------------------------------------------------------------- seen clusters


def test_seen_clusters_get_their_own_effects(site_fit):
    rows = FRAME.iloc[[3, 0, 9]]
    prediction = site_fit.predict(rows, draws=20)
    fixed, effects = linear_part(site_fit, rows, 20)
    codes = [site_fit.model.facts.levels["site"].get_loc(site) for site in rows["site"]]
    expected = on_scale(site_fit, fixed + effects["site_effect"][:, codes])
    np.testing.assert_allclose(prediction.expected, expected, rtol=1e-4)
    assert list(prediction.unseen) == ["", "", ""]


def test_row_order_and_labels_are_kept(site_fit):
    order = np.random.default_rng(0).permutation(len(FRAME))
    one = site_fit.predict(FRAME, draws=10)
    other = site_fit.predict(FRAME.iloc[order], draws=10)
    np.testing.assert_allclose(other.expected, one.expected[:, order], rtol=1e-5)
    assert list(other.row_labels) == list(other.to_frame().index) == list(FRAME.index[order])


def test_the_outcome_is_not_needed_and_data_serves_as_well_as_a_table(site_fit):
    one = site_fit.predict(FRAME.drop(columns="y"), draws=5)
    other = site_fit.predict(site_fit.data, draws=5)
    np.testing.assert_array_equal(one.expected, other.expected)


@pytest.mark.parametrize("mode", [None, *PLAIN])
def test_seen_clusters_do_not_depend_on_the_mode(site_fit, mode):
    rows = at(site=["s0", "new", "s2"])
    seen = site_fit.predict(rows.iloc[[0, 2]], unseen=mode, draws=5)
    plain = site_fit.predict(rows.iloc[[0, 2]], draws=5)
    np.testing.assert_array_equal(seen.expected, plain.expected)
    assert set(seen.unseen) == {""}


def test_seeds_decide_the_draws(site_fit):
    one, again = site_fit.predict(FRAME, draws=5, seed=1), site_fit.predict(FRAME, draws=5, seed=1)
    np.testing.assert_array_equal(one.expected, again.expected)
    np.testing.assert_array_equal(one.outcome, again.outcome)
    other = site_fit.predict(FRAME, draws=5, seed=2)
    assert not np.isclose(one.expected, other.expected).any()
    default = site_fit.predict(FRAME, draws=5)
    np.testing.assert_array_equal(
        default.outcome, site_fit.predict(FRAME, draws=5, seed=site_fit.seed).outcome
    )


# ------------------------------------------------------------------------------- unseen clusters


def test_unseen_clusters_need_a_mode_and_the_error_explains_them(site_fit):
    with pytest.raises(ValueError, match="not seen in training") as caught:
        site_fit.predict(at(site=["s9", "s0", "s8", "s9"]))
    message = str(caught.value)
    assert "2 of 'site' ('s8', 's9'; training had 's0'" in message
    assert all(f"{mode}: {meaning}" in message for mode, meaning in MODES.items())


@pytest.mark.parametrize("site", ["s0", "s9"])
def test_an_unknown_mode_is_refused_with_the_modes(site_fit, site):
    with pytest.raises(ValueError, match=r"(?s)'averge'.*population.*marginal"):
        site_fit.predict(at(site=[site]), unseen="averge")


def test_population_is_the_fixed_effects_alone(site_fit):
    rows = at(site=["s9", "s8"])
    prediction = site_fit.predict(rows, unseen="population", draws=20)
    fixed, _ = linear_part(site_fit, rows, 20)
    np.testing.assert_allclose(prediction.expected, on_scale(site_fit, fixed), rtol=1e-4)
    assert set(prediction.unseen) == {"population"}


def test_marginal_spreads_as_a_new_cluster_does(site_fit):
    draws, rows = 4000, at(site=["s9"])
    prediction = site_fit.predict(rows, unseen="marginal", draws=draws)
    fixed, _ = linear_part(site_fit, rows, draws)
    effect = (prediction.expected - on_scale(site_fit, fixed))[:, 0]
    sd = site_fit.draws(draws)["site_sd"].numpy().ravel() * site_fit.model.facts.spread
    excess = effect**2 - sd**2
    assert abs(effect.mean()) < 4 * effect.std() / np.sqrt(draws)
    assert abs(excess.mean()) < 4 * excess.std() / np.sqrt(draws)
    total = np.sqrt((sd**2).mean() + on_scale(site_fit, fixed).var())
    # sd of a sample sd, allowing for tails twice as heavy as the normal's.
    assert prediction.sd[0] == pytest.approx(total, rel=4 / np.sqrt(draws))


def test_marginal_effects_follow_each_draws_own_sd(site_fit):
    """Large effects come with large sds: D is not replaced by its mean."""
    draws, rows = 4000, at(site=["s9"])
    prediction = site_fit.predict(rows, unseen="marginal", draws=draws)
    fixed, _ = linear_part(site_fit, rows, draws)
    effect = np.abs(prediction.expected - on_scale(site_fit, fixed))[:, 0]
    sd = site_fit.draws(draws)["site_sd"].numpy().ravel() * site_fit.model.facts.spread
    assert np.std(sd) / np.mean(sd) > 0.02, "there must be some uncertainty of the sd"
    low, high = np.quantile(sd, [0.5, 0.5])
    ratio = (effect / sd)[sd > high].mean() / (effect / sd)[sd < low].mean()
    # E|z| = 0.8, sd 0.6, in each half.
    assert ratio == pytest.approx(1.0, abs=4 * (0.6 / 0.8) * np.sqrt(2 / (draws / 2)))


def test_rows_of_one_new_cluster_share_its_draw(plain_fit):
    rows = at(site=["s9", "s8", "s9"], x=[1.0, 2.0, 9.0])
    prediction = plain_fit.predict(rows, unseen="marginal", draws=2000)
    apart = prediction.expected[:, 2] - prediction.expected[:, 0]
    assert np.ptp(apart) < 1e-3 * prediction.sd[0], "an intercept shifts all rows alike"
    correlation = np.corrcoef(prediction.expected[:, 0], prediction.expected[:, 1])[0, 1]
    assert abs(correlation) < 4 / np.sqrt(2000)
    assert prediction.sd[0] > 0


def test_modes_are_named_row_by_row(site_fit):
    prediction = site_fit.predict(at(site=["s0", "s9", "s1"]), unseen="marginal", draws=5)
    assert list(prediction.to_frame()["unseen"]) == ["", "marginal", ""]


@pytest.fixture(scope="module")
def crossed_fit():
    return run("(1 | site) + (1 | batch)")


@pytest.mark.parametrize("mode", PLAIN)
def test_a_seen_factor_keeps_its_effect_beside_an_unseen_one(crossed_fit, mode):
    draws, rows = 2000, at(site=["s1", "s1", "s9"], batch=["b0", "b9", "b9"])
    prediction = crossed_fit.predict(rows, unseen=mode, draws=draws)
    fixed, effects = linear_part(crossed_fit, rows, draws)
    site = effects["site_effect"][:, 1]
    batch = effects["batch_effect"][:, 0]
    both = on_scale(crossed_fit, fixed[:, 0] + site + batch)
    np.testing.assert_allclose(prediction.expected[:, 0], both, rtol=1e-4)
    assert list(prediction.unseen) == ["", mode, mode]
    rest = prediction.expected[:, 1] - on_scale(crossed_fit, fixed[:, 1] + site)
    if mode == "population":
        np.testing.assert_allclose(rest, 0, atol=1e-3)
    else:
        sd = crossed_fit.draws(draws)["batch_sd"].numpy().ravel() * crossed_fit.model.facts.spread
        excess = rest**2 - sd**2
        assert abs(excess.mean()) < 4 * excess.std() / np.sqrt(draws)


def test_a_new_inner_cluster_keeps_its_known_outer_one():
    result = run("(1 | site/arm)")
    draws, rows = 50, at(site=["s1", "s1", "s9"], arm=["a1", "a7", "a0"])
    prediction = result.predict(rows, unseen="population", draws=draws)
    fixed, effects = linear_part(result, rows, draws)
    cell = result.model.facts.levels["site:arm"].get_loc("s1:a1")
    site, arm = effects["site_effect"][:, 1], effects["site:arm_effect"][:, cell]
    own = np.stack([fixed[:, 0] + site + arm, fixed[:, 1] + site, fixed[:, 2]], 1)
    np.testing.assert_allclose(prediction.expected, on_scale(result, own), rtol=1e-4)
    # Arm a0 is known of other sites, but not of s9.
    assert list(prediction.unseen) == ["", "population", "population"]


def test_unseen_clusters_of_a_factor_without_effects_need_no_mode():
    result = run((), adversary=Adversary("site", [""]))
    prediction = result.predict(at(site=["s9", "s0"]), draws=5)
    assert list(prediction.unseen) == ["", ""]


# ---------------------------------------------------------------------------------------- chunks


@pytest.mark.parametrize("mode", PLAIN)
@pytest.mark.parametrize("chunk", [1, 7, 48])
def test_blocks_of_rows_give_the_same_expected_outcomes(crossed_fit, mode, chunk):
    rows = FRAME.assign(site=["s9", "s0", "s8", "s1"] * 12)
    whole = crossed_fit.predict(rows, unseen=mode, draws=9)
    posterior, data = crossed_fit.posterior, crossed_fit.posterior.encode(rows)
    source, _ = effect_source(posterior, data, mode, draws=9)
    parts = list(predict_chunks(posterior, data, source, draws=9, chunk=chunk))
    assert [len(part.unseen) for part in parts[:-1]] == [chunk] * (len(parts) - 1)
    joined = np.concatenate([part.expected for part in parts], 1)
    # To the last bits: blocks of other sizes may be multiplied in another order.
    np.testing.assert_allclose(joined, whole.expected, rtol=1e-6)
    assert list(np.concatenate([part.unseen for part in parts])) == list(whole.unseen)
    assert [label for part in parts for label in part.row_labels] == list(rows.index)


def test_many_rows_are_joined_from_blocks(site_fit, monkeypatch):
    monkeypatch.setattr("armed_pyro.program.blocks.BLOCK_VALUES", 9 * 10)
    blocks = site_fit.predict(FRAME, draws=9)
    monkeypatch.undo()
    whole = site_fit.predict(FRAME, draws=9)
    np.testing.assert_allclose(blocks.expected, whole.expected, rtol=1e-6)
    pd.testing.assert_index_equal(blocks.row_labels, whole.row_labels)
    assert blocks.outcome.shape == whole.outcome.shape


# ------------------------------------------------------------------------- tables and intervals


def test_intervals_are_equal_tailed_and_nested(site_fit):
    prediction = site_fit.predict(FRAME, draws=400, prob=0.8)
    lower, upper = prediction.interval()
    expected = np.quantile(prediction.expected, [0.1, 0.9], axis=0)
    np.testing.assert_allclose(np.stack([lower, upper]), expected)
    wider = prediction.interval(0.95)
    assert (wider[0] < lower).all()
    assert (wider[1] > upper).all()
    low, high = prediction.interval(of="outcome")
    assert (high - low > upper - lower).all(), "y varies about its mean"
    with pytest.raises(ValueError, match="'expected' or 'outcome'"):
        prediction.interval(of="mean")


def test_the_outcome_varies_about_its_mean_by_the_residual_sd(site_fit):
    prediction = site_fit.predict(FRAME, draws=2000)
    residual = (prediction.outcome - prediction.expected).ravel()
    sd = site_fit.draws(2000)["residual_sd"].numpy() * site_fit.model.facts.spread
    assert residual.std() == pytest.approx(np.sqrt((sd**2).mean()), rel=0.02)
    assert abs(residual.mean()) < 5 * residual.std() / np.sqrt(residual.size)


def test_the_table_has_these_columns_and_values(site_fit):
    prediction = site_fit.predict(FRAME, draws=50)
    table = prediction.to_frame()
    assert list(table.columns) == ["mean", "sd", "lower", "upper", "unseen"]
    np.testing.assert_allclose(table["mean"], prediction.expected.mean(0))
    np.testing.assert_allclose(table["sd"], prediction.expected.std(0, ddof=1))
    np.testing.assert_allclose(table["lower"], prediction.interval()[0])
    np.testing.assert_allclose(table["upper"], prediction.interval()[1])


def test_the_dataset_is_labelled(site_fit):
    dataset = site_fit.predict(FRAME, draws=7).to_dataset()
    assert dataset["y"].dims == dataset["y_expected"].dims == ("chain", "draw", "row")
    assert dataset["y"].shape == (1, 7, len(FRAME))
    assert list(dataset["row"].values) == list(FRAME.index)
    assert dataset["unseen"].dims == ("row",)


# -------------------------------------------------------------------------------------- families


@pytest.mark.parametrize("head", [True, False])
def test_class_probabilities_sum_to_one_and_name_their_classes(head):
    result = run(outcome="grade", family="categorical", head=head)
    prediction = result.predict(at(site=["s0", "s9"]), unseen="marginal", draws=11)
    assert prediction.expected.shape == (11, 2, 3)
    np.testing.assert_allclose(prediction.expected.sum(-1), 1, rtol=1e-5)
    assert set(np.unique(prediction.outcome)) <= {0, 1, 2}
    columns = [f"{part}[{c}]" for c in ("low", "mid", "top") for part in ("mean", "sd")]
    assert set(columns) <= set(prediction.to_frame())
    assert list(prediction.to_frame())[:4] == ["mean[low]", "sd[low]", "lower[low]", "upper[low]"]
    assert list(prediction.to_frame())[-1] == "unseen"
    dataset = prediction.to_dataset()
    assert dataset["grade_expected"].dims == ("chain", "draw", "row", "class")
    assert list(dataset["class"].values) == ["low", "mid", "top"]
    assert dataset["grade"].dims == ("chain", "draw", "row")


def test_class_probabilities_follow_the_classes_frequencies():
    frame = FRAME.assign(grade=["top"] * 40 + ["low"] * 4 + ["mid"] * 4)
    table = run(outcome="grade", family="categorical", frame=frame).predict(frame).to_frame()
    assert table["mean[top]"].mean() > 0.6


def test_binomial_predictions_are_counts_of_the_rows_own_trials():
    result = run(outcome="hits", family="binomial", trials="trials")
    few = result.predict(FRAME.assign(trials=5), draws=30)
    many = result.predict(FRAME.assign(trials=50), draws=30)
    np.testing.assert_allclose(many.expected, 10 * few.expected, rtol=1e-5)
    assert (few.expected < 5).all()
    assert ((few.outcome >= 0) & (few.outcome <= 5) & (few.outcome % 1 == 0)).all()
    assert many.outcome.max() > 5


@pytest.mark.parametrize(
    ("family", "outcome"),
    [("bernoulli", "won"), ("poisson", "count"), ("negative_binomial", "count")],
)
def test_expected_outcomes_are_means_of_the_outcomes(family, outcome):
    prediction = run(outcome=outcome, family=family).predict(FRAME, draws=500)
    gap = (prediction.outcome - prediction.expected).mean(1)
    assert abs(gap.mean()) < 5 * gap.std() / np.sqrt(500)
    assert (prediction.expected > 0).all()
    if family == "bernoulli":
        assert (prediction.expected < 1).all()
        assert set(np.unique(prediction.outcome)) == {0.0, 1.0}


def test_an_offset_multiplies_expected_counts():
    frame = FRAME.assign(log_time=np.log(2.0))
    result = run(outcome="count", family="poisson", frame=frame, offset="log_time")
    one = result.predict(frame, draws=5)
    other = result.predict(frame.assign(log_time=np.log(6.0)), draws=5)
    np.testing.assert_allclose(other.expected, 3 * one.expected, rtol=1e-4)


def test_predictions_scale_with_the_outcome(site_fit):
    scaled = run(frame=FRAME.assign(y=1000 * FRAME["y"] - 7))
    scaled.guide.load_state_dict(site_fit.guide.state_dict())
    one, other = site_fit.predict(FRAME, draws=5), scaled.predict(FRAME, draws=5)
    np.testing.assert_allclose(other.expected, 1000 * one.expected - 7, rtol=1e-3)
    np.testing.assert_allclose(other.outcome, 1000 * one.outcome - 7, rtol=1e-3)


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize(("family", "outcome"), [("gaussian", "y"), ("bernoulli", "won")])
def test_a_model_without_random_effects_predicts(family, outcome, head):
    result = run((), family=family, outcome=outcome, head=head)
    prediction = result.predict(at(site=["s9"] * 6), draws=10)
    assert prediction.expected.shape == (10, 6)
    assert np.isfinite(prediction.expected).all()
    assert set(prediction.unseen) == {""}
    assert (prediction.sd > 0).all() == head


# ---------------------------------------------------------------------------------------- errors


def test_new_categories_are_an_error_that_names_them(site_fit):
    with pytest.raises(ValueError, match=r"'sex'.*'x'"):
        site_fit.predict(at(sex=["x", "m"]))


@pytest.mark.parametrize("column", ["x", "sex", "site"])
def test_a_missing_column_is_an_error_that_names_it(site_fit, column):
    with pytest.raises(ValueError, match=f"'{column}'"):
        site_fit.predict(FRAME.drop(columns=column))


def test_a_model_fitted_to_arrays_cannot_read_a_table():
    site = np.repeat(np.arange(4), 5)
    x = np.random.default_rng(0).normal(size=(20, 1))
    data = ClusteredData.from_arrays(x, x[:, 0], {"site": site})
    result = fit(MixedEffects(nn.Linear(1, 1), "(1 | site)"), data, schedule=SHORT, progress=False)
    assert result.predict(data, draws=3).expected.shape == (3, 20)
    with pytest.raises(ValueError, match="from_arrays"):
        result.predict(FRAME)


@pytest.mark.parametrize(
    ("options", "name"), [({"prob": 1.0}, "prob"), ({"prob": 0}, "prob"), ({"draws": 1}, "draws")]
)
def test_settings_out_of_range_are_refused(site_fit, options, name):
    with pytest.raises(ValueError, match=name):
        site_fit.predict(FRAME, **options)


def test_no_rows_are_an_error(site_fit):
    with pytest.raises(ValueError, match="row"):
        site_fit.predict(FRAME.head(0))
    with pytest.raises(ValueError, match="row"):
        site_fit.predict(site_fit.data.take([]))
