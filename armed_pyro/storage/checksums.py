"""SHA-256 sums by which a changed file of a saved fit is recognised."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["check_sums", "file_sum", "sealed"]

BLOCK = 2**20


def file_sum(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def sealed(
    manifest: Mapping[str, Any], name: str, folder: Path, files: Iterable[str]
) -> dict[str, Any]:
    """The manifest with the sums of these files of the folder, and of itself under its own name.

    Its own sum is that of its content without sums of itself, so that line ends do not matter.
    """
    sums = {file: file_sum(folder / file) for file in files}
    content = {**manifest, "checksums": sums}
    return {**content, "checksums": {**sums, name: _content_sum(content)}}


def check_sums(manifest: Mapping[str, Any], name: str, folder: Path) -> None:
    """Raise ValueError for the first file that was changed; warn if the manifest has no sums."""
    sums = dict(manifest.get("checksums", {}))
    if not sums:
        warnings.warn(
            f"{folder} was saved by an armed_pyro that kept no checksums, so changed files are not "
            "recognised: save the fit again",
            UserWarning,
            stacklevel=4,
        )
        return
    expected = sums.pop(name, None)
    if expected != _content_sum({**manifest, "checksums": sums}):
        raise _changed(folder / name)
    for file, value in sums.items():
        path = folder / Path(file).name  # never outside the folder
        if path.is_file() and file_sum(path) != value:
            raise _changed(path)


def _content_sum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _changed(path: Path) -> ValueError:
    return ValueError(
        f"{path} was changed after the fit was saved, as its checksum differs: put a copy of the "
        "file back or save the fit again; if the change is intended, load the fit with "
        "verify=False (command line: --no-verify)"
    )
