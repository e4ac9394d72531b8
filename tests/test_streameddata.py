"""Rows streamed from files: the same rows as in memory, the same fits, and nothing left behind."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import nn

from armed_pyro import Adversary, ClusteredData, MixedEffects, Schedule, Slopes, fit
from armed_pyro.fit_result import Fit
from armed_pyro.inference.cross_fitting import CrossFitting
from armed_pyro.inference.training_run import Run
from armed_pyro.program.data_spec import Facts
from armed_pyro.rows.in_memory import HeldRows
from armed_pyro.streaming.on_disk import StreamedRows
from armed_pyro.streaming.streamed_data import StreamedData

MEMORY = 300_000
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
    with stream(frame, tmp_path, weights="w").encoded(["site"], seed=3) as encoded:
        yield encoded, StreamedRows(encoded, bound.reference()), bound.encode(data)
    assert left_in(tmp_path) == ["rows.parquet"]


def sorted_rows(rows):
    """Values of rows as a table, sorted by the outcome; clusters by their codes."""
    codes = {name: one.index[one.position] for name, one in rows.memberships.items()}
    columns = [rows.y, rows.weights, *codes.values(), *rows.x.T]
    values = torch.stack([one.double() for one in columns], 1)
    return values[values[:, 0].argsort()]


def test_facts_are_those_of_the_table_in_memory(both):
    encoded, _, _ = both
    data = ClusteredData.from_frame(table(), **ROLES, weights="w")
    model = dense()
    wanted = Facts.of(data, model.family, model.factor_names())
    streamed = Facts.of_encoded(encoded, model.family)
    for field in dataclasses.fields(Facts):
        mine, other = getattr(streamed, field.name), getattr(wanted, field.name)
        if field.name in ("feature_mean", "feature_scale", "feature_average", "center", "spread"):
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
    batches = list(source.batches(100, dense_up_to=0))
    assert all(rows.scale == N / 100 for rows in batches)
    taken = torch.cat([sorted_rows(rows) for rows in batches])
    torch.testing.assert_close(taken[taken[:, 0].argsort()], every, rtol=1e-5, atol=1e-5)
    weights = torch.zeros(K).double()
    for rows in batches:
        one = rows.memberships["site"]
        weights.index_add_(0, one.index, one.weight)
    torch.testing.assert_close(weights * 100 / N, torch.ones(K).double())


def test_whole_clusters_are_those_of_the_rows_in_memory(both):
    _, source, held = both
    chosen = torch.tensor([41, 3, 4, 59, 0])
    mine, other = (one.whole_clusters("site", chosen) for one in (source, held))
    assert mine.scale == other.scale == K / 5
    assert torch.equal(mine.memberships["site"].index, other.memberships["site"].index)
    assert torch.equal(mine.memberships["site"].weight, other.memberships["site"].weight)
    assert not mine.memberships["site"].complete
    torch.testing.assert_close(sorted_rows(mine), sorted_rows(other), rtol=1e-5, atol=1e-5)
    batches = list(source.cluster_batches("site", 7))
    assert [len(rows.memberships["site"].index) for rows in batches] == [7] * (K // 7)
    drawn = torch.cat([rows.memberships["site"].index for rows in batches])
    assert len(drawn.unique()) == len(drawn)
    for rows in batches:
        assert len(rows) == int(held.counts["site"][rows.memberships["site"].index].sum())


@pytest.mark.parametrize("kind", ["rows", "clusters"])
def test_passes_differ_and_follow_from_the_generator(kind, both):
    _, source, _ = both

    def batches(seed):
        generator = torch.Generator().manual_seed(seed)
        if kind == "rows":
            return list(source.batches(100, generator))
        return list(source.cluster_batches("site", 10, generator))

    one, again, other = batches(0), batches(0), batches(1)
    assert all(torch.equal(a.y, b.y) for a, b in zip(one, again, strict=True))
    together = [frozenset(batch.y.tolist()) for batch in one]
    assert not set(together) & {frozenset(batch.y.tolist()) for batch in other}


@pytest.fixture
def numbered(tmp_path, monkeypatch):
    """12,000 streamed rows in six row groups, of which two are mixed; the outcome counts them."""
    monkeypatch.setattr("armed_pyro.streaming.encoded_table.GROUP_BYTES", 1)  # 2,048 rows
    monkeypatch.setattr("armed_pyro.streaming.on_disk.MIXED", 2)
    frame = table(n=12_000).assign(y=np.arange(12_000))
    with stream(frame, tmp_path).encoded(["site"], seed=0) as encoded:
        yield frame, StreamedRows(encoded, torch.zeros(0))


def test_a_pass_over_several_row_groups_has_no_row_twice(numbered):
    frame, source = numbered
    batches = [rows.y.long() for rows in source.batches(500)]
    assert [len(one) for one in batches] == [500] * 24
    assert torch.equal(torch.cat(batches).sort().values, torch.arange(12_000))
    large = list(source.batches(7000))
    assert [len(rows.y.unique()) for rows in large] == [7000]
    assert torch.equal(source.all().y, torch.arange(12_000).float())
    levels = source.table.scanned.levels["site"]
    for chosen in ([7, 3], [59], list(range(K))):
        rows = source.whole_clusters("site", torch.tensor(chosen))
        wanted = frame.y[frame.site.isin(levels[chosen])]
        assert sorted(rows.y.tolist()) == wanted.tolist()


def uniformity(values, n):
    """p-value of the means of batches of 100 of the numbers below n as those of random samples."""
    spread = np.sqrt((n**2 - 1) / 12 / 100 * (1 - 100 / n))
    means = (np.reshape(values, (-1, 100)).mean(1) - (n - 1) / 2) / spread
    return stats.kstest(means, "norm").pvalue


def test_mini_batches_are_random_samples_of_all_rows(numbered):
    n, (_, source) = 12_000, numbered
    drawn = np.concatenate([rows.y.numpy() for rows in source.batches(100)])
    # Of a random order neither neighbours nor place and value are correlated.
    for one, other in [(drawn[1:], drawn[:-1]), (drawn, np.arange(n))]:
        assert abs(np.corrcoef(one, other)[0, 1]) * np.sqrt(n) < 4
    assert uniformity(drawn, n) > 0.001
    groups = np.random.default_rng(0).permuted(np.arange(n).reshape(6, -1), axis=1)
    assert uniformity(groups, n) < 1e-6  # rows mixed within row groups of the table alone


@pytest.mark.parametrize("name", ["rows[1]*.parquet", "it's ?.parquet"])
def test_odd_characters_in_paths_are_no_patterns(name, tmp_path):
    folder = tmp_path / "a[b]*?'"
    folder.mkdir()
    table().to_parquet(folder / name)
    data = StreamedData.scan(folder / name, folder=folder, **ROLES)
    with data.encoded(["site"], seed=0) as encoded:
        source = StreamedRows(encoded, torch.zeros(0))
        assert len(next(source.batches(100))) == 100
        assert len(source.whole_clusters("site", torch.arange(K))) == N
    assert left_in(folder) == [name]


def test_columns_that_differ_by_case_are_told_apart(tmp_path):
    frame = table().rename(columns={"dose": "Age"})
    roles = {**ROLES, "features": ["age", "Age", "sex"]}
    frame.to_parquet(tmp_path / "rows.parquet")
    data = StreamedData.scan(tmp_path / "rows.parquet", folder=tmp_path, **roles)
    held = ClusteredData.from_frame(frame, **roles)
    with data.encoded(["site"], seed=0) as encoded:
        found = encoded.sample("site")
    assert found.feature_names == held.feature_names
    assert torch.equal(found.features, held.features)
    assert torch.equal(found.outcome, held.outcome)
    assert found.groupings["site"].levels.equals(held.groupings["site"].levels)
    assert torch.equal(found.groupings["site"].codes, held.groupings["site"].codes)


def test_clusters_that_lie_beside_each_other_are_random_ones(both):
    _, source, _ = both
    order = source.cluster_order("site").numpy()
    assert np.array_equal(np.sort(order), np.arange(K))
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) * np.sqrt(K) < 3


def test_the_sample_is_whole_clusters(monkeypatch, tmp_path):
    with stream(table(), tmp_path).encoded(["site"], seed=0) as encoded:
        assert encoded.sample("site").n_rows == N  # it is small enough to be kept whole
        assert encoded.sample(None).n_rows == N
        assert encoded.sample("site").row_labels.tolist() == list(range(N))
        monkeypatch.setattr("armed_pyro.streaming.encoded_table.SAMPLE_ROWS", 1500)
        sample = encoded.sample("site")
        assert 1300 < sample.n_rows <= 1500
        assert 1300 < encoded.sample(None).n_rows < 1700
        whole = dict(
            zip(
                encoded.scanned.levels["site"], encoded.scanned.counts["site"].tolist(), strict=True
            )
        )
        for label, count in zip(
            sample.groupings["site"].levels, sample.groupings["site"].counts.tolist(), strict=True
        ):
            assert whole[label] == count


def test_large_means_lose_nothing_in_single_precision(tmp_path):
    frame = table().assign(age=lambda t: 1e9 + t.age)
    with stream(frame, tmp_path).encoded(["site"], seed=0) as encoded:
        x = StreamedRows(encoded, torch.zeros(0)).all().x[:, 0].double()
        assert abs(float(x.mean())) < 1e-3
        assert abs(float(x.std()) - 1) < 1e-3


# ---------------------------------------------------------------------------------- errors


def test_files_are_removed_after_errors(tmp_path):
    data = stream(table(), tmp_path)

    def fail_within():
        with data.encoded(["site"], seed=0) as encoded:
            assert len(left_in(tmp_path)) == 2
            source = StreamedRows(encoded, torch.zeros(0))
            assert len(source) == N
            next(source.batches(100))
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
    with pytest.raises(ValueError, match="cluster column 'day'"):
        fit(linear(random="(1 | site/day)"), counts, progress=False)
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
    monkeypatch.setattr("armed_pyro.streaming.encoded_table.SAMPLE_ROWS", n // 2)


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
    assert not found.failed
    assert "elpd_loo" not in found.figures
    streamed.save(tmp_path / "run")
    again = Fit.load(tmp_path / "run", nn.Linear(3, 1))
    assert again.sampled
    assert again.variance_components().equals(streamed.variance_components())
    with pytest.raises(ValueError, match=rf"keeps .* of its {n} rows"):
        again.refine("nuts")
    with pytest.raises(ValueError, match="rows of every cluster of 'site'"):
        again.classifier("site")


def two_factors(n=1200):
    """Rows in 300 clusters of "a" and 60 of "b"."""
    rng = np.random.default_rng(4)
    frame = table(n=n, seed=4).assign(a=rng.permutation(n) % 300, b=rng.permutation(n) % 60)
    return frame.assign(y=lambda t: t.y + rng.normal(size=300)[t.a])


def test_a_factor_with_few_clusters_but_most_effects_is_taken_whole(tmp_path, monkeypatch):
    # A hidden layer of 8 units has 480 effects of "b", beside 300 of "a".
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    model = MixedEffects(net, ["(1 | a)", Slopes("b", on="1")])
    data = stream(two_factors(), tmp_path, clusters=["a", "b"])
    monkeypatch.setattr("armed_pyro.inference.phases.LARGEST_STEP", 2 * 600)
    # Sums of gaussian rows would need no rows.
    monkeypatch.setattr("armed_pyro.inference.phases.exact_likelihood", lambda *_: None)
    whole, asked = StreamedRows.whole_clusters, []

    def recorded(self, factor, chosen):
        asked.append(factor)
        return whole(self, factor, chosen)

    monkeypatch.setattr(StreamedRows, "whole_clusters", recorded)
    schedule = Schedule(steps=40, window=10, batch_size=100, stages=1, particles=1)
    streamed = fit(model, data, schedule=schedule, refine=False, progress=False)
    assert streamed.history.settled is not None
    assert set(asked) == {"b"}
    assert left_in(tmp_path) == ["rows.parquet"]


# ------------------------------------------------------------------------------- held-out rows


@pytest.mark.parametrize("factor", ["site", None])
def test_held_out_rows_and_the_rest_are_all_rows(both, factor):
    encoded, streamed, held = both
    rest, part = streamed.divided(factor, wanted=400)
    assert 0 < part.n_rows <= (400 if factor else 500)
    assert len(rest) + part.n_rows == len(held)
    y = torch.cat([rest.all().y, part.outcome.to(rest.like)])
    torch.testing.assert_close(y.sort().values, held.y.sort().values.to(y))
    codes = rest.all().memberships["site"].clusters()
    assert torch.equal(torch.bincount(codes, minlength=K), rest.counts["site"])
    seen = set(encoded.scanned.levels["site"][codes.unique().numpy()])
    apart = not seen & set(part.grouping("site").labels())
    assert apart == (factor == "site")
    assert next(iter(rest.fingerprint())) != next(iter(streamed.fingerprint()))


def test_rows_in_files_are_held_out_to_stop_a_network(tmp_path, monkeypatch):
    frame, path, trained = table(), tmp_path / "checkpoint.safetensors", []
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    model = MixedEffects(net, "(1 | site)")
    short = Schedule(steps=200, window=20, batch_size=200)
    settings = {"schedule": short, "refine": False, "progress": False, "compile": "never"}
    make = CrossFitting._task

    def recorded(self, number):
        task = make(self, number)
        trained.append((task.source.counts["site"] > 0, task.validation.counts["site"] > 0))
        return task

    monkeypatch.setattr(CrossFitting, "_task", recorded)
    whole = fit(model, stream(frame, tmp_path), **settings)
    (seen, held), record = trained[0], whole.history.held_out
    assert not (seen & held).any()
    assert (seen | held).all()
    assert len(whole.history.fold_steps) == 1
    assert whole.model.fold_networks is None
    share = record["rows"] / len(frame)
    assert 0.1 < share <= 0.2
    assert abs(record["coverage"] - 0.9) < 0.03 + 3 * record["coverage_se"]

    def interrupted(self):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CrossFitting, "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit(model, stream(frame, tmp_path), checkpoint=path, **settings)
    resumed = fit(model, stream(frame, tmp_path), checkpoint=path, resume=True, **settings)
    assert resumed.history == whole.history
    assert left_in(tmp_path) == ["checkpoint.safetensors", "rows.parquet"]


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
