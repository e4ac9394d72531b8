"""Runs that end early, fail to save, or meet each other: nothing is lost, and nothing is left."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
import warnings
from contextlib import nullcontext

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from armed_pyro import (
    ClusteredData,
    DivergenceError,
    Fit,
    FitInterrupted,
    MixedEffects,
    Schedule,
    StreamedData,
    fit,
)
from armed_pyro.cli import app
from armed_pyro.engine.checkpoint import Checkpoint, module_tensors
from armed_pyro.inference.training_run import Run
from armed_pyro.storage.run_lock import locked

SCRIPT = "from armed_pyro.cli import app; app()"
FILES = {
    "model.safetensors",
    "manifest.json",
    "posterior.nc",
    "variance_components.csv",
    "fixed_effects.csv",
    "diagnostics.json",
}


def rows(name="dose"):
    rng = np.random.default_rng(0)
    site = np.repeat(np.arange(6), 10)
    dose = rng.normal(size=60)
    y = dose + rng.normal(size=6)[site] + rng.normal(size=60)
    return pd.DataFrame({"y": y, name: dose, "site": site})


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "rows.csv"
    rows().to_csv(path, index=False)
    return path


def command(table, run, *more):
    words = ["fit", table, "--outcome", "y", "--random", "(1 | site)", "--out", run]
    return [str(word) for word in [*words, "--compile", "never", *more]]


def call(*arguments):
    return CliRunner().invoke(app, [str(one) for one in arguments])


def started(*arguments, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    start = [sys.executable, "-c", SCRIPT, *arguments]
    return subprocess.Popen(start, env=environment, stderr=subprocess.PIPE, **options)


def quick(model=None, schedule=None, **options):
    data = ClusteredData.from_frame(rows(), outcome="y", clusters=["site"])
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1))
    model = MixedEffects(net, "(1 | site)") if model is None else model
    schedule = Schedule(steps=12, window=4, stages=0) if schedule is None else schedule
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return fit(model, data, schedule=schedule, compile="never", progress=False, **options)


def interrupt_at(monkeypatch, step):
    real = Run.take_step

    def take(run):
        if run.step == step:
            raise KeyboardInterrupt
        return real(run)

    monkeypatch.setattr(Run, "take_step", take)


# ------------------------------------------------------------------------------------- the lock


def test_a_second_writer_is_told_who_writes(tmp_path):
    messages = []

    def second():
        try:
            with locked(tmp_path / "run"):
                messages.append("entered")
        except ValueError as error:
            messages.append(str(error))

    with locked(tmp_path / "run"), locked(tmp_path / "run"):
        other = threading.Thread(target=second)
        other.start()
        other.join()
    assert f"being written to by process {os.getpid()}" in messages[0]
    assert not (tmp_path / "run").exists(), "an empty folder is removed again"
    second()
    assert messages[1] == "entered"


def test_what_killed_runs_left_is_removed(tmp_path):
    run = tmp_path / "run"
    for name in (".saving-3f", ".armed_pyro-rows-x"):
        (run / name).mkdir(parents=True)
        (run / name / "rows.parquet").write_text("large")
    (run / "mine.txt").write_text("kept")
    with locked(run):
        pass
    assert [path.name for path in run.iterdir()] == ["mine.txt"]


def test_litter_of_a_killed_saving_is_no_obstacle(table, tmp_path):
    run = tmp_path / "run"
    (run / ".saving-3f").mkdir(parents=True)
    (run / ".saving-3f" / "manifest.json").write_text("{}")
    done = call(*command(table, run, "--steps", 20))
    assert done.exit_code == 0, done.stderr
    assert {path.name for path in run.iterdir()} == FILES


# ----------------------------------------------------------------------------- Ctrl-C and SIGTERM


@pytest.mark.parametrize(("step", "kept"), [(2, 0), (10, 8)])
def test_an_interrupt_gives_the_fit_so_far_and_resumes_to_the_same_bits(
    tmp_path, monkeypatch, step, kept
):
    whole = quick()
    path = tmp_path / "run.checkpoint"
    with monkeypatch.context() as patched:
        interrupt_at(patched, step)
        with pytest.raises(FitInterrupted) as caught:
            quick(checkpoint=path)
    early = caught.value.fit
    assert early.stopped == "interrupted"
    assert len(early.history.loss) == kept
    assert not early.converged
    assert np.isfinite(early.predict(early.data, draws=5).expected).all()
    resumed = quick(checkpoint=path, resume=True)
    assert resumed.history.loss == whole.history.loss
    mine, its = module_tensors("", whole.model), module_tensors("", resumed.model)
    assert all(torch.equal(mine[name], its[name]) for name in mine)


def test_an_interrupted_fit_says_so_where_it_is_saved(tmp_path, monkeypatch):
    interrupt_at(monkeypatch, 10)
    with pytest.raises(FitInterrupted) as caught:
        quick()
    result = caught.value.fit
    assert "it was interrupted" in str(result.diagnostics())
    result.summary()
    result.save(tmp_path / "run", draws=2)


def test_sigterm_keeps_the_state_and_exits_with_143(table, tmp_path):
    run = tmp_path / "run"
    slow = ["--net", "dense", "--hidden", "8", "--batch-size", "16", "--steps", "20000"]
    process = started(*command(table, run, *slow), stdout=subprocess.DEVNULL)
    checkpoint = run / "checkpoint.safetensors"
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 143, errors.decode()
    assert "Terminated; the state is kept" in errors.decode()
    assert "--resume" in errors.decode()
    assert [path.name for path in run.iterdir()] == [checkpoint.name]


# ---------------------------------------------------------------------------- the user's settings


def settings():
    validate = torch.distributions.Distribution._validate_args
    return (
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),  # noqa: NPY002
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        pyro.settings.get(),
        validate,
        signal.getsignal(signal.SIGINT),
    )


@pytest.mark.parametrize("end", ["success", "interrupt", "divergence", "error"])
def test_the_users_settings_are_as_before_after_any_end(monkeypatch, end):
    torch.manual_seed(7)
    errors = {
        "interrupt": FitInterrupted,
        "divergence": DivergenceError,
        "error": ZeroDivisionError,
    }
    with monkeypatch.context() as patched:
        if end == "interrupt":
            interrupt_at(patched, 6)
        if end == "divergence":
            patched.setattr(
                Run, "take_step", lambda run: (_ for _ in ()).throw(run._divergence("x"))
            )
        if end == "error":
            patched.setattr(Run, "close_window", lambda run, losses: 1 / 0)
        data = ClusteredData.from_frame(rows(), outcome="y", clusters=["site"])
        model = MixedEffects(nn.Linear(1, 1), "(1 | site)")
        before = settings()
        expected = pytest.raises(errors[end]) if end in errors else nullcontext()
        with expected:
            fit(model, data, schedule=Schedule(steps=12, window=4, stages=0), progress=False)
    after = settings()
    for mine, its in zip(before, after, strict=True):
        assert mine == its


# ------------------------------------------------------------------------- wrong before training


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--draws", "0"], "--draws must be at least 2"),
        (["--adversary", "site", "--adversary-weight", "nan"], "--adversary-weight must be"),
    ],
)
def test_wrong_options_are_said_before_training(table, tmp_path, monkeypatch, more, message):
    monkeypatch.setattr("armed_pyro.cli.fit.fit", lambda *_, **__: pytest.fail("it was trained"))
    done = call(*command(table, tmp_path / "run", *more))
    assert done.exit_code == 2
    assert message in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written_is_said_before_training(table, tmp_path, monkeypatch):
    monkeypatch.setattr("armed_pyro.cli.fit.fit", lambda *_, **__: pytest.fail("it was trained"))
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    done = call(*command(table, tmp_path / "link"))
    assert (done.exit_code, "does not exist" in done.stderr) == (2, True)
    done = call(*command(table, tmp_path / ("x" * 300)))
    assert (done.exit_code, "too long" in done.stderr) == (2, True)
    monkeypatch.chdir(tmp_path)
    done = call(*command(table, "."))
    assert (done.exit_code, "folder with other files" in done.stderr) == (2, True)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_of_another_range_is_refused(seed):
    with pytest.raises(ValueError, match="`seed` must be at least 0 and below"):
        quick(seed=seed)


# ------------------------------------------------------------------------------------ the outputs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit")
    rows().to_csv(folder / "rows.csv", index=False)
    done = call(*command(folder / "rows.csv", folder / "run", "--steps", 20))
    assert done.exit_code == 0, done.stderr
    return folder / "run"


def test_an_output_never_replaces_an_input_or_the_fit(run, table):
    before = table.read_bytes()
    done = call("predict", run, table, "--out", table)
    assert done.exit_code == 2
    assert "would replace" in done.stderr
    assert table.read_bytes() == before
    done = call("predict", run, table, "--out", run / "fixed_effects.csv")
    assert "would replace a file of the fit" in done.stderr
    done = call("report", run, "--out", run / "manifest.json")
    assert "--out must end in .html" in done.stderr
    assert call("predict", run, table, "--out", table.with_name("pred.csv")).exit_code == 0


def test_a_changed_file_ends_predict_unless_it_is_asked_for(run, table, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in run.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "fixed_effects.csv").write_text("mine")
    done = call("predict", copy, table, "--out", tmp_path / "pred.csv")
    assert done.exit_code == 2
    assert "fixed_effects.csv was changed" in done.stderr
    assert "--no-verify" in done.stderr
    done = call("predict", copy, table, "--no-verify", "--out", tmp_path / "pred.csv")
    assert done.exit_code == 0


def test_a_fit_that_cannot_be_saved_keeps_its_state(table, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        full = OSError("No space left on device")
        patched.setattr(
            "armed_pyro.storage.save._write_groups", lambda *_: (_ for _ in ()).throw(full)
        )
        done = call(*command(table, run, "--steps", 20))
    assert done.exit_code == 2
    assert "No space left" in done.stderr
    assert "--resume" in done.stderr
    assert [path.name for path in run.iterdir()] == ["checkpoint.safetensors"]
    assert call(*command(table, run, "--steps", 20, "--resume")).exit_code == 0
    assert {path.name for path in run.iterdir()} == FILES


@pytest.mark.skipif(os.name == "nt", reason="limits of POSIX")
@pytest.mark.parametrize("limit", [2_000, 20_000, 60_000])
def test_a_full_disk_is_an_error_that_leaves_nothing_behind(run, tmp_path, limit):
    target = tmp_path / "again"
    script = (
        "import resource, sys\n"
        "from armed_pyro import Fit\n"
        f"fit = Fit.load({str(run)!r})\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        f"try: fit.save({str(target)!r}, draws=1000)\n"
        "except OSError as error: print(error); sys.exit(7)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == 7, done.stderr.decode()
    assert not target.exists()


@pytest.mark.skipif(os.name == "nt", reason="limits of POSIX")
def test_a_checkpoint_on_a_full_disk_leaves_the_one_before(tmp_path):
    path = tmp_path / "run.checkpoint"
    small, large = (Checkpoint({"x": torch.zeros(n)}, {}) for n in (10, 10_000))
    small.write(path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="could not be written to"):
            large.write(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert Checkpoint.read(path).tensors["x"].shape == (10,)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_too_little_free_space_is_said_before_anything_is_written(run, tmp_path, monkeypatch):
    fitted = Fit.load(run)
    monkeypatch.setattr("armed_pyro._free_space.free_bytes", lambda folder: 100)
    with pytest.raises(OSError, match=r"0\.0 MB free, and the fit takes at least 0\.3 MB"):
        fitted.save(tmp_path / "again", draws=10)
    with pytest.raises(OSError, match="the checkpoint takes"):
        Checkpoint({"x": torch.zeros(100)}, {}).write(tmp_path / "run.checkpoint")
    frame = rows()
    frame.to_parquet(tmp_path / "rows.parquet", index=False)
    data = StreamedData.scan(tmp_path / "rows.parquet", outcome="y", clusters=["site"])
    model = MixedEffects(nn.Linear(1, 1), "(1 | site)", bayesian_head=True)
    with pytest.raises(OSError, match="a copy of the rows takes"):
        fit(model, data, progress=False)
    assert [file.name for file in tmp_path.iterdir()] == ["rows.parquet"]


def test_texts_that_look_like_formulas_are_quoted_on_request(tmp_path):
    table = rows("@dose")
    table["y"] = np.where(table["y"] > 0, "=1+1", "no")
    table.to_csv(tmp_path / "rows.csv", index=False)
    ask = ["--steps", 20, "--family", "bernoulli", "--event", "=1+1"]
    for name, more in {"as_is": [], "quoted": ["--quote-formulas"]}.items():
        done = call(*command(tmp_path / "rows.csv", tmp_path / name, *ask, *more))
        assert done.exit_code == 0, done.stderr
        files = [
            "predict",
            tmp_path / name,
            tmp_path / "rows.csv",
            "--out",
            tmp_path / f"{name}.csv",
        ]
        assert call(*files, "--draws", 5, *more).exit_code == 0
    as_is, quoted = (pd.read_csv(tmp_path / f"{name}.csv") for name in ("as_is", "quoted"))
    assert set(as_is.event) == {"=1+1"}
    assert set(quoted.event) == {"'=1+1"}
    pd.testing.assert_frame_equal(quoted.drop(columns="event"), as_is.drop(columns="event"))
    terms = [pd.read_csv(tmp_path / n / "fixed_effects.csv").term for n in ("as_is", "quoted")]
    assert "@dose" in set(terms[0])
    assert "'@dose" in set(terms[1])


def test_a_closed_ascii_output_loses_no_file(tmp_path):
    rows("dosé").to_csv(tmp_path / "rows.csv", index=False)
    run = tmp_path / "run"
    more = ["--steps", "20", "--validate-rows", "0.2"]
    arguments = command(tmp_path / "rows.csv", run, *more)
    process = started(*arguments, stdout=subprocess.PIPE, env={"PYTHONIOENCODING": "ascii"})
    process.stdout.close()
    errors = process.stderr.read()
    process.wait(timeout=600)
    assert "Traceback" not in errors.decode()
    assert {path.name for path in run.iterdir()} == FILES | {"evaluation.csv"}


def test_an_ascii_output_shows_other_letters_as_escapes(tmp_path):
    rows("dosé").to_csv(tmp_path / "rows.csv", index=False)
    arguments = command(tmp_path / "rows.csv", tmp_path / "run", "--steps", "20")
    process = started(*arguments, stdout=subprocess.PIPE, env={"PYTHONIOENCODING": "ascii"})
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors.decode()
    assert rb"dos\xe9" in output
