"""``armed-pyro report``: a fit's results as one HTML page."""

from __future__ import annotations

import pandas as pd

from armed_pyro.cli.console import out
from armed_pyro.cli.options import ReportOptions
from armed_pyro.cli.saved_run import EVALUATION, load_run
from armed_pyro.report.html import page
from armed_pyro.summaries.variance import random_effects

__all__ = ["write_report"]


def write_report(options: ReportOptions) -> None:
    """Write the report of a saved fit, with the evaluation that ``armed-pyro fit`` saved."""
    evaluation = options.run / EVALUATION
    held_out = pd.read_csv(evaluation) if evaluation.is_file() else None
    fitted = load_run(options.run, options.net)
    text = page(
        fitted.results(prob=options.prob),
        random_effects(fitted.posterior, prob=options.prob),
        title=options.run.resolve().name,
        evaluation=held_out,
    )
    options.html.parent.mkdir(parents=True, exist_ok=True)
    options.html.write_text(text, encoding="utf-8")
    out.print(f"The report is in {options.html}")
