"""``armed-pyro predict``: predict the rows of a table, and write the predictions to a file."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from rich.progress import Progress, TaskID

from armed_pyro.cli.console import err, out
from armed_pyro.cli.options import PredictOptions
from armed_pyro.cli.saved_run import load_run
from armed_pyro.data.files import draft_of, read_table, write_table
from armed_pyro.prediction.predict import predict_table
from armed_pyro.prediction.result import Prediction
from armed_pyro.streaming.parquet_table import TableBlocks

Report = Callable[[str, int, int], None]


def predict_to_file(options: PredictOptions) -> None:
    """Predict the rows of a table, write the predictions, and print the path of the file."""
    if not options.pred.name.lower().endswith((".csv", ".csv.gz", ".parquet", ".pq")):
        raise ValueError(f"--out must end in .csv or .parquet, found {str(options.pred)!r}")
    if options.by_row and options.unseen not in ("membership", "nearest"):
        raise ValueError("--by-row is for --unseen membership and --unseen nearest")
    table = TableBlocks.open(options.data)
    support = None if options.support is None else read_table(options.support)
    fitted = load_run(options.run, options.net)
    settings: Any = {"draws": options.draws, "prob": options.prob, "seed": options.seed}
    with _progress() as report:
        parts, membership = predict_table(
            fitted.posterior,
            table,
            unseen=options.unseen,
            support=support,
            pooled=not options.by_row,
            classifiers=fitted.classifiers,
            report=report,
            **settings,
        )
        # The comparison comes before the writing, so that its errors leave no file.
        modes = None
        if options.compare:
            frame = pd.concat(table.blocks(2**18)) if table.frame is None else table.frame
            modes = fitted.compare_modes(frame, support=support, **settings)
        done = 0
        for rows in write_predictions(parts, options.pred):
            done += rows
            report("predicting", done, table.n_rows)
    out.print(f"{table.n_rows} predictions are in {options.pred}")
    for name, extra_table in {"membership": membership, "modes": modes}.items():
        if extra_table is not None:
            path = options.pred.with_name(f"{options.pred.name}.{name}.csv")
            write_table(extra_table, path)
            _print_table(name, extra_table, path)
    for name, classifier in fitted.classifiers.items():
        quality = classifier.report
        out.print(
            f"Classifier of {name!r}, on {quality['rows']:.0f} rows kept for that: accuracy "
            f"{quality['accuracy']:.2f} (chance {quality['chance']:.2f}), calibration error "
            f"{quality['ece']:.3f}"
        )


@contextmanager
def _progress() -> Iterator[Report]:
    """A progress bar for each task on a terminal, updated by ``report(task, done, total)``."""
    with Progress(console=err, disable=not err.is_terminal) as bar:
        tasks: dict[str, TaskID] = {}

        def report(task: str, done: int, total: int) -> None:
            if task not in tasks:
                tasks[task] = bar.add_task(task, total=total)
            bar.update(tasks[task], completed=done)

        yield report


def write_predictions(parts: Iterator[Prediction], path: Path) -> Iterator[int]:
    """Write predictions block by block, as CSV or Parquet by suffix; yield each block's length.

    The file appears only once it is complete.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.name.lower()
    writer: Any = None
    with draft_of(path) as draft, ExitStack() as files:
        for part in parts:
            frame = part.to_frame()
            if name.endswith((".csv", ".csv.gz")):
                first = writer is None
                if first:
                    text = gzip.open if name.endswith(".gz") else open
                    writer = files.enter_context(text(draft, "wt", encoding="utf-8"))
                frame.to_csv(writer, header=first, index=False)
            else:
                block = pa.Table.from_pandas(frame, preserve_index=False)
                if writer is None:
                    writer = files.enter_context(pq.ParquetWriter(draft, block.schema))
                writer.write_table(block)
            yield len(frame)


def _print_table(name: str, table: pd.DataFrame, path: Path) -> None:
    if name == "modes":
        out.print("\nModes compared on the new clusters' outcomes:")
        out.print(table.to_string(index=False, float_format="{:.4g}".format))
    else:
        probability = table["probability"].median()
        out.print(
            f"Membership of {len(table)} new clusters: median probability of the nearest "
            f"{probability:.2f}, {int(table['alien'].sum())} like no seen cluster"
        )
    out.print(f"That table is in {path}")
