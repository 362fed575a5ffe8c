"""Text for a person, whose terminal may be closed while the run goes on."""

from __future__ import annotations

import errno
import os
import stat
import sys
from contextlib import suppress
from typing import TextIO


def show(text: str, *, end: str = "\n", file: TextIO | None = None) -> None:
    """Print to `file`, stdout unless given, at once.

    What goes to a terminal that was closed is dropped, from then on: a run that its SIGHUP ends
    has results to write yet, and one that ignores it goes on. OSError for all else that cannot be
    written, such as a pipe without a reader.
    """
    try:
        print(text, end=end, file=file, flush=True)
    except OSError as error:
        descriptor = (sys.stdout if file is None else file).fileno()
        if error.errno != errno.EIO or not _was_terminal(descriptor):
            raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)  # the flush at exit would fail too, and change the exit code
        os.close(nowhere)


def say(line: str) -> None:
    """A line for the user on stderr; that nobody reads it, such as a closed pipe, is no error."""
    with suppress(OSError):
        show(line, file=sys.stderr)


def _was_terminal(descriptor: int) -> bool:
    """Whether it is a terminal that was closed: a device still, but none to talk to."""
    return stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor)
