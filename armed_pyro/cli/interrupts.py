"""Ctrl-C and SIGTERM during ``armed-pyro fit``: the state is kept, and the way to go on is said."""

from __future__ import annotations

import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import typer

from armed_pyro.cli.console import err

__all__ = ["interruptible", "resume_command"]

INTERRUPTED, TERMINATED = 130, 143


def resume_command() -> str:
    """The running command with --resume, as text for a shell.

    >>> resume_command() != ""
    True
    """
    program, *arguments = sys.argv
    if Path(program).stem not in ("armed-pyro", "__main__"):
        return "the same command with --resume"
    start = (
        ["armed-pyro"] if Path(program).stem == "armed-pyro" else ["python", "-m", "armed_pyro.cli"]
    )
    return shlex.join([*start, *(a for a in arguments if a != "--resume"), "--resume"])


@contextmanager
def interruptible(checkpoint: Path) -> Iterator[None]:
    """End the command with code 130 after Ctrl-C, and with 143 after SIGTERM.

    Both unwind the code inside, so that temporary files are deleted; a message says whether the
    checkpoint is there to go on from.
    """
    terminated = False

    def terminate(_number: int, _frame: FrameType | None) -> None:
        nonlocal terminated
        terminated = True
        raise KeyboardInterrupt

    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, terminate) if in_main_thread else None
    try:
        yield
    except KeyboardInterrupt as error:
        kept = "nothing was kept, as the first window of steps was not over"
        if checkpoint.exists():
            kept = f"the state is kept in {checkpoint}. Go on with: {resume_command()}"
        err.print(f"{'Terminated' if terminated else 'Interrupted'}; {kept}", style="yellow")
        raise typer.Exit(TERMINATED if terminated else INTERRUPTED) from error
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, before)
