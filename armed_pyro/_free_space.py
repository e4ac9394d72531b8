"""Free space on a disk, looked at before much is written."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

__all__ = ["check_free", "free_bytes"]


def check_free(folder: Path, needed: int, what: str) -> None:
    """Raise OSError if the file system of a folder, which may not exist yet, lacks this many bytes.

    >>> check_free(Path(), 0, "nothing")
    """
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    free = free_bytes(folder)
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"the disk of {folder} has {free / 1e6:.1f} MB free, and {what} takes at least "
            f"{needed / 1e6:.1f} MB: delete files, or choose a folder on another disk",
        )


def free_bytes(folder: Path) -> int:
    """Bytes that can be written to the file system of a folder.

    >>> free_bytes(Path()) >= 0
    True
    """
    return shutil.disk_usage(folder).free
