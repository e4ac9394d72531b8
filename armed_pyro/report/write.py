"""A report as a file, HTML or Word by its ending."""

from __future__ import annotations

from pathlib import Path

from armed_pyro.data.files import draft_of
from armed_pyro.report.content import Report
from armed_pyro.report.html import rendered
from armed_pyro.report.word import write_word

__all__ = ["check_ending", "write_report"]

HTML, WORD = (".html", ".htm"), (".docx",)


def check_ending(path: Path, name: str = "the file") -> None:
    """Raise ValueError for a folder, or an ending of another kind of file."""
    if path.is_dir():
        raise ValueError(f"{name} {path} is a folder, expected a file: {path / 'report.html'}")
    if path.suffix.lower() not in (*HTML, *WORD):
        raise ValueError(
            f"{name} must end in .html or .docx, found {str(path)!r}: reports are HTML, which a "
            "browser can print to PDF, or Word"
        )


def write_report(content: Report, path: Path) -> None:
    """Write a report whole or not at all; folders are made if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with draft_of(path) as draft:
        if path.suffix.lower() in WORD:
            write_word(content, draft)
        else:
            draft.write_text(rendered(content), encoding="utf-8")
