"""The one exception for mistakes a person can mend."""

from __future__ import annotations


class UserError(Exception):
    """A user mistake or a bad file, told in one sentence.

    The message names what was expected, what was found and what to do. Entry points print it
    to stderr and exit with code 2; `--debug` shows the traceback as well.
    """
