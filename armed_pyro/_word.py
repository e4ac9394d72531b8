"""Documents of Word: headings, paragraphs, tables and pictures, by python-docx."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import pandas as pd

from armed_pyro._optional import extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Document"]

WIDTH = 6.0  # inches of text on a page
DPI = 200
# Characters that XML, and so Word, cannot hold.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff\ud800-\udfff]")


@final
class Document:
    """A document of Word, filled from top to bottom; python-docx must be installed."""

    def __init__(self, what: str) -> None:
        self._docx: Any = extra("docx", what, "word").Document()
        margin = self._docx.sections[0]
        self._width = min(margin.page_width - margin.left_margin - margin.right_margin, 10**9)

    def heading(self, text: str, level: int) -> None:
        """A heading; level 0 is the title."""
        self._docx.add_heading(_clean(text), level)

    def paragraph(self, text: str, *, bold: bool = False, bullet: bool = False) -> None:
        """A paragraph, or an item of a list."""
        style = "List Bullet" if bullet else None
        self._docx.add_paragraph(style=style).add_run(_clean(text)).bold = bold or None

    def pairs(self, values: Mapping[str, str]) -> None:
        """Names in bold, each with its value after it."""
        for name, value in values.items():
            line = self._docx.add_paragraph()
            line.add_run(f"{_clean(name)}: ").bold = True
            line.add_run(_clean(value))

    def table(self, texts: pd.DataFrame) -> None:
        """A table of texts with a header that is repeated on every page; numbers at the right."""
        from docx.enum.text import WD_ALIGN_PARAGRAPH
        from docx.oxml import OxmlElement
        from docx.shared import Pt

        table = self._docx.add_table(1, len(texts.columns), style="Light List Accent 1")
        rows: list[Sequence[Any]] = [list(texts.columns), *texts.itertuples(index=False)]
        numeric = [_numeric(texts[name]) for name in texts]
        for place, row in enumerate(rows):
            cells = (table.rows[0] if place == 0 else table.add_row()).cells
            for cell, value, right in zip(cells, row, numeric, strict=True):
                line = cell.paragraphs[0]
                line.add_run(_clean(str(value))).font.size = Pt(8)
                line.alignment = WD_ALIGN_PARAGRAPH.RIGHT if right else None
        table.rows[0]._tr.get_or_add_trPr().append(OxmlElement("w:tblHeader"))
        self._docx.add_paragraph()

    def picture(self, figure: Figure, alt: str) -> None:
        """A figure of matplotlib, at most as wide as the text, with words that stand for it."""
        from docx.shared import Inches

        file, width = io.BytesIO(), min(WIDTH, figure.get_figwidth())
        figure.savefig(file, format="png", dpi=DPI)
        file.seek(0)
        shape = self._docx.add_picture(file, width=Inches(width))
        shape._inline.docPr.set("descr", _clean(alt))

    def save(self, path: str | Path) -> None:
        """Write the document."""
        self._docx.save(str(path))


def _clean(text: str) -> str:
    """Text that XML can hold."""
    return _FORBIDDEN.sub("�", text)


def _numeric(column: pd.Series) -> bool:
    """Whether all texts of a column are numbers, or empty."""
    texts = [text for text in column if text != ""]
    return bool(texts) and bool(pd.to_numeric(pd.Series(texts), errors="coerce").notna().all())
