"""The one exception for mistakes a person can mend."""

from __future__ import annotations

import re
from typing import Final

LONGEST_MESSAGE: Final = 2000
FEW_THREADS: Final = (
    "the system refuses this program another thread: raise the limit (ulimit -u, a container's "
    "pids), or ask for fewer with OMP_NUM_THREADS"
)


class UserError(Exception):
    """A user mistake or a bad file, told in one sentence.

    The message names what was expected, what was found and what to do. Entry points print it
    to stderr and exit with code 2; `--debug` shows the traceback as well.

    What it quotes may be anything: as text, it is one line, a control character is shown by its
    code, so that none reaches a terminal, and a long middle is left out.
    """

    def __str__(self) -> str:
        return plain(re.sub(r"\s*[\n\r\t]\s*", " ", super().__str__()))


def plain(line: str) -> str:
    """`line` without characters that a terminal obeys, and its middle cut out if it is too long."""
    if len(line) > LONGEST_MESSAGE:
        half = LONGEST_MESSAGE // 2
        line = f"{line[:half]} ... {line[-half:]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
