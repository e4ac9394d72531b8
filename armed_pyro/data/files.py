"""Tables of other libraries, and CSV and Parquet files, as pandas tables."""

from __future__ import annotations

import csv
import difflib
import gzip
import os
import uuid
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import narwhals as nw
import pandas as pd
import pyarrow as pa

from armed_pyro._messages import listing


def as_pandas(frame: Any) -> pd.DataFrame:
    """A pandas, polars or pyarrow table as a pandas table; a pandas table is returned as it is."""
    if not isinstance(frame, pd.DataFrame):
        try:
            frame = nw.from_native(frame, eager_only=True).to_pandas()
        except TypeError as error:
            raise TypeError(
                f"Expected a pandas, polars or pyarrow table, found {type(frame).__name__}. Use "
                "ClusteredData.from_arrays for arrays, read_table for files."
            ) from error
    if repeated := frame.columns[frame.columns.duplicated()].unique().tolist():
        raise ValueError(f"Column names must be distinct; these are not: {listing(repeated)}.")
    if others := [name for name in frame.columns if not isinstance(name, str)]:
        raise ValueError(
            f"Column names must be text, found {listing(others)}. Name the columns, for example "
            "frame.columns = frame.columns.astype(str)."
        )
    return frame


def read_table(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Read a table from a CSV (``.csv``, ``.csv.gz``) or Parquet (``.parquet``, ``.pq``) file.

    A first CSV column without a name becomes the index: pandas and R write row names so.

    Raises
    ------
    ValueError
        If there is no such file, or it is not a readable table; the message says what to do.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     pd.DataFrame({"site": ["a", "b"]}).to_csv(f"{folder}/rows.csv", index=False)
    ...     read_table(f"{folder}/rows.csv").site.tolist()
    ['a', 'b']
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder; expected a table, such as rows.csv in it.")
    is_csv = _is_csv(path)
    if not path.is_file():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        nearest = difflib.get_close_matches(path.name, siblings, n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else " Check the path."
        raise ValueError(f"There is no file {str(path)!r}.{hint}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes); expected a table with a header and rows.")
    frame = _read_csv(path) if is_csv else _read_parquet(path)
    if frame.empty:
        raise ValueError(
            f"{path} has a header ({listing(frame.columns)}) but no rows; at least one is needed."
        )
    return frame


def write_table(frame: pd.DataFrame, path: str | os.PathLike[str]) -> None:
    """Write a table, without its index, as CSV or Parquet by suffix.

    The file appears only once it is complete.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_table(pd.DataFrame({"age": [1, 2]}), f"{folder}/rows.parquet")
    ...     read_table(f"{folder}/rows.parquet").age.tolist()
    [1, 2]
    """
    is_csv = _is_csv(Path(path))
    with draft_of(Path(path)) as draft:
        if is_csv:
            frame.to_csv(draft, index=False)
        else:
            frame.to_parquet(draft, index=False)


@contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """A path to write to; its file replaces `path` once it is complete, or is deleted."""
    # The draft is in the same folder, because replacing is atomic only within one file system.
    draft = path.with_name(f".{uuid.uuid4().hex}-{path.name}")
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _is_csv(path: Path) -> bool:
    name = path.name.lower()
    if name.endswith((".csv", ".csv.gz")):
        return True
    if name.endswith((".parquet", ".pq")):
        return False
    raise ValueError(
        f"Cannot tell the format of {str(path)!r} by its suffix {path.suffix!r}; expected .csv, "
        ".csv.gz, .parquet or .pq."
    )


def _read_csv(path: Path) -> pd.DataFrame:
    try:
        with _open(path) as file:
            text = (line.decode("utf-8-sig" if i == 0 else "utf-8") for i, line in enumerate(file))
            header = next(csv.reader(text), [])
        if len(header) == 1:
            for delimiter, called in [(";", "semicolons"), ("\t", "tabs"), ("|", "bars")]:
                if delimiter in header[0]:
                    raise ValueError(
                        f"{path} is delimited by {called}, expected commas: its header is "
                        f"{header[0]!r}. Convert it, for example with pandas.read_csv(path, "
                        f"sep={delimiter!r}).to_csv(path, index=False)."
                    )
        if repeated := [name for name, count in Counter(header).items() if name and count > 1]:
            raise ValueError(
                f"{path} has repeated column names in its header: {listing(repeated)}. Rename them."
            )
        row_names = 0 if len(header) > 1 and not header[0] else False
        with warnings.catch_warnings():
            # Pandas drops the surplus fields of a row; this warning is the only sign of it.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            return pd.read_csv(path, index_col=row_names, low_memory=False)
    except UnicodeDecodeError:
        raise ValueError(
            f"{path} is not UTF-8: byte {_first_bad_byte(path)} cannot be decoded. Re-encode it, "
            "for example with: iconv -f latin1 -t utf-8 old.csv > new.csv"
        ) from None
    except (pd.errors.EmptyDataError, pd.errors.ParserError, pd.errors.ParserWarning) as error:
        raise ValueError(
            f"{path} is not a comma-separated table: {str(error).strip()} Every row needs as many "
            "fields as the header has names."
        ) from error
    except (gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path} is not a whole gzip file ({error}); fetch it again.") from error


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _first_bad_byte(path: Path) -> int:
    with _open(path) as file:
        try:
            file.read().decode("utf-8")
        except UnicodeDecodeError as error:
            return error.start
    return 0


def _read_parquet(path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} is not a readable Parquet file ({error}); write it again, or rename it if it "
            "is a CSV file."
        ) from error
