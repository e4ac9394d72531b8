"""Tables and reports as documents of Word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from armed_pyro._word import Document
from armed_pyro.data.files import draft_of
from armed_pyro.report.cells import as_text
from armed_pyro.report.content import (
    Block,
    Bullets,
    Gallery,
    Heading,
    Pairs,
    Paragraph,
    Report,
    Table,
)

__all__ = ["to_word", "write_word"]


def to_word(table: Any, path: str | Path, *, title: str = "", note: str = "") -> None:
    """Write a table as a document of Word, with a title above and a note below it.

    Numbers have as many digits as their sds allow, numbers are aligned at the right, and the header
    is repeated on every page.

    Parameters
    ----------
    table : pandas.DataFrame, or an object with ``to_frame()``
        Any table of the library, such as ``fit.variance_components()`` or ``fit.diagnostics()``.
        A frame with a named or labelled index gets it as its first columns.
    path : str or Path
        The file to write, which must end in ``.docx``. A file of this name is replaced.
    title, note : str
        Text above and below the table.

    Raises
    ------
    ImportError
        If python-docx is not installed: ``pip install 'armed_pyro[word]'``.
    TypeError
        If `table` is no table.
    ValueError
        If the file's name does not end in ``.docx``.

    Examples
    --------
    ``to_word(fit.fixed_effects(), "table1.docx", title="Table 1. Fixed effects")``
    """
    frame = (
        table if isinstance(table, pd.DataFrame) else getattr(table, "to_frame", lambda: table)()
    )
    if not isinstance(frame, pd.DataFrame):
        raise TypeError(
            f"to_word takes a pandas table or an object with to_frame(), found "
            f"{type(table).__name__}"
        )
    check_docx(path)
    if not isinstance(frame.index, pd.RangeIndex):
        frame = frame.reset_index()
    document = Document("a table for Word")
    if title:
        document.heading(title, 1)
    document.table(as_text(frame))
    if note:
        document.paragraph(note)
    with draft_of(Path(path)) as draft:
        document.save(draft)


def check_docx(path: str | Path) -> None:
    """Raise ValueError unless a file's name ends in ``.docx``."""
    if Path(path).suffix.lower() != ".docx":
        raise ValueError(f"the file must end in .docx, found {str(path)!r}: name it table.docx")


def write_word(content: Report, path: str | Path) -> None:
    """Write a report as a document of Word."""
    document = Document("a report for Word")
    document.heading(content.title, 0)
    document.paragraph(content.subtitle)
    for section in content.sections:
        document.heading(section.title, 1)
        for block in section.blocks:
            _add(document, block)
    document.save(path)


def _add(document: Document, block: Block) -> None:
    """Add one block."""
    match block:
        case Paragraph(text, mood):
            document.paragraph(text, bold=mood == "bad")
        case Heading(text):
            document.heading(text, 2)
        case Bullets(items):
            for item in items:
                document.paragraph(item, bullet=True)
        case Pairs(values):
            document.pairs(values)
        case Table(frame):
            document.table(as_text(frame))
        case Gallery(pictures):
            for picture in pictures:
                document.picture(picture.figure, picture.alt)
