"""Reads back the folder that a run wrote, checked, as arrays for figures."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_offload.errors import UserError

Floats = npt.NDArray[np.float64]

_FOLDER_REMEDY = "give the folder that a run wrote (src/main.py --output-dir)"


@dataclass(frozen=True)
class RunFiles:
    """One run: columns of its CSVs by name, empty cells as NaN.

    `breakdown`, `cachehit` and `tokens` are the number columns of out.csv, cache.csv and
    token_gen_time.csv; `decode` [P] says of each forward pass whether it decoded; `hits` [P, L]
    are the chosen experts that hit, by layer. `choices` is where expert_choices.csv lies.
    """

    folder: Path
    label: str
    document: dict[str, Any]
    decode: npt.NDArray[np.bool_]
    breakdown: dict[str, Floats] = field(repr=False)
    cachehit: dict[str, Floats] = field(repr=False)
    hits: Floats = field(repr=False)
    tokens: dict[str, Floats] = field(repr=False)
    choices: Path

    @property
    def n_layers(self) -> int:
        return int(self.hits.shape[1])

    @property
    def summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = self.document["summary"]
        return summary

    @property
    def batch_size(self) -> int:
        generation = (self.document.get("settings") or {}).get("generation") or {}
        return int(generation.get("batch_size") or 1)

    def fact(self, group: str, name: str) -> Any:
        """A fact of run.json, or None."""
        return (self.document.get(group) or {}).get(name)


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
    folder = path.parent
    document = _read_document(path)
    names = document["files"]
    phases, breakdown = _read_numbers(
        folder / names["breakdown"], ["Index", "attn", "step_ms", "rest_ms"], text="phase"
    )
    _, cachehit = _read_numbers(
        folder / names["cachehit"], ["Index", "Block_0", "Pairs", "Hits"], text="Phase"
    )
    _, tokens = _read_numbers(folder / names["token_gen_time"], ["Index", "Time", "Timestamp"])
    blocks = [name for name in cachehit if name.startswith("Block_")]
    hits = np.stack([cachehit[name] for name in blocks], axis=1)
    if len(hits) != len(phases):
        raise UserError(
            f"{folder}: expected {names['breakdown']} and {names['cachehit']} of one run, found "
            f"{len(phases)} and {len(hits)} forward passes: {_FOLDER_REMEDY}"
        )
    decode = np.array([phase == "decode" for phase in phases])
    choices = folder / names["expert_choices"]
    return RunFiles(folder, label, document, decode, breakdown, cachehit, hits, tokens, choices)


def _document_path(folder: Path) -> Path:
    """The folder's run.json, or that of the last unfinished run."""
    path = folder / "run.json"
    if path.is_file():
        return path
    unfinished = sorted(folder.glob("run.partial*.json"), key=lambda one: (len(one.name), one.name))
    if not unfinished:
        raise UserError(f"expected run.json in {folder}, found none: {_FOLDER_REMEDY}")
    return unfinished[-1]


def _read_document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        files, summary = document["files"], document["summary"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = error.strerror if isinstance(error, OSError) else "another file"
        raise UserError(
            f"{path}: expected the JSON that a run writes, found {found}: {_FOLDER_REMEDY}"
        ) from error
    expected = {"breakdown", "cachehit", "expert_choices", "token_gen_time"}
    if not (isinstance(files, dict) and expected <= set(files) and isinstance(summary, dict)):
        raise UserError(f"{path}: expected the names of the run's files: {_FOLDER_REMEDY}")
    return dict(document)


def _read_numbers(
    path: Path, required: Sequence[str], text: str | None = None
) -> tuple[list[str], dict[str, Floats]]:
    """(the `text` column, all other columns as numbers); UserError names the line of a bad cell."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            missing = [
                name for name in [*required, *([text] if text else [])] if name not in header
            ]
            if missing:
                raise UserError(
                    f"{path}, line 1: expected the columns {', '.join(missing)}, found "
                    f"{','.join(header)[:60]!r}: {_FOLDER_REMEDY}"
                )
            rows = []
            for row in reader:
                if len(row) != len(header):
                    raise UserError(
                        f"{path}, line {reader.line_num}: expected {len(header)} cells, found "
                        f"{len(row)}: run again, the file is damaged"
                    )
                rows.append(row)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"expected {path}, which cannot be read ({error}): {_FOLDER_REMEDY}") from (
            error
        )
    texts: list[str] = []
    numbers: dict[str, Floats] = {}
    for column, name in enumerate(header):
        cells = [row[column] for row in rows]
        if name == text:
            texts = cells
        else:
            numbers[name] = _numbers(path, name, cells)
    return texts, numbers


def _numbers(path: Path, name: str, cells: Sequence[str]) -> Floats:
    try:
        return np.array([float(cell) if cell else np.nan for cell in cells], dtype=np.float64)
    except ValueError:
        line = next(n for n, cell in enumerate(cells, 2) if cell and not _is_number(cell))
        raise UserError(
            f"{path}, line {line}: expected a number in column {name}, found "
            f"{cells[line - 2][:20]!r}: run again, the file is damaged"
        ) from None


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
