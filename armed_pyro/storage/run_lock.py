"""The folder of a run: one writer at a time, and nothing left by writers that were killed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

__all__ = ["DRAFT", "LOCK", "REPLACED", "is_temporary", "locked"]

LOCK = ".lock"
# How names of folders begin in which files are written before they are moved to their place, and
# those of the sorted rows of a table larger than memory.
DRAFT, ROWS = ".saving-", ".armed_pyro-"
# In a draft, the folder of the files that it replaces. It is made when the draft is complete.
REPLACED, LAST = "replaced", "manifest.json"


def is_temporary(name: str) -> bool:
    """Whether a file or folder of this name in a run's folder is only there while it is written.

    >>> is_temporary(".saving-3f"), is_temporary("manifest.json")
    (True, False)
    """
    return name == LOCK or name.startswith((DRAFT, ROWS))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody else writes to the folder, which is made if needed, while the context lasts.

    What killed processes left is removed first, and a fit that was being moved to its place when
    one was killed is moved there. A folder that is empty at the end is removed again.
    The lock is the operating system's, so it ends with the process. It is re-entrant in a thread.

    Raises
    ------
    ValueError
        If another process or thread holds the lock; the message says which.
    """
    if folder.is_symlink() and not folder.exists():
        raise ValueError(f"{folder} is a link to {folder.readlink()}, which does not exist")
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0, is_singleton=True)
    first = not lock.is_locked
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"{folder} is being written to by {_holder(folder)}: wait until that run has ended, or "
            "choose another folder"
        ) from None
    try:
        if first:
            holder = {"pid": os.getpid(), "host": socket.gethostname()}
            (folder / LOCK).write_text(json.dumps(holder), "utf-8")
            _remove_litter(folder)
        yield
    finally:
        if first:
            (folder / LOCK).unlink(missing_ok=True)
        lock.release()
        if first:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


def _holder(folder: Path) -> str:
    """The process that holds the lock of a folder, in words."""
    try:
        holder = json.loads((folder / LOCK).read_text("utf-8"))
        return f"process {int(holder['pid'])} on {str(holder['host'])[:100]!r}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _remove_litter(folder: Path) -> None:
    """Remove what processes left that were killed while they wrote to the folder."""
    for path in list(folder.iterdir()):
        if path.name != LOCK and is_temporary(path.name):
            if (path / REPLACED).is_dir() and not (folder / LAST).exists():
                files = [file for file in path.iterdir() if file.name != REPLACED]
                for file in sorted(files, key=lambda file: file.name == LAST):
                    file.replace(folder / file.name)
            shutil.rmtree(path, ignore_errors=True)
