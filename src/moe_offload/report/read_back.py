"""Reads back the folder that a run wrote, checked, as arrays and facts for figures."""

from __future__ import annotations

import csv
import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISREG
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from moe_offload.errors import UserError

Floats = npt.NDArray[np.float64]
T = TypeVar("T")

_REMEDY = "give the folder that a run wrote (src/main.py --output-dir)"
_LARGEST_DOCUMENT_BYTES = 2**26
_LARGEST_TABLE_BYTES = 2**32  # a hundred times a night's
_LARGEST_NUMBER = 1e18
# The files that figures need, and the columns besides `Index` and the phase of those with numbers.
_FILES = ("breakdown", "cachehit", "expert_choices", "token_gen_time")
_PARTS = ("attention", "router", "plan", "cpu", "gpu", "copy_wait", "combine", "rest_ms")
_HITS = ("Block_0", "Tokens", "Hits", "Misses", "Pairs")
_MAY_BE_EMPTY = (
    *("Accumulated Generation Throughput (tokens/s)", "CPU Frequency", "CPU Temperature"),
)
_TOKENS = ("Time", *_MAY_BE_EMPTY)


@dataclass(frozen=True)
class RunFiles:
    """One run: facts of run.json, and columns of its CSVs by name, empty cells as NaN.

    `cache` is (indexes N, ways M); 0 x 0, and no `policy`, without one. `breakdown`, `cachehit` and
    `tokens` are the number columns of out.csv, cache.csv and token_gen_time.csv; `decode` [P] says
    of each forward pass whether it decoded; `hits` [P, L] are the chosen experts that hit, by
    layer. `choices` is where expert_choices.csv lies. Facts that run.json lacks are empty or 0.
    """

    folder: Path
    label: str
    model: str
    machine: str
    n_experts: int | None
    n_threads: int
    cache: tuple[int, int]
    policy: str
    batch_size: int
    throughput: float
    decode: npt.NDArray[np.bool_] = field(repr=False)
    breakdown: dict[str, Floats] = field(repr=False)
    cachehit: dict[str, Floats] = field(repr=False)
    hits: Floats = field(repr=False)
    tokens: dict[str, Floats] = field(repr=False)
    choices: Path

    @property
    def n_layers(self) -> int:
        return int(self.hits.shape[1])


def read_runs(folders: Sequence[Path]) -> list[RunFiles]:
    """The runs of these folders, labelled by the shortest tails of their paths that differ."""
    resolved = [folder.resolve() for folder in folders]
    depth = 1
    labels = [folder.name for folder in resolved]
    while len(set(labels)) < len(set(resolved)) and depth < 20:
        depth += 1
        labels = ["/".join(folder.parts[-depth:]) for folder in resolved]
    return [read_run(folder, label) for folder, label in zip(folders, labels, strict=True)]


def read_run(folder: Path, label: str) -> RunFiles:
    """One run's files; UserError where one is missing or is not what a run writes.

    `folder` may name one of several run.json files in a folder, such as an unfinished run's.
    """
    named = folder.is_file() or folder.suffix == ".json"
    document = _Document(folder if named else _document_path(folder))
    folder = document.path.parent
    paths = {name: folder / document.fact(str, "files", name) for name in _FILES}
    decode, breakdown = _read_table(paths["breakdown"], _PARTS, "phase")
    decode_of_hits, cachehit = _read_table(paths["cachehit"], _HITS, "Phase")
    _, tokens = _read_table(paths["token_gen_time"], _TOKENS)
    _check_is_file(paths["expert_choices"], _LARGEST_TABLE_BYTES)
    if len(decode) != len(decode_of_hits):
        raise UserError(
            f"{folder}: expected {paths['breakdown'].name} and {paths['cachehit'].name} of one "
            f"run, found {len(decode)} and {len(decode_of_hits)} forward passes: {_REMEDY}"
        )
    document.fact(dict, "summary")
    n_choices = cachehit["Hits"] + cachehit["Misses"]
    counts = np.stack([cachehit["Tokens"], cachehit["Pairs"], n_choices])
    if (counts < 0).any() or (counts[:, cachehit["Pairs"] > 0] < 1).any():
        raise UserError(f"{paths['cachehit']}: expected counts that agree: run again")
    n_experts = document.fact(list, "model", "n_experts", default=[])
    on_gpu = document.fact(str, "model", "device", default="cpu") != "cpu"
    gpu = document.fact(str, "hardware", "gpu", "name", default="") if on_gpu else ""
    cpu = document.fact(str, "hardware", "cpu", default="")
    n, m = (document.fact(int, "model", f"cache_n{axis}", default=0) for axis in ("blocks", "ways"))
    return RunFiles(
        folder,
        label,
        model=document.fact(str, "model", "name", default=""),
        machine=" and ".join(filter(None, (cpu, gpu))),
        n_experts=max((n for n in n_experts if type(n) is int), default=None),
        n_threads=document.fact(int, "n_threads", default=0),
        cache=(n, m),
        policy=document.fact(str, "settings", "cache", "policy", default="").upper() if n else "",
        batch_size=document.fact(int, "settings", "generation", "batch_size", default=1),
        throughput=document.fact(float, "summary", "generation_throughput", default=0.0),
        decode=decode,
        breakdown=breakdown,
        cachehit=cachehit,
        hits=np.stack([cachehit[name] for name in cachehit if name.startswith("Block_")], axis=1),
        tokens=tokens,
        choices=paths["expert_choices"],
    )


def _document_path(folder: Path) -> Path:
    """The folder's run.json, or that of the last unfinished run."""
    path = folder / "run.json"
    if path.exists():
        return path
    unfinished = sorted(folder.glob("run.partial*.json"), key=lambda one: (len(one.name), one.name))
    if not unfinished:
        raise UserError(f"expected run.json in {folder}, found none: {_REMEDY}")
    return unfinished[-1]


class _Document:
    """run.json, whose facts are checked for their kind as they are asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        _check_is_file(path, _LARGEST_DOCUMENT_BYTES)
        try:
            self._content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(
                f"{path}: expected the JSON that a run writes, found another file: {_REMEDY}"
            ) from error

    def fact(self, kind: type[T], *names: str, default: T | None = None) -> T:
        """What lies under these names; where it is absent or null, `default` if there is one."""
        found: Any = self._content
        for name in names:
            found = found.get(name) if isinstance(found, dict) else None
        if found is None and default is not None:
            return default
        if kind is float and type(found) is int:
            found = float(found)
        if type(found) is not kind:
            raise UserError(
                f"{self.path}: expected the JSON that a run writes, found {found!r:.40} as its "
                f"{'.'.join(names)}: {_REMEDY}"
            )
        return found


def _check_is_file(path: Path, limit_bytes: int) -> None:
    """UserError for what is not there, waits for a writer, never ends, or is no run's."""
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(
            f"expected {path}, which cannot be read ({error.strerror}): {_REMEDY}"
        ) from (error)
    if not S_ISREG(status.st_mode):
        raise UserError(f"expected a file, found {path}, a folder, pipe or device: {_REMEDY}")
    if status.st_size > limit_bytes:
        raise UserError(
            f"expected {path} of at most {limit_bytes >> 20} MiB, found {status.st_size >> 20}: "
            f"{_REMEDY}"
        )


def _read_table(
    path: Path, required: Sequence[str], phase: str | None = None
) -> tuple[npt.NDArray[np.bool_], dict[str, Floats]]:
    """(where the column `phase` says decode, all other columns as numbers by name).

    UserError names the line of a bad cell.
    """
    _check_is_file(path, _LARGEST_TABLE_BYTES)
    decode, numbers = [], array("d")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            wanted = ["Index", *required, *([phase] if phase else [])]
            missing = [name for name in wanted if name not in header]
            if missing:
                raise UserError(
                    f"{path}, line 1: expected the columns {', '.join(missing)}, found "
                    f"{','.join(header)[:60]!r}: {_REMEDY}"
                )
            at = header.index(phase) if phase else len(header)
            for row in reader:
                if len(row) != len(header):
                    raise UserError(
                        f"{path}, line {reader.line_num}: expected {len(header)} cells, found "
                        f"{len(row)}: run again, the file is damaged"
                    )
                decode += [row.pop(at) == "decode"] if phase else []
                numbers.extend([float(cell or "nan") for cell in row])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"expected {path}, which cannot be read ({error}): {_REMEDY}") from error
    except ValueError as error:
        raise UserError(
            f"{path}, line {reader.line_num}: expected a number in every column but {phase}, found "
            f"{','.join(row)[:60]!r}: run again, the file is damaged"
        ) from error
    names = [name for name in header if name != phase]
    table = np.frombuffer(numbers, dtype=np.float64).reshape(-1, len(names)).T
    columns = dict(zip(names, table, strict=True))
    for name in names:
        known = columns[name][~np.isnan(columns[name])]
        if np.abs(known).max(initial=0) > _LARGEST_NUMBER or (
            name in wanted and name not in _MAY_BE_EMPTY and len(known) < table.shape[1]
        ):
            raise UserError(
                f"{path}: expected a number of sensible size in every line of column {name}: run "
                "again, the file is damaged"
            )
    return np.array(decode, dtype=bool), columns
