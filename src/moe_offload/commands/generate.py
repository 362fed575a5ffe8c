"""Generate text with a Mixture-of-Experts model that does not fit in the GPU: the command line.

Parses and checks what can be checked at once: the flags, the model's folder, the prompts, and that
each result has a file of its own that can be written. Then loads and runs (`run.py`).
"""

from __future__ import annotations

import sys
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from moe_offload import VERSION
from moe_offload.checkpoint.folders import require_prepared
from moe_offload.commands.answers import Answers
from moe_offload.commands.arguments import build_parser, parse, parse_config, started_as
from moe_offload.commands.prompts import LeftOut, read_prompts
from moe_offload.config import Config
from moe_offload.errors import UserError
from moe_offload.kernels.library import describe_kernels
from moe_offload.machine.terminal import (
    EXIT_USER_ERROR,
    Interruption,
    complain,
    open_closed_streams,
    say,
    show,
)
from moe_offload.report.files import ReportPaths, same_file_as, versions
from moe_offload.simulation.shapes import shape_config
from moe_offload.simulation.trace_files import TraceReader

_FLAGS = {"breakdown": "--breakdown-csv", "cachehit": "--cachehit-csv"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    open_closed_streams()
    with Interruption() as interruption:
        try:
            return _main(argv, interruption)
        except KeyboardInterrupt:
            say(f"interrupted ({interruption.name}) before any token: no file was written")
            return interruption.exit_code
        except BrokenPipeError:  # such as `| head`: there is nobody left to tell
            return EXIT_USER_ERROR
        except (UserError, OSError) as error:
            if "--debug" in argv:
                traceback.print_exc()
            complain(error)
            return EXIT_USER_ERROR


def _main(argv: Sequence[str], interruption: Interruption) -> int:
    arguments = parse(argv)
    if arguments.version:
        show(_version_text())
        return 0
    if not argv:
        build_parser().print_usage(sys.stderr)
    config = parse_config(arguments)
    _check_sources(config)
    # The imports below are not at the top because torch and transformers take seconds to load:
    # help, versions and what is found wrong so far need not wait for them.
    if arguments.show_calibration:
        say("loading, then measuring ...")
        from moe_offload.commands.measure import show_calibration

        show_calibration(config)
        return 0
    prompts, left_out = read_prompts(config.prompts, config.generation)
    paths = ReportPaths.in_folder(
        config.output.output_dir, config.output.breakdown_csv, config.output.cachehit_csv
    )
    check_destinations(config, paths)
    with ExitStack() as stack:
        answers = None
        if config.output.responses_jsonl is not None:
            answers = stack.enter_context(Answers(config.output.responses_jsonl, config))
            prompts = answers.unanswered(prompts)
            if not prompts:
                say(f"all {answers.n_before} prompts are answered in {answers.path}")
                return _left_out_code(left_out)
        if not config.output.quiet:
            say(f"loading {config.model.model_path or config.model.dummy_shape} ...")
        from moe_offload.commands.run import run

        command = [started_as("src/main.py"), *argv]
        code = run(config, prompts, left_out, answers, paths, command, interruption)
    return code or _left_out_code(left_out)


def _left_out_code(left_out: LeftOut) -> int:
    """The exit code of a run that did all the others."""
    if not left_out.reasons:
        return 0
    n_lines = len(left_out.reasons)
    complain(
        f"{n_lines} line{'s'[: n_lines > 1]} of {left_out.path} could not be answered (left out, "
        "see above); all others are"
    )
    return EXIT_USER_ERROR


def _check_sources(config: Config) -> None:
    """UserError where the model or a trace is not there, or is not one."""
    if config.model.model_path is not None:
        require_prepared(config.model.model_path)
    if config.model.dummy_shape is not None:
        shape_config(config.model.dummy_shape, config.model.dummy_layers)
    for trace in (config.model.routing_trace, config.cache.trace):
        if trace is not None:
            TraceReader(trace)


def check_destinations(config: Config, paths: ReportPaths) -> None:
    """Make the folders of all results and try them; no file is left in them.

    UserError names the flag to change: for a folder that cannot be written, a folder in a file's
    place, two results in one file, a result in the place of what the run reads (the model, the
    prompts, a trace: under whatever name), and responses in a folder that neither is there nor is
    one of the other results'.
    """
    wanted: list[tuple[str, Path]] = []
    if config.output.record:
        # The names that nobody chose first: what takes one of them was asked for by its flag.
        named = sorted(paths.items(), key=lambda one: one[0] in _FLAGS)
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
    read = (
        ("the model is", config.model.model_path),
        ("the prompts are", config.prompts.path),
        ("a trace is", config.model.routing_trace),
        ("a trace is", config.cache.trace),
    )
    taken: set[Path] = set()
    for flag, path in wanted:
        another = f"choose another file with {flag}"
        if path.is_dir():
            raise UserError(f"cannot write {path}: it is a folder; name a file with {flag}")
        if path.exists() and not path.is_file() and flag != "--responses-jsonl":
            raise UserError(  # the finished file would take the device's place
                f"cannot write {path}: it is a device or pipe, not a file; name a file with {flag}"
                ", or --no-record"
            )
        for what, source in read:
            if source is not None and (same := same_file_as(path, [source])) is not None:
                also = "" if same == path else f", the same file as {same}"
                raise UserError(f"{what} read from {path}{also}: {another}")
        if path.resolve() in taken or same_file_as(path, taken) is not None:
            raise UserError(f"another of the run's files goes to {path}: {another}")
        taken.add(path.resolve())
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


def _version_text() -> str:
    lines = [f"moe-cpu-gpu-inference {VERSION}", *describe_kernels()]
    lines += [f"{name} {number}" for name, number in versions().items() if number]
    return "\n".join(lines)
