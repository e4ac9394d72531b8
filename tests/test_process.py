"""Processes in time: exact agreement with dense normal densities, priors, tables, forecasts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from pyro import poutine
from scipy import special, stats
from torch import Tensor
from typer.testing import CliRunner

import armed_pyro as ap
from armed_pyro.cli import app
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.guides.noise import proposal_noise
from armed_pyro.guides.process import ProcessGuide
from armed_pyro.inference.nested_weights import weigh
from armed_pyro.prediction.adapt import AdaptedEffects
from armed_pyro.prediction.chunks import predict_rows
from armed_pyro.prediction.new_clusters import condition
from armed_pyro.prediction.unseen import Marginal, new_clusters
from armed_pyro.program.model import MixedEffects

Array = NDArray[np.float64]


def panel(kind: str, seed: int = 0, *, repeated: bool = False) -> pd.DataFrame:
    """Rows of clusters of unequal length at irregular times, or at whole steps with gaps."""
    rng = np.random.default_rng(seed)
    parts = []
    for k, n in enumerate([1, 7, 4, 9, 2, 6, 9]):
        time = rng.choice(20, n, replace=False) * 0.5 if kind == "ar1" else rng.uniform(0, 9, n)
        parts.append(pd.DataFrame({"id": f"c{k}", "t": time, "school": f"s{k // 2}"}))
    table = pd.concat(parts, ignore_index=True)
    if repeated:
        table = pd.concat([table, table[::3], table[::5]], ignore_index=True)
    n = len(table)
    table["x"] = rng.normal(size=n)
    table["y"] = 5 + table["x"] + rng.normal(size=n) * 2
    return table.sample(frac=1, random_state=seed).reset_index(drop=True)


def bound(table: pd.DataFrame, random: str) -> tuple[MixedEffects, ClusteredData]:
    made = ap.model(f"y ~ x + {random}", table)
    return made.program.bind(made.data), made.data


def sites(model: MixedEffects, kind: str, draws: int = 3) -> dict[str, Tensor]:
    """Hyperparameters with draws, "draws 1 size"."""
    torch.manual_seed(1)
    factors = {f.sd_site: len(f.terms) for f in model.factors}
    values = {name: torch.rand(draws, 1, size).double() + 0.3 for name, size in factors.items()}
    for factor in model.factors:
        for group, covariance in factor.groups:
            root = torch.linalg.cholesky(torch.tensor([[1.0, 0.4], [0.4, 1.0]])).double()
            (site,) = covariance.sites(group)
            values[site] = root.expand(draws, 1, 2, 2)
    if kind == "ou":
        values["id:t_range"] = torch.rand(draws, 1, 1).double() * 3 + 0.2
    if kind == "ar1":
        values["id:t_phi"] = torch.tensor([0.7, -0.4, 0.2]).double().reshape(3, 1, 1)
    values["residual_sd"] = torch.rand(draws, 1).double() + 0.2
    values["fixed_effect"] = torch.randn(draws, 1, 2).double()
    return values


def kernel(
    kind: str,
    values: Mapping[str, Tensor],
    draw: int,
    table: pd.DataFrame,
    unit: float | None = None,
) -> Array:
    """Correlation, or covariance in units of sd^2, of the process at the table's rows."""
    time = table["t"].to_numpy()
    same = table["id"].to_numpy()[:, None] == table["id"].to_numpy()
    gap = np.abs(time[:, None] - time)
    gaps = [np.diff(np.unique(part["t"])) for _, part in table.groupby("id")]
    unit = np.concatenate(gaps).min() if unit is None else unit
    if kind == "rw":
        start = table.groupby("id")["t"].transform("min").to_numpy() - unit
        walk = np.minimum(time[:, None] - start[:, None], time - start)
        return same * walk / unit
    if kind == "ou":
        return same * np.exp(-gap / float(values["id:t_range"][draw]))
    phi = float(values["id:t_phi"][draw])
    steps = np.round(gap / unit)
    return same * np.abs(phi) ** steps * np.where((steps % 2 == 1) & (phi < 0), -1.0, 1.0)


def dense(
    model: MixedEffects,
    table: pd.DataFrame,
    data: ClusteredData,
    values: Mapping[str, Tensor],
    kind: str,
    draw: int,
) -> tuple[Array, Array, dict[str, Array]]:
    """Mean and covariance of y, and the covariance of every factor's part of it."""
    facts, rows = model.data_facts(), model.encode(data).all()
    latents = {name: value[draw, 0] for name, value in values.items()}
    latents["residual_sd"] = values["residual_sd"][draw]
    mean = model.predictor(rows, {"fixed_effect": latents["fixed_effect"]}).eta[:, 0].numpy()
    parts: dict[str, Array] = {}
    for factor in model.factors:
        if factor.process is not None:
            sd = float(latents[factor.sd_site])
            parts[factor.name] = (sd * facts.spread) ** 2 * kernel(kind, values, draw, table)
            continue
        phi = factor.design(rows.slope_inputs(), {}).numpy()
        label = data.grouping(factor.name).codes.numpy()
        between = phi @ factor.covariance(latents).numpy() @ phi.T
        parts[factor.name] = facts.spread**2 * between * (label[:, None] == label)
    residual = (float(latents["residual_sd"]) * facts.spread) ** 2
    return mean, sum(parts.values()) + residual * np.eye(len(mean)), parts


RANDOM = {
    "alone": "{kind}(t | id)",
    "intercepts": "(1 | id) + {kind}(t | id)",
    "slopes": "(x | id) + {kind}(t | id)",
    "nested": "(1 | school) + (1 | id) + {kind}(t | id)",
    "outside": "(x | school) + {kind}(t | id)",
}


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("design", list(RANDOM))
@pytest.mark.parametrize("kind", ["ou", "ar1", "rw"])
def test_likelihood_and_effects_are_those_of_the_dense_normal(
    kind: str, design: str, repeated: bool
) -> None:
    table = panel(kind, repeated=repeated)
    model, data = bound(table, RANDOM[design].format(kind=kind))
    source = model.encode(data)
    guide, values = ProcessGuide(model, source), sites(model, kind)
    found = guide.closed_form(model, source)
    assert found is not None
    densities = found.log_likelihood(values)
    y = table["y"].to_numpy()
    with torch.no_grad():
        draws = [
            guide.effects_given({k: v[[d] * 4000] for k, v in values.items()}, model.clusters())
            for d in range(3)
        ]
    for draw in range(3):
        mean, covariance, parts = dense(model, table, data, values, kind, draw)
        exact = stats.multivariate_normal(mean, covariance).logpdf(y)
        assert float(densities[draw]) == pytest.approx(exact, rel=1e-9)
        # The posterior means and sds of the effects on every row, in standard errors of the draws.
        weights = np.linalg.solve(covariance, np.column_stack([y - mean, *parts.values()]))
        for place, (name, part) in enumerate(parts.items()):
            factor = next(f for f in model.factors if f.name == name)
            effects = draws[draw][factor.effect_site]
            rows = source.all()
            phi = factor.design(rows.slope_inputs(), {})
            drawn = factor.contribution(phi, rows.memberships[name], effects)[..., 0].numpy()
            drawn = drawn * model.data_facts().spread
            n = len(y)
            expected = part @ weights[:, 0]
            sd = np.sqrt(np.diag(part - part @ weights[:, 1 + place * n : 1 + (place + 1) * n]))
            error = (drawn.mean(0) - expected) / (sd / math.sqrt(4000))
            assert np.abs(error).max() < 5
            ratio = drawn.std(0) / sd
            assert np.abs(ratio - 1).max() < 5 / math.sqrt(2 * 4000)


@pytest.mark.parametrize("kind", ["ou", "ar1", "rw"])
def test_prior_of_the_site_is_that_of_the_dense_normal(kind: str) -> None:
    table = panel(kind)
    model, data = bound(table, f"{kind}(t | id)")
    (factor,) = model.factors
    values = {name: value[0, 0] for name, value in sites(model, kind).items()}
    values["residual_sd"] = values["residual_sd"].reshape(1)
    rows = model.encode(data).all()
    membership = rows.memberships["id:t"]
    effect = torch.randn(len(membership.index), 1).double()
    given = {k: v for k, v in values.items() if k not in ("residual_sd", "fixed_effect")}
    conditioned = poutine.condition(factor, given | {factor.effect_site: effect})
    trace = poutine.trace(conditioned).get_trace(membership)
    trace.compute_log_prob()
    found = float(trace.nodes[factor.effect_site]["log_prob_sum"])
    cells = table.drop_duplicates(["id", "t"])
    place = data.grouping("id:t").codes.numpy()[cells.index]
    sd = float(values[factor.sd_site])
    drawn = {name: value[None] for name, value in values.items()}
    covariance = sd**2 * kernel(kind, drawn, 0, cells)
    exact = stats.multivariate_normal(np.zeros(len(cells)), covariance)
    assert found == pytest.approx(exact.logpdf(effect[place, 0].numpy()), rel=1e-9)


@pytest.mark.parametrize("kind", ["ou", "ar1", "rw"])
def test_draws_at_new_times_are_those_of_the_dense_normal(kind: str) -> None:
    table = panel(kind)
    seen = table[(table["id"] != "c6") & (np.arange(len(table)) % 3 > 0)]
    cells = table.drop(seen.index)
    n = 4000
    model, data = bound(seen, f"{kind}(t | id)")
    (factor,) = model.factors
    values = {name: value[[0]] for name, value in sites(model, kind).items()}
    process = factor.process
    assert process is not None
    levels = model.data_facts().levels["id:t"]
    latents = {name: value.expand(n, *value.shape[1:]) for name, value in values.items()}
    effect = torch.randn(1, len(levels), 1).double()
    latents[factor.effect_site] = effect.expand(n, -1, -1)
    source = Marginal(latents, 0)
    new = data.encode(cells, data.schema).grouping("id:t")
    first, second = new.levels[:5], new.levels[5:]
    drawn = torch.cat([source.effects(factor, part)[0] for part in (first, second)], 1)
    again = source.effects(factor, new.levels)
    assert torch.equal(again[0], drawn)  # all calls share one path
    expected_modes = ["marginal" if "c6" in str(label) else "" for label in new.levels]
    assert again[1] == expected_modes
    both = pd.concat([seen, cells], ignore_index=True)
    unit = process.kernel.unit
    assert unit == pytest.approx(process.cells.shortest_gap())
    covariance = kernel(kind, values, 0, both, unit) * float(values[factor.sd_site]) ** 2
    k = len(seen)
    place = data.grouping("id:t").codes.numpy()
    u = effect[0, place, 0].numpy()
    solved = np.linalg.solve(covariance[:k, :k], np.column_stack([u, covariance[:k, k:]]))
    order = new.codes.numpy()
    mean = covariance[k:, :k] @ solved[:, 0]
    left = covariance[k:, k:] - covariance[k:, :k] @ solved[:, 1:]
    found = drawn[:, order, 0].numpy()
    sd = np.sqrt(np.diag(left))
    assert np.abs((found.mean(0) - mean) / (sd / math.sqrt(n))).max() < 5
    correlation = left / sd[:, None] / sd
    assert np.abs(np.cov(found.T) / sd[:, None] / sd - correlation).max() < 0.12


@pytest.fixture(scope="module")
def ovary() -> ap.Fit:
    rng = np.random.default_rng(3)
    parts = []
    for k in range(12):
        time = np.sort(rng.uniform(0, 10, 12))
        same = np.exp(-np.abs(time[:, None] - time) / 2)
        y = 3 + rng.normal() + np.linalg.cholesky(same) @ rng.normal(size=12)
        parts.append(pd.DataFrame({"id": f"m{k}", "t": time, "y": y + 0.5 * rng.normal(size=12)}))
    table = pd.concat(parts, ignore_index=True)
    table["x"] = rng.normal(size=len(table)) + np.repeat(np.arange(12) % 3, 12)
    return ap.model("y ~ x + (1 | id) + ou(t | id)", table).fit(progress=False)


@pytest.mark.parametrize("seen", [True, False])
def test_adapted_processes_are_those_of_the_dense_normal(ovary: ap.Fit, seen: bool) -> None:
    model, n = ovary.model, 4000
    rng = np.random.default_rng(5)
    name = "m1" if seen else "new"
    support = pd.DataFrame({"id": name, "t": [1.0, 4.0, 10.5, 11.0], "y": rng.normal(3, 2, 4)})
    support["x"] = rng.normal(size=4)
    rows = ovary.posterior.encode(support)
    one = ovary.posterior.draws(2)
    latents = {k: v[[0]].expand(n, *v.shape[1:]) for k, v in one.items()}
    made = condition(ovary.posterior, rows, latents, 0, update_seen=seen)
    marginal = Marginal(made.latents, 0)
    source = AdaptedEffects.of(made.latents, new_clusters(model, rows), made.effects, marginal)
    ahead = pd.DataFrame({"id": name, "t": [0.5, 11.5, 13.0], "x": [0.0, 1.0, -1.0]})
    drawn = predict_rows(ovary.posterior, ovary.posterior.encode(ahead), source).expected
    training = ovary.posterior.data
    table = pd.DataFrame(
        {"id": training.grouping("id").labels(), "t": training.grouping("t").labels()}
    )
    table["y"], table["x"] = training.outcome.numpy(), training.features[:, 0].numpy()
    known = pd.concat([table[table["id"] == name], support])
    both = pd.concat([known, ahead], ignore_index=True)
    spread = model.data_facts().spread
    sds = [float(one[site][0]) * spread for site in ("id_sd", "id:t_sd", "residual_sd")]
    gap = np.abs(both["t"].to_numpy()[:, None] - both["t"].to_numpy())
    part = sds[0] ** 2 + sds[1] ** 2 * np.exp(-gap / float(one["id:t_range"][0]))
    k = len(known)
    whole = part[:k, :k] + sds[2] ** 2 * np.eye(k)
    facts, fixed = model.data_facts(), one["fixed_effect"][0].flatten().numpy()
    x = (both["x"].to_numpy() - facts.feature_mean[0]) / facts.feature_scale[0]
    mean = facts.center[0] + spread * (fixed[0] + fixed[1] * x)
    solved = np.linalg.solve(whole, np.column_stack([known["y"] - mean[:k], part[:k, k:]]))
    expected = mean[k:] + part[k:, :k] @ solved[:, 0]
    sd = np.sqrt(np.diag(part[k:, k:] - part[k:, :k] @ solved[:, 1:]))
    assert np.abs((drawn.mean(0) - expected) / (sd / math.sqrt(n))).max() < 5
    assert np.abs(drawn.std(0) / sd - 1).max() < 5 / math.sqrt(2 * n)


def test_saved_streamed_and_stated_on_the_command_line_it_is_the_same_fit(
    ovary: ap.Fit, tmp_path: Path
) -> None:
    data = ovary.posterior.data
    table = pd.DataFrame({"id": data.grouping("id").labels(), "t": data.grouping("t").labels()})
    table["y"], table["x"] = data.outcome.numpy(), data.features[:, 0].numpy()
    ahead = table.assign(t=table["t"] + 1.5)
    expected = ovary.predict(ahead).to_frame()
    components = ovary.variance_components()
    assert {"sd", "range"} <= set(components[components["factor"] == "id:t"]["statistic"])
    ovary.save(tmp_path / "run")
    again = ap.Fit.load(tmp_path / "run")
    assert str(again.model.terms[1]) == "ou(t | id)"
    pd.testing.assert_frame_equal(again.predict(ahead).to_frame(), expected, rtol=1e-9)
    assert "id:t_range" in again.to_datatree()["posterior"]
    table.to_parquet(tmp_path / "rows.parquet")
    rows = ap.StreamedData.scan(
        tmp_path / "rows.parquet", outcome="y", clusters=["id"], times=["t"], features="x"
    )
    streamed = ap.fit(
        ap.model("y ~ x + (1 | id) + ou(t | id)", table).program, rows, progress=False
    )
    pd.testing.assert_frame_equal(streamed.variance_components(), components, rtol=1e-3)
    (tmp_path / "ahead.csv").write_text(ahead.drop(columns="y").to_csv(index=False))
    folder = str(tmp_path / "cli")
    told = ["fit", str(tmp_path / "rows.parquet"), "y ~ x + (1 | id) + ou(t | id)"]
    assert CliRunner().invoke(app, [*told, "--out", folder]).exit_code == 0
    written = str(tmp_path / "predictions.csv")
    told = ["predict", folder, str(tmp_path / "ahead.csv"), "--out", written]
    assert CliRunner().invoke(app, told).exit_code == 0
    made = pd.read_csv(written)
    assert made["unseen"].isna().all()
    assert np.allclose(made["mean"], expected["mean"], atol=0.02)


def test_unseen_clusters_get_paths_from_the_prior(ovary: ap.Fit) -> None:
    new = pd.DataFrame({"id": "new", "t": np.linspace(0, 9, 40), "x": 0.0})
    with pytest.raises(ValueError, match=r"1 of 'id' \('new'"):
        ovary.predict(new)
    zero = ovary.predict(new, unseen="population", draws=4000)
    assert np.ptp(zero.expected, axis=1).max() == pytest.approx(0, abs=1e-9)
    made = ovary.predict(new, unseen="marginal", draws=4000)
    table = ovary.variance_components().set_index(["factor", "statistic"])["mean"]
    both = float(table["id:t", "variance"]) + float(table["id", "variance"])
    assert (made.expected - zero.expected).var(0).mean() == pytest.approx(both, rel=0.15)
    for mode in ("membership", "nearest"):
        assert (ovary.predict(new, unseen=mode).unseen == mode).all()


def test_wrong_times_and_designs_are_told(ovary: ap.Fit) -> None:
    table = panel("ou")
    with pytest.raises(ValueError, match="ar1 needs times that are whole numbers of steps"):
        bound(table, "ar1(t | id)")
    with pytest.raises(ValueError, match="the times of 'id:t' must be numbers, found 'x"):
        bound(table.assign(t="x" + table["t"].astype(str)), "ou(t | id)")
    crossed = table.assign(g=np.arange(len(table)) % 3)
    made = ap.model("y ~ x + (1 | g) + ou(t | id)", crossed)
    with pytest.raises(ValueError, match="lie in several clusters of 'g'"):
        made.fit(progress=False)
    with pytest.raises(ValueError, match="at most one process"):
        ap.model("y ~ x + ou(t | school/id)", table).fit(progress=False)
    with pytest.raises(ValueError, match="write the column of times"):
        ap.model("y ~ x + ou(t)", table)


def test_counts_are_weighed_by_cluster() -> None:
    """log p(y | theta) of a cluster by particles is that of quadrature over its two effects."""
    rng = np.random.default_rng(2)
    table = pd.DataFrame({"id": np.repeat(["a", "b", "c"], 2), "t": [0.0, 1.0, 0.0, 3.0, 1.0, 1.5]})
    table["y"] = rng.poisson(3, 6)
    made = ap.model("y ~ 1 + ou(t | id)", table, family="poisson")
    model = made.program.bind(made.data)
    source = model.encode(made.data)
    guide = ProcessGuide(model, source).requires_grad_(False)
    for _ in range(5):
        guide.refresh(model, source)
    rows = source.all()
    torch.manual_seed(0)
    noise = proposal_noise(guide, rows, 1, 4096, model.reference(), heavy=False)
    noise = replace(noise, values={**noise.values, "_theta": 0 * noise.values["_theta"]})
    weighted = weigh(model, guide, rows, noise)
    center = guide.hyperparameters.center()
    sd, length = float(center["id:t_sd"]), float(center["id:t_range"])
    fixed = model.predictor(rows, {"fixed_effect": center["fixed_effect"]}).eta[:, 0].numpy()
    nodes, node_weights = np.polynomial.hermite_e.hermegauss(60)
    z = np.stack(np.meshgrid(nodes, nodes, indexing="ij"), -1).reshape(-1, 2)
    log_weights = np.log(np.multiply.outer(node_weights, node_weights).ravel() / (2 * np.pi))
    spread = model.data_facts().spread
    for k, name in enumerate(["a", "b", "c"]):
        part = table["id"] == name
        gap = abs(np.diff(table["t"][part])[0])
        rho = np.exp(-gap / length)
        root = np.linalg.cholesky([[1, rho], [rho, 1]]) * sd * spread
        eta = fixed[part.to_numpy()] + z @ root.T
        log_p = stats.poisson(np.exp(eta)).logpmf(table["y"][part].to_numpy()).sum(1)
        exact = special.logsumexp(log_p + log_weights)
        assert float(weighted.clusters()[0, k]) == pytest.approx(exact, abs=0.01)


@pytest.mark.parametrize("family", ["poisson", "bernoulli"])
def test_other_families_are_fitted_and_forecast(family: str) -> None:
    rng = np.random.default_rng(4)
    n, k = (6, 25) if family == "poisson" else (8, 50)  # binary rows say less
    time = np.sort(rng.uniform(0, 6, (k, n)), 1)
    same = np.exp(-np.abs(time[:, :, None] - time[:, None]) / 2)
    path = (np.linalg.cholesky(same) @ rng.normal(size=(k, n, 1)))[..., 0]
    eta = 0.5 + 0.8 * path.ravel()
    y = (
        rng.poisson(np.exp(eta))
        if family == "poisson"
        else rng.random(n * k) < 1 / (1 + np.exp(-eta))
    )
    table = pd.DataFrame({"id": np.repeat(np.arange(k), n), "t": time.ravel(), "y": y.astype(int)})
    fitted = ap.model("y ~ 1 + ou(t | id)", table, family=family).fit(progress=False)
    assert fitted.importance.k_hat < 0.7
    drawn = fitted.variance_components().set_index(["factor", "statistic"])
    for name, truth in {"sd": 0.8, "range": 2.0}.items():
        row = drawn.loc[("id:t", name)]
        assert row["lower"] < truth < row["upper"]
    values = fitted.predict(table).mean
    assert np.corrcoef(values, eta)[0, 1] > (0.7 if family == "poisson" else 0.4)
    ahead = fitted.predict(table.assign(t=table["t"] + 0.5), interval="outcome")
    assert (ahead.unseen == "").all()
