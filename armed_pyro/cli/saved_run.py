"""The folder of a run: its files, the fit that it holds, and its report."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pandas as pd

from armed_pyro.fit_result import Fit
from armed_pyro.networks.by_name import network
from armed_pyro.program.data_spec import Facts
from armed_pyro.report.html import page
from armed_pyro.storage.manifest import read_family
from armed_pyro.summaries.variance import random_effects

EVALUATION = "evaluation.csv"
CHECKPOINT = "checkpoint.safetensors"
# A killed process may leave this incomplete checkpoint.
PARTIAL = "checkpoint.partial"


def check_run_folder(run: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise ValueError if a fit cannot be written to this folder."""
    if run.exists() and not run.is_dir():
        raise ValueError(f"--out {run} is a file, expected a folder to write the fit to")
    names = {path.name for path in run.iterdir()} - {PARTIAL} if run.exists() else set()
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


def load_run(run: Path, net: str | None) -> Fit:
    """The fit in a folder; a network of the user, `net`, is made with the sizes of the fit."""
    try:
        manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
        facts, family = Facts.from_json(manifest["facts"]), read_family(manifest["model"]["family"])
        made_by = manifest["network"]["made_by"]
    except (OSError, ValueError, LookupError, TypeError):
        return Fit.load(run)  # raises an error that explains the fault of the folder
    if net is None and made_by is None:
        raise ValueError(f"{run} has a network of your own: name it with --net FILE.py:NAME")
    if net is None:
        return Fit.load(run)
    n_outputs = family.outputs(len(facts.columns))
    return Fit.load(run, network(net, math.prod(facts.feature_shape), n_outputs))


def report_page(run: Path, net: str | None, prob: float) -> str:
    """The report of a saved fit, with the evaluation that ``armed-pyro fit`` saved."""
    evaluation = run / EVALUATION
    held_out = pd.read_csv(evaluation) if evaluation.is_file() else None
    fitted = load_run(run, net)
    effects = random_effects(fitted.posterior, prob=prob)
    title = run.resolve().name
    return page(fitted.results(prob=prob), effects, title=title, evaluation=held_out)
