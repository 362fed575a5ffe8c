"""Files of our own: written whole or not at all, read back as the dataclass that they hold."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Final, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

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

    A field is a bool, int, float, str, None, Path, Literal, tuple, list, dict, another dataclass
    or a union of these. A field that is missing takes its default. ValueError, with the field's
    place, for what `asdict` of a `kind` cannot have given, and for what `kind` itself refuses.
    """
    return _read(kind, data, kind.__name__)  # type: ignore[no-any-return]


def _read(kind: Any, data: Any, place: str) -> Any:
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    if is_dataclass(kind):
        return _read_dataclass(kind, data, place)
    if origin in (Union, UnionType):
        for option in arguments:
            with contextlib.suppress(ValueError):
                return _read(option, data, place)
    elif (
        origin is Any
        or (origin is NoneType and data is None)
        or (origin is Literal and data in arguments)
    ):
        return data
    elif origin is Path and isinstance(data, str):
        return Path(data)
    elif origin is float and type(data) in (int, float):
        return float(data)
    elif origin in (bool, int, str) and type(data) is origin:
        return data
    elif origin in (tuple, list) and isinstance(data, list):
        if origin is list or arguments[1:] == (...,):
            arguments = arguments[:1] * len(data)
        if len(arguments) == len(data):
            parts = zip(arguments, data, strict=True)
            return origin(_read(of, part, f"{place}[{i}]") for i, (of, part) in enumerate(parts))
    elif isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(data, dict):
        of = arguments[1] if arguments else Any
        return {key: _read(of, value, f"{place}.{key}") for key, value in data.items()}
    choices = f"one of {', '.join(map(str, arguments))}" if origin is Literal else None
    expected = choices or getattr(kind, "__name__", kind)
    raise ValueError(f"{place}: expected {expected}, found {data!r:.80}")


def _read_dataclass(kind: Any, data: Any, place: str) -> Any:
    if not isinstance(data, dict):
        raise ValueError(f"{place}: expected an object, found {data!r:.80}")
    types = _types_of(kind)
    unknown = data.keys() - {field.name for field in fields(kind)}
    if unknown:
        raise ValueError(f"{place}: unknown field {min(unknown)!r:.80}")
    values = {name: _read(types[name], value, f"{place}.{name}") for name, value in data.items()}
    try:
        return kind(**values)
    except (TypeError, AssertionError) as error:
        raise ValueError(f"{place}: {error}") from error


@cache  # the names of types are read anew each time, and a manifest has hundreds of objects
def _types_of(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)
