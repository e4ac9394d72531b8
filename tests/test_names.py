"""Names of grouping factors and outcomes never collide with those of the program and of trees."""

import warnings
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from armed_pyro import ClusteredData, Fit, MixedEffects, Schedule, fit
from armed_pyro.data.xarray_names import factor_names
from armed_pyro.program.names import tree_names

SHORT = Schedule(steps=20, window=10, stages=0)


def trained(factors, random=None, outcome="y"):
    rng = np.random.default_rng(0)
    n = 120
    places = {name: np.arange(n) // (3 + k) % (5 + k) for k, name in enumerate(factors)}
    frame = pd.DataFrame({outcome: rng.normal(size=n), "x": rng.normal(size=n), **places})
    data = ClusteredData.from_frame(frame, outcome=outcome, clusters=factors, features=["x"])
    torch.manual_seed(0)
    terms = [f"(1 + x | {name})" for name in factors] if random is None else random
    model = MixedEffects(nn.Linear(1, 1), terms, bayesian_head=True)
    return fit(model, data, schedule=SHORT, refine=False, progress=False), frame


@pytest.mark.parametrize(
    "factors",
    [
        ["draw", "chain"],
        ["row", "row_"],
        ["draws", "sample"],
        ["gen", "gen_term"],
        ["gen_term", "gen"],
        ["gen", "gen_effect"],
        ["gen", "gen_cor"],
        ["fixed_term", "feature"],
        ["fixed", "fixed_effect"],
        ["residual", "residual_sd"],
        ["step", "term"],
        ["a/b", "a_b"],
        ["features", "weights"],
        ["y_expected", "unseen"],
    ],
)
def test_every_pair_of_factors_is_fitted_saved_and_predicted(factors, tmp_path):
    result, frame = trained(factors, None if "/" not in factors[0] else ["(1 | a_b)"])
    names = tree_names(result.model)
    tree = result.to_datatree(draws=20)
    posterior, constant = tree["posterior"], tree["constant_data"]
    for factor, levels in result.model.data_facts().levels.items():
        assert posterior[names[factor].effect].dims[2:] == (
            names[factor].cluster,
            names[factor].term,
        )
        assert posterior[names[factor].cluster].values.tolist() == levels.tolist()
        assert constant[names[factor].cluster].values.tolist() == frame[factor].tolist()
    result.save(tmp_path / "run", draws=20)
    loaded = Fit.load(tmp_path / "run", net=nn.Linear(1, 1))
    for name in factors:
        assert loaded.data.grouping(name).labels().tolist() == frame[name].tolist()
    new = frame.drop(columns="y").assign(**dict.fromkeys(names, 99))
    made = loaded.predict(new, draws=20, unseen="marginal")
    predicted = made.to_datatree(loaded.data)["predictions"]
    for factor in names:
        assert predicted[names[factor].effect].dims[2:] == (
            names[factor].cluster,
            names[factor].term,
        )
    assert set(names) <= set(result.variance_components().factor)


def test_a_changed_name_is_told_and_no_other_name_changes():
    with pytest.warns(UserWarning, match="the grouping factor 'row' is 'row_'"):
        result, _ = trained(["row"])
    dims = result.to_datatree(draws=20, groups=["posterior"])["posterior"]["row_effect"].dims
    assert dims == ("chain", "draw", "row_", "row_term")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(["site", "batch"])


def test_names_do_not_depend_on_what_is_predicted():
    result, frame = trained(["gen", "gen_term"])
    new = frame.drop(columns="y").assign(gen=99)
    tree = result.predict(new, draws=20, unseen="marginal").to_datatree()
    posterior = result.to_datatree(draws=20, groups=["posterior"])["posterior"]
    for group in (tree["predictions"], posterior):
        assert group["gen_effect"].dims == ("chain", "draw", "gen", "gen_term_")


def test_all_names_of_a_tree_differ():
    labels = ["gen", "gen_term", "gen_term_", "gen_term_term", "draw", "draw_", "draw_effect"]
    made = factor_names({label: label for label in labels})
    names = sorted(name for names in made.values() for name in vars(names).values())
    assert all(first != second for first, second in pairwise(names))
