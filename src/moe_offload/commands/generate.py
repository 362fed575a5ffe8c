"""Generate text with a Mixture-of-Experts model that does not fit in the GPU: the command line.

Parses, checks what can be checked at once, then loads and runs (`run.py`).

Where a run's results go: each to a file of its own that can be written, found out before it."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

from moe_offload import VERSION
from moe_offload.checkpoint.folders import require_prepared
from moe_offload.commands.arguments import build_parser, parse, parse_config, read_prompts
from moe_offload.config import Config
from moe_offload.errors import UserError
from moe_offload.kernels.library import describe_kernels
from moe_offload.machine.terminal import Interruption, say
from moe_offload.report.files import ReportPaths, versions
from moe_offload.simulation.shapes import shape_config
from moe_offload.simulation.trace_files import TraceReader

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


EXIT_USER_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    debug = "--debug" in argv
    with Interruption() as interruption:
        try:
            return _main(argv, interruption)
        except KeyboardInterrupt:
            say(f"interrupted ({interruption.name}) before any token: no file was written")
            return interruption.exit_code
        except BrokenPipeError:  # such as `| head`: there is nobody left to tell
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_USER_ERROR
        except (UserError, OSError) as error:
            if debug:
                traceback.print_exc()
            say(f"error: {' '.join(str(error).split())}")
            return EXIT_USER_ERROR


def _main(argv: Sequence[str], interruption: Interruption) -> int:
    arguments = parse(argv)
    if arguments.version:
        print(_version_text())
        return 0
    if not argv:
        build_parser().print_usage(sys.stderr)
    config = parse_config(arguments)
    _check_sources(config)
    # The imports below are not at the top because torch and transformers take seconds to load:
    # help, versions and what is found wrong so far need not wait for them.
    if arguments.show_calibration:
        from moe_offload.commands.measure import show_calibration

        show_calibration(config)
        return 0
    texts = read_prompts(config.prompts)
    paths = ReportPaths.in_folder(
        config.output.output_dir, config.output.breakdown_csv, config.output.cachehit_csv
    )
    check_destinations(config, paths)
    from moe_offload.commands.run import run

    return run(config, texts, paths, argv, interruption)


def _check_sources(config: Config) -> None:
    """UserError where the model or a trace is not there, or is not one."""
    if config.model.model_path is not None:
        require_prepared(config.model.model_path)
    if config.model.dummy_shape is not None:
        shape_config(config.model.dummy_shape, config.model.dummy_layers)
    for trace in (config.model.routing_trace, config.cache.trace):
        if trace is not None:
            TraceReader(trace)


def _version_text() -> str:
    lines = [f"moe-cpu-gpu-inference {VERSION}", *describe_kernels()]
    lines += [f"{name} {number}" for name, number in versions().items() if number]
    return "\n".join(lines)
