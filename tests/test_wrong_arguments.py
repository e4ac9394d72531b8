"""Arguments of a wrong type are refused at the entrance, with the way to make the right one."""

import numpy as np
import pandas as pd
import pytest
from torch import nn

from armed_pyro import ClusteredData, HalfNormal, MixedEffects, Priors, Schedule, fit

TABLE = pd.DataFrame(
    {"y": np.arange(24.0) % 5, "x": np.arange(24.0) % 7, "g": np.repeat(np.arange(6), 4)}
)
DATA = ClusteredData.from_frame(TABLE, outcome="y", clusters=["g"])
NET = nn.Linear(1, 1)
MODEL = MixedEffects(NET, "(1 | g)", bayesian_head=True)


@pytest.fixture(scope="module")
def result():
    return fit(MODEL, DATA, schedule=Schedule(steps=20), refine=False, progress=False)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit(MODEL, TABLE), r"data must be a ClusteredData or .*from_frame\(table"),
        (lambda: fit(MODEL, DATA, validation=TABLE), "validation must be a ClusteredData or None"),
        (lambda: fit(NET, DATA), r"model must be a MixedEffects, found a Linear.*MixedEffects\("),
        (lambda: fit(MODEL, DATA, schedule=2000), r"schedule must be a Schedule.*\(2000\)"),
        (lambda: fit(MODEL, DATA, seed="a"), "seed must be an int"),
        (lambda: MixedEffects(NET, None), r"random must be a str.* found None.*'\(1 \| site\)'"),
        (lambda: MixedEffects(NET, "(1 | g)", family=None), "family must be a str or a Family"),
        (lambda: MixedEffects(NET, priors={"sd": 1}), r"priors must be a Priors.*Priors\(sd="),
        (lambda: MixedEffects(NET, adversary="g"), "adversary must be an Adversary"),
        (lambda: MixedEffects(NET, others=3), "others must be a Reconstruction"),
        (lambda: MixedEffects(NET, bayesian_head="yes"), "bayesian_head must be a bool"),
        (lambda: MixedEffects(NET, fixed_weight="1"), "fixed_weight must be a float"),
        (lambda: Priors(sd=2.0), r"sd must be a ScalePrior or a Mapping, found a float \(2.0\)"),
        (lambda: Priors(sd={"g": 2.0}), "the prior of the sds of 'g' must be a ScalePrior"),
        (lambda: Priors(cor="1"), "cor must be a float"),
        (lambda: ClusteredData.from_frame(TABLE, outcome=["y"], clusters=["g"]), "outcome must be"),
        (lambda: ClusteredData.from_frame(TABLE, outcome="y", clusters=None), "must be a list of"),
        (
            lambda: ClusteredData.from_frame(TABLE, outcome="y", clusters=["g"], weights=TABLE.x),
            "weights must be a str or None",
        ),
        (lambda: ClusteredData.from_frame("a.csv", outcome="y", clusters=["g"]), "read_table for"),
        (lambda: ClusteredData.from_arrays(TABLE[["x"]], TABLE.y, TABLE.g), "clusters must be a M"),
        (lambda: ClusteredData.from_xarray(TABLE, outcome="y", clusters=["g"]), "from_frame takes"),
        (lambda: DATA.grouping(0), "factor must be a str"),
        (lambda: DATA.hold_out_clusters(None, fraction=0.5), "factor must be a str"),
        (lambda: DATA.split_rows("0.5", seed=0), "fraction must be a float"),
        (lambda: DATA.folds(2.5, seed=0), "n must be an int"),
    ],
)
def test_a_wrong_type_is_refused_with_the_remedy(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_priors_by_factor_are_still_priors():
    assert Priors(sd={"g": HalfNormal(1.0)}, cor=2).of("g") == HalfNormal(1.0)


def test_a_percentage_is_no_probability(result):
    made = result.predict(TABLE, draws=10)
    calls = [
        lambda: result.predict(TABLE, prob=95),
        lambda: result.variance_components(prob=95),
        lambda: result.fixed_effects(prob=95),
        lambda: result.summary(prob=95),
        lambda: made.interval(95),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"between 0 and 1, found 95: 95% is 0\.95"):
            call()


def test_wrong_arguments_of_predictions(result):
    for settings, message in [
        ({"prob": "0.9"}, "`prob` must be a float"),
        ({"draws": 10.5}, "`draws` must be an int"),
        ({"unseen": True}, "`unseen` must be a str or None"),
    ]:
        with pytest.raises(TypeError, match=message):
            result.predict(TABLE, **settings)
    with pytest.raises(TypeError, match="Expected a pandas, polars or pyarrow table"):
        result.predict(TABLE.to_numpy())
    with pytest.raises(ValueError, match="`draws` must be at least 1"):
        result.variance_components(draws=0)
