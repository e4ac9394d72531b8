"""The folder of a run: its files, the fit that it holds, and its report."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd

from armed_pyro._messages import check_probability
from armed_pyro.cli.console import out
from armed_pyro.cli.options import ReportOptions
from armed_pyro.fit_result import Fit
from armed_pyro.networks.by_name import network
from armed_pyro.program.data_spec import Facts
from armed_pyro.report.write import check_ending
from armed_pyro.storage.manifest import MANIFEST, read_family, read_manifest, reading
from armed_pyro.storage.run_lock import is_temporary
from armed_pyro.storage.save import FILES

EVALUATION = "evaluation.csv"
CHECKPOINT = "checkpoint.safetensors"
# A killed process may leave this incomplete checkpoint.
PARTIAL = "checkpoint.partial"


def check_run_folder(run: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise ValueError if a fit cannot be written to this folder."""
    if run.is_symlink() and not run.exists():
        raise ValueError(f"--out {run} is a link to {run.readlink()}, which does not exist")
    if run.exists() and not run.is_dir():
        raise ValueError(f"--out {run} is a file, expected a folder to write the fit to")
    names = {path.name for path in run.iterdir()} - {PARTIAL} if run.exists() else set()
    names = {name for name in names if not is_temporary(name)}
    if not names or (resume and CHECKPOINT in names):
        return
    if not names & {CHECKPOINT, "manifest.json"}:
        raise ValueError(f"--out {run} is a folder with other files: choose a new one")
    if not overwrite:
        if CHECKPOINT in names:
            raise ValueError(f"{run} holds an unfinished run: add --resume, or --overwrite")
        content = "nothing to resume, as the run in it is finished" if resume else "a fit"
        raise ValueError(
            f"{run} holds {content}: choose another folder, or replace it: --overwrite"
        )


def load_run(run: Path, net: str | None, *, verify: bool = True) -> Fit:
    """The fit in a folder; a network of the user, `net`, is made with the sizes of the fit."""
    manifest = read_manifest(run)
    if manifest["network"]["made_by"] is None and net is None:
        raise ValueError(f"{run} has a network of your own: name it with --net FILE.py:NAME")
    if net is None:
        return Fit.load(run, verify=verify)
    path = run / MANIFEST
    with reading(path, "facts"):
        facts = Facts.from_json(manifest["facts"])
    with reading(path, "model.family"):
        n_outputs = read_family(manifest["model"]["family"], path).outputs(len(facts.columns))
    made = network(net, math.prod(facts.feature_shape), n_outputs)
    return Fit.load(run, made, verify=verify)


def check_output(path: Path, run: Path, *inputs: Path | None) -> None:
    """Raise ValueError if writing to this path would replace an input, or a file of the fit."""
    check_replaces(path, *inputs)
    if path.parent.resolve() == run.resolve() and path.name in FILES | {EVALUATION, CHECKPOINT}:
        raise ValueError(f"--out {path} would replace a file of the fit: choose another name")


def check_replaces(path: Path, *inputs: Path | None) -> None:
    """Raise ValueError if writing to this path would replace an input."""
    for name in inputs:
        if name is not None and path.exists() and name.exists() and path.samefile(name):
            raise ValueError(
                f"--out {path} would replace {name}, which is read: choose another file"
            )


def interval_prob(run: Path, prob: float | None) -> float:
    """The probability asked for by --prob, by default that with which the fit was saved."""
    if prob is None:  # manifests of earlier versions lack the entry
        prob = float(read_manifest(run).get("prob", 0.9))
    check_probability(prob, "--prob")
    return prob


def write_report(options: ReportOptions) -> None:
    """Write the report of a saved fit, with the evaluation that ``armed-pyro fit`` saved."""
    path, run = options.html, options.run
    check_ending(path, "--out")
    prob = interval_prob(run, options.prob)
    evaluation = run / EVALUATION
    held_out = pd.read_csv(evaluation) if evaluation.is_file() else None
    fitted = load_run(run, options.net, verify=options.verify)
    fitted.report(path, title=run.resolve().name, prob=prob, evaluation=held_out)
    out.print(f"The report is in {path}")
