"""The one exception for mistakes a person can mend."""

from __future__ import annotations

import re
from typing import Final

LONGEST_MESSAGE: Final = 2000


class UserError(Exception):
    """A user mistake or a bad file, told in one sentence.

    The message names what was expected, what was found and what to do. Entry points print it
    to stderr and exit with code 2; `--debug` shows the traceback as well.

    What it quotes may be anything: as text, it is one line, a control character is shown by its
    code, so that none reaches a terminal, and a long middle is left out.
    """

    def __str__(self) -> str:
        text = re.sub(r"\s*[\n\r\t]\s*", " ", super().__str__())
        if len(text) > LONGEST_MESSAGE:
            half = LONGEST_MESSAGE // 2
            text = f"{text[:half]} ... {text[-half:]}"
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
