"""JSON files that others wrote: whatever is wrong with one is a sentence with its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moe_offload.errors import UserError


def read_json_object(path: Path, remedy: str = "download it again") -> dict[str, Any]:
    """The object in a JSON file; UserError where there is none that can be read."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged or unreadable; {remedy}") from error
    if not isinstance(found, dict):
        raise UserError(f"expected a JSON object in {path}, found {type(found).__name__}; {remedy}")
    return found
