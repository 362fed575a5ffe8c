"""Reads back the folder that a run wrote, checked, as arrays and facts for figures."""

from __future__ import annotations

import csv
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, TypeVar

import numpy as np
import numpy.typing as npt

from moe_offload.errors import UserError
from moe_offload.files import read_json_object, require_regular

Floats = npt.NDArray[np.float64]
T = TypeVar("T")

_REMEDY = "give the folder that a run wrote (src/main.py --output-dir)"
_LARGEST_TABLE_BYTES = 2**32  # a hundred times a night's
_LARGEST_NUMBER = 1e18
_MAY_BE_EMPTY = (
    *("Accumulated Generation Throughput (tokens/s)", "CPU Frequency", "CPU Temperature"),
)
# What figures need of each CSV: the column that names the phase, and those with numbers.
_COLUMNS = {
    "breakdown": (
        *("phase", "Index", "attention", "router", "plan", "cpu", "gpu", "copy_wait", "combine"),
        "rest_ms",
    ),
    "cachehit": ("Phase", "Index", "Block_0", "Tokens", "Hits", "Misses", "Pairs"),
    "token_gen_time": ("", "Index", "Time", *_MAY_BE_EMPTY),
}


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
    path = folder if named else _document_path(folder)
    document, folder = read_json_object(path, _REMEDY), path.parent

    def fact(kind: type[T], names: str, default: T | None = None) -> T:
        """What lies under these names; where it is absent or null, `default` if there is one."""
        found: Any = document
        for name in names.split("."):
            found = found.get(name) if isinstance(found, dict) else None
        if found is None and default is not None:
            return default
        if kind is float and type(found) is int:
            found = float(found)
        if type(found) is not kind:
            raise UserError(
                f"{path}: expected the JSON that a run writes, found {found!r:.40} as its {names}: "
                f"{_REMEDY}"
            )
        return found

    paths = {name: folder / fact(str, f"files.{name}") for name in (*_COLUMNS, "expert_choices")}
    tables = [_read_table(paths[name], *columns) for name, columns in _COLUMNS.items()]
    (decode, breakdown), (decode_of_hits, cachehit), (_, tokens) = tables
    with _opened(paths["expert_choices"]):
        pass
    if len(decode) != len(decode_of_hits):
        raise UserError(
            f"{folder}: expected {paths['breakdown'].name} and {paths['cachehit'].name} of one "
            f"run, found {len(decode)} and {len(decode_of_hits)} forward passes: {_REMEDY}"
        )
    hits = np.stack([cachehit[name] for name in cachehit if name.startswith("Block_")], axis=1)
    pairs, most_pairs = cachehit["Pairs"], cachehit["Tokens"] * hits.shape[1]
    n_choices = cachehit["Hits"] + cachehit["Misses"]
    if not ((pairs >= 0) & (pairs <= n_choices) & (pairs <= most_pairs)).all():
        raise UserError(f"{paths['cachehit']}: expected counts that agree: run again")
    fact(dict, "summary")
    on_gpu = fact(str, "model.device", "cpu") != "cpu"
    gpu = fact(str, "hardware.gpu.name", "") if on_gpu else ""
    n, m = fact(int, "model.cache_nblocks", 0), fact(int, "model.cache_nways", 0)
    return RunFiles(
        folder,
        label,
        model=fact(str, "model.name", ""),
        machine=" and ".join(filter(None, (fact(str, "hardware.cpu", ""), gpu))),
        n_experts=max(
            (n for n in fact(list, "model.n_experts", []) if type(n) is int), default=None
        ),
        n_threads=fact(int, "n_threads", 0),
        cache=(n, m),
        policy=fact(str, "settings.cache.policy", "").upper() if n else "",
        batch_size=fact(int, "settings.generation.batch_size", 1),
        throughput=fact(float, "summary.generation_throughput", 0.0),
        decode=decode,
        breakdown=breakdown,
        cachehit=cachehit,
        hits=hits,
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


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    """The text of a CSV; UserError for what is not there, waits for a writer, or never ends."""
    try:
        require_regular(path, _LARGEST_TABLE_BYTES)
        with path.open(newline="", encoding="utf-8") as file:
            yield file
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"expected {path}, which cannot be read ({reason}): {_REMEDY}") from error


def _read_table(
    path: Path, phase: str, *required: str
) -> tuple[npt.NDArray[np.bool_], dict[str, Floats]]:
    """(where the column `phase` says decode, all other columns as numbers by name).

    UserError names the line of a bad cell.
    """
    decode, numbers = [], array("d")
    with _opened(path) as file:
        reader = csv.reader(file)
        header = next(reader, [])
        missing = [name for name in (*required, phase) if name and name not in header]
        if missing:
            raise UserError(
                f"{path}, line 1: expected the columns {', '.join(missing)}, found "
                f"{','.join(header)[:60]!r}: {_REMEDY}"
            )
        for row in reader:
            try:
                cells = dict(zip(header, row, strict=True))
                decode.append(cells.pop(phase, "") == "decode")
                numbers.extend([float(cell or "nan") for cell in cells.values()])
            except ValueError as error:
                raise UserError(
                    f"{path}, line {reader.line_num}: expected {len(header)} cells, a number in "
                    f"every column but {phase}, found {','.join(row)[:60]!r}: run again, the file "
                    "is damaged"
                ) from error
    names = [name for name in dict.fromkeys(header) if name != phase]
    table = np.frombuffer(numbers, dtype=np.float64).reshape(-1, len(names)).T
    columns = dict(zip(names, table, strict=True))
    for name, values in columns.items():
        whole = name in required and name not in _MAY_BE_EMPTY
        if (np.abs(values) > _LARGEST_NUMBER).any() or (whole and np.isnan(values).any()):
            raise UserError(
                f"{path}: expected a number of sensible size in every line of column {name}: run "
                "again, the file is damaged"
            )
    return np.array(decode, dtype=bool), columns
