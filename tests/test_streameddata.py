"""Rows streamed from files: the same rows as in memory, the same fits, and nothing left behind."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from armed_pyro import Adversary, ClusteredData, MixedEffects, Schedule, fit
from armed_pyro.fit_result import Fit
from armed_pyro.inference.training_run import Run
from armed_pyro.program.data_spec import Facts
from armed_pyro.rows.in_memory import HeldRows
from armed_pyro.streaming.streamed_data import StreamedData

MEMORY = 300_000  # so little that rows are sorted in several files
N, K = 3000, 60


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr("armed_pyro.streaming.scan.BLOCK_ROWS", 271)


def table(family="gaussian", n=N, clusters=K, seed=0):
    rng = np.random.default_rng(seed)
    site = rng.integers(clusters, size=n)
    age, dose = rng.normal(50, 10, size=n), rng.normal(size=n)
    effects = rng.normal(size=(clusters, 2)) * [0.8, 0.5]
    sex = np.array(["f", "m"])[rng.integers(2, size=n)]
    eta = 0.03 * (age - 50) + 0.5 * (sex == "m") + effects[site, 0] + effects[site, 1] * dose
    y = eta + 0.6 * rng.normal(size=n)
    if family == "bernoulli":
        y = (rng.random(n) < 1 / (1 + np.exp(-2 * eta))).astype(float)
    columns = {"y": y, "age": age, "dose": dose, "sex": sex}
    return pd.DataFrame({**columns, "site": [f"s{k}" for k in site], "w": rng.random(n)})


ROLES = {"outcome": "y", "clusters": ["site"], "features": ["age", "dose", "sex"]}
SLOPES = "(1 + dose | site)"


def stream(frame, folder, memory=MEMORY, **roles):
    frame.to_parquet(folder / "rows.parquet", row_group_size=500)
    return StreamedData.scan(
        folder / "rows.parquet", memory=memory, folder=folder, **{**ROLES, **roles}
    )


def linear(family="gaussian", random=SLOPES, width=3):
    return MixedEffects(nn.Linear(width, 1), random, family, bayesian_head=True)


def dense():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    return MixedEffects(net, SLOPES, adversary=Adversary("site", ["1"]))


def left_in(folder):
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------------------------- the rows


@pytest.fixture
def both(tmp_path):
    """A streamed source with a shuffled file, and the same rows in memory."""
    frame, model = table(), dense()
    roles = {**ROLES, "weights": "w"}
    data = ClusteredData.from_frame(frame, **roles)
    bound = model.bind(data)
    with stream(frame, tmp_path, weights="w").laid_out(model, seed=3) as files:
        yield files, files.rows(bound.reference()), bound.encode(data)
    assert left_in(tmp_path) == ["rows.parquet"]


def sorted_rows(rows):
    """Values of rows as a table, sorted by the outcome; clusters by their codes."""
    codes = {name: one.index[one.position] for name, one in rows.memberships.items()}
    columns = [rows.y, rows.weights, *codes.values(), *rows.x.T]
    values = torch.stack([one.double() for one in columns], 1)
    return values[values[:, 0].argsort()]


def test_facts_are_those_of_the_table_in_memory(both):
    files, _, _ = both
    data = ClusteredData.from_frame(table(), **ROLES, weights="w")
    model = dense()
    wanted = Facts.of(data, model.family, model.factor_names())
    for field in dataclasses.fields(Facts):
        mine, other = getattr(files.facts, field.name), getattr(wanted, field.name)
        if field.name in ("feature_mean", "feature_scale", "center", "spread"):
            np.testing.assert_allclose(mine, other, rtol=1e-10)
        elif field.name == "levels":
            assert mine["site"].equals(other["site"])
        elif field.name == "counts":
            assert torch.equal(mine["site"], other["site"])
        elif field.name == "schema":
            assert mine.to_json() == other.to_json()
        else:
            assert mine == other, field.name


def test_passes_and_batches_have_every_row_once(both):
    _, source, held = both
    assert isinstance(held, HeldRows)
    assert len(source) == N
    every = sorted_rows(held.all())
    torch.testing.assert_close(sorted_rows(source.all()), every, rtol=1e-5, atol=1e-5)
    chunks = torch.cat([sorted_rows(rows) for rows in source.chunks(400)])
    torch.testing.assert_close(chunks[chunks[:, 0].argsort()], every, rtol=1e-5, atol=1e-5)
    batches = [source.batch(index, dense_up_to=0) for index in torch.arange(N).split(100)]
    assert all(rows.scale == N / 100 for rows in batches)
    taken = torch.cat([sorted_rows(rows) for rows in batches])
    torch.testing.assert_close(taken[taken[:, 0].argsort()], every, rtol=1e-5, atol=1e-5)
    weights = torch.zeros(K)
    for rows in batches:
        one = rows.memberships["site"]
        weights.index_add_(0, one.index, one.weight)
    torch.testing.assert_close(weights * 100 / N, torch.ones(K))


def test_whole_clusters_are_those_of_the_rows_in_memory(both):
    _, source, held = both
    chosen = torch.tensor([41, 3, 4, 59, 0])
    mine, other = (one.whole_clusters("site", chosen) for one in (source, held))
    assert mine.scale == other.scale == K / 5
    assert torch.equal(mine.memberships["site"].index, other.memberships["site"].index)
    assert torch.equal(mine.memberships["site"].weight, other.memberships["site"].weight)
    assert not mine.memberships["site"].complete
    torch.testing.assert_close(sorted_rows(mine), sorted_rows(other), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="sorted by 'site', but whole clusters of 'ward'"):
        source.whole_clusters("ward", chosen)


def test_the_sample_is_whole_clusters(monkeypatch, tmp_path):
    with stream(table(), tmp_path).laid_out(linear(), seed=0) as files:
        assert files.sample.n_rows == N  # it is small enough to be kept whole
    monkeypatch.setattr("armed_pyro.streaming.sort_and_shuffle.SAMPLE_ROWS", 1500)
    with stream(table(), tmp_path).laid_out(linear(), seed=0) as smaller:
        sample = smaller.sample
        assert 1300 < sample.n_rows <= 1500
        whole = dict(zip(smaller.facts.levels["site"], smaller.facts.counts["site"].tolist(),
                         strict=True))  # fmt: skip
        for label, count in zip(
            sample.groupings["site"].levels, sample.groupings["site"].counts.tolist(), strict=True
        ):
            assert whole[label] == count


def test_large_means_lose_nothing_in_single_precision(tmp_path):
    frame = table().assign(age=lambda t: 1e9 + t.age)
    with stream(frame, tmp_path).laid_out(linear(), seed=0) as files:
        x = files.rows(torch.zeros(0)).all().x[:, 0].double()
        assert abs(float(x.mean())) < 1e-3
        assert abs(float(x.std()) - 1) < 1e-3


# ---------------------------------------------------------------------------------- errors


def test_files_are_removed_after_errors(tmp_path):
    data = stream(table(), tmp_path)

    def fail_within():
        with data.laid_out(linear(), seed=0) as files:
            assert len(left_in(tmp_path)) == 2
            assert len(files.rows(torch.zeros(0))) == N
            raise RuntimeError("from within")

    with pytest.raises(RuntimeError, match="from within"):
        fail_within()
    assert left_in(tmp_path) == ["rows.parquet"]
    counts = stream(table().assign(y=lambda t: t.y.round().abs()), tmp_path)
    broken = table().assign(y=lambda t: t.y.round().abs())
    broken.loc[2900, "y"] = -1
    with pytest.raises(ValueError, match=r"'y' is outside that range in 1 row.*2900"):
        fit(linear("poisson"), stream(broken, tmp_path), progress=False)
    with pytest.raises(ValueError, match="Constant in all training rows: 'dose'"):
        fit(linear(), stream(table().assign(dose=1.5), tmp_path), progress=False)
    with pytest.raises(ValueError, match="'site' has a single level"):
        fit(linear(), stream(table().assign(site="a"), tmp_path), progress=False)
    with pytest.raises(ValueError, match="cells of 'site:sex' cannot be streamed"):
        fit(linear(random="(1 | site/sex)"), counts, progress=False)
    assert left_in(tmp_path) == ["rows.parquet"]


def test_bad_trials_are_told_by_the_row_of_the_file(tmp_path):
    frame = table().assign(y=lambda t: (t.y > 0).astype(float), n=3.0)
    frame.loc[1234, "n"] = 0.5
    data = stream(frame, tmp_path, trials="n")
    with pytest.raises(ValueError, match=r"trials must be positive whole numbers.*in row 1234"):
        fit(linear("binomial"), data, progress=False)


def test_only_parquet_is_streamed(tmp_path):
    table().to_csv(tmp_path / "rows.csv", index=False)
    with pytest.raises(ValueError, match="not a Parquet file"):
        StreamedData.scan(tmp_path / "rows.csv", **ROLES)


# ---------------------------------------------------------------------------------- fits


def in_pieces(monkeypatch, n):
    """Neither the search for the mode nor the weights may see all n rows at once."""
    monkeypatch.setattr("armed_pyro.inference.marginal_mode.SEARCHED", n // 2)
    monkeypatch.setattr("armed_pyro.inference.marginal_mode.FEWEST_SEARCHED", 10)
    monkeypatch.setattr("armed_pyro.inference.marginal_mode.LARGEST_STEP", n - 1)
    monkeypatch.setattr("armed_pyro.inference.importance_sampling.MOST_AT_ONCE", n // 3)
    monkeypatch.setattr("armed_pyro.inference.importance_sampling.MOST_DRAWS", 1000)
    monkeypatch.setattr("armed_pyro.inference.importance_sampling.PIECE", 1000 * n // 4)
    monkeypatch.setattr("armed_pyro.streaming.sort_and_shuffle.SAMPLE_ROWS", n // 2)


@pytest.mark.parametrize(
    ("family", "random", "n", "clusters"),
    [("gaussian", SLOPES, N, K), ("bernoulli", "(1 | site)", 1200, 40)],
    ids=["gaussian", "bernoulli"],
)
def test_streamed_and_in_memory_fits_agree(family, random, n, clusters, tmp_path, monkeypatch):
    frame, model = table(family, n, clusters), linear(family, random)
    held = fit(model, ClusteredData.from_frame(frame, **ROLES), progress=False)
    in_pieces(monkeypatch, n)
    streamed = fit(model, stream(frame, tmp_path, memory=100_000), seed=1, progress=False)
    assert left_in(tmp_path) == ["rows.parquet"]
    assert streamed.sampled
    assert streamed.refined is not None
    for make in (Fit.variance_components, Fit.fixed_effects):
        mine, other = make(streamed), make(held)
        # Shares and R2 average over the rows that were kept.
        if "statistic" in mine:
            mine, other = (one[one.statistic.isin(["sd", "cor"])] for one in (mine, other))
        ess = streamed.refined.quality["ess"]
        error = 4 * other.sd.to_numpy() / np.sqrt(ess)
        assert (np.abs(mine["mean"].to_numpy() - other["mean"].to_numpy()) < error).all()
        np.testing.assert_allclose(mine.sd, other.sd, rtol=4 / np.sqrt(2 * ess))
    new = ClusteredData.from_frame(table(family, n, clusters, seed=5), **ROLES)
    mine, other = (one.predict(new).to_frame() for one in (streamed, held))
    gap = (mine["mean"] - other["mean"]).abs() / other.sd
    assert gap.quantile(0.95) < 0.35
    found = streamed.diagnostics()
    (rows,) = (check for check in found.checks if check.name == "rows")
    assert f"of {n} rows {streamed.data.n_rows}, in" in rows.reason
    assert found.verdict != "fail"
    assert "elpd_loo" not in found.figures
    streamed.save(tmp_path / "run")
    again = Fit.load(tmp_path / "run", nn.Linear(3, 1))
    assert again.sampled
    assert again.variance_components().equals(streamed.variance_components())
    with pytest.raises(ValueError, match=rf"keeps .* of its {n} rows"):
        again.refine("nuts")
    with pytest.raises(ValueError, match="rows of every cluster of 'site'"):
        again.classifier("site")


@pytest.mark.slow
def test_a_network_trained_on_streamed_batches_explains_as_much(tmp_path):
    frame = table()
    schedule = Schedule(steps=600, batch_size=128, window=50)
    data = ClusteredData.from_frame(frame, **ROLES)
    found = []
    for rows in (data, stream(frame, tmp_path)):
        one = fit(dense(), rows, schedule=schedule, refine=False, progress=False)
        found.append(one.predict(data).to_frame()["mean"])
    residual = [float((frame.y - one).var()) for one in found]
    assert abs(residual[0] - residual[1]) < 0.04
    assert residual[1] < 0.5


def test_a_streamed_run_is_resumed_where_it_stopped(tmp_path):
    frame, path = table(), tmp_path / "checkpoint.safetensors"
    short = Schedule(steps=60, window=20, batch_size=64, stages=0)
    settings = {"schedule": short, "refine": False, "progress": False, "compile": "never"}
    whole = fit(dense(), stream(frame, tmp_path), seed=2, **settings)

    saved, save = [], Run.save

    def stop(self):
        if saved:
            raise KeyboardInterrupt
        saved.append(1)
        return save(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            fit(dense(), stream(frame, tmp_path), seed=2, checkpoint=path, **settings)
    resumed = fit(
        dense(), stream(frame, tmp_path), seed=2, checkpoint=path, resume=True, **settings
    )
    assert resumed.history.loss == whole.history.loss
    other = stream(frame.assign(y=frame.y + 1), tmp_path)
    with pytest.raises(ValueError, match="belongs to another run"):
        fit(dense(), other, seed=2, checkpoint=path, resume=True, **settings)
    assert left_in(tmp_path) == ["checkpoint.safetensors", "rows.parquet"]
