"""The commands' output, and their exit on an error."""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

# Markup and emoji codes are off, because names in the data may look like them: [bold], :school:.
out = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
err = Console(soft_wrap=True, highlight=False, markup=False, emoji=False, stderr=True)


@contextmanager
def messages() -> Iterator[None]:
    """Print the library's warnings and errors on stderr; an error ends the command with code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # an ASCII output gets escapes in place of errors
            stream.reconfigure(errors="backslashreplace")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = lambda message, *_, **__: err.print(
            f"Warning: {message}", style="yellow"
        )
        try:
            yield
        except (ValueError, OSError, ImportError) as error:
            err.print(f"Error: {error}", style="red")
            raise typer.Exit(2) from error
