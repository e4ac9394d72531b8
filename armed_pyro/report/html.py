"""A report as one HTML page."""

from __future__ import annotations

import base64
import io
from importlib.resources import files
from typing import TYPE_CHECKING

import pandas as pd

from armed_pyro._optional import extra
from armed_pyro._plotting import FAINT, PLAIN
from armed_pyro.report.cells import as_text
from armed_pyro.report.content import Pictures, Report
from armed_pyro.report.results import Results
from armed_pyro.report.story import report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["page", "rendered"]

TEMPLATE = "page.html.jinja"


def page(
    results: Results,
    random_effects: pd.DataFrame,
    *,
    title: str = "",
    evaluation: pd.DataFrame | None = None,
    pictures: Pictures | None = None,
) -> str:
    """The report of a fit as one self-contained HTML page; see `armed_pyro.report.story.report`."""
    return rendered(
        report(results, random_effects, title=title, evaluation=evaluation, pictures=pictures)
    )


def rendered(content: Report) -> str:
    """A report as HTML without scripts, links or files beside it; all text is escaped."""
    import jinja2  # not needed for anything else

    source = (files("armed_pyro.report") / TEMPLATE).read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.tests["text_column"] = pd.api.types.is_string_dtype
    environment.filters |= {
        "as_text": as_text,
        "kind": lambda block: type(block).__name__,
        "svg": _svg,
    }
    return environment.from_string(source).render(report=content)


def _svg(figure: Figure) -> str:
    """A figure as base64 SVG, the same each time."""
    mpl, file = extra("matplotlib", "a report"), io.BytesIO()
    with mpl.rc_context({**PLAIN, "svg.hashsalt": "armed_pyro", "axes.edgecolor": FAINT}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return base64.b64encode(file.getvalue()).decode()
