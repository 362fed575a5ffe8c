"""JSON files that others wrote: whatever is wrong with one is a sentence with its name.

The one exception for mistakes a person can mend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class UserError(Exception):
    """A user mistake or a bad file, told in one sentence.

    The message names what was expected, what was found and what to do. Entry points print it
    to stderr and exit with code 2; `--debug` shows the traceback as well.
    """


def read_json_object(path: Path, remedy: str = "download it again") -> dict[str, Any]:
    """The object in a JSON file; UserError where there is none that can be read."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged or unreadable; {remedy}") from error
    if not isinstance(found, dict):
        raise UserError(f"expected a JSON object in {path}, found {type(found).__name__}; {remedy}")
    return found
