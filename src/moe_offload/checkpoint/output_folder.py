"""An output folder between runs: who holds it, what an interrupted run left, what to remove."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from moe_offload.checkpoint.model_folders import MANIFEST_NAME
from moe_offload.checkpoint.safetensors_file import TEMPORARY_SUFFIX
from moe_offload.errors import UserError

RECORD_NAME: Final = "preparation.json"
_OUR_SHARD: Final = re.compile(r"(dense(-\d{5}-of-\d{5})?|experts-\d{5})\.safetensors")


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the folder against a second preparation; UserError when another one holds it.

    On a file system that cannot lock folders, such as some network ones, nothing is held.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"another preparation is writing to {folder}; wait until it has ended"
                ) from error
        yield
    finally:
        os.close(handle)


def read_record(folder: Path) -> dict[str, Any]:
    """The record of an interrupted preparation, empty when there is none or it is unreadable."""
    with suppress(OSError, ValueError, RecursionError):
        data = json.loads((folder / RECORD_NAME).read_bytes())
        if isinstance(data, dict) and isinstance(data.get("shards"), dict):
            return data
    return {}


def remove_temporary_files(folder: Path) -> None:
    """Remove what a killed run left half-written."""
    for path in folder.glob(f"*{TEMPORARY_SUFFIX}"):
        name = path.name.removesuffix(TEMPORARY_SUFFIX)
        if _OUR_SHARD.fullmatch(name) or name in (MANIFEST_NAME, RECORD_NAME):
            path.unlink(missing_ok=True)


def tidy(folder: Path) -> None:
    """Remove what a run killed just after it wrote the manifest left behind."""
    remove_temporary_files(folder)
    (folder / RECORD_NAME).unlink(missing_ok=True)


def remove_prepared(folder: Path) -> None:
    """Remove a complete preparation, the manifest first; only files that it names and are ours.

    UserError when `manifest.json` belongs to something else.
    """
    path = folder / MANIFEST_NAME
    names: list[str] = []
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        data = json.loads(path.read_bytes())
        if "format_version" not in data:
            raise UserError(
                f"{path} belongs to another program, so --force does not replace it; "
                "choose another --output-path"
            )
        names = [str(entry["file"]) for entry in (*data["dense"], *data["moe_layers"])]
    path.unlink(missing_ok=True)
    remove_shards(folder, names)


def remove_shards(folder: Path, names: Iterable[str]) -> None:
    """Remove these shards; a name that no shard of ours can have is left alone."""
    for name in names:
        if _OUR_SHARD.fullmatch(name):
            (folder / name).unlink(missing_ok=True)
