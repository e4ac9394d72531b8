"""The generators draw from what they say, checked against moments and exact probabilities."""

import math

import numpy as np
import pytest
import statsmodels.api as sm

from armed_pyro.data.simulate import spirals, wages
from armed_pyro.families.registry import FAMILIES
from armed_pyro.families.simulate import mixed_model


def z_score(draws: np.ndarray, mean: np.ndarray | float, variance: np.ndarray | float) -> float:
    """Standardised sum of independent draws with these means and variances."""
    variance = np.broadcast_to(variance, np.shape(draws))
    return float((draws - mean).sum() / np.sqrt(variance.sum()))


# --- spirals


def test_spirals_have_the_papers_sizes_and_names() -> None:
    data, truth = spirals()
    assert data.n_rows == 10_000
    assert data.feature_names == ("x1", "x2")
    assert data.grouping("site").counts.tolist() == [1000] * 10
    assert data.outcome is not None
    assert data.outcome.reshape(10, 1000).sum(1).tolist() == [500] * 10
    assert truth.radius.shape == truth.ratio.shape == (10,)


def test_spirals_of_the_same_seed_are_equal() -> None:
    one, same, other = (spirals(3, 20, probes=1, ratio_sd=0.1, seed=s)[0] for s in (4, 4, 5))
    assert (one.features == same.features).all()
    assert (one.features != other.features).any()


def test_squared_distance_from_the_centre_is_that_of_the_spiral() -> None:
    data, truth = spirals(10, 2000, noise=0.1, seed=1)
    squared = (data.features.numpy() ** 2).sum(1).reshape(10, -1)
    # E[rho^2] = r^2 / 3 for rho uniform on 0..r, and each coordinate adds noise^2.
    for k, r in enumerate(truth.radius):
        mean = r**2 / 3 + 2 * 0.01
        assert abs(z_score(squared[k], mean, squared[k].var())) < 4


def test_without_noise_every_row_lies_on_the_arm_of_its_class() -> None:
    data, truth = spirals(4, 100, noise=0.0)
    assert data.outcome is not None
    x, label = data.features.numpy(), data.outcome.numpy()
    radius = truth.radius[data.grouping("site").labels()]
    turn = 2 * np.pi * np.hypot(*x.T) / radius
    angle = np.arctan2(x[:, 1], x[:, 0])
    np.testing.assert_allclose(np.cos(angle - turn - np.pi * label), 1, atol=1e-9)


def test_radii_are_normal_around_one() -> None:
    radius = spirals(2000, 10, radius_sd=0.3)[1].radius
    assert abs(z_score(radius, 1.0, 0.09)) < 4
    assert radius.std() == pytest.approx(0.3, rel=4 / math.sqrt(2 * 2000))


def test_probes_tell_the_clusters_class_ratio() -> None:
    data, truth = spirals(6, 500, ratio_sd=0.5, probes=2, probe_sd=0.2)
    assert data.feature_names == ("x1", "x2", "probe1", "probe2")
    assert truth.ratio.min() >= 0.1
    assert truth.ratio.max() <= 0.9
    assert data.outcome is not None
    np.testing.assert_allclose(
        data.outcome.reshape(6, 500).mean(1), np.round(truth.ratio * 500) / 500
    )
    probes = data.features.numpy()[:, 2:]
    centre = truth.ratio[data.grouping("site").labels()][:, None]
    assert abs(z_score(probes, centre, 0.04)) < 4


@pytest.mark.parametrize("known", [True, False])
def test_the_exact_probability_is_calibrated(known: bool) -> None:
    data, truth = spirals(8, 500, ratio_sd=0.2, probes=1, seed=3)
    assert data.outcome is not None
    chance, label = truth.probability(data, cluster_known=known), data.outcome.numpy()
    for low in np.arange(0, 1, 0.2):
        inside = (chance >= low) & (chance < low + 0.2)
        p = chance[inside]
        assert abs(z_score(label[inside], p, p * (1 - p))) < 4


def test_knowing_the_cluster_helps() -> None:
    data, truth = spirals(10, 200)
    assert data.outcome is not None
    accuracy = [
        ((truth.probability(data, cluster_known=known) > 0.5) == data.outcome.numpy()).mean()
        for known in (True, False)
    ]
    assert accuracy[0] > accuracy[1] + 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_clusters": 1}, "at least 2 clusters"),
        ({"rows": 3}, "at least 10 row"),
        ({"noise": -0.1}, "`noise` is a standard deviation"),
        ({"probe_sd": -0.1, "probes": 1}, "`probe_sd` is a standard deviation"),
    ],
)
def test_impossible_spirals_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spirals(**options)  # type: ignore[arg-type]


# --- wages


def test_wages_are_a_balanced_panel_with_experience_that_grows_with_the_year() -> None:
    data, truth = wages()
    table = truth.table
    assert data.grouping("id").counts.tolist() == [7] * 595
    assert "year" in table
    assert "year" not in data.feature_names
    growth = table.groupby("id")["exper"].diff().dropna()
    assert (growth == 1).all()
    assert (table.groupby("id")[["ed", "fem", "black"]].nunique() == 1).all(axis=None)
    changes = table.groupby("id")[["union", "south", "married"]].nunique().mean() - 1
    assert ((changes > 0.05) & (changes < 0.25)).all()  # 0.97^6 of the people keep their value


def test_wages_have_the_slopes_and_spreads_that_the_truth_says() -> None:
    _, truth = wages(seed=2)
    table = truth.table
    mean = table.groupby("id")["exper"].transform("mean")
    columns = table[list(truth.coefficients)].assign(within=table["exper"] - mean, between=mean)
    result = sm.MixedLM(table["lwage"], sm.add_constant(columns), groups=table["id"]).fit()
    expected = {**truth.coefficients, "within": 0.10, "between": 0.01}
    for name, value in expected.items():
        assert abs(result.params[name] - value) < 4 * result.bse[name]
    assert result.scale**0.5 == pytest.approx(0.15, rel=4 / math.sqrt(2 * 595 * 6))
    # The sd of the intercepts also has the error of each person's mean residual.
    assert truth.effects.std() == pytest.approx(0.3, rel=4 / math.sqrt(2 * 595))
    residual = (table["lwage"] - truth.mean).to_numpy()
    assert abs(z_score(residual[::7], 0.0, truth.new_person_sd**2)) < 4
    assert residual[::7].std() == pytest.approx(truth.new_person_sd, rel=4 / math.sqrt(2 * 595))


def test_a_random_intercept_follows_the_slope_within_people() -> None:
    _, truth = wages(seed=1)
    columns = sm.add_constant(truth.table[["exper", *truth.coefficients]])
    result = sm.MixedLM(truth.table["lwage"], columns, groups=truth.table["id"]).fit()
    assert 0.08 < result.params["exper"] < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_people": 1}, "at least 2 clusters"),
        ({"n_years": 1}, "at least 2 row"),
        ({"person_sd": -1.0}, "`person_sd` is a standard deviation"),
    ],
)
def test_impossible_wages_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wages(**options)  # type: ignore[arg-type]


# --- mixed models

MOMENTS = {
    "gaussian": lambda eta: (eta, 0.49 + 0 * eta),
    "bernoulli": lambda eta: (p := 1 / (1 + np.exp(-eta)), p * (1 - p)),
    "binomial": lambda eta: (10 * (p := 1 / (1 + np.exp(-eta))), 10 * p * (1 - p)),
    "poisson": lambda eta: (np.exp(eta), np.exp(eta)),
    "negative_binomial": lambda eta: (m := np.exp(eta), m + m**2 / 0.7),
}


@pytest.mark.parametrize("family", MOMENTS)
def test_outcomes_have_the_familys_mean_and_variance(family: str) -> None:
    data, truth = mixed_model(
        family, 50, 200, sd=[0.5, 0.3], cor=0.4, coefficients=[0.2, 0.5, -0.4], dispersion=0.7
    )
    assert data.outcome is not None
    y = data.outcome.numpy()
    mean, variance = MOMENTS[family](truth.eta[:, 0])
    assert abs(z_score(y, mean, variance)) < 4
    squares = (y - mean) ** 2 / variance
    assert abs(z_score(squares, 1.0, squares.var())) < 4


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_of_the_library_takes_its_rows(family: str) -> None:
    data, _ = mixed_model(family, 10, 30)
    data.check_training()
    FAMILIES[family]().check(data)


def test_classes_follow_the_softmax() -> None:
    coefficients = np.array([[0.5, -0.5], [1.0, 0.3]])
    data, truth = mixed_model("categorical", 40, 100, sd=[0.6], coefficients=coefficients)
    assert data.outcome is not None
    assert data.classes == (0, 1, 2)
    assert truth.effects.shape == (40, 2)
    logits = np.hstack([np.zeros((4000, 1)), truth.eta])
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for code in range(3):
        hit = data.outcome.numpy() == code
        assert abs(z_score(hit, p[:, code], p[:, code] * (1 - p[:, code]))) < 4


def test_the_predictor_is_fixed_plus_random_effects() -> None:
    data, truth = mixed_model("poisson", 3, [5, 1, 7], sd=[1.0, 0.5], coefficients=[0.1, 0.2, 0.3])
    assert data.grouping("site").counts.tolist() == [5, 1, 7]
    x, site = data.features.numpy(), data.grouping("site").labels()
    fixed = 0.1 + x @ np.array([0.2, 0.3])
    random = truth.effects[site, 0] + truth.effects[site, 1] * x[:, 0]
    np.testing.assert_allclose(truth.eta[:, 0], fixed + random)


def test_random_effects_have_the_sds_and_correlation_asked_for() -> None:
    _, truth = mixed_model(n_clusters=20_000, rows=1, sd=[2.0, 0.5], cor=-0.6)
    spread = 1 / math.sqrt(2 * 20_000)
    np.testing.assert_allclose(truth.effects.std(0), [2.0, 0.5], rtol=4 * spread)
    cor = np.corrcoef(truth.effects.T)[0, 1]
    assert cor == pytest.approx(-0.6, abs=4 * (1 - 0.36) / math.sqrt(20_000))
    np.testing.assert_allclose(truth.cor, [[1, -0.6], [-0.6, 1]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"family": "gama"}, "unknown family 'gama': choose one of bernoulli"),
        ({"n_clusters": 1}, "at least 2 clusters"),
        ({"n_clusters": 3, "rows": [5, 5]}, "give one each"),
        ({"rows": 0}, "at least 1 row"),
        ({"sd": [1, 1, 1]}, "`sd` must be non-negative numbers"),
        ({"sd": [-1]}, "`sd` must be non-negative numbers"),
        ({"sd": [1, 1], "cor": 1.0}, "positive definite 2 x 2"),
        ({"sd": [1, 1], "cor": np.eye(3)}, "positive definite 2 x 2"),
        ({"coefficients": np.zeros((2, 2))}, "give `coefficients` as a list"),
    ],
)
def test_impossible_mixed_models_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixed_model(**options)  # type: ignore[arg-type]
