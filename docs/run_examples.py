"""Extension of Sphinx that runs the Python examples of a page, and shows what they print and draw.

The blocks of a page share their names, in order. What a block prints follows it as text; a
matplotlib figure that it assigns to `figure` follows as a picture. An example that fails ends the
build with the page, the number of the block and the error.
"""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import re
from typing import Any

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class ExampleError(RuntimeError):
    """An example of a page failed."""


def with_results(text: str, name: str) -> str:
    """The page `name` with the output of each block after it."""
    names: dict[str, Any] = {"__name__": name}
    numbers = itertools.count(1)

    def run(match: re.Match[str]) -> str:
        shown = [match[0]]
        printed, figure = _run(match[1], names, f"{name} (example {next(numbers)})")
        if printed.strip():
            shown.append(f"```text\n{printed.rstrip()}\n```")
        if figure is not None:
            shown.append(f"```{{raw}} html\n{_image(figure)}\n```")
        return "\n\n".join(shown)

    return BLOCK.sub(run, text)


def _run(code: str, names: dict[str, Any], where: str) -> tuple[str, Any]:
    """What a block prints, and the figure that it assigns."""
    names.pop("figure", None)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            # Without the imports from __future__ of this file.
            exec(compile(code, where, "exec", dont_inherit=True), names)
    except Exception as error:
        raise ExampleError(f"{where}: {type(error).__name__}: {error}") from error
    return printed.getvalue(), names.get("figure")


def _image(figure: Any) -> str:
    """A figure as an image inside the page."""
    file = io.BytesIO()
    figure.savefig(file, format="svg")
    return (
        '<img class="result" alt="The figure that the code above draws" '
        f'src="data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}">'
    )


def _on_read(app: Any, docname: str, source: list[str]) -> None:
    source[0] = with_results(source[0], docname)


def setup(app: Any) -> dict[str, Any]:
    """Register the extension."""
    app.connect("source-read", _on_read)
    return {"parallel_read_safe": True}
