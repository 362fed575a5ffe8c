"""Files of our own: written whole or not at all, read back as the dataclass that they hold."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

from pydantic import TypeAdapter, ValidationError

from moe_offload.errors import UserError

T = TypeVar("T")

_LFS_POINTER: Final = b"version https://git-lfs"
LARGEST_JSON_BYTES: Final = 256 << 20  # the largest tokenizer.json in use has 35 MB


def write_atomically(path: Path, data: str | bytes) -> None:
    """Replace `path` by `data`: a reader sees the old file or the new one, never a part.

    OSError, with nothing left behind, where that cannot be.
    """
    write_together({path: [data]})


def write_together(parts: Mapping[Path, Iterable[str | bytes]]) -> None:
    """Write every file under a temporary name, then rename them all.

    OSError, naming the file, as for one.
    """
    path = Path()
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in parts}
    try:
        for path, of_file in parts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary[path].open("wb") as file:
                for part in of_file:
                    file.write(part.encode() if isinstance(part, str) else part)
                file.flush()
                os.fsync(file.fileno())
        for path in parts:
            temporary[path].replace(path)
    except OSError as error:
        error.filename = str(path)  # and not the temporary one
        raise
    finally:
        for leftover in temporary.values():
            with contextlib.suppress(OSError):
                leftover.unlink(missing_ok=True)
    for folder in {path.parent for path in parts}:
        sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def user_cache() -> Path:
    """Where this tool keeps what it can make again: in XDG_CACHE_HOME, else in ~/.cache."""
    configured = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(configured) if configured.startswith("/") else Path.home() / ".cache"
    return root / "moe-cpu-gpu-inference"


def require_regular(path: Path, limit_bytes: int | None = None) -> None:
    """UserError for what is no file with content of its own; OSError where there is nothing.

    That is a device, pipe or folder, which may never end, a file above the limit, and the pointer
    that a clone without git-lfs has in a file's place.
    """
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode):
        raise UserError(f"expected a file at {path}, found a folder, device or pipe; check it")
    if limit_bytes is not None and facts.st_size > limit_bytes:
        raise UserError(
            f"expected at most {limit_bytes >> 20} MiB in {path}, found {facts.st_size >> 20} MiB; "
            "check the file"
        )
    if facts.st_size < 1024:
        with path.open("rb") as file:
            if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise UserError(
                    f"{path} is a git-lfs pointer, not the file itself: run git lfs pull there, or "
                    "download it again"
                )


def read_json_object(
    path: Path,
    remedy: str = "download it again",
    object_hook: Callable[[dict[str, Any]], Any] | None = None,
) -> dict[str, Any]:
    """The object in a JSON file; UserError where there is none that can be read."""
    try:
        require_regular(path, LARGEST_JSON_BYTES)
        found = json.loads(path.read_bytes(), object_hook=object_hook)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged or unreadable; {remedy}") from error
    if not isinstance(found, dict):
        raise UserError(f"expected a JSON object in {path}, found {type(found).__name__}; {remedy}")
    return found


def from_json(kind: type[T], data: Any) -> T:
    """The inverse of `dataclasses.asdict` through JSON, checked against the fields' types.

    A field that is missing takes its default. ValueError, with the field's place, for what `asdict`
    of a `kind` cannot have given, and for what `kind` itself refuses.
    """
    try:
        return TypeAdapter(kind).validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(map(str, (kind.__name__, *first["loc"])))
        said, value = first["msg"].removeprefix("Value error, "), first["input"]
        found = "" if isinstance(value, (dict, list)) else f", found {value!r:.80}"
        raise ValueError(f"{place}: {said}{found}") from error
    except TypeError as error:  # of what JSON does not have, such as a date of YAML
        raise ValueError(f"{kind.__name__}: {error}") from error
