"""The command ``armed-pyro predict``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import pandas as pd
from rich.progress import Progress, TaskID

from armed_pyro.cli.console import OwnNet, Prob, Run, Table, err, load_run, messages, option, out
from armed_pyro.cli.prediction_file import write_predictions
from armed_pyro.data.files import read_table, write_table
from armed_pyro.fitting import Fit
from armed_pyro.prediction.predict_table import predict_table
from armed_pyro.prediction.result import Prediction
from armed_pyro.prediction.unseen import MODES
from armed_pyro.streaming.parquet_table import TableBlocks

__all__ = ["predict_command"]


def predict_command(
    run: Run,
    data: Table,
    pred: Annotated[Path, option("Table to write: --out pred.csv", "--out", metavar="PRED")],
    unseen: Annotated[
        str | None,
        option(
            "What to assume of clusters not seen in training, required if there are any: "
            + "; ".join(f"{name}, {meaning}" for name, meaning in MODES.items()),
            metavar="MODE",
        ),
    ] = None,
    support: Annotated[
        Path | None,
        option(
            "Labelled rows of the new clusters, for --unseen adapt: --support first_rows.csv",
            metavar="FILE",
        ),
    ] = None,
    by_row: Annotated[
        bool,
        option("Membership of each row by itself, not of its whole cluster", "--by-row"),
    ] = False,
    compare: Annotated[
        bool,
        option(
            "Compare all modes on the new clusters, whose outcomes DATA must have; the table is "
            "printed and written beside PRED, as PRED.modes.csv",
            "--compare",
        ),
    ] = False,
    net: OwnNet = None,
    draws: Annotated[int, option("Posterior draws: --draws 2000")] = 1000,
    prob: Prob = 0.9,
    seed: Annotated[int | None, option("Seed of the draws: --seed 1 [default: the fit's]")] = None,
) -> None:
    """Predict the expected outcome of new rows, in their order, with its uncertainty.

    armed-pyro predict run new.csv --unseen marginal --out pred.csv

    Parquet tables are read and written block by block, whatever their size.
    """
    with messages():
        if not pred.name.lower().endswith((".csv", ".csv.gz", ".parquet", ".pq")):
            raise ValueError(f"--out must end in .csv or .parquet, found {str(pred)!r}")
        if by_row and unseen not in ("membership", "nearest"):
            raise ValueError("--by-row is for --unseen membership and --unseen nearest")
        table = TableBlocks.open(data)
        labelled = None if support is None else read_table(support)
        fitted = load_run(run, net)
        with Progress(console=err, disable=not err.is_terminal) as bar:
            tasks: dict[str, TaskID] = {}

            def report(what: str, done: int, total: int) -> None:
                if what not in tasks:
                    tasks[what] = bar.add_task(what, total=total)
                bar.update(tasks[what], completed=done)

            parts, membership = predict_table(
                fitted.posterior,
                table,
                unseen=unseen,
                support=labelled,
                pooled=not by_row,
                draws=draws,
                prob=prob,
                seed=seed,
                classifiers=fitted.classifiers,
                report=report,
            )
            # Before anything is written: a comparison that cannot be made is an error.
            modes = _compared(fitted, table, labelled, draws, prob, seed) if compare else None
            _write(parts, pred, report, table.n_rows)
        out.print(f"{table.n_rows} predictions are in {pred}", markup=False)
        beside = {"membership": membership, "modes": modes}
        for name, one in beside.items():
            if one is not None:
                path = pred.with_name(f"{pred.name}.{name}.csv")
                write_table(one, path)
                _print(name, one, path)
        _print_calibration(fitted)


def _write(
    parts: Iterator[Prediction], pred: Path, report: Callable[[str, int, int], None], total: int
) -> None:
    done = 0
    for rows in write_predictions(parts, pred):
        done += rows
        report("predicting", done, total)


def _compared(
    fit: Fit,
    table: TableBlocks,
    support: pd.DataFrame | None,
    draws: int,
    prob: float,
    seed: int | None,
) -> pd.DataFrame:
    frame = pd.concat(table.blocks(2**18)) if table.frame is None else table.frame
    return fit.compare_modes(frame, support=support, draws=draws, prob=prob, seed=seed)


def _print(name: str, table: pd.DataFrame, path: Path) -> None:
    if name == "modes":
        out.print("\nModes compared on the new clusters' outcomes:")
        out.print(table.to_string(index=False, float_format="{:.4g}".format), markup=False)
    else:
        sure = table["probability"].median()
        out.print(
            f"Membership of {len(table)} new clusters: median probability of the nearest {sure:.2f}"
            f", {int(table['alien'].sum())} like no seen cluster",
            markup=False,
        )
    out.print(f"That table is in {path}", markup=False)


def _print_calibration(fit: Fit) -> None:
    for name, one in fit.classifiers.items():
        found = one.report
        out.print(
            f"Classifier of {name!r}, on {found['rows']:.0f} rows kept for that: accuracy "
            f"{found['accuracy']:.2f} (chance {found['chance']:.2f}), calibration error "
            f"{found['ece']:.3f}",
            markup=False,
        )
