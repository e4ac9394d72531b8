"""Outcomes with labels: the family they need, the modelled event, and its name in results."""

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from torch import nn
from typer.testing import CliRunner

from armed_pyro import ClusteredData, Fit, MixedEffects, Schedule, StreamedData, fit
from armed_pyro.cli import app
from armed_pyro.families.registry import FAMILIES, family_named
from armed_pyro.report.text import summarize

SHORT = Schedule(steps=20, window=10, stages=0)
CODES = {
    "text": np.array(["control", "case"]),
    "boolean": np.array([False, True]),
    "numbers": np.array([1, 2]),
    "categorical": np.array(["no", "yes"]),
}


def table(kind="text", n=80, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=n)
    status = CODES[kind][(rng.random(n) < 1 / (1 + np.exp(-x))).astype(int)]
    if kind == "categorical":
        status = pd.Categorical(status, categories=["yes", "no"])
    return pd.DataFrame({"status": status, "x": x, "g": np.arange(n) % 8})


def encoded(kind="text", **settings):
    return ClusteredData.from_frame(table(kind), outcome="status", clusters=["g"], **settings)


def trained(data, family="bernoulli"):
    torch.manual_seed(0)
    model = MixedEffects(nn.Linear(1, 1), "(1 | g)", family, bayesian_head=True)
    return fit(model, data, schedule=SHORT, refine=False, progress=False)


TAKE_LABELS = {"bernoulli", "binomial", "categorical", "ordinal", "beta_binomial"}


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - TAKE_LABELS))
@pytest.mark.parametrize("kind", ["text", "boolean", "categorical"])
def test_labels_are_no_numbers_and_the_error_names_the_family(family, kind):
    with pytest.raises(ValueError, match=r"2 labels.*use family 'bernoulli'.*--family bernoulli"):
        family_named(family).check(encoded(kind))


def test_more_labels_need_the_categorical_family():
    frame = table().assign(status=lambda t: np.where(t.x > 1, "other", t.status))
    data = ClusteredData.from_frame(frame, outcome="status", clusters=["g"])
    with pytest.raises(ValueError, match=r"3 labels.*use family 'categorical'"):
        family_named("gaussian").check(data)


@pytest.mark.parametrize(
    ("kind", "default", "other"),
    [
        ("text", "control", "case"),
        ("boolean", True, False),
        ("categorical", "no", "yes"),
        ("numbers", 2, 1),
    ],
)
def test_the_event_is_the_second_label_or_the_chosen_one(kind, default, other):
    plain = encoded(kind)
    if kind != "numbers":
        assert plain.classes == (other, default)
    for event in (default, other, str(other)):
        data = encoded(kind, event=event)
        chosen = default if event == default else other
        assert data.classes[1] == chosen
        expected = (table(kind)["status"] == chosen).astype(float)
        assert data.outcome.tolist() == expected.tolist()
        again = ClusteredData.encode(table(kind).head(9), data.schema)
        assert again.outcome.tolist() == expected.head(9).tolist()


def test_arrays_and_datasets_take_an_event_too():
    frame = table()
    arrays = ClusteredData.from_arrays(
        frame[["x"]].to_numpy(), frame["status"].to_numpy(), {"g": frame["g"]}, event="case"
    )
    dataset = xr.Dataset.from_dataframe(frame).rename(index="row")
    for data in (
        arrays,
        ClusteredData.from_xarray(dataset, outcome="status", clusters=["g"], event="case"),
    ):
        assert data.classes == ("control", "case")


@pytest.mark.parametrize("kind", ["text", "numbers"])
def test_a_streamed_table_takes_an_event_too(tmp_path, kind):
    table(kind).to_parquet(tmp_path / "rows.parquet")
    event = CODES[kind][0]
    data = StreamedData.scan(
        tmp_path / "rows.parquet", outcome="status", clusters=["g"], event=event
    )
    assert data.scanned.schema.classes.tolist()[1] == event


def test_an_event_that_is_no_label_is_refused():
    with pytest.raises(
        ValueError, match=r"no label of the outcome 'status' for event= 'casee'.*'case'"
    ):
        encoded(event="casee")
    with pytest.raises(ValueError, match=r"names one of two labels, but .* has 80"):
        ClusteredData.from_frame(
            table().rename(columns={"x": "y"}), outcome="y", clusters=["g"], event="1"
        )


def test_the_event_is_named_in_all_results(tmp_path):
    result = trained(encoded(event="case"))
    text = summarize(result.results())
    assert "Modelled event: 'case' (the second label, against 'control')" in text
    assert "Fixed effects (of 'case', posterior mean" in text
    assert repr(result).startswith("Fit of status = 'case' (")
    assert "Fixed effects of &#x27;case&#x27;" in result._repr_html_()
    assert result.fixed_effects().attrs["event"] == "case"
    assert "the linear predictor of P(status = case)" in result.slopes("x", scale="link").title
    made = result.predict(table().drop(columns="status"), draws=20)
    assert set(made.to_frame()["event"]) == {"case"}
    tree = result.to_datatree(draws=20, groups=["observed_data"])
    assert tree["observed_data"]["status"].attrs["event"] == "case"
    result.save(tmp_path / "run", draws=20)
    loaded = Fit.load(tmp_path / "run", net=nn.Linear(1, 1))
    assert summarize(loaded.results()) == text
    opposite = trained(encoded()).predict(table().drop(columns="status"), draws=20)
    assert np.corrcoef(opposite.mean, made.mean)[0, 1] < -0.9


def test_the_command_line_names_the_family_and_takes_the_event(tmp_path):
    table().to_csv(tmp_path / "rows.csv", index=False)
    call = ["fit", str(tmp_path / "rows.csv"), "--outcome", "status", "--random", "(1 | g)"]
    call += ["--steps", "20", "--out", str(tmp_path / "run"), "--compile", "never"]
    refused = CliRunner().invoke(app, call)
    assert refused.exit_code == 2
    assert "--family bernoulli" in refused.output
    done = CliRunner().invoke(app, [*call, "--family", "bernoulli", "--event", "case"])
    assert done.exit_code == 0, done.output
    assert "Modelled event: 'case'" in done.output
