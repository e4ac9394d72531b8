"""docs/extending.md: every example runs by itself and fits its data."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from armed_pyro import Fit
from armed_pyro.families.registry import FAMILIES
from armed_pyro.inference.posterior import Posterior
from armed_pyro.random_effects.covariance import COVARIANCES

PAGE = Path(__file__).resolve().parents[1] / "docs" / "extending.md"


def sections():
    """Python code of the page by the title of its section."""
    titled = re.split(r"^## (.+)$", PAGE.read_text("utf-8"), flags=re.MULTILINE)[1:]
    blocks = {
        title: "\n".join(re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
        for title, text in zip(titled[::2], titled[1::2], strict=True)
    }
    return {title: code for title, code in blocks.items() if code}


@pytest.fixture(scope="module")
def run():
    """Names that a section's code defines, when it has run in an empty namespace."""
    done = {}

    def namespace(title):
        if title not in done:
            done[title] = {"__name__": f"extending_{title.split()[-1]}"}
            with torch.random.fork_rng():
                exec(compile(sections()[title], f"{PAGE} ({title})", "exec"), done[title])
        return done[title]

    return namespace


@pytest.fixture(autouse=True)
def nothing_registered():
    before = dict(FAMILIES), dict(COVARIANCES)
    yield
    assert before == (FAMILIES, COVARIANCES)


def test_the_page_has_an_example_of_every_kind_of_extension():
    kinds = ["a family", "a covariance", "a term", "a guide", "a source of rows", "a rival"]
    assert [title.lower() for title in sections()] == kinds


@pytest.mark.parametrize("title", ["A family", "A covariance", "A term", "A guide"])
def test_extensions_fit(title, run):
    result = run(title)["result"]
    assert isinstance(result, Fit)
    loss = np.asarray(result.history.loss)
    assert np.isfinite(loss).all()
    assert loss[-10:].mean() < loss[:5].mean()
    table = result.variance_components()
    assert np.isfinite(table["mean"]).all()
    expected = result.predict(result.data.take(range(5)), draws=20).expected
    assert np.isfinite(expected).all()


def test_the_family_is_checked_by_its_distribution_function(run):
    names = run("A family")
    (check,) = [
        check for check in names["result"].diagnostics().checks if check.name == "residuals"
    ]
    assert check.effect is not None
    family, draws = names["Gamma"](), 4000
    y = family.simulate(np.random.default_rng(0), np.full((draws, 1), 0.7), {"shape": 3.0}, 1)
    assert abs(y.mean() - np.exp(0.7)) < 4 * np.exp(0.7) / (3 * draws) ** 0.5


def test_the_covariance_is_in_the_tables(run):
    result = run("A covariance")["result"]
    assert "rho" in set(result.variance_components()["statistic"])


def test_the_effects_of_the_term_are_found(run):
    names = run("A term")
    result = names["result"]
    effects = result.draws(200)["site_effect"].mean(0).numpy()
    found = effects[:, list(result.model.factors[0].terms).index("cos(time)")]
    assert np.corrcoef(found, names["amplitude"])[0, 1] > 0.9


def test_the_guide_is_the_one_of_the_page(run):
    names = run("A guide")
    guide = names["result"].guide
    assert type(guide) is names["MeanField"]
    assert float(guide.mean[0].detach().abs().max()) > 0.1


def test_the_source_trains(run):
    names = run("A source of rows")
    posterior, source = names["result"], names["source"]
    assert isinstance(posterior, Posterior)
    loss = np.asarray(posterior.history.loss)
    assert loss[-10:].mean() < loss[:5].mean()
    batches = [
        next(rows.batches(10, torch.Generator().manual_seed(0))).x for rows in (source, source.rows)
    ]
    noise = batches[0] - batches[1]
    assert 0.02 < float(noise.std()) < 0.3
    torch.testing.assert_close(source.all().x, source.rows.all().x)


def test_the_rival_predicts_seen_and_unseen_clusters(run):
    names = run("A rival")
    trained, rows, new = (names[name] for name in ("result", "rows", "new"))
    y = rows.outcome.numpy()
    assert np.square(y - trained.predict(rows)).mean() < 0.7 * y.var()
    x = trained.standardise(new.features)
    fixed = trained.net(x)[:, 0].detach().numpy()
    np.testing.assert_allclose(trained.predict(new), fixed)
