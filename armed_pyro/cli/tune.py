"""``armed-pyro tune``: choose options of a program by cross-validation, and print their scores."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import typer

from armed_pyro._messages import listing
from armed_pyro.cli.console import err, out
from armed_pyro.cli.fit import (
    check_program,
    opened,
    program,
    table_rows,
    terms_of,
    with_formula,
)
from armed_pyro.cli.options import Between, TuneOptions
from armed_pyro.cli.saved_run import check_replaces
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.data.files import write_table
from armed_pyro.engine.schedule import Schedule
from armed_pyro.families.registry import family_named
from armed_pyro.program.model import MixedEffects
from armed_pyro.tuning.folds import By
from armed_pyro.tuning.settings import Settings
from armed_pyro.tuning.tune import single, tune

__all__ = ["tune_table"]

SWITCH = {"yes": True, "no": False}
SWITCHES = ("bayesian_head", "linear_effects")
# Options that change the program and not the rows, and how each reads its text.
READERS: Mapping[str, Callable[[str], Any]] = {
    "random": lambda text: [text],
    "net": str,
    "hidden": str,
    "family": str,
    "slopes_on": lambda text: [text],
    "bayesian_head": lambda text: SWITCH[text],
    "between": Between,
    "linear_effects": lambda text: SWITCH[text],
    "adversary_weight": str,
    "adversary_taps": str,
    "adversary_hidden": str,
    "adversary_warmup": float,
    "fixed_weight": float,
}


def tune_table(options: TuneOptions) -> None:
    """Score every combination of options, print the table and the options that are chosen.

    The command exits with code 1 if every combination has a fit that diverged.
    """
    options = with_formula(options)
    if options.table is not None:
        check_replaces(options.table, options.data)
    grid = values(options.over)
    check_program(options)
    tried = [changed(options, {name: text}) for name, texts in grid.items() for text in texts]
    for trial in tried:
        check_program(trial)
        family_named(trial.family)
    rows = _rows(options, tried)

    def make(settings: Settings) -> MixedEffects:
        made = changed(options, settings)
        family = family_named(made.family)
        family.check(rows)
        return program(made, terms_of(made), family, rows, options.seed)

    by = cast("By", options.by.value)
    steps = Schedule.steps if options.steps is None else options.steps
    try:
        tuning = tune(
            make,
            rows,
            by,
            grid,
            factor=options.factor or terms_of(options)[0].factor,
            folds=options.folds,
            unseen=options.unseen,
            support=options.support,
            criterion=cast(Any, options.criterion.value),
            schedule=replace(single(by), steps=steps),
            workers=options.workers,
            seed=options.seed,
            progress=err.is_terminal,
        )
    except RuntimeError as error:
        err.print(f"Error: {error}", style="red")
        raise typer.Exit(1) from error
    if options.table is not None:
        options.table.parent.mkdir(parents=True, exist_ok=True)
        write_table(tuning.table, options.table)
    out.print(str(tuning))
    out.print(f"Options of fit: {as_options(tuning.chosen)}")


def values(over: list[str]) -> dict[str, list[str]]:
    """The values of each option, as text.

    >>> values(["fixed-weight = 0; 0.3", "hidden=32; 64,32"])
    {'fixed_weight': ['0', '0.3'], 'hidden': ['32', '64,32']}
    """
    grid: dict[str, list[str]] = {}
    for text in over:
        name, sign, listed = text.partition("=")
        name = name.strip().removeprefix("--").replace("-", "_")
        if not sign or name not in READERS:
            known = listing([known.replace("_", "-") for known in READERS], len(READERS))
            raise ValueError(
                f"--over {text!r} must be an option and its values, such as 'fixed-weight = 0; 1'; "
                f"the options are {known}"
            )
        for value in filter(None, map(str.strip, listed.split(";"))):
            _read(name, value)
            grid.setdefault(name, []).append(value)
    return grid


def changed(options: TuneOptions, settings: Settings) -> TuneOptions:
    """The options with other values of some, given as text."""
    return replace(options, **{name: _read(name, text) for name, text in settings.items()})


def as_options(settings: Settings) -> str:
    """Settings as options of a command.

    >>> as_options({"fixed_weight": "0.3", "bayesian_head": "no", "hidden": "64,32"})
    '--fixed-weight 0.3 --no-bayesian-head --hidden 64,32'
    """
    words = []
    for name, text in settings.items():
        option = name.replace("_", "-")
        if name in SWITCHES:
            words.append(f"--{'' if SWITCH[text] else 'no-'}{option}")
        else:
            words += [f"--{option}", text]
    return shlex.join(words)


def _read(name: str, text: str) -> Any:
    """The value of an option; ValueError names the option."""
    try:
        return READERS[name](text)
    except (KeyError, ValueError) as error:
        expected = {"between": "auto, yes or no", **dict.fromkeys(SWITCHES, "yes or no")}
        raise ValueError(
            f"--over: {name.replace('_', '-')} must be {expected.get(name, 'a number')}, found "
            f"{text!r}"
        ) from error


def _rows(options: TuneOptions, tried: list[TuneOptions]) -> ClusteredData:
    """The table's rows in memory, with the columns of all terms."""
    terms = [term for trial in (options, *tried) for term in terms_of(trial)]
    texts = (text for trial in (options, *tried) for text in trial.random or ())
    options = replace(options, random=list(dict.fromkeys(texts)))
    table = opened(options, terms)
    rows = table_rows(options, terms, table, sys.maxsize, Path())
    assert isinstance(rows, ClusteredData)  # for mypy; nothing needs more memory than that
    return rows
