"""Where a run's results go: each to a file of its own that can be written, found out before it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from moe_offload.config import Config
from moe_offload.errors import UserError
from moe_offload.report.report_paths import ReportPaths

_FLAGS = {"breakdown": "--breakdown-csv", "cachehit": "--cachehit-csv"}


def check_destinations(config: Config, paths: ReportPaths) -> None:
    """Make the folders of all results and try them; no file is left in them.

    UserError names the flag to change: for a folder that cannot be written, a folder in a file's
    place, two results in one file, a result in the place of the prompts, and responses in a folder
    that neither is there nor is one of the other results'.
    """
    wanted: list[tuple[str, Path]] = []
    if config.output.record:
        # The names that nobody chose first: what takes one of them was asked for by its flag.
        named = sorted(paths.by_name().items(), key=lambda one: one[0] in _FLAGS)
        wanted += [(_FLAGS.get(name, "--output-dir"), path) for name, path in named]
    if config.output.responses_jsonl is not None:
        folder = config.output.responses_jsonl.parent
        made = {path.parent.resolve() for _, path in wanted}
        if not folder.exists() and folder.resolve() not in made:
            raise UserError(
                f"expected --responses-jsonl in a folder that is there, found no {folder}: make it "
                "or correct the path"
            )
        wanted.append(("--responses-jsonl", config.output.responses_jsonl))
    taken: dict[Path, str] = {}
    if config.prompts.path is not None:
        taken[config.prompts.path.resolve()] = "the prompts are read from"
    for flag, path in wanted:
        if path.is_dir():
            raise UserError(f"cannot write {path}: it is a folder; name a file with {flag}")
        if path.exists() and not path.is_file() and flag != "--responses-jsonl":
            raise UserError(  # the finished file would take the device's place
                f"cannot write {path}: it is a device or pipe, not a file; name a file with {flag}"
                ", or --no-record"
            )
        if path.resolve() in taken:
            raise UserError(f"{taken[path.resolve()]} {path}: choose another file with {flag}")
        taken[path.resolve()] = "another of the run's files goes to"
        _try_folder(path.parent, flag)


def _try_folder(folder: Path, flag: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror
        remedy = "" if flag == "--responses-jsonl" else ", or --no-record"
        raise UserError(
            f"cannot write results to {folder.resolve()} ({reason}): choose another {flag}{remedy}"
        ) from error
