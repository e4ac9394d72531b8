"""What the commands share: consoles, options, messages, and the fit in a folder."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from armed_pyro.fitting import Fit
from armed_pyro.networks.by_name import network
from armed_pyro.program.data_spec import Facts

__all__ = [
    "Column",
    "OwnNet",
    "Prob",
    "Run",
    "Table",
    "column",
    "err",
    "load_run",
    "messages",
    "option",
    "out",
    "say",
]


out = Console(soft_wrap=True, highlight=False)
err = Console(soft_wrap=True, highlight=False, stderr=True)


def option(text: str, *names: str, metavar: str | None = None) -> Any:
    """An option of the command line, with its help text."""
    return typer.Option(*names, metavar=metavar, help=text)


def column(text: str) -> Any:
    """An option that names a column."""
    return option(text, metavar="COLUMN")


Column = str | None
Table = Annotated[Path, typer.Argument(metavar="DATA", help="CSV or Parquet table: rows.csv")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder that fit wrote: run")]
Prob = Annotated[float, option("Probability of the equal-tailed intervals: --prob 0.95")]
OwnNet = Annotated[
    str | None,
    option("The network, if it is one of your own: --net my_net.py:MyNet", metavar="FILE.py:NAME"),
]


@contextmanager
def messages() -> Iterator[None]:
    """Warnings and errors of the library as messages on stderr; an error ends with code 2."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = lambda message, *_, **__: say(f"Warning: {message}", "yellow")
        try:
            yield
        except (ValueError, OSError, ImportError) as error:
            say(f"Error: {error}", "red")
            raise typer.Exit(2) from error


def say(message: str, style: str) -> None:
    """Print a message on stderr."""
    err.print(message, style=style, markup=False)


def load_run(run: Path, net: str | None) -> Fit:
    """The fit in a folder; a network of the user's own is made with the sizes it had."""
    try:
        manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
        facts, family = Facts.from_json(manifest["facts"]), manifest["model"]["family"]
        made_by = manifest["network"]["made_by"]
    except (OSError, ValueError, LookupError, TypeError):
        return Fit.load(run)  # which says what is wrong with the folder
    if net is None and made_by is None:
        raise ValueError(f"{run} has a network of your own: name it with --net FILE.py:NAME")
    if net is None:
        return Fit.load(run)
    n_outputs = len(facts.columns) + (family == "categorical")
    return Fit.load(run, network(net, math.prod(facts.feature_shape), n_outputs))
