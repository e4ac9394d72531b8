"""Evaluation on held-out rows, predictions written in blocks, and the HTML page."""

import base64
import re
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest

from armed_pyro import (
    Adversary,
    ClusteredData,
    MixedEffects,
    RandomEffects,
    Schedule,
    Slopes,
    fit,
)
from armed_pyro.cli.predict import write_predictions
from armed_pyro.models.dense import dense
from armed_pyro.models.linear import linear
from armed_pyro.prediction.chunks import predict_chunks
from armed_pyro.prediction.scores import evaluate
from armed_pyro.prediction.unseen import Marginal
from armed_pyro.report.cells import as_text
from armed_pyro.report.html import page
from armed_pyro.summaries.variance import random_effects


def clustered(outcome: str = "gaussian", clusters: int = 6) -> ClusteredData:
    rng = np.random.default_rng(0)
    site = np.repeat(np.arange(clusters), 10)
    x = rng.normal(size=(len(site), 2))
    y = x[:, 0] + rng.normal(size=clusters)[site] + 0.5 * rng.normal(size=len(site))
    if outcome == "bernoulli":
        y = (y > 0).astype(float)
    if outcome == "categorical":
        y = np.array(["low", "mid", "top"])[np.digitize(y, [-0.5, 0.5])]
    return ClusteredData.from_arrays(
        x, y, {"site<b>": [f"s&{k}" for k in site]}, feature_names=["a", "b"]
    )


def fitted(data, family="gaussian", **more):
    model = MixedEffects(
        linear(2, 3 if family == "categorical" else 1), "(1 + a | site<b>)", family
    )
    return fit(model, data, schedule=Schedule(steps=30), progress=False, device="cpu", **more)


@pytest.fixture(scope="module")
def result():
    train, rest = clustered().split_rows(0.3, seed=0)
    return fitted(train, validation=rest)


@pytest.mark.parametrize("family", ["gaussian", "bernoulli", "categorical"])
def test_evaluation(family):
    train, unseen = clustered(family).hold_out_clusters("site<b>", fraction=0.3)
    scores = evaluate(
        fitted(train, family).posterior, {"rows": train, "clusters": unseen}, draws=200
    )
    expected = ["rmse", "coverage"] if family == "gaussian" else ["auroc", "accuracy", "log_loss"]
    assert list(scores) == ["held_out", "rows", "unseen", *expected]
    assert scores.rows.tolist() == [40, 20]
    assert scores.unseen.tolist() == [0, 20]
    # The training rows are predicted better than by chance.
    if family == "gaussian":
        assert scores.rmse[0] < float(train.outcome.std())
        assert scores.coverage[0] > 0.8
    else:
        assert scores.auroc[0] > 0.7
        assert scores.accuracy[0] > 0.5


def test_evaluation_of_a_single_class_has_no_auroc():
    data = clustered("bernoulli")
    ones = data.take(data.outcome.numpy() == 1)
    assert np.isnan(
        evaluate(fitted(data, "bernoulli").posterior, {"ones": ones}, draws=50).auroc[0]
    )


def test_evaluation_needs_outcomes(result):
    x = clustered().features
    data = ClusteredData.from_arrays(x, None, {"site<b>": ["a"] * len(x)}, feature_names=["a", "b"])
    with pytest.raises(ValueError, match="no outcome"):
        evaluate(result.posterior, {"rows": data})


def marginal(result):
    return Marginal(result.draws(30), result.seed)


@pytest.mark.parametrize("name", ["p.csv", "p.csv.gz", "p.parquet"])
def test_predictions_in_blocks_are_those_at_once(result, tmp_path, name):
    data, path = clustered(), tmp_path / name
    parts = predict_chunks(result.posterior, data, marginal(result), draws=30, chunk=7)
    assert list(write_predictions(parts, path)) == [7] * 8 + [4]
    written = (
        pd.read_parquet(path)
        if name.endswith("parquet")
        else pd.read_csv(path, keep_default_na=False)
    )
    whole = result.predict(data, draws=30).to_frame().reset_index(drop=True)
    pd.testing.assert_frame_equal(written, whole, check_dtype=False)


def test_broken_off_predictions_leave_nothing(result, tmp_path):
    def parts():
        yield from predict_chunks(
            result.posterior, clustered().take(slice(0, 7)), marginal(result), draws=30
        )
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        list(write_predictions(parts(), tmp_path / "p.csv"))
    assert list(tmp_path.iterdir()) == []


def shown(result, prob=0.9, **more):
    return page(result.results(prob=prob), random_effects(result.posterior, prob=prob), **more)


class Checker(HTMLParser):
    """Collects what a page refers to, and that every element is closed."""

    def __init__(self):
        super().__init__()
        self.open, self.sources, self.headings = [], [], []

    def handle_starttag(self, tag, attrs):
        self.sources += [value for key, value in attrs if key in ("src", "href")]
        if tag not in ("meta", "img", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings.append(text)


def checked(text):
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    return checker


def test_page_is_whole_and_self_contained(result):
    scores = pd.DataFrame({"held_out": ["rows"], "rmse": [0.12345]})
    text = shown(result, title="A & B <i>", prob=0.8, evaluation=scores)
    checker = checked(text)
    assert checker.headings[0] == "A & B <i>"
    for heading in ["The question", "Convergence and priors", "Predictions of held-out rows"]:
        assert heading in checker.headings
    assert any("80%" in heading for heading in checker.headings)
    assert "<i>" not in text
    assert "<b>" not in text
    assert "0.1235" in text or "0.1234" in text
    # The loss and one factor's effects, as images inside the page.
    assert len(checker.sources) == 2
    for source in checker.sources:
        kind, _, code = source.partition(",")
        assert kind == "data:image/svg+xml;base64"
        assert ElementTree.fromstring(base64.b64decode(code)).tag.endswith("svg")
    assert not re.search(r"https?://", re.sub(r'src="[^"]*"', "", text))


def test_page_is_the_same_each_time(result):
    assert shown(result) == shown(result)


def test_page_of_many_clusters_terms_and_an_adversary():
    data = clustered(clusters=70)
    terms = ["(1 | site<b>)", Slopes("site<b>", on="1")]
    model = MixedEffects(dense(2, 1, (5,)), terms, adversary=Adversary("site<b>", ["1"]))
    result = fit(model, data, schedule=Schedule(steps=30), progress=False, device="cpu")
    text = shown(result)
    assert "NOT CONVERGED" in text
    assert "without uncertainty of their own" in text
    assert "weight 1" in text
    assert "Predictions of held-out rows" not in text
    checked(text)


def test_estimates_have_digits_by_their_sd():
    table = pd.DataFrame(
        {
            "term": ["Intercept", "[red]"],
            "mean": [1e8 + 3.25, 10.4673],
            "sd": [0.512, 1.5458],
            "lower": [1e8 + 2.41, 7.9],
            "rows": [123456, 7],
            "none": [np.nan, np.inf],
        }
    )
    shown = as_text(table)
    assert shown.iloc[0].tolist() == [
        "Intercept", "100000003.25", "0.512", "100000002.41", "123456", "",
    ]  # fmt: skip
    assert shown.iloc[1].tolist() == ["[red]", "10.47", "1.546", "7.9", "7", "inf"]


def test_page_without_matplotlib(result, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"needs matplotlib.*armed_pyro\[analysis\]"):
        shown(result)


def test_page_escapes_everything_that_comes_from_the_data():
    bad = "<script>alert('&')</script>{{ 'exe' ~ 'cuted' }}"
    rng = np.random.default_rng(0)
    # An open brace: as a formula, which matplotlib makes of dollar signs, it would be an error.
    site = np.repeat([f"$x_{{{k}$ {bad}" for k in range(4)], 8)
    x = rng.normal(size=(32, 1))
    data = ClusteredData.from_arrays(
        x, x[:, 0], {bad: site}, feature_names=["<b>"], outcome_name="<i>"
    )
    model = MixedEffects(linear(1, 1), RandomEffects(bad), "gaussian")
    result = fit(model, data, schedule=Schedule(steps=5), progress=False, device="cpu")
    scores = pd.DataFrame({bad: [bad]})
    text = shown(result, title=bad, evaluation=scores)
    assert not re.search("<(script|b|i)>", text)
    assert "Content-Security-Policy\" content=\"default-src 'none'" in text
    assert "executed" not in text
    checker = checked(text)
    assert checker.headings.count(bad) == 2  # title and factor


def test_random_effects_are_those_of_the_draws(result):
    table = random_effects(result.posterior, draws=50, prob=0.8)
    assert list(table) == ["factor", "term", "cluster", "mean", "sd", "lower", "upper"]
    factor = result.model.factors[0]
    draws = result.draws(50)[factor.effect_site].to(factor.to_original) @ factor.to_original.mT
    for place, term in enumerate(["Intercept", "a"]):
        part = table[table.term == term]
        assert part.cluster.tolist() == [f"s&{k}" for k in range(6)]
        expected = draws[:, :, place].numpy()
        np.testing.assert_allclose(part["mean"], expected.mean(0))
        np.testing.assert_allclose(part["lower"], np.quantile(expected, 0.1, axis=0))
        np.testing.assert_allclose(part["upper"], np.quantile(expected, 0.9, axis=0))
