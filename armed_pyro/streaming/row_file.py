"""Encoded rows in files: records of a fixed width, an external shuffle and an external sort."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from armed_pyro.rows.in_memory import HeldRows

__all__ = ["Buckets", "Layout", "RowFile"]


Records = Float[np.ndarray, "rows width"]


@dataclass(frozen=True)
class Layout:
    """What the columns of a record are: features, row-wise numbers, codes of clusters.

    All are 32 bits wide: single-precision numbers, and codes as integers.

    Attributes
    ----------
    n_features : int
        Feature columns, which come first.
    numbers : tuple of str
        Those of y, trials, offset and weights that there are.
    factors : tuple of str
        Grouping factors.
    """

    n_features: int
    numbers: tuple[str, ...]
    factors: tuple[str, ...]

    @property
    def width(self) -> int:
        """Columns of a record."""
        return self.n_features + len(self.numbers) + len(self.factors)

    def records(
        self,
        features: Float[np.ndarray, "rows features"],
        numbers: Mapping[str, Float[np.ndarray, " rows"]],
        codes: Mapping[str, Int[np.ndarray, " rows"]],
    ) -> Records:
        """Records of these rows."""
        made = np.empty((len(features), self.width), np.float32)
        made[:, : self.n_features] = features
        for place, name in enumerate(self.numbers, self.n_features):
            made[:, place] = numbers[name]
        whole = made.view(np.int32)
        for place, name in enumerate(self.factors, self.n_features + len(self.numbers)):
            whole[:, place] = codes[name]
        return made

    def codes(self, records: Records, factor: str) -> Int[np.ndarray, " rows"]:
        """Each record's cluster."""
        place = self.n_features + len(self.numbers) + self.factors.index(factor)
        return np.ascontiguousarray(records[:, place]).view(np.int32)

    def rows(self, records: Records, counts: Mapping[str, Tensor], like: Tensor) -> HeldRows:
        """Records as tensors with the precision and device of `like`."""
        values = torch.from_numpy(records)
        numbers = {
            name: values[:, place].to(like).contiguous()
            for place, name in enumerate(self.numbers, self.n_features)
        }
        codes = {
            name: torch.from_numpy(self.codes(records, name)).to(like.device, torch.long)
            for name in self.factors
        }
        x = values[:, : self.n_features].to(like).contiguous()
        trials, offset, weights = (numbers.get(name) for name in ("trials", "offset", "weights"))
        return HeldRows(x, numbers.get("y"), codes, counts, trials, offset, weights)


class RowFile:
    """A file of records, read in stretches.

    Parameters
    ----------
    path : Path
        The file; made if it does not exist.
    width : int
        Columns of a record.
    """

    def __init__(self, path: Path, width: int) -> None:
        self.path, self.width = path, width
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self._in_use = threading.Lock()

    def __len__(self) -> int:
        return os.fstat(self._file).st_size // (4 * self.width)

    def append(self, records: Records) -> None:
        """Write records at the end."""
        with self.path.open("ab") as file:
            file.write(np.ascontiguousarray(records, np.float32).data)

    def read(self, starts: np.ndarray, stops: np.ndarray) -> Records:
        """The records of these stretches, one after the other; neighbours are read at once."""
        joins = np.flatnonzero(starts[1:] != stops[:-1]) + 1
        firsts = np.concatenate([[0], joins]).astype(int)
        lasts = np.concatenate([joins, [len(starts)]]).astype(int) - 1
        found = np.empty((int((stops - starts).sum()), self.width), np.float32)
        place, record = 0, 4 * self.width
        with self._in_use:
            for start, stop in zip(starts[firsts], stops[lasts], strict=True):
                piece = found[place : place + stop - start].data.cast("B")
                self._fill(piece, int(start) * record)
                place += stop - start
        return found

    def _fill(self, piece: memoryview, offset: int) -> None:
        while piece:
            count = os.preadv(self._file, [piece], offset)
            if not count:
                raise OSError(f"{self.path} ends early: it was changed while it was in use")
            piece, offset = piece[count:], offset + count

    def close(self) -> None:
        """Close the file, once a thread that reads it has done so."""
        with self._in_use:
            if self._file >= 0:
                os.close(self._file)
            self._file = -1


class Buckets:
    """Files among which records are dealt out, to be ordered one file at a time.

    Dealt out at random and then permuted within each, rows end up in an order drawn uniformly
    from all (Rao 1961; Sanders 1998). Dealt out by ranges of a key and then sorted within each,
    they end up sorted.

    Parameters
    ----------
    folder : Path
        Where the files are made.
    name : str
        What they are called.
    count : int
        Number of files, all of which are open at once.
    width : int
        Columns of a record.

    References
    ----------
    Sanders (1998), "Random permutations on distributed, external and hierarchical memory",
    Information Processing Letters 67(6).
    """

    def __init__(self, folder: Path, name: str, count: int, width: int) -> None:
        self.width = width
        self._paths = [folder / f"{name}.{place}" for place in range(count)]
        self._files = [path.open("wb") for path in self._paths]

    def __enter__(self) -> Buckets:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._files:
            file.close()

    def __len__(self) -> int:
        return len(self._paths)

    def add(self, records: Records, bucket: Int[np.ndarray, " rows"]) -> None:
        """Deal out some records."""
        order = np.argsort(bucket, kind="stable")
        ordered = records[order]
        edges = np.searchsorted(bucket[order], np.arange(len(self) + 1))
        for file, start, stop in zip(self._files, edges[:-1], edges[1:], strict=True):
            if stop > start:
                file.write(ordered[start:stop].data)

    def join(self, path: Path, ordered: Callable[[Records], Records]) -> RowFile:
        """One file of the records of all buckets, each put in order; the buckets are deleted."""
        joined = RowFile(path, self.width)
        for records in self._contents():
            joined.append(ordered(records))
        return joined

    def _contents(self) -> Iterator[Records]:
        for file, path in zip(self._files, self._paths, strict=True):
            file.close()
            yield np.fromfile(path, np.float32).reshape(-1, self.width)
            path.unlink()
