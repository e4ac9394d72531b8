"""The command line: its files, its tables, its messages and exit codes, and resuming."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from armed_pyro import DivergenceError, Fit, Schedule, cli
from armed_pyro.cli import app
from armed_pyro.cli import fit as fit_module
from armed_pyro.families.registry import FAMILIES
from armed_pyro.prediction.unseen import MODES

FILES = {
    "model.safetensors",
    "manifest.json",
    "posterior.nc",
    "variance_components.csv",
    "fixed_effects.csv",
    "diagnostics.json",
}
QUICK = ["--steps", "20", "--draws", "50", "--device", "cpu"]


def table(seed: int = 0, sites: int = 8, rows: int = 12) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    site = np.repeat(np.arange(sites), rows)
    n = len(site)
    age, dose = rng.normal(50, 10, n), rng.normal(size=n)
    eta = 0.05 * (age - 50) + dose + rng.normal(size=sites)[site]
    y = eta + rng.normal(size=n)
    return pd.DataFrame(
        {
            "y": y,
            "site": [f"s{k}" for k in site],
            "ward": [f"w{k}" for k in np.arange(n) % 3],
            "age": age,
            "dose": dose,
            "case": (rng.random(n) < 1 / (1 + np.exp(-eta))).astype(int),
            "kind": np.array(["a", "b", "c"])[np.digitize(y, np.quantile(y, [0.4, 0.7]))],
            "hits": rng.binomial(6, 1 / (1 + np.exp(-eta))),
            "size": 6,
            "count": rng.poisson(np.exp(eta / 3)),
        }
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.csv"
    table().to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A fit that other tests read and never change."""
    folder = tmp_path_factory.mktemp("fit") / "run"
    done = call(*fit(data, folder), "--validate-rows", 0.2, "--hold-out-clusters", 0.25)
    assert done.exit_code == 0, done.stderr
    return folder


def call(*arguments):
    return CliRunner().invoke(app, [str(one) for one in arguments])


def fit(data, run, *more, random="(1 + dose | site)", features="age,dose", outcome="y"):
    command = ["fit", data, "--outcome", outcome, "--random", random, "--out", run]
    return [*command, "--features", features, *QUICK, *more]


def refused(*arguments, message, code=2):
    """The command ends with one message and no traceback; nothing was trained."""
    done = call(*arguments)
    assert done.exit_code == code, done.output
    assert message in done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("fitting ")]
    assert lines[0].startswith(("Error: ", "Warning: "))
    assert "Traceback" not in done.output


# ------------------------------------------------------------------------------------------ fit


def test_fit_writes_the_run(run):
    assert {path.name for path in run.iterdir()} == FILES | {"evaluation.csv"}
    components = pd.read_csv(run / "variance_components.csv")
    expected = ["factor", "term", "statistic", "mean", "median", "sd", "lower", "upper"]
    assert list(components) == expected
    statistics = {"sd", "variance", "cor", "icc", "share", "r2_marginal", "r2_conditional"}
    assert set(components.statistic) == statistics
    assert set(components.factor.dropna()) == {"site", "Residual", "Fixed"}
    json.loads((run / "diagnostics.json").read_text())


def test_fit_judges_held_out_rows_and_clusters(run):
    scores = pd.read_csv(run / "evaluation.csv").set_index("held_out")
    assert list(scores) == ["rows", "unseen", "rmse", "coverage"]
    # 2 of 8 clusters of 12 rows are left out; a fifth of the other rows.
    assert scores.loc["clusters", ["rows", "unseen"]].tolist() == [24, 24]
    assert scores.loc["rows", "unseen"] == 0
    assert abs(scores.loc["rows", "rows"] - 14) <= 1
    assert (scores.rmse > 0).all()
    assert scores.coverage.between(0, 1).all()


def test_fit_prints_summary_evaluation_and_files(data, tmp_path):
    done = call(*fit(data, tmp_path / "run", "--hold-out-clusters", 0.25))
    assert done.exit_code == 0, done.stderr
    assert "Variance components" in done.stdout
    assert "coverage" in done.stdout
    assert "variance_components.csv" in done.stdout
    assert "fewer rows" not in done.stderr


@pytest.mark.parametrize(
    ("outcome", "family", "more", "score"),
    [
        ("case", "bernoulli", [], "auroc"),
        ("kind", "categorical", [], "auroc"),
        ("hits", "binomial", ["--trials", "size"], "rmse"),
        ("count", "poisson", ["--offset", "dose", "--features", "age"], "rmse"),
        ("count", "negative_binomial", ["--weights", "size"], "coverage"),
    ],
)
def test_families(data, tmp_path, outcome, family, more, score):
    run, pred = tmp_path / "run", tmp_path / "pred.parquet"
    command = fit(data, run, random="(1 | site)", outcome=outcome)
    done = call(*command, "--family", family, "--hold-out-clusters", 0.25, *more)
    assert done.exit_code == 0, done.output
    assert pd.read_csv(run / "evaluation.csv")[score].notna().all()
    done = call("predict", run, data, "--unseen", "population", "--draws", 20, "--out", pred)
    assert done.exit_code == 0, done.output
    columns = ["mean", "sd", "lower", "upper"]
    if family == "categorical":
        columns = [f"{name}[{label}]" for label in "abc" for name in columns]
    predictions = pd.read_parquet(pred)
    assert list(predictions) == [*columns, "unseen"]
    if family == "categorical":
        total = predictions[["mean[a]", "mean[b]", "mean[c]"]].sum(axis=1)
        np.testing.assert_allclose(total, 1, atol=1e-6)


def test_dense_with_adversary_slopes_and_head(data, tmp_path):
    command = fit(data, tmp_path / "run", "--net", "dense", "--hidden", "6,4")
    command += ["--adversary", "site", "--adversary-weight", 2.0, "--slopes-on", "3"]
    done = call(*command, "--bayesian-head")
    assert done.exit_code == 0, done.output
    loaded = Fit.load(tmp_path / "run")
    assert loaded.model.adversaries[0].taps == ("1", "3")
    assert loaded.model.adversaries[0].weight == 2.0
    assert str(loaded.model.terms[1]) == "Slopes('site', on='3')"
    assert loaded.model.bayesian_head


def test_options_of_the_adversary_and_of_fixed_effects(data, tmp_path):
    command = fit(
        data, tmp_path / "run", "--net", "dense", "--hidden", "6,4", "--fixed-weight", 0.5
    )
    command += ["--adversary", "site", "--adversary-taps", "3", "--adversary-hidden", "5,4"]
    done = call(*command, "--adversary-warmup", 2)
    assert done.exit_code == 0, done.output
    loaded = Fit.load(tmp_path / "run")
    assert loaded.model.fixed_weight == 0.5
    assert loaded.model.adversaries[0].settings() == {
        "factor": "site", "taps": ["3"], "weight": 1.0, "hidden": [5, 4], "warmup": 0.1,
        "warmup_epochs": 2.0,
    }  # fmt: skip
    assert "Fresh probe of site: accuracy" in done.output


def test_the_weight_of_the_adversary_is_chosen(data, tmp_path):
    command = fit(data, tmp_path / "run", "--net", "dense", "--hidden", "4")
    done = call(*command, "--adversary", "site", "--adversary-weight", "auto")
    assert done.exit_code == 0, done.output
    assert "(chosen from 0" in done.output
    assert isinstance(Fit.load(tmp_path / "run").model.adversaries[0].weight, float)


def test_a_network_is_cross_fitted_unless_told_otherwise(data, tmp_path):
    more = ["--net", "dense", "--hidden", "4", "--steps", 60]
    run = tmp_path / "run"
    done = call(*fit(data, run, *more, "--folds", 3, "--weight-decay", 1, random="(1 | site)"))
    assert done.exit_code == 0, done.output
    manifest = json.loads((run / "manifest.json").read_text("utf-8"))
    folds = {"networks": 3, "factor": "site", "clusters": 8}
    assert manifest["network"]["folds"] == folds
    assert manifest["training"]["schedule"]["weight_decay"] == 1
    new = tmp_path / "new.csv"
    table(seed=3, sites=9).query("site == 's8'").to_csv(new, index=False)
    widths = {}
    for choice in ("none", "ensemble"):
        pred = tmp_path / f"{choice}.csv"
        options = ["--unseen", "population", "--network-uncertainty", choice]
        done = call("predict", run, new, *options, "--out", pred)
        assert done.exit_code == 0, done.output
        frame = pd.read_csv(pred)
        widths[choice] = (frame["upper"] - frame["lower"]).mean()
    assert widths["ensemble"] > widths["none"]
    alone = tmp_path / "alone"
    done = call(*fit(data, alone, *more, "--no-cross-fit", random="(1 | site)"))
    assert done.exit_code == 0, done.output
    assert Fit.load(alone).model.fold_networks is None
    assert "no rows were held out" in done.output


def test_nested_factors_and_formula(data, tmp_path):
    done = call(*fit(data, tmp_path / "run", random="(1 | ward/site)", features="age * dose"))
    assert done.exit_code == 0, done.output
    loaded = Fit.load(tmp_path / "run")
    assert loaded.model.factor_names() == ("ward", "ward:site")
    assert loaded.model.data_facts().feature_names == ("age", "dose", "age:dose")


def test_features_default_to_every_other_column(tmp_path):
    path, run = tmp_path / "rows.csv", tmp_path / "run"
    table()[["y", "site", "age", "dose"]].to_csv(path, index=False)
    done = call("fit", path, "--outcome", "y", "--random", "(1 | site)", *QUICK, "--out", run)
    assert done.exit_code == 0, done.output
    assert Fit.load(run).model.data_facts().feature_names == ("age", "dose")


def test_missing_rows_are_dropped_with_a_warning(tmp_path):
    holed = table()
    holed.loc[3, "age"] = np.nan
    holed.to_csv(tmp_path / "rows.csv", index=False)
    refused(*fit(tmp_path / "rows.csv", tmp_path / "run"), message="--missing drop")
    done = call(*fit(tmp_path / "rows.csv", tmp_path / "run", "--missing", "drop"))
    assert done.exit_code == 0
    assert "Warning: Dropped 1 of 96 rows" in done.stderr


def test_own_network(data, tmp_path):
    run, pred = tmp_path / "run", tmp_path / "pred.csv"
    (tmp_path / "own.py").write_text(
        "from torch import nn\n"
        "def make(n_features, n_outputs):\n"
        "    return nn.Sequential(nn.Linear(n_features, 5), nn.Tanh(), nn.Linear(5, n_outputs))\n"
    )
    net = ["--net", f"{tmp_path}/own.py:make"]
    done = call(*fit(data, run, *net, "--adversary", "site"))
    assert done.exit_code == 0, done.output
    predict = ["predict", run, data, "--draws", 20, "--out", pred]
    done = call(*predict)
    assert done.exit_code == 2
    assert "--net" in done.stderr
    done = call(*predict, *net)
    assert done.exit_code == 0, done.output
    assert len(pd.read_csv(pred)) == 96


@pytest.mark.parametrize(
    ("random", "features", "more", "terms"),
    [
        ("(1 + hits | site)", "1", [], ["Intercept", "hits"]),
        ("(1 + factor(size) || `site`)", "0 + dose", ["--no-bayesian-head"], None),
        ("(0 + ward | site)", "0 + ward", [], ["ward[w0]", "ward[w1]", "ward[w2]"]),
        ("(1 + hits | site)", "age,hits", ["--categorical", "hits"], None),
    ],
)
def test_fit_reads_designs_as_lme4_does(data, tmp_path, random, features, more, terms):
    if "size" in random:
        pd.read_csv(data).assign(size=lambda t: 6 + t.index % 2).to_csv(data := tmp_path / "d.csv")
    done = call(*fit(data, tmp_path / "run", *more, random=random, features=features))
    assert done.exit_code == 0, done.output
    table = pd.read_csv(tmp_path / "run" / "variance_components.csv")
    sds = table[(table.statistic == "sd") & (table.factor == "site")].term.tolist()
    if "size" in random:
        terms = ["Intercept", "size[6]", "size[7]"]
    assert sds == (terms or ["Intercept", *(f"hits[T.{k}]" for k in range(1, 7))])
    done = call("predict", tmp_path / "run", data, "--draws", 20, "--out", tmp_path / "pred.csv")
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--family", "gausian"], "unknown family 'gausian'"),
        (["--outcome", "z"], "no column 'z'"),
        (["--random", "(1 + age | sit)"], "Did you mean 'site'"),
        (["--random", "(1 + )"], "annot read"),
        (["--random", "(1 + hitz | site)"], "not among the features"),
        (["--random", "(1 | site/room)"], "no column 'room'"),
        (["--features", "spline(age,2)"], "not a function of formulas"),
        (["--features", "age^2"], "not its square"),
        (["--features", "0 + age", "--net", "dense"], "linear fixed effects only"),
        (["--categorical", "dosis"], "Did you mean 'dose'"),
        (["--trials", "size"], "'gaussian' has no trials"),
        (["--features", "age,doze"], "Did you mean 'dose'"),
        (["--outcome", "hits", "--family", "binomial"], "--trials"),
        (["--outcome", "y", "--family", "poisson"], "whole numbers"),
        (["--net", "dens"], "Did you mean 'dense'"),
        (["--net", "none.py:Net"], "no file 'none.py'"),
        (["--hidden", "32,32"], "--net dense"),
        (["--net", "dense", "--hidden", "a"], "--hidden must be widths"),
        (["--net", "dense", "--hidden", "0"], "positive widths"),
        (["--adversary", "site"], "hidden layers"),
        (["--adversary-weight", "2"], "needs --adversary"),
        (["--adversary-taps", "1"], "--adversary-taps needs --adversary"),
        (["--adversary-hidden", "5"], "--adversary-hidden needs --adversary"),
        (["--adversary-warmup", "5"], "--adversary-warmup needs --adversary"),
        (["--net", "dense", "--adversary", "site", "--adversary-weight", "x"], "a number such as"),
        (["--net", "dense", "--adversary", "site", "--adversary-hidden", "x"], "must be widths"),
        (["--net", "dense", "--adversary", "site", "--adversary-taps", "9"], "no module '9'"),
        (["--fixed-weight", "-1"], "`fixed_weight` must not be negative"),
        (["--net", "dense", "--adversary", "site", "--adversary-weight", "-1"], "negative"),
        (["--net", "dense", "--slopes-on", "9"], "no module '9'"),
        (
            ["--validate-rows", "1.5"],
            "--validate-rows must lie between 0 and 1, not 1.5",
        ),
        (["--hold-out-clusters", "20"], "--hold-out-clusters must lie between 0 and 1, not 20"),
        (["--prob", "95"], "--prob must lie between 0 and 1, not 95: write 0.95"),
        (["--draws", "1"], "--draws must be at least 2"),
        (["--family", "normal"], "did you mean 'gaussian'"),
        (["--features", "AGE"], "Did you mean 'age'"),
        (["--hold-out-clusters", "0.99"], "at least one cluster"),
        (["--steps", "0"], "`steps` must be positive"),
        (["--batch-size", "0"], "`batch_size` must be at least 1"),
        (["--prob", "1"], "--prob must lie"),
    ],
)
def test_fit_errors_come_before_training(data, tmp_path, more, message, monkeypatch):
    monkeypatch.setattr(Fit, "save", lambda *_, **__: pytest.fail("it was trained"))
    given = dict(zip(more[::2], more[1::2], strict=True))
    base = {"--outcome": "y", "--random": "(1 | site)", "--features": "age,dose", "--steps": "100"}
    options = [text for option in (base | given).items() for text in option]
    refused("fit", data, *options, "--out", tmp_path / "run", message=message)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(data, tmp_path):
    command = fit(data, tmp_path / "run", "--device", "cuda")
    refused(*command, message="finds no CUDA device")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty (0 bytes)"),
        (b"y;site\n1;a\n", "delimited by semicolons"),
        ("y,site\n1,Z\u00fcrich\n".encode("latin-1"), "is not UTF-8"),
        (b"y,site\n", "no rows"),
        (None, "There is no file"),
    ],
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "rows.csv"
    if content is not None:
        path.write_bytes(content)
    refused(*fit(path, tmp_path / "run"), message=message)


def test_bad_options_end_with_code_2(data, tmp_path):
    assert call("fit", data, "--outcome", "y", "--out", tmp_path / "run").exit_code == 2
    assert call(*fit(data, tmp_path / "run", "--device", "tpu")).exit_code == 2
    assert call(*fit(data, tmp_path / "run", "--missing", "guess")).exit_code == 2


def test_a_fit_is_not_overwritten_unasked(data, run, tmp_path):
    refused(*fit(data, run), message="--overwrite")
    refused(*fit(data, run, "--resume"), message="nothing to resume")
    (tmp_path / "notes.txt").write_text("mine")
    refused(*fit(data, tmp_path, "--overwrite"), message="other files")
    refused(*fit(data, tmp_path / "notes.txt"), message="is a file")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    mine = tmp_path / "run"
    assert call(*fit(data, mine, "--hold-out-clusters", 0.25)).exit_code == 0
    assert call(*fit(data, mine, "--overwrite", "--seed", 3)).exit_code == 0
    assert Fit.load(mine).seed == 3
    assert not (mine / "evaluation.csv").exists()


def test_divergence_keeps_the_last_good_state(data, tmp_path, monkeypatch):
    real = fit_module.fit

    def diverge(*arguments, **settings):
        result = real(*arguments, **settings)
        last = Fit(replace(result.posterior, stopped="diverged"))
        raise DivergenceError("the loss diverged at step 7", last)

    monkeypatch.setattr(fit_module, "fit", diverge)
    run = tmp_path / "run"
    refused(*fit(data, run), message="diverged at step 7", code=1)
    assert {path.name for path in run.iterdir()} == FILES
    assert "diverged" in (run / "diagnostics.json").read_text()


def test_an_exposure_as_offset_ends_in_the_message_of_divergence(tmp_path):
    rng = np.random.default_rng(0)
    days, site = rng.uniform(50, 2000, 200), np.repeat(np.arange(10), 20)
    y = rng.poisson(days * np.exp(rng.normal(-3, 0.5, 10))[site])
    frame = pd.DataFrame({"y": y, "x": rng.normal(size=200), "days": days, "site": site})
    frame.to_csv(tmp_path / "rows.csv", index=False)
    run, more = tmp_path / "run", ["--offset", "days", "--family", "poisson"]
    done = call(*fit(tmp_path / "rows.csv", run, *more, random="(1 | site)", features="x"))
    assert done.exit_code == 1
    assert "Traceback" not in done.output
    assert "the loss diverged at step 1" in done.stderr
    assert "offset 'days' (up to 199" in done.stderr
    assert "posterior_predictive, which could not be computed: invalid Poisson rate" in done.stderr
    assert {path.name for path in run.iterdir()} == FILES
    assert Fit.load(run).stopped == "diverged"
    loaded = json.loads((run / "diagnostics.json").read_text())
    assert loaded["computation"]["verdict"] == loaded["model"]["verdict"] == "fail"


def test_strict_exits_with_3_where_a_verdict_is_fail(data, tmp_path):
    table(sites=2, rows=40).to_csv(tmp_path / "two.csv", index=False)
    random = {"random": "(1 | site)", "features": "dose"}
    command = fit(tmp_path / "two.csv", tmp_path / "run", "--strict", "--steps", 400, **random)
    done = call(*command)
    assert done.exit_code == 3, done.output
    assert "\nModel: no misfit found; the data say little: " in done.stdout
    loaded = json.loads((tmp_path / "run" / "diagnostics.json").read_text())
    assert loaded["model"]["verdict"] == "fail"
    assert f"Model: {loaded['model']['sentence']}" in done.stdout
    assert "exit with code 3" in " ".join(call("fit", "--help").stdout.lower().split())


def test_refine_nuts_says_its_time_and_is_saved(data, tmp_path, monkeypatch):
    real = Fit.refine
    short = {"draws": 20, "chains": 2, "warmup": 5, "progress": False}
    monkeypatch.setattr(Fit, "refine", lambda fit, method: real(fit, method, **short))
    run = tmp_path / "run"
    done = call(*fit(data, run, "--refine", "nuts", random="(1 | site)", features="dose"))
    assert done.exit_code == 0, done.output
    assert re.search(
        r"Drawing by NUTS, which will take about \d+ (second|minute|hour)s", done.stderr
    )
    assert Fit.load(run).refined.method == "nuts"
    assert "Computation: " in done.stdout
    assert call(*fit(data, run, "--refine", "mcmc")).exit_code == 2


def test_interrupt_says_how_to_resume(data, tmp_path, monkeypatch):
    real = fit_module.fit

    def interrupt(*arguments, **settings):
        real(*arguments, **settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(fit_module, "fit", interrupt)
    run = tmp_path / "run"
    done = call(*fit(data, run))
    assert done.exit_code == 130
    assert "--resume" in done.stderr
    assert [path.name for path in run.iterdir()] == ["checkpoint.safetensors"]
    monkeypatch.setattr(fit_module, "fit", real)
    refused(*fit(data, run), message="add --resume")
    refused(*fit(data, run, "--resume", "--seed", 5), message="belongs to another run")
    assert call(*fit(data, run, "--resume")).exit_code == 0
    assert {path.name for path in run.iterdir()} == FILES


def test_resumed_after_a_kill_is_as_if_unbroken(data, tmp_path):
    def command(run, *more):
        dense = ["--net", "dense", "--hidden", "4", "--batch-size", "64", "--steps", "120"]
        dense += ["--folds", "2"]
        return fit(data, run, *dense, *more, random="(1 | site)")

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    script = "from armed_pyro.cli import app; app()"
    started = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, command(broken))],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    checkpoint = broken / "checkpoint.safetensors"  # written after every 100 steps
    while not checkpoint.exists() and started.poll() is None:
        time.sleep(0.01)
    started.send_signal(signal.SIGKILL)
    assert started.wait() == -signal.SIGKILL, "it had ended before it could be killed"
    assert not (broken / "model.safetensors").exists()

    assert call(*command(broken, "--resume")).exit_code == 0
    assert call(*command(whole)).exit_code == 0
    same = (whole / "model.safetensors").read_bytes() == (broken / "model.safetensors").read_bytes()
    assert same
    assert not checkpoint.exists()


# -------------------------------------------------------------------------------------- predict


def test_a_table_beyond_memory_is_streamed(tmp_path):
    frame = table(sites=40, rows=30)
    frame.to_parquet(tmp_path / "rows.parquet")
    command = fit(tmp_path / "rows.parquet", tmp_path / "new" / "run", "--memory", "100MB")
    done = call(*command)
    assert done.exit_code == 0, done.stderr
    assert "of rows in temporary files in" in done.stderr
    assert "Most memory held" in done.stdout
    assert set(FILES) <= {path.name for path in (tmp_path / "new" / "run").iterdir()}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["run"]
    found = pd.read_csv(tmp_path / "new" / "run" / "variance_components.csv")
    held = call(*fit(tmp_path / "rows.parquet", tmp_path / "held"))
    assert held.exit_code == 0, held.stderr
    other = pd.read_csv(tmp_path / "held" / "variance_components.csv")
    sds = found.statistic == "sd"
    assert (found["mean"] - other["mean"])[sds].abs().max() < 0.1
    run, rows = tmp_path / "new" / "run", tmp_path / "rows.parquet"
    new = call("predict", run, rows, "--out", tmp_path / "p.csv")
    assert new.exit_code == 0, new.stderr
    assert len(pd.read_csv(tmp_path / "p.csv")) == len(frame)


def test_rows_cannot_be_held_out_of_a_streamed_table(tmp_path):
    table().to_parquet(tmp_path / "rows.parquet")
    command = fit(tmp_path / "rows.parquet", tmp_path / "run", "--memory", "1MB")
    done = call(*command, "--validate-rows", 0.2)
    assert done.exit_code == 2
    assert "rows cannot be held out" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["rows.parquet"]


def test_predict_keeps_row_order_and_names_modes(run, tmp_path):
    new = table(seed=1).sample(frac=1, random_state=0).reset_index(drop=True)
    new.loc[5, "site"] = "new"
    new.drop(columns="y").to_csv(tmp_path / "new.csv", index=False)
    held_out = ~new.site.isin(Fit.load(run).model.data_facts().levels["site"])
    assert held_out[5]

    command = ["predict", run, tmp_path / "new.csv", "--draws", 200]
    for mode in ("marginal", "population"):
        path = tmp_path / "deep" / f"{mode}.csv"
        done = call(*command, "--unseen", mode, "--out", path)
        assert done.exit_code == 0, done.output
        predictions = pd.read_csv(path, keep_default_na=False)
        assert list(predictions) == ["mean", "sd", "lower", "upper", "unseen"]
        assert len(predictions) == len(new)
        assert ((predictions.unseen == mode) == held_out).all()
        assert (predictions.unseen[~held_out] == "").all()
        direct = Fit.load(run).predict(new.drop(columns="y"), unseen=mode, draws=200)
        np.testing.assert_allclose(predictions["mean"], direct.mean)
        assert (predictions.lower < predictions["mean"]).all()
        assert [one.name for one in path.parent.glob(".*")] == []


def test_wider_intervals_with_a_higher_probability(run, data, tmp_path):
    widths = []
    for prob in (0.5, 0.95):
        path = tmp_path / f"{prob}.csv"
        command = ["predict", run, data, "--unseen", "marginal", "--prob", prob, "--out", path]
        assert call(*command).exit_code == 0
        predictions = pd.read_csv(path)
        widths.append(predictions.upper - predictions.lower)
    assert (widths[0] < widths[1]).all()


def test_unseen_clusters_need_a_mode(run, data, tmp_path):
    path = tmp_path / "pred.csv"
    refused("predict", run, data, "--out", path, message="--unseen")
    done = call("predict", run, data, "--out", path)
    assert "population" in done.stderr
    assert "marginal" in done.stderr
    done = call("predict", run, data, "--unseen", "guess", "--out", path)
    assert done.exit_code == 2
    assert "unknown mode 'guess'" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_predict_errors(run, data, tmp_path):
    pred = tmp_path / "pred.csv"
    refused("predict", tmp_path, data, "--out", pred, message=str(tmp_path))
    refused("predict", run, tmp_path / "no.csv", "--out", pred, message="There is no file")
    refused("predict", run, data, "--out", tmp_path / "pred.txt", message=".csv or .parquet")
    table().drop(columns="dose").to_csv(tmp_path / "less.csv", index=False)
    refused("predict", run, tmp_path / "less.csv", "--out", pred, message="no column 'dose'")
    refused("predict", run, data, "--prob", 2, "--out", pred, message="--prob")
    assert not pred.exists()


# ------------------------------------------------------------------------------ report and demo


def test_report_command(run, tmp_path):
    path = tmp_path / "deep" / "report.html"
    done = call("report", run, "--out", path)
    assert done.exit_code == 0, done.output
    text = path.read_text("utf-8")
    assert "Predictions of held-out rows" in text
    refused("report", tmp_path, "--out", path, message=str(tmp_path))
    refused("report", run, "--out", tmp_path / "report.pdf", message=".html or .docx")
    refused("report", run, "--out", tmp_path, message="is a folder")
    refused("report", run, "--out", path, "--prob", 95, message="write 0.95")


def test_report_and_predictions_have_the_probability_of_the_fit(data, tmp_path):
    run, page = tmp_path / "run", tmp_path / "report.html"
    assert call(*fit(data, run, "--prob", 0.5)).exit_code == 0
    assert call("report", run, "--out", page).exit_code == 0
    assert "(50% equal-tailed intervals)" in page.read_text("utf-8")
    assert call("report", run, "--prob", 0.8, "--out", page).exit_code == 0
    assert "(80% equal-tailed intervals)" in page.read_text("utf-8")
    tables = []
    for prob in ([], ["--prob", 0.5]):
        path = tmp_path / f"{len(prob)}.csv"
        assert call("predict", run, data, *prob, "--out", path).exit_code == 0
        tables.append(path.read_bytes())
    assert tables[0] == tables[1]
    manifest = json.loads((run / "manifest.json").read_text("utf-8"))
    del manifest["prob"], manifest["checksums"]  # as in fits of earlier versions
    (run / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    assert call("report", run, "--out", page).exit_code == 0
    assert "(90% equal-tailed intervals)" in page.read_text("utf-8")


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_rows_with_holes_keep_their_place(run, tmp_path, suffix):
    rows = table()
    rows["site"] = rows["site"].where(rows.index != 3)
    rows.loc[[0, 50], "dose"] = np.nan
    rows.loc[7, "count"] = np.nan  # not needed for predictions
    path, whole = tmp_path / f"rows.{suffix}", tmp_path / f"whole.{suffix}"
    getattr(rows, f"to_{suffix}")(path, index=False)
    getattr(rows.drop([0, 50]), f"to_{suffix}")(whole, index=False)
    command = ["--unseen", "marginal", "--draws", 20, "--out"]
    refused("predict", run, path, *command, tmp_path / "p.csv", message="--missing empty")
    done = call("predict", run, path, "--missing", "empty", *command, tmp_path / "p.csv")
    assert done.exit_code == 0, done.output
    assert call("predict", run, whole, *command, tmp_path / "w.csv").exit_code == 0
    predictions = pd.read_csv(tmp_path / "p.csv")
    assert len(predictions) == len(rows)
    assert predictions.index[predictions["mean"].isna()].tolist() == [0, 50]
    assert predictions["unseen"][3] == "membership"  # its site is unknown, and no hole
    expected = pd.read_csv(tmp_path / "w.csv")
    kept = predictions.drop([0, 50]).reset_index(drop=True)
    # The effects of the unknown site are drawn by the number of its row.
    pd.testing.assert_frame_equal(kept.drop(2), expected.drop(2))
    rows["dose"] = np.nan
    getattr(rows, f"to_{suffix}")(path, index=False)
    refused(
        "predict", run, path, "--missing", "empty", *command, tmp_path / "q.csv",
        message="Every row",
    )  # fmt: skip


def test_demo_calls_the_entry_point(tmp_path, monkeypatch):
    class Point:
        def load(self):
            return lambda argv: (tmp_path / "called").write_text(" ".join(argv))

    monkeypatch.setattr(cli, "entry_points", lambda **_: [Point()])
    assert call("demo", "--out", tmp_path / "demo").exit_code == 0
    assert (tmp_path / "called").read_text() == f"--out {tmp_path / 'demo'}"
    monkeypatch.setattr(cli, "entry_points", lambda **_: [])
    refused("demo", message="not installed")


def test_names_in_the_data_are_no_markup(tmp_path):
    frame = table().rename(columns={"site": "school", "ward": "lea"})
    frame["lea"] = "[red]" + frame["lea"]
    frame["class"] = frame["school"]
    frame.to_csv(tmp_path / "rows.csv", index=False)
    done = call(*fit(tmp_path / "rows.csv", tmp_path / "run", random="(1 | lea/school/class)"))
    assert done.exit_code == 0, done.output
    assert "lea:school:class" in done.stdout
    predicted = call(
        "predict", tmp_path / "run", tmp_path / "rows.csv", "--out", tmp_path / "p.csv"
    )
    assert predicted.exit_code == 0, predicted.output
    assert call("report", tmp_path / "run", "--out", tmp_path / "r.html").exit_code == 0
    assert "lea:school:class" in (tmp_path / "r.html").read_text("utf-8")
    refused(
        *fit(tmp_path / "rows.csv", tmp_path / "run", "--net", ":school:[/red]"),
        message="holds a fit",
    )
    refused(
        *fit(tmp_path / "rows.csv", tmp_path / "new", "--features", ":school:[/red]"),
        message=":school:[/red]",
    )


def test_the_command_line_is_a_module(data, tmp_path):
    command = [sys.executable, "-m", "armed_pyro.cli", "fit", str(data)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--out" in done.stderr


def test_help_lists_families_modes_and_the_default_of_steps():
    shown = " ".join(call("fit", "--help").stdout.split())
    assert ", ".join(FAMILIES) in shown
    assert f"[default: {Schedule.steps}]" in shown
    shown = " ".join(call("predict", "--help").stdout.split())
    for name, meaning in MODES.items():
        assert f"{name}, {meaning}" in shown


@pytest.mark.parametrize("command", [[], ["fit"], ["predict"], ["report"], ["demo"]])
def test_help_shows_an_example(command):
    done = call(*command, "--help")
    assert done.exit_code == 0
    assert not command or f"armed-pyro {command[0]}" in done.stdout
