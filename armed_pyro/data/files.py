"""Tables of other libraries, and CSV and Parquet files, as pandas tables."""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import os
import uuid
import warnings
import zlib
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import narwhals as nw
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from armed_pyro._messages import listing

# Whole numbers from here on are not all exact as floats.
EXACT = 2**53
# First characters of texts that a spreadsheet takes as formulas (OWASP, "CSV injection").
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
_nullable = {
    pa.int64(): pd.Int64Dtype(),
    pa.uint64(): pd.UInt64Dtype(),
}


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
    if broken := [n for n in frame.columns if isinstance(n, str) and not _is_unicode(n)]:
        raise ValueError(
            f"Column names must be valid Unicode, found {listing(broken)}. Rename them."
        )
    if others := [name for name in frame.columns if not isinstance(name, str)]:
        raise ValueError(
            f"Column names must be text, found {listing(others)}. Name the columns, for example "
            "frame.columns = frame.columns.astype(str)."
        )
    return frame


def _is_unicode(text: str) -> bool:
    return text.encode(errors="replace").decode() == text


def natural_types(table: pd.DataFrame) -> pd.DataFrame:
    """The table with columns of objects as numbers or text, if they hold one of these.

    ValueError, with the column's name, for text that is not valid Unicode.
    """
    try:
        return table.infer_objects()
    except UnicodeEncodeError:
        for name in table:
            if bad := [v for v in table[name] if isinstance(v, str) and not _is_unicode(v)]:
                raise ValueError(
                    f"The column {name!r} has text that is not valid Unicode, such as {bad[0]!r}. "
                    "Read the file again with its encoding, or replace that text."
                ) from None
        raise


def read_table(path: str | os.PathLike[str], *, labels: Collection[str] = ()) -> pd.DataFrame:
    """Read a table from a CSV (``.csv``, ``.csv.gz``) or Parquet (``.parquet``, ``.pq``) file.

    A first CSV column without a name becomes the index: pandas and R write row names so. Whole
    numbers beside blanks stay exact beyond 2^53.

    Parameters
    ----------
    labels : collection of str
        Columns of a CSV file that are labels, such as those of the clusters: they are read as they
        are written, so that ``0.1`` and ``0.10``, ``7`` and ``007``, ``0`` and ``-0`` stay
        different. A column of whole numbers without leading zeros is read as numbers. Names of
        absent columns are ignored.

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
    frame = _read_csv(path, labels) if is_csv else _read_parquet(path)
    if frame.empty:
        raise ValueError(
            f"{path} has a header ({listing(frame.columns)}) but no rows; at least one is needed."
        )
    return frame


def write_table(
    frame: pd.DataFrame, path: str | os.PathLike[str], *, quote_formulas: bool = False
) -> None:
    """Write a table, without its index, as CSV or Parquet by suffix.

    The file appears only once it is complete.

    Parameters
    ----------
    quote_formulas : bool
        Whether texts and column names of a CSV file that a spreadsheet would take as formulas get a
        leading apostrophe. These begin with ``=``, ``+``, ``-``, ``@``, a tab or a line end; a
        label of a stranger's table can so run a command on opening. Such labels then differ from
        those of the data.

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
            (without_formulas(frame) if quote_formulas else frame).to_csv(draft, index=False)
        else:
            frame.to_parquet(draft, index=False)


def without_formulas(frame: pd.DataFrame) -> pd.DataFrame:
    """The table with an apostrophe before texts and names that a spreadsheet takes as formulas.

    >>> without_formulas(pd.DataFrame({"site": ["=1+1", "a"], "mean": [-1.0, 2.0]})).values.tolist()
    [["'=1+1", -1.0], ['a', 2.0]]
    """
    quoted = {
        name: frame[name].map(_without_formula)
        for name in frame
        if not pd.api.types.is_numeric_dtype(frame[name])
    }
    return frame.assign(**quoted).rename(columns=_without_formula)


def _without_formula(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


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


def _read_csv(path: Path, labels: Collection[str] = ()) -> pd.DataFrame:
    try:
        header = _header(path)
        _check_header(path, header)
        _check_no_zero_bytes(path)
        row_names = 0 if len(header) > 1 and not header[0] else False
        settings: dict[str, Any] = {"index_col": row_names, "low_memory": False}
        written = dict.fromkeys((name for name in header if name in labels), str)
        with warnings.catch_warnings():
            # Pandas drops the surplus fields of a row; this warning is the only sign of it.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frame = pd.read_csv(path, dtype=written, **settings)
            if inexact := [name for name in frame if _is_inexact(frame[name])]:
                whole = pd.read_csv(path, usecols=inexact, dtype=str, low_memory=False)
                for name in inexact:
                    frame[name] = _whole_numbers(whole[name], frame[name]).array
    except UnicodeDecodeError:
        raise ValueError(
            f"{path} is not UTF-8: byte {_first_bad_byte(path)} cannot be decoded. Re-encode it, "
            "for example with: iconv -f latin1 -t utf-8 old.csv > new.csv"
        ) from None
    except (csv.Error, pd.errors.ParserWarning, pd.errors.EmptyDataError) as error:
        raise _not_a_table(path, error) from error
    except (pd.errors.ParserError, OverflowError) as error:
        raise _not_a_table(path, error) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file ({error}); fetch it again.") from error
    return frame.assign(**{name: _as_written(frame[name]) for name in written if name in frame})


def _header(path: Path) -> list[str]:
    """The names in the first row of a CSV file."""
    with _open(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig") as text:
        return next(csv.reader(text), [])


def _check_header(path: Path, header: list[str]) -> None:
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


def _check_no_zero_bytes(path: Path) -> None:
    """Raise ValueError for a byte 0, at which pandas would end a field without a word."""
    place = 0
    with _open(path) as file:
        while block := file.read(2**20):
            if (at := block.find(b"\0")) >= 0:
                raise ValueError(
                    f"{path} is not text: byte {place + at} is 0. Write the table again as UTF-8."
                )
            place += len(block)


def _not_a_table(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path} is not a comma-separated table: {str(error).strip()} Every row needs as many "
        "fields as the header has names."
    )


def _is_inexact(column: pd.Series) -> bool:
    """Whether a column of floats may have been whole numbers too large to be exact."""
    if column.dtype != np.float64:
        return False
    values = column.dropna().to_numpy()
    return bool(len(values) and (values % 1 == 0).all() and (np.abs(values) >= EXACT).any())


def _whole_numbers(text: pd.Series, numbers: pd.Series) -> pd.Series:
    """Text as 64-bit integers with gaps; the numbers if it is anything else."""
    try:
        return _exact(text)
    except (ValueError, TypeError, OverflowError):
        return numbers


def _as_written(text: pd.Series) -> pd.Series:
    """Labels as they are written; whole numbers as numbers, if all are written in one way."""
    present = text.dropna()
    if not len(present) or not present.str.fullmatch(r"0|-?[1-9]\d{0,17}").all():
        return text
    return _exact(text) if len(present) < len(text) else text.map(int).astype(np.int64)


def _exact(text: pd.Series) -> pd.Series:
    """Text of whole numbers as these; pandas itself would go through floats if there are gaps."""
    numbers = [
        pd.NA if missing else int(value) for value, missing in zip(text, text.isna(), strict=True)
    ]
    return pd.Series(pd.array(numbers, dtype="Int64"), index=text.index)


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
        return to_pandas(pq.read_table(path))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} is not a readable Parquet file ({error}); write it again, or rename it if it "
            "is a CSV file."
        ) from error


def to_pandas(table: pa.Table) -> pd.DataFrame:
    """An Arrow table as a pandas table, in which whole numbers beside gaps stay exact.

    Pandas would turn integers beside gaps into floats, which are inexact beyond 2^53. A table whose
    notes for pandas are damaged is read without these.
    """
    try:
        frame = table.to_pandas()
    except (KeyError, TypeError, ValueError, AttributeError, LookupError):  # notes for pandas
        table = table.replace_schema_metadata(None)
        frame = table.to_pandas()
    for name, column in zip(table.column_names, table.columns, strict=True):
        if column.null_count and pa.types.is_integer(column.type) and name in frame:
            exact = frame[name].dropna().abs() < EXACT
            if not exact.all():
                numbers = column.to_pandas(types_mapper=_nullable.get)
                frame[name] = pd.array(numbers, dtype=numbers.dtype)
    return frame
