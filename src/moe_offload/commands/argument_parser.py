"""How every entry point reads its command line: a mistake in it is one sentence."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from moe_offload.errors import UserError


def a_path(text: str) -> Path:
    """The path that an argument names; an empty text, such as a variable unset, names none."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, found an empty text")
    return Path(text)


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, but a mistake raises UserError instead of printing the usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")
