"""How every entry point reads its command line: a mistake in it is one sentence."""

from __future__ import annotations

import argparse
from typing import NoReturn

from errors import UserError


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, but a mistake raises UserError instead of printing the usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")
