"""The folder of compiled steps, which nobody but the user may write to.

Torch's compiler reads pickles and shared libraries from its cache, so whoever can write there runs
code in the user's process. By default that is a folder of a known name under the system's temporary
folder.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from platformdirs import user_cache_path

__all__ = ["check_private", "private_cache"]

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
ADVICE = f"Set {VARIABLE} to a folder that only you can write to"


@contextmanager
def private_cache() -> Iterator[Path]:
    """Torch's compiler uses a folder of the user's, with mode 700, while the context lasts.

    It is the one that the environment variable TORCHINDUCTOR_CACHE_DIR names, or ``armed_pyro``
    among the user's caches. PermissionError if others may write to it, or could replace it.
    """
    before = os.environ.get(VARIABLE)
    folder = Path(before) if before else user_cache_path("armed_pyro") / "compiled"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise PermissionError(f"the compiler's cache {folder}: {error}. {ADVICE}") from error
    check_private(folder)
    os.environ[VARIABLE] = str(folder)
    try:
        yield folder
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def check_private(folder: Path) -> None:
    """Raise PermissionError unless only the user, and root, may change a folder or replace it."""
    if os.name == "nt":  # the folders of a user's profile have access lists instead of modes
        return
    user, group = os.getuid(), os.getgid()
    folder = folder.resolve()
    for path in (folder, *folder.parents):
        found = path.stat()
        mode = stat.S_IMODE(found.st_mode)
        others = stat.S_IWOTH if found.st_gid == group and path != folder else 0o022
        # In a sticky folder nobody can rename what belongs to someone else.
        writable = mode & others and (path == folder or not mode & stat.S_ISVTX)
        if found.st_uid not in (user, 0) or (path == folder and found.st_uid != user) or writable:
            raise PermissionError(
                f"the compiler's cache {folder} is not used, as others may write to {path} (mode "
                f"{mode:o}, owner {found.st_uid}): they could run code in this process. {ADVICE}"
            )
