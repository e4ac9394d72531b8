"""Discrimination: DeLong's variance against its definition, scikit-learn and the bootstrap."""

import numpy as np
import pytest
from scipy.special import expit, logit
from scipy.stats import ttest_1samp
from sklearn.metrics import roc_auc_score

from armed_pyro.analysis.rivals.scores import (
    METRICS,
    binary_metrics,
    bounded,
    calibration_error,
    delong,
    resampled,
    youden_threshold,
)


def scores(seed: int, n: int = 60, *, ties: bool = True) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = (rng.random(n) < 0.4).astype(float)
    s = rng.normal(size=(2, n)) + np.array([[1.0], [0.6]]) * y + 0.8 * rng.normal(size=n)
    return y, np.round(s, 1) if ties else s


def by_definition(y: np.ndarray, s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUROCs and covariance by DeLong's formulas, pair by pair."""
    pairs = np.array(
        [[[np.sign(a - b) / 2 + 0.5 for b in one[y == 0]] for a in one[y == 1]] for one in s]
    )
    v10, v01 = pairs.mean(2), pairs.mean(1)
    return pairs.mean((1, 2)), np.cov(v10) / v10.shape[1] + np.cov(v01) / v01.shape[1]


@pytest.mark.parametrize("ties", [True, False])
def test_delong_is_its_definition(ties):
    y, s = scores(0, ties=ties)
    found, (auroc, covariance) = delong(y, s), by_definition(y, s)
    np.testing.assert_allclose(found.auroc, auroc, atol=1e-12)
    np.testing.assert_allclose(found.covariance, covariance, atol=1e-12)
    np.testing.assert_allclose(found.auroc, [roc_auc_score(y, one) for one in s], atol=1e-12)
    one = found.difference(0, 1)
    error = np.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    assert one.mean == pytest.approx(auroc[0] - auroc[1])
    assert one.upper - one.lower == pytest.approx(2 * 1.959964 * error, rel=1e-6)


def test_delongs_standard_error_is_the_bootstraps():
    y, s = scores(1, 400, ties=False)
    rng, draws = np.random.default_rng(0), []
    for _ in range(400):
        rows = rng.integers(0, 400, 400)
        draws.append([roc_auc_score(y[rows], one[rows]) for one in s])
    draws = np.array(draws)
    found = delong(y, s)
    # An sd of 400 draws is good to 3.5%.
    np.testing.assert_allclose(np.sqrt(np.diag(found.covariance)), draws.std(0), rtol=0.14)
    contrast = np.array([1, -1])
    error = np.sqrt(contrast @ found.covariance @ contrast)
    assert error == pytest.approx((draws[:, 0] - draws[:, 1]).std(), rel=0.14)


def test_dependent_rows_widen_the_interval_as_the_bootstrap_of_clusters_does():
    rng = np.random.default_rng(2)
    cluster = np.repeat(np.arange(60), 8)
    shift = rng.normal(0, 1.2, 60)[cluster]
    y = (rng.random(480) < 1 / (1 + np.exp(-2 * shift))).astype(float)
    s = (0.5 * shift + rng.normal(size=60)[cluster] + 0.3 * rng.normal(size=480))[None]
    naive, clustered = delong(y, s), delong(y, s, cluster)
    assert clustered.auroc == pytest.approx(naive.auroc)
    draws = []
    for _ in range(400):
        chosen = rng.integers(0, 60, 60)
        rows = (chosen[:, None] * 8 + np.arange(8)).ravel()
        draws.append(roc_auc_score(y[rows], s[0, rows]))
    error, naive_error = (np.sqrt(one.covariance[0, 0]) for one in (clustered, naive))
    assert error == pytest.approx(np.std(draws), rel=0.14)
    assert naive_error < 0.75 * error


def test_clusters_of_one_row_are_no_clusters_but_for_the_factor():
    y, s = scores(3, 4000)
    apart = delong(y, s, np.arange(len(y))[::-1])
    np.testing.assert_allclose(apart.covariance, delong(y, s).covariance, rtol=1e-3)


def test_a_models_interval_stays_within_zero_and_one():
    y = np.repeat([0.0, 1.0], 8)
    s = np.arange(16.0)[None].copy()
    s[0, [7, 8]] = s[0, [8, 7]]
    one = delong(y, s).of(0)
    assert 0 < one.lower < one.mean < one.upper < 1
    assert np.isnan(delong(y, np.arange(16.0)[None]).of(0).lower)
    assert delong(y, np.vstack([s, s])).difference(0, 1).p == 1


def test_delong_needs_both_classes():
    with pytest.raises(ValueError, match="both classes"):
        delong(np.ones(4), np.zeros((1, 4)))


def test_resampled_t_is_the_paired_t_test_without_overlap():
    values = np.random.default_rng(4).normal(0.3, 1.0, 12)
    one, reference = resampled(values, 0.0), ttest_1samp(values, 0.0)
    assert one.p == pytest.approx(reference.pvalue)
    interval = reference.confidence_interval(0.95)
    assert (one.lower, one.upper) == pytest.approx((interval.low, interval.high))
    corrected = resampled(values, 0.25)
    widening = (corrected.upper - corrected.lower) / (one.upper - one.lower)
    assert widening == pytest.approx(np.sqrt((1 / 12 + 0.25) / (1 / 12)))


def test_equal_differences_are_no_evidence():
    zero = resampled(np.zeros(5), 0.25)
    assert (zero.mean, zero.p) == (0, 1)
    for values in (np.full(2, 0.01), np.array([0.3]), np.array([np.nan, 0.2])):
        one = resampled(values, 0.25)
        assert one.mean == pytest.approx(values[-1])
        assert np.isnan([one.lower, one.upper, one.p]).all()


def test_intervals_of_proportions_stay_between_zero_and_one():
    values = np.array([0.93, 0.99, 1.0])
    plain, one = resampled(values, 0.25), bounded(values, 0.25)
    assert plain.upper > 1
    assert 0 < one.lower < one.mean < one.upper < 1
    assert (one.mean, one.p) == (plain.mean, plain.p)
    # The delta method: the t interval's half-width over m (1 - m), about logit(m).
    m = values.mean()
    half = (plain.upper - m) / (m * (1 - m))
    assert (one.lower, one.upper) == pytest.approx(
        tuple(expit(logit(m) + half * np.array([-1, 1])))
    )
    mirrored = bounded(1 - values, 0.25)
    assert (mirrored.lower, mirrored.upper) == pytest.approx((1 - one.upper, 1 - one.lower))


def test_intervals_far_from_the_limits_are_those_of_t():
    values = np.array([0.49, 0.52, 0.505, 0.51])
    plain, one = resampled(values, 0.0), bounded(values, 0.0)
    assert (one.lower, one.upper) == pytest.approx((plain.lower, plain.upper), abs=2e-4)


def test_intervals_of_errors_are_positive_and_change_with_the_unit():
    values = np.array([1e-4, 2e-3, 5e-4])
    one, other = bounded(values, 0.3, np.inf), bounded(1000 * values, 0.3, np.inf)
    assert resampled(values, 0.3).lower < 0 < one.lower < one.mean < one.upper
    assert (other.lower, other.upper) == pytest.approx((1000 * one.lower, 1000 * one.upper))


def test_without_spread_proportions_have_no_interval():
    for values in ([1.0, 1.0], [0.0, 0.0, 0.0], [0.7], [np.nan, 0.7]):
        one = bounded(np.array(values), 0.25)
        assert one.mean == pytest.approx(values[-1])
        assert np.isnan([one.lower, one.upper]).all()
    with pytest.raises(ValueError, match=r"between 0 and 1.0, but there is 1.2"):
        bounded(np.array([0.3, 1.2]), 0.0)


def test_intervals_of_proportions_cover():
    """Five AUROCs about 0.95: nearer to 95% than the t interval, within 4 standard errors."""
    rng, n = np.random.default_rng(7), 4000
    draws = rng.beta(0.95 * 60, 0.05 * 60, size=(n, 5))

    def coverage(interval):
        found = [interval(values, 0.0) for values in draws]
        return np.mean([one.lower < 0.95 < one.upper for one in found])

    assert coverage(bounded) == pytest.approx(0.95, abs=4 * np.sqrt(0.95 * 0.05 / n))
    assert coverage(bounded) > coverage(resampled)


def test_metrics_of_a_known_table():
    # 8 of 10 of class 1 and 15 of 20 of class 0 are right at 0.5.
    y = np.repeat([1.0, 1.0, 0.0, 0.0], [8, 2, 15, 5])
    p = np.repeat([0.8, 0.2, 0.2, 0.8], [8, 2, 15, 5])
    found = binary_metrics(y, p, 0.5)
    assert set(found) == set(METRICS)
    assert found["sensitivity"] == pytest.approx(0.8)
    assert found["specificity"] == pytest.approx(0.75)
    assert found["balanced accuracy"] == pytest.approx(0.775)
    assert found["brier"] == pytest.approx((23 * 0.04 + 7 * 0.64) / 30)
    # 13 rows at 0.8, of which 8 are 1; 17 at 0.2, of which 2.
    assert found["ece"] == pytest.approx((abs(8 - 13 * 0.8) + abs(2 - 17 * 0.2)) / 30)
    assert np.isnan(binary_metrics(np.ones(3), np.full(3, 0.5), 0.5)["auroc"])


def test_calibrated_probabilities_have_no_calibration_error():
    rng = np.random.default_rng(5)
    p = rng.random(200_000)
    y = (rng.random(200_000) < p).astype(float)
    assert calibration_error(y, p) < 0.005
    assert calibration_error(y, p**2) == pytest.approx(1 / 6, abs=0.01)


def test_youdens_threshold_is_the_best_of_all():
    y, s = scores(6)
    p = 1 / (1 + np.exp(-s[0]))
    best = youden_threshold(y, p)

    def index(threshold):
        return (p[y == 1] >= threshold).mean() - (p[y == 0] >= threshold).mean()

    assert index(best) == pytest.approx(max(index(one) for one in p))
