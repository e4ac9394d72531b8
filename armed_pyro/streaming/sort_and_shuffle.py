"""From a table's blocks to files of encoded rows: checked, dealt out, then sorted and shuffled."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.data.columns import check_varying
from armed_pyro.data.grouping import check_informative
from armed_pyro.program.data_spec import Facts
from armed_pyro.program.model import MixedEffects
from armed_pyro.random_effects.terms import RandomEffects
from armed_pyro.streaming.on_disk import StreamedRows
from armed_pyro.streaming.row_file import Buckets, Layout, Records, RowFile
from armed_pyro.streaming.scan import TableScan

__all__ = ["RowFiles", "RowWriter"]


# Rows that a fit keeps to be checked and saved with; fewest clusters to take them in whole.
SAMPLE_ROWS, FEWEST_CLUSTERS = 50_000, 20
# Files among which rows are dealt out; the share of memory that one's content may take.
MOST_BUCKETS, BUCKET_SHARE = 256, 1 / 32


@dataclass(frozen=True, eq=False)
class RowFiles:
    """The rows of a table in files, and what is known of them.

    Attributes
    ----------
    facts : Facts
        Those of all rows.
    sample : ClusteredData
        At most about 50,000 of the rows, in whole clusters where that makes 20 or more.
    rows : callable
        The rows with the precision and device of a tensor.
    files : tuple of RowFile
        The files.
    """

    facts: Facts
    sample: ClusteredData
    rows: Callable[[Tensor], StreamedRows]
    files: tuple[RowFile, ...]

    @property
    def n_bytes(self) -> int:
        """Size of the files."""
        return sum(4 * file.width * len(file) for file in self.files)

    def close(self) -> None:
        """Close the files."""
        for file in self.files:
            file.close()


class RowWriter:
    """Writes a table's rows as one program needs them.

    Parameters
    ----------
    folder : Path
        Where to.
    scanned : TableScan
        What a first pass over the table told.
    model : MixedEffects
        The program, which need not be bound.
    memory : int
        Bytes of memory, of which the rows sorted at once take a thirty-second.
    seed : int
        Seed of the shuffle and of the sample that is kept.

    Raises
    ------
    ValueError
        If a grouping factor cannot be fitted, or is one of cells.
    """

    def __init__(
        self, folder: Path, scanned: TableScan, model: MixedEffects, memory: int, seed: int
    ) -> None:
        self.folder, self.scanned, self.model, self.memory = folder, scanned, model, memory
        self.by = _sorting_factor(scanned, model)
        self.rng = np.random.default_rng([seed, 12])
        self.digest, self.moments = hashlib.blake2b(), _Moments()
        schema = scanned.schema
        given = {"y": schema.outcome, "trials": schema.trials, "offset": schema.offset}
        given["weights"] = schema.weights
        names = [name for name, column in given.items() if column is not None]
        self.numbers = {name: np.empty(scanned.n_rows) for name in names}
        # In the file, where rows of it are left out.
        self.places = np.empty(0 if scanned.complete else scanned.n_rows, np.int64)
        self.kept: list[pd.DataFrame] = []
        self.chosen = _some_clusters(scanned, self.by, self.rng)
        self.done = 0

    def __enter__(self) -> RowWriter:
        self._open = ExitStack()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.close()

    def add(self, frame: pd.DataFrame) -> None:
        """Take in the next rows of the table, without missing values."""
        rows = ClusteredData.encode(frame, self.scanned.schema, outcome_required=True)
        x = rows.features.numpy()
        if not self.done:
            self._start(rows)
        self.moments.add(x)
        codes = {
            name: self.scanned.levels[name].get_indexer(one.levels)[one.codes.numpy()]
            for name, one in rows.groupings.items()
        }
        numbers = {
            name: getattr(rows, "outcome" if name == "y" else name).numpy() for name in self.numbers
        }
        place = slice(self.done, self.done + len(rows))
        for name, one in numbers.items():
            self.numbers[name][place] = one
        if not self.scanned.complete:
            self.places[place] = frame.index
        records = self.layout.records((x - self.shift) / self.unit, numbers, codes)
        self.digest.update(records.data)
        own = codes[self.by] if self.by else np.zeros(len(rows), np.int64)
        self.sorting.add(records, self.ranges[own])
        if self.shuffling is not None:
            bucket = self.rng.integers(len(self.shuffling), size=len(rows))
            self.shuffling.add(records, bucket)
        mask = self.chosen(own)
        if mask.any():
            self.kept.append(frame[mask])
        self.done += len(rows)

    def finish(self) -> RowFiles:
        """The files, once all rows have been added.

        Raises
        ------
        ValueError
            If the rows cannot be fitted: see `Facts.of`.
        """
        facts = self._facts()
        self.numbers, self.places = {}, np.empty(0, np.int64)
        sample = ClusteredData.encode(
            pd.concat(self.kept), self.scanned.schema, outcome_required=True
        )
        files = [self.sorting.join(self.folder / "sorted", lambda one: self._sorted(facts, one))]
        if self.shuffling is not None:
            shuffled = self.folder / "shuffled"
            files.append(self.shuffling.join(shuffled, lambda one: self._shuffled(facts, one)))

        def rows(like: Tensor) -> StreamedRows:
            counts = {name: one.to(like.device) for name, one in facts.counts.items()}
            return StreamedRows(
                self.layout,
                self.by,
                files[0],
                files[1] if len(files) > 1 else None,
                counts,
                like.new_zeros(0),
                self.digest.digest(),
            )

        return RowFiles(facts, sample, rows, tuple(files))

    def _start(self, rows: ClusteredData) -> None:
        """Lay out records and files by the first rows."""
        self.first, width = rows, len(rows.feature_names)
        self.layout = Layout(width, tuple(self.numbers), self.model.factor_names())
        # Means and sds of all rows are not known yet; single precision needs something near them.
        x, continuous = rows.features.numpy(), np.asarray(rows.continuous, dtype=bool)
        self.shift = np.where(continuous, x.mean(0), 0.0)
        spread = x.std(0)
        self.unit = np.where(continuous & (spread > 0), spread, 1.0)
        size = 4 * self.layout.width * self.scanned.n_rows
        count = int(np.clip(size / (BUCKET_SHARE * self.memory), 1, MOST_BUCKETS))
        self.ranges = np.zeros(1, np.int64)
        if self.by:
            before = np.cumsum(self.scanned.counts[self.by].numpy()) - 1
            self.ranges = before * count // self.scanned.n_rows
        self.sorting = self._buckets("sorting", count)
        self.shuffling = self._buckets("shuffling", count) if _shuffles(self.model) else None

    def _buckets(self, name: str, count: int) -> Buckets:
        made = Buckets(self.folder, name, count, self.layout.width)
        return self._open.enter_context(made)

    def _facts(self) -> Facts:
        schema, first, scanned = self.scanned.schema, self.first, self.scanned
        optional = dict.fromkeys(("trials", "offset", "weights"))
        numbers = {name: torch.from_numpy(one) for name, one in self.numbers.items()}
        every = pd.RangeIndex(self.done)
        outline = ClusteredData(
            features=torch.zeros(self.done, 0),
            feature_names=(),
            sources=(),
            continuous=(),
            outcome_name=schema.outcome,
            outcome=numbers.pop("y"),
            classes=first.classes,
            groupings={},
            row_labels=every if scanned.complete else pd.Index(self.places),
            schema=schema,
            **{**optional, **numbers},
        )
        factors = self.model.factor_names()
        for name in factors:
            check_informative(name, scanned.levels[name], scanned.counts[name])
        facts = Facts.of(outline, self.model.family, ())
        check_varying(first.feature_names, torch.from_numpy(self.moments.varying))
        continuous = np.asarray(first.continuous, dtype=bool)
        return replace(
            facts,
            feature_names=first.feature_names,
            sources=first.sources,
            feature_shape=(len(first.feature_names),),
            feature_mean=tuple(np.where(continuous, self.moments.mean, 0.0).tolist()),
            feature_scale=tuple(np.where(continuous, self.moments.sds(), 1.0).tolist()),
            levels={name: scanned.levels[name] for name in factors},
            counts={name: scanned.counts[name] for name in factors},
        )

    def _sorted(self, facts: Facts, records: Records) -> Records:
        if self.by:
            records = records[np.argsort(self.layout.codes(records, self.by), kind="stable")]
        return self._standardised(facts, records)

    def _shuffled(self, facts: Facts, records: Records) -> Records:
        return self._standardised(facts, records[self.rng.permutation(len(records))])

    def _standardised(self, facts: Facts, records: Records) -> Records:
        """The records with features in units of all rows' sds from all rows' means."""
        mean, scale = np.array(facts.feature_mean), np.array(facts.feature_scale)
        features = records[:, : self.layout.n_features]
        features *= (self.unit / scale).astype(np.float32)
        features += ((self.shift - mean) / scale).astype(np.float32)
        return records


class _Moments:
    """Means and sds of columns seen block by block (Chan, Golub, LeVeque 1983)."""

    def __init__(self) -> None:
        self.n = 0
        self.mean: Any = 0.0
        self.squares: Any = 0.0
        self.varying: Any = False
        self._first: Any = None

    def add(self, x: Float[np.ndarray, "rows columns"]) -> None:
        """Take in some rows."""
        self._first = x[0].copy() if self._first is None else self._first
        self.varying = self.varying | (x != self._first).any(0)
        mean, n = x.mean(0), self.n + len(x)
        delta = mean - self.mean
        self.squares = self.squares + ((x - mean) ** 2).sum(0) + delta**2 * self.n * len(x) / n
        self.mean = self.mean + delta * len(x) / n
        self.n = n

    def sds(self) -> Float[np.ndarray, " columns"]:
        """Standard deviations."""
        return np.asarray(np.sqrt(self.squares / max(1, self.n - 1)))


def _sorting_factor(scanned: TableScan, model: MixedEffects) -> str:
    """The factor with most random effects, whose whole clusters training will ask for."""
    for name in model.factor_names():
        if name not in scanned.levels:
            raise ValueError(
                f"the cells of {name!r} cannot be streamed: write their labels to a column of the "
                "table, and name that column in the random effects"
            )
    effects: dict[str, int] = {}
    for term in model.terms:
        width = len(term.slopes) + term.intercept if isinstance(term, RandomEffects) else 1
        effects[term.factor] = effects.get(term.factor, 0) + width
    return max(effects, key=lambda one: effects[one] * len(scanned.levels[one]), default="")


def _shuffles(model: MixedEffects) -> bool:
    """Whether mini-batches of rows are needed: where there is a network to train, or no factor."""
    linear = model.bayesian_head and isinstance(model.network, nn.Linear)
    return not linear or bool(model.adversaries) or not model.terms


def _some_clusters(
    scanned: TableScan, by: str, rng: np.random.Generator
) -> Callable[[Int[np.ndarray, " rows"]], Bool[np.ndarray, " rows"]]:
    """Tells by their clusters which rows to keep as a sample of all."""
    if by:
        counts = scanned.counts[by].numpy()
        order = rng.permutation(len(counts))
        taken = order[: max(1, np.searchsorted(np.cumsum(counts[order]), SAMPLE_ROWS, "right"))]
        if len(taken) >= min(FEWEST_CLUSTERS, len(counts)):
            wanted = np.zeros(len(counts), dtype=bool)
            wanted[taken] = True
            return lambda codes: wanted[codes]
    share = SAMPLE_ROWS / scanned.n_rows
    return lambda codes: rng.random(len(codes)) < share
