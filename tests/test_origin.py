"""A fit does not depend on the origin of x, nor on the reference level of a factor."""

import numpy as np
import pandas as pd
import pytest
from torch import nn

from armed_pyro import ClusteredData, HalfNormal, MixedEffects, Priors, fit

LEVELS = ("none", "crabs", "shrimp", "both")


def years(origin):
    rng = np.random.default_rng(0)
    site, year = np.repeat(np.arange(20), 10), np.tile(np.arange(10) - 4.5, 20)
    a, b = rng.normal(0, 2, 20)[site], rng.normal(0.2, 0.15, 20)[site]
    y = 10 + a + b * year + rng.normal(size=200)
    return pd.DataFrame({"site": site, "year": year + origin, "y": y})


def fitted(table, random, family="gaussian", **settings):
    names = [name for name in ("year", "treatment") if name in table]
    cluster = random.split("|")[-1].strip(" )")
    data = ClusteredData.from_frame(table, outcome="y", clusters=[cluster], features=names)
    net = nn.Linear(data.n_features, 1).double()
    model = MixedEffects(net, random, family, bayesian_head=True, **settings)
    return fit(model, data, seed=0, progress=False).refine()


def posterior(result, term, factor="site"):
    """Mean and sd of an sd."""
    table = result.variance_components(draws=10_000).query("statistic == 'sd'")
    row = table[(table.factor == factor) & (table.term == term)].iloc[0]
    return np.array([row["mean"], row["sd"]])


def test_uncentred_years_are_fitted_as_centred_ones():
    near, far = (fitted(years(origin), "(1 + year | site)") for origin in (0, 2000))
    for term, factor in (("year", "site"), ("", "Residual")):
        np.testing.assert_allclose(
            posterior(near, term, factor), posterior(far, term, factor), 1e-6
        )
    quality = [result.posterior.refined.quality["k_hat"] for result in (near, far)]
    assert quality[0] == pytest.approx(quality[1], abs=1e-6)


@pytest.mark.parametrize("bar", ["|", "||"])
def test_a_prior_at_zero_has_reliable_weights(bar):
    """The rows say most of the sd at the mean of years, and the prior holds far from it."""
    priors = Priors(sd=HalfNormal({"Intercept": 5.0}))
    quality = fitted(years(20), f"(1 + year {bar} site)", priors=priors).posterior.refined.quality
    assert quality["k_hat"] < 0.5
    assert quality["ess"] > 2000


def test_a_prior_on_a_correlation_that_must_be_nearly_one_is_said_aloud():
    priors = Priors(sd=HalfNormal({"Intercept": 5.0}))
    with pytest.warns(UserWarning, match=r"site_sd\[Intercept\] holds at year = 0, .* centre year"):
        fitted(years(2000), "(1 + year | site)", priors=priors)


def test_independent_terms_far_from_zero_have_reliable_weights():
    """Independent at year 0, so the rows know only the sum of the squares of two sds."""
    result = fitted(years(2000), "(1 + year || site)")
    assert result.posterior.refined.quality["k_hat"] < 0.5
    assert result.posterior.refined.quality["ess"] > 2000


def starfish(reference):
    """80 rows, 10 blocks, 4 treatments; without treatment nearly every coral is eaten."""
    rng = np.random.default_rng(3)
    effects = dict(zip(LEVELS, (5.0, 1.3, 0.9, -0.4), strict=True))
    rows = []
    for block in range(10):
        shift = rng.normal(0, 3)
        for level in LEVELS:
            for _ in range(2):
                eaten = rng.random() < 1 / (1 + np.exp(-effects[level] - shift))
                rows.append((block, level, float(eaten)))
    table = pd.DataFrame(rows, columns=["block", "treatment", "y"])
    order = [reference, *(level for level in LEVELS if level != reference)]
    return table.assign(treatment=pd.Categorical(table.treatment, categories=order))


def test_the_reference_level_changes_nothing_else():
    """The mean sd of blocks moved from 2.77 to 2.96, a contrast from 1.99 to 3.04."""
    sds, contrasts = [], []
    for reference in ("none", "both"):
        result = fitted(starfish(reference), "(1 | block)", "bernoulli")
        sds.append(posterior(result, "Intercept", "block"))
        means = result.fixed_effects(draws=10_000).set_index("term")["mean"]
        effect = {level: means.get(f"treatment[T.{level}]", 0.0) for level in LEVELS}
        contrasts.append(effect["none"] - effect["both"])
    # The weighted draws have a Monte Carlo error of about 0.03 posterior sds each.
    assert np.abs(sds[0] - sds[1]).max() < 0.1 * sds[0][1]
    assert contrasts[0] == pytest.approx(contrasts[1], abs=0.12)
