"""``armed-pyro predict``: predict the rows of a table, and write the predictions to a file."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool
from rich.progress import Progress, TaskID

from armed_pyro.cli.console import err, out
from armed_pyro.cli.options import Holes, PredictOptions
from armed_pyro.cli.saved_run import check_output, interval_prob, load_run
from armed_pyro.data.files import draft_of, read_table, without_formulas, write_table
from armed_pyro.data.schema import Schema
from armed_pyro.prediction.predict import predict_table
from armed_pyro.prediction.result import Prediction
from armed_pyro.streaming.parquet_table import TableBlocks

Report = Callable[[str, int, int], None]


def predict_to_file(options: PredictOptions) -> None:
    """Predict the rows of a table, write the predictions, and print the path of the file."""
    if not options.pred.name.lower().endswith((".csv", ".csv.gz", ".parquet", ".pq")):
        raise ValueError(f"--out must end in .csv or .parquet, found {str(options.pred)!r}")
    check_output(options.pred, options.run, options.data, options.support)
    if options.seed is not None and not 0 <= options.seed < 2**63:
        raise ValueError(f"--seed must be at least 0 and below 2^63, not {options.seed}")
    if options.draws < 1:
        raise ValueError(f"--draws must be at least 1, not {options.draws}")
    if options.by_row and options.unseen not in ("membership", "nearest"):
        raise ValueError("--by-row is for --unseen membership and --unseen nearest")
    fitted = load_run(options.run, options.net, verify=options.verify)
    schema = fitted.posterior.model.data_facts().schema
    labels = () if schema is None else schema.clusters
    table = TableBlocks.open(options.data, labels)
    support = None if options.support is None else read_table(options.support, labels=labels)
    prob = interval_prob(options.run, options.prob)
    masks = None
    if options.missing is Holes.empty:
        table = table.without_holes(_needed(schema))
        masks = table.complete_rows()
    settings: Any = {"draws": options.draws, "prob": prob, "seed": options.seed}
    with _progress() as report:
        parts, membership = predict_table(
            fitted.posterior,
            table,
            unseen=options.unseen,
            support=support,
            pooled=not options.by_row,
            network_uncertainty=cast(Any, options.network_uncertainty.value),
            classifiers=fitted.classifiers,
            report=report,
            **settings,
        )
        # The comparison comes before the writing, so that its errors leave no file.
        modes = None
        if options.compare:
            frame = pd.concat(table.blocks(2**18))
            modes = fitted.compare_modes(frame, support=support, **settings)
        done = 0
        for rows in write_predictions(
            parts, options.pred, masks, quote_formulas=options.quote_formulas
        ):
            done += rows
            report("predicting", done, table.n_rows)
    tables = {"membership": membership, "modes": modes}
    written = {name: extra for name, extra in tables.items() if extra is not None}
    paths = {name: options.pred.with_name(f"{options.pred.name}.{name}.csv") for name in written}
    for name, extra in written.items():
        write_table(extra, paths[name], quote_formulas=options.quote_formulas)
    # Printed last, so that a closed output loses no file.
    out.print(f"{table.n_rows} predictions are in {options.pred}")
    for name, extra in written.items():
        _print_table(name, extra, paths[name])
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


def _needed(schema: Schema | None) -> tuple[str, ...]:
    """The columns without which rows cannot be predicted; labels of clusters may be missing."""
    if schema is None:
        raise ValueError("the model was fitted to arrays, so it cannot read a table")
    names = (*schema.columns, schema.trials, schema.offset)
    return tuple(name for name in names if name is not None)


def in_place(
    frames: Iterator[pd.DataFrame], masks: Iterable[Bool[np.ndarray, " rows"]]
) -> Iterator[pd.DataFrame]:
    """Yield the predictions of complete rows in their place, among empty ones of other rows.

    `frames` are the predictions of all complete rows, and `masks` tell block by block which rows
    are complete.

    >>> frames = iter([pd.DataFrame({"mean": [1.0, 2.0]})])
    >>> pd.concat(in_place(frames, [np.array([True, False]), np.array([True])]))["mean"].tolist()
    [1.0, nan, 2.0]
    """
    waiting = next(frames)
    for mask in masks:
        while len(waiting) < mask.sum():
            waiting = pd.concat([waiting, next(frames)])
        place = np.where(mask, np.cumsum(mask) - 1, -1)
        filled = waiting.reset_index(drop=True).reindex(place).reset_index(drop=True)
        if "unseen" in filled:
            filled["unseen"] = filled["unseen"].fillna("")
        waiting = waiting.iloc[mask.sum() :]
        yield filled


def write_predictions(
    parts: Iterator[Prediction],
    path: Path,
    masks: Iterable[Bool[np.ndarray, " rows"]] | None = None,
    *,
    quote_formulas: bool = False,
) -> Iterator[int]:
    """Write predictions block by block, as CSV or Parquet by suffix; yield each block's length.

    The file appears only once it is complete. With masks, the rows are those of `in_place`.
    `quote_formulas` is that of `write_table`.
    """
    frames: Iterator[pd.DataFrame] = (part.to_frame() for part in parts)
    if masks is not None:
        frames = in_place(frames, masks)
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.name.lower()
    writer: Any = None
    with draft_of(path) as draft, ExitStack() as files:
        for frame in frames:
            if name.endswith((".csv", ".csv.gz")):
                first = writer is None
                if first:
                    text = gzip.open if name.endswith(".gz") else open
                    writer = files.enter_context(text(draft, "wt", encoding="utf-8"))
                frame = without_formulas(frame) if quote_formulas else frame
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
